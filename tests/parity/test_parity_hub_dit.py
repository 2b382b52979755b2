"""Parity of hub/dit with diffusers 0.42.1: their DiTTransformer2DModel read here, ours written and loaded there.

Every parameter is perturbed first, for a block that starts as identity would make anything equal.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor
from torch.testing import assert_close

from inkdrop.core.cond import Cond
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.find import build
from inkdrop.generate import sample
from inkdrop.hub.dit import part_of, read_dit, write_dit
from inkdrop.hub.folder import read_component, write_component
from inkdrop.hub.plan import read_scheduler
from inkdrop.hub.schedule import schedule_of
from inkdrop.nets.dit import DiT, dit

pytestmark = pytest.mark.long  # left out of the fast tier

XL: dict[str, Any] = {  # facebook/DiT-XL-2-256, from before the class had a name of its own
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
    "use_linear_projection": False,
}
SMALL = {"attention_head_dim": 8, "num_attention_heads": 3, "num_layers": 3, "sample_size": 8}
NETS: dict[str, dict[str, Any]] = {
    "dit-xl": {**XL, **SMALL, "num_embeds_ada_norm": 7},
    "pixels": {**XL, **SMALL, "in_channels": 1, "out_channels": 1, "patch_size": 4, "num_embeds_ada_norm": 10},
    "other numbers": {"num_embeds_ada_norm": 2, "norm_eps": 1e-3, "dropout": 0.1, **SMALL, "num_layers": 1},
}


def theirs_of(record: dict[str, Any], *, shared: bool) -> Any:
    """Their net of a config, every parameter random; shared: one embedding for all blocks, as in published weights."""
    torch.manual_seed(0)
    own = {k: v for k, v in record.items() if not k.startswith("_") and k not in LEGACY}
    net = perturbed(DiTTransformer2DModel(**own))
    if shared:
        first = net.transformer_blocks[0].norm1.emb.state_dict()
        for block in net.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return net


LEGACY = ("cross_attention_dim", "num_vector_embeds", "only_cross_attention", "use_linear_projection")


def perturbed(net: Any, seed: int = 1) -> Any:
    """The net with noise on every parameter, in evaluation mode."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))
    return net.eval()


def asked(net: DiT, theirs: Any, size: int) -> tuple[Tensor, Tensor]:
    """(ours, theirs): both nets' answers to the same; the first row is null, which is theirs' class after the last."""
    x = torch.randn(3, net.shape[0], size, size, generator=torch.Generator().manual_seed(3))
    clock, label = torch.tensor([3.0, 401.5, 999.0]), torch.tensor([0, 1, net.classes - 1])
    null = torch.tensor([True, False, False])
    last = theirs.config.num_embeds_ada_norm
    with torch.no_grad():
        mine = net(x, clock, Cond(label=label).null(null))
        other = theirs(x, timestep=clock, class_labels=torch.where(null, last, label)).sample
    return mine, other


def same(net: DiT, theirs: Any) -> None:
    """Equal to 1e-5 at the size of both and, where theirs runs at another, there; answers are of order 1."""
    for size in (8, 16):
        mine, other = asked(net, theirs, size)
        assert float(other.std()) > 0.2
        assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_theirs_saved_and_read_here_says_the_same(name: str, shared: bool, tmp_path: Path) -> None:
    theirs = theirs_of(NETS[name], shared=shared)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    net = read_dit(*read_component(tmp_path))
    one = shared or len(net.blocks) == 1
    assert len(net.contexts) == (0 if one else len(net.blocks) - 1)
    assert net.classes == NETS[name]["num_embeds_ada_norm"]
    same(net, theirs)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_ours_written_and_loaded_there_says_the_same(name: str, shared: bool, tmp_path: Path) -> None:
    part, shape = part_of(NETS[name], theirs_of(NETS[name], shared=True).state_dict())
    torch.manual_seed(4)
    net = perturbed(build("nets", replace(part, knobs={**part.knobs, "shared": shared}), shape))
    write_component(tmp_path / "transformer", *write_dit(net))
    theirs, said = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    same(net, theirs.eval())
    again = read_dit(*read_component(tmp_path / "transformer")).state_dict()
    assert again.keys() == net.state_dict().keys()
    for key, value in again.items():
        assert torch.equal(value, net.state_dict()[key]), key


def test_the_published_config_has_a_place_for_every_key() -> None:
    """DiT-XL/2 on the meta device: names and shapes alone."""
    with torch.device("meta"):
        theirs = DiTTransformer2DModel(**{k: v for k, v in XL.items() if not k.startswith("_") and k not in LEGACY})
    net = read_dit(XL, theirs.state_dict())
    copies = 27 * sum(p.numel() for p in theirs.transformer_blocks[0].norm1.emb.parameters())
    count = sum(p.numel() for p in net.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) - copies
    assert (net.shape, net.classes, net.learned_variance) == ((4, 32, 32), 1000, True)


@pytest.mark.parametrize("name", ["dit-xl", "pixels"])
def test_ten_ddim_steps_are_the_same(name: str) -> None:
    """Their scheduler and net, guided as DiTPipeline does it, from the same noise as ours, to 1e-4."""
    theirs = theirs_of(NETS[name], shared=True)
    net = read_dit(NETS[name], theirs.state_dict())
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    reading = read_scheduler(json.loads(scheduler.to_json_string()))
    made = Denoiser(net, schedule_of(reading.noising.schedule), build("targets", reading.noising.target, None))
    start: list[Tensor] = []
    label = torch.tensor([0, 4])
    mine = sample(
        made,
        2,
        cond=Cond(label=label),
        shape=net.shape,
        plan=reading.plan,
        steps=10,
        guidance=1.5,
        seed=5,
        see=lambda ask, belief: start.append(ask.x) if not start else None,
    )
    scheduler.set_timesteps(10)
    x = start[0]
    null = torch.full((2,), net.classes)
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond, uncond = theirs(
                torch.cat([x, x]), timestep=t.expand(4), class_labels=torch.cat([label, null])
            ).sample.chunk(2)
            told, untold = (y[:, : x.shape[1]] for y in (cond, uncond))
            x = scheduler.step(untold + 1.5 * (told - untold), t, x, use_clipped_model_output=True).prev_sample
    assert float(x.std()) > 0.2
    assert_close(mine, x, rtol=0, atol=1e-4)


def test_a_net_of_few_classes_is_guided_by_their_pipeline(tmp_path: Path) -> None:
    """DiTPipeline asks class 1000 for the null, whatever the net has: the table is filled up with it."""
    torch.manual_seed(0)
    net = perturbed(dit((4, 8, 8), classes=3, width=24, depth=2, heads=3))
    config, tensors = write_dit(net, classes=1000)
    write_component(tmp_path / "transformer", config, tensors)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4).eval()
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = DiTPipeline(theirs, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    out = pipe([2, 0], num_inference_steps=3, generator=torch.manual_seed(7), output_type="pt").images
    x = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(7))
    cond, label = Cond(label=torch.tensor([2, 0])), None
    for t in scheduler.timesteps:
        clock = t.float().expand(2)
        with torch.no_grad():
            told, untold = net(x, clock, cond), net(x, clock, label)
        x = scheduler.step(untold + 4.0 * (told - untold), t, x).prev_sample
    with torch.no_grad():
        want = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert_close(out, want, rtol=0, atol=1e-4)
    back = read_dit(config, tensors)
    assert back.classes == 3
    for key, value in net.state_dict().items():
        assert torch.equal(value, back.state_dict()[key]), key


def test_a_net_without_classes_is_there_and_back_the_same(tmp_path: Path) -> None:
    net = perturbed(dit((1, 8, 8), width=24, depth=2, heads=3, patch=4))
    write_component(tmp_path / "transformer", *write_dit(net, classes=2))
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    x, clock = torch.randn(3, 1, 8, 8), torch.tensor([3.0, 401.5, 999.0])
    with torch.no_grad():
        assert_close(net(x, clock), theirs(x, timestep=clock, class_labels=torch.arange(3)).sample, rtol=0, atol=1e-5)
    back = read_dit(*read_component(tmp_path / "transformer"))
    assert back.classes == 0
    assert torch.equal(back(x, clock), net(x, clock))
    config, tensors = write_dit(net)
    null = torch.randn(24)  # a table of nothing but a null that is not zero: it is told in every row
    for name in tensors:
        if "class_embedder" in name:
            tensors[name] = null[None]
    with torch.no_grad():
        net.context.linear2.bias += null
    assert_close(read_dit(config, tensors)(x, clock), net(x, clock), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_an_embedding_of_augmentation_is_left_out_as_it_is_told_nothing_there(shared: bool) -> None:
    """Told nothing, ours does what theirs does; of each block's embedding where they are not shared."""
    net = perturbed(dit((1, 8, 8), classes=2, width=24, depth=2, heads=3, patch=4, augmentation=3, shared=shared))
    config, tensors = write_dit(net)
    theirs = DiTTransformer2DModel.from_config({k: v for k, v in config.items() if not k.startswith("_")}).eval()
    theirs.load_state_dict(tensors)
    mine, other = asked(net, theirs, 8)
    assert_close(mine, other, rtol=0, atol=1e-5)
    x, clock = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        assert (net(x, clock, Cond(augmentation=torch.ones(2, 3))) - net(x, clock)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single', need 'ada_norm_zero'"),
        ({"activation_fn": "gelu"}, "activation_fn"),
        ({"attention_bias": False}, "attention_bias"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine"),
        ({"out_channels": 3}, "out_channels is 3, need 4, or 8 with learned variance"),
        ({"patch_size": 3}, "sample_size is 8, need a multiple of the patch_size, 3"),
        ({"attention_head_dim": 7}, "attention_head_dim is 7"),
        ({"num_embeds_ada_norm": 9}, "a class table has 8 rows, need 10"),
        ({"num_layers": 4}, "transformer_blocks.3.norm1.emb.timestep_embedder.linear_1.weight is missing"),
        ({"num_layers": 2}, "transformer_blocks.2"),
        ({"cross_attention_dim": 8}, "cross_attention_dim = 8 is not known here"),
    ],
)
def test_configs_that_are_not_understood_are_refused(change: dict[str, Any], said: str) -> None:
    tensors = theirs_of(NETS["dit-xl"], shared=True).state_dict()
    with pytest.raises(BadCheckpoint, match=said) as caught:
        read_dit({**NETS["dit-xl"], **change}, tensors)
    assert "\n" not in str(caught.value)


def test_a_key_too_many_or_too_few_is_refused() -> None:
    tensors = theirs_of(NETS["dit-xl"], shared=True).state_dict()
    with pytest.raises(BadCheckpoint, match="extra left over"):
        read_dit(NETS["dit-xl"], {**tensors, "extra": torch.zeros(1)})
    for name in tensors:
        with pytest.raises(BadCheckpoint, match=name):
            read_dit(NETS["dit-xl"], {k: v for k, v in tensors.items() if k != name})


@pytest.mark.parametrize(
    ("shape", "knobs", "said"),
    [
        ((1, 8, 8), {"vocabulary": 3, "length": 2}, "the net has text"),
        ((1, 8, 8), {"image": 1}, "the net has an image condition"),
        ((1, 8, 8), {"attributes": 1}, "the net has attributes"),
        ((1, 8, 8), {"coordinates": 2}, "the net has coordinates"),
        ((1, 8, 8), {"embedding": "fourier"}, "the net has Fourier waves"),
        ((1, 8, 8), {"mlp_ratio": 2.0}, "the net has a perceptron of 48 numbers, need .* of 96"),
        ((1, 8, 4), {}, "the net has images of 8×4"),
    ],
)
def test_a_net_that_has_no_place_there_is_not_written(shape: Any, knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(BadArgument, match=said):
        write_dit(dit(shape, width=24, depth=1, heads=3, **knobs))
    with pytest.raises(BadArgument, match="got classes=2, need at least the net's 3"):
        write_dit(dit((1, 8, 8), classes=3, width=24, depth=1, heads=3), classes=2)
