"""Session: a model, how to ask it, and the noise of some images, for whatever is run on them batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor

from inkdrop import condition
from inkdrop.condition import Attributes, Told
from inkdrop.core.ask import Ask, Belief, Noise, Sampler, Sampling
from inkdrop.core.check import check_range, check_state
from inkdrop.core.cond import Cond
from inkdrop.core.grid import Grid
from inkdrop.core.noise import normal
from inkdrop.core.schedule import Schedule
from inkdrop.denoiser import Denoiser
from inkdrop.drive import Answerer, Step, drive, overhear
from inkdrop.edit.cut import lower_grid
from inkdrop.edit.hook import See, hook
from inkdrop.errors import BadArgument, BadData
from inkdrop.find import Part
from inkdrop.generate import cond_of, evaluating, parts_of, plan_of
from inkdrop.model import Model, conditional
from inkdrop.picture import is_picture
from inkdrop.plan import Plan, grid_of, noise_of, sampling

__all__ = ["Edit", "How", "Session", "check_images", "open_session"]

Edit: TypeAlias = Callable[[Sampler, slice], Sampler]
"""(sampler, rows) -> the sampler with an edit's middleware or combinator round it, for these rows of all images."""

_OWN = ("seed", "first", "label", "text", "attributes", "cond", "plan", "batch", "on_step", "see")
"""What of `How` is no change of the plan."""


class How(TypedDict, total=False):
    """What every verb of `inkdrop.editing` takes besides its own: as in `generate.sample`.

    Attributes:
        seed: of all noise; 0 by default. Image i of a seed has the same noise at any count and batch.
        first: index of the first image; 0 by default.
        label: a class or its name, or one for each image. By default none: the model is asked without its class.
        text: a prompt, or one for each image. By default none.
        attributes: values by name, or such for each image. By default none.
        cond: other conditions, one row an image.
        plan: how to sample; the model's own by default.
        batch: images at a time, ≥ 1; 256 by default.
        on_step: called with (images done before this batch, step); returning True cancels.
        see: a hook, (ask, belief) -> another x0 or None: shown every belief, edited already, before the sampler.
        sampler: a change of the plan, as are the following: another sampler.
        grid: another spacing.
        steps: another number of steps.
        guidance: the scale of classifier-free guidance.
        clip: whether x0 is clipped.
        guide: guides to add.
        combine: another combinator.
        noise: another kind of noise.
    """

    seed: int
    first: int
    label: int | str | Sequence[int | str] | None
    text: str | Sequence[str] | None
    attributes: Attributes | Sequence[Attributes] | None
    cond: Cond | None
    plan: Plan | None
    batch: int
    on_step: Callable[[int, Step], bool | None] | None
    see: See | None
    sampler: str | Part | None
    grid: str | Part | None
    steps: int | None
    guidance: float | None
    clip: bool | None
    guide: Sequence[str | Part] | None
    combine: str | Part | None
    noise: Literal["white", "brownian"] | None


@dataclass(frozen=True)
class Session:
    """Some images of a model, and everything that is needed to run samplings on them.

    Attributes:
        parts: what answers, by the name in Ask.of.
        schedule: the model's noise levels.
        plan: how to sample.
        cond: what the net is told besides, one row an image.
        seed: of all noise.
        images: the index of each image, by which its noise is keyed.
        batch: images at a time.
        on_step: as in `generate.sample`.
        see: a hook.
        device: where the net is.
    """

    parts: Mapping[str, Answerer]
    schedule: Schedule
    plan: Plan
    cond: Cond | None
    seed: int
    images: tuple[int, ...]
    batch: int
    on_step: Callable[[int, Step], bool | None] | None
    see: See | None
    device: torch.device

    def grid(self, strength: float = 1.0, what: str = "strength") -> Grid:
        """The plan's levels from the time `strength` down to clean, as many steps at any strength.

        Raises:
            BadArgument: a strength outside (0, 1], or with fewer levels below it than steps.
        """
        return lower_grid(self.schedule, strength, self.plan.steps, lambda cut: grid_of(self.plan, cut), what)

    def unit(self, shape: tuple[int, ...]) -> Tensor:
        """Unit normal noise of rows of this shape, one an image: draw 0, which no sampler draws again."""
        return normal((len(self.images), *shape), self.seed, self.images, 0).to(self.device, torch.float32)

    def each(self, count: int, *, apart: bool = True) -> Session:
        """The same with each image `count` times, one after another; apart: each with noise of its own."""
        rows = [i for i in range(len(self.images)) for _ in range(count)]
        keys = [self.images[0] + j for j in range(len(rows))] if apart else [self.images[i] for i in rows]
        return replace(self, images=tuple(keys), cond=None if self.cond is None else self.cond.take(rows))

    def run(
        self,
        x: Tensor,
        grid: Grid,
        *,
        edit: Edit | None = None,
        sampler: Sampler | None = None,
        outer: Callable[[Sampling], Sampling] | None = None,
    ) -> Tensor:
        """Run one sampling a batch, and return all results (B, C, *S), on the CPU.

        Args:
            x: (B, C, *S), at grid[0]; at whatever level `sampler` starts from where one is given.
            grid: levels in falling order.
            edit: put round the sampler, inside of guidance.
            sampler: takes the place of the plan's.
            outer: put round everything, nearest the net.
        """
        out = []
        with evaluating(self.parts):
            for start in range(0, len(x), self.batch):
                rows, heard = slice(start, start + self.batch), list[tuple[Ask, Belief]]()
                noise, cond = self._of(rows)

                def inner(given: Sampler, rows: slice = rows, heard: list[tuple[Ask, Belief]] = heard) -> Sampler:
                    ears = _eared(sampler or given, heard, self.see)
                    return ears if edit is None else edit(ears, rows)

                work = sampling(self.plan, x[rows].to(self.device), grid, noise, cond, edit=inner)
                tell = None if self.on_step is None else _after(self.on_step, start)
                work = work if outer is None else outer(work)
                out.append(drive(work, self.parts, on_step=tell, heard=heard).cpu())
        return torch.cat(out)

    def _of(self, rows: slice) -> tuple[Noise, Cond | None]:
        cond = None if self.cond is None else self.cond.take(rows).to(self.device)
        return noise_of(self.plan, self.seed, self.images[rows]), cond


def _eared(sampler: Sampler, heard: list[tuple[Ask, Belief]], see: See | None) -> Sampler:
    """The sampler with its questions and answers noted, and a hook, if there is one, outside of that."""

    def run(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
        work = overhear(sampler(x, grid, noise), heard)
        return work if see is None else hook(work, see)

    return run


def _after(on_step: Callable[[int, Step], bool | None], done: int) -> Callable[[Step], bool | None]:
    return lambda step: on_step(done, step)


def check_images(model: Model | Denoiser, data: Tensor, what: str, *, ranged: bool = True) -> None:
    """Refuse images that the model could not have made.

    Args:
        model: a Bundle; of a Denoiser the shape is not known.
        data: (B, C, *S).
        what: the verb, for messages.
        ranged: whether pictures must lie in [-1, 1].

    Raises:
        BadArgument: no image.
        BadShape: not of the model's shape.
        BadData: values that are not finite, or pictures outside [-1, 1].
    """
    shape = tuple(data.shape[1:]) if isinstance(model, Denoiser) else model.shape
    check_state(data, shape, f"{what} images")
    if len(data) < 1:
        raise BadArgument(f"{what} images: got none, need at least 1")
    if not bool(torch.isfinite(data).all()):
        raise BadData(f"{what} images: got values that are not finite")
    if ranged and is_picture(shape) and getattr(model, "ranged", True):
        check_range(data, f"{what} images")


def open_session(
    model: Model | Denoiser, data: Tensor, what: str, *, ranged: bool = True, **how: Unpack[How]
) -> Session:
    """A session on these images.

    Args:
        model: a Bundle, or a Denoiser.
        data: (B, C, *S), as the model makes them.
        what: the verb, for messages.
        ranged: whether pictures must lie in [-1, 1].
        how: see `How`.

    Raises:
        BadArgument: no image, or a model that must be told a class and is not, or options that do not go together.
        BadShape: not of the model's shape.
        BadData: values that are not finite, or pictures outside [-1, 1].
    """
    check_images(model, data, what, ranged=ranged)
    batch, first = how.get("batch", 256), how.get("first", 0)
    if batch < 1:
        raise BadArgument(f"{what} batch: got {batch}, need at least 1")
    changes = {name: value for name, value in how.items() if name not in _OWN}
    plan, cond = plan_of(model, how.get("plan"), changes), how.get("cond")
    told = Told(how.get("label"), how.get("text"), how.get("attributes"))
    if isinstance(model, Denoiser) or cond is not None:
        cond = cond_of(model, len(data), told, cond)
    elif model.pair is not None:
        raise BadArgument(f"{what}: this model starts from a picture of its own; give it as cond, or use sample")
    else:
        cond = condition.as_said(model, len(data), told)
        plan = _untold(model, plan, how.get("guidance")) if told.nothing and conditional(model) else plan
    denoiser = model if isinstance(model, Denoiser) else model.denoiser
    return Session(
        parts_of(model),
        denoiser.schedule,
        plan,
        cond,
        how.get("seed", 0),
        tuple(range(first, first + len(data))),
        batch,
        how.get("on_step"),
        how.get("see"),
        next((p.device for p in denoiser.parameters()), torch.device("cpu")),
    )


def _untold(model: Model, plan: Plan, guidance: float | None) -> Plan:
    """The plan of a model that is told nothing: without guidance by what it is told.

    Raises:
        BadArgument: something in the plan needs a condition.
    """
    one = "a class" if model.classes else "a text" if model.reader else "attributes"
    what = one.removeprefix("a ")
    if guidance is not None:
        raise BadArgument(
            f"guidance: got {guidance:g}, but there is no {what} to guide by; give {one}, or leave it out"
        )
    for part in plan.guide:
        if part.name == "classifier":
            raise BadArgument("classifier: there is no class to guide towards; give a class")
    guide = tuple(p for p in plan.guide if p.name != "cfg" or p.knobs.get("negative") is not None)
    return replace(plan, guide=guide)
