"""Text: what a net reads, a sequence of vectors made of tokens or of given embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadShape
from inkdrop.nets.blocks import attend

__all__ = ["Text", "TextBlock", "Words"]


class Words(NamedTuple):
    """A read text.

    Attributes:
        tokens: (B, L, D), a vector for each place.
        mask: (B, L) bool, True where there is something to look at; at least one place in each row.
        pooled: (B, D), the mean over those places.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class TextBlock(nn.Module):
    """A transformer block: h = h + W_out·attend(W·norm1(h)), then h + W2·gelu(W1·norm2(h)), token by token.

    Args:
        width: D.
        heads: how many, a divisor of D.

    Reference: Vaswani et al. 2017, with the norms first (Radford et al. 2019, §2.3).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """h (B, L, D), mask (B, L) bool -> (B, L, D)."""
        b, length, width = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = h + self.out(attend(q, k, v, mask).transpose(1, 2).reshape(b, length, width))
        y: Tensor = h + self.linear2(functional.gelu(self.linear1(self.norm2(h))))
        return y


class Text(nn.Module):
    """Reads a condition's text: tokens by an encoder trained with the net, or given embeddings by a linear map.

    Tokens: h = table[token] + place, `depth` transformer blocks, a last norm. Embeddings: W·e + b, or as they are
    where features == width. Rows without a text are told a learned sequence of `null_length` vectors instead.

    Args:
        width: D of the vectors that the net reads.
        vocabulary: how many tokens there are; 0 for given embeddings.
        features: of given embeddings; 0 for tokens.
        length: the most places, at least 1.
        depth: transformer blocks for tokens, at least 0.
        heads: of their attention, a divisor of width.
        null_length: places of the learned null, in [1, length].

    Raises:
        BadArgument: neither or both of vocabulary and features, or a number out of its range.
    """

    def __init__(
        self,
        width: int,
        *,
        vocabulary: int = 0,
        features: int = 0,
        length: int = 77,
        depth: int = 2,
        heads: int = 4,
        null_length: int = 1,
    ) -> None:
        super().__init__()
        if (vocabulary > 0) == (features > 0):
            raise BadArgument(f"text: got vocabulary {vocabulary} and features {features}, need one of them above 0")
        if depth < 0 or heads < 1 or width % heads:
            raise BadArgument(f"text: got depth {depth} and {heads} heads, need depth ≥ 0 and a divisor of {width}")
        if not 1 <= null_length <= length:
            raise BadArgument(f"text null_length: got {null_length}, need 1 to {length}")
        self.width, self.vocabulary, self.features, self.length = width, vocabulary, features, length
        self.null = nn.Parameter(torch.zeros(null_length, width))
        if vocabulary:
            self.table = nn.Embedding(vocabulary, width)
            self.place = nn.Parameter(torch.randn(length, width))  # as large as the table: order is heard
            self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
            self.norm = nn.LayerNorm(width)
        elif features != width:
            self.linear = nn.Linear(features, width)

    def forward(self, cond: Cond | None, rows: int) -> Words:
        """What a batch reads; the null in every row where cond has no text.

        Raises:
            BadShape: text of another kind or width than it was made for, or longer than `length`.
            BadArgument: a token out of range, or a row that is not null without any place to look at (looked at on the
                CPU only, and not while compiling).
        """
        if cond is None or cond.text is None or cond.text_mask is None:
            tokens = self.null.expand(rows, -1, -1)
            return Words(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), tokens.mean(1))
        none, count = cond.null_rows("text"), len(self.null)
        mask = cond.text_mask | none[:, None]  # what a null row says is never used, but its softmax must be finite
        tokens = self._read(cond.text, mask)
        places = max(count, tokens.shape[1])
        tokens, mask = (_padded(part, places) for part in (tokens, mask))
        null, seen = _padded(self.null[None], places), torch.arange(places, device=mask.device)[None] < count
        tokens = torch.where(none[:, None, None], null, tokens)
        mask = torch.where(none[:, None], seen, mask)
        share = mask[:, :, None].to(tokens.dtype)
        return Words(tokens, mask, (tokens * share).sum(1) / share.sum(1))

    def _read(self, text: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, L) or embeddings (B, L, features), and a mask (B, L) -> (B, L, width)."""
        if text.ndim != (2 if self.vocabulary else 3) or text.shape[1] > self.length:
            need = "tokens (B, L)" if self.vocabulary else f"embeddings (B, L, {self.features})"
            raise BadShape(f"cond text: got shape {tuple(text.shape)}, need {need}, L at most {self.length}")
        self._look(text, mask)
        if not self.vocabulary:
            if text.shape[2] != self.features:
                raise BadShape(f"cond text: got embeddings of {text.shape[2]} numbers, need {self.features}")
            given = text.to(self.null.dtype)
            return given if self.features == self.width else self.linear(given)
        h = self.table(text) + self.place[: text.shape[1]]
        for block in self.blocks:
            h = block(h, mask)
        y: Tensor = self.norm(h)
        return y

    def _look(self, text: Tensor, mask: Tensor) -> None:
        """Refuse what cannot be read; on an accelerator the look would wait for the device."""
        if text.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if not bool(mask.any(1).all()):
            raise BadArgument("cond text: got a row without any place to look at, need one at least; try null rows")
        if self.vocabulary:
            wrong = text[(text < 0) | (text >= self.vocabulary)]
            if len(wrong):
                raise BadArgument(f"cond text: got token {int(wrong[0])}, need 0 to {self.vocabulary - 1}")


def _padded(part: Tensor, places: int) -> Tensor:
    """(B, L, ...) with zeros (False) added to (B, places, ...)."""
    gap = part.new_zeros(part.shape[0], places - part.shape[1], *part.shape[2:])
    return torch.cat([part, gap], dim=1)
