"""Parity of the deterministic DPM family with diffusers 0.42.1: KDPM2, DPM-Solver++, its EDM kind, and UniPC.

Both sides compute in float64, to 1e-7 of the state, but DPMSolverMultistepScheduler, which casts the state to float32
in each step: 1e-5. There is one exception, of DPM-Solver++ of order 3: below.
"""

from __future__ import annotations

import linecache
import math
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler
from theirs import grid_of_theirs, noises_of, ours, same, scheduler_of, start_of, theirs
from torch import Tensor

from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.oracle import Gaussian
from inkdrop.core.schedule import Schedule, edm, vp
from inkdrop.find import Part

pytestmark = pytest.mark.long  # left out of the fast tier

STEPS = (1, 2, 3, 7, 20)
VP: list[dict[str, Any]] = [  # spacings of the tables that all of them have, and what else the net may say
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "v_prediction"},
    {"timestep_spacing": "trailing", "beta_schedule": "scaled_linear"},
    {"use_karras_sigmas": True, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"use_exponential_sigmas": True},
]
MULTISTEP = [
    *VP,
    {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
]
SHORT = {"num_train_timesteps": 50, "beta_start": 2e-3, "beta_end": 0.4}  # their KDPM2 takes a second to make T = 1000
EDM: list[dict[str, Any]] = [{}, {"sigma_schedule": "exponential"}, {"prediction_type": "v_prediction"}]


def told(config: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in config.items() if not k.startswith("beta_")) or "default"


# ---- dpm2 ----------------------------------------------------------------------------------------------------


def with_midpoints(grid: Grid, *, eta: float) -> list[Level]:
    """The levels of a two-stage scheduler's calls: each but the last with the middle, in log rho, of its step to
    rho_down = rho'·√(1 − eta²·(1 − rho'²/rho²)), and the last, which leads to clean, alone."""
    found = []
    for now, nxt in pairwise(grid):
        found.append(now)
        if not nxt.clean:
            down = nxt.rho * (1 - eta**2 * (1 - (nxt.rho / now.rho) ** 2)).sqrt()
            found.append(grid.at(-(now.rho * down).log() / 2))
    return found


@pytest.mark.parametrize("config", VP, ids=told)
def test_dpm2_is_kdpm2(config: dict[str, Any]) -> None:
    for steps in STEPS:
        scheduler = scheduler_of("KDPM2DiscreteScheduler", steps, **config | SHORT)
        grid = grid_of_theirs(scheduler)
        x = start_of(grid)
        same(ours(Part("dpm2"), x, grid), theirs(scheduler, x, with_midpoints(grid, eta=0)), 1e-7)


@pytest.mark.parametrize("config", VP, ids=told)
def test_dpm2_ancestral_is_kdpm2_ancestral(config: dict[str, Any]) -> None:
    """Theirs is eta = 1, with one noise a step but the last, which both take from the same list."""
    for steps in STEPS:
        scheduler = scheduler_of("KDPM2AncestralDiscreteScheduler", steps, **config | SHORT)
        grid = grid_of_theirs(scheduler)
        x = start_of(grid)
        noises = noises_of(x, steps - 1)
        got = ours(Part("dpm2_ancestral"), x, grid, noises=noises)
        same(got, theirs(scheduler, x, with_midpoints(grid, eta=1), noises=noises), 1e-7)


# ---- DPM-Solver++ --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*MULTISTEP, {"use_lu_lambdas": True}], ids=told)
def test_dpmpp_2m_is_dpm_solver_multistep_of_order_2(config: dict[str, Any]) -> None:
    """And of order 1 it is ddim."""
    for steps in STEPS:
        for order, name in ((1, "ddim"), (2, "dpmpp_2m")):
            scheduler = scheduler_of("DPMSolverMultistepScheduler", steps, solver_order=order, **config)
            grid = grid_of_theirs(scheduler)
            x = start_of(grid)
            same(ours(Part(name), x, grid), theirs(scheduler, x, grid[:-1]), 1e-5)


@pytest.mark.parametrize("config", EDM, ids=told)
def test_dpmpp_2m_is_edm_dpm_solver_multistep_of_order_2(config: dict[str, Any]) -> None:
    for steps in STEPS:
        for order, name in ((1, "ddim"), (2, "dpmpp_2m")):
            scheduler = scheduler_of("EDMDPMSolverMultistepScheduler", steps, solver_order=order, **config)
            grid = grid_of_theirs(scheduler)
            x = start_of(grid)
            same(ours(Part(name), x, grid), theirs(scheduler, x, grid[:-1]), 1e-7)


@pytest.mark.parametrize("steps", [1, 3, 7, 21])
def test_dpmpp_2s_is_dpm_solver_singlestep_of_order_2(steps: int) -> None:
    """Theirs takes two of its own levels a step, and where log rho is equally spaced the inner one is our midpoint:
    so n = 2·k + 1 of its levels are k of our steps and the one to clean."""
    scheduler = scheduler_of("DPMSolverSinglestepScheduler", steps, solver_order=2, use_exponential_sigmas=True)
    every = grid_of_theirs(scheduler)
    grid = Grid(every.schedule, torch.cat([every.times[:-1:2], every.times[-1:]]))
    x = start_of(grid)
    same(ours(Part("dpmpp_2s"), x, grid), theirs(scheduler, x, every[:-1]), 1e-7)


# ---- the exception: order 3 ----------------------------------------------------------------------------------

HALVED = "        D2 = (1.0 / (r0 + r1)) * (D1_0 - D1_1)\n"  # is half of h²·x0'', where their formula has all of it
LINES = {DPMSolverMultistepScheduler: 1116, EDMDPMSolverMultistepScheduler: 660}


class Mended:
    """Their scheduler with 2.0 for the 1.0 in HALVED: the term that has D2 is added once more."""

    def multistep_dpm_solver_third_order_update(self, outputs: list[Tensor], sample: Tensor, **noise: Any) -> Tensor:
        i, (m0, m1, m2) = self.step_index, outputs[::-1]
        alphas, sigmas = zip(*(self._sigma_to_alpha_sigma_t(self.sigmas[k]) for k in range(i - 2, i + 2)), strict=True)
        lam2, lam1, lam0, lam = (math.log(alpha / sigma) for alpha, sigma in zip(alphas, sigmas, strict=True))
        h, r0, r1 = lam - lam0, (lam0 - lam1) / (lam - lam0), (lam1 - lam2) / (lam - lam0)
        half = ((m0 - m1) / r0 - (m1 - m2) / r1) / (r0 + r1)
        once = super().multistep_dpm_solver_third_order_update(outputs, sample=sample, **noise)
        return once - alphas[-1] * ((math.expm1(-h) + h) / h**2 - 0.5) * half


class MendedVP(Mended, DPMSolverMultistepScheduler):
    pass


class MendedEDM(Mended, EDMDPMSolverMultistepScheduler):
    pass


@pytest.mark.parametrize("config", [*MULTISTEP, *({"edm": True, **config} for config in EDM)], ids=told)
def test_dpmpp_3m_is_theirs_but_for_one_factor(config: dict[str, Any]) -> None:
    """With "heun" their second step is a line's integral, as ours; the midpoint's is 2M's. With lower_order_final they
    take order 2 in the last but one of fewer than 15 steps; without, as we do, order 3."""
    kind = MendedEDM if "edm" in config else MendedVP
    config = {knob: value for knob, value in config.items() if knob != "edm"}
    for steps in STEPS:
        scheduler = scheduler_of(kind, steps, solver_order=3, solver_type="heun", lower_order_final=False, **config)
        grid = grid_of_theirs(scheduler)
        x = start_of(grid)
        same(ours(Part("dpmpp_3m"), x, grid), theirs(scheduler, x, grid[:-1]), 1e-5)


@pytest.mark.parametrize("kind", LINES, ids=lambda kind: kind.__name__)
def test_their_order_3_is_of_order_2_and_ours_nearer_the_exact_map(kind: Any) -> None:
    """Of a Gaussian's flow from rho = 5 to 0.1, known in closed form: slopes of the error over 32, 64 and 128 equal
    steps of lam, of which the first is graded so that the start does not show. Mended as above theirs has order 3."""
    file = sys.modules[kind.__module__].__file__
    assert linecache.getline(file, LINES[kind]) == HALVED
    oracle = Gaussian(torch.tensor([0.3, -0.5], dtype=torch.float64), 0.4)
    mended = MendedEDM if kind is EDMDPMSolverMultistepScheduler else MendedVP
    errors: dict[str, list[float]] = {"theirs": [], "mended": [], "ours": []}
    for steps in (32, 64, 128):
        grid = graded(edm() if mended is MendedEDM else vp(), steps)
        x = oracle.sample(16, grid[0], seed=1)
        exact = oracle.flow(x, grid[0], grid[-1])
        ends = {"ours": ours(Part("dpmpp_3m"), x, grid, oracle).result}
        for name, made in (("theirs", kind), ("mended", mended)):
            scheduler = scheduler_of(made, len(grid), solver_order=3)
            scheduler.sigmas = torch.tensor([*(float(level.rho) for level in grid), 0.0], dtype=torch.float64)
            ends[name] = theirs(scheduler, x, grid, oracle).asked[-1]  # before they step from rho = 0.1 to clean
        for name, end in ends.items():
            errors[name].append(float((end - exact).square().mean().sqrt()))
    slopes = {name: math.log2(found[-2] / found[-1]) for name, found in errors.items()}
    assert slopes == pytest.approx({"theirs": 2, "mended": 3, "ours": 3}, abs=0.15), errors
    assert all(a < b / 3 for a, b in zip(errors["ours"], errors["theirs"], strict=True)), errors


def graded(schedule: Schedule, steps: int) -> Grid:
    """From rho = 5 to 0.1 in equal steps of lam, the first of them cut at h² and h^1.5."""
    part = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    part = torch.cat([part[:1], part[1:2] ** 2, part[1:2] ** 1.5, part[1:]])
    return Grid(schedule, schedule.time_of(-math.log(5) + part * math.log(50)))


# ---- UniPC ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", MULTISTEP, ids=told)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_unipc_multistep(order: int, config: dict[str, Any]) -> None:
    for steps in STEPS:
        scheduler = scheduler_of("UniPCMultistepScheduler", steps, solver_order=order, **config)
        grid = grid_of_theirs(scheduler)
        x = start_of(grid)
        got = ours(Part("unipc", {"predictor_order": order}), x, grid)
        same(got, theirs(scheduler, x, grid[:-1]), 1e-7)


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_unipc_multistep_to_a_noisy_level(order: int, solver_type: str) -> None:
    """With bh1 their step into the clean level is 0·inf, not a number. To their least sigma it works, and both of us
    keep the order to the end."""
    for steps in STEPS:
        scheduler = scheduler_of(
            "UniPCMultistepScheduler",
            steps,
            solver_order=order,
            solver_type=solver_type,
            final_sigmas_type="sigma_min",
            lower_order_final=False,
        )
        grid = grid_of_theirs(scheduler)
        assert not grid[-1].clean
        x = start_of(grid)
        part = Part("unipc", {"predictor_order": order, "variant": solver_type.replace("h", "")})
        same(ours(part, x, grid), theirs(scheduler, x, grid[:-1]), 1e-7)
