"""Laws of the linear multistep samplers and of consistency sampling that the law of all samplers does not state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.oracle import Gaussian, Mixture
from inkdrop.drive import drive
from inkdrop.errors import BadArgument
from inkdrop.find import Part, build
from specimens import label, normals, sampler_of, schedule_of

MIXTURE = Mixture(
    torch.tensor([[-0.7, 0.2], [0.5, 0.6], [0.3, -0.8]], dtype=torch.float64),
    torch.tensor([0.25, 0.3, 0.2], dtype=torch.float64),
)
MULTISTEP = [Part("deis"), Part("lms"), Part("plms"), Part("ipndm")]
every_multistep = pytest.mark.parametrize("part", MULTISTEP, ids=label)
every_path = pytest.mark.parametrize("path", ["vp", "edm", "flow"])


def silent(x: Tensor, now: Level, nxt: Level) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def run(part: Part, x: Tensor, grid: Sequence[Level], net: Callable[[Ask], Belief] = MIXTURE) -> list[Tensor]:
    """Every x asked about, and the result."""
    asked: list[Tensor] = []

    def ear(ask: Ask) -> Belief:
        asked.append(ask.x)
        return net(ask)

    result = drive(sampler_of(part)(x, grid, silent), ear)
    return [*asked, result]


def levels(path: str, count: int, seed: int = 0) -> Grid:
    """Levels at unequal steps of log rho between rho = 20 and 0.05, the ratio of neighbouring steps up to 4."""
    schedule = schedule_of(path)
    steps = np.random.default_rng(seed).uniform(0.25, 1, count - 1).cumsum()
    lam = torch.from_numpy(np.append(0, steps / steps[-1])) * math.log(400) - math.log(20)
    return Grid(schedule, schedule.time_of(lam))


def told(slope: Callable[[Level], float]) -> Callable[[Ask], Belief]:
    """A net whose eps is a function of the level alone, so that z = x/alpha is that function's integral over rho."""

    def net(ask: Ask) -> Belief:
        eps = torch.full_like(ask.x, slope(ask.level))
        return Belief((ask.x - ask.level.sigma * eps) / ask.level.alpha, eps)

    return net


def gains(states: Sequence[Tensor], grid: Sequence[Level]) -> list[float]:
    """The change of x/alpha over each step, divided by that of rho: the mean of eps that was taken."""
    z = [float(x / level.alpha) for x, level in zip(states, grid, strict=True)]
    return [(b - a) / float(hi.rho - lo.rho) for (a, b), (lo, hi) in zip(pairwise(z), pairwise(grid), strict=True)]


# ---- what a step integrates exactly --------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize(("name", "orders"), [("lms", (1, 2, 3, 4)), ("deis", (1, 2, 3))])
def test_a_step_is_exact_for_polynomials_of_degree_below_its_order(
    name: str, orders: tuple[int, ...], path: str
) -> None:
    """In rho for lms and in log rho for deis, on unequal steps, by scipy's quadrature; and for no higher degree."""
    variable = float if name == "lms" else math.log
    grid = levels(path, 9)
    rhos = [float(level.rho) for level in grid]
    for order in orders:
        for degree in range(order + 1):
            scale = max(abs(variable(rho)) for rho in rhos)

            def slope(rho: float, degree: int = degree, scale: float = scale) -> float:
                return (variable(rho) / scale) ** degree

            net = told(lambda level, slope=slope: slope(float(level.rho)))
            means = gains(run(Part(name, {"order": order}), normals(1, 1), grid, net), grid)
            true = [quad(slope, a, b, epsabs=0, epsrel=1e-13)[0] / (b - a) for a, b in pairwise(rhos)]
            off = max(abs(a - b) for a, b in zip(means[order - 1 :], true[order - 1 :], strict=True))
            assert off < 1e-11 if degree < order else off > 1e-5, (order, degree, off)


@every_path
@pytest.mark.parametrize("name", ["plms", "ipndm"])
def test_pseudo_steps_take_the_mean_over_equal_steps_of_time(name: str, path: str) -> None:
    """Their e is the mean of eps over *time*, exact for cubics from the fourth step on, and not for quartics."""
    grid = Grid(schedule_of(path), torch.linspace(0.9, 0.1, 9, dtype=torch.float64))
    for degree in range(5):
        net = told(lambda level, degree=degree: float(level.t) ** degree)
        states = run(Part(name), normals(1, 1), grid, net)
        means = gains(states[:1] + states[2:] if name == "plms" else states, grid)
        true = [
            (b ** (degree + 1) - a ** (degree + 1)) / (degree + 1) / (b - a) for a, b in pairwise(grid.times.tolist())
        ]
        off = max(abs(a - b) for a, b in zip(means[3:], true[3:], strict=True))
        assert off < 1e-11 if degree < 4 else off > 1e-5, (degree, off)


# ---- how they start and end ----------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("part", [Part("deis", {"order": 1}), Part("lms", {"order": 1})], ids=label)
def test_order_1_is_ddim(part: Part, path: str) -> None:
    grid = levels(path, 7)
    x = MIXTURE.sample(4, grid[0])
    for a, b in zip(run(part, x, grid), run(Part("ddim"), x, grid), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1.0, float(x.abs().max())))


@every_path
def test_plms_starts_with_heun_s_step_in_rho_and_ipndm_with_euler_s(path: str) -> None:
    """One step of each between two noisy levels, and n + 1 asks against n."""
    grid = levels(path, 6)
    x = MIXTURE.sample(4, grid[0])
    for name, first in (("plms", Part("heun", {"space": "rho"})), ("ipndm", Part("ddim"))):
        torch.testing.assert_close(
            run(Part(name), x, grid[:2])[-1], run(first, x, grid[:2])[-1], rtol=1e-12, atol=1e-12
        )
    assert {part.name: len(run(part, x, grid)) - 1 for part in MULTISTEP} == {
        "deis": 5,
        "lms": 5,
        "plms": 6,
        "ipndm": 5,
    }


@pytest.mark.parametrize("path", ["flow", "cosine"])
@every_multistep
def test_from_alpha_0_the_first_step_is_ddim_s_and_is_forgotten(part: Part, path: str) -> None:
    """Where rho is infinite, no polynomial can go through it: the rest is what the rest of the grid alone gives."""
    schedule = schedule_of("flow" if path == "flow" else Part("cosine", {"zero_terminal": True}))
    grid = Grid(schedule, torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0], dtype=torch.float64))
    assert float(grid[0].alpha) == 0
    x = schedule.start(normals(4, 2))
    second = run(Part("ddim"), x, grid[:2])[-1]
    whole, rest = run(part, x, grid), run(part, second, grid[1:])
    assert len(whole) == len(rest) + 1
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))


@every_path
@every_multistep
def test_into_clean_the_result_is_the_last_x0(part: Part, path: str) -> None:
    grid = Grid(schedule_of(path), torch.tensor([0.9, 0.6, 0.3, 0.05, 0.0], dtype=torch.float64))
    x = MIXTURE.sample(4, grid[0])
    *_, last, result = run(part, x, grid)
    assert torch.equal(result, MIXTURE(Ask(last, grid[-2])).x0)


# ---- consistency sampling ------------------------------------------------------------------------------------

GAUSSIAN = Gaussian(torch.tensor([0.3], dtype=torch.float64), 0.4)


def ending(ask: Ask) -> Belief:
    """The exact consistency function of GAUSSIAN: x0 is where the flow takes x."""
    clean = Level(*(torch.tensor(f, dtype=torch.float64) for f in (1.0, 0.0, 0.0)))
    x0 = GAUSSIAN.flow(ask.x, ask.level, clean)
    return Belief(x0, (ask.x - ask.level.alpha * x0) / ask.level.sigma)


@every_path
def test_one_consistency_step_is_the_flow_to_its_end(path: str) -> None:
    grid = Grid(schedule_of(path), [0.8, 0.0])
    x = GAUSSIAN.sample(8, grid[0])
    got = drive(sampler_of(Part("consistency"))(x, grid, silent), ending)
    torch.testing.assert_close(got, ending(Ask(x, grid[0])).x0, rtol=0, atol=0)


@every_path
@pytest.mark.parametrize("steps", [2, 5])
def test_an_exact_consistency_function_keeps_every_level_s_distribution(path: str, steps: int) -> None:
    """Rows 0 and 1 are mean and mean + std of the start, one unit of one noise in each other row: as x is an affine
    function of them all, the difference of a row to row 0 is its factor, and the variance the sum of their squares."""
    grid = Grid(schedule_of(path), torch.linspace(0.9, 0, steps + 1, dtype=torch.float64))
    draws = iter(range(2, steps + 1))

    def noise(x: Tensor, now: Level, nxt: Level) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(draws)]), steps + 1).T.to(x.dtype)

    def check(x: Tensor, level: Level) -> None:
        mean, cov = GAUSSIAN.moments(level)
        torch.testing.assert_close(x[0], mean, rtol=0, atol=1e-12)
        torch.testing.assert_close((x - x[0]).square().sum()[None, None], cov, rtol=1e-12, atol=0)

    def ear(ask: Ask) -> Belief:
        check(ask.x, ask.level)
        return ending(ask)

    mean, cov = GAUSSIAN.moments(grid[0])
    x = mean.expand(steps + 1, 1).clone()
    x[1] += cov[0].sqrt()
    check(drive(sampler_of(Part("consistency"))(x, grid, noise), ear), grid[-1])
    assert next(draws, None) is None


# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("deis", {"order": 4}), "deis order: got 4, need 1, 2 or 3; try 3"),
        (Part("deis", {"order": 0}), "deis order: got 0"),
        (Part("lms", {"order": 5}), "lms order: got 5, need 1, 2, 3 or 4; try 4"),
        (Part("lms", {"order": 0}), "lms order: got 0"),
    ],
    ids=label,
)
def test_orders_that_there_are_not_are_refused_before_the_first_question(part: Part, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        next(sampler_of(part)(torch.zeros(1, 2), levels("vp", 3), silent))


@pytest.mark.parametrize("part", [Part("plms"), Part("heun", {"space": "rho"}), Part("edm", {"churn": 0.0})], ids=label)
def test_a_start_far_beyond_any_signal_is_not_averaged(part: Part) -> None:
    """The cosine table starts at rho = 20,000: half of a step in rho would be eps of pure noise. On trailing, 20 steps
    end within 0.05 of where 1,000 of heun's in u do, of a mixture as wide as 0.8; averaged, plms ended 0.32 away."""
    schedule, x = schedule_of("cosine"), normals(64, 2, seed=3)
    want = drive(sampler_of(Part("heun"))(x, build("grids", Part("quadratic"), schedule, 500), silent), MIXTURE)
    got = drive(sampler_of(part)(x, build("grids", Part("trailing"), schedule, 20), silent), MIXTURE)
    assert float((got - want).square().mean().sqrt()) < 0.05
