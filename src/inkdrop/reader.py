"""Reader: texts as what a net reads, tokens of a vocabulary of its own or embeddings of a pretrained encoder.

Public functions here that take (texts, files) are found by name: with files, as a checkpoint holds them, they make the
reader again; without, they make one for these texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from inkdrop.errors import BadArgument, BadCheckpoint, MissingExtra, warn
from inkdrop.find import Part, build
from inkdrop.pretrained import Pretrained

__all__ = ["Bpe", "Reader", "bpe", "pretrained", "reader_of"]

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

    def __call__(self, texts: Sequence[str], heard: Callable[[str], None] = warn) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) int64 or embeddings (B, L, D), and (B, L) bool, True at the places to look at, one at least.

        Several threads may ask at once. What there is to say, as of a text that is cut, is told to `heard`.
        """
        ...

    def files(self) -> dict[str, bytes]:
        """What a checkpoint must hold to read texts the same: file name -> content."""
        ...


def reader_of(part: Part, texts: Sequence[str] = (), files: Mapping[str, bytes] | None = None) -> Reader:
    """A reader by name and knobs: made for these texts, or again from a checkpoint's files."""
    made: Reader = build("readers", part, texts, files or {})
    return made


class Bpe:
    """A byte-level byte-pair tokenizer: [begin] first and [end] last, at most `length` tokens.

    Texts are read in lower case, with any white space as one blank and none at the ends. Every text can be read: what
    no merge knows falls into its bytes. The names of the special tokens mean nothing in a text.

    Args:
        content: a tokenizer.json that `bpe` made.
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
            raise BadCheckpoint(f"{_FILE}: is no tokenizer ({(str(error).splitlines() or ['?'])[0]})") from None
        ids = [self._tokenizer.token_to_id(name) for name in (_PAD, _BEGIN, _END)]
        if None in ids:
            raise BadCheckpoint(f"{_FILE}: has no tokens {_PAD}, {_BEGIN} and {_END}; give one that inkdrop wrote")
        self._pad, _, self._end = ids
        self._tokenizer.encode_special_tokens = True
        self._content, self.length = content, length
        self.vocabulary = int(self._tokenizer.get_vocab_size())

    def __call__(self, texts: Sequence[str], heard: Callable[[str], None] = warn) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) int64 and mask (B, L) bool, L the longest of these texts, at least 2.

        A text of more than `length` tokens is cut, and a warning says so; its last token is [end] all the same.
        """
        rows: list[list[int]] = [found.ids for found in self._tokenizer.encode_batch(list(texts))]
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            if len(row) > self.length:
                heard(f"text: {text!r} has {len(row)} tokens; only the first {self.length} are read")
                rows[i] = [*row[: self.length - 1], self._end]
        longest = max(map(len, rows), default=2)
        tokens = [row + [self._pad] * (longest - len(row)) for row in rows]
        mask = [[True] * len(row) + [False] * (longest - len(row)) for row in rows]
        shape = (len(rows), longest)
        return torch.tensor(tokens, dtype=torch.int64).view(shape), torch.tensor(mask, dtype=torch.bool).view(shape)

    def text_of(self, tokens: Tensor) -> str:
        """The text that one row of tokens (L,) stands for, without special tokens."""
        said: str = self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        return said.strip()

    def files(self) -> dict[str, bytes]:
        """The tokenizer.json."""
        return {_FILE: self._content}


def bpe(texts: Sequence[str], files: Mapping[str, bytes], *, vocabulary: int = 512, length: int = 32) -> Bpe:
    """Tokens of a vocabulary learned from the captions by byte-pair merges; read by an encoder trained with the net.

    Args:
        texts: the captions to learn from.
        files: of a checkpoint, or none.
        vocabulary: the most tokens, at least 260: 256 bytes, three special ones, and merges; fewer where the captions
            give no more.
        length: the most tokens of a text, at least 2; what is longer is cut.

    Raises:
        MissingExtra: the library `tokenizers` is not installed.
        BadArgument: a number out of its range, or no texts to learn from.
        BadCheckpoint: files without a tokenizer.

    Reference: Sennrich et al. 2016; byte-level as in Radford et al. 2019, section 2.2.
    """
    if vocabulary < 260 or length < 2:
        raise BadArgument(f"bpe: got vocabulary {vocabulary} and length {length}, need at least 260 and 2")
    if files:
        if _FILE not in files:
            raise BadCheckpoint(f"bpe: got {', '.join(files)}, need {_FILE}")
        return Bpe(files[_FILE], length)
    if not texts:
        raise BadArgument("bpe: got no captions to learn a vocabulary from, and no checkpoint that holds one")
    tokenizers = _library()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    form = tokenizers.normalizers
    blank = form.Replace(tokenizers.Regex(r"\s+"), " ")
    made.normalizer = form.Sequence([form.NFC(), form.Lowercase(), blank, form.Strip()])
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PAD, _BEGIN, _END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    ends = [(name, made.token_to_id(name)) for name in (_BEGIN, _END)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single=f"{_BEGIN} $A {_END}", special_tokens=ends)
    return Bpe(made.to_str().encode(), length)


def pretrained(
    texts: Sequence[str],
    files: Mapping[str, bytes],
    *,
    model: str = "",
    length: int = 77,
    cache: Literal["disk", "memory"] = "disk",
) -> Pretrained:
    """Embeddings of a frozen CLIP or T5 text encoder that was trained elsewhere, from a folder or the Hugging Face hub.

    The last hidden states in float32. CLIP is read as Stable Diffusion reads it: every text is padded to `length`
    tokens, all of which are looked at. T5's padding is not looked at.

    Args:
        texts: not looked at; a pretrained encoder learns nothing of them.
        files: of a checkpoint, or none: which encoder it was trained with.
        model: a folder of transformers' (safetensors), one with text_encoder/ and tokenizer/, or a hub id.
        length: the most tokens of a text; 77 for CLIP.
        cache: embeddings of texts seen before are kept on disk ($INKDROP_CACHE, or ~/.cache/inkdrop; 0.24 MB a text for
            CLIP ViT-L) or only in memory.

    Raises:
        MissingExtra: the library `transformers` is not installed.
        BadArgument: no model, one that is not to be had, or of another kind.
        BadCheckpoint: files that do not say which encoder it was, or another one than that.

    Reference: Radford et al. 2021; Raffel et al. 2020; Rombach et al. 2022, section 3.3.
    """
    if not model:
        raise BadArgument("pretrained: got no model, need a folder or a hub id; try --set text.model=PATH")
    if length < 1:
        raise BadArgument(f"pretrained length: got {length}, need at least 1")
    return Pretrained(model, length, on_disk=cache == "disk", files=files)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("text", "tokenizers", "text") from None
    return tokenizers
