"""Embeddings: how a net is told the time and the class."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadShape
from inkdrop.nets.blocks import zeroed

__all__ = [
    "AttributeEmbedding",
    "ClassEmbedding",
    "Context",
    "Coordinates",
    "Fourier",
    "ImageCondition",
    "Sinusoid",
    "Wave",
    "check_input",
    "sinusoid",
]

Wave: TypeAlias = Literal["sinusoidal", "fourier"]


def sinusoid(
    clock: Tensor, width: int, *, max_period: float = 10_000.0, shift: float = 1.0, cos_first: bool = False
) -> Tensor:
    """Sines and cosines of the clock at geometrically spaced frequencies.

    [sin(clock·f_0) … sin(clock·f_{h−1}), cos(clock·f_0) … cos(clock·f_{h−1})], h = width/2,
    f_i = max_period^{−i/(h − shift)}: from 1 to 1/max_period radians a unit of clock where shift = 1.

    Args:
        clock: (B,) float, in any unit; computed in its own dtype.
        width: numbers a row, even, at least 4.
        max_period: the longest wavelength over 2·pi, in units of the clock, > 1.
        shift: 1 for DDPM (the last frequency is exactly 1/max_period), 0 for ADM and "Attention is all you need".
        cos_first: cosines before sines (ADM, DiT).

    Returns:
        (B, width), in [−1, 1]; with the defaults what DDPM's code and diffusers' `get_timestep_embedding` with
        `flip_sin_to_cos=False, downscale_freq_shift=1` give.

    Raises:
        BadArgument: width is odd or below 4.

    Reference: Vaswani et al. 2017, §3.5; Ho et al. 2020, appendix B.
    """
    if width < 4 or width % 2:
        raise BadArgument(f"sinusoid width: got {width}, need an even number of at least 4; try {max(4, width + 1)}")
    half = width // 2
    steps = torch.arange(half, dtype=clock.dtype, device=clock.device)
    angle = clock[:, None] * torch.exp(steps * (-math.log(max_period) / (half - shift)))
    parts = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return torch.cat(parts, dim=1)


class Sinusoid(nn.Module):
    """The sinusoidal embedding of DDPM as a layer: (B,) -> (B, width), see `sinusoid`."""

    def __init__(self, width: int, *, shift: float = 1.0, cos_first: bool = False) -> None:
        super().__init__()
        self.width, self.shift, self.cos_first = width, shift, cos_first

    def forward(self, clock: Tensor) -> Tensor:
        """(B,) float -> (B, width) in [−1, 1], in the clock's dtype."""
        return sinusoid(clock, self.width, shift=self.shift, cos_first=self.cos_first)


class Fourier(nn.Module):
    """Sines and cosines of the clock at random frequencies, fixed when the net is made and saved with it.

    [sin(2·pi·f_i·clock), cos(2·pi·f_i·clock)] with f_i ~ N(0, scale²), rounded to the eight significant bits of
    bfloat16, so that a net hears the same frequencies after it is cast to half precision.

    Args:
        width: numbers a row, even, at least 2.
        scale: the standard deviation of the frequencies, in cycles a unit of clock, > 0; 16 suits a clock of order
            1 (EDM's quarter log sigma, flow time), not the 0…999 of a DDPM table.

    Raises:
        BadArgument: width is odd or below 2; scale is not positive.

    Reference: Tancik et al. 2020, eq. 5; Song et al. 2021 (score SDE), appendix C.2.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 16.0) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise BadArgument(f"fourier width: got {width}, need an even number of at least 2; try {width + 1}")
        if not scale > 0:
            raise BadArgument(f"fourier scale: got {scale}, need more than 0; try 16")
        self.register_buffer("frequencies", (torch.randn(width // 2) * scale).bfloat16().float())

    def forward(self, clock: Tensor) -> Tensor:
        """(B,) float -> (B, width) in [−1, 1], in the clock's dtype."""
        angle = 2 * math.pi * clock[:, None] * self.frequencies.to(clock.dtype)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class ClassEmbedding(nn.Module):
    """A learned vector for each class, and one more for "no class" (the null of classifier-free guidance).

    Rows whose label is null get the null vector whatever their label says; no label value is special. The class
    vectors start as N(0, 1), the null at their mean, 0.

    Args:
        classes: how many classes, at least 1.
        width: numbers a vector.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, cond: Cond | None, rows: int) -> Tensor:
        """The class vectors of a batch.

        Args:
            cond: whose label (B,) is used; None, or without a label, is null in every row.
            rows: B.

        Returns:
            (B, width), in the weights' dtype.

        Raises:
            BadArgument: a label is outside [0, classes) (looked at on the CPU only, and not while compiling or
                exporting: on an accelerator the look would wait for the device).
        """
        if cond is None or cond.label is None:
            return self.null.expand(rows, -1)
        label = cond.label
        if label.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = label[(label < 0) | (label >= self.classes)]
            if len(wrong):
                raise BadArgument(f"cond label: got {int(wrong[0])}, need 0 to {self.classes - 1}")
        return torch.where(cond.null_rows("label")[:, None], self.null, self.table(label))


class AttributeEmbedding(nn.Module):
    """A linear map of D continuous attributes, W·vec + b, and a learned vector for rows without them.

    Args:
        attributes: D, at least 1.
        width: numbers a vector.
    """

    def __init__(self, attributes: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(attributes, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, cond: Cond | None, rows: int) -> Tensor:
        """The vectors of a batch, (B, width) in the weights' dtype; null in every row where cond has no vec.

        Raises:
            BadShape: vec is not (B, D).
        """
        if cond is None or cond.vec is None:
            return self.null.expand(rows, -1)
        if cond.vec.shape[1] != self.linear.in_features:
            raise BadShape(f"cond vec: got {cond.vec.shape[1]} attributes, need {self.linear.in_features}")
        told = self.linear(cond.vec.to(self.linear.weight.dtype))
        return torch.where(cond.null_rows("vec")[:, None], self.null, told)


class Context(nn.Module):
    """What every block of a net is told, as one vector a row: time, class, attributes, how noisy an image condition is.

    context = W2·silu(W1·wave(clock) + b1) + b2 + class + attributes + augment + augmentation: DDPM's time MLP with
    ADM's class term. Each further term is there only where the net takes it; augment is an MLP like the time's, of
    1000·image_t; augmentation is linear without a bias and starts at 0, so that zeros mean nothing.

    Args:
        width: numbers of the wave embedding, even, at least 4.
        out: numbers of the context.
        classes: how many classes; 0 for a net that takes none.
        attributes: how many continuous attributes; 0 for a net that takes none.
        augment: whether it is told the time at which an image condition was noised (Ho et al. 2022, cascades, §4.2).
        augmentation: how many numbers say how a picture was augmented; 0 for a net that is not told.
        also: what other parts of the net take of a condition: "text", "image", "window".
        embedding: "sinusoidal" for any clock; "fourier" for a clock of order 1.
        fourier_scale: the standard deviation of the frequencies, in cycles a unit of clock; 16 if None. Only with
            embedding "fourier".
        shift: of the sinusoid's frequencies, see `sinusoid`: 1 for DDPM, 0 for ADM.
        cos_first: the sinusoid's cosines before its sines (ADM, DiT).

    Raises:
        BadArgument: negative classes or attributes, an unknown embedding, or a fourier_scale that would have no effect.
    """

    def __init__(
        self,
        width: int,
        out: int,
        *,
        classes: int = 0,
        attributes: int = 0,
        augment: bool = False,
        augmentation: int = 0,
        also: tuple[str, ...] = (),
        embedding: Wave = "sinusoidal",
        fourier_scale: float | None = None,
        shift: float = 1.0,
        cos_first: bool = False,
    ) -> None:
        super().__init__()
        for name, count in (("classes", classes), ("attributes", attributes), ("augmentation", augmentation)):
            if count < 0:
                raise BadArgument(f"net {name}: got {count}, need 0 (none) or more")
        if embedding not in ("sinusoidal", "fourier"):
            raise BadArgument(f"net embedding: got {embedding!r}, need 'sinusoidal' or 'fourier'")
        if embedding == "sinusoidal" and fourier_scale is not None:
            raise BadArgument(f"net fourier_scale: got {fourier_scale} with embedding 'sinusoidal'; try 'fourier'")
        if embedding == "fourier" and (shift != 1 or cos_first):
            raise BadArgument(
                f"net shift, cos_first: got {shift}, {cos_first} with embedding 'fourier'; try 'sinusoidal'"
            )
        scale = 16.0 if fourier_scale is None else fourier_scale
        wave = Sinusoid(width, shift=shift, cos_first=cos_first)
        self.wave = wave if embedding == "sinusoidal" else Fourier(width, scale)
        self.linear1 = nn.Linear(width, out)
        self.linear2 = nn.Linear(out, out)
        self.label = ClassEmbedding(classes, out) if classes else None
        self.vec = AttributeEmbedding(attributes, out) if attributes else None
        self.augment = (
            nn.Sequential(Sinusoid(width), nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out)) if augment else None
        )
        self.augmentation = zeroed(nn.Linear(augmentation, out, bias=False)) if augmentation else None
        parts = (("label", self.label), ("vec", self.vec), ("augmentation", self.augmentation))
        own = [name for name, part in parts if part is not None]
        self.takes = (*own, *also)

    @property
    def classes(self) -> int:
        """How many classes it takes; 0 for none."""
        return 0 if self.label is None else self.label.classes

    def forward(self, clock: Tensor, cond: Cond | None) -> Tensor:
        """The context of a batch.

        Args:
            clock: (B,) float32 or float64.
            cond: the conditions of the B rows, or None.

        Returns:
            (B, out), in the weights' dtype.

        Raises:
            BadArgument: cond carries a field that this net does not take, or a label out of range.
            BadShape: cond has another number of rows than clock.
        """
        rows = clock.shape[0]
        self._check(cond, rows)
        hidden = self.linear1(self.wave(clock).to(self.linear1.weight.dtype))
        context: Tensor = self.linear2(functional.silu(hidden))
        for part in (self.label, self.vec):
            if part is not None:
                context = context + part(cond, rows)
        if self.augment is not None:
            context = context + self.augment(_noised(cond, clock).to(context.dtype))
        if self.augmentation is not None and cond is not None and cond.augmentation is not None:
            if cond.augmentation.shape[1] != self.augmentation.in_features:
                got, need = tuple(cond.augmentation.shape), f"(B, {self.augmentation.in_features})"
                raise BadShape(f"cond augmentation: got shape {got}, need {need}")
            context = context + self.augmentation(cond.augmentation.to(context.dtype))
        return context

    def _check(self, cond: Cond | None, rows: int) -> None:
        if cond is None or not cond.told:
            return
        for name in cond.told:
            if name not in self.takes:
                knob = _KNOBS.get(name, name)
                hint = f"make the net with {knob}=n (--set net=unet takes all), or leave it out"
                raise BadArgument(f"net cond: got {name}, this net takes {', '.join(self.takes) or 'none'}; {hint}")
        if cond.image_t is not None and self.augment is None:
            raise BadArgument(
                "net cond: got image_t, but this net is not told how noisy its image is; "
                "try augment=true (--set net.augment=true)"
            )
        if len(cond) != rows:
            raise BadShape(f"net cond: got {len(cond)} rows, need {rows}, one for each row of x")


_KNOBS = {"label": "classes", "vec": "attributes", "text": "vocabulary", "window": "coordinates"}
"""By which knob a net takes what is told, where that has another name."""


def _noised(cond: Cond | None, clock: Tensor) -> Tensor:
    """1000·image_t as (B,) in the clock's dtype; 0 where the image is clean, null or not there."""
    if cond is None or cond.image_t is None:
        return torch.zeros_like(clock)
    return torch.where(cond.null_rows("image"), 0, 1000 * cond.image_t).to(clock.dtype)


class ImageCondition(nn.Module):
    """An image that is joined to x along the channels, and a learned colour for rows without one.

    Args:
        channels: C' of the condition, at least 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.zeros(channels))

    def forward(self, cond: Cond | None, x: Tensor) -> Tensor:
        """The condition of x (B, C, H, W) at its size and in its dtype: (B, C', H, W).

        An image of another size is resized bilinearly, half-pixel centres. A null row, or every row where cond has no
        image, is the null in every pixel.

        Raises:
            BadShape: the image is not (B, C', h, w).
        """
        null = self.null[None, :, None, None]
        if cond is None or cond.image is None:
            return null.to(x.dtype).expand(x.shape[0], -1, *x.shape[-2:])
        image = cond.image.to(x.dtype)
        if image.ndim != 4 or image.shape[1] != self.null.shape[0]:
            got, need = tuple(image.shape), f"(B, {self.null.shape[0]}, H, W)"
            raise BadShape(f"cond image: got shape {got}, need {need}")
        if image.shape[-2:] != x.shape[-2:]:
            image = functional.interpolate(image, size=x.shape[-2:], mode="bilinear")
        return torch.where(cond.null_rows("image")[:, None, None, None], null.to(x.dtype), image)


class Coordinates(nn.Module):
    """Where in the full picture each pixel's middle lies: two channels joined to x (Wang et al. 2023).

    Args:
        channels: 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels != 2:
            raise BadArgument(f"net coordinates: got {channels}, need 2 (y and x), or 0 for none")

    def forward(self, cond: Cond | None, x: Tensor) -> Tensor:
        """(y, x) of each pixel of x (B, C, H, W), −1 and 1 at the edges of the full picture: (B, 2, H, W).

        x is the part of it that cond.window says, or all of it where there is none.
        """
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=x.device).expand(x.shape[0], 4)
        top, left, high, wide = (whole if cond is None or cond.window is None else cond.window.to(x.device)).T
        middles = [(torch.arange(side, device=x.device) + 0.5) / side for side in x.shape[2:]]
        down, across = (
            2 * (first[:, None] + length[:, None] * middle) - 1
            for first, length, middle in zip((top, left), (high, wide), middles, strict=True)
        )
        planes = (down[:, :, None].expand(-1, *x.shape[2:]), across[:, None, :].expand(-1, *x.shape[2:]))
        return torch.stack(planes, dim=1).to(x.dtype)


def check_input(x: Tensor, clock: Tensor, shape: tuple[int, ...], *, any_size: bool) -> None:
    """Refuse a batch that a net made for `shape` cannot take; looks at shapes and dtypes only.

    Args:
        x: what should be (B, C, *S).
        clock: what should be (B,) float32 or float64.
        shape: (C, *S) that the net was made for.
        any_size: whether S may differ from the net's own.

    Raises:
        BadShape: x or clock is of another shape, or clock is not float32 or float64.
    """
    if x.ndim != len(shape) + 1:
        raise BadShape(f"net x: got shape {tuple(x.shape)}, need (B, {', '.join(map(str, shape))})")
    if x.shape[1] != shape[0]:
        raise BadShape(f"net x: got {x.shape[1]} channels, need {shape[0]}")
    if not any_size and tuple(x.shape[1:]) != shape:
        raise BadShape(f"net x: got shape {tuple(x.shape)}, need (B, {', '.join(map(str, shape))})")
    if clock.shape != x.shape[:1] or clock.dtype not in (torch.float32, torch.float64):
        got = f"{str(clock.dtype).removeprefix('torch.')} {tuple(clock.shape)}"
        raise BadShape(f"net clock: got {got}, need float32 or float64 ({x.shape[0]},)")
