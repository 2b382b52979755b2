"""Bundle: what a checkpoint folder holds, written atomically and read back whole; safetensors and JSON, never pickles.

    step-00001000/
        bundle.json         recipe, shape, classes, card, the sha256 of every other file, and its own
        net.safetensors     the averaged (EMA) weights, which are what is sampled
        codec.safetensors   the autoencoder in whose latents it works, if there is one
        tokenizer.json      and the like: how it reads text, if it does
        raw.safetensors     the optimiser's own weights
        state.*             what resuming needs besides (optional)

A folder under its final name is complete: it is written beside it under another name, flushed to disk, then renamed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from inkdrop.augmentation import Augmentation
from inkdrop.codec import CARD, Codec, codec_of
from inkdrop.core.cond import Terms
from inkdrop.core.schedule import Schedule
from inkdrop.denoiser import Denoiser
from inkdrop.edit.pairs import Pair
from inkdrop.errors import BadArgument, BadCheckpoint, InkdropError
from inkdrop.files import Writer, load_weights, own_sha256, sha256, tensors, write_folder, write_json
from inkdrop.find import build
from inkdrop.model import Examples, examples_of
from inkdrop.plan import Plan
from inkdrop.reader import Reader, reader_of
from inkdrop.recipe import Recipe, denoiser_of, dump, read, refuse_foreign_code

__all__ = ["Bundle", "checkpoints", "load", "locate", "pair_of", "read_manifest", "save", "shown_of", "terms_of"]

MANIFEST = "bundle.json"
FORMAT = "inkdrop-bundle-1"


@dataclass
class Bundle:
    """A trained model and all that is needed to sample it.

    Attributes:
        recipe: that made it.
        denoiser: with its weights.
        shape: (C, *S) of one sample.
        classes: class names, label i being classes[i]; () if there are none.
        levels: how many values a channel can take; None if continuous.
        card: what it was trained on, when, where and how far; for people.
        parts: what else answers questions, by the name in Ask.of ("weak", "classifier"); given by `with_parts`, and not
            saved with it.
        attributes: the names of the continuous attributes that it takes, in order; () if there are none.
        reader: how it reads text; None if it reads none.
        codec: the autoencoder in whose latents it works; None if it works on samples themselves.
        examples: what it is told unless its user says otherwise.
    """

    recipe: Recipe
    denoiser: Denoiser
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    levels: int | None = None
    card: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, nn.Module] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()
    reader: Reader | None = None
    codec: Codec | None = None
    examples: Examples = field(default_factory=Examples)

    @property
    def plan(self) -> Plan:
        """How to sample it unless told otherwise."""
        return self.recipe.plan

    @property
    def guidable(self) -> bool:
        """Whether it was trained with dropped conditions, so that it has an unconditional branch."""
        return self.recipe.train.null_rate > 0

    @property
    def schedule(self) -> Schedule:
        """Its noise levels."""
        return self.denoiser.schedule

    @property
    def pair(self) -> Pair | None:
        """How its image condition is made; None if it takes none."""
        return pair_of(self.recipe, self.shape)


def pair_of(recipe: Recipe, shape: tuple[int, ...]) -> Pair | None:
    """How a recipe makes image conditions of pictures of this shape; None if it makes none."""
    made: Pair | None = None if recipe.image is None else build("pairs", recipe.image, shape)
    return made


def terms_of(
    classes: int, attributes: int, reader: Reader | None, pair: Pair | None, augmentation: int = 0, coordinates: int = 0
) -> Terms:
    """How much of each condition there is."""
    told = (0, 0, 0) if reader is None else (reader.vocabulary, reader.features, reader.length)
    return Terms(classes, attributes, *told, 0 if pair is None else pair.channels, augmentation, coordinates)


def shown_of(recipe: Recipe, shape: tuple[int, ...]) -> tuple[int, int]:
    """What a net is told of how pictures of this shape are shown to it: (numbers of augmentation, coordinates)."""
    return Augmentation(recipe.augment).told(shape), 2 if recipe.train.windows else 0


def save(
    bundle: Bundle,
    path: Path,
    *,
    net: Mapping[str, Tensor] | None = None,
    raw: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Tensor] | None = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder, atomically.

    Args:
        bundle: what to save.
        path: a new folder.
        net: the weights of bundle.denoiser.net, where that does not hold them whole.
        raw: the optimiser's own weights, beside the averaged ones in bundle.denoiser.net.
        state: the optimiser's tensors, for resuming.
        progress: plain JSON for resuming (the update reached).

    Raises:
        BadArgument: a tensor is not finite, the folder exists or cannot be written.
    """
    files: dict[str, Writer] = {"net.safetensors": tensors(bundle.denoiser.net.state_dict() if net is None else net)}
    if bundle.codec is not None:
        files["codec.safetensors"] = tensors(bundle.codec.state_dict())
    texts = {} if bundle.reader is None else bundle.reader.files()
    files |= {name: partial(_write, content) for name, content in texts.items()}
    if raw is not None:
        files["raw.safetensors"] = tensors(raw)
    if state is not None:
        files["state.safetensors"] = tensors(state)
    if progress is not None:
        files["state.json"] = lambda p: write_json(p, dict(progress))

    def manifest(target: Path) -> None:
        record = {
            "format": FORMAT,
            "recipe": dump(bundle.recipe),
            "shape": list(bundle.shape),
            "range": [-1.0, 1.0],
            "levels": bundle.levels,
            "classes": list(bundle.classes),
            "attributes": list(bundle.attributes),
            "texts": sorted(texts),
            "codec": None if bundle.codec is None else bundle.codec.record(),
            "examples": bundle.examples._asdict(),
            "card": bundle.card,
            "files": {name: sha256(target.parent / name) for name in files},
        }
        write_json(target, {**record, "sha256": own_sha256(record)})

    write_folder(path, {**files, MANIFEST: manifest})


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if (p / MANIFEST).is_file())


def locate(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest of a run.

    Raises:
        BadCheckpoint: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        beside = [p.name for p in checkpoints(path.parent.parent)] if path.name.startswith("step-") else []
        there = f" (there are {', '.join(beside)})" if beside else ""
        raise BadCheckpoint(f"{path}: {what}; give a run folder or a checkpoint in it{there}")
    found = checkpoints(path)
    if not found:
        none = f"holds no checkpoint (no {MANIFEST}, no checkpoints/step-*); train first"
        raise BadCheckpoint(
            f"{path}: {next((what for name, what in _OTHERS.items() if (path / name).is_file()), none)}"
        )
    return found[-1]


_OTHERS = {
    "classifier.json": "is a classifier; give a run, and this with --classifier",
    CARD: "is an autoencoder, in whose latents a model is trained; see: inkdrop train RECIPE --codec FOLDER",
    **dict.fromkeys(
        ("model_index.json", "config.json"),
        "looks like a folder of diffusers; read it first: inkdrop hub read FOLDER --out CHECKPOINT",
    ),
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The bundle.json of a checkpoint, with its files checked.

    Raises:
        BadCheckpoint: it is not JSON of this format, or a file is missing or does not have its sha256.
    """
    manifest = folder / MANIFEST
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{manifest}: cannot be read ({error}); {_ANOTHER}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BadCheckpoint(f"{manifest}: is not of the format {FORMAT}; give a checkpoint that inkdrop wrote")
    if record.get("sha256") != own_sha256(record):
        raise BadCheckpoint(f"{manifest}: is corrupt (its sha256 is not the recorded one); {_ANOTHER}")
    try:
        _check_form(record)
    except InkdropError as error:
        raise BadCheckpoint(f"{manifest}: {error}") from None
    for name, want in record["files"].items():
        file = folder / Path(name).name
        if not file.is_file():
            raise BadCheckpoint(f"{file}: is missing; {_ANOTHER}, or copy the folder again")
        if sha256(file) != want:
            raise BadCheckpoint(f"{file}: is corrupt (its sha256 is not the recorded one); {_ANOTHER}")
    result: dict[str, Any] = record
    return result


_ANOTHER = "use another checkpoint (if this one is deleted, its run goes on from the one before)"


def _check_form(record: dict[str, Any]) -> None:
    """Refuse a manifest whose fields are missing or of another form; fills in what its recipe left out."""
    missing = [key for key in ("recipe", "shape", "classes", "files") if key not in record]
    if missing:
        raise BadCheckpoint(f"lacks {', '.join(missing)}")
    record["recipe"] = dump(read(record["recipe"]))
    shape, classes, files = record["shape"], record["classes"], record["files"]
    sizes = isinstance(shape, list) and shape and all(isinstance(n, int) and n >= 1 for n in shape)
    if not sizes or math.prod(shape) > 2**31:
        raise BadCheckpoint(f"got shape {shape}, need positive sizes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise BadCheckpoint(f"got classes {classes!r}, need a list of names")
    if not isinstance(files, dict) or not isinstance(record.get("card", {}), dict):
        raise BadCheckpoint("files and card must be JSON objects")
    for name in ("attributes", "texts"):
        names = record.setdefault(name, [])
        if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
            raise BadCheckpoint(f"got {name} {names!r}, need a list of names")
    record["examples"] = examples_of(record.get("examples", {}))._asdict()
    needed = [*record["texts"], *(["codec.safetensors"] if record.setdefault("codec", None) is not None else [])]
    if lost := [name for name in needed if name not in files]:
        raise BadCheckpoint(f"needs {lost[0]}, which is not among its files")


def load(
    path: Path | str, *, weights: Literal["ema", "raw"] = "ema", trust: bool = False, device: str = "cpu"
) -> Bundle:
    """Read a checkpoint: a folder, or a run folder, whose newest is taken.

    Args:
        path: where it is.
        weights: "ema", the averaged weights, or "raw", the optimiser's own.
        trust: allow parts named "my.module:thing", whose import runs their code.
        device: where the net goes.

    Raises:
        BadCheckpoint: a file is missing, foreign or corrupt, or names code outside inkdrop without trust.
    """
    folder = locate(Path(path))
    record = read_manifest(folder)
    if not trust:
        refuse_foreign_code(record["recipe"], folder, BadCheckpoint)
    name = {"ema": "net.safetensors", "raw": "raw.safetensors"}.get(weights)
    if name is None:
        raise BadArgument(f"weights: got {weights!r}, need ema or raw")
    if name not in record["files"]:
        other = "raw" if weights == "ema" else "ema"
        raise BadCheckpoint(f"{folder}: has no {weights} weights ({name}); try --weights {other}")
    recipe, shape = read(record["recipe"]), tuple(record["shape"])
    try:
        bundle = _built(recipe, shape, record, folder, trust)
    except InkdropError as error:
        raise BadCheckpoint(f"{folder}: cannot be built here: {error}") from None
    load_weights(bundle.denoiser.net, folder / name)
    bundle.denoiser.to(device).eval()
    if bundle.codec is not None:
        load_weights(bundle.codec, folder / "codec.safetensors")
        bundle.codec.to(device).eval().requires_grad_(False)
    return bundle


def _built(recipe: Recipe, shape: tuple[int, ...], record: dict[str, Any], folder: Path, trust: bool) -> Bundle:
    """The bundle of a manifest, with fresh weights."""
    texts = {name: (folder / Path(name).name).read_bytes() for name in record["texts"]}
    reader = None if recipe.text is None else reader_of(recipe.text, files=texts)
    codec = None if record.get("codec") is None else codec_of(record["codec"], trust=trust)
    classes, attributes = tuple(record["classes"]), tuple(record["attributes"])
    terms = terms_of(len(classes), len(attributes), reader, pair_of(recipe, shape), *shown_of(recipe, shape))
    denoiser = denoiser_of(recipe, shape if codec is None else codec.latent_shape, terms)
    card, levels = record.get("card", {}), record.get("levels")
    made = Bundle(recipe, denoiser, shape, classes, levels, card)
    made.attributes, made.reader, made.codec, made.examples = attributes, reader, codec, Examples(**record["examples"])
    return made
