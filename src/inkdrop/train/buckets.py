"""Buckets: the gradients of all ranks summed, bucket by bucket, while the backward pass still goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from inkdrop.parallel import Ranks

__all__ = ["Buckets"]

_BYTES = 25 * 2**20  # of a bucket, as DistributedDataParallel's


class Buckets:
    """Sums of gradients over ranks, which begin as soon as a bucket of them is there.

    What DistributedDataParallel does, with one difference: its ranks wait for ever, or for a time-out, for one whose
    backward pass broke off. Here such a rank gives zeros for the buckets that it did not come to, in the order that is
    the same on all; nobody waits, and what went wrong can be talked about afterwards (`Ranks.gather`).

    A gradient that no rank has stays None, so that the optimiser leaves that weight alone, as with one rank.

    Args:
        weights: of the net, on one device, in the same order on all ranks.
        ranks: of the job.
        size: bytes of a bucket.
    """

    def __init__(self, weights: Iterable[nn.Parameter], ranks: Ranks, size: int = _BYTES) -> None:
        self._ranks, self._buckets = ranks, list(_cut(list(weights), size))
        self._of = {weight: i for i, bucket in enumerate(self._buckets) for weight in bucket}
        self._begun: list[tuple[Tensor, Callable[[], None]]] = []
        self._left: list[int] | None = None  # gradients that a bucket waits for; None outside the last micro-batch
        for weight in self._of:
            weight.register_post_accumulate_grad_hook(self._hear)

    def listen(self) -> None:
        """From now on gradients are whole when they come: those of the last micro-batch are next."""
        self._left = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Put the sums over all ranks into the weights' gradients; what did not come on this rank counts as zero.

        Raises:
            Lost: another rank is gone.
        """
        self._left = None
        while len(self._begun) < len(self._buckets):
            self._begin()
        for bucket, (flat, wait) in zip(self._buckets, self._begun, strict=True):
            wait()
            there = flat[-len(bucket) :].tolist()
            sizes = [weight.numel() for weight in bucket]
            for weight, part, count in zip(bucket, flat[: -len(bucket)].split(sizes), there, strict=True):
                weight.grad = part.view_as(weight) if count else None
        self._begun = []

    def _hear(self, weight: Tensor) -> None:
        """A gradient is there; begin the buckets that are complete, in their order."""
        if self._left is None:
            return
        self._left[self._of[weight]] -= 1  # type: ignore[index] # the hook is given the parameter itself
        while len(self._begun) < len(self._buckets) and self._left[len(self._begun)] == 0:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Begin the sum of the next bucket: its gradients, and for each a 1 where there is one."""
        bucket = self._buckets[len(self._begun)]
        parts = [(weight if weight.grad is None else weight.grad).flatten() for weight in bucket]
        there = torch.tensor([float(weight.grad is not None) for weight in bucket])
        flat = torch.cat([*parts, there.to(parts[0])])
        at = 0
        for weight in bucket:
            if weight.grad is None:
                flat[at : at + weight.numel()] = 0
            at += weight.numel()
        self._begun.append((flat, self._ranks.begin_sum(flat)))


def _cut(weights: list[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """The weights that have gradients, last ones first as a backward pass comes to them, in buckets of one dtype."""
    bucket: list[nn.Parameter] = []
    held = 0
    for weight in reversed([w for w in weights if w.requires_grad]):
        if bucket and (held >= size or weight.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(weight)
        held += weight.numel() * weight.element_size()
    if bucket:
        yield bucket
