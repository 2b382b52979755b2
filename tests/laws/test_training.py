"""Law 6 and R10, R16: the average of the weights, the rate, the order, resuming bit for bit, and honest feedback."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from inkdrop.bundle import checkpoints, load, locate
from inkdrop.core.cond import Cond
from inkdrop.core.noise import Draw, Keyed, generator
from inkdrop.errors import BadArgument, BadCheckpoint, InkdropWarning
from inkdrop.find import Part
from inkdrop.recipe import open_data
from inkdrop.settings import Train
from inkdrop.train import loop
from inkdrop.train.ema import Ema
from inkdrop.train.guard import NotFinite
from inkdrop.train.interrupt import Stopped, hold_interrupts
from inkdrop.train.loop import fit, resume
from inkdrop.train.order import learning_rate, rows_of
from inkdrop.train.trainer import Trainer
from runs import digits, files_of, log_of, points


def weights(net: nn.Module) -> torch.Tensor:
    """Every weight as one float64 vector."""
    return torch.cat([p.detach().flatten() for p in net.parameters()]).double()


# ---- R10: the average ------------------------------------------------------------------------------------------


def test_the_average_is_its_closed_form_after_500_updates():
    """m = Π d_k·w_init + Σ_n (1 − d_n)·Π_{k>n} d_k·w_n, d_n = min(decay, (1 + n)/(10 + n)), through a real run.

    Three decays of one run: the trainer's own, which is warm after 290 updates, one that never is, and none.
    Tolerance: 500 float32 roundings of 6e-8 a weight, as a random walk: about 1e-6.
    """
    trainer = Trainer(points(batch=1, lr=0.01, ema=0.97, decay="constant"), None)
    averages = {0.97: trainer.ema, 0.9999: Ema(trainer.denoiser.net, 0.9999), 0.0: Ema(trainer.denoiser.net, 0.0)}
    seen = [weights(trainer.denoiser.net)]
    assert all(torch.equal(weights(ema.net), seen[0]) for ema in averages.values()), "it starts at the weights"
    for n in range(500):
        trainer.step()
        seen.append(weights(trainer.denoiser.net))
        for decay in (0.9999, 0.0):
            averages[decay].update(trainer.denoiser.net, n)
    for decay, ema in averages.items():
        shares, left = [], 1.0
        for n in reversed(range(500)):
            keep = min(decay, (1 + n) / (10 + n))
            shares.append((1 - keep) * left)
            left *= keep
        shares = torch.tensor([left, *reversed(shares)], dtype=torch.float64)
        assert float(shares.sum()) == pytest.approx(1)
        expected = shares @ torch.stack(seen)
        assert (seen[-1] - expected).abs().max() > (1e-3 if decay else -1), "nothing was averaged: the test is blind"
        torch.testing.assert_close(weights(ema.net), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("updates", [1, 2, 5, 30])
def test_the_average_warms_up(updates):
    """While (1 + n)/(10 + n) is below the decay, what is left of the start is Π (1 + n)/(10 + n) = 1/C(N + 9, 9)."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = Ema(net, 0.9999)
    nn.init.ones_(net.weight)
    for n in range(updates):
        ema.update(net, n)
    expected = 1 - 1 / math.comb(updates + 9, 9)
    torch.testing.assert_close(float(ema.net.weight.detach()), expected, rtol=0, atol=1e-6)


def test_buffers_are_copied_not_averaged():
    net = nn.BatchNorm1d(2)
    ema = Ema(net, 0.999)
    net(torch.randn(16, 2) + 3)
    ema.update(net, 0)
    for mine, theirs in zip(ema.net.buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert int(ema.net.num_batches_tracked) == 1


def test_both_kinds_of_weights_are_kept(tmp_path):
    recipe = points(steps=10)
    trainer = Trainer(recipe, None)
    for _ in range(10):
        trainer.step()
    averaged = fit(recipe, tmp_path / "run")
    assert torch.equal(weights(averaged.denoiser), weights(trainer.ema.net))
    for kind, net in (("raw", trainer.denoiser.net), ("ema", trainer.ema.net)):
        assert torch.equal(weights(load(tmp_path / "run", weights=kind).denoiser), weights(net)), kind
    assert not torch.equal(weights(trainer.denoiser.net), weights(trainer.ema.net))
    with pytest.raises(BadArgument, match="weights: got 'mean', need ema or raw"):
        load(tmp_path / "run", weights="mean")


# ---- the rate and the order --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "steps", "final"), [(0, 30, 0.0), (7, 30, 0.1), (30, 30, 0.0), (40, 30, 0.5)])
def test_the_rate_warms_up_and_falls_as_a_cosine(warmup, steps, final):
    train = Train(steps=steps, warmup=warmup, final=final, lr=2e-3)
    trace = [learning_rate(n, train) for n in range(steps + 3)]
    n = np.arange(steps + 3)
    part = np.clip((n - warmup) / max(1, steps - warmup), 0, 1)
    fall = final + (1 - final) * np.cos(np.pi / 2 * part) ** 2  # (1 + cos 2a)/2 = cos² a
    expected = 2e-3 * np.where(n < warmup, (n + 1) / max(1, warmup), fall)
    np.testing.assert_allclose(trace, expected, rtol=1e-12, atol=1e-18)
    constant = replace(train, decay="constant")
    assert [learning_rate(k, constant) for k in range(warmup, steps + 3)] == [2e-3] * max(0, steps + 3 - warmup)


def test_the_rate_of_an_update_is_the_one_it_logs():
    """Adam's first step is lr·sign(gradient): the first update moves no weight further than lr/warmup."""
    trainer = Trainer(points(warmup=4, lr=0.02), None)
    before = weights(trainer.denoiser.net)
    facts = trainer.step()
    assert facts["lr"] == pytest.approx(0.005)
    moved = (weights(trainer.denoiser.net) - before).abs().max()
    torch.testing.assert_close(float(moved), 0.005, rtol=1e-4, atol=0)


@given(total=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 2**63 - 1), start=st.integers(0, 10**12))
def test_an_epoch_is_a_permutation_whatever_the_batch(total, batch, seed, start):
    first = start * total  # a multiple of the epoch, far into a run
    stream = [rows_of(first + i, 1, total, seed)[0] for i in range(2 * total)]
    assert sorted(stream[:total]) == sorted(stream[total:]) == list(range(total))
    for update in (first // batch + 1, (first + total) // batch):
        places = range(update * batch - first, (update + 1) * batch - first)
        rows = rows_of(update, batch, total, seed)
        assert len(rows) == batch
        inside = [(row, stream[p]) for row, p in zip(rows, places, strict=True) if 0 <= p < 2 * total]
        assert all(mine == theirs for mine, theirs in inside)


def test_epochs_and_seeds_are_shuffled_anew():
    """Three orders of 1,000: an equal pair by chance has a probability of 1/1000!."""
    orders = [rows_of(0, 1000, 1000, 0), rows_of(1, 1000, 1000, 0), rows_of(0, 1000, 1000, 1), list(range(1000))]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_a_sample_draws_by_its_place_alone():
    """Rows split over micro-batches or ranks see what they saw together, and one stream does not move another."""
    whole, parts = Draw(5, 7, range(6)), [Draw(5, 7, range(3)), Draw(5, 7, range(3, 6))]
    for stream in ("time", "dropout", "augment"):
        together = whole.uniform(stream)
        assert torch.equal(together, torch.cat([p.uniform(stream) for p in parts]))
        assert len(set(together.tolist())) == 6
    asked = Draw(5, 7, range(6))
    assert torch.equal(asked.normal((6, 2)), torch.cat([p.normal((3, 2)) for p in parts]))
    for other in (Draw(6, 7, range(6)), Draw(5, 8, range(6)), Draw(5, 7, range(1, 7))):
        assert not torch.equal(other.uniform(), whole.uniform())
    streams = [whole.uniform(s) for s in ("time", "dropout", "augment")]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(streams, 2))
    start = Keyed(5, range(6)).start((6, 2))
    assert not torch.isin(asked.normal((6, 2)), start).any(), "training sees the noise that sampling starts from"


def test_conditions_are_dropped_at_the_stated_rate():
    """Within 4 standard errors of 0.3 over 2,000 rows, and the same rows when an update is repeated."""
    trainer = Trainer(points(batch=100, null_rate=0.3), None)
    seen: list[torch.Tensor] = []

    def spy(denoiser, x0, cond: Cond, draw):
        seen.append(cond.null_rows("label"))
        return {"loss": x0.sum(1) * 0}

    trainer.loss = spy
    for update in (*range(20), 3):
        trainer.update = update
        trainer.losses(range(90))
    dropped = torch.cat(seen[:20]).double()
    assert abs(float(dropped.mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(dropped))
    assert torch.equal(seen[20], seen[3])
    assert not torch.equal(seen[4], seen[3])


# ---- resuming bit for bit ----------------------------------------------------------------------------------------


def run_to_end(folder: Path, **train: object) -> Path:
    fit(points(dropout=0.3, **train), folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """24 updates with dropout, never stopped."""
    return run_to_end(tmp_path_factory.mktemp("runs") / "unbroken")


def assert_same_run(broken: Path, unbroken: Path) -> None:
    """Weights, average, optimiser, the log, and the last preview."""
    mine, theirs = locate(broken), locate(unbroken)
    assert mine.name == theirs.name == "step-00000024"
    assert set(files_of(mine)) == {"net.safetensors", "raw.safetensors", "state.safetensors"}
    assert files_of(mine) == files_of(theirs)
    assert log_of(broken) == log_of(unbroken)
    last = "previews/step-00000024.png"
    assert (broken / last).read_bytes() == (unbroken / last).read_bytes()


def test_dropout_is_at_work(unbroken, tmp_path):
    """Otherwise the tests below would say nothing of it."""
    fit(points(dropout=0.0), tmp_path / "run")
    assert files_of(locate(tmp_path / "run")) != files_of(locate(unbroken))


@pytest.mark.parametrize("stop", [1, 11, 16, 23])
def test_stopping_and_resuming_changes_nothing(stop, unbroken, tmp_path):
    """Also where no preview, line or checkpoint was due; with the global generator elsewhere in between."""
    run = tmp_path / "run"
    fit(points(dropout=0.3), run, max_steps=stop)
    assert locate(run).name == f"step-{stop:08d}"
    torch.manual_seed(999)
    resume(run)
    assert_same_run(run, unbroken)


CHILD = """
import os, sys
from pathlib import Path
import safetensors.torch
from runs import points
from inkdrop.train.loop import fit

whole = safetensors.torch.save_file
def killed(tensors, path, *rest):
    if "step-00000016" in str(path) and Path(path).name == "state.safetensors":
        whole(tensors, path)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        os._exit(9)
    whole(tensors, path, *rest)
safetensors.torch.save_file = killed
fit(points(dropout=0.3), sys.argv[1])
"""


def test_a_process_killed_inside_a_save_leaves_the_checkpoint_before_it(unbroken, tmp_path):
    """Half of the third file of the save at update 16 is written; then a new process goes on from update 8."""
    run = tmp_path / "run"
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(run)], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 9, done.stderr
    assert [p.name for p in checkpoints(run)] == ["step-00000008"]
    assert [p.name for p in (run / "checkpoints").iterdir() if not p.name.startswith(".")] == ["step-00000008"]
    load(run)
    resume(run)
    assert_same_run(run, unbroken)
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == [], "the rest was not removed"


def test_a_log_that_was_cut_off_is_mended(unbroken, tmp_path):
    """Killed between checkpoints: later lines are written again, and a line cut in the middle is dropped."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    for late in (16, 24):
        shutil.rmtree(run / "checkpoints" / f"step-{late:08d}")
    text = (run / "stats.jsonl").read_text()
    for cut in (text[: len(text) // 2], text.rstrip("}\n") + "}"):  # the second ends in a brace, but not whole
        (run / "stats.jsonl").write_text(cut)
        resume(run)
        assert_same_run(run, unbroken)
        for late in (16, 24):
            shutil.rmtree(run / "checkpoints" / f"step-{late:08d}")


def test_a_log_with_a_hole_does_not_stop_a_run(unbroken, tmp_path):
    """The machine lost power after a checkpoint reached the disk, and lines before it did not."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    for late in (16, 24):
        shutil.rmtree(run / "checkpoints" / f"step-{late:08d}")
    lines = (run / "stats.jsonl").read_text().splitlines(keepends=True)
    (run / "stats.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    resume(run)
    assert files_of(locate(run)) == files_of(locate(unbroken))
    assert log_of(run) == [line for line in log_of(unbroken) if not 5 <= line["update"] <= 8]


def test_ctrl_c_tears_nothing(unbroken, tmp_path, monkeypatch):
    """The signal arrives between the optimiser's step and the average's: the update is finished, then saved."""
    run, whole = tmp_path / "run", Ema.update

    def interrupted(self, net, update):
        if update == 12:
            os.kill(os.getpid(), signal.SIGINT)
        whole(self, net, update)

    heard: list[tuple[str, dict]] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Ema, "update", interrupted)
            with pytest.raises(Stopped, match=r"^interrupted at update 13 of 24; go on with: inkdrop resume ") as stop:
                fit(points(dropout=0.3), run, heard=lambda kind, facts: heard.append((kind, facts)))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard[-1] == ("end", {"update": 13, "why": "interrupted"})
    assert isinstance(stop.value, KeyboardInterrupt), "a script does not go on with half a model"
    assert stop.value.bundle.card["updates"] == 13
    resume(run)
    assert files_of(locate(run)) == files_of(locate(unbroken))


@pytest.mark.parametrize("again", [False, True])
def test_the_time_limit_counts_from_the_call(again, unbroken, tmp_path, monkeypatch):
    """Opening the data and the net takes 40 of the 100 seconds that a cluster gives."""
    clock, left = [1000.0], list[float]()

    class Slow(Trainer):
        def __init__(self, *args, **rest):
            super().__init__(*args, **rest)
            clock[0] += 40.0

        def run(self, *, max_steps=None, max_time=None):
            left.append(max_time)
            return "max-time"

    monkeypatch.setattr(loop, "Trainer", Slow)
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    if again:
        resume(unbroken, max_time=100.0)
    else:
        fit(points(), tmp_path / "run", max_time=100.0)
    assert left == [60.0]


def test_an_ignored_ctrl_c_stays_ignored():
    """As in a process that runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        try:
            with hold_interrupts():
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("it was raised")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(unbroken, tmp_path):
    run = tmp_path / "run"
    fit(points(dropout=0.3), run, max_steps=3)
    shutil.rmtree(run / "checkpoints")
    resume(run)
    assert_same_run(run, unbroken)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    """Also where its end, 13, was due for nothing."""
    run = tmp_path / "run"
    fit(points(steps=13), run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    heard: list[str] = []
    resume(run, heard=lambda kind, facts: heard.append(kind))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert heard == ["end"]
    with pytest.raises(BadArgument, match="max_steps: got 10, but the run is at update 13"):
        resume(run, max_steps=10)


def test_lengthening_a_run_is_the_longer_run(tmp_path):
    """With a constant rate the schedule does not depend on the length, so 12 + 12 is 24."""
    fit(points(steps=12, decay="constant"), tmp_path / "a")
    resume(tmp_path / "a", settings=["train.steps=24"])
    fit(points(steps=24, decay="constant"), tmp_path / "b")
    assert files_of(locate(tmp_path / "a")) == files_of(locate(tmp_path / "b"))


def test_resuming_says_what_is_wrong(unbroken, tmp_path):
    with pytest.raises(BadCheckpoint, match="is no run folder"):
        resume(tmp_path)
    with pytest.raises(BadArgument, match="need train"):
        resume(unbroken, settings=["net.width=16"])
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    recipe = replace(points(dropout=0.3), data=Part("mixture1d", {"count": 90, "labelled": True, "seed": 1}))
    trainer = Trainer(recipe, None)
    with pytest.warns(InkdropWarning, match="data have changed"):
        trainer.load(locate(run))


def test_looking_does_not_change_training(tmp_path):
    """Previews, held-out losses, logs and saves draw nothing that training would have drawn."""
    fit(points(dropout=0.3, preview_every=2, save_every=6, log_every=1), tmp_path / "a")
    fit(points(dropout=0.3, preview_every=24, save_every=24, log_every=24), tmp_path / "b")
    assert files_of(locate(tmp_path / "a")) == files_of(locate(tmp_path / "b"))


# ---- what is never saved, and what is dropped --------------------------------------------------------------------


def test_a_loss_that_is_not_finite_changes_nothing():
    trainer = Trainer(points(), None)
    for _ in range(3):
        trainer.step()
    nets = (trainer.denoiser.net, trainer.ema.net)
    before = [weights(net) for net in nets]
    moments = {i: {k: v.clone() for k, v in e.items()} for i, e in trainer.optimiser.state_dict()["state"].items()}
    take = trainer.data.take
    trainer.data.take = lambda rows: (take(rows)[0] * math.nan, take(rows)[1])
    with pytest.raises(NotFinite, match="the loss of update 3 is not finite for each of the 8 samples; lower train.lr"):
        trainer.step()
    assert trainer.update == 3
    assert all(torch.equal(was, weights(net)) for was, net in zip(before, nets, strict=True))
    torch.testing.assert_close(trainer.optimiser.state_dict()["state"], moments, rtol=0, atol=0)


def test_only_the_newest_checkpoints_stay(tmp_path):
    fit(points(steps=14, save_every=3, keep=2), tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000012", "step-00000014"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


# ---- R16: early, honest feedback ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "looks"), [(100, [100]), (101, [100, 101])])
def test_a_preview_and_a_held_out_loss_come_by_update_100(steps, looks, tmp_path):
    """Whatever the recipe's own period, and at the end; once, where that is the same."""
    seen: list[tuple[str, int]] = []
    recipe = points(steps=steps, batch=2, preview_every=10_000, save_every=10_000, log_every=50)
    fit(recipe, tmp_path, heard=lambda kind, facts: seen.append((kind, facts["update"])))
    expected = [(kind, update) for update in looks for kind in ("held_out", "preview")]
    assert [s for s in seen if s[0] != "update"] == [*expected, ("checkpoint", steps), ("end", steps)]
    assert [line["update"] for line in log_of(tmp_path) if "held_out" in line] == looks
    assert sorted(p.name for p in (tmp_path / "previews").iterdir()) == [f"step-{n:08d}.png" for n in looks]


def test_previews_start_from_the_same_noise_at_every_step():
    trainer = Trainer(points(seed=3), None)
    heard: list[torch.Tensor] = []
    trainer.ema.net.register_forward_pre_hook(lambda net, args: heard.append(args[0].clone()))
    images = [trainer.preview()]
    for _ in range(30):
        trainer.step()
    torch.manual_seed(77)
    images.append(trainer.preview())
    starts = heard[:: len(heard) // 2]
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], Keyed(3, range(16)).start((16, 1)))
    assert torch.equal(images[1], trainer.preview())
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(("target", "samples"), [("v", 73), ("eps", 73), ("x0", 40)])
def test_the_held_out_loss_is_its_formula(target, samples):
    """Of a fresh net, whose answer is 0: mean (p·x0 + q·eps)², computed with NumPy from the betas and the keys.

    Row i is in band i mod 5 of time, 0 at the clean end; the noise is that of update 2^63, place i, stream 1.
    """
    recipe = replace(points(seed=4, count=samples), target=Part(target))
    trainer = Trainer(recipe, None)
    got = trainer.held_out_loss()
    x0 = open_data(recipe.data, "test").take(range(samples))[0].numpy()[:, 0].astype(np.float64)
    abar = np.cumprod(1 - trainer.denoiser.schedule.betas.numpy())
    row = np.arange(samples)
    u = (row % 5 + (row // 5 + 0.5) / math.ceil(samples / 5)) / 5
    alpha, sigma = (f[np.floor(u * 100).astype(int)] for f in (np.sqrt(abar), np.sqrt(1 - abar)))
    eps = np.array([generator(4 + 2**63, 4 * i + 1, 2**63).standard_normal() for i in row])
    y = {"v": alpha * eps - sigma * x0, "eps": eps, "x0": x0}[target]
    assert got["samples"] == samples
    assert got["loss"] == pytest.approx((y**2).mean(), rel=1e-5)
    assert got["bands"] == pytest.approx([(y[i::5] ** 2).mean() for i in range(5)], rel=1e-5)
    assert trainer.held_out_loss() == got


def test_the_bands_run_from_clean_to_noise():
    """A fresh net says 0: in v the error is E eps² = 1 at the clean end and E x0² = 0.18 at the noisy one."""
    recipe = points(count=2000)
    bands = Trainer(recipe, None).held_out_loss(count=2000)["bands"]
    x0 = open_data(recipe.data, "test").take(range(2000))[0]
    assert bands == sorted(bands, reverse=True)
    assert bands[0] > 0.85
    assert bands[-1] < 2 * float(x0.square().mean()) < 0.5


def test_the_held_out_loss_is_that_of_the_average_and_falls_with_training():
    trainer = Trainer(points(batch=32, lr=0.01), None)
    first = trainer.held_out_loss()
    for parameter in trainer.denoiser.net.parameters():
        nn.init.normal_(parameter)
    assert trainer.held_out_loss() == first
    trainer = Trainer(points(batch=32, lr=0.01), None)
    for _ in range(60):
        trainer.step()
    assert trainer.held_out_loss()["loss"] < 0.9 * first["loss"]


def test_few_held_out_samples_have_no_bands():
    assert Trainer(points(count=4), None).held_out_loss() == {"samples": 4}


def test_limits_always_stop(tmp_path):
    """A run of a million updates ends when its time is up, with a checkpoint of where it was."""
    ends: list[dict] = []
    recipe = points(steps=10**6, save_every=10**6, preview_every=10**6)
    listen = lambda kind, facts: ends.append(facts) if kind == "end" else None  # noqa: E731
    began = time.monotonic()
    fit(recipe, tmp_path / "run", max_time=0.2, heard=listen)
    assert time.monotonic() - began >= 0.2
    assert ends[0]["why"] == "max-time"
    assert 1 <= ends[0]["update"] < 5000
    assert locate(tmp_path / "run").name == f"step-{ends[0]['update']:08d}"
    spent = json.loads((locate(tmp_path / "run") / "state.json").read_text())["seconds"]
    assert spent < 2, "it is asked after every update"
    resume(tmp_path / "run", max_steps=ends[0]["update"] + 2, heard=listen)
    assert ends[1] == {"update": ends[0]["update"] + 2, "why": "max-steps"}
    for wrong in ({"max_steps": 0}, {"max_time": -1.0}, {"max_time": math.nan}):
        with pytest.raises(BadArgument, match="need more than 0"):
            fit(recipe, tmp_path / "other", **wrong)
        with pytest.raises(BadArgument, match="need more than 0"):
            resume(tmp_path / "run", **wrong)
    assert not (tmp_path / "other").exists()


def test_pictures_train_too(tmp_path):
    """Images, classes and guidance: the last preview is that of the last weights, on disk whole."""
    from inkdrop.generate import sample
    from inkdrop.picture import save_grid

    bundle = fit(digits(), tmp_path / "run")
    save_grid(sample(bundle, 16, seed=0), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "run/previews/step-00000006.png").read_bytes()
    assert sorted(p.name for p in (tmp_path / "run/previews").iterdir()) == [
        "step-00000004.png", "step-00000006.png",
    ]  # fmt: skip


def test_a_preview_that_cannot_be_written_leaves_no_half(tmp_path, monkeypatch):
    """The disk is full after recipe.json and run.json: the third file is the preview of update 4."""
    whole, calls = os.fsync, itertools.count(1)

    def full(handle: int) -> None:
        if next(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadArgument, match=r"step-00000004\.png: cannot be written \(No space left"):
        fit(digits(save_every=6), tmp_path / "run")
    assert list((tmp_path / "run" / "previews").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"plan": ["plan.steps=101"]}, "sampler steps: got 101"),
        ({"plan": ["sampler.eta=2"]}, "ddim eta"),
        ({"plan": ["sampler=ddpm", "sampler.variance=learned"]}, "does not predict a variance"),
        ({"plan": ["loss.weight=snrr"]}, "did you mean snr"),
        ({"plan": ["net.learned_variance=true"]}, "cannot train a learned variance"),
        ({"plan": ["net.classes=7"]}, "the data have 3"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_is_written(change, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        fit(points(), tmp_path / "run", settings=change["plan"])
    assert not (tmp_path / "run").exists()


def test_guidance_without_dropped_conditions_is_refused_before_training(tmp_path):
    from inkdrop.plan import Plan

    with pytest.raises(BadArgument, match="null_rate=0"):
        fit(points(null_rate=0, plan=Plan(steps=3, guide=(Part("cfg", {"scale": 2.0}),))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, match in (("photos", "not an empty folder"), ("file", "not an empty folder"), ("file/run", "cannot be")):
        with pytest.raises(BadArgument, match=match):
            fit(points(), tmp_path / out)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["mine.txt"]
    fit(points(steps=2), tmp_path / "run")
    with pytest.raises(BadArgument, match="holds a run already"):
        fit(points(steps=2), tmp_path / "run")
