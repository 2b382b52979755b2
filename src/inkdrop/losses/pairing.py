"""Pairing: which noise of a batch goes with which data.

With independent noise the straight paths from noise to data cross, and the flow that follows their mean is bent. If
each batch is matched by optimal transport, paths cross less, and the flow needs fewer steps (Pooladian et al. 2023;
Tong et al. 2024, OT-CFM). The marginals of data and of noise stay as they are, but x_t given x0 is no longer Gaussian:
sample what was trained so by an ODE solver (euler, heun, rk45), and not with fresh noise. A pairing is of the rows at
hand, so it changes with the size of a micro-batch and with the number of ranks.

A model that is told the class meets all noise with each class when it samples. Paired across classes, it would have
seen but a part of it with each, so only rows that are told the same are paired (Cheng & Schwing 2025, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, MissingExtra

__all__ = ["optimal"]


def optimal(x0: Tensor, eps: Tensor, cond: Cond | None = None) -> Tensor:
    """The permutation that makes Σ_i |x0_i − eps_{row_i}|² least, exactly, of those that keep rows to their class.

    Cost: B²·D multiplications and O(B³), a few milliseconds at B = 128, on the CPU.

    Args:
        x0: (B, C, *S).
        eps: of the same shape.
        cond: what the rows are told: nothing, or classes, of which null is one more.

    Returns:
        row: (B,) int64: row i goes with eps[row[i]].

    Raises:
        MissingExtra: scipy is not installed.
        BadArgument: something else than a class is told, in which hardly two rows are alike.
    """
    if others := [name for name in (() if cond is None else cond.told) if name != "label"]:
        raise BadArgument(
            f"loss pairing optimal: rows are told {', '.join(others)}, but only those told the same can be paired, so "
            "that need be nothing or the class; try pairing=independent"
        )
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtra("loss pairing optimal", "scipy", "eval") from None

    classes = torch.zeros(len(x0), dtype=torch.int64)
    if cond is not None and cond.label is not None:
        classes = cond.label.masked_fill(cond.null_rows("label"), -1).cpu()
    alike = (x0.detach().double().flatten(1) @ eps.double().flatten(1).T).cpu()  # Σ|x0|² + Σ|eps|² are the same for all
    row = torch.arange(len(x0))
    for kind in classes.unique():
        own = (classes == kind).nonzero()[:, 0]
        _, best = linear_sum_assignment(alike[own][:, own].numpy(), maximize=True)
        row[own] = own[torch.as_tensor(best)]
    return row.to(x0.device)
