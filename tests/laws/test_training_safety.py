"""R3, R15, R25: micro-batches change nothing, and what a run does when numbers, memory, disk or data fail it."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inkdrop.bundle import checkpoints, load, locate
from inkdrop.errors import BadArgument, BadData, Diverged
from inkdrop.find import Part
from inkdrop.parallel import shares
from inkdrop.recipe import open_data
from inkdrop.settings import Train
from inkdrop.train.ema import Ema
from inkdrop.train.guard import NotFinite, offenders
from inkdrop.train.interrupt import Stopped, hold_interrupts
from inkdrop.train.loop import fit, resume
from inkdrop.train.loss_scale import LossScale
from inkdrop.train.order import rows_of
from inkdrop.train.run import Run
from inkdrop.train.trainer import Trainer
from runs import digits, files_of, log_of, points


def gradients(trainer: Trainer) -> torch.Tensor:
    """The gradient that the weights hold, as one float64 vector."""
    return torch.cat([p.grad.flatten() for p in trainer.denoiser.net.parameters()]).double()


def perturbed(recipe, seed: int = 0) -> Trainer:
    """A trainer whose every weight was moved: fresh nets end in zeros, whose gradients are mostly 0."""
    trainer, generator = Trainer(recipe, None), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.denoiser.net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return trainer


# ---- R15: accumulation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "parts"), [(8, 1), (8, 4), (7, 3), (5, 5), (1, 1)])
def test_shares_are_the_places_in_their_order(count, parts):
    found = shares(range(3, 3 + count), parts)
    assert [place for part in found for place in part] == list(range(3, 3 + count))
    assert len(found) == parts
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.long
@pytest.mark.parametrize("make", [points, digits])
@pytest.mark.parametrize("parts", [3, 4, 8])
def test_micro_batches_have_the_gradient_of_the_whole_batch(make, parts):
    """Clipped at the norm of the whole: a part's own norm would clip otherwise. Within 1e-6 of a norm of 0.5."""
    whole, split = (perturbed(make(batch=8, clip_grad=0.5, accumulate=n)) for n in (1, parts))
    sizes: list[int] = []
    loss = split.loss
    split.loss = lambda *args: (sizes.append(len(args[1])), loss(*args))[1]
    for update in (0, 5):
        whole.update = split.update = update
        facts = [trainer.gradient() for trainer in (whole, split)]
        assert facts[0]["grad_norm"] > 0.5, "nothing was clipped: the test is blind"
        torch.testing.assert_close(gradients(split), gradients(whole), rtol=0, atol=1e-6)
        assert facts[1] == pytest.approx(facts[0], rel=1e-5)
    assert sizes == [len(part) for part in shares(range(8), parts)] * 2


@pytest.mark.long
def test_micro_batches_have_the_rates_and_weights_of_the_whole_batch():
    """After 20 updates, as many as without them: steps are optimiser updates.

    Adam turns rounding in a gradient g into a share of lr where |g| is near its epsilon; seen: 2e-6 at most.
    """
    ones, fours = (perturbed(points(batch=8, accumulate=n, lr=0.005)) for n in (1, 4))
    rates = [[trainer.step()["lr"] for _ in range(20)] for trainer in (ones, fours)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 10
    for a, b in ((ones.denoiser.net, fours.denoiser.net), (ones.ema.net, fours.ema.net)):
        for mine, theirs in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


def test_more_parts_than_samples_are_refused():
    for wrong in (0, 9):
        with pytest.raises(BadArgument, match=f"train.accumulate: got {wrong}, need 1 to train.batch, which is 8"):
            Train(batch=8, accumulate=wrong)


# ---- R3: losses that are not finite ------------------------------------------------------------------------------


class Poisoned:
    """Puts NaN into the loss, or only its gradient, of the samples of given rows; counts the calls."""

    def __init__(self, trainer: Trainer, rows: set[int], *, where: str = "loss") -> None:
        self.trainer, self.rows, self.where = trainer, rows, where
        self.losses, trainer.losses = trainer.losses, self

    def __call__(self, rows, places=None):
        terms = self.losses(rows, places)
        for place, row in enumerate(rows):
            if row in self.rows:
                mask = torch.arange(len(rows)) == place
                if self.where == "loss":
                    terms["loss"] = torch.where(mask, math.nan, terms["loss"])
                else:  # 0·√x has a gradient of 0·∞ at 0
                    zero = (terms["loss"] * 0).sqrt()
                    terms["loss"] = terms["loss"] + torch.where(mask, zero, 0.0)
        return terms


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_offending_samples_are_named(where, accumulate):
    trainer = perturbed(points(accumulate=accumulate))
    rows = rows_of(0, 8, 90, 0)
    Poisoned(trainer, {rows[2], rows[7]}, where=where)
    with pytest.raises(NotFinite) as caught:
        trainer.step()
    names = tuple(trainer.data.name(row) for row in (rows[2], rows[7]))
    assert caught.value.names == names
    text = f"the {where} of update 0 is not finite for {names[0]}, {names[1]}; look at it, or take it out of the data"
    assert str(caught.value) == f"training: {text}"
    assert trainer.update == 0


def test_offenders_are_found_in_few_passes():
    """Two among 64: at most 2·log₂ 64 + 1 questions on either side of each halving."""
    asked = []

    def finite(places):
        asked.append(len(places))
        return not {11, 40} & set(places)

    assert offenders(finite, range(64)) == [11, 40]
    assert len(asked) <= 25
    assert len(offenders(lambda places: False, range(64))) == 16


def poisoned_fit(monkeypatch, rows_or_updates, *, by: str):
    """Every trainer made from now on has NaN losses in these rows, or at these updates."""
    losses = Trainer.losses

    def poisoned(self, rows, places=None):
        terms = losses(self, rows, places)
        bad = [row in rows_or_updates for row in rows] if by == "rows" else [self.update in rows_or_updates] * len(rows)
        return {**terms, "loss": torch.where(torch.tensor(bad), math.nan, terms["loss"])}

    monkeypatch.setattr(Trainer, "losses", poisoned)


@pytest.mark.long
def test_an_update_is_skipped_counted_and_told(monkeypatch, tmp_path):
    """Updates 5 and 9 are left out of 24: weights, average and moments are as if they had not been, and it goes on."""
    reference = Trainer(points(), None)
    for update in range(24):
        if update in (5, 9):
            reference.update += 1
        else:
            reference.step()
    poisoned_fit(monkeypatch, {5, 9}, by="updates")
    heard: list[tuple[str, dict]] = []
    fit(points(skips=2), tmp_path / "run", heard=lambda kind, facts: heard.append((kind, facts)))
    raw = load(tmp_path / "run", weights="raw").denoiser
    for mine, theirs in zip(raw.net.parameters(), reference.denoiser.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    told = [facts for kind, facts in heard if kind == "skipped"]
    assert [(t["update"], t["skipped"], t["not_finite"]) for t in told] == [(6, 1, "loss"), (10, 2, "loss")]
    assert "is not finite for each of the 8 samples" in told[0]["text"]
    lines = [line for line in log_of(tmp_path / "run") if "skipped" in line]
    assert [(line["update"], line["skipped"]) for line in lines] == [(6, 1), (10, 2)]
    assert all(len(line["samples"]) == 8 for line in lines)
    assert json.loads((locate(tmp_path / "run") / "state.json").read_text())["guard"]["skipped"] == 2


@pytest.mark.long
@pytest.mark.parametrize(("first", "back", "stops"), [(13, 8, (9, 14, 15, 17)), (7, 0, (8, 9, 12))])
def test_after_repeats_the_run_goes_back_with_half_the_rate_and_resumes_bit_for_bit(
    first, back, stops, monkeypatch, tmp_path
):
    """The rate is what breaks it: from the update `first` on losses are NaN where it is above a half of the recipe's.

    From 13: it goes back from update 16 to the checkpoint at 8, and on with half the rate. From 7: the checkpoint at 8
    is written in the middle of the trouble, and is no good one. So does a run that was stopped before, in between and
    after, and one that was killed after it went back, before the next save.
    """
    losses = Trainer.losses

    def fragile(self, rows, places=None):
        terms = losses(self, rows, places)
        bad = self.update >= first and self.guard.rate > 0.5
        return {**terms, "loss": terms["loss"] * (math.nan if bad else 1.0)}

    monkeypatch.setattr(Trainer, "losses", fragile)
    heard: list[tuple[str, dict]] = []
    settings = {"skips": 3, "decay": "constant", "warmup": 0, "dropout": 0.3}
    whole = tmp_path / "whole"
    fit(points(**settings), whole, heard=lambda kind, facts: heard.append((kind, facts)))
    [told] = [facts for kind, facts in heard if kind == "rollback"]
    assert (told["update"], told["from"], told["rate"], told["rollback"]) == (back, first + 3, 0.5, 1)
    assert "not finite in 3 updates in a row" in told["text"]
    lines = log_of(whole)
    assert [line["update"] for line in lines] == sorted(line["update"] for line in lines)
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == [1e-3] * back + [0.5e-3] * (24 - back), "what was undone is in the log"
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    for late in checkpoints(killed):
        if int(late.name[5:]) > back:
            shutil.rmtree(late)
    for stop in stops:
        fit(points(**settings), tmp_path / f"stopped-{stop}", max_steps=stop)
        assert locate(tmp_path / f"stopped-{stop}").name == f"step-{stop:08d}"
    for run in (killed, *(tmp_path / f"stopped-{stop}" for stop in stops)):
        assert locate(run).name != "step-00000024" if checkpoints(run) else run == killed
        resume(run)
        assert files_of(locate(run)) == files_of(locate(whole)), run.name
        assert log_of(run) == lines, run.name


def test_without_a_checkpoint_the_run_goes_back_to_its_start(monkeypatch, tmp_path):
    poisoned_fit(monkeypatch, {2, 3}, by="updates")
    heard: list[tuple[str, dict]] = []
    with pytest.raises(Diverged) as caught:
        fit(points(skips=2, rollbacks=2), tmp_path, heard=lambda kind, facts: heard.append((kind, facts)))
    assert [facts["rate"] for kind, facts in heard if kind == "rollback"] == [0.5, 0.25]
    assert "gave up at update 4 after 2 returns; it has no checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_bad_data_end_a_run_with_their_names_and_its_last_good_checkpoint(monkeypatch, tmp_path):
    """A third of the samples is poisoned from the 8th update on, which no learning rate mends."""
    losses = Trainer.losses

    def poisoned(self, rows, places=None):
        terms = losses(self, rows, places)
        bad = torch.tensor([row < 30 and self.update > 8 for row in rows])
        return {**terms, "loss": torch.where(bad, math.nan, terms["loss"])}

    monkeypatch.setattr(Trainer, "losses", poisoned)
    with pytest.raises(Diverged) as caught:
        fit(points(skips=2), tmp_path)
    text, data = str(caught.value), open_data(points().data, "train")
    assert any(f"for {data.name(row)}" in text for row in range(30))
    assert "after 3 returns; its last good checkpoint is" in text
    assert text.endswith("step-00000008")
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000008"]
    load(tmp_path)


@pytest.mark.long
def test_weights_that_are_not_finite_are_never_saved(monkeypatch, tmp_path):
    """An update that breaks them is found where a checkpoint is due, or at the end, and undone."""
    apply, broken = Trainer.apply, []

    def breaking(self):
        facts = apply(self)
        if self.update in (12, 23) and self.update not in broken:
            broken.append(self.update)
            with torch.no_grad():
                next(self.denoiser.net.parameters()).view(-1)[0] = math.inf
        return facts

    monkeypatch.setattr(Trainer, "apply", breaking)
    heard: list[str] = []
    fit(points(save_every=4, preview_every=30, steps=23), tmp_path, heard=lambda kind, facts: heard.append(kind))
    assert heard.count("rollback") == 2
    assert locate(tmp_path).name == "step-00000023"
    raw = load(tmp_path, weights="raw").denoiser
    assert all(bool(torch.isfinite(p).all()) for p in raw.parameters())


# ---- float16 -----------------------------------------------------------------------------------------------------


def test_the_factor_on_the_loss_doubles_and_halves():
    scale = LossScale(4.0, interval=3)
    for _ in range(3):
        scale.grow()
    assert (scale.scale, scale.good) == (8.0, 0)
    scale.grow()
    assert scale.back_off()
    assert (scale.scale, scale.good) == (4.0, 0), "an overflow starts the count anew"
    assert not LossScale(1.0).back_off()


def test_float16_follows_float32():
    """20 updates of a net whose layers run in float16: losses within its 11 bits, over some layers."""
    runs = [perturbed(points(precision=kind, batch=8)) for kind in ("float32", "float16")]
    losses = torch.tensor([[trainer.step()["loss"] for _ in range(20)] for trainer in runs])
    assert not torch.equal(*losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=1e-3)
    assert next(runs[1].denoiser.net.parameters()).dtype == torch.float32


def test_an_overflow_is_computed_again_and_is_not_a_bad_sample():
    """A factor of 2^40 overflows float16: it is halved until it does not, and the gradient is that of a small one."""
    trainer, other = (perturbed(points(precision="float16")) for _ in range(2))
    trainer.scale.scale, other.scale.scale = 2.0**40, 2.0**8
    facts = trainer.gradient()
    other.gradient()
    assert 1 < facts["loss_scale"] < 2.0**30
    torch.testing.assert_close(gradients(trainer), gradients(other), rtol=5e-3, atol=1e-4)
    before = trainer.scale.scale
    Poisoned(trainer, {rows_of(0, 8, 90, 0)[2]}, where="gradient")
    with pytest.raises(NotFinite, match="the gradient of update 0"):
        trainer.gradient()
    assert trainer.scale.scale == before, "a bad sample does not spend the factor"


@pytest.mark.long
@pytest.mark.parametrize("start", [4.0, 2.0**18])
def test_the_factor_is_saved_and_resumed(start, monkeypatch, tmp_path):
    """It doubles every 5 updates, or overflows at once, and so depends on the past; also where it is halved between."""
    monkeypatch.setattr(LossScale, "__init__", lambda self, scale=start, good=0, interval=5: self.__dict__.update(
        scale=scale, good=good, interval=interval))  # fmt: skip
    fit(points(precision="float16"), tmp_path / "whole")
    lines = log_of(tmp_path / "whole")
    assert len({line["loss_scale"] for line in lines if "loss_scale" in line}) > 2, "it never moved: the test is blind"
    fit(points(precision="float16"), tmp_path / "run", max_steps=11)
    resume(tmp_path / "run")
    assert files_of(locate(tmp_path / "run")) == files_of(locate(tmp_path / "whole"))
    assert log_of(tmp_path / "run") == lines


# ---- R25: memory that runs out -----------------------------------------------------------------------------------

NO_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes. Error code 12"


@pytest.mark.long
@pytest.mark.parametrize(
    "error", [RuntimeError(NO_MEMORY), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()]
)
def test_memory_that_runs_out_halves_the_micro_batch_alone(error, monkeypatch, tmp_path):
    """More than 2 of 8 samples at once do not fit from update 10 on: the numbers are those of accumulate=4."""
    losses = Trainer.losses

    def narrow(self, rows, places=None):
        terms = losses(self, rows, places)
        if self.update >= 10 and len(rows) > 2:
            raise error
        return terms

    monkeypatch.setattr(Trainer, "losses", narrow)
    heard: list[tuple[str, dict]] = []
    fit(points(), tmp_path / "run", heard=lambda kind, facts: heard.append((kind, facts)))
    [told] = [facts for kind, facts in heard if kind == "memory"]
    assert (told["update"], told["accumulate"], told["micro_batch"]) == (11, 4, 2)
    assert "train.accumulate=4" in told["text"]
    monkeypatch.undo()
    fit(points(), tmp_path / "wide")
    mine, theirs = (log_of(tmp_path / name) for name in ("run", "wide"))
    assert [line for line in mine if "out_of_memory" in line] == [
        {"update": 11, "out_of_memory": {"accumulate": 4, "micro_batch": 2}}
    ]
    mine = [line for line in mine if "loss" in line]
    theirs = [line for line in theirs if "loss" in line]
    assert len(mine) == 24
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    monkeypatch.setattr(Trainer, "losses", narrow)
    fit(points(), tmp_path / "stopped", max_steps=14)
    for asked, expected in ((1, 4), (8, 8), (3, 3)):  # 1 is what the run began with; another number is a wish
        trainer = Trainer(points(accumulate=asked), None)
        trainer.load(locate(tmp_path / "stopped"))
        assert trainer.accumulate == expected
    resume(tmp_path / "stopped")
    assert files_of(locate(tmp_path / "stopped")) == files_of(locate(tmp_path / "run"))
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "run")


def test_one_sample_that_does_not_fit_ends_the_run_with_a_line(monkeypatch, tmp_path):
    losses = Trainer.losses

    def full(self, rows, places=None):
        if self.update == 12:
            raise RuntimeError(NO_MEMORY)
        return losses(self, rows, places)

    monkeypatch.setattr(Trainer, "losses", full)
    with pytest.raises(BadArgument, match="memory runs out at update 12 even with one sample at a time.*step-00000012"):
        fit(points(), tmp_path)
    assert locate(tmp_path).name == "step-00000012"


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    trainer = Trainer(points(), None)

    def broken(rows, places=None):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(trainer, "losses", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer.step()
    assert trainer.accumulate == 1


# ---- disk, data, signals -----------------------------------------------------------------------------------------


def assert_nothing_half_written(run: Path) -> None:
    assert [p.name for p in run.rglob("*.part")] == []
    for line in (run / "stats.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    fit(points(dropout=0.3), run)
    return run


@pytest.mark.long
@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_full_disk_ends_a_run_with_one_line_and_it_can_be_resumed(what, unbroken, monkeypatch, tmp_path):
    """At the save of update 16; or, a line being half written, at the log of update 13 and ever after."""
    run, fsync, write = tmp_path / "run", os.fsync, os.write
    full: list[bool] = []

    def no_sync(handle: int) -> None:
        if what == "checkpoint" and "step-00000016" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    def half(handle: int, content) -> int:
        if what == "log" and (full or b'"update": 13' in bytes(content)):
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            full.append(True)
            return write(handle, content[:9])
        return write(handle, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_sync)
        patch.setattr(os, "write", half)
        with pytest.raises(BadArgument) as caught:
            fit(points(dropout=0.3), run)
    text = str(caught.value)
    assert "cannot be written (No space left on device); free some space" in text
    assert "\n" not in text
    assert ("go on from step-00000008" if what == "checkpoint" else "go on from step-00000013") in text
    assert f"inkdrop resume {run}" in text
    assert_nothing_half_written(run)
    resume(run)
    assert files_of(locate(run)) == files_of(locate(unbroken))
    if what == "checkpoint":
        assert log_of(run) == log_of(unbroken)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_data_that_disappear_end_a_run_with_a_checkpoint_and_their_name(workers, monkeypatch, tmp_path):
    """Pictures that are read from their files as they are needed, one of which is deleted while the run is on."""
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i:02d}.png")
    train = digits(null_rate=0, steps=20, workers=workers)
    recipe = replace(train, data=Part("folder", {"data": str(folder), "cache": False}))
    rows: list[str] = []

    def remove(kind: str, facts: dict) -> None:
        if kind == "update" and facts["update"] == 5:
            rows.extend(p.name for p in folder.iterdir())
            for path in list(folder.iterdir()):
                path.unlink()

    with pytest.raises(BadData) as caught:
        fit(recipe, tmp_path / "run", heard=remove)
    text = str(caught.value)
    assert any(name in text for name in rows)
    assert "No such file" in text
    at = int(locate(tmp_path / "run").name.removeprefix("step-"))
    assert 5 <= at <= 5 + 2 * workers, "batches that were read before it happened are used"
    assert f"stopped at update {at}; go on from step-{at:08d} with: inkdrop resume" in text
    assert "\n" not in text


@pytest.mark.long
def test_sigterm_leaves_a_checkpoint_and_ends_cleanly(unbroken, monkeypatch, tmp_path):
    """It arrives between the optimiser's step and the average's: the update is finished and logged, then saved."""
    run, whole = tmp_path / "run", Ema.update

    def asked(self, net, update):
        if update == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        whole(self, net, update)

    heard: list[tuple[str, dict]] = []
    with monkeypatch.context() as patch:
        patch.setattr(Ema, "update", asked)
        with pytest.raises(Stopped, match=r"^terminated at update 13 of 24; "):
            fit(points(dropout=0.3), run, heard=lambda kind, facts: heard.append((kind, facts)))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert heard[-1] == ("end", {"update": 13, "why": "terminated"})
    resume(run)
    assert files_of(locate(run)) == files_of(locate(unbroken))
    assert log_of(run) == log_of(unbroken)


@pytest.mark.long
@pytest.mark.parametrize("place", ["held_out_loss", "preview", "save"])
def test_an_interrupt_in_a_look_or_a_save_is_made_good(place, unbroken, monkeypatch, tmp_path):
    """In the middle of what is due at update 16: it is taken up again there, and the log is that of one run."""
    run, whole, hit = tmp_path / "run", getattr(Trainer, place), []

    def interrupted(self, *args):
        if self.update == 16 and not hit:
            hit.append(True)
            raise KeyboardInterrupt
        return whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, place, interrupted)
        with pytest.raises(Stopped):
            fit(points(dropout=0.3), run)
    assert locate(run).name == "step-00000016"
    resume(run)
    assert files_of(locate(run)) == files_of(locate(unbroken))
    assert log_of(run) == log_of(unbroken)
    names = [sorted(p.name for p in (each / "previews").iterdir()) for each in (run, unbroken)]
    assert names[0] == names[1]


def test_a_handler_of_somebody_else_is_left_alone(monkeypatch, tmp_path):
    """A server that has its own way to end keeps it."""
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        heard = lambda kind, facts: os.kill(os.getpid(), signal.SIGTERM) if facts.get("update") == 3 else None  # noqa: E731
        fit(points(steps=5, preview_every=5, save_every=5), tmp_path, heard=heard)
        with hold_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
            assert len(got) == 1
        assert got == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert locate(tmp_path).name == "step-00000005"


def test_a_run_killed_before_it_began_can_be_begun(tmp_path):
    """run.json is written first, recipe.json last: what is there without it does not keep the folder."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json", ".recipe.json.part"):
        (run / name).write_text("{")
    fit(points(steps=2), run)
    about = json.loads((run / "run.json").read_text())
    assert about["updates"] == 2
    assert about["hours"] >= 0
    (run / "run.json").unlink()
    resume(run, settings=["train.steps=3"])
    resume(run, settings=["train.steps=4"])
    about = json.loads((run / "run.json").read_text())
    assert about["updates"] == 4
    assert [again["update"] for again in about["resumed"]] == [3]
    assert {"versions", "hardware", "command", "commit", "seed"} <= set(about) & set(about["resumed"][0])


def test_a_run_says_how_it_ended_when_it_has_nothing_to_do(tmp_path):
    trainer = Trainer(points(steps=2), tmp_path)
    trainer.update = 2
    assert Run(trainer, trainer.log).go(None, None) == "finished"
