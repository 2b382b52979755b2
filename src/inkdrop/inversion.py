"""Inversion: from images to the noise that makes them, back, and on ways between two of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias, Unpack

import torch
from torch import Tensor

from inkdrop.core.ask import Noise, Sampling
from inkdrop.core.forward import diffuse
from inkdrop.core.grid import Grid
from inkdrop.denoiser import Denoiser
from inkdrop.edit.invert import Method
from inkdrop.edit.invert import invert as climb
from inkdrop.edit.slerp import slerp
from inkdrop.errors import BadArgument, BadShape, UnknownName
from inkdrop.find import Part
from inkdrop.latent import in_latents
from inkdrop.model import Model
from inkdrop.session import How, Session, check_images, open_session

__all__ = ["PARTNERS", "Via", "climbed", "decode", "interpolate", "interpolate_seeds", "invert", "open_deterministic"]

Via: TypeAlias = Literal["inversion", "noise"]

PARTNERS = {"naive": "ddim", "fixed-point": "ddim", "heun": "heun"}  # the sampler that each inversion is undone by


@in_latents("images", back=False)
def invert(
    model: Model | Denoiser,
    images: Tensor,
    *,
    depth: float = 1.0,
    method: Method = "fixed-point",
    iterations: int = 3,
    **how: Unpack[How],
) -> Tensor:
    """The states at the time `depth` from which `decode` makes these images (DDIM inversion; see `edit.invert`).

    Cost: one ask a step for naive, `iterations` for fixed-point, two for heun. Guidance is inverted with the rest.

    Args:
        model: a Bundle, or a Denoiser.
        images: (B, C, *S).
        depth: a time of the model's schedule, in (0, 1]; 1 is noise.
        method: naive, fixed-point or heun.
        iterations: of the fixed point, ≥ 1.
        how: see `session.How`; the sampler is the method's, so none can be given.

    Returns:
        (B, C, *S), the states, float32.
    """
    session = open_deterministic(model, images, "invert", method, **how)
    return climbed(session, images, session.grid(depth, "depth"), method, iterations)


@in_latents()
def decode(
    model: Model | Denoiser, states: Tensor, *, depth: float = 1.0, method: Method = "fixed-point", **how: Unpack[How]
) -> Tensor:
    """Sample from given states at the time `depth`: undoes `invert` with the same depth, method and options.

    With another label than the inversion's it shows what that class makes of the image's noise.

    Args:
        model: a Bundle, or a Denoiser.
        states: (B, C, *S), at the first level of the grid.
        depth: their time, in (0, 1].
        method: of the inversion: heun is undone by the sampler heun, the others by ddim.
        how: see `session.How`; the sampler is the method's, so none can be given.

    Returns:
        (B, C, *S), float32.
    """
    session = open_deterministic(model, states, "decode", method, ranged=False, **how)
    return session.run(states.to(torch.float32), session.grid(depth, "depth"))


def open_deterministic(
    model: Model | Denoiser, data: Tensor, what: str, method: Method, *, ranged: bool = True, **how: Unpack[How]
) -> Session:
    """A session whose sampler is the one that this inversion is undone by, run once and without fresh noise.

    Raises:
        UnknownName: no such method.
        BadArgument: another sampler, a combinator or noise was asked for.
    """
    if method not in PARTNERS:
        raise UnknownName(f"{what} method", method, PARTNERS)
    for name in ("sampler", "combine", "noise"):
        if how.get(name) is not None:
            raise BadArgument(
                f"{what} {name}: got {how.get(name)}, but inversion by {method} goes with the sampler "
                f"{PARTNERS[method]} alone; leave it out"
            )
    session = open_session(model, data, what, ranged=ranged, **how)
    return replace(session, plan=replace(session.plan, sampler=Part(PARTNERS[method]), combine=None, noise=None))


def climbed(session: Session, images: Tensor, grid: Grid, method: Method, iterations: int) -> Tensor:
    """The images' states at grid[0], by the session's conditions and guidance.

    Args:
        session: from `open_deterministic`.
        images: (B, C, *S).
        grid: levels in falling order, ending clean.
        method: as in `invert`.
        iterations: as in `invert`.
    """

    def upwards(x: Tensor, grid: Grid, noise: Noise) -> Sampling:
        return climb(x, grid, method=method, iterations=iterations)

    return session.run(images.to(torch.float32), grid, sampler=upwards)


@in_latents("a", "b")
def interpolate(
    model: Model | Denoiser,
    a: Tensor,
    b: Tensor,
    *,
    count: int = 8,
    depth: float = 1.0,
    via: Via = "inversion",
    iterations: int = 3,
    **how: Unpack[How],
) -> Tensor:
    """A way from each image of a to its partner in b: their states at the time `depth`, slerped and sampled down.

    Via inversion the ways begin and end at the images themselves, to the inversion's accuracy (DDIM: Song et al. 2021,
    section 5.3). Via noise both images get the same noise (Ho et al. 2020, section 4.4): there is no inversion to pay
    for, and the ends are only like the images, as in img2img. A smaller depth blends more than it morphs.

    Args:
        model: a Bundle, or a Denoiser.
        a: (B, C, *S).
        b: (B, C, *S).
        count: images of a way, both ends included, ≥ 2.
        depth: a time of the model's schedule, in (0, 1].
        via: inversion or noise.
        iterations: of the inversion.
        how: see `session.How`; via inversion no sampler can be given.

    Returns:
        (B, count, C, *S), float32.
    """
    if a.shape != b.shape:
        raise BadShape(f"interpolate: got images of {tuple(a.shape)} and {tuple(b.shape)}, need one shape")
    if via not in ("inversion", "noise"):
        raise UnknownName("interpolate via", via, ("inversion", "noise"))
    check_images(model, b, "interpolate")
    if via == "inversion":
        session = open_deterministic(model, a, "interpolate", "fixed-point", **how)
        grid = session.grid(depth, "depth")
        ends = [climbed(session, end, grid, "fixed-point", iterations) for end in (a, b)]
    else:
        session = open_session(model, a, "interpolate", **how)
        grid, unit = session.grid(depth, "depth"), session.unit(tuple(a.shape[1:]))
        ends = [diffuse(end.to(session.device, torch.float32), unit, grid[0]) for end in (a, b)]
    return _ways(session, ends[0], ends[1], count, grid)


def _ways(session: Session, a: Tensor, b: Tensor, count: int, grid: Grid) -> Tensor:
    """Sample down from `count` states on the arc between each two; fresh noise is the same along a way."""
    if count < 2:
        raise BadArgument(f"interpolate count: got {count}, need at least 2, the ends")
    parts = torch.linspace(0, 1, count, dtype=torch.float64).repeat(len(a))
    states = slerp(a.repeat_interleave(count, 0), b.repeat_interleave(count, 0), parts)
    return session.each(count, apart=False).run(states, grid).reshape(len(a), count, *a.shape[1:])


@in_latents()
def interpolate_seeds(
    model: Model, seeds: tuple[int, int], *, number: int = 1, count: int = 8, **how: Unpack[How]
) -> Tensor:
    """A way between samples of two seeds: their noises, slerped and sampled.

    Args:
        model: a Bundle.
        seeds: from whose samples to whose.
        number: how many ways, from images first, first + 1, ... of the one seed to those of the other.
        count: images of a way, both ends included, ≥ 2.
        how: see `session.How`; its seed is that of a stochastic sampler's fresh noise alone.

    Returns:
        (number, count, C, *S), float32.
    """
    if number < 1:
        raise BadArgument(f"interpolate number: got {number}, need at least 1")
    session = open_session(model, torch.zeros(number, *model.shape), "interpolate", **how)
    grid = session.grid()
    ends = [session.schedule.start(replace(session, seed=seed).unit(model.shape), grid[0]) for seed in seeds]
    return _ways(session, ends[0], ends[1], count, grid)
