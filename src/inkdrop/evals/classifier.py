"""Classifier: a small CNN trained on the data set itself, whose last hidden layer gives the features of FID and KID."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from inkdrop.core.check import check_state
from inkdrop.core.dataset import Data
from inkdrop.data.fetch import cache_folder
from inkdrop.errors import BadArgument, BadData, BadShape, Diverged
from inkdrop.evals.convnet import ConvNet
from inkdrop.evals.stream import Progress, chunk_rows, chunks
from inkdrop.files import write_folder

__all__ = ["Classifier", "classifier"]

_HELD_BYTES = 1 << 30
_WEIGHTS, _CARD = "classifier.safetensors", "classifier.json"


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier; called on images it gives its features.

    Attributes:
        net: the network, in evaluation mode, on the CPU.
        shape: (C, H, W) of an image.
        classes: class names, in the order of the probabilities.
        dim: D, the length of a feature vector.
        accuracy: share of the held-out images whose class it finds, in [0, 1].
        hash: the first 12 hexadecimal digits of the SHA-256 of its weights.
        card: how it was trained.
    """

    net: ConvNet
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    dim: int
    accuracy: float
    hash: str
    card: dict[str, Any]
    name: str = "classifier"
    resize: str = "none"
    note: str = "last hidden layer of a small classifier trained on this data set; not comparable with Inception's FID"

    def __call__(self, x: Tensor) -> Tensor:
        """Features (B, D) of images (B, C, H, W): the same as `features`."""
        return self.features(x)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The activations of the last hidden layer: float32 (B, D), ≥ 0, on the CPU.

        Args:
            x: (B, C, H, W) in [-1, 1].

        Raises:
            BadShape: x of another shape than the training images.
        """
        check_state(x, self.shape, "classifier")
        x = x.detach().to("cpu", torch.float32)
        parts = [self.net.features(part) for part in x.split(chunk_rows(self.shape, 512))]
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """The probability of each class: float32 (B, K), each row sums to 1."""
        return self.read(self.features(x))

    @torch.no_grad()
    def read(self, features: Tensor) -> Tensor:
        """The probabilities (B, K) that belong to features (B, D) which are known already."""
        logits: Tensor = self.net.head(features)
        return logits.softmax(1)


def classifier(
    train: Data,
    test: Data,
    *,
    seed: int = 0,
    epochs: int | None = None,
    dim: int = 64,
    on_progress: Progress | None = None,
) -> Classifier:
    """Train a classifier on labelled images, or take it from the cache.

    AdamW with a one-cycle learning rate on cross-entropy; images are shifted at random by up to 8 % of their sides. A
    quarter as many images of nothing (shuffled pixels, uniform noise) are to be given to all classes alike, so that
    being sure says something about a sample.

    The cache is the folder classifier-KEY in $INKDROP_CACHE or ~/.cache/inkdrop; KEY hashes both data sets, the
    arguments and the code that trains; a damaged entry is trained again. The same seed gives the same weights on the
    same machine with the same number of threads.

    Args:
        train: labelled images (C, H, W), H and W ≥ 4, of at least 2 classes.
        test: held-out images of the same shape and classes, for `accuracy`.
        seed: of the initial weights, the order and the shifts, in [0, 2^63).
        epochs: passes over the data, ≥ 1; by default as many as make 36,000 images, but at least 4 and at most 200.
        dim: length of a feature vector, ≥ 1.
        on_progress: is told how far the training is.

    Raises:
        BadShape: samples that are no images of at least 4 × 4, or test images of another shape.
        BadData: no labels, fewer than 2 classes, fewer than 2 images, or other classes in test.
        BadArgument: an argument out of range, or a cache that cannot be written.
        Diverged: the training left the finite numbers.

    Reference:
        Hendrycks, Mazeika & Dietterich, "Deep anomaly detection with outlier exposure", 2019, section 3.
    """
    _check(train, test, seed, epochs, dim)
    passes = min(200, max(4, -(-36_000 // len(train)))) if epochs is None else epochs
    about = [train.fingerprint, test.fingerprint, train.shape, train.classes, seed, passes, dim]
    folder = cache_folder(f"classifier-{_key(about)}")
    if (cached := _load(folder, train, dim)) is not None:
        return cached
    _check_writable(folder.parent)
    began = time.monotonic()
    net = _fit(train, seed, passes, dim, on_progress)
    trained = {"seed": seed, "epochs": passes, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    card = {"source": train.source, "images": len(train), "held_out": len(test), **trained}
    made = Classifier(net, train.shape, train.classes, dim, 0.0, _hash(net), card)
    card = {"accuracy": _accuracy(made, test), "hash": made.hash, "seconds": round(time.monotonic() - began, 1), **card}
    return _store(folder, net, train, dim, card)


def _key(about: list[Any]) -> str:
    """A hash of the arguments and of the code that trains."""
    total = hashlib.sha256(json.dumps(about).encode())
    for file in ("classifier.py", "convnet.py"):
        total.update((Path(__file__).parent / file).read_bytes())
    return total.hexdigest()[:16]


def _check(train: Data, test: Data, seed: int, epochs: int | None, dim: int) -> None:
    if len(train.shape) != 3 or min(train.shape[1:]) < 4:
        raise BadShape(f"classifier: got samples of shape {train.shape}, need images (C, H, W) of at least 4 × 4")
    if test.shape != train.shape:
        raise BadShape(f"classifier: got held-out images of shape {test.shape}, need {train.shape}")
    if len(train.classes) < 2 or test.classes != train.classes:
        got = f"{len(train.classes)} classes to train on and {len(test.classes)} held out"
        raise BadData(f"classifier: got {got}, need the same at least 2")
    if len(train) < 2 or len(test) < 1:
        raise BadData(f"classifier: got {len(train)} images and {len(test)} held out, need at least 2 and 1")
    for what, value, least in (("seed", seed, 0), ("epochs", 1 if epochs is None else epochs, 1), ("dim", dim, 1)):
        if not least <= value < 2**63:
            raise BadArgument(f"classifier {what}: got {value}, need at least {least}")


def _held(train: Data) -> tuple[Tensor, Tensor] | None:
    """All images and labels, if they take at most 1 GiB."""
    if 4 * len(train) * math.prod(train.shape) > _HELD_BYTES:
        return None
    x, y = torch.empty(len(train), *train.shape), torch.empty(len(train), dtype=torch.int64)
    for first, part, labels in chunks(train):
        x[first : first + len(part)], y[first : first + len(part)] = part, _need(labels)
    return x, y


def _need(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise BadData("classifier: got images without labels, need labelled ones")
    return labels


def _batches(train: Data, size: int, passes: int, draws: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of `size`; the rest of a pass is left out, another one each time."""
    held = _held(train)
    for _ in range(passes):
        order = torch.randperm(len(train), generator=draws)
        for rows in order[: len(order) // size * size].split(size):
            if held is not None:
                yield held[0][rows], held[1][rows]
            else:
                x, cond = train.take(rows.tolist())
                yield x, _need(None if cond is None else cond.label)


def _background(train: Data) -> Tensor:
    """What shifted images are filled up with: the median of the outermost pixels of a channel, (C, 1, 1)."""
    x = train.take(range(min(256, len(train))))[0]
    edges = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], dim=2)
    return edges.transpose(0, 1).flatten(1).median(1).values[:, None, None]


def _shift(x: Tensor, fill: Tensor, draws: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) shifted by whole pixels, up to 8 % of its sides."""
    b, c, h, w = x.shape
    by_y, by_x = round(0.08 * h), round(0.08 * w)
    padded = F.pad(x - fill, (by_x, by_x, by_y, by_y)) + fill
    y0 = torch.randint(2 * by_y + 1, (b, 1), generator=draws) + torch.arange(h)
    x0 = torch.randint(2 * by_x + 1, (b, 1), generator=draws) + torch.arange(w)
    at = torch.arange(b)[:, None, None, None], torch.arange(c)[None, :, None, None]
    return padded[at[0], at[1], y0[:, None, :, None], x0[:, None, None, :]]


def _garbage(x: Tensor, draws: torch.Generator) -> Tensor:
    """As many images of nothing: half of them x with its pixels in random order, half uniform noise."""
    half = len(x) // 2
    order = torch.rand(half, 1, math.prod(x.shape[2:]), generator=draws).argsort(2).expand(-1, x.shape[1], -1)
    mixed = x[:half].flatten(2).gather(2, order).view(half, *x.shape[1:])
    return torch.cat([mixed, torch.rand(len(x) - half, *x.shape[1:], generator=draws) * 2 - 1])


def _fit(train: Data, seed: int, passes: int, dim: int, on_progress: Progress | None) -> ConvNet:
    size = min(64 if len(train) < 10_000 else 128, len(train))
    total, fill = passes * (len(train) // size), _background(train)
    draws = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ConvNet(train.shape, len(train.classes), dim)
        optimiser = torch.optim.AdamW(net.parameters(), lr=6e-3, weight_decay=1e-2)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=total)
        for done, (x, y) in enumerate(_batches(train, size, passes, draws), start=1):
            logits = net(torch.cat([_shift(x, fill, draws), _garbage(x[: size // 4], draws)]))
            garbage = logits[size:].log_softmax(1).mean(1).sum()
            loss = F.cross_entropy(logits[:size], y) - garbage / size
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            rate.step()
            if on_progress is not None and (done % 10 == 0 or done == total):
                on_progress(done, total, f"loss {loss.item():.3f}")
    if not all(bool(t.isfinite().all()) for t in net.state_dict().values()):
        raise Diverged("classifier: the training left the finite numbers; try another seed")
    return net.eval().requires_grad_(False)


def _accuracy(made: Classifier, test: Data) -> float:
    """The share of images whose class is found, in [0, 1]."""
    right = sum(int((made.probabilities(x).argmax(1) == _need(labels)).sum()) for _, x, labels in chunks(test))
    return right / len(test)


def _hash(net: ConvNet) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:12]


def _check_writable(folder: Path) -> None:
    """Refuse a cache that cannot be written before the training rather than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "cannot be written"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise BadArgument(f"cache {folder}: {reason}; set INKDROP_CACHE to a folder that can be written")


def _store(folder: Path, net: ConvNet, train: Data, dim: int, card: dict[str, Any]) -> Classifier:
    """Put a classifier into the cache; one that another process put there meanwhile stays, a damaged one goes."""
    if (found := _load(folder, train, dim)) is not None:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(card, indent=1) + "\n"

    def write_card(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    try:
        write_folder(folder, {_WEIGHTS: lambda path: save_file(net.state_dict(), path), _CARD: write_card})
    except BadArgument:
        if _load(folder, train, dim) is None:
            raise
    return Classifier(net, train.shape, train.classes, dim, card["accuracy"], card["hash"], card)


def _load(folder: Path, train: Data, dim: int) -> Classifier | None:
    """What the cache holds, or None if it holds nothing or something damaged."""
    with torch.random.fork_rng(devices=[]):
        net = ConvNet(train.shape, len(train.classes), dim)
    try:
        card = json.loads((folder / _CARD).read_text(encoding="utf-8"))
        net.load_state_dict(load_file(folder / _WEIGHTS))
        accuracy, known = float(card["accuracy"]), str(card["hash"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
        return None
    net.eval().requires_grad_(False)
    if _hash(net) != known:
        return None
    return Classifier(net, train.shape, train.classes, dim, accuracy, known, card)
