"""What an autoencoder is trained against besides pixels and features: a discriminator of patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from inkdrop.errors import BadArgument
from inkdrop.nets.blocks import norm

__all__ = ["PatchGAN", "adaptive_weight", "hinge"]

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
