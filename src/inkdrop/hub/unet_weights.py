"""Weights of a U-Net: what each of our parameters is called in UNet2DModel and UNet2DConditionModel."""

from __future__ import annotations

from torch import Tensor, nn

from inkdrop.hub.weights import Pair, Tensors, layer
from inkdrop.nets.blocks import ResBlock, SelfAttention
from inkdrop.nets.layout import Stage
from inkdrop.nets.spatial import SpatialTransformer, TokenAttention
from inkdrop.nets.unet import UNet

__all__ = ["pairs_of", "renamed"]

_BEFORE_0_15 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What the layers of self-attention were called before diffusers 0.15, as in google/ddpm-cifar10-32."""


def renamed(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors with the layers of self-attention called as they are now."""
    out = {}
    for key, value in tensors.items():
        *before, name, last = key.rsplit(".", 2)
        old = bool(before) and ".attentions." in key and name in _BEFORE_0_15
        out[f"{before[0]}.{_BEFORE_0_15[name]}.{last}" if old else key] = value
    return out


def pairs_of(net: UNet, *, linear: bool = False, null: bool = False) -> list[Pair]:
    """Every parameter of a U-Net, and its name in UNet2DModel or UNet2DConditionModel.

    Args:
        net: ours.
        linear: the projections of its spatial transformers are linear there; else 1×1 convolutions.
        null: the last row of their class table is the null; else they have none, and ours is zero.
    """
    pairs = layer("stem", "conv_in") + layer("head.0", "conv_norm_out") + layer("head.2", "conv_out")
    for n in "12":
        pairs += layer(f"context.linear{n}", f"time_embedding.linear_{n}")
    if net.context.label is not None:
        table = ("class_embedding.weight",)
        pairs.append(Pair("context.label.table.weight", table, "but last" if null else "same"))
        pairs.append(Pair("context.label.null", table, "last") if null else Pair("context.label.null", ()))
    pairs += [Pair(name, ()) for name in ("text.null", "image.null") if name in net.state_dict()]
    for way, parts in (("down", net.down), ("up", net.up)):
        pairs += _way(way, parts, linear)
    for place, stage in enumerate(net.middle):
        pairs += _stage(f"middle.{place}", stage, "mid_block", place, linear)
    return pairs


def _way(way: str, parts: nn.ModuleList, linear: bool) -> list[Pair]:
    """The pairs of one way, level by level: ours in one list, theirs in blocks that end in a change of size."""
    pairs: list[Pair] = []
    level = place = 0
    for index, part in enumerate(parts):
        ours, theirs = f"{way}.{index}", f"{way}_blocks.{level}"
        if isinstance(part, Stage):
            pairs += _stage(ours, part, theirs, place, linear)
            place += 1
            continue
        between = f"{theirs}.{way}samplers.0"
        pairs += _block(ours, part, between) if isinstance(part, ResBlock) else layer(f"{ours}.conv", f"{between}.conv")
        level, place = level + 1, 0
    return pairs


def _stage(ours: str, stage: nn.Module, theirs: str, place: int, linear: bool) -> list[Pair]:
    pairs = _block(f"{ours}.block", stage.get_submodule("block"), f"{theirs}.resnets.{place}")
    attention, other = getattr(stage, "attention", None), f"{theirs}.attentions.{place}"
    if isinstance(attention, SelfAttention):
        pairs += layer(f"{ours}.attention.norm", f"{other}.group_norm") if len(attention.norm.state_dict()) else []
        pairs += _rows(f"{ours}.attention.qkv", other, "qkv", bias=True)
        pairs += layer(f"{ours}.attention.out", f"{other}.to_out.0")
    elif isinstance(attention, SpatialTransformer):
        pairs += _transformer(f"{ours}.attention", attention, other, linear)
    return pairs


def _rows(ours: str, theirs: str, parts: str, *, bias: bool) -> list[Pair]:
    """Several of to_q, to_k and to_v, which are one layer here."""
    return layer(ours, *(f"{theirs}.to_{part}" for part in parts), how="rows", bias=bias)


def _block(ours: str, block: nn.Module, theirs: str) -> list[Pair]:
    names = {"norm1": "norm1", "conv1": "conv1", "project": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
    pairs = [pair for one, other in names.items() for pair in layer(f"{ours}.{one}", f"{theirs}.{other}")]
    if isinstance(getattr(block, "shortcut", None), nn.Conv2d):
        pairs += layer(f"{ours}.shortcut", f"{theirs}.conv_shortcut")
    return pairs


def _transformer(ours: str, attention: SpatialTransformer, theirs: str, linear: bool) -> list[Pair]:
    pairs = layer(f"{ours}.norm", f"{theirs}.norm")
    for one, other in (("inp", "proj_in"), ("out", "proj_out")):
        pairs += layer(f"{ours}.{one}", f"{theirs}.{other}", how="same" if linear else "conv")
    for place, block in enumerate(attention.blocks):
        one, other = f"{ours}.blocks.{place}", f"{theirs}.transformer_blocks.{place}"
        for n in "123":
            pairs += layer(f"{one}.norm{n}", f"{other}.norm{n}")
        for n in "12":
            pairs += _tokens(f"{one}.attention{n}", block.get_submodule(f"attention{n}"), f"{other}.attn{n}")
        pairs += layer(f"{one}.linear1", f"{other}.ff.net.0.proj") + layer(f"{one}.linear2", f"{other}.ff.net.2")
    return pairs


def _tokens(ours: str, attention: nn.Module, theirs: str) -> list[Pair]:
    pairs = layer(f"{ours}.out", f"{theirs}.to_out.0")
    if isinstance(attention, TokenAttention) and not attention.cross:
        return pairs + _rows(f"{ours}.qkv", theirs, "qkv", bias=False)
    return pairs + layer(f"{ours}.q", f"{theirs}.to_q", bias=False) + _rows(f"{ours}.kv", theirs, "kv", bias=False)
