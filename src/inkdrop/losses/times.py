"""Times: which noise levels a loss is trained at, each a map of uniform numbers u in [0, 1) to times. Found by name.

t rises with u, so that u spread evenly, or drawn more often where the loss is large, is so in the quantiles of these
times. All are whole entries of a table; on a continuous schedule they have the density that their paper states, cut
off at the schedule's ends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inkdrop.core.schedule import Schedule
from inkdrop.errors import BadArgument

__all__ = ["logit_normal", "lognormal", "loguniform", "uniform"]


def uniform(u: Tensor, schedule: Schedule) -> Tensor:
    """Uniform over the noisy times, (B,) as u (Ho et al. 2020, algorithm 1)."""
    return schedule.pick(u)


def logit_normal(u: Tensor, schedule: Schedule, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """log(t/(1 − t)) ~ N(mean, std²): mostly the middle of the way (Esser et al. 2024, eq. 19).

    Args:
        u: (B,).
        schedule: whose times; the paper's is `flow`.
        mean: of the logit; > 0 draws noisier levels.
        std: of the logit, > 0.
    """
    _positive("logit_normal std", std)
    ends = torch.tensor([schedule.least, 1.0], dtype=torch.float64).logit()
    return _entries((mean + std * _normal(u, (ends - mean) / std)).sigmoid(), schedule)


def lognormal(u: Tensor, schedule: Schedule, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """log rho ~ N(mean, std²), rho = sigma/alpha: EDM's levels (Karras et al. 2022, table 1).

    Args:
        u: (B,).
        schedule: whose levels; the paper's is `edm`.
        mean: of log rho.
        std: of log rho, > 0.
    """
    _positive("lognormal std", std)
    ends = -_lams(schedule)
    return _entries(schedule.time_of(-(mean + std * _normal(u, (ends - mean) / std))), schedule)


def loguniform(u: Tensor, schedule: Schedule, *, levels: int | None = None) -> Tensor:
    """lam uniform between the schedule's ends, so rho is geometric: NCSN's levels (Song & Ermon 2019, section 4.2).

    Args:
        u: (B,).
        schedule: whose levels; NCSN's is `edm`, where rho is sigma.
        levels: L ≥ 2, for the L levels rho_i = rho_1·q^{i−1} of NCSN; None for all between the ends.

    Raises:
        BadArgument: fewer than 2 levels, or a schedule that ends without signal (zero terminal SNR).
    """
    high, low = _lams(schedule)
    if math.isinf(low):
        raise BadArgument("loguniform times: the schedule ends without signal, at lam = -inf; try times uniform")
    if levels is not None:
        if levels < 2:
            raise BadArgument(f"loguniform levels: got {levels}, need at least 2, or None for all; try 10")
        u = (u * levels).floor().clamp(max=levels - 1) / (levels - 1)
    return _entries(schedule.time_of(high + u.double() * (low - high)), schedule)


def _lams(schedule: Schedule) -> Tensor:
    """(2,): lam at the least time and at t = 1."""
    return schedule(torch.tensor([schedule.least, 1.0], dtype=torch.float64)).lam


def _normal(u: Tensor, ends: Tensor) -> Tensor:
    """The quantiles at u of N(0, 1) between two ends, (B,) float64."""
    low, high = torch.special.ndtr(ends)
    if not high > low:
        raise BadArgument("times: the schedule has no level near this mean; choose one between its ends")
    z: Tensor = torch.special.ndtri(low + u.double() * (high - low))
    return z.clamp(*ends)


def _entries(t: Tensor, schedule: Schedule) -> Tensor:
    """These times where the schedule is continuous; the entries of a table, each for an equal share of [1/T, 1]."""
    return schedule.pick((t - schedule.least) / max(1 - schedule.least, 1e-9))


def _positive(what: str, got: float) -> None:
    if not 0 < got < math.inf:
        raise BadArgument(f"{what}: got {got:g}, need a positive finite number; try 1")
