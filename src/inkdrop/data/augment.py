"""Augmentations: a picture changed at random, and the numbers that say how, all 0 where it was left as it is.

A net that is told the numbers learns what each change does, and sampled with 0 it makes pictures as the data are: the
augmentation does not leak (Karras et al. 2022, appendix F.2). They are a condition that is never dropped: a row whose
class is null keeps its numbers. Without being told, a net learns the changed pictures too, which is right for flips of
things that have no left and right, and wrong for digits.

Functions here take clean pictures and the randomness of their batch: (x0 (B, C, H, W), draw) -> (x0', numbers (B, K)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from inkdrop.core.noise import Draw
from inkdrop.errors import BadArgument, BadShape

__all__ = ["affine", "crop", "flip"]

TAKEN = 4  # numbers of the stream that belong to image conditions (pairs: hole)


def flip(
    x0: Tensor, draw: Draw, *, horizontal: bool = True, vertical: bool = False, told: bool = True
) -> tuple[Tensor, Tensor]:
    """Each picture mirrored with probability 1/2, left and right, up and down, or both.

    Args:
        x0: (B, C, H, W).
        draw: the randomness of this batch.
        horizontal: left and right.
        vertical: up and down.
        told: give the numbers to the net; false for pictures of things that have no left and right.

    Returns:
        The pictures, and numbers (B, 1 or 2), 1 where a picture was mirrored; (B, 0) if not told.

    Raises:
        BadShape: no pictures.
        BadArgument: neither direction.
    """
    _pictures(x0)
    if not (horizontal or vertical):
        raise BadArgument("flip: got neither horizontal nor vertical, need one of them; or leave the augmentation out")
    axes = [axis for axis, wanted in ((3, horizontal), (2, vertical)) if wanted]
    chosen = _uniform(draw, len(axes)) < 0.5
    for axis, rows in zip(axes, chosen.T, strict=True):
        x0 = torch.where(rows.to(x0.device).reshape(-1, 1, 1, 1), x0.flip(axis), x0)
    return x0, _said(chosen.to(x0.device, torch.float32), told)


def crop(x0: Tensor, draw: Draw, *, pad: int = 2, told: bool = True) -> tuple[Tensor, Tensor]:
    """A window of the picture's own size in the picture mirrored beyond its edges: a shift by whole pixels.

    x0'[y, x] = x0[y + dy, x + dx], dy and dx uniform on {−pad, ..., pad}.

    Args:
        x0: (B, C, H, W).
        draw: the randomness of this batch.
        pad: the largest shift in pixels, in [1, H − 1] and [1, W − 1].
        told: give the numbers to the net.

    Returns:
        The pictures, and numbers (B, 2): (dy, dx)/pad; (B, 0) if not told.

    Raises:
        BadShape: no pictures.
        BadArgument: a shift outside its range.
    """
    _, _, height, width = _pictures(x0)
    if not 1 <= pad < min(height, width):
        raise BadArgument(f"crop pad: got {pad}, need 1 to {min(height, width) - 1} for pictures of {height}×{width}")
    shift = (_uniform(draw, 2) * (2 * pad + 1)).floor().long().to(x0.device)
    wide = functional.pad(x0, (pad,) * 4, mode="reflect")
    y = (shift[:, :1] + torch.arange(height, device=x0.device))[:, :, None]
    x = (shift[:, 1:] + torch.arange(width, device=x0.device))[:, None, :]
    window = wide[torch.arange(len(x0), device=x0.device)[:, None, None], :, y, x]  # (B, H, W, C)
    return window.permute(0, 3, 1, 2).contiguous(), _said((shift - pad).float() / pad, told)


def affine(
    x0: Tensor,
    draw: Draw,
    *,
    share: float = 0.12,
    flips: bool = False,
    scale: float = 0.2,
    shift: float = 0.125,
    told: bool = True,
) -> tuple[Tensor, Tensor]:
    """EDM's augmentation: mirror, scale, turn, stretch and shift, each of the last four with probability `share`.

    A point p of a picture, in pixels from its middle, goes to S·R·z·F·p + d. F mirrors, z = 2^{scale·n0}, R turns by
    an angle uniform on [−π, π), S stretches by 2^{scale·n1} along a random axis and by 2^{−scale·n1} across it, and
    d = shift·(W·n2, H·n3), each n ~ N(0, 1). Beyond its edges a picture is mirrored; between pixels it is bilinear,
    where theirs is oversampled.

    Args:
        x0: (B, C, H, W).
        draw: the randomness of this batch.
        share: in (0, 1].
        flips: mirror left and right (half of all) and up and down (half of `share`); not for digits or letters.
        scale: deviation of the logarithms to base 2, ≥ 0.
        shift: deviation of the shift, in sides of the picture, ≥ 0.
        told: give the numbers to the net.

    Returns:
        The pictures, and numbers (B, 9): mirrored left and right, up and down; n0; cos − 1 and sin of the angle; n1
        times cos and sin of twice the axis' angle; n2, n3. All 0 where nothing was done; (B, 0) if not told.

    Raises:
        BadShape: no pictures.
        BadArgument: a share or deviation outside its range.

    Reference: Karras et al. 2022, table 6 and appendix F.2.
    """
    _pictures(x0)
    if not 0 < share <= 1:
        raise BadArgument(f"affine share: got {share:g}, need a number in (0, 1]; try 0.12")
    for what, got in (("scale", scale), ("shift", shift)):
        if not got >= 0:
            raise BadArgument(f"affine {what}: got {got:g}, need at least 0")
    u = _uniform(draw, 12)
    mirror = torch.stack([u[:, 0] < 0.5, u[:, 1] < 0.5 * share], 1).double() * flips
    on = (u[:, 2:6] < share).double()
    n = torch.special.ndtri(u[:, 6:10].clamp(min=1e-300)) * on[:, [0, 2, 3, 3]]
    turn, axis = (2 * math.pi * (u[:, 10:] - 0.5)).unbind(1)
    turn = turn * on[:, 1]
    numbers = [mirror, n[:, :1], torch.stack([turn.cos() - 1, turn.sin()], 1)]
    numbers += [n[:, 1:2] * torch.stack([axis.cos(), axis.sin()], 1), n[:, 2:]]
    whole = torch.cat(numbers, 1)
    return _warp(x0, whole, scale, shift), _said(whole.to(x0.device, torch.float32), told)


def _warp(x0: Tensor, numbers: Tensor, scale: float, shift: float) -> Tensor:
    """The pictures that these numbers say, (B, C, H, W); rows of zeros are the picture itself."""
    flip_x, flip_y, size, cos, sin, along, across, *by = numbers.unbind(1)
    cos = cos + 1
    n = torch.hypot(along, across)
    angle = torch.atan2(across, along) / 2
    stretch = _turned(angle, torch.exp2(scale * n), torch.exp2(-scale * n))
    rotate = torch.stack([cos, -sin, sin, cos], 1).reshape(-1, 2, 2)
    first = torch.exp2(scale * size)[:, None] * torch.stack([1 - 2 * flip_x, 1 - 2 * flip_y], 1)
    matrix = stretch @ rotate @ torch.diag_embed(first)
    sides = torch.tensor([x0.shape[3], x0.shape[2]], dtype=torch.float64)
    back = torch.linalg.inv(matrix)  # where each pixel comes from
    inner = back * sides[None, None, :] / sides[None, :, None]  # in halves of the sides, as affine_grid wants it
    theta = torch.cat([inner, -(inner @ (2 * shift * torch.stack(by, 1))[:, :, None])], 2).to(x0.device, x0.dtype)
    grid = functional.affine_grid(theta, list(x0.shape), align_corners=False)
    warped = functional.grid_sample(x0, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return torch.where((numbers != 0).any(1).to(x0.device).reshape(-1, 1, 1, 1), warped, x0)


def _turned(angle: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """(B, 2, 2): a stretch by `along` in the direction of an angle and by `across` at right angles to it."""
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([cos, -sin, sin, cos], 1).reshape(-1, 2, 2)
    return turn @ torch.diag_embed(torch.stack([along, across], 1)) @ turn.mT


def _said(numbers: Tensor, told: bool) -> Tensor:
    """The numbers (B, K), or (B, 0) where a net is not told."""
    return numbers if told else numbers[:, :0]


def _uniform(draw: Draw, count: int) -> Tensor:
    return draw.uniform("augment", TAKEN + count)[:, TAKEN:]


def _pictures(x0: Tensor) -> torch.Size:
    if x0.ndim != 4:
        raise BadShape(f"augmentation: got data of shape {tuple(x0.shape)}, need pictures (B, C, H, W)")
    return x0.shape
