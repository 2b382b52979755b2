"""Plan: how to sample (sampler, grid, steps, guidance, noise), and the generator that it makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Noise, Sampler, Sampling, given
from inkdrop.core.brownian import Brownian
from inkdrop.core.cond import Cond
from inkdrop.core.grid import Grid
from inkdrop.core.noise import Keyed
from inkdrop.core.schedule import Schedule
from inkdrop.drive import overhear
from inkdrop.errors import BadArgument
from inkdrop.find import Part, build, check_knobs, find

__all__ = ["Plan", "change", "grid_of", "noise_of", "sampling"]


@dataclass(frozen=True)
class Plan:
    """How to sample.

    Attributes:
        sampler: a sampler and its knobs.
        grid: a spacing of levels and its knobs.
        steps: the number of steps of the grid, ≥ 1.
        guide: middleware from the sampler outwards: clip before cfg, so that the guided x0 is clipped.
        combine: a combinator that runs the sampler on segments of the grid, such as restart; None runs it once.
        noise: "white", "brownian" (one path an image, whatever the steps), or None for what the sampler's file names in
            its NOISE, white where it names none.
    """

    sampler: Part = field(default_factory=lambda: Part("ddim"))
    grid: Part = field(default_factory=lambda: Part("trailing"))
    steps: int = 50
    guide: tuple[Part, ...] = (Part("clip"),)
    combine: Part | None = None
    noise: Literal["white", "brownian"] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadArgument(f"sampler steps: got {self.steps}, need at least 1")
        if self.noise not in (None, "white", "brownian"):
            raise BadArgument(f"noise: got {self.noise!r}, need white or brownian; leave it out for the sampler's own")


def change(
    plan: Plan,
    *,
    sampler: str | Part | None = None,
    grid: str | Part | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    clip: bool | None = None,
) -> Plan:
    """A plan with some of it changed; what is None stays.

    Args:
        plan: to start from.
        sampler: another sampler, with default knobs if only named.
        grid: another spacing.
        steps: another number of steps.
        guidance: the scale w of classifier-free guidance: 1 conditional, 0 unconditional, above 1 stronger.
        clip: whether x0 is clipped, to the plan's own range if it has one, else to the data's.
    """
    guide = list(plan.guide)
    if clip is not None:
        own = [p for p in guide if p.name == "clip"] or [Part("clip")]
        guide = (own if clip else []) + [p for p in guide if p.name != "clip"]
    if guidance is not None:
        guide = [p for p in guide if p.name != "cfg"] + [Part("cfg", {"scale": float(guidance)})]
    return replace(
        plan,
        sampler=Part(sampler) if isinstance(sampler, str) else sampler or plan.sampler,
        grid=Part(grid) if isinstance(grid, str) else grid or plan.grid,
        steps=plan.steps if steps is None else steps,
        guide=tuple(guide),
    )


def grid_of(plan: Plan, schedule: Schedule) -> Grid:
    """The noise levels that this plan visits on a schedule: the ones printed are the ones used."""
    grid: Grid = build("grids", plan.grid, schedule, plan.steps)
    return grid


def noise_of(plan: Plan, seed: int, images: Sequence[int]) -> Keyed | Brownian:
    """The noise of these images of a seed, of the plan's kind: white, or one Brownian path each."""
    kind = plan.noise or getattr(inspect.getmodule(find("samplers", plan.sampler.name)), "NOISE", "white")
    return Brownian(seed, images) if kind == "brownian" else Keyed(seed, images)


def sampling(
    plan: Plan,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    cond: Cond | None = None,
    heard: list[tuple[Ask, Belief]] | None = None,
    edit: Callable[[Sampler], Sampler] | None = None,
) -> Sampling:
    """The sampler's generator on a grid, with the plan's middleware round it.

    From the inside out: the sampler, an edit's middleware or combinator, the plan's combinator, the condition, and the
    plan's guidance, so that an edit is told of beliefs that are guided and clipped already.

    Args:
        plan: how.
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: fresh noise for stochastic samplers.
        cond: what the net is told besides.
        heard: as in `drive.overhear`.
        edit: sampler -> sampler.
    """
    function = find("samplers", plan.sampler.name)
    sampler: Sampler = partial(function, **check_knobs(plan.sampler.name, function, plan.sampler.knobs))
    if edit is not None:
        sampler = edit(sampler)
    if plan.combine is not None:
        sampler = partial(build, "combinators", plan.combine, sampler)
    work = sampler(x, grid, noise)
    work = given(work if heard is None else overhear(work, heard), cond)
    for part in plan.guide:
        work = build("guide", part, work)
    return work
