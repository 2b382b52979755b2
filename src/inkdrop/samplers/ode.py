"""The probability-flow ODE with adaptive steps: each image takes its own."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument, Diverged

__all__ = ["ORDER", "rk45"]

ORDER = None  # in the number of steps, which the tolerances decide: the error is about proportional to them

# The tableau of Dormand & Prince 1980: nodes, stages, and the difference of its orders 5 and 4.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # of order 5: where the step ends
)
DOUBT = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
SAFETY, LEAST, MOST = 0.9, 0.2, 10.0  # a step is at most this much shorter or longer than the one before
TRIES = 2000  # steps; smooth flows take fewer than 300 at tolerances of 1e-13


def rk45(x: Tensor, grid: Grid, noise: Noise, *, rtol: float = 1e-5, atol: float = 1e-5) -> Sampling:
    """Dormand & Prince's method of order 5(4) on the probability flow, steps chosen by its error (Song et al. 2021).

    In u = sigma/(alpha + sigma), z = x/(alpha + sigma) the flow is dz/du = eps − x0, finite at both ends. A step from z
    to z' is accepted if the root mean square of its error over atol + rtol·max(|z|, |z'|) is below 1, over one image:
    each has steps and times of its own, so none depends on its neighbours, and all are asked about together, at levels
    that differ from row to row. An image that has arrived goes on asking its last question until the others have too.

    Only the ends of the grid count. Ending clean, the flow is followed to the schedule's last noisy level, and the x0
    answered there is the result. Cost: two asks, and six for each step tried by the image that tries most; 50 to 150 in
    all at the default tolerances, whatever the number of steps of the grid. Song et al. 2021, section 4.3; step control
    of Hairer et al. 1993, section II.4.

    Args:
        x: (B, C, *S), at grid[0].
        grid: where to start and to end.
        noise: not used.
        rtol: the relative error of a step, > 0; at least 10 roundings of x's dtype.
        atol: the absolute error of a step, ≥ 0, in units of z, which is about that of the data.

    Raises:
        Diverged: an image would take more than 2,000 steps, for the net is not smooth enough for these tolerances.
    """
    images = torch.split(x, 1)
    least = 10 * torch.finfo(x.dtype).eps
    if not least <= rtol < 1:
        raise BadArgument(f"rk45 rtol: got {rtol:g}, need a number in [{least:.2g}, 1) for {x.dtype}; try 1e-5")
    if not 0 <= atol < math.inf:
        raise BadArgument(f"rk45 atol: got {atol:g}, need a finite number of at least 0; try 1e-5")
    return (yield from _abreast([_flow(image, grid, rtol, atol) for image in images]))


def _abreast(samplings: Sequence[Sampling]) -> Sampling:
    """Samplings of one image each as one of all: questions stacked, the last of each repeated once it has ended."""
    asks: list[Ask | None] = [None] * len(samplings)
    ends: list[Tensor | None] = [None] * len(samplings)
    told: Sequence[Belief | None] = [None] * len(samplings)
    while True:
        for i, (sampling, belief) in enumerate(zip(samplings, told, strict=True)):
            if ends[i] is None:
                try:
                    asks[i] = next(sampling) if belief is None else sampling.send(belief)
                except StopIteration as end:
                    ends[i] = end.value
        done = [end for end in ends if end is not None]
        if len(done) == len(samplings):
            return torch.cat(done)
        each = [ask for ask in asks if ask is not None]
        whole = yield Ask(torch.cat([a.x for a in each]), Level.cat([a.level for a in each], [1] * len(each)))
        told = [Belief(*parts) for parts in zip(whole.x0.split(1), whole.eps.split(1), strict=True)]


class _Point(NamedTuple):
    """Where the flow is: z (1, C, *S) at u, dz/du there, and the x0 answered."""

    u: float
    z: Tensor
    slope: Tensor
    x0: Tensor


def _flow(x: Tensor, grid: Grid, rtol: float, atol: float) -> Sampling:
    """The flow of one image, x of shape (1, C, *S), from the first level of the grid to its last."""
    now, last = grid[0], grid[-1]
    if len(grid) == 1:
        return x
    if last.clean:
        last = grid.schedule(grid.schedule.least)
    end = _u(last)
    at = yield from _reached(_u(now), x / (now.alpha + now.sigma), now)
    h, failed = (yield from _first(at, end, grid, rtol, atol)) if at.u > end else 0.0, False
    tried = 0
    while at.u > end:
        if tried == TRIES:
            raise Diverged(f"rk45: tried {TRIES} steps and came to u = {at.u:.3g} only; try greater rtol and atol")
        tried += 1
        to = max(at.u - h, end)
        ahead, doubt = yield from _step(at, to, last if to == end else _level(grid, to), grid)
        error = _size(doubt, at.z, ahead.z, rtol, atol)
        factor = SAFETY * error**-0.2 if error > 0 else MOST
        h = (at.u - to) * (max(LEAST, factor) if error >= 1 else min(1.0 if failed else MOST, factor))
        failed = error >= 1
        at = at if failed else ahead
    return at.x0 if grid[-1].clean else (last.alpha + last.sigma) * at.z


def _step(at: _Point, to: float, level: Level, grid: Grid) -> Generator[Ask, Belief, tuple[_Point, Tensor]]:
    """One step to u = to, whose level is given: where it leads, and by how much orders 5 and 4 differ. Six asks."""
    h, slopes, ahead = to - at.u, [at.slope], at
    for node, stage in zip(NODES, STAGES, strict=True):
        z = at.z + h * _sum(stage, slopes)
        there = level if node == 1 else _level(grid, at.u + node * h)
        ahead = yield from _reached(to, z, there)
        slopes.append(ahead.slope)
    return ahead, h * _sum(DOUBT, slopes)


def _first(at: _Point, end: float, grid: Grid, rtol: float, atol: float) -> Generator[Ask, Belief, float]:
    """The length of the first step, from the first and second derivative (Hairer et al. 1993, II.4). One ask."""
    length = at.u - end
    value, slope = (_size(f, at.z, at.z, rtol, atol) for f in (at.z, at.slope))
    trial = min(0.01 * value / slope if min(value, slope) >= 1e-5 else 1e-6, length)
    there = yield from _reached(at.u - trial, at.z - trial * at.slope, _level(grid, at.u - trial))
    bend = _size(there.slope - at.slope, at.z, at.z, rtol, atol) / trial
    steep = max(slope, bend)
    guess = (0.01 / steep) ** 0.2 if steep > 1e-15 else max(1e-6, trial * 1e-3)
    return min(100 * trial, guess, length)


def _reached(u: float, z: Tensor, level: Level) -> Generator[Ask, Belief, _Point]:
    belief = yield Ask((level.alpha + level.sigma) * z, level)
    return _Point(u, z, belief.eps - belief.x0, belief.x0)


def _size(error: Tensor, z: Tensor, to: Tensor, rtol: float, atol: float) -> float:
    """The root mean square of an error in units of what is tolerated."""
    tolerated = atol + rtol * torch.maximum(z.abs(), to.abs())
    return float(torch.linalg.vector_norm(error / tolerated)) / math.sqrt(error.numel())


def _sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total = total + weight * slope
    return total


def _u(level: Level) -> float:
    return float(level.sigma / (level.alpha + level.sigma))


def _level(grid: Grid, u: float) -> Level:
    """The schedule's level with sigma/(alpha + sigma) = u."""
    return grid.at(math.log((1 - u) / u))
