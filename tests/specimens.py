"""Specimens: every schedule, target, grid and sampler of the house with the knobs that the laws try, found by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.level import Level
from inkdrop.core.schedule import Schedule
from inkdrop.core.target import Target
from inkdrop.denoiser import Denoiser
from inkdrop.find import Part, build, find, knobs, names

T_LIST = (1, 2, 3, 7, 13, 50)  # the steps of law 3; T itself is added where it is known

# A table of one's own: neither rising nor smooth, which the schedules of the papers are.
OWN_BETAS = tuple(float(b) for b in 0.02 + 0.2 * np.sin(np.arange(1, 61)) ** 2)

NEEDED: dict[str, dict[str, Any]] = {"table": {"betas": OWN_BETAS}}  # knobs without a default

MORE: list[Part] = [
    Part("linear", {"steps": 100, "rescale": True}),
    Part("cosine", {"steps": 50}),
    Part("table", {"betas": (*OWN_BETAS[:20], 1.0)}),
    Part("vp", {"beta_min": 0.5, "beta_max": 12.0}),
    Part("edm", {"rho_min": 0.01, "rho_max": 20.0, "power": 3.0}),
    Part("flow", {"shift": 3.0}),
    Part("flow", {"shift": 0.5}),
    Part("continuous_cosine", {"lam_end": -math.inf}),
    Part("linear", {"steps": 1, "first": 0.5, "last": 0.5}),
    Part("linear", {"steps": 2, "first": 0.3, "last": 0.6}),
]


def label(thing: Any) -> str:
    """The name of a test's case."""
    if isinstance(thing, Part):
        shown = (f"{k}={len(v) if isinstance(v, tuple) else v}" for k, v in thing.knobs.items())
        return f"{thing.name}({','.join(shown)})" if thing.knobs else thing.name
    return str(thing)


def _schedules() -> list[Part]:
    """Each schedule as it comes, again with zero terminal SNR where it has that knob, and the variants above."""
    parts: list[Part] = []
    for name in names("schedules"):
        own = NEEDED.get(name, {})
        parts.append(Part(name, own))
        if "zero_terminal" in knobs(find("schedules", name)):
            parts.append(Part(name, {**own, "zero_terminal": True}))
    return parts + MORE


SCHEDULES = _schedules()
TARGETS = names("targets")
GRIDS = names("grids")

# Each sampler as it comes, and with the knobs that change its numbers.
SAMPLERS: list[Part] = [Part(name) for name in names("samplers")] + [
    Part("ddim", {"eta": 0.5}),
    Part("ddim", {"eta": 1.0}),
    Part("ddpm", {"variance": "beta"}),
    Part("heun", {"space": "rho"}),
    # linear multistep
    Part("deis", {"order": 2}),
    Part("lms", {"order": 2}),
    Part("lms", {"order": 3}),
    # the deterministic DPM family
    Part("dpm2_ancestral", {"eta": 0.5}),
    Part("unipc", {"predictor_order": 1}),
    Part("unipc", {"predictor_order": 3}),
    Part("unipc", {"variant": "b1"}),
    # the stochastic ones
    Part("euler_ancestral", {"eta": 0.5}),
    Part("edm", {"order": 1, "churn": 5.0}),
    Part("edm", {"churn": 4.0, "low": 0.2, "high": 3.0}),
    Part("dpmpp_2s_sde", {"eta": 0.5}),
    Part("dpmpp_2m_sde", {"eta": 0.5}),
    Part("dpmpp_3m_sde", {"eta": 0.5}),
    Part("predictor_corrector", {"predictor": "euler_maruyama", "corrections": 2}),
    Part("annealed_langevin", {"per_level": 2, "step_size": 0.2}),
]


def schedule_of(part: Part | str) -> Schedule:
    """A schedule by its part, or by its name with the knobs that it needs."""
    part = Part(part, NEEDED.get(part, {})) if isinstance(part, str) else part
    schedule: Schedule = build("schedules", part)
    return schedule


def target_of(name: str, schedule: Schedule) -> Target:
    """A target of this schedule by its name."""
    target: Target = build("targets", Part(name), schedule)
    return target


def sampler_of(part: Part) -> Callable[..., Any]:
    """A sampler with its knobs filled in."""
    function = find("samplers", part.name)
    return lambda x, grid, noise: function(x, grid, noise, **part.knobs)


class OracleNet(nn.Module):
    """A net that knows: its answer y is the oracle's belief said in the terms of a target.

    `listen` is its clock: it hears the exact level, so that the only rounding is that of a float32 answer.
    """

    def __init__(self, oracle: Callable[[Ask], Belief], target: Target) -> None:
        super().__init__()
        self.oracle, self.target = oracle, target
        self.level: Level | None = None

    def listen(self, level: Level) -> Tensor:
        """The clock of this net."""
        self.level = level
        return level.t

    def forward(self, x: Tensor, clock: Tensor, cond: Any) -> Tensor:
        """y = p·x0 + q·eps of the oracle's belief, computed in float64."""
        belief = self.oracle(Ask(x.double(), self.level, cond))
        return self.target.make(belief.x0, belief.eps, self.level)


def denoiser_of(oracle: Callable[[Ask], Belief], schedule: Schedule, target: Target) -> Denoiser:
    """A Denoiser whose net is this oracle."""
    net = OracleNet(oracle, target)
    return Denoiser(net, schedule, target, net.listen)


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit normal numbers, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
