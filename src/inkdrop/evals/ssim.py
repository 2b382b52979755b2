"""SSIM: how alike two images are in brightness, contrast and structure, window by window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from inkdrop.errors import BadArgument, BadShape

__all__ = ["ssim"]


def ssim(x: Tensor, y: Tensor, *, window: int = 11, sigma: float = 1.5) -> Tensor:
    """The structural similarity of each row, in [-1, 1], 1 where they are equal: (B,).

        SSIM = mean of (2·m_x·m_y + c1)(2·s_xy + c2)/((m_x² + m_y² + c1)(s_x² + s_y² + c2))

    with means m, variances s² and covariance s_xy in a Gaussian window (with 1/1, not 1/(n − 1)), over all windows that
    lie within the image and over the channels, of values shifted to [0, 2]; c1 = (0.01·2)², c2 = (0.03·2)².

    Args:
        x: (B, C, H, W) in [-1, 1], H and W ≥ window.
        y: of the same shape.
        window: its side, odd, ≥ 3.
        sigma: its standard deviation, > 0, in pixels.

    Raises:
        BadShape: other shapes, or images smaller than the window.
        BadArgument: a window that is not odd or below 3, or a sigma that is not above 0.

    Reference:
        Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, eq. 13 to 16.
    """
    if window < 3 or window % 2 == 0 or not sigma > 0:
        raise BadArgument(f"ssim: got window={window}, sigma={sigma:g}, need an odd window of at least 3 and sigma > 0")
    if x.ndim != 4 or x.shape != y.shape or min(x.shape[2:]) < window:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise BadShape(f"ssim: got {shapes}, need twice (B, C, H, W) with H and W at least the window, {window}")
    x, y = x.double() + 1, y.double() + 1
    places = torch.arange(window, dtype=torch.float64, device=x.device) - window // 2
    line = torch.exp(-(places**2) / (2 * sigma**2))
    line = line / line.sum()

    def blur(z: Tensor) -> Tensor:
        c = z.shape[1]
        z = functional.conv2d(z, line.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)
        return functional.conv2d(z, line.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    both = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    each = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return each.flatten(1).mean(1)
