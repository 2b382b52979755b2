"""The work behind `inkdrop edit`: pictures read and checked, a verb run with a progress bar, results written whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from inkdrop import jobs, picture
from inkdrop.condition import labels_of
from inkdrop.core.noise import normal
from inkdrop.denoiser import Denoiser
from inkdrop.drive import Step
from inkdrop.edit.operators import Operator
from inkdrop.editing import VERBS, operator_of
from inkdrop.errors import BadArgument, BadData, BadShape
from inkdrop.files import refuse_folder, replace_folder
from inkdrop.find import Part, parse
from inkdrop.inputs import read_array, read_picture
from inkdrop.inversion import PARTNERS
from inkdrop.model import state_shape
from inkdrop.options import Options
from inkdrop.recipe import dump
from inkdrop.said import attributes_of, background_of, each
from inkdrop.screen import Screen
from inkdrop.session import open_session

__all__ = ["Desk", "padded"]

RECORD = "edit.json"
MEASURING = 2**62  # draw of the noise of simulated measurements, which no sampler draws


def padded(images: Tensor, *, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Images on a larger canvas, what is added in the middle of the range."""
    return functional.pad(images, (left, right, top, bottom))


class _Nothing(nn.Module):
    """A net that answers nothing: what a verb asks is counted with it."""

    def forward(self, x: Tensor, clock: Tensor, cond: Any) -> Tensor:
        """Zeros of x's shape, with a derivative."""
        return 0 * x


class Desk:
    """One editing command: its model, what it reads, and the folder it writes.

    Args:
        verb: one of `editing.VERBS`.
        checkpoint: a run, or a checkpoint in it.
        options: how to sample, and where to write.

    Raises:
        BadArgument: the folder may not be written, or options that do not go together.
    """

    def __init__(self, verb: str, checkpoint: Path, options: Options) -> None:
        self.verb, self.options = verb, options
        self.out = options.out or Path("edits")
        refuse_folder(self.out, options.overwrite, RECORD)
        bundle = jobs.open_bundle(
            checkpoint,
            options.weights,
            options.trust,
            options.device,
            weak=options.weak,
            classifier=options.classifier,
        )
        changes = {name: getattr(options, name) for name in ("steps", "grid", "clip", "combine", "noise")}
        changes |= {"guide": options.guide or None, "sampler": options.sampler, "guidance": options.guidance}
        settings = options.settings or []
        self.own = [text for text in settings if text.startswith("operator.") and verb == "restore"]
        self.bundle = jobs.with_plan(bundle, changes, [text for text in settings if text not in self.own])
        self.seed = self.bundle.recipe.train.seed if options.seed is None else options.seed
        self.record: dict[str, Any] = {"knobs": {}, "asks": 0}
        self.arrays: dict[str, Tensor] = {}
        self.said: list[str] = []

    # ---- reading ---------------------------------------------------------------------------------------------

    def read(self, paths: Sequence[Path], shape: tuple[int, ...] | None = None) -> Tensor:
        """The inputs as (N, *shape), of the model's shape by default."""
        shape = self.bundle.shape if shape is None else shape
        if not picture.is_picture(shape):
            return torch.cat([read_array(path, shape) for path in paths])
        background = background_of(self.bundle)
        return torch.stack([read_picture(path, shape, background) for path in paths])

    def read_mask(self, keep: Path | None, repaint: Path | None) -> Tensor:
        """What is kept: bool (C, H, W), from one of two masks, of which the brighter half of the range is white."""
        if keep is not None and repaint is not None:
            raise BadArgument("inpaint: got --keep and --repaint; give one of them")
        if keep is None and repaint is None:
            raise BadArgument(
                "inpaint: got no mask; give --keep MASK (white is kept) or --repaint MASK (white is redrawn)"
            )
        path = keep or repaint
        shape = self.bundle.shape
        if path is None or not picture.is_picture(shape):
            raise BadShape(f"inpaint: this model's data of shape {shape} are no pictures, so no mask fits them")
        white = read_picture(path, (1, *shape[1:])) > 0
        if bool(white.all()) or not bool(white.any()):
            shade = "white" if bool(white.all()) else "black"
            raise BadArgument(f"{path}: is all {shade}, need a mask of black and white (transparency counts as white)")
        return (white if keep is not None else ~white).expand(shape)

    def measure(
        self, paths: Sequence[Path], name: str, noise_std: float, simulate: bool
    ) -> tuple[Operator, list[Tensor], Tensor]:
        """The operator, the whole pictures if measurements are simulated, and the measurements."""
        knobs = {}
        for text in self.own:
            path, _, value = text.partition("=")
            knobs[path.removeprefix("operator.").strip()] = parse(value.strip())
        made = operator_of(Part(name, knobs), self.bundle.shape)
        self.record["operator"] = {"name": name, "knobs": knobs}
        if not simulate:
            return made, [], self.read(paths, made.shape)
        whole = self.read(paths)
        y = made.apply(whole)
        noise = normal(y.shape, self.seed, range(len(y)), MEASURING).to(y.dtype)
        self.record["simulated"] = True
        return made, [whole], y + noise_std * noise

    # ---- running ---------------------------------------------------------------------------------------------

    def run(self, *given: Any, verb: str | None = None, label: Sequence[str] | None = None, **knobs: Any) -> Tensor:
        """The verb on what is given, with a progress bar; its knobs are noted.

        Args:
            given: its positional arguments after the model.
            verb: another verb than the command's.
            label: other classes than the command's.
            knobs: its own; those that are None are left to their defaults.
        """
        verb, asks, done = verb or self.verb, 0, 0
        knobs = {name: value for name, value in knobs.items() if value is not None}
        self.record["knobs"] |= knobs
        rows = next((len(x) for x in given if isinstance(x, Tensor)), 1)
        how: dict[str, Any] = {"seed": self.seed, "label": each(label or self.options.label, rows)}
        how |= {"text": each(self.options.text, rows), "attributes": attributes_of(self.options.attribute)}
        total = self._rows(verb, given, {**knobs, **how})

        with Screen() as screen:
            report = screen.task(self.verb if verb == "interpolate_seeds" else verb)

            def heard(before: int, step: Step) -> None:
                nonlocal asks, done
                if not step.level.clean:
                    asks, done = asks + (before == 0), done + len(step.x)
                    report(min(done, total), total, "")

            after = VERBS[verb](self.bundle, *given, **knobs, **how, guidance=self.options.guidance, on_step=heard)
        self.record["asks"] += asks
        return after

    def _rows(self, verb: str, given: Sequence[Any], knobs: Mapping[str, Any]) -> int:
        """How many rows will be asked about in all: counted, by running the verb on a net that answers nothing."""
        own, rows = self.bundle.denoiser, 0
        blank = Denoiser(_Nothing(), own.schedule, own.target)
        plan = replace(self.bundle.recipe.plan, guide=())
        recipe = replace(self.bundle.recipe, plan=plan)
        shape = state_shape(self.bundle) if verb == "decode" else self.bundle.shape
        model = replace(self.bundle, recipe=recipe, denoiser=blank, parts={}, codec=None, shape=shape)

        def heard(_: int, step: Step) -> None:
            nonlocal rows
            rows += 0 if step.level.clean else len(step.x)

        VERBS[verb](model, *given, **knobs, on_step=heard)
        return max(1, rows)

    def settle(self, sampler: str = "ddim") -> None:
        """Sample by what an inversion is undone by.

        Raises:
            BadArgument: another way of sampling was asked for.
        """
        for name in ("sampler", "combine", "noise"):
            texts = [text for text in self.options.settings or () if text.partition(".")[0].partition("=")[0] == name]
            if getattr(self.options, name) is not None or texts:
                got = getattr(self.options, name) or texts[0]
                raise BadArgument(
                    f"{self.verb} {name}: got {got}, but this goes with the sampler {sampler} alone; leave it out"
                )
        plan = replace(self.bundle.recipe.plan, sampler=Part(sampler), combine=None, noise=None)
        self.bundle = replace(self.bundle, recipe=replace(self.bundle.recipe, plan=plan))

    def round_trip(self, images: Tensor, to: str | None, *, depth: float, method: str, iterations: int) -> Tensor:
        """Invert and decode; the states are written too, and how near the images came is noted."""
        if method in PARTNERS:
            self.settle(PARTNERS[method])
        states = self.run(images, depth=depth, method=method, iterations=iterations)
        self.arrays["noise.npy"] = states
        after = self.run(states, verb="decode", label=None if to is None else [to], depth=depth, method=method)
        if to is None:
            self.compare(after, images, "round trip")
        else:
            self.record["decoded as"] = to
        return after

    def way(self, paths: Sequence[Path], seeds: tuple[int, int] | None, count: int, knobs: Mapping[str, Any]) -> Tensor:
        """The way between two pictures, or between the samples of two seeds."""
        if len(self.options.label or ()) > 1:
            raise BadArgument(f"interpolate: got {len(self.options.label or ())} classes, need one for the whole way")
        if seeds is not None:
            if paths or knobs:
                extra = next(iter(knobs), "pictures")
                raise BadArgument(f"interpolate {extra}: has no effect with --seeds; leave it out")
            return self.run(seeds, verb="interpolate_seeds", count=count)
        if len(paths) != 2:
            raise BadArgument(f"interpolate: got {len(paths)} pictures, need two, or --seeds")
        if knobs.get("via", "inversion") == "inversion":
            self.settle()
        elif "iterations" in knobs:
            raise BadArgument("interpolate iterations: has no effect without an inversion; leave it out")
        ends = self.read(paths)
        if len(ends) != 2:
            raise BadData(f"interpolate: got {len(ends)} samples in these files, need one in each")
        return self.run(ends[:1], ends[1:], count=count, **knobs)

    def compare(self, after: Tensor, images: Tensor, what: str) -> None:
        """Note the peak signal-to-noise ratio of results to images: 10·log10(2²/mean square) dB, 126 at most."""
        errors = (after - images).square().flatten(1).mean(1)
        decibels = (10 * (4 / errors.clamp(min=1e-12)).log10()).tolist()
        self.record["psnr_db"] = [round(value, 2) for value in decibels]
        self.said.append(f"{what}: {sum(decibels) / len(decibels):.1f} dB (worst {min(decibels):.1f})")

    # ---- writing ---------------------------------------------------------------------------------------------

    def write(self, after: Tensor, *, inputs: Sequence[Path | None], before: Sequence[Tensor] = ()) -> str:
        """Write the folder, whole or not at all, and say where.

        Args:
            after: results, (N, C, *S), or (N, count, C, *S).
            inputs: the files that were read.
            before: what stands before the results in the grid, each (N, C, *S).
        """
        many = after if after.ndim > len(self.bundle.shape) + 1 else after[:, None]
        sheet = torch.cat([*(x[:, None] for x in before), many], dim=1)
        results = many.flatten(0, 1)
        files: dict[str, Any] = {RECORD: self._write_record(inputs, len(after))}
        for name, array in self.arrays.items():
            files[name] = lambda p, array=array: np.save(p, array.numpy())
        if picture.is_picture(self.bundle.shape):
            files["grid.png"] = lambda p: picture.save_grid(sheet.flatten(0, 1)[:1024], p, columns=sheet.shape[1])
            for i, one in enumerate(results):
                files[f"{i:06d}.png"] = lambda p, one=one: picture.image(one).save(p)
        else:
            files["results.npy"] = lambda p: np.save(p, results.numpy())
        replace_folder(self.out, files)
        self.said.append(f"edits: {self.out / ('grid.png' if 'grid.png' in files else 'results.npy')}")
        return "\n".join(self.said)

    def _write_record(self, inputs: Sequence[Path | None], count: int) -> Callable[[Path], Any]:
        """A writer of edit.json: how the results were made."""
        labels = each(self.options.label, count)
        told = open_session(
            self.bundle,
            torch.zeros(count, *self.bundle.shape),
            self.verb,
            label=labels,
            text=each(self.options.text, count),
            attributes=attributes_of(self.options.attribute),
            guidance=self.options.guidance,
        )
        classes = labels_of(labels, count, self.bundle.classes) if labels else None
        files = [path for path in inputs if path is not None]
        record = {
            "edit": self.verb,
            **self.record,
            "inputs": [{"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in files],
            "seed": self.seed,
            "texts": each(self.options.text, count),
            "attributes": attributes_of(self.options.attribute),
            "classes": None if classes is None else [self.bundle.classes[i] for i in classes.tolist()],
            "plan": dump(replace(self.bundle.recipe, plan=told.plan))["plan"],
            "card": self.bundle.card,
        }
        return lambda path: path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
