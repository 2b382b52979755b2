"""The work behind `inkdrop eval`: samples drawn and looked at batch by batch, so that what was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inkdrop.bundle import Bundle
from inkdrop.core.dataset import Data
from inkdrop.drawn import BATCH, Samples, identity, pace
from inkdrop.errors import BadArgument
from inkdrop.evals.features import Features, features_for
from inkdrop.evals.nearest import Near
from inkdrop.evals.score import check_metrics, reference_shelf, score
from inkdrop.evals.shelf import Seen, Shelf
from inkdrop.evals.text_match import Match, text_match
from inkdrop.files import weights_hash
from inkdrop.find import Part, build, check_knobs, find, knobs, parse
from inkdrop.generate import evaluating
from inkdrop.jobs import asks_of, guided_asks_of
from inkdrop.measures import Measures
from inkdrop.parallel import ranks
from inkdrop.recipe import dump, open_data, set_knobs
from inkdrop.said import Captioned
from inkdrop.screen import Screen, seconds_text
from inkdrop.train.record import describe_run

__all__ = ["check_data", "check_enough", "likelihood_of", "score_bundle", "split_of"]


def split_of(bundle: Bundle, data: Path | None, split: str) -> Data:
    """A split of the model's data, from where they are now."""
    part = bundle.recipe.data
    if data is not None:
        known = bundle.recipe if part is not None else replace(bundle.recipe, data=Part("folder"))
        part = set_knobs(known, [f"data.data={json.dumps(str(data))}"]).data
    found = open_data(part, split)
    if found.shape != bundle.shape:
        raise BadArgument(f"eval: the data have shape {found.shape}, but the model makes {bundle.shape}")
    return found


def likelihood_of(
    bundle: Bundle,
    count: int,
    seed: int,
    data: Path | None,
    changes: Mapping[str, Any],
    settings: Iterable[str],
    screen: Screen,
) -> dict[str, Any]:
    """Bits a dimension of held-out data by the bare model: one dict of figures, as plain JSON.

    What is found of each batch is kept in the cache, so that the same call goes on where it was stopped.

    Args:
        bundle: the model.
        count: how many held-out images, chosen at random by the seed; all there are if fewer.
        seed: of the choice and of all noise.
        data: where the data are now, if not where they were.
        changes: as in `with_plan`; steps and grid are the chain's, the others have no effect here and are refused.
        settings: "nll.variance=beta-tilde" and the like, knobs of `evals.likelihood.Settings`.
        screen: shows progress.
    """
    from inkdrop.evals.likelihood import Settings, likelihood
    from inkdrop.evals.stream import subset

    given = _nll_knobs(bundle, changes, settings)
    how, test = Settings(**check_knobs("nll", Settings, given)), split_of(bundle, data, "test")
    if test.classes != bundle.classes:
        raise BadArgument("eval --nll: the data have other classes than the model, so it cannot be told them")

    def estimate(seconds: float, asks: tuple[int, int]) -> None:
        about = f"about {seconds_text(seconds)}" if seconds else "in the cache"
        which = f"{len(rows)} of {len(test)} held-out images"
        screen.say(f"{which}, {asks[0]:,} asks each of the chain and {asks[1]:,} of the flow: {about}")

    test = test if bundle.reader is None else Captioned(test, bundle.reader)
    rows, task = subset(len(test), count, seed=seed), screen.task("likelihood")
    batch = 16 if next(bundle.denoiser.parameters()).device.type == "cpu" else 64  # the fewer, the less is lost
    about = {"model": identity(bundle), "data": test.fingerprint, "rows": rows, "how": asdict(how), "seed": seed}
    shelf = Shelf("likelihood", {**about, "batch": batch})
    with evaluating(bundle.denoiser):
        found = likelihood(
            bundle.denoiser,
            test,
            rows,
            how,
            seed=seed,
            batch=batch,
            on_estimate=estimate,
            on_progress=task,
            ranks=ranks(),
            shelf=shelf,
        )
    of = {"n": len(test), "source": test.source, "fingerprint": test.fingerprint}
    model = {"checkpoint": bundle.card, "weights": weights_hash(bundle.denoiser)}
    return {**found, "data": of, **model, "seed": seed, "threads": torch.get_num_threads()}


def _nll_knobs(bundle: Bundle, changes: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """The knobs of a likelihood; whatever has no effect on it is refused, and a model that has none."""
    for name in changes:
        if name not in ("steps", "grid") and changes[name] is not None:
            raise BadArgument(
                f"eval --nll: got {name}, which has no effect: likelihood is of the bare model; leave it out"
            )
    if bundle.parts:
        raise BadArgument(f"eval --nll: got {', '.join(bundle.parts)}, which has no effect; leave it out")
    for what, there in (("of latents", bundle.codec), ("that starts from a picture", bundle.pair)):
        if there is not None:
            raise BadArgument(f"eval --nll: got a model {what}, whose likelihood of pictures is not known; try eval")
    given = {name: changes[name] for name in ("steps", "grid") if changes[name] is not None}
    for text in settings:
        path, sign, value = text.partition("=")
        slot, _, knob = path.strip().partition(".")
        if slot != "nll" or not sign:
            raise BadArgument(f"--set: got {text!r}, but with --nll only nll.KNOB=VALUE has an effect, as nll.draws=4")
        given[knob] = parse(value.strip())
    return given


def check_enough(bundle: Bundle, train: Data, test: Data) -> None:
    """Refuse splits of fewer than two images, before a judge is trained on them."""
    if min(len(train), len(test)) < 2:
        part = bundle.recipe.data or Part("folder")
        apart = (
            ", trained with more held out: --set data.holdout=0.2"
            if "holdout" in knobs(find("data", part.name))
            else ""
        )
        raise BadArgument(
            f"eval: got {len(train)} training and {len(test)} held-out images, need at least 2 of each; "
            f"try a model of more images{apart}"
        )


def check_data(bundle: Bundle, train: Data) -> list[str]:
    """What a reader must know where the data are not those that the model was trained on: a sentence, or none.

    Raises:
        BadArgument: their classes are others, so that nothing could be said of what was asked for.
    """
    if bundle.classes and train.classes and bundle.classes != train.classes:
        theirs, own = (", ".join((*each[:4], *["…"][: len(each) > 4])) for each in (train.classes, bundle.classes))
        raise BadArgument(f"eval: the data have the classes {theirs}, but the model knows {own}; try its own data")
    if bundle.card.get("fingerprint") in (None, train.fingerprint):
        return []
    return [
        "these are not the data that the model was trained on, or they have changed since: the rate of copies is not "
        "of its training images, and some held-out images may have been"
    ]


def score_bundle(
    bundle: Bundle,
    count: int,
    seed: int,
    data: Path | None,
    screen: Screen,
    measures: Measures = Measures(),  # noqa: B008, it is immutable
    *,
    batch: int = BATCH,
) -> dict[str, Any]:
    """Score a model against its data: one dict of figures, as plain JSON.

    What is seen of the samples is kept in the cache, so that the same call goes on where it was stopped, with the same
    figures to the bit, and what is seen of real images, for all models of these data.

    Args:
        bundle: the model, with the plan to sample by.
        count: how many samples, ≥ 2.
        seed: of the samples.
        data: where the data are now, if not where they were.
        screen: shows progress.
        measures: what is measured besides, and on which features.
        batch: samples at a time.
    """
    if count < 2:
        raise BadArgument(f"eval: got {count} samples, need at least 2; try 1000")
    train, test = split_of(bundle, data, "train"), split_of(bundle, data, "test")
    check_enough(bundle, train, test)
    strange = check_data(bundle, train)
    job = ranks()

    def extractor() -> Features:
        return features_for(train, test, measures.features, on_progress=screen.task("training the judge"))

    features = job.lead(extractor) or extractor()  # what rank 0 has trained, the others find in the cache
    check_metrics(measures.metrics, features, made=count, train=len(train), test=len(test))
    match = job.together(lambda: _match(measures.match, bundle, train, test))
    samples = Samples(bundle, count, seed, train, test, features, batch, match)
    shelf = samples.shelf()
    if job.first:
        announce(samples, shelf, screen)
    outside, seconds, matched = list[float](), list[float](), list[Tensor]()

    def seen() -> Iterator[Seen]:
        for found in samples.seen(shelf, screen, job):
            outside.append(float(found["outside"]))
            seconds.append(float(found["seconds"]))
            matched.extend([found["match"]] if match is not None else [])
            yield Seen(found["features"], Near(found["distance"], found["row"].tolist()))

    def figures() -> dict[str, Any]:
        found = score(
            seen(),
            train,
            test,
            features,
            labels=samples.labels(),
            seed=seed,
            metrics=measures.metrics,
            on_progress=screen.task("scoring"),
            shelf=reference_shelf(train, test, features),
        )
        shown = None if match is None else text_match(match, torch.cat(matched), test, seed=seed)
        found["warnings"] += strange
        return {**found, "match": shown, **_how(bundle, seed, max(outside), sum(seconds))}

    if not job.first:
        for _ in seen():
            pass
    found: dict[str, Any] = job.tell(job.lead(figures))
    return found


def _match(part: Part | None, bundle: Bundle, train: Data, test: Data) -> Match | None:
    """The judge of samples and texts, if one was asked for and there are texts."""
    if part is None:
        return None
    if bundle.reader is None:
        raise BadArgument("eval --match: got a model that reads no text; leave it out")
    if not any(getattr(test, "texts", None) or ()):
        raise BadArgument("eval --match: the held-out images have no captions, so nothing is said of samples")
    made: Match = build("matches", part, train)
    return made


def _how(bundle: Bundle, seed: int, outside: float, seconds: float) -> dict[str, Any]:
    """How samples were made, and with what."""
    about = describe_run(seed)
    return {
        "clamped": outside,  # the greatest share of values in a batch that left [-1, 1]
        "checkpoint": bundle.card,
        "weights": weights_hash(bundle.denoiser),
        "plan": dump(bundle.recipe)["plan"],
        "asks": guided_asks_of(bundle),
        "sampling_seconds": round(seconds, 3),
        "seed": seed,
        "threads": torch.get_num_threads(),
        **{name: about[name] for name in ("hardware", "versions", "commit")},
    }


def announce(samples: Samples, shelf: Shelf, screen: Screen) -> None:
    """Say how long the sampling will take, from a measured question, before it begins."""
    missing, count = samples.missing(shelf), samples.count
    if not missing:
        return screen.say(f"all {count:,} samples are in the cache: {shelf.folder}")
    asks = asks_of(samples.bundle)
    left = missing * asks * pace(samples.bundle, samples.test, rows=min(64, missing))
    done = "" if missing == count else f"{count - missing:,} are in the cache; "
    return screen.say(f"{done}{missing:,} samples of {asks:,} asks each: about {seconds_text(left)} of sampling")
