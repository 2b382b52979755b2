"""Convolve: norm, activation and convolution in one, which in training keeps only its input for the gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

__all__ = ["activated", "convolve", "normed"]

_HALF = (torch.bfloat16, torch.float16)


def activated(h: Tensor, norm: nn.GroupNorm, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """silu(norm(h)), or silu(norm(h)·(1 + scale) + shift): h (B, C, H, W), scale and shift (B, C, 1, 1)."""
    if torch.compiler.is_compiling():  # which makes one loop of them itself
        h = norm(h) if scale is None or shift is None else norm(h) * (1 + scale) + shift
        return functional.silu(h)
    if _is_turned(h):
        return _turned(h, norm, scale, shift, curved=True)
    moved = _moved(h, scale, shift, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return functional.silu(moved.y, inplace=not torch.is_grad_enabled())


def normed(h: Tensor, norm: nn.Module) -> Tensor:
    """norm(h), h (B, C, H, W), by the kernel that is quickest for its layout."""
    if isinstance(norm, nn.GroupNorm) and not torch.compiler.is_compiling() and _is_turned(h):
        return _turned(h, norm, None, None, curved=False)
    y: Tensor = norm(h)
    return y


def _is_turned(h: Tensor) -> bool:
    """Whether h is to be normalised with channels first though they are last.

    That in half precision on a processor, where the kernel for channels last takes twenty times as long: 16 ms for
    (64, 32, 28, 28) against 0.7 ms and 1.8 ms for turning h there and back (torch 2.13, one Sapphire Rapids core).
    """
    return h.dtype in _HALF and _is_last(h) and forward_ad.unpack_dual(h).tangent is None


def _turned(h: Tensor, norm: nn.GroupNorm, scale: Tensor | None, shift: Tensor | None, *, curved: bool) -> Tensor:
    how = norm.num_groups, norm.eps, curved
    return _Turned.apply(h, scale, shift, norm.weight, norm.bias, how)  # type: ignore[no-any-return,no-untyped-call]


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
        h, scale, shift, keep, weight, bias, kernel, offset, (groups, eps, dropout) = given
        seen = functional.silu(_moved(h, scale, shift, weight, bias, groups, eps).y, inplace=True)
        return functional.conv2d(_dropped(seen, keep, dropout), kernel, offset, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.how = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, scale, shift, keep, weight, bias, kernel, _ = ctx.saved_tensors  # read once: a checkpoint forgets them then
        groups, eps, dropout = ctx.how
        moved = _moved(h, scale, shift, weight, bias, groups, eps)
        wanted = list(ctx.needs_input_grad)
        pads = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        seen = _dropped(functional.silu(moved.y), keep, dropout)
        g, to_kernel, to_offset = torch.ops.aten.convolution_backward(
            grads[0], seen, kernel, [kernel.shape[0]], *pads, [True, *wanted[6:8]]
        )
        del seen
        g = _silu_gradient(_dropped(g, keep, dropout), moved.y)
        return *_moved_gradient(g, h, scale, weight, bias, moved, eps), to_kernel, to_offset, None


class _Turned(torch.autograd.Function):
    """norm(h)·(1 + scale) + shift, and silu of it or not, of channels last: normalised with channels first.

    It keeps h alone, and turns and normalises it again for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        h, scale, shift, weight, bias, (groups, eps, curved) = given
        ctx.save_for_backward(*given[:-1])
        ctx.how = given[-1]
        y = _moved(h, scale, shift, weight, bias, groups, eps).y
        y = functional.silu(y, inplace=True) if curved else y
        return y.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, scale, shift, weight, bias = ctx.saved_tensors
        groups, eps, curved = ctx.how
        moved = _moved(h, scale, shift, weight, bias, groups, eps)
        g = grads[0].contiguous()
        g = _silu_gradient(g, moved.y) if curved else g
        to_h, to_scale, to_shift, _, *rest = _moved_gradient(g, h, scale, weight, bias, moved, eps)
        turned = None if to_h is None else to_h.contiguous(memory_format=torch.channels_last)
        return turned, to_scale, to_shift, *rest, None


class _Moved(NamedTuple):
    """What goes into silu, and the normalisation that made it.

    Attributes:
        y: (B, C, H, W).
        rows: what was normalised, h as (N, C', H, W).
        weight: its weight (C',).
        groups: its groups of C'.
        mean: of each group, (N, groups).
        rate: 1/deviation of each, (N, groups).
        folded: whether N = 1 and C' = B·C, with scale and shift in the weight and the bias.
    """

    y: Tensor
    rows: Tensor
    weight: Tensor
    groups: int
    mean: Tensor
    rate: Tensor
    folded: bool


def _moved(
    h: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> _Moved:
    """norm(h)·(1 + scale) + shift, as one normalisation where it can be: all images are channels of a single one then.

    That saves a pass or two over the pixels, and more of them backwards. Where channels are last in memory they
    cannot be seen so.
    """
    b, c, high, wide = h.shape
    layout = _layout(h)
    rows = h.contiguous(memory_format=layout)
    folded = scale is not None and shift is not None and layout is torch.contiguous_format
    if scale is not None and shift is not None and folded:
        by, to = 1 + scale.reshape(b, c), shift.reshape(b, c)
        rows, groups = rows.reshape(1, b * c, high, wide), b * groups
        weight, bias = (weight * by).reshape(-1), (bias * by + to).reshape(-1)
    y, mean, rate = torch.native_group_norm(rows, weight, bias, len(rows), rows.shape[1], high * wide, groups, eps)
    if scale is not None and shift is not None and not folded:
        y = y * (1 + scale) + shift
    return _Moved(y.reshape(h.shape), rows, weight, groups, mean, rate, folded)


def _moved_gradient(
    g: Tensor, h: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, moved: _Moved, eps: float
) -> tuple[Tensor | None, ...]:
    """The gradients by the first six of what `_Convolve` is given."""
    if scale is None:
        to_h, to_weight, to_bias = _norm_gradient(g, moved, eps)
        return to_h, None, None, None, to_weight, to_bias
    (b, c), groups = h.shape[:2], moved.mean.shape[1]
    by = (1 + scale).reshape(b, c)
    if moved.folded:
        to_h, slopes, levels = _norm_gradient(g.reshape(moved.rows.shape), moved, eps)
        slopes, levels = slopes.reshape(b, c), levels.reshape(b, c)
    else:
        levels, pulls = g.sum((2, 3)), (g * h).sum((2, 3))
        mean, rate = (part[:, :, None].expand(-1, -1, c // groups).reshape(b, c) for part in (moved.mean, moved.rate))
        slopes = rate * (pulls - mean * levels)
        to_h, *_ = _norm_gradient(g * by[:, :, None, None], moved, eps)
    to_scale, to_shift = ((weight * slopes + bias * levels).reshape(scale.shape), levels.reshape(scale.shape))
    return to_h.reshape(h.shape), to_scale, to_shift, None, (by * slopes).sum(0), (by * levels).sum(0)


def _dropped(h: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    """h without what is not kept, and the rest so much larger."""
    return h if keep is None else h * keep / (1 - dropout)


def _layout(h: Tensor) -> torch.memory_format:
    """The layout in which h is normalised, and a gradient like it."""
    return torch.channels_last if _is_last(h) and h.dtype not in _HALF else torch.contiguous_format


def _is_last(h: Tensor) -> bool:
    """Whether channels are last in memory, on a processor: by strides, for vmap knows of no other question."""
    channels = h.shape[1]
    return h.device.type == "cpu" and channels > 1 and h.stride(1) == 1 and h.stride(3) == channels


def _silu_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g·silu'(x); the kernel, or operations with gradients where one of this gradient is wanted."""
    if not torch.is_grad_enabled():
        fused: Tensor = torch.ops.aten.silu_backward(g, x)
        return fused
    rate = x.sigmoid()
    return g * rate * (1 + x * (1 - rate))


def _norm_gradient(g: Tensor, moved: _Moved, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of group normalisation by (rows, weight, bias), as `_silu_gradient`."""
    rows, weight, groups = moved.rows, moved.weight, moved.groups
    b, c, high, wide = rows.shape
    if not torch.is_grad_enabled():
        layout = _layout(rows)
        g, rows = (part.contiguous(memory_format=layout) for part in (g, rows))
        fused: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm_backward(
            g, rows, moved.mean, moved.rate, weight, b, c, high * wide, groups, [True, True, True]
        )
        return fused
    h = rows.reshape(b, groups, -1)
    rate = (h.var(2, correction=0, keepdim=True) + eps).rsqrt()
    unit = (h - h.mean(2, keepdim=True)) * rate
    pull = (g * weight[:, None, None]).reshape(h.shape)
    to_h = rate * (pull - pull.mean(2, keepdim=True) - unit * (pull * unit).mean(2, keepdim=True))
    return to_h.reshape(rows.shape), (g * unit.reshape(rows.shape)).sum((0, 2, 3)), g.sum((0, 2, 3))
