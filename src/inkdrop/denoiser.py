"""Denoiser: a net, a schedule, a target and a clock, answering questions with beliefs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.clock import Clock, table
from inkdrop.core.scale import Scale, unit
from inkdrop.core.schedule import Schedule
from inkdrop.core.target import Target
from inkdrop.errors import BadArgument, BadShape

__all__ = ["Denoiser", "wrap"]


class Denoiser(nn.Module):
    """A net that answers questions: Ask (x, level, cond) -> Belief (x0, eps).

    The net is told scale_in·x and the clock's number, and says y; the target's coefficients, computed per row in
    float64 and cast to the state's dtype, turn it into x0 = a·x + b·y and eps = c·x + d·y. The state may be float32
    while the net is of another dtype.

    Args:
        net: (B, C, *S), (B,), Cond | None -> (B, C or 2C, *S); a second half is the raw learned variance in [-1, 1].
        schedule: whose levels will be asked about.
        target: what the net predicts.
        clock: what the net is told about time; DDPM's timestep by default.
        scale_in: the factor on its input; 1 by default.

    Raises:
        BadArgument: the target cannot be inverted at the schedule's end.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        target: Target,
        clock: Clock | None = None,
        scale_in: Scale = unit,
    ) -> None:
        super().__init__()
        target.check(schedule)
        self.net, self.schedule, self.target = net, schedule, target
        self.clock: Clock = clock or (lambda level: table(level, steps=schedule.steps))
        self.scale_in = scale_in

    def forward(self, ask: Ask) -> Belief:
        """Answer a question.

        Args:
            ask: x (B, C, *S) and a level of 0-dim or (B,) fields; `to` must be None.

        Raises:
            BadArgument: a clean level, where there is nothing to ask, or a second level.
        """
        if ask.to is not None:
            raise BadArgument("ask: got a second level `to`, but this denoiser is not a flow map")
        if bool((ask.level.sigma == 0).any()):
            raise BadArgument(
                "ask: got the clean level (sigma = 0), where x is the answer; ask about noisy levels only"
            )
        if not ask.pull:
            return self._believe(ask, *self.predict(ask))
        with torch.enable_grad():
            x = ask.x.detach().requires_grad_()
            belief = self._believe(ask._replace(x=x), *self.predict(ask._replace(x=x)))
        return Belief(
            belief.x0.detach(),
            belief.eps.detach(),
            None if belief.var_frac is None else belief.var_frac.detach(),
            lambda g: torch.autograd.grad(belief.x0, x, g, retain_graph=True)[0],
        )

    def predict(self, ask: Ask) -> tuple[Tensor, Tensor | None]:
        """The net's own words (y, raw variance): y (B, C, *S) in the target's space, as losses want it.

        Raises:
            BadShape: the net's answer fits neither C nor 2C channels.
        """
        x, level = ask.x, ask.level.rows(len(ask.x)) if ask.level.alpha.ndim == 0 else ask.level
        dtype = next((p.dtype for p in self.net.parameters()), x.dtype)
        scale = self.scale_in(level).to(x.device, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        y = self.net((scale * x).to(dtype), self.clock(level).to(x.device, torch.float32), ask.cond).to(x.dtype)
        if y.shape == x.shape:
            return y, None
        if y.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
            first, second = y.chunk(2, dim=1)
            return first, second
        raise BadShape(f"net: got an answer of shape {tuple(y.shape)} for x of {tuple(x.shape)}, need C or 2C channels")

    def _believe(self, ask: Ask, y: Tensor, raw: Tensor | None) -> Belief:
        x0, eps = self.target.split(ask.x, y, ask.level)
        return Belief(x0, eps, None if raw is None else (raw + 1) / 2)


class _Foreign(nn.Module):
    """Anyone's network, called with as many of (x, clock, cond) as it takes."""

    def __init__(self, net: Callable[..., Any], takes: int) -> None:
        super().__init__()
        self.inner, self.takes = net, takes

    def forward(self, x: Tensor, clock: Tensor, cond: Any) -> Tensor:
        """The network's answer; a `.sample` field is unpacked, as diffusers' models return."""
        if cond is not None and self.takes < 3:
            raise BadArgument(
                "cond: got a condition, but the wrapped net takes only (x, time); wrap a net of three arguments"
            )
        answer = self.inner(*(x, clock, cond)[: self.takes])
        result: Tensor = getattr(answer, "sample", answer)
        return result


def wrap(
    net: Callable[..., Any],
    schedule: Schedule,
    target: Target,
    clock: Clock | None = None,
    scale_in: Scale = unit,
) -> Denoiser:
    """A Denoiser made of anyone's network.

    Args:
        net: a module or function of (x, time) or (x, time, cond); x (B, C, *S), time (B,) as `clock` tells it. It
            returns (B, C or 2C, *S), or something with such a `.sample`.
        schedule: with which it was trained.
        target: what it predicts.
        clock: what it is told about time; DDPM's timestep by default.
        scale_in: the factor on its input; 1 by default.

    Raises:
        BadArgument: it cannot be called with two or three arguments.
    """
    call = net.forward if isinstance(net, nn.Module) else net
    params = list(inspect.signature(call).parameters.values())
    many = any(p.kind is p.VAR_POSITIONAL for p in params)
    takes = 3 if many else min(3, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in params))
    if takes < 2:
        raise BadArgument(f"wrap: the net takes {takes} argument(s), need (x, time) or (x, time, cond)")
    return Denoiser(_Foreign(net, takes), schedule, target, clock, scale_in)
