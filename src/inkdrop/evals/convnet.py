"""ConvNet: the network of the classifier, for images of any size from 4 × 4 on."""

from __future__ import annotations

import math

from torch import Tensor, nn

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """Strided 3 × 3 convolutions down to about 4 × 4, pooled to 3 × 3, a hidden layer, and logits.

    Images larger than 32 pixels enter through one convolution of stride s = ⌈longest side/32⌉ and kernel 2s + 1:
    nothing is resized. Every layer but the last is followed by batch normalisation and ReLU, so features are ≥ 0. In
    evaluation mode rows do not see one another.

    Args:
        shape: (C, H, W), H and W ≥ 4.
        classes: K, the number of logits.
        dim: D, the length of the hidden layer.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, dim: int) -> None:
        super().__init__()
        c, h, w = shape
        stride = -(-max(h, w) // 32)
        h, w = -(-h // stride), -(-w // stride)
        halvings = max(0, int(math.log2(min(h, w) / 4)))
        width = max(16, 64 >> halvings)
        layers = _layer(c, width, 3 if stride == 1 else 2 * stride + 1, stride)
        for _ in range(halvings):
            layers += _layer(width, min(2 * width, 64), 3, 2)
            width, h, w = min(2 * width, 64), -(-h // 2), -(-w // 2)
        layers += _layer(width, width, 3, 1)
        pool = min(h, 3), min(w, 3)
        layers += [nn.AdaptiveAvgPool2d(pool), nn.Flatten()]
        layers += [nn.Linear(width * pool[0] * pool[1], dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU()]
        self.body, self.drop, self.head = nn.Sequential(*layers), nn.Dropout(0.2), nn.Linear(dim, classes)

    def features(self, x: Tensor) -> Tensor:
        """The hidden layer (B, D), ≥ 0, of x (B, C, H, W)."""
        hidden: Tensor = self.body(x)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of x (B, C, H, W)."""
        logits: Tensor = self.head(self.drop(self.body(x)))
        return logits


def _layer(c_in: int, c_out: int, size: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
