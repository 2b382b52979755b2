"""Law 3: samplers against distributions whose ideal denoiser, flow and moments are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.noise import Keyed
from inkdrop.core.oracle import Gaussian, Mixture
from inkdrop.core.schedule import Schedule, Table
from inkdrop.drive import drive, trace
from inkdrop.errors import BadArgument
from inkdrop.find import Part, build, find, names, order_of
from specimens import GRIDS, SAMPLERS, T_LIST, denoiser_of, label, normals, sampler_of, schedule_of, target_of

MEANS = torch.tensor([[-0.7, 0.2], [0.5, 0.6], [0.3, -0.8]], dtype=torch.float64)
STDS = torch.tensor([0.25, 0.3, 0.2], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
MIXTURE = Mixture(MEANS, STDS, WEIGHTS)
GAUSSIAN = Gaussian(torch.tensor([0.3, -0.5], dtype=torch.float64), 0.4)
POINT = torch.tensor([0.25, -0.75], dtype=torch.float64)

ALPHA_OF_RHO: dict[str, Callable[[float], float]] = {  # the three paths, written without inkdrop
    "vp": lambda rho: 1 / math.sqrt(1 + rho**2),
    "edm": lambda rho: 1.0,
    "flow": lambda rho: 1 / (1 + rho),
}
every_path = pytest.mark.parametrize("path", ALPHA_OF_RHO)
# Each path at a speed that is smooth at both ends; the schedule vp itself turns sharply near t = beta_min/beta_max.
SMOOTH = {"vp": "continuous_cosine", "edm": "edm", "flow": "flow"}
HIGH, LOW = 5.0, 0.1  # rho = sigma/alpha of the two interior levels between which orders are measured
ENDS = (0.3, LOW)  # where errors are taken: at two levels, for one may lie where the error happens to change its sign


def silent(x: Tensor, now: Level, nxt: Level) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def is_stochastic(part: Part) -> bool:
    """Whether the sampler asks for noise at all."""
    asked = []

    def noise(x: Tensor, now: Level, nxt: Level) -> Tensor:
        asked.append(now)
        return torch.zeros_like(x)

    grid = build("grids", Part("uniform"), schedule_of("vp"), 3)
    drive(sampler_of(part)(torch.ones(1, 2, dtype=torch.float64), grid, noise), GAUSSIAN)
    return bool(asked)


STOCHASTIC = [p for p in SAMPLERS if is_stochastic(p)]
DETERMINISTIC = [p for p in SAMPLERS if p not in STOCHASTIC]
# Those without an order have laws of their own: rk45 (test_ode.py), Langevin steps (test_stochastic.py), consistency.
SOLVERS = [p for p in DETERMINISTIC if order_of(p) is not None]
ORDERED = [p for p in STOCHASTIC if order_of(p) is not None]
every_sampler = pytest.mark.parametrize("part", SAMPLERS, ids=label)


def between(path: str, steps: int, order: int = 1, start: float | None = None, end: float = LOW) -> Grid:
    """Equal steps of t, in which lam, rho and u are smooth, from rho = HIGH to rho = `end`, not ending clean.

    For multistep methods of order 3 and more the first steps are graded h², h^1.5, so that their start-up, which has
    a lower order, does not show.
    """
    schedule = schedule_of(SMOOTH[path])
    high = float(schedule.time_of(-math.log(HIGH))) if start is None else start
    low = float(schedule.time_of(-math.log(end)))
    part = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if order >= 3:
        part = torch.cat([part[:1], part[1:2] ** 2, part[1:2] ** 1.5, part[1:]])
    return Grid(schedule, high + part * (low - high))


# ---- order of convergence ------------------------------------------------------------------------------------


def mixture_flow(path: str, x: np.ndarray) -> list[Tensor]:
    """The probability flow of MIXTURE from rho = HIGH to ENDS: d(x/alpha)/drho = −sigma·∇ log p(x), by DOP853.

    Everything is written in numpy here: the path, the density's gradient and the solver know nothing of inkdrop.
    """
    means, stds, weights = MEANS.numpy(), STDS.numpy(), WEIGHTS.numpy()

    def slope(rho: float, flat: np.ndarray) -> np.ndarray:
        alpha = ALPHA_OF_RHO[path](rho)
        sigma, x = alpha * rho, alpha * flat.reshape(-1, 2)
        var = (alpha * stds) ** 2 + sigma**2
        gap = x[:, None] - alpha * means
        log_p = np.log(weights / var) - (gap**2).sum(-1) / (2 * var)
        p = np.exp(log_p - log_p.max(1, keepdims=True))
        score = -((p / var)[..., None] * gap).sum(1) / p.sum(1, keepdims=True)
        return (-sigma * score).ravel()

    z, ends = (x / ALPHA_OF_RHO[path](HIGH)).ravel(), []
    for step in pairwise((HIGH, *ENDS)):
        z = solve_ivp(slope, step, z, "DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
        ends.append(torch.from_numpy(ALPHA_OF_RHO[path](step[1]) * z.reshape(x.shape)))
    return ends


@cache
def mixture_case(path: str) -> tuple[Tensor, list[Tensor]]:
    """16 rows at rho = HIGH and where the flow takes them, found once."""
    x = MIXTURE.sample(16, between(path, 1)[0], seed=2)
    return x, mixture_flow(path, x.numpy())


def slope_of(errors: Sequence[tuple[int, float]], floor: float) -> float:
    """log2 of the ratio of errors on the finest pair of step counts whose errors lie above rounding."""
    pairs = [(a, b) for a, b in pairwise(errors) if b[1] > floor]
    assert pairs, f"every error is below {floor:g}: {errors}"
    (_, coarse), (_, fine) = pairs[-1]
    return math.log2(coarse / fine)


def measured_order(
    part: Part, path: str, oracle: Mixture, wants: Sequence[Tensor], x: Tensor, start: float | None = None
) -> float:
    """The slope of the RMS error over rows and ENDS, each reached in as many steps."""
    errors = []
    finest = 512 if order_of(part) > 2 else 256  # errors of higher order show their slope later
    for steps in (finest // 4, finest // 2, finest):
        gaps = []
        for end, want in zip(ENDS, wants, strict=True):
            grid = between(path, steps, order_of(part), start, end)
            gaps.append(drive(sampler_of(part)(x, grid, silent), oracle) - want)
        errors.append((steps, float(torch.stack(gaps).square().mean().sqrt())))
    return slope_of(errors, 1e-9)


def gaussian_flow(path: str, x: Tensor, now: Level) -> list[Tensor]:
    return [GAUSSIAN.flow(x, now, between(path, 1, end=end)[-1]) for end in ENDS]


@every_path
@pytest.mark.parametrize("part", SOLVERS, ids=label)
def test_order_on_a_gaussian(part: Part, path: str) -> None:
    """RMS error over 16 rows against the affine flow in closed form; ORDER as its module states, ±0.15."""
    now, _ = between(path, 1)
    x = GAUSSIAN.sample(16, now, seed=1)
    order = measured_order(part, path, GAUSSIAN, gaussian_flow(path, x, now), x)
    assert order == pytest.approx(order_of(part), abs=0.15)


@every_path
@pytest.mark.parametrize("part", SOLVERS, ids=label)
def test_order_on_a_mixture(part: Part, path: str) -> None:
    """The same where the flow is not affine, against an independent solver whose own error is about 1e-11."""
    x, wants = mixture_case(path)
    order = measured_order(part, path, MIXTURE, wants, x)
    assert order == pytest.approx(order_of(part), abs=0.15)


def test_heun_keeps_its_order_from_pure_noise_without_signal() -> None:
    """On the straight path from alpha = 0 exactly, where rho is infinite and u = 1 is not."""
    now = schedule_of("flow")(1.0)
    x = GAUSSIAN.sample(16, now, seed=3)
    order = measured_order(Part("heun"), "flow", GAUSSIAN, gaussian_flow("flow", x, now), x, start=1.0)
    assert order == pytest.approx(2, abs=0.15)


def line_of(part: Part, grid: Grid, mean: float, std: float) -> Tensor:
    """What a sampler makes of N(mean, std²) on the line, exactly: its coefficients of the number 1, of the unit normal
    of the start, which is the exact marginal's at grid[0], and of each noise in turn.

    The ideal denoiser is affine, x0 = m + k·(x − alpha·m), and so is a sampler: its state is a row of coefficients, on
    which noise number i is the i-th unit vector. No draws, so weak errors of any size can be seen.
    """
    drawn: list[int] = []

    def noise(x: Tensor, now: Level, nxt: Level) -> Tensor:
        drawn.append(2 + len(drawn))
        unit = torch.zeros_like(x)
        unit[:, drawn[-1] :][:, :1] = 1
        return unit

    def ideal(ask: Ask) -> Belief:
        alpha, sigma = ask.level.alpha, ask.level.sigma
        k = alpha * std**2 / ((alpha * std) ** 2 + sigma**2)
        x0 = k * ask.x
        x0[:, 0] += mean * (1 - k * alpha)
        return Belief(x0, (ask.x - alpha * x0) / sigma)

    def run_on(width: int) -> Tensor:
        drawn.clear()
        x = torch.zeros(1, width, dtype=torch.float64)
        x[0, 0], x[0, 1] = grid[0].alpha * mean, ((grid[0].alpha * std) ** 2 + grid[0].sigma ** 2).sqrt()
        return drive(sampler_of(part)(x, grid, noise), ideal)[0]

    run_on(2)  # to count its noises
    return run_on(2 + len(drawn))


def variance_of(line: Tensor) -> float:
    return float(line[1:].square().sum())


@every_path
@pytest.mark.parametrize("part", ORDERED, ids=label)
def test_weak_order_in_the_exact_moments_of_a_gaussian(part: Part, path: str) -> None:
    """The variance's error falls with the stated weak order, ±0.15, and the mean is exact for any number of steps; but
    for Euler-Maruyama, which is exact in neither unless alpha is linear in t. Two fall faster until steps are small."""
    mean, std, end = 0.3, 0.4, between(path, 1)[-1]
    finest = {"dpmpp_3m_sde": 1024, "reverse_sde": 512}.get(part.name, 128)
    lines = [(n, line_of(part, between(path, n), mean, std)) for n in (finest // 4, finest // 2, finest)]
    true = (float(end.alpha) * std) ** 2 + float(end.sigma) ** 2
    errors = [(n, abs(variance_of(line) - true)) for n, line in lines]
    assert slope_of(errors, 1e-11) == pytest.approx(order_of(part), abs=0.15), errors
    errors = [(n, abs(float(line[0] - end.alpha * mean))) for n, line in lines]
    if part.name == "reverse_sde" and path == "vp":
        assert slope_of(errors, 1e-11) == pytest.approx(order_of(part), abs=0.15), errors
    else:
        assert max(error for _, error in errors) < 1e-14


@every_path
@pytest.mark.parametrize(
    "part", [Part("ddpm"), Part("ddpm", {"variance": "beta"}), Part("ddim", {"eta": 1.0})], ids=label
)
def test_ddpm_s_conditional_mean_is_the_reversed_chain_s(part: Part, path: str) -> None:
    """Given where it starts, the reversed chain of a Gaussian has, by Bayes' rule on (x_s, x_t), the slope a·v_s/v_t
    with a = alpha_t/alpha_s and v = alpha²·std² + sigma²: exactly, for any number of steps; the variance errs."""
    std, grid = 0.4, between(path, 7)
    var = [float((level.alpha * std) ** 2 + level.sigma**2) for level in (grid[0], grid[-1])]
    slope = float(grid[0].alpha / grid[-1].alpha) * var[1] / var[0]
    assert float(line_of(part, grid, 0.0, std)[1]) / var[0] ** 0.5 == pytest.approx(slope, rel=1e-11)


def test_each_variance_of_ddpm_is_exact_where_ho_et_al_say_it_is() -> None:
    """Section 3.2: beta is optimal for x0 ~ N(0, I), beta-tilde for a single point. Exactly so, on coarse grids."""
    for name in ("linear", "cosine", "vp"):
        grid = build("grids", Part("trailing"), schedule_of(name), 9)
        end = grid[-2]
        unit = line_of(Part("ddpm", {"variance": "beta"}), grid[:-1], 0.0, 1.0)
        assert (float(unit[0]), variance_of(unit)) == pytest.approx((0.0, 1.0), abs=1e-12)
        point = line_of(Part("ddpm"), grid[:-1], 0.7, 0.0)
        assert (float(point[0]), variance_of(point)) == pytest.approx(
            (float(end.alpha) * 0.7, float(end.sigma) ** 2), rel=1e-10
        )


@every_path
@pytest.mark.parametrize("part", ORDERED, ids=label)
def test_a_stochastic_sampler_keeps_the_mixture_s_moments(part: Part, path: str) -> None:
    """10,000 rows from the exact marginal at rho = 5 to rho = 0.7, where noise is half of the variance: mean and
    covariance within 4.5 standard errors, of which the steps' own bias is below one. Noise 5 % too strong is seen, but
    for eta = 0.5, where the exact moments above see it."""
    whole, n = between(path, 150), 10_000
    grid = whole[: sum(float(level.rho) > 0.7 for level in whole) + 1]
    gen = torch.Generator().manual_seed(5)
    x = MIXTURE.sample(n, grid[0], seed=4)
    got = drive(sampler_of(part)(x, grid, lambda y, *_: torch.randn(y.shape, generator=gen, dtype=y.dtype)), MIXTURE)
    mean, cov = MIXTURE.moments(grid[-1])
    gap = got - mean
    assert bool((gap.mean(0).abs() < 4.5 * cov.diagonal().sqrt() / n**0.5).all())
    products = gap[:, :, None] * gap[:, None, :]
    assert bool(((products.mean(0) - cov).abs() < 4.5 * products.std(0) / n**0.5).all())


# ---- a point mass is hit, on the grid that is printed --------------------------------------------------------

BETWEEN = ("dpm2", "dpm2_ancestral", "dpmpp_2s", "dpmpp_2s_sde")  # which ask about midpoints besides
WILD = ("reverse_sde", "predictor_corrector", "annealed_langevin")  # whose x is large after a few coarse steps
ELSEWHERE = ("edm", "rk45")  # which ask about levels of their own: test_stochastic.py and test_ode.py say which


def needs_signal(part: Part) -> bool:
    """Whether the sampler refuses to start where alpha = 0."""
    return part.name in ("reverse_sde", "predictor_corrector") or part.knobs.get("space") == "rho"


def point_oracle(ask: Ask) -> Belief:
    """All mass at POINT: x0 is POINT whatever is asked."""
    x0 = POINT.to(ask.x.dtype).expand_as(ask.x)
    return Belief(x0, (ask.x - ask.level.over(ask.x).alpha * x0) / ask.level.over(ask.x).sigma)


def hits(sampler: Part, schedule: Schedule, grid: Grid, target: str) -> None:
    """A float32 sampling through a Denoiser that speaks this target ends at the point, to 1e-6.

    eps alone is asked less: x0 = (x − sigma·eps)/alpha magnifies the rounding of a float32 eps by rho of the last
    level asked about, which is 157 where one step leads from DDPM's t = 1 to clean. So 1e-6·max(1, rho). Where x is
    large, rounding is in proportion.
    """
    asked: list[Level] = []
    size = 1.0

    def ear(ask: Ask) -> Belief:
        nonlocal size
        assert ask.x.dtype == torch.float32
        asked.append(ask.level)
        size = max(1.0, float(ask.x.abs().max())) if sampler.name in WILD else 1.0
        return denoiser(ask)

    denoiser = denoiser_of(point_oracle, schedule, target_of(target, schedule))
    x = schedule.start(normals(2, 2, seed=6, dtype=torch.float32))
    got = drive(sampler_of(sampler)(x, grid, Keyed(0, [0, 1])), ear)
    assert got.dtype == torch.float32
    allowed = 1e-6 * size * (max(1.0, float(grid[-2].rho)) if target == "eps" else 1.0)
    torch.testing.assert_close(got.double(), POINT.expand(2, 2), rtol=0, atol=allowed)
    assert bool((grid.times.diff() < 0).all())
    assert grid[-1].clean
    if sampler.name in ELSEWHERE:
        return
    times = [float(level.t) for level in asked]
    distinct = [t for t, before in zip(times, [math.inf, *times], strict=False) if t != before]
    if sampler.name in BETWEEN:
        assert distinct == sorted(distinct, reverse=True), "asked about levels that are not between the grid's"
        distinct = [t for t in distinct if t in grid.times]
    assert distinct == grid.times[:-1].tolist(), "asked about other levels than the printed grid's"


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sampler", names("samplers"))
def test_a_point_is_hit_for_every_grid_steps_and_target(sampler: str, grid: str, target: str) -> None:
    """R5, on a table of T = 60: steps 1, 2, 3, 7, 13, 50 and T."""
    schedule = schedule_of(Part("linear", {"steps": 60, "rescale": True}))
    for steps in (1, 7) if sampler == "rk45" else (*T_LIST, schedule.steps):  # to which only the ends count
        hits(Part(sampler), schedule, build("grids", Part(grid), schedule, steps), target)


def refuses(sampler: Part, schedule: Schedule) -> None:
    """Before its first question it says that the schedule's start has no signal."""
    grid = build("grids", Part("trailing"), schedule, 2)
    with pytest.raises(BadArgument, match=r"(rho is infinite at the start|starts without signal).*zero terminal SNR"):
        next(sampler_of(sampler)(POINT[None], grid, silent))


@pytest.mark.parametrize("name", names("schedules"))
@pytest.mark.parametrize("sampler", [p for p in SAMPLERS if p.knobs], ids=label)
def test_a_point_is_hit_on_every_schedule(name: str, sampler: Part) -> None:
    schedule = schedule_of(name)
    if needs_signal(sampler) and float(schedule(1.0).alpha) == 0:
        refuses(sampler, schedule)
        return
    for steps in T_LIST:
        hits(sampler, schedule, build("grids", Part("trailing"), schedule, steps), "v")


@pytest.mark.parametrize(
    ("sampler", "name"), [("ddpm", "linear"), ("ddpm", "flow"), ("ddim", "cosine"), ("heun", "vp"), ("euler", "edm")]
)
def test_a_point_is_hit_at_all_thousand_steps(sampler: str, name: str) -> None:
    """T, which for continuous schedules is 1,000; T trailing steps are every entry of the schedule."""
    schedule = schedule_of(name)
    grid = build("grids", Part("trailing"), schedule, 1000)
    entries = torch.arange(1000, -1, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(grid.times, entries, rtol=0, atol=1e-15)
    hits(Part(sampler), schedule, grid, "v")


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear", "sigmoid"])
def test_a_point_is_hit_from_zero_terminal_snr(name: str) -> None:
    schedule = schedule_of(Part(name, {"zero_terminal": True}))
    for sampler in names("samplers"):
        if needs_signal(Part(sampler)):
            refuses(Part(sampler), schedule)
            continue
        for target in ("x0", "v", "flow"):
            for steps in (1, 2, 7):
                hits(Part(sampler), schedule, build("grids", Part("trailing"), schedule, steps), target)


# ---- samplers that are one another ---------------------------------------------------------------------------


def run(
    part: Part, x: Tensor, grid: Sequence[Level], oracle: Callable[[Ask], Belief] = MIXTURE, seed: int = 7
) -> Tensor:
    return drive(sampler_of(part)(x, grid, Keyed(seed, range(len(x)))), oracle)


def subgrids(schedule: Schedule) -> list[Grid]:
    """Every spacing at a few steps, random entries, and a segment that does not end clean."""
    gen = np.random.default_rng(0)
    found = [
        build("grids", Part(name), schedule, n) for name in ("trailing", "leading", "uniform") for n in (1, 2, 7, 20)
    ]
    for size in (3, 12):
        ks = np.sort(gen.choice(np.arange(1, schedule.steps + 1), size, replace=False))[::-1]
        found.append(Grid(schedule, np.append(ks, 0) / schedule.steps))
    return [*found, found[-1][2:-2]]


@pytest.mark.parametrize(
    "part",
    [Part("linear"), Part("cosine"), Part("edm"), Part("flow"), Part("linear", {"zero_terminal": True})],
    ids=label,
)
def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(part: Part) -> None:
    """The same noise gives the same numbers to 1e-12 of the state's size, on every sub-grid."""
    schedule = schedule_of(part)
    for grid in subgrids(schedule):
        x = normals(4, 2, seed=8) * float(grid[0].sigma)
        ddim, ddpm = run(Part("ddim", {"eta": 1.0}), x, grid), run(Part("ddpm"), x, grid)
        torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-12 * max(1.0, float(x.abs().max())))


@every_path
def test_euler_is_ddim_without_noise(path: str) -> None:
    grid = build("grids", Part("trailing"), schedule_of(path), 10)
    x = schedule_of(path).start(normals(3, 2, seed=9))
    assert torch.equal(run(Part("euler"), x, grid), run(Part("ddim", {"eta": 0.0}), x, grid))


def test_euler_on_the_straight_path_is_flow_matching_s() -> None:
    """x ← x + (s' − s)·v with v = eps − x0 (Lipman et al. 2023), written out, from s = 1 to s = 0."""
    for shift in (1.0, 3.0):
        schedule = schedule_of(Part("flow", {"shift": shift}))
        grid = build("grids", Part("uniform"), schedule, 12)
        x = want = normals(3, 2, seed=10)
        for now, nxt in pairwise(grid):
            belief = MIXTURE(Ask(want, now))
            want = want + (nxt.sigma - now.sigma) * (belief.eps - belief.x0)
        for name in ("ddim", "euler"):
            torch.testing.assert_close(run(Part(name), x, grid), want, rtol=0, atol=1e-13)


def test_heun_in_rho_is_karras_algorithm_1() -> None:
    """With D the denoiser and no churn: d = (x − D)/sigma, an Euler step, the mean of both slopes but at the end."""
    schedule = schedule_of("edm")
    grid = build("grids", Part("karras"), schedule, 8)
    x = want = schedule.start(normals(3, 2, seed=11))
    sigmas = [float(level.sigma) for level in grid]
    for i, (now, nxt) in enumerate(pairwise(sigmas)):
        slope = (want - MIXTURE(Ask(want, grid[i])).x0) / now
        ahead = want + (nxt - now) * slope
        if nxt > 0:
            second = (ahead - MIXTURE(Ask(ahead, grid[i + 1])).x0) / nxt
            ahead = want + (nxt - now) * (slope + second) / 2
        want = ahead
    torch.testing.assert_close(run(Part("heun", {"space": "rho"}), x, grid), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_song_s_equation_12(eta: float) -> None:
    """In their letters: a = abar, s(eta) = eta·√((1 − a_s)/(1 − a_t))·√(1 − a_t/a_s)."""
    schedule = schedule_of("linear")
    grid = build("grids", Part("leading"), schedule, 10)
    noise, x = Keyed(3, [0, 1]), normals(2, 2, seed=12)
    want = x
    for now, nxt in pairwise(grid):
        a_t, a_s = float(now.alpha) ** 2, float(nxt.alpha) ** 2
        eps = MIXTURE(Ask(want, now)).eps
        s = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
        x0 = (want - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
        want = math.sqrt(a_s) * x0 + math.sqrt(max(0.0, 1 - a_s - s**2)) * eps
        if eta and not nxt.clean:
            want = want + s * noise(want, now, nxt)
    torch.testing.assert_close(run(Part("ddim", {"eta": eta}), x, grid, seed=3), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("variance", ["beta", "beta-tilde"])
def test_ddpm_is_ho_s_algorithm_2(variance: str) -> None:
    """x ← (x − beta/√(1 − abar)·eps)/√(1 − beta) + √var·z, from betas alone, over all T = 40 steps."""
    schedule = schedule_of(Part("linear", {"steps": 40, "rescale": True}))
    assert isinstance(schedule, Table)
    beta = schedule.betas
    abar = (1 - beta).cumprod(0)
    grid = build("grids", Part("trailing"), schedule, 40)
    noise, x = Keyed(3, [0, 1]), normals(2, 2, seed=13)
    want = x
    for k in range(39, -1, -1):
        level = grid[39 - k]
        eps = MIXTURE(Ask(want, level)).eps
        want = (want - beta[k] / (1 - abar[k]).sqrt() * eps) / (1 - beta[k]).sqrt()
        if k > 0:
            var = beta[k] * (1 if variance == "beta" else (1 - abar[k - 1]) / (1 - abar[k]))
            want = want + var.sqrt() * noise(want, level, level)
    torch.testing.assert_close(run(Part("ddpm", {"variance": variance}), x, grid, seed=3), want, rtol=0, atol=1e-10)


def test_learned_variance_interpolates_the_logarithms() -> None:
    """var = beta^v·beta-tilde^(1 − v) (Nichol & Dhariwal 2021, eq. 15), each pixel with its own v in [0, 1]."""
    grid = build("grids", Part("trailing"), schedule_of("linear"), 5)[:2]
    x = normals(2, 3, seed=14)
    frac = torch.tensor([[0.0, 1.0, 0.3], [0.5, 0.25, 0.0]], dtype=torch.float64)

    def net(ask: Ask) -> Belief:
        return Belief(0 * ask.x, ask.x / ask.level.sigma, var_frac=frac)

    def ends(variance: str) -> Tensor:
        part = Part("ddpm", {"variance": variance})
        return run(part, x, grid, net) - drive(sampler_of(part)(x, grid, lambda y, *_: 0 * y), net)

    noise = Keyed(7, [0, 1])(x, grid[0], grid[1])
    low, high = (ends(variance) / noise for variance in ("beta-tilde", "beta"))
    torch.testing.assert_close(ends("learned") / noise, high**frac * low ** (1 - frac), rtol=1e-10, atol=0)
    with pytest.raises(BadArgument, match="'learned', but this net does not predict a variance; try beta-tilde"):
        run(Part("ddpm", {"variance": "learned"}), x, grid, GAUSSIAN_3)


GAUSSIAN_3 = Gaussian(torch.zeros(3, dtype=torch.float64), 0.5)


# ---- tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "edm", "flow"])
@every_sampler
def test_the_table_is_the_generator(part: Part, schedule: str) -> None:
    """Played back with recorded noise, the float64 coefficients give the sampler's states to 1e-12 of their size. Where
    there are none, for steps that depend on the answers, trace says so."""
    built = schedule_of(schedule)
    grid = build("grids", Part("trailing"), built, 9)
    if needs_signal(part) and schedule == "flow":
        grid = grid[1:]
    if part.name in ("predictor_corrector", "rk45"):
        with pytest.raises(BadArgument, match="not linear in its answers"):
            trace(find("samplers", part.name), grid, **part.knobs)
        return
    x = normals(3, 2, seed=15) * float(grid[0].sigma)
    asked, drawn, keyed = [], [], Keyed(5, range(3))

    def noise(y: Tensor, now: Level, nxt: Level) -> Tensor:
        drawn.append(keyed(y, now, nxt))
        return drawn[-1]

    def ear(ask: Ask) -> Belief:
        asked.append(ask)
        return MIXTURE(ask)

    result = drive(sampler_of(part)(x, grid, noise), ear)
    rows = trace(find("samplers", part.name), grid, **part.knobs)
    registers = {"start": x, **{f"noise_{i}": z for i, z in enumerate(drawn)}}
    assert len(rows) - 1 == len(asked)
    size = 1e-12 * max(1.0, float(x.abs().max()))
    for i, ((state, level), want) in enumerate(zip(rows, [*asked, None], strict=True)):
        got = sum((factor * registers[name] for name, factor in state.items()), torch.zeros_like(x))
        torch.testing.assert_close(got, result if want is None else want.x, rtol=0, atol=size)
        if want is not None and level is not None:
            assert float(level.t) == float(want.level.t)
            registers[f"x0_{i}"] = MIXTURE(Ask(got, level)).x0
    assert {name for row in rows for name in row.state} <= set(registers)


def test_a_sampler_that_is_not_linear_has_no_table() -> None:
    def squares(x: Tensor, grid: Sequence[Level], noise: object) -> object:
        belief = yield Ask(x, grid[0])
        return torch.square(belief.x0)

    def divides(x: Tensor, grid: Sequence[Level], noise: object) -> object:
        belief = yield Ask(x, grid[0])
        return grid[0].alpha / belief.x0

    grid = build("grids", Part("trailing"), schedule_of("linear"), 1)
    for sampler in (squares, divides):
        with pytest.raises(BadArgument, match="not linear in its answers"):
            trace(sampler, grid)


# ---- rows and dtypes -----------------------------------------------------------------------------------------


@every_path
@every_sampler
def test_an_image_does_not_depend_on_its_neighbours(part: Part, path: str) -> None:
    """Row i alone is bit for bit row i of a batch, and moves no other row when it is changed."""
    grid = build("grids", Part("trailing"), schedule_of(path), 6)
    grid = grid[1:] if float(grid[0].alpha) == 0 else grid
    x = normals(5, 2, seed=16) * float(grid[0].sigma)
    whole = run(part, x, grid)
    for i in (0, 3):
        alone = drive(sampler_of(part)(x[i : i + 1], grid, Keyed(7, [i])), MIXTURE)
        assert torch.equal(alone[0], whole[i])
    x[2] = 50.0
    moved = run(part, x, grid)
    assert torch.equal(moved[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])
    assert not torch.equal(moved[2], whole[2])


@every_path
@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_keeps_its_dtype(part: Part, path: str, dtype: torch.dtype) -> None:
    """Levels are float64, 0-dim or one a row, and promote neither; float32 then follows float64 to rounding."""
    grid = build("grids", Part("trailing"), schedule_of(path), 6)
    grid = grid[1:] if float(grid[0].alpha) == 0 else grid
    x = normals(3, 2, seed=17) * float(grid[0].sigma)
    seen: set[torch.dtype] = set()

    def ear(ask: Ask) -> Belief:
        seen.add(ask.x.dtype)
        assert {f.dtype for f in ask.level} == {torch.float64}
        return MIXTURE(ask)

    got = run(part, x.to(dtype), grid, ear)
    assert seen | {got.dtype} == {dtype}
    want = run(part, x, grid)
    allowed = 2e-5 * max(1.0, float(want.abs().max())) if dtype == torch.float32 else 0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=allowed)


# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("ddim", {"eta": 1.5}), r"ddim eta: got 1.5, need a number in \[0, 1\]"),
        (Part("ddim", {"eta": -0.1}), r"ddim eta: got -0.1, need a number in \[0, 1\]"),
        (Part("ddim", {"eta": math.nan}), "ddim eta: got nan"),
        (Part("ddpm", {"variance": "gamma"}), "ddpm variance: got 'gamma', need beta, beta-tilde or learned"),
        (Part("heun", {"space": "lam"}), "heun space: got 'lam', need u or rho"),
    ],
    ids=label,
)
def test_bad_knobs_are_refused_before_the_first_question(part: Part, message: str) -> None:
    grid = build("grids", Part("trailing"), schedule_of("linear"), 2)
    with pytest.raises(BadArgument, match=message):
        next(sampler_of(part)(torch.zeros(1, 2), grid, silent))
