"""How a net is laid out for speed, and which of several ways of training is the fastest here."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inkdrop.core.noise import generator
from inkdrop.errors import BadArgument, Diverged
from inkdrop.settings import Train
from inkdrop.train.loss_scale import LossScale

if TYPE_CHECKING:
    from inkdrop.parallel import Ranks
    from inkdrop.train.trainer import Trainer

__all__ = ["BOUND", "FIELDS", "GAIN", "Tried", "fastest", "lay_out", "said", "settled", "table", "ways"]

FIELDS = ("precision", "channels_last", "compile", "tf32")
"""The fields of train that change the time of an update, and its numbers by rounding alone."""

BOUND = 0.1
"""How far a way's gradient may be from float32's, over how far that of other samples and noise is from it."""

GAIN = 1.03
"""How much faster than the recipe's own way another must be to be taken: less is noise."""

_ROUNDS, _LEAST = 7, 2
_MOVED = 0.02  # the deviation by which weights are moved: a new net's last layers are zero, and hide all gradients


def settled(train: Train, device: torch.device, ranks: Ranks) -> Train:
    """The fields of train with precision "auto" made one of the others, the same on all ranks.

    It is bfloat16 where the devices of all ranks have instructions for it (x86 processors with AMX or AVX-512 BF16,
    CUDA GPUs from Ampere on), else float32, as emulated bfloat16 is slower.
    """
    if train.precision != "auto":
        return train
    return replace(train, precision="float32" if ranks.most(int(not _halves(device))) else "bfloat16")


def _halves(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; False where that is not known."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # which older versions of torch have not
        return False
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def lay_out(net: nn.Module, train: Train, device: torch.device) -> None:
    """Give a net the layout and the kind of products that the recipe says.

    Raises:
        BadArgument: tf32 where there is no CUDA GPU; channels_last for a net without 2-d convolutions.
    """
    if train.tf32 and device.type != "cuda":
        raise BadArgument(f"train.tf32: got true, but {device.type} has no such products; leave it out (false)")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = train.tf32
    if train.channels_last:
        if not any(isinstance(part, nn.Conv2d) for part in net.modules()):
            raise BadArgument("train.channels_last: got true, but the net has no convolution; leave it out (false)")
        _turn(net, torch.channels_last)


def _turn(net: nn.Module, layout: torch.memory_format) -> None:
    """Give the kernels of a net's convolutions a layout, in place."""
    net.to(memory_format=layout)  # type: ignore[call-overload]


@dataclass
class Tried:
    """A way of training, and what was found of it.

    Attributes:
        way: its fields of train.
        seconds: of the gradient of a batch, one number a round: processor time, on a GPU wall time.
        wall: the same in wall time.
        off: |g − g32|/|g32|, of the gradient by all weights; None if it did not run.
        off_loss: the same of the loss.
        why: why it cannot be taken; "" if it can.
    """

    way: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    off: float | None = None
    off_loss: float | None = None
    why: str = ""

    @property
    def name(self) -> str:
        """As words: its precision, and what is on."""
        return " ".join([self.way["precision"], *(name for name in FIELDS[1:] if self.way[name])])


def ways(train: Train, device: torch.device, *, convolves: bool) -> list[dict[str, Any]]:
    """The ways to try: the recipe's own, float32, and those that may be faster on this device."""
    plain = {"precision": "float32", "channels_last": False, "compile": False, "tf32": False}
    found = [{name: getattr(train, name) for name in FIELDS}, plain]
    layouts = (False, True) if convolves and not train.shard else (False,)
    if device.type == "cuda":
        found += [{**plain, "tf32": True}, *({**plain, "tf32": True, "channels_last": last} for last in layouts)]
        halves = [{**plain, "precision": kind, "channels_last": last} for kind in _HALVES for last in layouts]
        return _distinct([*found, *halves, *({**half, "compile": True} for half in halves[:2])])
    both = [{**plain, "precision": kind, "channels_last": last} for kind in ("float32", "bfloat16") for last in layouts]
    return _distinct([*found, *both])


_HALVES = ("bfloat16", "float16")


def _distinct(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [way for i, way in enumerate(found) if way not in found[:i]]


def fastest(trainer: Trainer, seconds: float = 30.0) -> tuple[Train, list[Tried]]:
    """Measure ways of training on this machine, with this net, batch and data; the recipe's fields with the fastest.

    What is timed is the gradient of a micro-batch, in rounds in which every way has its turn; of each way the median
    counts, of processor time, on a GPU of wall time. A way is taken only if its gradient and loss are those of float32
    up to `BOUND` of the difference that other samples and other noise make, and if it is faster than the recipe's own
    by `GAIN`. Where a pass takes long, the batch is made smaller, so that all takes about `seconds`.

    Args:
        trainer: of the recipe, which is used up: its weights are moved, and its dropout is turned off.
        seconds: about how long it may take, > 0.

    Returns:
        the fields of train, changed in those of `FIELDS` at most; and what was tried, the recipe's own way first.
    """
    train = trainer.recipe.train
    net = trainer.denoiser.net
    for part in net.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # its values would differ between layouts
    with torch.no_grad():
        for i, weight in enumerate(net.parameters()):
            noise = torch.from_numpy(generator(train.seed, i, 0).standard_normal(tuple(weight.shape)))
            weight.add_(noise.to(weight.device, weight.dtype), alpha=_MOVED)
    convolves = any(isinstance(part, nn.Conv2d) for part in net.modules())
    tried = [Tried(way) for way in ways(train, trainer.device, convolves=convolves)]
    began, batch = time.monotonic(), _batch(trainer, len(tried), seconds)
    measured = replace(train, batch=batch, accumulate=1, clip_grad=float("inf"))
    _compare(trainer, measured, tried)
    fine = [each for each in tried if not each.why]
    for turn in range(_ROUNDS):
        if turn >= _LEAST and time.monotonic() - began > seconds:
            break
        for each in fine if turn % 2 else fine[::-1]:
            _gradient(trainer, measured, each, timed=True)
    return replace(train, **_best(fine, tried[0]).way), tried


def table(tried: list[Tried]) -> list[str]:
    """What was tried, a line each: a gradient's time, how much faster than the recipe's own, how far from float32."""
    own = tried[0]
    lines = [f"{'way of training':32} {'ms':>8} {'faster':>7} {'gradient off':>13}"]
    for each in tried:
        cells = [
            f"{each.name:32}",
            f"{'':>8} {'':>7}",
            f"{'' if each.off is None else f'{each.off:.1e}':>13}",
            each.why,
        ]
        if each.seconds:
            middle = statistics.median(each.seconds)
            faster = f"{statistics.median(own.seconds) / middle:.2f}x" if own.seconds else ""
            cells[1] = f"{1e3 * middle:8.1f} {faster:>7}"
        lines.append(" ".join(cells).rstrip())
    return lines


def said(tried: list[Tried], chosen: dict[str, Any]) -> str:
    """What is taken, as --set would say it."""
    kept = " (the recipe's own)" if chosen == tried[0].way else ""
    return f"speed: {' '.join(f'train.{name}={json.dumps(value)}' for name, value in chosen.items())}{kept}"


def _best(fine: list[Tried], own: Tried) -> Tried:
    """The fastest; the recipe's own unless it cannot be taken or another gains on it."""
    best = min(fine, key=lambda each: statistics.median(each.seconds))
    if own.why or statistics.median(own.seconds) > GAIN * statistics.median(best.seconds):
        return best
    return own


def _batch(trainer: Trainer, count: int, seconds: float) -> int:
    """The samples of a pass: a micro-batch, or fewer where so many passes would take longer."""
    train = trainer.recipe.train
    micro, small = -(-train.batch // train.accumulate), min(train.batch, 4)
    plain = Tried({"precision": "float32", "channels_last": False, "compile": False, "tf32": False})
    for timed in (False, True):
        _gradient(trainer, replace(train, batch=small, accumulate=1), plain, timed=timed)
    passes = count * (_LEAST + 1) + 2
    return max(1, min(micro, int(small * seconds / (passes * plain.seconds[-1]))))


def _compare(trainer: Trainer, train: Train, tried: list[Tried]) -> None:
    """Note how far each way's gradient and loss are from float32's, and which cannot be taken."""
    plain = next(each for each in tried if each.name == "float32")
    trainer.update = 1
    loss, other = _gradient(trainer, train, plain)
    trainer.update = 0
    right, g32 = _gradient(trainer, train, plain)
    noise, spread = _apart(other, g32), abs(loss - right) / abs(right)
    for each in tried:
        try:
            loss, g = _gradient(trainer, train, each)
        except (RuntimeError, MemoryError, BadArgument, Diverged) as error:
            each.why = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        each.off, each.off_loss = _apart(g, g32), abs(loss - right) / abs(right)
        if trainer.accumulate > 1:
            trainer.accumulate, each.why = 1, "memory runs out"
        elif not each.off <= BOUND * noise:
            each.why = f"its gradient is {each.off:.1%} from float32's, need at most {BOUND * noise:.1%}"
        elif not each.off_loss <= max(BOUND * spread, 1e-2):
            each.why = f"its loss is {each.off_loss:.1%} from float32's, need at most {max(BOUND * spread, 1e-2):.1%}"


def _apart(g: list[Tensor], right: list[Tensor]) -> float:
    """|g − right|/|right| over all of them."""
    off = sum(float((a - b).double().square().sum()) for a, b in zip(g, right, strict=True))
    return float((off / sum(float(b.double().square().sum()) for b in right)) ** 0.5)


def _gradient(trainer: Trainer, train: Train, each: Tried, *, timed: bool = False) -> tuple[float, list[Tensor]]:
    """The loss and the gradients of the trainer's batch in one way; its time is noted where it is to be."""
    net = trainer.denoiser.net
    trainer.recipe = replace(trainer.recipe, train=replace(train, **each.way))
    trainer.scale = LossScale() if each.way["precision"] == "float16" else None
    trainer.accumulate = 1
    _turn(net, torch.channels_last if each.way["channels_last"] else torch.contiguous_format)
    lay_out(net, trainer.recipe.train, trainer.device)
    if each.way["compile"]:
        net.compile(dynamic=False)
    else:
        net._compiled_call_impl = None  # what `compile` sets
    on_gpu = trainer.device.type == "cuda"
    busy, wall = time.process_time(), time.monotonic()
    facts = trainer.gradient()
    if on_gpu:
        torch.cuda.synchronize(trainer.device)
    busy, wall = time.process_time() - busy, time.monotonic() - wall
    if timed:
        each.seconds.append(wall if on_gpu else busy)
        each.wall.append(wall)
    return facts["loss"], [weight.grad.clone() for weight in net.parameters() if weight.grad is not None]
