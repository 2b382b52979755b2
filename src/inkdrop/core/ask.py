"""What samplers say: questions (Ask), answers (Belief), and the generator protocol between them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

from torch import Tensor

from inkdrop.core.cond import Cond
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level

__all__ = ["Ask", "Belief", "Noise", "Sampler", "Sampling", "given", "relay", "revise"]


class Ask(NamedTuple):
    """A question: what is the clean signal under x at this noise level?

    Attributes:
        x: the noisy state, (B, C, *S).
        level: the noise level of x; 0-dim fields, or (B,) after a batcher stacked several questions.
        cond: what the net is told besides, or None.
        of: which part of the bundle answers ("net", "weak", "classifier", "decode", "stage2").
        to: the second level that flow-map students are asked about, or None.
        pull: whether the answer must carry the vector-Jacobian product of x0 by x.
    """

    x: Tensor
    level: Level
    cond: Cond | None = None
    of: str = "net"
    to: Level | None = None
    pull: bool = False


class Belief(NamedTuple):
    """An answer about the asker's x: alpha·x0 + sigma·eps == ask.x.

    Attributes:
        x0: the expected clean signal, (B, C, *S).
        eps: the expected noise, (B, C, *S).
        var_frac: learned variance as the fraction v in [0, 1] between log beta-tilde (0) and log beta (1),
            (B, C, *S), or None.
        pull: g (B, C, *S) -> (d x0 / d x)^T g, or None unless it was asked for.
    """

    x0: Tensor
    eps: Tensor
    var_frac: Tensor | None = None
    pull: Callable[[Tensor], Tensor] | None = None


Sampling: TypeAlias = Generator[Ask, Belief, Tensor]
"""A sampler at work: yields questions, is sent answers, returns the final x."""

Noise: TypeAlias = Callable[[Tensor, Level, Level], Tensor]
"""f(x, now, nxt): standard normal noise of x's shape for the step from one level to the next."""

Sampler: TypeAlias = Callable[[Tensor, Grid, Noise], Sampling]
"""f(x, grid, noise): a sampler with its knobs filled in, x at grid[0]."""


def relay(sampling: Sampling, before: Callable[[Ask], Ask], after: Callable[[Ask, Belief], Belief]) -> Sampling:
    """Rewrite every question and every answer of a sampling: what most middleware is made of.

    Args:
        sampling: the generator to wrap.
        before: rewrites a question on its way to the net.
        after: rewrites the answer on its way back, given the *original* question.
    """
    try:
        ask = next(sampling)
        while True:
            ask = sampling.send(after(ask, (yield before(ask))))
    except StopIteration as end:
        result: Tensor = end.value
        return result


def given(sampling: Sampling, cond: Cond | None) -> Sampling:
    """Give every question of a sampling this condition; the innermost middleware."""
    return sampling if cond is None else relay(sampling, lambda ask: ask._replace(cond=cond), lambda _, belief: belief)


def revise(ask: Ask, belief: Belief, x0: Tensor) -> Belief:
    """The belief with another x0, and the eps = (x − alpha·x0)/sigma that agrees with it; var_frac is kept."""
    level = ask.level.over(ask.x)
    return belief._replace(x0=x0, eps=(ask.x - level.alpha * x0) / level.sigma)
