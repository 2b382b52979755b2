"""How the numbers behind the times are drawn while training: unbiased, remembered, and the same however it is split."""

from __future__ import annotations

import pytest
import torch

from inkdrop.errors import BadArgument
from inkdrop.losses.aware import LossAware
from inkdrop.losses.spread import Spread
from inkdrop.train.guard import NotFinite
from inkdrop.train.loop import fit, resume
from inkdrop.train.order import rows_of
from inkdrop.train.trainer import Trainer
from runs import files_of, log_of, points

AWARE = {"draws": "aware", "batch": 60, "steps": 32, "save_every": 8, "preview_every": 32, "lr": 1e-2}


@pytest.fixture(autouse=True)
def quick_history(monkeypatch):
    """Bands that are full after a few updates, so that aiming is at work for most of a short run."""
    monkeypatch.setattr("inkdrop.train.draws.LossAware", lambda: LossAware(bands=8, history=3))


def test_spread_times_are_what_a_loss_is_told():
    trainer, told = Trainer(points(draws="spread", batch=16), None), []
    trainer.loss = lambda denoiser, x0, cond, draw: told.append(draw.uniform("time")) or {"loss": x0.flatten(1).sum(1)}
    trainer.losses(range(16))
    trainer.losses(range(4), range(8, 12))
    whole = Spread(0, 0, range(16)).uniform("time")
    assert torch.equal(told[0], whole)
    assert torch.equal(told[1], whole[8:12])
    assert sorted((whole - whole[0]).remainder(1).mul(16).round().tolist()) == list(range(16))


def test_one_sample_cannot_be_spread():
    with pytest.raises(BadArgument, match="nothing to spread"):
        Trainer(points(draws="spread", batch=1), None)
    with pytest.raises(BadArgument, match="independent, spread or aware"):
        points(draws="sobol")


def test_aware_draws_see_the_losses_of_the_whole_batch_once_and_unweighted():
    """Bands and losses are recomputed from the trainer's own terms and densities, update by update."""
    trainer, seen = Trainer(points(**AWARE), None), LossAware(8, 3)
    aimed = False
    for update in range(12):
        draw = trainer.draws.of(update, range(60))
        with torch.no_grad():
            terms = trainer.losses(_rows(trainer))
        aimed = aimed or bool((draw.importance != 1).any())
        facts = trainer.step()
        seen.see(draw.u, terms["loss"].double() / draw.importance)
        torch.testing.assert_close(trainer.draws.aware.losses, seen.losses, rtol=1e-5, atol=0)
        assert torch.equal(trainer.draws.aware.seen, seen.seen)
        assert int(seen.seen.sum()) == 60 * (update + 1)
        assert facts["mse"] == pytest.approx(float(terms["mse"].mean()), rel=1e-5)
    assert aimed, "never aimed: the test is blind"


def _rows(trainer):
    train = trainer.recipe.train
    return rows_of(trainer.update, train.batch, len(trainer.data), train.seed)


def test_every_term_is_weighed_so_that_its_mean_is_that_of_independent_draws():
    """The mean of importance-weighted losses over many updates of still weights, against independent ones: 4 errors."""
    trainer = Trainer(points(**AWARE), None)
    for _ in range(12):
        trainer.step()
    plain = Trainer(points(**{**AWARE, "draws": "independent"}), None)
    plain.denoiser.load_state_dict(trainer.denoiser.state_dict())
    assert (trainer.draws.aware.density() - 1).abs().max() > 0.2
    with torch.no_grad():
        both = []
        for one in (trainer, plain):
            values = []
            for update in range(200):
                one.update = update
                values.append(one.losses(range(60))["mse"])
            both.append(torch.cat(values).double())
        raw = both[0] / torch.cat([trainer.draws.of(u, range(60)).importance for u in range(200)])
    means = [values.mean() for values in both]
    error = (sum(values.var() / len(values) for values in both)) ** 0.5
    assert abs(means[0] - means[1]) < 4 * error
    assert abs(raw.mean() - means[1]) > 8 * error, "unweighted it reads too high"
    assert both[0].var() < both[1].var()


@pytest.mark.parametrize("stop", [6, 13])
def test_stopping_and_resuming_changes_nothing(stop, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(points(**AWARE), whole)
    fit(points(**AWARE), parts, max_steps=stop)
    resume(parts)
    assert log_of(whole) == log_of(parts)
    name = f"checkpoints/step-{32:08d}"
    assert files_of(whole / name) == files_of(parts / name)


def test_aware_draws_change_the_run(tmp_path):
    """Else the tests of its state would compare runs without one."""
    for draws in ("aware", "spread", "independent"):
        fit(points(**{**AWARE, "draws": draws}), tmp_path / draws)
    runs = [files_of(tmp_path / draws / f"checkpoints/step-{32:08d}") for draws in ("aware", "spread", "independent")]
    assert len({run["net.safetensors"] for run in runs}) == 3


@pytest.mark.parametrize("draws", ["aware", "spread"])
def test_micro_batches_give_the_same_numbers(draws):
    one, four = (Trainer(points(**{**AWARE, "draws": draws, "accumulate": n}), None) for n in (1, 4))
    for _ in range(10):
        a, b = one.step(), four.step()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for mine, theirs in zip(one.denoiser.parameters(), four.denoiser.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    if draws == "aware":
        torch.testing.assert_close(one.draws.aware.losses, four.draws.aware.losses, rtol=1e-4, atol=1e-6)
        assert torch.equal(one.draws.aware.seen, four.draws.aware.seen)


def test_a_skipped_update_is_not_seen(monkeypatch):
    trainer = Trainer(points(**AWARE), None)
    trainer.step()
    before = {name: value.clone() for name, value in trainer.draws.state_dict().items()}
    plain = trainer.loss

    def broken(*args):
        terms = plain(*args)
        return {**terms, "loss": terms["loss"] * float("nan")}

    monkeypatch.setattr(trainer, "loss", broken)
    with pytest.raises(NotFinite):
        trainer.step()
    monkeypatch.setattr(trainer, "loss", plain)
    trainer.gradient()  # an update that is computed, and then not made
    for name, value in trainer.draws.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_rollback_takes_the_memory_back(tmp_path):
    trainer = Trainer(points(**AWARE), tmp_path)
    for _ in range(8):
        trainer.step()
    trainer.save()
    before = {name: value.clone() for name, value in trainer.draws.state_dict().items()}
    for _ in range(3):
        trainer.step()
    assert not torch.equal(trainer.draws.aware.seen, before["seen"])
    trainer.load(tmp_path / "checkpoints" / f"step-{8:08d}")
    for name, value in trainer.draws.state_dict().items():
        assert torch.equal(value, before[name])
    trainer.begin()
    assert int(trainer.draws.aware.seen.sum()) == 0
