"""Pool: what is kept of a stream of images while it is scored, in constant memory; and how far the scoring is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from inkdrop.evals.features import Features, Reads
from inkdrop.evals.frechet import Moments, frechet
from inkdrop.evals.inception_score import InceptionScore
from inkdrop.evals.interval import parts_of
from inkdrop.evals.judge import Judge
from inkdrop.evals.kid import kid
from inkdrop.evals.stream import Progress, Reservoir

__all__ = ["MOST", "Meter", "Pool"]

MOST = 10_000
"""Features of more images than this are not kept, only their moments."""


class Pool:
    """What is kept of one stream of images: moments, a bounded subset of the features, and tallies of classes.

    Args:
        features: of which kind.
        seed: of the subset, and of how images are dealt to the parts.
        parts: for how many parts of the images moments are kept too.
        classes: of the data; what features read is judged where it is just these.

    Attributes:
        features: of which kind.
        moments: of all features.
        kept: at most 10,000 of them.
        judge: which classes of the data are seen in them; None where features read others, or none.
        parts: the moments of each part.
        surety: their Inception Score; None where features have no classes to read.
    """

    def __init__(self, features: Features, seed: int, parts: int = 0, classes: Sequence[str] = ()) -> None:
        self.features, self.seed = features, seed
        self.moments, self.kept = Moments(features.dim), Reservoir(MOST, seed=seed)
        self.parts = [Moments(features.dim) for _ in range(parts)]
        read = tuple(features.classes) if isinstance(features, Reads) else ()
        self.judge = Judge(read) if len(read) > 1 and read == tuple(classes) else None
        self.surety = InceptionScore(len(read), seed=seed) if len(read) > 1 else None

    def update(self, found: Tensor, labels: Tensor | None) -> None:
        """Take in features (B, D), and the classes that were asked for, int64 (B,)."""
        if self.parts:
            dealt = parts_of(len(found), len(self.parts), self.seed, self.moments.n)
            for index, part in enumerate(self.parts):
                part.update(found[dealt == index])
        self.moments.update(found)
        self.kept.update(found)
        if self.surety is not None and isinstance(self.features, Reads):
            read = self.features.read(found)
            self.surety.update(read)
            if self.judge is not None:
                self.judge.update(read, labels)

    def fid(self, other: Pool) -> float:
        """The Fréchet distance between the two streams."""
        return frechet(self.moments.mean, self.moments.cov, other.moments.mean, other.moments.cov)

    def kid(self, other: Pool, subsets: int, size: int, seed: int) -> dict[str, Any]:
        """The kernel distance between the two streams, as `kid` gives it."""
        return kid(self.kept.rows, other.kept.rows, subsets=subsets, size=size, seed=seed)._asdict()


class Meter:
    """Counts images over all phases; the total is what is known of it so far.

    Args:
        on_progress: is told.
        held_out: how many held-out images are looked at, by neighbours and by features.
        train: how many training images there are for the floor.
        samples: how many samples are expected; 0 if that is not known.
    """

    def __init__(self, on_progress: Progress | None, held_out: int, train: int, samples: int) -> None:
        self._tell, self._held_out, self._train, self._done = on_progress, held_out, train, 0
        self.expect(samples)

    def expect(self, samples: int) -> None:
        """Hear how many samples there are."""
        self._total = self._held_out + 2 * samples + min(samples, self._train)

    def add(self, count: int, text: str) -> None:
        """Tell that so many more images are done."""
        self._done += count
        self._total = max(self._total, self._done)
        if self._tell is not None:
            self._tell(self._done, self._total, text)
