"""Likelihood: bits a dimension of held-out data by a model, bounded by its chain and by its flow, as one dict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inkdrop.core.cond import Cond
from inkdrop.core.dataset import Data
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.schedule import Schedule
from inkdrop.denoiser import Denoiser
from inkdrop.errors import BadArgument, BadData
from inkdrop.evals.bound import Bound, Choice, bound
from inkdrop.evals.nll import Method, Trace, asks_of, dequantise, nll
from inkdrop.evals.shelf import Make, Shelf, kept
from inkdrop.evals.stream import Progress
from inkdrop.find import Part, build
from inkdrop.parallel import ALONE, Ranks

__all__ = ["Settings", "likelihood"]

Tell = Callable[[], None]


class _Batch(NamedTuple):
    """Some images where the denoiser is, their rows of the data set, and the place of the first in those asked for."""

    first: int
    keys: Sequence[int]
    x: Tensor
    cond: Cond | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the two are estimated, and so what they cost.

    Attributes:
        steps: of the chain, ≥ 2; T by default, which is the bound of the whole model.
        grid: the spacing of the chain's levels, a name of the room grids.
        variance: of the chain's steps, as in `bound`.
        clip: x0 to the data's range in the chain, as in `bound`.
        flow_steps: noisy levels that the flow visits, ≥ 2, equally spaced in √t from t = 1 down to `start`.
        start: time of the level whose density is taken, in [1/T, 1); 1/T by default.
        method: of integration, as in `nll`.
        trace: of the flow's derivative, as in `nll`.
        probes: for each draw, as in `nll`.
        draws: independent dequantisations of each image, with probes of their own, ≥ 1; with 2 or more an image has a
            standard error.
    """

    steps: int | None = None
    grid: str = "trailing"
    variance: Choice = "beta"
    clip: bool = False
    flow_steps: int = 50
    start: float | None = None
    method: Method = "rk4"
    trace: Trace = "rademacher"
    probes: int | None = None
    draws: int = 2

    def __post_init__(self) -> None:
        for what, got, least in (("flow_steps", self.flow_steps, 2), ("draws", self.draws, 1)):
            if got < least:
                raise BadArgument(f"likelihood {what}: got {got}, need at least {least}")

    def chain(self, schedule: Schedule) -> Grid:
        """The levels of the bound."""
        grid: Grid = build("grids", Part(self.grid), schedule, schedule.steps if self.steps is None else self.steps)
        return grid

    def flow(self, schedule: Schedule) -> Grid:
        """The levels of the flow, none of them clean."""
        least = schedule.least if self.start is None else self.start
        if not schedule.least <= least < 1:
            raise BadArgument(f"likelihood start: got {least:g}, need a time in [{schedule.least:g}, 1)")
        return Grid(schedule, torch.linspace(1, math.sqrt(least), self.flow_steps, dtype=torch.float64) ** 2)


def likelihood(
    denoiser: Denoiser,
    data: Data,
    rows: Sequence[int],
    settings: Settings | None = None,
    *,
    seed: int = 0,
    batch: int = 64,
    on_estimate: Callable[[float, tuple[int, int]], None] | None = None,
    on_progress: Progress | None = None,
    ranks: Ranks = ALONE,
    shelf: Shelf | None = None,
) -> dict[str, Any]:
    """Two upper bounds on −log2 P(x)/D of discrete data: the chain's (`bound`) and the flow's (`nll`).

    The first is of the ancestral chain on a grid. The second is of the flow's density at the starting level, of data
    dequantised uniformly, plus −log2 of a bin's width. Both are of the bare model, told each sample's own condition,
    but that the chain may clip: guidance belongs to sampling. What is random is keyed by (seed, row of the data set).

    Cost: `steps` asks an image for the chain; draws · 4 · (flow_steps − 1) for the flow (2 with heun), each with as
    many derivatives as there are probes.

    Args:
        denoiser: the bare model, in evaluation mode.
        data: discrete data (levels is not None), held out.
        rows: which of them, at least 2.
        settings: how; the defaults if None.
        seed: in [0, 2^64).
        batch: images at a time, ≥ 1.
        on_estimate: is told before the work about how many seconds it will take, and the asks an image of the two.
        on_progress: is told how far it is.
        ranks: of the job, each of which takes its share of the batches; the figures are those of one process, on all.
        shelf: where what is found of each batch is kept, so that the same call goes on where it was stopped; of all
            that the figures depend on.

    Returns:
        Plain JSON without NaN: n, dim, levels, uniform (log2 levels), bound, flow, images, settings, seconds; bits are
        a dimension's.

    Raises:
        BadData: data that are continuous.
        BadArgument: fewer than 2 rows, or settings outside their values.
    """
    began = time.monotonic()
    work = _Work(denoiser, data, rows, settings or Settings(), seed, batch, ranks, shelf)
    if on_estimate is not None:
        on_estimate(work.seconds(), work.asks)
    tell = _teller(on_progress, sum(work.asks) * len(work.mine))
    bounds, flows = ranks.together(lambda: (work.bounds(tell), work.flows(tell)))
    figures = _report(work, Bound(*map(work.gathered, bounds)), work.gathered(flows))
    return {**figures, "settings": asdict(work.settings), "seconds": round(time.monotonic() - began, 1)}


class _Work:
    """What is to be done: batches of images through both."""

    def __init__(
        self,
        denoiser: Denoiser,
        data: Data,
        rows: Sequence[int],
        settings: Settings,
        seed: int,
        batch: int,
        ranks: Ranks = ALONE,
        shelf: Shelf | None = None,
    ) -> None:
        if data.levels is None:
            raise BadData(
                "likelihood: the data are continuous (no levels), so they have densities, not bits; "
                "evals.nll.nll gives the density at a point"
            )
        for what, got, least in (("images", len(rows), 2), ("batch", batch, 1)):
            if got < least:
                raise BadArgument(f"likelihood {what}: got {got}, need at least {least}")
        self.data, self.rows, self.batch, self.settings, self.levels = data, rows, batch, settings, data.levels
        self._ranks, self._shelf, self._all = ranks, shelf, range(0, len(rows), batch)
        self.mine = self._all[ranks.rank :: ranks.size] or self._all[:1]  # a rank without one has a shape
        self.chain, self.flow = settings.chain(denoiser.schedule), settings.flow(denoiser.schedule)
        self.asks = (len(self.chain) - 1, settings.draws * asks_of(self.flow, settings.method))
        self._device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
        self._seed = seed
        levels, variance, clip = data.levels, settings.variance, settings.clip
        self._bound = partial(bound, denoiser, levels=levels, variance=variance, clip=clip, seed=seed)
        trace, probes, method = settings.trace, settings.probes, settings.method
        self._nll = partial(nll, denoiser, trace=trace, probes=probes, method=method, seed=seed)

    def batches(self) -> Iterator[_Batch]:
        for first in self.mine:
            keys = self.rows[first : first + self.batch]
            x, cond = self.data.take(keys)
            yield _Batch(first, keys, x.to(self._device), None if cond is None else cond.to(self._device))

    def gathered(self, found: Tensor) -> Tensor:
        """(..., N), in the order of the rows, from what each rank has found of its batches, (..., n) each.

        What ranks without a batch have found comes last, and is left there.
        """
        ranks, whole = self._ranks, torch.arange(len(self.rows))
        if ranks.size == 1:
            return found
        dealt = [whole[i : i + self.batch] for rank in range(ranks.size) for i in self._all[rank :: ranks.size]]
        return ranks.cat(found.movedim(-1, 0))[torch.cat(dealt).argsort()].movedim(0, -1).contiguous()

    def bounds(self, tell: Tell | None) -> Bound:
        """The terms of this rank's images."""

        def found(batch: _Batch) -> Bound:
            make = partial(self._bound, batch.x, self.chain, cond=batch.cond, images=batch.keys, on_ask=tell)
            return Bound(**self._kept("bound", batch.first, lambda: make()._asdict(), self.asks[0], tell))

        each = [found(batch) for batch in self.batches()]
        return Bound(*(torch.cat(parts, -1) for parts in zip(*each, strict=True)))

    def flows(self, tell: Tell | None) -> Tensor:
        """(draws, K, n): bits a dimension of this rank's images, by each dequantisation and each of its probes."""

        def found(batch: _Batch) -> Tensor:
            make = partial(self._flowed, batch, self.flow, self.settings.draws, tell)
            return self._kept("flow", batch.first, lambda: {"bits": make()}, self.asks[1], tell)["bits"]

        return torch.cat([found(batch) for batch in self.batches()], -1)

    def _kept(self, kind: str, first: int, make: Make, asks: int, tell: Tell | None) -> dict[str, Tensor]:
        """What the shelf keeps of a batch, in which case its asks are told of at once, or what is made now."""
        if tell is not None and self._there(kind, first):
            for _ in range(asks):
                tell()
        return kept(self._shelf, _name(kind, first), make)

    def _there(self, kind: str, first: int) -> bool:
        return self._shelf is not None and self._shelf.find(_name(kind, first)) is not None

    def _flowed(self, batch: _Batch, grid: Grid, draws: int, tell: Tell | None) -> Tensor:
        found = []
        for draw in range(draws):
            x = dequantise(batch.x, self.levels, seed=self._seed, images=batch.keys, draw=draw)
            found.append(self._nll(x, grid, cond=batch.cond, images=batch.keys, draw=draw, on_ask=tell).each)
        return torch.stack(found) + math.log2((self.levels - 1) / 2)

    def seconds(self) -> float:
        """About how long it takes, by two asks of the chain and one step of the flow, timed after a first try."""
        left = [[first for first in self.mine if not self._there(kind, first)] for kind in ("bound", "flow")]
        if not any(left):
            return 0.0
        batch, few = next(self.batches()), self.chain[-3:]
        spent = (0.0, 0.0)
        for _ in range(2):
            began = time.monotonic()
            self._bound(batch.x, few, cond=batch.cond, images=batch.keys)
            middle = time.monotonic()
            self._flowed(batch, self.flow[-2:], 1, None)
            spent = middle - began, time.monotonic() - middle
        chain = spent[0] * self.asks[0] / (len(few) - 1)
        flow = spent[1] * self.settings.draws * (len(self.flow) - 1)
        counts = [sum(min(self.batch, len(self.rows) - first) for first in each) for each in left]
        return (chain * counts[0] + flow * counts[1]) / len(batch.x)


def _name(kind: str, first: int) -> str:
    return f"{kind}-{first:08d}"


def _teller(on_progress: Progress | None, total: int) -> Tell | None:
    """Counts the asks of all batches."""
    if on_progress is None:
        return None
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        on_progress(done, total, "asks")

    return tell


def _mean(values: Tensor) -> dict[str, float]:
    """The mean over images and its standard error."""
    return {"bits": float(values.mean()), "se": float(values.std()) / math.sqrt(len(values))}


def _plain(level: Level) -> dict[str, float]:
    return {name: float(number) for name, number in level._asdict().items()}


def _report(work: _Work, bounds: Bound, flows: Tensor) -> dict[str, Any]:
    """What was found, in bits a dimension, of all images and of each."""
    dim, images = math.prod(work.data.shape), {"bound": bounds.total.tolist(), **_by_image(flows)}
    return {
        "n": len(work.rows),
        "dim": dim,
        "levels": work.levels,
        "uniform": math.log2(work.levels),
        "bound": {**_bound_report(bounds, work.chain), "asks": work.asks[0]},
        "flow": {
            **_flow_report(images),
            "start": _plain(work.flow[-1]),
            "asks": work.asks[1],
            "derivatives": dim if work.settings.trace == "exact" else flows.shape[1],
        },
        "images": {"row": list(work.rows), **images},
    }


def _bound_report(found: Bound, chain: Grid) -> dict[str, Any]:
    """Means over images: the total, its three parts, and every term with its level."""
    bits = [*found.steps.mean(1).tolist(), float(found.decoder.mean())]
    errors = zip(found.x0_mse.mean(1).tolist(), found.eps_mse.mean(1).tolist(), strict=True)
    return {
        **_mean(found.total),
        "prior": float(found.prior.mean()),
        "steps": float(found.steps.sum(0).mean()),
        "decoder": float(found.decoder.mean()),
        "terms": [
            {**_plain(level), "bits": each, "x0_mse": x0_mse, "eps_mse": eps_mse}
            for level, each, (x0_mse, eps_mse) in zip(list(chain)[:-1], bits, errors, strict=True)
        ],
    }


def _by_image(flows: Tensor) -> dict[str, Any]:
    """The flow's bits of each image, and their standard error over draws, or over probes if there is one draw."""
    draws, probes, _ = flows.shape
    over = flows.mean(1) if draws > 1 else flows[0]
    se = (over.std(0) / math.sqrt(len(over))).tolist() if draws * probes > 1 else None
    return {"flow": flows.mean((0, 1)).tolist(), "flow_se": se}


def _flow_report(images: dict[str, Any]) -> dict[str, Any]:
    """The mean over images, its standard error, and the share of it that draws and probes make."""
    errors = images["flow_se"]
    noise = None if errors is None else math.sqrt(sum(e * e for e in errors)) / len(errors)
    return {**_mean(torch.tensor(images["flow"], dtype=torch.float64)), "se_of_draws": noise}
