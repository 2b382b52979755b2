"""Settings: how a recipe is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from inkdrop.errors import BadArgument

__all__ = ["Train"]


@dataclass(frozen=True)
class Train:
    """How to train.

    Attributes:
        steps: optimiser updates, ≥ 1.
        batch: samples an update, ≥ 1.
        accumulate: micro-batches in which an update is computed one after the other, in [1, batch]: less memory, the
            same numbers. Their sizes differ by one sample at most; if memory runs out, it doubles by itself.
        lr: AdamW's peak learning rate, > 0.
        warmup: updates of linear rise to lr.
        decay: "cosine" falls from lr to lr·final over the run; "constant" stays.
        final: the share of lr that is left at the end of cosine decay, in [0, 1].
        weight_decay: AdamW's, ≥ 0.
        betas: AdamW's.
        clip_grad: the greatest norm of the gradient, > 0.
        ema: the decay of the weights' moving average, in [0, 1); warmed up as (1 + n)/(10 + n).
        snapshots: updates between snapshots of two power-function averages, of which `inkdrop ema` makes an average of
            any length after training; 0 keeps none.
        null_rate: the share of rows whose class, attributes and text are dropped, for classifier-free guidance, in
            [0, 1); an image condition stays.
        augment: the latest time to which an image condition is noised while training, in [0, 1); each row's is uniform
            on [0, augment], and the net is told it (its knob augment=true). 0 leaves images as they are.
        windows: sides of windows over those of the picture, each in (0, 1), as [0.25, 0.5]: most updates see one random
            window of each picture, all of a side that is drawn from these, and the net is told where it lies. () for
            full pictures only.
        full: with windows, the share of the updates that see full pictures, in (0, 1).
        stages: progressive resolution, as [[4, 0.25], [2, 0.25]]: for a quarter of the updates, means of 4×4 pixels,
            then of 2×2, then the full size. Factors fall; the shares come to less than 1.
        shift: in those stages see the levels of the full picture, whose log SNR is 2·log(factor) higher there.
        precision: "float32", or "bfloat16" or "float16": the net's layers run in it while training (autocast), the
            weights, the average and the optimiser stay float32. Faster where the processor has such instructions;
            float16 with a factor on the loss that adapts itself. "auto" is bfloat16 where the device has instructions
            for it, else float32, and a run's recipe.json says which.
        workers: threads that read and make coming batches while the net works, ≥ 0; 0 makes each when it is needed. The
            numbers are the same; memory holds two batches more a thread. A stream takes one thread at most.
        cache: with a codec, keep each picture's latent on disk, so that it is encoded once; false encodes it anew at
            every update, as augmentation of pictures and streams need.
        draws: how the numbers behind the times of a batch are drawn: "independent"; "spread" evenly over the batch, so
            that its mean loss varies less; or "aware", more often where the loss was large, each loss divided by how
            much more often, which the checkpoints remember.
        channels_last: the channels of a pixel are neighbours in memory, in the net and in what runs through it; much
            faster convolutions in bfloat16 on some processors and in half precision on GPUs, slower ones elsewhere.
        compile: the net runs as one program that torch.compile makes for the batch, in training; minutes beforehand.
        tf32: products of float32 numbers are of ten bits of fraction; CUDA GPUs from Ampere on only.
        seed: of initial weights, data order and noise.
        log_every: updates between lines of stats.jsonl.
        preview_every: updates between sample grids and held-out losses.
        save_every: updates between checkpoints.
        keep: how many of the newest checkpoints stay.
        skips: updates in a row that are skipped as their loss or gradient is not finite, ≥ 1; the last of them takes
            the run back to its last good checkpoint, with half the learning rate.
        rollbacks: how often the run may go back before it gives up, ≥ 0.
        shard: with several ranks, hold weights, average and optimiser in shares, one a rank (FSDP), rather than all on
            each: less memory a rank, more words between them.
        tensorboard: write what stats.jsonl holds for TensorBoard too, into the run's folder tensorboard/.
    """

    steps: int = 10_000
    batch: int = 128
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 100
    decay: str = "cosine"
    final: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip_grad: float = 1.0
    ema: float = 0.999
    snapshots: int = 0
    null_rate: float = 0.1
    augment: float = 0.0
    windows: tuple[float, ...] = ()
    full: float = 0.5
    stages: tuple[tuple[int, float], ...] = ()
    shift: bool = True
    precision: str = "float32"
    workers: int = 1
    cache: bool = True
    draws: str = "independent"
    channels_last: bool = False
    compile: bool = False
    tf32: bool = False
    seed: int = 0
    log_every: int = 10
    preview_every: int = 500
    save_every: int = 1000
    keep: int = 2
    skips: int = 5
    rollbacks: int = 3
    shard: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for need, (fits, names) in _RULES.items():
            for name in names:
                if not fits(got := getattr(self, name)):
                    raise BadArgument(f"train.{name}: got {got}, need {need}")
        if not 1 <= self.accumulate <= self.batch:
            raise BadArgument(f"train.accumulate: got {self.accumulate}, need 1 to train.batch, which is {self.batch}")
        if self.windows and self.stages:
            raise BadArgument("train.windows: got train.stages too; train in windows or in stages")
        if self.shard and self.channels_last:
            raise BadArgument("train.channels_last: got true beside train.shard; shares have no layout: leave one out")
        for name, given, beside in (("full", self.full != 0.5, "windows"), ("shift", not self.shift, "stages")):
            if given and not getattr(self, beside):
                raise BadArgument(f"train.{name}: has no effect without train.{beside}; leave it out")


def _staged(stages: tuple[tuple[int, float], ...]) -> bool:
    factors, shares = [factor for factor, _ in stages], [share for _, share in stages]
    falling = all(a > b for a, b in pairwise([*factors, 1]))
    return falling and all(share > 0 for share in shares) and sum(shares) < 1


_RULES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "at least 1": (lambda v: v >= 1, ("steps", "batch", "log_every", "preview_every", "save_every", "keep", "skips")),
    "at least 0": (lambda v: v >= 0, ("warmup", "weight_decay", "rollbacks", "snapshots", "workers")),
    "more than 0": (lambda v: v > 0, ("lr", "clip_grad")),
    "a number in [0, 1)": (lambda v: 0 <= v < 1, ("ema", "null_rate", "augment")),
    "a number in (0, 1)": (lambda v: 0 < v < 1, ("full",)),
    "numbers in (0, 1), each once": (lambda v: all(0 < s < 1 for s in v) and len({*v}) == len(v), ("windows",)),
    "(factor, share) pairs, factors of at least 2 that fall, and shares above 0 that come to less than 1": (
        lambda v: _staged(v),
        ("stages",),
    ),
    "a number in [0, 1]": (lambda v: 0 <= v <= 1, ("final",)),
    "two numbers in [0, 1)": (lambda v: all(0 <= beta < 1 for beta in v), ("betas",)),
    "cosine or constant": (lambda v: v in ("cosine", "constant"), ("decay",)),
    "independent, spread or aware": (lambda v: v in ("independent", "spread", "aware"), ("draws",)),
    "auto, float32, bfloat16 or float16": (
        lambda v: v in ("auto", "float32", "bfloat16", "float16"),
        ("precision",),
    ),
    "an integer in [0, 2^63)": (lambda v: 0 <= v < 2**63, ("seed",)),
}
"""What the fields of Train must be, and how to test it."""
