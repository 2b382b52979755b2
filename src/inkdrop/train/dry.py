"""What a run would be, without running it; and how much memory it will need."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from inkdrop.recipe import Recipe
from inkdrop.train.frames import Frame
from inkdrop.train.loop import check_latents
from inkdrop.train.resident import need_of
from inkdrop.train.trainer import Trainer

__all__ = ["dry_run", "in_use", "peak_memory"]

_SIZES = (2, 4)  # samples of the two passes from which larger batches are told


def dry_run(recipe: Recipe, device: str = "cpu", *, process: bool = False, trust: bool = False) -> dict[str, Any]:
    """The data, the parameters and the memory of a recipe, from a few passes of at most four samples.

    Memory in bytes: "bytes_peak" is the most in use at once (see `peak_memory`); "bytes_fixed" the part of it that is
    weights, gradients, AdamW's two moments and the average, 20 bytes a float32 parameter, with the codec's weights;
    "bytes_activations" the rest. Data that are held in memory come on top. "bytes_process" is what the whole process
    will grow by, and "seconds_update" the time of an update, where they were asked for and can be told: see
    `resident.need_of`; on a GPU they are None.

    Raises:
        InkdropError: whatever training would have raised at its start.
    """
    check_latents(recipe)
    trainer = Trainer(recipe, None, device=device, trust=trust)
    parameters = sum(p.numel() for p in trainer.denoiser.parameters())
    fixed = _held(trainer) + _bytes(trainer.denoiser.parameters())
    peak = peak_memory(trainer)
    need = need_of(recipe, trust=trust) if process and trainer.device.type == "cpu" else None
    return {
        "data": trainer.data.source,
        "samples": len(trainer.data),
        "held_out": len(trainer.held_out),
        "shape": trainer.data.shape,
        "classes": trainer.data.classes,
        "terms": trainer.feed.terms._asdict(),
        "state_shape": trainer.feed.shape,
        "parameters": parameters,
        "micro_batch": _micro_batch(trainer),
        "bytes_fixed": fixed,
        "bytes_activations": max(0, peak - fixed),
        "bytes_peak": peak,
        "bytes_process": None if need is None else need.bytes,
        "seconds_update": None if need is None else need.seconds,
        "epochs": recipe.train.steps * recipe.train.batch / max(1, len(trainer.data)),
    }


def peak_memory(trainer: Trainer) -> int:
    """The most bytes that an update will have in use at once, of what torch allocates.

    What is in use after each allocation of a pass is a + b·n for a micro-batch of n samples: two passes, of two and of
    four samples, give a and b of each moment, and the peak is the largest of them at the micro-batch of the recipe. A
    first pass finds no gradients and leaves some; of more than one micro-batch the second finds them, and is measured
    too. To this comes what is always there: weights, average, moments and the codec.

    On a GPU the allocator's own peaks of the two passes take the place of the moments (not measured on one so far); its
    cache and CUDA's own some hundred MiB come on top. On a processor the memory of libraries and kernels does, and the
    holes that the C library leaves between blocks: `resident.need_of` tells the whole.

    Args:
        trainer: whose gradients are discarded.
    """
    micro, keep = _micro_batch(trainer), trainer.recipe.train.accumulate > 1
    gradients, before = _bytes(trainer.denoiser.parameters()), trainer.update
    trainer.update = trainer.feed.frames.trials()[Frame()]  # where full pictures are seen, for which most is needed
    most = gradients
    for with_gradients in (False, True) if keep else (False,):
        small, large = (_trace(trainer, min(n, micro), with_gradients) for n in _SIZES)
        most = max(most, (gradients if with_gradients else 0) + _extrapolated(small, large, micro))
    trainer.optimiser.zero_grad(set_to_none=True)
    trainer.update = before
    return _held(trainer) + most


def _micro_batch(trainer: Trainer) -> int:
    """Samples of the largest micro-batch."""
    return -(-trainer.recipe.train.batch // trainer.accumulate)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _held(trainer: Trainer) -> int:
    """Bytes of weights, averages, AdamW's two moments and the codec."""
    net = _bytes(trainer.denoiser.net.state_dict().values())
    codec = 0 if trainer.feed.codec is None else _bytes(trainer.feed.codec.state_dict().values())
    powers = 0 if trainer.powers is None else _bytes(trainer.powers.state_dict().values())
    return 2 * net + 2 * _bytes(trainer.denoiser.net.parameters()) + powers + codec


def _extrapolated(small: list[int], large: list[int], size: int) -> int:
    """The peak of a pass of `size` samples from the bytes in use in passes of 2 and of 4, or of fewer."""
    if size <= _SIZES[1]:
        return max(large)
    if len(small) != len(large):  # moments cannot be matched, so that the peaks have to do
        small, large = [max(small)], [max(large)]
    step = (size - _SIZES[1]) / (_SIZES[1] - _SIZES[0])
    return int(max(b + (b - a) * step for a, b in zip(small, large, strict=True)))


def _trace(trainer: Trainer, count: int, with_gradients: bool) -> list[int]:
    """Bytes in use beyond those at its start, after each allocation of a pass with its backward pass."""

    def run() -> None:
        loss: Tensor = trainer.losses(range(count))["loss"].mean()
        loss.backward()

    trainer.optimiser.zero_grad(set_to_none=True)
    if with_gradients:
        run()
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
        before = torch.cuda.memory_allocated(trainer.device)
        run()
        return [torch.cuda.max_memory_allocated(trainer.device) - before]
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it writes to stderr that it begins, and that it ends
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    return in_use(seen) or [0]


def in_use(seen: profile) -> list[int]:
    """Bytes in use after each allocation and release of what was allocated while the profiler looked, in their order.

    What came before and goes now is left out: other garbage, and what the profiler takes for an allocation of an
    earlier look that it did not see go, because it lies at the same address.
    """
    inner: Any = seen.profiler
    events = [e for e in _all(inner.kineto_results.experimental_event_tree()) if e.tag == _EventType.Allocation]
    found, there, total = list[int](), set[int](), 0
    for event in sorted(events, key=lambda each: each.start_time_ns):
        place, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size < 0 and place not in there:
            continue
        (there.discard if size < 0 else there.add)(place)
        total += size
        found.append(total)
    return found


def _all(events: Iterable[Any]) -> Iterator[Any]:
    """Events of a profiler with all that lie within them."""
    waiting = list(events)
    while waiting:
        yield (event := waiting.pop())
        waiting.extend(event.children)
