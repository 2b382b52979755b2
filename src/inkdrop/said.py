"""Said: what a command's options say of the samples, read and checked, as what a model is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from inkdrop.bundle import Bundle
from inkdrop.condition import Told, captioned, labels_of
from inkdrop.core.cond import Cond
from inkdrop.core.dataset import Data
from inkdrop.edit.pairs import middle_hole
from inkdrop.errors import BadArgument
from inkdrop.inputs import read_picture, read_sized
from inkdrop.reader import Reader

__all__ = ["Captioned", "Said", "attributes_of", "background_of", "each", "labels_by", "told_by", "told_of"]


class Said(NamedTuple):
    """What a command's options say of the samples; of several, each image takes the next in turn.

    Attributes:
        label: classes, by number or name.
        text: prompts.
        attribute: "NAME=VALUE" each, for all images.
        image: pictures to start from.
        mask: what is kept of them is white in it.
        negative: texts to steer away from.
    """

    label: Sequence[str] | None = None
    text: Sequence[str] | None = None
    attribute: Sequence[str] | None = None
    image: Sequence[Path] | None = None
    mask: Path | None = None
    negative: Sequence[str] | None = None


def each(values: Sequence[str] | None, count: int) -> list[str] | None:
    """One an image from a few, in turn."""
    return None if not values else [values[i % len(values)] for i in range(count)]


def told_of(bundle: Bundle, said: Said, count: int) -> Told:
    """What the model is told of `count` images.

    Raises:
        BadArgument: an attribute that is not NAME=VALUE or is given twice, a picture to a model that takes none, or no
            image.
        BadData: a picture that cannot be read, or of another size.
    """
    if count < 1:
        raise BadArgument(f"sample count: got {count}, need at least 1")
    image, mask, pair = None, None, bundle.pair
    if said.image and pair is None:
        raise BadArgument(
            "--image: this model does not start from a picture; to change one, try: inkdrop edit img2img RUN PICTURE"
        )
    if said.mask and (pair is None or not pair.masked):
        hint = "try: inkdrop edit inpaint RUN PICTURE --keep MASK" if pair is None else "leave it out"
        raise BadArgument(f"--mask: this model was not trained to fill holes; {hint}")
    if said.image and pair is not None:
        background = background_of(bundle)
        read = [read_sized(path, (pair.size, bundle.shape), background) for path in said.image]
        if len({one.shape for one in read}) > 1:
            raise BadArgument("--image: got pictures of two sizes; give all of one")
        image = torch.stack([read[i % len(read)] for i in range(count)])
    if said.mask:
        mask = read_picture(said.mask, (1, *bundle.shape[1:]))[None] > 0
    negative = each(said.negative, count)
    return Told(each(said.label, count), each(said.text, count), attributes_of(said.attribute), image, mask, negative)


def attributes_of(said: Sequence[str] | None) -> dict[str, float] | None:
    """The attributes of "NAME=VALUE" each; None where none is said.

    Raises:
        BadArgument: not of that form, or one twice.
    """
    values: dict[str, float] = {}
    for text in said or ():
        name, _, value = text.partition("=")
        if name.strip() in values:
            raise BadArgument(f"--attribute: got {name.strip()} twice; give it once, it is for all images")
        try:
            values[name.strip()] = float(value)
        except ValueError:
            raise BadArgument(f"--attribute: got {text!r}, need NAME=NUMBER") from None
    return values or None


def background_of(bundle: Bundle) -> Literal["white", "black"]:
    """What an alpha that the model does not know is laid over: as its own data were read."""
    data = bundle.recipe.data
    background: Literal["white", "black"] = "white" if data is None else data.knobs.get("background", "white")
    return background


def told_by(bundle: Bundle, data: Data, rows: Sequence[int]) -> Told:
    """What the model is told of samples of these numbers: the classes in turn, or all that comes with the data in turn.

    The latter where there is more than classes, so that class, caption, attributes and picture are of one sample; a
    model that reads is told of samples that have captions.
    """
    if not _more(bundle):
        return Told(labels_by(bundle, data, rows) or None)
    there, texts = _there(bundle, data, rows)
    x0, cond = data.take(there)
    attributes = None
    if bundle.attributes and cond is not None and cond.vec is not None:
        attributes = [dict(zip(bundle.attributes, row, strict=False)) for row in cond.vec.tolist()]
    masked = bundle.pair is not None and bundle.pair.masked
    return Told(
        _labels(bundle, cond) or None,
        texts,
        attributes,
        None if bundle.pair is None else x0,
        middle_hole(len(x0), bundle.shape) if masked else None,
    )


def labels_by(bundle: Bundle, data: Data, rows: Sequence[int]) -> list[int]:
    """The classes that `told_by` tells; none to a model without."""
    if _more(bundle):
        return _labels(bundle, data.take(_there(bundle, data, rows)[0])[1])
    label = labels_of(None, len(rows), bundle.classes, first=rows[0])
    return [] if label is None else label.tolist()


def _more(bundle: Bundle) -> bool:
    """Whether it is told more than a class."""
    return bool(bundle.reader or bundle.attributes or bundle.pair)


def _labels(bundle: Bundle, cond: Cond | None) -> list[int]:
    return cond.label.tolist() if bundle.classes and cond is not None and cond.label is not None else []


def _there(bundle: Bundle, data: Data, rows: Sequence[int]) -> tuple[list[int], list[str] | None]:
    """The rows of the data for samples of these numbers, and their captions where the model reads and there are any."""
    known: Sequence[str | None] | None = None if bundle.reader is None else getattr(data, "texts", None)
    if known is None:
        return [row % len(data) for row in rows], None
    usable = [(row, text) for row, text in enumerate(known) if text]
    there = [usable[row % len(usable)] for row in rows]
    return [row for row, _ in there], [text for _, text in there]


class Captioned:
    """A `core.dataset.Data` whose captions are among its conditions, as a reader reads them.

    Args:
        data: whose captions they are.
        reader: of the model that is told them.
    """

    def __init__(self, data: Data, reader: Reader) -> None:
        self._data, self._reader = data, reader
        self.shape, self.classes, self.levels = data.shape, data.classes, data.levels
        self.source, self.fingerprint = data.source, data.fingerprint
        self._texts: Sequence[str | None] = getattr(data, "texts", None) or [None] * len(data)

    def __len__(self) -> int:
        return len(self._data)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Cond | None]:
        """The samples at these indices, (B, C, *S), and their conditions; those without a caption have a null one."""
        x, cond = self._data.take(rows)
        return x, captioned(self._reader, cond, [self._texts[row] for row in rows])

    def name(self, row: int) -> str:
        """What to call a sample in a message."""
        return self._data.name(row)
