"""Score: every figure about a set of samples, with the same figure of real data beside it, as one dict."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from inkdrop.core.check import check_range, check_state
from inkdrop.core.dataset import Data
from inkdrop.errors import BadArgument, BadShape
from inkdrop.evals.classifier import Classifier
from inkdrop.evals.features import Features
from inkdrop.evals.frechet import Moments, frechet
from inkdrop.evals.judge import Judge
from inkdrop.evals.kid import kid
from inkdrop.evals.nearest import Copies, nearest
from inkdrop.evals.stream import Progress, Reservoir, chunk_rows, chunks, subset

__all__ = ["ENOUGH", "score"]

ENOUGH = 2048
"""With fewer samples than this a warning says that FID is biased; it is the D of Inception, the customary least N."""

_KID_ROWS = 10_000

_SOUND = 0.9
"""A classifier that is right on fewer held-out images than this share is warned of."""


class _Pool:
    """What is kept of one stream of images: moments, a bounded subset of the features, and the judge's tally."""

    def __init__(self, features: Features, seed: int) -> None:
        self.features = features
        self.moments, self.kept = Moments(features.dim), Reservoir(_KID_ROWS, seed=seed)
        self.judge = Judge(features.classes) if isinstance(features, Classifier) else None

    def update(self, x: Tensor, labels: Tensor | None) -> None:
        found = self.features(x)
        self.moments.update(found)
        self.kept.update(found)
        if self.judge is not None and isinstance(self.features, Classifier):
            self.judge.update(self.features.read(found), labels)

    def fid(self, other: _Pool) -> float:
        return frechet(self.moments.mean, self.moments.cov, other.moments.mean, other.moments.cov)

    def kid(self, other: _Pool, subsets: int, size: int, seed: int) -> dict[str, Any]:
        return kid(self.kept.rows, other.kept.rows, subsets=subsets, size=size, seed=seed)._asdict()


class _Meter:
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
        self._total = self._held_out + 2 * samples + min(samples, self._train)

    def add(self, count: int, text: str) -> None:
        self._done += count
        self._total = max(self._total, self._done)
        if self._tell is not None:
            self._tell(self._done, self._total, text)


def score(
    batches: Iterable[Tensor],
    train: Data,
    test: Data,
    features: Features,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    subsets: int = 100,
    subset_size: int = 1000,
    held_out: int = 2000,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Score samples against the held-out images of their data set.

    FID and KID compare the samples with all of `test`; their floors compare as many training images, or all there are,
    with it. Memory does not grow with N: KID sees a random 10,000 of each set at most.

    Args:
        batches: the samples, float (B, C, *S) in [-1, 1] each, N ≥ 2 in all.
        train: what the generator was trained on.
        test: held-out images of the same data set.
        features: from `features_for`.
        labels: the classes that were asked for, int64 (N,), in the order of the samples.
        seed: of the random subsets, in [0, 2^64).
        subsets: of KID, ≥ 1.
        subset_size: rows of each set in a subset of KID, ≥ 2.
        held_out: how many held-out images are looked up in the training set for the rate of copies, ≥ 1.
        on_progress: is told how many images of all phases are done.

    Returns:
        Plain JSON without NaN, see the guide on evaluation: n, shape, resize, reference, splits, features, fid,
        fid_floor, kid, kid_floor, floor_n, classes, classes_real (None without classifier), nearest, warnings, seconds.

    Raises:
        BadArgument: fewer than 2 samples, held-out or training images; a number out of range.
        BadShape: samples of another shape, or not one label a sample.
        BadData: samples outside [-1, 1] or not finite.
    """
    _check(train, test, held_out, labels)
    began = time.monotonic()
    rows = subset(len(test), held_out, seed=seed)
    meter = _Meter(on_progress, len(rows) + len(test), len(train), 0 if labels is None else len(labels))
    copies = Copies(torch.cat([_distances(x, train, meter) for _, x, _ in chunks(test, rows=rows)]))
    made = _read_samples(batches, train, features, labels, copies, seed, meter)
    meter.expect(n := made.moments.n)
    real = _read(test, None, features, seed, meter, "held-out images")
    floor = _read(train, subset(len(train), n, seed=seed, draw=1), features, seed, meter, "training images")
    figures = {
        "n": n,
        **_setting(train, test, features),
        "fid": made.fid(real),
        "fid_floor": floor.fid(real),
        "kid": made.kid(real, subsets, subset_size, seed),
        "kid_floor": floor.kid(real, subsets, subset_size, seed),
        "floor_n": floor.moments.n,
        **_verdicts(made.judge, real.judge),
        "nearest": copies.report(),
    }
    return {**figures, "warnings": _warnings(figures, labels), "seconds": round(time.monotonic() - began, 1)}


def _setting(train: Data, test: Data, features: Features) -> dict[str, Any]:
    """What was compared, and on which features."""
    about = {"name": features.name, "hash": features.hash, "dim": features.dim, "note": features.note}
    return {
        "shape": list(train.shape),
        "resize": "none",
        "reference": "test",
        "splits": {
            name: {"n": len(data), "source": data.source, "fingerprint": data.fingerprint}
            for name, data in (("train", train), ("test", test))
        },
        "features": {**about, "accuracy": features.accuracy if isinstance(features, Classifier) else None},
    }


def _verdicts(made: Judge | None, real: Judge | None) -> dict[str, Any]:
    """What the classifier makes of both; samples of which nothing was asked should have the classes of real images."""
    if made is None or real is None:
        return {"classes": None, "classes_real": None}
    return {"classes": made.report(made.asked if made.asked.any() else real.asked), "classes_real": real.report()}


def _check(train: Data, test: Data, held_out: int, labels: Tensor | None) -> None:
    if test.shape != train.shape:
        raise BadShape(f"score: got held-out images of shape {test.shape}, need {train.shape}")
    if min(len(train), len(test)) < 2:
        raise BadArgument(f"score: got {len(train)} training and {len(test)} held-out images, need at least 2 of each")
    if held_out < 1:
        raise BadArgument(f"score held_out: got {held_out}, need at least 1")
    if labels is not None and (labels.ndim != 1 or labels.dtype != torch.int64):
        raise BadShape(f"score labels: got {labels.dtype} {tuple(labels.shape)}, need int64 (N,)")


def _distances(x: Tensor, train: Data, meter: _Meter) -> Tensor:
    found = nearest(x, train).distance
    meter.add(len(x), "neighbours of held-out images")
    return found


def _read(data: Data, rows: list[int] | None, features: Features, seed: int, meter: _Meter, text: str) -> _Pool:
    """Take in real images."""
    pool = _Pool(features, seed)
    for _, x, labels in chunks(data, rows=rows):
        pool.update(x, labels)
        meter.add(len(x), text)
    return pool


def _read_samples(
    batches: Iterable[Tensor],
    train: Data,
    features: Features,
    labels: Tensor | None,
    copies: Copies,
    seed: int,
    meter: _Meter,
) -> _Pool:
    """Take in the samples; neighbours are looked up many at a time, for each look is a pass over the training set."""
    pool, waiting, n = _Pool(features, seed), list[Tensor](), 0
    for batch in batches:
        check_state(batch, train.shape, "samples")
        check_range(batch, "samples")
        x = batch.detach().to("cpu", torch.float32)
        asked = None if labels is None else labels[n : n + len(x)]
        if asked is not None and len(asked) < len(x):
            raise BadShape(f"score labels: got {len(asked) + n} for more samples, need one a sample")
        pool.update(x, asked)
        n += len(x)
        waiting.append(x)
        meter.add(len(x), "samples")
        if sum(map(len, waiting)) >= chunk_rows(train.shape):
            copies.update(nearest(torch.cat(waiting), train))
            meter.add(sum(map(len, waiting)), "neighbours of samples")
            waiting.clear()
    if n < 2:
        raise BadArgument(f"score: got {n} samples, need at least 2; try 1000")
    if labels is not None and len(labels) != n:
        raise BadShape(f"score labels: got {len(labels)} for {n} samples, need one a sample")
    if waiting:
        copies.update(nearest(torch.cat(waiting), train))
        meter.add(sum(map(len, waiting)), "neighbours of samples")
    return pool


def _warnings(figures: dict[str, Any], labels: Tensor | None) -> list[str]:
    """What a reader of the figures must know, a sentence each."""
    n, dim, test_n = figures["n"], figures["features"]["dim"], figures["splits"]["test"]["n"]
    found = []
    accuracy = figures["features"]["accuracy"]
    if accuracy is not None and accuracy < _SOUND:
        found.append(
            f"the classifier is right on only {accuracy:.1%} of held-out images: its features, classes and sureness "
            "say little; more images, or more of them held out, would help"
        )
    if min(n, test_n) < ENOUGH:
        found.append(
            f"{n:,} samples against {test_n:,} held-out images: with fewer than {ENOUGH:,} of either FID is biased "
            "upward; read KID, and FID only beside its floor"
        )
    if min(n, test_n) <= dim:
        found.append(
            f"{min(n, test_n):,} images give {dim} features a covariance without full rank; FID sees "
            "only a part of the spread"
        )
    if figures["floor_n"] < n:
        found.append(f"the floor is of {figures['floor_n']:,} training images, all there are: its FID is biased more")
    if figures["classes"] is None:
        found.append(f"{figures['features']['name']} features: {figures['features']['note']}")
        if labels is not None:
            found.append("the classes that were asked for are not checked: that takes a classifier")
    if figures["splits"]["train"]["fingerprint"] == figures["splits"]["test"]["fingerprint"]:
        found.append("the held-out images are the training images: floors and the rate of copies say nothing")
    return found
