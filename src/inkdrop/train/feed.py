"""Feed: what an update is made of: samples, the conditions that come with them, and what is made of both."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inkdrop.augmentation import Augmentation
from inkdrop.bundle import Bundle, pair_of, shown_of, terms_of
from inkdrop.codec import Codec, encoded, load_codec
from inkdrop.condition import Told, captioned
from inkdrop.core.cond import Cond, Terms
from inkdrop.core.dataset import Data, Forward
from inkdrop.core.forward import diffuse
from inkdrop.core.noise import Draw
from inkdrop.core.schedule import Schedule
from inkdrop.edit.pairs import middle_hole
from inkdrop.errors import BadArgument, warn
from inkdrop.model import Examples
from inkdrop.reader import Reader, reader_of
from inkdrop.recipe import Recipe, open_data
from inkdrop.train.frames import Frames
from inkdrop.train.latents import Latents, check_images

__all__ = ["Feed"]

_READ = 1_000_000
"""The most captions that a vocabulary is learned from."""

EXAMPLES = 16
"""How many held-out captions and attributes a model keeps, to be sampled with unless it is told others."""


class Feed:
    """The data of a recipe in both splits, how they are read, and the batches that are made of them.

    Args:
        recipe: names the data, how captions are read, image conditions are made and pictures augmented, and the codec.
        device: where the codec encodes.
        known: the model of a run that goes on: texts are read and pictures encoded as it does.
        trust: allow the codec's folder to name code outside inkdrop.

    Attributes:
        data: the training split as samples.
        held_out: the test split as samples.
        reader: of captions; None where none are read.
        codec: the autoencoder in whose latents the model works; None for the samples themselves.
        pair: how image conditions are made; None where there are none.
        frames: which part of a picture an update sees, at which size.
        terms: how much of each condition there is.
        shape: (C, *S) of what is noised.

    Raises:
        BadArgument: a recipe that reads captions of data that have none, noises images that it does not have, or
            changes pictures whose latents are kept.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, known: Bundle | None = None, *, trust: bool = False
    ) -> None:
        self.recipe = recipe
        self.data, self.held_out = open_data(recipe.data, "train"), open_data(recipe.data, "test")
        if not len(self.data):
            raise BadArgument(f"train: {self.data.source} holds no samples")
        self.reader: Reader | None = None if known is None else known.reader
        self._cut, self._lock = False, threading.Lock()
        if recipe.text is not None and not (self.reader is not None and isinstance(self.data, Forward)):
            texts = self._captions()  # which a stream would be read through for
            self.reader = self.reader or reader_of(recipe.text, texts)
        self.pair = pair_of(recipe, self.data.shape)
        if self.pair is None and recipe.train.augment:
            raise BadArgument(f"train.augment: got {recipe.train.augment:g}, but there is no image condition to noise")
        self.codec: Codec | None = None if known is None else known.codec
        self._augmentation = Augmentation(recipe.augment)
        self._states: dict[int, Data] = {}
        if recipe.codec is None and not recipe.train.cache:
            raise BadArgument("train.cache: got false, but there is no codec whose latents could be kept; leave it out")
        if recipe.codec is not None and self.augmented and recipe.train.cache:
            names = ", ".join(part.name for part in recipe.augment)
            raise BadArgument(
                f"augment: got {names} beside a codec, whose latents of each picture are kept; use augment=none, or "
                "train.cache=false"
            )
        if recipe.codec is not None:
            self.codec = self.codec or load_codec(recipe.codec, trust=trust)
            self.codec.to(device)
            self._open(self.codec)
        self.shape: tuple[int, ...] = self.data.shape if self.codec is None else self.codec.latent_shape
        attributes = len(getattr(self.data, "attributes", ()))
        shown = shown_of(recipe, self.data.shape)
        self.terms: Terms = terms_of(len(self.data.classes), attributes, self.reader, self.pair, *shown)
        self.frames = Frames(recipe, self.shape)

    @property
    def augmented(self) -> bool:
        """Whether training pictures are changed at random, so that nothing made of them can be kept for later."""
        return bool(self.recipe.augment)

    def _open(self, codec: Codec) -> None:
        """Have the latents of both splits at hand, or else see that they can be made as they are needed."""
        for data in (self.data, self.held_out):
            if self.recipe.train.cache:
                self._states[id(data)] = Latents(data, codec)
            elif len(data):
                check_images(data, codec)

    def _state(self, data: Data) -> Data:
        """The data as what is noised: their latents where there is a codec."""
        return self._states.get(id(data), data)

    def _captions(self) -> list[str]:
        """The captions of the training split, of which a reader is made."""
        texts = list(itertools.islice((text for text in self._texts(self.data) if text), _READ))
        if not texts:
            raise BadArgument(f"text: {self.data.source} has no captions to read; leave text out (--set text=none)")
        return texts

    @staticmethod
    def _texts(data: Data) -> Sequence[str | None]:
        """The caption of each sample, None where it has none."""
        return getattr(data, "texts", None) or [None] * len(data)

    def take(
        self, rows: Sequence[int], draw: Draw, schedule: Schedule, *, held_out: bool = False
    ) -> tuple[Tensor, Cond | None]:
        """What is noised (B, C, *S) and its conditions, none of them dropped.

        Args:
            rows: which samples.
            draw: the randomness of augmentation, image conditions and windows.
            schedule: on which image conditions are noised, where they are.
            held_out: of the test split rather than the training split.
        """
        data = self.held_out if held_out else self.data
        x0, cond = self._state(data).take(rows)
        if self.augmented and not held_out:
            x0, numbers = self._augmentation(x0, draw)
            cond = replace(cond or Cond(), augmentation=numbers) if numbers.shape[1] else cond
        if self.reader is not None:
            cond = self._read(cond, [self._texts(data)[row] for row in rows])
        if self.pair is not None:
            cond = self._pictured(cond, data.take(rows)[0] if self._states else x0, draw, schedule)
        if self.codec is not None and not self._states:
            with self._lock:
                x0 = encoded(self.codec, x0)
        return (x0, cond) if held_out else self.frames.cut(x0, cond, draw)

    def _read(self, cond: Cond | None, texts: Sequence[str | None]) -> Cond:
        """The condition with captions; that the reader cuts some is said once, not at every update."""
        if self.reader is None:
            raise BadArgument("text: there is no reader")
        return captioned(self.reader, cond, texts, self._hear)

    def _hear(self, text: str) -> None:
        """Warn of the first text that the reader cuts, whichever thread it is that reads it."""
        with self._lock:
            before, self._cut = self._cut, True
        if not before:
            warn(text)

    def _pictured(self, cond: Cond | None, pictures: Tensor, draw: Draw, schedule: Schedule) -> Cond:
        """The condition with the image that is made of each picture, noised a little where the recipe says so."""
        if self.pair is None:
            raise BadArgument("image: there is no image condition")
        image, most = self.pair.make(pictures, draw), self.recipe.train.augment
        if not most:
            return replace(cond or Cond(), image=image)
        t = draw.uniform("image_time") * most
        noise = draw.normal(image.shape, image.dtype, "image")
        level = schedule(t.clamp(min=schedule.least))
        noised = torch.where((t < schedule.least).reshape(-1, 1, 1, 1), image, diffuse(image, noise, level))
        return replace(cond or Cond(), image=noised, image_t=t.float())

    def _shown(self) -> tuple[Data, list[int]]:
        """The samples that a model is looked at with: the first held-out ones, with captions where it reads."""
        for data in (self.held_out, self.data):
            texts = None if self.reader is None else self._texts(data)
            rows = [row for row in range(len(data)) if texts is None or texts[row]][:EXAMPLES]
            if rows:
                return data, rows
        raise BadArgument(f"train: {self.data.source} holds no sample to look at")

    def examples(self) -> Examples:
        """Captions, attributes and classes of the samples that a model is looked at with."""
        if self.reader is None and not self.terms.attributes:
            return Examples()
        data, rows = self._shown()
        texts = () if self.reader is None else tuple(text for row in rows if (text := self._texts(data)[row]))
        told = data.take(rows)[1] or Cond()
        vec = () if told.vec is None else tuple(tuple(row) for row in told.vec.tolist())
        return Examples(texts, vec, () if told.label is None else tuple(told.label.tolist()))

    def told(self, count: int) -> Told:
        """What a preview says: nothing, or the pictures of the samples that it is looked at with and all about them.

        Of pictures with holes the middle is to be filled in.
        """
        if self.pair is None:
            return Told()
        data, shown = self._shown()
        rows = [shown[i % len(shown)] for i in range(count)]
        x0, cond = data.take(rows)
        cond, names = cond or Cond(), getattr(self.data, "attributes", ())
        return Told(
            None if cond.label is None else cond.label.tolist(),
            None if self.reader is None else [self._texts(data)[row] or "" for row in rows],
            None if cond.vec is None else [dict(zip(names, row, strict=True)) for row in cond.vec.tolist()],
            x0,
            middle_hole(count, self.data.shape) if self.pair.masked else None,
        )

    def given_to(self, bundle: Bundle) -> Bundle:
        """The bundle with what this feed knows of conditions."""
        names: tuple[str, ...] = getattr(self.data, "attributes", ())
        return replace(bundle, attributes=names, reader=self.reader, codec=self.codec, examples=self.examples())
