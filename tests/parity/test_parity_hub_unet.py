"""Parity of hub/unet with diffusers 0.42.1: their U-Nets saved and read here, ours written and loaded there.

Every parameter is perturbed first, for a layer that starts at zero would make anything equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from inkdrop.core.cond import Cond
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadCheckpoint
from inkdrop.find import Part, build
from inkdrop.generate import sample
from inkdrop.hub.folder import read_component, write_component
from inkdrop.hub.plan import read_scheduler
from inkdrop.hub.schedule import schedule_of
from inkdrop.hub.unet import part_of, read_unet
from inkdrop.hub.unet_config import write_unet
from inkdrop.nets.unet import UNet, unet

pytestmark = pytest.mark.long  # left out of the fast tier

# ---- the published configs -----------------------------------------------------------------------------------

CIFAR10 = {  # google/ddpm-cifar10-32
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
STABLE = {  # Stable Diffusion 1.5
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
STABLE_2 = {  # Stable Diffusion 2.1
    **STABLE,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
CAT = {  # google/ddpm-cat-256 and its kin
    **CIFAR10,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "sample_size": 256,
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}

# ---- the same, scaled down -----------------------------------------------------------------------------------

SMALL = {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "sample_size": 16}
TEXT = {"block_out_channels": [16, 32, 64, 64], "norm_num_groups": 8, "sample_size": 16, "cross_attention_dim": 12}
ADM = {
    "_class_name": "UNet2DModel",
    "attention_head_dim": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "downsample_type": "resnet",
    "norm_num_groups": 8,
    "num_class_embeds": 5,
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 16,
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "upsample_type": "resnet",
}
NETS: dict[str, dict[str, Any]] = {
    "ddpm-cifar10": {**CIFAR10, **SMALL},
    "ddpm-cat": {**CAT, "block_out_channels": [8, 8, 16, 16, 32, 32], "norm_num_groups": 4, "sample_size": 32},
    "its defaults": {**SMALL, "_class_name": "UNet2DModel", "layers_per_block": 1},
    "no attention in the middle": {**CIFAR10, **SMALL, "add_attention": False, "dropout": 0.1},
    "adm": ADM,
    "adm with a norm in the middle": {**ADM, "attn_norm_num_groups": 4, "layers_per_block": 1},
    "adm that attends at full size": {
        **ADM,
        "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
    },
    "super-resolution": {**CIFAR10, **SMALL, "in_channels": 6},
    "stable diffusion 1.5": {**STABLE, **TEXT, "attention_head_dim": 4},
    "stable diffusion 2.1": {**STABLE_2, **TEXT, "attention_head_dim": [2, 4, 8, 8]},
    "inpainting": {**STABLE, **TEXT, "attention_head_dim": 4, "in_channels": 9, "layers_per_block": 1},
    "upscaler": {
        **STABLE_2,
        **TEXT,
        "attention_head_dim": 4,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
        "in_channels": 7,
        "num_class_embeds": 9,
        "only_cross_attention": [True, True, True, False],
        "transformer_layers_per_block": [1, 1, 2, 1],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    },
}


@cache
def theirs_of(name: str) -> Any:
    """Their net of a config, with every parameter random."""
    record = NETS[name]
    kind = UNet2DModel if record["_class_name"] == "UNet2DModel" else UNet2DConditionModel
    torch.manual_seed(0)
    return perturbed(kind.from_config({k: v for k, v in record.items() if not k.startswith("_")}))


def perturbed(net: Any) -> Any:
    """The net with noise on every parameter and buffer that is learned, in evaluation mode."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))
    return net.eval()


def told_of(net: UNet, rows: int, *, text: int = 7) -> tuple[Cond | None, dict[str, Tensor], Tensor | None]:
    """(ours, theirs, the image that theirs is given beside x): a condition of every kind that the net takes."""
    source = torch.Generator().manual_seed(2)
    fields: dict[str, Any] = {}
    more: dict[str, Tensor] = {}
    if net.classes:
        fields["label"] = more["class_labels"] = torch.arange(rows) % net.classes
    if net.text is not None:
        words = torch.randn(rows, text, net.text.features, generator=source)
        fields["text"] = more["encoder_hidden_states"] = words
    image = None
    if net.image is not None:
        image = fields["image"] = torch.randn(rows, len(net.image.null), *net.shape[1:], generator=source)
    return (Cond(**fields) if fields else None), more, image


def asked(net: UNet, theirs: Any, size: tuple[int, int], rows: int = 2) -> tuple[Tensor, Tensor]:
    """(ours, theirs): both nets' answers to the same, at timesteps of which one is no whole number of theirs."""
    x = torch.randn(rows, net.shape[0], *size, generator=torch.Generator().manual_seed(3))
    clock = torch.tensor([3.0, 712.0])
    cond, more, image = told_of(net, rows)
    if image is not None and cond is not None:
        image = nn.functional.interpolate(image, size=size)
        cond = replace(cond, image=image)
    with torch.no_grad():
        mine = net(x, clock, cond)
        other = theirs(x if image is None else torch.cat([x, image], dim=1), clock, **more).sample
    return mine, other


@pytest.mark.parametrize("name", NETS)
def test_theirs_saved_and_read_here_says_the_same(name: str, tmp_path: Path) -> None:
    """Through their save_pretrained and a folder; to 1e-5, of answers of order 1. Written again, it is the same."""
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    net = read_unet(*read_component(tmp_path))
    mine, other = asked(net, theirs, net.shape[1:])
    assert float(other.std()) > 0.2
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    written_reads_back(net, NETS[name])


@pytest.mark.parametrize("name", NETS)
def test_ours_written_and_loaded_there_says_the_same(name: str, tmp_path: Path) -> None:
    """A net of ours with the knobs of theirs, its own weights, and no null that they have no place for."""
    part, shape = part_of(NETS[name])
    torch.manual_seed(4)
    net = perturbed(build("nets", part, shape))
    with torch.no_grad():
        for key, value in net.state_dict().items():
            value.mul_(0 if key.endswith(".null") else 1)
    write_component(tmp_path / "unet", *write_unet(net))
    kind = UNet2DModel if NETS[name]["_class_name"] == "UNet2DModel" else UNet2DConditionModel
    theirs, said = kind.from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    mine, other = asked(net, theirs.eval(), net.shape[1:])
    assert float(other.std()) > 0.2
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def written_reads_back(net: UNet, record: dict[str, Any]) -> None:
    """Knob for knob and number for number."""
    part, shape = part_of(record)
    config, tensors = write_unet(net)
    again = part_of(config)
    assert (again[0].name, again[1]) == (part.name, shape)
    assert spread(again[0]) == spread(part)
    other = read_unet(config, tensors).state_dict()
    assert net.state_dict().keys() == other.keys()
    for key, value in net.state_dict().items():
        assert torch.equal(value, other[key]), key


def spread(part: Part) -> dict[str, Any]:
    """The knobs, with one number a level where one for all may be written."""
    levels = len(part.knobs["multipliers"])
    given = {knob: value for knob, value in part.knobs.items() if knob in ("depth", "heads")}
    return part.knobs | {knob: value * levels if len(value) == 1 else value for knob, value in given.items()}


@pytest.mark.parametrize("name", ["ddpm-cifar10", "adm", "stable diffusion 1.5"])
def test_ten_ddim_steps_are_the_same(name: str) -> None:
    """Their scheduler and net from the same noise as ours, to 1e-4."""
    theirs = theirs_of(name)
    net = read_unet(NETS[name], theirs.state_dict())
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    reading = read_scheduler(json.loads(scheduler.to_json_string()))
    made = Denoiser(net, schedule_of(reading.noising.schedule), build("targets", reading.noising.target, None))
    cond, more, _ = told_of(net, 2)
    mine = sample(made, 2, cond=cond, shape=net.shape, plan=replace(reading.plan, steps=10), seed=5)
    x = started(made, net.shape)
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            said = theirs(x, t, **more).sample[:, : x.shape[1]]
            x = scheduler.step(said, t, x, use_clipped_model_output=True).prev_sample
    assert float(x.std()) > 0.1
    torch.testing.assert_close(mine, x, rtol=0, atol=1e-4)


def started(made: Denoiser, shape: tuple[int, ...], rows: int = 2, seed: int = 5) -> Tensor:
    """The noise that `sample` starts from."""
    from inkdrop.core.noise import Keyed

    return made.schedule.start(Keyed(seed, range(rows)).start((rows, *shape)))


# ---- sizes ---------------------------------------------------------------------------------------------------


def test_odd_sizes_are_those_of_unet_2d_condition_model() -> None:
    """Which goes to the size of the skip that it meets, as ours does."""
    theirs = theirs_of("stable diffusion 1.5")
    net = read_unet(NETS["stable diffusion 1.5"], theirs.state_dict())
    torch.testing.assert_close(*asked(net, theirs, (11, 13)), rtol=0, atol=1e-5)


def test_a_side_that_unet_2d_model_cannot_halve_is_padded() -> None:
    """14 is halved to 7, and no further: theirs fails, ours is written with sides of 16, and agrees there."""
    theirs = theirs_of("ddpm-cifar10")
    net = read_unet({**NETS["ddpm-cifar10"], "sample_size": 14}, theirs.state_dict())
    assert net.shape == (3, 14, 14)
    assert net(torch.randn(1, 3, 14, 14), torch.zeros(1)).shape == (1, 3, 14, 14)
    with pytest.raises(RuntimeError):
        theirs(torch.randn(1, 3, 14, 14), torch.zeros(1))
    assert write_unet(net)[0]["sample_size"] == 16
    torch.testing.assert_close(*asked(net, theirs, (16, 16)), rtol=0, atol=1e-5)


# ---- the full nets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("record", "count"), [(CIFAR10, 35_746_307), (CAT, 113_673_219), (STABLE, 859_520_964)])
def test_published_configs_use_every_key_and_leave_none_over(record: dict[str, Any], count: int) -> None:
    """On the meta device: names and shapes. Their keys are those of the class itself."""
    with torch.device("meta"):
        theirs = (UNet2DModel if record["_class_name"] == "UNet2DModel" else UNet2DConditionModel).from_config(
            {k: v for k, v in record.items() if not k.startswith("_")}
        )
    tensors = theirs.state_dict()
    assert sum(value.numel() for value in tensors.values()) == count
    net = read_unet(record, tensors)
    own = sum(value.numel() for key, value in net.state_dict().items() if not key.endswith(".null"))
    assert own == count
    config, back = write_unet(net, forget=("text.null",))
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in tensors.items()}
    assert part_of(config)[0].knobs.keys() == part_of(record)[0].knobs.keys()
    for key in tensors:
        with pytest.raises(BadCheckpoint, match=f"weights: {key} is missing"):
            read_unet(record, {name: value for name, value in tensors.items() if name != key})
        break
    with pytest.raises(BadCheckpoint, match=r"one\.more left over"):
        read_unet(record, {**tensors, "one.more": torch.empty(1, device="meta")})


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel"])
def test_a_key_that_is_absent_has_the_default_of_their_class(name: str) -> None:
    """Old configs say little; the class fills in the rest."""
    least: dict[str, Any] = {"sample_size": 32}
    with torch.device("meta"):
        theirs = (UNet2DModel if name == "UNet2DModel" else UNet2DConditionModel)(**least)
    whole = json.loads(theirs.to_json_string())
    assert len(whole) > 20
    assert part_of({"_class_name": name, **least}) == part_of(whole)


@pytest.mark.slow
def test_the_full_cifar10_net_says_the_same() -> None:
    """In memory: 35.7 M parameters, the same answers at 32×32."""
    torch.manual_seed(0)
    theirs = perturbed(UNet2DModel.from_config({k: v for k, v in CIFAR10.items() if not k.startswith("_")}))
    net = read_unet(CIFAR10, theirs.state_dict())
    mine, other = asked(net, theirs, (32, 32))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_the_old_names_of_attention_are_known() -> None:
    """The files of google/ddpm-cifar10-32 are older than to_q, to_k, to_v and to_out."""
    theirs = theirs_of("ddpm-cifar10")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, value in theirs.state_dict().items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.") if ".attentions." in key else key
        tensors[key] = value
    assert tensors.keys() != theirs.state_dict().keys()
    torch.testing.assert_close(*asked(read_unet(NETS["ddpm-cifar10"], tensors), theirs, (16, 16)), rtol=0, atol=1e-5)


# ---- what is refused -----------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("ddpm-cifar10", {"center_input_sample": True}, "center_input_sample is True, need False"),
    ("ddpm-cifar10", {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
    ("ddpm-cifar10", {"time_embedding_dim": 32}, "time_embedding_dim is 32, need null or 64"),
    ("ddpm-cifar10", {"mid_block_scale_factor": 1.41}, "mid_block_scale_factor is 1.41, need 1"),
    ("ddpm-cifar10", {"act_fn": "gelu"}, "act_fn is 'gelu', need 'silu' or 'swish'"),
    ("ddpm-cifar10", {"block_out_channels": [16, 24, 32, 32]}, "need multiples of the first, 16"),
    ("ddpm-cifar10", {"block_out_channels": [16, 32, 10**9, 32]}, "need whole numbers in [4, 65536]"),
    ("ddpm-cifar10", {"block_out_channels": "many"}, "need a list of 1 to 16 whole numbers"),
    ("ddpm-cifar10", {"layers_per_block": 10**6}, "layers_per_block is 1000000"),
    ("ddpm-cifar10", {"mid_block_type": None}, "mid_block_type is null, need 'UNetMidBlock2D'"),
    ("ddpm-cifar10", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep', need null"),
    ("ddpm-cifar10", {"down_block_types": ["SkipDownBlock2D"] * 4}, "down_block_types is 'SkipDownBlock2D'"),
    ("ddpm-cifar10", {"up_block_types": ["UpBlock2D"] * 4}, "need attention at the levels where it is on the way down"),
    (
        "ddpm-cifar10",
        {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]},
        "need sizes that change in one way",
    ),
    ("ddpm-cifar10", {"out_channels": 5}, "out_channels is 5, need 3 or 6"),
    ("ddpm-cifar10", {"sample_size": None}, "sample_size is null, need one or two whole numbers"),
    ("ddpm-cifar10", {"norm_num_groups": None}, "norm_num_groups is null"),
    ("ddpm-cifar10", {"a_new_way": 2}, "a_new_way = 2 is not known here"),
    ("stable diffusion 1.5", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time', need null"),
    ("stable diffusion 1.5", {"encoder_hid_dim": 8}, "encoder_hid_dim is 8, need null"),
    ("stable diffusion 1.5", {"conv_in_kernel": 1}, "conv_in_kernel is 1, need 3"),
    ("stable diffusion 1.5", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
    ("stable diffusion 1.5", {"layers_per_block": [1, 2, 2, 2]}, "need one number, the same at every level"),
    ("stable diffusion 1.5", {"attention_head_dim": [4, 4]}, "need one number, or 4 of them"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=str)
def test_a_config_that_we_cannot_be_is_refused_by_its_key(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadCheckpoint) as caught:
        part_of({**NETS[name], **change})
    assert message in str(caught.value)
    assert str(caught.value).startswith("UNet2D")
    assert "\n" not in str(caught.value)


def test_weights_of_another_config_are_refused_by_their_key() -> None:
    tensors = theirs_of("ddpm-cifar10").state_dict()
    wide = {**NETS["ddpm-cifar10"], "block_out_channels": [32, 64, 64, 64]}
    with pytest.raises(BadCheckpoint, match=r"weights: time_embedding\.\S+ has shape \(64, 16\), its config needs"):
        read_unet(wide, tensors)


@contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises(BadCheckpoint) as caught:
        yield
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


WIDE: dict[str, Any] = {"width": 16, "multipliers": (1, 2), "norm_groups": 4}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"patch": 2}, "net.patch has no counterpart"),
        ({"attributes": 3}, "net.attributes has no counterpart"),
        ({"image": 1, "augment": True}, "net.augment has no counterpart"),
        ({"vocabulary": 20, "length": 5, "cross": (1,), "pooled": False}, "net.vocabulary has no counterpart"),
        ({"features": 8, "length": 5, "cross": (1,)}, "net.pooled has no counterpart"),
        ({"embedding": "fourier"}, "net.embedding and net.shift must be"),
        ({"norm_groups": None}, "net.norm_groups is 4, 8, 16, 12 in different layers"),
        ({"cross": (1,), "attention": (0,), "features": 8, "length": 5, "pooled": False}, "which are two classes"),
        ({"cross": (1,), "features": 8, "length": 5, "pooled": False, "middle_attention": False}, "middle_attention"),
        ({"cross": (1,), "features": 8, "length": 5, "pooled": False, "resample": "residual"}, "net.resample"),
        ({"middle_groups": 0, "scale_shift": False}, "net.middle_groups is 0"),
    ],
    ids=str,
)
def test_a_net_that_they_cannot_be_is_refused_by_its_knob(knobs: dict[str, Any], message: str) -> None:
    net = unet((1, 8, 8), **{**WIDE, **knobs})
    with refused(message):
        write_unet(net)


def test_a_learned_null_class_is_one_more_class_there_and_other_nulls_are_not_dropped_unsaid() -> None:
    net = perturbed(unet((1, 8, 8), classes=3, **WIDE))
    config, tensors = write_unet(net)
    assert config["num_class_embeds"] == 4
    theirs = UNet2DModel.from_config({k: v for k, v in config.items() if not k.startswith("_")}).eval()
    theirs.load_state_dict(tensors)
    x, clock = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, 900.0])
    cond = Cond(label=torch.tensor([1, 2])).null(torch.tensor([False, True]))
    with torch.no_grad():
        mine, other = net(x, clock, cond), theirs(x, clock, class_labels=torch.tensor([1, 3])).sample
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    with_image = perturbed(unet((1, 8, 8), image=1, **WIDE))
    with refused("our image.null has no counterpart there, and is not zero"):
        write_unet(with_image)
    assert "image.null" not in write_unet(with_image, forget=("image.null",))[1]


def test_an_embedding_of_augmentation_is_left_out_as_it_is_told_nothing_there() -> None:
    """Told zeros, or nothing, ours does what theirs does."""
    net = perturbed(unet((1, 8, 8), augmentation=3, **WIDE))
    config, tensors = write_unet(net)
    theirs = UNet2DModel.from_config({k: v for k, v in config.items() if not k.startswith("_")}).eval()
    theirs.load_state_dict(tensors)
    x, clock = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, 900.0])
    with torch.no_grad():
        plain, other = net(x, clock), theirs(x, clock).sample
        told = net(x, clock, Cond(augmentation=torch.ones(2, 3)))
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-5)
    assert (told - plain).abs().max() > 1e-3
    with refused("net.coordinates"):
        write_unet(unet((1, 8, 8), coordinates=2, **WIDE))
