"""Law 3, the grids: strictly falling, ending clean, rounded exactly as stated, and what is printed is what is there."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from inkdrop.core.grid import Grid
from inkdrop.core.schedule import Schedule
from inkdrop.errors import BadArgument
from inkdrop.find import Part, build
from specimens import GRIDS, SCHEDULES, T_LIST, label, schedule_of

every_schedule = pytest.mark.parametrize("part", SCHEDULES, ids=label)
every_grid = pytest.mark.parametrize("name", GRIDS)

SPACED_IN_SNR = ("karras", "loguniform")  # these start at rho = 80 where the schedule goes beyond it


def grid_of(name: str, schedule: Schedule, steps: int, **knobs: object) -> Grid:
    grid: Grid = build("grids", Part(name, knobs), schedule, steps)
    return grid


def steps_of(schedule: Schedule) -> list[int]:
    return sorted({n for n in (*T_LIST, schedule.steps) if n <= schedule.steps})


@every_schedule
@every_grid
def test_a_grid_starts_at_noise_falls_strictly_and_ends_clean_for_any_steps(part: Part, name: str) -> None:
    """Leading starts lower, at the greatest multiple of T//n, plus one for the first entry; the spacings of log-SNR
    where rho is 80 at most."""
    schedule = schedule_of(part)
    for steps in steps_of(schedule):
        grid = grid_of(name, schedule, steps)
        assert len(grid) == steps + 1
        assert bool((grid.times.diff() < 0).all()), steps
        assert bool((schedule(grid.times).lam.diff() > 0).all()), steps
        assert grid[-1].clean
        assert not grid[-2].clean
        lead = ((steps - 1) * (schedule.steps // steps) + 1) / schedule.steps
        if name in SPACED_IN_SNR and float(schedule(1.0).rho) > 80:
            assert float(grid[0].rho) == pytest.approx(80, rel=1e-9)
        else:
            assert float(grid[0].t) == pytest.approx(lead if name == "leading" else 1.0, abs=1e-15)


@every_grid
def test_what_is_printed_is_what_is_there(name: str) -> None:
    """Every printed number is the time of its level to the four digits shown, and the level is the schedule's there."""
    schedule = schedule_of("vp")
    grid = grid_of(name, schedule, 13)
    head, _, numbers = repr(grid).partition(": ")
    assert head == "Grid(13 steps"
    printed = [float(text) for text in re.findall(r"[0-9.e+-]+", numbers)]
    np.testing.assert_allclose(printed, [float(level.t) for level in grid], rtol=5e-4)
    for level in grid:
        for got, want in zip(level, schedule(float(level.t)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            assert got.shape == ()
            assert got.dtype == torch.float64


# ---- the exact spacings, once more in numpy ------------------------------------------------------------------


def uniform(s: Schedule, n: int) -> np.ndarray:
    return np.array([(n - i) / n for i in range(n)])


def trailing(s: Schedule, n: int) -> np.ndarray:
    """Lin et al. 2024, table 2 and diffusers: round(arange(T, 0, −T/n)) − 1, rounding half to even."""
    return (np.round([s.steps - i * s.steps / n for i in range(n)]) - 1 + 1) / s.steps


def leading(s: Schedule, n: int) -> np.ndarray:
    return (np.arange(n)[::-1] * (s.steps // n) + 1) / s.steps


def linspace(s: Schedule, n: int) -> np.ndarray:
    clocks = np.round([(s.steps - 1) * (n - 1 - i) / (n - 1) for i in range(n)]) if n > 1 else np.array([s.steps - 1])
    return (clocks + 1) / s.steps


def quadratic(s: Schedule, n: int) -> np.ndarray:
    low = np.sqrt(1 / s.steps)
    return np.array([1 if i == 0 else (1 + i / (n - 1) * (low - 1)) ** 2 for i in range(n)])


def power(s: Schedule, n: int) -> np.ndarray:
    return s.least + (1 - s.least) * ((n - np.arange(n)) / n) ** 1.5


def by_rho(s: Schedule, n: int, rhos: np.ndarray) -> np.ndarray:
    """Times of these sigma/alpha by bisection: not through the schedule's own inverse."""
    low, high = np.full(n, s.least), np.ones(n)
    for _ in range(80):
        middle = (low + high) / 2
        above = s(torch.from_numpy(middle)).rho.numpy() > rhos
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


def ends(s: Schedule) -> tuple[float, float]:
    return min(80.0, float(s(1.0).rho)), float(s(s.least).rho)


def karras(s: Schedule, n: int) -> np.ndarray:
    most, least = ends(s)
    roots = [most ** (1 / 7) + i / max(n - 1, 1) * (least ** (1 / 7) - most ** (1 / 7)) for i in range(n)]
    return by_rho(s, n, np.array(roots) ** 7)


def loguniform(s: Schedule, n: int) -> np.ndarray:
    most, least = ends(s)
    return by_rho(s, n, most * (least / most) ** (np.arange(n) / max(n - 1, 1)))


SPACINGS: dict[str, Callable[[Schedule, int], np.ndarray]] = {
    "karras": karras,
    "leading": leading,
    "linspace": linspace,
    "loguniform": loguniform,
    "power": power,
    "quadratic": quadratic,
    "trailing": trailing,
    "uniform": uniform,
}


def test_every_spacing_is_written_out_here() -> None:
    assert sorted(SPACINGS) == GRIDS, "write the new spacing's formula into this file"


@every_grid
@pytest.mark.parametrize("schedule", ["linear", "vp", "edm", "flow", "continuous_cosine"])
def test_spacings_match_their_formula(name: str, schedule: str) -> None:
    """For steps that divide T = 1000 and steps that do not (7, 13, 37: rounding), and at T itself."""
    built = schedule_of(schedule)
    for steps in (1, 2, 3, 7, 8, 13, 37, 50, 400, 1000):
        got = grid_of(name, built, steps).times.numpy()
        np.testing.assert_allclose(got[:-1], SPACINGS[name](built, steps), rtol=0, atol=1e-11)
        assert got[-1] == 0


def test_ties_round_to_even() -> None:
    """T = 1000, n = 16: T·i/n = 62.5·i, so every other entry is a tie; numpy's rounding of the same numbers."""
    for name in ("trailing", "linspace"):
        clocks = grid_of(name, schedule_of("linear"), 16 if name == "trailing" else 3).times.numpy()[:-1] * 1000 - 1
        want = np.round(1000 - np.arange(16) * 62.5) - 1 if name == "trailing" else np.array([999, 500, 0])
        np.testing.assert_allclose(clocks, want, rtol=0, atol=1e-9)


def test_the_tables_of_the_papers() -> None:
    """Lin et al. 2024, table 2 (T = 1000, 10 steps, theirs counted from 1), and Karras' sigmas for 18 steps."""
    schedule = schedule_of("linear")
    want = {
        "leading": [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
        "linspace": [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1],
        "trailing": [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100],
    }
    for name, steps in want.items():
        got = (grid_of(name, schedule, 10).times[:-1] * 1000).tolist()
        assert [round(k, 9) for k in got] == steps, name
    i = np.arange(18)
    sigmas = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    got = [float(level.sigma) for level in grid_of("karras", schedule_of("edm"), 18)]
    np.testing.assert_allclose(got, [*sigmas, 0], rtol=1e-11)


def test_knobs_of_spacings() -> None:
    schedule = schedule_of("linear")
    shifted = grid_of("leading", schedule, 50, offset=1).times[:-1] - grid_of("leading", schedule, 50).times[:-1]
    torch.testing.assert_close(shifted, torch.full((50,), 1e-3, dtype=torch.float64), rtol=0, atol=1e-15)
    rho = torch.stack([level.rho for level in grid_of("karras", schedule, 9, power=1.0)][:-1])
    torch.testing.assert_close(rho.diff(), rho.diff()[:1].expand(8), rtol=1e-8, atol=0)  # power 1: equal steps of rho
    late = grid_of("power", schedule, 8, exponent=2.0, start=0.8).times.numpy()
    np.testing.assert_allclose(late, [*(0.001 + 0.799 * ((8 - np.arange(8)) / 8) ** 2), 0], rtol=1e-12)
    for knob, value in (("exponent", 0.0), ("start", 1.1), ("start", 0.0), ("start", 0.001)):
        with pytest.raises(BadArgument, match=f"power {knob}: got {value:g}, need"):
            grid_of("power", schedule, 9, **{knob: value})
    for name in SPACED_IN_SNR:
        assert float(grid_of(name, schedule, 9, rho_max=torch.inf).times[0]) == 1.0
        assert float(grid_of(name, schedule, 9, rho_max=14.6)[0].rho) == pytest.approx(14.6, rel=1e-9)
        for rho_max in (0, 0.001):
            with pytest.raises(BadArgument, match=f"{name} rho_max: got {rho_max:g}, need"):
                grid_of(name, schedule, 9, rho_max=rho_max)
        with pytest.raises(BadArgument, match=f"{name} rho_max: .*zero terminal SNR"):
            grid_of(name, schedule_of("flow"), 9, rho_max=torch.inf)


def test_at_gives_levels_on_the_grid_and_off_it() -> None:
    for name in ("linear", "vp", "edm"):
        schedule = schedule_of(name)
        grid = grid_of("uniform", schedule, 10)
        for now, nxt in zip(grid, list(grid)[1:-1], strict=False):
            for lam in (now.lam, (now.lam + nxt.lam) / 2):
                level = grid.at(lam)
                torch.testing.assert_close(level.lam, lam, rtol=1e-12, atol=1e-12)
                assert level.t.shape == ()
                assert float(nxt.t) < float(level.t) <= float(now.t) * (1 + 1e-12)
        assert grid.at(torch.inf).clean


def test_a_slice_is_the_segment_itself() -> None:
    grid = grid_of("trailing", schedule_of("linear"), 10)
    part = grid[3:7]
    assert isinstance(part, Grid)
    assert [float(a.t) for a in part] == [float(a.t) for a in grid][3:7]
    assert part.at(part[1].lam).t == pytest.approx(float(grid[4].t), abs=1e-12)
    assert grid[-1].clean
    assert len(grid[-1:]) == 1


def test_grids_that_do_not_fall_are_refused() -> None:
    schedule = schedule_of("linear")
    for times in ([0.5, 0.5, 0.0], [0.2, 0.4], [0.3, 0.0, 0.0]):
        with pytest.raises(BadArgument, match="do not fall .* try fewer steps"):
            Grid(schedule, times)
    with pytest.raises(BadArgument, match="schedule time: got 0.0004"):
        Grid(schedule, [0.5, 0.0004])
    with pytest.raises(BadArgument, match="grid: got times of shape"):
        Grid(schedule, [])


@every_grid
def test_impossible_steps_are_refused(name: str) -> None:
    schedule = schedule_of(Part("linear", {"steps": 100, "rescale": True}))
    with pytest.raises(BadArgument, match="sampler steps: got 0, need at least 1"):
        grid_of(name, schedule, 0)
    with pytest.raises(BadArgument, match="sampler steps: got 101, need at most 100, .* try 100"):
        grid_of(name, schedule, 101)
