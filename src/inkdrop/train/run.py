"""The course of a run: updates, what follows them, and what is done when something goes wrong."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from inkdrop import picture
from inkdrop.bundle import checkpoints
from inkdrop.core.dataset import Forward
from inkdrop.errors import BadArgument, BadData, Diverged, InkdropError
from inkdrop.files import remove_folder
from inkdrop.parallel import out_of_memory
from inkdrop.train.guard import Guard, NotFinite
from inkdrop.train.interrupt import Terminated, heed_terminate, hold_interrupts, note_interrupts
from inkdrop.train.log import Log
from inkdrop.train.look import advise, colours_of, copies, copies_text, drift, drift_text
from inkdrop.train.record import note_progress, write_atomically
from inkdrop.train.snapshots import drop_later, keep_snapshot
from inkdrop.train.state import finite, newest_good

if TYPE_CHECKING:
    from inkdrop.train.trainer import Trainer

__all__ = ["Run"]


_WHY = (None, "max-time", "interrupted", "terminated")
"""Why ranks stop before the last update; of several reasons the last one here is given."""


class Run:
    """One call of `Trainer.run`: from where the trainer is to the end, or to a limit.

    Args:
        trainer: with its weights, at the update from which to go on.
        log: of the run.
    """

    def __init__(self, trainer: Trainer, log: Log) -> None:
        self.trainer, self.log, self.train = trainer, log, trainer.recipe.train
        self._began, self._before = time.monotonic(), trainer.seconds
        self._colours: dict[str, list[float]] | None = None
        self._asked: list[str] = []  # by signals, while there are other ranks to tell of it
        self._shown: tuple[int, Tensor | None] = (-1, None)  # the newest preview, and its update

    def go(self, max_steps: int | None, max_time: float | None) -> str:
        """Train, and say why it ended.

        Raises:
            Diverged: the run went back as often as it may; its last good checkpoint is there.
            BadData: a sample cannot be read any more; a checkpoint is there.
            BadArgument: a file cannot be written; the last checkpoint is there.
        """
        trainer, train = self.trainer, self.train
        trainer.last = train.steps if max_steps is None else min(train.steps, max_steps)
        ended = "finished" if trainer.last == train.steps else "max-steps"
        if trainer.update >= trainer.last:
            return ended
        trainer.ranks.lead(lambda: drop_later(trainer.out, trainer.update))
        with trainer.ahead.running(trainer.last):
            return self._guarded(ended, max_time)

    def _guarded(self, ended: str, max_time: float | None) -> str:
        """Train, and say why it ended, with what is written then; `ended` if that was the last update."""
        try:
            if self.trainer.ranks.size > 1:
                with note_interrupts() as self._asked:
                    return self._train(max_time) or ended
            with heed_terminate():
                try:
                    return self._train(max_time) or ended
                except KeyboardInterrupt as stop:
                    with hold_interrupts():
                        self._save()
                    return "terminated" if isinstance(stop, Terminated) else "interrupted"
        except Diverged:
            raise
        except (InkdropError, OSError) as error:
            raise self._ended(error) from None

    def _train(self, max_time: float | None) -> str | None:
        """Updates until the last, or until it is to stop: why, the same on all ranks; None where it came there."""
        trainer = self.trainer
        if not trainer.update:
            trainer.history = [{"update": 0, **_loss_of(trainer.held_out_loss())}]
        elif trainer.looks_at(trainer.update) and trainer.looked < trainer.update:
            self._look()  # the run was stopped in the middle of this one
        while trainer.update < trainer.last:
            self._step()
            late = max_time is not None and time.monotonic() - self._began >= max_time
            why = self._stopped(late)
            if why == "max-time":
                self._mend()
                self._close()
            elif why is not None:
                self._save()
            if why is not None:
                return why
        self._close()
        return None

    def _stopped(self, late: bool) -> str | None:
        """Why all ranks stop after this update: a signal to one of them, or rank 0's clock; None to go on."""
        asked = max((_WHY.index(why) for why in self._asked), default=0)
        return _WHY[self.trainer.ranks.most(max(asked, int(late and self.trainer.ranks.first)))]

    def _step(self) -> None:
        """An update, or a skipped one, and what is due after it."""
        trainer = self.trainer
        before, micro = trainer.update, trainer.accumulate
        try:
            facts = trainer.gradient()
        except NotFinite as error:
            self._skip(error)
        else:
            with hold_interrupts():
                facts |= trainer.apply()
                self._note(facts)
            rate = trainer.update * self.train.batch / max(trainer.seconds, 1e-9)
            trainer.heard(
                "update", {"update": trainer.update, "last": trainer.last, **facts, "samples_per_second": rate}
            )
        if trainer.accumulate != micro:
            self._tell_memory()
        if trainer.update > before:
            self._due()

    def _note(self, facts: dict[str, float]) -> None:
        """The time that has passed, and the line of an update where one is due."""
        trainer = self.trainer
        trainer.seconds = self._before + time.monotonic() - self._began
        if trainer.update % self.train.log_every == 0:
            rate = trainer.update * self.train.batch / max(trainer.seconds, 1e-9)
            timing = {"seconds": round(trainer.seconds, 3), "samples_per_second": round(rate, 1)}
            self.log.write(trainer.update, {**facts, **timing})

    def _tell_memory(self) -> None:
        """Say and log that the micro-batch was made smaller."""
        trainer = self.trainer
        size = -(-self.train.batch // trainer.accumulate)
        text = (
            f"memory ran out, so each update of {self.train.batch} samples is now computed in {trainer.accumulate} "
            f"parts of at most {size} (train.accumulate={trainer.accumulate}); its numbers stay the same"
        )
        facts = {"accumulate": trainer.accumulate, "micro_batch": size}
        self.log.write(trainer.update, {"out_of_memory": facts})
        trainer.heard("memory", {"update": trainer.update, **facts, "text": text})

    # ---- losses that are not finite -----------------------------------------------------------------------------

    def _skip(self, error: NotFinite) -> None:
        """Leave an update out; go back if it was one too many in a row."""
        trainer = self.trainer
        with hold_interrupts():
            trainer.guard.skipped += 1
            trainer.guard.streak += 1
            trainer.update += 1
            facts = {"skipped": trainer.guard.skipped, "not_finite": error.what, "samples": list(error.names)}
            self.log.write(trainer.update, facts)
        text = f"skipped, as its {error.what} is not finite for {error.samples}"
        trainer.heard("skipped", {"update": trainer.update, **facts, "text": text})
        if trainer.guard.streak >= self.train.skips:
            self._go_back(f"the {error.what} was not finite in {self.train.skips} updates in a row, at last for "
                          f"{error.samples}")  # fmt: skip

    def _go_back(self, why: str) -> None:
        """Take up the last good checkpoint, or the start, with half the learning rate.

        Raises:
            Diverged: that was done as often as train.rollbacks allows.
        """
        trainer, guard = self.trainer, self.trainer.guard
        ranks, good = trainer.ranks, self._good()
        if guard.rollbacks >= self.train.rollbacks:
            there = f"its last good checkpoint is {good}" if good else "it has no checkpoint"
            raise Diverged(
                f"training: {why}; gave up at update {trainer.update} after {guard.rollbacks} returns; {there}"
            )
        with hold_interrupts():
            where, seconds = trainer.update, trainer.seconds
            ranks.lead(lambda: _remove_later(trainer.out, good))
            trainer.begin() if good is None else trainer.load(good)
            ranks.lead(lambda: drop_later(trainer.out, trainer.update))
            self.log.cut(trainer.update, guard.rollbacks, looked=trainer.looks_at(trainer.update))
            trainer.seconds = seconds
            trainer.guard = Guard(guard.skipped, 0, guard.rollbacks + 1, guard.rate / 2)
            facts = {"rollback": trainer.guard.rollbacks, "from": where, "rate": trainer.guard.rate, "why": why}
            self.log.write(trainer.update, facts)
        text = f"{why}: back from update {where} to {trainer.update}, with {trainer.guard.rate:g} of the learning rate"
        trainer.heard("rollback", {"update": trainer.update, **facts, "text": text})

    def _good(self) -> Path | None:
        """The checkpoint to go back to, which rank 0 looks for."""
        there = self.trainer.ranks.lead(lambda: newest_good(self.trainer.out, self.train))
        name = self.trainer.ranks.tell(None if there is None else there.name)
        return None if name is None else self.trainer.out / "checkpoints" / str(name)

    def _ended(self, error: InkdropError | OSError) -> InkdropError:
        """The error that ends the run, with where it stands; a checkpoint is written if that can be."""
        trainer = self.trainer
        text = str(error) if isinstance(error, InkdropError) else f"{error.filename or 'file'}: {error.strerror}"
        try:
            with hold_interrupts():
                self._save()
        except (InkdropError, OSError):
            trainer.heard("unsaved", {"update": trainer.update})
        found = checkpoints(trainer.out)
        there = f"go on from {found[-1].name}" if found else "there is no checkpoint yet, so start again"
        kind = BadData if isinstance(error, BadData | FileNotFoundError) else BadArgument
        ended = kind(f"{text}; stopped at update {trainer.update}; {there} with: inkdrop resume {trainer.out}")
        ended.echo = not trainer.ranks.first
        return ended

    # ---- looks and checkpoints ----------------------------------------------------------------------------------

    def _due(self) -> None:
        """A look and a checkpoint, when they are due."""
        trainer = self.trainer
        look, saving = trainer.looks_at(trainer.update), trainer.update % self.train.save_every == 0
        snapshot = self.train.snapshots and trainer.update % self.train.snapshots == 0
        if (look or saving or snapshot or trainer.update >= trainer.last) and self._mend():
            return
        if look:
            self._look()
        keep_snapshot(trainer)
        if saving:
            self._save()

    def _mend(self) -> bool:
        """Go back if what a checkpoint would hold is not finite; whether that was so."""
        if finite(self.trainer):
            return False
        self._go_back(f"the weights are not finite at update {self.trainer.update}")
        return True

    def _save(self) -> None:
        """A checkpoint, unless what it would hold is not finite: then the one before is the newest."""
        trainer = self.trainer
        if finite(trainer):
            trainer.save()
            trainer.ranks.lead(lambda: note_progress(trainer.out / "run.json", trainer.update, trainer.seconds))

    def _close(self) -> None:
        """The last look and the last checkpoint."""
        trainer = self.trainer
        if not (trainer.looks_at(trainer.update) and trainer.looked == trainer.update):
            self._look()
        x = self._shown[1] if self._shown[0] == trainer.update else self._preview()
        found = None if x is None else self._copies(x)
        if found is not None:
            self.log.write(trainer.update, {"copies": found})
            if found["copies"]:
                trainer.heard("copies", {"update": trainer.update, **found, "text": copies_text(found)})
        self._save()

    def _copies(self, x: Tensor) -> dict[str, Any] | None:
        """How near samples come to training images, which rank 0 looks for; None where that is not looked for."""
        if x.ndim != 4:
            return None
        ranks, trainer = self.trainer.ranks, self.trainer
        found: dict[str, Any] | None = ranks.tell(ranks.lead(lambda: copies(x, trainer.data, trainer.held_out)))
        return found

    def _preview(self) -> Tensor | None:
        """Samples; None where the net is not yet such that they are finite, or memory does not suffice for them."""
        trainer, why = self.trainer, ""
        try:
            return trainer.preview()
        except Diverged:
            why = "its samples are not finite yet"
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            why = "there is not enough memory for one"
        trainer.heard("no_preview", {"update": trainer.update, "text": f"no preview, as {why}; training goes on"})
        return None

    def _look(self) -> None:
        """Held-out loss, a sample grid and its colours, and advice; all from fixed noise, written down together."""
        trainer = self.trainer
        held_out = trainer.held_out_loss()
        losses = _loss_of(held_out)
        lines: list[dict[str, Any]] = [{"held_out": held_out if losses else {"samples": held_out["samples"]}}]
        trainer.heard("held_out", {"update": trainer.update, **lines[0]["held_out"]})
        seen: dict[str, Any] = {"update": trainer.update, **losses}
        told: list[tuple[str, str]] = []
        x = self._preview()
        self._shown = trainer.update, x
        if x is not None and (x.ndim == 4 or x.shape[1:] in ((1,), (2,))):
            drawn = x
            trainer.ranks.lead(lambda: self._draw(drawn))
        if x is not None and x.ndim == 4:
            stream = isinstance(trainer.data, Forward)  # which would be read to its end for it
            shown = trainer.held_out if stream else trainer.data
            self._colours = self._colours or trainer.ranks.together(lambda: colours_of(shown))
            lines.append({"colour": drift(x, self._colours)})
            seen["drift"] = lines[-1]["colour"]["drift"]
            last = next((look["drift"] for look in reversed(trainer.history) if "drift" in look), None)
            if (text := drift_text(lines[-1]["colour"], last)) is not None:
                told.append(("drift", text))
        if (advice := advise([*trainer.history, seen])) is not None:
            seen["advice"] = advice[0]
            if trainer.history[-1].get("advice") != advice[0]:
                told.append(advice)
        lines += [{"advice": kind, "text": text} for kind, text in told]
        with hold_interrupts():
            trainer.history, trainer.looked = [*trainer.history, seen], trainer.update
            self.log.write(trainer.update, *lines)
        for kind, text in told:
            trainer.heard("advice", {"update": trainer.update, "kind": kind, "text": text})

    def _draw(self, x: Tensor) -> None:
        """The grid of a preview as a file."""
        trainer = self.trainer
        path = trainer.out / "previews" / f"step-{trainer.update:08d}.png"
        path.parent.mkdir(exist_ok=True)
        png = io.BytesIO()
        picture.grid(x).save(png, "PNG")
        write_atomically(path, png.getvalue())
        trainer.heard("preview", {"path": path, "update": trainer.update})


def _remove_later(run: Path, good: Path | None) -> None:
    """Drop the checkpoints after the one to go back to, or all."""
    for late in checkpoints(run):
        if good is None or late.name > good.name:
            remove_folder(late)


def _loss_of(held_out: dict[str, Any]) -> dict[str, float]:
    """{"held_out": loss} where there is one that is finite, else {}."""
    loss = held_out.get("loss")
    return {} if loss is None or not abs(loss) < float("inf") else {"held_out": loss}
