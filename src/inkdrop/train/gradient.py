"""The gradient of one update: in micro-batches, in float16 with a factor on the loss, and finite or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inkdrop.errors import BadArgument, InkdropError
from inkdrop.parallel import out_of_memory, shares
from inkdrop.train.guard import NotFinite, offenders
from inkdrop.train.shard import add_up, full

if TYPE_CHECKING:
    from inkdrop.train.trainer import Trainer

__all__ = ["gradient"]


def gradient(trainer: Trainer) -> dict[str, float]:
    """Leave the clipped gradient of this update's batch in the weights.

    Each rank computes its share of the batch, in `trainer.accumulate` micro-batches, twice as many from now on if
    memory runs out: the gradient is that of the mean over the whole batch, whatever their number and that of the ranks.
    With float16 a gradient that overflows is computed again with half the factor on the loss, so that no update is lost
    to it.

    Returns:
        the mean of each loss term over the batch; "grad_norm", before clipping; "loss_scale" with float16.

    Raises:
        NotFinite: the loss or the gradient is not finite; weights, optimiser and the factor are as before.
        BadArgument: there is not enough memory for one sample.
    """
    train, weights = trainer.recipe.train, list(trainer.denoiser.net.parameters())
    rows, places = trainer.ahead.rows(trainer.update), trainer.ranks.share(train.batch)
    before = None if trainer.scale is None else replace(trainer.scale)
    while True:
        tried = _tried(trainer, rows, places)
        if tried is None:
            _halve_micro_batch(trainer)
            continue
        means, losses = tried
        norm = full(torch.nn.utils.clip_grad_norm_(weights, train.clip_grad))
        fine = torch.isfinite(losses)
        if bool(torch.isfinite(norm)) and bool(fine.all()):
            trainer.draws.hold(losses)
            scale = {} if trainer.scale is None else {"loss_scale": trainer.scale.scale}
            return {**means, "grad_norm": float(norm), **scale}
        if not bool(fine.all()) or trainer.scale is None or not trainer.scale.back_off():
            trainer.scale = before
            raise _not_finite(trainer, rows, places, [place for place, good in enumerate(fine.tolist()) if not good])


def _tried(trainer: Trainer, rows: Sequence[int], places: range) -> tuple[dict[str, float], Tensor] | None:
    """The gradient of a batch, of which this rank computes these places.

    Returns:
        the means of its loss terms and the losses (B,), those of all ranks in the order of their places; None where
        memory ran out on a rank, all that the attempt held being free again.
    """
    found, error = dict[str, Tensor](), None
    try:
        found = _backward(trainer, rows, places, shared=True)
    except (InkdropError, OSError, RuntimeError, MemoryError) as caught:
        if trainer.ranks.size == 1 and not out_of_memory(caught):
            raise
        if trainer.sharded:  # the others wait within their passes, where they cannot be told
            raise _ended(trainer, caught) from None
        error = caught.with_traceback(None)
    if trainer.buckets is not None:
        trainer.buckets.finish()
    full_up = error is not None and out_of_memory(error)
    trainer.ranks.agree(None if full_up else error)
    told = trainer.ranks.gather(
        {
            "full": full_up,
            "losses": found["loss"].tolist() if found else [],
            "sums": {name: float(value.double().sum()) for name, value in found.items()},
        }
    )
    if any(each["full"] for each in told):
        return None
    if trainer.scale is not None:
        trainer.scale.divide(p.grad for p in trainer.denoiser.net.parameters() if p.grad is not None)
    batch = trainer.recipe.train.batch
    means = {name: sum(each["sums"][name] for each in told) / batch for name in told[0]["sums"]}
    return means, torch.tensor([loss for each in told for loss in each["losses"]])


def _backward(trainer: Trainer, rows: Sequence[int], places: range, *, shared: bool) -> dict[str, Tensor]:
    """Leave the part of the batch's gradient that comes from these places; their loss terms, (B,) each.

    Args:
        trainer: whose net it is.
        rows: of the whole batch.
        places: of it, to compute here.
        shared: whether the other ranks do the same with theirs, and the gradients are to be added.
    """
    train, scale, ranks = trainer.recipe.train, trainer.scale, trainer.ranks
    # nn.Dropout has no other key
    torch.manual_seed((train.seed * 1_000_003 + trainer.update + ranks.rank * 2**40) % 2**63)
    trainer.optimiser.zero_grad(set_to_none=True)
    factor = (1.0 if scale is None else scale.scale) / train.batch * (ranks.size if trainer.sharded else 1)
    least = train.batch // ranks.size if trainer.sharded else len(places)  # in shares all ranks need as many passes
    found: dict[str, list[Tensor]] = {}
    parts = shares(places, min(trainer.accumulate, least))
    for part in parts:
        if trainer.sharded:
            add_up(trainer.denoiser.net, part is parts[-1])
        elif shared and trainer.buckets is not None and part is parts[-1]:
            trainer.buckets.listen()
        terms = trainer.losses([rows[place] for place in part], part)
        (terms["loss"].sum() * factor).backward()
        for name, value in terms.items():
            found.setdefault(name, []).append(value.detach())
    return {name: torch.cat(values) for name, values in found.items()}


def _ended(trainer: Trainer, error: Exception) -> Exception:
    """What ends a rank whose net is in shares."""
    if out_of_memory(error):
        return BadArgument(
            f"training: memory runs out on rank {trainer.ranks.rank} at update {trainer.update}, and with train.shard "
            f"no update can be computed again; try train.accumulate={2 * trainer.accumulate}, or more ranks"
        )
    return error


def _halve_micro_batch(trainer: Trainer) -> None:
    """Compute an update in twice as many parts from now on.

    Raises:
        BadArgument: the parts are single samples already.
    """
    share = -(-trainer.recipe.train.batch // trainer.ranks.size)  # the largest
    trainer.optimiser.zero_grad(set_to_none=True)
    if trainer.accumulate >= share:
        raise BadArgument(
            f"training: memory runs out at update {trainer.update} even with one sample at a time; "
            "take a smaller net or smaller images, or train.precision=bfloat16"
        )
    trainer.accumulate = min(share, 2 * trainer.accumulate)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()


def _not_finite(trainer: Trainer, rows: Sequence[int], places: range, bad: list[int]) -> NotFinite:
    """What is wrong with this update: the samples whose loss, or else whose gradient alone, is not finite.

    Each rank looks through its own places.
    """

    def finite(part: Sequence[int]) -> bool:
        losses = _backward(trainer, rows, range(part[0], part[-1] + 1), shared=False)["loss"]
        kept = [p.grad for p in trainer.denoiser.net.parameters() if p.grad is not None]
        return all(bool(torch.isfinite(value).all()) for value in (losses, *kept))

    what, alone = "loss" if bad else "gradient", not trainer.sharded
    if not bad and alone:
        bad = [place for found in trainer.ranks.gather(offenders(finite, places)) for place in found]
    trainer.optimiser.zero_grad(set_to_none=True)
    names = list(dict.fromkeys(trainer.data.name(rows[i]) for i in bad))
    return NotFinite(trainer.update, what, names, len(rows), alone=alone)
