"""Power-function averages (R10) and those that are made of them: closed forms, direct tracking, and bits that last."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.integrate import quad
from torch import nn

from inkdrop.bundle import load, save
from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.train.ema import LENGTHS, Powers, mixture, power_of
from inkdrop.train.guard import NotFinite
from inkdrop.train.loop import fit, resume
from inkdrop.train.snapshots import reconstruct
from inkdrop.train.trainer import Trainer
from runs import files_of, log_of, points


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()]).double()


def shares(last, length):
    """w_s's share in the average at update `last`, s = 1 … last: p(s) ∝ s^gamma integrated over (s − 1, s]."""
    gamma = power_of(length)
    return np.array(
        [quad(lambda s: (gamma + 1) * s**gamma / last ** (gamma + 1), s - 1, s)[0] for s in range(1, last + 1)]
    )


@pytest.mark.parametrize("length", [0.02, 0.05, 0.08, 0.1, 0.15, 0.25])
def test_a_profile_has_its_length(length):
    """The standard deviation of p(s) ∝ s^gamma on [0, 1], by numerical integration."""
    gamma = power_of(length)
    mass, first, second = (quad(lambda s, k=k: s ** (gamma + k), 0, 1)[0] for k in range(3))
    assert gamma > 0
    assert math.sqrt(second / mass - (first / mass) ** 2) == pytest.approx(length, rel=1e-6)


def test_known_powers():
    """Karras et al. 2024, section 3.1: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert power_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert power_of(0.10) == pytest.approx(6.94, abs=5e-3)
    for wrong in (0.0, -0.1, 0.3):
        with pytest.raises(BadArgument, match="ema length"):
            power_of(wrong)


def test_the_averages_are_their_closed_form_after_500_updates_in_parts_and_resumed(tmp_path):
    """R10: the integrals of the profile are the shares, to 1e-6, with two micro-batches and a stop at 230."""
    recipe = points(batch=4, accumulate=2, lr=0.01, decay="constant", snapshots=1000, steps=500, save_every=230)
    trainer, seen = Trainer(recipe, tmp_path), []
    start = weights(trainer.denoiser.net)
    for n in range(500):
        if n == 230:
            trainer.save()
            trainer = Trainer(recipe, tmp_path)
            trainer.load(tmp_path / "checkpoints" / f"step-{n:08d}")
        trainer.step()
        seen.append(weights(trainer.denoiser.net))
    assert trainer.powers.count == 500
    for length, average in zip(LENGTHS, trainer.powers.averages, strict=True):
        expected = torch.from_numpy(shares(500, length)) @ torch.stack(seen)
        assert (seen[-1] - expected).abs().max() > 1e-3, "nothing was averaged: the test is blind"
        assert (start - expected).abs().max() > 1e-2
        torch.testing.assert_close(torch.cat([p.flatten() for p in average]).double(), expected, rtol=0, atol=1e-6)


def test_a_skipped_update_is_not_counted(monkeypatch):
    trainer = Trainer(points(snapshots=8), None)
    trainer.step()
    plain = trainer.loss
    monkeypatch.setattr(trainer, "loss", lambda *args: {name: value / 0 for name, value in plain(*args).items()})
    with pytest.raises(NotFinite):
        trainer.step()
    assert trainer.powers.count == 1


@pytest.fixture(scope="module")
def walk():
    """A random walk of weights with drift, 4,000 updates: (snapshots of every 250, the weights after each update)."""
    net = nn.Linear(6, 6).double()
    powers, generator, kept, way = Powers(net), torch.Generator().manual_seed(0), [], []
    for n in range(1, 4001):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.001)
        powers.update(net)
        way.append(weights(net))
        if n % 250 == 0:
            flat = [torch.cat([p.flatten() for p in average]) for average in powers.averages]
            kept += [(n, width, each) for width, each in zip(LENGTHS, flat, strict=True)]
    return kept, torch.stack(way)


@pytest.mark.parametrize("length", [0.05, 0.06, 0.08, 0.1, 0.13])
def test_a_mixture_of_snapshots_is_the_average_that_was_tracked(length, walk):
    """To 1e-4 of the average.

    Where the length is one that was kept, the mixture is that average itself; beyond both, 0.13 is made to 1.4e-4.
    """
    kept, way = walk
    factors, error = mixture([(n, width) for n, width, _ in kept], (4000, length))
    made = sum(each * factor for (_, _, each), factor in zip(kept, factors, strict=True))
    tracked = torch.from_numpy(_exact(4000, length)) @ way
    assert error < (1e-9 if length in LENGTHS else 1e-2)
    assert (made - tracked).norm() / tracked.norm() < (1e-4 if length <= 0.1 else 3e-4)
    other = torch.from_numpy(_exact(4000, length + 0.02)) @ way
    assert (made - other).norm() / tracked.norm() > 1e-3, "the test could not tell lengths apart"


def _exact(last, length):
    step = np.arange(last + 1) / last
    return np.diff(step ** (power_of(length) + 1))


@pytest.mark.parametrize("times", [(1,), (4, 8, 12), (30_000, 65_537), (30_000, 60_000, 90_000)])
def test_a_mixture_is_the_least_squares_of_the_whole_matrix(times):
    """However few updates there are, or one more than a block has: the factors, and what they leave of the profile."""
    ends = [(n, width) for n in times for width in LENGTHS]
    last = times[-1]
    whole = np.stack([np.pad(_exact(*end), (0, last - end[0])) for end in ends], 1)
    expected = np.linalg.lstsq(whole, _exact(last, 0.07), rcond=None)[0]
    factors, error = mixture(ends, (last, 0.07))
    np.testing.assert_allclose(factors, expected, rtol=1e-6, atol=1e-9)
    left = np.linalg.norm(whole @ expected - _exact(last, 0.07)) / np.linalg.norm(_exact(last, 0.07))
    assert error == pytest.approx(left, rel=1e-6, abs=1e-12)


SNAPSHOTS = {"snapshots": 4, "steps": 48, "save_every": 16, "preview_every": 48, "keep": 1, "lr": 1e-2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    fit(points(**SNAPSHOTS), folder)
    return folder


def test_a_run_s_average_of_another_length_is_the_tracked_one(run, tmp_path):
    """Tracked beside the same run, whose updates are a function of its seed; the rest of float32 sets the tolerance."""
    trainer, seen = Trainer(points(**SNAPSHOTS), None), []
    for _ in range(48):
        trainer.step()
        seen.append(weights(trainer.denoiser.net))
    for length in (0.05, 0.08, 0.1):
        made = reconstruct(run, length)
        tracked = torch.from_numpy(_exact(48, length)) @ torch.stack(seen)
        got = weights(made.denoiser.net)
        assert (got - tracked).norm() / (seen[0] - seen[-1]).norm() < 1e-3
        assert made.card["ema_length"] == length
    save(made, tmp_path / "made")
    assert torch.equal(weights(load(tmp_path / "made").denoiser.net), got)


def test_an_average_is_mixed_in_float64(run):
    """From the files themselves: each number is the nearest float32, or its neighbour."""
    kept = [load_file(path / "averages.safetensors") for path in sorted((run / "averages").iterdir())]
    ends = [(int(each["count"]), width) for each in kept for width in LENGTHS]
    factors, _ = mixture(ends, (48, 0.07))
    for name, made in reconstruct(run, 0.07).denoiser.net.named_parameters():
        parts = [each[f"{width:.2f}/{name}"].double() for each in kept for width in LENGTHS]
        expected = sum(factor * part for factor, part in zip(factors, parts, strict=True))
        torch.testing.assert_close(made.detach().double(), expected, rtol=2**-23, atol=1e-12)


def test_an_average_up_to_an_older_checkpoint_needs_the_snapshots_before_it_alone(run, tmp_path):
    """Neither later ones nor that of its own update, whose averages it holds: damage there is no matter."""
    fit(points(**SNAPSHOTS), tmp_path, max_steps=16)
    older = tmp_path / "checkpoints" / "step-00000016"
    before = weights(reconstruct(tmp_path, 0.08).denoiser.net)
    shutil.copytree(run / "averages", tmp_path / "averages", dirs_exist_ok=True)
    assert torch.equal(weights(reconstruct(older, 0.08).denoiser.net), before)
    assert not torch.equal(weights(reconstruct(run, 0.08).denoiser.net), before)
    for update in (20, 16):
        (tmp_path / "averages" / f"step-{update:08d}" / "averages.safetensors").write_bytes(b"")
        assert torch.equal(weights(reconstruct(older, 0.08).denoiser.net), before)
    (tmp_path / "averages" / "step-00000012" / "averages.safetensors").write_bytes(b"")
    with pytest.raises(BadCheckpoint, match="step-00000012: is damaged"):
        reconstruct(older, 0.08)


def test_snapshots_stay_when_checkpoints_go(run):
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000048"]
    assert [int(p.name[5:]) for p in sorted((run / "averages").iterdir())] == list(range(4, 49, 4))


@pytest.mark.parametrize("stop", [7, 16, 30])
def test_resuming_keeps_the_same_snapshots(run, stop, tmp_path):
    fit(points(**SNAPSHOTS), tmp_path, max_steps=stop)
    stale = tmp_path / "averages" / "step-00000032"  # as of a run that was killed after it, or went back
    stale.mkdir(parents=True)
    (tmp_path / "averages" / ".step-00000036.x.part").mkdir()
    resume(tmp_path)
    assert log_of(run) == log_of(tmp_path)
    last = "checkpoints/step-00000048"
    assert files_of(run / last) == files_of(tmp_path / last)
    for path in (run / "averages").iterdir():
        assert files_of(path) == files_of(tmp_path / "averages" / path.name)
        assert files_of(path)
    assert len(list((tmp_path / "averages").iterdir())) == 12


def test_a_run_that_goes_back_makes_its_later_snapshots_anew(monkeypatch, tmp_path):
    """From 13 on losses are NaN above half the rate: back from 16 to 8; the snapshots of 10 and 12 are undone."""
    losses, kept = Trainer.losses, tmp_path / "averages"

    def fragile(self, rows, places=None):
        bad = self.update >= 13 and self.guard.rate > 0.5
        return {name: value * (math.nan if bad else 1) for name, value in losses(self, rows, places).items()}

    monkeypatch.setattr(Trainer, "losses", fragile)
    before, left = {}, []

    def heard(kind, facts):
        if kind == "update" and facts["update"] == 13 and not before:
            before.update({path.name: files_of(path) for path in kept.iterdir()})
        if kind == "rollback":
            left.extend(sorted(path.name for path in kept.iterdir()))

    fit(points(snapshots=2, skips=3, decay="constant"), tmp_path, heard=heard)
    assert left == [f"step-{n:08d}" for n in (2, 4, 6, 8)]
    assert len(before) == 6
    for name, files in before.items():
        assert (files == files_of(kept / name)) == (name <= "step-00000008")


def test_what_cannot_be_made_is_one_line(run, tmp_path):
    fit(points(**{**SNAPSHOTS, "snapshots": 0, "steps": 8}), tmp_path / "none")
    with pytest.raises(BadCheckpoint, match=r"train.snapshots=500"):
        reconstruct(tmp_path / "none", 0.08)
    with pytest.raises(BadArgument, match="snapshots make to"):
        reconstruct(run, 0.01)
    fit(points(**{**SNAPSHOTS, "steps": 8}), tmp_path / "hurt")
    file = tmp_path / "hurt" / "averages" / "step-00000004" / "averages.safetensors"
    content = bytearray(file.read_bytes())
    for wrong in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1]):
        file.write_bytes(wrong)
        with pytest.raises(BadCheckpoint, match="damaged"):
            reconstruct(tmp_path / "hurt", 0.1)
    file.write_bytes(content)
    reconstruct(tmp_path / "hurt", 0.1)
    record = file.with_suffix(".json")
    record.write_text(record.read_text().replace("averages-1", "averages-2"))
    with pytest.raises(BadCheckpoint, match="another version"):
        reconstruct(tmp_path / "hurt", 0.1)
    record.write_text("{")
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        reconstruct(tmp_path / "hurt", 0.1)
