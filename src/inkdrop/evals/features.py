"""Features: what FID and KID compare; a classifier's where there are classes, else pooled pixels."""

from __future__ import annotations

import hashlib
import math
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from inkdrop.core.check import check_state
from inkdrop.core.dataset import Data
from inkdrop.errors import BadArgument, BadShape
from inkdrop.evals.classifier import classifier
from inkdrop.evals.stream import Progress
from inkdrop.find import Part, build

__all__ = ["Features", "Pixels", "Reads", "features_for"]


@runtime_checkable
class Features(Protocol):
    """Images (B, C, *S) in [-1, 1] -> features (B, D), float32 on the CPU; rows do not see one another."""

    @property
    def name(self) -> str:
        """The kind: "classifier", "pixels", "inception", ..."""
        ...

    @property
    def hash(self) -> str:
        """12 hexadecimal digits; scores are comparable only where it is the same."""
        ...

    @property
    def dim(self) -> int:
        """D, the length of a feature vector."""
        ...

    @property
    def resize(self) -> str:
        """How images are brought to the size that is compared; "none" if they are not."""
        ...

    @property
    def note(self) -> str:
        """What a reader must know to read scores of these features."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """The features (B, D) of x (B, C, *S)."""
        ...


@runtime_checkable
class Reads(Protocol):
    """Features that tell classes apart.

    Attributes:
        classes: their names; () where they cannot be read after all.
    """

    classes: tuple[str, ...]

    def read(self, features: Tensor) -> Tensor:
        """The probabilities (B, K) that belong to features (B, D)."""
        ...


class Pixels:
    """The image itself, averaged to at most 8 values along each side: weak features, for data without classes.

    They see brightness, colour and coarse layout, not strokes or textures; points and other data without sides are
    taken as they are.

    Args:
        shape: (C, *S) of a sample, S of at most 3 sides.

    Raises:
        BadShape: more sides.
    """

    name, resize = "pixels", "none"
    note = "images averaged to at most 8 values a side: weaker than a classifier's features, blind to fine detail"

    def __init__(self, shape: tuple[int, ...]) -> None:
        if not 1 <= len(shape) <= 4:
            raise BadShape(f"pixels: got samples of shape {shape}, need (C, *S) with at most 3 sides")
        self.shape = shape
        self._sides = [min(8, side) for side in shape[1:]]
        self.dim = math.prod([shape[0], *self._sides])
        self.hash = hashlib.sha256(f"pixels of {shape} averaged to {self._sides}".encode()).hexdigest()[:12]

    def __call__(self, x: Tensor) -> Tensor:
        """The averages (B, D), float32.

        Raises:
            BadShape: x of another shape.
        """
        check_state(x, self.shape, "pixels")
        x = x.detach().to("cpu").float()
        match self._sides:
            case [w]:
                x = F.adaptive_avg_pool1d(x, w)
            case [h, w]:
                x = F.adaptive_avg_pool2d(x, (h, w))
            case [t, h, w]:
                x = F.adaptive_avg_pool3d(x, (t, h, w))
        return x.flatten(1)


def features_for(
    train: Data, test: Data, part: Part | None = None, *, seed: int = 0, on_progress: Progress | None = None
) -> Features:
    """The features of this name, or the best without a download: a classifier's where there are classes, else pixels.

    Args:
        train: the data set.
        test: its held-out part.
        part: which extractor, and its knobs; by default a classifier for images of at least 2 classes, else `Pixels`.
        seed: of the classifier.
        on_progress: is told how far its training is.

    Raises:
        UnknownName: no such extractor.
    """
    if part is not None:
        found = build("features", part, train, test, on_progress, seed=seed)
        if not isinstance(found, Features):
            raise BadArgument(
                f"features {part.name!r}: gives {type(found).__name__}, need name, hash, dim, note and a call"
            )
        return found
    if len(train.shape) == 3 and min(train.shape[1:]) >= 4 and len(train.classes) > 1:
        return classifier(train, test, seed=seed, on_progress=on_progress)
    return Pixels(train.shape)
