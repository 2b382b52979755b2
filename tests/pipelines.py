"""Small pipelines of diffusers with random weights, for the tests of hub/: every parameter is perturbed."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

__all__ = ["ddim", "ddpm", "dit", "latent", "perturbed", "pixels", "quietly", "same_weights", "silent", "stable", "vae"]


def perturbed(net: Any, size: float = 0.05, seed: int = 1) -> Any:
    """The net with noise on every parameter, in evaluation mode."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=source))
    return net.eval()


def pixels(**config: Any) -> Any:
    """A UNet2DModel of two levels, of 8×8 pixels of one channel."""
    own: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    return perturbed(diffusers.UNet2DModel(**{**own, **config}))


def vae() -> Any:
    """An AutoencoderKL of factor 2, of 16×16 pixels in colour and latents of 4 channels."""
    torch.manual_seed(0)
    made = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
    )
    return perturbed(made, 0.02)


def ddpm(**scheduler: Any) -> Any:
    """A DDPMPipeline, as google/ddpm-cifar10-32 is."""
    own = {"variance_type": "fixed_large", "clip_sample": True}
    return silent(diffusers.DDPMPipeline(pixels(), diffusers.DDPMScheduler(**{**own, **scheduler})))


def ddim(**scheduler: Any) -> Any:
    """A DDIMPipeline."""
    return silent(diffusers.DDIMPipeline(pixels(), diffusers.DDIMScheduler(**scheduler)))


def latent() -> Any:
    """An LDMPipeline, whose autoencoder is of the KL kind."""
    net, scheduler = pixels(in_channels=4, out_channels=4), diffusers.DDIMScheduler(clip_sample=False)
    return silent(diffusers.LDMPipeline(vae(), net, scheduler))


def dit(classes: int = 1000) -> Any:
    """A DiTPipeline of learned variance."""
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=classes,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return silent(diffusers.DiTPipeline(perturbed(net), vae(), scheduler))


def stable(tmp: Path) -> Any:
    """A StableDiffusionPipeline with a CLIP of its own, and the scheduler of Stable Diffusion 1.5."""
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    scheduler = diffusers.PNDMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    words = (vae(), clip(), tokenizer(tmp), perturbed(net), scheduler, None, None)
    return silent(diffusers.StableDiffusionPipeline(*words, requires_safety_checker=False))


def clip() -> Any:
    """A CLIP text encoder of two layers that reads 16 tokens."""
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return perturbed(transformers.CLIPTextModel(config))


def tokenizer(tmp: Path) -> Any:
    """CLIP's tokenizer with letters for tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(tmp / "vocab.json"), str(tmp / "merges.txt"), model_max_length=16)


def silent(pipeline: Any) -> Any:
    """The pipeline without its progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def quietly() -> Iterator[None]:
    """Their advice about packages that are not installed, and numpy 2's about them, are not ours to heed."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two nets have the same parameters, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())
