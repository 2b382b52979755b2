"""Autoguidance: the net against a weaker version of itself (Karras et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling
from inkdrop.guide.middleware import Dialogue, blend, converse, over
from inkdrop.guide.strength import Shape, strength

__all__ = ["NEEDS", "PLACE", "autoguidance"]

PLACE = 40
NEEDS = ("weak",)


def autoguidance(
    sampling: Sampling, *, scale: float = 2.0, start: float = 1.0, stop: float = 0.0, shape: Shape = "constant"
) -> Sampling:
    """Autoguidance: x0 = weak + w·(net − weak), and eps likewise (Karras et al. 2024, section 4).

    The weak net has the same condition and the same kinds of fault, only more of them: an early checkpoint of the same
    run, or a smaller net trained less. w = 1 asks the net alone, w = 0 the weak one alone; outside stop < t ≤ start it
    is 1. The learned variance kept is the net's.

    Together with cfg of scale s, which mixes the net alone, it is w·s·cond − w·(s − 1)·uncond − (w − 1)·weak: a total
    guidance of w·s, of which w·(s − 1) steers away from the null condition and w − 1 from the weak net.

    Cost: two asks, one of the net and one of the weak net.

    Args:
        sampling: what to wrap.
        scale: w, ≥ 0, finite; its mean over the interval if a shape is given.
        start: guidance starts at this time, in (0, 1]; 1 is noise.
        stop: and ends at this, in [0, start); 0 is clean.
        shape: of w over the interval; see `strength`.

    Raises:
        BadArgument: a number outside its range, or a knob that has no effect at this scale.
    """
    weight = strength("autoguidance", scale=scale, start=start, stop=stop, shape=shape)

    def answer(ask: Ask) -> Dialogue:
        if ask.of != "net":
            return (yield ask)
        w = weight(ask.level)
        if bool((w == 1).all()):
            return (yield ask)
        weak = yield ask._replace(of="weak")
        return weak if bool((w == 0).all()) else _mix(w, (yield ask), weak)

    return converse(sampling, answer)


def _mix(w: Tensor, net: Belief, weak: Belief) -> Belief:
    """weak + w·(net − weak), with the pull of both."""
    x0, eps = blend(w, net.x0, weak.x0), blend(w, net.eps, weak.eps)
    strong_pull, weak_pull = net.pull, weak.pull
    if strong_pull is None or weak_pull is None:
        return Belief(x0, eps, net.var_frac)
    share = over(w, x0)
    return Belief(x0, eps, net.var_frac, lambda g: strong_pull(share * g) + weak_pull((1 - share) * g))
