"""Plan: how to sample (sampler, grid, steps, guidance, noise), and the generator that it makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

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

__all__ = ["Plan", "add_guide", "change", "check_guide", "grid_of", "needs_of", "noise_of", "place_of", "sampling"]


@dataclass(frozen=True)
class Plan:
    """How to sample.

    Attributes:
        sampler: a sampler and its knobs.
        grid: a spacing of levels and its knobs.
        steps: the number of steps of the grid, ≥ 1.
        guide: middleware from the sampler outwards, in the order of their PLACE (see `guide`): clip before cfg, so that
            the guided x0 is clipped.
        combine: a combinator that runs the sampler on segments of the grid, such as restart; None runs it once.
        noise: "white", "brownian" (one path an image, whatever the steps), or None for what the sampler's file names in
            its NOISE, white where it names none or with a combinator.
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


def _stated(part: Part, name: str) -> Any:
    """What the file of a guide states by this name; None where it states nothing."""
    return getattr(inspect.getmodule(find("guide", part.name)), name, None)


def place_of(part: Part) -> int:
    """Where a guide stands between the sampler and the net: the PLACE in its file, larger nearer the net.

    Raises:
        BadArgument: its file states none.
    """
    place: int | None = _stated(part, "PLACE")
    if place is None:
        raise BadArgument(f"guide {part.name}: its module states no PLACE; write PLACE = 25 for between drift and cfg")
    return place


def needs_of(plan: Plan) -> dict[str, str]:
    """The parts of a bundle that the plan's guides ask besides the net, and which guide asks it: NEEDS in its file."""
    return {name: part.name for part in plan.guide for name in _stated(part, "NEEDS") or ()}


def check_guide(guide: Sequence[Part]) -> None:
    """Refuse guides that are not in the order of their PLACE, or two at one place.

    Raises:
        BadArgument: naming them.
    """
    for inner, outer in pairwise(guide):
        if place_of(inner) == place_of(outer):
            hint = ", as --no-clip does" if "clip" in (inner.name, outer.name) else ""
            raise BadArgument(f"guide: {inner.name} and {outer.name} do the same work; keep one of them{hint}")
        if place_of(inner) > place_of(outer):
            right = ", ".join(part.name for part in sorted(guide, key=place_of))
            raise BadArgument(f"guide: got {inner.name} before {outer.name}, need {right} (from the sampler outwards)")


def add_guide(guide: Sequence[Part], part: Part) -> tuple[Part, ...]:
    """Guides with one more, or with another one of its name, in the order of their PLACE."""
    return tuple(sorted([*(p for p in guide if p.name != part.name), part], key=place_of))


def change(
    plan: Plan,
    *,
    sampler: str | Part | None = None,
    grid: str | Part | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    clip: bool | None = None,
    guide: Sequence[str | Part] | None = None,
    combine: str | Part | None = None,
    noise: Literal["white", "brownian"] | None = None,
) -> Plan:
    """A plan with some of it changed; what is None stays.

    Args:
        plan: to start from.
        sampler: another sampler, with default knobs if only named.
        grid: another spacing.
        steps: another number of steps.
        guidance: the scale w of classifier-free guidance: 1 conditional, 0 unconditional, above 1 stronger. Its other
            knobs stay, but at 1, where they would have no effect.
        clip: whether x0 is clipped, to the plan's own range if it has one, else to the data's.
        guide: guides to add, with default knobs if only named and not there; "none" takes those so far away.
        combine: another combinator, or "none".
        noise: another kind of noise.
    """
    guides = plan.guide
    for each in guide or ():
        guides = () if each == "none" else add_guide(guides, _own(guides, each) if isinstance(each, str) else each)
    if clip is not None:
        guides = add_guide(guides, _own(guides, "clip")) if clip else tuple(p for p in guides if p.name != "clip")
    if guidance is not None:
        kept = {} if guidance == 1 else _own(guides, "cfg").knobs
        guides = add_guide(guides, Part("cfg", {**kept, "scale": float(guidance)}))
    return replace(
        plan,
        sampler=plan.sampler if sampler is None else _part(sampler),
        grid=plan.grid if grid is None else _part(grid),
        steps=plan.steps if steps is None else steps,
        guide=guides,
        combine=plan.combine if combine is None else None if combine == "none" else _part(combine),
        noise=plan.noise if noise is None else noise,
    )


def _own(guide: Sequence[Part], name: str) -> Part:
    """The guide of this name with the knobs that it has here, or with default ones."""
    return next((part for part in guide if part.name == name), Part(name))


def _part(given: str | Part) -> Part:
    return Part(given) if isinstance(given, str) else given


def grid_of(plan: Plan, schedule: Schedule) -> Grid:
    """The noise levels that this plan visits on a schedule: the ones printed are the ones used."""
    grid: Grid = build("grids", plan.grid, schedule, plan.steps)
    return grid


def noise_of(plan: Plan, seed: int, images: Sequence[int]) -> Keyed | Brownian:
    """The noise of these images of a seed, of the plan's kind: white, or one Brownian path each.

    A combinator goes back up in noise, which a path cannot: with one, noise is white unless the plan says otherwise.
    """
    own = getattr(inspect.getmodule(find("samplers", plan.sampler.name)), "NOISE", "white")
    kind = plan.noise or ("white" if plan.combine else own)
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

    Raises:
        BadArgument: guides out of their order, or two that do the same work.
    """
    check_guide(plan.guide)
    function = find("samplers", plan.sampler.name)
    sampler: Sampler = partial(function, **check_knobs(plan.sampler.name, function, plan.sampler.knobs))
    if heard is not None:
        sampler = _overheard(sampler, heard)
    if edit is not None:
        sampler = edit(sampler)
    if plan.combine is not None:
        sampler = partial(build, "combinators", plan.combine, sampler)
    work = given(sampler(x, grid, noise), cond)
    for part in plan.guide:
        work = build("guide", part, work)
    return work


def _overheard(sampler: Sampler, heard: list[tuple[Ask, Belief]]) -> Sampler:
    """The sampler with its own questions, and the answers that reach it, noted."""
    return lambda x, grid, noise: overhear(sampler(x, grid, noise), heard)
