"""SDE variants of DPM-Solver++: exponential integrators of the reverse SDE in lam (Lu et al. 2022b, appendix).

With lam = log(alpha/sigma), h = lam' − lam > 0 and q = e^{−h} = rho'/rho, the reverse SDE with a share eta of its noise
has, over one step and in the data prediction x0(lam), the exact solution

    x' = sigma'/sigma·q^eta·x + alpha'·∫_0^h w(s)·x0(lam + s) ds + sigma'·√(1 − q^{2·eta})·z,

w(s) = (1 + eta)·e^{−(1 + eta)·(h − s)} and z unit normal. eta = 1 is the SDE, eta = 0 the probability flow, whose
solvers dpmpp_2s, dpmpp_2m and dpmpp_3m are then these. They differ in what they take for x0 between the levels. Where
x0 is constant they are exact, and with eta = 1 the noise adds up in SNR: the same Brownian path (core/brownian.py)
leads to the same state in any number of steps.

The stated weak order is that of the moments. It is 2 for all three: the noise inside a step moves x0 inside that step,
and a polynomial through the answers sees it only at the ends, which leaves the variance an error of order h³ a step,
however high the degree (the parabola's own is of order h⁴, so 3M falls faster until its steps are small). That past
answers know nothing of the newest noise costs no order: it acts on x0 one step late, and by one half more.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument

__all__ = ["NOISE", "ORDER", "dpmpp_2m_sde", "dpmpp_2s_sde", "dpmpp_3m_sde"]

ORDER = 2  # weak: of the moments
NOISE = "brownian"


class _Steps(NamedTuple):
    """The steps of a grid for constant x0: x' = keep·x + gain·x0 + std·z; a list of n floats each."""

    keep: list[float]
    gain: list[float]
    std: list[float]


def _steps(now: Level, nxt: Level, eta: float) -> _Steps:
    """keep = sigma'/sigma·q^eta, gain = alpha'·(1 − q^{1+eta}), std = sigma'·√(1 − q^{2·eta}); q = 0 from alpha = 0."""
    q = now.alpha * nxt.sigma / (nxt.alpha * now.sigma)
    keep, gain = nxt.sigma / now.sigma * q**eta, nxt.alpha * (1 - q ** (1 + eta))
    return _Steps(keep.tolist(), gain.tolist(), (nxt.sigma * (1 - q ** (2 * eta)).sqrt()).tolist())


def _check(sampler: str, eta: float) -> None:
    if not 0 <= eta <= 1:
        raise BadArgument(f"{sampler} eta: got {eta:g}, need a number in [0, 1]; 0 is the ODE, 1 the SDE")


def dpmpp_2s_sde(x: Tensor, grid: Grid, noise: Noise, *, eta: float = 1.0) -> Sampling:
    """SDE-DPM-Solver++(2S): x0 is that of the midpoint in lam, reached with noise (k-diffusion's dpmpp_sde, r = 1/2).

    u = the step for constant x0 from lam to (lam + lam')/2, with noise; then x' from x with x0(u), and with the noise
    of the first half carried on to lam' beside that of the second: together the Brownian increment of the whole step.
    k-diffusion's eta is another for 0 < eta < 1 (DDIM's share of beta-tilde).
    Cost: two asks a step; one into the clean level, and one from alpha = 0. Weak order 2.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order; their midpoints are asked about besides.
        noise: two unit normals a step if eta > 0, one from alpha = 0, none into the clean level.
        eta: the share of the SDE's noise, in [0, 1]; 0 is dpmpp_2s.
    """
    _check("dpmpp_2s_sde", eta)
    noisier, less_noisy = grid.intervals()
    low, high = noisier.lam, less_noisy.lam
    between = grid.at(torch.where(low.isinf(), low, (low + high) / 2))
    whole, first = _steps(noisier, less_noisy, eta), _steps(noisier, between, eta)
    second, middles = _steps(between, less_noisy, eta), [Level(*fields) for fields in zip(*between, strict=True)]
    for i, ((now, nxt), mid) in enumerate(zip(pairwise(grid), middles, strict=True)):
        x0 = (yield Ask(x, now)).x0
        if nxt.clean:
            return x0
        if now.alpha == 0:  # an infinite step, which has no middle, and in which noise replaces x
            x = (whole.keep[i] * x).add(x0, alpha=whole.gain[i])
            x = x.add(noise(x, now, nxt), alpha=whole.std[i]) if eta else x
            continue
        u, kept = (first.keep[i] * x).add(x0, alpha=first.gain[i]), whole.keep[i] * x
        if eta:
            early, late = first.std[i] * noise(x, now, mid), noise(x, mid, nxt)
            u, kept = u + early, kept.add(early, alpha=second.keep[i]).add(late, alpha=second.std[i])
        x = kept.add((yield Ask(u, mid)).x0, alpha=whole.gain[i])
    return x


def dpmpp_2m_sde(x: Tensor, grid: Grid, noise: Noise, *, eta: float = 1.0) -> Sampling:
    """SDE-DPM-Solver++(2M): x0 on the line through the last two answers, at half of the step (Lu et al. 2022b).

    D = x0 + h/(2·h_before)·(x0 − x0_before), and the step for constant D. The first step, and one after alpha = 0, is
    of first order: that of ddim, where eta is 0 or 1. Cost: one ask a step. Weak order 2.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: one unit normal a step if eta > 0, none into the clean level.
        eta: the share of the SDE's noise, in [0, 1]; 0 is dpmpp_2m.
    """
    _check("dpmpp_2m_sde", eta)
    keep, gain, std = _steps(*grid.intervals(), eta)
    lams, before = _lams(grid), None
    for i, (now, nxt) in enumerate(pairwise(grid)):
        x0 = (yield Ask(x, now)).x0
        if nxt.clean:
            return x0
        x = (keep[i] * x).add(x0, alpha=gain[i])
        if before is not None:
            ratio = (lams[i + 1] - lams[i]) / (lams[i] - lams[i - 1])  # 0 after an infinite step
            x = x.add(x0 - before, alpha=gain[i] * ratio / 2)
        if eta:
            x = x.add(noise(x, now, nxt), alpha=std[i])
        before = x0
    return x


def dpmpp_3m_sde(x: Tensor, grid: Grid, noise: Noise, *, eta: float = 1.0) -> Sampling:
    """SDE-DPM-Solver++(3M): x0 on the parabola through the last three answers, integrated exactly (k-diffusion).

    With the divided differences d1, d2 of the last answers over lam, x0(lam + s) is x0 + s·(d1 + h_before·d2) + s²·d2.
    The integrals of 1, s and s² are m0 = 1 − e^{−k}, h·m1 with m1 = 1 − m0/k, and h²·(1 − 2·m1/k), k = (1 + eta)·h.
    k-diffusion, and Lu et al.'s code for the ODE, take half of the last, with which eta = 0 has order 2 and not 3. The
    first steps, and those after alpha = 0, have fewer answers to use.
    Cost: one ask a step. Weak order 2; with eta = 0 order 3, of dpmpp_3m.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order.
        noise: one unit normal a step if eta > 0, none into the clean level.
        eta: the share of the SDE's noise, in [0, 1]; 0 is dpmpp_3m.
    """
    _check("dpmpp_3m_sde", eta)
    now, nxt = grid.intervals()
    keep, gain, std = _steps(now, nxt, eta)
    lams, line, parabola = _lams(grid), *_bends(now, nxt, eta)
    before: Tensor | None = None
    slope: Tensor | None = None
    for i, (now, nxt) in enumerate(pairwise(grid)):
        x0 = (yield Ask(x, now)).x0
        if nxt.clean:
            return x0
        x = (keep[i] * x).add(x0, alpha=gain[i])
        if before is not None:
            h = lams[i] - lams[i - 1]
            d1 = (x0 - before) / h
            x = x.add(d1, alpha=line[i])
            if slope is not None:
                x = x.add(d1 - slope, alpha=(line[i] * h + parabola[i]) / (lams[i] - lams[i - 2]))
            slope = d1
        if eta:
            x = x.add(noise(x, now, nxt), alpha=std[i])
        before = x0
    return x


def _bends(now: Level, nxt: Level, eta: float) -> tuple[list[float], list[float]]:
    """alpha'·∫_0^h w(s)·s ds and alpha'·∫_0^h w(s)·s² ds, w(s) = (1 + eta)·e^{−(1 + eta)·(h − s)}; n floats each."""
    h = nxt.lam - now.lam
    k = (1 + eta) * h
    first = 1 + torch.expm1(-k) / k
    return (nxt.alpha * h * first).tolist(), (nxt.alpha * h**2 * (1 - 2 * first / k)).tolist()


def _lams(grid: Grid) -> list[float]:
    """lam of each level; −∞ where alpha = 0, +∞ clean."""
    return [float(level.lam) for level in grid]
