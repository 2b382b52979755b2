"""High resolution: windows are parts of their pictures, stages are means of them, and both are keyed by the update."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from inkdrop.bundle import load
from inkdrop.core.cond import Cond
from inkdrop.core.noise import Draw
from inkdrop.core.schedule import cosine, edm, flow, linear
from inkdrop.errors import BadArgument, BadShape
from inkdrop.find import Part
from inkdrop.generate import sample
from inkdrop.losses.aware import LossAware
from inkdrop.nets.embed import Coordinates
from inkdrop.recipe import read
from inkdrop.train.dry import peak_memory
from inkdrop.train.feed import Feed
from inkdrop.train.frames import Frame, Frames, Lowered
from inkdrop.train.loop import fit, resume
from inkdrop.train.trainer import Trainer
from runs import digits, files_of, log_of, points

CPU = torch.device("cpu")
WINDOWS = {"windows": (0.25, 0.5), "full": 0.3}
STAGES = {"stages": ((4, 0.25), (2, 0.25))}


# ---- windows ---------------------------------------------------------------------------------------------------


def test_a_window_is_its_part_of_the_picture_and_says_where():
    feed, seen = Feed(digits(**WINDOWS), CPU), set()
    whole = feed.data.take(range(30))[0]
    for update in range(30):
        x0, cond = feed.take(range(30), Draw(0, update, range(30)), None)
        frame = feed.frames.at(update)
        if frame == Frame():
            assert torch.equal(x0, whole)
            assert cond.window is None
            continue
        side = round(8 * frame.window)
        assert x0.shape == (30, 1, side, side)
        for row, (top, left, high, wide) in enumerate((cond.window * 8).tolist()):
            assert high == wide == side
            top, left = round(top), round(left)
            assert torch.equal(x0[row], whole[row, :, top : top + side, left : left + side])
            seen.add((side, top, left))
    assert {place for side, *place in seen if side == 4 for place in place} == set(range(5)), "all corners, evenly"
    assert len(seen) > 40


def test_corners_are_uniform():
    """Of 2,000 windows of half a picture each of 25 corners is hit 80 times, within four standard errors."""
    frames = Frames(digits(windows=(0.5,), full=0.01), (1, 8, 8))
    places = range(2000)
    _, cond = frames.cut(torch.zeros(2000, 1, 8, 8), None, Draw(0, 0, places))
    counts = Counter(map(tuple, (cond.window[:, :2] * 8).tolist()))
    assert len(counts) == 25
    assert all(abs(count - 80) < 4 * 80**0.5 for count in counts.values())


@pytest.mark.parametrize("full", [0.1, 0.3, 0.5, 0.9])
def test_the_share_of_full_pictures_is_the_stated_one(full):
    """Of the first n updates floor(n·full) are full, and the others draw each size alike."""
    frames = Frames(digits(windows=(0.25, 0.5), full=full), (1, 8, 8))
    seen = [frames.at(update) for update in range(1000)]
    for n in range(1001):
        assert sum(frame == Frame() for frame in seen[:n]) == math.floor(n * full)
    sizes = Counter(frame.window for frame in seen if frame != Frame())
    assert set(sizes) == {0.25, 0.5}
    assert abs(sizes[0.25] - sizes[0.5]) < 4 * sum(sizes.values()) ** 0.5
    assert all(frame.factor == 1 for frame in seen)


def test_coordinates_of_a_window_are_those_of_its_part_of_the_picture():
    layer, whole = Coordinates(2), torch.zeros(1, 3, 12, 20)
    full = layer(None, whole)
    assert full.shape == (1, 2, 12, 20)
    assert_close(full[0, 0, :, 7], (2 * torch.arange(12) + 1) / 12 - 1)
    assert_close(full[0, 1, 5], (2 * torch.arange(20) + 1) / 20 - 1)
    window = torch.tensor([[3 / 12, 10 / 20, 6 / 12, 5 / 20], [0, 0, 6 / 12, 5 / 20]])
    part = layer(Cond(window=window), torch.zeros(2, 3, 6, 5))
    assert_close(part[0], full[0, :, 3:9, 10:15])
    assert_close(part[1], full[0, :, :6, :5])


@pytest.mark.parametrize("net", [{}, {"patch": 2}, "dit"])
def test_a_net_is_told_where_its_window_lies(net):
    net = Part("dit", {"width": 8, "depth": 1, "heads": 1}) if net == "dit" else Part("unet", {**SMALL, **net})
    net = shaken(replace(digits(**WINDOWS), net=net)).denoiser.net.eval()
    x, clock = torch.randn(1, 1, 4, 4).repeat(2, 1, 1, 1), torch.full((2,), 0.3)
    windows = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0, 0.5, 0.5]])
    said = net(x, clock, Cond(window=windows))
    assert (said[0] - said[1]).abs().max() > 1e-3
    whole = torch.tensor([0.0, 0, 1, 1]).repeat(2, 1)
    assert torch.equal(net(x, clock, Cond(window=whole)), net(x, clock, None))


SMALL = {"width": 4, "multipliers": [1], "blocks": 1, "middle_attention": False}


def shaken(recipe, seed=0):
    """A trainer whose net has random weights everywhere."""
    trainer = Trainer(recipe, None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.denoiser.net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return trainer


def test_a_net_trained_in_windows_samples_at_full_size(tmp_path):
    fit(digits(**WINDOWS), tmp_path)
    model = load(tmp_path)
    assert sample(model, 3).shape == (3, 1, 8, 8)
    assert model.denoiser.net.stem.in_channels == 3


def test_where_a_pixel_lies_is_learned_from_windows():
    """Pictures dark above and bright below, seen in quarters that do not show which: the net answers by coordinates."""
    trainer = Trainer(digits(windows=(0.5,), full=0.02, batch=32, lr=1e-2, steps=150, warmup=5, ema=0.9), None)
    ramp = torch.linspace(-1, 1, 8)[:, None].expand(8, 8)[None, None]
    trainer.feed._states[id(trainer.data)] = Still(ramp, len(trainer.data))
    for _ in range(150):
        trainer.step()
    x = sample(trainer.bundle(), 8, steps=10, cond=Cond(label=torch.arange(8)))
    rows = x.mean((0, 1, 3))
    assert rows[0] < -0.4
    assert rows[-1] > 0.4


class Still:
    """A data set of one picture."""

    def __init__(self, picture, count):
        self.picture, self.count = picture, count

    def take(self, rows):
        return self.picture.repeat(len(rows), 1, 1, 1), Cond(label=torch.zeros(len(rows), dtype=torch.int64))


# ---- stages ----------------------------------------------------------------------------------------------------


def test_stages_begin_and_end_where_their_shares_say():
    frames = Frames(digits(steps=40, **STAGES), (1, 8, 8))
    assert [frames.at(update).factor for update in (0, 9, 10, 19, 20, 39, 40)] == [4, 4, 2, 2, 1, 1, 1]
    assert frames.trials() == {Frame(4): 0, Frame(2): 10, Frame(): 20}


def test_a_stage_sees_means_of_pixels():
    feed = Feed(digits(steps=8, **STAGES), CPU)
    whole = feed.data.take(range(5))[0]
    for update, factor in ((0, 4), (2, 2), (4, 1)):
        x0, _ = feed.take(range(5), Draw(0, update, range(5)), None)
        n = 8 // factor
        assert_close(x0, whole.reshape(5, 1, n, factor, n, factor).mean((3, 5)))
    assert feed.take(range(5), Draw(0, 0, range(5)), None, held_out=True)[0].shape[2] == 8


@pytest.mark.parametrize("schedule", [cosine(), linear(), edm(), flow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("factor", [2, 4])
def test_levels_of_a_stage_are_those_of_the_means_of_noisy_pictures(schedule, factor):
    """Means of factor² pixels of alpha·x0 + sigma·eps have sigma/factor: log SNR is 2·log(factor) higher."""
    times = schedule.pick(torch.linspace(0, 0.999, 50, dtype=torch.float64))
    full, low = schedule(times), Lowered(schedule, factor)(times)
    best = float(schedule(schedule.least).lam)
    wanted = (full.lam + math.log(factor)).clamp(max=best)
    assert_close(low.lam, wanted, rtol=1e-9, atol=1e-9)
    assert_close(schedule(low.t).lam, low.lam, rtol=1e-9, atol=1e-9)
    inside = full.lam + math.log(factor) < best - 1e-6
    assert inside.sum() > 30
    assert_close(Lowered(schedule, factor).time_of(low.lam[inside]), times[inside], rtol=1e-6, atol=1e-9)
    noise = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ratio = torch.nn.functional.avg_pool2d(noise, factor).std() * factor
    assert abs(float(ratio) - 1) < 0.05


def test_shifted_losses_are_asked_at_their_levels_and_others_at_their_own():
    told = {}
    for shift in (True, False):
        trainer = Trainer(digits(steps=8, shift=shift, **STAGES), None)
        levels = told[shift] = []
        trainer.loss = partial(asked, levels)
        for update in (0, 4):
            trainer.update = update
            trainer.losses(range(2))
    plain = told[False][0].lam
    assert_close(told[True][0].lam, plain + math.log(4))
    assert told[True][1].lam == told[False][1].lam == plain


def asked(levels, denoiser, x0, cond, draw):
    """A loss that notes the level of t = 1/2."""
    levels.append(denoiser.schedule(0.5))
    return {"loss": x0.flatten(1).sum(1)}


# ---- both ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [WINDOWS, STAGES], ids=["windows", "stages"])
def test_a_run_resumed_in_the_middle_is_the_whole_run(how, tmp_path):
    settings = {"steps": 16, "save_every": 16, "preview_every": 16, **how}
    fit(digits(**settings), tmp_path / "whole")
    fit(digits(**settings), tmp_path / "parts", max_steps=2)
    resume(tmp_path / "parts", max_steps=6)
    resume(tmp_path / "parts")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    last = "checkpoints/step-00000016"
    assert files_of(tmp_path / "whole" / last) == files_of(tmp_path / "parts" / last)
    fit(digits(**{key: value for key, value in settings.items() if key not in how}), tmp_path / "plain")
    assert files_of(tmp_path / "plain" / last) != files_of(tmp_path / "whole" / last)


@pytest.mark.parametrize("how", [WINDOWS, STAGES], ids=["windows", "stages"])
@pytest.mark.parametrize("also", [{"draws": "aware"}, {"draws": "spread"}, {"precision": "float16"}])
def test_draws_and_half_precision_go_with_it(how, also, tmp_path, monkeypatch):
    """Stopped in the first stage and in the second; aware times are aimed by then, else they would be independent."""
    monkeypatch.setattr("inkdrop.train.draws.LossAware", lambda: LossAware(bands=2, history=1))
    settings = {"batch": 8, "steps": 8, "save_every": 8, "preview_every": 8, "lr": 1e-2, "warmup": 1, **how}
    fit(digits(**settings, **also), tmp_path / "whole")
    fit(digits(**settings, **also), tmp_path / "parts", max_steps=1)
    resume(tmp_path / "parts", max_steps=3)
    resume(tmp_path / "parts")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    last = "checkpoints/step-00000008"
    assert files_of(tmp_path / "whole" / last) == files_of(tmp_path / "parts" / last)
    plain = Trainer(digits(**settings), None)
    for _ in range(8):
        plain.step()
    changed = load(tmp_path / "whole", weights="raw").denoiser
    assert not torch.equal(changed.net.stem.weight, plain.denoiser.net.stem.weight)
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / "whole") if "loss" in line)


def test_a_resumed_run_of_more_updates_has_its_stages_at_their_shares_of_the_new_number(tmp_path):
    """As docs/training/objectives.md says: at update 5 of 8 it sees full pictures, at 5 of 16 means of 2×2.

    Without its stages it goes on at full size.
    """
    seen = []

    def heard(kind, facts):
        if kind == "update":
            seen.append(facts["update"])

    recipe = digits(steps=8, save_every=4, preview_every=16, **STAGES)
    assert [Frames(recipe, (1, 8, 8)).at(update).factor for update in range(8)] == [4, 4, 2, 2, 1, 1, 1, 1]
    fit(recipe, tmp_path, max_steps=5)
    resume(tmp_path, settings=["train.steps=16"], heard=heard)
    assert seen == list(range(6, 17))
    longer = read(tmp_path / "recipe.json")
    factors = [Frames(longer, (1, 8, 8)).at(update).factor for update in range(16)]
    assert factors == [4] * 4 + [2] * 4 + [1] * 8
    resume(tmp_path, settings=["train.steps=40", "train.stages=[]"], max_steps=17)
    assert Frames(read(tmp_path / "recipe.json"), (1, 8, 8)).at(16) == Frame()


@pytest.mark.parametrize("how", [WINDOWS, STAGES], ids=["windows", "stages"])
def test_micro_batches_are_the_batch(how):
    one, two = (Trainer(digits(accumulate=n, **how), None) for n in (1, 2))
    for trainer in (one, two):
        trainer.gradient()
    for mine, theirs in zip(one.denoiser.parameters(), two.denoiser.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_memory_is_told_for_full_pictures():
    plain, staged = (Trainer(digits(**how), None) for how in ({}, STAGES))
    assert peak_memory(staged) == peak_memory(plain)
    assert staged.update == 0


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: digits(windows=(0.5,), stages=((2, 0.5),)), BadArgument, "in windows or in stages"),
        (lambda: digits(full=0.3), BadArgument, "no effect without train.windows"),
        (lambda: digits(shift=False), BadArgument, "no effect without train.stages"),
        (lambda: digits(windows=(0.5, 0.5)), BadArgument, "each once"),
        (lambda: digits(windows=(1.0,)), BadArgument, "numbers in"),
        (lambda: digits(stages=((2, 0.2), (4, 0.2))), BadArgument, "factors of at least 2 that fall"),
        (lambda: digits(stages=((4, 0.5), (2, 0.5))), BadArgument, "less than 1"),
        (lambda: Trainer(digits(stages=((3, 0.5),)), None), BadShape, "does not divide"),
        (lambda: Trainer(points(windows=(0.5,)), None), BadShape, "need pictures"),
        (lambda: Trainer(replace(digits(**STAGES), net=Part("mlp")), None), BadShape, "net x"),
        (lambda: Trainer(replace(digits(**WINDOWS), image=Part("hole")), None), BadArgument, "image condition"),
        (lambda: Trainer(replace(digits(**STAGES), loss=Part("hybrid")), None), BadArgument, "train.shift=false"),
        (
            lambda: Trainer(replace(digits(**STAGES), loss=Part("simple", {"times": "lognormal"})), None),
            BadArgument,
            "train.shift=false",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(make, error, text):
    with pytest.raises(error, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)
