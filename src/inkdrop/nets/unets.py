"""U-Nets of known sizes: calls of `unet`, each named by what it was made for."""

from __future__ import annotations

from typing import Any

from inkdrop.nets.unet import UNet, unet

__all__ = [
    "unet_adm64",
    "unet_adm256",
    "unet_cifar10",
    "unet_digits",
    "unet_latent",
    "unet_mnist",
    "unet_sd15",
    "unet_text",
    "unet_tiny",
]


def unet_tiny(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    augmentation: int = 0,
    coordinates: int = 0,
    width: int = 16,
    dropout: float = 0.0,
    learned_variance: bool = False,
) -> UNet:
    """A two-level U-Net of 0.2 M parameters that sees 2×2 pixels as one, for drawn shapes and first tries."""
    return unet(
        shape,
        classes=classes,
        augmentation=augmentation,
        coordinates=coordinates,
        width=width,
        multipliers=(1, 2),
        blocks=1,
        dropout=dropout,
        learned_variance=learned_variance,
        patch=2,
    )


def unet_digits(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    augmentation: int = 0,
    coordinates: int = 0,
    width: int = 16,
    dropout: float = 0.0,
    learned_variance: bool = False,
) -> UNet:
    """A two-level U-Net of 0.2 M parameters for 8×8 digits, trained in about a minute on two CPU cores."""
    return unet(
        shape,
        classes=classes,
        augmentation=augmentation,
        coordinates=coordinates,
        width=width,
        multipliers=(1, 2),
        blocks=1,
        dropout=dropout,
        learned_variance=learned_variance,
    )


def unet_mnist(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    augmentation: int = 0,
    coordinates: int = 0,
    width: int = 24,
    dropout: float = 0.0,
    learned_variance: bool = False,
) -> UNet:
    """A three-level U-Net of 1.5 M parameters that sees 2×2 pixels as one, for 28×28 digits on a CPU."""
    return unet(
        shape,
        classes=classes,
        augmentation=augmentation,
        coordinates=coordinates,
        width=width,
        multipliers=(1, 2, 4),
        blocks=1,
        dropout=dropout,
        learned_variance=learned_variance,
        patch=2,
    )


def unet_cifar10(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    augmentation: int = 0,
    dropout: float = 0.1,
    learned_variance: bool = False,
) -> UNet:
    """The CIFAR-10 net of DDPM: 35.7 M parameters, attention at half size, time added, a single head.

    Reference: Ho et al. 2020, appendix B.
    """
    return unet(
        shape,
        classes=classes,
        augmentation=augmentation,
        width=128,
        multipliers=(1, 2, 2, 2),
        attention=(1,),
        dropout=dropout,
        scale_shift=False,
        learned_variance=learned_variance,
    )


def unet_text(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    attributes: int = 0,
    vocabulary: int = 0,
    features: int = 0,
    length: int = 0,
    image: int = 0,
    augmentation: int = 0,
    coordinates: int = 0,
    augment: bool = False,
    width: int = 32,
    dropout: float = 0.0,
    norm_groups: int | None = None,
    learned_variance: bool = False,
) -> UNet:
    """A three-level U-Net of 2.0 M parameters that reads a text at quarter size, for 32 to 64 pixels on a CPU.

    It sees 2×2 pixels as one. Words are 4·width numbers, of an encoder of its own for tokens (vocabulary), or made of
    given embeddings (features).
    """
    return unet(
        shape,
        classes=classes,
        attributes=attributes,
        vocabulary=vocabulary,
        features=features,
        length=length,
        image=image,
        augmentation=augmentation,
        coordinates=coordinates,
        augment=augment,
        width=width,
        multipliers=(1, 2, 2),
        blocks=1,
        cross=(2,),
        head_width=width,
        dropout=dropout,
        norm_groups=norm_groups,
        learned_variance=learned_variance,
        patch=2,
        text_width=4 * width if vocabulary or features else None,
    )


def unet_latent(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    attributes: int = 0,
    vocabulary: int = 0,
    features: int = 0,
    length: int = 0,
    image: int = 0,
    augment: bool = False,
    width: int = 64,
    dropout: float = 0.0,
    norm_groups: int | None = None,
    learned_variance: bool = False,
) -> UNet:
    """A three-level U-Net of 5.0 M parameters for latents of some 16×16, with attention at half and quarter size.

    Where there is a text (vocabulary or features), spatial transformers read it at those two sizes: 7.6 M parameters.
    """
    reads = bool(vocabulary or features)
    return unet(
        shape,
        classes=classes,
        attributes=attributes,
        vocabulary=vocabulary,
        features=features,
        length=length,
        image=image,
        augment=augment,
        width=width,
        multipliers=(1, 2, 2),
        blocks=1,
        attention=() if reads else (1, 2),
        cross=(1, 2) if reads else (),
        head_width=width // 2,
        dropout=dropout,
        norm_groups=norm_groups,
        learned_variance=learned_variance,
        text_width=2 * width if reads else None,
    )


def unet_adm64(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    dropout: float = 0.1,
    learned_variance: bool = True,
    checkpoint: bool = False,
) -> UNet:
    """ADM's net for ImageNet at 64×64: 296 M parameters with its 1,000 classes, attention at 32, 16 and 8 pixels.

    Reference: Dhariwal & Nichol 2021, the table of hyperparameters in its appendix.
    """
    return _adm(
        shape,
        classes=classes,
        width=192,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        attention=(1, 2, 3),
        dropout=dropout,
        learned_variance=learned_variance,
        checkpoint=checkpoint,
    )


def unet_adm256(
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    dropout: float = 0.0,
    learned_variance: bool = True,
    checkpoint: bool = False,
) -> UNet:
    """ADM's net for ImageNet at 256×256: 554 M parameters with its 1,000 classes, attention at 32, 16 and 8 pixels.

    Reference: Dhariwal & Nichol 2021, the table of hyperparameters in its appendix.
    """
    return _adm(
        shape,
        classes=classes,
        width=256,
        multipliers=(1, 1, 2, 2, 4, 4),
        blocks=2,
        attention=(3, 4, 5),
        dropout=dropout,
        learned_variance=learned_variance,
        checkpoint=checkpoint,
    )


def unet_sd15(
    shape: tuple[int, ...], *, features: int = 768, length: int = 77, image: int = 0, checkpoint: bool = False
) -> UNet:
    """Stable Diffusion 1's net for latents of four channels, which reads 77 embeddings of CLIP: 860 M parameters.

    With image=5 it is that of the inpainting model (a mask, and the latents of what is kept).

    Reference: Rombach et al. 2022, appendix E.2.
    """
    return unet(
        shape,
        features=features,
        length=length,
        image=image,
        width=320,
        multipliers=(1, 2, 4, 4),
        cross=(0, 1, 2),
        heads=(8,),
        scale_shift=False,
        symmetric=True,
        norm_groups=32,
        norm_eps=1e-5,
        shift=0.0,
        cos_first=True,
        pooled=False,
        checkpoint=checkpoint,
    )


def _adm(shape: tuple[int, ...], **given: Any) -> UNet:
    """What the nets of ADM share: residual resampling, heads of 64 channels, scale-shift, OpenAI's sinusoid."""
    return unet(
        shape, head_width=64, resample="residual", norm_groups=32, norm_eps=1e-5, shift=0.0, cos_first=True, **given
    )
