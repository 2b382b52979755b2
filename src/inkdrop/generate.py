"""Generate: samples of a model by a plan, one batch step by step or many at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling
from inkdrop.core.check import check_state
from inkdrop.core.cond import Cond
from inkdrop.denoiser import Denoiser
from inkdrop.drive import Step, drive, watch
from inkdrop.errors import BadArgument, BadShape, UnknownName
from inkdrop.plan import Plan, change, grid_of, noise_of, sampling

__all__ = ["Model", "cond_of", "evaluating", "labels_of", "plan_of", "sample", "steps"]


class Model(Protocol):
    """What can be sampled without further words: a Bundle."""

    @property
    def denoiser(self) -> Denoiser:
        """What answers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, *S) of one sample."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""

    @property
    def plan(self) -> Plan:
        """How to sample unless told otherwise."""

    @property
    def guidable(self) -> bool:
        """Whether it was trained with dropped conditions, so that it has an unconditional branch."""


def labels_of(
    label: int | str | Sequence[int | str] | None, count: int, classes: tuple[str, ...], *, first: int = 0
) -> Tensor | None:
    """(count,) int64 labels from a class, its name, or one of either for each image; None cycles through all classes.

    By default image i, counted from `first`, has label i mod classes: the same at any count.

    Raises:
        BadArgument: a label to a model without classes, or one outside them.
        UnknownName: no class of this name.
        BadShape: not one label an image.
    """
    if not classes:
        if label is not None:
            raise BadArgument(f"class: got {label!r}, but this model has no classes; leave it out")
        return None
    if label is None:
        return torch.arange(first, first + count) % len(classes)
    each = [label] * count if isinstance(label, (int, str)) else list(label)
    if len(each) != count:
        raise BadShape(f"class: got {len(each)} labels for {count} images; give one, or one an image")
    return torch.tensor([_label(one, classes) for one in each], dtype=torch.int64)


def _label(one: int | str, classes: tuple[str, ...]) -> int:
    if isinstance(one, str):
        if one in classes:
            return classes.index(one)
        if not re.fullmatch(r"-?[0-9]+", one):
            raise UnknownName("class", one, classes)
    elif int(one) != one:
        raise BadArgument(f"class: got {one}, need a whole number, or a name: {', '.join(classes)}")
    if not 0 <= int(one) < len(classes):
        raise BadArgument(
            f"class: got {one}, need a number in [0, {len(classes) - 1}], or a name: {', '.join(classes)}"
        )
    return int(one)


class _Job(NamedTuple):
    """A sampling ready to be driven, who answers it, and where what its sampler hears is noted."""

    work: Sampling
    denoiser: Denoiser
    heard: list[tuple[Ask, Belief]]


def _prepare(
    model: Model | Denoiser,
    images: Sequence[int],
    shape: tuple[int, ...] | None,
    plan: Plan,
    seed: int,
    cond: Cond | None,
) -> _Job:
    """The sampling of these images from their own start noise."""
    denoiser = model if isinstance(model, Denoiser) else model.denoiser
    shape = shape or (None if isinstance(model, Denoiser) else model.shape)
    if shape is None:
        raise BadArgument("sample: a bare denoiser does not know its data; give shape=(channels, height, width)")
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    noise = noise_of(plan, seed, images)
    heard: list[tuple[Ask, Belief]] = []
    grid = grid_of(plan, denoiser.schedule)
    x = denoiser.schedule.start(noise.start((len(images), *shape), device=str(device)), grid[0])
    check_state(x, shape)
    cond = None if cond is None else cond.to(device)
    return _Job(sampling(plan, x, grid, noise, cond, heard), denoiser, heard)


def plan_of(model: Model | Denoiser, plan: Plan | None, changes: dict[str, Any]) -> Plan:
    """The plan given, or the model's own, or the plainest, with its changes; guidance only where it can work."""
    unknown = set(changes) - {"sampler", "grid", "steps", "guidance", "clip"}
    if unknown:
        raise UnknownName("sample option", min(unknown), ("sampler", "grid", "steps", "guidance", "clip"))
    if isinstance(model, Denoiser):
        return change(plan or Plan(guide=()), **changes)
    plan = change(plan or model.plan, **changes)
    scale = next((float(p.knobs.get("scale", 1.0)) for p in plan.guide if p.name == "cfg"), 1.0)
    if scale != 1 and model.classes and not model.guidable:
        raise BadArgument(
            f"guidance: got {scale:g}, but this model was trained without dropped conditions (train.null_rate=0); "
            "use 1, or train with null_rate=0.1"
        )
    return plan


def cond_of(model: Model | Denoiser, count: int, label: Any, cond: Cond | None, first: int = 0) -> Cond | None:
    """The condition of these images: the one given, or their labels.

    Raises:
        BadArgument: both label and cond, or labels to a model without classes.
        BadShape: not one row an image.
    """
    if cond is not None:
        if label is not None:
            raise BadArgument("sample: got both label and cond; give one of them")
        if len(cond) != count:
            raise BadShape(f"cond: got {len(cond)} rows for {count} images; give one row an image")
        return cond
    labels = labels_of(label, count, () if isinstance(model, Denoiser) else model.classes, first=first)
    return None if labels is None else Cond(label=labels)


def steps(
    model: Model | Denoiser,
    count: int = 16,
    *,
    seed: int = 0,
    label: int | str | Sequence[int | str] | None = None,
    cond: Cond | None = None,
    shape: tuple[int, ...] | None = None,
    plan: Plan | None = None,
    **changes: Any,
) -> Iterator[Step]:
    """Sample one batch, giving a Step (x, x0, level) at each answer and a last one with the result.

    x0 is what the sampler is told: guided and clipped as the plan says.

    Args:
        model: a Bundle, or a Denoiser together with `shape`.
        count: how many images, ≥ 1.
        seed: image i of seed s starts from the same noise at any count.
        label: a class or its name, or one for each image; by default the classes in turn.
        cond: other conditions, one row an image.
        shape: (C, *S) of one image, where the model does not know it.
        plan: how to sample; the model's own by default.
        changes: of the plan: sampler, grid, steps, guidance, clip.
    """
    if count < 1:
        raise BadArgument(f"sample count: got {count}, need at least 1")
    plan = plan_of(model, plan, changes)
    return _watch(_prepare(model, range(count), shape, plan, seed, cond_of(model, count, label, cond)))


def _watch(job: _Job) -> Iterator[Step]:
    with evaluating(job.denoiser):
        yield from watch(*job)


@contextmanager
def evaluating(denoiser: Denoiser) -> Iterator[None]:
    """The net in evaluation mode, and back as it was, whatever happens."""
    was = denoiser.training
    denoiser.eval()
    try:
        yield
    finally:
        denoiser.train(was)


def sample(
    model: Model | Denoiser,
    count: int = 16,
    *,
    seed: int = 0,
    first: int = 0,
    label: int | str | Sequence[int | str] | None = None,
    cond: Cond | None = None,
    shape: tuple[int, ...] | None = None,
    plan: Plan | None = None,
    batch: int = 256,
    on_step: Callable[[int, Step], bool | None] | None = None,
    **changes: Any,
) -> Tensor:
    """Samples (count, C, *S), float32, in the range of the data (clipped where the plan says so).

    Args:
        model: a Bundle, or a Denoiser together with `shape`.
        count: how many images, ≥ 1.
        seed: image i of seed s starts from the same noise, whatever the count and the batch.
        first: index of the first image: images first … first + count − 1 of this seed.
        label: a class or its name, or one for each image; by default the classes in turn.
        cond: other conditions, one row an image.
        shape: (C, *S) of one image, where the model does not know it.
        plan: how to sample; the model's own by default.
        batch: images at a time, ≥ 1.
        on_step: called with (images done before this batch, step); returning True cancels.
        changes: of the plan: sampler, grid, steps, guidance, clip.
    """
    for what, number in (("count", count), ("batch", batch)):
        if number < 1:
            raise BadArgument(f"sample {what}: got {number}, need at least 1")
    plan = plan_of(model, plan, changes)
    every, out = cond_of(model, count, label, cond, first), []
    for start in range(0, count, batch):
        rows = range(start, min(start + batch, count))
        part = None if every is None else every.take(slice(rows.start, rows.stop))
        job = _prepare(model, [first + i for i in rows], shape, plan, seed, part)
        tell = None if on_step is None else (lambda step, done=start: on_step(done, step))
        with evaluating(job.denoiser):
            out.append(drive(job.work, job.denoiser, on_step=tell, heard=job.heard).cpu())
    return torch.cat(out)
