"""Vision: features by a vision model of transformers, such as DINOv2 or CLIP, from a folder or the hub."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from inkdrop.core.check import check_state
from inkdrop.errors import BadArgument, BadCheckpoint, BadShape, MissingExtra
from inkdrop.evals.resize import clean, to_rgb
from inkdrop.pretrained import fetched, opened

__all__ = ["Pool", "Vision", "Where", "device_of"]

Where: TypeAlias = Literal["auto", "cpu", "cuda"]

Pool: TypeAlias = Literal["auto", "first", "mean"]
"""first: the class token; mean: of all others; auto: what the model gives for an image, normalised for CLIP."""

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


class Vision:
    """The embedding of 8-bit RGB images by a frozen vision model, without torchvision.

    Images are rounded to 8 bits, resized to the model's side × side by Pillow's bicubic with antialiasing (never
    cropped), and normalised as its preprocessor_config.json says, or as ImageNet's. The hash is of all that, too: it is
    our own preprocessing, not that of other programs.

    Args:
        shape: (C, H, W) of a sample, C of 1, 3 or 4.
        model: a folder as transformers saves it, with safetensors, or a hub id.
        pool: which embedding.
        device: where the model runs.

    Attributes:
        dim: the length of an embedding.
        hash: 12 digits of the SHA-256 of weights, configuration and preprocessing.
        texts: f(B texts) -> (B, D), embeddings of length 1 by the text encoder of a whole CLIP; None of other models.

    Raises:
        MissingExtra: transformers is not installed.
        BadShape: samples that are no images of 1, 3 or 4 channels.
        BadArgument: no such model, or one of another kind.
        BadCheckpoint: it cannot be opened, or weights are missing.
    """

    name = "transformers"

    def __init__(self, shape: tuple[int, ...], model: str, *, pool: Pool = "auto", device: str = "cpu") -> None:
        if len(shape) != 3 or shape[0] not in (1, 3, 4):
            raise BadShape(f"vision model: got samples of shape {shape}, need images (C, H, W) of 1, 3 or 4 channels")
        folder = Path(model).expanduser()
        folder = folder if folder.is_dir() else fetched(model, "vision model")
        self.shape, self.device, self.pool = shape, torch.device(device), pool
        self._clip, self.net, config = _open(folder, pool)
        self.texts = _texts(folder, self.device) if self._clip else None
        self.net = self.net.to(self.device)
        self.side = int(config.image_size)
        how = _IMAGENET | _preprocessing(folder)
        self._mean, self._std = (torch.tensor(how[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
        self.resize = f"bicubic {self.side}, Pillow floats"
        about = f"{_sha256(folder)} {pool} {self.side} {how['image_mean']} {how['image_std']}"
        self.hash = hashlib.sha256(about.encode()).hexdigest()[:12]
        once, again = (self(torch.linspace(-1, 1, math.prod(shape)).view(1, *shape)) for _ in range(2))
        if not torch.allclose(once, again, rtol=1e-3):  # a masked autoencoder draws what it looks at
            raise BadArgument(f"vision model {folder}: gives one image other features each time; try another model")
        self.dim = once.shape[1]
        self.note = f"{config.model_type} {Path(model).name}, {self.resize}, whole image, {pool}: our own preprocessing"

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The embeddings (B, D), float32 on the CPU, of x (B, C, H, W) in [-1, 1].

        Raises:
            BadShape: x of another shape.
        """
        check_state(x, self.shape, "vision model")
        parts = [self._embedded(part) for part in x.split(32) if len(part)]
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

    def _embedded(self, x: Tensor) -> Tensor:
        pixels = (clean(to_rgb(x), self.side) / 255 - self._mean) / self._std
        given = self.net(pixel_values=pixels.to(self.device))
        if self.pool != "auto":
            tokens = given.last_hidden_state
            found: Tensor = tokens[:, 0] if self.pool == "first" else tokens[:, 1:].mean(1)
        elif self._clip:
            found = torch.nn.functional.normalize(given.image_embeds, dim=1)
        elif getattr(given, "pooler_output", None) is None:
            raise BadArgument("vision model pool: it has no embedding of its own; try features.pool=first or mean")
        else:
            found = given.pooler_output
        return found.float().cpu()


def _open(folder: Path, pool: Pool) -> tuple[bool, Any, Any]:
    """Whether it is a CLIP, its vision part, that part's configuration; a pooler may lack where it has no use."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("vision model", "transformers", "text") from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        clip = config.model_type in ("clip", "clip_vision_model")
        kind = transformers.CLIPVisionModelWithProjection if clip else transformers.AutoModel
        net = opened(kind, folder, spare="" if pool == "auto" else "pooler.")
    except (OSError, ValueError, ImportError) as error:
        raise BadCheckpoint(f"vision model {folder}: cannot be opened ({str(error).splitlines()[0]})") from None
    config = getattr(config, "vision_config", config)
    if not isinstance(getattr(config, "image_size", None), int):
        raise BadArgument(
            f"vision model {folder}: {config.model_type} has no image_size; need one as DINOv2, ViT or CLIP"
        )
    return clip, net, config


def _texts(folder: Path, device: torch.device) -> Callable[[Sequence[str]], Tensor] | None:
    """The text encoder of a CLIP, opened when it is first asked; None of a vision part alone."""
    import transformers

    if transformers.AutoConfig.from_pretrained(folder).model_type != "clip":
        return None

    @cache
    def parts() -> tuple[Any, Any]:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            net = opened(transformers.CLIPTextModelWithProjection, folder)
        except (OSError, ValueError, ImportError) as error:
            raise BadCheckpoint(f"CLIP {folder}: its texts cannot be read ({str(error).splitlines()[0]})") from None
        return tokenizer, net.to(device)

    @torch.no_grad()
    def embedded(texts: Sequence[str]) -> Tensor:
        tokenizer, net = parts()
        most = net.config.max_position_embeddings
        words = tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt").to(device)
        return torch.nn.functional.normalize(net(**words).text_embeds.float(), dim=1).cpu()

    return embedded


def _preprocessing(folder: Path) -> dict[str, Any]:
    """Mean and deviation of each colour in [0, 1], where the model says them."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        found = {key: [float(v) for v in said[key]] for key in _IMAGENET if key in said}
    except (ValueError, TypeError) as error:
        raise BadCheckpoint(f"{file}: cannot be read ({error})") from None
    if any(len(values) != 3 for values in found.values()):
        raise BadCheckpoint(f"{file}: need three numbers in image_mean and image_std")
    return found


def _sha256(folder: Path) -> str:
    """The hash of its weights and its configuration."""
    total = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def device_of(name: Where) -> str:
    """The name of a device; "auto" is CUDA where there is a GPU.

    Raises:
        BadArgument: cuda where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BadArgument("features device: got cuda, but there is none; try auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
