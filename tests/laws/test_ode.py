"""rk45: the probability flow with adaptive steps, an image each, against scipy's solver and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, given, revise
from inkdrop.core.cond import Cond
from inkdrop.core.grid import Grid
from inkdrop.core.schedule import Schedule
from inkdrop.drive import drive
from inkdrop.errors import BadArgument, Diverged
from inkdrop.find import Part, build
from inkdrop.guide.cfg import cfg
from inkdrop.guide.clip import clip
from inkdrop.samplers import ode
from inkdrop.samplers.ode import rk45
from paths import GAUSSIAN, MIXTURE, between, every_path, mixture_case, silent
from specimens import label, normals, schedule_of

pytestmark = pytest.mark.long  # left out of the fast tier


def heard(x: Tensor, grid: Grid, tolerance: float = 1e-5, net=MIXTURE) -> tuple[Tensor, list[Ask]]:
    """The result of rk45 and its questions."""
    asks: list[Ask] = []

    def ear(ask: Ask) -> Belief:
        asks.append(ask)
        return net(ask)

    return drive(rk45(x, grid, silent, rtol=tolerance, atol=tolerance), ear), asks


def last_of(schedule: Schedule):
    return schedule(schedule.least)


def by_scipy(x: Tensor, grid: Grid, tolerance: float) -> tuple[Tensor, list[int]]:
    """Each row by scipy's RK45 in u, to the last noisy level, and there x0; and how often it asked."""
    schedule, results, counts = grid.schedule, [], []
    ends = [float(level.sigma / (level.alpha + level.sigma)) for level in (grid[0], last_of(schedule))]
    at = {ends[0]: grid[0], ends[1]: last_of(schedule)}
    for row in x:

        def slope(u: float, z: np.ndarray) -> np.ndarray:
            level = at[u] if u in at else grid.at(math.log((1 - u) / u))
            belief = MIXTURE(Ask(torch.from_numpy(z)[None] * (level.alpha + level.sigma), level))
            return (belief.eps - belief.x0)[0].numpy()

        z = (row / (grid[0].alpha + grid[0].sigma)).numpy()
        found = solve_ivp(slope, ends, z, "RK45", rtol=tolerance, atol=tolerance)
        level = at[ends[1]]
        z = torch.from_numpy(found.y[:, -1])[None] * (level.alpha + level.sigma)
        results.append(MIXTURE(Ask(z, level)).x0)
        counts.append(found.nfev)
    return torch.cat(results), counts


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize(
    "part", [Part("vp"), Part("edm"), Part("flow"), Part("cosine"), Part("linear", {"zero_terminal": True})], ids=label
)
def test_it_is_scipy_s_for_each_row_in_as_many_questions(part: Part, tolerance: float) -> None:
    """Dormand & Prince's tableau, its first step and its step control are those of scipy.integrate.RK45, which knows
    nothing of inkdrop: the same end to 1e-9, and as many questions as the row that asks most. From t = 1, where alpha
    may be 0 and the flow is straight at first, and from t = 0.4, where it is not."""
    schedule = schedule_of(part)
    for grid in (build("grids", Part("trailing"), schedule, 3), Grid(schedule, [0.4, 0.0])):
        x = grid[0].sigma * normals(4, 2, seed=1)
        got, asks = heard(x, grid, tolerance)
        want, counts = by_scipy(x, grid, tolerance)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
        assert len(asks) == max(counts)


@every_path
def test_the_error_is_about_proportional_to_the_tolerance(path: str) -> None:
    """Between two interior levels, against the affine flow of a Gaussian in closed form: from 1e-3 to 1e-9 the error
    stays within 30 times the tolerance, and falls by 6 powers of ten, ± 0.9."""
    now, nxt = grid = between(path, 1)
    x = GAUSSIAN.sample(8, now, seed=1)
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        got, _ = heard(x, grid, tolerance, GAUSSIAN)
        errors.append(float((got - GAUSSIAN.flow(x, now, nxt)).abs().max()))
        assert errors[-1] < 30 * tolerance
    assert math.log10(errors[0] / errors[-1]) == pytest.approx(6, abs=0.9)
    assert all(fine < coarse for coarse, fine in pairwise(errors))


@every_path
def test_it_follows_the_flow_of_a_mixture(path: str) -> None:
    """Against DOP853 on the numpy density, to 1e-7."""
    x, wants = mixture_case(path)
    got, _ = heard(x, between(path, 1), 1e-9)
    torch.testing.assert_close(got, wants[-1], rtol=0, atol=1e-7)


def test_only_the_ends_of_the_grid_count() -> None:
    """Bit for bit: 1 step or 40; asked about are levels from the grid's first to the schedule's last noisy one."""
    schedule = schedule_of("linear")
    x = normals(3, 2, seed=2)
    one, asks = heard(x, build("grids", Part("trailing"), schedule, 1))
    many, _ = heard(x, build("grids", Part("trailing"), schedule, 40))
    assert torch.equal(one, many)
    times = torch.stack([ask.level.t for ask in asks])
    assert float(times.max()) == 1.0
    assert float(times.min()) == schedule.least
    assert bool((times[0] == 1.0).all())
    assert bool((times[-1] == schedule.least).all())
    torch.testing.assert_close(one, MIXTURE(asks[-1]).x0, rtol=0, atol=0)


def test_a_grid_of_the_last_noisy_level_takes_one_question() -> None:
    schedule = schedule_of("linear")
    x = normals(3, 2, seed=2)
    got, asks = heard(x, Grid(schedule, [schedule.least, 0.0]))
    assert len(asks) == 1
    assert torch.equal(got, MIXTURE(asks[0]).x0)
    assert torch.equal(heard(x, Grid(schedule, [0.5]))[0], x)


def test_each_image_has_steps_of_its_own() -> None:
    """Bit for bit what it gets alone, beside rows for which more and fewer steps are tried; all rows stay in every
    question, one that has arrived with its last noisy level; and as many questions as the slowest asks alone."""
    schedule = schedule_of("vp")
    grid = build("grids", Part("trailing"), schedule, 5)
    x = normals(5, 2, seed=3)
    x[1], x[3] = 60.0, 0.0
    whole, asks = heard(x, grid, 1e-6)
    counts = []
    for i in range(5):
        alone, own = heard(x[i : i + 1], grid, 1e-6)
        assert torch.equal(alone[0], whole[i])
        counts.append(len(own))
        for ask, mine in zip(asks, own, strict=False):
            assert torch.equal(ask.x[i], mine.x[0])
        for ask in asks[len(own) :]:
            assert torch.equal(ask.x[i], own[-1].x[0])
            assert float(ask.level.t[i]) == schedule.least
    assert len(set(counts)) > 1
    assert len(asks) == max(counts)
    assert all(len(ask.x) == len(ask.level.t) == 5 for ask in asks)


def of_class(ask: Ask) -> Belief:
    """N(−0.5, 0.3²) for class 0 and where the class is not told, N(0.6, 0.3²) for class 1."""
    assert ask.cond is not None
    assert ask.cond.label is not None
    told = torch.where(ask.cond.null_rows("label"), 0, ask.cond.label)
    mean, level = torch.tensor([[-0.5], [0.6]], dtype=torch.float64)[told], ask.level.over(ask.x)
    shrink = level.alpha * 0.3**2 / ((level.alpha * 0.3) ** 2 + level.sigma**2)
    x0 = mean + shrink * (ask.x - level.alpha * mean)
    return revise(ask, Belief(x0, x0), x0)


def test_conditions_stay_with_their_rows_through_guidance_and_clipping() -> None:
    """Row by row, cfg and clip meet levels that differ: each image is what it is alone with its own class."""
    grid = build("grids", Part("trailing"), schedule_of("vp"), 5)
    x, told = normals(4, 2, seed=4), torch.tensor([0, 1, 1, 0])
    x[2] = 30.0

    def run(rows: list[int]) -> Tensor:
        work = given(rk45(x[rows], grid, silent), Cond(label=told[rows]))
        return drive(cfg(clip(work, low=-0.7, high=0.8), scale=1.5), of_class)

    whole = run([0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(run([i])[0], whole[i])
    assert float(whole.abs().max()) <= 0.8


def test_float32_follows_float64() -> None:
    grid = build("grids", Part("trailing"), schedule_of("flow"), 5)
    x = normals(4, 2, seed=5)
    got, asks = heard(x.float(), grid)
    assert {ask.x.dtype for ask in asks} | {got.dtype} == {torch.float32}
    torch.testing.assert_close(got.double(), heard(x, grid)[0], rtol=0, atol=1e-4)


def test_answers_without_a_limit_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A net of noise has no flow: steps shrink without end, and the message says so."""
    gen, asked = torch.Generator().manual_seed(0), 0
    monkeypatch.setattr(ode, "TRIES", 60)

    def rough(ask: Ask) -> Belief:
        nonlocal asked
        asked += 1
        x0 = 1e6 * torch.randn(ask.x.shape, generator=gen, dtype=ask.x.dtype)
        return revise(ask, Belief(x0, x0), x0)

    grid = build("grids", Part("trailing"), schedule_of("vp"), 5)
    with pytest.raises(Diverged, match="rk45: tried 60 steps and came to u = .* only; try greater rtol and atol"):
        heard(normals(1, 2), grid, net=rough)
    assert asked == 2 + 6 * 60


@pytest.mark.parametrize(
    ("knobs", "dtype", "message"),
    [
        ({"rtol": 0.0}, torch.float64, r"rk45 rtol: got 0, need a number in \[2.2e-15, 1\)"),
        ({"rtol": 1e-7}, torch.float32, r"rk45 rtol: got 1e-07, need a number in \[1.2e-06, 1\) for torch.float32"),
        ({"rtol": math.nan}, torch.float64, "rk45 rtol: got nan"),
        ({"atol": -1e-9}, torch.float64, "rk45 atol: got -1e-09, need a finite number of at least 0"),
    ],
)
def test_bad_tolerances_are_refused(knobs: dict[str, float], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        next(rk45(torch.zeros(1, 2, dtype=dtype), between("vp", 1), silent, **knobs))
