"""PNDM: pseudo linear multistep methods (Liu et al. 2022), with the start of PLMS and with that of iPNDM."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from inkdrop.core.ask import Ask, Noise, Sampling
from inkdrop.core.grid import Grid
from inkdrop.samplers.heun import FAR
from inkdrop.samplers.lms import transfer

__all__ = ["ORDER", "ipndm", "plms"]

ORDER = 2

# Adams and Bashforth's weights for equal steps of the one, two or three earlier answers; this one's is 1 − their sum.
_ADAMS = ((), (-1 / 2,), (-16 / 12, 5 / 12), (-59 / 24, 37 / 24, -9 / 24))


def plms(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
    """PLMS: ddim's transfer of the Adams–Bashforth mean of the last four eps (Liu et al. 2022, eq. 9, 12, algorithm 2).

    x_s = alpha_s·(x_t/alpha_t + (rho_s − rho_t)·e) with e = (55·eps_t − 59·eps_1 + 37·eps_2 − 9·eps_3)/24. First comes
    a step of Heun's, e = (eps_t + eps_s)/2 with eps_s asked at the end of an Euler step, then two of two and of three
    weights: the start of Stable Diffusion and of diffusers' skip_prk_steps, for the paper's three Runge–Kutta steps.
    From rho > 1,000, where a mean of two eps says nothing of the step, and into clean the step is ddim's. Cost: one
    ask a step, and one more for Heun's.

    Order 2, as they prove, on grids of equal steps of any smooth time: four weights make e the mean of eps over *time*
    to fourth order, but the transfer wants the mean over rho, and the two differ by rho''/rho'·eps'·h²/12. That is an
    error of third order a step, and of second in all, however many weights there are.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order, at equal steps of time.
        noise: not used.
    """
    return (yield from _pseudo(x, grid, heun=True))


def ipndm(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
    """iPNDM: plms that starts with lower orders instead of an extra ask (Zhang & Chen 2023, "improved PNDM").

    The first three steps have one, two and three weights; from alpha = 0 and into clean the step is ddim's. Cost: one
    ask a step. Order 2, for the reason that plms gives.

    Args:
        x: (B, C, *S), at grid[0].
        grid: levels in falling order, at equal steps of time.
        noise: not used.
    """
    return (yield from _pseudo(x, grid, heun=False))


def _pseudo(x: Tensor, grid: Grid, heun: bool) -> Sampling:
    """The loop of both; with `heun`, the first step of finite length is Heun's."""
    past: list[Tensor] = []
    for now, nxt in pairwise(grid):
        belief = yield Ask(x, now)
        if nxt.clean or float(now.alpha) == 0 or (heun and float(now.rho) > FAR):
            x = transfer(belief, now, nxt)
            continue
        if heun and not past:
            ahead = yield Ask(transfer(belief, now, nxt), nxt)
            x = transfer(belief, now, nxt, [ahead.eps], [0.5])
        else:
            x = transfer(belief, now, nxt, past, _ADAMS[len(past)])
        past = [belief.eps, *past][:3]
    return x
