"""Condition: what a caller says (a class, a text, attributes, a picture), as the Cond that a model is told."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from inkdrop.core.check import check_range
from inkdrop.core.cond import Cond
from inkdrop.edit.pairs import Pair
from inkdrop.errors import BadArgument, BadShape, UnknownName
from inkdrop.model import Model
from inkdrop.reader import Reader

__all__ = ["Attributes", "Told", "captioned", "class_of", "cond_of", "labels_of"]

Attributes: TypeAlias = Mapping[str, float]
"""An attribute's name -> its value."""


@dataclass(frozen=True)
class Told:
    """What a caller says of some images: one of each, or one an image.

    Attributes:
        label: a class or its name.
        text: a prompt.
        attributes: values by name, all of the model's.
        image: (B or 1, C, h, w) in [-1, 1], of the data's size or of that of the model's small pictures.
        mask: (B or 1, 1, H, W) bool, True where the image is kept; only for models that fill holes.
        negative: a text to steer away from by guidance, in place of no text.
    """

    label: int | str | Sequence[int | str] | None = None
    text: str | Sequence[str] | None = None
    attributes: Attributes | Sequence[Attributes] | None = None
    image: Tensor | None = None
    mask: Tensor | None = None
    negative: str | Sequence[str] | None = None

    @property
    def nothing(self) -> bool:
        """Whether nothing was said."""
        return all(
            part is None for part in (self.label, self.text, self.attributes, self.image, self.mask, self.negative)
        )


def labels_of(
    label: int | str | Sequence[int | str] | None, count: int, classes: tuple[str, ...], *, first: int = 0
) -> Tensor | None:
    """(count,) int64 labels from a class, its name, or one of either for each image; None cycles through all classes.

    By default image i, counted from `first`, has label i mod classes: the same at any count.

    Raises:
        BadArgument: a label to a model without classes, or one outside them.
        UnknownName: no class of this name.
        BadShape: not one label an image.
    """
    if not classes:
        if label is not None:
            raise BadArgument(f"class: got {_first(label)!r}, but this model has no classes; leave it out")
        return None
    if label is None:
        return torch.arange(first, first + count) % len(classes)
    each = _each("class", "labels", label, count, (int, str))
    return torch.tensor([class_of(one, classes) for one in each], dtype=torch.int64)


def captioned(reader: Reader, cond: Cond | None, texts: Sequence[str | None]) -> Cond:
    """The condition with these captions, as `reader` reads them; rows without one are null."""
    tokens, mask = reader([text or "" for text in texts])
    none = torch.tensor([text is None for text in texts])
    nulls = {} if cond is None else cond.nulls
    nulls = {**nulls, "text": none} if bool(none.any()) else nulls
    return replace(cond or Cond(), text=tokens, text_mask=mask, nulls=nulls)


def class_of(one: int | str, classes: tuple[str, ...], what: str = "class") -> int:
    """The number of a class, from its number or its name.

    Raises:
        UnknownName: no class of this name.
        BadArgument: a number outside the classes.
    """
    given: Any = one
    if isinstance(given, str):
        if given in classes:
            return classes.index(given)
        if not re.fullmatch(r"-?[0-9]+", given):
            raise UnknownName(what, given, classes)
    elif not isinstance(given, Real) or given % 1 != 0:
        raise BadArgument(f"{what}: got {one!r}, need a whole number, or a name: {', '.join(classes)}")
    if not 0 <= int(one) < len(classes):
        raise BadArgument(
            f"{what}: got {one}, need a number in [0, {len(classes) - 1}], or a name: {', '.join(classes)}"
        )
    return int(one)


def cond_of(model: Model, count: int, told: Told, *, first: int = 0) -> Cond | None:
    """The condition of `count` images of a model; None for a model that takes none.

    What is left out is filled in: the classes in turn, the model's example texts and attributes in turn (where neither
    is given, with the examples' own classes), so that image i, counted from `first`, is told the same at any count. A
    picture cannot be filled in.

    Raises:
        BadArgument: something that this model does not take, or a picture that it needs and is not given.
        BadShape: not one of each, or one an image.
        UnknownName: no class or attribute of this name.
    """
    label, own = told.label, model.examples.labels
    if label is None and own and told.text is None and told.attributes is None:
        label = [own[i % len(own)] for i in range(first, first + count)]
    labels = labels_of(label, count, model.classes, first=first)
    vec = _vec(model, count, told.attributes, first)
    text, mask = _text(model, count, told.text, first)
    image = _image(model.pair, count, told.image, told.mask, model.shape)
    cond = Cond(label=labels, vec=vec, text=text, text_mask=mask, image=image)
    if told.negative is not None:
        other, seen = _text(model, count, told.negative, first, "negative")
        dropped = [name for name in cond.present if name not in ("image", "text")]
        away = cond.null(only=dropped) if dropped else cond
        cond = replace(cond, against=replace(away, text=other, text_mask=seen))
    return cond if cond.present else None


def _first(given: Any) -> Any:
    """The first of several, for a message."""
    return next(iter(given), None) if isinstance(given, Iterable) and not isinstance(given, str) else given


def _each(what: str, many: str, given: Any, count: int, single: type | tuple[type, ...]) -> list[Any]:
    """One an image, from one or from as many."""
    given = given.tolist() if isinstance(given, Tensor) else given
    if isinstance(given, single):
        return [given] * count
    if not isinstance(given, Iterable):
        raise BadArgument(f"{what}: got {given!r}, need one, or one an image")
    each = list(given)
    if len(each) != count:
        raise BadShape(f"{what}: got {len(each)} {many} for {count} images; give one, or one an image")
    return each


def _vec(model: Model, count: int, given: Attributes | Sequence[Attributes] | None, first: int) -> Tensor | None:
    names = model.attributes
    if not names:
        if given is not None:
            raise BadArgument("attributes: got some, but this model takes none; leave them out")
        return None
    if given is None:
        rows = model.examples.attributes
        if not rows:
            raise BadArgument(f"attributes: this model needs {', '.join(names)}; give --attribute NAME=VALUE")
        return torch.tensor([rows[i % len(rows)] for i in range(first, first + count)], dtype=torch.float32)
    out = []
    for each in _each("attributes", "sets", given, count, Mapping):
        if not isinstance(each, Mapping):
            raise BadArgument(f"attributes: got {each!r}, need values by name: {', '.join(names)}")
        for name in each:
            if name not in names:
                raise UnknownName("attribute", name, names)
        missing = [name for name in names if name not in each]
        if missing:
            raise BadArgument(f"attributes: {missing[0]} is missing; give all of {', '.join(names)}")
        out.append([_number(name, each[name]) for name in names])
    return torch.tensor(out, dtype=torch.float32)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) < 3e38:  # it must be finite as float32
        raise BadArgument(f"attribute {name}: got {value!r}, need a finite number")
    return number


def _text(
    model: Model, count: int, given: str | Sequence[str] | None, first: int, what: str = "text"
) -> tuple[Tensor | None, Tensor | None]:
    if model.reader is None:
        if given is not None:
            raise BadArgument(f"{what}: got {_first(given)!r}, but this model reads none; leave it out")
        return None, None
    if given is None:
        texts = model.examples.texts
        if not texts:
            raise BadArgument("text: this model must be told what to draw; give --text")
        return model.reader([texts[i % len(texts)] for i in range(first, first + count)])
    each = _each(what, "texts", given, count, str)
    if not all(isinstance(one, str) for one in each):
        raise BadArgument(f"{what}: got {next(one for one in each if not isinstance(one, str))!r}, need a text")
    return model.reader(each)


def _image(
    pair: Pair | None, count: int, picture: Tensor | None, mask: Tensor | None, shape: tuple[int, ...]
) -> Tensor | None:
    if pair is None:
        if picture is not None or mask is not None:
            raise BadArgument("image: got a picture, but this model takes none; try: inkdrop edit")
        return None
    if picture is None:
        raise BadArgument("image: this model starts from a picture; give --image PATH")
    if mask is not None and not pair.masked:
        raise BadArgument("mask: got one, but this model fills no holes; leave it out")
    if tuple(picture.shape[1:]) not in (pair.size, shape):
        raise BadShape(f"image: got shape {tuple(picture.shape[1:])}, need {pair.size} or {shape}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1:] != (1, *shape[1:])):
        raise BadShape(f"mask: got {mask.dtype} {tuple(mask.shape)}, need bool (B, 1, {shape[1]}, {shape[2]})")
    for what, many, given in (("image", "pictures", picture), ("mask", "masks", mask)):
        if given is not None and len(given) not in (1, count):
            raise BadShape(f"{what}: got {len(given)} {many} for {count} images; give one, or one an image")
    check_range(picture, "image")
    made = pair.given(picture.float(), mask)
    return made.expand(count, *made.shape[1:]) if len(made) == 1 else made
