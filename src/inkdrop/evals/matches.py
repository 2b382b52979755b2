"""Matches: judges of whether a picture shows what a text says, `inkdrop eval --match NAME`; a function each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from inkdrop.core.dataset import Data
from inkdrop.errors import BadArgument
from inkdrop.evals.scenes import judge
from inkdrop.evals.text_match import Match
from inkdrop.evals.vision import Vision, Where, device_of

__all__ = ["clip", "scenes"]


def scenes(train: Data) -> Match:
    """1 where a program finds in the picture all that the caption says and nothing else, else 0; for `shapes`.

    Args:
        train: the data set, pictures of three channels.
    """

    def scored(x: Tensor, texts: Sequence[str]) -> Tensor:
        return torch.tensor([float(verdict.right) for verdict in judge(x, texts)], dtype=torch.float64)

    if len(train.shape) != 3 or train.shape[0] != 3:
        raise BadArgument(f"match scenes: got samples of shape {train.shape}, need pictures of three channels")
    return Match("scenes", "1", "share of pictures that show all that is said and nothing else, by a program", scored)


def clip(train: Data, *, model: str, device: Where = "auto") -> Match:
    """The cosine between a CLIP's embeddings of picture and text: CLIPScore without its factor (Hessel et al. 2021).

    Args:
        train: the data set, pictures of 1, 3 or 4 channels.
        model: a folder, or a hub id, as openai/clip-vit-base-patch32. The extra `text`.
        device: where it runs.
    """
    place = device_of(device)
    pictures = Vision(train.shape, model, device=place)
    if pictures.texts is None:
        raise BadArgument(
            f"match clip: {model} has no text encoder; need a whole CLIP, as openai/clip-vit-base-patch32"
        )
    texts_of = pictures.texts

    def scored(x: Tensor, texts: Sequence[str]) -> Tensor:
        return (pictures(x).double() * texts_of(texts).double()).sum(1)

    digest = hashlib.sha256(f"clip {pictures.hash}".encode()).hexdigest()[:12]
    return Match("clip", digest, f"cosine in {pictures.note}", scored)
