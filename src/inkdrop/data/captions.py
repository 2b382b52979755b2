"""Captions: scenes of one drawn thing or two in words, and which of them are held out of training."""

from __future__ import annotations

import hashlib
import itertools
import re
from functools import cache
from typing import NamedTuple

from inkdrop.data.arrays import check_split
from inkdrop.errors import BadArgument

__all__ = [
    "COLOURS",
    "PLACES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Scene",
    "Thing",
    "combinations",
    "scene_of",
    "text_of",
]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 165, 60),
    "cyan": (40, 195, 215),
    "blue": (40, 75, 220),
    "purple": (145, 50, 185),
    "pink": (250, 130, 190),
}
"""The 8-bit red, green and blue of each colour."""

SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")

RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
"""Where the first thing lies, seen from the second: the sign of x (to the right) and of y (down)."""

_COLUMNS, _ROWS = ("left", "", "right"), ("top", "", "bottom")


def _place(column: str, row: str) -> str:
    if column and row:
        return f"at the {row} {column}"
    return f"at the {row}" if row else f"on the {column}" if column else "in the middle"


PLACES = {_place(_COLUMNS[i], _ROWS[j]): (i - 1, j - 1) for j in range(3) for i in range(3)}
"""Where a single thing lies in the picture: the column and the row, each −1, 0 or 1."""


class Thing(NamedTuple):
    """What is drawn: a colour, a shape, and a size, "" where it is left unsaid."""

    colour: str
    shape: str
    size: str = ""


class Scene(NamedTuple):
    """One thing and its place in the picture, or two and how the first lies to the second; "" where it is unsaid."""

    first: Thing
    relation: str = ""
    second: Thing | None = None


def text_of(scene: Scene) -> str:
    """The caption: "a small red circle at the top left", "a small red circle above a large blue square"."""
    things = [" ".join(filter(None, (t.size, t.colour, t.shape))) for t in (scene.first, scene.second) if t]
    things = [f"{'an' if said[0] in 'aeiou' else 'a'} {said}" for said in things]
    return " ".join(filter(None, [things[0], scene.relation, *things[1:]]))


def scene_of(text: str) -> Scene:
    """The scene of a caption.

    Raises:
        BadArgument: it is not of the form of `text_of`.
    """
    one = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    form = rf"{one}(?: ({'|'.join(PLACES)})| ({'|'.join(RELATIONS)}) {one})?"
    found = re.fullmatch(form, " ".join(text.lower().split()))
    if found is None:
        raise BadArgument(f"scene: got {text!r}, need a caption like 'a small red circle above a large blue square'")
    size, colour, shape, place, relation, *second = found.groups()
    first = Thing(colour, shape, size or "")
    if relation is None:
        return Scene(first, place or "")
    return Scene(first, relation, Thing(second[1], second[2], second[0] or ""))


def _unseen(thing: Thing) -> bool:
    """Whether a thing is never drawn in training: 24 of 64, never both sizes of a colour and shape."""
    colour, shape = list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)
    return (colour + shape + 4 * SIZES.index(thing.size)) % 8 in (0, 3, 6)


def _held_out(scene: Scene) -> bool:
    """Whether a combination is of the test split; "a above b" and "b below a" are the same one."""
    if scene.second is None:
        return _unseen(scene.first)
    if _unseen(scene.first) or _unseen(scene.second):
        return True
    other = {"below": "above", "right of": "left of"}.get(scene.relation)
    same = Scene(scene.second, other, scene.first) if other else scene
    return hashlib.sha256(text_of(same).encode()).digest()[0] < 32


@cache
def combinations(split: str, things: int) -> tuple[Scene, ...]:
    """Every scene of a split with one thing or with two of unlike colours, said whole.

    Args:
        split: "train" or "test"; no scene is in both, whichever way it is said.
        things: 1 (360 and 216 scenes) or 2 (4,928 and 9,408).

    Raises:
        BadArgument: another split or number.
    """
    check_split(split)
    if things not in (1, 2):
        raise BadArgument(f"scenes things: got {things}, need 1 or 2")
    kinds = [Thing(*names) for names in itertools.product(COLOURS, SHAPES, SIZES)]
    if things == 1:
        every = [Scene(thing, place) for thing in kinds for place in PLACES]
    else:
        pairs = [(a, b) for a in kinds for b in kinds if a.colour != b.colour]
        every = [Scene(a, relation, b) for a, b in pairs for relation in RELATIONS]
    return tuple(scene for scene in every if _held_out(scene) == (split == "test"))
