"""Draws: how the numbers u behind the times of an update are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from inkdrop.core.noise import Draw
from inkdrop.errors import BadArgument
from inkdrop.losses.aware import Aimed, LossAware
from inkdrop.losses.spread import Spread
from inkdrop.settings import Train

__all__ = ["Draws"]


class Draws:
    """The randomness of each update, and what it has to remember.

    With "aware" every term of a loss is multiplied by the row's importance, so that its mean, in the gradient and in
    the log, estimates what independent numbers estimate, and runs of either kind can be compared.

    Args:
        train: its seed, batch and draws.

    Raises:
        BadArgument: spread over a batch of one sample, which is no other than independent.
    """

    def __init__(self, train: Train) -> None:
        if train.draws == "spread" and train.batch == 1:
            raise BadArgument("train.draws: got spread with train.batch=1, where there is nothing to spread; try aware")
        self.train = train
        self.aware = LossAware() if train.draws == "aware" else None
        self._held: Tensor | None = None

    def of(self, update: int, places: Sequence[int]) -> Draw:
        """The randomness of an update's samples at these places of the whole batch."""
        draw = (Spread if self.train.draws == "spread" else Draw)(self.train.seed, update, places)
        return draw if self.aware is None else self.aware.aim(draw)

    def weighed(self, draw: Draw, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss terms, each (B,), as what their means estimate under independent draws."""
        if not isinstance(draw, Aimed):
            return terms
        return {name: value * draw.importance.to(value.device, value.dtype) for name, value in terms.items()}

    def hold(self, losses: Tensor) -> None:
        """Take the losses of an update that is finite: (B,), weighed, of the whole batch in the order of its places.

        They count once its weights have moved (`see`): an update that is skipped or repeated leaves no trace.
        """
        self._held = losses

    def see(self, update: int) -> None:
        """Remember the losses that are held, as those of this update, before `aim` is asked about another."""
        if self.aware is not None and self._held is not None:
            aimed = self.aware.aim(Draw(self.train.seed, update, range(len(self._held))))
            self.aware.see(aimed.u, self._held.double().cpu() / aimed.importance)
        self._held = None

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved to go on as if never stopped."""
        return {} if self.aware is None else self.aware.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a state; none at all, of a run that drew otherwise until now, is where `aware` begins.

        Raises:
            BadCheckpoint: it does not fit.
        """
        if self.aware is not None and state:
            self.aware.load_state_dict(state)
