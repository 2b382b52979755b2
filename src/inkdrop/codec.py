"""Codec: a trained autoencoder with the measured shift and scale that give its latents mean 0 and deviation 1.

    PATH/
        autoencoder.json            what it is, the sha256 of the weights, and its own
        autoencoder.safetensors     the weights, shift and scale

`train.autoencoder.fit_autoencoder` makes one; a recipe names its folder, and a checkpoint holds a copy of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.check import check_state
from inkdrop.core.dataset import Data
from inkdrop.core.noise import generator
from inkdrop.errors import BadArgument, BadCheckpoint, BadData, InkdropError
from inkdrop.files import load_weights, own_sha256, sha256, tensors, write_folder, write_json
from inkdrop.find import Part, build
from inkdrop.nets.autoencoder import Autoencoder

__all__ = ["CARD", "WEIGHTS", "Codec", "chunk", "codec_of", "encoded", "load_codec", "measure", "save_codec"]

CARD, WEIGHTS = "autoencoder.json", "autoencoder.safetensors"
FORMAT = "inkdrop-autoencoder-1"

Numbers: TypeAlias = float | Sequence[float]

_PIXELS = 1 << 18  # of a chunk that is encoded at once
_MEASURED = 4096  # images at most, over which shift and scale are measured


class Codec(nn.Module):
    """An autoencoder with z = (mean of E(x) − shift)·scale, and back x = D(z/scale + shift).

    It is deterministic: the mean of the posterior is taken, never a sample of it.

    Attributes:
        shape: (C, H, W) of one image.
        latent_shape: (c, h, w) of its latent.
        tile: latent positions a side of the windows in which larger images are encoded and decoded (see
            `nets.tiles`), so that memory does not grow with the image; None: whole. It is not saved.

    Args:
        part: the autoencoder's name and knobs, in the room "codecs".
        pixels: (C, H, W) of one image.
        shift: the mean of each channel of its latents over its data, one number or c; in the unit of E.
        scale: one over their standard deviations, one number or c, > 0.
        card: how it was trained; plain JSON.
        net: an autoencoder of that part with its weights; a fresh one if None.

    Raises:
        BadArgument: shift or scale is not finite, scale is not positive, or there are not one or c of them.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        part: Part,
        pixels: tuple[int, ...],
        shift: Numbers = 0.0,
        scale: Numbers = 1.0,
        card: dict[str, Any] | None = None,
        *,
        net: Autoencoder | None = None,
    ) -> None:
        super().__init__()
        self.part, self.shape, self.card = part, tuple(pixels), card or {}
        self.tile: int | None = None
        self.autoencoder: Autoencoder = build("codecs", part, self.shape) if net is None else net
        self.latent_shape: tuple[int, ...] = tuple(self.autoencoder.latent_shape)
        self.register_buffer("shift", _channels("shift", shift, self.latent_shape[0]))
        self.register_buffer("scale", _channels("scale", scale, self.latent_shape[0]))
        if not bool((self.scale > 0).all()):
            raise BadArgument(f"codec scale: got {scale}, need more than 0")

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, c, H/f, W/f) of images x (B, C, H, W) in [-1, 1], whose sides are multiples of the factor f.

        Raises:
            BadShape: other channels or sides.
        """
        mean = self.autoencoder.encode(x, tile=self.tile).mean
        return (mean - self.shift[:, None, None]) * self.scale[:, None, None]

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, f·h, f·w), about in [-1, 1] but not clipped, of latents z (B, c, h, w).

        Raises:
            BadShape: other channels.
        """
        return self.autoencoder.decode(z / self.scale[:, None, None] + self.shift[:, None, None], tile=self.tile)

    def forward(self, ask: Ask) -> Belief:
        """Answer a question of="decode": x0 (B, C, H, W) is the image under the latent ask.x, clipped to [-1, 1].

        It is no belief about ask.x itself, which is of another shape; eps is 0.
        """
        x0 = self.decode(ask.x).clamp(-1, 1)
        return Belief(x0, torch.zeros_like(x0))

    @property
    def hash(self) -> str:
        """SHA-256 of what it computes: its part, the shape of its images, and every weight, in hexadecimal."""
        total = hashlib.sha256(json.dumps([self.part.name, self.part.knobs, self.shape], sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    def record(self) -> dict[str, Any]:
        """What makes it again but for its weights, as plain JSON; shift and scale are among the weights."""
        return {"name": self.part.name, "knobs": self.part.knobs, "pixels": list(self.shape), "card": self.card}


def _channels(what: str, given: Numbers, count: int) -> Tensor:
    """One number a channel, float32 (count,)."""
    value = torch.as_tensor(given, dtype=torch.float32)
    if value.shape not in ((), (count,)) or not bool(value.isfinite().all()):
        raise BadArgument(f"codec {what}: got {given}, need one finite number, or one for each of {count} channels")
    return value.expand(count).clone()


def codec_of(record: dict[str, Any], *, trust: bool = False) -> Codec:
    """A codec of a record, with fresh weights, a shift of 0 and a scale of 1.

    Args:
        record: what `Codec.record` gave.
        trust: allow an autoencoder named "my.module:thing", whose import runs its code.

    Raises:
        BadCheckpoint: the record is not of this form, or names code outside inkdrop without trust.
    """
    try:
        part, pixels = Part(record["name"], dict(record["knobs"])), tuple(record["pixels"])
        foreign = [v for v in (part.name, *part.knobs.values()) if isinstance(v, str) and ":" in v]
        if foreign and not trust:
            raise BadCheckpoint(
                f"codec: would import {foreign[0]}, code outside inkdrop; "
                "load it with trust=True (--trust) if you trust it"
            )
        if not all(isinstance(n, int) and n >= 1 for n in pixels) or math.prod(pixels) > 2**31:
            raise BadCheckpoint(f"codec: got images of {pixels}, need positive sizes")
        return Codec(part, pixels, card=dict(record.get("card", {})))
    except BadCheckpoint:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, InkdropError) as error:
        raise BadCheckpoint(f"codec: cannot be read ({error})") from None


def save_codec(codec: Codec, path: Path | str) -> None:
    """Write a codec as a new folder, whole or not at all.

    Raises:
        BadArgument: the folder exists or cannot be written, or a weight is not finite.
    """

    def card(target: Path) -> None:
        record = {"format": FORMAT, **codec.record(), "weights": sha256(target.parent / WEIGHTS)}
        write_json(target, {**record, "sha256": own_sha256(record)})

    write_folder(Path(path), {WEIGHTS: tensors(codec.state_dict()), CARD: card})


def load_codec(path: Path | str, *, trust: bool = False, device: str = "cpu") -> Codec:
    """Read a codec's folder.

    Args:
        path: the folder.
        trust: allow an autoencoder named "my.module:thing", whose import runs its code.
        device: where it goes.

    Raises:
        BadCheckpoint: a file is missing, foreign or corrupt, or names code outside inkdrop without trust.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise BadCheckpoint(f"{folder}: {what}; give an autoencoder's folder, or make one with: inkdrop autoencoder")
    if not (folder / CARD).is_file():
        raise BadCheckpoint(f"{folder}: is no autoencoder (it has no {CARD}); make one with: inkdrop autoencoder")
    try:
        record = json.loads((folder / CARD).read_text(encoding="utf-8"))
        known, weights, own = record["format"], record["weights"], record["sha256"]
        actual = sha256(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{folder}: cannot be read as an autoencoder ({error}); train it again") from None
    if known != FORMAT:
        raise BadCheckpoint(f"{folder / CARD}: is not of the format {FORMAT}")
    for file, want, got in ((CARD, own, own_sha256(record)), (WEIGHTS, weights, actual)):
        if want != got:
            raise BadCheckpoint(f"{folder / file}: is corrupt (its sha256 is not the recorded one); train it again")
    try:
        made = codec_of(record, trust=trust)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{folder}: {error}") from None
    load_weights(made, folder / WEIGHTS)
    return made.to(device).eval().requires_grad_(False)


def chunk(shape: Sequence[int]) -> int:
    """How many images of (C, H, W) are encoded at once."""
    return max(1, _PIXELS // math.prod(shape[1:]))


@torch.no_grad()
def measure(autoencoder: Autoencoder, data: Data, *, most: int = _MEASURED) -> tuple[list[float], list[float]]:
    """(shift, scale), one number a channel: with them the latents of the data have mean 0 and deviation 1.

    shift is the mean of the posterior means over images and positions, 1/scale their standard deviation, in float64.

    Args:
        autoencoder: in evaluation mode.
        data: images of its shape.
        most: a random choice of so many images is measured, always the same.

    Raises:
        BadData: a channel is the same in every image and position, or not finite.

    Reference: Rombach et al. 2022, appendix G (one scale for all channels).
    """
    device = next(autoencoder.parameters()).device
    rows = sorted(generator(0, 0, 0).permutation(len(data))[:most].tolist())
    count, total, square = 0, torch.zeros(1), torch.zeros(1)
    for first in range(0, len(rows), chunk(data.shape)):
        x = data.take(rows[first : first + chunk(data.shape)])[0]
        mean = autoencoder.encode(x.to(device)).mean.double().cpu().transpose(0, 1).flatten(1)
        count, total, square = count + mean.shape[1], total + mean.sum(1), square + mean.square().sum(1)
    shift = total / count
    deviation = (square / count - shift.square()).clamp(min=0).sqrt()
    for channel, value in enumerate(deviation.tolist()):
        if not math.isfinite(value) or value <= 1e-6:
            raise BadData(
                f"codec: channel {channel} of the latents has a deviation of {value:.2g} over {data.source}; "
                "train longer, or with less kl"
            )
    return shift.tolist(), (1 / deviation).tolist()


@torch.no_grad()
def encoded(codec: Codec, x: Tensor) -> Tensor:
    """The latents (B, c, H/f, W/f) of images x (B, C, H, W), on the CPU in float32; so many at once as memory is for.

    Raises:
        BadShape: images of another shape.
    """
    check_state(x, codec.shape, "latents")
    parts = x.split(chunk(codec.shape))
    return torch.cat([codec.encode(part.to(codec.shift.device)).float().cpu() for part in parts])
