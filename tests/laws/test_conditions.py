"""Conditions: what of them is dropped, what is made of pictures, what a caller says, and what a checkpoint carries."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from albums import COLOURS, KINDS, NAMES, SHAPE, album, codec_folder, pictured, shake
from inkdrop import said
from inkdrop.bundle import Bundle, load, locate, save
from inkdrop.condition import Told, cond_of
from inkdrop.core.cond import Cond
from inkdrop.core.noise import Draw, generator
from inkdrop.data.folder import folder as open_folder
from inkdrop.denoiser import Denoiser
from inkdrop.edit.pairs import Pair, gray, hole, lowres, middle_hole
from inkdrop.errors import BadArgument, BadCheckpoint, BadData, BadShape, InkdropWarning, UnknownName
from inkdrop.files import own_sha256
from inkdrop.find import Part
from inkdrop.generate import sample, steps
from inkdrop.model import Examples, Plain
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe, denoiser_of, set_knobs
from inkdrop.session import open_session
from inkdrop.train.dry import dry_run
from inkdrop.train.feed import Feed
from inkdrop.train.loop import fit, resume
from inkdrop.train.trainer import Trainer
from runs import files_of, log_of

CPU = torch.device("cpu")
HOLE = Part("hole")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """40 pictures, of which 11 are held out."""
    return album(tmp_path_factory.mktemp("albums") / "pictures")


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    return codec_folder(tmp_path_factory.mktemp("codecs") / "codec")


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- dropping ----------------------------------------------------------------------------------------------------


def watched(recipe: Recipe, updates: Sequence[int], rows: Sequence[int]) -> list[Cond]:
    """The condition of these samples at each of these updates, as the loss is told it."""
    trainer, seen = Trainer(recipe, None), list[Cond]()

    def spy(denoiser: Denoiser, x0: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        seen.append(cond)
        return {"loss": x0.flatten(1).sum(1) * 0}

    trainer.loss = spy
    for trainer.update in updates:
        trainer.losses(rows)
    return seen


def test_class_attributes_and_text_of_a_row_drop_together_and_its_picture_stays(pictures):
    """The rate over 600 rows within 4 binomial standard errors, and each row's by its own key."""
    rate, rows, updates = 0.3, range(25), range(24)
    recipe = pictured(pictures, label=True, text=True, attributes=True, image=HOLE, null_rate=rate, seed=5)
    seen = watched(recipe, [*updates, 3], rows)
    label, vec, text, image = (torch.stack([c.null_rows(f) for c in seen]) for f in ("label", "vec", "text", "image"))
    assert abs(float(label[:-1].double().mean()) - rate) < 4 * math.sqrt(rate * (1 - rate) / (len(updates) * len(rows)))
    assert torch.equal(vec, label)
    texts = Trainer(recipe, None).data.texts
    silent = torch.tensor([texts[row] is None for row in rows])
    assert 0 < int(silent.sum()) < len(rows)
    assert torch.equal(text, label | silent)
    assert not image.any()
    mine = [[generator(5 + 2**63, 4 * place + 2, u).random() < rate for place in rows] for u in updates]
    assert torch.equal(label[:-1], torch.tensor(mine))
    assert torch.equal(label[-1], label[3])


def test_every_stream_has_keys_of_its_own_and_the_old_ones_their_old_numbers():
    """(seed, update, place) at any split of the batch; the image word is bank·2⁶² + 4·place + stream."""
    words = {"time": 0, "noise": 1, "dropout": 2, "augment": 3, "image": 2**62, "image_time": 2**62 + 1}
    places = [0, 1, 7, 2**40]
    for name, word in words.items():
        each = [generator(9 + 2**63, word + 4 * place, 31) for place in places]
        parts = [Draw(9, 31, places[:1]), Draw(9, 31, places[1:])]
        if name in ("noise", "image"):
            want = torch.tensor(np.stack([g.standard_normal((2, 3)) for g in each])).float()
            got = torch.cat([d.normal((len(d.places), 2, 3), stream=name) for d in parts])
        else:
            want = torch.tensor(np.stack([g.random(4) for g in each]))
            got = torch.cat([d.uniform(name, 4) for d in parts])
            assert torch.equal(torch.cat([d.uniform(name) for d in parts]), want[:, 0])
        assert torch.equal(got, want), name
    keys = {word + 4 * place for word in words.values() for place in range(100)}
    assert len(keys) == 100 * len(words)


# ---- what is made of a picture -----------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def bilinear(small: np.ndarray, factor: int) -> np.ndarray:
    """A line scaled up by a factor, pixel centres at (i + 1/2)/factor − 1/2, the ends held: along the last axis."""
    at = np.clip((np.arange(small.shape[-1] * factor) + 0.5) / factor - 0.5, 0, small.shape[-1] - 1)
    low = np.floor(at).astype(int)
    part = at - low
    return small[..., low] * (1 - part) + small[..., np.minimum(low + 1, small.shape[-1] - 1)] * part


@pytest.mark.parametrize("factor", [2, 4])
def test_lowres_is_means_of_squares_scaled_up_bilinearly(factor):
    x = noise(3, 2, 8, 12)
    made = lowres((2, 8, 12), factor=factor)
    squares = x.numpy().astype(np.float64).reshape(3, 2, 8 // factor, factor, 12 // factor, factor).mean((3, 5))
    want = bilinear(np.swapaxes(bilinear(squares, factor), -1, -2), factor).swapaxes(-1, -2)
    assert_close(made.make(x, Draw(0, 0, range(3))), torch.tensor(want).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(made.given(x, None), made.make(x, Draw(1, 1, range(3))))
    small = torch.tensor(squares).float()
    assert_close(made.given(small, None), torch.tensor(want).float(), rtol=1e-5, atol=1e-6)
    assert (made.channels, made.size, made.masked) == (2, (2, 8 // factor, 12 // factor), False)


def test_gray_is_the_luma_of_colour_files():
    x = noise(4, 3, 5, 6)
    want = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    made = gray((3, 5, 6))
    assert_close(made.make(x, Draw(0, 0, range(4))), want, rtol=0, atol=3e-7)
    assert torch.equal(made.given(x, None), made.make(x, Draw(3, 3, range(4))))
    assert (made.channels, made.size) == (1, (3, 5, 6))


def test_a_hole_is_cut_out_and_said_in_the_mask():
    """Where it is kept the condition is x0 bit for bit, in the hole 0; the mask is 1 and −1; a user's hole likewise."""
    x, made = noise(3, 2, 16, 12), hole((2, 16, 12))
    got = made.make(x, Draw(0, 0, range(3)))
    keep = got[:, 2:] == 1
    assert torch.equal(got[:, 2:].unique(), torch.tensor([-1.0, 1.0]))
    assert torch.equal(got[:, :2], torch.where(keep, x, 0))
    assert torch.equal(made.given(x, keep), got)
    mask = middle_hole(3, (2, 16, 12))
    assert mask[0, 0].sum(1).tolist() == [12] * 4 + [6] * 8 + [12] * 4
    assert torch.equal(made.given(x, mask[:1]), made.given(x, mask))  # one mask for all, and one picture
    assert torch.equal(made.given(x[:1], mask), made.given(x[:1].expand(3, -1, -1, -1), mask))
    assert (made.channels, made.size, made.masked) == (3, (2, 16, 12), True)


def test_holes_have_sides_of_the_stated_shares_anywhere_they_fit():
    """Over 4,000 holes: sides are shares uniform on [least, most], rounded; places are uniform; chi² at p > 0.001."""
    n, least, most = 20, 0.2, 0.6
    got = hole((1, n, n), least=least, most=most).make(torch.zeros(4000, 1, n, n), Draw(1, 2, range(4000)))[:, 1] < 0
    for axis in (1, 2):
        lines = got.any(dim=3 - axis)
        sides, tops = lines.sum(1), lines.int().argmax(1)
        last = n - 1 - lines.flip(1).int().argmax(1)
        assert torch.equal(last - tops + 1, sides)  # a hole is one piece,
        assert torch.equal(got.sum((1, 2)), got.any(2).sum(1) * got.any(1).sum(1))  # and a rectangle
        assert int(sides.min()) == least * n
        assert int(sides.max()) == most * n
        counts = torch.bincount(sides)[4:13].double()
        share = torch.tensor([0.5, *[1.0] * 7, 0.5]) / 8  # the two ends take half a pixel each
        assert stats.chisquare(counts, 4000 * share.double()).pvalue > 1e-3
        for side in (4, 8, 12):
            places = torch.bincount(tops[sides == side], minlength=n - side + 1)
            assert len(places) == n - side + 1
            assert stats.chisquare(places).pvalue > 1e-3
    heights, widths = got.any(2).sum(1).double(), got.any(1).sum(1).double()
    assert abs(float(torch.corrcoef(torch.stack([heights, widths]))[0, 1])) < 4 / math.sqrt(4000)


PAIRS = [
    (lambda: lowres((1, 8, 8), factor=3), BadArgument, "lowres factor: got 3, need at least 2, and a divisor of 8"),
    (lambda: lowres((1, 8, 8), factor=1), BadArgument, "lowres factor: got 1"),
    (lambda: lowres((2,)), BadShape, "lowres: got data of shape (2,), need pictures"),
    (lambda: gray((1, 8, 8)), BadShape, "gray: got data of shape (1, 8, 8), need colour pictures"),
    (lambda: hole((1, 8, 8), least=0.0), BadArgument, "hole: got least 0 and most 0.75"),
    (lambda: hole((1, 8, 8), least=0.5, most=0.4), BadArgument, "hole: got least 0.5 and most 0.4"),
    (lambda: hole((1, 8, 8), most=1.1), BadArgument, "hole: got least 0.25 and most 1.1"),
    (lambda: hole((2,)), BadShape, "hole: got data of shape (2,), need pictures"),
]


@pytest.mark.parametrize(("make", "error", "text"), PAIRS, ids=[row[2][:40] for row in PAIRS])
def test_pairs_that_cannot_be_made_are_one_line(make, error, text):
    with pytest.raises(error) as caught:
        make()
    assert one_line(caught).startswith(text)


def test_an_image_condition_is_noised_to_a_uniform_time_that_is_told(pictures):
    """image_t ~ U[0, augment]; image = alpha·clean + sigma·unit noise, which has nothing to do with eps or x."""
    recipe = pictured(pictures, image=Part("gray"), augment=0.6)
    feed, made = Feed(recipe, CPU), gray(SHAPE)
    schedule = denoiser_of(recipe, SHAPE, feed.terms._replace(image=0)).schedule
    times, units, epses, xs = [], [], [], []
    for update in range(30):
        draw, rows = Draw(3, update, range(20)), [(20 * update + i) % len(feed.data) for i in range(20)]
        x0, cond = feed.take(rows, draw, schedule)
        clean, t = made.make(x0, draw), cond.image_t.double()
        level = schedule(t.clamp(min=schedule.least)).over(x0)
        times.append(cond.image_t)
        noisy = cond.image_t >= schedule.least
        assert torch.equal(cond.image[~noisy], clean[~noisy])
        units.append(((cond.image - level.alpha * clean) / level.sigma)[noisy])
        epses.append(draw.normal(x0.shape)[:, :1][noisy])
        xs.append(x0[:, :1][noisy])
    t, unit, eps, x = (torch.cat(part).double().flatten() for part in (times, units, epses, xs))
    assert stats.kstest(t.numpy(), stats.uniform(0, 0.6).cdf).pvalue > 1e-3
    assert float(t.min()) < 0.6 / 50  # of some hundred rows: missed by chance once in e^8
    assert float(t.max()) > 0.59
    assert stats.kstest(unit[:20_000].numpy(), "norm").pvalue > 1e-3
    error = 4 / math.sqrt(len(unit))
    assert abs(float(unit.mean())) < error
    assert abs(float(unit.var()) - 1) < math.sqrt(2) * error
    for other in (eps, x):
        assert abs(float(torch.corrcoef(torch.stack([unit, other]))[0, 1])) < error
    plain = Feed(pictured(pictures, image=Part("gray")), CPU).take(range(9), Draw(0, 0, range(9)), schedule)[1]
    assert plain.image_t is None
    assert torch.equal(plain.image, made.make(feed.data.take(range(9))[0], Draw(0, 0, range(9))))


# ---- what a caller says ------------------------------------------------------------------------------------------


class Letters:
    """A reader of letters: 1 for a, 2 for b, and so on."""

    vocabulary, features, length = 30, 0, 12

    def __call__(self, texts: Sequence[str], heard: object = None) -> tuple[Tensor, Tensor]:
        longest = max((len(text) for text in texts), default=0) + 1
        rows = [[0, *(ord(c) % 30 for c in text)] for text in texts]
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
        mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
        return tokens.view(len(texts), longest), mask.view(len(texts), longest)

    def files(self) -> dict[str, bytes]:
        return {}


EXAMPLES = Examples(("a", "bcd", "ef"), ((0.1, 1.0), (0.2, 2.0), (0.3, 3.0)), (2, 0, 2))


def plain(pair: Pair | None = None, **known: Any) -> Plain:
    """A model that nobody asks: what it is told is looked at, not what it answers."""
    return Plain(denoiser=torch.nn.Identity(), shape=SHAPE, pair=pair, **known)


def whole(**more: Any) -> Plain:
    return plain(classes=KINDS, attributes=NAMES, reader=Letters(), examples=EXAMPLES, **more)


def words(cond: Cond, row: int) -> list[int]:
    return cond.text[row][cond.text_mask[row]].tolist()


@pytest.mark.parametrize(("count", "first"), [(1, 0), (7, 0), (3, 5), (1, 11)])
def test_an_image_is_told_the_same_by_default_at_any_count_and_first(count, first):
    """Example i mod n, all of one sample: its class, its attributes, its text."""
    cond = cond_of(whole(), count, Told(), first=first)
    for row in range(count):
        own = (first + row) % 3
        assert int(cond.label[row]) == EXAMPLES.labels[own]
        assert cond.vec[row].tolist() == torch.tensor(EXAMPLES.attributes[own]).tolist()
        assert words(cond, row) == [0, *(ord(c) % 30 for c in EXAMPLES.texts[own])]
    only = cond_of(plain(classes=KINDS), count, Told(), first=first)
    assert only.label.tolist() == [(first + row) % 3 for row in range(count)]
    assert only.present == ("label",)
    assert cond_of(plain(), count, Told(), first=first) is None


def test_one_is_for_all_and_several_are_one_an_image():
    vec = {"hue": 0.5, "size": -1}
    cond = cond_of(whole(), 3, Told("light", "ab", vec))
    assert cond.label.tolist() == [1, 1, 1]
    assert cond.vec.tolist() == [[0.5, -1.0]] * 3
    assert [words(cond, row) for row in range(3)] == [[0, 7, 8]] * 3
    other = {"size": 2.0, "hue": 0.0}
    cond = cond_of(whole(), 2, Told([2, "dark"], ["a", "ab"], [vec, other]))
    assert cond.label.tolist() == [2, 0]
    assert cond.vec.tolist() == [[0.5, -1.0], [0.0, 2.0]]
    assert [words(cond, row) for row in range(2)] == [[0, 7], [0, 7, 8]]
    x, pair = noise(3, *SHAPE), lowres(SHAPE, factor=4)
    cond = cond_of(plain(pair), 3, Told(image=x))
    assert torch.equal(cond.image, pair.given(x, None))
    small = torch.nn.functional.avg_pool2d(x, 4)
    assert torch.equal(cond_of(plain(pair), 3, Told(image=small)).image, cond.image)
    assert torch.equal(cond_of(plain(pair), 3, Told(image=x[:1])).image, cond.image[:1].expand(3, -1, -1, -1))
    cut, mask = hole(SHAPE), noise(3, 1, 8, 8) > 0
    for rows, masks in itertools.product((1, 3), (1, 3)):
        cond = cond_of(plain(cut), 3, Told(image=x[:rows], mask=mask[:masks]))
        want = cut.given(x[:rows].expand(3, *SHAPE), mask[:masks].expand(3, 1, 8, 8))
        assert torch.equal(cond.image, want)


@pytest.mark.parametrize(
    "said", [{"label": 1}, {"text": "a"}, {"attributes": {"hue": 1.0, "size": 0.0}}, {"image": True}]
)
def test_what_is_not_said_beside_something_is_null(said):
    """Two conditions of which one is made up would contradict each other, and nobody would be told."""
    pair = lowres(SHAPE, factor=4) if "image" in said else None
    told = Told(**{name: noise(3, *SHAPE) if name == "image" else value for name, value in said.items()})
    cond = cond_of(whole(guidable=True, pair=pair), 3, told)
    kept = {"attributes": "vec"}.get(*said, next(iter(said)))
    assert [name for name in cond.present if not cond.null_rows(name).all()] == [kept]
    with pytest.raises(
        BadArgument, match=r"this model was trained without dropped conditions .*so it must be told one"
    ):
        cond_of(whole(pair=pair), 3, told)


X, VEC = noise(2, *SHAPE), {"hue": 1.0, "size": 1.0}
KEEP = torch.ones(2, 1, 8, 8, dtype=torch.bool).index_fill(2, torch.tensor([3]), False)
WRONG = [
    (plain(), Told(label=1), BadArgument, "class: got 1, but this model has no classes"),
    (plain(), Told(text="a"), BadArgument, "text: got 'a', but this model reads none"),
    (plain(), Told(text=["a", "b"]), BadArgument, "text: got 'a', but this model reads none"),
    (plain(), Told(attributes=VEC), BadArgument, "attributes: got some, but this model takes none"),
    (plain(), Told(image=X), BadArgument, "image: got a picture, but this model takes none; try: inkdrop edit"),
    (plain(), Told(mask=KEEP), BadArgument, "image: got a picture, but this model takes none"),
    (whole(), Told(label=3), BadArgument, "class: got 3, need a number in [0, 2], or a name: dark, light, two"),
    (whole(), Told(label=-1), BadArgument, "class: got -1, need a number in [0, 2]"),
    (whole(), Told(label="drak"), UnknownName, "class: unknown name 'drak'; did you mean dark"),
    (whole(), Told(label=1.5), BadArgument, "class: got 1.5, need one, or one an image"),
    (whole(), Told(label=[0, None]), BadArgument, "class: got None, need a whole number"),
    (whole(), Told(label=[0, math.nan]), BadArgument, "class: got nan, need a whole number"),
    (whole(), Told(label=[0]), BadShape, "class: got 1 labels for 2 images"),
    (whole(), Told(text=["a"]), BadShape, "text: got 1 texts for 2 images"),
    (whole(), Told(text=5), BadArgument, "text: got 5, need one, or one an image"),
    (whole(), Told(text=["a", None]), BadArgument, "text: got None, need a text"),
    (whole(), Told(attributes={"hue": 1.0}), BadArgument, "attributes: size is missing; give all of hue, size"),
    (whole(), Told(attributes={**VEC, "szie": 1.0}), UnknownName, "attribute: unknown name 'szie'; did you mean size"),
    (whole(), Told(attributes={**VEC, "hue": "red"}), BadArgument, "attribute hue: got 'red', need a finite number"),
    (whole(), Told(attributes={**VEC, "hue": math.nan}), BadArgument, "attribute hue: got nan, need a finite"),
    (whole(), Told(attributes={**VEC, "hue": 1e39}), BadArgument, "attribute hue: got 1e+39, need a finite"),
    (whole(), Told(attributes=[VEC]), BadShape, "attributes: got 1 sets for 2 images"),
    (whole(), Told(attributes=["hue", "size"]), BadArgument, "attributes: got 'hue', need values by name: hue, size"),
    (plain(reader=Letters()), Told(), BadArgument, "text: this model must be told what to draw; give --text"),
    (plain(attributes=NAMES), Told(), BadArgument, "attributes: this model needs hue, size; give --attribute"),
    (plain(gray(SHAPE)), Told(), BadArgument, "image: this model starts from a picture; give image=... (--image PATH)"),
    (plain(gray(SHAPE)), Told(image=X, mask=KEEP), BadArgument, "mask: got one, but this model fills no holes"),
    (plain(gray(SHAPE)), Told(image=X[0]), BadShape, "image: got shape (3, 8, 8), need (B, 3, 8, 8)"),
    (plain(gray(SHAPE)), Told(image=X[:, :1]), BadShape, "image: got shape (2, 1, 8, 8), need (B, 3, 8, 8)"),
    (plain(gray(SHAPE)), Told(image=3 * X), BadData, "image: got values in ["),
    (plain(gray(SHAPE)), Told(image=X / 0), BadData, "image: got values in ["),
    (plain(gray(SHAPE)), Told(image=noise(3, *SHAPE)), BadShape, "image: got 3 pictures for 2 images"),
    (plain(hole(SHAPE)), Told(image=X), BadArgument, "image: this model fills holes; give a mask too (--mask"),
    (plain(hole(SHAPE)), Told(mask=KEEP), BadArgument, "image: this model starts from a picture"),
    (plain(hole(SHAPE)), Told(image=X, mask=KEEP.float()), BadShape, "mask: got torch.float32 (2, 1, 8, 8), need bool"),
    (
        plain(hole(SHAPE)),
        Told(image=X, mask=KEEP[0]),
        BadShape,
        "mask: got torch.bool (1, 8, 8), need bool (B, 1, 8, 8",
    ),
    (
        plain(hole(SHAPE)),
        Told(image=X, mask=KEEP | True),
        BadArgument,
        "mask: keeps every pixel, so that there is nothing",
    ),
    (
        plain(gray(SHAPE)),
        Told(image="a.png"),
        BadArgument,
        "image: got str, need a tensor; inkdrop.inputs.read_picture",
    ),
    (
        whole(),
        Told(attributes={**VEC, "hue": [1.0, 2.0]}),
        BadArgument,
        "attribute hue: got [1.0, 2.0], need a finite number for all; for one an image give [{...}, {...}]",
    ),
    (plain(hole(SHAPE)), Told(image=X, mask=KEEP[[0, 0, 0]]), BadShape, "mask: got 3 masks for 2 images"),
    (plain(hole(SHAPE)), Told(image=noise(3, *SHAPE), mask=KEEP), BadShape, "image: got 3 pictures for 2 images"),
]


@pytest.mark.parametrize(
    ("model", "told", "error", "text"), WRONG, ids=[f"{i} {r[3][:40]}" for i, r in enumerate(WRONG)]
)
def test_what_cannot_be_told_is_one_line(model, told, error, text):
    with pytest.raises(error) as caught:
        cond_of(model, 2, told)
    assert one_line(caught).startswith(text)


# ---- guidance ----------------------------------------------------------------------------------------------------


def untrained(pictures: Path, *, plan: Plan | None = None, **asked: Any) -> Bundle:
    """A model of an album with every weight random."""
    recipe = pictured(pictures, plan=plan, **asked)
    feed = Feed(recipe, CPU)
    denoiser = denoiser_of(recipe, feed.shape, feed.terms).eval()
    shake(denoiser)
    return feed.given_to(Bundle(recipe, denoiser, feed.data.shape, feed.data.classes))


def test_guidance_drops_what_can_be_dropped_and_keeps_the_picture(pictures):
    """w = 1 is the conditional model and w = 0 that of the learned nulls, bit for bit (R8); else both by eq. 6."""
    model = untrained(pictures, label=True, text=True, attributes=True, image=HOLE, plan=Plan(steps=1, guide=()))
    x, mask = noise(3, *SHAPE, seed=1), middle_hole(3, SHAPE)
    told = Told(2, "a red square", {"hue": 0.3, "size": -1.0}, x, mask)
    cond = cond_of(model, 3, told)
    nothing = cond.null(only=("label", "vec", "text"))
    free, bound = sample(model, 3, cond=nothing), sample(model, 3, cond=cond)
    assert (free - bound).abs().max() > 1e-3
    assert torch.equal(sample(model, 3, guidance=1.0, **vars(told)), bound)
    assert torch.equal(sample(model, 3, guidance=0.0, **vars(told)), free)
    assert_close(sample(model, 3, guidance=2.5, **vars(told)), free + 2.5 * (bound - free), rtol=1e-4, atol=1e-5)
    assert (sample(model, 3, cond=cond.null()) - free).abs().max() > 1e-3, "the picture says something"
    other = sample(
        model, 3, cond=replace(nothing, label=torch.full((3,), 1), nulls=dict(list(nothing.nulls.items())[1:]))
    )
    steered = sample(model, 3, guide=[Part("cfg", {"scale": 2.5, "negative": 1})], **vars(told))
    assert_close(steered, other + 2.5 * (bound - other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("field", "asked"), [("text", {"text": True}), ("vec", {"attributes": True})])
def test_guidance_by_one_condition_alone(field, asked, pictures):
    model = untrained(pictures, plan=Plan(steps=2, guide=()), **asked)
    cond = cond_of(model, 4, Told())
    assert cond.present == (field,)
    bound, free = sample(model, 4), sample(model, 4, cond=cond.null())
    assert torch.equal(sample(model, 4, guidance=1.0), bound)
    assert torch.equal(sample(model, 4, guidance=0.0), free)
    assert (bound - free).abs().max() > 1e-3
    with pytest.raises(BadArgument, match="cfg negative: got class 1, but this model has no classes") as caught:
        sample(model, 1, guide=[Part("cfg", {"scale": 2.0, "negative": 1})])
    one_line(caught)


def test_there_is_nothing_to_guide_by_in_a_picture_alone(pictures):
    """It was never dropped in training, so a branch without it would be nonsense."""
    model = untrained(pictures, image=Part("lowres", {"factor": 4}), plan=Plan(steps=1, guide=()))
    for guidance in (0.0, 1.0, 3.0):
        with pytest.raises(BadArgument, match="cfg: there is no condition to guide by") as caught:
            sample(model, 2, image=noise(2, *SHAPE), guidance=guidance)
        one_line(caught)
    recipe = pictured(pictures, image=Part("gray"), plan=Plan(guide=(Part("cfg", {"scale": 2.0}),)))
    with pytest.raises(BadArgument, match="cfg: there is no condition to guide by"):
        Trainer(recipe, None)


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_what_a_mask_keeps_is_kept_to_the_bit(kind, pictures, codec):
    """Whatever the net draws there, in one batch and in several, and in the last step that is watched."""
    model = untrained(pictures, image=HOLE, codec=codec if kind == "latents" else None)
    x, keep = noise(3, *SHAPE).clamp(-1, 1), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    out = sample(model, 3, image=x, mask=keep, batch=2)
    where = keep.expand_as(out)
    assert torch.equal(out[where], x[where])
    assert not bool((out[~where] == x[~where]).any())
    *_, last = steps(model, 3, image=x, mask=keep)
    assert torch.equal(last.x[where], x[where])


def test_what_is_steered_away_from_need_not_be_of_the_kind_that_is_said(pictures):
    """At w = 0 guidance asks the negative alone: a negative prompt beside a class is that prompt without a class, and a
    negative class beside a prompt is that class without a prompt."""
    model = untrained(pictures, label=True, text=True, attributes=True)
    for told in ({"label": 1}, {"text": "a"}, {"attributes": {"hue": 0.5, "size": 0.0}}, {}):
        prompt = sample(model, 3, negative="a red", guidance=0.0, **told)
        assert_close(prompt, sample(model, 3, text="a red", guidance=1.0), rtol=1e-5, atol=1e-5)
        other = sample(model, 3, guide=(Part("cfg", {"scale": 0.0, "negative": 2}),), **told)
        assert_close(other, sample(model, 3, label=2, guidance=1.0), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(prompt, other, atol=1e-2)


def test_guidance_of_a_net_without_a_null_is_refused_with_what_can_be_done(pictures):
    """One of ours can be trained again; one that was read from elsewhere cannot."""
    model = untrained(pictures, label=True)
    bound = replace(model.recipe, train=replace(model.recipe.train, null_rate=0.0))
    with pytest.raises(BadArgument, match=r"train.null_rate=0\); use 1, or train with null_rate=0.1"):
        sample(replace(model, recipe=bound), 1, label=1, guidance=2.0)
    with pytest.raises(
        BadArgument, match="guidance: got 2, but this net knows no null class to guide away from; use 1"
    ):
        sample(replace(model, recipe=replace(bound, data=None)), 1, label=1, guidance=2.0)


def test_an_edit_is_told_what_is_said_and_nothing_else(pictures):
    """The rest is null, whatever its value; a model without a learned null must be told all."""
    model = untrained(pictures, label=True, text=True, attributes=True)
    x = noise(2, *SHAPE)
    vec = {"hue": 0.5, "size": 0.0}
    for how, kept in (({"label": 1}, "label"), ({"text": "a red"}, "text"), ({"attributes": vec}, "vec"), ({}, "none")):
        cond = open_session(model, x, "img2img", **how).cond
        assert cond.present == ("label", "vec", "text")
        for name in cond.present:
            assert cond.null_rows(name).tolist() == [name != kept] * 2
    cond = open_session(model, x, "img2img", first=3, label=[0, 2], attributes=vec).cond
    assert cond.label.tolist() == [0, 2]
    assert cond.vec.tolist() == [[0.5, 0.0]] * 2
    bound = replace(model, recipe=replace(model.recipe, train=replace(model.recipe.train, null_rate=0.0)))
    for how, text in (
        ({}, "class: this model was"),
        ({"label": 1}, "attributes: this"),
        ({"label": 1, "attributes": vec}, "text:"),
    ):
        with pytest.raises(BadArgument, match="trained without dropped conditions") as caught:
            open_session(bound, x, "img2img", **how)
        assert one_line(caught).startswith(text)
    assert open_session(bound, x, "img2img", label=1, attributes=vec, text="a").cond.nulls == {}
    only = untrained(pictures, attributes=True)
    with pytest.raises(BadArgument, match="guidance: got 2, but there is no attributes to guide by"):
        open_session(only, x, "img2img", guidance=2.0)
    picture = untrained(pictures, image=Part("gray"))
    with pytest.raises(BadArgument, match="img2img: this model starts from a picture of its own; give it as cond"):
        open_session(picture, x, "img2img")
    given = Cond(image=noise(2, 1, 8, 8))
    assert open_session(picture, x, "img2img", cond=given).cond is given


# ---- training ----------------------------------------------------------------------------------------------------

KINDS_OF_RUN: dict[str, dict[str, Any]] = {
    "text": {"text": True, "label": True, "attributes": True},
    "image": {"image": HOLE, "augment": 0.5, "net": {"augment": True}},
    "latents": {"label": True},
}


def asked_for(kind: str, codec: Path) -> dict[str, Any]:
    return {**KINDS_OF_RUN[kind], **({"codec": codec} if kind == "latents" else {})}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS_OF_RUN)
def test_the_held_out_loss_is_the_same_twice(kind, pictures, codec):
    """Whatever was drawn between, and at any update: only the weights can move it."""
    trainer = Trainer(pictured(pictures, **asked_for(kind, codec)), None)
    shake(trainer.ema.net)
    first = trainer.held_out_loss()
    assert first["samples"] == 11
    trainer.losses(range(4))
    trainer.update = 17
    assert trainer.held_out_loss() == first
    shake(trainer.ema.net, seed=1)
    assert trainer.held_out_loss()["loss"] != first["loss"]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS_OF_RUN)
def test_stopping_and_resuming_changes_nothing(kind, pictures, codec, tmp_path):
    """4 updates in one go, or 2 and 2: weights, average, optimiser, log and preview bit for bit."""
    recipe = pictured(pictures, **asked_for(kind, codec))
    fit(recipe, tmp_path / "unbroken")
    fit(recipe, tmp_path / "broken", max_steps=2)
    resume(tmp_path / "broken")
    mine, theirs = (locate(tmp_path / name) for name in ("broken", "unbroken"))
    assert mine.name == theirs.name == "step-00000004"
    assert files_of(mine) == files_of(theirs)
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "unbroken")
    last = "previews/step-00000004.png"
    assert (tmp_path / "broken" / last).read_bytes() == (tmp_path / "unbroken" / last).read_bytes()


@pytest.mark.long
def test_a_resumed_run_reads_and_encodes_as_its_checkpoint_does(tmp_path):
    """Other captions would give another vocabulary, another autoencoder other latents: both are the checkpoint's."""
    run, folder = tmp_path / "run", album(tmp_path / "album")
    first = codec_folder(tmp_path / "codec")
    fit(pictured(folder, text=True, codec=first), run, max_steps=2)
    before = load(run)
    shutil.rmtree(first)
    codec_folder(first, seed=1)
    table = (folder / "metadata.csv").read_text(encoding="utf-8")
    (folder / "metadata.csv").write_text(table.replace("square", "zig"), encoding="utf-8")
    with pytest.warns(InkdropWarning, match="the data have changed since"):
        after = resume(run)
    assert after.reader.files() == before.reader.files()
    assert after.codec.hash == before.codec.hash
    new = Feed(pictured(folder, text=True), CPU)
    assert new.reader.files() != before.reader.files()
    shutil.rmtree(first)
    assert load(locate(run)).codec.hash == before.codec.hash


@pytest.mark.long
def test_an_autoencoder_of_ones_own_is_imported_with_trust_only(tmp_path, monkeypatch):
    """To look, to train, to load and to go on."""
    (tmp_path / "own_codecs.py").write_text(
        "from inkdrop.nets.autoencoder import autoencoder\n\n\ndef small(pixels, *, width: int = 4):\n"
        "    return autoencoder(pixels, latent=2, width=width, multipliers=(1, 2), blocks=1)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = codec_folder(tmp_path / "codec", part=Part("own_codecs:small"))
    recipe, run = pictured(album(tmp_path / "album"), codec=own), tmp_path / "run"
    for start in (dry_run, lambda r, **k: fit(r, run, max_steps=2, **k)):
        with pytest.raises(BadCheckpoint, match="would import own_codecs:small"):
            start(recipe)
        assert not run.exists()
        start(recipe, trust=True)
    with pytest.raises(BadCheckpoint, match="own_codecs:small"):
        resume(run)
    assert resume(run, trust=True).codec.part.name == "own_codecs:small"


@pytest.mark.long
def test_a_model_is_looked_at_with_captions_even_if_none_is_held_out(tmp_path):
    """Held-out pictures without captions are null in the loss; the examples are then those of training."""
    folder = album(tmp_path / "album")
    held = {open_folder("test", data=folder, holdout=0.25).name(row).split("/")[-1] for row in range(11)}
    lines = (folder / "metadata.csv").read_text(encoding="utf-8").splitlines()
    silent = [",".join([*line.split(",")[:2], "", *line.split(",")[-2:]]) for line in lines]
    kept = [b if a.split(",")[0] in held else a for a, b in zip(lines, silent, strict=True)]
    (folder / "metadata.csv").write_text("\n".join(kept) + "\n", encoding="utf-8")
    trainer = Trainer(pictured(folder, text=True, label=True, attributes=True), None)
    assert trainer.held_out.texts is None
    examples, data = trainer.bundle().examples, trainer.data
    rows = [row for row, text in enumerate(data.texts) if text][:16]
    assert list(examples.texts) == [data.texts[row] for row in rows]
    told = data.take(rows)[1]
    assert torch.equal(torch.tensor(examples.attributes), told.vec)
    assert list(examples.labels) == told.label.tolist()
    cond = trainer.feed.take(range(11), Draw(0, 0, range(11)), trainer.denoiser.schedule, held_out=True)[1]
    assert cond.null_rows("text").all()
    assert not cond.null_rows("label").any()


def test_examples_are_of_the_same_held_out_samples(pictures):
    trainer = Trainer(pictured(pictures, label=True, text=True, attributes=True), None)
    examples, data = trainer.bundle().examples, trainer.held_out
    rows = [row for row, text in enumerate(data.texts) if text]
    assert len(rows) < len(data)
    assert list(examples.texts) == [data.texts[row] for row in rows]
    told = data.take(rows)[1]
    assert torch.equal(torch.tensor(examples.attributes), told.vec)
    assert list(examples.labels) == told.label.tolist()
    shown = Feed(pictured(pictures, label=True, text=True, image=HOLE), CPU)
    asked, (x0, own) = shown.told(12), data.take([rows[i % len(rows)] for i in range(12)])
    assert torch.equal(asked.image, x0)
    assert asked.label == own.label.tolist()
    assert torch.equal(asked.mask, middle_hole(12, SHAPE))


@pytest.mark.long
def test_long_captions_are_said_once_not_at_every_update(tmp_path):
    recipe = pictured(album(tmp_path / "album", count=12), text=True)
    recipe = replace(recipe, text=Part("bpe", {"vocabulary": 260, "length": 8}))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer = Trainer(recipe, None)
        for trainer.update in range(3):
            trainer.losses(range(4))
    mine = [w for w in heard if "only the first 8 are read" in str(w.message)]
    assert 1 <= len(mine) <= 4  # those of the first batch


@pytest.mark.long
def test_a_recipe_that_reads_what_is_not_there_is_one_line(tmp_path, pictures, codec):
    silent = album(tmp_path / "album", captions=False)
    with pytest.raises(BadArgument, match=r"has no captions to read; leave text out \(--set text=none\)") as caught:
        Trainer(pictured(silent, text=True), None)
    one_line(caught)
    for change, text in (
        ({"augment": 0.5}, "train.augment: got 0.5, but there is no image condition to noise"),
        ({"image": Part("gray"), "augment": 0.5}, "net cond: got image_t, but this net is not told how noisy"),
        ({"image": Part("lowres", {"factor": 3})}, "lowres factor: got 3"),
        ({"codec": codec, "plan": Plan()}, "clip: got a model of latents, which have no range"),
        ({"codec": tmp_path}, f"{tmp_path}: is no autoencoder"),
    ):
        with pytest.raises((BadArgument, BadCheckpoint)) as caught:
            Trainer(pictured(pictures, **change), None)
        assert one_line(caught).startswith(text)
    mute = replace(pictured(pictures, text=True), net=Part("mlp", {"width": 4, "depth": 1}))
    with pytest.raises(BadArgument, match="net cond: got text, this net takes none"):
        Trainer(mute, None)


def test_settings_name_texts_pictures_and_codecs(pictures):
    recipe = set_knobs(pictured(pictures), ["text=bpe", "text.length=9", "image=lowres", "image.factor=2", "codec=a/b"])
    assert recipe.text == Part("bpe", {"length": 9})
    assert recipe.image == Part("lowres", {"factor": 2})
    assert recipe.codec == "a/b"
    none = set_knobs(recipe, ["text=none", "image=none", "codec=none"])
    assert (none.text, none.image, none.codec) == (None, None, None)
    for setting, text in (
        ("text.length=3", "--set: got text.length, but there is no text; name one first, as in text=bpe"),
        ("image.factor=2", "--set: got image.factor, but there is no image; name one first, as in image=lowres"),
        ("codec.x=2", "--set: got codec.x, but a codec has no knobs; give its folder, as codec=PATH"),
    ):
        with pytest.raises(BadArgument) as caught:
            set_knobs(none, [setting])
        assert one_line(caught) == text


# ---- checkpoints -------------------------------------------------------------------------------------------------

TOLD = {"label": True, "text": True, "attributes": True}


@pytest.mark.long
@pytest.mark.parametrize("latent", [False, True], ids=["pixels", "latents"])
def test_a_checkpoint_carries_all_that_it_is_told_with(latent, tmp_path):
    """Without the data and the codec's folder: names, vocabulary, examples, and the trainer's preview bit for bit."""
    folder = album(tmp_path / "album")
    codec = codec_folder(tmp_path / "codec") if latent else None
    recipe = pictured(folder, **TOLD, codec=codec)
    trainer = Trainer(recipe, tmp_path)
    shake(trainer.ema.net, by=0.2)
    for _ in range(2):
        trainer.step()
    trainer.save()
    want = trainer.preview()
    shutil.rmtree(folder)
    if codec is not None:
        shutil.rmtree(codec)
    model = load(locate(tmp_path))
    assert torch.equal(sample(model, 16, seed=recipe.train.seed), want)
    assert (model.classes, model.attributes) == (KINDS, NAMES)
    assert model.examples == trainer.bundle().examples
    mine, theirs = (m.reader(["a red square, number 7", ""]) for m in (model, trainer.feed))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert model.reader.vocabulary == trainer.feed.reader.vocabulary > 260
    if latent:
        assert model.codec.hash == trainer.feed.codec.hash
        assert not any(p.requires_grad for p in model.codec.parameters())


@pytest.fixture(scope="module")
def saved(tmp_path_factory, pictures, codec) -> Path:
    """A checkpoint of latents with texts, classes and attributes."""
    path = tmp_path_factory.mktemp("bundles") / "one"
    save(untrained(pictures, **TOLD, codec=codec), path)
    return path


def altered(saved: Path, folder: Path, **changes: Any) -> Path:
    """A copy whose manifest says something else, with its own hash."""
    shutil.copytree(saved, folder)
    record = json.loads((folder / "bundle.json").read_text()) | changes
    record = {name: value for name, value in record.items() if value is not ...}
    record["sha256"] = own_sha256(record)
    (folder / "bundle.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("name", ["tokenizer.json", "codec.safetensors"])
def test_a_flipped_byte_of_what_it_reads_or_decodes_with_is_noticed(name, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=f"{name}: is corrupt") as caught:
        load(folder)
    one_line(caught)
    (folder / name).unlink()
    with pytest.raises(BadCheckpoint, match=f"{name}: is missing"):
        load(folder)


def test_pictures_too_travel_in_the_recipe(pictures, tmp_path):
    model = untrained(pictures, image=HOLE)
    save(model, tmp_path / "one")
    again, x = load(tmp_path / "one"), noise(2, *SHAPE)
    told = {"image": x, "mask": middle_hole(2, SHAPE)}
    assert torch.equal(sample(again, 2, **told), sample(model, 2, **told))


def test_a_manifest_of_before_is_read(pictures, tmp_path):
    """Without the keys that came with texts, attributes, codecs and pictures, in it and in its recipe."""
    model = untrained(pictures, label=True)
    save(model, tmp_path / "new")
    recipe = json.loads((tmp_path / "new" / "bundle.json").read_text())["recipe"]
    recipe = {name: value for name, value in recipe.items() if name not in ("text", "image", "codec")}
    recipe["train"].pop("augment")
    gone = dict.fromkeys(("attributes", "texts", "codec", "examples"), ...)
    old = load(altered(tmp_path / "new", tmp_path / "old", recipe=recipe, **gone))
    assert torch.equal(sample(old, 3), sample(model, 3))
    assert (old.attributes, old.reader, old.codec, old.examples, old.pair) == ((), None, None, Examples(), None)


FOREIGN = [
    ({"attributes": 5}, "got attributes 5, need a list of names"),
    ({"attributes": "hue"}, "got attributes 'hue', need a list of names"),
    ({"attributes": [1, 2]}, "got attributes [1, 2], need a list of names"),
    ({"texts": "tokenizer.json"}, "got texts 'tokenizer.json', need a list of names"),
    ({"texts": ["nope.json"]}, "needs nope.json, which is not among its files"),
    ({"files": 5}, "files and card must be JSON objects"),
    ({"texts": []}, "no captions to learn a vocabulary from, and no checkpoint that holds one"),
    ({"examples": 5}, "got examples of another form"),
    ({"examples": {"texts": [1]}}, "got examples of another form"),
    ({"examples": {"attributes": [["x"]]}}, "got examples of another form"),
    ({"codec": 5}, "codec: cannot be read"),
    ({"codec": {"name": "autoencoder"}}, "codec: cannot be read"),
    ({"codec": {"name": "os:system", "knobs": {}, "pixels": [3, 8, 8]}}, "codec: would import os:system"),
    ({"codec": None}, "does not fit this net"),
    ({"attributes": ["hue"]}, "does not fit this net"),
]


@pytest.mark.parametrize(("changes", "text"), FOREIGN, ids=[f"{i} {next(iter(r[0]))}" for i, r in enumerate(FOREIGN)])
def test_a_foreign_manifest_is_one_line(changes, text, saved, tmp_path):
    with pytest.raises(BadCheckpoint) as caught:
        load(altered(saved, tmp_path / "foreign", **changes))
    assert text in one_line(caught)


# ---- what data are scored and edited with ------------------------------------------------------------------------


@pytest.mark.long
def test_scores_tell_class_caption_attributes_and_picture_of_one_sample(pictures):
    """Sample i is told all of row i of those held-out ones that have captions; classes alone go in turn."""
    model = untrained(pictures, label=True, text=True, attributes=True, image=HOLE)
    data = open_folder("test", data=pictures, label="kind", attributes=NAMES, holdout=0.25)
    rows = [row for row, text in enumerate(data.texts) if text]
    told = said.told_by(model, data, range(4, 13))
    there = [rows[i % len(rows)] for i in range(4, 13)]
    x0, own = data.take(there)
    assert told.label == said.labels_by(model, data, range(4, 13)) == own.label.tolist()
    assert told.text == [data.texts[row] for row in there]
    assert [list(each.values()) for each in told.attributes] == own.vec.tolist()
    assert torch.equal(told.image, x0)
    assert cond_of(model, 9, told).present == ("label", "vec", "text", "image")
    only = untrained(pictures, label=True)
    assert said.told_by(only, data, range(4, 7)).label == said.labels_by(only, data, range(4, 7)) == [1, 2, 0]
    assert said.told_by(untrained(pictures), data, range(3)).nothing


def test_captions_are_read_as_the_data_s_conditions(pictures):
    model = untrained(pictures, text=True, label=True)
    data = open_folder("test", data=pictures, label="kind", holdout=0.25)
    read = said.Captioned(data, model.reader)
    x, cond = read.take(range(len(data)))
    assert torch.equal(x, data.take(range(len(data)))[0])
    tokens, mask = model.reader([text or "" for text in data.texts])
    assert torch.equal(cond.text, tokens)
    assert torch.equal(cond.text_mask, mask)
    assert cond.null_rows("text").tolist() == [text is None for text in data.texts]
    assert not cond.null_rows("label").any()
    assert (len(read), read.shape, read.levels, read.name(3)) == (len(data), SHAPE, 256, data.name(3))


# ---- columns of folders ------------------------------------------------------------------------------------------


def jsonl(folder: Path) -> None:
    """The same table as JSON lines."""
    text = (folder / "metadata.csv").read_text(encoding="utf-8")
    (folder / "metadata.csv").unlink()
    _, *rows = (line.split(",", 2) for line in text.splitlines())
    lines = []
    for file, kind, rest in rows:
        caption, hue, size = (rest.strip('"') if i < 0 else part for i, part in enumerate(rest.rsplit(",", 2)))
        lines.append(
            {"file_name": file, "kind": kind, "text": caption.strip('"'), "hue": float(hue), "size": float(size)}
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_columns_become_classes_and_attributes(form, tmp_path):
    folder = album(tmp_path / "album", count=10)
    if form == "jsonl":
        jsonl(folder)
    data = open_folder("train", data=folder, label="kind", attributes=("size", "hue"), holdout=0.2)
    numbers = [int(data.name(row).split("/")[-1][:3]) for row in range(len(data))]
    cond = data.take(range(len(data)))[1]
    assert data.attributes == ("size", "hue")
    assert cond.vec.tolist() == torch.tensor([[-1 + i % 4 / 2, i / 10] for i in numbers]).tolist()
    assert [data.classes[i] for i in cond.label.tolist()] == [KINDS[i % 3] for i in numbers]
    assert data.texts == tuple(None if i % 5 == 4 else f"a {COLOURS[i % 3]} square, number {i}" for i in numbers)
    bare = open_folder("train", data=folder, holdout=0.2)
    assert bare.take([0])[1] is None
    assert (bare.classes, bare.attributes) == ((), ())


def test_the_fingerprint_knows_the_values_and_is_the_old_one_without(tmp_path):
    """SHA-256 of the form, the classes, and of each image its key, label, caption, bytes, and values if any."""
    folder = album(tmp_path / "album", count=6)

    def mark(**knobs: Any) -> str:
        return open_folder("train", data=folder, holdout=0.2, **knobs).fingerprint

    data = open_folder("train", data=folder, holdout=0.2)
    total = hashlib.sha256(json.dumps(["pixels 1", data.form, []]).encode())
    for row in range(len(data)):
        path = Path(data.name(row))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(json.dumps([path.name, None, data.texts[row], digest]).encode())
    assert mark() == total.hexdigest()
    marks = [
        mark(),
        mark(label="kind"),
        mark(attributes=("hue",)),
        mark(attributes=("hue", "size")),
        mark(attributes=("size",)),
    ]
    assert len(set(marks)) == 5
    table, own = (folder / "metadata.csv").read_text(), f"{int(Path(data.name(0)).stem) / 6:.3f}"
    (folder / "metadata.csv").write_text(table.replace(f",{own},", ",0.99,"))
    assert mark(attributes=("hue",)) != marks[2]
    assert [mark(), mark(label="kind"), mark(attributes=("size",))] == [marks[0], marks[1], marks[4]]


COLUMNS = [
    ({"attributes": ("heu",)}, "metadata.csv line 2: no column 'heu'; there are file_name, kind, text, hue, size"),
    ({"label": "kin"}, "metadata.csv line 2: no column 'kin'"),
    ({"attributes": ("kind",)}, "metadata.csv line 2: got 'dark' for kind, need a finite number"),
    ({"attributes": ("text",)}, "metadata.csv line 2: got 'a red square, number 0' for text"),
]


@pytest.mark.parametrize(("knobs", "text"), COLUMNS)
def test_columns_that_are_not_there_or_no_numbers_are_named(knobs, text, pictures):
    with pytest.raises(BadData) as caught:
        open_folder("train", data=pictures, **knobs)
    assert one_line(caught).startswith(text)


@pytest.mark.parametrize("value", ["nan", "inf", "1e39", "", "red"])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_bad_number_is_named_with_its_line(form, value, tmp_path):
    folder = album(tmp_path / "album", count=6)
    name, line = "metadata.csv", 5
    if form == "jsonl":
        jsonl(folder)
        name, line = "metadata.jsonl", 4
    text = (folder / name).read_text(encoding="utf-8")
    number, bad = ("0.500", value) if form == "csv" else ('"hue": 0.5', f'"hue": {json.dumps(value)}')
    (folder / name).write_text(text.replace(number, bad, 1), encoding="utf-8")
    with pytest.raises(BadData, match=f"{name} line {line}: got {value!r} for hue, need a finite number") as caught:
        open_folder("train", data=folder, attributes=("hue",))
    one_line(caught)


def test_columns_need_a_table(tmp_path):
    folder = album(tmp_path / "album", count=6)
    (folder / "metadata.csv").unlink()
    for knobs in ({"label": "kind"}, {"attributes": ("hue",)}):
        with pytest.raises(BadData, match="no table with labels or captions, so there is no column to read"):
            open_folder("train", data=folder, **knobs)
