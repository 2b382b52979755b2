"""NLL: the negative log-likelihood of the probability-flow ODE, by change of variables, in bits a dimension.

In z = x/(alpha + sigma) and u = sigma/(alpha + sigma) the flow is dz/du = eps − x0, and along it

    d log p(z)/du = −div = −(alpha + sigma)/sigma · tr(1 − (alpha + sigma)·∂x0/∂x)

(Song et al. 2021, eq. 39, in these variables). Both are integrated upwards from the least noisy level to the grid's
first, where x has the density that sampling starts from, N(0, 1) or N(0, sigma(1)²); then log p(x) = log p(z) −
D·log(alpha + sigma). It is a density of *noisy* data, at the level that x is said to be at, and exact but for steps and
probes.

The trace is the mean of gᵀ(1 − (alpha + sigma)·∂x0/∂x)g over random probes g (Hutchinson 1990; Grathwohl et al. 2019),
each kept along the whole flow; or the exact sum over the D unit vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inkdrop.core.ask import Ask
from inkdrop.core.cond import Cond
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.noise import generator, normal
from inkdrop.drive import Answerer
from inkdrop.errors import BadArgument, Diverged

__all__ = ["NLL", "Method", "Trace", "asks_of", "dequantise", "nll"]

Trace = Literal["rademacher", "gaussian", "exact"]
Method = Literal["rk4", "heun"]

_DEQUANTISE, _PROBES = 2**40, 2**41  # draws of their own, apart from those of sampling and of the bound
_ASKS = {"rk4": 4, "heun": 2}


class NLL(NamedTuple):
    """The negative log-likelihood of B points.

    Attributes:
        each: (K, B) float64, −log2 p(x)/D by each of K probes, in bits a dimension, each without bias; one row where
            the trace is exact.
        end: (B, C, *S), where the flow takes x: its latent, at the grid's first level.
    """

    each: Tensor
    end: Tensor

    @property
    def bits(self) -> Tensor:
        """(B,): the mean over the probes."""
        return self.each.mean(0)

    @property
    def se(self) -> Tensor:
        """(B,): the standard error of `bits` over the probes.

        Raises:
            BadArgument: there is one value an image, which does not tell.
        """
        if len(self.each) < 2:
            raise BadArgument("nll: one probe has no standard error; give at least 2")
        return self.each.std(0) / math.sqrt(len(self.each))


def asks_of(grid: Grid, method: Method) -> int:
    """How many questions `nll` asks about an image: 4 (rk4) or 2 (heun) for every step between noisy levels."""
    return _ASKS[method] * (sum(not level.clean for level in grid) - 1)


def dequantise(x: Tensor, levels: int, *, seed: int = 0, images: Sequence[int] | None = None, draw: int = 0) -> Tensor:
    """Discrete data with uniform noise over the bin of each value: x + w·U(−½, ½), w = 2/(levels − 1).

    A density p of such data bounds the probability P of the discrete ones: −log2 P(x)/D ≤ E[−log2 p]/D − log2 w
    (Theis, van den Oord & Bethge 2016, eq. 4).

    Args:
        x: (B, C, *S), values of `levels` equally spaced numbers in [-1, 1].
        levels: ≥ 2.
        seed: of the noise, in [0, 2^64).
        images: key of each row; 0 to B − 1 by default.
        draw: another number is independent noise.
    """
    if levels < 2:
        raise BadArgument(f"dequantise levels: got {levels}, need at least 2")
    keys = range(len(x)) if images is None else images
    rows = [generator(seed, i, _DEQUANTISE + draw).random(tuple(x.shape[1:])) - 0.5 for i in keys]
    return (x.double() + 2 / (levels - 1) * torch.from_numpy(np.stack(rows)).to(x.device)).to(x.dtype)


@torch.no_grad()
def nll(
    denoiser: Answerer,
    x: Tensor,
    grid: Grid,
    *,
    trace: Trace = "rademacher",
    probes: int | None = None,
    method: Method = "rk4",
    cond: Cond | None = None,
    seed: int = 0,
    images: Sequence[int] | None = None,
    draw: int = 0,
    on_ask: Callable[[], None] | None = None,
) -> NLL:
    """−log2 p(x)/D of the probability flow, at the grid's least noisy level: see above.

    Cost: 4 asks a step (rk4, order 4) or 2 (heun, order 2), for the n − 1 steps between n noisy levels. An ask is one
    call of the net forwards and as many backwards as there are probes, D for the exact trace.

    Args:
        denoiser: answers for the bare model: no guidance and no clipping, which belong to sampling.
        x: points (B, C, *S) at the least noisy level of the grid; float32 for nets.
        grid: at least 2 noisy levels; a clean end is left out.
        trace: how probes are drawn, ±1 or unit normal (the first has less variance), or exact.
        probes: K ≥ 1, 1 by default; not with the exact trace.
        method: of integration, in u.
        cond: what the net is told besides, one row a point.
        seed: of the probes, in [0, 2^64).
        images: key of each row; 0 to B − 1 by default.
        draw: another number is independent probes, < 2^20.
        on_ask: called after each answer.

    Raises:
        BadArgument: a knob outside its values, or a grid of fewer than 2 noisy levels.
        Diverged: a value is not finite.
    """
    levels = [level for level in grid if not level.clean][::-1]
    _check(levels, trace, probes, method)
    vectors = _vectors(x, trace, probes or 1, seed, range(len(x)) if images is None else images, draw)
    slope, step = _slope(denoiser, cond, vectors, trace == "exact", on_ask), _rk4 if method == "rk4" else _heun
    z, gained = x / _size(levels[0]), torch.zeros((), dtype=torch.float64)
    for low, high in pairwise(levels):
        up, div = step(slope, z, grid, low, high)
        z, gained = z + up, gained + div
    end, dim = _size(levels[-1]) * z, x[0].numel()
    log_p = _start(end, grid) + gained + dim * (_size(levels[-1]) / _size(levels[0])).log()
    if not bool(torch.isfinite(log_p).all()):
        raise Diverged("nll: a value is not finite; try more steps, or a noisier starting level")
    return NLL(-log_p / (dim * math.log(2)), end)


Slope = Callable[[Tensor, Level], tuple[Tensor, Tensor]]


def _check(levels: Sequence[Level], trace: str, probes: int | None, method: str) -> None:
    if len(levels) < 2:
        raise BadArgument(f"nll: got a grid of {len(levels)} noisy level(s), need at least 2; try 50 steps")
    if trace not in ("rademacher", "gaussian", "exact"):
        raise BadArgument(f"nll trace: got {trace!r}, need rademacher, gaussian or exact")
    if method not in _ASKS:
        raise BadArgument(f"nll method: got {method!r}, need rk4 or heun")
    if probes is not None and trace == "exact":
        raise BadArgument(f"nll probes: got {probes}, but the exact trace has none; leave it out")
    if probes is not None and not 1 <= probes < 2**20:
        raise BadArgument(f"nll probes: got {probes}, need at least 1")


def _vectors(x: Tensor, trace: Trace, probes: int, seed: int, images: Sequence[int], draw: int) -> list[Tensor]:
    """K random probes of x's shape, or the D unit vectors."""
    if trace == "exact":
        unit = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        return [row.view(x.shape[1:]).expand_as(x) for row in unit]
    first = _PROBES + (draw << 20)
    found = [normal(x.shape, seed, images, first + k).to(x.device, x.dtype) for k in range(probes)]
    return [torch.where(g < 0, -1.0, 1.0).to(x.dtype) for g in found] if trace == "rademacher" else found


def _slope(
    denoiser: Answerer, cond: Cond | None, vectors: list[Tensor], exact: bool, on_ask: Callable[[], None] | None
) -> Slope:
    """f(z, level) = (dz/du, div), of shapes (B, C, *S) and (K, B): one ask, and a derivative for each vector."""

    def slope(z: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        scale = _size(level)
        belief = denoiser(Ask(scale * z, level, cond, pull=True))
        pull = belief.pull
        if pull is None:
            raise BadArgument("nll: this model's answers carry no derivative (pull), so its flow has no likelihood")
        parts = torch.stack([_rows(g * (g - scale * pull(g))) for g in vectors])
        if on_ask is not None:
            on_ask()
        return belief.eps - belief.x0, scale / level.sigma * (parts.sum(0, True) if exact else parts)

    return slope


def _rows(each: Tensor) -> Tensor:
    """The sum over the dimensions of each row, (B,) float64."""
    return each.flatten(1).sum(1, dtype=torch.float64)


def _size(level: Level) -> Tensor:
    return level.alpha + level.sigma


def _u(level: Level) -> Tensor:
    return level.sigma / (level.alpha + level.sigma)


def _start(x: Tensor, grid: Grid) -> Tensor:
    """log N(x; 0, s²) in nats, (B,), s what the schedule starts sampling with."""
    std = grid.schedule.start(torch.ones((), dtype=torch.float64))
    return -0.5 * _rows((x.double() / std) ** 2) - x[0].numel() * (std.log() + 0.5 * math.log(2 * math.pi))


def _heun(slope: Slope, z: Tensor, grid: Grid, low: Level, high: Level) -> tuple[Tensor, Tensor]:
    """The increments of (z, ∫div) by the explicit trapezoid."""
    h = _u(high) - _u(low)
    first = slope(z, low)
    second = slope(z + h * first[0], high)
    return 0.5 * h * (first[0] + second[0]), 0.5 * h * (first[1] + second[1])


def _rk4(slope: Slope, z: Tensor, grid: Grid, low: Level, high: Level) -> tuple[Tensor, Tensor]:
    """The increments of (z, ∫div) by the classical Runge–Kutta method, its middle halfway in u."""
    h, u = _u(high) - _u(low), 0.5 * (_u(low) + _u(high))
    middle = grid.at(((1 - u) / u).log())
    a = slope(z, low)
    b = slope(z + 0.5 * h * a[0], middle)
    c = slope(z + 0.5 * h * b[0], middle)
    d = slope(z + h * c[0], high)
    mean = [
        (first + 2 * second + 2 * third + fourth) / 6 for first, second, third, fourth in zip(a, b, c, d, strict=True)
    ]
    return h * mean[0], h * mean[1]
