"""UNet2DModel and UNet2DConditionModel of diffusers, read as our U-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inkdrop.find import Part, build
from inkdrop.hub.config import Config
from inkdrop.hub.unet_weights import pairs_of, renamed
from inkdrop.hub.weights import Tensors, filled
from inkdrop.nets.unet import UNet

__all__ = ["CONDITION", "PLAIN", "part_of", "read_unet"]

PLAIN, CONDITION = "UNet2DModel", "UNet2DConditionModel"


def read_unet(
    record: Mapping[str, Any], tensors: Tensors, *, size: tuple[int, int] | None = None, length: int = 77
) -> UNet:
    """Our U-Net of one of theirs; on the meta device where the tensors are.

    Their class table has no null, so that ours, and the null text and image, are zeros.

    Args:
        record: its config.json.
        tensors: its weights; each must be used.
        size: (H, W) of what it denoises, where its config does not say.
        length: the most embeddings of a text, where it reads one.

    Raises:
        BadCheckpoint: a config that is not understood whole, or a key missing, left over or of another shape.
    """
    part, shape = part_of(record, size=size, length=length)
    linear = bool(record.get("use_linear_projection", False))
    net: UNet = filled(lambda: build("nets", part, shape), lambda net: pairs_of(net, linear=linear), renamed(tensors))
    return net


def part_of(
    record: Mapping[str, Any], *, size: tuple[int, int] | None = None, length: int = 77
) -> tuple[Part, tuple[int, int, int]]:
    """(unet and its knobs, (C, H, W)) of a config.json; see `read_unet`."""
    config = Config(record, str(record.get("_class_name", "unet")))
    kind = config.choice("_class_name", "", (PLAIN, CONDITION))
    knobs, channels = _common(config, conditional=kind == CONDITION)
    knobs |= _cross(config, length) if kind == CONDITION else _own(config, knobs)
    shape = (channels, *_size(config, size))
    config.done()
    return Part("unet", knobs), shape


def _common(config: Config, *, conditional: bool) -> tuple[dict[str, Any], int]:
    """(knobs that both classes have, C)."""
    widths = config.integers("block_out_channels", (320, 640, 1280, 1280) if conditional else (224, 448, 672, 896), 4)
    if any(width % widths[0] for width in widths):
        raise config.error("block_out_channels", f"multiples of the first, {widths[0]}")
    for key, value in (("center_input_sample", False), ("time_embedding_type", "positional")):
        config.only(key, value)
    config.only("time_embedding_dim", None, 4 * widths[0])
    config.only("class_embed_type", None)
    config.only("mid_block_scale_factor", 1)
    config.only("act_fn", "silu", "swish")
    knobs: dict[str, Any] = {
        "width": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": _one(config, "layers_per_block", 2, len(widths), 64),
        "dropout": config.number("dropout", 0.0, 0, 0.999),
        "norm_groups": config.integer("norm_num_groups", 32, 1),
        "norm_eps": config.number("norm_eps", 1e-5, 1e-12, 1),
        "shift": float(config.integer("freq_shift", 0, 0, 1)),
        "cos_first": config.flag("flip_sin_to_cos", True),
        "scale_shift": config.choice("resnet_time_scale_shift", "default", ("default", "scale_shift")) != "default",
        "symmetric": config.integer("downsample_padding", 1, 0, 1) == 1,
    }
    if (classes := config.get("num_class_embeds")) is not None:
        knobs["classes"] = config.integer("num_class_embeds", classes, 1, 1_000_000)
    inp = config.integer("in_channels", 4 if conditional else 3, 1)
    out = config.integer("out_channels", 4 if conditional else 3, 1)
    if out == 2 * inp:
        knobs["learned_variance"] = True
    elif inp > out:
        knobs["image"] = inp - out
    elif inp != out:
        raise config.error("out_channels", f"{inp} or {2 * inp} beside {inp} in_channels, or fewer")
    return knobs, min(inp, out)


def _one(config: Config, key: str, default: int, levels: int, high: int = 65_536) -> int:
    """A whole number that may be written once for each level, if it is the same for all."""
    value = config.get(key, default)
    if not isinstance(value, (list, tuple)):
        return config.integer(key, default, 1, high)
    numbers = config.integers(key, (default,), 1, high)
    if len(numbers) != levels or len(set(numbers)) != 1:
        raise config.error(key, "one number, the same at every level")
    return numbers[0]


def _size(config: Config, size: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W)."""
    value = config.get("sample_size")
    if size is not None:
        return size
    sides = [value, value] if isinstance(value, int) else value
    good = isinstance(sides, (list, tuple)) and len(sides) == 2 and all(type(side) is int for side in sides)
    if not good or not all(1 <= side <= 65_536 for side in sides):
        raise config.error("sample_size", "one or two whole numbers; give size=(H, W)")
    return sides[0], sides[1]


def _own(config: Config, knobs: dict[str, Any]) -> dict[str, Any]:
    """The knobs that UNet2DModel has alone: self-attention, and how sizes change."""
    levels = len(knobs["multipliers"])
    down_kinds, up_kinds = (
        ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    down = config.words("down_block_types", ("DownBlock2D", *["AttnDownBlock2D"] * 3), down_kinds)
    up = config.words("up_block_types", (*["AttnUpBlock2D"] * 3, "UpBlock2D"), up_kinds)
    attention = _levels(config, down, up, "Attn", levels)
    config.only("mid_block_type", "UNetMidBlock2D")
    config.only("num_train_timesteps", None)  # of learned time embeddings
    out: dict[str, Any] = {"attention": attention, "middle_attention": config.flag("add_attention", True)}
    head = config.get("attention_head_dim", 8)
    if head is not None and (attention or out["middle_attention"]):
        out["head_width"] = config.integer("attention_head_dim", 8, 1)
    groups = config.get("attn_norm_num_groups")
    if out["middle_attention"]:
        norm = knobs["norm_groups"] if not knobs["scale_shift"] else 0
        groups = norm if groups is None else config.integer("attn_norm_num_groups", 0, 1)
        out |= {"middle_groups": groups} if groups != knobs["norm_groups"] else {}
    ways = {
        *_ways(config, down[:-1], "downsample_type", "ResnetDownsampleBlock2D"),
        *_ways(config, up[:-1], "upsample_type", "ResnetUpsampleBlock2D"),
    }
    if len(ways) > 1:
        raise config.error("down_block_types", "sizes that change in one way, by convolutions or by residual blocks")
    if ways == {"resnet"}:
        out["resample"] = "residual"
        knobs.pop("symmetric")
    elif not ways:
        knobs.pop("symmetric")
    return out


def _ways(config: Config, kinds: Sequence[str], key: str, residual: str) -> list[str]:
    """How each of these blocks changes the size: "conv" or "resnet"."""
    attending = config.choice(key, "conv", ("conv", "resnet"))
    return ["resnet" if kind == residual else attending if kind.startswith("Attn") else "conv" for kind in kinds]


def _levels(config: Config, down: Sequence[str], up: Sequence[str], prefix: str, levels: int) -> list[int]:
    """The levels whose blocks attend, the same on the way down and up."""
    for key, kinds in (("down_block_types", down), ("up_block_types", up)):
        if len(kinds) != levels:
            raise config.error(key, f"as many as block_out_channels, {levels}")
    found = [level for level, kind in enumerate(down) if kind.startswith(prefix)]
    if found != [level for level, kind in enumerate(reversed(up)) if kind.startswith(prefix)]:
        raise config.error("up_block_types", "attention at the levels where it is on the way down")
    return found


_OFF: dict[str, Any] = {
    "dual_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "reverse_transformer_layers_per_block": None,
}
"""What UNet2DConditionModel can besides, and we cannot."""


def _cross(config: Config, length: int) -> dict[str, Any]:
    """The knobs that UNet2DConditionModel has alone: spatial transformers."""
    for key, value in _OFF.items():
        config.only(key, value)
    config.only("mid_block_only_cross_attention", None, False)
    config.skip("upcast_attention", "addition_embed_type_num_heads")  # in which dtype; of what is off
    config.flag("use_linear_projection", False)
    down = config.words(
        "down_block_types", (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"), ("CrossAttnDownBlock2D", "DownBlock2D")
    )
    up = config.words("up_block_types", ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3), ("CrossAttnUpBlock2D", "UpBlock2D"))
    levels = len(config.record.get("block_out_channels", (320, 640, 1280, 1280)))
    cross = _levels(config, down, up, "CrossAttn", levels)
    if not cross:
        raise config.error("down_block_types", "CrossAttnDownBlock2D at one level at least")
    config.only("mid_block_type", "UNetMidBlock2DCrossAttn")
    only = config.get("only_cross_attention", False)
    if not isinstance(only, bool) and not (isinstance(only, (list, tuple)) and len(only) == levels):
        raise config.error("only_cross_attention", f"true, false, or {levels} of them")
    only = [level for level in cross if (only if isinstance(only, bool) else only[level])]
    depth, heads = (
        _each(config, "transformer_layers_per_block", 1, levels),
        _each(config, "attention_head_dim", 8, levels),
    )
    return {
        "cross": cross,
        **({"only_cross": only} if only else {}),
        "depth": depth,
        "heads": heads,
        "features": _one(config, "cross_attention_dim", 1280, levels),
        "length": length,
        "null_length": length,
        "pooled": False,
    }


def _each(config: Config, key: str, default: int, levels: int) -> list[int]:
    """One number for all levels, or one a level."""
    if not isinstance(config.get(key, default), (list, tuple)):
        return [config.integer(key, default, 1, 1024)]
    numbers = config.integers(key, (default,), 1, 1024)
    if len(numbers) != levels:
        raise config.error(key, f"one number, or {levels} of them")
    return list(numbers)
