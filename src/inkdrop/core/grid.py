"""Grids: the noise levels that a sampler visits, from noise to clean.

A builder takes (schedule, steps) and returns a Grid of steps + 1 levels: `steps` noisy ones, strictly less and less
noisy, then the clean level. What a grid prints is what a sampler is asked about. Public functions here are found by
name.

Below, T is the schedule's number of steps (1,000 where it has no table), n is `steps`, and a "clock" is a table's
integer timestep, 0..T−1, of time t = (clock + 1)/T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor

from inkdrop.core.level import Level
from inkdrop.core.schedule import Schedule
from inkdrop.errors import BadArgument

__all__ = [
    "End",
    "Grid",
    "karras",
    "leading",
    "linspace",
    "loguniform",
    "power",
    "quadratic",
    "trailing",
    "uniform",
]

End: TypeAlias = Literal["clean", "least"]
"""Where a grid ends: at the clean level, or at the table's first entry (diffusers' set_alpha_to_one=False)."""


class Grid(Sequence[Level]):
    """Noise levels in falling order, and the schedule they came from.

    Args:
        schedule: gives levels between the entries, through `at`.
        times: (n,) float64 times, strictly falling.

    Raises:
        BadArgument: fewer than one level, or times that do not fall.
    """

    def __init__(self, schedule: Schedule, times: Tensor | Sequence[float]) -> None:
        times = torch.as_tensor(times, dtype=torch.float64)
        if times.ndim != 1 or len(times) < 1:
            raise BadArgument(f"grid: got times of shape {tuple(times.shape)}, need a list of at least one time")
        if bool((times.diff() >= 0).any()):
            k = int((times.diff() >= 0).nonzero()[0])
            raise BadArgument(
                f"grid: times {k} and {k + 1} do not fall ({float(times[k]):g}, {float(times[k + 1]):g}); "
                "try fewer steps, or the spacing uniform"
            )
        self.schedule, self.times = schedule, times
        self._fields = schedule(times)
        self._levels = _apart(self._fields)

    @overload
    def __getitem__(self, index: int) -> Level: ...
    @overload
    def __getitem__(self, index: slice) -> Grid: ...
    def __getitem__(self, index: int | slice) -> Level | Grid:
        """One level, or the segment of the grid that a slice selects."""
        return Grid(self.schedule, self.times[index]) if isinstance(index, slice) else self._levels[index]

    def __len__(self) -> int:
        return len(self._levels)

    def at(self, lam: Tensor | float) -> Level:
        """The schedule's level with log(alpha/sigma) = lam, on the grid or not; 0-dim float64."""
        return self.schedule(self.schedule.time_of(lam))

    def each_at(self, lams: Tensor) -> list[Level | None]:
        """The schedule's levels of these half log-SNRs (n,), found in one go; None where one is infinite."""
        finite = lams.isfinite()
        found = iter(_apart(self.at(lams[finite])))
        return [next(found) if here else None for here in finite.tolist()]

    def intervals(self) -> tuple[Level, Level]:
        """Both ends of all n steps of a grid of n + 1 levels, the noisier and the next: fields (n,)."""
        return Level(*(f[:-1] for f in self._fields)), Level(*(f[1:] for f in self._fields))

    def __repr__(self) -> str:
        return f"Grid({len(self) - 1} steps: {', '.join(f'{float(t):.4g}' for t in self.times)})"


def _apart(levels: Level) -> list[Level]:
    """Fields (n,) as n levels of 0-dim fields."""
    return [Level(*fields) for fields in zip(*levels, strict=True)]


def _check(schedule: Schedule, steps: int, skip_last: bool = False) -> int:
    most = schedule.steps - skip_last
    if steps < 1:
        raise BadArgument(f"sampler steps: got {steps}, need at least 1")
    if steps > most:
        beside = ", less the one that is left out" if skip_last else ""
        raise BadArgument(
            f"sampler steps: got {steps}, need at most {most}, the entries of the schedule{beside}; try {most}"
        )
    return schedule.steps


def _of_clocks(schedule: Schedule, clocks: Tensor, end: End = "clean") -> Grid:
    """The grid of these timesteps, then its end; a last timestep that is the end already is not repeated."""
    if end not in ("clean", "least"):
        raise BadArgument(f"grid end: got {end!r}, need clean or least")
    times = (clocks.double() + 1) / schedule.steps
    last = times.new_tensor([0.0 if end == "clean" else schedule.least])
    return Grid(schedule, times if end == "least" and float(clocks[-1]) == 0 else torch.cat([times, last]))


def _half_even(x: Tensor) -> Tensor:
    """Round half to even, as numpy does, after dropping float noise below 1e-9."""
    return (x * 1e9).round().div(1e9).round()


def uniform(schedule: Schedule, steps: int) -> Grid:
    """Equal steps of t, not rounded: t_i = 1 − i/n, between a table's entries too; the last noisy time is 1/n."""
    _check(schedule, steps)
    return Grid(schedule, 1 - torch.arange(steps + 1, dtype=torch.float64) / steps)


def trailing(schedule: Schedule, steps: int, *, end: End = "clean") -> Grid:
    """Integer timesteps counted back from the end: clock_i = round(T − i·T/n) − 1 (Lin et al. 2024, table 2).

    Starts at pure noise for every n. Rounds half to even.

    Args:
        schedule: the schedule of T steps.
        steps: n in [1, T].
        end: the clean level, or the table's first entry.
    """
    total = _check(schedule, steps)
    k = total - torch.arange(steps, dtype=torch.float64) * total / steps
    return _of_clocks(schedule, _half_even(k) - 1, end)


def leading(schedule: Schedule, steps: int, *, offset: int = 0, skip_last: bool = False, end: End = "clean") -> Grid:
    """Integer timesteps counted from the start: clock_i = i·⌊T/n⌋ + offset (Song et al. 2021's DDIM).

    Starts *below* pure noise unless T/n is 1: kept for agreement with published numbers; prefer trailing.

    Args:
        schedule: the schedule of T steps.
        steps: n in [1, T].
        offset: added to every timestep (Stable Diffusion uses 1); the last must stay below T.
        skip_last: space n + 1 timesteps so and leave out the last (diffusers' multistep solvers); n below T.
        end: the clean level, or the table's first entry.
    """
    total = _check(schedule, steps, skip_last)
    stride = total // (steps + skip_last)
    clocks = torch.arange(steps + skip_last).flip(0)[:steps] * stride + offset
    if offset < 0 or int(clocks[0]) > total - 1:
        raise BadArgument(f"leading offset: got {offset}, need 0 to {total - 1 - int(clocks[0]) + offset}; try 0")
    return _of_clocks(schedule, clocks, end)


def linspace(
    schedule: Schedule, steps: int, *, rounded: bool = True, skip_last: bool = False, end: End = "clean"
) -> Grid:
    """n timesteps equally spaced over [0, T − 1], both ends included, rounded half to even.

    One step is the noisiest timestep, T − 1.

    Args:
        schedule: the schedule of T steps.
        steps: n in [1, T].
        rounded: to integers; otherwise levels between a table's entries are visited too (k-diffusion).
        skip_last: space n + 1 timesteps so and leave out the last (diffusers' multistep solvers); n below T.
        end: the clean level, or the table's first entry.
    """
    total = _check(schedule, steps, skip_last)
    clocks = torch.linspace(total - 1, 0, steps + skip_last, dtype=torch.float64)[:steps]
    return _of_clocks(schedule, _half_even(clocks) if rounded else clocks, end)


def quadratic(schedule: Schedule, steps: int) -> Grid:
    """√t equally spaced from 1 to the least time: small steps near clean (the idea of DDIM's "quad", to the end).

    Song et al. 2021 (their code) square n numbers from 0 to √(0.8·T); here the grid reaches both ends of the schedule.
    """
    _check(schedule, steps)
    times = torch.linspace(1, schedule.least**0.5, steps, dtype=torch.float64) ** 2
    return Grid(schedule, torch.cat([times, times.new_zeros(1)]))


def power(schedule: Schedule, steps: int, *, exponent: float = 1.5, start: float = 1.0) -> Grid:
    """t_i = least + (start − least)·(1 − i/n)^exponent: smaller steps towards clean, for solvers at few asks.

    With exponent 1 and start 1 it is nearly uniform. A start below 1 leaves out the noisiest levels, at which most of
    what is drawn is undecided, and begins from the noise that they would have left; the signal share that is missing
    there is alpha/sigma of the start.

    Args:
        schedule: any.
        steps: n in [1, T].
        exponent: > 0; larger puts more steps near clean.
        start: the first time, in (least, 1].
    """
    _check(schedule, steps)
    if not 0 < exponent < math.inf:
        raise BadArgument(f"power exponent: got {exponent:g}, need a positive finite number; try 1.5")
    if not (schedule.least < start <= 1 or start == schedule.least == 1):
        raise BadArgument(f"power start: got {start:g}, need a time in ({schedule.least:g}, 1]; try 1")
    part = (1 - torch.arange(steps, dtype=torch.float64) / steps) ** exponent
    times = schedule.least + (start - schedule.least) * part
    return Grid(schedule, torch.cat([times, times.new_zeros(1)]))


def _lam_ends(schedule: Schedule, spacing: str, rho_max: float) -> tuple[float, float]:
    """lam at the start, where rho = min(rho_max, rho(1)), and at the least time; both finite."""
    if not rho_max > 0:
        raise BadArgument(f"{spacing} rho_max: got {rho_max:g}, need a positive number; try 80")
    end = float(schedule(schedule.least).lam)
    start = max(float(schedule(1.0).lam), -math.log(rho_max))
    if start == -math.inf:
        raise BadArgument(
            f"{spacing} rho_max: this schedule has no signal at t = 1 (zero terminal SNR), where log-SNR cannot be "
            "spaced; try rho_max=80, or the spacing uniform or trailing"
        )
    if -math.log(rho_max) >= end:
        raise BadArgument(f"{spacing} rho_max: got {rho_max:g}, need more than the least, {math.exp(-end):.3g}; try 80")
    return start, end


def _of_lams(schedule: Schedule, lams: Tensor) -> Grid:
    """The grid of these half log-SNRs, then clean; a first one that is the schedule's end is t = 1 itself."""
    times = schedule.time_of(lams)
    if float(lams[0]) == float(schedule(1.0).lam):
        times[0] = 1.0
    return Grid(schedule, torch.cat([times, times.new_zeros(1)]))


def karras(schedule: Schedule, steps: int, *, power: float = 7.0, rho_max: float = 80.0) -> Grid:
    """rho^{1/power} equally spaced between the schedule's ends, rho = sigma/alpha (Karras et al. 2022, eq. 5).

    A table may end far above any use (rho = 20,000 for the cosine table), where equal steps of log-SNR would be wasted:
    sampling starts at rho_max if the schedule goes beyond it, from the noise that t = 1 has. What that leaves out is a
    share 1/rho_max of the signal.

    Args:
        schedule: any.
        steps: n in [1, T].
        power: their ρ, > 0; 7 in the paper; larger puts more steps near clean.
        rho_max: the noisiest level, > 0; 80 in the paper; inf starts at t = 1, which zero terminal SNR does not allow.
    """
    _check(schedule, steps)
    if not power > 0:
        raise BadArgument(f"karras power: got {power:g}, need a positive number; try 7")
    start, end = _lam_ends(schedule, "karras", rho_max)
    roots = torch.linspace(math.exp(-start / power), math.exp(-end / power), steps, dtype=torch.float64)
    lams = (-power * roots.log()).clamp(start, end)
    return _of_lams(schedule, torch.cat([lams.new_tensor([start]), lams[1:]]))


def loguniform(schedule: Schedule, steps: int, *, rho_max: float = 80.0) -> Grid:
    """Half log-SNR equally spaced between the schedule's ends (Lu et al. 2022, DPM-Solver).

    Args:
        schedule: any.
        steps: n in [1, T].
        rho_max: the noisiest level, > 0, as in karras.
    """
    _check(schedule, steps)
    start, end = _lam_ends(schedule, "loguniform", rho_max)
    return _of_lams(schedule, torch.linspace(start, end, steps, dtype=torch.float64))
