"""Config of a U-Net: our net in the words of UNet2DModel's or UNet2DConditionModel's config.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from inkdrop.errors import BadCheckpoint
from inkdrop.hub.unet import CONDITION, PLAIN
from inkdrop.hub.unet_weights import pairs_of
from inkdrop.hub.weights import to_theirs
from inkdrop.nets.blocks import Down, ResBlock, SelfAttention
from inkdrop.nets.embed import Sinusoid
from inkdrop.nets.layout import Stage
from inkdrop.nets.spatial import SpatialTransformer, TokenAttention, TransformerBlock
from inkdrop.nets.unet import UNet

__all__ = ["config_of", "write_unet"]

Value = TypeVar("Value")


def write_unet(
    net: UNet, *, forget: Sequence[str] = (), told: Tensor | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of the UNet2DModel, or with spatial transformers UNet2DConditionModel, that does as ours does.

    A learned null class that is not zero becomes one more class there, the last. Sides that it cannot halve so often
    become the next that it can: its sample_size.

    Args:
        net: ours.
        forget: nulls that it has no place for, "text.null" or "image.null", to leave out; else they must be zero.
        told: the vector of one class (D,), for a net without classes that does what ours does for that class.

    Raises:
        BadCheckpoint: a net that they cannot be, naming the knob; or a null that is not zero.
    """
    config, state = config_of(net), net.state_dict()
    label = net.context.label
    null = label is not None and bool(label.null.any())
    gone = {*forget, "context.augmentation.weight"}  # which is told zeros there, and so says nothing
    if told is not None:
        state["context.linear2.bias"] = state["context.linear2.bias"] + told
        gone |= {name for name in state if name.startswith("context.label.")}
    elif label is not None:
        config["num_class_embeds"] = label.classes + null
    pairs = [pair for pair in pairs_of(net, null=null) if pair.ours not in gone]
    return config, to_theirs(pairs, {name: value for name, value in state.items() if name not in gone})


def config_of(net: UNet) -> dict[str, Any]:
    """The config.json of a U-Net without its classes; see `write_unet`."""
    _refuse(net)
    down, up = _levels(net.down), _levels(net.up)
    attentions = [part.attention for part in net.modules() if isinstance(part, Stage) and part.attention is not None]
    cross = any(isinstance(part, SpatialTransformer) for part in attentions)
    if cross and any(isinstance(part, SelfAttention) for part in attentions):
        raise BadCheckpoint("hub write: the U-Net has attention and cross levels, which are two classes there")
    blocks = [part for part in net.modules() if isinstance(part, ResBlock)]
    norms, free = _norms(net)
    wave = net.context.wave
    if not isinstance(wave, Sinusoid) or wave.shift not in (0, 1):
        raise BadCheckpoint("hub write: net.embedding and net.shift must be sinusoidal, 0 or 1")
    config: dict[str, Any] = {
        "_class_name": CONDITION if cross else PLAIN,
        "act_fn": "silu",
        "block_out_channels": [stages[-1].block.conv2.out_channels for stages in down],
        "center_input_sample": False,
        "dropout": _same("dropout", [block.dropout.p for block in blocks]),
        "downsample_padding": 1,
        "flip_sin_to_cos": wave.cos_first,
        "freq_shift": int(wave.shift),
        "in_channels": net.stem.in_channels,
        "layers_per_block": _same("blocks", [len(stages) for stages in down]),
        "mid_block_scale_factor": 1,
        "norm_eps": _same("norm_eps", [norm.eps for norm in norms]),
        "norm_num_groups": _same("norm_groups", [norm.num_groups for norm in (*norms, *free)]),
        "out_channels": net.head[2].out_channels,
        "resnet_time_scale_shift": "scale_shift"
        if _same("scale_shift", [b.scale_shift for b in blocks])
        else "default",
        "sample_size": _sides(net, len(down)),
    }
    if any(isinstance(part, Down) and not part.symmetric for part in net.down):
        config["downsample_padding"] = 0
    return config | (_of_cross(net, down) if cross else _of_own(net, down, up))


def _refuse(net: UNet) -> None:
    """What they have no place for."""
    text = net.text
    told = {
        "patch": net.patch != 1,
        "attributes": net.context.vec is not None,
        "augment": net.context.augment is not None,
        "coordinates": net.coordinates is not None,
        "pooled": net.pool is not None,
        "vocabulary": text is not None and text.vocabulary > 0,
        "text_width": text is not None and not text.vocabulary and text.features != text.width,
    }
    for knob, there in told.items():
        if there:
            raise BadCheckpoint(
                f"hub write: net.{knob} has no counterpart in diffusers' U-Nets; train a net without it"
            )


def _same(knob: str, values: Iterable[Value]) -> Value:
    """The one value that all have."""
    found = list(dict.fromkeys(values))
    if len(found) != 1:
        raise BadCheckpoint(
            f"hub write: net.{knob} is {', '.join(map(str, found))} in different layers, and diffusers has but one; "
            f"train one with --set net.{knob}={found[0]}"
        )
    return found[0]


def _norms(net: UNet) -> tuple[list[nn.GroupNorm], list[nn.GroupNorm]]:
    """The norms of one eps, and those of spatial transformers, which have their own; without the middle's own."""
    middle = net.middle[0].get_submodule("attention") if net.middle[0].attention is not None else None
    apart = [part.norm for part in net.modules() if isinstance(part, SpatialTransformer)]
    known = {*map(id, apart), *([id(middle.norm)] if isinstance(middle, SelfAttention) else [])}
    return [m for m in net.modules() if isinstance(m, nn.GroupNorm) and id(m) not in known], apart


def _levels(parts: nn.ModuleList) -> list[list[Stage]]:
    """The stages of each level, in the order in which they run."""
    levels: list[list[Stage]] = [[]]
    for part in parts:
        if isinstance(part, Stage):
            levels[-1].append(part)
        else:
            levels.append([])
    return levels


def _sides(net: UNet, levels: int) -> int | list[int]:
    """The sides, rounded up to what can be halved once a level."""
    step = 2 ** (levels - 1)
    sides = [-(-side // step) * step for side in net.shape[1:]]
    return sides[0] if sides[0] == sides[1] else sides


def _of_own(net: UNet, down: list[list[Stage]], up: list[list[Stage]]) -> dict[str, Any]:
    """What UNet2DModel has alone."""
    own = [[stage.attention for stage in stages if isinstance(stage.attention, SelfAttention)] for stages in down]
    middle = net.middle[0].get_submodule("attention") if net.middle[0].attention is not None else None
    every = [part for parts in own for part in parts] + ([middle] if isinstance(middle, SelfAttention) else [])
    residual = any(isinstance(part, ResBlock) for part in net.down)
    kinds = [_kind("Down", bool(parts), residual and i < len(own) - 1) for i, parts in enumerate(own)]
    ups = [_kind("Up", bool(parts), residual and i > 0) for i, parts in enumerate(own)][::-1]
    single = all(part.head_width == part.qkv.in_features for part in every)
    config: dict[str, Any] = {
        "add_attention": middle is not None,
        "attention_head_dim": None if single else _same("heads", [part.head_width for part in every]),
        "down_block_types": kinds,
        "downsample_type": "resnet" if residual else "conv",
        "up_block_types": ups,
        "upsample_type": "resnet" if residual else "conv",
    }
    if isinstance(middle, SelfAttention) and isinstance(middle.norm, nn.GroupNorm):
        config["attn_norm_num_groups"] = middle.norm.num_groups
    elif isinstance(middle, SelfAttention) and not net.middle[0].get_submodule("block").scale_shift:
        raise BadCheckpoint("hub write: net.middle_groups is 0, which they have beside scale_shift alone")
    return config


def _kind(way: str, attends: bool, residual: bool) -> str:
    """The class of a block of UNet2DModel; one that attends says apart how it changes the size."""
    if attends:
        return f"Attn{way}Block2D"
    return f"Resnet{way}sampleBlock2D" if residual else f"{way}Block2D"


def _of_cross(net: UNet, down: list[list[Stage]]) -> dict[str, Any]:
    """What UNet2DConditionModel has alone."""
    if any(isinstance(part, ResBlock) for part in net.down):
        raise BadCheckpoint("hub write: net.resample is residual, which they do not have beside cross")
    first = [stages[0].attention for stages in down]
    cross = [isinstance(part, SpatialTransformer) for part in first]
    last = net.middle[0].get_submodule("attention") if net.middle[0].attention is not None else None
    if not isinstance(last, SpatialTransformer):
        raise BadCheckpoint("hub write: net.middle_attention is false, which they do not have beside cross")
    levels = [part if isinstance(part, SpatialTransformer) else last for part in first]
    heads = [part.inp.in_features // _first(part).head_width for part in levels]
    only = [there and _first(part).cross for part, there in zip(levels, cross, strict=True)]
    return {
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "cross_attention_dim": net.text.features if net.text is not None else None,
        "down_block_types": [f"{'CrossAttn' if there else ''}DownBlock2D" for there in cross],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "only_cross_attention": only if any(only) else False,
        "transformer_layers_per_block": [len(part.blocks) for part in levels],
        "up_block_types": [f"{'CrossAttn' if there else ''}UpBlock2D" for there in reversed(cross)],
        "use_linear_projection": False,
    }


def _first(attention: SpatialTransformer) -> TokenAttention:
    """The first attention of its first block."""
    block = attention.blocks[0]
    if not isinstance(block, TransformerBlock):
        raise BadCheckpoint(f"hub write: {type(block).__name__} is no transformer block")
    return block.attention1
