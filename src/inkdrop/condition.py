"""Condition: what a caller says (a class, a text, attributes, a picture), as the Cond that a model is told."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from inkdrop.core.check import check_range
from inkdrop.core.cond import Cond
from inkdrop.edit.pairs import Pair
from inkdrop.errors import BadArgument, BadShape, UnknownName, warn
from inkdrop.model import Model
from inkdrop.reader import Reader

__all__ = ["Attributes", "Told", "as_said", "captioned", "class_of", "cond_of", "labels_of"]

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


def captioned(
    reader: Reader, cond: Cond | None, texts: Sequence[str | None], heard: Callable[[str], None] = warn
) -> Cond:
    """The condition with these captions, as `reader` reads them; rows without one are null."""
    tokens, mask = reader([text or "" for text in texts], heard)
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

    Where nothing is said of class, text, attributes and picture, all are the model's examples in turn, each with its
    own, or else its classes in turn: image i, counted from `first`, is told the same at any count. Where anything is
    said, what is not said is null.

    Raises:
        BadArgument: something that this model does not take, a picture that it needs and is not given, or something not
            said to a model that knows no null.
        BadShape: not one of each, or one an image.
        UnknownName: no class or attribute of this name.
    """
    by_default = all(part is None for part in (told.label, told.text, told.attributes, told.image))
    return as_said(model, count, replace(told, **_examples(model, count, first)) if by_default else told)


def as_said(model: Model, count: int, told: Told) -> Cond | None:
    """The condition of `count` images of which this is said, and null in the rest; None for a model that takes none.

    Every field that the model takes is there, so that any two conditions of it can be asked about at once.

    Raises:
        BadArgument, BadShape, UnknownName: as `cond_of`.
    """
    takes = {"label": model.classes, "vec": model.attributes, "text": model.reader is not None}
    said = {"label": told.label, "vec": told.attributes, "text": told.text}
    unsaid = [name for name, there in takes.items() if there and said[name] is None]
    label = 0 if "label" in unsaid else told.label
    vec = dict.fromkeys(model.attributes, 0.0) if "vec" in unsaid else told.attributes
    text, mask = _text(model, count, "" if "text" in unsaid else told.text)
    whole = Cond(
        label=labels_of(label, count, model.classes),
        vec=_vec(model, count, vec),
        text=text,
        text_mask=mask,
        image=_image(model.pair, count, told.image, told.mask, model.shape),
    )
    if unsaid and not model.guidable:
        raise _unknown_null(model, unsaid[0])
    cond = whole.null(only=unsaid) if unsaid else whole
    if told.negative is not None:
        other, seen = _text(model, count, told.negative, "negative")
        others = [name for name in whole.present if name not in ("image", "text")]
        away = whole.null(only=others) if others else whole
        cond = replace(cond, against=replace(away, text=other, text_mask=seen))
    return cond if cond.present else None


def _unknown_null(model: Model, name: str) -> BadArgument:
    """What to say where a field is left unsaid to a model that was never trained without it."""
    what, known = {"label": ("class", model.classes), "vec": ("attributes", model.attributes), "text": ("text", ())}[
        name
    ]
    return BadArgument(
        f"{what}: this model was trained without dropped conditions (train.null_rate=0), so it must be told one; "
        f"give {what if name == 'vec' else f'a {what}'}{': ' if known else ''}{', '.join(known)}"
    )


def _examples(model: Model, count: int, first: int) -> dict[str, Any]:
    """What images first … first + count − 1 are told by default: the model's examples, or its classes, in turn.

    Raises:
        BadArgument: it needs words or numbers, and has no examples of them.
    """
    own, told, rows = model.examples, dict[str, Any](), range(first, first + count)
    if model.reader is not None:
        if not own.texts:
            raise BadArgument("text: this model must be told what to draw; give --text")
        told["text"] = [own.texts[i % len(own.texts)] for i in rows]
    if model.attributes:
        if not own.attributes:
            raise BadArgument(
                f"attributes: this model needs {', '.join(model.attributes)}; give --attribute NAME=VALUE"
            )
        each = [dict(zip(model.attributes, values, strict=True)) for values in own.attributes]
        told["attributes"] = [each[i % len(each)] for i in rows]
    if model.classes:
        labels = own.labels or range(len(model.classes))
        told["label"] = [labels[i % len(labels)] for i in rows]
    return told


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


def _vec(model: Model, count: int, given: Attributes | Sequence[Attributes] | None) -> Tensor | None:
    names, out = model.attributes, []
    if given is None:
        return None
    if not names:
        raise BadArgument("attributes: got some, but this model takes none; leave them out")
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
        several = " for all; for one an image give [{...}, {...}]" if isinstance(value, (list, tuple)) else ""
        raise BadArgument(f"attribute {name}: got {value!r}, need a finite number{several}")
    return number


def _text(
    model: Model, count: int, given: str | Sequence[str] | None, what: str = "text"
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if given is None:
        return None, None
    if model.reader is None:
        raise BadArgument(f"{what}: got {_first(given)!r}, but this model reads none; leave it out")
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
        raise BadArgument("image: this model starts from a picture; give image=... (--image PATH)")
    for name, given in (("image", picture), ("mask", mask)):
        if given is not None and not isinstance(given, Tensor):
            raise BadArgument(
                f"{name}: got {type(given).__name__}, need a tensor; inkdrop.inputs.read_picture reads one"
            )
    if mask is not None and not pair.masked:
        raise BadArgument("mask: got one, but this model fills no holes; leave it out")
    if picture.ndim != 4 or tuple(picture.shape[1:]) not in (pair.size, shape):
        need = " or ".join(f"(B, {', '.join(map(str, size))})" for size in dict.fromkeys((pair.size, shape)))
        raise BadShape(f"image: got shape {tuple(picture.shape)}, need {need}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1:] != (1, *shape[1:])):
        raise BadShape(f"mask: got {mask.dtype} {tuple(mask.shape)}, need bool (B, 1, {shape[1]}, {shape[2]})")
    if mask is not None and bool(mask.all()):
        raise BadArgument("mask: keeps every pixel, so that there is nothing to fill; what is to be filled is black")
    for what, many, given in (("image", "pictures", picture), ("mask", "masks", mask)):
        if given is not None and len(given) not in (1, count):
            raise BadShape(f"{what}: got {len(given)} {many} for {count} images; give one, or one an image")
    check_range(picture, "image")
    made = pair.given(picture.float(), mask)
    return made.expand(count, *made.shape[1:]) if len(made) == 1 else made
