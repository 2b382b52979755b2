"""Editing: inpaint, outpaint, img2img, invert, interpolate, vary and restore, with any model, sampler and guidance.

Each verb takes a model (a Bundle, or a Denoiser), images (B, C, *S) in the range of its data, knobs of its own, and
what `session.How` lists: seed, label, plan, steps, guidance and so on. It returns float32 results on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias, Unpack

import torch
from torch import Tensor

from inkdrop.core.ask import Noise, Sampler, Sampling
from inkdrop.core.check import check_state
from inkdrop.core.forward import diffuse
from inkdrop.core.grid import Grid
from inkdrop.denoiser import Denoiser
from inkdrop.edit.operators import Operator
from inkdrop.edit.restore import ddnm, pigdm
from inkdrop.errors import BadArgument, UnknownName
from inkdrop.find import Part, build
from inkdrop.inversion import climbed, decode, interpolate, interpolate_seeds, invert, open_deterministic
from inkdrop.latent import in_latents, of_pictures_only
from inkdrop.model import Model
from inkdrop.painting import inpaint, outpaint
from inkdrop.session import How, Session, open_session

__all__ = [
    "VERBS",
    "Restorer",
    "decode",
    "img2img",
    "inpaint",
    "interpolate",
    "interpolate_seeds",
    "invert",
    "operator_of",
    "outpaint",
    "restore",
    "vary",
]

Restorer: TypeAlias = Literal["ddnm", "pigdm"]


@in_latents("images")
def img2img(model: Model | Denoiser, images: Tensor, *, strength: float = 0.6, **how: Unpack[How]) -> Tensor:
    """Images like the given ones: noised up to the time `strength`, and sampled down again (SDEdit: Meng et al. 2022).

    x_t = alpha·x0 + sigma·noise at t = strength, then down a grid of as many steps as the plan has. Strength 0 returns
    the images and asks nothing; 1 is sampling, from (nearly) pure noise. Cost: that of sampling.

    Args:
        model: a Bundle, or a Denoiser.
        images: (B, C, *S).
        strength: a time of the model's schedule, in [0, 1], rounded to its entries.
        how: see `session.How`.

    Returns:
        (B, C, *S), float32.

    Raises:
        BadArgument: a strength outside [0, 1], or with fewer levels below it than steps.
    """
    session = open_session(model, images, "img2img", **how)
    if strength == 0:
        return images.detach().to("cpu", torch.float32, copy=True)
    return _redrawn(session, images, session.grid(strength))


def _redrawn(session: Session, images: Tensor, grid: Grid) -> Tensor:
    """Noise the images up to the grid's start, each with its own noise, and sample them down."""
    images = images.to(session.device, torch.float32)
    return session.run(diffuse(images, session.unit(tuple(images.shape[1:])), grid[0]), grid)


@in_latents("images")
def vary(
    model: Model | Denoiser,
    images: Tensor,
    *,
    count: int = 8,
    strength: float = 0.5,
    eta: float | None = None,
    iterations: int | None = None,
    **how: Unpack[How],
) -> Tensor:
    """Several variations of each image.

    By default they are `img2img` with other noise for each. With `eta` the image is inverted up to the time `strength`
    and decoded by DDIM with fresh noise: the less of it, the more they keep of the image's own noise.

    Args:
        model: a Bundle, or a Denoiser.
        images: (B, C, *S).
        count: variations of each, ≥ 1.
        strength: a time of the model's schedule, in (0, 1].
        eta: how much of the posterior's standard deviation is fresh noise, in (0, 1].
        iterations: of the inversion, 3 by default; only with eta.
        how: see `session.How`; with eta no sampler can be given.

    Returns:
        (B, count, C, *S), float32.

    Raises:
        BadArgument: a knob out of its range or without effect.
    """
    if count < 1:
        raise BadArgument(f"vary count: got {count}, need at least 1")
    if eta is None and iterations is not None:
        raise BadArgument(f"vary iterations: got {iterations}, which has no effect without eta; leave it out")
    if eta is None:
        session = open_session(model, images, "vary", **how)
        many = _redrawn(session.each(count), images.repeat_interleave(count, 0), session.grid(strength))
        return many.reshape(len(images), count, *images.shape[1:])
    if not 0 < eta <= 1:
        raise BadArgument(f"vary eta: got {eta:g}, need a number in (0, 1]; at 0 every variation is the image itself")
    session = open_deterministic(model, images, "vary", "fixed-point", **how)
    grid = session.grid(strength)
    states = climbed(session, images, grid, "fixed-point", 3 if iterations is None else iterations)
    session = replace(session, plan=replace(session.plan, sampler=Part("ddim", {"eta": eta}))).each(count)
    return session.run(states.repeat_interleave(count, 0), grid).reshape(len(images), count, *images.shape[1:])


def operator_of(operator: str | Part | Operator, shape: Sequence[int]) -> Operator:
    """A measurement operator for data of this shape (C, *S): by name, by name and knobs, or itself."""
    if isinstance(operator, Operator):
        return operator
    made: Operator = build("operators", Part(operator) if isinstance(operator, str) else operator, tuple(shape))
    return made


@of_pictures_only
def restore(
    model: Model | Denoiser,
    measured: Tensor,
    operator: str | Part | Operator,
    *,
    method: Restorer = "ddnm",
    noise_std: float = 0.0,
    sd: float | None = None,
    scale: float | None = None,
    **how: Unpack[How],
) -> Tensor:
    """Data from measurements y = A·x0 + noise of them: super-resolution, deblurring, colourising, filling in.

    ddnm replaces what is measured in x0 and leaves the rest to the net; pigdm follows the net's own derivative, so that
    what is measured of one pixel moves others with it (see `edit.restore`). Cost: that of sampling; pigdm's asks take
    about three times as long.

    Args:
        model: a Bundle, or a Denoiser.
        measured: y, (B, *operator.shape).
        operator: A: a name or a Part in the room "operators", or one of your own.
        method: ddnm or pigdm.
        noise_std: standard deviation of the measurements' noise, ≥ 0, in units of the data.
        sd: standard deviation of the data, > 0, 0.5 by default; ddnm needs it only where there is noise.
        scale: how strong pigdm is, > 0, 1 by default.
        how: see `session.How`.

    Returns:
        (B, C, *S), float32.

    Raises:
        BadShape: the measurements are not of the operator's shape.
        BadArgument: a knob out of its range or without effect.
    """
    if method not in ("ddnm", "pigdm"):
        raise UnknownName("restore method", method, ("ddnm", "pigdm"))
    if method == "ddnm" and scale is not None:
        raise BadArgument(f"restore scale: got {scale:g}, which has no effect with ddnm; try method=pigdm")
    if method == "ddnm" and sd is not None and noise_std == 0:
        raise BadArgument(f"restore sd: got {sd:g}, which has no effect with ddnm without noise; try method=pigdm")
    if isinstance(operator, Operator):
        known = operator
    elif isinstance(model, Denoiser):
        raise BadArgument("restore: a bare denoiser does not know its data; give an Operator instead of its name")
    else:
        known = operator_of(operator, model.shape)
    check_state(measured, known.shape, "restore measurements")
    least = known.inverse(measured)
    session = open_session(model, least, "restore", ranged=False, **how)
    grid, y = session.grid(), measured.to(session.device, torch.float32)
    guide = ddnm if method == "ddnm" else partial(pigdm, scale=1.0 if scale is None else scale)

    def edit(sampler: Sampler, rows: slice) -> Sampler:
        def guided(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
            return guide(sampler(x, grid, noise), y[rows], known, noise=noise_std, sd=0.5 if sd is None else sd)

        return guided

    return session.run(session.schedule.start(session.unit(tuple(least.shape[1:])), grid[0]), grid, edit=edit)


VERBS: dict[str, Callable[..., Tensor]] = {
    verb.__name__: verb
    for verb in (inpaint, outpaint, img2img, invert, decode, interpolate, interpolate_seeds, vary, restore)
}
