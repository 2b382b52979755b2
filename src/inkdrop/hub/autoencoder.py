"""AutoencoderKL of diffusers, read as a codec and written from one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inkdrop.codec import Codec
from inkdrop.errors import BadCheckpoint
from inkdrop.find import Part, build
from inkdrop.hub.config import Config
from inkdrop.hub.weights import Pair, Tensors, filled, layer, to_theirs
from inkdrop.nets.autoencoder import Autoencoder, Residual
from inkdrop.nets.blocks import Down, SelfAttention, Up

__all__ = ["pairs_of", "read_autoencoder", "write_autoencoder"]

_CLASS = "AutoencoderKL"
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What the layers of attention were called before diffusers 0.15, as in the files of Stable Diffusion 1."""


def read_autoencoder(config: Mapping[str, Any], tensors: Tensors, *, size: tuple[int, int] | None = None) -> Codec:
    """A codec of an AutoencoderKL; on the meta device where the tensors are.

    scaling_factor is our scale; shift_factor, or latents_mean and latents_std (SDXL), our shift and scale.

    Args:
        config: its config.json.
        tensors: its weights; each must be used.
        size: (H, W) of the images; by default its sample_size. It runs at all multiples of the factor.

    Raises:
        BadCheckpoint: a config that is not understood whole, or a key missing, left over or of another shape.
    """
    told = Config(config, _CLASS)
    knobs = _knobs(told)
    sample = told.get("sample_size", 32)
    if isinstance(sample, int) and not isinstance(sample, bool):
        sample = (sample, sample)
    if not isinstance(sample, (list, tuple)) or len(sample) != 2 or not all(type(n) is int and n > 0 for n in sample):
        raise told.error("sample_size", "one or two positive whole numbers")
    pixels = (told.integer("in_channels", 3, 1, 1024), *(sample if size is None else size))
    told.only("out_channels", pixels[0])
    shift, scale = _unit(told, knobs["latent"])
    told.skip("force_upcast")
    told.done()
    part = Part("autoencoder", knobs)
    net = filled(lambda: build("codecs", part, pixels), pairs_of, _renamed(tensors))
    codec = Codec(part, pixels, shift, scale, {"source": _CLASS}, net=net)
    return codec.eval().requires_grad_(False)


def _knobs(told: Config) -> dict[str, Any]:
    """The knobs of `autoencoder` for their config."""
    widths = told.integers("block_out_channels", (64,), 1)
    for key, kind in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        if len(told.words(key, (kind,), (kind,))) != len(widths):
            raise told.error(key, f"as many as block_out_channels, {len(widths)}")
    told.only("act_fn", "silu", "swish")
    quant = told.flag("use_quant_conv", True)
    if told.flag("use_post_quant_conv", True) != quant:
        raise told.error("use_post_quant_conv", f"the same as use_quant_conv, {quant}")
    width = math.gcd(*widths)
    return {
        "latent": told.integer("latent_channels", 4, 1, 1024),
        "width": width,
        "multipliers": [w // width for w in widths],
        "blocks": told.integer("layers_per_block", 1, 1, 64),
        "middle_attention": told.flag("mid_block_add_attention", True),
        "norm_groups": told.integer("norm_num_groups", 32, 1),
        "quant": quant,
    }


def _unit(told: Config, latent: int) -> tuple[Sequence[float], Sequence[float]]:
    """(shift, scale) of each channel: their pipelines make pixels of z/scale + shift."""
    factor = told.number("scaling_factor", 0.18215, 1e-12)
    shift = told.number("shift_factor", 0.0) if told.get("shift_factor") is not None else 0.0
    means, stds = told.get("latents_mean"), told.get("latents_std")
    if means is None and stds is None:
        return [shift] * latent, [factor] * latent
    for key, value in (("latents_mean", means), ("latents_std", stds)):
        good = isinstance(value, (list, tuple)) and len(value) == latent
        if not good or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in value):
            raise told.error(key, f"{latent} numbers, as is its counterpart")
    if shift or min(stds) <= 0:
        raise told.error("latents_std", "more than 0, and no shift_factor beside it")
    return list(means), [factor / std for std in stds]


def _renamed(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors with the layers of attention called as they are now."""
    out = {}
    for key, value in tensors.items():
        *before, name, last = key.rsplit(".", 2)
        old = bool(before) and ".attentions." in key and name in _ATTENTION
        out[f"{before[0]}.{_ATTENTION[name]}.{last}" if old else key] = value
    return out


def pairs_of(net: Autoencoder) -> list[Pair]:
    """Every parameter of an autoencoder, and its name in AutoencoderKL."""
    down = _levels("encoder.down", net.encoder.down, "encoder.down_blocks", "downsamplers", Down)
    up = _levels("decoder.up", net.decoder.up, "decoder.up_blocks", "upsamplers", Up)
    pairs = [*down, *up]
    for half, middle in (("encoder", net.encoder.middle), ("decoder", net.decoder.middle)):
        pairs += layer(f"{half}.stem", f"{half}.conv_in")
        pairs += _middle(f"{half}.middle", middle, f"{half}.mid_block")
        pairs += layer(f"{half}.head.0", f"{half}.conv_norm_out") + layer(f"{half}.head.2", f"{half}.conv_out")
    if isinstance(net.quant, nn.Conv2d):
        pairs += layer("quant", "quant_conv") + layer("post_quant", "post_quant_conv")
    return pairs


def _levels(ours: str, parts: nn.ModuleList, theirs: str, between: str, kind: type[nn.Module]) -> list[Pair]:
    """The pairs of one way, level by level: ours in one list, theirs in blocks that end in a change of size."""
    pairs: list[Pair] = []
    level = place = 0
    for index, part in enumerate(parts):
        if isinstance(part, kind):
            pairs += layer(f"{ours}.{index}.conv", f"{theirs}.{level}.{between}.0.conv")
            level, place = level + 1, 0
        elif isinstance(part, Residual):
            pairs += _residual(f"{ours}.{index}", part, f"{theirs}.{level}.resnets.{place}")
            place += 1
    return pairs


def _residual(ours: str, part: Residual, theirs: str) -> list[Pair]:
    pairs = [
        pair for name in ("norm1", "conv1", "norm2", "conv2") for pair in layer(f"{ours}.{name}", f"{theirs}.{name}")
    ]
    if isinstance(part.shortcut, nn.Conv2d):
        pairs += layer(f"{ours}.shortcut", f"{theirs}.conv_shortcut")
    return pairs


def _middle(ours: str, parts: nn.ModuleList, theirs: str) -> list[Pair]:
    pairs: list[Pair] = []
    place = 0
    for index, part in enumerate(parts):
        if isinstance(part, SelfAttention):
            one, other = f"{ours}.{index}", f"{theirs}.attentions.0"
            pairs += layer(f"{one}.norm", f"{other}.group_norm")
            pairs += layer(f"{one}.qkv", *(f"{other}.to_{name}" for name in "qkv"), how="rows")
            pairs += layer(f"{one}.out", f"{other}.to_out.0")
        elif isinstance(part, Residual):
            pairs += _residual(f"{ours}.{index}", part, f"{theirs}.resnets.{place}")
            place += 1
    return pairs


def write_autoencoder(codec: Codec) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an AutoencoderKL that does what the codec does.

    A shift of 0 with one scale for all channels is written as scaling_factor. Most of their pipelines know no more
    and pass over shift_factor, so that any other shift and scale go into quant_conv and post_quant_conv, and
    scaling_factor is 1: their posterior is then that of the codec's latents.

    Raises:
        BadCheckpoint: the autoencoder is not one that AutoencoderKL can be: its norms have several numbers of groups.
    """
    net = codec.autoencoder
    groups = {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)}
    if len(groups) != 1:
        raise BadCheckpoint(f"{_CLASS}: cannot have norms of {sorted(groups)} groups, need one number for all")
    tensors = to_theirs(pairs_of(net), net.state_dict())
    plain = not bool(codec.shift.any()) and bool((codec.scale == codec.scale[0]).all())
    if not plain:
        tensors |= _folded(codec, tensors)
    widths = [part.conv2.out_channels for part in net.encoder.down if isinstance(part, Residual)]
    levels = 1 + sum(isinstance(part, Down) for part in net.encoder.down)
    blocks = len(widths) // levels
    sides = list(codec.shape[1:])
    config = {
        "_class_name": _CLASS,
        "act_fn": "silu",
        "block_out_channels": widths[::blocks],
        "down_block_types": [_DOWN] * levels,
        "force_upcast": True,
        "in_channels": codec.shape[0],
        "latent_channels": codec.latent_shape[0],
        "layers_per_block": blocks,
        "mid_block_add_attention": len(net.encoder.middle) == 3,
        "norm_num_groups": groups.pop(),
        "out_channels": codec.shape[0],
        "sample_size": sides[0] if sides[0] == sides[1] else sides,
        "scaling_factor": float(codec.scale[0]) if plain else 1.0,
        "up_block_types": [_UP] * levels,
        "use_post_quant_conv": not plain or isinstance(net.quant, nn.Conv2d),
        "use_quant_conv": not plain or isinstance(net.quant, nn.Conv2d),
    }
    return config, tensors


def _folded(codec: Codec, tensors: Tensors) -> dict[str, Tensor]:
    """The two 1×1 convolutions with shift and scale in them.

    With s the scale and m the shift: mean' = s·(mean − m), logvar' = logvar + 2·log s, and z = z'/s + m.
    """
    c = codec.latent_shape[0]
    shift, scale = codec.shift.double().cpu(), codec.scale.double().cpu()
    weight, bias = _conv(tensors, "quant_conv", 2 * c)
    rows = torch.cat([scale, torch.ones_like(scale)])
    moved = torch.cat([-scale * shift, 2 * scale.log()])
    back, after = _conv(tensors, "post_quant_conv", c)
    return {
        "quant_conv.weight": (rows[:, None] * weight)[:, :, None, None].float(),
        "quant_conv.bias": (rows * bias + moved).float(),
        "post_quant_conv.weight": (back / scale)[:, :, None, None].float(),
        "post_quant_conv.bias": (after + back @ shift).float(),
    }


def _conv(tensors: Tensors, name: str, count: int) -> tuple[Tensor, Tensor]:
    """Weight (O, I) and bias (O,) of a 1×1 convolution in float64; those of the identity where there is none."""
    if f"{name}.weight" not in tensors:
        return torch.eye(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    return tensors[f"{name}.weight"][:, :, 0, 0].double().cpu(), tensors[f"{name}.bias"].double().cpu()
