"""MLP: a residual perceptron for points and other small samples."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadShape
from inkdrop.nets.blocks import zeroed
from inkdrop.nets.embed import Context, Wave, check_input

__all__ = ["MLP", "MLPBlock", "mlp"]


class MLPBlock(nn.Module):
    """A residual block without normalisation: y = h + W2·silu(W1·silu(h) + b1 + P·silu(context) + p) + b2.

    W2 and b2 start at zero, so that the block starts as identity.

    Args:
        width: numbers in and out.
        context: numbers of the context vector.
        dropout: the probability of dropping a hidden value, in [0, 1).
    """

    def __init__(self, width: int, context: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, width)
        self.project = nn.Linear(context, width)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = zeroed(nn.Linear(width, width))

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """h (B, width), context (B, context) -> (B, width)."""
        hidden = self.linear1(functional.silu(h)) + self.project(functional.silu(context))
        y: Tensor = h + self.linear2(self.dropout(functional.silu(hidden)))
        return y


class MLP(nn.Module):
    """The module that `mlp` makes.

    Args:
        shape: (C, *S) of one sample, the only one that it takes.
        learned_variance: whether the output has 2·C channels.
        context: clock, class and attributes -> (B, D).
        first: (B, C·S) -> (B, width).
        blocks: the residual blocks.
        last: (B, width) -> (B, C·S or 2·C·S).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        learned_variance: bool,
        context: Context,
        first: nn.Linear,
        blocks: list[MLPBlock],
        last: nn.Linear,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.learned_variance = learned_variance
        self.context = context
        self.first = first
        self.blocks = nn.ModuleList(blocks)
        self.last = last

    @property
    def classes(self) -> int:
        """How many classes the net takes; 0 if it takes none."""
        return 0 if self.context.label is None else self.context.label.classes

    def forward(self, x: Tensor, clock: Tensor, cond: Cond | None = None) -> Tensor:
        """The net's answer.

        Args:
            x: (B, C, *S).
            clock: (B,) float32 or float64, the time in the unit that the net was trained with.
            cond: a label and attributes for each row; None for null in every row.

        Returns:
            (B, C, *S); with learned variance (B, 2·C, *S), whose second half is 2·v − 1, v the fraction in [0, 1]
            between log beta-tilde and log beta, not clamped.

        Raises:
            BadShape: x is not (B, C, *S) of the net's own shape, or x, clock and cond differ in rows.
            BadArgument: cond has a field that this net does not take, or a label out of range.
        """
        check_input(x, clock, self.shape, any_size=False)
        context = self.context(clock, cond)
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, context)
        y: Tensor = self.last(functional.silu(h)).unflatten(1, (-1, *self.shape[1:]))
        return y


def mlp(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    attributes: int = 0,
    augmentation: int = 0,
    width: int = 128,
    depth: int = 3,
    dropout: float = 0.0,
    learned_variance: bool = False,
    embedding: Wave = "sinusoidal",
    fourier_scale: float | None = None,
) -> MLP:
    """A residual perceptron for points of a line or a plane, and anything small.

    y = W_out·silu(h_depth) + b, h_0 = W_in·x + b over all numbers of x at once. The last layer of every residual
    branch and of the net starts at zero.

    Args:
        shape: (C, *S) of one sample, of any rank from 1: (2,) for points of the plane.
        classes: how many classes; 0 for a net that takes none.
        attributes: how many continuous attributes; 0 for a net that takes none.
        augmentation: how many numbers say how a picture was augmented; 0 for a net that is not told.
        width: numbers of a hidden layer and of the context; even, at least 4.
        depth: residual blocks, at least 1.
        dropout: the probability of dropping a hidden value, in [0, 1).
        learned_variance: 2·C channels out, the second half for the variance (Improved DDPM).
        embedding: of the time, "sinusoidal" for any clock or "fourier" for a clock of order 1.
        fourier_scale: the standard deviation of the Fourier frequencies, in cycles a unit of clock; 16 if None.

    Raises:
        BadShape: shape is empty or has a side below 1.
        BadArgument: a knob is out of its range.
    """
    if not shape or min(shape) < 1:
        raise BadShape(f"mlp shape: got {tuple(shape)}, need (C, *S) of at least 1 each; try (2,)")
    if width < 4 or width % 2:
        raise BadArgument(f"mlp width: got {width}, need an even number of at least 4")
    if depth < 1:
        raise BadArgument(f"mlp depth: got {depth}, need at least 1")
    if not 0 <= dropout < 1:
        raise BadArgument(f"mlp dropout: got {dropout}, need at least 0 and below 1")
    size = math.prod(shape)
    context = Context(
        width,
        width,
        classes=classes,
        attributes=attributes,
        augmentation=augmentation,
        embedding=embedding,
        fourier_scale=fourier_scale,
    )
    blocks = [MLPBlock(width, width, dropout=dropout) for _ in range(depth)]
    last = zeroed(nn.Linear(width, size * (2 if learned_variance else 1)))
    return MLP(tuple(shape), learned_variance, context, nn.Linear(size, width), blocks, last)
