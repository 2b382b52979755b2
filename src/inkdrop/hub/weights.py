"""Weights: the same numbers under their names and under ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from inkdrop.errors import BadCheckpoint

__all__ = ["How", "Pair", "Tensors", "filled", "layer", "null_class", "to_ours", "to_theirs"]

Tensors: TypeAlias = Mapping[str, Tensor]
"""Parameter name -> its value."""

How: TypeAlias = Literal["same", "rows", "conv", "rows of conv", "but last", "last"]
"""How ours is made of theirs: as it is; their tensors joined along dim 0; without the two trailing sides of a 1×1
convolution; both; all rows but the last; the last row alone."""

_CONVS = ("conv", "rows of conv")

Net = TypeVar("Net", bound=nn.Module)


class Pair(NamedTuple):
    """One of our parameters, and what it is called there.

    Attributes:
        ours: its name here.
        theirs: its name there; with "rows" the names of its equal parts, first rows first; () where there is no such
            thing there, and it is zero here.
        how: see `How`.
    """

    ours: str
    theirs: tuple[str, ...]
    how: How = "same"


def layer(ours: str, *theirs: str, how: How = "same", bias: bool = True) -> list[Pair]:
    """The pairs of a layer's weight and bias.

    Args:
        ours: the layer's name here.
        theirs: its name there; several where ours is several of theirs, joined along the output.
        how: of the weight; a bias has no sides to drop and is "same", or "rows" with several.
        bias: whether there is one.
    """
    pairs = [Pair(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), how)]
    if bias:
        kind: How = "rows" if how in ("rows", "rows of conv") else "same"
        pairs.append(Pair(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), kind))
    return pairs


def null_class(ours: str, theirs: str) -> list[Pair]:
    """The pairs of a `ClassEmbedding` of K classes whose table there has K + 1 rows, the last of them the null.

    Args:
        ours: the name of the ClassEmbedding.
        theirs: the name of the table, without ".weight".
    """
    table = (f"{theirs}.weight",)
    return [Pair(f"{ours}.table.weight", table, "but last"), Pair(f"{ours}.null", table, "last")]


def to_ours(pairs: Iterable[Pair], tensors: Tensors) -> dict[str, Tensor]:
    """Their tensors under our names.

    Args:
        pairs: every parameter of our net, once.
        tensors: theirs; each must be used.

    Returns:
        Ours, without those that have no counterpart. A "same" tensor is theirs itself, not a copy.

    Raises:
        BadCheckpoint: a key is missing, left over, or of a shape that its pair does not allow.
    """
    left = dict(tensors)
    ours: dict[str, Tensor] = {}
    for pair in pairs:
        missing = [name for name in pair.theirs if name not in tensors]
        if missing:
            raise BadCheckpoint(f"weights: {missing[0]} is missing; is this config of these weights?")
        if pair.theirs:
            ours[pair.ours] = _join(pair, [tensors[name] for name in pair.theirs])
        for name in pair.theirs:
            left.pop(name, None)
    if left:
        raise BadCheckpoint(f"weights: {_some(left)} left over, for which this net has no place")
    return ours


def _join(pair: Pair, parts: Sequence[Tensor]) -> Tensor:
    """Ours of their tensors."""
    if pair.how in _CONVS:
        for name, part in zip(pair.theirs, parts, strict=True):
            if part.ndim != 4 or part.shape[2:] != (1, 1):
                raise BadCheckpoint(f"weights: {name} has shape {tuple(part.shape)}, need (out, in, 1, 1)")
        parts = [part[:, :, 0, 0] for part in parts]
    if pair.how in ("but last", "last"):
        if parts[0].ndim < 1 or len(parts[0]) < 2:
            raise BadCheckpoint(f"weights: {pair.theirs[0]} has shape {tuple(parts[0].shape)}, need at least 2 rows")
        return (parts[0][-1] if pair.how == "last" else parts[0][:-1]).clone()
    if any(part.shape != parts[0].shape for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise BadCheckpoint(f"weights: {', '.join(pair.theirs)} have shapes {shapes}, need the same")
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def to_theirs(pairs: Iterable[Pair], state: Tensors) -> dict[str, Tensor]:
    """Our tensors under their names: the inverse of `to_ours`.

    Args:
        pairs: every parameter of our net, once.
        state: our net's state_dict.

    Returns:
        Theirs, contiguous, each with memory of its own.

    Raises:
        BadCheckpoint: a key is missing, left over, of a shape that its pair does not allow, or without counterpart
            and not zero.
    """
    left = dict(state)
    theirs: dict[str, Tensor] = {}
    for pair in pairs:
        if pair.ours not in left:
            raise BadCheckpoint(f"weights: our {pair.ours} is missing; is this the state of that net?")
        for name, part in zip(pair.theirs, _split(pair, left.pop(pair.ours).detach()), strict=True):
            theirs[name] = torch.cat([theirs[name], part]) if name in theirs else part.clone()
    if left:
        raise BadCheckpoint(f"weights: our {_some(left)} left over, which has no name there")
    return {name: value.contiguous() for name, value in theirs.items()}


def _split(pair: Pair, value: Tensor) -> Sequence[Tensor]:
    """Their tensors of ours."""
    if not pair.theirs:
        if bool(value.any()):
            raise BadCheckpoint(f"weights: our {pair.ours} has no counterpart there, and is not zero")
        return ()
    count = len(pair.theirs)
    if count > 1 and (value.ndim < 1 or value.shape[0] % count):
        raise BadCheckpoint(f"weights: our {pair.ours} has shape {tuple(value.shape)}, need {count} equal parts")
    if pair.how == "last":
        return (value[None],)
    parts = value.chunk(count) if count > 1 else (value,)
    return [part[:, :, None, None] for part in parts] if pair.how in _CONVS else parts


def filled(make: Callable[[], Net], pairs: Callable[[Net], Iterable[Pair]], tensors: Tensors) -> Net:
    """A net with their weights, built without ever holding others: `make` runs on the meta device.

    Args:
        make: builds the net; every parameter and buffer that it uses must be in its state_dict.
        pairs: of the net that was made.
        tensors: theirs, which become its own; on the meta device the net stays there.

    Returns:
        The net, in evaluation mode.

    Raises:
        BadCheckpoint: a key is missing, left over or of another shape.
    """
    with torch.device("meta"):
        net = make()
    given = list(pairs(net))
    ours, want = to_ours(given, tensors), net.state_dict()
    some = next(iter(tensors.values()), torch.zeros(()))
    ours |= {pair.ours: some.new_zeros(want[pair.ours].shape) for pair in given if not pair.theirs}
    for name, value in want.items():
        if name not in ours:
            raise BadCheckpoint(f"weights: nothing is given for our {name}")
        if ours[name].shape != value.shape:
            names = next(", ".join(pair.theirs) for pair in given if pair.ours == name)
            got, need = tuple(ours[name].shape), tuple(value.shape)
            raise BadCheckpoint(f"weights: {names} has shape {got}, its config needs {need}; is it of these weights?")
    net.load_state_dict(ours, assign=True)
    return net.eval()


def _some(names: Mapping[str, Tensor]) -> str:
    """The first few of these names, and how many more."""
    first = ", ".join(list(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
