"""Drawn: samples of a model that are drawn batch by batch, looked at, and kept, so that what was stopped goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inkdrop.bundle import Bundle
from inkdrop.core.dataset import Data
from inkdrop.evals.features import Features
from inkdrop.evals.shelf import Shelf, look
from inkdrop.evals.stream import chunk_rows, cut
from inkdrop.evals.text_match import Match
from inkdrop.files import weights_hash
from inkdrop.generate import sample, steps
from inkdrop.jobs import asks_of
from inkdrop.parallel import ALONE, Ranks
from inkdrop.recipe import dump
from inkdrop.said import labels_by, told_by

if TYPE_CHECKING:
    from inkdrop.drive import Step
    from inkdrop.screen import Screen

__all__ = ["BATCH", "Samples", "identity", "pace"]

BATCH = 256
"""Samples at a time."""


def identity(bundle: Bundle) -> dict[str, Any]:
    """All of a model that its samples depend on, as JSON can hold it: its weights, its parts, its plan."""
    nets = {"net": bundle.denoiser, **bundle.parts} | ({} if bundle.codec is None else {"codec": bundle.codec})
    record = dump(bundle.recipe)
    slots = ("net", "schedule", "target", "clock", "scale", "text", "image", "plan")
    return {
        "weights": {name: weights_hash(part) for name, part in nets.items()},
        "recipe": {slot: record[slot] for slot in slots},
        "parts": {name: bundle.card.get(name) for name in bundle.parts},
        "told": [list(bundle.shape), list(bundle.classes), list(bundle.attributes), list(bundle.examples)],
        "device": _kind(next(bundle.denoiser.parameters()).device),
    }


def _kind(device: torch.device) -> str:
    """What makes samples differ by their rounding: the kind of a device, not its number, so that ranks share."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pace(bundle: Bundle, test: Data, *, rows: int = 64) -> float:
    """Seconds that one image takes at one question of the plan's sampler, measured: the first, asked a second time.

    Args:
        bundle: the model, with the plan to sample by.
        test: held-out data, from which it is told what it must be told.
        rows: images at a time.
    """
    words: dict[str, Any] = vars(told_by(bundle, test, range(rows)))
    for _ in range(2):  # what is made once, is made in the first
        walk = steps(bundle, rows, **words)
        began = time.perf_counter()
        next(walk)
    return (time.perf_counter() - began) / rows


@dataclass(frozen=True)
class Samples:
    """Samples of a model that are drawn when they are needed, looked at, and kept as what was seen of them.

    Image i of a seed is the same at any count. Batches are kept as images until as many are there as one look at the
    training set is worth; then as features and neighbours, and the images go. So little is lost when the work is
    stopped, and disk and memory stay small: about 4·D + 20 bytes a sample.

    Attributes:
        bundle: the model, with its plan.
        count: how many, N.
        seed: of their noise.
        train: the training images, for neighbours.
        test: held-out images, from which the model is told what it must be told.
        features: the extractor.
        batch: samples at a time.
        match: the judge of samples and the texts they are told; None for none.
    """

    bundle: Bundle
    count: int
    seed: int
    train: Data
    test: Data
    features: Features
    batch: int = BATCH
    match: Match | None = None

    def shelf(self) -> Shelf:
        """Where they are kept: by the model, its plan, seed and batch, the extractor and the data."""
        about = {"model": identity(self.bundle), "seed": self.seed, "batch": self.batch}
        data = [self.train.fingerprint, self.test.fingerprint]
        if self.match is not None:
            about["match"] = [self.match.name, self.match.hash]
        return Shelf("samples", {**about, "features": [self.features.name, self.features.hash], "data": data})

    def groups(self) -> list[Sequence[int]]:
        """The numbers of the samples that are looked at together."""
        return cut(range(self.count), max(self.batch, chunk_rows(self.bundle.shape) // self.batch * self.batch))

    def missing(self, shelf: Shelf) -> int:
        """How many samples are still to be drawn."""
        left = [rows for rows in self.groups() if shelf.find(_name("seen", rows)) is None]
        parts = [part for rows in left for part in cut(rows, self.batch)]
        return sum(len(part) for part in parts if shelf.find(_name("drawn", part)) is None)

    def labels(self) -> Tensor | None:
        """The classes that are asked for; None of a model that is told none."""
        asked = [
            label for rows in cut(range(self.count), self.batch) for label in labels_by(self.bundle, self.test, rows)
        ]
        return torch.tensor(asked, dtype=torch.int64) if asked else None

    def draw(self, rows: Sequence[int], on_step: Any = None) -> dict[str, Tensor]:
        """Samples of these numbers, in [-1, 1], the share of values that had left it, and the seconds it took."""
        words: dict[str, Any] = vars(told_by(self.bundle, self.test, rows))
        began = time.perf_counter()
        x = sample(self.bundle, len(rows), seed=self.seed, first=rows[0], batch=self.batch, on_step=on_step, **words)
        spent, outside = time.perf_counter() - began, (x.abs() > 1).double().mean()
        return {"x": x.clamp(-1, 1), "outside": outside, "seconds": torch.tensor(spent, dtype=torch.float64)}

    def seen(self, shelf: Shelf, screen: Screen | None = None, ranks: Ranks = ALONE) -> Iterator[dict[str, Tensor]]:
        """What was seen of the samples, group by group: features, distance, row, outside (greatest share), seconds.

        And match, their scores, where there is a judge.

        Of several ranks, which have the shelf in common, each draws its share of the batches of as many groups as there
        are ranks, and then looks at one of these; rank 0 takes them from the shelf, and the others yield nothing.
        """
        show = None if screen is None else screen.sampling(self.count, asks_of(self.bundle))
        groups = self.groups()
        for i in range(0, len(groups), ranks.size):
            some = groups[i : i + ranks.size]
            if ranks.size > 1:
                ranks.together(partial(self._help, shelf, some, ranks))
                ranks.together(partial(self._help_look, shelf, some[ranks.rank :][:1]))
            for rows in some if ranks.first else ():
                parts = cut(rows, self.batch)
                yield shelf.get(_name("seen", rows), partial(self._look, shelf, parts, show))
                for part in parts:
                    shelf.drop(_name("drawn", part))

    def _help(self, shelf: Shelf, groups: Sequence[Sequence[int]], ranks: Ranks) -> None:
        """Draw this rank's share of the batches onto the shelf, of those groups that were not looked at already."""
        left = [rows for rows in groups if shelf.find(_name("seen", rows)) is None]
        parts = [part for rows in left for part in cut(rows, self.batch)]
        for part in parts[ranks.rank :: ranks.size]:
            shelf.get(_name("drawn", part), partial(self.draw, part, None))

    def _help_look(self, shelf: Shelf, groups: Sequence[Sequence[int]]) -> None:
        """Look at groups whose batches lie on the shelf."""
        for rows in groups:
            shelf.get(_name("seen", rows), partial(self._look, shelf, cut(rows, self.batch), None))

    def _look(self, shelf: Shelf, parts: Sequence[Sequence[int]], show: Any) -> dict[str, Tensor]:
        """What is seen of samples of these numbers, some of which may have been drawn before."""
        drawn = []
        for part in parts:
            heard = None if show is None else partial(_shift, show, part[0])
            drawn.append(shelf.get(_name("drawn", part), partial(self.draw, part, heard)))
        x = torch.cat([each["x"] for each in drawn])
        found = look(x, self.train, self.features)
        scores = {}
        if self.match is not None:
            texts = [text for part in parts for text in told_by(self.bundle, self.test, part).text or ()]
            scores = {"match": self.match.score(x, texts)}
        return {
            **scores,
            "features": found.features,
            "distance": found.near.distance,
            "row": torch.tensor(found.near.rows),
            "outside": torch.stack([each["outside"] for each in drawn]).max(),
            "seconds": torch.stack([each["seconds"] for each in drawn]).sum(),
        }


def _shift(show: Any, first: int, done: int, step: Step) -> None:
    """Tell of samples that are counted from the first on."""
    show(first + done, step)


def _name(kind: str, rows: Sequence[int]) -> str:
    return f"{kind}-{rows[0]:08d}-{rows[-1] + 1:08d}"
