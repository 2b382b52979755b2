"""Law 2: make then split gives (x0, eps) back, the weight law holds, refused combinations are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from inkdrop.core.level import Level
from inkdrop.core.schedule import Schedule, Table
from inkdrop.core.target import Target
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument
from inkdrop.find import Part
from specimens import SCHEDULES, TARGETS, label, normals, schedule_of, target_of

every_schedule = pytest.mark.parametrize("part", SCHEDULES, ids=label)
every_target = pytest.mark.parametrize("name", TARGETS)

ULP = 2.0**-52


def levels_of(schedule: Schedule) -> Level:
    """Per-row levels: the least time, some entries, some times between them, and the very end."""
    inner = schedule.least + torch.tensor([0.05, 0.31, 0.5, 0.77, 0.98], dtype=torch.float64) * (1 - schedule.least)
    entries = (inner * schedule.steps).round().clamp(1, schedule.steps) / schedule.steps
    ends = torch.tensor([schedule.least, 1.0], dtype=torch.float64)
    return schedule(torch.cat([ends[:1], inner, entries, ends[1:]]))


def invertible(target: Target, level: Level) -> Level:
    """The rows of these levels at which the target is allowed."""
    rows = target.det(level) != 0
    assert int(rows.sum()) >= len(rows) - 2  # none but those of t = 1 at zero terminal SNR
    return Level(*(f[rows] for f in level))


def rounding(target: Target, level: Level, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What float64 allows: 16 ulp of the two terms of x0 and of eps, times what the difference det loses."""
    a, b, c, d = (f[:, None].abs() for f in target.coefficients(level))
    parts = (level.alpha * target.q(level)).abs() + (level.sigma * target.p(level)).abs()
    lost = (parts / target.det(level).abs())[:, None]
    return 16 * ULP * lost * (a * x.abs() + b * y.abs()), 16 * ULP * lost * (c * x.abs() + d * y.abs())


@every_schedule
@every_target
def test_make_then_split_returns_x0_and_eps(part: Part, name: str) -> None:
    schedule = schedule_of(part)
    target = target_of(name, schedule)
    level = invertible(target, levels_of(schedule))
    x0, eps = normals(len(level.t), 6, seed=1), normals(len(level.t), 6, seed=2)
    x = level.alpha[:, None] * x0 + level.sigma[:, None] * eps
    y = target.make(x0, eps, level)
    got = target.split(x, y, level)
    for found, true, allowed in zip(got, (x0, eps), rounding(target, level, x, y), strict=True):
        assert bool(((found - true).abs() <= allowed).all()), float(((found - true).abs() / allowed).max())
        assert float(allowed.max()) < 1e-5  # so that the bound above cannot hide a wrong formula


@every_schedule
@every_target
def test_an_error_of_y_is_the_stated_multiple_of_the_error_of_x0(part: Part, name: str) -> None:
    """|dy|² = weight_from_x0·|dx0|², measured by moving y by 1: large, so that rounding does not blur it."""
    schedule = schedule_of(part)
    target = target_of(name, schedule)
    level = invertible(target, levels_of(schedule))
    zero = torch.zeros(len(level.t), 3, dtype=torch.float64)
    step = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).expand_as(zero)
    dx0 = target.split(zero, step, level)[0] - target.split(zero, zero, level)[0]
    weight = target.weight_from_x0(level)
    assert weight.shape == level.t.shape
    torch.testing.assert_close(weight[:, None] * dx0**2, step**2, rtol=1e-10, atol=0)


@every_schedule
@every_target
def test_one_level_for_all_rows_equals_one_level_a_row(part: Part, name: str) -> None:
    schedule = schedule_of(part)
    target = target_of(name, schedule)
    single = schedule(0.5 if schedule.least <= 0.5 else 1.0)
    x0, eps = normals(3, 2, 2, seed=3), normals(3, 2, 2, seed=4)
    y = target.make(x0, eps, single)
    torch.testing.assert_close(target.make(x0, eps, single.rows(3)), y, rtol=0, atol=0)
    for a, b in zip(target.split(x0, y, single), target.split(x0, y, single.rows(3)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- the (p, q) of the papers --------------------------------------------------------------------------------

PAPERS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda a, s: (0 * a, 1 + 0 * a),
    "x0": lambda a, s: (1 + 0 * a, 0 * a),
    "v": lambda a, s: (-s, a),
    "score": lambda a, s: (0 * a, -1 / s),
    "flow": lambda a, s: (-1 + 0 * a, 1 + 0 * a),
    "edm": lambda a, s: (s / (0.5 * (s**2 + 0.25 * a**2).sqrt()), -0.5 * a / (s**2 + 0.25 * a**2).sqrt()),
}


def test_every_target_but_the_posterior_mean_is_written_out_here() -> None:
    assert sorted([*PAPERS, "mu"]) == TARGETS, "write the new target's p and q into this file"


@every_schedule
@pytest.mark.parametrize("name", list(PAPERS))
def test_coefficients_are_those_of_the_papers(part: Part, name: str) -> None:
    schedule = schedule_of(part)
    target, level = target_of(name, schedule), levels_of(schedule)
    p, q = PAPERS[name](level.alpha, level.sigma)
    torch.testing.assert_close(target.p(level), p, rtol=1e-12, atol=0)
    torch.testing.assert_close(target.q(level), q, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "part", [p for p in SCHEDULES if p.name in ("linear", "cosine", "table", "sigmoid")], ids=label
)
def test_mu_is_the_posterior_mean_of_ddpm(part: Part) -> None:
    """Ho et al. 2020, eq. 7, from betas and abar alone, at every entry; the first entry's mean is x0 itself."""
    schedule = schedule_of(part)
    assert isinstance(schedule, Table)
    beta = schedule.betas
    abar = (1 - beta).cumprod(0)
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    c0 = before.sqrt() * beta / (1 - abar)
    ct = (1 - beta).sqrt() * (1 - before) / (1 - abar)
    level = schedule(torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps)
    x0, eps = normals(schedule.steps, 2, seed=5), normals(schedule.steps, 2, seed=6)
    xt = abar.sqrt()[:, None] * x0 + (1 - abar).sqrt()[:, None] * eps
    got = target_of("mu", schedule).make(x0, eps, level)
    torch.testing.assert_close(got, c0[:, None] * x0 + ct[:, None] * xt, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got[0], x0[0], rtol=0, atol=1e-14)


def test_mu_of_a_continuous_schedule_looks_one_thousandth_back() -> None:
    """E[x_s | x_t, x0] of the joint Gaussian of (x_s, x_t) given x0, for the straight path at t = 0.6, s = 0.599."""
    t, s = 0.6, 0.599
    x0, eps = normals(4, 1, seed=7), normals(4, 1, seed=8)
    xt = (1 - t) * x0 + t * eps
    a = (1 - t) / (1 - s)
    covariance = a * s**2  # of x_s and x_t given x0
    mean = (1 - s) * x0 + covariance / t**2 * (xt - (1 - t) * x0)
    schedule = schedule_of("flow")
    torch.testing.assert_close(target_of("mu", schedule).make(x0, eps, schedule(t)), mean, rtol=1e-10, atol=1e-12)


def test_v_is_the_derivative_by_the_angle_and_flow_the_derivative_by_time() -> None:
    """Salimans & Ho 2022: v = dx/dphi at alpha = cos phi; the straight path: dx/dt = eps − x0. By differences."""
    x0, eps, h = normals(5, 1, seed=9), normals(5, 1, seed=10), 1e-5
    phi, one = torch.tensor(0.7, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)

    def turned(angle: Tensor) -> Tensor:
        return angle.cos() * x0 + angle.sin() * eps

    level = Level(phi.cos(), phi.sin(), phi)
    v = target_of("v", schedule_of("vp")).make(x0, eps, level)
    torch.testing.assert_close(v, (turned(phi + h) - turned(phi - h)) / (2 * h), rtol=0, atol=1e-9)
    schedule = schedule_of("flow")
    later, sooner = schedule(0.4 + h), schedule(0.4 - h)
    slope = ((later.alpha - sooner.alpha) * x0 + (later.sigma - sooner.sigma) * eps) / (2 * h)
    flow = target_of("flow", schedule).make(x0, eps, Level(0.6 * one, 0.4 * one, 0.4 * one))
    torch.testing.assert_close(flow, slope, rtol=0, atol=1e-9)


def test_score_is_the_gradient_of_the_log_density() -> None:
    level = schedule_of("vp")(0.3)
    x0, eps = normals(4, 3, seed=11), normals(4, 3, seed=12)
    x = (level.alpha * x0 + level.sigma * eps).requires_grad_()
    log_density = torch.distributions.Normal(level.alpha * x0, level.sigma).log_prob(x).sum()
    [gradient] = torch.autograd.grad(log_density, x)
    torch.testing.assert_close(target_of("score", schedule_of("vp")).make(x0, eps, level), gradient, rtol=1e-12, atol=0)


def test_edm_is_karras_preconditioning() -> None:
    """D = c_skip·x + c_out·F (Karras et al. 2022, eq. 7 and table 1), and lambda·c_out² = 1 with their loss weight."""
    schedule = schedule_of("edm")
    level = levels_of(schedule)
    sigma, sd = level.sigma[:, None], 0.5
    x, f = normals(len(sigma), 2, seed=13), normals(len(sigma), 2, seed=14)
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt()
    target = target_of("edm", schedule)
    torch.testing.assert_close(target.split(x, f, level)[0], c_skip * x + c_out * f, rtol=1e-11, atol=1e-13)
    weight = (level.sigma**2 + sd**2) / (level.sigma * sd) ** 2
    torch.testing.assert_close(target.weight_from_x0(level), weight, rtol=1e-12, atol=0)


def test_edm_at_unit_deviation_on_a_preserving_schedule_is_minus_v() -> None:
    from inkdrop.core.target import edm, v

    level = levels_of(schedule_of("cosine"))
    x0, eps = normals(len(level.t), 2, seed=15), normals(len(level.t), 2, seed=16)
    torch.testing.assert_close(edm(sd=1.0).make(x0, eps, level), -v().make(x0, eps, level), rtol=1e-12, atol=1e-14)


# ---- refusals ------------------------------------------------------------------------------------------------


@every_schedule
@every_target
def test_a_target_is_refused_exactly_where_it_cannot_be_inverted(part: Part, name: str) -> None:
    """The denoiser asks the target, so the refusal comes before a training run, not after it."""
    schedule = schedule_of(part)
    target = target_of(name, schedule)
    zero_terminal = float(schedule(1.0).alpha) == 0
    if zero_terminal and name in ("eps", "score"):
        with pytest.raises(BadArgument, match=f"target {name}: cannot be inverted at t = 1.*try target v, x0 or flow"):
            target.check(schedule)
        with pytest.raises(BadArgument, match="zero terminal SNR"):
            Denoiser(nn.Identity(), schedule, target)
    else:
        Denoiser(nn.Identity(), schedule, target)
        assert all(bool(torch.isfinite(f).all()) for f in target.coefficients(levels_of(schedule)))
