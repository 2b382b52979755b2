"""What the terminal shows: progress bars and tables (rich), on stderr and stdout."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from inkdrop.parallel import is_first

if TYPE_CHECKING:
    from inkdrop.codec import Codec
    from inkdrop.drive import Step
    from inkdrop.recipe import Recipe

__all__ = [
    "Screen",
    "print_card",
    "print_codec",
    "print_dry_run",
    "print_knobs",
    "print_likelihood",
    "print_room",
    "print_rooms",
    "print_scores",
    "seconds_text",
]

EVERY = 60.0
"""Seconds between two lines of a task where stderr is no terminal."""

Report = Callable[[int, int, str], None]
"""f(done, total, text): how far a task is."""


def seconds_text(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.5 h, 4.2 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


class Screen:
    """Progress bars on stderr while it is open; plain lines, now and then, where stderr is no terminal; rank 0 only.

    Args:
        stopped: what Ctrl-C leaves, which is said then.
    """

    def __init__(self, stopped: str = "nothing was written") -> None:
        self._stopped = stopped
        self.console = Console(stderr=True, highlight=False, quiet=not is_first())
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),  # all of it fits into 80 columns
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Screen:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()
        if isinstance(error, KeyboardInterrupt):
            self.say(f"stopped; {self._stopped}")

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._bars.console.print(text, markup=False, soft_wrap=True)

    def task(self, what: str) -> Report:
        """A bar for a task; the first report sets its length."""
        holder: list[TaskID] = []
        begun = said = time.monotonic()
        start = 0

        def report(done: int, total: int, text: str = "") -> None:
            nonlocal begun, said, start
            now = time.monotonic()
            if not holder:
                holder.append(self._bars.add_task(what, total=total, note=""))
                begun, said, start = now, now, done
                if not self.console.is_terminal:
                    self.say(f"{what} ...")
            elif not self.console.is_terminal and now - said >= EVERY and start < done < total:
                left = (now - begun) * (total - done) / (done - start)
                self.say(f"{what}: {done:,} of {total:,}, about {seconds_text(left)} left")
                said = now
            self._bars.update(holder[0], completed=done, total=total, note=text)

        return report

    def training(
        self, what: str = "training", *, seconds: float | None = None, quiet: bool = False
    ) -> Callable[[str, dict[str, Any]], None]:
        """A listener for the trainer: a bar of updates, or of seconds where time is the limit; quiet: the bar alone."""
        report, began = self.task(what), time.monotonic()

        def heard(kind: str, facts: dict[str, Any]) -> None:
            if kind == "update":
                note = f"loss {facts['loss']:.4f}"
                spent = time.monotonic() - began
                by_time = seconds is not None and spent / seconds > facts["update"] / facts["last"]
                done, total = (int(spent), int(seconds or 0)) if by_time else (facts["update"], facts["last"])
                report(min(done, total), total, note)
            elif quiet:
                return
            elif kind == "held_out" and "loss" in facts:
                bands = " ".join(f"{b:.3f}" for b in facts["bands"])
                self.say(f"update {facts['update']}: held-out loss {facts['loss']:.4f} (clean to noise: {bands})")
            elif kind == "preview":
                self.say(f"update {facts['update']}: preview {facts['path']}")
            elif kind == "checkpoint":
                self.say(f"update {facts['update']}: checkpoint {facts['path']}")
            elif kind == "end":
                self.say(f"stopped at update {facts['update']}: {facts['why']}")
            elif kind == "speed":
                for line in facts["lines"]:
                    self.say(line)
            elif "text" in facts:
                self.say(f"update {facts['update']}: {facts['text']}")

        return heard

    def sampling(self, count: int, asks: int, what: str = "sampling") -> Callable[[int, Step], None]:
        """A listener for `sample`: a bar of images' questions; `asks` questions an image."""
        report = self.task(what)

        def heard(done: int, step: Step) -> None:
            rows = len(step.x)
            part = min(1.0, step.number / max(1, asks))
            report(int(done * asks + part * rows * asks), count * asks, f"{done + int(part * rows)} of {count} samples")

        return heard


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _print(thing: Any) -> None:
    """A table, or text in lines of its own; nothing in brackets is markup: tuple[int, ...], a class called [red]."""
    Console(highlight=False, markup=False).print(thing, soft_wrap=isinstance(thing, str))


def print_rooms() -> None:
    """The rooms and what each holds."""
    from inkdrop.find import ROOMS, names

    table = _table("room", "holds")
    for room in ROOMS:
        table.add_row(room, ", ".join(names(room)))
    _print(table)
    _print("one room: inkdrop list samplers    one thing: inkdrop list samplers ddim")


def print_room(room: str) -> None:
    """What a room holds, a line each."""
    from inkdrop.find import listing

    table = _table("name", "what it is")
    for name, entry in listing(room).items():
        table.add_row(name, entry.summary)
    _print(table)


def print_knobs(room: str, name: str) -> None:
    """The docstring and the knobs of one thing."""
    import inspect

    from inkdrop.find import find, knobs

    function = find(room, name)
    _print(f"{inspect.getdoc(function)}\n")
    table = _table("knob", "type", "default")
    known = knobs(function)
    for knob, param in known.items():
        default = "needed" if param.default is param.empty else repr(param.default)
        table.add_row(knob, inspect.formatannotation(param.annotation).replace("typing.", ""), default)
    _print(table if known else "no knobs")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError


def print_dry_run(recipe: Recipe, facts: dict[str, Any]) -> None:
    """The recipe as JSON, then its data, parameters and memory."""
    import json

    from inkdrop.recipe import dump

    _print(json.dumps(dump(recipe), indent=1))
    classes = facts["classes"]
    table = _table("", "")
    table.add_row("data", facts["data"])
    table.add_row("samples", f"{facts['samples']:,} to train on, {facts['held_out']:,} held out")
    table.add_row("shape", " × ".join(map(str, facts["shape"])))
    table.add_row("classes", f"{len(classes)}: {', '.join(classes)}" if classes else "none")
    for name, count in facts["terms"].items():
        if count and name != "classes":
            table.add_row(name, f"{count:,}")
    if facts["state_shape"] != facts["shape"]:
        table.add_row("latents", " × ".join(map(str, facts["state_shape"])))
    table.add_row("parameters", f"{facts['parameters']:,}")
    table.add_row(
        "memory",
        f"{_size(facts['bytes_fixed'])} weights and optimiser + {_size(facts['bytes_activations'])} activations",
    )
    if facts["bytes_process"] is not None:
        table.add_row("", f"the process will grow by {_size(facts['bytes_process'])}, data and libraries included")
    table.add_row("training", f"{recipe.train.steps:,} updates of {recipe.train.batch}: {facts['epochs']:.1f} epochs")
    if (each := facts["seconds_update"]) is not None:
        table.add_row("", f"about {seconds_text(each * recipe.train.steps)} here, at {each:.2g} s an update")
    _print(table)


def print_scores(figures: dict[str, Any]) -> None:
    """The figures of a model beside those of real data, and what to know about them."""
    features, near, kid, floor = figures["features"], figures["nearest"], figures["kid"], figures["kid_floor"]
    table = _table("", f"{figures['n']:,} samples", "real data")
    table.add_row("FID", f"{figures['fid']:.4g}", f"{figures['fid_floor']:.4g}")
    table.add_row("KID × 1000", *(f"{1000 * k['mean']:.4g} ± {1000 * k['se']:.2g}" for k in (kid, floor)))
    if figures["classes"] is not None:
        for row, key in (
            (f"sure of a class (p ≥ {figures['classes']['sure_at']})", "sure"),
            ("as asked, as written", "agree"),
        ):
            shares = [figures[side][key] for side in ("classes", "classes_real")]
            table.add_row(row, *("–" if share is None else f"{share:.1%}" for share in shares))
        missing = [", ".join(figures[side]["missing"]) or "none" for side in ("classes", "classes_real")]
        table.add_row("classes missing", *missing)
    if (match := figures["match"]) is not None:
        table.add_row(f"match by {match['name']}", *(_share(match[side]) for side in ("samples", "real")))
        table.add_row("  real images by others' texts", "", _share(match["others"]))
    for name, found in figures["metrics"].items():
        for key, value in found["samples"].items():
            if isinstance(value, float):  # counts and knobs stand in the JSON
                table.add_row(f"{name}: {key}".removesuffix(": value"), f"{value:.4g}", f"{found['real'][key]:.4g}")
    table.add_row("copies of training images", f"{near['rate']:.1%}", f"{near['held_out_rate']:.1%}")
    _print(table)
    right = "" if features["accuracy"] is None else f", right on {features['accuracy']:.1%} of held-out images"
    _print(f"features: {features['name']} {features['hash']}{right}; resize: {figures['resize']}")
    _print(
        f"reference: {figures['splits']['test']['n']:,} held-out images; "
        f"real data: {figures['floor_n']:,} training images"
    )
    plan = figures["plan"]
    guide = ", ".join(_call(p) for p in plan["guide"]) or "no clipping, no guidance"
    sampler = _call(plan["sampler"]) + (f" within {_call(plan['combine'])}" if plan.get("combine") else "")
    noise = f", {plan['noise']} noise" if plan.get("noise") else ""
    _print(f"sampled by {sampler}, {plan['steps']} steps of {_call(plan['grid'])}{noise}; {guide}")
    for warning in figures["warnings"]:
        _print(f"note: {warning}")


def _share(found: dict[str, Any]) -> str:
    return f"{found['value']:.3g} ({found['low']:.3g} to {found['high']:.3g})"


def print_likelihood(figures: dict[str, Any]) -> None:
    """Bits a dimension by the chain and by the flow, with what they cost."""
    chain, flow, how = figures["bound"], figures["flow"], figures["settings"]
    table = _table("", "bits/dim", "± (images)", "± (draws)")
    table.add_row("bound of the chain", f"{chain['bits']:.4f}", f"{chain['se']:.4f}")
    for part in ("prior", "steps", "decoder"):
        table.add_row(f"  {part}", f"{chain[part]:.4g}")
    noise = "" if flow["se_of_draws"] is None else f"{flow['se_of_draws']:.4f}"
    table.add_row("flow", f"{flow['bits']:.4f}", f"{flow['se']:.4f}", noise)
    table.add_row(f"all {figures['levels']} values alike", f"{figures['uniform']:.4f}")
    _print(table)
    _print(f"{figures['n']:,} of {figures['data']['n']:,} held-out images of {figures['dim']:,} dimensions")
    clip = ", x0 clipped" if how["clip"] else ""
    _print(f"chain: {chain['asks']:,} asks an image, grid {how['grid']}, variance {how['variance']}{clip}")
    start, trace = flow["start"], f"{flow['derivatives']} derivative(s) each ({how['trace']})"
    _print(f"flow: {flow['asks']:,} asks an image, {trace}, {how['draws']} draw(s) of uniform dequantisation")
    _print(f"      the density at t = {start['t']:.4g}, sigma = {start['sigma']:.3g}")
    _print("both are upper bounds, of the bare conditional model: own classes, no guidance")
    if chain["bits"] > figures["uniform"] and not how["clip"]:
        _print("note: the bound is above all values alike; --set nll.clip=true clips x0 in the chain, as papers do")


def print_card(folder: Path, record: dict[str, Any]) -> None:
    """What a checkpoint holds, for people."""
    recipe, card = record["recipe"], record.get("card", {})
    table = _table("", "")
    table.add_row("checkpoint", str(folder))
    for key in ("updates", "hours", "parameters", "samples", "data"):
        value = card.get(key, "not recorded")
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    table.add_row("shape", " × ".join(map(str, record["shape"])))
    table.add_row("classes", ", ".join(record["classes"]) or "none")
    if record["attributes"]:
        table.add_row("attributes", ", ".join(record["attributes"]))
    for key in ("net", "schedule", "target", "clock", "scale", "loss", "text", "image"):
        if recipe[key] is not None:
            table.add_row(key, _call(recipe[key]))
    if record.get("codec"):
        table.add_row("latents", f"of {_call(record['codec'])}")
    plan = recipe["plan"]
    guide = ", ".join(_call(p) for p in plan["guide"]) or "none"
    table.add_row(
        "sampling", f"{_call(plan['sampler'])}, {plan['steps']} steps of {_call(plan['grid'])}; guidance: {guide}"
    )
    _print(table)


def print_codec(folder: Path, codec: Codec) -> None:
    """What an autoencoder is, for people."""
    card, table = codec.card, _table("", "")
    table.add_row("autoencoder", str(folder))
    for key in ("updates", "samples", "data", "held_out", "psnr_db", "latent_std"):
        if (value := card.get(key)) is not None:
            table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    table.add_row("parameters", f"{sum(p.numel() for p in codec.parameters()):,}")
    table.add_row("shape", " × ".join(map(str, codec.shape)))
    table.add_row("latents", " × ".join(map(str, codec.latent_shape)))
    table.add_row("net", _call(codec.record()))
    _print(table)


def _call(part: dict[str, Any]) -> str:
    return (
        f"{part['name']}({', '.join(f'{k}={v}' for k, v in part['knobs'].items())})" if part["knobs"] else part["name"]
    )
