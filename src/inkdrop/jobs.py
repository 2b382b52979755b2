"""The work behind the commands: open a model, draw samples and write them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from inkdrop import picture
from inkdrop.bundle import Bundle, load
from inkdrop.classifier import load_classifier, with_parts
from inkdrop.condition import Told, class_of, cond_of
from inkdrop.core.ask import Ask, Belief
from inkdrop.core.cond import Cond
from inkdrop.drive import watch
from inkdrop.errors import BadArgument, UnknownName
from inkdrop.files import refuse_folder, replace_folder, weights_hash
from inkdrop.find import Part, names, parse
from inkdrop.generate import plan_of, sample_shared
from inkdrop.model import state_shape
from inkdrop.parallel import ranks
from inkdrop.plan import Plan, change, grid_of, needs_of, sampling
from inkdrop.recipe import dump, set_knobs, valid, with_knob
from inkdrop.said import Said, each, told_of
from inkdrop.train.record import write_atomically
from inkdrop.train.trainer import device_of

if TYPE_CHECKING:
    from inkdrop.screen import Screen
    from inkdrop.train.autoencoder import Against

__all__ = [
    "asks_of",
    "autoencoder_parts",
    "draw",
    "guided_asks_of",
    "open_bundle",
    "with_plan",
    "write_figures",
    "write_samples",
]

SAMPLING_SLOTS = ("sampler", "grid", "combine", "plan")

GUIDES = {"weak": "autoguidance", "classifier": "classifier"}
"""Which guide a part is for, where the plan has none that asks it."""


def open_bundle(
    checkpoint: Path,
    weights: str,
    trust: bool,
    device: str,
    weak: Path | None = None,
    classifier: Path | None = None,
) -> Bundle:
    """Load a checkpoint onto a device, and what is to guide it.

    Args:
        checkpoint: a run, or a checkpoint in it.
        weights: "ema" or "raw".
        trust: allow code from outside inkdrop.
        device: "auto", "cpu", "cuda", ...
        weak: a weaker run or checkpoint of the same data, for autoguidance; its weights are the averaged ones.
        classifier: the folder of a classifier of noisy images, for classifier guidance.
    """
    kind, where = cast(Literal["ema", "raw"], weights), str(device_of(device, ranks()))
    bundle = load(checkpoint, weights=kind, trust=trust, device=where)
    return with_parts(
        bundle,
        weak=None if weak is None else load(weak, trust=trust, device=where),
        classifier=None if classifier is None else load_classifier(classifier, trust=trust, device=where),
    )


def with_plan(bundle: Bundle, changes: Mapping[str, Any], settings: Iterable[str]) -> Bundle:
    """The bundle with another way of sampling; a weak net or a classifier that it was given brings its guide along.

    Args:
        bundle: the model.
        changes: of `plan.change`: sampler, steps, grid, guidance, ...; None where nothing was said.
        settings: "sampler.eta=0.5" and the like; cfg.negative may be a class's name.

    Raises:
        BadArgument: a setting that is not about sampling, or guides that do not go together.
        UnknownName: no such class.
    """
    plan = change(bundle.plan, **changes)
    for part, guide in GUIDES.items():
        if part in bundle.parts and part not in needs_of(plan):
            plan = change(plan, guide=[guide])
    slots = (*SAMPLING_SLOTS, *(p.name for p in plan.guide))
    wanted = [_numbered(text, bundle.classes) for text in settings]
    for text in wanted:
        slot = text.partition("=")[0].partition(".")[0].strip()
        if slot == "nll":
            raise BadArgument(f"--set: got {text!r}, which goes with eval --nll alone")
        if slot not in slots:
            raise BadArgument(
                f"--set: got {text!r}, but of a trained model only {', '.join(slots)} can change; "
                + (f"add --guide {slot} first" if slot in names("guide") else "train anew to change more")
            )
    changed = replace(bundle, recipe=set_knobs(replace(bundle.recipe, plan=plan), wanted))
    plan_of(changed, None, {})
    return changed


def _numbered(text: str, classes: tuple[str, ...]) -> str:
    """A setting whose class to steer away from is a number, as its knob takes it, also where it was a name."""
    path, sign, value = text.partition("=")
    if path.strip() != "cfg.negative" or not classes or parse(value.strip()) is None:
        return text
    return f"{path}{sign}{class_of(value.strip(), classes, 'cfg negative')}"


def asks_of(bundle: Bundle) -> int:
    """How many questions the plan's sampler has for a sample: counted, by running it on nothing."""
    return len(_asked(bundle, replace(bundle.plan, guide=())))


def guided_asks_of(bundle: Bundle) -> int:
    """How many rows the nets are asked about for a sample, guidance included: what it costs, and the NFE of papers.

    Where cfg, autoguidance or a classifier guides, two for each question of the sampler.
    """
    return sum(_asked(bundle, bundle.plan))


def _asked(bundle: Bundle, plan: Plan) -> list[int]:
    """The rows of each question that one sample costs."""
    channels, *sides = state_shape(bundle)
    nothing, rows = torch.zeros(1, channels, *(2 for _ in sides)), list[int]()

    def hear(ask: Ask) -> Belief:
        rows.append(len(ask.x))
        zero = torch.zeros_like(ask.x)
        return Belief(zero, zero, zero)

    cond = Cond(label=torch.zeros(1, dtype=torch.int64))
    work = sampling(plan, nothing, grid_of(plan, bundle.schedule), lambda x, now, nxt: x, cond)
    for _ in watch(work, dict.fromkeys(("net", *needs_of(plan)), hear)):
        pass
    return rows


def draw(bundle: Bundle, count: int, seed: int, told: Told, screen: Screen) -> Tensor:
    """Samples with a progress bar; of several ranks each draws its share, and all have all of them."""
    job = ranks()
    heard = screen.sampling(max(1, len(job.share(count))), asks_of(bundle))
    return sample_shared(bundle, count, job, told=told, seed=seed, on_step=lambda done, step: heard(done, step))


def write_samples(
    x: Tensor, path: Path, bundle: Bundle, seed: int, said: Said, overwrite: bool, model: Mapping[str, str]
) -> None:
    """Write samples as a new folder, whole or not at all.

    grid.png where they can be drawn; one PNG a sample where they are pictures, else samples.npy (float32, in the range
    of the data); sample.json with how they were made, by which weights, and what each was told.
    """
    refuse_folder(path, overwrite)
    cond = cond_of(bundle, len(x), told_of(bundle, said, len(x))) or Cond()
    names, heard = bundle.attributes, [name for name in cond.present if not bool(cond.null_rows(name).all())]
    record = {
        "seed": seed,
        "count": len(x),
        "classes": None
        if cond.label is None or "label" not in heard
        else [bundle.classes[i] for i in cond.label.tolist()],
        "texts": None if "text" not in heard else each(said.text or bundle.examples.texts, len(x)),
        "negatives": each(said.negative, len(x)),
        "attributes": None
        if cond.vec is None or "vec" not in heard
        else [dict(zip(names, r, strict=True)) for r in cond.vec.tolist()],
        "images": each([str(picture) for picture in said.image or ()], len(x)),
        "mask": None if said.mask is None else str(said.mask),
        "plan": dump(bundle.recipe)["plan"],
        "model": dict(model),
        "weights": weights_hash(bundle.denoiser),
        "card": bundle.card,
    }
    files: dict[str, Any] = {
        "sample.json": lambda p: p.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    }
    if x.ndim == 4 or x.shape[1:] in ((1,), (2,)):
        files["grid.png"] = lambda p: picture.save_grid(x[:256], p)
    if picture.is_picture(tuple(x.shape[1:])):
        for i, one in enumerate(x):
            files[f"{i:06d}.png"] = lambda p, one=one: picture.image(one).save(p)
    else:
        files["samples.npy"] = lambda p: np.save(p, x.numpy())
    replace_folder(path, files)


def autoencoder_parts(name: str, data: Path | None, settings: Iterable[str]) -> tuple[Part, Part, Against]:
    """What an autoencoder is trained on, what it is, and what it is measured against, from a command's options.

    Args:
        name: of the data set.
        data: where it is.
        settings: "data.KNOB=VALUE", "net=NAME", "net.KNOB=VALUE" or "against.KNOB=VALUE".

    Raises:
        UnknownName: no such data set, net or knob.
        BadArgument: a value that does not fit, or data to a set that takes none.
    """
    from inkdrop.train.autoencoder import Against

    parts = {"data": with_knob("data", Part(""), "", name), "net": Part("autoencoder_small")}
    if data is not None:
        parts["data"] = with_knob("data", parts["data"], "data", str(data.resolve()))
    given: dict[str, Any] = {}
    for text in settings:
        path, sign, value = text.partition("=")
        slot, _, knob = path.strip().partition(".")
        if not sign or slot not in ("data", "net", "against") or (slot != "net" and not knob):
            raise BadArgument(
                f"--set: got {text!r}, need data.KNOB=VALUE, net=NAME, net.KNOB=VALUE or against.KNOB=VALUE"
            )
        if slot == "against":
            given[knob] = parse(value.strip())
        else:
            parts[slot] = with_knob({"data": "data", "net": "codecs"}[slot], parts[slot], knob, parse(value.strip()))
    known = {f.name: f.type for f in fields(Against)}
    if wrong := next((knob for knob in given if knob not in known), None):
        raise UnknownName("against knob", wrong, known)
    return parts["data"], parts["net"], valid(Against, given, "against")


def write_figures(figures: Mapping[str, Any], path: Path) -> None:
    """Write figures as JSON, whole or not at all; the folder is made."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dict(figures))
