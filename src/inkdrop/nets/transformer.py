"""The parts of a diffusion transformer: patches, places, and blocks that are told time and class by adaLN-Zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from inkdrop.nets.blocks import attend, zeroed

__all__ = ["NORM_EPS", "Attention", "DiTBlock", "DiTHead", "modulate", "positions", "unpatchify", "xavier"]

NORM_EPS = 1e-6
"""Added to the variance in a norm over a token's numbers."""


def modulate(h: Tensor, shift: Tensor, scale: Tensor, *, eps: float = NORM_EPS) -> Tensor:
    """norm(h)·(1 + scale) + shift, the norm token by token and without weights of its own.

    Args:
        h: (B, N, D).
        shift: (B, 1, D).
        scale: (B, 1, D).
        eps: added to the variance, > 0.

    Returns:
        (B, N, D).

    Reference: Peebles & Xie 2023, §3.2, after Perez et al. 2018.
    """
    return torch.addcmul(shift, functional.layer_norm(h, h.shape[-1:], eps=eps), 1 + scale)


def positions(rows: int, columns: int, width: int, made: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Fixed places of a grid of tokens: waves of the column beside waves of the row.

    e(p) = [sin(p·f_0) …, cos(p·f_0) …] with f_i = 10000^(−i/h), h = width/4, and the token in row r and column c has
    [e(c·C0/columns), e(r·R0/rows)]: plain row and column on the grid (R0, C0) that the net was made for, stretched over
    it on any other.

    Args:
        rows: of the grid at hand, at least 1.
        columns: of the grid at hand, at least 1.
        width: numbers a token, a multiple of 4, at least 8.
        made: (R0, C0).
        device: where.

    Returns:
        (rows·columns, width) float64 in [−1, 1], row by row.

    Reference: Vaswani et al. 2017, §3.5, along both sides (Peebles & Xie 2023, §3.2, "Patchify").
    """
    halves = []
    for count, base in zip((rows, columns), made, strict=True):
        place = torch.arange(count, device=device, dtype=torch.float64) * (base / count)
        steps = torch.arange(width // 4, device=device, dtype=torch.float64)
        angle = place[:, None] * 10_000.0 ** (-steps / (width // 4))
        halves.append(torch.cat([angle.sin(), angle.cos()], dim=1))
    down, across = halves
    grid = (rows, columns, width // 2)
    return torch.cat([across[None].expand(grid), down[:, None].expand(grid)], dim=2).flatten(0, 1)


def unpatchify(y: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Tokens to an image: token (r, c) holds pixel (r·patch + i, c·patch + j), channel k, at its (i·patch + j)·C + k.

    Args:
        y: (B, rows·columns, patch²·C), row by row.
        rows: of the grid.
        columns: of the grid.
        patch: the side of a patch in pixels.

    Returns:
        (B, C, rows·patch, columns·patch).

    Reference: Peebles & Xie 2023, §3.2, "Transformer decoder".
    """
    squares = y.unflatten(1, (rows, columns)).unflatten(3, (patch, patch, -1))
    image: Tensor = squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return image


def xavier(part: nn.Module) -> None:
    """Xavier's uniform weights and zero biases in every linear layer of a part; a convolution's is that of its patches.

    Reference: Glorot & Bengio 2010, eq. 16.
    """
    for layer in part.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Attention(nn.Module):
    """Attention of several heads: W_out·attend(q, k, v) + b, of tokens to themselves or to words of the same width.

    [q, k, v] = W·h + b; to words q = W_q·h + b_q and [k, v] = W_kv·words + b_kv. Dropout comes last.

    Args:
        width: D.
        heads: how many, a divisor of D.
        cross: to words.
        dropout: the probability of dropping a number of the answer, in [0, 1).

    Reference: Vaswani et al. 2017, §3.2.2.
    """

    def __init__(self, width: int, heads: int, *, cross: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.cross = heads, cross
        if cross:
            self.q = nn.Linear(width, width)
            self.kv = nn.Linear(width, 2 * width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, mask: Tensor | None = None, words: Tensor | None = None) -> Tensor:
        """One look.

        Args:
            h: (B, N, D).
            mask: (B, M) bool, True for the tokens that are looked at; None for all.
            words: (B, M, D), only with cross.

        Returns:
            (B, N, D).
        """
        if self.cross:
            parts = (self.q(h), *self.kv(words).chunk(2, dim=2))
        else:
            parts = self.qkv(h).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        y: Tensor = self.dropout(self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2)))
        return y


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero.

    [shift1, scale1, gate1, shift2, scale2, gate2] = W·silu(context) + b, D numbers each, and

        h = h + gate1·attention(norm(h)·(1 + scale1) + shift1)
        h = h + cross(h, words)                                          where it reads (PixArt)
        h = h + gate2·(W2·gelu(W1·(norm(h)·(1 + scale2) + shift2) + b1) + b2)

    gelu in its tanh form. W and b, and the last layer of cross, start at zero: the block starts as identity.

    Args:
        width: D.
        heads: of attention, a divisor of D.
        hidden: numbers of the perceptron's middle.
        cross: whether it looks at words.
        dropout: the probability of dropping a number of attention's answer or of the perceptron's middle, in [0, 1).
        eps: added to the variance in the second norm.

    Reference: Peebles & Xie 2023, §3.2 and figure 3; Chen et al. 2024 (PixArt-α), §2.3, for cross.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        cross: bool = False,
        dropout: float = 0.0,
        eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads, dropout=dropout)
        self.cross = Attention(width, heads, cross=True, dropout=dropout) if cross else None
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        xavier(self)
        zeroed(self.modulation)
        if self.cross is not None:
            zeroed(self.cross.out)

    def forward(self, h: Tensor, told: Tensor, mask: Tensor | None = None, words: Tensor | None = None) -> Tensor:
        """One block.

        Args:
            h: (B, N, D).
            told: (B, D), silu(context).
            mask: (B, M) bool, True for the words that are looked at; without cross, for the tokens of h that are.
            words: (B, M, D), only with cross.

        Returns:
            (B, N, D).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(told)[:, None].chunk(6, dim=2)
        inner = self.attention(modulate(h, shift1, scale1), None if self.cross is not None else mask)
        h = torch.addcmul(h, gate1, inner)
        if self.cross is not None:
            h = h + self.cross(h, mask, words)
        inner = functional.gelu(self.linear1(modulate(h, shift2, scale2, eps=self.eps)), approximate="tanh")
        return torch.addcmul(h, gate2, self.linear2(self.dropout(inner)))


class DiTHead(nn.Module):
    """Tokens to the numbers of their patches, told the context: W·(norm(h)·(1 + scale) + shift) + b.

    [shift, scale] = V·silu(context) + c. W, b, V and c start at zero.

    Args:
        width: numbers a token.
        out: numbers a patch.

    Reference: Peebles & Xie 2023, §3.2, "Transformer decoder".
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.linear = zeroed(nn.Linear(width, out))

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        """h (B, N, width), told (B, width), silu(context) -> (B, N, out)."""
        shift, scale = self.modulation(told)[:, None].chunk(2, dim=2)
        y: Tensor = self.linear(modulate(h, shift, scale))
        return y
