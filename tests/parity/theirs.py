"""Diffusers' schedulers, run on the same net, start and noise as our samplers: the harness of the parity tests.

Tests beside this file say `from theirs import same, schedule_of_theirs, ...`: pytest puts the folder of a test file
without an `__init__.py` on the path (and `specimens`, one folder up, by the conftest there). Names of test files must
differ from those in laws/: test_parity_dpm.py.

A parity test reads:

    scheduler = scheduler_of("DPMSolverMultistepScheduler", 10, solver_order=2)
    grid = grid_of_theirs(scheduler)
    x = start_of(grid)
    same(ours(Part("dpmpp_2m"), x, grid), theirs(scheduler, x, grid[:-1]))

Everything runs in float64: their tables, which are float32, are cast, and our grid is made of them.
What is compared is every x that the net is asked about, and the result.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.oracle import Mixture
from inkdrop.core.schedule import Schedule, Table, edm, flow
from inkdrop.drive import drive
from inkdrop.find import Part
from specimens import normals, sampler_of

NET = Mixture(  # of smooth, nonlinear answers; its rows are points of the plane
    torch.tensor([[-0.7, 0.2], [0.5, 0.6], [0.3, -0.8]], dtype=torch.float64),
    torch.tensor([0.25, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
)


class Run(NamedTuple):
    """What happened: the x of every question, as alpha·x0 + sigma·eps, and the result."""

    asked: list[Tensor]
    result: Tensor


def scheduler_of(name: str | Callable[..., Any], steps: int, **config: Any) -> Any:
    """Their scheduler, by name or class, of this configuration; its timesteps set, and every table in float64."""
    made = getattr(diffusers, name) if isinstance(name, str) else name
    with quiet(), patch.object(np, "float32", np.float64):  # to which they round their sigmas
        scheduler = double(made(**config))
        scheduler.set_timesteps(steps)
    return double(scheduler)


@contextmanager
def quiet() -> Iterator[None]:
    """Their way of making arrays of tensors is deprecated by numpy 2; our tests turn warnings into errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array", category=DeprecationWarning)
        yield


def double(scheduler: Any) -> Any:
    """The same scheduler with every table of floats (betas, alphas_cumprod, sigmas, ...) in float64."""
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            setattr(scheduler, name, value.double())
    return scheduler


def is_flow(scheduler: Any) -> bool:
    """Whether its sigma is that of the straight path, alpha = 1 − sigma."""
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))


def is_edm(scheduler: Any) -> bool:
    """Whether it keeps alpha = 1 and preconditions the net itself."""
    return hasattr(scheduler, "precondition_outputs")


def schedule_of_theirs(scheduler: Any) -> Schedule:
    """Our schedule of theirs: the straight path, EDM's, or the table of their alphas_cumprod (not of their float32
    betas, whose product differs from it by 1e-6)."""
    if is_flow(scheduler):
        return flow()
    if is_edm(scheduler):
        return edm(rho_min=scheduler.config.sigma_min, rho_max=scheduler.config.sigma_max)
    abar = scheduler.alphas_cumprod.double()
    return Table(1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]]))


def grid_of_theirs(scheduler: Any) -> Grid:
    """The levels of their sigmas, without the repetitions of two-ask schedulers; where they keep none, those of their
    integer timesteps and then clean. Levels beyond our schedule's ends by a rounding are its ends."""
    schedule = schedule_of_theirs(scheduler)
    if not hasattr(scheduler, "sigmas"):
        clocks = scheduler.timesteps.double()
        return Grid(schedule, torch.cat([(clocks + 1) / schedule.steps, torch.zeros(1, dtype=torch.float64)]))
    return Grid(schedule, times_of(schedule, torch.unique_consecutive(scheduler.sigmas), straight=is_flow(scheduler)))


def times_of(schedule: Schedule, sigmas: Tensor, *, straight: bool = False) -> Tensor:
    """Our times of their sigmas (n,): sigma/alpha, or on the straight path sigma itself; 0 is clean."""
    sigmas = sigmas.double()
    lam = (-sigmas.logit() if straight else -sigmas.log()).clamp(min=float(schedule(1.0).lam))
    most = float(schedule(schedule.least).lam)
    lam = torch.where((lam > most) & (lam < most + 1e-5), most, lam)
    return schedule.time_of(lam)


def start_of(grid: Sequence[Level], rows: int = 4, seed: int = 0) -> Tensor:
    """(rows, 2) float64 draws of NET's exact marginal at the start of a grid."""
    return NET.sample(rows, grid[0], seed=seed)


def theirs(
    scheduler: Any,
    x: Tensor,
    levels: Sequence[Level],
    net: Callable[[Ask], Belief] = NET,
    noises: Iterable[Tensor] = (),
    **step: Any,
) -> Run:
    """Their loop from x at levels[0].

    Args:
        scheduler: with timesteps set.
        x: (B, ...) = alpha·x0 + sigma·eps at levels[0], whatever their state is.
        levels: of each call of the net, one for each of scheduler.timesteps.
        net: answers in beliefs, which are turned into what their prediction_type calls for.
        noises: what their randn_tensor returns, one a call; running out of them is an error.
        step: further arguments of their `step`, such as eta.
    """
    queue = iter(noises)
    asked: list[Tensor] = []
    scale = 1.0 if is_edm(scheduler) else _scale(scheduler, scheduler.timesteps[0])
    state = x / scale
    module = sys.modules[type(scheduler).__module__]
    with quiet(), patch.object(module, "randn_tensor", lambda *_, **__: next(queue), create=True):
        for t, level in zip(scheduler.timesteps, levels, strict=True):
            said = scheduler.scale_model_input(state, t) if hasattr(scheduler, "scale_model_input") else state
            asked.append(state if is_edm(scheduler) else said)
            belief = net(Ask(asked[-1], level))
            y = _output(scheduler, belief, state, level)
            state = scheduler.step(y, t, state, return_dict=False, **step)[0]
    return Run(asked, state)


def _scale(scheduler: Any, t: Tensor) -> Tensor | float:
    """What they multiply their state by to show it to the net: 1, or alpha where they keep x/alpha."""
    one = torch.ones((), dtype=torch.float64)
    return scheduler.scale_model_input(one, t) if hasattr(scheduler, "scale_model_input") else 1.0


def _output(scheduler: Any, belief: Belief, state: Tensor, level: Level) -> Tensor:
    """The belief in the words of their prediction_type; with a learned variance, twice the channels."""
    if belief.var_frac is not None:
        mean = _output(scheduler, belief._replace(var_frac=None), state, level)
        return torch.cat([mean, 2 * belief.var_frac - 1], dim=1)
    if is_edm(scheduler):
        zero, one = torch.zeros_like(state), torch.ones_like(state)
        kept = scheduler.precondition_outputs(state, zero, level.sigma)
        return (belief.x0 - kept) / scheduler.precondition_outputs(zero, one, level.sigma)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    return {
        "epsilon": lambda: belief.eps,
        "sample": lambda: belief.x0,
        "v_prediction": lambda: level.alpha * belief.eps - level.sigma * belief.x0,
        "flow_prediction": lambda: belief.eps - belief.x0,
    }[kind]()


def ours(
    part: Part,
    x: Tensor,
    grid: Sequence[Level],
    net: Callable[[Ask], Belief] = NET,
    noises: Iterable[Tensor] = (),
    guide: Callable[[Sampling], Sampling] = lambda sampling: sampling,
) -> Run:
    """Our sampler from x at grid[0], with middleware round it; its noise is taken from `noises` one by one."""
    queue = iter(noises)
    asked: list[Tensor] = []

    def noise(y: Tensor, now: Level, nxt: Level) -> Tensor:
        return next(queue)

    def ear(ask: Ask) -> Belief:
        asked.append(ask.x)
        return net(ask)

    fresh: Noise = noise
    return Run(asked, drive(guide(sampler_of(part)(x, grid, fresh)), ear))


def noises_of(x: Tensor, count: int, seed: int = 1) -> list[Tensor]:
    """`count` unit normals of x's shape, float64, the same in every run."""
    return list(normals(count, *x.shape, seed=seed))


def same(a: Run, b: Run, tolerance: float = 1e-4) -> None:
    """Fail unless every question's x and the result agree to this relative tolerance."""
    for i, (p, q) in enumerate(zip([*a.asked, a.result], [*b.asked, b.result], strict=True)):
        size = float(q.abs().max())
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance * size, msg=lambda m, i=i: f"state {i}: {m}")
