"""Parity of the multistep samplers with diffusers: DEIS, LMS, PNDM's PLMS, iPNDM, and consistency models'."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, IPNDMScheduler
from theirs import (
    NET,
    Run,
    double,
    grid_of_theirs,
    noises_of,
    ours,
    quiet,
    same,
    schedule_of_theirs,
    scheduler_of,
    start_of,
    theirs,
    times_of,
)

from inkdrop.core.ask import Ask, Belief, revise
from inkdrop.core.grid import Grid
from inkdrop.core.schedule import continuous_cosine, edm
from inkdrop.find import Part
from inkdrop.guide.clip import clip

pytestmark = pytest.mark.long  # left out of the fast tier

SPACINGS = ("leading", "trailing", "linspace")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_deis_multistep(order: int, spacing: str) -> None:
    """Its solver_type is "logrho". It ends at the table's first entry, not clean, and so does the grid made of it."""
    scheduler = scheduler_of(
        "DEISMultistepScheduler", 12, solver_order=order, timestep_spacing=spacing, lower_order_final=False
    )
    grid = grid_of_theirs(scheduler)
    x = start_of(grid)
    assert not grid[-1].clean
    same(ours(Part("deis", {"order": order}), x, grid), theirs(scheduler, x, grid[:-1]), 1e-6)


def test_deis_on_the_straight_path_is_theirs_with_flow_sigmas() -> None:
    """Where they integrate the straight path, alpha = 1 − sigma, we do so without being told."""
    scheduler = scheduler_of(
        "DEISMultistepScheduler",
        10,
        solver_order=3,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        lower_order_final=False,
    )
    scheduler.sigmas = scheduler.sigmas[:-1]  # the last is there twice
    scheduler.timesteps = scheduler.timesteps[:-1]
    grid = grid_of_theirs(scheduler)
    x = start_of(grid)
    same(ours(Part("deis"), x, grid), theirs(scheduler, x, grid[:-1]), 1e-6)


def last_of_order_1(scheduler: Any, order: int) -> Any:
    """The same LMS scheduler, told by its own argument `order` to take Euler's step into clean, as k-diffusion does."""
    step, last = scheduler.step, float(scheduler.timesteps[-1])
    scheduler.step = lambda y, t, x, **kw: step(y, t, x, order=1 if float(t) == last else order, **kw)
    return scheduler


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_lms_discrete(order: int, karras: bool) -> None:
    """With their coefficients from scipy's quadrature, ours in closed form."""
    scheduler = scheduler_of("LMSDiscreteScheduler", 9, use_karras_sigmas=karras)
    grid = grid_of_theirs(scheduler)
    x = start_of(grid)
    their = theirs(last_of_order_1(scheduler, order), x, grid[:-1])
    same(ours(Part("lms", {"order": order}), x, grid), their, 1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [2, 5, 10, 20])
def test_plms_is_pndm_without_its_runge_kutta_steps(steps: int, spacing: str) -> None:
    """set_alpha_to_one=False ends at the table's first entry, offset 1 begins the leading grid above it."""
    scheduler = scheduler_of(
        "PNDMScheduler",
        steps,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        timestep_spacing=spacing,
        steps_offset=1 if spacing == "leading" else 0,
    )
    schedule = schedule_of_theirs(scheduler)
    asked = (scheduler.timesteps.double() + 1) / schedule.steps  # the second level twice, for its Heun start
    grid = Grid(schedule, torch.cat([torch.unique_consecutive(asked), asked.new_full((1,), schedule.least)]))
    x = start_of(grid)
    same(ours(Part("plms"), x, grid), theirs(scheduler, x, [schedule(t) for t in asked]), 1e-6)


def test_ipndm_is_ipndm() -> None:
    """Their own levels are alpha = √(1 − sigma²), sigma = sin²(π·k/2n), and their net speaks v.

    From their second level, which set_begin_index chooses, to the last noisy one: at alpha = 0, the first, theirs takes
    0 for x0 (scheduling_ipndm.py:273, where alpha is replaced by 1e-8), and into clean the house's step is x0.
    """
    first = 1
    with quiet():
        scheduler = double(IPNDMScheduler())
        scheduler.set_timesteps(12)
    double(scheduler).set_begin_index(first)
    alphas, sigmas = scheduler.alphas[first:-1], scheduler.betas[first:-1]
    schedule = continuous_cosine(lam_end=-math.inf)
    grid = Grid(schedule, schedule.time_of((alphas / sigmas).log()))
    x = start_of(grid)
    state, asked = x, []
    for t, level in zip(scheduler.timesteps[first:], grid, strict=True):
        asked.append(state)
        belief = NET(Ask(state, level))
        v = level.alpha * belief.eps - level.sigma * belief.x0
        state = scheduler.step(v, t, state, return_dict=False)[0]
    same(ours(Part("ipndm"), x, grid), Run(asked[:-1], asked[-1]), 1e-6)


# ---- consistency models --------------------------------------------------------------------------------------


def test_consistency_is_lcm() -> None:
    """Their scalings c_skip·x + c_out·x0 at the boundary belong to the net here, so that its x0 is where x ends."""
    scheduler = scheduler_of("LCMScheduler", 4, prediction_type="sample", clip_sample=False)
    grid = grid_of_theirs(scheduler)
    x = start_of(grid)
    noises = noises_of(x, 3)

    def whole(ask: Ask) -> Belief:
        belief = NET(ask)
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(float(ask.level.t) * 1000 - 1)
        return revise(ask, belief, c_out * belief.x0 + c_skip * ask.x)

    same(ours(Part("consistency"), x, grid, whole, noises), theirs(scheduler, x, grid[:-1], NET, noises), 1e-6)


@pytest.mark.parametrize("clipped", [False, True])
def test_consistency_is_cm_stochastic_iterative(clipped: bool) -> None:
    """With sigma_min, where their flow ends, at 0, the clean level; their net speaks F, x0 = c_skip·x + c_out·F."""
    with quiet():
        scheduler = double(CMStochasticIterativeScheduler(sigma_min=0.0, clip_denoised=clipped))
        scheduler.set_timesteps(4)
    scheduler.sigmas = scheduler.sigmas.double()
    schedule = edm(rho_min=1e-4)
    grid = Grid(schedule, times_of(schedule, scheduler.sigmas))
    x = start_of(grid)
    noises = noises_of(x, 4)
    asked, state, queue = [], x, iter(noises)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_consistency_models.randn_tensor", lambda *_, **__: next(queue))
        for t, level in zip(scheduler.timesteps, grid, strict=False):
            asked.append(state)
            scheduler.scale_model_input(state, t)
            c_skip, c_out = scheduler.get_scalings_for_boundary_condition(level.sigma)
            said = (3 * NET(Ask(state, level)).x0 - c_skip * state) / c_out  # tripled, so that some of it is clipped
            state = scheduler.step(said, t, state, return_dict=False)[0]

    def tripled(ask: Ask) -> Belief:
        belief = NET(ask)
        return revise(ask, belief, 3 * belief.x0)

    our = ours(Part("consistency"), x, grid, tripled, noises, **({"guide": clip} if clipped else {}))
    same(our, Run(asked, state), 1e-6)
