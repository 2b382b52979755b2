"""A run at work: the net, its average and its optimiser, updated, looked at, saved and taken up again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inkdrop.bundle import Bundle
from inkdrop.core.dataset import Forward
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument
from inkdrop.find import check_knobs, find
from inkdrop.find import knobs as knobs_of
from inkdrop.generate import sample_shared, steps
from inkdrop.parallel import ALONE, Ranks, heeding_loss
from inkdrop.recipe import Recipe, denoiser_of
from inkdrop.train.ahead import Ahead
from inkdrop.train.allocator import keeping_memory
from inkdrop.train.buckets import Buckets
from inkdrop.train.draws import Draws
from inkdrop.train.ema import Ema, Powers
from inkdrop.train.feed import Feed
from inkdrop.train.gradient import gradient
from inkdrop.train.guard import Guard
from inkdrop.train.held_out import held_out_loss
from inkdrop.train.interrupt import hold_interrupts
from inkdrop.train.log import Log
from inkdrop.train.loss_scale import LossScale
from inkdrop.train.order import learning_rate
from inkdrop.train.run import Run
from inkdrop.train.shard import shard
from inkdrop.train.snapshots import keep_snapshot
from inkdrop.train.speed import lay_out, settled
from inkdrop.train.state import load_state, prune, save_state

__all__ = ["Heard", "Trainer", "device_of", "silent"]

Heard = Callable[[str, dict[str, Any]], None]
"""f(kind, facts): "speed", "update", "held_out", "preview", "checkpoint", "end"; and with a "text" for people
"skipped", "rollback", "memory", "advice", "copies", "no_preview", "unsaved"."""


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
        start: the checkpoint from which a run goes on; None: from the beginning.
        trust: allow the codec's folder to name code outside inkdrop.
        ranks: of the job, each of which has a trainer and makes the same calls of it.

    Attributes:
        sharded: whether weights, average and optimiser are held in shares, one a rank.
        buckets: how gradients are added up over ranks; None where there is one rank, or FSDP does it.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path | None,
        heard: Heard = silent,
        device: str = "auto",
        known: Bundle | None = None,
        *,
        start: Path | None = None,
        trust: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks, self.heard = ranks, heard if ranks.first else silent
        if recipe.train.batch < ranks.size:
            raise BadArgument(f"train.batch: got {recipe.train.batch}, need at least one sample a rank, {ranks.size}")
        self.sharded = recipe.train.shard and ranks.size > 1
        self.out = Path() if out is None else out
        self.device = ranks.together(lambda: device_of(device, ranks))
        self.recipe = recipe = replace(recipe, train=settled(recipe.train, self.device, ranks))
        self.feed = ranks.together(lambda: Feed(recipe, self.device, known, trust=trust))
        self.data, self.held_out = self.feed.data, self.feed.held_out
        function = find("losses", recipe.loss.name)
        levels = self.data.levels if self.feed.codec is None else None  # latents are continuous
        own = {"levels": levels} if "levels" in knobs_of(function) else {}
        knobs = check_knobs(recipe.loss.name, function, {**own, **recipe.loss.knobs})
        self.loss: Callable[..., dict[str, Tensor]] = lambda *args: function(*args, **knobs)
        self.accumulate, self.last = recipe.train.accumulate, recipe.train.steps
        self.log = Log(self.out, tensorboard=recipe.train.tensorboard, ranks=ranks)
        self.begin()
        self.ahead = Ahead(self.feed, self.denoiser.schedule, self.device, ranks.share(recipe.train.batch))
        if start is not None:
            self.load(start)
        self._try()

    def begin(self) -> None:
        """Be at update 0, with the weights that the seed gives."""
        train = self.recipe.train
        torch.manual_seed(train.seed)
        self.denoiser = denoiser_of(self.recipe, self.feed.shape, self.feed.terms).to(self.device)
        lay_out(self.denoiser.net, train, self.device)
        self.ema = Ema(self.denoiser.net, train.ema)
        if self.sharded:
            with heeding_loss(self.ranks):
                for net in (self.denoiser.net, self.ema.net):
                    shard(net, self.ranks, self.device)
        self.powers = Powers(self.denoiser.net) if train.snapshots else None
        if train.compile:  # its average stays as it is written
            self.denoiser.net.compile(dynamic=False)
        weights = list(self.denoiser.net.parameters())
        self.buckets = Buckets(weights, self.ranks) if self.ranks.size > 1 and not self.sharded else None
        self.optimiser = torch.optim.AdamW(
            weights, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
        )
        self.scale = LossScale() if train.precision == "float16" else None
        self.draws = Draws(train)
        self.update, self.looked, self.seconds = 0, 0, 0.0
        self.guard, self.history = Guard(), list[dict[str, Any]]()

    @torch.no_grad()
    def _try(self) -> None:
        """A loss of each frame, two questions of the plan: what they refuse is refused before anything is written."""
        before = self.update
        for update in self.feed.frames.trials().values():
            row = self.ahead.rows(before)[0] if isinstance(self.data, Forward) else 0  # that which is read next
            self.update = update
            self.ranks.together(partial(self.losses, [row]))
        self.update = before
        for _ in itertools.islice(steps(self.bundle(), 1, **vars(self.feed.told(1))), 2):
            pass

    def losses(self, rows: Sequence[int], places: range | None = None) -> dict[str, Tensor]:
        """The loss terms of these samples at this update's randomness, each (B,), with their graph.

        Args:
            rows: of the data.
            places: of these samples in the whole batch, by which their randomness is keyed; the first ones by default.
        """
        train = self.recipe.train
        places = range(len(rows)) if places is None else places
        draw = self.draws.of(self.update, places)
        x0, cond = self.ahead.part(self.update, rows, places)
        x0 = x0.to(self.device, non_blocking=True)
        cond = None if cond is None else cond.to(self.device, non_blocking=True)
        dropped = [] if cond is None else [name for name in cond.present if name != "image"]
        if cond is not None and dropped and train.null_rate:
            cond = cond.null(draw.uniform("dropout") < train.null_rate, only=dropped)
        self.denoiser.train()
        denoiser = self.feed.frames.denoiser(self.denoiser, self.update)
        kind = torch.float16 if train.precision == "float16" else torch.bfloat16
        with torch.autocast(self.device.type, kind, enabled=train.precision != "float32"):
            terms = self.loss(denoiser, x0, cond, draw)
        return self.draws.weighed(draw, terms)

    def step(self) -> dict[str, float]:
        """One optimiser update; returns the means of its loss terms, its gradient norm and its learning rate.

        Raises:
            NotFinite: the loss or the gradient is not finite; weights, average, optimiser and update are as before.
            BadArgument: there is not enough memory for one sample.
        """
        facts = self.gradient()
        with hold_interrupts():
            return facts | self.apply()

    def gradient(self) -> dict[str, float]:
        """Leave the clipped gradient of this update's batch in the weights; its loss terms' means and its norm."""
        return gradient(self)

    def apply(self) -> dict[str, float]:
        """Move the weights by the gradient that they hold, and the average after them; the learning rate."""
        train = self.recipe.train
        rate = learning_rate(self.update, train) * self.guard.rate
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.ema.update(self.denoiser.net, self.update)
        if self.powers is not None:
            self.powers.update(self.denoiser.net)
        self.draws.see(self.update)
        self.update += 1
        self.guard.streak = 0
        if self.scale is not None:
            self.scale.grow()
        return {"lr": rate}

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
        averaged = Denoiser(self.ema.net, net.schedule, net.target, net.clock, net.scale_in).eval()
        bundle = Bundle(self.recipe, averaged, self.data.shape, self.data.classes, self.data.levels, card)
        return self.feed.given_to(bundle)

    def held_out_loss(self, count: int = 256) -> dict[str, Any]:
        """The averaged net's loss on held-out data, whole and in bands of time, on fixed noise: see held_out.py."""
        net, seed = self.bundle().denoiser, self.recipe.train.seed
        return held_out_loss(net, self.loss, self.feed, seed=seed, device=self.device, count=count, ranks=self.ranks)

    def preview(self, count: int = 16) -> Tensor:
        """Samples of the averaged model from noise that is the same at every call, (count, C, *S), on all ranks.

        Each rank makes its share of them; where the weights are in shares, each makes all of them together with the
        others.
        """
        sharing = ALONE if self.sharded else self.ranks
        told = self.ranks.together(lambda: self.feed.told(count))
        return sample_shared(self.bundle(), count, sharing, told=told, seed=self.recipe.train.seed)

    def save(self) -> Path:
        """Write a checkpoint of everything, and drop the oldest beyond `keep`."""
        keep_snapshot(self)
        path = self.out / "checkpoints" / f"step-{self.update:08d}"
        if self.ranks.tell(not path.exists()):
            save_state(self, path)
            self.heard("checkpoint", {"path": path, "update": self.update})
        self.ranks.lead(lambda: prune(self.out, self.recipe.train))
        return path

    def load(self, folder: Path) -> None:
        """Take up the weights, average, optimiser and progress of a checkpoint.

        Raises:
            BadCheckpoint: it was not made for resuming, or does not fit.
        """
        self.ranks.together(lambda: load_state(self, folder))

    def run(self, *, max_steps: int | None = None, max_time: float | None = None) -> str:
        """Train until the recipe's steps, max_steps updates in all, or max_time seconds of this call.

        A checkpoint is written at the end, also when it is interrupted (Ctrl-C, SIGTERM) or cannot go on, as long as
        the weights are finite. What train.skips and train.rollbacks say is done where losses are not finite.

        Returns:
            Why it ended: "finished", "max-steps", "max-time", "interrupted" or "terminated"; heard is told too ("end").

        Raises:
            Diverged: the losses stay outside the finite numbers.
            BadData: a sample cannot be read any more.
            BadArgument: a file cannot be written, or there is not enough memory.
            Lost: another rank is gone.
        """
        with self.log, keeping_memory(), heeding_loss(self.ranks):
            why = Run(self, self.log).go(max_steps, max_time)
        self.heard("end", {"update": self.update, "why": why})
        return why

    def looks_at(self, update: int) -> bool:
        """Whether a preview and a held-out loss are due: at the 100th update at the latest, then as the recipe says."""
        every = self.recipe.train.preview_every
        return update == min(100, every) or update % every == 0


def device_of(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of a name; "auto" is CUDA where there is a GPU, else the CPU; of several ranks each has its own GPU.

    Raises:
        BadArgument: no such device here, or fewer GPUs than ranks on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.size > 1:
        if ranks.local >= torch.cuda.device_count():
            raise BadArgument(
                f"device: rank {ranks.local} of this machine has no GPU of its own, as there are "
                f"{torch.cuda.device_count()}; start as many ranks (--nproc-per-node), or take --device cpu"
            )
        name = f"cuda:{ranks.local}"
        torch.cuda.set_device(ranks.local)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadArgument(
            f"device: got {name!r}, which is not to be had here ({str(error).splitlines()[0]}); try cpu"
        ) from None
    return device
