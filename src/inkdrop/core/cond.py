"""Cond: what a net is told besides x and its noise level (class, attributes, text, image)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inkdrop.errors import BadArgument, BadShape

__all__ = ["FIELDS", "Cond", "Terms"]

FIELDS = ("label", "vec", "text", "image")
_ALWAYS = ("augmentation", "window")  # never dropped, for they say what was done to x and not what it shows
_TENSORS = (*FIELDS, *_ALWAYS, "text_mask", "image_t")


class Terms(NamedTuple):
    """How much of each condition there is: what a net is built for, by the names of its knobs.

    Attributes:
        classes: how many classes; 0 for no label.
        attributes: D, how many continuous attributes; 0 for none.
        vocabulary: how many tokens there are, for a net with a text encoder of its own; 0 for no tokens.
        features: D of each given text embedding, for a net that takes them as they are; 0 for none.
        length: L, the most tokens or embeddings of a text; 0 without text.
        image: C', the channels of an image condition; 0 for none.
        augmentation: K, how many numbers say how a picture was augmented; 0 for none.
        coordinates: channels that say where in the full picture each pixel lies, 2; 0 for none.
    """

    classes: int = 0
    attributes: int = 0
    vocabulary: int = 0
    features: int = 0
    length: int = 0
    image: int = 0
    augmentation: int = 0
    coordinates: int = 0


@dataclass(frozen=True, eq=False)
class Cond:
    """The conditions of B rows; a field that is None is absent for all of them.

    A row whose condition was dropped (for classifier-free guidance) is marked in `nulls`, never by a special
    value: the net puts its learned null there.

    Attributes:
        label: (B,) int64, the class of each row in [0, classes).
        vec: (B, D) float, continuous attributes.
        text: (B, L) int64 tokens or (B, L, D) float embeddings.
        text_mask: (B, L) bool, True where text is real and False where it is padding.
        image: (B, C', *S) float in [-1, 1].
        image_t: (B,) float in [0, 1], the time to which the image was noised; None where it is clean.
        augmentation: (B, K) float, how each row's picture was changed at random in training; None and 0: not at all.
        window: (B, 4) float in [0, 1], which part of the full picture x is: (top, left, height, width); None: all.
        nulls: field name -> (B,) bool, True in rows where that field is null.
        against: what guidance steers away from in place of the null condition (a negative prompt), B rows; no net
            hears it.

    Raises:
        BadShape: fields of different batch size, or of the wrong dtype or rank.
    """

    label: Tensor | None = None
    vec: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    image: Tensor | None = None
    image_t: Tensor | None = None
    augmentation: Tensor | None = None
    window: Tensor | None = None
    nulls: dict[str, Tensor] = field(default_factory=dict)
    against: Cond | None = None

    def __post_init__(self) -> None:
        sizes = {name: f.shape[0] for name in (*FIELDS, *_ALWAYS) if (f := getattr(self, name)) is not None}
        if any(a != b for a, b in pairwise(sizes.values())):  # no set and no len: torch.export keeps B free
            raise BadShape(f"cond: fields of different batch size {sizes}; give each one row an image")
        if self.label is not None and (self.label.ndim != 1 or self.label.dtype != torch.int64):
            raise BadShape(f"cond label: got {self.label.dtype} {tuple(self.label.shape)}, need int64 (B,)")
        if self.vec is not None and self.vec.ndim != 2:
            raise BadShape(f"cond vec: got shape {tuple(self.vec.shape)}, need (B, D)")
        if self.text is not None and self.text_mask is None:
            object.__setattr__(self, "text_mask", self.text.new_ones(self.text.shape[:2], dtype=torch.bool))
        if self.image_t is not None and (self.image is None or self.image_t.shape != self.image.shape[:1]):
            raise BadShape(f"cond image_t: got shape {tuple(self.image_t.shape)}, need (B,), beside an image of B rows")
        for name in self.nulls:
            if name not in self.present:
                raise BadArgument(f"cond nulls: got {name!r}, which is absent; present: {', '.join(self.present)}")

    @property
    def present(self) -> tuple[str, ...]:
        """The names of the fields that are given, in the order of FIELDS."""
        return tuple(name for name in FIELDS if getattr(self, name) is not None)

    @property
    def told(self) -> tuple[str, ...]:
        """The names of all that is told: what is present, and of augmentation and window those that are given."""
        return (*self.present, *(name for name in _ALWAYS if getattr(self, name) is not None))

    def __len__(self) -> int:
        return len(getattr(self, self.told[0])) if self.told else 0

    def null_rows(self, name: str) -> Tensor:
        """(B,) bool: the rows in which field `name` is null."""
        f = getattr(self, name)
        return self.nulls.get(name, torch.zeros(f.shape[0], dtype=torch.bool, device=f.device))

    def null(self, rows: Tensor | None = None, only: Sequence[str] | None = None) -> Cond:
        """The same with fields set to null.

        Args:
            rows: (B,) bool, which rows; all by default.
            only: which fields; all that are present by default (("text",) keeps an image).
        """
        names = self.present if only is None else tuple(only)
        for name in names:
            if name not in self.present:
                raise BadArgument(f"cond null: got {name!r}, which is absent; present: {', '.join(self.present)}")
        nulls = dict(self.nulls)
        for name in names:
            was = self.null_rows(name)
            nulls[name] = torch.ones_like(was) if rows is None else was | rows.to(was.device)
        return replace(self, nulls=nulls)

    def take(self, rows: Any) -> Cond:
        """The rows selected by an index, a slice or a tensor of indices."""
        pick = {n: f[rows] for n in _TENSORS if (f := getattr(self, n)) is not None}
        against = None if self.against is None else self.against.take(rows)
        return Cond(**pick, nulls={n: f[rows] for n, f in self.nulls.items()}, against=against)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Cond:
        """The same on another device; from page-locked memory the copy may run beside what comes next."""
        move = {n: f.to(device, non_blocking=non_blocking) for n in _TENSORS if (f := getattr(self, n)) is not None}
        against = None if self.against is None else self.against.to(device, non_blocking=non_blocking)
        return Cond(
            **move, nulls={n: f.to(device, non_blocking=non_blocking) for n, f in self.nulls.items()}, against=against
        )

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Several batches as one, for a net, which hears nothing of `against`; text is padded to the longest.

        Raises:
            BadArgument: the conditions do not have the same fields.
        """
        kinds = {c.told for c in conds}
        if len(kinds) != 1:
            raise BadArgument(f"cond cat: got different fields {sorted(kinds)}; ask about them separately")
        out: dict[str, Any] = {}
        for name in conds[0].told:
            parts = [getattr(c, name) for c in conds]
            if name == "text":
                longest = max(p.shape[1] for p in parts)
                parts = [_pad(p, longest) for p in parts]
                masks = [c.text_mask for c in conds if c.text_mask is not None]
                out["text_mask"] = torch.cat([_pad(m, longest) for m in masks])
            if name == "image" and any(c.image_t is not None for c in conds):
                times = [
                    p.new_zeros(len(p)) if c.image_t is None else c.image_t for p, c in zip(parts, conds, strict=True)
                ]
                out["image_t"] = torch.cat(times)
            out[name] = torch.cat(parts)
        names = {n for c in conds for n in c.nulls}
        return Cond(**out, nulls={n: torch.cat([c.null_rows(n) for c in conds]) for n in names})


def _pad(x: Tensor, length: int) -> Tensor:
    """x of shape (B, L, ...) padded with zeros to (B, length, ...)."""
    gap = x.new_zeros((x.shape[0], length - x.shape[1], *x.shape[2:]))
    return torch.cat([x, gap], dim=1)
