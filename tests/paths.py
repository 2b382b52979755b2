"""Paths: the oracles, grids and helpers that the laws of samplers share."""

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
from inkdrop.drive import drive
from inkdrop.find import Part, build, order_of
from specimens import SAMPLERS, label, sampler_of, schedule_of

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


def gaussian_flow(path: str, x: Tensor, now: Level) -> list[Tensor]:
    return [GAUSSIAN.flow(x, now, between(path, 1, end=end)[-1]) for end in ENDS]


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


def needs_signal(part: Part) -> bool:
    """Whether the sampler refuses to start where alpha = 0."""
    return part.name in ("reverse_sde", "predictor_corrector") or part.knobs.get("space") == "rho"


def point_oracle(ask: Ask) -> Belief:
    """All mass at POINT: x0 is POINT whatever is asked."""
    x0 = POINT.to(ask.x.dtype).expand_as(ask.x)
    return Belief(x0, (ask.x - ask.level.over(ask.x).alpha * x0) / ask.level.over(ask.x).sigma)


def run(
    part: Part, x: Tensor, grid: Sequence[Level], oracle: Callable[[Ask], Belief] = MIXTURE, seed: int = 7
) -> Tensor:
    return drive(sampler_of(part)(x, grid, Keyed(seed, range(len(x)))), oracle)
