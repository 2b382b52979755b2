"""Clips: features of moving pictures, for a Fréchet distance on clips; by a net for pictures, frame by frame."""

from __future__ import annotations

import torch
from torch import Tensor

from inkdrop.core.check import check_state
from inkdrop.errors import BadShape
from inkdrop.evals.features import Features

__all__ = ["Clips"]


class Clips:
    """The features of each frame and how they change: mean over frames, and mean |change| between neighbouring ones.

    The first D see what is shown, the second D how it moves: frames in another order have the same first half only. It
    is a Fréchet distance in the manner of FVD, on any net; a net for clips, as I3D, is given as features of its own.

    Args:
        frames: features of one picture (C, H, W), D of them.
        shape: (C, T, H, W) of a clip, T ≥ 2.

    Raises:
        BadShape: clips of another number of sides, or of one frame.

    Reference: Unterthiner et al., "Towards accurate generative models of video", 2018, for the distance.
    """

    def __init__(self, frames: Features, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or shape[1] < 2:
            raise BadShape(f"clips: got samples of shape {shape}, need (C, T, H, W) of at least 2 frames")
        self.frames, self.shape, self.dim = frames, shape, 2 * frames.dim
        self.name, self.hash, self.resize = f"{frames.name} of frames", frames.hash, frames.resize
        self.note = f"mean and mean absolute change over frames of: {frames.note}"

    def __call__(self, x: Tensor) -> Tensor:
        """The features (B, 2·D) of clips x (B, C, T, H, W).

        Raises:
            BadShape: x of another shape.
        """
        check_state(x, self.shape, "clips")
        found = self.frames(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), self.shape[1]))
        return torch.cat([found.mean(1), found.diff(dim=1).abs().mean(1)], dim=1)
