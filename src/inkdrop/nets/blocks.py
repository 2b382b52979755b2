"""Blocks: the layers that nets are built of."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from inkdrop.errors import BadArgument
from inkdrop.nets.convolve import activated, convolve, normed

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
        tokens = normed(x, self.norm).flatten(2).transpose(1, 2)
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
