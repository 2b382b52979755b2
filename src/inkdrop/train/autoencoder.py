"""Train a KL autoencoder and measure its latents."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from inkdrop.codec import Codec, measure, save_codec
from inkdrop.core.dataset import Data
from inkdrop.core.noise import Draw
from inkdrop.errors import BadArgument, BadData, Diverged
from inkdrop.evals.perceptual import FeatureMaps, maps_of, perceptual
from inkdrop.evals.psnr import psnr
from inkdrop.find import Part
from inkdrop.nets.autoencoder import Autoencoder, Moments
from inkdrop.recipe import open_data
from inkdrop.settings import Train
from inkdrop.train.adversary import PatchGAN, adaptive_weight, hinge
from inkdrop.train.ema import Ema
from inkdrop.train.halfway import Halfway
from inkdrop.train.order import learning_rate, rows_of
from inkdrop.train.trainer import device_of

__all__ = ["Against", "fit_autoencoder", "reconstruct"]

Progress = Callable[[int, int, str], None]
Precision: TypeAlias = Literal["float32", "bfloat16"]

_HELD_OUT = 1024  # images at most, over which the reconstruction is judged
_PIXELS = 1 << 17  # of the images that are reconstructed at once


@dataclass(frozen=True)
class Against:
    """What the decoder is measured against, and how much each counts beside the pixels.

    Attributes:
        reconstruction: of pixels, "l1" (absolute) or "mse" (squared differences), averaged.
        kl: the weight of KL(posterior ‖ N(0, 1)), summed over the latent and divided by the image's numbers, ≥ 0.
        perceptual: the weight of the distance in features, ≥ 0; 0 for none.
        features: the feature maps to compare: a function, or "classifier" for a classifier of the same data set.
        adversary: the weight of a patch-GAN over the weight at which it pulls as the rest does, ≥ 0; 0 for none.
        start: the share of the updates after which the adversary counts, in [0, 1); it learns from the first on.

    Raises:
        BadArgument: a number out of its range, or a setting that has no effect.
    """

    reconstruction: Literal["l1", "mse"] = "l1"
    kl: float = 1e-6
    perceptual: float = 0.0
    features: FeatureMaps | Literal["classifier"] | None = None
    adversary: float = 0.0
    start: float = 0.5

    def __post_init__(self) -> None:
        if self.reconstruction not in ("l1", "mse"):
            raise BadArgument(f"autoencoder reconstruction: got {self.reconstruction!r}, need l1 or mse")
        for name in ("kl", "perceptual", "adversary"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadArgument(f"autoencoder {name}: got {getattr(self, name)}, need a number of at least 0")
        if not 0 <= self.start < 1:
            raise BadArgument(f"autoencoder start: got {self.start}, need a share in [0, 1)")
        if (self.perceptual > 0) != (self.features is not None):
            raise BadArgument("autoencoder: a perceptual weight and features go together; give both or neither")


def fit_autoencoder(
    data: Part,
    out: Path | str | None = None,
    *,
    net: Part | None = None,
    steps: int = 3000,
    batch: int = 16,
    lr: float = 1e-3,
    ema: float = 0.995,
    against: Against | None = None,
    precision: Precision = "float32",
    seed: int = 0,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> Codec:
    """Train a KL autoencoder on a data set's images, and measure shift and scale of its latents (R25).

    loss = |x − D(z)| + kl·KL/(C·H·W) + perceptual·distance + λ·adversary·(−mean of the patch-GAN's logits of D(z)),
    z = mean + exp(logvar/2)·noise, λ as in `adaptive_weight`; AdamW, warm-up of a twentieth, cosine decay to 0. Images
    and noise are keyed by (seed, update, place), weights and dropout by the seed. The averaged weights are kept.

    Args:
        data: names the images; their sides must be multiples of the autoencoder's factor.
        out: a new folder to write it to at the end; None writes nothing. The same call goes on with what was stopped,
            from the hidden folder beside it; not with features that are a function.
        net: the autoencoder, in the room "codecs"; autoencoder_small by default.
        steps: updates, ≥ 1.
        batch: images an update, ≥ 1.
        lr: the peak learning rate, > 0.
        ema: the decay of the weights' moving average, in [0, 1).
        against: the terms of the loss; L1 with a kl of 10⁻⁶ by default.
        precision: "bfloat16" runs the layers in it (autocast) while the weights stay float32.
        seed: of weights, order and noise, in [0, 2^63).
        device: "auto", "cpu", "cuda", ...
        on_progress: f(done, total, text).

    Returns:
        The codec, whose card says how well it reconstructs held-out images.

    Raises:
        BadData: samples that are no images, or none at all.
        BadShape: sides that are no multiples of the factor.
        BadArgument: a number out of its range, or a folder that exists.
        Diverged: the loss left the finite numbers.

    Reference: Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2021, section 3.1.
    """
    train = Train(steps=steps, batch=batch, lr=lr, warmup=steps // 20, ema=ema, seed=seed)
    part, against = net or Part("autoencoder_small"), against or Against()
    if precision not in ("float32", "bfloat16"):
        raise BadArgument(f"autoencoder precision: got {precision!r}, need float32 or bfloat16")
    if out is not None and Path(out).exists():
        raise BadArgument(f"{out}: exists already; choose another --out")
    images, held_out, began = open_data(data, "train"), open_data(data, "test"), time.monotonic()
    if len(images.shape) != 3 or not len(images):
        raise BadData(f"autoencoder: {images.source} gives {len(images)} samples of {images.shape}, need images")
    torch.manual_seed(seed)
    codec = Codec(part, images.shape).to(device_of(device))
    fit = _Fit(codec.autoencoder, images, held_out, train, against, precision)
    named = not callable(against.features)  # what an unnamed function says cannot be known again
    about = {"data": images.fingerprint, "net": asdict(part), "train": asdict(train), "precision": precision}
    halfway = Halfway(out if named else None, {**about, "against": asdict(against) if named else None})
    fit.run(halfway, on_progress)
    shift, scale = measure(fit.ema.net, images)
    made = Codec(part, images.shape, shift, scale, net=fit.ema.net).eval().requires_grad_(False)
    made.card |= _card(made, images, held_out, train, against)
    made.card["hours"] = round((halfway.seconds + time.monotonic() - began) / 3600, 4)
    made.to(codec.shift.device)
    if out is not None:
        save_codec(made, out)
        halfway.drop()
    return made


class _Fit:
    """The updates."""

    ema: Any

    def __init__(
        self, net: Autoencoder, images: Data, held_out: Data, train: Train, against: Against, precision: Precision
    ) -> None:
        self.net, self.images, self.train, self.against = net, images, train, against
        self.device = next(net.parameters()).device
        self.half = precision == "bfloat16"
        self.ema = Ema(net, train.ema)
        self.optimiser = _adamw(net, train.lr, train.betas)
        self.features = _features(against, images, held_out, self.device)
        self.critic: PatchGAN | None = None
        if against.adversary:
            self.critic = _critic(images.shape).to(self.device)
            self.against_critic = _adamw(self.critic, train.lr, (0.5, 0.9))
        self.starts = round(against.start * train.steps)

    def run(self, halfway: Halfway, on_progress: Progress | None) -> None:
        """All updates that are not done; the averaged net is in `ema.net`."""
        self.net.train()
        critic: dict[str, nn.Module | torch.optim.Optimizer] = {}
        if self.critic is not None:
            critic = {"critic": self.critic, "against_critic": self.against_critic}
        with halfway.running(net=self.net, ema=self.ema.net, optimiser=self.optimiser, **critic) as done:
            self._go_on(done, halfway, on_progress)

    def _go_on(self, done: int, halfway: Halfway, on_progress: Progress | None) -> None:
        for update in range(done, self.train.steps):
            x = self.images.take(rows_of(update, self.train.batch, len(self.images), self.train.seed))[0]
            torch.manual_seed((self.train.seed * 1_000_003 + update) % 2**63)  # nn.Dropout has no other key
            with halfway.update(update):
                facts = self.step(update, x.to(self.device))
            if on_progress is not None and ((update + 1) % 10 == 0 or update + 1 == self.train.steps):
                shown = ", ".join(f"{name} {float(value):.4g}" for name, value in facts.items())
                on_progress(update + 1, self.train.steps, shown)

    def step(self, update: int, x: Tensor) -> dict[str, Tensor]:
        """One update of the autoencoder, and one of its adversary if it has one."""
        draw = Draw(self.train.seed, update, range(len(x)))
        noise = draw.normal((len(x), self.net.latent_shape[0], *(s // self.net.factor for s in x.shape[2:])))
        rate = learning_rate(update, self.train)
        with self._cast():
            y, moments = self.net(x, noise.to(self.device))
        y, moments = y.float(), Moments(moments.mean.float(), moments.logvar.float())
        facts = self._terms(x, y, moments)
        loss = facts["loss"]
        if self.critic is not None and update >= self.starts:
            with self._cast():
                fooled = -self.critic(y).float().mean()
            weight = adaptive_weight(facts["loss"], fooled, self.net.decoder.get_parameter("head.2.weight"))
            facts["fooled"], loss = fooled.detach(), loss + self.against.adversary * weight * fooled
        if not bool(loss.isfinite()):
            raise Diverged(f"autoencoder: the loss is not finite at update {update}; lower the learning rate")
        _update(self.optimiser, loss, self.net, rate, self.train.clip_grad)
        self.ema.update(self.net, update)
        if self.critic is not None:
            with self._cast():
                lost = hinge(self.critic(x).float(), self.critic(y.detach()).float())
            _update(self.against_critic, lost, self.critic, rate, self.train.clip_grad)
            facts["critic"] = lost.detach()
        return {name: value.detach() for name, value in facts.items()}

    def _terms(self, x: Tensor, y: Tensor, moments: Moments) -> dict[str, Tensor]:
        """The loss without adversary, and its terms, each averaged over the rows."""
        gap = x - y
        facts = {
            "pixels": gap.abs().mean() if self.against.reconstruction == "l1" else gap.square().mean(),
            "kl": moments.kl().mean(),
        }
        loss = facts["pixels"] + self.against.kl * facts["kl"] / math.prod(x.shape[1:])
        if self.features is not None:
            facts["perceptual"] = perceptual(self.features, x, y).mean()
            loss = loss + self.against.perceptual * facts["perceptual"]
        return {"loss": loss, **facts}

    def _cast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.half else contextlib.nullcontext()


def _adamw(net: nn.Module, lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), lr=lr, betas=betas, weight_decay=0.0, fused=True)


def _update(optimiser: torch.optim.Optimizer, loss: Tensor, net: nn.Module, rate: float, most: float) -> None:
    """One step down the loss's gradient, at most so long, at this rate."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), most)
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()


def _features(against: Against, images: Data, held_out: Data, device: torch.device) -> FeatureMaps | None:
    """The feature maps of the perceptual term, or None."""
    if against.features != "classifier":
        return against.features
    from inkdrop.evals.classifier import classifier

    return maps_of(classifier(images, held_out).net.body.to(device))


def _critic(shape: tuple[int, ...]) -> PatchGAN:
    """A patch-GAN as deep as the images allow: 3 from 32 pixels on, as in the paper."""
    side = min(shape[1:])
    if side < 8:
        raise BadArgument(f"autoencoder adversary: got images of {side} pixels, need at least 8; leave it out")
    return PatchGAN(shape[0], width=64 if side >= 128 else 32, depth=min(3, int(math.log2(side / 4))))


@torch.no_grad()
def reconstruct(codec: Codec, x: Tensor) -> Tensor:
    """Images (B, C, H, W) encoded, decoded and clipped to [-1, 1], a few at a time, on the CPU."""
    device, step = codec.shift.device, _rows(x.shape[1:])
    return torch.cat([codec.decode(codec.encode(part.to(device))).clamp(-1, 1).cpu() for part in x.split(step)])


def _rows(shape: Sequence[int]) -> int:
    return max(1, _PIXELS // math.prod(shape[1:]))


@torch.no_grad()
def _card(made: Codec, images: Data, held_out: Data, train: Train, against: Against) -> dict[str, Any]:
    """How it was trained, how well it reconstructs held-out images, and what its latents of them are like."""
    rows = range(min(_HELD_OUT, len(held_out)))
    ratios, latents, kl = [], [], 0.0
    step = _rows(images.shape)
    for first in range(0, len(rows), step):
        x = held_out.take(rows[first : first + step])[0]
        ratios.append(psnr(x, reconstruct(made, x)))
        moments = made.autoencoder.encode(x.to(made.shift.device))
        kl += float(moments.kl().sum()) / len(rows)
        latents.append(made.encode(x.to(made.shift.device)).cpu())
    ratio, z = torch.cat(ratios), torch.cat(latents)
    features = against.features if isinstance(against.features, str | None) else "given"
    return {
        "data": images.source,
        "fingerprint": images.fingerprint,
        "samples": len(images),
        "updates": train.steps,
        "batch": train.batch,
        "lr": train.lr,
        "seed": train.seed,
        "parameters": sum(p.numel() for p in made.parameters()),
        "reconstruction": against.reconstruction,
        "kl_weight": against.kl,
        "perceptual": [against.perceptual, features],
        "adversary": against.adversary,
        "shift": [round(v, 6) for v in made.shift.tolist()],
        "scale": [round(v, 6) for v in made.scale.tolist()],
        "held_out": len(rows),
        "psnr_db": round(float(ratio.mean()), 3),
        "psnr_least_db": round(float(ratio.min()), 3),
        "kl_nats": round(kl, 2),
        "latent_std": round(float(z.std()), 4),
        "latent_std_by_channel": [round(v, 4) for v in z.transpose(0, 1).flatten(1).std(dim=1).tolist()],
    }
