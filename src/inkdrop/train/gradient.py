"""The gradient of one update: in micro-batches, in float16 with a factor on the loss, and finite or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inkdrop.errors import BadArgument
from inkdrop.train.guard import NotFinite, offenders, out_of_memory
from inkdrop.train.order import shares

if TYPE_CHECKING:
    from inkdrop.train.trainer import Trainer

__all__ = ["gradient"]


def gradient(trainer: Trainer) -> dict[str, float]:
    """Leave the clipped gradient of this update's batch in the weights.

    The batch is computed in `trainer.accumulate` micro-batches, twice as many from now on if memory runs out: the
    gradient is that of the mean over the whole batch, whatever their number. With float16 a gradient that overflows is
    computed again with half the factor on the loss, so that no update is lost to it.

    Returns:
        the mean of each loss term over the batch; "grad_norm", before clipping; "loss_scale" with float16.

    Raises:
        NotFinite: the loss or the gradient is not finite; weights, optimiser and the factor are as before.
        BadArgument: there is not enough memory for one sample.
    """
    train, weights = trainer.recipe.train, list(trainer.denoiser.net.parameters())
    rows = trainer.ahead.rows(trainer.update)
    before = None if trainer.scale is None else replace(trainer.scale)
    while True:
        tried = _tried(trainer, rows)
        if tried is None:
            _halve_micro_batch(trainer)
            continue
        means, losses = tried
        norm = torch.nn.utils.clip_grad_norm_(weights, train.clip_grad)
        fine = torch.isfinite(losses)
        if bool(torch.isfinite(norm) & fine.all()):
            trainer.draws.hold(losses)
            scale = {} if trainer.scale is None else {"loss_scale": trainer.scale.scale}
            return {**means, "grad_norm": float(norm), **scale}
        if not bool(fine.all()) or trainer.scale is None or not trainer.scale.back_off():
            trainer.scale = before
            raise _not_finite(trainer, rows, fine.tolist())


def _tried(trainer: Trainer, rows: Sequence[int]) -> tuple[dict[str, float], Tensor] | None:
    """The gradient of a batch; None where memory ran out, all that the attempt held being free again."""
    try:
        return _backward(trainer, rows, range(len(rows)))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None


def _backward(trainer: Trainer, rows: Sequence[int], places: range) -> tuple[dict[str, float], Tensor]:
    """The part of the batch's gradient that comes from these places; the means of their loss terms, and losses (B,)."""
    train, scale = trainer.recipe.train, trainer.scale
    torch.manual_seed((train.seed * 1_000_003 + trainer.update) % 2**63)  # nn.Dropout has no other key
    trainer.optimiser.zero_grad(set_to_none=True)
    factor = (1.0 if scale is None else scale.scale) / train.batch
    found: dict[str, list[Tensor]] = {}
    for part in shares(places, min(trainer.accumulate, len(places))):
        terms = trainer.losses([rows[place] for place in part], part)
        (terms["loss"].sum() * factor).backward()
        for name, value in terms.items():
            found.setdefault(name, []).append(value.detach())
    if scale is not None:
        scale.divide(p.grad for p in trainer.denoiser.net.parameters() if p.grad is not None)
    whole = {name: torch.cat(values) for name, values in found.items()}
    return {name: float(value.mean()) for name, value in whole.items()}, whole["loss"]


def _halve_micro_batch(trainer: Trainer) -> None:
    """Compute an update in twice as many parts from now on.

    Raises:
        BadArgument: the parts are single samples already.
    """
    batch = trainer.recipe.train.batch
    trainer.optimiser.zero_grad(set_to_none=True)
    if trainer.accumulate >= batch:
        raise BadArgument(
            f"training: memory runs out at update {trainer.update} even with one sample at a time; "
            "take a smaller net or smaller images, or train.precision=bfloat16"
        )
    trainer.accumulate = min(batch, 2 * trainer.accumulate)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()


def _not_finite(trainer: Trainer, rows: Sequence[int], fine: list[bool]) -> NotFinite:
    """What is wrong with this update: the samples whose loss, or else whose gradient alone, is not finite."""

    def finite(places: Sequence[int]) -> bool:
        _, losses = _backward(trainer, rows, range(places[0], places[-1] + 1))
        kept = [p.grad for p in trainer.denoiser.net.parameters() if p.grad is not None]
        return all(bool(torch.isfinite(value).all()) for value in (losses, *kept))

    what = "gradient" if all(fine) else "loss"
    bad = offenders(finite, range(len(rows))) if all(fine) else [i for i, good in enumerate(fine) if not good]
    trainer.optimiser.zero_grad(set_to_none=True)
    return NotFinite(trainer.update, what, list(dict.fromkeys(trainer.data.name(rows[i]) for i in bad)), len(rows))
