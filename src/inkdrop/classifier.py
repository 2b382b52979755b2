"""Classifier: p(y | x_t), the class of a noisy image, answering questions as the denoiser that guides towards it.

    PATH/
        classifier.json             what it is, the sha256 of the weights, and its own
        classifier.safetensors      the weights

`train.classifier.fit_classifier` makes one; `with_parts` gives it to a bundle, and `guide.classifier` asks it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from inkdrop.bundle import Bundle
from inkdrop.core.ask import Ask, Belief
from inkdrop.core.level import Level
from inkdrop.core.schedule import Schedule
from inkdrop.errors import BadArgument, BadCheckpoint, InkdropError
from inkdrop.files import load_weights, write_folder
from inkdrop.find import Part, build
from inkdrop.model import state_shape
from inkdrop.nets.encoder import Encoder

__all__ = ["NoisyClassifier", "load_classifier", "save_classifier", "with_parts"]

CARD, WEIGHTS = "classifier.json", "classifier.safetensors"
FORMAT = "inkdrop-classifier-1"


class NoisyClassifier(nn.Module):
    """A classifier p(y|x_t) of noisy images: the denoiser whose score is ∇ log p(y|x_t).

    It hears x/√(alpha² + sigma²) and 1000·t, whatever the clock of the net that it guides.

    Args:
        schedule: whose levels it was trained on.
        shape: (C, H, W) of an image.
        classes: class names, in the order of the logits.
        knobs: of the Encoder: width, blocks, dropout.
        card: how it was trained and how often it is right; plain JSON.
    """

    def __init__(
        self,
        schedule: Part,
        shape: tuple[int, ...],
        classes: tuple[str, ...],
        knobs: dict[str, Any],
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.part, self.shape, self.classes = schedule, tuple(shape), tuple(classes)
        self.knobs, self.card = knobs, card or {}
        self.schedule: Schedule = build("schedules", schedule)
        self.net = Encoder(self.shape, len(classes), **knobs)

    def logits(self, x: Tensor, level: Level) -> Tensor:
        """log p(y|x_t) but for a constant: (B, K) in the weights' dtype, of x (B, C, H, W) at 0-dim or (B,) levels."""
        level = level.rows(len(x)) if level.alpha.ndim == 0 else level
        weight = self.net.stem.weight
        scale = (level.alpha**2 + level.sigma**2).rsqrt().to(x.device, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        logits: Tensor = self.net((scale * x).to(weight.dtype), (1000 * level.t).to(weight.device, torch.float32))
        return logits

    def forward(self, ask: Ask) -> Belief:
        """The belief whose score is that of the class: eps = −sigma·∇ log p(y|x_t), x0 = (x + sigma²·∇ log p)/alpha.

        Rows whose class is null have no score, and eps = 0. Its pull is exact, by a second derivative.

        Args:
            ask: x (B, C, H, W), a level with signal, and the class of each row in cond.label.

        Raises:
            BadArgument: no class, one outside of those it knows, or alpha = 0.
        """
        if ask.cond is None or ask.cond.label is None:
            raise BadArgument("classifier: got a question without a class; give every row a label")
        label, asked = ask.cond.label, ~ask.cond.null_rows("label")
        if bool(((label < 0) | (label >= len(self.classes))).any()):
            raise BadArgument(f"classifier: got a class outside [0, {len(self.classes) - 1}]")
        if bool((ask.level.alpha == 0).any()):
            raise BadArgument("classifier: got a level without signal (alpha = 0), which tells nothing of a class")
        level = ask.level.over(ask.x)
        with torch.enable_grad():
            x = ask.x.detach().requires_grad_()
            right = self.logits(x, ask.level).log_softmax(1).gather(1, label[:, None])[asked]
            [score] = torch.autograd.grad(right.sum(), x, create_graph=ask.pull)
            x0 = (x + level.sigma**2 * score) / level.alpha
        pull = (lambda g: torch.autograd.grad(x0, x, g, retain_graph=True)[0]) if ask.pull else None
        return Belief(x0.detach(), (-level.sigma * score).detach(), pull=pull)


def _sha256(record: dict[str, Any]) -> str:
    """The hash of a card's content but for its own."""
    content = json.dumps({name: value for name, value in record.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def save_classifier(made: NoisyClassifier, path: Path | str) -> None:
    """Write a classifier as a new folder, whole or not at all.

    Raises:
        BadArgument: the folder exists or cannot be written, or a weight is not finite.
    """
    weights = {name: t.detach().cpu().contiguous() for name, t in made.net.state_dict().items()}
    if not all(bool(t.isfinite().all()) for t in weights.values()):
        raise BadArgument("classifier: a weight is not finite; nothing was saved")
    data = save(weights)
    record = {
        "format": FORMAT,
        "schedule": {"name": made.part.name, "knobs": made.part.knobs},
        "shape": list(made.shape),
        "classes": list(made.classes),
        "net": made.knobs,
        "card": made.card,
        "weights": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps({**record, "sha256": _sha256(record)}, indent=1, allow_nan=False) + "\n"
    write_folder(Path(path), {WEIGHTS: lambda p: _write(p, data), CARD: lambda p: _write(p, text.encode())})


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def load_classifier(path: Path | str, *, trust: bool = False, device: str = "cpu") -> NoisyClassifier:
    """Read a classifier's folder.

    Args:
        path: the folder.
        trust: allow a schedule named "my.module:thing", whose import runs its code.
        device: where the net goes.

    Raises:
        BadCheckpoint: a file is missing, foreign or corrupt, or names code outside inkdrop without trust.
    """
    folder = Path(path)
    if not (folder / CARD).is_file():
        raise BadCheckpoint(f"{folder}: is no classifier (it has no {CARD}); make one with: inkdrop classifier RUN")
    try:
        record = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise BadCheckpoint(f"{folder / CARD}: is not of the format {FORMAT}")
        if record["sha256"] != _sha256(record):
            raise BadCheckpoint(f"{folder / CARD}: is corrupt (its sha256 is not the recorded one); train it again")
        data = (folder / WEIGHTS).read_bytes()
        if record["weights"] != hashlib.sha256(data).hexdigest():
            raise BadCheckpoint(f"{folder / WEIGHTS}: is corrupt (its sha256 is not the recorded one); train it again")
        part = Part(**record["schedule"])
        foreign = [v for v in (part.name, *part.knobs.values()) if isinstance(v, str) and ":" in v]
        if foreign and not trust:
            raise BadCheckpoint(
                f"{folder}: would import {foreign[0]}, code outside inkdrop; "
                "load it with trust=True (--trust) if you trust it"
            )
        made = NoisyClassifier(part, tuple(record["shape"]), tuple(record["classes"]), record["net"], record["card"])
    except BadCheckpoint:
        raise
    except (OSError, ValueError, KeyError, TypeError, InkdropError) as error:
        raise BadCheckpoint(f"{folder}: cannot be read as a classifier ({error}); train it again") from None
    load_weights(made.net, folder / WEIGHTS)
    return made.to(device).eval().requires_grad_(False)


def with_parts(bundle: Bundle, *, weak: Bundle | None = None, classifier: NoisyClassifier | None = None) -> Bundle:
    """The bundle with a weak net for autoguidance, or a classifier for classifier guidance, or both.

    Args:
        bundle: the model.
        weak: a weaker model of the same data: an early checkpoint, or a smaller net.
        classifier: of its noisy images.

    Returns:
        Another bundle, whose card says what its parts are.

    Raises:
        BadArgument: a part of other shape, conditions, latents or noise levels.
    """
    parts, card = dict(bundle.parts), dict(bundle.card)
    if weak is not None:
        _check_part("weak", bundle, state_shape(weak), weak.classes, weak.schedule)
        _check_told(bundle, weak)
        parts["weak"], card["weak"] = weak.denoiser, weak.card
    if classifier is not None:
        _check_part("classifier", bundle, classifier.shape, classifier.classes, classifier.schedule)
        parts["classifier"], card["classifier"] = classifier, classifier.card
    return replace(bundle, parts=parts, card=card)


def _check_told(bundle: Bundle, weak: Bundle) -> None:
    """Refuse a weak net that is told, or works on, something else than the model: it is asked the model's questions."""

    def facts(of: Bundle) -> dict[str, Any]:
        texts = None if of.reader is None else (of.recipe.text, of.reader.files())
        codec = None if of.codec is None else of.codec.hash
        return {"latents": codec, "texts": texts, "attributes": of.attributes, "pictures": of.recipe.image}

    theirs = facts(weak)
    for name, mine in facts(bundle).items():
        if mine != theirs[name]:
            raise BadArgument(f"weak: was trained with other {name} than the model; need the same")


def _check_part(
    what: str, bundle: Bundle, shape: tuple[int, ...], classes: tuple[str, ...], schedule: Schedule
) -> None:
    """Refuse a part that answers about other samples, classes or noise levels than the model asks about."""
    if shape != state_shape(bundle):
        made = "makes" if bundle.codec is None else "works on latents of"
        raise BadArgument(f"{what}: made for samples of shape {shape}, but the model {made} {state_shape(bundle)}")
    if classes != bundle.classes:
        theirs, ours = (f"{len(names)} ({', '.join(names)})" for names in (classes, bundle.classes))
        raise BadArgument(f"{what}: knows {theirs} classes, the model {ours}; need the same in the same order")
    mine, least = bundle.schedule, max(bundle.schedule.least, schedule.least)
    times = least + (1 - least) * torch.linspace(0, 1, 65, dtype=torch.float64)
    same = mine.steps == schedule.steps and all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(mine(times), schedule(times), strict=True)
    )
    if not same:
        raise BadArgument(f"{what}: was trained with another noise schedule than the model; need the same")
