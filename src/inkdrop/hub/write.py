"""Write: a bundle as a folder that a pipeline of diffusers loads and runs unchanged; JSON and safetensors.

pixels, a U-Net                    DDPMPipeline (sampler ddpm) or DDIMPipeline (ddim)
latents, a U-Net                   LDMPipeline
latents, a U-Net that reads CLIP   StableDiffusionPipeline
latents, a DiT                     DiTPipeline
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inkdrop.bundle import Bundle
from inkdrop.condition import class_of
from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.files import Writer, write_folder
from inkdrop.hub.autoencoder import write_autoencoder
from inkdrop.hub.dit import write_dit
from inkdrop.hub.folder import component_files
from inkdrop.hub.plan import write_scheduler
from inkdrop.hub.schedule import Noising
from inkdrop.hub.unet_config import write_unet
from inkdrop.nets.dit import DiT
from inkdrop.nets.unet import UNet
from inkdrop.plan import Plan
from inkdrop.reader import Reader

__all__ = ["write"]

_VERSION = "0.35.0"  # of diffusers, whose folders look like this
_NULL_OF_DIT = 1000  # the class that DiTPipeline asks for its unconditional branch
_TEXT = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
_READ = ("*.json", "*.safetensors", "*.txt")


@dataclass(frozen=True)
class _Pipeline:
    """A pipeline to be written.

    Attributes:
        kind: its class.
        scheduler: of its scheduler_config.json.
        net: (config, tensors).
        name: what it calls the net.
    """

    kind: str
    scheduler: dict[str, Any]
    net: tuple[dict[str, Any], dict[str, Tensor]]
    name: str = "unet"


def write(
    bundle: Bundle,
    path: Path | str,
    *,
    plan: Plan | None = None,
    label: int | str | None = None,
    forget_null: bool = False,
) -> str:
    """Write a bundle as a new folder for diffusers, whole or not at all.

    Their pipelines for U-Nets of pixels and of latents know no classes: a net that does is written as the net of one
    class, whose vector goes into the bias of the time's.

    Args:
        bundle: the model.
        path: a new folder.
        plan: how it is to be sampled, by ddim, ddpm or plms; its own by default. Steps, guidance and eta are
            arguments of their pipelines, and not written.
        label: the class that a U-Net of classes is written for, its number or name, or "none" for its null.
        forget_null: leave out the learned null text of a net that is guided; theirs is the text "".

    Returns:
        The class of the pipeline that it is.

    Raises:
        BadCheckpoint: something of the model has no counterpart there, naming it.
        BadArgument: the folder exists or cannot be written, or a label too many, or one is missing.
    """
    recipe, net = bundle.recipe, bundle.denoiser.net
    noising = Noising(recipe.schedule, recipe.target, recipe.clock, recipe.scale)
    plan = plan or bundle.plan
    scheduler = write_scheduler(noising, plan)
    if bundle.recipe.image is not None or bundle.attributes:
        raise BadCheckpoint("hub write: the model takes an image or attributes, which no pipeline of theirs has")
    if isinstance(net, DiT):
        made = _of_dit(bundle, net, scheduler, label)
    elif isinstance(net, UNet):
        made = _of_unet(bundle, net, scheduler, label, forget_null)
    else:
        raise BadCheckpoint(f"hub write: a {type(net).__name__} has no counterpart in diffusers; need a unet or a dit")
    write_folder(Path(path), _files(bundle, made))
    return made.kind


def _of_dit(bundle: Bundle, net: DiT, scheduler: dict[str, Any], label: int | str | None) -> _Pipeline:
    """DiTPipeline, which asks for a class, and for class 1000 where it is guided."""
    if bundle.codec is None:
        raise BadCheckpoint("hub write: diffusers has no pipeline for a dit of pixels; train one of latents")
    if label is not None:
        raise BadArgument(f"hub write: got class {label!r}, but DiTPipeline is told classes when it runs; leave it out")
    if net.classes > _NULL_OF_DIT:
        raise BadCheckpoint(f"hub write: DiTPipeline takes class {_NULL_OF_DIT} for none; the net has {net.classes}")
    return _Pipeline("DiTPipeline", scheduler, write_dit(net, classes=_NULL_OF_DIT), "transformer")


def _of_unet(
    bundle: Bundle, net: UNet, scheduler: dict[str, Any], label: int | str | None, forget_null: bool
) -> _Pipeline:
    """The pipeline of a U-Net, by what it works on and whether it reads."""
    if bundle.reader is None:
        config, tensors = write_unet(net, told=_told(net, bundle.classes, label))
        if bundle.codec is not None:
            kind = "LDMPipeline"
        else:
            kind = "DDPMPipeline" if scheduler["_class_name"] == "DDPMScheduler" else "DDIMPipeline"
    else:
        if bundle.codec is None:
            raise BadCheckpoint("hub write: diffusers has no pipeline for a U-Net of pixels that reads; need latents")
        if net.classes or label is not None:
            raise BadCheckpoint("hub write: StableDiffusionPipeline knows no classes")
        _check_null(net, bundle.reader, forget_null)
        kind, (config, tensors) = "StableDiffusionPipeline", write_unet(net, forget=("text.null",))
    if net.learned_variance and scheduler.get("variance_type") != "learned_range":
        config, tensors = _without_variance(config, tensors, net.shape[0])
    if bundle.codec is not None and not isinstance(config["sample_size"], int):
        raise BadCheckpoint(f"hub write: {kind} takes square latents, the model's are {config['sample_size']}")
    return _Pipeline(kind, scheduler, (config, tensors))


def _told(net: UNet, classes: tuple[str, ...], label: int | str | None) -> Tensor | None:
    """The vector of the class that is written; None for a net without classes."""
    table = net.context.label
    if table is None:
        if label is not None:
            raise BadArgument(f"hub write: got class {label!r}, but the model has no classes; leave it out")
        return None
    if label is None:
        raise BadArgument(
            "hub write: the pipeline knows no classes; say for which one the net is written, as --class "
            f"{classes[0] if classes else 0}, or --class none"
        )
    row = table.null if label == "none" else table.table.weight[class_of(label, classes)]
    return row.detach()


def _without_variance(
    config: dict[str, Any], tensors: Mapping[str, Tensor], channels: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The net without its second half, which this scheduler has no use for and would refuse."""
    cut = {name: tensors[name][:channels].contiguous() for name in ("conv_out.weight", "conv_out.bias")}
    return {**config, "out_channels": channels}, {**tensors, **cut}


def _check_null(net: UNet, reader: Reader, forget_null: bool) -> None:
    """Refuse to drop a learned null text that is not the one theirs has."""
    if net.text is None or reader.vocabulary:
        raise BadCheckpoint("hub write: the model reads tokens of its own, which no pipeline of theirs does")
    empty, null = reader([""])[0][0], net.text.null.detach().cpu()
    if not forget_null and (empty.shape != null.shape or not torch.allclose(empty, null, atol=1e-6)):
        raise BadCheckpoint(
            "hub write: the model's null text was learned, and StableDiffusionPipeline guides away from the text '' "
            "instead; leave it out with forget_null (--forget-null), and guidance will differ"
        )


# ---- files ---------------------------------------------------------------------------------------------------


def _files(bundle: Bundle, made: _Pipeline) -> dict[str, Writer]:
    """Every file of the folder."""
    config, tensors = made.net
    index: dict[str, Any] = {
        "_class_name": made.kind,
        "_diffusers_version": _VERSION,
        "scheduler": ["diffusers", made.scheduler["_class_name"]],
        made.name: ["diffusers", config["_class_name"]],
    }
    files = component_files(config, tensors, under=made.name)
    files |= component_files(made.scheduler, under="scheduler", name="scheduler_config.json")
    if bundle.codec is not None:
        name = "vqvae" if made.kind == "LDMPipeline" else "vae"
        index[name] = ["diffusers", "AutoencoderKL"]
        files |= component_files(*write_autoencoder(bundle.codec), under=name)
    if bundle.reader is not None:
        index |= {name: ["transformers", kind] for name, kind in _TEXT.items()}
        index |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
        index["requires_safety_checker"] = False
        files |= _text_files(bundle.reader)
    if made.kind == "DiTPipeline" and bundle.classes:
        index["id2label"] = {str(i): name for i, name in enumerate(bundle.classes)}
    return {**files, **component_files(index, name="model_index.json")}


def _text_files(reader: Reader) -> dict[str, Writer]:
    """Copies of the text encoder and its tokenizer, from where the reader has them."""
    record = json.loads(reader.files().get("reader.json", b"{}"))
    folder = Path(record.get("folder", ""))
    two = (folder / "text_encoder").is_dir()
    files: dict[str, Writer] = {}
    for name, kind in _TEXT.items():
        place = folder / name if two else folder
        found = sorted(path for pattern in _READ for path in place.glob(pattern)) if record else []
        config = next((path for path in found if path.name == "config.json"), None)
        if name == "text_encoder" and (config is None or "clip" not in str(_model_type(config))):
            raise BadCheckpoint(f"hub write: {reader!r} is no CLIP encoder whose folder is there; need {kind}")
        for path in found:
            files[f"{name}/{path.name}"] = _copier(path)
    return files


def _model_type(config: Path) -> Any:
    return json.loads(config.read_text(encoding="utf-8")).get("model_type")


def _copier(source: Path) -> Writer:
    def copy(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes())

    return copy
