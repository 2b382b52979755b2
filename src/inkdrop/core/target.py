"""Targets: what a net predicts, as the two coefficients of y = p·x0 + q·eps.

With det = alpha·q − sigma·p the prediction is turned back by

    x0  = (q·x − sigma·y)/det,    eps = (alpha·y − p·x)/det,

and an error δy of the net is an error |δx0|² = (sigma/det)²·|δy|². Nothing else in the house asks which target it is.
Public functions here build targets and are found by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from inkdrop.core.level import Level
from inkdrop.core.posterior import mean_coefficients
from inkdrop.core.schedule import Schedule
from inkdrop.errors import BadArgument

__all__ = ["Target", "edm", "eps", "flow", "mu", "score", "v", "x0"]


class Target(NamedTuple):
    """A parameterisation y = p(level)·x0 + q(level)·eps.

    Attributes:
        name: for messages.
        p: level -> coefficient of x0; the shape of level.alpha.
        q: level -> coefficient of eps; the shape of level.alpha.
    """

    name: str
    p: Callable[[Level], Tensor]
    q: Callable[[Level], Tensor]

    def det(self, level: Level) -> Tensor:
        """alpha·q − sigma·p: zero where x and y do not determine x0 and eps."""
        return level.alpha * self.q(level) - level.sigma * self.p(level)

    def make(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """What the net should say, y = p·x0 + q·eps, (B, C, *S) from (B, C, *S) twice."""
        p = level._replace(alpha=self.p(level), sigma=self.q(level)).over(x0)
        return p.alpha * x0 + p.sigma * eps

    def coefficients(self, level: Level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, c, d) with x0 = a·x + b·y and eps = c·x + d·y, in float64, the shape of level.alpha."""
        det, p, q = self.det(level), self.p(level), self.q(level)
        return q / det, -level.sigma / det, -p / det, level.alpha / det

    def split(self, x: Tensor, y: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """(x0, eps) from the state x and the prediction y, each (B, C, *S): the inverse of make."""
        a, b, c, d = self.coefficients(level)
        to_x0, to_eps = level._replace(alpha=a, sigma=b).over(x), level._replace(alpha=c, sigma=d).over(x)
        return to_x0.alpha * x + to_x0.sigma * y, to_eps.alpha * x + to_eps.sigma * y

    def weight_from_x0(self, level: Level) -> Tensor:
        """(det/sigma)²: |δy|² = this · |δx0|². A loss weight on |δy|² is w/this for a weight w on |δx0|²."""
        return (self.det(level) / level.sigma) ** 2

    def check(self, schedule: Schedule) -> None:
        """Refuse a schedule at whose end this target cannot be inverted.

        Raises:
            BadArgument: det(1) = 0, as for eps and score at zero terminal SNR.
        """
        if float(self.det(schedule(1.0))) == 0:
            raise BadArgument(
                f"target {self.name}: cannot be inverted at t = 1, where the schedule has zero terminal SNR "
                "(alpha = 0); try target v, x0 or flow"
            )


def _zero(level: Level) -> Tensor:
    return torch.zeros_like(level.alpha)


def _one(level: Level) -> Tensor:
    return torch.ones_like(level.alpha)


def eps() -> Target:
    """The noise: y = eps (Ho et al. 2020, eq. 14). Refused at zero terminal SNR."""
    return Target("eps", _zero, _one)


def x0() -> Target:
    """The clean signal: y = x0."""
    return Target("x0", _one, _zero)


def v() -> Target:
    """The velocity: y = alpha·eps − sigma·x0 (Salimans & Ho 2022, section 4)."""
    return Target("v", lambda level: -level.sigma, lambda level: level.alpha)


def score() -> Target:
    """The score: y = ∇ log p(x_t) = −eps/sigma (Song et al. 2021, eq. 7). Refused at zero terminal SNR."""
    return Target("score", _zero, lambda level: -1 / level.sigma)


def flow() -> Target:
    """The flow: y = eps − x0, dx/dt on the straight path (Lipman et al. 2023; Liu et al. 2023)."""
    return Target("flow", lambda level: -_one(level), _one)


def edm(*, sd: float = 0.5) -> Target:
    """EDM's preconditioned output F: p = sigma/(sd·r), q = −alpha·sd/r, r = √(sigma² + alpha²·sd²).

    With alpha = 1 this is Karras et al. 2022, eq. 7 and table 1; at sd = 1 on a variance-preserving schedule it is −v.

    Args:
        sd: the standard deviation of the data, > 0.
    """
    if not sd > 0:
        raise BadArgument(f"edm sd: got {sd:g}, need a positive number; try 0.5, the deviation of your data")

    def root(level: Level) -> Tensor:
        return (level.sigma**2 + (level.alpha * sd) ** 2).sqrt()

    return Target("edm", lambda lv: lv.sigma / (sd * root(lv)), lambda lv: -lv.alpha * sd / root(lv))


def mu(schedule: Schedule) -> Target:
    """The mean of the posterior one table step down: y = c0·x0 + ct·x (Ho et al. 2020, eq. 7).

    Args:
        schedule: gives the previous level t − 1/T, with which p = c0 + ct·alpha and q = ct·sigma.
    """

    def means(level: Level) -> tuple[Tensor, Tensor]:
        below = (level.t - 1 / schedule.steps).clamp(min=0)
        below = torch.where(below < schedule.least * (1 - 1e-6), torch.zeros_like(below), below)
        return mean_coefficients(level, schedule(below))

    def p(level: Level) -> Tensor:
        c0, ct = means(level)
        return c0 + ct * level.alpha

    def q(level: Level) -> Tensor:
        return means(level)[1] * level.sigma

    return Target("mu", p, q)
