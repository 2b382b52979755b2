"""Blocks: the layers that nets are built of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from inkdrop.errors import BadArgument

__all__ = ["EPS", "Down", "ResBlock", "SelfAttention", "Up", "attend", "check_heads", "groups", "norm", "zeroed"]

Layer = TypeVar("Layer", bound=nn.Module)

EPS = 1e-6
"""Added to the variance in group normalisation; DDPM's value (and its ports')."""

_PLAIN_TOKENS = 1024
"""The longest sequence that half precision on a CPU attends to by plain products; see `attend`."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, by the fused kernel or by plain matrix products, whichever is faster.

    softmax(q·k^T/√D)·v, the softmax over the keys that the mask leaves.

    The choice is by length, dtype and device and never by batch size, so that a row alone and a row in a batch take
    the same path: plain products for half precision on the CPU up to 1,024 tokens, fused otherwise. Time of fused
    over plain on one Zen 4 core (torch 2.13, 4 to 1,024 tokens; the whole table is in docs/guides/nets.md): float32
    0.4 to 1.0, at no length above; bfloat16 with its backward pass 1.6 to 3.6 from 16 tokens on.

    Args:
        q: (B, heads, L, D).
        k: (B, heads, M, D).
        v: (B, heads, M, D).
        mask: (B, M) bool, True for the keys that are looked at, at least one in each row; None for all.

    Returns:
        (B, heads, L, D).

    Reference: Vaswani et al. 2017, eq. 1.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cpu" and half and max(q.shape[-2], k.shape[-2]) <= _PLAIN_TOKENS:
        return _plain(q, k, v, mask)
    return functional.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None, :])


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by plain matrix products; shapes as in `attend`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    mixed: Tensor = scores.softmax(dim=-1) @ v
    return mixed


def groups(channels: int) -> int:
    """The number of groups for group normalisation: the largest divisor of channels up to min(32, channels/4).

    At least four channels a group (as in EDM): with one a group, the norm would erase the mean of every channel and
    with it the time that a block adds to it. 128 -> 32 (DDPM), 64 -> 16, 48 -> 12, 36 -> 9, 5 -> 1.

    Args:
        channels: at least 1.
    """
    return max(n for n in range(1, max(1, min(32, channels // 4)) + 1) if channels % n == 0)


def norm(channels: int, count: int | None = None, eps: float = EPS) -> nn.GroupNorm:
    """Group normalisation over `count` groups; `groups(channels)` of them if None.

    Args:
        channels: at least 1.
        count: how many groups, a divisor of channels.
        eps: what is added to the variance, > 0.

    Raises:
        BadArgument: count does not divide the channels.

    Reference: Wu & He 2018.
    """
    if count is not None and (count < 1 or channels % count):
        raise BadArgument(f"norm_groups: got {count}, need a divisor of {channels} channels")
    return nn.GroupNorm(groups(channels) if count is None else count, channels, eps=eps)


def zeroed(layer: Layer) -> Layer:
    """The layer with every parameter set to zero: the last of a residual branch, so that it starts as identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


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

    In training what is between h and the answer is computed again for the gradient: about 2 % more time for a third
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
    """`convolve`, with the gradient written out; what is inside is made of differentiable operations again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*given: Any) -> Tensor:
        *_, kernel, offset, how = given
        return functional.conv2d(_inside(given, how)[-1], kernel, offset, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.how = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: a checkpoint forgets them then
        h, scale, _, keep, weight, _, kernel, _ = saved
        groups, _, dropout = ctx.how
        normed, mean, rstd, moved, seen = _inside(saved, ctx.how)
        wanted = list(ctx.needs_input_grad)
        pads = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        g, to_kernel, to_offset = torch.ops.aten.convolution_backward(
            grads[0], seen, kernel, [kernel.shape[0]], *pads, [True, *wanted[6:8]]
        )
        del seen
        g = torch.ops.aten.silu_backward(g if keep is None else g * keep / (1 - dropout), moved)
        to_scale = to_shift = None
        if scale is not None:
            to_scale, to_shift = (g * normed).sum((2, 3), keepdim=True), g.sum((2, 3), keepdim=True)
            g = g * (1 + scale)
        b, c, high, wide = h.shape
        to_h, to_weight, to_bias = torch.ops.aten.native_group_norm_backward(
            g, h, mean, rstd, weight, b, c, high * wide, groups, [wanted[0], *wanted[4:6]]
        )
        return to_h, to_scale, to_shift, None, to_weight, to_bias, to_kernel, to_offset, None


def _inside(given: Sequence[Any], how: tuple[int, float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What is inside `convolve`: (normed, its mean, its 1/deviation, moved, what the convolution sees)."""
    h, scale, shift, keep, weight, bias = given[:6]
    groups, eps, dropout = how
    b, c, high, wide = h.shape
    normed, mean, rstd = torch.native_group_norm(h, weight, bias, b, c, high * wide, groups, eps)
    moved = normed if scale is None else torch.addcmul(shift, normed, 1 + scale)
    seen = functional.silu(moved)
    return normed, mean, rstd, moved, seen if keep is None else seen * keep / (1 - dropout)


class ResBlock(nn.Module):
    """A residual block that is told time and class.

    h = conv1(silu(norm1(x))), e = W·silu(context) + b, then

        added (DDPM)          h = norm2(h + e)
        scale-shift (ADM)     h = norm2(h)·(1 + e1) + e2, with e = [e1, e2]

    and y = shortcut(x) + conv2(dropout(silu(h))), the shortcut a 1×1 convolution where the widths differ. conv2
    starts at zero, so that the block starts as its shortcut.

    A block that resamples (ADM) changes the size of silu(norm1(x)) before conv1, and of x before the shortcut: down
    by the mean over 2×2 pixels (over those that there are, at an odd edge), up by nearest neighbour.

    Args:
        inp: channels in.
        out: channels out.
        context: numbers of the context vector.
        dropout: the probability of dropping a value, in [0, 1).
        scale_shift: scale-shift (ADM) rather than added (DDPM).
        resample: "down" to half the size (rounded up), "up" to a given size; None keeps it.
        norm_groups: of both norms, see `norm`.
        norm_eps: of both norms.

    Reference: Ho et al. 2020, appendix B; Dhariwal & Nichol 2021, eq. 1 and §3 (resampling, after BigGAN).
    """

    def __init__(
        self,
        inp: int,
        out: int,
        context: int,
        *,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resample: Literal["down", "up"] | None = None,
        norm_groups: int | None = None,
        norm_eps: float = EPS,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = norm(inp, norm_groups, norm_eps)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.project = nn.Linear(context, 2 * out if scale_shift else out)
        self.norm2 = norm(out, norm_groups, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Identity() if inp == out else nn.Conv2d(inp, out, 1)

    def forward(self, x: Tensor, context: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """x (B, inp, H, W), context (B, context), `size` where it resamples up -> (B, out, H', W')."""
        if self.resample is None:
            h = convolve(x, self.norm1, self.conv1, training=self.training)
        else:
            h, x = self._resized(activated(x, self.norm1), size), self._resized(x, size)
            h = self.conv1(h)
        e = self.project(functional.silu(context))[:, :, None, None]
        scale, shift = e.chunk(2, dim=1) if self.scale_shift else (None, None)
        if not self.scale_shift:
            h += e
        h = convolve(h, self.norm2, self.conv2, scale, shift, dropout=self.dropout.p, training=self.training)
        h += self.shortcut(x)
        return h

    def _resized(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        if self.resample == "down":
            return functional.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        return functional.interpolate(x, size=size, mode="nearest")


def check_heads(channels: int, head_width: int | None) -> int:
    """The channels of a head of attention: `head_width`, or all of them if None.

    Raises:
        BadArgument: head_width does not divide the channels.
    """
    width = channels if head_width is None else head_width
    if width < 1 or channels % width:
        raise BadArgument(f"attention head_width: got {head_width}, need a divisor of {channels} channels")
    return width


class SelfAttention(nn.Module):
    """Every pixel looks at every pixel: y = x + W_out·attend(q, k, v), [q, k, v] = W·norm(x) pixel by pixel.

    The output layer starts at zero, so that the block starts as identity.

    Args:
        channels: C.
        head_width: channels a head, a divisor of C; None for a single head of C (DDPM).
        norm_groups: of the norm, see `norm`; 0 for no norm.
        norm_eps: of the norm.

    Raises:
        BadArgument: head_width or norm_groups does not divide C.

    Reference: Ho et al. 2020, appendix B; Dhariwal & Nichol 2021, §3 (heads of 64 channels).
    """

    def __init__(
        self, channels: int, *, head_width: int | None = None, norm_groups: int | None = None, norm_eps: float = EPS
    ) -> None:
        super().__init__()
        self.head_width = check_heads(channels, head_width)
        self.norm = nn.Identity() if norm_groups == 0 else norm(channels, norm_groups, norm_eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        b, c, high, wide = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(b, high * wide, 3, -1, self.head_width).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v).transpose(1, 2).reshape(b, high * wide, c)
        y: Tensor = x + self.out(mixed).transpose(1, 2).reshape(b, c, high, wide)
        return y


class Down(nn.Module):
    """Half the size by a 3×3 convolution of stride 2: (B, C, H, W) -> (B, C, ⌈H/2⌉, ⌈W/2⌉).

    Zeros pad an even side by (0, 1), as DDPM does, and an odd side by (1, 1), so that every pixel is seen and a side
    of 1 stays 1.

    Args:
        channels: C.
        symmetric: pad every side by (1, 1), as Improved DDPM and Stable Diffusion do.
    """

    def __init__(self, channels: int, *, symmetric: bool = False) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ⌈H/2⌉, ⌈W/2⌉)."""
        high, wide = x.shape[-2:]
        y: Tensor = self.conv(x if self.symmetric else functional.pad(x, (wide % 2, 1, high % 2, 1)))
        return y


class Up(nn.Module):
    """A given size by nearest neighbour, then a 3×3 convolution; undoes `Down`, odd sizes too.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, H, W) -> (B, C, *size)."""
        y: Tensor = self.conv(functional.interpolate(x, size=size, mode="nearest"))
        return y
