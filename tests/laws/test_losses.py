"""Losses: a weight is always meant on |δx0|², whatever the net predicts; draws do not know how a batch is split."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.cond import Cond
from inkdrop.core.noise import Draw
from inkdrop.core.oracle import Gaussian
from inkdrop.core.schedule import Schedule
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument, UnknownName
from inkdrop.find import find, names
from inkdrop.losses.simple import simple
from specimens import OracleNet, normals, schedule_of, target_of

SIZE = 64
X0 = normals(SIZE, 2, 3, seed=1)
DRAW = Draw(0, 5, range(SIZE))

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {  # of SNR
    "constant": lambda snr: snr**0,
    "edm": lambda snr: (1 / snr + 0.25) / (0.25 / snr),
    "min_snr": lambda snr: torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64)),
    "p2": lambda snr: snr / (1 + snr),
    "sigmoid": lambda snr: snr / (1 + snr * math.exp(-2)),
    "snr": lambda snr: snr,
    "truncated_snr": lambda snr: torch.maximum(snr, torch.tensor(1.0, dtype=torch.float64)),
}
COMBINATIONS = [
    ("vp", ("eps", "x0", "v", "score", "flow", "edm")),
    ("linear", ("eps", "v", "mu")),
    ("edm", ("eps", "x0", "v", "edm")),
    ("flow", ("x0", "v", "flow")),
]


def guess(ask: Ask) -> Belief:
    """Some belief that is wrong by a different amount everywhere, and consistent with x."""
    level = ask.level.over(ask.x)
    x0 = torch.tanh(0.4 * ask.x + level.sigma / (1 + level.sigma))
    return Belief(x0, (ask.x - level.alpha * x0) / level.sigma)


def believer(schedule: Schedule, target: str, *, learned: bool = False) -> Denoiser:
    """A denoiser whose net says `guess` in the words of this target, and something of the variance if it is learned."""
    built = target_of(target, schedule)
    net = (Doubtful if learned else OracleNet)(guess, built)
    return Denoiser(net, schedule, built, net.listen)


class Doubtful(OracleNet):
    """An oracle's net with a learned variance, its fraction anywhere in [0, 1]."""

    def forward(self, x: Tensor, clock: Tensor, cond: Any) -> Tensor:
        """(B, 2C, *S): the answer, and a raw variance in [-1, 1]."""
        return torch.cat([super().forward(x, clock, cond), torch.sin(3 * x)], dim=1)


def noised(schedule: Schedule) -> tuple[Any, Tensor, Tensor]:
    """(level, eps, x_t) of the batch, from the draw, not from the loss."""
    level = schedule(schedule.pick(DRAW.uniform("time")))
    eps = DRAW.normal(X0.shape, torch.float64)
    over = level.over(X0)
    return level, eps, over.alpha * X0 + over.sigma * eps


def test_every_weight_is_written_out_here() -> None:
    assert sorted(WEIGHTS) == names("weights"), "write the new weight's formula into this file"


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_match_their_formula(name: str) -> None:
    lam = torch.linspace(-8, 6, 29, dtype=torch.float64)
    torch.testing.assert_close(find("weights", name)(lam), WEIGHTS[name]((2 * lam).exp()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(("schedule", "targets"), COMBINATIONS, ids=[c[0] for c in COMBINATIONS])
def test_nets_of_equal_beliefs_have_equal_weighted_losses(schedule: str, targets: tuple[str, ...], name: str) -> None:
    """loss = w(lam)·mean |δx0|² row by row, for eps-, x0-, v-, score-, flow-, EDM- and mu-nets alike."""
    built = schedule_of(schedule)
    level, _, x = noised(built)
    want = WEIGHTS[name](level.snr) * (guess(Ask(x, level)).x0 - X0).square().flatten(1).mean(1)
    for target in targets:
        got = simple(believer(built, target), X0, None, DRAW, weight=name)["loss"]
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12, msg=lambda text, t=target: f"{t}: {text}")


@pytest.mark.parametrize(("schedule", "targets"), COMBINATIONS, ids=[c[0] for c in COMBINATIONS])
def test_uniform_is_the_plain_error_of_the_net_s_own_words(schedule: str, targets: tuple[str, ...]) -> None:
    """For eps, Ho et al.'s L_simple, mean |eps − eps_θ|² (their eq. 14); "mse" is that number for any weight."""
    built = schedule_of(schedule)
    level, eps, x = noised(built)
    belief = guess(Ask(x, level))
    for name in targets:
        target = target_of(name, built)
        says, truth = target.make(belief.x0, belief.eps, level), target.make(X0, eps, level)
        want = (says - truth).square().flatten(1).mean(1)
        out = simple(believer(built, name), X0, None, DRAW)
        torch.testing.assert_close(out["loss"], want, rtol=1e-9, atol=1e-14)
        weighted = simple(believer(built, name), X0, None, DRAW, weight="snr")
        torch.testing.assert_close(weighted["mse"], want, rtol=1e-9, atol=1e-14)
    if "eps" in targets and schedule != "edm":
        plain = simple(believer(built, "eps"), X0, None, DRAW)["loss"]
        torch.testing.assert_close(plain, (belief.eps - eps).square().flatten(1).mean(1), rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(simple(believer(built, "v"), X0, None, DRAW, weight="snr")["loss"], plain)


def test_the_ideal_denoiser_s_loss_is_the_noise_that_cannot_be_known() -> None:
    """On N(m, s²): E|δx0|² = s²·sigma²/(alpha²·s² + sigma²) at each level; the mean of 20,000 rows within 4 of its
    standard errors (each row's loss is that number times a chi-square of 2 over 2)."""
    schedule = schedule_of("linear")
    n, std = 20_000, 0.4
    draw = Draw(7, 0, range(n))
    oracle = Gaussian(torch.tensor([0.2, -0.1], dtype=torch.float64), std)
    x0 = oracle.sample(n, schedule(0.0), seed=2)
    target = target_of("v", schedule)
    net = OracleNet(oracle, target)
    loss = simple(Denoiser(net, schedule, target, net.listen), x0, None, draw, weight="constant")["loss"]
    level = schedule(schedule.pick(draw.uniform("time")))
    left = std**2 * level.sigma**2 / ((level.alpha * std) ** 2 + level.sigma**2)
    ratio = loss / left
    assert abs(float(ratio.mean()) - 1) < 4 / n**0.5
    assert abs(float(ratio.var()) - 1) < 0.1


@pytest.mark.parametrize("name", names("losses"))
def test_a_loss_does_not_depend_on_how_its_batch_is_split(name: str) -> None:
    """Rows 0..3 and 4..7, on two ranks or in two micro-batches, are rows 0..7, bit for bit; and every key is (B,)."""
    loss = find("losses", name)
    denoiser = believer(schedule_of("cosine"), "v", learned=name == "hybrid")
    cond = Cond(label=torch.arange(8))
    whole = loss(denoiser, X0[:8], cond, Draw(3, 1, range(8)))
    parts = [loss(denoiser, X0[s], cond.take(s), Draw(3, 1, range(8)[s])) for s in (slice(0, 4), slice(4, 8))]
    assert "loss" in whole
    for key, value in whole.items():
        assert value.shape == (8,)
        assert torch.equal(torch.cat([part[key] for part in parts]), value)
    other = loss(denoiser, X0[:8], cond, Draw(3, 2, range(8)))["loss"]
    assert not torch.equal(other, whole["loss"])  # another update, other noise


class Gain(nn.Module):
    """y = gain·x, and what it heard."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.heard: list[Any] = []

    def forward(self, x: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
        self.heard.append((x, clock, cond))
        return self.gain * x


def test_the_net_is_trained_on_what_it_will_be_asked() -> None:
    """x_t = alpha·x0 + sigma·eps, whole timesteps of the table, the condition as given; and the gradient is its own."""
    schedule = schedule_of("linear")
    net = Gain()
    target = target_of("eps", schedule)
    x0, cond = X0.float(), Cond(label=torch.arange(SIZE))
    simple(Denoiser(net, schedule, target), x0, cond, DRAW)["loss"].mean().backward()
    x, clock, heard = net.heard[0]
    level, eps, want = noised(schedule)
    torch.testing.assert_close(x.double(), want, rtol=0, atol=1e-6)
    assert heard is cond
    assert clock.tolist() == (level.t * 1000 - 1).round().tolist()
    gradient = (2 * (0.3 * want - eps) * want).mean()
    assert float(net.gain.grad) == pytest.approx(float(gradient), rel=1e-5)


def test_weights_and_nets_that_do_not_fit_are_refused() -> None:
    schedule = schedule_of("linear")
    denoiser = believer(schedule, "v")
    with pytest.raises(UnknownName, match="weights: unknown name 'snrr'; did you mean .*snr"):
        simple(denoiser, X0, None, DRAW, weight="snrr")
    with pytest.raises(UnknownName, match="min_snr knob: unknown name 'gama'; did you mean gamma"):
        simple(denoiser, X0, None, DRAW, weight="min_snr", weight_knobs={"gama": 3})
    with pytest.raises(BadArgument, match="loss weight uniform: has no knobs, got gamma"):
        simple(denoiser, X0, None, DRAW, weight_knobs={"gamma": 3})
    with pytest.raises(BadArgument, match="min_snr gamma: got -1, need a positive number; try 5"):
        simple(denoiser, X0, None, DRAW, weight="min_snr", weight_knobs={"gamma": -1})

    class Twice(nn.Module):
        def forward(self, x: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
            return torch.cat([x, x], dim=1)

    with pytest.raises(BadArgument, match="cannot train a learned variance; build the net with learned_variance=false"):
        simple(Denoiser(Twice(), schedule, target_of("v", schedule)), X0, None, DRAW)


def test_a_weight_from_outside_the_house(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text("def half(lam, *, part: float = 0.5):\n    return part + 0 * lam\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    denoiser = believer(schedule_of("linear"), "x0")
    plain = simple(denoiser, X0, None, DRAW, weight="constant")["loss"]
    halved = simple(denoiser, X0, None, DRAW, weight="mine:half", weight_knobs={"part": 0.25})["loss"]
    torch.testing.assert_close(halved, plain / 4, rtol=1e-12, atol=0)
