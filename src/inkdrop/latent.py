"""Latent: the verbs of editing for models of latents: pictures are encoded, edited as latents, and decoded again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.nn import functional

from inkdrop.codec import Codec
from inkdrop.denoiser import Denoiser
from inkdrop.edit.inpaint import fitted
from inkdrop.errors import BadArgument
from inkdrop.generate import evaluating
from inkdrop.model import Model, Plain
from inkdrop.session import check_images

__all__ = ["in_latents", "inside", "of_pictures_only"]

P = ParamSpec("P")
Verb = Callable[P, Tensor]

_BATCH = 16  # pictures that are encoded or decoded at a time


@dataclass
class _Latents(Plain):
    """A model of latents as one of samples: its shape is theirs, and they have no range."""

    ranged: bool = False


def inside(model: Model) -> Plain:
    """A model of latents as a model of samples that are those latents.

    Raises:
        BadArgument: it works on samples themselves.
    """
    if model.codec is None:
        raise BadArgument("latents: this model works on samples themselves")
    parts: dict[str, Any] = dict(model.parts)
    own = {name: getattr(model, name) for name in ("denoiser", "classes", "plan", "guidable", "attributes", "reader")}
    return _Latents(shape=model.codec.latent_shape, pair=model.pair, examples=model.examples, parts=parts, **own)


def in_latents(*pictures: str, back: bool = True, keep: str | None = None) -> Callable[[Verb[P]], Verb[P]]:
    """Make a verb of editing work for models of latents too.

    Args:
        pictures: its parameters that are pictures (B, C, *S), which are encoded.
        back: whether its results are samples, which are decoded, rather than states.
        keep: its parameter that is a mask of pictures: a latent is kept where all of its pixels are, and the kept
            pixels themselves are laid over the result.
    """

    def decorate(verb: Verb[P]) -> Verb[P]:
        signature = inspect.signature(verb)

        @wraps(verb)
        def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            given = signature.bind(*args, **kwargs)
            model = given.arguments["model"]
            if isinstance(model, Denoiser) or model.codec is None:
                return verb(*args, **kwargs)
            codec, told = model.codec, given.arguments
            for name in pictures:
                check_images(model, told[name], verb.__name__)
            whole = {name: told[name] for name in pictures}
            mask = None if keep is None else fitted(told[keep], whole[pictures[0]])
            changed = {name: _encoded(codec, x) for name, x in whole.items()}
            changed |= {} if keep is None or mask is None else {keep: _shrunk(codec, mask)}
            told.update(model=inside(model), **changed)
            made = verb(*given.args, **given.kwargs)
            if told.get("strength") == 0:  # nothing was drawn, so nothing is lost in the autoencoder either
                same: Tensor = whole[pictures[0]].detach().to("cpu", torch.float32, copy=True)
                return same
            made = _decoded(codec, made) if back else made
            return made if mask is None else torch.where(mask.to(made.device), whole[pictures[0]].to(made), made)

        return run

    return decorate


def of_pictures_only(verb: Verb[P]) -> Verb[P]:
    """Refuse models of latents: what the verb holds is known of pixels, not of their latents."""

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        model: Any = args[0] if args else kwargs["model"]
        if not isinstance(model, Denoiser) and model.codec is not None:
            raise BadArgument(f"{verb.__name__}: got a model of latents, need one of pictures; try inpaint or img2img")
        return verb(*args, **kwargs)

    return run


def _place(codec: Codec) -> torch.device:
    return codec.shift.device


@torch.no_grad()
def _encoded(codec: Codec, x: Tensor) -> Tensor:
    with evaluating(codec):
        return torch.cat([codec.encode(part.to(_place(codec), torch.float32)).cpu() for part in x.split(_BATCH)])


@torch.no_grad()
def _decoded(codec: Codec, z: Tensor) -> Tensor:
    """(..., c, h, w) -> (..., C, H, W), clipped to [-1, 1]."""
    flat = z.reshape(-1, *z.shape[-3:])
    with evaluating(codec):
        parts = [codec.decode(part.to(_place(codec))).clamp(-1, 1).cpu() for part in flat.split(_BATCH)]
    whole = torch.cat(parts)
    return whole.reshape(*z.shape[:-3], *whole.shape[1:])


def _shrunk(codec: Codec, mask: Tensor) -> Tensor:
    """Of a mask (B, C, H, W) of pixels that of latents (B, 1, h, w): kept where every pixel under it is."""
    rows = mask.all(dim=1, keepdim=True)
    lost = functional.adaptive_max_pool2d((~rows).float(), codec.latent_shape[1:])
    kept = lost == 0
    if not bool(kept.any()):
        raise BadArgument("inpaint keep: no latent is kept whole; keep larger areas")
    return kept
