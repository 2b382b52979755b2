"""Stochastic and score-based samplers: their papers' formulas written out, their stationary laws, and restarts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Noise, revise
from inkdrop.core.brownian import Brownian
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.noise import Keyed
from inkdrop.core.oracle import Mixture
from inkdrop.core.schedule import Table
from inkdrop.drive import drive
from inkdrop.errors import BadArgument
from inkdrop.find import Part, build, find, order_of
from inkdrop.plan import Plan, sampling
from inkdrop.samplers.restart import restart
from paths import MIXTURE, STOCHASTIC, between, every_path, line_of, run, silent, variance_of
from specimens import SCHEDULES, label, normals, sampler_of, schedule_of

pytestmark = pytest.mark.long  # left out of the fast tier


def score(x: Tensor, level: Level) -> Tensor:
    return -MIXTURE(Ask(x, level)).eps / level.sigma


def heard(part: Part, x: Tensor, grid: Grid, noise: Noise, net: Callable[[Ask], Belief] = MIXTURE):
    """The result and the levels that were asked about."""
    levels: list[Level] = []

    def ear(ask: Ask) -> Belief:
        levels.append(ask.level)
        return net(ask)

    return drive(sampler_of(part)(x, grid, noise), ear), levels


# ---- the papers, written out ---------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_euler_ancestral_steps_down_and_adds_noise(path: str, eta: float) -> None:
    """k-diffusion's step in z = x/alpha: rho_up = eta·√(rho'²·(rho² − rho'²)/rho²), rho_down = √(rho'² − rho_up²). And
    it is ddim with this eta, bit for bit."""
    grid = between(path, 12)
    noise, x = Keyed(3, [0, 1]), normals(2, 2, seed=1) * 3
    z = x / grid[0].alpha
    for now, nxt in pairwise(grid):
        rho, to = float(now.rho), float(nxt.rho)
        up = eta * math.sqrt(to**2 * (rho**2 - to**2) / rho**2)
        slope = MIXTURE(Ask(now.alpha * z, now)).eps
        z = z + slope * (math.sqrt(to**2 - up**2) - rho)
        if eta:
            z = z + up * noise(z, now, nxt)
    got = run(Part("euler_ancestral", {"eta": eta}), x, grid, seed=3)
    torch.testing.assert_close(got, z * grid[-1].alpha, rtol=1e-11, atol=1e-12)
    assert torch.equal(got, run(Part("ddim", {"eta": eta}), x, grid, seed=3))


@pytest.mark.parametrize("order", [1, 2])
def test_edm_is_karras_algorithm_2(order: int) -> None:
    """Every line of it, with S_churn = 7, S_tmin = 0.05, S_tmax = 50 and S_noise = 1.007, on EDM's own grid; t_hat and,
    for the correction, t_{i+1} are asked about."""
    schedule = schedule_of("edm")
    grid = build("grids", Part("karras"), schedule, 14)
    noise, x = Keyed(3, [0, 1]), schedule.start(normals(2, 2, seed=2))
    want, sigmas, visited = x, [float(level.sigma) for level in grid], []

    def denoised(y: Tensor, sigma: float) -> Tensor:
        visited.append(sigma)
        return MIXTURE(Ask(y, schedule(schedule.time_of(-math.log(sigma))))).x0

    for t, nxt in pairwise(sigmas):
        gamma = min(7.0 / 14, math.sqrt(2) - 1) if 0.05 <= t <= 50 else 0.0
        t_hat = t * (1 + gamma)
        if gamma:
            want = want + math.sqrt(t_hat**2 - t**2) * 1.007 * noise(want, grid[0], grid[0])
        slope = (want - denoised(want, t_hat)) / t_hat
        ahead = want + (nxt - t_hat) * slope
        if order == 2 and nxt > 0:
            second = (ahead - denoised(ahead, nxt)) / nxt
            ahead = want + (nxt - t_hat) * (slope + second) / 2
        want = ahead
    part = Part("edm", {"churn": 7.0, "low": 0.05, "high": 50.0, "inflate": 1.007, "order": order})
    got, levels = heard(part, x, grid, Keyed(3, [0, 1]))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    assert [float(level.sigma) for level in levels] == pytest.approx(visited, rel=1e-11)


def test_edm_raises_nothing_above_the_schedule_s_noisiest_level() -> None:
    """The first steps of a grid from t = 1 are capped: no noise at all at the first, for there is nowhere to go."""
    schedule = schedule_of("vp")
    grid = build("grids", Part("trailing"), schedule, 200)
    drawn: list[tuple[float, float]] = []

    def noise(x: Tensor, now: Level, nxt: Level) -> Tensor:
        drawn.append((float(now.t), float(nxt.t)))
        return torch.zeros_like(x)

    _, levels = heard(Part("edm", {"churn": 70.0, "order": 1}), normals(1, 2), grid, noise)
    gamma = 70 / 200
    want = [min(float(level.rho) * (1 + gamma), float(schedule(1.0).rho)) for level in grid[:-1]]
    assert [float(level.rho) for level in levels] == pytest.approx(want, rel=1e-9)
    assert sum(rho == want[0] for rho in want) > 3
    assert len(drawn) == 199
    assert all(now < nxt <= 1 for now, nxt in drawn)


@every_path
def test_edm_without_churn_is_heun_in_rho(path: str) -> None:
    x = normals(3, 2, seed=3)
    grid = between(path, 9)
    got = drive(sampler_of(Part("edm", {"churn": 0.0}))(x, grid, silent), MIXTURE)
    assert torch.equal(got, run(Part("heun", {"space": "rho"}), x, grid))
    got = drive(sampler_of(Part("edm", {"churn": 0.0, "order": 1}))(x, grid, silent), MIXTURE)
    assert torch.equal(got, run(Part("euler"), x, grid))


def test_dpmpp_2m_sde_is_lu_s_update() -> None:
    """SDE-DPM-Solver++(2M) in the letters of its paper: h, r, D, and the noise √(1 − e^{−2h})·sigma."""
    grid = build("grids", Part("trailing"), schedule_of("linear"), 12)
    noise, x, before = Keyed(3, [0, 1]), normals(2, 2, seed=4), None
    want = x
    for i, (now, nxt) in enumerate(pairwise(grid)):
        x0 = MIXTURE(Ask(want, now)).x0
        if nxt.clean:
            want = x0
            break
        h, d = float(nxt.lam - now.lam), x0
        if before is not None:
            r = float(now.lam - grid[i - 1].lam) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        spread = nxt.sigma * math.sqrt(1 - math.exp(-2 * h))
        want = nxt.sigma / now.sigma * math.exp(-h) * want + nxt.alpha * (1 - math.exp(-2 * h)) * d
        want, before = want + spread * noise(want, now, nxt), x0
    torch.testing.assert_close(run(Part("dpmpp_2m_sde"), x, grid, seed=3), want, rtol=0, atol=1e-11)


def test_dpmpp_2s_sde_is_k_diffusion_s() -> None:
    """Ancestral steps to the midpoint and to the end, both from x, in z = x/alpha and −log rho; the noise of the whole
    step is the Brownian increment, √-weighted by SNR, of the two that are drawn."""
    grid = between("vp", 8)
    noise, x = Keyed(3, [0, 1]), normals(2, 2, seed=5) * 2
    z = x / grid[0].alpha
    for now, nxt in pairwise(grid):
        s, e = float(now.rho), float(nxt.rho)
        m = math.sqrt(s * e)

        def down_up(to: float, s: float = s) -> tuple[float, float]:
            up = min(to, math.sqrt(to**2 * (s**2 - to**2) / s**2))
            return math.sqrt(to**2 - up**2), up

        mid = grid.at(-math.log(m))
        first, second = noise(z, now, mid), noise(z, mid, nxt)
        whole = ((m**-2 - s**-2) ** 0.5 * first + (e**-2 - m**-2) ** 0.5 * second) / (e**-2 - s**-2) ** 0.5
        denoised = MIXTURE(Ask(now.alpha * z, now)).x0
        down, up = down_up(m)
        ahead = down / s * z - math.expm1(math.log(down / s)) * denoised + up * first
        denoised = MIXTURE(Ask(mid.alpha * ahead, mid)).x0
        down, up = down_up(e)
        z = down / s * z - math.expm1(math.log(down / s)) * denoised + up * whole
    got = run(Part("dpmpp_2s_sde"), x, grid, seed=3)
    torch.testing.assert_close(got, z * grid[-1].alpha, rtol=0, atol=1e-11)


def integral(now: Level, nxt: Level, eta: float, x0_of: Callable[[float], float]) -> float:
    """alpha'·∫ (1 + eta)·e^{−(1 + eta)·(lam' − lam)}·x0(lam) dlam over one step, by quadrature."""
    low, high = float(now.lam), float(nxt.lam)
    weight = lambda lam: (1 + eta) * math.exp(-(1 + eta) * (high - lam))  # noqa: E731
    return float(nxt.alpha) * quad(lambda lam: weight(lam) * x0_of(lam), low, high, epsabs=1e-13)[0]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("name", "degree"), [("dpmpp_2s_sde", 0), ("dpmpp_2m_sde", 0), ("dpmpp_3m_sde", 2)])
def test_polynomials_in_lam_are_integrated_exactly(name: str, degree: int, eta: float) -> None:
    """An x0 that is a polynomial of lam alone, of the solver's degree: without noise the state is the integral's, on
    uneven steps; the parabola's first two steps, for which it has too few answers, apart."""
    schedule = schedule_of("vp")
    grid = Grid(schedule, schedule.time_of(torch.tensor([-1.5, -1.0, -0.7, 0.1, 0.4, 1.3], dtype=torch.float64)))
    coefficients = (0.3, -0.8, 0.5)[: degree + 1]
    states: list[tuple[Tensor, Level]] = []

    def net(ask: Ask) -> Belief:
        states.append((ask.x, ask.level))
        x0 = torch.full_like(ask.x, np.polynomial.Polynomial(coefficients)(float(ask.level.lam)))
        return revise(ask, Belief(x0, x0), x0)

    end = drive(sampler_of(Part(name, {"eta": eta}))(normals(1, 1), grid, lambda x, *_: 0 * x), net)
    states.append((end, grid[-1]))
    asked = [(x, level) for x, level in states if float(level.t) in grid.times]
    for (x, now), (got, nxt) in list(pairwise(asked))[degree:]:
        h = float(nxt.lam - now.lam)
        want = nxt.sigma / now.sigma * math.exp(-eta * h) * x
        want = want + integral(now, nxt, eta, np.polynomial.Polynomial(coefficients))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@every_path
@pytest.mark.parametrize("name", ["dpmpp_2s", "dpmpp_2m", "dpmpp_3m"])
def test_without_noise_the_sde_solvers_are_the_ode_s(path: str, name: str) -> None:
    grid = between(path, 9)
    x = normals(3, 2, seed=6) * 3
    got = drive(sampler_of(Part(f"{name}_sde", {"eta": 0.0}))(x, grid, silent), MIXTURE)
    torch.testing.assert_close(got, run(Part(name), x, grid), rtol=0, atol=1e-12)


@every_path
@pytest.mark.parametrize("part", [Part(f"dpmpp_{n}_sde") for n in ("2s", "2m", "3m")] + [Part("ddpm")], ids=label)
def test_noise_is_asked_for_intervals_that_follow_one_another(part: Part, path: str) -> None:
    """From the first level to the last, none overlapping: so a Brownian path adds up, and white noise does as well."""
    pieces: list[tuple[float, float]] = []

    def noise(x: Tensor, now: Level, nxt: Level) -> Tensor:
        pieces.append((float(now.t), float(nxt.t)))
        return torch.zeros_like(x)

    grid = between(path, 6)
    drive(sampler_of(part)(normals(1, 2), grid, noise), MIXTURE)
    assert (pieces[0][0], pieces[-1][1]) == (float(grid[0].t), float(grid[-1].t))
    assert all(a[1] == b[0] and a[0] > a[1] for a, b in pairwise(pieces))


# ---- the score-based line ------------------------------------------------------------------------------------


def test_the_rates_of_the_forward_sde_are_the_papers() -> None:
    """VP: f = −beta/2, g² = beta (Song et al. 2021, eq. 11). VE: f = 0, g² = d(sigma²)/dt (eq. 9).
    Flow: f = −1/(1 − t), g² = 2·t/(1 − t). Cosine: f = −θ·tan(θt), g² = 2·θ·tan(θt)."""
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    fall, spread = schedule_of("vp").rates(t)
    beta = 0.1 + t * 19.9
    torch.testing.assert_close((fall, spread), (-beta / 2, beta), rtol=1e-12, atol=0)
    fall, spread = schedule_of("flow").rates(t)
    torch.testing.assert_close((fall, spread), (-1 / (1 - t), 2 * t / (1 - t)), rtol=1e-12, atol=0)
    schedule = schedule_of(Part("continuous_cosine", {"lam_end": -math.inf}))
    angle = math.pi / 2
    fall, spread = schedule.rates(t)
    wants = (-angle * (angle * t).tan(), 2 * angle * (angle * t).tan())
    torch.testing.assert_close((fall, spread), wants, rtol=1e-12, atol=0)
    fall, spread = schedule_of("edm").rates(t)
    root = 0.002 ** (1 / 7) + (t - 0.001) / 0.999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))
    torch.testing.assert_close(fall, 0 * t, rtol=0, atol=0)
    torch.testing.assert_close(spread, 14 * root**13 * (80 ** (1 / 7) - 0.002 ** (1 / 7)) / 0.999, rtol=1e-10, atol=0)


@pytest.mark.parametrize("part", [p for p in SCHEDULES if schedule_of(p).steps > 1], ids=label)
def test_the_rates_are_the_slopes_of_the_schedule(part: Part) -> None:
    """f = d log alpha/dt and g² = −2·sigma²·dlam/dt by central differences, between a table's entries; at an entry, the
    slopes of the interval below it."""
    schedule = schedule_of(part)
    k = torch.linspace(1, schedule.steps - 1, 11).round().double().unique() + 0.37
    t, h = k / schedule.steps, 1e-7
    high, low = schedule(t + h), schedule(t - h)
    fall, spread = schedule.rates(t)
    torch.testing.assert_close(fall, (high.alpha.log() - low.alpha.log()) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(spread, -(schedule(t).sigma ** 2) * (high.lam - low.lam) / h, rtol=1e-6, atol=0)
    if isinstance(schedule, Table):
        k = (k - 0.37)[1:]
        entry, below = schedule.rates(k / schedule.steps), schedule.rates((k - 1e-6) / schedule.steps)
        torch.testing.assert_close(entry, below, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("part", "t"), [(Part("linear"), 0.0), (Part("flow"), 1.0), (Part("linear", {"zero_terminal": True}), 1.0)]
)
def test_rates_that_are_infinite_or_none_are_refused(part: Part, t: float) -> None:
    with pytest.raises(BadArgument, match="schedule rates: got a time that is clean, or without signal"):
        schedule_of(part).rates(t)


def test_reverse_sde_is_euler_maruyama_of_song_s_equation_6() -> None:
    """dx = (−beta·x/2 − beta·score) dt + √beta dw backwards, from beta(t) alone; the last step, into clean, is x0."""
    grid = build("grids", Part("uniform"), schedule_of("vp"), 20)
    noise, x = Keyed(3, [0, 1]), normals(2, 2, seed=7)
    want = x
    for now, nxt in pairwise(grid[:-1]):
        beta, step = 0.1 + float(now.t) * 19.9, float(now.t - nxt.t)
        drift = -0.5 * beta * want - beta * score(want, now)
        want = want - drift * step + math.sqrt(beta * step) * noise(want, now, nxt)
    want = MIXTURE(Ask(want, grid[-2])).x0
    torch.testing.assert_close(run(Part("reverse_sde"), x, grid, seed=3), want, rtol=1e-10, atol=1e-10)


def corrected(x: Tensor, level: Level, z: Tensor, snr: float, alpha: float) -> Tensor:
    """Algorithms 4 and 5, one row at a time."""
    rows = []
    for row, fresh in zip(x, z, strict=True):
        g = score(row[None], level)[0]
        e = 2 * alpha * (snr * float(fresh.norm()) / float(g.norm())) ** 2
        rows.append(row + e * g + math.sqrt(2 * e) * fresh)
    return torch.stack(rows)


def test_predictor_corrector_is_song_s_algorithms_2_and_4() -> None:
    """Variance exploding: x + (sigma_{i+1}² − sigma_i²)·s + √(sigma_{i+1}² − sigma_i²)·z, then two Langevin steps."""
    grid = build("grids", Part("karras"), schedule_of("edm"), 12)
    noise, x = Keyed(3, range(3)), normals(3, 2, seed=8) * 80
    want = x
    for now, nxt in pairwise(grid[:-1]):
        gap = float(now.sigma**2 - nxt.sigma**2)
        want = want + gap * score(want, now) + math.sqrt(gap) * noise(want, now, nxt)
        for _ in range(2):
            want = corrected(want, nxt, noise(want, nxt, nxt), 0.1, 1.0)
    want = MIXTURE(Ask(want, grid[-2])).x0
    got = run(Part("predictor_corrector", {"snr": 0.1, "corrections": 2}), x, grid, seed=3)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_predictor_corrector_is_song_s_algorithms_3_and_5() -> None:
    """Variance preserving, from betas: (2 − √(1 − beta))·x + beta·s + √beta·z over every entry of a table of 40."""
    schedule = schedule_of(Part("linear", {"steps": 40, "rescale": True}))
    assert isinstance(schedule, Table)
    grid, beta = build("grids", Part("trailing"), schedule, 40), schedule.betas.flip(0)
    noise, x = Keyed(3, range(3)), normals(3, 2, seed=9)
    want = x
    for b, (now, nxt) in zip(beta[:-1].tolist(), pairwise(grid[:-1]), strict=True):
        want = (2 - math.sqrt(1 - b)) * want + b * score(want, now) + math.sqrt(b) * noise(want, now, nxt)
        want = corrected(want, nxt, noise(want, nxt, nxt), 0.16, 1 - b)
    want = MIXTURE(Ask(want, grid[-2])).x0
    torch.testing.assert_close(run(Part("predictor_corrector"), x, grid, seed=3), want, rtol=1e-9, atol=1e-9)


def test_annealed_langevin_is_song_and_ermon_s_algorithm_1() -> None:
    """x + a/2·s + √a·z with a = ε·sigma_i²/sigma_L², ε = 0.2·sigma_L²; then one denoising step."""
    grid = build("grids", Part("karras", {"rho_max": 3.0}), schedule_of("edm"), 5)
    noise, x = Keyed(3, [0, 1]), normals(2, 2, seed=10) * 3
    want, last = x, float(grid[-2].sigma)
    for level in grid[:-1]:
        a = 0.2 * last**2 * float(level.sigma) ** 2 / last**2
        for _ in range(4):
            want = want + a / 2 * score(want, level) + math.sqrt(a) * noise(want, level, level)
    want = want + last**2 * score(want, grid[-2])
    got, levels = heard(Part("annealed_langevin", {"per_level": 4, "step_size": 0.2}), x, grid, Keyed(3, [0, 1]))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert len(levels) == 4 * 5 + 1


@pytest.mark.parametrize("step_size", [0.05, 0.2, 1.0])
def test_langevin_s_stationary_variance_is_known(step_size: float) -> None:
    """On N(0, v) the steps x ← x + e·score + √(2·e)·z settle at the variance v/(1 − e/(2·v)), e = step_size·sigma²/2:
    more than v, and exactly this, from any start."""
    std, grid = 0.4, between("vp", 9)[-2:-1]
    sigma, v = float(grid[0].sigma), float((grid[0].alpha * std) ** 2 + grid[0].sigma ** 2)
    e = step_size * sigma**2 / 2
    steps = 2 + int(20 / e * v)  # (1 − e/v)^steps < e^-20
    line = line_of(Part("annealed_langevin", {"per_level": steps, "step_size": step_size}), grid, 0.7, std)
    assert variance_of(line) == pytest.approx(v / (1 - e / (2 * v)), rel=1e-10)
    assert float(line[0]) == pytest.approx(float(grid[0].alpha) * 0.7, abs=1e-8)


def test_the_corrector_s_stationary_variance_is_known_where_norms_concentrate() -> None:
    """At one level, over and over, on N(0, v) in 4,000 dimensions: ‖z‖² = d and ‖eps‖² = d·sigma²·w/v² at variance w,
    so e = 2·a²·snr²·v²/w, which with w = v/(1 − e/(2·v)) gives w = v·(1 + a²·snr²), here within 1 %."""
    std, dim, snr = 0.4, 4000, 0.3
    oracle = Mixture(torch.zeros(1, dim), torch.tensor([std]))
    schedule = schedule_of("edm")
    grid = Grid(schedule, schedule.time_of(-torch.tensor([0.5001, 0.5], dtype=torch.float64).log()))
    v = std**2 + 0.25
    x = normals(6, dim, seed=11) * v**0.5
    part = Part("predictor_corrector", {"snr": snr, "corrections": 150})
    got = drive(sampler_of(part)(x, grid, Keyed(1, range(6))), oracle)
    assert float(got.square().mean()) == pytest.approx(v * (1 + snr**2), rel=0.01)


def energy(x: Tensor, y: Tensor, draws: int = 300) -> float:
    """The share of random relabellings of two samples (n, D) whose energy distance is as great: a p-value."""
    both, n = torch.cat([x, y]), len(x)
    apart = torch.cdist(both, both)
    gen = torch.Generator().manual_seed(0)
    signs = torch.ones(draws + 1, 2 * n, dtype=torch.float64)
    for i in range(draws + 1):
        signs[i, (torch.arange(2 * n) if i == 0 else torch.randperm(2 * n, generator=gen))[n:]] = -1
    distance = -((signs @ apart) * signs).sum(1)  # 2·E|x − y| − E|x − x'| − E|y − y'|, times n²
    return float((distance[1:] >= distance[0]).double().mean())


FINE = {  # Langevin steps need near levels and many of them
    "annealed_langevin": Part("annealed_langevin", {"per_level": 12, "step_size": 0.1}),
    "predictor_corrector": Part("predictor_corrector", {"snr": 0.1}),
}
DIMS = {"predictor_corrector": 48}  # where norms concentrate


def clusters(dim: int) -> Mixture:
    """MIXTURE's three clusters, each coordinate of it in turn."""
    return Mixture(MIXTURE.means.repeat(1, dim // 2), MIXTURE.stds, MIXTURE.weights)


@pytest.mark.parametrize("name", sorted({p.name for p in STOCHASTIC} - {"consistency"}))
def test_two_samples_are_not_told_apart(name: str) -> None:
    """500 rows of a mixture of three clusters, taken from its exact marginal at rho = 5 to rho = 0.3, against 500 exact
    draws there: the energy distance is within the lower 98 % of its permutation law."""
    part, oracle = FINE.get(name, Part(name)), clusters(DIMS.get(name, 2))
    grid = between("vp", 60, end=0.3)
    gen = torch.Generator().manual_seed(5)
    x = oracle.sample(500, grid[0], seed=4)
    got = drive(sampler_of(part)(x, grid, lambda y, *_: torch.randn(y.shape, generator=gen, dtype=y.dtype)), oracle)
    assert energy(got, oracle.sample(500, grid[-1], seed=6)) > 0.02


@pytest.mark.parametrize("wrong", ["wide", "narrow", "weights"])
def test_two_samples_are_told_apart_by_this_test(wrong: str) -> None:
    """Its power, on the same mixture: a spread 20 % off, either way, or a cluster that is missed."""
    level = between("vp", 1, end=0.3)[-1]
    x, y = MIXTURE.sample(500, level, seed=7), MIXTURE.sample(500, level, seed=6)
    assert energy(x, y) > 0.02
    if wrong == "weights":
        x = Mixture(MIXTURE.means[1:], MIXTURE.stds[1:], MIXTURE.weights[1:]).sample(500, level, seed=7)
    else:
        x = x.mean(0) + (x - x.mean(0)) * (1.25 if wrong == "wide" else 0.8)
    assert energy(x, y) < 0.01


# ---- restart -------------------------------------------------------------------------------------------------


def restarted(part: Part, **knobs: float) -> Callable[..., object]:
    return partial(restart, sampler_of(part), **knobs)


def test_restart_is_xu_s_algorithm_1() -> None:
    """Down to rho = 0.1; K times up by √(t_max² − t_min²)·z, which is all that variance exploding adds, and down again;
    then on to the end. Written out with Euler's steps; asks are counted."""
    schedule = schedule_of("edm")
    grid = build("grids", Part("karras"), schedule, 30)
    inside = [i for i, level in enumerate(grid) if 0.1 <= float(level.rho) <= 1.0]
    top, bottom, noise = inside[0], inside[-1], Keyed(3, [0, 1])
    want = x = normals(2, 2, seed=12) * 80

    def down(y: Tensor, levels: Sequence[Level]) -> Tensor:
        for now, nxt in pairwise(levels):
            y = y + (nxt.sigma - now.sigma) * (y - MIXTURE(Ask(y, now)).x0) / now.sigma
        return y

    want = down(want, grid[: bottom + 1])
    for _ in range(3):
        gap = float(grid[top].sigma ** 2 - grid[bottom].sigma ** 2)
        want = want + math.sqrt(gap) * noise(want, grid[bottom], grid[top])
        want = down(want, grid[top : bottom + 1])
    want = down(want, grid[bottom:])
    asks: list[Ask] = []

    def ear(ask: Ask) -> Belief:
        asks.append(ask)
        return MIXTURE(ask)

    got = drive(restarted(Part("euler"), low=0.1, high=1.0, times=3)(x, grid, Keyed(3, [0, 1])), ear)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    assert len(asks) == 30 + 3 * (bottom - top)
    assert len(inside) == 5


@pytest.mark.parametrize("part", [Part("dpmpp_2m"), Part("heun"), Part("ddpm")], ids=label)
def test_restart_that_has_nothing_to_do_is_the_sampler_itself(part: Part) -> None:
    """No times, or no stretch with two levels: bit for bit, a multistep sampler's history included."""
    grid = build("grids", Part("trailing"), schedule_of("vp"), 12)
    x = normals(3, 2, seed=13)

    def restarts(**knobs: float) -> Tensor:
        return drive(restarted(part, **knobs)(x, grid, Keyed(7, range(3))), MIXTURE)

    for knobs in ({"low": 0.5, "high": 2.0, "times": 0}, {"low": 0.5, "high": 0.501}):
        assert torch.equal(restarts(**knobs), run(part, x, grid))
    assert not torch.equal(restarts(low=0.5, high=2.0, times=1), run(part, x, grid))


@every_path
def test_restart_keeps_the_moments(path: str) -> None:
    """10,000 rows from the exact marginal at rho = 5, twice back from rho = 0.7 to 2, at the end: mean and covariance
    within 4.5 standard errors, as for stochastic samplers."""
    grid, n = between(path, 100, end=0.6), 10_000
    gen = torch.Generator().manual_seed(5)
    x = MIXTURE.sample(n, grid[0], seed=4)
    work = restarted(Part("heun"), low=0.7, high=2.0, times=2)
    got = drive(work(x, grid, lambda y, *_: torch.randn(y.shape, generator=gen, dtype=y.dtype)), MIXTURE)
    mean, cov = MIXTURE.moments(grid[-1])
    gap = got - mean
    assert bool((gap.mean(0).abs() < 4.5 * cov.diagonal().sqrt() / n**0.5).all())
    products = gap[:, :, None] * gap[:, None, :]
    assert bool(((products.mean(0) - cov).abs() < 4.5 * products.std(0) / n**0.5).all())


def test_a_plan_combines_a_sampler_with_restart() -> None:
    grid = build("grids", Part("trailing"), schedule_of("vp"), 20)
    x, combine = normals(3, 2, seed=14), Part("restart", {"low": 0.1, "high": 0.5, "times": 1})
    plan = Plan(sampler=Part("heun"), steps=20, guide=(), combine=combine)
    got = drive(sampling(plan, x, grid, Keyed(7, range(3))), MIXTURE)
    want = drive(restarted(Part("heun"), **combine.knobs)(x, grid, Keyed(7, range(3))), MIXTURE)
    assert torch.equal(got, want)
    assert find("combinators", "restart") is restart


# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("euler_ancestral", {"eta": 1.5}), r"euler_ancestral eta: got 1.5, need a number in \[0, 1\]"),
        (Part("edm", {"churn": -1.0}), "edm churn: got -1, need a finite number of at least 0"),
        (Part("edm", {"low": 2.0, "high": 1.0}), "edm low, high: got 2, 1, need 0 <= low < high"),
        (Part("edm", {"inflate": 0.0}), "edm inflate: got 0, need a positive finite number"),
        (Part("edm", {"order": 3}), r"edm order: got 3, need 1 \(Euler\) or 2 \(Heun\)"),
        (Part("edm", {"churn": 0.0, "inflate": 1.003}), "edm churn: got 0, with which low, high and inflate have no"),
        (Part("dpmpp_2s_sde", {"eta": -0.5}), r"dpmpp_2s_sde eta: got -0.5, need a number in \[0, 1\]"),
        (Part("dpmpp_2m_sde", {"eta": 2.0}), r"dpmpp_2m_sde eta: got 2, need a number in \[0, 1\]"),
        (Part("dpmpp_3m_sde", {"eta": math.nan}), "dpmpp_3m_sde eta: got nan"),
        (Part("predictor_corrector", {"snr": 0.0}), "predictor_corrector snr: got 0, need a positive finite number"),
        (Part("predictor_corrector", {"corrections": 0}), "predictor_corrector corrections: got 0, need at least 1"),
        (Part("predictor_corrector", {"predictor": "none"}), "predictor_corrector predictor: got 'none', need rev"),
        (Part("annealed_langevin", {"per_level": 0}), "annealed_langevin per_level: got 0, need at least 1"),
        (
            Part("annealed_langevin", {"step_size": 4.0}),
            r"annealed_langevin step_size: got 4, need a number in \(0, 4\)",
        ),
    ],
    ids=label,
)
def test_bad_knobs_are_refused_before_the_first_question(part: Part, message: str) -> None:
    grid = build("grids", Part("trailing"), schedule_of("linear"), 2)
    with pytest.raises(BadArgument, match=message):
        next(sampler_of(part)(torch.zeros(1, 2), grid, silent))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"low": 0.5, "high": 0.2}, "restart low, high: got 0.5, 0.2, need 0 < low < high"),
        ({"low": 0.0}, "restart low, high: got 0, 0.3, need 0 < low < high"),
        ({"times": -1}, "restart times: got -1, need at least 0"),
    ],
)
def test_bad_restarts_are_refused(knobs: dict[str, float], message: str) -> None:
    grid = build("grids", Part("trailing"), schedule_of("linear"), 2)
    with pytest.raises(BadArgument, match=message):
        next(restarted(Part("heun"), **knobs)(torch.zeros(1, 2), grid, silent))


def test_a_brownian_path_does_not_go_back_up() -> None:
    """Restarts and churn add noise that it does not have, and Langevin steps stay where they are: each says so."""
    grid = build("grids", Part("trailing"), schedule_of("vp"), 20)
    works = [
        restarted(Part("heun"), low=0.1, high=1.0),
        sampler_of(Part("edm")),
        sampler_of(Part("annealed_langevin")),
        sampler_of(Part("predictor_corrector")),
    ]
    for work in works:
        with pytest.raises(BadArgument, match="brownian noise: .* try white noise"):
            drive(work(normals(1, 2), grid, Brownian(0, [0])), MIXTURE)


def test_langevin_claims_no_order() -> None:
    assert [order_of(Part(n)) for n in ("reverse_sde", "predictor_corrector", "annealed_langevin")] == [1, None, None]
