"""Train a recipe in a run folder, or go on with a run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from inkdrop.bundle import Bundle, checkpoints, load
from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.find import Part, find, knobs
from inkdrop.parallel import ranks
from inkdrop.recipe import Recipe, dump, read, refuse_foreign_code, set_knobs
from inkdrop.train.allocator import keeping_memory
from inkdrop.train.interrupt import Stopped
from inkdrop.train.record import begin_record, go_on_record, note_progress, write_atomically
from inkdrop.train.speed import FIELDS, fastest, said, table
from inkdrop.train.state import prune
from inkdrop.train.trainer import Heard, Trainer, silent

__all__ = ["check_latents", "check_speed", "choose", "fit", "quickened", "resume"]


def choose(
    recipe: Recipe | str | Path, *, data: Path | None = None, settings: Iterable[str] = (), trust: bool = False
) -> Recipe:
    """A recipe by its name or its recipe.json, with the data's place and other knobs set.

    A recipe.json may name code outside inkdrop ("my.module:thing") only with `trust`; your own settings always may.

    Raises:
        UnknownName: no such recipe.
        BadArgument: data given to a recipe that takes none, or missing where it needs them.
    """
    if isinstance(recipe, str) and not recipe.endswith(".json"):
        recipe = find("recipes", recipe)()
    made = recipe if isinstance(recipe, Recipe) else read(Path(recipe))
    if not isinstance(recipe, Recipe) and not trust:
        refuse_foreign_code(dump(made), Path(recipe))
    if data is not None:
        if made.data is None:
            made = replace(made, data=Part("folder"))
        if made.data is not None and "data" not in knobs(find("data", made.data.name)):
            raise BadArgument(
                f"--data: got {data}, but the data set {made.data.name} takes none; "
                f"try: inkdrop train folder --data {data}"
            )
        made = set_knobs(made, [f"data.data={json.dumps(str(data.resolve()))}"])
    return set_knobs(made, settings)


def fit(
    recipe: Recipe | str | Path,
    out: Path | str,
    *,
    data: Path | str | None = None,
    settings: Iterable[str] = (),
    max_steps: int | None = None,
    max_time: float | None = None,
    heard: Heard = silent,
    device: str = "auto",
    speed: Literal["none", "auto"] = "none",
    trust: bool = False,
) -> Bundle:
    """Train a recipe in a new run folder and return the averaged model.

    Under torchrun all ranks train it together; when torchrun has started them anew, a run that is there already goes
    on as with `resume`.

    Args:
        recipe: a Recipe, the name of one in recipes/, or the path of a recipe.json.
        out: a folder that holds no run yet.
        data: where your data are, like the command line's --data.
        settings: changes as "slot.knob=value", like the command line's --set.
        max_steps: stop after so many updates, ≥ 1.
        max_time: stop after so many seconds of this call, the opening of the data included.
        heard: f(kind, facts), told of updates, previews and checkpoints.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        speed: "auto" measures some ways of training for half a minute, and trains in the fastest whose gradients are
            float32's; it is written into recipe.json, so that the run goes on in it. "none" trains as the recipe says.
        trust: allow a recipe.json or a codec to name code outside inkdrop, which is imported and run.

    Raises:
        BadArgument: the folder holds a run, or a setting is wrong.
        Diverged: the loss left the finite numbers, and lower learning rates did not help.
        BadData: a sample cannot be read; a checkpoint was written where the run has begun.
        Stopped: (a KeyboardInterrupt) Ctrl-C or SIGTERM; a checkpoint was written, and `bundle` holds the model.
    """
    began = time.monotonic()
    made, out = choose(recipe, data=None if data is None else Path(data), settings=settings, trust=trust), Path(out)
    job = ranks()
    if job.tell(job.restarts > 0 and (out / "recipe.json").exists()):
        return resume(out, max_steps=max_steps, max_time=max_time, heard=heard, device=device, trust=trust)
    job.lead(lambda: _check_new(out))
    _check_limits(max_steps, max_time)
    check_latents(made)
    if check_speed(speed) == "auto":
        made = job.together(lambda: quickened(made, heard if job.first else silent, device, trust=trust))
        made = replace(
            made, train=replace(made.train, **job.tell({name: getattr(made.train, name) for name in FIELDS}))
        )
    trainer = Trainer(made, out, heard, device, trust=trust, ranks=job)
    job.lead(lambda: _begin(out, trainer.recipe))
    return _trained(trainer, max_steps, max_time, began)


def _trained(trainer: Trainer, max_steps: int | None, max_time: float | None, began: float) -> Bundle:
    """The averaged model after a run to its end, or to a limit."""
    left = None if max_time is None else max_time - (time.monotonic() - began)
    why, bundle = trainer.run(max_steps=max_steps, max_time=left), trainer.bundle()
    if why in ("interrupted", "terminated"):
        last, run = trainer.recipe.train.steps, trainer.out
        raise Stopped(f"{why} at update {trainer.update:,} of {last:,}; go on with: inkdrop resume {run}", bundle)
    return bundle


def _check_new(out: Path) -> None:
    """Refuse a folder that something is in."""
    if (out / "recipe.json").exists():
        raise BadArgument(f"{out}: holds a run already; resume it, or choose another --out")
    if out.exists() and (not out.is_dir() or any(p.name not in _UNBEGUN for p in out.iterdir())):
        raise BadArgument(f"{out}: is not an empty folder; choose another --out")


def _begin(out: Path, recipe: Recipe) -> None:
    """Make the folder of a run, with its run.json and its recipe.json."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"{out}: cannot be made ({error.strerror}); choose another --out") from None
    begin_record(out / "run.json", recipe.train.seed)
    write_atomically(out / "recipe.json", dump(recipe))


def check_speed(speed: str, *, train: bool = True) -> Literal["none", "auto"]:
    """The word, if it is one of the two.

    Raises:
        BadArgument: another, or "auto" where nothing is trained.
    """
    if speed == "auto" and not train:
        raise BadArgument("speed: got auto, but nothing is trained; leave out --dry-run or --speed")
    if speed == "auto":
        return "auto"
    if speed == "none":
        return "none"
    raise BadArgument(f"speed: got {speed!r}, need none or auto")


def quickened(recipe: Recipe, heard: Heard = silent, device: str = "auto", *, trust: bool = False) -> Recipe:
    """The recipe trained in the fastest of the ways that this machine has; see `speed.fastest`.

    Args:
        recipe: to be trained.
        heard: told "speed", with "tried", "chosen" (the fields of train), and "lines" for people.
        device: as in fit.
        trust: as in fit.
    """
    trainer = Trainer(recipe, None, device=device, trust=trust)
    with keeping_memory():
        train, tried = fastest(trainer)
    chosen = {name: getattr(train, name) for name in FIELDS}
    heard("speed", {"tried": tried, "chosen": chosen, "lines": [*table(tried), said(tried, chosen)]})
    return replace(recipe, train=train)


_UNBEGUN = ("run.json", ".run.json.part", ".recipe.json.part")
"""What is there of a run that was killed before it began: recipe.json comes last."""


def check_latents(recipe: Recipe) -> None:
    """Refuse a plan that bounds x0, of a model of latents, before anything is read.

    Raises:
        BadArgument: clip or threshold among its guides.
    """
    bounds = [part.name for part in recipe.plan.guide if part.name in ("clip", "threshold")]
    if recipe.codec is not None and bounds:
        kept = ",".join(part.name for part in recipe.plan.guide if part.name not in bounds) or "none"
        raise BadArgument(
            f"{bounds[0]}: got a model of latents, which have no range; train with --set plan.guide={kept}"
        )


def _check_limits(max_steps: int | None, max_time: float | None) -> None:
    for name, limit in (("max_steps", max_steps), ("max_time", max_time)):
        if limit is not None and not limit > 0:
            raise BadArgument(f"{name}: got {limit:g}, need more than 0; leave it out to train to the end")


def resume(
    run: Path | str,
    *,
    data: Path | str | None = None,
    settings: Iterable[str] = (),
    max_steps: int | None = None,
    max_time: float | None = None,
    heard: Heard = silent,
    device: str = "auto",
    trust: bool = False,
) -> Bundle:
    """Go on with a run from its newest checkpoint; the same numbers as if it had never stopped.

    A run that was stopped before its first checkpoint starts again; one that is finished is left as it is.

    Args:
        run: its folder.
        data: where the data are now, if they moved; a warning says if they are not the same.
        settings: changes of the train fields only ("train.steps=20000"): another net would not fit.
        max_steps: stop after so many updates in all.
        max_time: stop after so many seconds of this call.
        heard: as in fit.
        device: as in fit.
        trust: as in fit.

    Raises:
        BadCheckpoint: it is no run folder, or its newest checkpoint is damaged.
        BadArgument: a setting that is not of train, or a max_steps that the run is past.
        Stopped: as in fit.
    """
    began, run = time.monotonic(), Path(run)
    if not (run / "recipe.json").is_file():
        raise BadCheckpoint(f"{run}: is no run folder (it has no recipe.json); give the folder that train wrote")
    recipe = choose(run / "recipe.json", trust=trust)
    for text in settings:
        if not text.startswith("train."):
            raise BadArgument(f"resume --set: got {text!r}, need train.*; what was trained cannot change")
    _check_limits(max_steps, max_time)
    where = None if data is None else Path(data)
    changed = replace(choose(recipe, data=where), train=set_knobs(recipe, settings).train)
    job, newest = ranks(), _newest(run)
    known = None
    if newest is not None and (changed.text is not None or changed.codec is not None):
        known = job.together(lambda: load(newest, weights="raw", trust=trust))
    trainer = Trainer(changed, run, heard, device, known, start=newest, trust=trust, ranks=job)
    job.lead(lambda: _tidy(trainer))
    if max_steps is not None and max_steps <= trainer.update and not job.restarts:
        raise BadArgument(f"max_steps: got {max_steps}, but the run is at update {trainer.update}; give more, or none")
    if trainer.update < changed.train.steps:
        trainer.log.cut(trainer.update, trainer.guard.rollbacks, looked=trainer.looks_at(trainer.update))
        job.lead(lambda: _note(trainer))
    return _trained(trainer, max_steps, max_time, began)


def _newest(run: Path) -> Path | None:
    """The newest checkpoint, which rank 0 looks for; None if there is none."""
    job = ranks()
    found = job.lead(lambda: checkpoints(run))
    name = job.tell(found[-1].name if found else None)
    return None if name is None else run / "checkpoints" / str(name)


def _tidy(trainer: Trainer) -> None:
    """Do what a run that was killed in or after a save had not come to."""
    run = trainer.out
    for rest in (run / "checkpoints").glob(".*.part"):
        shutil.rmtree(rest)
    if checkpoints(run):
        prune(run, trainer.recipe.train)
        note_progress(run / "run.json", trainer.update, trainer.seconds)


def _note(trainer: Trainer) -> None:
    """Write down that a run goes on, and as what."""
    write_atomically(trainer.out / "recipe.json", dump(trainer.recipe))
    go_on_record(trainer.out / "run.json", trainer.recipe.train.seed, trainer.update)
