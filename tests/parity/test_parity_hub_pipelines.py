"""Parity of hub/read and hub/write with the pipelines of diffusers 0.42.1, which are run: images of one noise."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import pipelines
from check_hub import their_images
from inkdrop.bundle import Bundle, load, save, terms_of
from inkdrop.codec import Codec
from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.find import Part
from inkdrop.generate import sample
from inkdrop.hub.read import read, read_codec
from inkdrop.hub.write import write
from inkdrop.plan import Plan
from inkdrop.recipe import Recipe, denoiser_of
from inkdrop.settings import Train
from pipelines import perturbed, quietly, silent

pytestmark = pytest.mark.long  # left out of the fast tier

SEED, STEPS, ROWS = 3, 10, 2  # 10 divides every T here: else their DDIM steps by T//n


def images_of(pipeline: Any, shape: tuple[int, ...], **how: Any) -> Tensor:
    """What a pipeline draws from our noise, in [-1, 1]."""
    with quietly():
        return their_images(pipeline, (ROWS, *shape), seed=SEED, steps=STEPS, **how)


def ours(bundle: Bundle, **how: Any) -> Tensor:
    return sample(bundle, ROWS, seed=SEED, steps=STEPS, **how).clamp(-1, 1)


def close(mine: Tensor, theirs: Tensor) -> None:
    """To 1e-4, of pictures a tenth of which, at least, is not clipped."""
    inside = theirs[theirs.abs() < 0.999]
    assert len(inside) > 0.1 * theirs.numel()
    assert float(inside.std()) > 0.05
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments of their call, and of ours
    "ddpm": ({}, {}),
    "ddpm, trailing, another variance": ({}, {}),
    "ddim": ({}, {}),
    "ddim that clips": ({"use_clipped_model_output": True}, {}),
    "ddim of v at zero terminal snr": ({}, {}),
    "latent": ({}, {}),
    "dit": ({"class_labels": [4, 999]}, {"label": [4, 999]}),
    "dit, guided otherwise": ({"class_labels": [4, 999], "guidance_scale": 1.5}, {"label": [4, 999], "guidance": 1.5}),
    "stable": ({"prompt": ["red cat", "blue"]}, {"text": ["red cat", "blue"]}),
}


def pipeline_of(kind: str, tmp: Path) -> Any:
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    with quietly():
        made = {
            "ddpm": pipelines.ddpm,
            "ddpm, trailing, another variance": lambda: pipelines.ddpm(
                timestep_spacing="trailing", variance_type="fixed_small", clip_sample_range=0.5
            ),
            "ddim": lambda: pipelines.ddim(clip_sample=False, timestep_spacing="trailing", prediction_type="sample"),
            "ddim that clips": lambda: pipelines.ddim(beta_schedule="squaredcos_cap_v2"),
            "ddim of v at zero terminal snr": lambda: pipelines.ddim(clip_sample=False, **zero),
            "latent": pipelines.latent,
            "dit": pipelines.dit,
            "dit, guided otherwise": pipelines.dit,
            "stable": lambda: pipelines.stable(tmp),
        }
        return made[kind]()


def state_of(bundle: Bundle) -> tuple[int, ...]:
    return bundle.shape if bundle.codec is None else bundle.codec.latent_shape


SLOW = ("ddpm, trailing, another variance", "ddim", "ddim of v at zero terminal snr", "dit, guided otherwise")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]
)
def test_their_pipeline_is_read_samples_the_same_and_is_written_again(kind: str, tmp_path: Path) -> None:
    """Their images, ours of what was read, ours of the checkpoint that it became, theirs of what it was written as."""
    theirs, how, own = pipeline_of(kind, tmp_path), *KINDS[kind]
    with quietly():
        theirs.save_pretrained(tmp_path / "theirs")
    bundle = read(tmp_path / "theirs")
    assert bundle.card["hub"]["pipeline"] == type(theirs).__name__
    wanted = images_of(theirs, state_of(bundle), **how)
    mine = ours(bundle, **own)
    close(mine, wanted)
    save(bundle, tmp_path / "checkpoint")
    again = load(tmp_path / "checkpoint")
    assert torch.equal(ours(again, **own), mine)
    assert write(again, tmp_path / "ours") == type(theirs).__name__
    with quietly():
        back = silent(type(theirs).from_pretrained(tmp_path / "ours"))
    torch.testing.assert_close(images_of(back, state_of(bundle), **how), wanted, rtol=0, atol=1e-5)


# ---- other layouts of a folder -------------------------------------------------------------------------------


def test_folders_with_everything_at_the_top_are_read(tmp_path: Path) -> None:
    """As google/ddpm-cifar10-32 is: diffusers of before 0.3."""
    theirs = pipelines.ddpm()
    with quietly():
        theirs.save_pretrained(tmp_path)
    for name in ("unet", "scheduler"):
        for file in (tmp_path / name).iterdir():
            file.rename(tmp_path / file.name)
        (tmp_path / name).rmdir()
    bundle = read(tmp_path)
    close(ours(bundle), images_of(theirs, bundle.shape))


def test_a_bare_unet_is_read_with_the_scheduler_beside_it(tmp_path: Path) -> None:
    theirs = pipelines.ddim(clip_sample=False, prediction_type="sample")
    with quietly():
        theirs.unet.save_pretrained(tmp_path)
        theirs.scheduler.save_pretrained(tmp_path)
    bundle = read(tmp_path)
    close(ours(bundle), images_of(theirs, bundle.shape))
    (tmp_path / "scheduler_config.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"has neither model_index\.json nor scheduler_config\.json"):
        read(tmp_path)


def test_a_variant_and_shards_are_read_as_float32(tmp_path: Path) -> None:
    """Half-precision weights are the rounded ones, in float32; in shards they are all there."""
    theirs = pipelines.ddpm()
    with quietly():
        theirs.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
        theirs.unet.float().save_pretrained(tmp_path / "sharded" / "unet", max_shard_size="50KB")
        theirs.scheduler.save_pretrained(tmp_path / "sharded" / "scheduler")
        shutil.copy(tmp_path / "half" / "model_index.json", tmp_path / "sharded")
    assert len(list((tmp_path / "sharded" / "unet").glob("*-of-*.safetensors"))) > 1
    half, sharded = read(tmp_path / "half", variant="fp16"), read(tmp_path / "sharded")
    assert pipelines.same_weights(half.denoiser.net, sharded.denoiser.net)
    assert {p.dtype for p in half.denoiser.net.parameters()} == {torch.float32}
    with pytest.raises(BadCheckpoint, match=r"has no diffusion_pytorch_model.safetensors, but the variant fp16"):
        read(tmp_path / "half")


def test_class_names_are_read_and_a_name_of_two_classes_stands_for_neither(tmp_path: Path) -> None:
    with quietly():
        pipelines.dit(classes=5).save_pretrained(tmp_path / "theirs")
    index = tmp_path / "theirs" / "model_index.json"
    named = {str(i): "crane" if i in (2, 3) else f"thing {i}, it" for i in range(5)}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": named}))
    bundle = read(tmp_path / "theirs")
    assert bundle.classes == ("thing 0, it", "thing 1, it", "crane (2)", "crane (3)", "thing 4, it")
    assert bundle.guidable
    assert bundle.plan.guide == (Part("cfg", {"scale": 4.0}),)


def test_the_null_of_a_model_that_reads_is_the_empty_text(tmp_path: Path) -> None:
    """So that unconditional is theirs: scale 0 is the pipeline's answer to ""."""
    theirs = pipeline_of("stable", tmp_path)
    with quietly():
        theirs.save_pretrained(tmp_path / "theirs")
    bundle = read(tmp_path / "theirs")
    wanted = images_of(theirs, state_of(bundle), prompt=["", ""], guidance_scale=1.0)
    close(ours(bundle, text="red cat", guidance=0.0), wanted)
    assert bundle.recipe.text == Part("pretrained", {"model": str(tmp_path / "theirs"), "length": 16})


def test_a_plan_of_ones_own_replaces_their_scheduler(tmp_path: Path) -> None:
    with quietly():
        pipelines.ddim(timestep_spacing="linspace").save_pretrained(tmp_path)
    with pytest.raises(BadCheckpoint, match="timestep_spacing is 'linspace'"):
        read(tmp_path)
    plan = Plan(Part("dpmpp_2m"), steps=4)
    bundle = read(tmp_path, plan=plan)
    assert bundle.plan == plan
    assert bundle.recipe.target == Part("eps")


def test_an_autoencoder_alone_is_read_as_a_codec(tmp_path: Path) -> None:
    theirs = pipelines.vae()
    with quietly():
        theirs.save_pretrained(tmp_path)
    codec = read_codec(tmp_path)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs.decode(z / theirs.config.scaling_factor).sample
        torch.testing.assert_close(codec.decode(z), wanted, rtol=0, atol=1e-5)
    with pytest.raises(BadCheckpoint, match="is an AutoencoderKL alone"):
        read(tmp_path)


# ---- models of ours ------------------------------------------------------------------------------------------

UNET = {"width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "norm_groups": 8, "head_width": 8}
CODEC = {"latent": 4, "width": 8, "multipliers": (1, 2), "blocks": 1, "norm_groups": 4}


def model(
    net: Part,
    shape: tuple[int, ...],
    *,
    classes: tuple[str, ...] = (),
    codec: Codec | None = None,
    plan: Plan | None = None,
    **parts: Any,
) -> Bundle:
    """A model of ours with random weights, its nulls too."""
    recipe = Recipe(None, net, train=Train(null_rate=0.1), plan=plan or Plan(guide=()), **parts)
    torch.manual_seed(0)
    denoiser = denoiser_of(
        recipe, shape if codec is None else codec.latent_shape, terms_of(len(classes), 0, None, None)
    )
    perturbed(denoiser, 0.1)
    return Bundle(recipe, denoiser, shape, classes, 256, codec=codec)


def autoencoder() -> Codec:
    """A codec with a shift, and a scale that is another for each channel."""
    torch.manual_seed(0)
    made = Codec(Part("autoencoder", CODEC), (3, 16, 16), [0.3, -0.2, 0.1, 0.0], [0.5, 1.0, 2.0, 1.5])
    return perturbed(made, 0.02).requires_grad_(False)


def loaded(kind: str, path: Path) -> Any:
    with quietly():
        return silent(getattr(diffusers, kind).from_pretrained(path))


ODD = Part("linear", {"steps": 60, "rescale": True})  # has no name there


@pytest.mark.parametrize(
    ("label", "schedule"), [(None, Part("cosine")), ("cat", Part("cosine")), ("none", ODD), (None, ODD)], ids=str
)
def test_a_model_of_pixels_is_a_ddim_pipeline(label: str | None, schedule: Part, tmp_path: Path) -> None:
    """Of target v, with the cosine table, or one that has no name there. A class goes into the bias of the time."""
    classes = () if label is None else ("dog", "cat", "owl")
    bundle = model(Part("unet", UNET), (1, 8, 8), classes=classes, schedule=schedule, plan=Plan(guide=()))
    assert write(bundle, tmp_path / "out", label=label) == "DDIMPipeline"
    told: dict[str, Any] = {} if label is None else {"label": "cat", "guidance": 0.0 if label == "none" else 1.0}
    close(ours(bundle, **told), images_of(loaded("DDIMPipeline", tmp_path / "out"), (1, 8, 8)))


def test_a_model_of_learned_variance_is_a_ddpm_pipeline_and_a_ddim_pipeline_without_it(tmp_path: Path) -> None:
    """Their DDIM has no use for the second half of the channels, and would fail on it."""
    learned = Plan(Part("ddpm", {"variance": "learned"}), Part("leading"), guide=(Part("clip"),))
    net = Part("unet", {**UNET, "learned_variance": True})
    bundle = model(net, (3, 8, 8), plan=learned, schedule=Part("linear"))
    assert write(bundle, tmp_path / "ddpm") == "DDPMPipeline"
    close(ours(bundle), images_of(loaded("DDPMPipeline", tmp_path / "ddpm"), (3, 8, 8)))
    other = Plan(guide=())
    assert write(bundle, tmp_path / "ddim", plan=other) == "DDIMPipeline"
    close(ours(bundle, plan=other), images_of(loaded("DDIMPipeline", tmp_path / "ddim"), (3, 8, 8)))
    assert json.loads((tmp_path / "ddim" / "unet" / "config.json").read_text())["out_channels"] == 3


def test_a_model_of_latents_is_an_ldm_pipeline(tmp_path: Path) -> None:
    """Shift and scale of each channel go into the autoencoder's own convolutions."""
    bundle = model(Part("unet", UNET), (3, 16, 16), codec=autoencoder())
    assert write(bundle, tmp_path / "out") == "LDMPipeline"
    close(ours(bundle), images_of(loaded("LDMPipeline", tmp_path / "out"), (4, 8, 8)))


def test_a_dit_of_latents_is_a_dit_pipeline_guided_by_its_own_null(tmp_path: Path) -> None:
    """Which it asks for as class 1000, however few classes there are."""
    knobs = {"width": 16, "depth": 2, "heads": 2, "learned_variance": True}
    names = ("dog", "cat", "owl")
    bundle = model(Part("dit", knobs), (3, 16, 16), classes=names, codec=autoencoder())
    assert write(bundle, tmp_path / "out") == "DiTPipeline"
    pipeline = loaded("DiTPipeline", tmp_path / "out")
    assert pipeline.get_label_ids(["owl"]) == [2]
    wanted = images_of(pipeline, (4, 8, 8), class_labels=[2, 0], guidance_scale=2.5)
    close(ours(bundle, label=["owl", "dog"], guidance=2.5), wanted)


def test_sides_that_their_net_cannot_halve_are_padded(tmp_path: Path) -> None:
    """7 is not halved there: the folder is of 8×8, and agrees with ours at 8×8."""
    bundle = model(Part("unet", UNET), (1, 7, 7))
    write(bundle, tmp_path / "out")
    wanted = images_of(loaded("DDIMPipeline", tmp_path / "out"), (1, 8, 8))
    close(sample(bundle, ROWS, seed=SEED, steps=STEPS, shape=(1, 8, 8)).clamp(-1, 1), wanted)


def test_a_learned_null_text_is_not_dropped_unsaid(tmp_path: Path) -> None:
    theirs = pipeline_of("stable", tmp_path)
    with quietly():
        theirs.save_pretrained(tmp_path / "theirs")
    bundle = read(tmp_path / "theirs")
    with torch.no_grad():
        bundle.denoiser.net.text.null.add_(0.5)  # type: ignore[union-attr]
    with pytest.raises(BadCheckpoint, match="the model's null text was learned"):
        write(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert write(bundle, tmp_path / "out", forget_null=True) == "StableDiffusionPipeline"
    wanted = images_of(
        loaded("StableDiffusionPipeline", tmp_path / "out"), (4, 8, 8), prompt=["red", "cat"], guidance_scale=1.0
    )
    close(ours(bundle, text=["red", "cat"], guidance=1.0), wanted)


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": Part("heun")}, "hub write: heun is no sampler of theirs"),
        ({"sampler": Part("ddim", {"eta": 0.5})}, "ddim's eta is an argument of their pipeline"),
        ({"grid": Part("uniform")}, "grid uniform is not theirs"),
        ({"grid": Part("linspace")}, "grid linspace is not theirs"),
        ({"guide": (Part("clip", {"low": 0.0}),)}, "guide clip as it is set is not in DDIMScheduler"),
        ({"guide": (Part("interval"),)}, "guide interval as it is set"),
        ({"combine": Part("restart")}, "restart is no sampler of theirs"),
    ],
    ids=str,
)
def test_a_plan_that_they_do_not_have_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    bundle = model(Part("unet", UNET), (1, 8, 8))
    with pytest.raises(BadCheckpoint) as caught:
        write(bundle, tmp_path / "out", plan=replace(Plan(guide=()), **change))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"schedule": Part("flow"), "target": Part("flow")}, "target flow is none of theirs"),
        ({"schedule": Part("vp")}, "schedule vp is no table of betas"),
        ({"clock": Part("time")}, "clock time and scale unit are not theirs"),
    ],
    ids=str,
)
def test_levels_that_they_do_not_have_are_refused(parts: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=message):
        write(model(Part("unet", UNET), (1, 8, 8), **parts), tmp_path / "out")


def test_models_that_no_pipeline_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="a MLP has no counterpart"):
        write(model(Part("mlp"), (2,)), tmp_path / "out")
    with pytest.raises(BadCheckpoint, match="no pipeline for a dit of pixels"):
        write(model(Part("dit", {"width": 16, "depth": 1, "heads": 2}), (1, 8, 8)), tmp_path / "out")
    classed = model(Part("unet", UNET), (1, 8, 8), classes=("dog", "cat"))
    with pytest.raises(BadArgument, match="say for which one the net is written, as --class dog, or --class none"):
        write(classed, tmp_path / "out")
    with pytest.raises(BadArgument, match="the model has no classes"):
        write(model(Part("unet", UNET), (1, 8, 8)), tmp_path / "out", label="cat")
    with pytest.raises(BadCheckpoint, match="net.patch has no counterpart"):
        write(model(Part("unet_tiny"), (1, 8, 8)), tmp_path / "out")


def test_pipelines_that_are_not_read_are_refused_by_name(tmp_path: Path) -> None:
    with quietly():
        pipelines.ddpm().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())

    def refused(change: dict[str, Any], message: str) -> None:
        (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(BadCheckpoint) as caught:
            read(tmp_path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    refused({"_class_name": "StableCascadePipeline"}, "is a StableCascadePipeline, need one of DDIMPipeline")
    refused({"_class_name": None}, "is a None, need one of")
    refused({"unet": ["my_code", "Net"]}, "unet is ['my_code', 'Net'], need a class of diffusers or transformers")
    refused({"unet": None}, "unet is None")
    clipping = pipelines.latent()
    clipping.scheduler = diffusers.DDIMScheduler()
    with quietly():
        clipping.save_pretrained(tmp_path / "clipping")
    with pytest.raises(BadCheckpoint, match="clips latents"):
        read(tmp_path / "clipping")
    assert read(tmp_path / "clipping", plan=Plan(guide=())).codec is not None
