"""Middleware: what the files of this room are made of."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeAlias

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, revise

__all__ = ["Dialogue", "blend", "converse", "deviation", "differentiable", "over", "rewritten"]

Dialogue: TypeAlias = Generator[Ask, Belief, Belief]
"""The answer to one question at work: yields questions of its own, is sent answers, returns the belief."""


def converse(sampling: Sampling, answer: Callable[[Ask], Dialogue]) -> Sampling:
    """Answer every question of a sampling by a dialogue, which may ask none, one or several others.

    Args:
        sampling: the generator to wrap.
        answer: a question -> the dialogue that returns its belief.
    """
    try:
        ask = next(sampling)
        while True:
            ask = sampling.send((yield from answer(ask)))
    except StopIteration as end:
        result: Tensor = end.value
        return result


def over(weight: Tensor, x: Tensor) -> Tensor:
    """A weight shaped to multiply x of shape (B, ...): 0-dim as it is, (B,) as (B, 1, ...) in x's dtype."""
    return weight if weight.ndim == 0 else weight.to(x.device, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def blend(weight: Tensor, strong: Tensor, weak: Tensor) -> Tensor:
    """weak + w·(strong − weak); of rows with a w of their own, those with 1 are `strong` and with 0 `weak` bit for bit.

    Args:
        weight: w, 0-dim and neither 0 nor 1, where one of the two need not be asked, or (B,).
        strong: (B, ...).
        weak: (B, ...).
    """
    w = over(weight, strong)
    mixed = weak + w * (strong - weak)
    if weight.ndim == 0:
        return mixed
    return torch.where(w == 1, strong, torch.where(w == 0, weak, mixed))


def deviation(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The standard deviation of x over these axes, which are kept: of all its numbers (no n − 1).

    0 where x is constant but for rounding, and its derivative there too.
    """
    var = x.var(dim=dims, keepdim=True, correction=0)
    rounding = 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax(dim=dims, keepdim=True)
    varies = var > rounding**2
    return torch.where(varies, torch.where(varies, var, 1).sqrt(), 0)


def differentiable(
    function: Callable[..., Tensor], *given: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """A function's value at some tensors, and its vector-Jacobian product there by automatic differentiation.

    Args:
        function: (tensors) -> (B, ...), each row from its own rows alone.
        given: where.

    Returns:
        The value, and g -> (∂f/∂given_i)ᵀ·g for each i; the product can be taken many times.
    """
    with torch.enable_grad():
        held = [tensor.detach().requires_grad_() for tensor in given]
        value = function(*held)
    return value.detach(), lambda g: torch.autograd.grad(value, held, g, retain_graph=True)


def rewritten(ask: Ask, belief: Belief, change: Callable[[Tensor], Tensor]) -> Belief:
    """The belief with x0 replaced by change(x0), and with the eps and the pull that agree with it.

    Args:
        ask: the question.
        belief: its answer.
        change: (B, C, *S) -> (B, C, *S), differentiable almost everywhere, rows apart.
    """
    pull = belief.pull
    if pull is None:
        return revise(ask, belief, change(belief.x0))
    x0, back = differentiable(change, belief.x0)
    return revise(ask, belief, x0)._replace(pull=lambda g: pull(back(g)[0]))
