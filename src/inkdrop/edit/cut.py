"""Cuts of a schedule: its lower part as a schedule of its own, on which every spacing of levels works unchanged."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from inkdrop.core.grid import Grid
from inkdrop.core.schedule import Schedule
from inkdrop.errors import BadArgument

__all__ = ["Cut", "lower_grid"]


class Cut(Schedule):
    """The levels of a schedule from clean up to a time, as a schedule whose t = 1 is that time.

    Entry k of its table is entry k of the whole one: t' = t·T/T', with T' = round(strength·T) entries.

    Args:
        whole: the schedule to cut.
        strength: the time that becomes t = 1, in (0, 1], rounded to the T entries.
        what: its name in messages.

    Raises:
        BadArgument: a strength outside [0, 1], or one that leaves no entry.
    """

    def __init__(self, whole: Schedule, strength: float, what: str = "strength") -> None:
        if not 0 <= strength <= 1:
            raise BadArgument(f"{what}: got {strength:g}, need a number in [0, 1]")
        self.whole, self.steps, self.preserving = whole, round(strength * whole.steps), whole.preserving
        if self.steps < 1:
            raise BadArgument(f"{what}: got {strength:g}, which is below the first noisy time, {whole.least:g}")
        self.top = self.steps / whole.steps

    def _noisy(self, t: Tensor) -> tuple[Tensor, Tensor]:
        level = self.whole((t * self.top).clamp(self.whole.least, 1))
        return level.alpha, level.sigma

    def _time(self, lam: Tensor) -> Tensor:
        return self.whole.time_of(lam) / self.top


def lower_grid(
    whole: Schedule, strength: float, steps: int, build: Callable[[Schedule], Grid], what: str = "strength"
) -> Grid:
    """A grid of `steps` steps from the time `strength` down to clean, in the whole schedule's times.

    n steps asked are n steps run, at any strength: the spacing is built on the cut schedule.

    Args:
        whole: the model's schedule.
        strength: the time to start from, in (0, 1], rounded to the schedule's T entries.
        steps: how many steps the grid has.
        build: a spacing of that many steps on the schedule it is given.
        what: the name of the strength in messages.

    Raises:
        BadArgument: there are fewer entries below the strength than steps.
    """
    cut = Cut(whole, strength, what)
    if cut.steps < steps:
        raise BadArgument(
            f"{what}: got {strength:g}, below which the schedule has {cut.steps} levels for {steps} steps; "
            f"need at least {steps / whole.steps:g}, or fewer steps"
        )
    return Grid(whole, build(cut).times * cut.top)
