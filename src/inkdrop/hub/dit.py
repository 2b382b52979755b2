"""DiT: diffusers' DiTTransformer2DModel, read as our `dit` and written from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.find import Part, build
from inkdrop.hub.config import Config
from inkdrop.hub.weights import Pair, Tensors, filled, layer, null_class, to_theirs
from inkdrop.nets.dit import DiT
from inkdrop.nets.embed import Sinusoid

__all__ = ["KIND", "part_of", "read_dit", "write_dit"]

KIND = "DiTTransformer2DModel"
"""Their class; "Transformer2DModel" in folders written before it had a name of its own."""

_TABLE = "class_embedder.embedding_table.weight"


def read_dit(record: Mapping[str, Any], tensors: Tensors) -> DiT:
    """Our net of one of theirs: the same answers, their class i being ours, their last class our null.

    They keep an embedding of time and class in every block. Where all are equal, as in published weights, ours has one;
    otherwise it has as many as they. Classes at the end of their table that equal the null in every block are places
    that were never filled (see `write_dit`), and left out; a table of nothing but the null is a net without classes,
    whose null is added to the bias of its time.

    Args:
        record: its config.json.
        tensors: its weights; each must be used. On the meta device the net stays there.

    Returns:
        The net, in evaluation mode; its clock is their timestep.

    Raises:
        BadCheckpoint: a config that is not understood whole, or a key missing, left over or of another shape.
    """
    part, shape = part_of(record, tensors)
    left = dict(tensors)
    own = [name.removeprefix(_embedder(0)) for name in tensors if name.startswith(_embedder(0))]
    for i in range(part.knobs["depth"]):
        for name in own if part.knobs["shared"] and i else ():
            if left.pop(_embedder(i) + name, None) is None:
                raise BadCheckpoint(f"weights: {_embedder(i)}{name} is missing; is this config of these weights?")
        if f"{_embedder(i)}{_TABLE}" in left:
            _trim(left, i, part.knobs["classes"])
    net: DiT = filled(lambda: build("nets", part, shape), _pairs, left)
    return net


def part_of(record: Mapping[str, Any], tensors: Tensors) -> tuple[Part, tuple[int, int, int]]:
    """(dit and its knobs, (C, H, W)) of a config.json and the weights beside it; see `read_dit`."""
    config = Config(record, KIND)
    config.only("norm_type", "ada_norm_zero")
    config.only("activation_fn", "gelu-approximate")
    config.only("attention_bias", True)
    config.only("norm_elementwise_affine", False)
    config.skip("norm_num_groups", "upcast_attention")
    channels, side = config.integer("in_channels", 4, 1), config.integer("sample_size", 32, 1)
    depth, patch = config.integer("num_layers", 28, 1, 1000), config.integer("patch_size", 2, 1)
    heads, wide = config.integer("num_attention_heads", 16, 1), config.integer("attention_head_dim", 72, 1)
    out = channels if config.get("out_channels") is None else config.integer("out_channels", channels, 1)
    if out not in (channels, 2 * channels):
        raise config.error("out_channels", f"{channels}, or {2 * channels} with learned variance")
    if side % patch:
        raise config.error("sample_size", f"a multiple of the patch_size, {patch}")
    if heads * wide < 8 or heads * wide % 4:
        raise config.error("attention_head_dim", f"one with {heads} of which tokens have a multiple of 4 numbers")
    knobs = {
        "classes": _filled_classes(tensors, depth, config.integer("num_embeds_ada_norm", 1000, 0, 1_000_000)),
        "patch": patch,
        "width": heads * wide,
        "depth": depth,
        "heads": heads,
        "dropout": config.number("dropout", 0.0, 0, 0.999),
        "learned_variance": out != channels,
        "eps": config.number("norm_eps", 1e-5, 1e-12, 1),
        "shared": _shared(tensors, depth),
    }
    config.done()
    return Part("dit", knobs), (channels, side, side)


def write_dit(net: DiT, *, classes: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our net as a DiTTransformer2DModel.

    Args:
        net: told time and class alone, of square images, with a perceptron four times as wide as its tokens.
        classes: their table's size besides the null: ours by default. DiTPipeline asks class 1000 for the null, so that
            a net of fewer classes can be guided there with classes=1000; the places that ours leaves hold the null.

    Returns:
        (config, tensors): for its config.json, and its weights.

    Raises:
        BadArgument: a net that has no place there, or fewer classes than it has.
    """
    count = net.classes if classes is None else classes
    if count < net.classes:
        raise BadArgument(f"write dit: got classes={classes}, need at least the net's {net.classes}")
    block: Any = net.blocks[0]
    config = {
        "_class_name": KIND,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": net.width // block.attention.heads,
        "dropout": block.dropout.p,
        "in_channels": net.shape[0],
        "norm_elementwise_affine": False,
        "norm_eps": block.eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": block.attention.heads,
        "num_embeds_ada_norm": count,
        "num_layers": len(net.blocks),
        "out_channels": net.shape[0] * (2 if net.learned_variance else 1),
        "patch_size": net.patch,
        "sample_size": net.shape[1],
        "upcast_attention": False,
    }
    _refuse(net)
    said = {name: value for name, value in net.state_dict().items() if not name.endswith(".augmentation.weight")}
    theirs = to_theirs(_pairs(net), said)  # which is told zeros of augmentation there, and so nothing
    first = {name.removeprefix(_embedder(0)): name for name in theirs if name.startswith(_embedder(0))}
    for i in range(len(net.blocks)):
        theirs |= {} if net.contexts else {_embedder(i) + name: theirs[own].clone() for name, own in first.items()}
    for i in range(len(net.blocks)):
        table = theirs.get(f"{_embedder(i)}{_TABLE}", net.stem.weight.new_zeros(1, net.width).detach())
        null = table[-1:].repeat(count + 1 - net.classes, 1)
        theirs[f"{_embedder(i)}{_TABLE}"] = torch.cat([table[:-1], null])
    return config, theirs


def _embedder(block: int) -> str:
    """Where a block keeps its embedding of time and class."""
    return f"transformer_blocks.{block}.norm1.emb."


def _tables(tensors: Tensors, depth: int) -> Sequence[Tensor]:
    """The class tables of all blocks, those that are there."""
    names = [f"{_embedder(i)}{_TABLE}" for i in range(depth)]
    return [tensors[name] for name in names if name in tensors and tensors[name].ndim == 2]


def _filled_classes(tensors: Tensors, depth: int, classes: int) -> int:
    """How many classes there are without those at the end that equal the null in every block."""
    tables = _tables(tensors, depth)
    for table in tables:
        if len(table) != classes + 1:
            got, need = len(table), classes + 1
            raise BadCheckpoint(f"{KIND}: a class table has {got} rows, need {need}, one for each class and the null")
    if not tables or any(table.is_meta for table in tables):
        return classes
    own = torch.stack([(table[:-1] != table[-1]).any(dim=1) for table in tables]).any(dim=0).nonzero()
    return int(own.max()) + 1 if len(own) else 0


def _shared(tensors: Tensors, depth: int) -> bool:
    """Whether all blocks embed time and class alike; on the meta device taken for granted."""
    for name, first in tensors.items():
        if not name.startswith(_embedder(0)) or first.is_meta:
            continue
        for i in range(1, depth):
            other = tensors.get(_embedder(i) + name.removeprefix(_embedder(0)))
            if other is not None and not torch.equal(first, other):
                return False
    return True


def _trim(left: dict[str, Tensor], block: int, classes: int) -> None:
    """Leave a block's filled classes and the null in its table; without classes, the null in the bias of its time."""
    name, bias = f"{_embedder(block)}{_TABLE}", f"{_embedder(block)}timestep_embedder.linear_2.bias"
    table = left.pop(name)
    if classes:
        left[name] = torch.cat([table[:classes], table[-1:]])
    elif bias in left:
        left[bias] = left[bias] + table[-1]


def _refuse(net: DiT) -> None:
    """Refuse what a DiTTransformer2DModel cannot hold.

    Raises:
        BadArgument: naming it.
    """
    block: Any = net.blocks[0]
    context, hidden = net.context, block.linear1.out_features
    has = {
        "text": net.text is not None,
        "an image condition": net.image is not None,
        "coordinates": net.coordinates is not None,
        "attributes": context.vec is not None,
        "Fourier waves": not isinstance(context.wave, Sinusoid),
        f"images of {net.shape[1]}×{net.shape[2]}": net.shape[1] != net.shape[2],
        f"a perceptron of {hidden} numbers": hidden != 4 * net.width,
    }
    for what, there in has.items():
        if there:
            need = f"time and class alone, square images, a perceptron of {4 * net.width}"
            raise BadArgument(f"write dit: the net has {what}, need {need}; diffusers has no class for it")


def _pairs(net: DiT) -> list[Pair]:
    """Every parameter of ours, and where it is there; of the embeddings those of the first block, or of each."""
    pairs = layer("stem", "pos_embed.proj")
    for i in range(len(net.blocks)):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        pairs += layer(f"{ours}.modulation", f"{theirs}.norm1.linear")
        parts = [f"{theirs}.attn1.to_{part}" for part in "qkv"]
        pairs += layer(f"{ours}.attention.qkv", *parts, how="rows")
        pairs += layer(f"{ours}.attention.out", f"{theirs}.attn1.to_out.0")
        pairs += layer(f"{ours}.linear1", f"{theirs}.ff.net.0.proj")
        pairs += layer(f"{ours}.linear2", f"{theirs}.ff.net.2")
    for i in range(1 + len(net.contexts)):
        own = "context" if i == 0 else f"contexts.{i - 1}"
        for n in (1, 2):
            pairs += layer(f"{own}.linear{n}", f"{_embedder(i)}timestep_embedder.linear_{n}")
        if net.classes:
            pairs += null_class(f"{own}.label", f"{_embedder(i)}{_TABLE.removesuffix('.weight')}")
    return [*pairs, *layer("head.modulation", "proj_out_1"), *layer("head.linear", "proj_out_2")]
