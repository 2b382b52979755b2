"""Aware: times drawn where the loss is large, and weighed so that the mean loss stays what it was."""

from __future__ import annotations

import torch
from torch import Tensor

from inkdrop.core.noise import Draw
from inkdrop.errors import BadArgument, BadCheckpoint

__all__ = ["Aimed", "LossAware"]


class LossAware:
    """Importance sampling of times by the loss that was seen there (Nichol & Dhariwal 2021, eq. 18).

    The numbers u behind the times lie in K bands of [0, 1). Once each band has been seen `history` times, band k is
    drawn with p_k ∝ √(E[L²]), the mean over its newest `history` losses; before, all alike. A loss is divided by K·p_k,
    so that its mean is that of uniform u, with the least variance. With K = T bands on a table of T betas, a band is a
    timestep, as in the paper.

    The state is two tensors; it is the same on all ranks if each sees the losses of all, in the order of their places.

    Args:
        bands: K, ≥ 2.
        history: losses kept of each band, ≥ 1; the paper's is 10.
        floor: the share of draws that stays uniform, in (0, 1), so that no band is lost from sight.
    """

    def __init__(self, bands: int = 100, history: int = 10, floor: float = 1e-3) -> None:
        if bands < 2:
            raise BadArgument(f"loss-aware bands: got {bands}, need at least 2; try 100")
        if history < 1:
            raise BadArgument(f"loss-aware history: got {history}, need at least 1; try 10")
        if not 0 < floor < 1:
            raise BadArgument(f"loss-aware floor: got {floor:g}, need a number in (0, 1); try 0.001")
        self.floor = floor
        self.losses = torch.zeros(bands, history, dtype=torch.float64)
        self.seen = torch.zeros(bands, dtype=torch.int64)

    def density(self) -> Tensor:
        """K·p_k, (K,) float64: how much more often than uniformly each band is drawn; its mean is 1."""
        if bool((self.seen < self.losses.shape[1]).any()):
            return torch.ones_like(self.losses[:, 0])
        root = self.losses.square().mean(1).sqrt()
        share = torch.full_like(root, 1 / len(root)) if float(root.sum()) == 0 else root / root.sum()
        return (1 - self.floor) * share * len(root) + self.floor

    def aim(self, draw: Draw) -> Aimed:
        """This draw, its times moved to where the loss was large so far."""
        return Aimed(draw, self.density())

    def see(self, u: Tensor, losses: Tensor) -> None:
        """Remember the losses of an update, not yet divided by any density.

        Args:
            u: (B,), `Aimed.u` of all its rows, in the order of their places.
            losses: (B,), finite.

        Raises:
            BadArgument: a loss that is not finite.
        """
        if not bool(torch.isfinite(losses).all()):
            raise BadArgument("loss-aware times: got a loss that is not finite; leave out an update that was skipped")
        bands, history = self.losses.shape
        for band, loss in zip(_band(u, bands).tolist(), losses.tolist(), strict=True):
            self.losses[band, self.seen[band] % history] = loss
            self.seen[band] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved to go on as if never stopped: losses (K, history) float64, seen (K,) int64."""
        return {"losses": self.losses.clone(), "seen": self.seen.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a state.

        Raises:
            BadCheckpoint: it is of other bands or another history.
        """
        for name, mine in (("losses", self.losses), ("seen", self.seen)):
            if name not in state or state[name].shape != mine.shape:
                raise BadCheckpoint(
                    f"loss-aware times: {name} do not fit {tuple(mine.shape)}; resume with the same bands"
                )
            mine.copy_(state[name])


class Aimed(Draw):
    """A Draw whose times fall into bands at given densities.

    Args:
        draw: whose randomness it is.
        density: (K,) of mean 1, > 0.

    Attributes:
        u: (B,), the numbers behind the times, distributed with this density.
        importance: (B,), 1/density at each u: what a row's loss is multiplied by.
    """

    def __init__(self, draw: Draw, density: Tensor) -> None:
        super().__init__(draw.seed, draw.update, draw.places)
        edges = torch.cat([density.new_zeros(1), density.cumsum(0) / len(density)])
        plain = draw.uniform("time") * edges[-1]
        band = (torch.searchsorted(edges, plain, right=True) - 1).clamp(0, len(density) - 1)
        inside = ((plain - edges[band]) / (edges[band + 1] - edges[band])).clamp(1e-9, 1 - 1e-9)  # away from its ends
        self.u = (band + inside) / len(density)
        self.importance = 1 / density[band]

    def uniform(self, stream: str = "time", count: int | None = None) -> Tensor:
        """The aimed numbers; other streams as ever.

        Raises:
            BadArgument: more than one time a row.
        """
        if stream != "time":
            return super().uniform(stream, count)
        if count is not None:
            raise BadArgument(f"loss-aware times: got count={count}, but there is one time a row; leave it out")
        return self.u


def _band(u: Tensor, bands: int) -> Tensor:
    return (u * bands).floor().long().clamp(0, bands - 1)
