"""Spatial transformers: pixels that look at each other and at a text, as in latent diffusion."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from inkdrop.nets.blocks import attend, check_heads, norm, zeroed
from inkdrop.nets.text import Words

__all__ = ["SpatialTransformer", "TokenAttention", "TransformerBlock"]


class TokenAttention(nn.Module):
    """Attention from tokens to themselves, or to other tokens: W_out·attend(q, k, v) + b, heads side by side.

    [q, k, v] = W·h; to others q = W_q·h and [k, v] = W_kv·other. None of these has a bias.

    Args:
        width: D of the tokens.
        head_width: numbers a head, a divisor of D.
        features: D' of the other tokens; None for attention to themselves.

    Reference: Vaswani et al. 2017, §3.2; Rombach et al. 2022, §3.3.
    """

    def __init__(self, width: int, head_width: int, *, features: int | None = None) -> None:
        super().__init__()
        self.head_width = head_width
        if features is None:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        else:
            self.q = nn.Linear(width, width, bias=False)
            self.kv = nn.Linear(features, 2 * width, bias=False)
        self.cross = features is not None
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor, words: Words) -> Tensor:
        """h (B, N, D), words of (B, L, D') and mask (B, L) -> (B, N, D)."""
        if self.cross:
            q, (k, v), mask = self._heads(self.q(h), 1)[0], self._heads(self.kv(words.tokens), 2), words.mask
        else:
            (q, k, v), mask = self._heads(self.qkv(h), 3), None
        y: Tensor = self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return y

    def _heads(self, h: Tensor, parts: int) -> Tensor:
        """(B, N, parts·D) -> (parts, B, heads, N, D/heads)."""
        b, length, _ = h.shape
        return h.view(b, length, parts, -1, self.head_width).permute(2, 0, 3, 1, 4)


class TransformerBlock(nn.Module):
    """A transformer block that reads a text.

        h = h + self-attention(norm1(h))
        h = h + cross-attention(norm2(h), words)
        h = h + W2·(a·gelu(g)) + b2,  [a, g] = W1·norm3(h) + b1       (GEGLU)

    Args:
        width: D.
        head_width: numbers a head.
        text: D' of the words.
        only_cross: the first attention looks at the words, too, instead of at the tokens.

    Reference: Rombach et al. 2022, appendix E.2.1; Shazeer 2020, eq. 6 (GEGLU).
    """

    def __init__(self, width: int, head_width: int, text: int, *, only_cross: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention1 = TokenAttention(width, head_width, features=text if only_cross else None)
        self.attention2 = TokenAttention(width, head_width, features=text)
        self.linear1 = nn.Linear(width, 8 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, h: Tensor, words: Words) -> Tensor:
        """h (B, N, D), words of (B, L, D') -> (B, N, D)."""
        h = h + self.attention1(self.norm1(h), words)
        h = h + self.attention2(self.norm2(h), words)
        value, gate = self.linear1(self.norm3(h)).chunk(2, dim=-1)
        y: Tensor = h + self.linear2(value * functional.gelu(gate))
        return y


class SpatialTransformer(nn.Module):
    """Transformer blocks on the pixels of an image: y = x + W_out·blocks(W_in·norm(x)), pixel by pixel.

    The output layer starts at zero, so that it starts as identity. Its norm has an eps of 1e-6 in every net.

    Args:
        channels: C.
        text: D' of the words that it reads.
        head_width: channels a head, a divisor of C; None for a single head of C.
        depth: transformer blocks, at least 1.
        only_cross: see `TransformerBlock`.
        norm_groups: of the norm before them, see `blocks.norm`.

    Raises:
        BadArgument: head_width or norm_groups does not divide C.

    Reference: Rombach et al. 2022, appendix E.2.1.
    """

    def __init__(
        self,
        channels: int,
        text: int,
        *,
        head_width: int | None = None,
        depth: int = 1,
        only_cross: bool = False,
        norm_groups: int | None = None,
    ) -> None:
        super().__init__()
        width = check_heads(channels, head_width)
        self.norm = norm(channels, norm_groups)
        self.inp = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, width, text, only_cross=only_cross) for _ in range(depth)
        )
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, words: Words) -> Tensor:
        """x (B, C, H, W), words of (B, L, D') -> (B, C, H, W)."""
        h = self.inp(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            h = block(h, words)
        y: Tensor = x + self.out(h).transpose(1, 2).unflatten(2, x.shape[-2:])
        return y
