"""Convolve: norm, activation and convolution in one, which in training keeps only its input for the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

__all__ = ["activated", "convolve"]


def activated(h: Tensor, norm: nn.GroupNorm, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """silu(norm(h)), or silu(norm(h)·(1 + scale) + shift): h (B, C, H, W), scale and shift (B, C, 1, 1)."""
    h = norm(h)
    if scale is not None and shift is not None:
        h = torch.addcmul(shift, h, 1 + scale)
    return functional.silu(h, inplace=not torch.is_grad_enabled())


def convolve(
    h: Tensor,
    norm: nn.GroupNorm,
    conv: nn.Conv2d,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """conv(dropped(silu(norm(h)·(1 + scale) + shift))), which keeps nothing but h for its gradient in training.

    In training what is between h and the answer is computed again for the gradient: little more time for much
    less memory (docs/nets/unet.md). Where the gradient is of a call in eval mode, under autocast, in a compiled or
    exported net, and in forward-mode differentiation, it is the plain chain of its parts.

    Args:
        h: (B, C, H, W).
        norm: before the activation.
        conv: 3×3 with a padding of 1, C -> C'.
        scale: (B, C, 1, 1), or None with shift for the norm's own.
        shift: (B, C, 1, 1).
        dropout: the probability of dropping a value before the convolution, in [0, 1).
        training: whether values are dropped and memory is saved.

    Returns:
        (B, C', H, W).
    """
    if not (training and torch.is_grad_enabled()) or torch.compiler.is_compiling() or _is_cast_or_dual(h):
        y: Tensor = conv(functional.dropout(activated(h, norm, scale, shift), dropout, training))
        return y
    keep = torch.rand_like(h) >= dropout if dropout else None
    return _Convolve.apply(  # type: ignore[no-any-return,no-untyped-call]
        h, scale, shift, keep, norm.weight, norm.bias, conv.weight, conv.bias, (norm.num_groups, norm.eps, dropout)
    )


def _is_cast_or_dual(h: Tensor) -> bool:
    """Whether operations on h run under autocast or carry a tangent (forward-mode differentiation)."""
    kind = h.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return cast or forward_ad.unpack_dual(h).tangent is not None


class _Convolve(torch.autograd.Function):
    """`convolve`, with the gradient written out in operations that have gradients themselves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*given: Any) -> Tensor:
        *_, kernel, offset, how = given
        return functional.conv2d(_inside(given, how, forget=True)[-1], kernel, offset, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.how = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: a checkpoint forgets them then
        h, scale, _, keep, weight, _, kernel, _ = saved
        dropout = ctx.how[2]
        normed, moments, moved, seen = _inside(saved, ctx.how)
        wanted = list(ctx.needs_input_grad)
        pads = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        g, to_kernel, to_offset = torch.ops.aten.convolution_backward(
            grads[0], seen, kernel, [kernel.shape[0]], *pads, [True, *wanted[6:8]]
        )
        del seen
        g = _silu_gradient(g if keep is None else g * keep / (1 - dropout), moved)
        del moved
        to_scale = to_shift = None
        if scale is not None:
            to_scale, to_shift = (g * normed).sum((2, 3), keepdim=True), g.sum((2, 3), keepdim=True)
            g = g * (1 + scale)
        del normed
        to_h, to_weight, to_bias = _norm_gradient(g, h, weight, moments, ctx.how, [wanted[0], *wanted[4:6]])
        return to_h, to_scale, to_shift, None, to_weight, to_bias, to_kernel, to_offset, None


def _inside(
    given: Sequence[Any], how: tuple[int, float, float], *, forget: bool = False
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """What is inside `convolve`: (normed, (mean, 1/deviation) of each group, moved, what the convolution sees).

    With `forget` only the last is right, written over the others.
    """
    h, scale, shift, keep, weight, bias = given[:6]
    groups, eps, dropout = how
    b, c, high, wide = h.shape
    h = h.contiguous(memory_format=_layout(h))
    normed, *moments = torch.native_group_norm(h, weight, bias, b, c, high * wide, groups, eps)
    moved = normed if scale is None else torch.addcmul(shift, normed, 1 + scale)
    seen = functional.silu(moved, inplace=forget)
    return normed, (moments[0], moments[1]), moved, seen if keep is None else seen * keep / (1 - dropout)


def _layout(h: Tensor) -> torch.memory_format:
    """The layout in which the kernels of group normalisation take h, and a gradient like it."""
    channels = h.shape[1]  # by its strides, for vmap knows of no other question
    last = h.device.type == "cpu" and channels > 1 and h.stride(1) == 1 and h.stride(3) == channels
    return torch.channels_last if last else torch.contiguous_format


def _silu_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g·silu'(x); the kernel, or operations with gradients where one of this gradient is wanted."""
    if not torch.is_grad_enabled():
        fused: Tensor = torch.ops.aten.silu_backward(g, x)
        return fused
    rate = x.sigmoid()
    return g * rate * (1 + x * (1 - rate))


def _norm_gradient(
    g: Tensor,
    h: Tensor,
    weight: Tensor,
    moments: tuple[Tensor, Tensor],
    how: tuple[int, float, float],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of group normalisation by (h, weight, bias), as `_silu_gradient`."""
    (b, c, high, wide), (groups, eps, _) = h.shape, how
    if not torch.is_grad_enabled():
        g, h = (part.contiguous(memory_format=_layout(h)) for part in (g, h))
        fused: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm_backward(
            g, h, *moments, weight, b, c, high * wide, groups, wanted
        )
        return fused
    rows = h.reshape(b, groups, -1)
    rate = (rows.var(2, correction=0, keepdim=True) + eps).rsqrt()
    unit = (rows - rows.mean(2, keepdim=True)) * rate
    pull = (g * weight[:, None, None]).reshape(rows.shape)
    to_h = rate * (pull - pull.mean(2, keepdim=True) - unit * (pull * unit).mean(2, keepdim=True))
    return to_h.reshape(h.shape), (g * unit.reshape(h.shape)).sum((0, 2, 3)), g.sum((0, 2, 3))
