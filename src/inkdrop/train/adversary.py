"""What an autoencoder is trained against besides the pixels: a discriminator of patches, and distances of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from inkdrop.errors import BadArgument
from inkdrop.nets.blocks import norm

__all__ = ["FeatureMaps", "PatchGAN", "adaptive_weight", "hinge", "maps_of", "perceptual"]

FeatureMaps: TypeAlias = Callable[[Tensor], Sequence[Tensor]]
"""Images (B, C, H, W) in [-1, 1] -> features (B, D) or feature maps (B, D, h, w), one or more, differentiable."""

_SLOPE = 0.2


class PatchGAN(nn.Module):
    """A convolutional discriminator: is each patch of the image real? Logits (B, 1, h, w), real above 0.

    `depth` convolutions 4×4 of stride 2, one of stride 1 and the logits', so that a logit sees 70×70 pixels at a
    depth of 3, 34×34 at 2 and 16×16 at 1. Group normalisation stands where the paper has batch normalisation, so that
    rows do not see one another.

    Args:
        channels: C.
        width: channels of the first layer, ≥ 1; doubled at each layer, up to 8 times.
        depth: layers of stride 2, ≥ 1.

    Raises:
        BadArgument: width or depth below 1.

    Reference: Isola et al. 2017, section 3.2.2 and appendix 6.1.2.
    """

    def __init__(self, channels: int, *, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise BadArgument(f"patch-GAN: got width {width} and depth {depth}, need at least 1 of each")
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(_SLOPE)]
        now = width
        for level in range(1, depth + 1):
            out = width * min(8, 2**level)
            layers += [nn.Conv2d(now, out, 4, 2 if level < depth else 1, 1), norm(out), nn.LeakyReLU(_SLOPE)]
            now = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(now, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, 1, h, w)."""
        logits: Tensor = self.layers(x)
        return logits


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, ½·(mean max(0, 1 − real) + mean max(0, 1 + fake)), of logits of any shape.

    Reference: Lim & Ye 2017, eq. 4; the half as in VQGAN's code.
    """
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """How much the adversary counts, so that both losses pull alike at the decoder's last layer.

    ‖∇reconstruction‖/(‖∇adversarial‖ + 10⁻⁴), at most 10⁴, the gradients by `last`; without a graph of its own.

    Args:
        reconstruction: 0-dim, with its graph.
        adversarial: 0-dim, with its graph.
        last: the weight of the decoder's last layer.

    Reference: Esser et al. 2021, eq. 7.
    """
    [one] = torch.autograd.grad(reconstruction, last, retain_graph=True)
    [other] = torch.autograd.grad(adversarial, last, retain_graph=True)
    weight: Tensor = (one.norm() / (other.norm() + 1e-4)).clamp(max=1e4)
    return weight.detach()


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
