"""Linear inverse problems: from measurements y = A·x0 + noise back to data (DDNM, pseudo-inverse guidance).

Both take p(x0 | x_t) for a Gaussian around the net's x0 with variance r² = sd²·sigma²/(alpha²·sd² + sigma²), which is
that of data N(m, sd²·I), and make the belief E[x0 | x_t, y]: for such data they are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, relay, revise
from inkdrop.edit.operators import Operator
from inkdrop.errors import BadArgument, BadShape

__all__ = ["ddnm", "pigdm"]


def _check(measured: Tensor, operator: Operator, noise: float, sd: float) -> None:
    if tuple(measured.shape[1:]) != operator.shape:
        raise BadShape(
            f"restore: got measurements of shape {tuple(measured.shape[1:])}, need {operator.shape} of this operator"
        )
    if not 0 <= noise < math.inf:
        raise BadArgument(f"restore noise: got {noise:g}, need a standard deviation of at least 0")
    if not 0 < sd < math.inf:
        raise BadArgument(f"restore sd: got {sd:g}, need a positive standard deviation; try 0.5")


def _spread(ask: Ask, sd: float) -> Tensor:
    """r², the variance of x0 given x_t: 0-dim, or (B, 1, ...)."""
    level = ask.level.over(ask.x)
    return sd**2 * level.sigma**2 / (level.alpha**2 * sd**2 + level.sigma**2)


def _pulled_in(belief: Belief, measured: Tensor, operator: Operator, spread: Tensor, noise: float) -> Tensor:
    """Aᵀ·(r²·A·Aᵀ + noise²·I)⁻¹·(y − A·x0): the gradient of log N(y; A·x0, ...) by x0."""
    gap = measured - operator.apply(belief.x0)
    return operator.transpose(operator.solve(gap, spread, noise**2))


def ddnm(sampling: Sampling, measured: Tensor, operator: Operator, *, noise: float = 0.0, sd: float = 0.5) -> Sampling:
    """Replacement: x0 ← x0 + A⁺·(y − A·x0), so that the belief measures y (DDNM: Wang et al. 2023, eq. 13).

    With noise it goes as far as y is to be trusted: x0 ← x0 + r²·Aᵀ·(r²·A·Aᵀ + noise²·I)⁻¹·(y − A·x0), a proximal step
    (DiffPIR: Zhu et al. 2023). What y does not measure is left to the net. Without noise every sampler ends at A·x = y.
    Cost: none.

    Args:
        sampling: what to wrap.
        measured: y, (B, *operator.shape).
        operator: A.
        noise: standard deviation of the measurements' noise, ≥ 0.
        sd: of the data, > 0; only matters where there is noise.

    Raises:
        BadShape: the measurements are not of the operator's shape.
        BadArgument: a knob outside its range.
    """
    _check(measured, operator, noise, sd)

    def after(ask: Ask, belief: Belief) -> Belief:
        spread = _spread(ask, sd)
        move = spread * _pulled_in(belief, measured, operator, spread, noise)
        return revise(ask, belief, belief.x0 + move)._replace(pull=None)

    return relay(sampling, lambda ask: ask, after)


def pigdm(
    sampling: Sampling,
    measured: Tensor,
    operator: Operator,
    *,
    noise: float = 0.0,
    sd: float = 0.5,
    scale: float = 1.0,
    onset: float = 0.05,
) -> Sampling:
    """Pseudo-inverse guidance: x0 ← x0 + scale·(sigma²/alpha)·Jᵀ·g, J = ∂x0/∂x (ΠGDM: Song et al. 2023, eq. 7).

    g = Aᵀ·(r²·A·Aᵀ + noise²·I)⁻¹·(y − A·x0), so Jᵀ·g is the gradient of log p(y | x_t) by x_t, and sigma²/alpha turns
    a score into an x0. (sigma²/alpha)·J is the covariance of x0 given x_t, as the net knows it: what y says of one
    pixel moves the others that go with it, which replacement leaves alone. Where alpha/sigma < onset that product of a
    large number and a net's small derivative is mostly the net's error, and r² stands for it, as in `ddnm`.
    Cost: from the onset on a question asks for the net's derivative too, about three times an ask.

    Args:
        sampling: what to wrap.
        measured: y, (B, *operator.shape).
        operator: A.
        noise: standard deviation of the measurements' noise, ≥ 0.
        sd: of the data, > 0.
        scale: how strong, > 0; 1 is Bayes' rule.
        onset: the signal-to-noise ratio alpha/sigma from which the derivative is used, > 0.

    Raises:
        BadShape: the measurements are not of the operator's shape.
        BadArgument: a knob outside its range, or the net's answer has no derivative.
    """
    _check(measured, operator, noise, sd)
    for what, number in (("scale", scale), ("onset", onset)):
        if not 0 < number < math.inf:
            raise BadArgument(f"pigdm {what}: got {number:g}, need a positive finite number")

    def early(ask: Ask) -> Tensor:
        level = ask.level.over(ask.x)
        return level.alpha < onset * level.sigma

    def after(ask: Ask, belief: Belief) -> Belief:
        spread = _spread(ask, sd)
        gap = _pulled_in(belief, measured, operator, spread, noise)
        move = spread * gap
        if not bool(early(ask).all()):
            if belief.pull is None:
                raise BadArgument("pigdm: the answer has no derivative (pull); try ddnm, which needs none")
            level = ask.level.over(ask.x)
            gain = level.sigma**2 / torch.where(early(ask), 1, level.alpha)
            move = torch.where(early(ask), move, gain * belief.pull(gap))
        return revise(ask, belief, belief.x0 + scale * move)._replace(pull=None)

    return relay(sampling, lambda ask: ask._replace(pull=not bool(early(ask).all())), after)
