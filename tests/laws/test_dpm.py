"""The deterministic DPM family: its papers' steps written out, what its integrals make exact, and its first step."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.oracle import Mixture
from inkdrop.drive import drive
from inkdrop.errors import BadArgument
from inkdrop.find import Part, build
from specimens import label, normals, sampler_of, schedule_of

pytestmark = pytest.mark.long  # left out of the fast tier

NET = Mixture(
    torch.tensor([[-0.7, 0.2], [0.5, 0.6], [0.3, -0.8]], dtype=torch.float64),
    torch.tensor([0.25, 0.3, 0.2], dtype=torch.float64),
)
FAMILY = [
    *(Part(name) for name in ("dpm2", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m")),
    *(Part("dpm2_ancestral", {"eta": eta}) for eta in (0.4, 1.0)),
    *(Part("unipc", {"predictor_order": p, "variant": v}) for p in (1, 2, 3) for v in ("b1", "b2")),
]
every_path = pytest.mark.parametrize("path", ["linear", "edm", "flow"])


def states(part: Part, x: Tensor, grid: Grid, net: Callable[[Ask], Belief] = NET, seed: int = 3) -> list[Tensor]:
    """The x of every question, and the result; the noise of the step between two levels is told by the first's time."""
    asked: list[Tensor] = []

    def ear(ask: Ask) -> Belief:
        asked.append(ask.x)
        return net(ask)

    def noise(y: Tensor, now: Level, nxt: Level) -> Tensor:
        return normals(*y.shape, seed=round(1e6 * float(now.t)) + seed)

    result = drive(sampler_of(part)(x, grid, noise), ear)
    return [*asked, result]


# ---- the papers' steps ---------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_dpm2_and_its_ancestral_are_k_diffusion_s(path: str, eta: float) -> None:
    """In k-diffusion's letters, at any alpha: z = x/alpha, d = (z − x0)/rho, an Euler step to √(rho·rho_down) and one
    with the d found there to rho_down, rho_up = min(rho', eta·rho'·√(rho² − rho'²)/rho) of noise besides."""
    schedule = schedule_of(path)
    grid = build("grids", Part("uniform"), schedule, 7)[1:]
    part = Part("dpm2_ancestral", {"eta": eta}) if eta else Part("dpm2")
    x = NET.sample(3, grid[0], seed=1)

    def d(z: Tensor, rho: float) -> Tensor:
        level = grid.at(-math.log(rho))
        return (z - NET(Ask(level.alpha * z, level)).x0) / rho

    z = x / grid[0].alpha
    for now, nxt in pairwise(grid):
        rho, to = float(now.rho), float(nxt.rho)
        up = min(to, eta * math.sqrt(to**2 * (rho**2 - to**2) / rho**2))
        down = math.sqrt(to**2 - up**2)
        slope = d(z, rho)
        if down > 0:
            middle = math.exp((math.log(rho) + math.log(down)) / 2)
            slope = d(z + (middle - rho) * slope, middle)
        z = z + (down - rho) * slope
        if up:
            z = z + up * normals(*z.shape, seed=round(1e6 * float(now.t)) + 3)
    torch.testing.assert_close(states(part, x, grid)[-1], z, rtol=0, atol=1e-10)


@every_path
def test_dpmpp_2s_is_lu_s_algorithm_1(path: str) -> None:
    """In their letters: u = sigma_s/sigma_t·x − alpha_s·(e^{−r·h} − 1)·x0, D = (1 − 1/(2r))·x0 + 1/(2r)·x0(u)."""
    grid = build("grids", Part("uniform"), schedule_of(path), 7)[1:-1]
    x = want = NET.sample(3, grid[0], seed=1)
    r = 0.5
    for now, nxt in pairwise(grid):
        h = float(nxt.lam - now.lam)
        mid = grid.at(now.lam + r * h)
        x0 = NET(Ask(want, now)).x0
        u = mid.sigma / now.sigma * want - mid.alpha * math.expm1(-r * h) * x0
        d = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * NET(Ask(u, mid)).x0
        want = nxt.sigma / now.sigma * want - nxt.alpha * math.expm1(-h) * d
    torch.testing.assert_close(states(Part("dpmpp_2s"), x, grid)[-1], want, rtol=0, atol=1e-11)


# ---- exact where they say so ---------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize(
    ("part", "degree", "warm"),
    [
        (Part("dpmpp_2m"), 0, 0),
        (Part("dpmpp_3m"), 2, 2),
        (Part("unipc", {"predictor_order": 1}), 0, 0),
        (Part("unipc", {"predictor_order": 3}), 2, 3),
    ],
    ids=label,
)
def test_polynomials_in_lam_are_integrated_exactly(part: Part, degree: int, warm: int, path: str) -> None:
    """If x0 is a polynomial in lam whatever x is, x' = sigma'·(x/sigma + ∫ e^lam·x0 dlam), by quadrature, from each
    question to the next, once the steps are of full order."""
    grid = build("grids", Part("uniform"), schedule_of(path), 8)[1:-1]
    factors = (0.3, -0.2, 0.15)[: degree + 1]

    def poly(lam: float) -> float:
        return sum(c * lam**k for k, c in enumerate(factors))

    def net(ask: Ask) -> Belief:
        x0 = torch.full_like(ask.x, poly(float(ask.level.lam)))
        return Belief(x0, (ask.x - ask.level.alpha * x0) / ask.level.sigma)

    seen = states(part, NET.sample(3, grid[0], seed=1), grid, net)
    for k, (now, nxt) in enumerate(pairwise(grid)):
        if k >= warm:
            area = quad(lambda lam: math.exp(lam) * poly(lam), float(now.lam), float(nxt.lam), epsabs=1e-13)[0]
            want = nxt.sigma * (seen[k] / now.sigma + area)
            torch.testing.assert_close(seen[k + 1], want, rtol=0, atol=1e-10)


def test_unipc_s_corrector_makes_a_cubic_exact_where_its_predictor_cannot() -> None:
    """UniPC-3 predicts with a parabola, corrects with a cubic, and starts the next step from the corrected x. So if x0
    is a cubic in lam, each question errs by the integral of what its own parabola missed, and the x without that error
    follow the flow exactly."""
    grid = build("grids", Part("uniform"), schedule_of("linear"), 12)[2:-1]
    lams = [float(level.lam) for level in grid]

    def cubic(lam: float) -> float:
        return 0.3 - 0.2 * lam + 0.15 * lam**2 + 0.1 * lam**3

    def net(ask: Ask) -> Belief:
        x0 = torch.full_like(ask.x, cubic(float(ask.level.lam)))
        return Belief(x0, (ask.x - ask.level.alpha * x0) / ask.level.sigma)

    def integral(f: Callable[[float], float], k: int) -> float:
        return quad(lambda lam: math.exp(lam) * f(lam), lams[k], lams[k + 1], epsabs=1e-13)[0]

    seen = states(Part("unipc", {"predictor_order": 3}), NET.sample(3, grid[0], seed=1), grid, net)
    corrected = {}
    for k in range(2, len(grid) - 1):  # the first step with three answers is from level 2 to 3
        missed = integral(lambda lam, k=k: 0.1 * math.prod(lam - lams[j] for j in (k, k - 1, k - 2)), k)
        assert float(grid[k + 1].sigma) * abs(missed) > 1e-4
        corrected[k + 1] = seen[k + 1] + grid[k + 1].sigma * missed
    for k in range(3, len(grid) - 1):
        want = grid[k + 1].sigma * (corrected[k] / grid[k].sigma + integral(cubic, k))
        torch.testing.assert_close(corrected[k + 1], want, rtol=0, atol=1e-10)


# ---- ends of the grid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Part("flow"), Part("linear", {"zero_terminal": True})], ids=label)
@pytest.mark.parametrize("part", FAMILY, ids=label)
def test_a_step_from_alpha_0_is_euler_s_and_is_forgotten(part: Part, schedule: Part) -> None:
    """It is ddim's, of the same eta, and what follows is what a start at the second level would do: no midpoint, no
    history and no correction across the infinite interval."""
    for steps in (1, 2, 6):
        grid = build("grids", Part("uniform"), schedule_of(schedule), steps)
        assert float(grid[0].alpha) == 0
        x = normals(3, 2, seed=4)
        euler = states(Part("ddim", {"eta": part.knobs.get("eta", 0.0)}), x, grid[:2])[-1]
        seen, rest = states(part, x, grid), states(part, euler, grid[1:])
        assert len(seen) == 1 + len(rest)
        for a, b in zip(seen[1:], rest, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", FAMILY, ids=label)
def test_the_cost_is_as_stated(part: Part) -> None:
    """n asks, or 2n − 1 of the midpoint methods on a grid that ends clean, 2n on one that does not."""
    for path, first in (("linear", 0), ("flow", 1)):
        grid = build("grids", Part("uniform"), schedule_of(path), 6)[first:]
        n = len(grid) - 1
        cost, noisy = (2 * n - 1, 2 * n - 2) if part.name in ("dpm2", "dpm2_ancestral", "dpmpp_2s") else (n, n - 1)
        x = NET.sample(3, grid[0], seed=1)
        assert len(states(part, x, grid)) - 1 == cost
        assert len(states(part, x, grid[:-1])) - 1 == noisy
        assert len(states(part, x, grid[-1:])) - 1 == 0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("dpm2_ancestral", {"eta": 1.5}), r"dpm2_ancestral eta: got 1.5, need a number in \[0, 1\]"),
        (Part("dpm2_ancestral", {"eta": math.nan}), "dpm2_ancestral eta: got nan"),
        (Part("unipc", {"predictor_order": 4}), "unipc predictor_order: got 4, need 1, 2 or 3"),
        (Part("unipc", {"variant": "bh2"}), "unipc variant: got 'bh2', need b1 or b2"),
    ],
    ids=label,
)
def test_bad_knobs_are_refused_before_the_first_question(part: Part, message: str) -> None:
    grid: Any = build("grids", Part("trailing"), schedule_of("linear"), 2)
    with pytest.raises(BadArgument, match=message):
        next(sampler_of(part)(torch.zeros(1, 2), grid, None))
