"""AutoencoderKL of diffusers against ours: every parameter perturbed, both ways, to 1e-5 in float32."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from inkdrop.codec import Codec
from inkdrop.errors import BadCheckpoint
from inkdrop.find import Part
from inkdrop.hub.autoencoder import read_autoencoder, write_autoencoder
from inkdrop.hub.folder import read_component, write_component

pytestmark = pytest.mark.long

# stabilityai/sd-vae-ft-mse and the VAE of Stable Diffusion 1.5, as published, but for names and versions.
SD: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SMALL = {**SD, "block_out_channels": [8, 16, 24, 24], "norm_num_groups": 4, "sample_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd": {**SMALL, "scaling_factor": 0.18215},
    "no-quant-shifted": {  # as SD 3's and FLUX's
        **SMALL,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    "no-attention-one-block": {
        **SMALL,
        "block_out_channels": [12, 24],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "mid_block_add_attention": False,
        "sample_size": [16, 24],
    },
    "sdxl-statistics": {**SMALL, "latents_mean": [0.5, -1.0, 0.25, 2.0], "latents_std": [2.0, 0.5, 1.5, 3.0]},
}


def perturbed(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net with noise on every parameter, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net.eval()


def theirs_of(config: dict[str, Any]) -> Any:
    """Their module of a config, with random weights."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return perturbed(diffusers.AutoencoderKL.from_config(config))


def sides(config: dict[str, Any]) -> tuple[int, int]:
    size = config["sample_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def unit_of(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(shift, scale) by which their pipelines go from the encoder's numbers to those that are noised."""
    c, factor = config["latent_channels"], config.get("scaling_factor", 0.18215)
    mean = torch.tensor(config.get("latents_mean", [config.get("shift_factor") or 0.0] * c))
    std = torch.tensor(config.get("latents_std", [1.0] * c))
    return mean[:, None, None], (factor / std)[:, None, None]


@pytest.mark.parametrize("name", CONFIGS)
def test_theirs_is_read(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    net = theirs_of(config)
    net.save_pretrained(tmp_path / "vae")
    codec = read_autoencoder(*read_component(tmp_path / "vae"))
    x = torch.randn(2, 3, *sides(config))
    shift, scale = unit_of(config)
    assert codec.shape == (3, *sides(config))
    with torch.no_grad():
        want = net.encode(x).latent_dist
        got = codec.autoencoder.encode(x)
        assert_close(got.mean, want.mean, rtol=1e-5, atol=1e-5)
        assert_close(got.logvar, want.logvar, rtol=1e-5, atol=1e-5)
        assert_close(got.kl(), want.kl(), rtol=1e-5, atol=1e-4)
        z = (want.mean - shift) * scale
        assert_close(codec.encode(x), z, rtol=1e-5, atol=1e-5)
        noisy = z + torch.randn_like(z)
        assert_close(codec.decode(noisy), net.decode(noisy / scale + shift).sample, rtol=1e-5, atol=1e-5)
        assert want.mean.std() > 0.05  # nothing is equal for being zero


@pytest.mark.parametrize("quant", [True, False])
@pytest.mark.parametrize("unit", [(0.0, 0.7), (0.3, 0.7), ([0.5, -1.0, 2.0], [0.5, 2.0, 3.0])])
def test_ours_is_read_there(quant: bool, unit: tuple[Any, Any], tmp_path: Path) -> None:
    knobs = {"latent": 3, "width": 8, "multipliers": (1, 2, 3), "blocks": 1, "quant": quant}
    codec = perturbed(Codec(Part("autoencoder", knobs), (1, 16, 24), *unit)).requires_grad_(False)
    write_component(tmp_path / "vae", *write_autoencoder(codec))
    net = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    factor = net.config.scaling_factor
    x, z = torch.randn(2, 1, 16, 24), torch.randn(2, 3, 4, 6)
    with torch.no_grad():
        want = codec.autoencoder.encode(x)
        there = net.encode(x).latent_dist
        assert_close(there.mean * factor, codec.encode(x), rtol=1e-5, atol=1e-5)
        spread = there.std * factor  # of their posterior, in the codec's unit
        assert_close(spread, (0.5 * want.logvar).exp() * codec.scale[:, None, None], rtol=1e-5, atol=1e-5)
        assert_close(net.decode(z / factor).sample, codec.decode(z), rtol=1e-5, atol=1e-5)
    again = read_autoencoder(*read_component(tmp_path / "vae"))
    with torch.no_grad():
        assert_close(again.encode(x), codec.encode(x), rtol=1e-5, atol=1e-5)
        assert_close(again.decode(z), codec.decode(z), rtol=1e-5, atol=1e-5)


def test_old_names_of_the_attention_are_read() -> None:
    # Files of Stable Diffusion 1 say query, key, value and proj_attn; from_pretrained renames them.
    net = theirs_of(CONFIGS["sd"])
    new = net.state_dict()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in new.items():
        for now, before in names.items():
            key = key.replace(f"attentions.0.{now}.", f"attentions.0.{before}.")
        old[key] = value
    assert old.keys() != new.keys()
    one, other = (read_autoencoder(CONFIGS["sd"], tensors) for tensors in (new, old))
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_whole_vae_of_stable_diffusion_is_read_with_every_key_used_and_none_left_over() -> None:
    with torch.device("meta"):
        tensors = diffusers.AutoencoderKL.from_config({**SD, "scaling_factor": 0.18215}).state_dict()
    assert len(tensors) == 248
    codec = read_autoencoder(SD, tensors)  # to_ours refuses a key that is missing, left over or of another shape
    assert codec.autoencoder.encoder.stem.weight.is_meta
    assert sum(p.numel() for p in codec.parameters()) == 83_653_863
    assert (codec.shape, codec.latent_shape) == ((3, 512, 512), (4, 64, 64))
    assert_close(codec.scale, torch.full((4,), 0.18215))
    for spoilt in (
        {k: v for k, v in tensors.items() if k != "quant_conv.bias"},
        {**tensors, "encoder.extra.weight": tensors["quant_conv.bias"]},
        {**tensors, "decoder.conv_in.weight": tensors["encoder.conv_in.weight"]},
    ):
        with pytest.raises(BadCheckpoint, match="quant_conv.bias|extra|conv_in") as caught:
            read_autoencoder(SD, spoilt)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types"),
        ({"act_fn": "relu"}, "act_fn"),
        ({"out_channels": 4}, "out_channels"),
        ({"use_quant_conv": False}, "use_post_quant_conv"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"latents_mean": [0.0] * 4}, "latents_std"),
        ({"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "latents_std"),
        ({"sample_size": "512"}, "sample_size"),
        ({"spatial_compression": 8}, "spatial_compression"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadCheckpoint, match=said) as caught:
        read_autoencoder(json.loads(json.dumps({**SMALL, **change})), {})
    assert "\n" not in str(caught.value)


def test_unlike_norms_cannot_be_written() -> None:
    codec = Codec(Part("autoencoder", {"width": 8, "multipliers": (1, 2), "blocks": 1}), (1, 8, 8))
    codec.autoencoder.encoder.head[0] = nn.GroupNorm(1, 16)
    with pytest.raises(BadCheckpoint, match="groups"):
        write_autoencoder(codec)
