"""Frames: which part of a picture an update sees, and at which size, for pictures that are large.

Patch training (Wang et al. 2023): most updates see a random window of each picture, and the net is told by two channels
of coordinates where it lies. Progressive training: the first updates see pictures that are averaged over squares of
pixels. Either way one net is trained, which samples at the full size.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from inkdrop.core.cond import Cond
from inkdrop.core.level import Level
from inkdrop.core.noise import Draw
from inkdrop.core.schedule import Schedule
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument, BadShape
from inkdrop.losses.spread import SHARED
from inkdrop.recipe import Recipe

__all__ = ["Frame", "Frames", "Lowered"]


class Frame(NamedTuple):
    """What an update sees of each picture.

    Attributes:
        factor: of how many pixels along each side the mean is one pixel.
        window: the side of the window over the picture's, in (0, 1]; 1 for all of it.
    """

    factor: int = 1
    window: float = 1.0


class Frames:
    """The frames of a run: a pure function of the update, so that a run that is resumed sees what it would have seen.

    Args:
        recipe: its train.windows, full, stages and shift.
        shape: (C, *S) of what is noised.

    Raises:
        BadShape: no pictures, or a side that a stage does not divide.
        BadArgument: something that does not go together with windows or stages.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, ...]) -> None:
        self.train, self.shape = recipe.train, shape
        ends, at = [], 0.0
        for factor, share in self.train.stages:
            at += share
            ends.append((round(at * self.train.steps), factor))
        self._ends = ends
        if self.train.windows or ends:
            self._check(recipe)

    def _check(self, recipe: Recipe) -> None:
        what = "windows" if self.train.windows else "stages"
        if len(self.shape) != 3:
            raise BadShape(f"train.{what}: got data of shape {self.shape}, need pictures (C, H, W)")
        if recipe.image is not None:
            raise BadArgument(f"train.{what}: got an image condition too, which is of the full picture; leave one out")
        if self.train.stages and recipe.codec is not None:
            raise BadArgument("train.stages: got a codec too, and means of latents are no latents; try train.windows")
        for _, factor in self._ends:
            if any(side % factor for side in self.shape[1:]):
                raise BadShape(f"train.stages: got {factor}, which does not divide pictures of {self.shape[1:]}")
        if self._ends and self.train.shift and recipe.loss.name == "hybrid":
            raise BadArgument("train.shift: got the loss hybrid, whose bound is of one chain; use train.shift=false")
        if self._ends and self.train.shift and recipe.loss.knobs.get("times") == "lognormal":
            raise BadArgument("train.shift: lognormal times name their levels themselves; use train.shift=false")

    def at(self, update: int) -> Frame:
        """What an update, counted from 0, sees.

        Of n updates floor(n·full) see full pictures, evenly spread; each other one draws one of the windows.
        """
        for end, factor in self._ends:
            if update < end:
                return Frame(factor)
        sizes, full = self.train.windows, self.train.full
        if not sizes or math.floor((update + 1) * full) > math.floor(update * full):
            return Frame()
        u = float(Draw(self.train.seed, update, [SHARED]).uniform("window"))
        return Frame(window=sizes[int(u * len(sizes))])

    def trials(self) -> dict[Frame, int]:
        """Each frame that there is, and the first update that sees it."""
        if not self.train.windows:
            return {self.at(start): start for start in (0, *(end for end, _ in self._ends))}
        found: dict[Frame, int] = {}
        for update in itertools.count():
            found.setdefault(self.at(update), update)
            if len(found) > len(self.train.windows):
                break
        return found

    def cut(self, x0: Tensor, cond: Cond | None, draw: Draw) -> tuple[Tensor, Cond | None]:
        """What this update sees of pictures (B, C, H, W): all, their means, or a window of each and where it lies."""
        frame = self.at(draw.update)
        if frame.factor > 1:
            return functional.avg_pool2d(x0, frame.factor), cond
        if frame.window == 1:
            return x0, cond
        high, wide = x0.shape[2:]
        h, w = (max(1, round(frame.window * side)) for side in (high, wide))
        free = torch.tensor([high - h + 1, wide - w + 1], dtype=torch.float64)
        corner = (draw.uniform("window", 2) * free).floor().long().to(x0.device)
        y = (corner[:, :1] + torch.arange(h, device=x0.device))[:, :, None]
        x = (corner[:, 1:] + torch.arange(w, device=x0.device))[:, None, :]
        part = x0[torch.arange(len(x0), device=x0.device)[:, None, None], :, y, x].permute(0, 3, 1, 2).contiguous()
        size = corner.new_tensor([h, w]).expand(len(x0), 2)
        window = torch.cat([corner, size], dim=1) / corner.new_tensor([high, wide, high, wide])
        return part, replace(cond or Cond(), window=window.float())

    def denoiser(self, denoiser: Denoiser, update: int) -> Denoiser:
        """The denoiser at the levels of this update: those of the full picture, seen from its means."""
        factor = self.at(update).factor
        if factor == 1 or not self.train.shift:
            return denoiser
        lowered = Lowered(denoiser.schedule, factor)
        return Denoiser(denoiser.net, lowered, denoiser.target, denoiser.clock, denoiser.scale_in)


class Lowered(Schedule):
    """A schedule's levels where each pixel is the mean of factor² pixels: lam + log factor, as noise averages out.

    Each is a level of the schedule itself, at an earlier time, and a net is told that one; what would be cleaner than
    its last noisy level is that level (Hoogeboom et al. 2023, §3.1: log SNR moves by 2·log of the ratio of the sides).

    Args:
        of: the schedule of the full picture.
        factor: ≥ 1.
    """

    def __init__(self, of: Schedule, factor: int) -> None:
        self.of, self.shift = of, math.log(factor)
        self.steps, self.preserving = of.steps, of.preserving

    def __call__(self, t: Tensor | float) -> Level:
        """The level at time t of the full picture."""
        now = self.of(t)
        high = float(self.of(self.of.least).lam)
        moved = self.of.time_of((now.lam + self.shift).clamp(max=high))
        return self.of(torch.where(now.t == 0, now.t, moved))

    def pick(self, u: Tensor) -> Tensor:
        """As the schedule picks."""
        return self.of.pick(u)

    def _noisy(self, t: Tensor) -> tuple[Tensor, Tensor]:
        level = self(t)
        return level.alpha, level.sigma

    def _time(self, lam: Tensor) -> Tensor:
        return self.of.time_of(lam - self.shift)
