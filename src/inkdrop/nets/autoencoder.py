"""The KL autoencoder of latent diffusion: images to fewer, smoother numbers and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from inkdrop.errors import BadArgument, BadShape
from inkdrop.nets.blocks import Down, SelfAttention, Up, groups, norm, zeroed
from inkdrop.nets.tiles import in_tiles

__all__ = [
    "Autoencoder",
    "Decoder",
    "Encoder",
    "Moments",
    "Residual",
    "autoencoder",
    "autoencoder_sd",
    "autoencoder_small",
]

_LOGVAR = (-30.0, 20.0)
"""The range of the log variance, as in the code of latent diffusion and its ports."""


class Moments(NamedTuple):
    """A Gaussian of the latent of each image, with independent numbers.

    Attributes:
        mean: (B, c, h, w).
        logvar: (B, c, h, w), the logarithm of the variance, in [−30, 20].
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + exp(logvar/2)·noise, for unit normal noise (B, c, h, w)."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL(N(mean, var) ‖ N(0, 1)) = ½·Σ (mean² + var − 1 − log var): (B,), in nats, ≥ 0.

        Reference: Kingma & Welling 2014, appendix B.
        """
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(dim=1)


class Residual(nn.Module):
    """A residual block that is told nothing: y = shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))))))).

    conv2 starts at zero, so that the block starts as its shortcut.

    Args:
        inp: channels in.
        out: channels out; the shortcut is a 1×1 convolution where it differs.
        norm_groups: of both norms.
        dropout: the probability of dropping a value, in [0, 1).
    """

    def __init__(self, inp: int, out: int, *, norm_groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = norm(inp, norm_groups)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.norm2 = norm(out, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Identity() if inp == out else nn.Conv2d(inp, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inp, H, W) -> (B, out, H, W)."""
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(self.dropout(functional.silu(self.norm2(h))))
        y: Tensor = self.shortcut(x) + h
        return y


class _Make(NamedTuple):
    """What every block of an autoencoder is made with."""

    norm_groups: int
    dropout: float
    attention: bool

    def block(self, inp: int, out: int) -> Residual:
        return Residual(inp, out, norm_groups=self.norm_groups, dropout=self.dropout)

    def middle(self, channels: int) -> nn.ModuleList:
        """Block, self-attention by one head, block: all at the size of the latents."""
        parts: list[nn.Module] = [self.block(channels, channels)]
        if self.attention:
            parts.append(SelfAttention(channels, norm_groups=self.norm_groups))
        return nn.ModuleList([*parts, self.block(channels, channels)])

    def head(self, inp: int, out: int) -> nn.Sequential:
        return nn.Sequential(norm(inp, self.norm_groups), nn.SiLU(), nn.Conv2d(inp, out, 3, padding=1))


class Encoder(nn.Module):
    """Pixels to moments: (B, C, H, W) -> (B, 2·c, H/f, W/f), the means and then the log variances, not clamped.

    A level has `blocks` residual blocks; between two levels `Down` halves the size.
    """

    def __init__(self, channels: int, latent: int, widths: list[int], blocks: int, make: _Make) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        parts: list[nn.Module] = []
        now = widths[0]
        for level, out in enumerate(widths):
            for _ in range(blocks):
                parts.append(make.block(now, out))
                now = out
            if level < len(widths) - 1:
                parts.append(Down(out))
        self.down = nn.ModuleList(parts)
        self.middle = make.middle(now)
        self.head = make.head(now, 2 * latent)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2·c, H/f, W/f)."""
        h = self.stem(x)
        for part in (*self.down, *self.middle):
            h = part(h)
        y: Tensor = self.head(h)
        return y


class Decoder(nn.Module):
    """Latents to pixels: (B, c, h, w) -> (B, C, f·h, f·w), not clipped.

    A level has blocks + 1 residual blocks; between two levels `Up` doubles the size.
    """

    def __init__(self, channels: int, latent: int, widths: list[int], blocks: int, make: _Make) -> None:
        super().__init__()
        now = widths[-1]
        self.stem = nn.Conv2d(latent, now, 3, padding=1)
        self.middle = make.middle(now)
        parts: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            for _ in range(blocks + 1):
                parts.append(make.block(now, widths[level]))
                now = widths[level]
            if level:
                parts.append(Up(now))
        self.up = nn.ModuleList(parts)
        self.head = make.head(now, channels)

    def forward(self, z: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, C, f·h, f·w)."""
        h = self.stem(z)
        for part in self.middle:
            h = part(h)
        for part in self.up:
            h = part(h, (2 * h.shape[-2], 2 * h.shape[-1])) if isinstance(part, Up) else part(h)
        y: Tensor = self.head(h)
        return y


class Autoencoder(nn.Module):
    """The module that `autoencoder` makes.

    Attributes:
        shape: (C, H, W) of one image, that it was made for; it also runs at other multiples of the factor.
        factor: f, pixels a side of one latent position: 2^(levels − 1).
        latent_shape: (c, H/f, W/f).
    """

    def __init__(
        self, shape: tuple[int, int, int], latent: int, factor: int, encoder: Encoder, decoder: Decoder, quant: bool
    ) -> None:
        super().__init__()
        self.shape, self.factor = shape, factor
        self.latent_shape = (latent, shape[1] // factor, shape[2] // factor)
        self.encoder, self.decoder = encoder, decoder
        self.quant = nn.Conv2d(2 * latent, 2 * latent, 1) if quant else nn.Identity()
        self.post_quant = nn.Conv2d(latent, latent, 1) if quant else nn.Identity()

    def encode(self, x: Tensor, *, tile: int | None = None, overlap: int | None = None) -> Moments:
        """The Gaussian of each image's latent.

        Args:
            x: (B, C, H, W) in [-1, 1], H and W multiples of the factor.
            tile: latent positions a side of a window; larger images are encoded in windows. None: never.
            overlap: latent positions that neighbours share, in [0, tile/2]; a quarter of a tile if None.

        Returns:
            Moments (B, c, H/f, W/f).

        Raises:
            BadShape: x has other than C channels, or sides that are no multiples of the factor.
            BadArgument: tile or overlap out of range, or overlap without tile.
        """
        if x.ndim != 4 or x.shape[1] != self.shape[0]:
            raise BadShape(f"autoencoder x: got shape {tuple(x.shape)}, need (B, {self.shape[0]}, H, W)")
        _check_sides(x.shape[-2], x.shape[-1], self.factor)

        def run(part: Tensor) -> Tensor:
            moments: Tensor = self.quant(self.encoder(part))
            return moments

        mean, logvar = self._tiled(run, x, self.factor, 1, tile, overlap).chunk(2, dim=1)
        return Moments(mean, logvar.clamp(*_LOGVAR))

    def decode(self, z: Tensor, *, tile: int | None = None, overlap: int | None = None) -> Tensor:
        """Pixels (B, C, f·h, f·w), about in [-1, 1] but not clipped, of latents z (B, c, h, w).

        Args:
            z: as the encoder gives them.
            tile: latent positions a side of a window; larger latents are decoded in windows. None: never.
            overlap: as in `encode`.

        Raises:
            BadShape: z has other than c channels.
            BadArgument: tile or overlap out of range, or overlap without tile.
        """
        if z.ndim != 4 or z.shape[1] != self.latent_shape[0]:
            raise BadShape(f"autoencoder z: got shape {tuple(z.shape)}, need (B, {self.latent_shape[0]}, h, w)")

        def run(part: Tensor) -> Tensor:
            pixels: Tensor = self.decoder(self.post_quant(part))
            return pixels

        return self._tiled(run, z, 1, self.factor, tile, overlap)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Moments]:
        """(the decoded sample, the moments) of x (B, C, H, W) with unit normal noise (B, c, H/f, W/f), for training."""
        moments = self.encode(x)
        return self.decode(moments.sample(noise)), moments

    @staticmethod
    def _tiled(
        run: Callable[[Tensor], Tensor], x: Tensor, inp: int, out: int, tile: int | None, overlap: int | None
    ) -> Tensor:
        if tile is None:
            if overlap is not None:
                raise BadArgument(f"overlap: got {overlap} without a tile; give tile=, or leave it out")
            return run(x)
        return in_tiles(run, x, inp=inp, out=out, tile=tile, overlap=tile // 4 if overlap is None else overlap)


def autoencoder(
    pixels: tuple[int, ...],
    *,
    latent: int = 4,
    width: int = 64,
    multipliers: tuple[int, ...] = (1, 2, 4),
    blocks: int = 2,
    middle_attention: bool = True,
    norm_groups: int | None = None,
    quant: bool = True,
    dropout: float = 0.0,
) -> Autoencoder:
    """The KL autoencoder of latent diffusion: images (C, H, W) to latents (latent, H/f, W/f), f = 2^(levels − 1).

    Level i has width·multipliers[i] channels at 1/2^i of the size: `blocks` residual blocks on the way down and
    blocks + 1 on the way up; at the size of the latents a residual block, self-attention and another stand between
    them and the rest. Three levels make a factor of 4, four of 8. Group normalisation has an eps of 1e-6.

    Args:
        pixels: (C, H, W) of one image, H and W multiples of f.
        latent: c, channels of the latent, ≥ 1.
        width: channels of level 0, ≥ 1.
        multipliers: the channels of each level over width, each at least 1.
        blocks: residual blocks a level, ≥ 1.
        middle_attention: self-attention at the size of the latents.
        norm_groups: of every norm, a divisor of all channels; `blocks.groups` of their common divisor if None.
        quant: a 1×1 convolution of the moments, and one of the latent before decoding.
        dropout: the probability of dropping a value inside a residual block, in [0, 1).

    Raises:
        BadShape: pixels are not (C, H, W), or H or W is no multiple of f.
        BadArgument: a knob is out of its range.

    Reference: Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2021 (VQGAN), table 7, for the layers.
    """
    _check(latent, width, multipliers, blocks, dropout)
    if len(pixels) != 3 or min(pixels) < 1:
        raise BadShape(f"autoencoder pixels: got {tuple(pixels)}, need (C, H, W) of at least 1 each")
    channels, high, wide = pixels
    factor = 2 ** (len(multipliers) - 1)
    _check_sides(high, wide, factor)
    widths = [width * m for m in multipliers]
    make = _Make(groups(math.gcd(*widths)) if norm_groups is None else norm_groups, dropout, middle_attention)
    encoder = Encoder(channels, latent, widths, blocks, make)
    decoder = Decoder(channels, latent, widths, blocks, make)
    return Autoencoder((channels, high, wide), latent, factor, encoder, decoder, quant)


def autoencoder_small(
    pixels: tuple[int, ...], *, latent: int = 4, width: int = 24, multipliers: tuple[int, ...] = (1, 2, 4)
) -> Autoencoder:
    """An autoencoder for CPUs: 3×64×64 to 4×16×16, one block a level."""
    return autoencoder(pixels, latent=latent, width=width, multipliers=multipliers, blocks=1)


def autoencoder_sd(pixels: tuple[int, ...], *, latent: int = 4) -> Autoencoder:
    """The autoencoder of Stable Diffusion, 83.7 M parameters: 3×512×512 to 4×64×64.

    Reference: Rombach et al. 2022, appendix G (the configuration kl-f8).
    """
    return autoencoder(pixels, latent=latent, width=128, multipliers=(1, 2, 4, 4))


def _check_sides(high: int, wide: int, factor: int) -> None:
    if high < factor or wide < factor or high % factor or wide % factor:
        near = "×".join(str(max(1, round(side / factor)) * factor) for side in (high, wide))
        raise BadShape(f"autoencoder: got images of {high}×{wide}, need multiples of {factor} pixels; try {near}")


def _check(latent: int, width: int, multipliers: tuple[int, ...], blocks: int, dropout: float) -> None:
    for what, value in (("latent", latent), ("width", width), ("blocks", blocks)):
        if value < 1:
            raise BadArgument(f"autoencoder {what}: got {value}, need at least 1")
    if not multipliers or min(multipliers) < 1:
        raise BadArgument(f"autoencoder multipliers: got {multipliers}, need at least one, each at least 1")
    if not 0 <= dropout < 1:
        raise BadArgument(f"autoencoder dropout: got {dropout}, need at least 0 and below 1")
