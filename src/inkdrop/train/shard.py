"""Shard: weights, average and optimiser in shares, one a rank (FSDP), and whole again for a checkpoint.

Checkpoints are the house's own in either case: safetensors of whole tensors, which any number of ranks reads again, in
shares or not. torch.distributed.checkpoint's own files are not written, as their `.metadata` is a pickle; nor those of
its HuggingFaceStorageWriter, which puts tensors without dimensions together as 0 (torch 2.13.0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from inkdrop.parallel import Ranks

__all__ = ["add_up", "full", "own", "placed", "shard", "whole"]


def shard(net: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Give each rank its share of every weight, with `fully_shard`: the blocks first, then the rest.

    A block's weights are whole only while it works.

    Args:
        net: the same on all ranks, on its device; it is changed in place.
        ranks: of the job.
        device: of the net.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in _blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh, reshard_after_forward=True)  # or whole weights stay after a look without gradients
    return net


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of lists of modules, which a net calls one after the other."""
    for child in net.children():
        if not isinstance(child, nn.ModuleList):
            yield from _blocks(child)
            continue
        for part in child:
            if isinstance(part, nn.ModuleList):
                yield from _blocks(part)
            elif any(True for _ in part.parameters()):
                yield part


def add_up(net: nn.Module, now: bool) -> None:
    """Let the next backward pass of a net in shares add up the gradients of all ranks, or leave that to a later one."""
    from torch.distributed.fsdp import FSDPModule

    cast(FSDPModule, net).set_requires_gradient_sync(now)


def own(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its share, or all of one that is not in shares."""
    held: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return held


def full(tensor: Tensor) -> Tensor:
    """A tensor whole, on all ranks; all of them must ask."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def whole(state: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Tensors whole, on the CPU of rank 0, one after the other so that no GPU holds them all; {} elsewhere."""
    kept = {}
    for name, value in state.items():
        tensor = full(value.detach())
        if ranks.first:
            kept[name] = tensor.cpu()
    return kept


def placed(value: Tensor, weight: Tensor) -> Tensor:
    """The share of a whole tensor that goes with a weight's; all of it where that is whole or of another shape."""
    if not hasattr(weight, "to_local") or value.shape != weight.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    like = cast(DTensor, weight)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
