"""Objectives: each published loss is a loss of the house with its target, weight and times, number for number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from inkdrop.core import clock, scale
from inkdrop.core.cond import Cond
from inkdrop.core.noise import Draw, normal
from inkdrop.data.augment import affine, crop, flip
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument, BadCheckpoint, BadShape, UnknownName
from inkdrop.evals.bound import bound
from inkdrop.find import Part, build
from inkdrop.losses import times
from inkdrop.losses.aware import LossAware
from inkdrop.losses.hybrid import hybrid
from inkdrop.losses.noise import noises
from inkdrop.losses.pairing import optimal
from inkdrop.losses.simple import simple
from inkdrop.losses.spread import Spread
from specimens import normals, schedule_of, target_of

ROWS = 96
X0 = torch.tanh(normals(ROWS, 2, 3, 3, seed=1))
DRAW = Draw(3, 4, range(ROWS))
U = DRAW.uniform("time")
EPS = DRAW.normal(X0.shape, torch.float64)
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)  # DDPM, section 4


class Odd(nn.Module):
    """A net that is wrong everywhere by another amount: y = tanh(W·x + b·clock); and what it heard."""

    def __init__(self, out: int = 18) -> None:
        super().__init__()
        self.weight = nn.Parameter(normals(18, out, seed=7) / 3)
        self.bias = nn.Parameter(normals(out, seed=8))
        self.heard: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def forward(self, x: Tensor, clock: Tensor, cond: Any) -> Tensor:
        self.heard = x, clock
        y = torch.tanh(x.flatten(1) @ self.weight + torch.sin(clock.double()[:, None] + 1) * self.bias)
        return y.reshape(len(x), -1, *x.shape[2:])


def odd(schedule: str | Part, target: str, **more: Any) -> Denoiser:
    """A denoiser of an odd net."""
    built = schedule_of(schedule)
    return Denoiser(Odd(), built, target_of(target, built), **more)


def rows(each: Tensor) -> Tensor:
    """The mean square of each row."""
    return each.square().flatten(1).mean(1)


def column(number: Tensor) -> Tensor:
    return number.reshape(-1, 1, 1, 1)


# ---- the objectives of the papers, in their own symbols ------------------------------------------------------------


def entries() -> tuple[Tensor, Tensor]:
    """(abar, timestep) of the table's rows, uniform over its 1,000 entries."""
    k = (U * 1000).floor().long()
    return ABAR[k], k


@pytest.mark.parametrize("target", ["eps", "x0", "v", "score"])
def test_ddpm_s_objectives(target: str) -> None:
    """|eps − eps_θ(√abar·x0 + √(1 − abar)·eps, t)|² (Ho et al. 2020, eq. 14); |x0 − x_θ|², |v − v_θ|², |s − s_θ|²."""
    abar, k = (column(each) for each in entries())
    x = abar.sqrt() * X0 + (1 - abar).sqrt() * EPS
    truth = {
        "eps": EPS,
        "x0": X0,
        "v": abar.sqrt() * EPS - (1 - abar).sqrt() * X0,  # Salimans & Ho 2022, section 4
        "score": -(x - abar.sqrt() * X0) / (1 - abar),  # the gradient of log N(x; √abar·x0, 1 − abar) by x
    }[target]
    want = rows(Odd()(x, k.flatten().float(), None) - truth)
    assert_close(simple(odd("linear", target), X0, None, DRAW)["loss"], want, rtol=1e-7, atol=1e-9)


def test_flow_matching_and_rectified_flow() -> None:
    """|v_θ(x_t, t) − (eps − x0)|² at x_t = (1 − t)·x0 + t·eps, log(t/(1 − t)) ~ N(0, 1) (Esser et al. 2024, eq. 19)."""
    low = scipy.stats.norm.cdf(math.log(0.001 / 0.999))
    t = torch.from_numpy(1 / (1 + np.exp(-scipy.stats.norm.ppf(low + (1 - low) * U.numpy()))))
    x = (1 - column(t)) * X0 + column(t) * EPS
    net = odd("flow", "flow", clock=lambda level: clock.time(level, scale=1.0))
    want = rows(Odd()(x, t.float(), None) - (EPS - X0))
    assert_close(simple(net, X0, None, DRAW, times="logit_normal")["loss"], want, rtol=1e-6, atol=1e-9)
    t = column(1e-3 + U * (1 - 1e-3))
    want = rows(Odd()((1 - t) * X0 + t * EPS, t.flatten().float(), None) - (EPS - X0))
    assert_close(simple(net, X0, None, DRAW)["loss"], want, rtol=1e-6, atol=1e-9)


def test_edm_s_objective() -> None:
    """λ(σ)·|D(x0 + n; σ) − x0|², D = c_skip·x + c_out·F(c_in·x; c_noise), ln σ ~ N(−1.2, 1.2²) (Karras et al. 2022,
    eq. 7 and 8, table 1): λ = (σ² + σ_d²)/(σ·σ_d)² is 1/c_out², so that it is 1 on F's own error."""
    sd = 0.5
    low, high = scipy.stats.norm.cdf((np.log([0.002, 80.0]) + 1.2) / 1.2)  # the schedule's ends
    sigma = column(torch.from_numpy(np.exp(-1.2 + 1.2 * scipy.stats.norm.ppf(low + (high - low) * U.numpy()))))
    root = (sigma**2 + sd**2).sqrt()
    c_skip, c_out, c_in, c_noise = sd**2 / root**2, sigma * sd / root, 1 / root, sigma.log() / 4
    x = X0 + sigma * EPS
    raw = Odd()(c_in * x, c_noise.flatten().float(), None)
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    want = weight.flatten() * rows(c_skip * x + c_out * raw - X0)
    net = odd("edm", "edm", clock=clock.lam, scale_in=scale.edm)
    got = simple(net, X0, None, DRAW, times="lognormal")
    assert_close(got["loss"], want, rtol=1e-5, atol=1e-9)  # the clock is a float32
    heard, told = net.net.heard
    assert_close(heard, c_in * x, rtol=1e-9, atol=1e-12)
    assert_close(told.double(), c_noise.flatten(), rtol=1e-6, atol=1e-6)
    assert_close(simple(net, X0, None, DRAW, times="lognormal", weight="edm")["loss"], got["mse"], rtol=1e-9, atol=0)


def test_denoising_score_matching_over_geometric_levels() -> None:
    """σ²·½·|s_θ(x̃, σ) + (x̃ − x0)/σ²|² on L = 10 levels σ_i = 1·0.01^{i/9} (Song & Ermon 2019, eq. 5 and 6), doubled:
    with the score as target and weight snr, and with eps as target, the plain error."""
    sigma = 0.01 * 100 ** ((U * 10).floor() / 9)
    x = X0 + column(sigma) * EPS
    ncsn = Part("edm", {"rho_min": 0.01, "rho_max": 1.0})
    knobs: dict[str, Any] = {"times": "loguniform", "times_knobs": {"levels": 10}}
    net = odd(ncsn, "score", clock=lambda level: clock.sigma(level, scale=1.0))
    score = Odd()(x, sigma.float(), None)
    want = sigma**2 / 2 * rows(score + (x - X0) / column(sigma) ** 2)
    assert_close(simple(net, X0, None, DRAW, weight="snr", **knobs)["loss"] / 2, want, rtol=1e-6, atol=1e-12)

    class Scaled(Odd):  # the score net of Song & Ermon 2020, technique 3: s_θ = −eps_θ/σ
        def forward(self, x: Tensor, clock: Tensor, cond: Any) -> Tensor:
            return -column(clock.double()) * super().forward(x, clock, cond)

    same = Denoiser(Scaled(), net.schedule, target_of("eps", net.schedule), net.clock)
    assert_close(simple(same, X0, None, DRAW, **knobs)["loss"] / 2, want, rtol=1e-5, atol=1e-9)
    assert len(set(sigma.tolist())) == 10


# ---- weights, on the schedules of their papers ---------------------------------------------------------------------


class Case(NamedTuple):
    """A weight, and what its paper multiplies |δx0|², |δeps|² and |δv|² by: functions of the log SNR."""

    weight: str
    knobs: dict[str, Any]
    schedule: str | Part
    target: str
    paper: Callable[[Tensor], Tensor]


def snr_of(log_snr: Tensor) -> Tensor:
    return log_snr.exp()


LINEAR = Part("linear", {})
CASES = {
    "L_simple": Case("snr", {}, LINEAR, "eps", lambda lv: torch.ones_like(lv)),
    "min-SNR on eps": Case("min_snr", {}, Part("cosine"), "eps", lambda lv: snr_of(lv).clamp(max=5) / snr_of(lv)),
    "min-SNR on x0": Case("min_snr", {"gamma": 3.0}, LINEAR, "x0", lambda lv: snr_of(lv).clamp(max=3)),
    "min-SNR on v": Case("min_snr", {}, Part("cosine"), "v", lambda lv: snr_of(lv).clamp(max=5) / (snr_of(lv) + 1)),
    "P2": Case("p2", {}, LINEAR, "eps", lambda lv: 1 / (1 + snr_of(lv))),
    "P2, gamma 0.5": Case("p2", {"k": 2.0, "gamma": 0.5}, LINEAR, "eps", lambda lv: (2 + snr_of(lv)) ** -0.5),
    "SNR + 1": Case("edm", {"sd": 1.0}, Part("continuous_cosine"), "v", lambda lv: torch.ones_like(lv)),
    "EDM": Case("edm", {"sd": 0.3}, Part("edm"), "x0", lambda lv: ((-lv).exp() + 0.09) / ((-lv).exp() * 0.09)),
    "sigmoid": Case("sigmoid", {}, Part("continuous_cosine"), "eps", lambda lv: torch.sigmoid(2 - lv)),
    "sigmoid, bias -1": Case("sigmoid", {"bias": -1.0}, Part("flow"), "x0", lambda lv: lv.exp() * (-1 - lv).sigmoid()),
    "constant": Case("constant", {}, Part("flow"), "x0", lambda lv: torch.ones_like(lv)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_are_those_of_their_papers(case: Case) -> None:
    """Hang et al. 2023, section 3.4 (eps, x0, v); Choi et al. 2022; Salimans & Ho 2022; Karras et al. 2022;
    Kingma & Gao 2023, section 5: each on the error that its paper writes it for."""
    net = odd(case.schedule, case.target)
    level = net.schedule(net.schedule.pick(U))
    out = simple(net, X0, None, DRAW, weight=case.weight, weight_knobs=case.knobs)
    assert_close(out["loss"], case.paper((level.alpha**2 / level.sigma**2).log()) * out["mse"], rtol=1e-9, atol=1e-15)


def test_truncated_snr_is_the_larger_of_two_errors() -> None:
    """max(|x0 − x̂0|², |eps − êps|²) (Salimans & Ho 2022, section 4)."""
    schedule = schedule_of("continuous_cosine")
    got = simple(odd("continuous_cosine", "v"), X0, None, DRAW, weight="truncated_snr")["loss"]
    x0_error = simple(odd("continuous_cosine", "v"), X0, None, DRAW, weight="constant")["loss"]
    eps_error = x0_error * schedule(schedule.pick(U)).snr
    assert bool((x0_error > eps_error).any() & (x0_error < eps_error).any())
    assert_close(got, torch.maximum(x0_error, eps_error), rtol=1e-9, atol=0)


def test_the_sigmoid_s_integral_over_log_snr() -> None:
    """∫ sigmoid(b − λ)·E|δeps|² dλ, λ = log SNR (Kingma & Gao 2023): the range of λ times the mean at loguniform times.

    For N(0, s²) and its ideal denoiser E|δeps|² = s²/(s² + e^{−λ}) in closed form; the trapezoid rule on 20,000 points.
    """
    schedule, std = schedule_of("continuous_cosine"), 0.4
    ends = schedule(torch.tensor([1e-3, 1.0])).lam * 2
    lam = torch.linspace(float(ends[1]), float(ends[0]), 20_000, dtype=torch.float64)
    want = torch.trapezoid(torch.sigmoid(1 - lam) * std**2 / (std**2 + (-lam).exp()), lam)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    level = schedule(times.loguniform(u, schedule))
    x0_error = std**2 * level.sigma**2 / (level.alpha**2 * std**2 + level.sigma**2)
    weight = build("weights", Part("sigmoid", {"bias": 1.0}), level.lam)
    assert float((weight * x0_error).mean() * (ends[0] - ends[1])) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize(
    ("weight", "knobs", "message"),
    [
        ("p2", {"k": 0.0}, "p2 k: got 0, need a positive number; try 1"),
        ("p2", {"gamma": -1.0}, "p2 gamma: got -1, need at least 0; try 1"),
        ("edm", {"sd": 0.0}, "edm sd: got 0, need a positive number; try 0.5"),
    ],
)
def test_weights_refuse_what_has_no_meaning(weight: str, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        simple(odd("linear", "eps"), X0, None, DRAW, weight=weight, weight_knobs=knobs)


# ---- offset noise, and a perturbed input ---------------------------------------------------------------------------


@pytest.mark.long
def test_offset_noise_has_its_covariance() -> None:
    """I + c²·11ᵀ within a channel of a row, I between channels (Guttenberg 2023): 10,000 rows, each entry of the
    empirical covariance within 5 of its standard errors, √((Σ_ij² + Σ_ii·Σ_jj)/n)."""
    n, c = 10_000, 0.5
    draw, x0 = Draw(1, 0, range(n)), torch.zeros(n, 2, 1, 3, dtype=torch.float64)
    eps, heard = noises(draw, x0, offset=c)
    assert torch.equal(eps, heard)
    flat = eps.flatten(1)
    want = torch.eye(6, dtype=torch.float64) + c**2 * torch.block_diag(*(torch.ones(3, 3, dtype=torch.float64),) * 2)
    error = ((want**2 + torch.outer(want.diag(), want.diag())) / n).sqrt()
    assert bool(((flat.T @ flat / n - want).abs() < 5 * error).all())
    one = (eps - draw.normal(x0.shape, torch.float64)) / c  # what was added to the same white noise
    assert_close(one, one[..., :1].expand_as(one), rtol=0, atol=1e-12)
    assert scipy.stats.kstest(one[:, :, 0, 0].flatten(), "norm").pvalue > 0.01


@pytest.mark.long
def test_a_perturbed_input_hears_more_noise_than_the_target() -> None:
    """x = alpha·x0 + sigma·(eps + gamma·xi), the target made of eps (Ning et al. 2023): the net hears
    noise of variance 1 + gamma²; 36,000 numbers, their second moments within 5 of their standard errors."""
    draw, x0, gamma = Draw(1, 0, range(2000)), torch.zeros(2000, 2, 3, 3, dtype=torch.float64), 0.4
    eps, heard = noises(draw, x0, perturb=gamma)
    assert torch.equal(eps, draw.normal(x0.shape, torch.float64))
    xi, n = (heard - eps) / gamma, eps.numel()
    assert scipy.stats.kstest(xi.flatten(), "norm").pvalue > 0.01
    assert abs(float((xi * eps).mean())) < 5 / n**0.5
    assert abs(float(heard.square().mean()) - (1 + gamma**2)) < 5 * (1 + gamma**2) * (2 / n) ** 0.5
    both = noises(draw, x0, offset=0.3, perturb=gamma)
    assert_close(both[1] - both[0], gamma * xi, rtol=0, atol=1e-12)


def test_the_loss_of_offset_and_perturbed_noise() -> None:
    eps, heard = noises(DRAW, X0, offset=0.2, perturb=0.1)
    abar, k = (column(each) for each in entries())
    y = Odd()(abar.sqrt() * X0 + (1 - abar).sqrt() * heard, k.flatten().float(), None)
    got = simple(odd("linear", "eps"), X0, None, DRAW, offset=0.2, perturb=0.1)["loss"]
    assert_close(got, rows(y - eps), rtol=1e-7, atol=1e-9)
    for knob in ("offset", "perturb"):
        with pytest.raises(BadArgument, match=f"loss {knob}: got -0.1, need at least 0; try 0.1, or 0 for none"):
            simple(odd("linear", "eps"), X0, None, DRAW, **{knob: -0.1})


# ---- the hybrid objective ------------------------------------------------------------------------------------------


def hybrid_net(part: Part, target: str = "eps") -> Denoiser:
    """An odd net of 2·C channels."""
    schedule = schedule_of(part)
    return Denoiser(Odd(36), schedule, target_of(target, schedule))


def betas_of(part: Part) -> Tensor:
    steps = part.knobs["steps"]
    if part.name == "linear":
        return torch.linspace(0.001, 0.3, steps, dtype=torch.float64)
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def terms_by_hand(part: Part, net: nn.Module, levels: int | None, data: Tensor = X0) -> tuple[Tensor, Tensor]:
    """(mse, T·L_t) of each row by DDPM's betas: Ho et al., eq. 6, 7 and 13; Nichol & Dhariwal, 15."""
    betas = betas_of(part)
    steps, abar = len(betas), torch.cumprod(1 - betas, 0)
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    tilde = betas * (1 - before) / (1 - abar)
    k = (U * steps).floor().long()
    a, b, at, last = (column(f[k]) for f in (abar, betas, before, tilde))
    x = a.sqrt() * data + (1 - a).sqrt() * EPS
    eps_hat, raw = net(x, k.float(), None).chunk(2, 1)
    low = torch.where(column(k) == 0, tilde[1], last)  # tilde is 0 at the first step
    std = ((raw + 1) / 2 * b.log() + (1 - raw) / 2 * low.log()).exp().sqrt()
    x0_hat = ((x - (1 - a).sqrt() * eps_hat) / a.sqrt()).detach()

    def mean(x0: Tensor) -> Tensor:
        return at.sqrt() * b / (1 - a) * x0 + (1 - b).sqrt() * (1 - at) / (1 - a) * x

    bits = kl_divergence(Normal(mean(data), last.clamp(min=1e-9).sqrt()), Normal(mean(x0_hat), std)) / math.log(2)
    first = Normal(x0_hat, std)
    decoder = -first.log_prob(data) / math.log(2)
    if levels is not None:
        half = 1 / (levels - 1)
        up = torch.where(1 - half < data, 1.0, first.cdf(data + half))
        down = torch.where(-1 + half > data, 0.0, first.cdf(data - half))
        decoder = -torch.where(column(k) == 0, up - down, 1.0).log2()
    bits = torch.where(column(k) == 0, decoder, bits)
    return rows(eps_hat - EPS), steps * bits.flatten(1).mean(1)


CHAINS = [Part("linear", {"steps": 20, "first": 0.001, "last": 0.3}), Part("cosine", {"steps": 13})]


@pytest.mark.parametrize("levels", [256, None])
@pytest.mark.parametrize("part", CHAINS, ids=lambda p: p.name)
def test_the_hybrid_loss_is_that_of_the_paper(part: Part, levels: int | None) -> None:
    """L_simple + 0.001·T·L_t (Nichol & Dhariwal 2021, eq. 16), in bits a dimension, the first step the decoder's."""
    mse, vlb = terms_by_hand(part, Odd(36), levels)
    sharp = torch.isfinite(vlb)  # a difference of two cdfs loses the far tail, which the house keeps
    assert int(sharp.sum()) > 0.9 * ROWS
    out = hybrid(hybrid_net(part), X0, None, DRAW, levels=levels)
    assert_close(out["mse"], mse, rtol=1e-7, atol=1e-9)
    assert_close(out["vlb"][sharp], vlb[sharp], rtol=1e-4, atol=1e-7)
    assert_close(out["loss"], out["mse"] + 1e-3 * out["vlb"], rtol=1e-12, atol=0)
    assert bool((entries_of(part) == 0).any() & (entries_of(part) == part.knobs["steps"] - 1).any())


def entries_of(part: Part) -> Tensor:
    return (U * part.knobs["steps"]).floor()


@pytest.mark.parametrize(("part", "levels"), [(CHAINS[0], None), (CHAINS[1], None), (CHAINS[1], 256)])
def test_the_bound_moves_the_variance_and_the_simple_loss_the_mean(part: Part, levels: int | None) -> None:
    """The gradient of L_vlb by the net's mean half is exactly 0, and by its variance half that of the formula; also
    where data are at the ends of their range, whose bins are half-lines."""
    x0 = torch.cat([torch.ones(ROWS, 2, 3, 1), -torch.ones(ROWS, 2, 3, 1), X0[..., 2:]], 3).double()
    net, other = hybrid_net(part), Odd(36)
    out = hybrid(net, x0, None, DRAW, levels=levels)
    half = net.net.weight.shape[1] // 2
    (by_vlb,) = torch.autograd.grad(out["vlb"].mean(), net.net.weight, retain_graph=True)
    (by_mse,) = torch.autograd.grad(out["mse"].mean(), net.net.weight)
    mse, vlb = terms_by_hand(part, other, levels, x0)
    (want_vlb,) = torch.autograd.grad(vlb.mean(), other.weight, retain_graph=True)
    (want_mse,) = torch.autograd.grad(mse.mean(), other.weight)
    assert bool((by_vlb[:, :half] == 0).all() & (by_mse[:, half:] == 0).all())
    assert_close(by_vlb[:, half:], want_vlb[:, half:], rtol=1e-4, atol=1e-6)
    assert_close(by_mse[:, :half], want_mse[:, :half], rtol=1e-4, atol=1e-6)


class AtStep(Draw):
    """The time of step k, and the noise with which `bound` asks about it."""

    def __init__(self, k: int, steps: int) -> None:
        super().__init__(0, 0, range(ROWS))
        self.k, self.steps = k, steps

    def uniform(self, stream: str = "time", count: int | None = None) -> Tensor:
        return torch.full((ROWS,), (self.k - 0.5) / self.steps, dtype=torch.float64)

    def normal(self, shape: Any, dtype: torch.dtype = torch.float32, stream: str = "noise") -> Tensor:
        return normal(shape, 0, range(ROWS), self.steps - self.k).to(dtype)


@pytest.mark.long
@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.parametrize("part", [*CHAINS, Part("vp")], ids=lambda p: p.name)
def test_the_mean_over_steps_is_the_bound_of_evals(part: Part, target: str) -> None:
    """The same noise at every step: the mean of T·L_t over t is `bound`'s sum without its prior, row by row."""
    net = hybrid_net(part, target)
    if part.name == "vp":
        net.schedule.steps = 9  # a continuous schedule's chain has 1,000
    grid = build("grids", Part("trailing"), net.schedule, net.schedule.steps)
    with torch.no_grad():
        every = range(1, net.schedule.steps + 1)
        found = [hybrid(net, X0, None, AtStep(k, net.schedule.steps))["vlb"] for k in every]
    want = bound(net, X0, grid, levels=256, variance="learned")
    assert_close(torch.stack(found).mean(0), want.steps.sum(0) + want.decoder, rtol=1e-9, atol=1e-12)


def test_hybrid_refuses_what_it_cannot_train() -> None:
    with pytest.raises(BadArgument, match="loss hybrid: the net predicts no variance; build it with learned_variance"):
        hybrid(odd("linear", "eps"), X0, None, DRAW)
    net = hybrid_net(CHAINS[0])
    with pytest.raises(BadArgument, match="hybrid vlb: got -1, need at least 0; try 0.001"):
        hybrid(net, X0, None, DRAW, vlb=-1)
    with pytest.raises(BadArgument, match="hybrid levels: got 1, need at least 2, or None for continuous data"):
        hybrid(net, X0, None, DRAW, levels=1)
    with pytest.raises(BadArgument, match="a chain of 1 step has no beta-tilde to learn from"):
        hybrid(hybrid_net(Part("linear", {"steps": 1, "first": 0.5, "last": 0.5})), X0, None, DRAW)


# ---- which times ---------------------------------------------------------------------------------------------------

EVEN = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


def cut(cdf: Callable[[Any], Any], low: float, high: float) -> Tensor:
    """Where EVEN is in a distribution of this cdf that is cut off at two ends."""
    return cdf(low) + EVEN * (cdf(high) - cdf(low))


def test_logit_normal_times_have_their_distribution() -> None:
    """F(t(u)) = u, F the cdf of scipy: log(t/(1 − t)) ~ N(0.4, 0.7²), cut off at t = 1/T (Esser et al. 2024)."""
    normal = scipy.stats.norm(0.4, 0.7)
    t = times.logit_normal(EVEN, schedule_of("flow"), mean=0.4, std=0.7)
    assert_close(torch.from_numpy(normal.cdf(t.logit())), cut(normal.cdf, math.log(1 / 999), math.inf))


@pytest.mark.parametrize("name", ["edm", "vp", "flow"])
def test_lognormal_times_have_their_distribution(name: str) -> None:
    """log rho ~ N(−1.2, 1.2²) on any schedule, cut off at its ends (Karras et al. 2022, table 1)."""
    schedule, normal = schedule_of(name), scipy.stats.norm(-1.2, 1.2)
    level = schedule(times.lognormal(EVEN, schedule))
    low, high = (-schedule(torch.tensor([1e-3, 1.0])).lam).tolist()
    assert_close(torch.from_numpy(normal.cdf(level.rho.log())), cut(normal.cdf, low, high), rtol=0, atol=1e-7)


def test_loguniform_times_are_geometric_levels() -> None:
    """L levels, each rho a constant factor from the next, each as often; without L every lam between the ends."""
    schedule = schedule_of(Part("edm", {"rho_min": 0.01, "rho_max": 50.0}))
    rho = schedule(times.loguniform(EVEN, schedule, levels=8)).rho
    want = torch.from_numpy(np.geomspace(0.01, 50, 8))
    assert_close(rho, want.repeat_interleave(500), rtol=1e-9, atol=0)
    lam = schedule(times.loguniform(EVEN, schedule)).lam
    assert_close(lam, -math.log(0.01) - EVEN * math.log(5000), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("part", "knobs"),
    [("logit_normal", {}), ("lognormal", {"mean": 0.0}), ("loguniform", {}), ("uniform", {})],
)
def test_a_table_is_trained_at_its_entries(part: str, knobs: dict[str, Any]) -> None:
    """Whole timesteps, in the order of u; each as often as the times between two neighbours are, within an entry."""
    table, smooth = schedule_of("cosine"), schedule_of("continuous_cosine")
    t = build("times", Part(part, knobs), EVEN, table)
    assert_close(t * 1000, (t * 1000).round(), rtol=0, atol=1e-9)
    assert bool((t.diff() >= 0).all())
    if part in ("logit_normal", "uniform"):  # distributions of t itself, whatever the schedule
        assert float((t - build("times", Part(part, knobs), EVEN, smooth)).abs().max()) < 1.001e-3


def test_times_that_no_schedule_has_are_refused() -> None:
    edm, zero = schedule_of("edm"), schedule_of(Part("continuous_cosine", {"lam_end": -math.inf}))
    for name in ("logit_normal", "lognormal"):
        with pytest.raises(BadArgument, match=f"{name} std: got 0, need a positive finite number; try 1"):
            build("times", Part(name, {"std": 0.0}), U, edm)
    with pytest.raises(BadArgument, match="loguniform levels: got 1, need at least 2, or None for all; try 10"):
        times.loguniform(U, edm, levels=1)
    with pytest.raises(BadArgument, match="loguniform times: the schedule ends without signal"):
        times.loguniform(U, zero)
    with pytest.raises(BadArgument, match="times: the schedule has no level near this mean"):
        times.lognormal(U, edm, mean=90.0, std=0.1)
    net = odd("linear", "eps")
    with pytest.raises(UnknownName, match="times: unknown name 'lognorm'; did you mean lognormal"):
        simple(net, X0, None, DRAW, times="lognorm")
    with pytest.raises(BadArgument, match="loss times uniform: has no knobs, got std; try times logit_normal or"):
        simple(net, X0, None, DRAW, times_knobs={"std": 1})


# ---- spread and aimed draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 64])
def test_spread_times_are_those_of_vdm(size: int) -> None:
    """{(u_0 + i/B) mod 1} for a batch of B = 2^m, in another order (Kingma et al. 2021, appendix I.1)."""
    u = Spread(5, 7, range(size)).uniform("time")
    want = (float(u[0]) + torch.arange(size, dtype=torch.float64) / size) % 1
    assert_close(u.sort().values, want.sort().values, rtol=0, atol=1e-12)


@pytest.mark.long
def test_spread_times_are_of_their_place_and_uniform() -> None:
    """The rows of two ranks are those of one; each row's number is uniform over updates; other streams are a Draw's."""
    whole, halves = Spread(1, 9, range(10)), [Spread(1, 9, range(3)), Spread(1, 9, range(3, 10))]
    assert torch.equal(torch.cat([h.uniform("time") for h in halves]), whole.uniform("time"))
    plain = Draw(1, 9, range(10))
    assert torch.equal(whole.uniform("dropout"), plain.uniform("dropout"))
    assert torch.equal(whole.normal((10, 3)), plain.normal((10, 3)))
    for place in (0, 5):
        u = torch.stack([Spread(1, update, [place]).uniform("time")[0] for update in range(500)])
        assert scipy.stats.kstest(u, "uniform").pvalue > 0.01


@pytest.mark.long
def test_spread_times_make_the_mean_loss_steadier() -> None:
    """Means of f(u) = 3u² over batches of 32: the plain draw's variance is Var f/32 = 0.8/32; the spread one's, where f
    jumps by 3 from u = 1 to u = 0 and is smooth besides, 3²/(12·32²). Both are unbiased."""
    for kind, variance in ((Draw, 0.8 / 32), (Spread, 9 / 12 / 32**2)):
        means = torch.stack([(3 * kind(2, update, range(32)).uniform() ** 2).mean() for update in range(300)])
        assert abs(float(means.mean()) - 1) < 4 * (variance / 300) ** 0.5
        assert float(means.var()) == pytest.approx(variance, rel=4 * (2 / 300) ** 0.5)


def taught(bands: int, losses: Tensor, history: int = 10) -> LossAware:
    """A LossAware that saw these losses (N, bands) one after the other."""
    aware = LossAware(bands, history)
    u = (torch.arange(bands, dtype=torch.float64) + 0.5) / bands
    for each in losses:
        aware.see(u, each)
    return aware


@pytest.mark.long
def test_aimed_times_are_drawn_by_the_root_of_the_mean_square() -> None:
    """p_k = √(E[L²])/Σ √(E[L²]) over the newest 10 losses, 0.001 of it uniform (Nichol & Dhariwal 2021, eq. 18)."""
    losses = normals(13, 7, seed=3).abs() * torch.arange(1, 8)
    root = (losses[-10:] ** 2).mean(0).sqrt()
    want = 7 * (0.999 * root / root.sum() + 0.001 / 7)
    aware = taught(7, losses)
    assert_close(aware.density(), want, rtol=1e-12, atol=0)
    u = aware.aim(Draw(0, 0, range(20_000))).u
    counts = torch.histc(u, 7, 0, 1)
    assert scipy.stats.chisquare(counts.numpy(), (want / 7 * 20_000).numpy()).pvalue > 0.01


def test_aiming_waits_until_every_band_was_seen_often_enough() -> None:
    draw = Draw(0, 1, range(500))
    losses = torch.ones(9, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    aware = taught(4, losses)
    assert_close(aware.aim(draw).u, draw.uniform("time"), rtol=0, atol=1e-8)
    assert torch.equal(aware.aim(draw).importance, torch.ones(500, dtype=torch.float64))
    aware.see(torch.tensor([0.1, 0.3, 0.6]), losses[0, :3])
    assert torch.equal(aware.density(), torch.ones(4, dtype=torch.float64))
    aware.see(torch.tensor([0.9]), losses[0, 3:])
    assert float(aware.density()[3]) > 1.5


def test_an_aimed_loss_has_the_mean_of_the_plain_one_and_the_least_variance() -> None:
    """For a loss L_k that is known in each band, importance·L_k has the mean of L_k and no variance left, but for the
    floor's; with the plain draw its variance is that of L_k."""

    class Even(Draw):
        def uniform(self, stream: str = "time", count: int | None = None) -> Tensor:
            return EVEN

    known = torch.tensor([0.1, 4.0, 1.0, 0.5, 9.0], dtype=torch.float64)
    aimed = taught(5, known.expand(10, 5)).aim(Even(0, 0, range(4000)))
    each = aimed.importance * known[(aimed.u * 5).long()]
    assert float(each.mean()) == pytest.approx(float(known.mean()), rel=2e-3)  # 4,000 points
    assert float(each.var()) < 1e-3 * float(known.var())


def test_on_a_table_a_band_is_a_timestep() -> None:
    """T bands: an aimed number picks the entry of its band, so the density is that of the timesteps."""
    schedule = schedule_of(Part("linear", {"steps": 20, "first": 0.001, "last": 0.3}))
    aware = taught(20, normals(10, 20, seed=4).abs())
    aimed = aware.aim(Draw(0, 3, range(2000)))
    k = (schedule.pick(aimed.uniform("time")) * 20).round().long() - 1
    assert_close(aimed.importance, 1 / aware.density()[k], rtol=1e-12, atol=0)
    assert torch.equal(aimed.uniform("dropout"), Draw(0, 3, range(2000)).uniform("dropout"))
    parts = [aware.aim(Draw(0, 3, places)) for places in (range(700), range(700, 2000))]  # two ranks
    assert torch.equal(torch.cat([part.u for part in parts]), aimed.u)
    assert torch.equal(torch.cat([part.importance for part in parts]), aimed.importance)


def test_aiming_goes_on_as_if_never_stopped() -> None:
    """state_dict into a fresh one, then the same losses: the same density, bit for bit; a copy, not a view."""
    losses = normals(30, 6, seed=5).abs()
    whole, first = taught(6, losses), taught(6, losses[:17])
    u = (torch.arange(6, dtype=torch.float64) + 0.5) / 6
    state, after = first.state_dict(), LossAware(6)
    after.load_state_dict(state)
    for _ in range(20):
        first.see(u, torch.full((6,), 100.0))
    assert float(state["losses"].max()) < 100
    for each in losses[17:]:
        after.see(u, each)
    for name, value in whole.state_dict().items():
        assert torch.equal(after.state_dict()[name], value)
    with pytest.raises(BadCheckpoint, match="losses do not fit .5, 10.; resume with the same bands"):
        LossAware(5).load_state_dict(state)


def test_aiming_refuses_what_would_spoil_it() -> None:
    for knobs, message in (
        ({"bands": 1}, "bands: got 1, need at least 2"),
        ({"history": 0}, "history: got 0, need at least 1"),
        ({"floor": 0.0}, "floor: got 0, need a number in"),
    ):
        with pytest.raises(BadArgument, match=f"loss-aware {message}"):
            LossAware(**knobs)
    with pytest.raises(BadArgument, match="got a loss that is not finite; leave out an update that was skipped"):
        LossAware().see(torch.tensor([0.5]), torch.tensor([math.nan]))
    with pytest.raises(BadArgument, match="got count=3, but there is one time a row"):
        LossAware().aim(DRAW).uniform("time", 3)


# ---- which noise goes with which data ------------------------------------------------------------------------------


def test_the_optimal_pairing_is_the_best_of_all_permutations() -> None:
    """Σ|x0 − eps|² over all 720 permutations of 6 rows."""
    x0, eps = normals(6, 2, 3, seed=1), normals(6, 2, 3, seed=2)
    cost = {p: float((x0 - eps[list(p)]).square().sum()) for p in itertools.permutations(range(6))}
    assert tuple(optimal(x0, eps).tolist()) == min(cost, key=lambda p: cost[p])


def test_on_the_line_the_optimal_pairing_keeps_the_order() -> None:
    """One dimension: the k-th smallest goes with the k-th smallest, the monotone map of optimal transport."""
    x0, eps = normals(200, 1, seed=1), normals(200, 1, seed=2)
    row = optimal(x0, eps)
    assert torch.equal(row.sort().values, torch.arange(200))
    assert torch.equal(eps[row][x0[:, 0].argsort(), 0], eps[:, 0].sort().values)


def test_rectified_flow_learns_from_the_paired_noise() -> None:
    """|v_θ(x_t) − (eps_π − x0)|², x_t = (1 − t)·x0 + t·eps_π, pi the optimal permutation (Pooladian et al. 2023)."""
    eps, heard = noises(DRAW, X0, perturb=0.1)
    row = optimal(X0, eps)
    assert not torch.equal(row, torch.arange(ROWS))
    t = column(1e-3 + U * (1 - 1e-3))
    y = Odd()((1 - t) * X0 + t * heard[row], t.flatten().float(), None)
    net = odd("flow", "flow", clock=lambda level: clock.time(level, scale=1.0))
    got = simple(net, X0, None, DRAW, pairing="optimal", perturb=0.1)["loss"]
    assert_close(got, rows(y - (eps[row] - X0)), rtol=1e-6, atol=1e-9)
    with pytest.raises(BadArgument, match="loss pairing: got 'closest', need independent or optimal"):
        simple(net, X0, None, DRAW, pairing="closest")  # type: ignore[arg-type]


def test_pairing_keeps_noise_to_the_class_that_is_told() -> None:
    """Within each class, null being one, the best of all permutations: each class meets the noise it would anyway."""
    x0, eps = normals(9, 2, 3, seed=1), normals(9, 2, 3, seed=2)
    cond = Cond(label=torch.tensor([4, 1, 4, 1, 4, 1, 4, 1, 4])).null(torch.arange(9) >= 6)
    row = optimal(x0, eps, cond)
    for own in ([0, 2, 4], [1, 3, 5], [6, 7, 8]):
        cost = {p: float((x0[own] - eps[list(p)]).square().sum()) for p in itertools.permutations(own)}
        assert tuple(row[own].tolist()) == min(cost, key=lambda p: cost[p])
    assert not torch.equal(row, optimal(x0, eps))
    assert torch.equal(optimal(x0, eps, Cond()), optimal(x0, eps))


def test_a_class_meets_all_noise_in_a_conditional_flow() -> None:
    """Two classes at ±3: paired across them a class would hear noise of mean ±0.8, and sampling starts elsewhere."""
    label = torch.arange(400) % 2
    x0, eps = 6.0 * label[:, None].double() - 3, normals(400, 1, seed=3)
    across, within = (eps[optimal(x0, eps, cond)][label == 1].mean() for cond in (None, Cond(label=label)))
    assert across > 0.6
    assert_close(within, eps[label == 1].mean())


def test_rectified_flow_of_classes_learns_from_the_noise_of_its_class() -> None:
    cond = Cond(label=torch.arange(ROWS) % 2)
    eps, _ = noises(DRAW, X0)
    row, net = optimal(X0, eps, cond), odd("flow", "flow", clock=lambda level: clock.time(level, scale=1.0))
    t = column(1e-3 + U * (1 - 1e-3))
    y = Odd()((1 - t) * X0 + t * eps[row], t.flatten().float(), None)
    got = simple(net, X0, cond, DRAW, pairing="optimal")["loss"]
    assert_close(got, rows(y - (eps[row] - X0)), rtol=1e-6, atol=1e-9)
    assert not torch.equal(row, optimal(X0, eps))


@pytest.mark.parametrize("told", [{"vec": normals(ROWS, 1)}, {"augmentation": normals(ROWS, 4)}])
def test_what_is_not_a_class_cannot_be_paired(told: dict[str, Tensor]) -> None:
    with pytest.raises(BadArgument, match=f"rows are told {next(iter(told))}, but only those told the same"):
        simple(odd("flow", "flow"), X0, Cond(**told), DRAW, pairing="optimal")


# ---- augmentation: what was done is told ---------------------------------------------------------------------------

PICTURES = torch.tanh(normals(200, 3, 8, 10, seed=6, dtype=torch.float32))
MANY = Draw(2, 5, range(200))


def test_flips_are_mirrors_and_say_so() -> None:
    """The numbers give the picture back: mirrored again where they are 1; half of each, within 4 standard errors."""
    x, numbers = flip(PICTURES, MANY, vertical=True)
    for row in range(200):
        axes = [axis for axis, done in zip((2, 1), numbers[row], strict=True) if done]
        assert torch.equal(x[row].flip(axes), PICTURES[row])
    assert bool(((numbers.mean(0) - 0.5).abs() < 4 * 0.5 / 200**0.5).all())
    only, told = flip(PICTURES, MANY)
    assert told.shape == (200, 1)
    assert torch.equal(only[0], PICTURES[0].flip(2) if told[0] else PICTURES[0])


@pytest.mark.long
def test_crops_are_shifts_and_say_so() -> None:
    """x0'[y, x] = x0[y + dy, x + dx] inside, mirrored at the edge (numpy's pad), every shift in −pad..pad there."""
    x, numbers = crop(PICTURES, MANY, pad=2)
    shifts = (numbers * 2).round().long()
    for row in range(200):
        wide = np.pad(PICTURES[row].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        dy, dx = (shifts[row] + 2).tolist()
        assert np.array_equal(x[row].numpy(), wide[:, dy : dy + 8, dx : dx + 10])
    assert {tuple(each) for each in shifts.tolist()} == set(itertools.product(range(-2, 3), repeat=2))


def coordinates(height: int, width: int) -> Tensor:
    """(2, H, W): x and y of each pixel's middle, in pixels from the picture's."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    return torch.stack([x, y]).double()


@pytest.mark.long
def test_affine_augmentation_does_what_its_numbers_say() -> None:
    """On pictures that are their own coordinates, where bilinear is exact, a pixel p shows the point M⁻¹·(p − d), with
    M = S·R·z·F and d written out from the nine numbers; where that point lies inside the picture."""
    size, n, height, width = (0.2, 0.125), 300, 32, 24
    at = coordinates(height, width)
    x, told = affine(
        at.expand(n, 2, height, width), Draw(0, 1, range(n)), share=0.5, flips=True, scale=0.2, shift=0.125
    )
    told = told.double()
    done = (told != 0).any(1)
    assert bool(done.any() & ~done.all())
    assert torch.equal(x[~done], at.expand(n, 2, height, width)[~done])
    for each, numbers in zip(x, told.tolist(), strict=True):
        fx, fy, n0, cos, sin, c2, s2, nx, ny = numbers
        n1, axis = math.hypot(c2, s2), math.atan2(s2, c2) / 2
        turn = np.array([[cos + 1, -sin], [sin, cos + 1]])
        e = np.array([math.cos(axis), math.sin(axis)])
        across = np.array([-e[1], e[0]])
        stretch = 2 ** (size[0] * n1) * np.outer(e, e) + 2 ** (-size[0] * n1) * np.outer(across, across)
        matrix = stretch @ turn @ np.diag([1 - 2 * fx, 1 - 2 * fy]) * 2 ** (size[0] * n0)
        shift = size[1] * np.array([width * nx, height * ny])
        want = np.linalg.inv(matrix) @ (at.flatten(1).numpy() - shift[:, None])
        inside = (np.abs(want) < np.array([[(width - 1) / 2], [(height - 1) / 2]])).all(0)
        assert np.allclose(each.flatten(1).numpy()[:, inside], want[:, inside], rtol=0, atol=1e-4)


@pytest.mark.long
def test_affine_augmentation_has_its_distributions() -> None:
    """Each of the four happens in a share of 0.3, alone; sizes and shifts are N(0, 1); angles uniform; a stretch's
    numbers are n1 at a uniform angle; nothing is mirrored unless asked."""
    n = 4000
    _, told = affine(torch.zeros(n, 1, 2, 2), Draw(0, 2, range(n)), share=0.3)
    told = told.double()
    assert bool((told[:, :2] == 0).all())
    size, turn, stretch, shift = told[:, 2], told[:, 3:5], told[:, 5:7], told[:, 7:]
    for each in (size[:, None], turn, stretch, shift):
        assert abs(float((each != 0).any(1).double().mean()) - 0.3) < 4 * (0.21 / n) ** 0.5
    on = [
        float(((a != 0) & (b != 0)).double().mean())
        for a, b in itertools.combinations((size, turn[:, 1], stretch[:, 0], shift[:, 0]), 2)
    ]
    assert all(abs(each - 0.09) < 4 * (0.0819 / n) ** 0.5 for each in on)
    for each in (size[size != 0], shift[shift != 0]):
        assert scipy.stats.kstest(each, "norm").pvalue > 0.01
    angle = torch.atan2(turn[:, 1], turn[:, 0] + 1)[turn[:, 1] != 0] / (2 * math.pi) + 0.5
    assert scipy.stats.kstest(angle, "uniform").pvalue > 0.01
    assert scipy.stats.kstest(stretch.norm(dim=1)[stretch[:, 0] != 0], "halfnorm").pvalue > 0.01
    mirrored = affine(torch.zeros(n, 1, 2, 2), Draw(0, 2, range(n)), share=0.3, flips=True)[1][:, :2].double().mean(0)
    assert abs(float(mirrored[0]) - 0.5) < 4 * 0.5 / n**0.5
    assert abs(float(mirrored[1]) - 0.15) < 4 * (0.1275 / n) ** 0.5


@pytest.mark.parametrize("augmentation", [flip, crop, affine])
def test_augmentation_is_of_the_row_s_place(augmentation: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """The rows of two ranks are those of one, picture and numbers, bit for bit; another update changes them."""
    whole = augmentation(PICTURES[:20], Draw(1, 2, range(20)))
    halves = [augmentation(PICTURES[:20][s], Draw(1, 2, range(20)[s])) for s in (slice(0, 7), slice(7, 20))]
    for i in (0, 1):
        assert torch.equal(torch.cat([half[i] for half in halves]), whole[i])
    assert not torch.equal(augmentation(PICTURES[:20], Draw(1, 3, range(20)))[1], whole[1])


def test_augmentations_refuse_what_they_cannot_do() -> None:
    for augmentation in (flip, crop, affine):
        with pytest.raises(BadShape, match=r"augmentation: got data of shape \(4, 2\), need pictures"):
            augmentation(torch.zeros(4, 2), Draw(0, 0, range(4)))
    for call, message in (
        (lambda: flip(PICTURES, MANY, horizontal=False), "flip: got neither horizontal nor vertical"),
        (lambda: crop(PICTURES, MANY, pad=8), "crop pad: got 8, need 1 to 7 for pictures of 8×10"),
        (lambda: affine(PICTURES, MANY, share=0.0), "affine share: got 0, need a number in"),
        (lambda: affine(PICTURES, MANY, scale=-1.0), "affine scale: got -1, need at least 0"),
    ):
        with pytest.raises(BadArgument, match=message):
            call()
