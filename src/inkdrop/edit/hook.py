"""A hook: any function of one's own between the net and the sampler, at every question."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, relay, revise
from inkdrop.errors import BadShape

__all__ = ["See", "hook"]

See: TypeAlias = Callable[[Ask, Belief], Tensor | None]
"""(ask, belief) -> the x0 (B, C, *S) to go on with, or None to leave the belief as it is."""


def hook(sampling: Sampling, see: See) -> Sampling:
    """Show every question and its answer to a function, which may put another x0 in its place.

    eps is recomputed to agree. Cost: none.

    Args:
        sampling: what to wrap.
        see: what to show them to.

    Raises:
        BadShape: it returned an x0 of another shape or dtype.
    """

    def after(ask: Ask, belief: Belief) -> Belief:
        x0 = see(ask, belief)
        if x0 is None:
            return belief
        if x0.shape != belief.x0.shape or x0.dtype != belief.x0.dtype:
            raise BadShape(
                f"hook: got an x0 of {x0.dtype} {tuple(x0.shape)}, "
                f"need {belief.x0.dtype} {tuple(belief.x0.shape)}, or None"
            )
        return revise(ask, belief, x0)._replace(pull=None)  # which was of another x0

    return relay(sampling, lambda ask: ask, after)
