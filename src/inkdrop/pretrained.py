"""Pretrained: a frozen CLIP or T5 text encoder through transformers, with the embeddings of texts kept."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inkdrop.data.fetch import cache_folder
from inkdrop.errors import BadArgument, BadCheckpoint, MissingExtra, warn

__all__ = ["Pretrained", "fetched", "opened"]

_FILE = "reader.json"
_ROOM = 1 << 29  # bytes of embeddings that are kept in memory
_KINDS = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
_FOLDERS = ("text_encoder", "tokenizer")
_READ = ("*.json", "*.safetensors", "*.txt", "*.model")


class _Parts(NamedTuple):
    """The encoder at work."""

    clip: bool
    tokenizer: Any
    encoder: Any


class Pretrained:
    """A reader of embeddings by an encoder that is not trained; each text is encoded alone, and kept.

    Attributes:
        vocabulary: 0, for it gives embeddings.
        features: D of an embedding.
        length: the most places of a text.

    Args:
        model: a folder, or a hub id.
        length: the most places of a text.
        on_disk: whether embeddings are kept on disk, too.
        files: of a checkpoint: which encoder it was; with them the encoder is opened when a text is first read.

    Raises:
        MissingExtra: transformers is not installed.
        BadArgument: no such model, or of another kind.
        BadCheckpoint: files that do not say which encoder it was.
    """

    vocabulary = 0

    def __init__(self, model: str, length: int, *, on_disk: bool, files: Mapping[str, bytes]) -> None:
        self.length, self._on_disk = length, on_disk
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()  # neither what is kept nor the tokenizer is for two threads
        self._model, self._known = model, _record(files) if files else None
        if self._known is None:
            config = _config(self._folder)
            self.features = int(config.d_model if config.model_type == "t5" else config.hidden_size)
            most = None if config.model_type == "t5" else int(config.max_position_embeddings)
            if most is not None and length > most:
                raise BadArgument(f"pretrained length: got {length}, but {model} reads at most {most} tokens")
        else:
            self.features = int(self._known["features"])

    @cached_property
    def _folder(self) -> Path:
        """Where the encoder lies."""
        local = [self._model, *([] if self._known is None else [str(self._known["folder"])])]
        for place in local:
            if (Path(place).expanduser()).is_dir():
                return Path(place).expanduser().resolve()
        return fetched(self._model, "text encoder")

    @cached_property
    def _sha256(self) -> str:
        """The hash of all of its files that are read."""
        total = hashlib.sha256()
        for name in _FOLDERS if _has_two(self._folder) else (".",):
            for path in sorted(p for pattern in _READ for p in (self._folder / name).glob(pattern)):
                with path.open("rb") as file:
                    total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        found = total.hexdigest()
        if self._known is not None and found != self._known["sha256"]:
            raise BadCheckpoint(
                f"text encoder {self._folder}: is not the one that this model was trained with (its sha256 is "
                f"{found[:12]}…, not {self._known['sha256'][:12]}…); put {self._model} there as it was"
            )
        return found

    @cached_property
    def _parts(self) -> _Parts:
        """The tokenizer and the encoder, opened."""
        library, config, folder = _library(), _config(self._folder), self._folder
        kind = getattr(library, _KINDS[config.model_type])
        first, second = (folder / name if _has_two(folder) else folder for name in _FOLDERS)
        try:
            tokenizer = library.AutoTokenizer.from_pretrained(second)
            encoder = opened(kind, first)
        except (OSError, ValueError, ImportError) as error:
            raise BadArgument(f"text encoder {folder}: cannot be opened ({str(error).splitlines()[0]})") from None
        return _Parts(config.model_type != "t5", tokenizer, encoder)

    def __call__(self, texts: Sequence[str], heard: Callable[[str], None] = warn) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) float32, zeros where there is no text, and (B, L) bool, True at the places to look at.

        A text of more than `length` tokens is cut, and a warning says so.

        Raises:
            BadArgument: the encoder is not to be had.
            BadCheckpoint: it is another one than the model was trained with.
        """
        with self._lock:
            rows = [self._row(text, heard) for text in texts]
        longest = max((len(row) for row in rows), default=1)
        embedded = torch.zeros(len(rows), longest, self.features)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            embedded[i, : len(row)], mask[i, : len(row)] = row, True
        return embedded, mask

    def files(self) -> dict[str, bytes]:
        """Which encoder it is: its hash, and where it lay; the encoder itself is not copied."""
        record = {"features": self.features, "folder": str(self._folder), "sha256": self._sha256}
        return {_FILE: (json.dumps(self._known or record, indent=1) + "\n").encode()}

    def _row(self, text: str, heard: Callable[[str], None]) -> Tensor:
        """The embeddings of one text (L, D), from memory, from disk, or by the encoder."""
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text]
        row = self._from_disk(text, heard) if self._on_disk else self._encoded(text, heard)
        self._kept[text] = row
        self._bytes += row.nbytes
        while len(self._kept) > 1 and self._bytes > _ROOM:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return row

    def _from_disk(self, text: str, heard: Callable[[str], None]) -> Tensor:
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        path = cache_folder("text") / f"{self._sha256[:16]}-{self.length}" / f"{name}.safetensors"
        try:
            return load_file(path)["text"]
        except (OSError, SafetensorError):  # not there yet, or damaged: it is made anew
            row = self._encoded(text, heard)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{uuid.uuid4().hex}.part")
        save_file({"text": row}, part)
        os.replace(part, path)
        return row

    @torch.no_grad()
    def _encoded(self, text: str, heard: Callable[[str], None]) -> Tensor:
        if self._known is not None:
            _ = self._sha256
        clip, tokenizer, encoder = self._parts
        whole = len(tokenizer(text, verbose=False).input_ids)
        if whole > self.length:
            heard(f"text: {text!r} has {whole} tokens; only the first {self.length} are read")
        padding = {"padding": "max_length"} if clip else {}
        ids = tokenizer(text, max_length=self.length, truncation=True, return_tensors="pt", **padding).input_ids
        row: Tensor = encoder(input_ids=ids).last_hidden_state[0]
        return row.float().cpu().contiguous()


def _record(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What a checkpoint says of its encoder."""
    try:
        record: dict[str, Any] = json.loads(files[_FILE])
        if not (
            int(record["features"]) > 0 and isinstance(record["sha256"], str) and isinstance(record["folder"], str)
        ):
            raise ValueError("features, sha256 and folder are needed")
    except (KeyError, ValueError, TypeError) as error:
        raise BadCheckpoint(f"{_FILE}: does not say which text encoder it was ({error})") from None
    return record


def _has_two(folder: Path) -> bool:
    """Whether encoder and tokenizer lie in folders of their own, as those of a pipeline do."""
    return (folder / _FOLDERS[0]).is_dir()


def _config(folder: Path) -> Any:
    """The configuration of the text part.

    Raises:
        BadArgument: it cannot be read, or is of another kind.
    """
    library = _library()
    try:
        config = library.AutoConfig.from_pretrained(folder / _FOLDERS[0] if _has_two(folder) else folder)
    except (OSError, ValueError) as error:
        raise BadArgument(f"text encoder {folder}: cannot be read ({str(error).splitlines()[0]})") from None
    if config.model_type not in _KINDS:
        raise BadArgument(f"text encoder {folder}: is a {config.model_type}, need one of {', '.join(_KINDS)}")
    return getattr(config, "text_config", config)


def opened(kind: Any, folder: Path, *, spare: str = "") -> Any:
    """A frozen model of transformers in float32, from safetensors, whose weights are all there.

    transformers fills what a file lacks with random numbers, others at every start, and goes on.

    Args:
        kind: the class of transformers.
        folder: where it was saved.
        spare: how the names of weights begin that may be missing, because they are not used; "" for none.

    Raises:
        OSError, ValueError, ImportError: as transformers does.
        BadCheckpoint: weights are missing.
    """
    net, about = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    missing = sorted(name for name in about["missing_keys"] if not (spare and name.startswith(spare)))
    if missing:
        raise BadCheckpoint(
            f"{folder}: lacks the weights {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}, "
            "and without them it would say something else at every start"
        )
    return net.float().eval().requires_grad_(False)


def fetched(model: str, what: str) -> Path:
    """The folder of a hub id, downloaded unless it is there already: JSON, text and safetensors only.

    Args:
        model: the id.
        what: it is wanted as, for messages.

    Raises:
        MissingExtra: huggingface_hub is not installed.
        BadArgument: it is not to be had.
    """
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError:
        raise MissingExtra(what, "huggingface_hub", "text") from None
    try:
        try:
            hf_hub_download(model, "text_encoder/config.json")
            both = [f"{folder}/{name}" for folder in _FOLDERS for name in _READ]
            return Path(snapshot_download(model, allow_patterns=both))
        except Exception:  # noqa: BLE001, the hub raises errors of four libraries; without that folder it is one model
            return Path(snapshot_download(model, allow_patterns=list(_READ), ignore_patterns=["*/*"]))
    except Exception as error:  # noqa: BLE001
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadArgument(
            f"{what} {model}: no such folder, and not to be had from the hub ({reason}); give the folder of one"
        ) from None


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtra("text encoder", "transformers", "text") from None
    return transformers
