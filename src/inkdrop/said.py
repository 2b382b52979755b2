"""Said: what a command's options say of the samples, read and checked, as what a model is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from inkdrop.bundle import Bundle
from inkdrop.condition import Told
from inkdrop.core.dataset import Data
from inkdrop.edit.pairs import middle_hole
from inkdrop.errors import BadArgument
from inkdrop.inputs import read_picture, read_sized

__all__ = ["Said", "each", "told_by", "told_of"]


class Said(NamedTuple):
    """What a command's options say of the samples; of several, each image takes the next in turn.

    Attributes:
        label: classes, by number or name.
        text: prompts.
        attribute: "NAME=VALUE" each, for all images.
        image: pictures to start from.
        mask: what is kept of them is white in it.
    """

    label: Sequence[str] | None = None
    text: Sequence[str] | None = None
    attribute: Sequence[str] | None = None
    image: Sequence[Path] | None = None
    mask: Path | None = None


def each(values: Sequence[str] | None, count: int) -> list[str] | None:
    """One an image from a few, in turn."""
    return None if not values else [values[i % len(values)] for i in range(count)]


def told_of(bundle: Bundle, said: Said, count: int) -> Told:
    """What the model is told of `count` images.

    Raises:
        BadArgument: an attribute that is not NAME=VALUE, or a picture to a model that takes none.
        BadData: a picture that cannot be read, or of another size.
    """
    values: dict[str, float] = {}
    for text in said.attribute or ():
        name, _, value = text.partition("=")
        try:
            values[name.strip()] = float(value)
        except ValueError:
            raise BadArgument(f"--attribute: got {text!r}, need NAME=NUMBER") from None
    image, mask, pair = None, None, bundle.pair
    if (said.image or said.mask) and pair is None:
        raise BadArgument("--image: this model does not start from a picture; to change one, try: inkdrop edit")
    if said.image and pair is not None:
        read = [read_sized(path, (pair.size, bundle.shape)) for path in said.image]
        if len({one.shape for one in read}) > 1:
            raise BadArgument("--image: got pictures of two sizes; give all of one")
        image = torch.stack([read[i % len(read)] for i in range(count)])
    if said.mask:
        mask = read_picture(said.mask, (1, *bundle.shape[1:]))[None] > 0
    return Told(each(said.label, count), each(said.text, count), values or None, image, mask)


def told_by(bundle: Bundle, data: Data, rows: Sequence[int], label: Sequence[int] | None) -> Told:
    """What the model is told of these samples: the classes given, and what else comes with the data in turn."""
    there = [row % len(data) for row in rows]
    texts, attributes, image, mask = None, None, None, None
    if bundle.reader is not None:
        known: Sequence[str | None] = getattr(data, "texts", None) or [None]
        texts = [known[row % len(known)] or "" for row in there]
    if bundle.attributes or bundle.pair is not None:
        x0, cond = data.take(there)
        image = None if bundle.pair is None else x0
        if bundle.attributes and cond is not None and cond.vec is not None:
            attributes = [dict(zip(bundle.attributes, row, strict=True)) for row in cond.vec.tolist()]
    if image is not None and bundle.pair is not None and bundle.pair.masked:
        mask = middle_hole(len(image), bundle.shape)
    return Told(label, texts, attributes, image, mask)
