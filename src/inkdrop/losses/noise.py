"""Noise: what is added to clean data while training, and what of it the net is to predict."""

from __future__ import annotations

from torch import Tensor

from inkdrop.core.noise import Draw
from inkdrop.errors import BadArgument

__all__ = ["noises"]


def noises(draw: Draw, x0: Tensor, *, offset: float = 0.0, perturb: float = 0.0) -> tuple[Tensor, Tensor]:
    """The noise that the target is made of, and that of the net's input.

    eps = white + offset·n, n one unit normal number a channel: covariance I + offset²·11ᵀ within a channel of a row
    (Guttenberg 2023). The input hears eps + perturb·xi, xi white: variance 1 + perturb² (Ning et al. 2023, DDPM-IP).

    n and xi are the next numbers of the row's own stream: white noise is the same with and without them.

    Args:
        draw: the randomness of this batch.
        x0: (B, C, *S), whose shape, dtype and device they have.
        offset: ≥ 0.
        perturb: gamma, ≥ 0.

    Returns:
        (eps, heard), each (B, C, *S); the same tensor if nothing is perturbed.

    Raises:
        BadArgument: a negative deviation.
    """
    for what, got in (("offset", offset), ("perturb", perturb)):
        if not got >= 0:
            raise BadArgument(f"loss {what}: got {got:g}, need at least 0; try 0.1, or 0 for none")
    rows, channels, size = len(x0), x0.shape[1], x0[0].numel()
    more = size if perturb else 0
    drawn = draw.normal((rows, size + channels + more), x0.dtype).to(x0.device)
    white, one, xi = drawn.split((size, channels, more), dim=1)
    eps = white.reshape(x0.shape)
    if offset:
        eps = eps + offset * one.reshape(rows, channels, *(1,) * (x0.ndim - 2))
    return eps, eps + perturb * xi.reshape(x0.shape) if perturb else eps
