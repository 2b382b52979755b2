"""Extractors: the features that are found by name, `inkdrop eval --features NAME`; a function each."""

from __future__ import annotations

from collections.abc import Callable

from inkdrop.core.dataset import Data
from inkdrop.evals import classifier as trained
from inkdrop.evals.clips import Clips
from inkdrop.evals.features import Features, Pixels
from inkdrop.evals.inception import Inception, weights_file
from inkdrop.evals.resize import Resize
from inkdrop.evals.stream import Progress
from inkdrop.evals.vision import Pool, Vision, Where, device_of

__all__ = ["classifier", "inception", "pixels", "transformers"]


def classifier(
    train: Data, test: Data, on_progress: Progress | None, *, seed: int = 0, epochs: int | None = None, dim: int = 64
) -> Features:
    """The last hidden layer of a classifier trained on the data set itself; cached.

    Args:
        train: the data set, labelled images.
        test: its held-out part.
        on_progress: is told how far the training is.
        seed: of the training.
        epochs: passes over the data; by default as many as make 36,000 images, at least 4 and at most 200.
        dim: how many features, ≥ 1.
    """
    return trained.classifier(train, test, seed=seed, epochs=epochs, dim=dim, on_progress=on_progress)


def pixels(train: Data, test: Data, on_progress: Progress | None) -> Features:
    """The image itself, averaged to at most 8 values a side; points as they are.

    Args:
        train: the data set.
        test: not used.
        on_progress: not used.
    """
    return Pixels(train.shape)


def inception(
    train: Data,
    test: Data,
    on_progress: Progress | None,
    *,
    weights: str = "",
    download: bool = False,
    resize: Resize = "clean",
    device: Where = "auto",
) -> Features:
    """Inception-v3's last pooling layer, with the weights of published FIDs; of clips, frame by frame.

    Args:
        train: the data set, images or clips of 1, 3 or 4 channels.
        test: not used.
        on_progress: not used.
        weights: the file; "" for the cache's inception folder.
        download: whether to fetch the weights if they are not there, 91 MB.
        resize: as clean-fid does, or as pytorch-fid.
        device: where it runs.
    """
    file = weights_file(weights, download=download)
    return _of(train.shape, lambda shape: Inception(shape, file, resize=resize, device=device_of(device)))


def transformers(
    train: Data, test: Data, on_progress: Progress | None, *, model: str, pool: Pool = "auto", device: Where = "auto"
) -> Features:
    """A vision model of transformers, such as DINOv2 or CLIP; of clips, frame by frame. The extra `text`.

    Args:
        train: the data set, images or clips of 1, 3 or 4 channels.
        test: not used.
        on_progress: not used.
        model: a folder, or a hub id, as facebook/dinov2-small.
        pool: which embedding: the class token, the mean of the others, or the model's own.
        device: where it runs.
    """
    return _of(train.shape, lambda shape: Vision(shape, model, pool=pool, device=device_of(device)))


def _of(shape: tuple[int, ...], make: Callable[[tuple[int, ...]], Features]) -> Features:
    """Features of pictures, or of clips by those of their frames."""
    return Clips(make((shape[0], *shape[2:])), shape) if len(shape) == 4 else make(shape)
