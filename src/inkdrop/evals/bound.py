"""Bound: the variational bound on the negative log-likelihood, term by term, in bits a dimension.

    −log p(x0) ≤ KL(q(x_T|x0) ‖ p(x_T)) + Σ E KL(q(x_s|x_t, x0) ‖ p(x_s|x_t)) − E log p(x0|x_1)

is of the chain that DDPM samples (Ho et al. 2020, eq. 5): p(x_s|x_t) = N(c0·x0' + ct·x_t, var), x0' the denoiser's
answer.

- Every KL is between two Gaussians, and exact. The expectations over x_t ~ q(x_t|x0) are taken by one draw a term,
  keyed by (seed, image, term): the mean over images is unbiased.
- The prior p(x_T) is what sampling starts from: N(0, 1), or N(0, sigma(1)²) where the schedule does not preserve the
  variance.
- Into clean the decoder is a Gaussian of mean x0', integrated over the bin of each value where the data are discrete
  (eq. 13). Its variance is sigma² of the last noisy level for "beta". For "beta-tilde", whose own is 0 there, it is
  that of the step before (Nichol & Dhariwal 2021, their code).
- With the T steps of a table it is the bound of the whole model; with fewer, that of the shorter chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from inkdrop.core.ask import Ask
from inkdrop.core.cond import Cond
from inkdrop.core.forward import diffuse
from inkdrop.core.grid import Grid
from inkdrop.core.noise import normal
from inkdrop.core.posterior import kl_normal
from inkdrop.core.variational import Choice, step_bits, step_variance
from inkdrop.drive import Answerer
from inkdrop.errors import BadArgument, Diverged

__all__ = ["Bound", "Choice", "bound"]


class Bound(NamedTuple):
    """The terms of the bound for B images on a grid of n steps, float64, in bits a dimension.

    Attributes:
        prior: (B,), KL(q(x_T | x0) ‖ N(0, s²)), ≥ 0.
        steps: (n − 1, B), the L_t of every step into a noisy level, in the order of the grid, each ≥ 0.
        decoder: (B,), −log2 p(x0 | x_1) of the last step, into clean; ≥ 0 for discrete data.
        x0_mse: (n, B), the mean over dimensions of (x0 − expected x0)² at every level asked about.
        eps_mse: (n, B), the same of eps; (alpha/sigma)² times x0_mse, where x0 was not clipped.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor
    x0_mse: Tensor
    eps_mse: Tensor

    @property
    def total(self) -> Tensor:
        """(B,): the sum of all terms, an upper bound on −log2 p(x0)/D in expectation over the noise."""
        return self.prior + self.steps.sum(0) + self.decoder


@torch.no_grad()
def bound(
    denoiser: Answerer,
    x0: Tensor,
    grid: Grid,
    *,
    levels: int | None,
    variance: Choice = "beta",
    clip: bool = False,
    cond: Cond | None = None,
    seed: int = 0,
    images: Sequence[int] | None = None,
    on_ask: Callable[[], None] | None = None,
) -> Bound:
    """The variational bound of x0 by the chain on this grid, term by term: see above.

    Cost: one ask a step, n in all.

    Args:
        denoiser: answers for the bare model: no guidance, which belongs to sampling.
        x0: clean data (B, C, *S) in [-1, 1]; float32 for nets.
        grid: of n steps, ending clean.
        levels: how many equally spaced values a channel takes, ≥ 2; None for continuous data, whose bound is on the
            density and can be negative.
        variance: of the chain's steps: beta, beta-tilde, or learned, by the net's fraction between their logarithms.
        clip: bring the net's x0 into [-1, 1] first, where the data lie: the bound of the chain that samples so, and how
            bits a dimension are published (Nichol & Dhariwal 2021, their code). Never worse with a fixed variance.
        cond: what the net is told besides, one row an image.
        seed: of the noise, in [0, 2^64).
        images: key of each row's noise; 0 to B − 1 by default.
        on_ask: called after each answer.

    Raises:
        BadArgument: a grid that does not end clean, another variance, a learned one that the net does not have.
        Diverged: a term is not finite.
    """
    _check(grid, variance, levels)
    keys, exact = range(len(x0)) if images is None else images, x0.double()
    steps, x0_mse, eps_mse = list[Tensor](), list[Tensor](), list[Tensor]()
    decoder = exact.new_zeros(len(x0))
    for i, (now, nxt) in enumerate(pairwise(grid)):
        eps = normal(x0.shape, seed, keys, i).to(x0.device, x0.dtype)
        belief = denoiser(Ask(diffuse(x0, eps, now), now, cond))
        expected = (belief.x0.clamp(-1, 1) if clip else belief.x0).double()
        var = step_variance(grid[i - 1], now, nxt, variance, belief.var_frac)
        bits = _rows(step_bits(exact, expected, var, now, nxt, levels))
        if nxt.clean:
            decoder = bits
        else:
            steps.append(bits)
        x0_mse.append(_rows((expected - exact) ** 2))
        eps_mse.append(_rows((belief.eps.double() - eps.double()) ** 2))
        if on_ask is not None:
            on_ask()
    middle = torch.stack(steps) if steps else exact.new_zeros(0, len(x0))
    found = Bound(_prior(exact, grid), middle, decoder, torch.stack(x0_mse), torch.stack(eps_mse))
    if not bool(torch.isfinite(found.total).all()):
        raise Diverged("bound: a term is not finite; the net's answers are not, or its data lie far outside [-1, 1]")
    return found


def _check(grid: Grid, variance: str, levels: int | None) -> None:
    if len(grid) < 2 or not grid[-1].clean:
        raise BadArgument("bound: the grid must end clean, where the decoder's term is; use one from a grid builder")
    if variance not in ("beta", "beta-tilde", "learned"):
        raise BadArgument(f"bound variance: got {variance!r}, need beta, beta-tilde or learned")
    if variance != "beta" and len(grid) < 3:
        raise BadArgument(f"bound variance: got {variance!r}, but one step has no beta-tilde; use beta, or 2 steps")
    if levels is not None and levels < 2:
        raise BadArgument(f"bound levels: got {levels}, need at least 2, or None for continuous data")


def _rows(each: Tensor) -> Tensor:
    """The mean over the dimensions of each row, (B,)."""
    return each.flatten(1).mean(1)


def _prior(x0: Tensor, grid: Grid) -> Tensor:
    """KL(N(alpha·x0, sigma²) ‖ N(0, s²)) in bits a dimension, (B,), s what the schedule starts sampling with."""
    first, std = grid[0], grid.schedule.start(torch.ones((), dtype=torch.float64))
    return _rows(kl_normal(first.alpha * x0, first.sigma**2, torch.zeros_like(x0), std**2))
