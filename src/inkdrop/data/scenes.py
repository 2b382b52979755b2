"""Scenes: pictures of drawn things with captions, "a small red circle above a large blue square"."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from inkdrop.core.noise import generator
from inkdrop.data.arrays import SPLITS, Arrays, check_split
from inkdrop.data.captions import COLOURS, PLACES, RELATIONS, SHAPES, Scene, Thing, combinations, text_of
from inkdrop.errors import BadArgument

__all__ = ["AREAS", "Scenes", "cover", "shapes"]

AREAS = {"small": (1 / 32, 5 / 128), "large": (21 / 256, 25 / 256)}
"""The least and the greatest area of a thing of each size, as a share of the picture's."""

_STEP, _JITTER, _BESIDE, _MARGIN, _GAP, _SLANT = 0.21, 0.035, 0.14, 1 / 64, 1 / 16, 0.35
_ROOT5 = 5**0.5
_EXTENTS = {  # above and below the centroid, and to either side, of a shape of area 1
    "circle": (np.pi**-0.5, np.pi**-0.5, np.pi**-0.5),
    "square": (0.5, 0.5, 0.5),
    "triangle": (2**1.5 / 3, 2**0.5 / 3, 2**-0.5),
    "cross": (1.5 / _ROOT5, 1.5 / _ROOT5, 1.5 / _ROOT5),
}


class Scenes(Arrays):
    """A `core.dataset.Data` of drawn scenes.

    Attributes:
        texts: the caption of each row.
    """

    def __init__(self, values: torch.Tensor, texts: Sequence[str], *, title: str, source: str) -> None:
        self.texts = tuple(texts)
        super().__init__(values, title=title, source=source, preprocessing="\n".join(self.texts))


def shapes(
    split: str,
    *,
    size: int = 32,
    count: int = 20_000,
    pairs: float = 0.6,
    background: Literal["white", "black"] = "white",
    seed: int = 0,
) -> Scenes:
    """Drawn scenes with captions: one thing or two, of 8 colours, 4 shapes and 2 sizes, shape (3, size, size).

    A thing covers a share of the picture uniform in AREAS of its size, whatever its shape. A single one's centroid is
    at 1/2 + 0.21·(column, row) of its place ± 0.035, moved inside where it would be cut off. Of two, the first lies
    above, below, left of or right of the second: their boxes are 1/16 to 3/16 apart that way, the middle of both is at
    1/2 ± 0.035, and the other way the upper or left one's centroid is at 1/2 ± 0.14 and the other's at most 0.35 of
    their distance beside it, both moved inside. A pixel is the mean of what covers it, in 8 bits.

    The split is by combination. 24 of the 64 kinds of thing are never drawn in training, alone or in a pair, and of the
    pairs of others an eighth is not, whichever way they are said. Captions of the test split say everything; those of
    training leave out each size with probability 1/5 and a place with 2/5.

    Row i of a seed is the same picture and caption at any count.

    Args:
        split: "train" or "test".
        size: height and width, 32 to 128 pixels.
        count: pictures in each split, at least 1.
        pairs: the share of pictures with two things, in [0, 1].
        background: what is behind them.
        seed: of the generator, in [0, 2^63).

    Raises:
        BadArgument: a knob outside its range.
    """
    check_split(split)
    limits = {"size": (size, 32, 128), "count": (count, 1, 1_000_000), "pairs": (pairs, 0, 1)}
    for name, (got, low, high) in {**limits, "seed": (seed, 0, 2**63 - 1)}.items():
        if not low <= got <= high:
            raise BadArgument(f"shapes {name}: got {got}, need {low} to {high}")
    singles, twos = combinations(split, 1), combinations(split, 2)
    stream = int.from_bytes(hashlib.sha256(b"inkdrop data shapes").digest()[:8], "big")
    texts, drawn = [], []
    for row in range(count):
        u = generator(seed, 2 * row + SPLITS.index(split), stream).random(12)
        kinds = twos if u[0] < pairs else singles
        scene = kinds[int(u[1] * len(kinds))]
        texts.append(text_of(scene if split == "test" else _shortened(scene, u[2:5])))
        drawn.append(_arranged(scene, u[5:]))
    source = f"scenes drawn by formula, {size} × {size}, on {background}, seed {seed}; no licence needed"
    values = torch.from_numpy(_draw(drawn, size, 255 if background == "white" else 0))
    return Scenes(values, texts, title=f"shapes {split}", source=source)


def _shortened(scene: Scene, u: np.ndarray) -> Scene:
    """The scene with some words unsaid."""
    first = scene.first._replace(size="") if u[0] < 0.2 else scene.first
    if scene.second is None:
        return Scene(first, "" if u[1] < 0.4 else scene.relation)
    return Scene(first, scene.relation, scene.second._replace(size="") if u[2] < 0.2 else scene.second)


class _Drawn(NamedTuple):
    """A thing in place: its centroid and its area, as shares of the picture's side and area."""

    thing: Thing
    x: float
    y: float
    area: float


def _arranged(scene: Scene, u: np.ndarray) -> list[_Drawn]:
    """Where the things of a scene are drawn, by uniform numbers u (7,)."""
    things = [scene.first] if scene.second is None else [scene.first, scene.second]
    areas = [
        low + part * (high - low) for thing, part in zip(things, u, strict=False) for low, high in [AREAS[thing.size]]
    ]
    ends = [tuple(area**0.5 * e for e in _EXTENTS[thing.shape]) for thing, area in zip(things, areas, strict=True)]
    if scene.second is None:
        [(up, down, side)], (column, row) = ends, PLACES[scene.relation]
        x, y = (0.5 + _STEP * place + _JITTER * (2 * part - 1) for place, part in ((column, u[2]), (row, u[3])))
        return [_Drawn(things[0], _inside(x, side, side), _inside(y, up, down), areas[0])]
    across, down_first = RELATIONS[scene.relation]
    order = (0, 1) if across + down_first < 0 else (1, 0)  # from the left or from the top
    boxes = [
        (side, side, up, down) if across else (up, down, side, side) for up, down, side in (ends[i] for i in order)
    ]
    (before, after, *wide), (next_before, next_after, *next_wide) = boxes
    slack = 1 - 2 * _MARGIN - _GAP - before - after - next_before - next_after
    gap = _GAP + u[2] * min(slack, 1 / 8)
    spare = (slack - (gap - _GAP)) / 2  # on either side
    begin = _MARGIN + spare + min(spare, _JITTER) * (2 * u[3] - 1) + before
    end = begin + after + gap + next_before
    place = _inside(0.5 + _BESIDE * (2 * u[4] - 1), *map(max, zip(wide, next_wide, strict=True)))
    beside = _inside(place + _SLANT * (end - begin) * (2 * u[5] - 1), *next_wide)
    spots = [(begin, place), (end, beside)]
    drawn = [(i, along, other) for i, (along, other) in zip(order, spots, strict=True)]
    return [
        _Drawn(things[i], along if across else other, other if across else along, areas[i])
        for i, along, other in sorted(drawn)
    ]


def _inside(at: float, before: float, after: float) -> float:
    """The centre nearest to `at` from which a box reaches no nearer to the picture's border than the margin."""
    return float(np.clip(at, _MARGIN + before, 1 - _MARGIN - after))


def cover(shape: str, x: np.ndarray, y: np.ndarray, area: np.ndarray, size: int) -> np.ndarray:
    """The share of each pixel that a shape covers.

    Each shape is, at the height v, the interval x ± half(v), which is cut with every pixel exactly at eight heights a
    pixel. For the area 1 and v downwards from the centroid, half(v) is √(1/pi − v²) of a circle, 1/2 of a square,
    (v + 2√2/3)/2 of a triangle (base and height √2), and 3/(2√5) in the middle third of a cross, else a third of that.

    Args:
        shape: one of SHAPES.
        x: (N,) centroids in [0, 1], from the left.
        y: (N,) centroids in [0, 1], from the top.
        area: (N,) in (0, 1).
        size: of the picture, in pixels.

    Returns:
        (N, size, size) float32 in [0, 1].
    """
    unit = (np.sqrt(area) * size)[:, None].astype(np.float32)
    v = ((np.arange(8 * size, dtype=np.float32) + 0.5) / 8 - (y * size)[:, None].astype(np.float32)) / unit
    up, down, side = _EXTENTS[shape]
    half = {
        "circle": lambda: np.sqrt(np.maximum(side**2 - v**2, 0)),
        "square": lambda: np.full_like(v, side),
        "triangle": lambda: (v + up) / 2,
        "cross": lambda: np.where(abs(v) <= side / 3, side, side / 3),
    }[shape]()
    half = (unit * np.where((v >= -up) & (v <= down), half, 0))[:, :, None].astype(np.float32)
    centre, pixel = (x * size)[:, None, None].astype(np.float32), np.arange(size, dtype=np.float32)
    part = np.clip(np.minimum(centre + half, pixel + 1) - np.maximum(centre - half, pixel), 0, 1)
    covered: np.ndarray = part.reshape(len(x), size, 8, size).mean(2)
    return covered


def _draw(scenes: Sequence[Sequence[_Drawn]], size: int, background: int) -> np.ndarray:
    """Pictures (N, 3, size, size) of arranged scenes, uint8."""
    out = np.empty((len(scenes), 3, size, size), dtype=np.uint8)
    for start in range(0, len(scenes), 512):
        part = scenes[start : start + 512]
        canvas = np.full((len(part), 3, size, size), background, dtype=np.float32)
        things = [(row, drawn) for row, scene in enumerate(part) for drawn in scene]
        for shape, turn in itertools.product(SHAPES, (0, 1)):  # a row has at most one thing of each turn
            mine = [(row, d) for row, d in things if d.thing.shape == shape and (d == part[row][-1]) == bool(turn)]
            if mine:
                rows = [row for row, _ in mine]
                x, y, area = (np.array([d[i] for _, d in mine]) for i in (1, 2, 3))
                ink = np.array([COLOURS[d.thing.colour] for _, d in mine], dtype=np.float32) - background
                canvas[rows] += cover(shape, x, y, area, size)[:, None] * ink[:, :, None, None]
        out[start : start + len(part)] = np.rint(canvas)
    return out
