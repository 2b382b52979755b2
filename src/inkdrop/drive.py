"""The loop between samplers and nets: watch, drive, and trace, which runs a sampler on symbols."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, relay
from inkdrop.core.cond import Cond
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument, Cancelled, Diverged

__all__ = ["Answerer", "Row", "Step", "answer", "drive", "overhear", "trace", "watch"]

Answerer = Callable[[Ask], Belief]
"""Whatever answers questions: a Denoiser, or an oracle."""

Sampler = Callable[..., Sampling]


class Step(NamedTuple):
    """What a notebook sees of one question and its answer.

    Attributes:
        number: of the question, from 0.
        x: the state asked about, (B, C, *S).
        x0: the clean signal expected under it, (B, C, *S); after the last step, the result itself.
        level: the noise level of x; the clean level after the last step.
    """

    number: int
    x: Tensor
    x0: Tensor
    level: Level


def answer(asks: Sequence[Ask], parts: Mapping[str, Answerer]) -> list[Belief]:
    """Answer several questions by one call of the part that they all ask: the house's stacking.

    The questions must agree in (of, shape of a row, dtype, fields of cond, pull), as a batcher groups them; their
    levels may differ.

    Raises:
        BadArgument: there is no such part.
    """
    first = asks[0]
    if first.of not in parts:
        raise BadArgument(f"ask of {first.of!r}: this bundle has only {', '.join(sorted(parts))}")
    part = parts[first.of]
    if len(asks) == 1:
        return [part(first)]
    counts = [len(a.x) for a in asks]
    conds = [a.cond for a in asks if a.cond is not None]
    if conds and len(conds) < len(asks):
        raise BadArgument("ask: only some of the stacked questions have a condition; ask about them separately")
    whole = part(
        first._replace(
            x=torch.cat([a.x for a in asks]),
            level=Level.cat([a.level for a in asks], counts),
            cond=Cond.cat(conds) if conds else None,
        )
    )
    fracs = [None] * len(asks) if whole.var_frac is None else whole.var_frac.split(counts)
    pulls = [_pull_of(whole, counts, i) for i in range(len(asks))]
    return [Belief(*b) for b in zip(whole.x0.split(counts), whole.eps.split(counts), fracs, pulls, strict=True)]


def _pull_of(whole: Belief, counts: list[int], index: int) -> Callable[[Tensor], Tensor] | None:
    """The rows of a stacked belief's pull that belong to one question."""
    pull = whole.pull
    if pull is None:
        return None
    start = sum(counts[:index])
    rows = slice(start, start + counts[index])

    def part(g: Tensor) -> Tensor:
        full = torch.zeros_like(whole.x0)
        full[rows] = g
        return pull(full)[rows]

    return part


def overhear(sampling: Sampling, heard: list[tuple[Ask, Belief]]) -> Sampling:
    """Note what a sampling asks and is told: put round the sampler itself, inside the guidance that rewrites both."""

    def after(ask: Ask, belief: Belief) -> Belief:
        heard.append((ask, belief))
        return belief

    return relay(sampling, lambda ask: ask, after)


def watch(
    sampling: Sampling,
    parts: Answerer | Mapping[str, Answerer],
    heard: list[tuple[Ask, Belief]] | None = None,
) -> Iterator[Step]:
    """Run one sampling, giving a Step for each answer and a last one with the result; leave the loop to cancel.

    Args:
        sampling: a sampler's generator, with its middleware round it.
        parts: what answers, by the name in Ask.of; a single denoiser answers "net".
        heard: what `overhear` fills, to see the sampler's own questions and the guided, clipped answers; without it the
            outermost are seen, which guidance may have made twice as many rows.

    Raises:
        Diverged: the result is not finite.
    """
    by_name = parts if isinstance(parts, Mapping) else {"net": parts}
    number = 0
    try:
        ask, result = _advance(sampling, None)
        while ask is not None:
            with torch.no_grad():
                [belief] = answer([ask], by_name)
            pair = (ask, belief)
            ask, result = _advance(sampling, belief)
            seen = [pair] if heard is None else heard[:]
            for question, told in seen:
                yield Step(number, question.x, told.x0, question.level)
                number += 1
            if heard is not None:
                heard.clear()
    finally:
        sampling.close()
    if result is None or not bool(torch.isfinite(result).all()):
        raise Diverged(
            f"sampling: the result of {number} questions is not finite; try more steps, less guidance, or clip"
        )
    yield Step(number, result, result, _CLEAN)


def _advance(sampling: Sampling, belief: Belief | None) -> tuple[Ask | None, Tensor | None]:
    """The next question, or the result."""
    try:
        return (next(sampling) if belief is None else sampling.send(belief)), None
    except StopIteration as end:
        return None, end.value


_CLEAN = Level(*(torch.tensor(f, dtype=torch.float64) for f in (1.0, 0.0, 0.0)))


def drive(
    sampling: Sampling,
    parts: Answerer | Mapping[str, Answerer],
    *,
    on_step: Callable[[Step], bool | None] | None = None,
    heard: list[tuple[Ask, Belief]] | None = None,
) -> Tensor:
    """Run one sampling to its end and return the final x.

    Args:
        sampling: a sampler's generator, with its middleware round it.
        parts: what answers, by the name in Ask.of; a single denoiser answers "net".
        on_step: called after each answer and with the result, for progress and previews; returning True cancels.
        heard: what on_step is shown, as in `watch`.

    Raises:
        Cancelled: on_step returned True.
        Diverged: the result is not finite.
    """
    for step in watch(sampling, parts, heard):
        if on_step is not None and on_step(step):
            raise Cancelled(f"sampling: cancelled after {step.number + 1} questions")
    return step.x0


class _Sum(dict[str, float]):
    """A linear combination of named registers: what a sampler computes when it is run on symbols."""

    def add(self, other: _Sum, *, alpha: float = 1.0) -> _Sum:
        """self + alpha·other, as torch names it."""
        out = _Sum(self)
        for name, value in other.items():
            out[name] = out.get(name, 0.0) + alpha * value
        return out

    def __add__(self, other: _Sum) -> _Sum:
        return self.add(other)

    def __sub__(self, other: _Sum) -> _Sum:
        return self.add(other, alpha=-1.0)

    def __mul__(self, factor: Any) -> _Sum:
        return _Sum({name: value * float(factor) for name, value in self.items()})

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> _Sum:
        return self * (1 / float(factor))

    def __neg__(self) -> _Sum:
        return self * -1.0

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> _Sum:
        """tensor·sum, which torch offers to the right operand."""
        if function not in (torch.Tensor.mul, torch.Tensor.__mul__, torch.mul):
            raise BadArgument(
                f"trace: this sampler is not linear in its answers ({function.__name__}); it has no table"
            )
        a, b = args
        product: _Sum = b * a if isinstance(b, cls) else a * b
        return product


class Row(NamedTuple):
    """One line of a sampler's table.

    Attributes:
        state: the coefficients of the state over the registers start, x0_0, x0_1, ..., noise_0, ...
        level: where the net is asked about that state; None in the last row, whose state is the result.
    """

    state: dict[str, float]
    level: Level | None


def trace(sampler: Sampler, grid: Sequence[Level], **knobs: Any) -> list[Row]:
    """The exact float64 coefficient table of a sampler with fixed coefficients, by running it on symbols.

    Row i says which combination of the start, the answers x0_j of earlier rows and the noises is asked about next:
    the loop without the sampler's code, for export and tuning. len(rows) − 1 is the cost in asks.

    Raises:
        BadArgument: the sampler is not linear in its answers.
    """
    rows: list[Row] = []
    draws = 0

    def noise(x: Any, now: Level, nxt: Level) -> Any:
        nonlocal draws
        draws += 1
        return _Sum({f"noise_{draws - 1}": 1.0})

    start: Any = _Sum(start=1.0)
    sampling = sampler(start, grid, noise, **knobs)
    try:
        ask = next(sampling)
        while True:
            x: Any = ask.x
            x0: Any = _Sum({f"x0_{len(rows)}": 1.0})
            rows.append(Row(dict(x), ask.level))
            ask = sampling.send(Belief(x0, (x - x0 * ask.level.alpha) / ask.level.sigma))
    except StopIteration as end:
        rows.append(Row(dict(end.value), None))
    return rows
