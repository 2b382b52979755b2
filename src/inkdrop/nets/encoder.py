"""Encoder: the down-going half of a U-Net with logits at its end, for classifiers of noisy images."""

from __future__ import annotations

from torch import Tensor, nn

from inkdrop.errors import BadArgument, BadShape
from inkdrop.nets.blocks import Down, ResBlock, norm
from inkdrop.nets.embed import Context, check_input

__all__ = ["Encoder"]


class Encoder(nn.Module):
    """Images and how noisy they are -> logits: residual blocks told the time, halved down to about 4 × 4.

    stem, then a `ResBlock` at each size with a `Down` between two, twice and then four times as many channels; norm,
    silu, the mean over each quarter of the image, and one linear layer. Smooth everywhere (silu, group norm), so that
    its gradient by x is, too.

    It is no denoiser's net: its answer is not of x's shape, so that it is not found among the nets.

    Args:
        shape: (C, H, W), H and W ≥ 4.
        outputs: K, the number of logits.
        width: channels of the first blocks, ≥ 4, even.
        blocks: residual blocks at each size, ≥ 1.
        dropout: in the residual blocks, in [0, 1).

    Raises:
        BadShape: shape is not that of images of at least 4 × 4.
        BadArgument: a number out of its range.

    Reference: Dhariwal & Nichol 2021, section 4 (who pool by attention).
    """

    def __init__(
        self, shape: tuple[int, ...], outputs: int, *, width: int = 32, blocks: int = 1, dropout: float = 0.1
    ) -> None:
        super().__init__()
        _check(shape, outputs, width, blocks, dropout)
        self.shape = tuple(shape)
        self.context = Context(width, 4 * width)
        self.stem = nn.Conv2d(shape[0], width, 3, padding=1)
        body: list[nn.Module] = []
        size, now = min(shape[1:]), width
        for level in range(8):
            wide = width * min(4, 2**level)
            for _ in range(blocks):
                body.append(ResBlock(now, wide, 4 * width, dropout=dropout))
                now = wide
            if size <= 4:
                break
            body.append(Down(now))
            size = -(-size // 2)
        self.body = nn.ModuleList(body)
        self.head = nn.Sequential(
            norm(now), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * now, outputs)
        )

    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        """Logits (B, K) of x (B, C, H, W), each at the time of clock (B,), float32 or float64.

        Raises:
            BadShape: x is not of the shape that it was made for, or clock has another number of rows.
        """
        check_input(x, clock, self.shape, any_size=False)
        context = self.context(clock, None)
        h = self.stem(x)
        for part in self.body:
            h = part(h) if isinstance(part, Down) else part(h, context)
        logits: Tensor = self.head(h)
        return logits


def _check(shape: tuple[int, ...], outputs: int, width: int, blocks: int, dropout: float) -> None:
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise BadShape(f"classifier shape: got {tuple(shape)}, need images (C, H, W) of at least 4 × 4")
    if outputs < 2:
        raise BadArgument(f"classifier: got {outputs} classes, need at least 2 to tell apart")
    if width < 4 or width % 2:
        raise BadArgument(f"classifier width: got {width}, need an even number of at least 4; try 32")
    if blocks < 1:
        raise BadArgument(f"classifier blocks: got {blocks}, need at least 1")
    if not 0 <= dropout < 1:
        raise BadArgument(f"classifier dropout: got {dropout:g}, need a number in [0, 1); try 0.1")
