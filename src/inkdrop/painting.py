"""Painting: pictures whose missing part is drawn anew, inside (inpaint) or beyond their edges (outpaint)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn import functional

from inkdrop.core.ask import Ask, Noise, Sampler, Sampling
from inkdrop.core.forward import diffuse
from inkdrop.core.grid import Grid
from inkdrop.denoiser import Denoiser
from inkdrop.edit.inpaint import fitted, repaint
from inkdrop.edit.inpaint import inpaint as hold
from inkdrop.edit.windows import windows as tile
from inkdrop.errors import BadArgument, BadShape
from inkdrop.latent import in_latents, of_pictures_only
from inkdrop.model import Model
from inkdrop.session import How, Session, open_session

__all__ = ["inpaint", "outpaint"]

JUMP = 10  # RePaint's block unless told otherwise, in steps


class _Passes(NamedTuple):
    """RePaint's knobs."""

    resample: int
    jump: int | None


@in_latents("images", keep="keep")
def inpaint(
    model: Model | Denoiser,
    images: Tensor,
    keep: Tensor,
    *,
    resample: int = 1,
    jump: int | None = None,
    **how: Unpack[How],
) -> Tensor:
    """Draw the pixels that are not kept anew, to go with those that are.

    x0 ← where(keep, known, x0) at every question (`edit.inpaint`); with resample > 1 RePaint's passes over blocks of
    the grid (`edit.repaint`). Kept pixels are returned to 1e-6. Cost: that of sampling, times `resample`.

    Args:
        model: a Bundle, or a Denoiser.
        images: (B, C, *S); what is not kept in them means nothing.
        keep: bool, (B, C, *S) with 1 where it is shared, or without the leading axes; True where a pixel is kept.
        resample: passes over each block, ≥ 1; 1 is plain replacement, 10 is the paper's.
        jump: the length of a block in steps, ≥ 1; 10 by default; only with resample > 1.
        how: see `session.How`.

    Returns:
        (B, C, *S), float32.

    Raises:
        BadShape: keep is not bool, or does not fit the images.
        BadArgument: everything is kept or nothing is, or a knob is out of its range or without effect.
    """
    session = open_session(model, images, "inpaint", **how)
    keep = fitted(keep, images)
    if bool(keep.all()) or not bool(keep.any()):
        share = "every" if keep.all() else "no"
        raise BadArgument(f"inpaint keep: got a mask that keeps {share} pixel, need some of both; is it inverted?")
    return _filled(session, images, keep, session.grid(), _Passes(resample, jump))


@of_pictures_only
def outpaint(
    model: Model | Denoiser,
    images: Tensor,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    windows: bool | None = None,
    stride: int | None = None,
    resample: int = 1,
    jump: int | None = None,
    **how: Unpack[How],
) -> Tensor:
    """Extend pictures beyond their edges: the new area of a larger canvas is inpainted.

    The net is asked about the canvas as a whole, or about overlapping windows of the trained size whose beliefs are
    averaged (`edit.windows`): those fit nets of one size, and repeat what the model knows along the canvas.

    Args:
        model: a Bundle, or a Denoiser.
        images: (B, C, H, W).
        left: pixels to add, ≥ 0.
        right: likewise.
        top: likewise.
        bottom: likewise.
        windows: whether to ask in windows; by default only where the net refuses the canvas, or a stride is given.
        stride: pixels from one window to the next; half the shorter side by default; only with windows.
        resample: as in `inpaint`.
        jump: as in `inpaint`.
        how: see `session.How`.

    Returns:
        (B, C, top + H + bottom, left + W + right), float32.

    Raises:
        BadShape: the model does not make pictures.
        BadArgument: nothing to add, or a knob out of its range or without effect.
    """
    session = open_session(model, images, "outpaint", **how)
    if images.ndim != 4:
        raise BadShape(f"outpaint: got images of shape {tuple(images.shape[1:])}, need (C, H, W)")
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    for name, pixels in sides.items():
        if pixels < 0:
            raise BadArgument(f"outpaint {name}: got {pixels}, need at least 0 pixels")
    if not any(sides.values()):
        raise BadArgument("outpaint: nothing to add; give left, right, top or bottom")
    canvas, keep = (functional.pad(x, tuple(sides.values())) for x in (images, torch.ones_like(images)))
    grid, size = session.grid(), tuple(images.shape[2:])
    if windows is None:
        windows = stride is not None or not _takes(session, canvas[:1], grid)
    if stride is not None and not windows:
        raise BadArgument(f"outpaint stride: got {stride}, which has no effect without windows; leave it out")
    tiles = (size, max(1, min(size) // 2) if stride is None else stride) if windows else None
    return _filled(session, canvas, keep > 0, grid, _Passes(resample, jump), tiles)


def _takes(session: Session, canvas: Tensor, grid: Grid) -> bool:
    """Whether the net answers about a canvas of this size: it is asked once."""
    cond = None if session.cond is None else session.cond.take(slice(0, 1)).to(session.device)
    try:
        with torch.no_grad():
            session.parts["net"](Ask(canvas.to(session.device, torch.float32), grid[0], cond))
    except BadShape:
        return False
    return True


def _filled(
    session: Session,
    images: Tensor,
    keep: Tensor,
    grid: Grid,
    passes: _Passes,
    tiles: tuple[tuple[int, ...], int] | None = None,
) -> Tensor:
    """Sample from noise with the kept pixels held, answered in windows of (size, stride) if asked for."""
    resample, jump = passes
    if jump is not None and resample == 1:
        raise BadArgument(f"repaint jump: got {jump}, which has no effect with resample=1; try resample=10")
    images, keep = images.to(session.device, torch.float32), keep.to(session.device)
    unit = session.unit(tuple(images.shape[1:]))
    x = torch.where(keep, diffuse(images, unit, grid[0]), session.schedule.start(unit, grid[0]))

    def edit(sampler: Sampler, rows: slice) -> Sampler:
        def held(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
            return hold(sampler(x, grid, noise), images[rows], keep[rows])

        return held if resample == 1 else partial(repaint, held, jump=JUMP if jump is None else jump, resample=resample)

    outer = None if tiles is None else partial(tile, size=tiles[0], stride=tiles[1])
    return (session if resample == 1 else _white(session)).run(x, grid, edit=edit, outer=outer)


def _white(session: Session) -> Session:
    """With white noise: RePaint goes the same way several times, for which a Brownian path has one noise only."""
    if session.plan.noise == "brownian":
        raise BadArgument("repaint noise: got brownian, which is the same in every pass; need white")
    return replace(session, plan=replace(session.plan, noise="white"))
