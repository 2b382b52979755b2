"""InceptionNet: Inception-v3 as TensorFlow's graph of 2015-12-05 has it, under the names of pytorch-fid's weights.

It differs from the published network, and from torchvision's, where that graph does: average pools do not count the
zeros round the image, and the pooling branch of the last block takes the maximum (Heusel et al. 2017 used this graph).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["InceptionNet"]

_Size = int | tuple[int, int]


class Conv(nn.Module):
    """A convolution without bias, batch normalisation and ReLU."""

    def __init__(self, c_in: int, c_out: int, size: _Size, *, stride: int = 1, padding: _Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return functional.relu(self.bn(self.conv(x)))


def _mean_pool(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=1, padding=1)


class MixedA(nn.Module):
    """35 × 35: 1×1, 5×5 and twice 3×3 convolutions, and a mean."""

    def __init__(self, c_in: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(c_in, 64, 1)
        self.branch5x5_1 = Conv(c_in, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(c_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(c_in, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 224 + pooled, H, W)."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_mean_pool(x))], 1)


class MixedB(nn.Module):
    """35 × 35 down to 17 × 17."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(c_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(c_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + 480, H', W')."""
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice, functional.max_pool2d(x, 3, 2)], 1)


class MixedC(nn.Module):
    """17 × 17: 7×7 convolutions as pairs of 1×7 and 7×1, and a mean."""

    def __init__(self, c_in: int, width: int) -> None:
        super().__init__()
        row: tuple[tuple[int, int], tuple[int, int]] = ((1, 7), (0, 3))
        column: tuple[tuple[int, int], tuple[int, int]] = ((7, 1), (3, 0))
        self.branch1x1 = Conv(c_in, 192, 1)
        self.branch7x7_1 = Conv(c_in, width, 1)
        self.branch7x7_2 = Conv(width, width, row[0], padding=row[1])
        self.branch7x7_3 = Conv(width, 192, column[0], padding=column[1])
        self.branch7x7dbl_1 = Conv(c_in, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, column[0], padding=column[1])
        self.branch7x7dbl_3 = Conv(width, width, row[0], padding=row[1])
        self.branch7x7dbl_4 = Conv(width, width, column[0], padding=column[1])
        self.branch7x7dbl_5 = Conv(width, 192, row[0], padding=row[1])
        self.branch_pool = Conv(c_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 768, H, W)."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(_mean_pool(x))], 1)


class MixedD(nn.Module):
    """17 × 17 down to 8 × 8."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(c_in, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(c_in, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + 512, H', W')."""
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, functional.max_pool2d(x, 3, 2)], 1)


class MixedE(nn.Module):
    """8 × 8: 3×3 convolutions split into 1×3 beside 3×1, and a pool: the mean in Mixed_7b, the maximum in Mixed_7c."""

    def __init__(self, c_in: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(c_in, 320, 1)
        self.branch3x3_1 = Conv(c_in, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(c_in, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(c_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2048, H, W)."""
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        split = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        split += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *split, self.branch_pool(self.pool(x))], 1)


class InceptionNet(nn.Module):
    """Inception-v3 for FID: (B, 3, 299, 299), values (v − 128)/128 of v in [0, 255] -> 2,048 features, 1,008 logits.

    Reference: Szegedy et al., "Rethinking the Inception architecture for computer vision", 2016, section 6.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = MixedA(192, 32)
        self.Mixed_5c = MixedA(256, 64)
        self.Mixed_5d = MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, 128)
        self.Mixed_6c = MixedC(768, 160)
        self.Mixed_6d = MixedC(768, 160)
        self.Mixed_6e = MixedC(768, 192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, _mean_pool)
        self.Mixed_7c = MixedE(2048, _max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """The last pooling layer, (B, 2048), of x (B, 3, H, W), H and W ≥ 75."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, 2)
        x = functional.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """The scores of the 1,008 classes without their bias, (B, 1008), as the Inception Score takes them."""
        return features @ self.fc.weight.T
