"""Perceptual: the distance of two images in the feature maps of any net, as LPIPS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from inkdrop.errors import BadArgument

__all__ = ["FeatureMaps", "maps_of", "perceptual"]

FeatureMaps: TypeAlias = Callable[[Tensor], Sequence[Tensor]]
"""Images (B, C, H, W) in [-1, 1] -> features (B, D) or feature maps (B, D, h, w), one or more, differentiable."""


def perceptual(features: FeatureMaps, x: Tensor, y: Tensor) -> Tensor:
    """The distance of two images in the features of a net, of each row: (B,), ≥ 0.

    Each map is divided by its length across the channels at each place; squared differences are summed over the
    channels, averaged over the places, and summed over the maps: LPIPS with all its weights 1.

    Args:
        features: of the net.
        x: (B, C, H, W).
        y: (B, C, H, W).

    Reference: Zhang et al. 2018, eq. 1.
    """
    total = x.new_zeros(len(x))
    for a, b in zip(features(x), features(y), strict=True):
        gap = functional.normalize(a.flatten(2) if a.ndim > 2 else a[:, :, None], dim=1)
        gap = gap - functional.normalize(b.flatten(2) if b.ndim > 2 else b[:, :, None], dim=1)
        total = total + gap.square().sum(dim=1).mean(dim=1)
    return total


def maps_of(layers: nn.Sequential) -> FeatureMaps:
    """The feature maps of a stack of layers: what each of its ReLUs gives.

    Args:
        layers: run one after the other, frozen and in evaluation mode.

    Raises:
        BadArgument: there is no ReLU among them.
    """
    if not any(isinstance(layer, nn.ReLU) for layer in layers):
        raise BadArgument("perceptual: these layers have no ReLU; give a function that returns feature maps")

    def run(x: Tensor) -> Sequence[Tensor]:
        found = []
        for layer in layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found

    return run
