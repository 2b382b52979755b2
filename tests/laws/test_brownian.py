"""Brownian noise: one path an image, in SNR, whatever was asked of it before; and what solvers make of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.brownian import Brownian
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.noise import Keyed
from inkdrop.drive import drive
from inkdrop.errors import BadArgument
from inkdrop.find import Part
from inkdrop.plan import Plan, noise_of
from paths import GAUSSIAN, between, every_path, point_oracle
from specimens import label, normals, sampler_of, schedule_of

pytestmark = pytest.mark.long  # left out of the fast tier

SDE = [Part(name) for name in ("dpmpp_2s_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")]


def level(lam: float) -> Level:
    """The variance-preserving level with log(alpha/sigma) = lam; −inf has no signal."""
    at = torch.tensor(lam, dtype=torch.float64)
    return Level(torch.sigmoid(2 * at).sqrt(), torch.sigmoid(-2 * at).sqrt(), at)


def increment(path: Brownian, rows: int, low: float, high: float) -> Tensor:
    return path(torch.empty(rows, 2, dtype=torch.float64), level(low), level(high))


# ---- the law of the path -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(-math.inf, -2.0), (-3.0, 2.0), (0.5, 0.501), (-4.6, -4.59), (6.0, 6.9), (-math.inf, 20.0)]
)
def test_an_increment_is_unit_normal(low: float, high: float) -> None:
    """Kolmogorov and Smirnov's test on 3,000 numbers, wide steps and narrow ones, does not tell it from N(0, 1)."""
    got = increment(Brownian(3, range(1500)), 1500, low, high).flatten().numpy()
    assert stats.kstest(got, "norm").pvalue > 0.01


def test_increments_over_disjoint_intervals_are_independent() -> None:
    """Neither they nor their squares correlate, by 4.5 standard errors of n = 3,000 pairs, across 10 pairs of 5."""
    path, n = Brownian(4, range(1500)), 3000
    parts = [increment(path, 1500, *ends).flatten() for ends in pairwise((-math.inf, -2.0, -0.7, -0.69, 1.0, 5.0))]
    for a, b in combinations(parts, 2):
        assert abs(float((a * b).mean())) < 4.5 / n**0.5
        assert abs(float(((a**2 - 1) * (b**2 - 1)).mean())) < 4.5 * 2 / n**0.5


@pytest.mark.parametrize("ends", [(-2.0, -0.3, 1.7), (0.1, 0.1004, 0.9), (-math.inf, -4.0, 6.5), (4.0, 4.001, 4.002)])
def test_increments_add_up_in_snr(ends: tuple[float, float, float]) -> None:
    """√(c − a)·z(a, c) = √(b − a)·z(a, b) + √(c − b)·z(b, c), with a, b, c the SNRs."""
    path, (a, b, c) = Brownian(5, range(8)), (math.exp(2 * lam) for lam in ends)
    first, second = (increment(path, 8, *pair) for pair in pairwise(ends))
    whole = increment(path, 8, ends[0], ends[2])
    both = (b - a) ** 0.5 * first + (c - b) ** 0.5 * second
    torch.testing.assert_close((c - a) ** 0.5 * whole, both, rtol=0, atol=1e-9 * (c - a) ** 0.5)


def test_the_path_does_not_depend_on_what_was_asked_before() -> None:
    """Bit for bit, in any order and by a path that was never asked anything."""
    ends = list(pairwise(np.linspace(-4.0, 5.0, 12).tolist()))
    fresh = {pair: increment(Brownian(6, range(3)), 3, *pair) for pair in ends}
    path = Brownian(6, range(3))
    for pair in [*np.random.default_rng(0).permutation(ends).tolist(), *reversed(ends)]:
        assert torch.equal(increment(path, 3, *pair), fresh[tuple(pair)])


def test_image_i_has_its_path_in_any_batch_and_none_other() -> None:
    whole = increment(Brownian(7, range(6)), 6, -1.0, 1.0)
    some = increment(Brownian(7, [4, 1]), 2, -1.0, 1.0)
    assert torch.equal(some, whole[[4, 1]])
    assert len({tuple(row) for row in whole.tolist()}) == 6
    assert not torch.equal(increment(Brownian(8, [4, 1]), 2, -1.0, 1.0), some)
    assert torch.equal(Brownian(7, [4, 1]).start((2, 5)), Keyed(7, [4, 1]).start((2, 5)))


def test_it_speaks_in_the_state_s_dtype() -> None:
    x = torch.empty(2, 3, dtype=torch.float32)
    got = Brownian(9, [0, 1])(x, level(-1.0), level(0.0))
    assert got.dtype == torch.float32
    assert torch.equal(got, Brownian(9, [0, 1])(x.double(), level(-1.0), level(0.0)).float())


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.5), (0.5, 0.5), (0.5, math.inf)])
def test_what_has_no_increment_is_refused(low: float, high: float) -> None:
    """Going up in noise, staying, and going clean."""
    with pytest.raises(
        BadArgument, match=f"from half log-SNR {low:g} to {high:g}, need one to a level .* try white noise"
    ):
        increment(Brownian(0, [0]), 1, low, high)


@pytest.mark.parametrize("part", SDE, ids=label)
def test_a_plan_gives_it_to_the_samplers_that_want_it(part: Part) -> None:
    assert isinstance(noise_of(Plan(sampler=part), 0, [0]), Brownian)
    assert isinstance(noise_of(Plan(sampler=part, noise="white"), 0, [0]), Keyed)
    assert isinstance(noise_of(Plan(sampler=Part("ddpm")), 0, [0]), Keyed)


# ---- what solvers make of it ---------------------------------------------------------------------------------


def run(part: Part, x: Tensor, grid: Grid, net: Callable[[Ask], Belief], seed: int = 1) -> Tensor:
    return drive(sampler_of(part)(x, grid, Brownian(seed, range(len(x)))), net)


@every_path
@pytest.mark.parametrize("part", [*SDE, Part("ddpm"), Part("ddim", {"eta": 1.0})], ids=label)
def test_with_constant_x0_the_number_of_steps_does_not_matter(part: Part, path: str) -> None:
    """All mass at a point: 7 steps and 50 lead to the same state at rho = 0.1, to 1e-10. Solvers that integrate the
    noise exactly make of x·alpha/sigma² a Brownian motion in SNR with drift x0. With eta = 1, as the SDE has it."""
    x = normals(4, 2, seed=2) * 3
    states = [run(part, x, between(path, n), point_oracle) for n in (1, 7, 50)]
    torch.testing.assert_close(states[1], states[2], rtol=0, atol=1e-10)
    torch.testing.assert_close(states[0], states[2], rtol=0, atol=1e-10)
    other = run(part, x, between(path, 7), point_oracle, seed=2)
    assert float((other - states[1]).abs().min()) > 1e-3  # though noise there is


@pytest.mark.parametrize("part", SDE, ids=label)
def test_from_no_signal_too(part: Part) -> None:
    """On the straight path from alpha = 0, where the first step forgets x and takes the path's whole beginning."""
    schedule = schedule_of("flow")
    grids = [Grid(schedule, torch.linspace(1, 0.2, n + 1, dtype=torch.float64)) for n in (7, 50)]
    few, many = (run(part, normals(4, 2, seed=3), grid, point_oracle) for grid in grids)
    torch.testing.assert_close(few, many, rtol=0, atol=1e-10)


@cache
def fine(path: str) -> tuple[Tensor, Tensor]:
    """24 rows of a Gaussian's marginal, and where 512 steps lead them along path 1."""
    x = GAUSSIAN.sample(24, between(path, 1)[0], seed=4)
    return x, run(Part("dpmpp_2s_sde"), x, between(path, 512), GAUSSIAN)


@pytest.mark.parametrize("path", ["vp", "flow"])
@pytest.mark.parametrize("part", [*SDE, Part("ddpm"), Part("reverse_sde")], ids=label)
def test_a_path_is_approached(part: Part, path: str) -> None:
    """Strong order 1, for the noise is additive: from 16 steps to 64 the RMS distance to the state that 512 lead to
    along the same path falls by 4; by 2^1.4 at least, over 24 rows. Along another path it does not fall."""
    x, want = fine(path)
    errors = [float((run(part, x, between(path, n), GAUSSIAN) - want).square().mean().sqrt()) for n in (16, 64)]
    assert math.log2(errors[0] / errors[1]) > 1.4, errors
    other = run(part, x, between(path, 64), GAUSSIAN, seed=2)
    assert float((other - want).square().mean().sqrt()) > 5 * errors[1]
