"""Scenes: whether a picture shows what its caption says, judged by a program: colour, shape, size and relation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from inkdrop.core.check import check_range
from inkdrop.data.captions import COLOURS, PLACES, RELATIONS, SHAPES, Scene, Thing, scene_of
from inkdrop.data.scenes import AREAS, cover
from inkdrop.errors import BadArgument, BadShape
from inkdrop.evals.interval import wilson

__all__ = ["Found", "Rate", "Verdict", "find_things", "judge", "rates"]

_BORDER = math.sqrt(AREAS["small"][1] * AREAS["large"][0])
"""The area from which on a thing is large: the geometric mean of the greatest small and the least large one."""

_SPECK = AREAS["small"][0] / 3
"""What is smaller than this share of the picture is no thing."""

_HUE = 0.3
"""The greatest distance in RGB, each in [0, 1], from a colour of that name."""

_LIKE = 0.72
"""The least intersection over union with the shape of a name."""

_PALETTE = np.array(list(COLOURS.values()), dtype=np.float64) / 255


class Found(NamedTuple):
    """A thing in a picture.

    Attributes:
        thing: its names; colour or shape are "" where none fits.
        x: its centroid from the left, in [0, 1].
        y: its centroid from the top, in [0, 1].
        area: the share of the picture that it covers.
    """

    thing: Thing
    x: float
    y: float
    area: float


class Verdict(NamedTuple):
    """What of a caption a picture shows.

    Attributes:
        number: as many things as are said.
        colour: there is a thing of each colour that is said.
        shape: those things have the shapes that are said.
        size: and the sizes; None where none is said.
        relation: and the place, or lie to each other as is said; None where none is said.
    """

    number: bool
    colour: bool
    shape: bool
    size: bool | None
    relation: bool | None

    @property
    def right(self) -> bool:
        """Whether the picture shows all that is said and nothing else."""
        return False not in self


class Rate(NamedTuple):
    """How many of how many, and the 95 % interval of their share."""

    right: int
    n: int
    low: float
    high: float


def judge(x: Tensor, texts: Sequence[str]) -> list[Verdict]:
    """Judge pictures by their captions.

    Args:
        x: (B, 3, H, W) in [-1, 1], on white or black.
        texts: B captions of the form of `captions.text_of`.

    Raises:
        BadShape: not pictures of three channels, or not one caption each.
        BadData: values outside [-1, 1].
        BadArgument: a caption of another form.
    """
    if x.ndim != 4 or x.shape[1] != 3 or len(x) != len(texts):
        raise BadShape(f"scenes: got {tuple(x.shape)} and {len(texts)} captions, need (B, 3, H, W) and B of them")
    check_range(x, "scenes")
    return [_judge(find_things(one), scene_of(text)) for one, text in zip(x, texts, strict=True)]


def _judge(found: Sequence[Found], scene: Scene) -> Verdict:
    """The verdict of the assignment of things to words that fits best."""
    wanted = [scene.first] if scene.second is None else [scene.first, scene.second]
    every = [*found, *[Found(Thing("", ""), -1.0, -1.0, 0.0)] * len(wanted)]

    def fits(chosen: Sequence[Found]) -> tuple[int, ...]:
        pairs = [(f.thing, w) for f, w in zip(chosen, wanted, strict=True)]
        return tuple(sum(getattr(f, name) == getattr(w, name) for f, w in pairs) for name in Thing._fields)

    best = max(itertools.permutations(every, len(wanted)), key=fits)
    colour, shape = (
        all(getattr(f.thing, n) == getattr(w, n) for f, w in zip(best, wanted, strict=True)) for n in Thing._fields[:2]
    )
    sized = [f.thing.size == w.size for f, w in zip(best, wanted, strict=True) if w.size]
    relation = _related(best, scene.relation) if scene.relation else None
    return Verdict(len(found) == len(wanted), colour, shape, all(sized) if sized else None, relation)


def _related(things: Sequence[Found], relation: str) -> bool:
    """Whether things are there and lie as is said."""
    if any(f.area == 0 for f in things):
        return False
    first = things[0]
    if relation in PLACES:
        return (_third(first.x), _third(first.y)) == PLACES[relation]
    across, down = first.x - things[1].x, first.y - things[1].y
    to_x, to_y = RELATIONS[relation]
    along, other = (across * to_x, down) if to_x else (down * to_y, across)
    return along > abs(other)


def _third(at: float) -> int:
    """−1, 0 or 1: nearest to the first, the middle or the last place of a single thing."""
    return -1 if at < 0.395 else 1 if at > 0.605 else 0


def find_things(x: Tensor) -> list[Found]:
    """The things in a picture (3, H, H) in [-1, 1], the largest first.

    Every pixel p is taken as a mixture b + a·(c − b) of the background b (white or black, as the border is) and the
    colour c of the palette that comes nearest. Neighbouring pixels of one colour with a ≥ 1/2 are a thing, if they are
    not too few. Its own colour m is the median of its pixels of the greatest a, and with it each pixel in it or beside
    it is covered by clip((p − b)·(m − b)/|m − b|², 0, 1). From that come its area, its centroid, and its shape: the one
    which, drawn with this area at this centroid, has the greatest intersection over union with it.
    """
    pixels = (x.detach().cpu().double().permute(1, 2, 0).numpy() + 1) / 2
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    back = np.full(3, 1.0 if np.median(border) > 0.5 else 0.0)
    toward = _PALETTE - back
    amount = np.clip((pixels - back) @ (toward / (toward**2).sum(1, keepdims=True)).T, 0, 1)
    off = pixels[:, :, None] - back - amount[..., None] * toward
    name = (off**2).sum(-1).argmin(-1)
    share = np.take_along_axis(amount, name[..., None], -1)[..., 0]
    least = _SPECK * share.size
    masks = [mask for mask in _components(np.where(share >= 0.5, name, -1)) if mask.sum() >= least]
    return sorted((_measured(pixels, back, share, mask) for mask in masks), key=lambda f: -f.area)


def _components(name: np.ndarray) -> Iterable[np.ndarray]:
    """The masks of the connected regions (sides and corners) of equal name, (H, W) bool each; −1 is nothing."""
    left = {(int(i), int(j)) for i, j in np.argwhere(name >= 0)}
    while left:
        first = left.pop()
        mask, edge = np.zeros(name.shape, dtype=bool), [first]
        while edge:
            i, j = edge.pop()
            mask[i, j] = True
            near = {(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)} & left
            same = {at for at in near if name[at] == name[first]}
            left -= same
            edge += same
        yield mask


def _measured(pixels: np.ndarray, back: np.ndarray, share: np.ndarray, mask: np.ndarray) -> Found:
    """The thing whose pixels are those of a mask."""
    size = len(mask)
    own = np.median(pixels[mask & (share >= np.quantile(share[mask], 0.5))], axis=0)
    wide = np.pad(mask, 1)
    beside = np.any([wide[i : i + size, j : j + size] for i in range(3) for j in range(3)], axis=0)
    toward = own - back
    covered = np.where(beside, np.clip((pixels - back) @ toward / (toward @ toward), 0, 1), 0)
    total, middle = covered.sum(), (np.arange(size) + 0.5) / size
    x, y, area = (covered.sum(0) @ middle) / total, (covered.sum(1) @ middle) / total, total / size**2
    at = [np.array([value]) for value in (x, y, area)]
    like = [_overlap(covered, cover(shape, at[0], at[1], at[2], size)[0]) for shape in SHAPES]
    far = np.sqrt(((_PALETTE - own) ** 2).sum(1))
    thing = Thing(
        list(COLOURS)[int(far.argmin())] if far.min() <= _HUE else "",
        SHAPES[int(np.argmax(like))] if max(like) >= _LIKE else "",
        "large" if area >= _BORDER else "small",
    )
    return Found(thing, float(x), float(y), float(area))


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """The intersection over union of two coverages."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def rates(verdicts: Sequence[Verdict]) -> dict[str, Rate]:
    """The rate of each field of the verdicts, over those in which it is said, and of those that are wholly right.

    Raises:
        BadArgument: no verdicts.
    """
    if not verdicts:
        raise BadArgument("scenes rates: got no verdicts, need at least 1")
    told = {name: [v for one in verdicts if (v := getattr(one, name)) is not None] for name in Verdict._fields}
    told["right"] = [one.right for one in verdicts]
    return {name: Rate(sum(each), len(each), *wilson(sum(each), len(each))) for name, each in told.items() if each}
