"""Drawn scenes: what captions say is what is drawn, no combination is in both splits, and the judge sees what is wrong.

Pictures are compared with drawings by Pillow, and the judge is tried on those, on the data set's own and on altered
captions.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn import functional
from torch.testing import assert_close

from inkdrop.core.dataset import Data
from inkdrop.data.captions import (
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    combinations,
    scene_of,
    text_of,
)
from inkdrop.data.scenes import AREAS, cover, shapes
from inkdrop.errors import BadArgument, BadData, BadShape
from inkdrop.evals.interval import wilson
from inkdrop.evals.scenes import Verdict, find_things, judge, rates

COUNT = 200


@cache
def drawn(split, count=COUNT, **knobs):
    data = shapes(split, count=count, **knobs)
    return data, data.take(range(count))[0]


def mirrored(scene):
    """The same scene said the other way round."""
    other = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    return scene if scene.second is None else Scene(scene.second, other[scene.relation], scene.first)


# ---- words -------------------------------------------------------------------------------------------------------


def test_no_combination_is_in_both_splits_whichever_way_it_is_said():
    every = {split: {s for n in (1, 2) for s in combinations(split, n)} for split in ("train", "test")}
    assert not every["train"] & every["test"]
    for scenes in every.values():
        assert {mirrored(s) for s in scenes} == scenes
    whole = every["train"] | every["test"]
    assert len(whole) == 64 * 9 + 64 * 56 * 4
    assert [len(combinations(split, n)) for split in ("train", "test") for n in (1, 2)] == [360, 4928, 216, 9408]


def test_what_is_never_drawn_in_training_is_made_of_what_is():
    seen = {thing for n in (1, 2) for s in combinations("train", n) for thing in (s.first, s.second) if thing}
    alone = {s.first for s in combinations("test", 1)}
    assert len(seen) == 40
    assert len(alone) == 24
    assert not seen & alone
    for two in ((0, 1), (0, 2), (1, 2)):  # each colour is drawn in each shape and size, each shape in each size
        assert {tuple(t[i] for i in two) for t in seen} == {tuple(t[i] for i in two) for t in seen | alone}
    pairs = [s for s in combinations("test", 2) if {s.first, s.second} <= seen]
    # an eighth of 2·40·35 pairs, each said two ways; four standard errors of the binomial
    assert abs(len(pairs) / 2 - 350) < 4 * math.sqrt(2800 / 8 * 7 / 8)


def test_captions_are_read_as_they_are_said():
    for split in ("train", "test"):
        for n in (1, 2):
            for scene in combinations(split, n):
                assert scene_of(text_of(scene)) == scene
    red, blue = Thing("red", "circle", "small"), Thing("blue", "square")
    assert text_of(Scene(red, "above", blue)) == "a small red circle above a blue square"
    assert text_of(Scene(Thing("orange", "cross"), "at the top left")) == "an orange cross at the top left"
    assert scene_of("  A small RED circle\nabove a  blue square ") == Scene(red, "above", blue)
    assert scene_of("a blue square") == Scene(blue)
    for wrong in (
        "",
        "a red",
        "a red circle above",
        "a mauve circle",
        "a red circle beside a blue square",
        "two red circles",
    ):
        with pytest.raises(BadArgument, match="need a caption like 'a small red circle above a large blue square'"):
            scene_of(wrong)


# ---- the data set ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_it_is_a_data_set_of_pictures_with_captions():
    data, x = drawn("train")
    assert isinstance(data, Data)
    assert (data.shape, data.classes, data.levels, len(data), len(data.texts)) == ((3, 32, 32), (), 256, COUNT, COUNT)
    assert data.take([3])[1] is None
    again = shapes("train", count=40)
    assert torch.equal(again.take(range(40))[0], x[:40])  # row i is the same at any count
    assert again.texts == data.texts[:40]
    others = [
        shapes("test", count=40),
        shapes("train", count=40, seed=1),
        shapes("train", count=40, background="black"),
    ]
    assert len({d.fingerprint for d in (data, again, *others)}) == 5
    for other in others[:2]:
        assert not {row.numpy().tobytes() for row in other.take(range(40))[0]} & {row.numpy().tobytes() for row in x}
    black = others[2].take(range(40))[0]
    inks = [(x[:40] + 1) / 2, (black + 1) / 2]  # c·a + (1 − a) on white, c·a on black: they differ by 1 − a
    assert_close(inks[0] - inks[1], (inks[0] - inks[1]).mean(1, keepdim=True).expand_as(black), rtol=0, atol=1.01 / 255)
    for knobs in ({"size": 16}, {"count": 0}, {"pairs": 1.5}, {"pairs": math.nan}, {"seed": -1}):
        with pytest.raises(BadArgument, match=f"shapes {next(iter(knobs))}: got"):
            shapes("train", **knobs)
    with pytest.raises(BadArgument, match="data split: got 'dev'"):
        shapes("dev")


@pytest.mark.long
def test_each_split_draws_its_own_combinations_and_says_what_it_should():
    data, test = drawn("train", 1500)[0], drawn("test")[0]
    scenes = [scene_of(text) for text in data.texts]
    things = [[t for t in (s.first, s.second) if t] for s in scenes]

    def share(flags, p):
        assert abs(sum(flags) / len(flags) - p) < 4 * math.sqrt(p * (1 - p) / len(flags))

    share([s.second is not None for s in scenes], 0.6)
    share([not s.relation for s in scenes if s.second is None], 0.4)
    share([not thing.size for each in things for thing in each], 0.2)
    said = [s for s, each in zip(scenes, things, strict=True) if s.relation and all(t.size for t in each)]
    assert set(said) <= set(combinations("train", 1)) | set(combinations("train", 2))
    assert {scene_of(text) for text in test.texts} <= set(combinations("test", 1)) | set(combinations("test", 2))
    count = Counter(thing.colour for each in things for thing in each)
    assert set(count) == set(COLOURS)


def pencil(shape, size, x, y, area, fine=16):
    """A shape drawn by Pillow at 16 times the size: its coverage of each pixel (size, size)."""
    n, unit = size * fine, math.sqrt(area) * size * fine
    cx, cy = x * n, y * n
    sheet = Image.new("L", (n, n), 0)
    pen = ImageDraw.Draw(sheet)
    if shape == "circle":
        r = unit / math.sqrt(math.pi)
        pen.ellipse([cx - r, cy - r, cx + r - 1, cy + r - 1], fill=255)
    if shape == "square":
        pen.rectangle([cx - unit / 2, cy - unit / 2, cx + unit / 2 - 1, cy + unit / 2 - 1], fill=255)
    if shape == "triangle":  # base and height √2, the centroid a third of the height above the base
        side = math.sqrt(2) * unit
        pen.polygon([(cx, cy - side * 2 / 3), (cx + side / 2, cy + side / 3), (cx - side / 2, cy + side / 3)], fill=255)
    if shape == "cross":  # five squares
        arm = unit / math.sqrt(5)
        pen.rectangle([cx - 1.5 * arm, cy - arm / 2, cx + 1.5 * arm - 1, cy + arm / 2 - 1], fill=255)
        pen.rectangle([cx - arm / 2, cy - 1.5 * arm, cx + arm / 2 - 1, cy + 1.5 * arm - 1], fill=255)
    return np.asarray(sheet, dtype=np.float64).reshape(size, fine, size, fine).mean((1, 3)) / 255


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_cover_what_a_pencil_covers(shape):
    draws = np.random.default_rng(0)
    for size in (32, 48):
        x, y, area = draws.uniform(0.4, 0.6, 6), draws.uniform(0.4, 0.6, 6), draws.uniform(1 / 32, 25 / 256, 6)
        covers = cover(shape, x, y, area, size)
        middle = (np.arange(size) + 0.5) / size
        for i in range(6):
            total = covers[i].sum()
            # the heights of the lines are rounded to an eighth of a pixel
            assert_close(total / size**2, area[i], rtol=0.02, atol=0)
            for side, at in ((0, x[i]), (1, y[i])):  # what covers a part of a pixel counts as in its middle
                assert abs(covers[i].sum(side) @ middle / total - at) < 0.07 / size
            off = np.abs(covers[i] - pencil(shape, size, x[i], y[i], area[i]))
            assert off.max() < 0.25  # a border drawn up to 1.5/16 of a pixel off, on two sides, and an eighth
            assert off.sum() < 0.05 * total


@pytest.mark.long
def test_single_things_have_their_colour_and_area_and_lie_whole_at_their_place():
    data, x = drawn("test", pairs=0.0)
    for one, text in zip((x.double() + 1) / 2, data.texts, strict=True):
        thing, place, _ = scene_of(text)
        ink = torch.tensor(COLOURS[thing.colour]) / 255
        share = ((1 - one) * (1 - ink)[:, None, None]).sum(0) / (1 - ink).square().sum()
        assert_close(1 - share * (1 - ink)[:, None, None], one, rtol=0, atol=0.75 / 255)
        low, high = AREAS[thing.size]
        assert 0.98 * low < share.mean() < 1.02 * high
        middle = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
        at = [float((share.sum(d) * middle).sum() / share.sum()) for d in (0, 1)]
        want = [0.5 + 0.21 * step for step in PLACES[place]]
        for got, aim in zip(at, want, strict=True):
            # moved inside by what a large triangle's top is above its centroid
            assert abs(got - aim) < 0.036 or (thing.shape == "triangle" and aim < 0.3 and 0 < got - aim < 0.06)


@pytest.mark.long
def test_two_things_lie_apart_as_is_said():
    data, x = drawn("train", pairs=1.0)
    for one, text in zip((x.double() + 1) / 2, data.texts, strict=True):
        scene = scene_of(text)
        inks = [1 - torch.tensor(COLOURS[t.colour], dtype=torch.float64) / 255 for t in (scene.first, scene.second)]
        pixels = (1 - one).flatten(1)  # each is a share of one ink or the other, but for rounding
        off = [(pixels - ((ink @ pixels) / (ink @ ink)) * ink[:, None]).norm(dim=0) for ink in inks]
        masks = [((pixels.norm(dim=0) > 0.2) & (off[i] < off[1 - i])).reshape(32, 32) for i in (0, 1)]
        boxes = [[(m.any(d).nonzero().min().item(), m.any(d).nonzero().max().item()) for d in (0, 1)] for m in masks]
        to_x, to_y = RELATIONS[scene.relation]
        near, far = (boxes[0], boxes[1]) if to_x + to_y < 0 else (boxes[1], boxes[0])
        axis = 0 if to_x else 1
        # two pixels are 1/16; the least covered ones are not in the mask, as the tips of triangles are
        lost = sum(t.shape == "triangle" for t in (scene.first, scene.second))
        assert 2 <= far[axis][0] - near[axis][1] <= 6 + 2 + 2 * lost
        assert abs((near[axis][0] + far[axis][1] + 1) / 2 - 16) < 0.035 * 32 + 1 + lost
        centres = [[(box[d][0] + box[d][1]) / 2 for d in (0, 1)] for box in boxes]
        along, other = (abs(centres[0][d] - centres[1][d]) for d in (axis, 1 - axis))
        assert other < 0.35 * along + 1.5 + lost  # a triangle's centroid is not the middle of its box
        assert abs((near[1 - axis][0] + near[1 - axis][1] + 1) / 2 - 16) < 0.14 * 32 + 1 + 2 * lost


# ---- the judge ---------------------------------------------------------------------------------------------------


def right(verdicts):
    return sum(v.right for v in verdicts) / len(verdicts)


@pytest.mark.long
@pytest.mark.parametrize("background", ["white", "black"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_judge_is_right_about_what_was_drawn(split, background):
    data, x = drawn(split, background=background)
    assert right(judge(x, data.texts)) >= 0.99
    data, x = drawn(split, count=60, background=background, size=48)
    assert right(judge(x, data.texts)) >= 0.99


@pytest.mark.long
def test_the_judge_bears_mild_blur_and_noise():
    data, x = drawn("test")
    k = torch.arange(-3.0, 4.0)
    bell = torch.exp(-(k**2) / (2 * 0.6**2))
    kernel = (bell[:, None] * bell / bell.sum() ** 2).expand(3, 1, 7, 7)
    blurred = functional.conv2d(functional.pad(x, (3, 3, 3, 3), mode="replicate"), kernel, groups=3)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert right(judge(blurred.clamp(-1, 1), data.texts)) >= 0.98  # blur of 0.6 pixels
    assert right(judge((x + 0.15 * noise).clamp(-1, 1), data.texts)) >= 0.98  # 19 of 255


def test_the_judge_knows_a_pencil_drawing():
    for i, (shape, size) in enumerate((shape, size) for shape in SHAPES for size in SIZES):
        name = list(COLOURS)[i]
        low, high = AREAS[size]
        share = torch.from_numpy(pencil(shape, 32, 0.3, 0.68, (low + high) / 2))
        x = 2 * (1 - share * (1 - torch.tensor(COLOURS[name])[:, None, None] / 255)) - 1
        [found] = find_things(x)
        assert found.thing == Thing(name, shape, size)
        assert_close([found.x, found.y, found.area], [0.3, 0.68, (low + high) / 2], rtol=0.05, atol=0)
        assert judge(x[None].float(), [f"a {size} {name} {shape} at the bottom left"])[0].right


def altered(scene, which):
    """The scene with one attribute changed to another."""

    def other(value, among):
        every = list(among)
        return every[(every.index(value) + 1) % len(every)]

    if which == "relation":
        return scene._replace(relation=other(scene.relation, RELATIONS if scene.second else PLACES))
    among = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[which]
    changed = scene.first._replace(**{which: other(getattr(scene.first, which), among)})
    return scene._replace(first=changed)


@pytest.mark.long
@pytest.mark.parametrize("which", ["colour", "shape", "size", "relation"])
def test_each_altered_word_is_noticed(which):
    data, x = drawn("test", count=100)
    verdicts = judge(x, [text_of(altered(scene_of(text), which)) for text in data.texts])
    scenes = [scene_of(text) for text in data.texts]
    taken = [s.second is not None and altered(s, which).first.colour == s.second.colour for s in scenes]
    assert not any(v.right for v in verdicts)
    assert all(getattr(v, which) is False for v, other in zip(verdicts, taken, strict=True) if not other)
    assert all(v.number for v in verdicts)
    if which != "colour":  # the other words are still right
        rest = {"colour", "shape", "size", "relation"} - {which}
        assert all(getattr(v, name) for v in verdicts for name in rest)


@pytest.mark.long
def test_attributes_of_the_other_thing_are_noticed():
    data, x = drawn("test", count=100, pairs=1.0)
    scenes = [scene_of(text) for text in data.texts]
    for name in Thing._fields:
        unlike = [i for i, s in enumerate(scenes) if getattr(s.first, name) != getattr(s.second, name)]
        swapped = [
            text_of(
                scenes[i]._replace(
                    first=scenes[i].first._replace(**{name: getattr(scenes[i].second, name)}),
                    second=scenes[i].second._replace(**{name: getattr(scenes[i].first, name)}),
                )
            )
            for i in unlike
        ]
        assert len(unlike) > 30
        assert not any(v.right for v in judge(x[unlike], swapped))
    assert right(judge(x, [text_of(mirrored(s)) for s in scenes])) >= 0.99


def test_what_is_missing_or_too_much_is_noticed():
    data, x = drawn("test", pairs=1.0)
    scene, one = scene_of(data.texts[0]), x[:1]
    assert judge(one, [data.texts[0]]) == [Verdict(True, True, True, True, True)]
    alone = judge(one, [text_of(Scene(scene.first))])[0]
    assert alone == Verdict(False, True, True, True, None)
    unsaid = text_of(Scene(scene.first._replace(size=""), scene.relation, scene.second._replace(size="")))
    assert judge(one, [unsaid])[0] == Verdict(True, True, True, None, True)
    blank = torch.ones(1, 3, 32, 32)
    assert judge(blank, [data.texts[0]])[0] == Verdict(False, False, False, False, False)
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not judge(noise, [data.texts[0]])[0].right
    smear = one.flip(-1).lerp(one, 0.5)  # two faint copies of each thing
    assert not judge(smear, [data.texts[0]])[0].right


def test_the_judge_refuses_what_it_cannot_read():
    x = torch.ones(2, 3, 32, 32)
    with pytest.raises(BadShape, match="need \\(B, 3, H, W\\)"):
        judge(x[:, :1], ["a red circle"] * 2)
    with pytest.raises(BadShape, match="1 captions"):
        judge(x, ["a red circle"])
    with pytest.raises(BadData, match="need \\[-1, 1\\]"):
        judge(2 * x, ["a red circle"] * 2)
    with pytest.raises(BadArgument, match="scene: got 'a house'"):
        judge(x[:1], ["a house"])


def test_rates_are_counted_over_what_is_said_and_have_wilsons_interval():
    verdicts = [
        Verdict(True, True, True, None, True),
        Verdict(True, True, False, None, True),
        Verdict(False, True, True, True, None),
    ]
    found = rates(verdicts)
    assert {name: (r.right, r.n) for name, r in found.items()} == {
        "number": (2, 3),
        "colour": (3, 3),
        "shape": (2, 3),
        "size": (1, 1),
        "relation": (2, 2),
        "right": (1, 3),
    }
    for k, n in ((0, 5), (3, 3), (181, 200), (1, 3)):
        low, high = wilson(k, n)
        for end in (low, high):  # where the share seen is z standard errors of that end away
            assert_close((k / n - end) ** 2, 1.96**2 * end * (1 - end) / n, rtol=1e-9, atol=1e-12)
        assert low <= k / n <= high
    for k, n in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(BadArgument, match="wilson"):
            wilson(k, n)
    with pytest.raises(BadArgument, match="no verdicts"):
        rates([])
