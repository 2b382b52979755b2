"""Generate: samples of a model by a plan, one batch step by step or many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inkdrop import condition
from inkdrop.condition import Attributes, Told, class_of
from inkdrop.core.ask import Ask, Belief, Sampler, Sampling
from inkdrop.core.check import check_state
from inkdrop.core.cond import Cond
from inkdrop.denoiser import Denoiser
from inkdrop.drive import Answerer, Step, drive, watch
from inkdrop.edit.decoded import decoded
from inkdrop.edit.hook import See, hook
from inkdrop.edit.pairs import Pair
from inkdrop.errors import BadArgument, BadShape, UnknownName
from inkdrop.find import knobs
from inkdrop.model import Model, conditional, state_shape
from inkdrop.parallel import Ranks
from inkdrop.plan import Plan, change, check_guide, grid_of, needs_of, noise_of, sampling

__all__ = ["cond_of", "evaluating", "parts_of", "plan_of", "sample", "sample_shared", "steps"]


class _Job(NamedTuple):
    """A sampling ready to be driven, who answers it, and where what its sampler hears is noted."""

    work: Sampling
    parts: Mapping[str, Answerer]
    heard: list[tuple[Ask, Belief]]


def _check_negative(plan: Plan, negative: str | Sequence[str] | None) -> None:
    """Refuse a negative prompt that guidance would not ask about."""
    scales = [float(part.knobs.get("scale", 1.0)) for part in plan.guide if part.name == "cfg"]
    if negative is not None and (not scales or scales[0] == 1):
        raise BadArgument("negative: has no effect without guidance; give guidance=3 (--guidance 3) too")


def parts_of(model: Model | Denoiser) -> dict[str, Answerer]:
    """What answers a model's questions, by the name in Ask.of: "net", "decode" (its codec), and its parts."""
    if isinstance(model, Denoiser):
        return {"net": model}
    decode: dict[str, Answerer] = {} if model.codec is None else {"decode": model.codec}
    return {"net": model.denoiser, **decode, **model.parts}


def _prepare(
    model: Model | Denoiser,
    images: Sequence[int],
    shape: tuple[int, ...] | None,
    plan: Plan,
    seed: int,
    cond: Cond | None,
    see: See | None,
) -> _Job:
    """The sampling of these images from their own start noise."""
    denoiser = model if isinstance(model, Denoiser) else model.denoiser
    shape = shape or (None if isinstance(model, Denoiser) else state_shape(model))
    if shape is None:
        raise BadArgument("sample: a bare denoiser does not know its data; give shape=(channels, height, width)")
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    noise = noise_of(plan, seed, images)
    heard: list[tuple[Ask, Belief]] = []
    grid = grid_of(plan, denoiser.schedule)
    x = denoiser.schedule.start(noise.start((len(images), *shape), device=str(device)), grid[0])
    check_state(x, shape)
    cond = None if cond is None else cond.to(device)

    def edit(sampler: Sampler) -> Sampler:
        return sampler if see is None else lambda x, grid, noise: hook(sampler(x, grid, noise), see)

    work = sampling(plan, x, grid, noise, cond, heard, edit)
    if not isinstance(model, Denoiser):
        work = work if model.codec is None else decoded(work)
        work = (
            work if cond is None or cond.image is None or model.pair is None else _pasted(work, model.pair, cond.image)
        )
    return _Job(work, parts_of(model), heard)


def _pasted(work: Sampling, pair: Pair, condition: Tensor) -> Sampling:
    """The sampling, whose result has the pixels that its picture keeps."""
    x = yield from work
    return x if pair.paste is None else pair.paste(condition.to(x.device), x)


def plan_of(model: Model | Denoiser, plan: Plan | None, changes: dict[str, Any]) -> Plan:
    """The plan given, or the model's own, or the plainest, with its changes; guidance only where it can work.

    Raises:
        UnknownName: there is no such change.
        BadArgument: guides that do not go together, or that this model has no branch, class or part for.
    """
    unknown = set(changes) - set(knobs(change))
    if unknown:
        raise UnknownName("sample option", min(unknown), knobs(change))
    own = Plan(guide=()) if isinstance(model, Denoiser) else model.plan
    plan = change(plan or own, **changes)
    check_guide(plan.guide)
    parts = parts_of(model)
    for name, guide in needs_of(plan).items():
        if name not in parts:
            raise BadArgument(
                f"{guide}: asks a part {name!r}, which this model does not have; give it by --{name} PATH or with_parts"
            )
    if isinstance(model, Denoiser):
        return plan
    bounds = [p.name for p in plan.guide if p.name in ("clip", "threshold")]
    if bounds and (model.codec is not None or not getattr(model, "ranged", True)):
        raise BadArgument(f"{bounds[0]}: got a model of latents, which have no range; sample with --no-clip")
    if conditional(model):
        _check_cfg(model, next((p.knobs for p in plan.guide if p.name == "cfg"), {}))
    return plan


def _check_cfg(model: Model, given: Mapping[str, Any]) -> None:
    """Whether a model has the branches that cfg mixes: the null one, or that of the negative class."""
    scale, negative = float(given.get("scale", 1.0)), given.get("negative")
    if negative is not None and not model.classes:
        raise BadArgument(f"cfg negative: got class {negative}, but this model has no classes; leave it out")
    if negative is not None:
        class_of(negative, model.classes, "cfg negative")
    elif scale != 1 and not model.guidable and getattr(getattr(model, "recipe", None), "data", True) is None:
        raise BadArgument(f"guidance: got {scale:g}, but this net knows no null class to guide away from; use 1")
    elif scale != 1 and not model.guidable:
        raise BadArgument(
            f"guidance: got {scale:g}, but this model was trained without dropped conditions (train.null_rate=0); "
            "use 1, or train with null_rate=0.1"
        )


def cond_of(model: Model | Denoiser, count: int, told: Told, cond: Cond | None, first: int = 0) -> Cond | None:
    """The condition of these images: the one given, or what the model is told.

    Raises:
        BadArgument: both, or something to a bare denoiser, or what `condition.cond_of` refuses.
        BadShape: not one row an image.
    """
    if cond is not None:
        if not told.nothing:
            raise BadArgument("sample: got cond beside label, text, attributes or image; give one or the others")
        if len(cond) != count:
            raise BadShape(f"cond: got {len(cond)} rows for {count} images; give one row an image")
        return cond
    if isinstance(model, Denoiser):
        if not told.nothing:
            raise BadArgument("sample: a bare denoiser knows no classes or words; give cond=Cond(...)")
        return None
    return condition.cond_of(model, count, told, first=first)


def steps(
    model: Model | Denoiser,
    count: int = 16,
    *,
    seed: int = 0,
    label: int | str | Sequence[int | str] | None = None,
    text: str | Sequence[str] | None = None,
    attributes: Attributes | Sequence[Attributes] | None = None,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    negative: str | Sequence[str] | None = None,
    cond: Cond | None = None,
    shape: tuple[int, ...] | None = None,
    plan: Plan | None = None,
    see: See | None = None,
    **changes: Any,
) -> Iterator[Step]:
    """Sample one batch, giving a Step (x, x0, level) at each answer and a last one with the result.

    x0 is what the sampler is told: guided and clipped as the plan says.

    Args:
        model: a Bundle, or a Denoiser together with `shape`.
        count: how many images, ≥ 1.
        seed: image i of seed s starts from the same noise at any count.
        label: a class or its name, or one for each image. Where nothing is said, the model's examples or classes in
            turn; where only text, attributes or image are said, no class.
        text: a prompt, or one for each image; the same.
        attributes: values by name, or such for each image; the same.
        image: (B or 1, C, h, w) in [-1, 1], for a model that starts from a picture.
        mask: (B or 1, 1, H, W) bool, True where the image is kept, to the bit, for a model that fills holes.
        negative: a text to steer away from by guidance, or one for each image.
        cond: the conditions themselves in place of all of these, one row an image.
        shape: (C, *S) of one image, where the model does not know it.
        plan: how to sample; the model's own by default.
        see: a hook, (ask, belief) -> another x0 or None: shown every guided and clipped belief before the sampler.
        changes: of the plan, as in `plan.change`: sampler, grid, steps, guidance, clip, guide, combine, noise.
    """
    if count < 1:
        raise BadArgument(f"sample count: got {count}, need at least 1")
    plan = plan_of(model, plan, changes)
    _check_negative(plan, negative)
    every = cond_of(model, count, Told(label, text, attributes, image, mask, negative), cond)
    return _watch(_prepare(model, range(count), shape, plan, seed, every, see))


def _watch(job: _Job) -> Iterator[Step]:
    with evaluating(job.parts):
        yield from watch(*job)


@contextmanager
def evaluating(parts: Mapping[str, Any] | nn.Module) -> Iterator[None]:
    """A net, or all of these, in evaluation mode, and back as they were, whatever happens."""
    nets = [parts] if isinstance(parts, nn.Module) else [p for p in parts.values() if isinstance(p, nn.Module)]
    was = [net.training for net in nets]
    try:
        for net in nets:
            net.eval()
        yield
    finally:
        for net, training in zip(nets, was, strict=True):
            net.train(training)


def sample(
    model: Model | Denoiser,
    count: int = 16,
    *,
    seed: int = 0,
    first: int = 0,
    label: int | str | Sequence[int | str] | None = None,
    text: str | Sequence[str] | None = None,
    attributes: Attributes | Sequence[Attributes] | None = None,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    negative: str | Sequence[str] | None = None,
    cond: Cond | None = None,
    shape: tuple[int, ...] | None = None,
    plan: Plan | None = None,
    batch: int = 256,
    on_step: Callable[[int, Step], bool | None] | None = None,
    see: See | None = None,
    **changes: Any,
) -> Tensor:
    """Samples (count, C, *S), float32, in the range of the data (clipped where the plan says so).

    Args:
        model: a Bundle, or a Denoiser together with `shape`.
        count: how many images, ≥ 1.
        seed: image i of seed s starts from the same noise, whatever the count and the batch.
        first: index of the first image: images first … first + count − 1 of this seed.
        label: a class or its name, or one for each image. Where nothing is said, the model's examples or classes in
            turn; where only text, attributes or image are said, no class.
        text: a prompt, or one for each image; the same.
        attributes: values by name, or such for each image; the same.
        image: (B or 1, C, h, w) in [-1, 1], for a model that starts from a picture.
        mask: (B or 1, 1, H, W) bool, True where the image is kept, to the bit, for a model that fills holes.
        negative: a text to steer away from by guidance, or one for each image.
        cond: the conditions themselves in place of all of these, one row an image.
        shape: (C, *S) of one image, where the model does not know it.
        plan: how to sample; the model's own by default.
        batch: images at a time, ≥ 1.
        on_step: called with (images done before this batch, step); returning True cancels.
        see: a hook, (ask, belief) -> another x0 or None: shown every guided and clipped belief before the sampler.
        changes: of the plan, as in `plan.change`: sampler, grid, steps, guidance, clip, guide, combine, noise.
    """
    for what, number in (("count", count), ("batch", batch)):
        if number < 1:
            raise BadArgument(f"sample {what}: got {number}, need at least 1")
    plan = plan_of(model, plan, changes)
    _check_negative(plan, negative)
    every, out = cond_of(model, count, Told(label, text, attributes, image, mask, negative), cond, first), []
    for start in range(0, count, batch):
        rows = range(start, min(start + batch, count))
        part = None if every is None else every.take(slice(rows.start, rows.stop))
        job = _prepare(model, [first + i for i in rows], shape, plan, seed, part, see)
        tell = None if on_step is None else (lambda step, done=start: on_step(done, step))
        with evaluating(job.parts):
            out.append(drive(job.work, job.parts, on_step=tell, heard=job.heard).cpu())
    return torch.cat(out)


def sample_shared(
    model: Model,
    count: int,
    ranks: Ranks,
    *,
    told: Told,
    seed: int = 0,
    first: int = 0,
    batch: int = 256,
    on_step: Callable[[int, Step], bool | None] | None = None,
) -> Tensor:
    """As `sample`, each rank making its share of the images, which then all ranks have, (count, C, *S) on the CPU.

    An image's noise is keyed by its number, so that it is the same whoever makes it, but for the rounding of another
    batch size.

    Args:
        model: the same on all ranks.
        count: how many images, ≥ 1; ranks beyond have nothing to do.
        ranks: of the job.
        told: what is said of the images.
        seed: as in `sample`; and so are first, batch and on_step, which hears of this rank's images.
        first: see there.
        batch: see there.
        on_step: see there.
    """
    if ranks.size == 1:
        words: dict[str, Any] = vars(told)
        return sample(model, count, seed=seed, first=first, batch=batch, on_step=on_step, **words)
    _check_negative(plan_of(model, None, {}), told.negative)
    every, mine = cond_of(model, count, told, None, first), ranks.share(count)

    def own() -> Tensor:
        if not mine:
            return torch.empty(0, *model.shape)
        cond = None if every is None else every.take(slice(mine.start, mine.stop))
        at = first + mine.start
        return sample(model, len(mine), seed=seed, first=at, cond=cond, batch=batch, on_step=on_step)

    return ranks.cat(ranks.together(own))
