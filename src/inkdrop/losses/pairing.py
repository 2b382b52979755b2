"""Pairing: which noise of a batch goes with which data.

With independent noise the straight paths from noise to data cross, and the flow that follows their mean is bent. If
each batch is matched by optimal transport, paths cross less, and the flow needs fewer steps (Pooladian et al. 2023;
Tong et al. 2024, OT-CFM). The marginals of data and of noise stay as they are, but x_t given x0 is no longer Gaussian:
sample what was trained so by an ODE solver (euler, heun, rk45), and not with fresh noise. A pairing is of the rows at
hand, so it changes with the size of a micro-batch and with the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inkdrop.errors import MissingExtra

__all__ = ["optimal"]


def optimal(x0: Tensor, eps: Tensor) -> Tensor:
    """The permutation that makes Σ_i |x0_i − eps_{row_i}|² least, exactly.

    Cost: B²·D multiplications and O(B³), a few milliseconds at B = 128, on the CPU.

    Args:
        x0: (B, C, *S).
        eps: of the same shape.

    Returns:
        row: (B,) int64: row i goes with eps[row[i]].

    Raises:
        MissingExtra: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtra("loss pairing optimal", "scipy", "eval") from None

    alike = x0.detach().double().flatten(1) @ eps.double().flatten(1).T  # Σ|x0|² + Σ|eps|² are the same for all
    _, row = linear_sum_assignment(alike.cpu().numpy(), maximize=True)
    return torch.as_tensor(row, device=x0.device)
