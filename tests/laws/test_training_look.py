"""R16, R17: what a run says of its colours, its losses and its copies, and the same numbers for TensorBoard."""

from __future__ import annotations

import builtins
import json
import sys

import numpy as np
import pytest
import torch

from inkdrop.errors import MissingExtra
from inkdrop.recipe import open_data
from inkdrop.train.log import Log, scalars
from inkdrop.train.look import advise, colours, colours_of, copies, copies_text, drift, drift_text
from inkdrop.train.loop import fit, resume
from inkdrop.train.trainer import Trainer
from runs import digits, log_of, points


def heard_by(kinds: list) -> object:
    return lambda kind, facts: kinds.append((kind, facts))


# ---- R17: colours ------------------------------------------------------------------------------------------------


def test_colours_are_means_over_images_of_each_ones_own():
    x = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = x.double().numpy().reshape(5, 3, 24)
    found = colours(x)
    for name, value in (("mean", pixels.mean(2)), ("std", pixels.std(2))):
        np.testing.assert_allclose(found[name], value.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found[f"{name}_se"], value.std(0), rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "expected"), [(lambda x: x, 0.0), (lambda x: x + 0.5, 0.5), (lambda x: x * 0.3, 0.7)]
)
def test_drift_is_what_noise_does_not_explain(change, expected):
    """16 images of the data themselves are within five standard errors; a shift is found, less those five."""
    data = open_data(digits().data, "train")
    reference = colours_of(data)
    x = data.take(range(100, 116))[0]
    found = drift(change(x), reference)["drift"]
    error = 5 * max(*reference["mean_se"], *reference["std_se"]) / 4
    own = max(abs(a - b) for k in ("mean", "std") for a, b in zip(colours(x)[k], reference[k], strict=True))
    if expected == 0.0:
        assert found == 0
    elif expected == 0.5:
        assert 0.5 - error - own - 1e-5 <= found <= 0.5 + own
    else:  # the mean shrinks to 0.3 of itself, and so does the contrast
        gap = max(0.7 * abs(reference[k][0]) for k in ("mean", "std"))
        assert gap - error - own <= found <= gap + own
    assert (found > 0.05) == (expected > 0)


def test_the_alarm_waits_for_a_drift_that_does_not_fade():
    now = {"drift": 0.3, "mean": [0.5], "data_mean": [0.1], "std": [0.2], "data_std": [0.2]}
    assert drift_text(now, None) is None
    assert drift_text(now, 0.04) is None, "it has only begun"
    assert drift_text(now, 0.5) is None, "it fades"
    text = drift_text(now, 0.35)
    assert text is not None
    assert "mean +0.50 where the data have +0.10" in text


@pytest.mark.long
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_a_forced_drift_raises_the_alarm(shift, monkeypatch, tmp_path):
    """Previews are pictures of the data, brighter by the shift, at three looks: the second one gives the alarm."""
    monkeypatch.setattr(Trainer, "preview", lambda self, count=16: self.data.take(range(count))[0] + shift)
    seen: list = []
    fit(digits(preview_every=2), tmp_path, heard=heard_by(seen))
    told = [(facts["update"], facts["kind"]) for kind, facts in seen if kind == "advice"]
    assert told == ([(4, "drift"), (6, "drift")] if shift else [])
    lines = log_of(tmp_path)
    drifts = [line["colour"]["drift"] for line in lines if "colour" in line]
    assert len(drifts) == 3
    assert all((value > 0.05) == bool(shift) for value in drifts)
    assert [line["update"] for line in lines if line.get("advice") == "drift"] == ([4, 6] if shift else [])


# ---- R16: advice and copies --------------------------------------------------------------------------------------


def looks(*losses: float) -> list[dict]:
    """A look at the start, and then every 100 updates."""
    return [{"update": 100 * i, "held_out": loss} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ((1.0, 0.999, 0.995, 0.99), "flat"),
        ((1.0, 1.4, 1.2, 1.1), "flat"),
        ((1.0, 0.3, 0.31, 0.33), "rising"),
        ((1.0, 0.3, 0.302, 0.304), None),
        ((1.0, 0.5, 0.3, 0.2), None),
        ((1.0, 0.2, 0.25, 0.21), None),
        ((1.0, 0.99, 0.99), None),
    ],
)
def test_advice_fits_the_losses(losses, kind):
    found = advise(looks(*losses))
    assert (None if found is None else found[0]) == kind
    if kind is not None:
        assert f"{losses[-1]:.4f} now" in found[1]
        assert "\n" not in found[1]


def test_advice_says_little_early_and_ignores_looks_without_a_loss():
    assert advise([{"update": i, "held_out": 1.0} for i in range(9)]) is None
    assert advise([{"update": 50}, *looks(1.0, 1.0, 1.0, 1.0)])[0] == "flat"


@pytest.mark.long
def test_a_run_that_learns_nothing_is_told_so_once(tmp_path):
    """A learning rate of 1e-9, looked at five times: the advice comes with the look at 120, and not again at 160."""
    seen: list = []
    recipe = points(steps=160, batch=2, lr=1e-9, preview_every=40, save_every=160, log_every=40)
    fit(recipe, tmp_path, heard=heard_by(seen))
    [told] = [facts for kind, facts in seen if kind == "advice"]
    assert (told["update"], told["kind"]) == (120, "flat")
    assert "train.lr" in told["text"]


@pytest.mark.long
@pytest.mark.parametrize("planted", [True, False])
def test_planted_copies_are_reported_at_the_end(planted, monkeypatch, tmp_path):
    """Samples that are training images are flagged, and named; random ones are further off than held-out images."""
    noise = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    preview = lambda self, count=16: self.data.take(range(30, 30 + count))[0] if planted else noise  # noqa: E731
    monkeypatch.setattr(Trainer, "preview", preview)
    seen: list = []
    fit(digits(), tmp_path, heard=heard_by(seen))
    [report] = [line["copies"] for line in log_of(tmp_path) if "copies" in line]
    told = [facts for kind, facts in seen if kind == "copies"]
    assert report["copies"] == (16 if planted else 0)
    assert report["n"] == 16
    if planted:
        assert {pair["train"] for pair in report["pairs"]} == set(range(30, 46))
        assert "16 of 16 samples are nearer to a training image" in told[0]["text"]
        assert report["nearest"] in told[0]["text"]
    else:
        assert told == []
        assert report["mean"] > report["held_out_mean"]


def test_few_held_out_images_cannot_tell_one_in_a_hundred():
    """Of 6 and one sample each is the nearest by chance one time in 7: 16 / 7 samples of 16."""
    found = {"n": 16, "copies": 3, "held_out_n": 99, "nearest": "a.png"}
    assert "99 in 100" in copies_text({**found, "held_out_n": 100})
    assert "chance" not in copies_text({**found, "held_out_n": 100})
    text = copies_text({**found, "held_out_n": 6})
    assert "than any of the 6 held-out images are, the nearest to a.png" in text
    assert text.endswith("(by chance alone about 2.3 of 16 would be so)")
    assert "any of the 99" in copies_text(found)


def test_a_training_set_too_large_is_not_searched(monkeypatch):
    data = open_data(digits().data, "train")
    x = data.take(range(4))[0]
    assert copies(x, data, open_data(digits().data, "test")) is not None
    monkeypatch.setattr("inkdrop.train.look._ROOM", 1000)
    assert copies(x, data, open_data(digits().data, "test")) is None


def test_samples_that_are_not_finite_do_not_end_a_run(monkeypatch, tmp_path):
    """An early net may send a sampler to infinity: there is no grid, and training goes on."""
    from inkdrop.errors import Diverged

    def preview(self, count=16):
        raise Diverged("sampling: not finite")

    monkeypatch.setattr(Trainer, "preview", preview)
    seen: list = []
    fit(digits(), tmp_path, heard=heard_by(seen))
    told = [facts for kind, facts in seen if kind == "no_preview"]
    assert next(facts["update"] for facts in told) == 4
    assert "not finite" in told[0]["text"]
    assert seen[-1] == ("end", {"update": 6, "why": "finished"})


# ---- TensorBoard -------------------------------------------------------------------------------------------------


def test_scalars_are_the_numbers_by_their_names():
    facts = {"loss": 0.5, "held_out": {"bands": [1, 2.5], "n": 3}, "samples": ["a"], "advice": "flat", "on": True}
    assert dict(scalars(facts)) == {"loss": 0.5, "held_out/bands/0": 1.0, "held_out/bands/1": 2.5, "held_out/n": 3.0}


@pytest.mark.long
def test_tensorboard_reads_what_stats_jsonl_holds(tmp_path):
    """Also after a run was killed at update 14 and went on from 8: what was undone is purged."""
    pytest.importorskip("tensorboard")
    import shutil

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    fit(points(tensorboard=True), run, max_steps=14)
    shutil.rmtree(run / "checkpoints" / "step-00000014")
    resume(run)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    for tag, key in (("train/loss", "loss"), ("train/lr", "lr"), ("train/grad_norm", "grad_norm")):
        found = [(event.step, event.value) for event in board.Scalars(tag)]
        expected = [(line["update"], line[key]) for line in lines if key in line]
        assert [step for step, _ in found] == [step for step, _ in expected] == list(range(1, 25))
        np.testing.assert_allclose([v for _, v in found], [v for _, v in expected], rtol=1e-6)  # they are float32 there
    bands = [event.value for event in board.Scalars("held_out/bands/4")]
    np.testing.assert_allclose(bands, [line["held_out"]["bands"][4] for line in lines if "held_out" in line], rtol=1e-6)


def test_without_tensorboard_the_extra_is_named(monkeypatch, tmp_path):
    whole = builtins.__import__

    def missing(name, *args, **rest):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return whole(name, *args, **rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingExtra, match=r"needs tensorboard.*inkdrop\[track\]"):
        Log(tmp_path, tensorboard=True)
    with pytest.raises(MissingExtra):
        fit(points(tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
