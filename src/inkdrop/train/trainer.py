"""A run at work: the net, its average and its optimiser, updated, looked at, saved and taken up again."""

from __future__ import annotations

import io
import itertools
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inkdrop import picture
from inkdrop.bundle import Bundle, checkpoints, read_manifest, save
from inkdrop.core.noise import Draw
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument, BadCheckpoint, Diverged, InkdropWarning
from inkdrop.files import load_weights, remove_folder
from inkdrop.find import check_knobs, find
from inkdrop.generate import sample, steps
from inkdrop.recipe import Recipe, denoiser_of
from inkdrop.train.ema import Ema
from inkdrop.train.feed import Feed
from inkdrop.train.held_out import held_out_loss
from inkdrop.train.interrupt import hold_interrupts
from inkdrop.train.order import learning_rate, rows_of
from inkdrop.train.record import write_atomically

__all__ = ["Heard", "Trainer", "device_of", "silent"]

Heard = Callable[[str, dict[str, Any]], None]
"""f(kind, facts): kinds are "update", "held_out", "preview", "checkpoint", "end"."""


def silent(kind: str, facts: dict[str, Any]) -> None:
    """Hear nothing."""


class Trainer:
    """A run: the net, its average, its optimiser, and how far they are.

    Args:
        recipe: what to train.
        out: the run folder; None trains without writing anything (a dry run).
        heard: told of what happens, for progress bars.
        device: where the net is; "auto" is CUDA where there is a GPU.
        known: the model of a run that goes on, whose reader and codec are kept; None for a new run.
        trust: allow the codec's folder to name code outside inkdrop.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path | None,
        heard: Heard = silent,
        device: str = "auto",
        known: Bundle | None = None,
        *,
        trust: bool = False,
    ) -> None:
        self.recipe, self.heard = recipe, heard
        self.out = Path() if out is None else out
        self.device = device_of(device)
        self.feed = Feed(recipe, self.device, known, trust=trust)
        self.data, self.held_out = self.feed.data, self.feed.held_out
        torch.manual_seed(recipe.train.seed)
        self.denoiser = denoiser_of(recipe, self.feed.shape, self.feed.terms).to(self.device)
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
        self._try()

    @torch.no_grad()
    def _try(self) -> None:
        """One loss and two questions of the plan: what they refuse is refused before anything is trained or written."""
        self.losses(range(1))
        for _ in itertools.islice(steps(self.bundle(), 1, **vars(self.feed.told(1))), 2):
            pass

    def losses(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The loss terms of these samples at this update's randomness, each (B,), with their graph."""
        train = self.recipe.train
        draw = Draw(train.seed, self.update, range(len(rows)))
        x0, cond = self.feed.take(rows, draw, self.denoiser.schedule)
        dropped = [] if cond is None else [name for name in cond.present if name != "image"]
        if cond is not None and dropped and train.null_rate:
            cond = cond.null(draw.uniform("dropout") < train.null_rate, only=dropped)
        self.denoiser.train()
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bfloat16")
        with half:
            return self.loss(self.denoiser, x0.to(self.device), None if cond is None else cond.to(self.device), draw)

    def step(self) -> dict[str, float]:
        """One optimiser update; returns its loss, gradient norm and learning rate.

        Raises:
            Diverged: the loss or the gradient is not finite; the weights are as before.
        """
        train = self.recipe.train
        torch.manual_seed((train.seed * 1_000_003 + self.update) % 2**63)  # nn.Dropout has no other key
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
        with hold_interrupts():
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
        bundle = Bundle(self.recipe, averaged, self.data.shape, self.data.classes, self.data.levels, card)
        return self.feed.given_to(bundle)

    def held_out_loss(self, count: int = 256) -> dict[str, Any]:
        """The averaged net's loss on held-out data, whole and in bands of time, on fixed noise: see held_out.py."""
        net, seed = self.bundle().denoiser, self.recipe.train.seed
        return held_out_loss(net, self.loss, self.feed, seed=seed, device=self.device, count=count)

    def preview(self, count: int = 16) -> Tensor:
        """Samples of the averaged model from noise that is the same at every call, (count, C, *S)."""
        told: dict[str, Any] = vars(self.feed.told(count))
        return sample(self.bundle(), count, seed=self.recipe.train.seed, **told)

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
            self.heard("checkpoint", {"path": path, "update": self.update})
        for old in checkpoints(self.out)[: -self.recipe.train.keep]:
            remove_folder(old)
        return path

    def load(self, folder: Path) -> None:
        """Take up the weights, average, optimiser and update of a checkpoint.

        Raises:
            BadCheckpoint: it was not made for resuming, or does not fit.
        """
        record = read_manifest(folder)
        files = record["files"]
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
        if record["card"].get("fingerprint") != self.data.fingerprint:
            text = f"{folder}: the data have changed since; the run goes on, but not as if it had never stopped"
            warnings.warn(text, InkdropWarning, stacklevel=2)

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
        if self.update >= self.last:
            return "finished" if self.update >= train.steps else "max-steps"
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
                self.save()
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
        if self.looks_at(self.update):
            self._look(log)
        if self.update % train.save_every == 0:
            self.save()

    def looks_at(self, update: int) -> bool:
        """Whether a preview and a held-out loss are due: at the 100th update at the latest, then as the recipe says."""
        every = self.recipe.train.preview_every
        return update == min(100, every) or update % every == 0

    def _look(self, log: Any) -> None:
        """Held-out loss and a sample grid, both from fixed noise."""
        facts = self.held_out_loss()
        self._log(log, {"held_out": facts})
        self.heard("held_out", {"update": self.update, **facts})
        path = self.out / "previews" / f"step-{self.update:08d}.png"
        x = self.preview()
        if x.ndim == 4 or x.shape[1:] in ((1,), (2,)):
            path.parent.mkdir(exist_ok=True)
            png = io.BytesIO()
            picture.grid(x).save(png, "PNG")
            write_atomically(path, png.getvalue())
            self.heard("preview", {"path": path, "update": self.update})

    def _close(self, log: Any) -> None:
        """The last look and the last checkpoint of a run."""
        if not self.looks_at(self.update):
            self._look(log)
        self.save()

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
