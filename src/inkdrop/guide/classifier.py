"""Classifier guidance (Dhariwal & Nichol 2021)."""

from __future__ import annotations

from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling
from inkdrop.errors import BadArgument
from inkdrop.guide.middleware import Dialogue, converse, over
from inkdrop.guide.strength import Shape, strength

__all__ = ["NEEDS", "PLACE", "classifier"]

PLACE = 30
NEEDS = ("classifier",)


def classifier(
    sampling: Sampling, *, scale: float = 1.0, start: float = 1.0, stop: float = 0.0, shape: Shape = "constant"
) -> Sampling:
    """Classifier guidance: eps − s·sigma·∇ log p(y|x_t), and x0 + s·(sigma²/alpha)·∇ log p(y|x_t).

    (Dhariwal & Nichol 2021, eq. 14 and algorithm 2.) y is the class that the sampling asks for, and p(y|x_t) a
    classifier of noisy images, which answers as the denoiser whose score is ∇ log p(y|x_t): its eps is
    −sigma·∇ log p(y|x_t). s = 1 is Bayes' rule: with the unconditional net (cfg.scale=0) and an exact classifier it is
    the conditional denoiser; beside a conditional net it guides towards the class once more.

    Under ddpm the step's mean moves by s·(alpha_s/alpha_t)·beta·∇ log p(y|x_t), exactly, beta being the forward
    variance of the step; the paper's algorithm 1 has the reverse variance Σ in that place, which is the same to first
    order in the step.

    Rows whose class is null are not guided. Without clip, begin below t = 1 on tables whose alpha(1) is next to 0
    (start=0.98 on cosine): there sigma²/alpha amplifies what little the classifier is wrong.

    Cost: two asks, one of the net and one of the classifier (forward and backward).

    Args:
        sampling: what to wrap.
        scale: s, ≥ 0, finite; its mean over the interval if a shape is given.
        start: guidance starts at this time, in (0, 1]; 1 is noise.
        stop: and ends at this, in [0, start); 0 is clean.
        shape: of s over the interval; see `strength`.

    Raises:
        BadArgument: a number outside its range, no class to guide towards, or a level without signal (alpha = 0), where
            no x0 agrees with the guided eps.
    """
    weight = strength("classifier", scale=scale, rest=0.0, start=start, stop=stop, shape=shape)

    def answer(ask: Ask) -> Dialogue:
        if ask.of != "net":
            return (yield ask)
        s = weight(ask.level)
        if bool((s == 0).all()):
            return (yield ask)
        if ask.cond is None or ask.cond.label is None or bool(ask.cond.null_rows("label").all()):
            raise BadArgument("classifier: there is no class to guide towards; give a model with classes a class")
        if bool((ask.level.alpha == 0).any()):
            raise BadArgument(
                "classifier: cannot guide where there is no signal (alpha = 0, zero terminal SNR); "
                "try classifier.start=0.99, or cfg"
            )
        return _add(ask, (yield ask), (yield ask._replace(of="classifier")), s)

    return converse(sampling, answer)


def _add(ask: Ask, net: Belief, judge: Belief, s: Tensor) -> Belief:
    """The net's score and s times the classifier's, as a belief."""
    level, share = ask.level.over(ask.x), over(s, ask.x)
    made = net._replace(
        x0=net.x0 - share * (level.sigma / level.alpha) * judge.eps,
        eps=net.eps + share * judge.eps,
    )
    mine, theirs = net.pull, judge.pull
    if mine is None or theirs is None:
        return made
    return made._replace(pull=lambda g: mine(g) + share * (theirs(g) - g / level.alpha))
