"""Reader: texts as what a net reads, tokens of a vocabulary of its own or embeddings of a pretrained encoder.

Public functions here that take (texts, files) are found by name: with files, as a checkpoint holds them, they make the
reader again; without, they make one for these texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from inkdrop.errors import BadArgument, BadCheckpoint, MissingExtra
from inkdrop.find import Part, build

__all__ = ["Bpe", "Reader", "bpe", "reader_of"]

_FILE = "tokenizer.json"
_PAD, _BEGIN, _END = "[pad]", "[begin]", "[end]"


class Reader(Protocol):
    """What turns texts into a condition.

    Attributes:
        vocabulary: how many tokens there are; 0 for embeddings.
        features: D of an embedding; 0 for tokens.
        length: the most places of a text.
    """

    vocabulary: int
    features: int
    length: int

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) int64 or embeddings (B, L, D), and (B, L) bool, True at the places to look at, one at least."""
        ...

    def files(self) -> dict[str, bytes]:
        """What a checkpoint must hold to read texts the same: file name -> content."""
        ...


def reader_of(part: Part, texts: Sequence[str] = (), files: Mapping[str, bytes] | None = None) -> Reader:
    """A reader by name and knobs: made for these texts, or again from a checkpoint's files."""
    made: Reader = build("readers", part, texts, files or {})
    return made


class Bpe:
    """A byte-level byte-pair tokenizer: lower case, [begin] first and [end] last, cut to `length` tokens.

    Args:
        content: a tokenizer.json.
        length: the most tokens of a text, at least 2.

    Raises:
        MissingExtra: the library is not installed.
        BadCheckpoint: the content is no tokenizer of ours.
    """

    features = 0

    def __init__(self, content: bytes, length: int) -> None:
        tokenizers = _library()
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # noqa: BLE001, the library raises Exception itself
            raise BadCheckpoint(f"{_FILE}: is no tokenizer ({str(error).splitlines()[0]})") from None
        pad = self._tokenizer.token_to_id(_PAD)
        if pad is None:
            raise BadCheckpoint(f"{_FILE}: has no token {_PAD}; give one that inkdrop wrote")
        self._content, self.length = content, length
        self.vocabulary = int(self._tokenizer.get_vocab_size())
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(pad_id=pad, pad_token=_PAD)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) int64 and mask (B, L) bool, L the longest of these texts."""
        found = self._tokenizer.encode_batch([text.lower() for text in texts])
        return torch.tensor([f.ids for f in found]), torch.tensor([f.attention_mask for f in found]).bool()

    def files(self) -> dict[str, bytes]:
        """The tokenizer.json."""
        return {_FILE: self._content}


def bpe(texts: Sequence[str], files: Mapping[str, bytes], *, vocabulary: int = 512, length: int = 32) -> Bpe:
    """Tokens of a vocabulary learned from the captions by byte-pair merges; read by an encoder trained with the net.

    Args:
        texts: the captions to learn from.
        files: of a checkpoint.
        vocabulary: the most tokens, at least 260: 256 bytes and some.
        length: the most tokens of a text, at least 2; what is longer is cut off.

    Raises:
        MissingExtra: the library `tokenizers` is not installed.
        BadArgument: a number out of its range.

    Reference: Sennrich et al. 2016; byte-level as in Radford et al. 2019, section 2.2.
    """
    if vocabulary < 260 or length < 2:
        raise BadArgument(f"bpe: got vocabulary {vocabulary} and length {length}, need at least 260 and 2")
    if files:
        return Bpe(files[_FILE], length)
    tokenizers = _library()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PAD, _BEGIN, _END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text.lower() for text in texts], trainer)
    ends = [(name, made.token_to_id(name)) for name in (_BEGIN, _END)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single=f"{_BEGIN} $A {_END}", special_tokens=ends)
    return Bpe(made.to_str().encode(), length)


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.processors
        import tokenizers.trainers
    except ImportError:
        raise MissingExtra("text reader bpe", "tokenizers", "text") from None
    return tokenizers
