"""Read: a pipeline of diffusers as a bundle, from its folder or by its hub id; JSON and safetensors, never pickles.

    PIPELINE/
        model_index.json                which classes it is made of
        scheduler/scheduler_config.json
        unet/ or transformer/           the net
        vae/                            the autoencoder, of a latent model
        text_encoder/, tokenizer/       of a model that reads texts

Folders written before diffusers 0.3 hold net and scheduler at the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from inkdrop.bundle import Bundle, terms_of
from inkdrop.codec import Codec
from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.find import Part
from inkdrop.hub import dit, unet
from inkdrop.hub.autoencoder import read_autoencoder
from inkdrop.hub.config import Config
from inkdrop.hub.fetch import located
from inkdrop.hub.folder import read_json, read_tensors
from inkdrop.hub.plan import Reading, read_scheduler
from inkdrop.hub.schedule import denoiser_with
from inkdrop.nets.unet import UNet
from inkdrop.plan import Plan, add_guide
from inkdrop.reader import Reader, reader_of
from inkdrop.recipe import Recipe
from inkdrop.settings import Train

__all__ = ["PIPELINES", "read", "read_any", "read_codec"]

PIPELINES = {
    "DDIMPipeline": ("unet",),
    "DDPMPipeline": ("unet",),
    "PNDMPipeline": ("unet",),
    "LDMPipeline": ("unet", "vqvae"),
    "DiTPipeline": ("transformer", "vae"),
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder", "tokenizer"),
}
"""The pipelines that are read, and what each is made of besides its scheduler."""

_GUIDANCE = {"DiTPipeline": 4.0, "StableDiffusionPipeline": 7.5}  # the scales that those pipelines take by default
_CLIP = 77
_LEFT = ("safety_checker", "feature_extractor", "image_encoder")
_INDEX = "model_index.json"
_DITS = (dit.KIND, "Transformer2DModel")


@dataclass(frozen=True)
class _Folder:
    """A pipeline's folder and what its index says.

    Attributes:
        path: the folder.
        index: its model_index.json; {} of a bare component.
        variant: which weights.
    """

    path: Path
    index: Mapping[str, Any]
    variant: str | None

    def of(self, name: str) -> Path:
        """Where a component lies: in a folder of its own, or at the top."""
        return self.path / name if (self.path / name).is_dir() else self.path

    def component(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(config, tensors) of a component."""
        return read_json(self.of(name) / "config.json"), read_tensors(self.of(name), variant=self.variant)


class _Net(NamedTuple):
    """A net, and how a recipe makes it."""

    module: nn.Module
    part: Part
    shape: tuple[int, int, int]


def read(
    source: str | Path,
    *,
    variant: str | None = None,
    plan: Plan | None = None,
    size: tuple[int, int] | None = None,
    revision: str | None = None,
) -> Bundle:
    """A pipeline of diffusers, or a bare U-Net or DiT with its scheduler_config.json beside it, as a bundle.

    Its data are not known, so that it can be sampled, edited and written, but not trained further. It samples as its
    pipeline does by default; card["hub"]["notes"] says in words where the two differ.

    Args:
        source: a folder, or a hub id "owner/name".
        variant: which weights, as "fp16"; they become float32.
        plan: how to sample instead of as its scheduler says; then only what that says of the net is read.
        size: (H, W) of what the net denoises, instead of its sample_size.
        revision: of a hub id.

    Raises:
        BadCheckpoint: a file is missing, foreign or not whole, or something has no counterpart here.
        MissingExtra: a package that its parts need is not installed.
    """
    path = located(source, variant=variant, revision=revision)
    index = read_json(path / _INDEX) if (path / _INDEX).is_file() else {}
    folder = _Folder(path, index, variant)
    kind = _kind(folder)
    scheduler = folder.of("scheduler") / "scheduler_config.json"
    if not index and not scheduler.is_file():
        raise BadCheckpoint(
            f"{path}: has neither {_INDEX} nor scheduler_config.json, which says what the net predicts; "
            "copy its pipeline's scheduler/scheduler_config.json into it"
        )
    reading = read_scheduler(read_json(scheduler), plan=plan)
    length = _length(folder, kind)
    net = _net(folder, size, length)
    classes = _classes(index, net.module)
    codec = _codec(folder, kind, net.shape)
    if codec is not None and plan is None and reading.plan.guide:
        raise BadCheckpoint(f"{scheduler}: clips latents (clip_sample or thresholding), which have no range")
    text = _text(folder, kind, str(source), length)
    bundle = _bundle(net, reading, kind, classes, codec, text)
    card = {"source": str(source), "pipeline": kind, "notes": [*reading.notes, *_left(index)]}
    bundle.card = {"parameters": sum(p.numel() for p in net.module.parameters()), "data": "not known", "hub": card}
    return bundle


def read_any(
    source: str | Path,
    *,
    variant: str | None = None,
    plan: Plan | None = None,
    size: tuple[int, int] | None = None,
    revision: str | None = None,
) -> Bundle | Codec:
    """What `read` gives, or of an AutoencoderKL alone what `read_codec` gives; see there."""
    path = located(source, variant=variant, revision=revision)
    alone = not (path / _INDEX).is_file() and (path / "config.json").is_file()
    if alone and read_json(path / "config.json").get("_class_name") == "AutoencoderKL":
        if plan is not None or size is not None:
            raise BadArgument(f"{source}: is an autoencoder alone, which is not sampled; leave out how")
        return read_codec(path, variant=variant)
    return read(source, variant=variant, plan=plan, size=size, revision=revision)


def _kind(folder: _Folder) -> str:
    """The pipeline's class, or the component's.

    Raises:
        BadCheckpoint: neither, or one that is not read here.
    """
    if folder.index:
        kind = str(folder.index.get("_class_name"))
        if kind not in PIPELINES:
            raise BadCheckpoint(f"{folder.path}: is a {kind}, need one of {', '.join(PIPELINES)}")
        for name in PIPELINES[kind]:
            entry = folder.index.get(name)
            if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in ("diffusers", "transformers"):
                raise BadCheckpoint(
                    f"{folder.path / _INDEX}: {name} is {entry}, need a class of diffusers or transformers"
                )
        return kind
    kind = str(read_json(folder.path / "config.json").get("_class_name"))
    if kind == "AutoencoderKL":
        raise BadCheckpoint(f"{folder.path}: is an AutoencoderKL alone; read it with hub.read.read_codec")
    return kind


def _net(folder: _Folder, size: tuple[int, int] | None, length: int) -> _Net:
    """The net of a pipeline, or the folder's own."""
    name = "transformer" if "transformer" in folder.index else "unet"
    config, tensors = folder.component(name)
    kind = config.get("_class_name")
    if kind in _DITS:
        part, shape = dit.part_of(config, tensors)
        return _Net(dit.read_dit(config, tensors), part, shape)
    if kind not in (unet.PLAIN, unet.CONDITION):
        known = ", ".join((unet.PLAIN, unet.CONDITION, dit.KIND))
        raise BadCheckpoint(f"{folder.of(name)}: is a {kind}, need one of {known}")
    part, shape = unet.part_of(config, size=size, length=length)
    if "image" in part.knobs:
        raise BadCheckpoint(
            f"{folder.of(name)}: takes an image of {part.knobs['image']} channels beside x, and nothing says how it is "
            "made; read the net alone with hub.unet.read_unet"
        )
    return _Net(unet.read_unet(config, tensors, size=size, length=length), part, shape)


def _classes(index: Mapping[str, Any], net: nn.Module) -> tuple[str, ...]:
    """The class names: those of id2label, or numbers."""
    count = int(getattr(net, "classes", 0))
    named = index.get("id2label")
    if named is None or not count:
        return tuple(str(i) for i in range(count))
    if not isinstance(named, dict) or not all(isinstance(named.get(str(i)), str) for i in range(count)):
        raise BadCheckpoint(f"{_INDEX}: id2label does not name classes 0 to {count - 1}")
    names = [named[str(i)] for i in range(count)]
    return tuple(name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names))


def _codec(folder: _Folder, kind: str, latent: tuple[int, int, int]) -> Codec | None:
    """The autoencoder, for images of the size that the net's latents decode to."""
    name = next((n for n in ("vae", "vqvae") if n in PIPELINES.get(kind, ())), None)
    if name is None:
        return None
    config, tensors = folder.component(name)
    levels = config.get("block_out_channels", [64])
    factor = 2 ** (len(levels) - 1) if isinstance(levels, list) else 1
    codec = read_autoencoder(config, tensors, size=(latent[1] * factor, latent[2] * factor))
    if codec.latent_shape != latent:
        raise BadCheckpoint(f"{folder.of(name)}: makes latents of {codec.latent_shape}, but the net takes {latent}")
    return codec


def read_codec(source: str | Path, *, variant: str | None = None) -> Codec:
    """The AutoencoderKL of a folder or a hub id, or that of a pipeline, as a codec.

    Raises:
        BadCheckpoint: as `read`.
    """
    path = located(source, variant=variant)
    inner = next((path / name for name in ("vae", "vqvae") if (path / name).is_dir()), path)
    return read_autoencoder(read_json(inner / "config.json"), read_tensors(inner, variant=variant))


def _length(folder: _Folder, kind: str) -> int:
    """The tokens that a pipeline's texts are padded to; CLIP's 77 where it does not say."""
    file = folder.path / "tokenizer" / "tokenizer_config.json"
    if "tokenizer" not in PIPELINES.get(kind, ()) or not file.is_file():
        return _CLIP
    return Config(read_json(file), "tokenizer").integer("model_max_length", _CLIP, 2, 4096)


def _text(folder: _Folder, kind: str, source: str, length: int) -> Part | None:
    """The reader of a pipeline that is told texts: its own encoder, wherever it lies."""
    if "text_encoder" not in PIPELINES.get(kind, ()):
        return None
    for name in ("text_encoder", "tokenizer"):
        if not (folder.path / name).is_dir():
            raise BadCheckpoint(f"{folder.path / name}: is missing; download the pipeline again, whole")
    local = Path(source).expanduser()
    return Part("pretrained", {"model": str(local.resolve()) if local.is_dir() else source, "length": length})


def _left(index: Mapping[str, Any]) -> list[str]:
    """What of the pipeline is not read."""
    there = [name for name in _LEFT if isinstance(index.get(name), list) and index[name][0] is not None]
    return [f"{', '.join(there)} of the pipeline: not read"] if there else []


def _bundle(
    net: _Net, reading: Reading, kind: str, classes: tuple[str, ...], codec: Codec | None, text: Part | None
) -> Bundle:
    """The bundle of parts; conditions can be dropped where there is a null that was trained."""
    reader = None if text is None else reader_of(text)
    plan = reading.plan
    if kind in _GUIDANCE and all(part.name != "cfg" for part in plan.guide):
        plan = replace(plan, guide=add_guide(plan.guide, Part("cfg", {"scale": _GUIDANCE[kind]})))
    part = net.part
    if reader is not None:
        _fill_null(net.module, reader)
    recipe = Recipe(
        None,
        part,
        reading.noising.schedule,
        reading.noising.target,
        reading.noising.clock,
        reading.noising.scale,
        text=text,
        train=Train(null_rate=0.1 if kind in _GUIDANCE else 0.0),
        plan=plan,
    )
    terms = terms_of(len(classes), 0, reader, None)
    for name, count in terms._asdict().items():
        if part.knobs.get(name, 0) != count:
            raise BadCheckpoint(f"{kind}: the net's {name} is {part.knobs.get(name, 0)}, but the pipeline has {count}")
    shape = net.shape if codec is None else codec.shape
    denoiser = denoiser_with(net.module, reading.noising).eval()
    return Bundle(recipe, denoiser, shape, classes, 256, reader=reader, codec=codec)


def _fill_null(net: nn.Module, reader: Reader) -> None:
    """Their unconditional text is the empty one, as their encoder reads it: it becomes the net's null."""
    if not isinstance(net, UNet) or net.text is None:
        raise BadCheckpoint("the pipeline has a text encoder, but its net reads no text")
    empty = reader([""])[0]
    if empty.shape[1:] != net.text.null.shape:
        got, need = tuple(empty.shape[1:]), tuple(net.text.null.shape)
        raise BadCheckpoint(f"the text encoder gives embeddings {got}, but the net reads {need}")
    with torch.no_grad():
        net.text.null.copy_(empty[0])
