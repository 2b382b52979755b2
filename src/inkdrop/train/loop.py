"""The training loop: fit a recipe, keep its checkpoints, go on from them."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inkdrop import picture
from inkdrop.bundle import Bundle, checkpoints, load_weights, locate, read_manifest, save
from inkdrop.core.dataset import Data
from inkdrop.core.noise import Draw
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument, BadCheckpoint, Diverged
from inkdrop.find import check_knobs, find, knobs
from inkdrop.plan import sample
from inkdrop.recipe import Recipe, denoiser_of, dump, open_data, read, set_knobs
from inkdrop.train.ema import Ema
from inkdrop.train.order import learning_rate, rows_of
from inkdrop.train.record import describe_run, write_atomically

__all__ = ["Trainer", "choose", "device_of", "fit", "resume"]

BANDS = 5
"""How many bands of time the held-out loss is given for."""

Heard = Callable[[str, dict[str, Any]], None]
"""f(kind, facts): kinds are "update", "held_out", "preview", "checkpoint"."""


def _silent(kind: str, facts: dict[str, Any]) -> None:
    """Hear nothing."""


class Trainer:
    """A run: the net, its average, its optimiser, and how far they are.

    Args:
        recipe: what to train.
        out: the run folder; None trains without writing anything (a dry run).
        heard: told of what happens, for progress bars.
        device: where the net is; "auto" is CUDA where there is a GPU.
    """

    def __init__(self, recipe: Recipe, out: Path | None, heard: Heard = _silent, device: str = "auto") -> None:
        self.recipe, self.heard = recipe, heard
        self.out = Path() if out is None else out
        self.device = device_of(device)
        self.data, self.held_out = open_data(recipe.data, "train"), open_data(recipe.data, "test")
        if not len(self.data):
            raise BadArgument(f"train: {self.data.source} holds no samples")
        torch.manual_seed(recipe.train.seed)
        self.denoiser = denoiser_of(recipe, self.data.shape, len(self.data.classes)).to(self.device)
        function = find("losses", recipe.loss.name)
        knobs = check_knobs(recipe.loss.name, function, recipe.loss.knobs)
        self.loss: Callable[..., dict[str, Tensor]] = lambda *args: function(*args, **knobs)
        self.ema = Ema(self.denoiser.net, recipe.train.ema)
        self.optimiser = torch.optim.AdamW(
            self.denoiser.net.parameters(),
            lr=recipe.train.lr,
            betas=recipe.train.betas,
            weight_decay=recipe.train.weight_decay,
            fused=True,
        )
        self.update, self.last, self.seconds = 0, recipe.train.steps, 0.0

    def losses(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The loss terms of these samples at this update's randomness, each (B,), with their graph."""
        train = self.recipe.train
        x0, cond = self.data.take(rows)
        draw = Draw(train.seed, self.update, range(len(rows)))
        if cond is not None and train.null_rate:
            cond = cond.null(draw.uniform("dropout") < train.null_rate)
        self.denoiser.train()
        return self.loss(self.denoiser, x0.to(self.device), None if cond is None else cond.to(self.device), draw)

    def step(self) -> dict[str, float]:
        """One optimiser update; returns its loss, gradient norm and learning rate.

        Raises:
            Diverged: the loss or the gradient is not finite; the weights are as before.
        """
        train = self.recipe.train
        torch.manual_seed(train.seed * 1_000_003 + self.update)  # nn.Dropout has no other key
        terms = self.losses(rows_of(self.update, train.batch, len(self.data), train.seed))
        loss = terms["loss"].mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.denoiser.net.parameters(), train.clip_grad)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise Diverged(
                f"training: the loss is not finite at update {self.update}; lower train.lr, or resume with less"
            )
        rate = learning_rate(self.update, train)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.ema.update(self.denoiser.net, self.update)
        self.update += 1
        means = {name: float(value.detach().mean()) for name, value in terms.items()}
        return {**means, "grad_norm": float(norm), "lr": rate}

    def bundle(self) -> Bundle:
        """The averaged model as it is now."""
        card = {
            "data": self.data.source,
            "fingerprint": self.data.fingerprint,
            "samples": len(self.data),
            "updates": self.update,
            "hours": round(self.seconds / 3600, 5),
            "parameters": sum(p.numel() for p in self.ema.net.parameters()),
        }
        net = self.denoiser
        averaged = Denoiser(self.ema.net, net.schedule, net.target, net.clock, net.scale_in)
        return Bundle(self.recipe, averaged, self.data.shape, self.data.classes, self.data.levels, card)

    @torch.no_grad()
    def held_out_loss(self, count: int = 256) -> dict[str, Any]:
        """The averaged net's loss on held-out data, whole and in bands of time, on fixed noise.

        Returns:
            "loss", "samples", and "bands": one number for each fifth of the schedule's time, from clean to noise.
        """
        n = min(count, len(self.held_out))
        if n < BANDS:
            return {"samples": n}
        x0, cond = self.held_out.take(list(range(n)))
        cond = None if cond is None else cond.to(self.device)
        losses = self.loss(self.bundle().denoiser, x0.to(self.device), cond, _FixedDraw(self.recipe.train.seed, n))[
            "loss"
        ]
        bands = [float(losses[i::BANDS].mean()) for i in range(BANDS)]
        return {"samples": n, "loss": float(losses.mean()), "bands": bands}

    def preview(self, count: int = 16) -> Tensor:
        """Samples of the averaged model from noise that is the same at every call, (count, C, *S)."""
        return sample(self.bundle(), count, seed=self.recipe.train.seed)

    def save(self) -> Path:
        """Write a checkpoint of everything, and drop the oldest beyond `keep`."""
        path = self.out / "checkpoints" / f"step-{self.update:08d}"
        if not path.exists():
            state = {
                f"{index}.{name}": value
                for index, entry in self.optimiser.state_dict()["state"].items()
                for name, value in entry.items()
            }
            progress = {"update": self.update, "seconds": self.seconds}
            save(self.bundle(), path, raw=self.denoiser.net.state_dict(), state=state, progress=progress)
        for old in checkpoints(self.out)[: -self.recipe.train.keep]:
            for file in sorted(old.iterdir(), reverse=True):
                file.unlink()
            old.rmdir()
        return path

    def load(self, folder: Path) -> None:
        """Take up the weights, average, optimiser and update of a checkpoint.

        Raises:
            BadCheckpoint: it was not made for resuming, or does not fit.
        """
        files = read_manifest(folder)["files"]
        if not {"raw.safetensors", "state.safetensors", "state.json"} <= set(files):
            raise BadCheckpoint(
                f"{folder}: has no training state (raw.safetensors, state.*); it can be sampled, not resumed"
            )
        from safetensors.torch import load_file

        load_weights(self.denoiser.net, folder / "raw.safetensors")
        load_weights(self.ema.net, folder / "net.safetensors")
        whole: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(folder / "state.safetensors").items():
            index, _, name = key.partition(".")
            whole.setdefault(int(index), {})[name] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": whole, "param_groups": groups})
        progress = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.update, self.seconds = int(progress["update"]), float(progress["seconds"])

    def run(self, *, max_steps: int | None = None, max_time: float | None = None) -> str:
        """Train until the recipe's steps, max_steps updates in all, or max_time seconds of this call.

        A checkpoint is written at the end, also when it is interrupted (Ctrl-C), as long as the weights are finite.

        Returns:
            Why it ended: "finished", "max-steps", "max-time" or "interrupted"; heard is told too ("end").
        """
        why = self._run(max_steps, max_time)
        self.heard("end", {"update": self.update, "why": why})
        return why

    def _run(self, max_steps: int | None, max_time: float | None) -> str:
        train, began, before = self.recipe.train, time.monotonic(), self.seconds
        self.last = train.steps if max_steps is None else min(train.steps, max_steps)
        with (self.out / "stats.jsonl").open("a", encoding="utf-8") as log:
            try:
                while self.update < self.last:
                    facts = self.step()
                    self.seconds = before + time.monotonic() - began
                    self._after(facts, log)
                    if max_time is not None and time.monotonic() - began >= max_time:
                        self._close(log)
                        return "max-time"
            except KeyboardInterrupt:
                self.heard("checkpoint", {"path": self.save(), "update": self.update})
                return "interrupted"
            self._close(log)
        return "finished" if self.update >= train.steps else "max-steps"

    def _after(self, facts: dict[str, float], log: Any) -> None:
        """What follows an update: the log, the preview, the checkpoint, when they are due."""
        train = self.recipe.train
        rate = self.update * train.batch / max(self.seconds, 1e-9)
        self.heard("update", {"update": self.update, "last": self.last, **facts, "samples_per_second": rate})
        if self.update % train.log_every == 0:
            self._log(log, {**facts, "seconds": round(self.seconds, 3), "samples_per_second": round(rate, 1)})
        early = self.update == min(100, train.preview_every)
        if early or self.update % train.preview_every == 0:
            self._look(log)
        if self.update % train.save_every == 0:
            self.heard("checkpoint", {"path": self.save(), "update": self.update})

    def _look(self, log: Any) -> None:
        """Held-out loss and a sample grid, both from fixed noise."""
        facts = self.held_out_loss()
        self._log(log, {"held_out": facts})
        self.heard("held_out", {"update": self.update, **facts})
        path = self.out / "previews" / f"step-{self.update:08d}.png"
        x = self.preview()
        if x.ndim == 4 or x.shape[1:] in ((1,), (2,)):
            path.parent.mkdir(exist_ok=True)
            picture.save_grid(x, path)
            self.heard("preview", {"path": path, "update": self.update})

    def _close(self, log: Any) -> None:
        """The last look and the last checkpoint of a run."""
        if self.update % self.recipe.train.preview_every:
            self._look(log)
        self.heard("checkpoint", {"path": self.save(), "update": self.update})

    def _log(self, log: Any, facts: dict[str, Any]) -> None:
        log.write(json.dumps({"update": self.update, **facts}) + "\n")
        log.flush()


def device_of(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is a GPU, else the CPU.

    Raises:
        BadArgument: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadArgument(
            f"device: got {name!r}, which is not to be had here ({str(error).splitlines()[0]}); try cpu"
        ) from None
    return device


class _FixedDraw(Draw):
    """The same noise at every call, times evenly spread: row i is at u = (i + ½)/n of its band's order."""

    def __init__(self, seed: int, count: int) -> None:
        super().__init__(seed, 2**63, range(count))

    def uniform(self, stream: str = "time", count: int | None = None) -> Tensor:
        """Evenly spread times, row i in band i mod BANDS; other streams as ever."""
        if stream != "time":
            return super().uniform(stream, count)
        n = len(self.places)
        row = torch.arange(n, dtype=torch.float64)
        inner = (row // BANDS + 0.5) / torch.ceil(torch.tensor(n / BANDS))
        return ((row % BANDS) + inner) / BANDS


def choose(recipe: Recipe | str | Path, *, data: Path | None = None, settings: Iterable[str] = ()) -> Recipe:
    """A recipe by its name or its recipe.json, with the data's place and other knobs set.

    Raises:
        UnknownName: no such recipe.
        BadArgument: data given to a recipe that takes none, or missing where it needs them.
    """
    if isinstance(recipe, str) and not recipe.endswith(".json"):
        recipe = find("recipes", recipe)()
    made = recipe if isinstance(recipe, Recipe) else read(Path(recipe))
    if data is not None:
        if "data" not in knobs(find("data", made.data.name)):
            raise BadArgument(
                f"--data: got {data}, but the data set {made.data.name} takes none; try: inkdrop train folder --data {data}"
            )
        made = set_knobs(made, [f"data.data={json.dumps(str(data))}"])
    return set_knobs(made, settings)


def fit(
    recipe: Recipe | str | Path,
    out: Path | str,
    *,
    settings: Iterable[str] = (),
    max_steps: int | None = None,
    max_time: float | None = None,
    heard: Heard = _silent,
    device: str = "auto",
) -> Bundle:
    """Train a recipe in a new run folder and return the averaged model.

    Args:
        recipe: a Recipe, the name of one in recipes/, or the path of a recipe.json.
        out: a folder that holds no run yet.
        settings: changes as "slot.knob=value", like the command line's --set.
        max_steps: stop after so many updates, ≥ 1.
        max_time: stop after so many seconds.
        heard: f(kind, facts), told of updates, previews and checkpoints.
        device: "auto", "cpu", "cuda", "cuda:1", ...

    Raises:
        BadArgument: the folder holds a run, or a setting is wrong.
        Diverged: the loss left the finite numbers.
    """
    made, out = choose(recipe, settings=settings), Path(out)
    if (out / "recipe.json").exists():
        raise BadArgument(f"{out}: holds a run already; resume it, or choose another --out")
    for name, limit in (("max_steps", max_steps), ("max_time", max_time)):
        if limit is not None and limit <= 0:
            raise BadArgument(f"{name}: got {limit:g}, need more than 0")
    trainer = Trainer(made, out, heard, device)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "run.json", describe_run(made.train.seed))
    write_atomically(out / "recipe.json", dump(made))
    trainer.run(max_steps=max_steps, max_time=max_time)
    return trainer.bundle()


def resume(
    run: Path | str,
    *,
    settings: Iterable[str] = (),
    max_steps: int | None = None,
    max_time: float | None = None,
    heard: Heard = _silent,
    device: str = "auto",
) -> Bundle:
    """Go on with a run from its newest checkpoint; the same numbers as if it had never stopped.

    Args:
        run: its folder.
        settings: changes of the train fields only ("train.steps=20000"): another net would not fit.
        max_steps: stop after so many updates in all.
        max_time: stop after so many seconds of this call.
        heard: as in fit.
        device: as in fit.

    Raises:
        BadCheckpoint: there is nothing to resume.
        BadArgument: a setting that is not of train.
    """
    run = Path(run)
    folder, recipe = locate(run), read(run / "recipe.json")
    for text in settings:
        if not text.startswith("train."):
            raise BadArgument(f"resume --set: got {text!r}, need train.*; what was trained cannot change")
    changed = replace(recipe, train=set_knobs(recipe, settings).train)
    trainer = Trainer(changed, run, heard, device)
    trainer.load(folder)
    _cut_log(run / "stats.jsonl", trainer.update)
    write_atomically(run / "recipe.json", dump(changed))
    trainer.run(max_steps=max_steps, max_time=max_time)
    return trainer.bundle()


def _cut_log(path: Path, update: int) -> None:
    """Drop lines after an update, which will be written again, and a last line that was cut off."""
    if path.exists():
        whole = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = itertools.takewhile(lambda line: json.loads(line)["update"] <= update, whole)
        write_atomically(path, "".join(f"{line}\n" for line in kept))
