"""Score: every figure about a set of samples, with the same figure of real data beside it, as one dict."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from inkdrop.core.check import check_range, check_state
from inkdrop.core.dataset import FEW, Data
from inkdrop.core.noise import normal
from inkdrop.errors import BadArgument, BadShape, InkdropError
from inkdrop.evals.classifier import Classifier
from inkdrop.evals.features import Features, Pixels
from inkdrop.evals.interval import estimate, frechet_error
from inkdrop.evals.judge import Judge
from inkdrop.evals.nearest import Copies, nearest
from inkdrop.evals.pool import MOST, Meter, Pool
from inkdrop.evals.shelf import Seen, Shelf, kept, look
from inkdrop.evals.stream import Progress, chunk_rows, cut, subset
from inkdrop.find import Part, build, find

__all__ = ["ENOUGH", "check_metrics", "real_features", "reference_shelf", "score"]

ENOUGH = 2048
"""With fewer samples than this a warning says that FID is biased; it is the D of Inception, the customary least N."""

_PARTS = 20
"""In how many parts the samples are dealt for the jackknife of FID."""

_TRIED = 64
"""Of so many random numbers a metric is tried first."""

_SOUND = 0.9
"""A classifier that is right on fewer held-out images than this share is warned of."""


def score(
    batches: Iterable[Tensor | Seen],
    train: Data,
    test: Data,
    features: Features,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    subsets: int = 100,
    subset_size: int = 1000,
    held_out: int = 2000,
    metrics: Sequence[Part] = (),
    on_progress: Progress | None = None,
    shelf: Shelf | None = None,
) -> dict[str, Any]:
    """Score samples against the held-out images of their data set.

    FID and KID compare the samples with all of `test`; their floors compare as many training images, or all there are,
    with it. Memory does not grow with N: KID sees a random 10,000 of each set at most.

    Args:
        batches: the samples, float (B, C, *S) in [-1, 1] each, N ≥ 2 in all; or what `look` saw of them.
        train: what the generator was trained on.
        test: held-out images of the same data set.
        features: from `features_for`.
        labels: the classes that were asked for, int64 (N,), in the order of the samples.
        seed: of the random subsets, in [0, 2^64).
        subsets: of KID, ≥ 1.
        subset_size: rows of each set in a subset of KID, ≥ 2.
        held_out: how many held-out images are looked up in the training set for the rate of copies, ≥ 1.
        metrics: what else is measured, functions of `evals.metrics` with their knobs.
        on_progress: is told how many images of all phases are done.
        shelf: where what is seen of real images is kept, from `reference_shelf` of these data and features.

    Returns:
        Plain JSON without NaN, see the guide on evaluation: n, shape, resize, reference, splits, features, fid,
        fid_floor, kid, kid_floor, floor_n, intervals, classes, classes_real (None without classifier), metrics,
        nearest, warnings, seconds.

    Raises:
        BadArgument: fewer than 2 samples, held-out or training images; a number out of range.
        BadShape: samples of another shape, or not one label a sample.
        BadData: samples outside [-1, 1] or not finite.
    """
    _check(train, test, held_out, labels)
    check_metrics(metrics, features)
    began = time.monotonic()
    rows = subset(len(test), held_out, seed=seed)
    meter = Meter(on_progress, len(rows) + len(test), len(train), 0 if labels is None else len(labels))
    copies = Copies(_distances(train, test, rows, meter, shelf, f"near-{held_out}-{seed}"))
    made = _read_samples(batches, train, features, labels, copies, seed, meter)
    meter.expect(n := made.moments.n)
    real, floor = (Pool(features, seed, classes=data.classes) for data in (test, train))
    _read(_held_out(test, features, shelf), real, meter, "held-out images")
    _read(_floor(train, n, features, seed, shelf), floor, meter, "training images")
    figures = {
        "n": n,
        **_setting(train, test, features),
        "fid": made.fid(real),
        "fid_floor": floor.fid(real),
        "kid": made.kid(real, subsets, subset_size, seed),
        "kid_floor": floor.kid(real, subsets, subset_size, seed),
        "floor_n": floor.moments.n,
        "intervals": None,
        **_verdicts(made.judge, real.judge),
        "metrics": {part.name: _measured(part, real, made, floor) for part in metrics},
        "nearest": copies.report(),
    }
    figures["intervals"] = _intervals(figures, made, real)
    return {**figures, "warnings": _warnings(figures, labels), "seconds": round(time.monotonic() - began, 1)}


def reference_shelf(train: Data, test: Data, features: Features) -> Shelf:
    """Where what is seen of real images is kept: by the content of the data, their preprocessing and the extractor."""
    data = {name: [data.fingerprint, len(data)] for name, data in (("train", train), ("test", test))}
    about = {"data": data, "shape": list(train.shape), "resize": features.resize}
    return Shelf("reference", {**about, "features": [features.name, features.hash, features.dim]})


def _intervals(figures: dict[str, Any], made: Pool, real: Pool) -> dict[str, Any]:
    """95 % intervals of FID and KID over images, in which the training of the model stays as it is."""
    found: dict[str, Any] = {"level": 0.95, "over": "images", "fid": None, "kid": None}
    if min(part.n for part in made.parts) > 1:
        se = frechet_error(made.parts, real.moments.mean, real.moments.cov)
        found["fid"] = estimate(figures["fid"], se, len(made.parts) - 1)._asdict()
    found["kid"] = estimate(figures["kid"]["mean"], figures["kid"]["se"])._asdict()
    return {**found, "how": f"{_HOW}; one model: other trainings of its recipe may differ by more"}


_HOW = (
    f"fid: jackknife over {_PARTS} parts of the samples, held-out images as they are; kid: jackknife over the images "
    "of both sets"
)


def _setting(train: Data, test: Data, features: Features) -> dict[str, Any]:
    """What was compared, and on which features."""
    about = {"name": features.name, "hash": features.hash, "dim": features.dim, "note": features.note}
    return {
        "shape": list(train.shape),
        "resize": features.resize,
        "reference": "test",
        "splits": {
            name: {"n": len(data), "source": data.source, "fingerprint": data.fingerprint}
            for name, data in (("train", train), ("test", test))
        },
        "features": {**about, "accuracy": features.accuracy if isinstance(features, Classifier) else None},
    }


def check_metrics(metrics: Sequence[Part], features: Features, *, made: int = 0, train: int = 0, test: int = 0) -> None:
    """Refuse, before anything is drawn, a metric that these features or so few images cannot give.

    Metrics of the house are tried on random numbers, so that a knob out of range is found, too.

    Args:
        metrics: which.
        features: of the images.
        made: how many samples there will be; 0 if that is not known, and then only names are looked at.
        train: how many training images there are.
        test: how many held-out images.

    Raises:
        UnknownName: no such metric.
        BadArgument: an Inception Score of features without classes; what the metric refuses.
    """
    for part in metrics:
        find("metrics", part.name)
    if "inception_score" in {part.name for part in metrics} and Pool(features, 0).surety is None:
        raise BadArgument(
            f"inception_score: {features.name} features have no classes; try --features classifier or inception"
        )
    if not made:
        return
    for part in (part for part in metrics if ":" not in part.name and part.name != "inception_score"):
        for what, count in (("samples", made), ("training images, which stand beside the samples", min(made, train))):
            if part.name == "fid_limit" and min(count, MOST) < (least := 2 * features.dim):
                raise BadArgument(
                    f"fid_limit: got {count:,} {what}, need at least {least:,} for {features.dim:,} features, at most "
                    f"{MOST:,} being kept; try fewer features or more images"
                )
            few = [min(n, _TRIED) for n in (test, count)]
            if _refused(part, *few) and (why := _refused(part, min(test, MOST), min(count, MOST))):
                raise BadArgument(f"{part.name} of {count:,} {what}: {why}")


def _refused(part: Part, real: int, made: int) -> str:
    """Why a metric cannot be had of so many images; "" if it can."""
    pools = [Pool(Pixels((2,)), 0) for _ in range(2)]
    for draw, (pool, count) in enumerate(zip(pools, (real, made), strict=True)):
        pool.update(normal((count, 2), 0, range(count), draw), None)
    try:
        build("metrics", part, *pools)
    except InkdropError as error:
        return str(error)
    return ""


def _measured(part: Part, real: Pool, made: Pool, floor: Pool) -> dict[str, Any]:
    """A metric of the samples, and of as many training images."""
    sides = {"samples": made, "real": floor}
    return {"knobs": part.knobs, **{side: build("metrics", part, real, pool) for side, pool in sides.items()}}


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


def _distances(train: Data, test: Data, rows: list[int], meter: Meter, shelf: Shelf | None, name: str) -> Tensor:
    """How near held-out images are to training images: (N,)."""
    found = list[Tensor]()
    for index, part in enumerate(cut(rows, chunk_rows(test.shape))):

        def make(part: Sequence[int] = part) -> dict[str, Tensor]:
            return {"distance": nearest(test.take(part)[0], train).distance}

        found.append(kept(shelf, f"{name}-{index}", make)["distance"])
        meter.add(len(part), "neighbours of held-out images")
    return torch.cat(found)


def _seen(
    data: Data, rows: Sequence[int], features: Features, shelf: Shelf | None, name: str
) -> Iterator[dict[str, Tensor]]:
    """What is seen of real images, part by part: features, and labels where there are any."""
    for index, part in enumerate(cut(rows, chunk_rows(data.shape))):

        def make(part: Sequence[int] = part) -> dict[str, Tensor]:
            x, cond = data.take(part)
            labels = {} if cond is None or cond.label is None else {"labels": cond.label}
            return {"features": features(x), **labels}

        yield kept(shelf, f"{name}-{index}", make)


def _held_out(test: Data, features: Features, shelf: Shelf | None) -> Iterator[dict[str, Tensor]]:
    return _seen(test, range(len(test)), features, shelf, "test")


def _floor(train: Data, n: int, features: Features, seed: int, shelf: Shelf | None) -> Iterator[dict[str, Tensor]]:
    """As many training images as there are samples, or all there are, at random."""
    few = subset(len(train), n, seed=seed, draw=1)
    return _seen(train, few, features, shelf, f"train-{len(few)}-{seed}")


def real_features(
    train: Data, test: Data, features: Features, n: int, seed: int, shelf: Shelf | None = None
) -> tuple[Tensor, Tensor]:
    """Features of all held-out images, and of those training images whose figures are the floors of n samples.

    Args:
        train: what the generators were trained on.
        test: held-out images of the same data set.
        features: from `features_for`.
        n: how many samples.
        seed: that of `score`.
        shelf: as in `score`, which has left them there.

    Returns:
        (M, D) and (n or fewer, D), in the order of the data.
    """
    sides = _held_out(test, features, shelf), _floor(train, n, features, seed, shelf)
    held_out, floor = (torch.cat([part["features"] for part in side]) for side in sides)
    return held_out, floor


def _read(parts: Iterable[dict[str, Tensor]], pool: Pool, meter: Meter, text: str) -> None:
    """Take in real images."""
    for seen in parts:
        pool.update(seen["features"], seen.get("labels"))
        meter.add(len(seen["features"]), text)


def _read_samples(
    batches: Iterable[Tensor | Seen],
    train: Data,
    features: Features,
    labels: Tensor | None,
    copies: Copies,
    seed: int,
    meter: Meter,
) -> Pool:
    """Take in the samples."""
    pool, n = Pool(features, seed, _PARTS, train.classes), 0
    for seen in _looked(batches, train, features, meter):
        count = len(seen.features)
        asked = None if labels is None else labels[n : n + count]
        if asked is not None and len(asked) < count:
            raise BadShape(f"score labels: got {len(asked) + n} for more samples, need one a sample")
        pool.update(seen.features, asked)
        copies.update(seen.near)
        n += count
    if n < 2:
        raise BadArgument(f"score: got {n} samples, need at least 2; try 1000")
    if labels is not None and len(labels) != n:
        raise BadShape(f"score labels: got {len(labels)} for {n} samples, need one a sample")
    return pool


def _looked(batches: Iterable[Tensor | Seen], train: Data, features: Features, meter: Meter) -> Iterator[Seen]:
    """What is seen of the samples; many at a time, for each look at neighbours is a pass over the training set."""
    waiting = list[Tensor]()

    def flush() -> Iterator[Seen]:
        if waiting:
            x = torch.cat(waiting)
            yield look(x, train, features)
            meter.add(len(x), "neighbours of samples")
            waiting.clear()

    for batch in batches:
        if isinstance(batch, Seen):
            yield batch
            meter.add(2 * len(batch.features), "samples")
            continue
        check_state(batch, train.shape, "samples")
        check_range(batch, "samples")
        waiting.append(batch.detach().to("cpu", torch.float32))
        meter.add(len(batch), "samples")
        if sum(map(len, waiting)) >= chunk_rows(train.shape):
            yield from flush()
    yield from flush()


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
    if test_n < FEW:
        found.append(
            f"only {test_n:,} held-out images: figures that rest on them one by one (the rate of copies; precision, "
            "recall, density and coverage) say little; add images, or hold out more"
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
