"""Inception: the features that published FIDs are of, by the weights of TensorFlow's graph of 2015-12-05."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from inkdrop.core.check import check_state
from inkdrop.data.fetch import cache_folder, fetch
from inkdrop.errors import BadArgument, BadCheckpoint, BadData, BadShape
from inkdrop.evals.inception_net import InceptionNet
from inkdrop.evals.resize import Resize, clean, legacy, to_rgb

__all__ = ["WEIGHTS", "Inception", "weights_file"]

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
"""pytorch-fid's file; its name carries the first 8 digits of its SHA-256."""

_SCRIPT = "inception-2015-12-05.pt"
_RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
_SCRIPT_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{_SCRIPT}"
_SIDE = 299


class Inception:
    """The last pooling layer of Inception-v3, of 8-bit RGB images resized to 299 × 299.

    Images are rounded to 8 bits, as a file would hold them; grey ones are taken three times, alpha is left out. Then
    they are resized, and shifted as their reference does: "clean" to (v − 128)/128 as clean-fid, "pytorch-fid" to
    v/127.5 − 1.

    Args:
        shape: (C, H, W) of a sample, C of 1, 3 or 4.
        weights: a file with pytorch-fid's state dict (read without unpickling anything but tensors), or StyleGAN's
            TorchScript, which is a program: take it only from whom you trust.
        resize: how.
        device: where the net runs.

    Attributes:
        dim: 2,048.
        classes: of `read`, their numbers; () for TorchScript.
        hash: 12 digits of the SHA-256 of the file of weights and of the preprocessing.

    Raises:
        BadShape: samples that are no images of 1, 3 or 4 channels.
        BadCheckpoint: the file is not one of the two.
    """

    name = "inception"
    dim = 2048

    def __init__(self, shape: tuple[int, ...], weights: Path, *, resize: Resize = "clean", device: str = "cpu") -> None:
        if len(shape) != 3 or shape[0] not in (1, 3, 4):
            raise BadShape(f"inception: got samples of shape {shape}, need images (C, H, W) with 1, 3 or 4 channels")
        if resize not in ("clean", "pytorch-fid"):
            raise BadArgument(f"inception resize: got {resize!r}, need clean or pytorch-fid")
        self.shape, self.device = shape, torch.device(device)
        self._legacy = resize == "pytorch-fid"
        self.resize = "bicubic 299, Pillow floats" if resize == "clean" else "bilinear 299, torch without antialiasing"
        digest, self.net, self._layers = _open(weights, self.device)
        self.hash = hashlib.sha256(f"{digest} {resize}".encode()).hexdigest()[:12]
        self.classes = () if self.net is None else tuple(str(i) for i in range(1008))
        self.note = (
            f"Inception-v3 of 2015-12-05, {self.resize}: ImageNet's view; papers state N, split and resizing too"
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The features (B, 2048), float32 on the CPU, of x (B, C, H, W) in [-1, 1].

        Raises:
            BadShape: x of another shape.
        """
        check_state(x, self.shape, "inception")
        parts = [self._layers(self.prepared(part).to(self.device)).float().cpu() for part in x.split(32) if len(part)]
        return torch.cat(parts).view(-1, self.dim) if parts else torch.empty(0, self.dim)

    def prepared(self, x: Tensor) -> Tensor:
        """What the net is given, float32 (B, 3, 299, 299), of x (B, C, H, W) in [-1, 1]."""
        pixels = to_rgb(x)
        return legacy(pixels, _SIDE) / 127.5 - 1 if self._legacy else (clean(pixels, _SIDE) - 128) / 128

    @torch.no_grad()
    def read(self, features: Tensor) -> Tensor:
        """The probabilities (B, 1008) of the classes of ImageNet that belong to features (B, 2048).

        Raises:
            BadArgument: the weights are TorchScript, whose last layer has no known name.
        """
        if self.net is None:
            raise BadArgument(f"inception score: TorchScript gives features only; try the state dict, {WEIGHTS}")
        return self.net.logits(features.to(self.device)).softmax(1).cpu()


def weights_file(weights: str = "", *, download: bool = False) -> Path:
    """Where the weights are: the file that is given, or one of the two in the cache, or pytorch-fid's, downloaded now.

    Args:
        weights: a path; "" for the cache's, $INKDROP_CACHE/inception or ~/.cache/inkdrop/inception.
        download: whether to fetch pytorch-fid's if none is there.

    Raises:
        BadData: there is no such file, or it cannot be had; the message says what to put where.
    """
    folder = cache_folder("inception")
    places = [Path(weights).expanduser()] if weights else [folder / WEIGHTS, folder / _SCRIPT]
    for place in places:
        if place.is_file():
            return place
    if weights:
        raise BadData(f"inception weights: {places[0]} is no file; try {WEIGHTS} from {_RELEASE}/{WEIGHTS}")
    if download:
        return fetch(folder / WEIGHTS, [_RELEASE], sha256=WEIGHTS.removesuffix(".pth").rpartition("-")[2])
    raise BadData(
        f"inception weights: not there yet; put {_RELEASE}/{WEIGHTS} (91 MB, its SHA-256 begins with 6726825d) or "
        f"{_SCRIPT_URL} into {folder}, give another place (--set features.weights=FILE), or try "
        "--set features.download=true"
    )


def _open(path: Path, device: torch.device) -> tuple[str, InceptionNet | None, Callable[[Tensor], Tensor]]:
    """The SHA-256 of a file, its net if that is known, and what gives features."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    prefix = path.stem.rpartition("-")[2]
    if path.name == WEIGHTS and not digest.startswith(prefix):
        raise BadCheckpoint(
            f"inception weights {path}: its SHA-256 begins with {digest[:8]}, need {prefix}; it is damaged"
        )
    if _is_script(path):
        return digest, None, _script(path, device)
    net = InceptionNet()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001, of a foreign file torch's reader raises errors of any kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadCheckpoint(f"inception weights {path}: not a state dict of it ({reason}); try {WEIGHTS}") from None
    net = net.to(device).eval().requires_grad_(False)
    return digest, net, net


def _is_script(path: Path) -> bool:
    """Whether a file is TorchScript: an archive that holds code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _script(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The layers of StyleGAN's TorchScript, which take what is resized already."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which this file is
            layers: Callable[[Tensor], Tensor] = torch.jit.load(path, map_location=device).eval().layers
    except (RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadCheckpoint(f"inception weights {path}: not StyleGAN's TorchScript ({reason}); try {_SCRIPT}") from None
    return layers
