"""Law 3, a point mass is hit, on the grid that is printed: every sampler, grid, number of steps and target."""

from __future__ import annotations

import math

import pytest
import torch

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.noise import Keyed
from inkdrop.core.schedule import Schedule
from inkdrop.drive import drive
from inkdrop.errors import BadArgument
from inkdrop.find import Part, build, names
from paths import POINT, needs_signal, point_oracle, silent
from specimens import GRIDS, SAMPLERS, T_LIST, denoiser_of, label, normals, sampler_of, schedule_of, target_of

pytestmark = pytest.mark.long  # together a minute

BETWEEN = ("dpm2", "dpm2_ancestral", "dpmpp_2s", "dpmpp_2s_sde")  # which ask about midpoints besides
WILD = ("reverse_sde", "predictor_corrector", "annealed_langevin")  # whose x is large after a few coarse steps
ELSEWHERE = ("edm", "rk45")  # which ask about levels of their own: test_stochastic.py and test_ode.py say which


def hits(sampler: Part, schedule: Schedule, grid: Grid, target: str) -> None:
    """A float32 sampling through a Denoiser that speaks this target ends at the point, to 1e-6.

    eps alone is asked less: x0 = (x − sigma·eps)/alpha magnifies the rounding of a float32 eps by rho of the last
    level asked about, which is 157 where one step leads from DDPM's t = 1 to clean. So 1e-6·max(1, rho). Where x is
    large, rounding is in proportion.
    """
    asked: list[Level] = []
    size = 1.0

    def ear(ask: Ask) -> Belief:
        nonlocal size
        assert ask.x.dtype == torch.float32
        asked.append(ask.level)
        size = max(1.0, float(ask.x.abs().max())) if sampler.name in WILD else 1.0
        return denoiser(ask)

    denoiser = denoiser_of(point_oracle, schedule, target_of(target, schedule))
    x = schedule.start(normals(2, 2, seed=6, dtype=torch.float32))
    got = drive(sampler_of(sampler)(x, grid, Keyed(0, [0, 1])), ear)
    assert got.dtype == torch.float32
    allowed = 1e-6 * size * (max(1.0, float(grid[-2].rho)) if target == "eps" else 1.0)
    torch.testing.assert_close(got.double(), POINT.expand(2, 2), rtol=0, atol=allowed)
    assert bool((grid.times.diff() < 0).all())
    assert grid[-1].clean
    if sampler.name in ELSEWHERE:
        return
    times = [float(level.t) for level in asked]
    distinct = [t for t, before in zip(times, [math.inf, *times], strict=False) if t != before]
    if sampler.name in BETWEEN:
        assert distinct == sorted(distinct, reverse=True), "asked about levels that are not between the grid's"
        distinct = [t for t in distinct if t in grid.times]
    assert distinct == grid.times[:-1].tolist(), "asked about other levels than the printed grid's"


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sampler", names("samplers"))
def test_a_point_is_hit_for_every_grid_steps_and_target(sampler: str, grid: str, target: str) -> None:
    """R5, on a table of T = 60: steps 1, 2, 3, 7, 13, 50 and T."""
    schedule = schedule_of(Part("linear", {"steps": 60, "rescale": True}))
    few = sampler in ("rk45", "annealed_langevin")  # to one only the ends count, the other asks five times a level
    for steps in (1, 7) if few else (*T_LIST, schedule.steps):
        hits(Part(sampler), schedule, build("grids", Part(grid), schedule, steps), target)


def refuses(sampler: Part, schedule: Schedule) -> None:
    """Before its first question it says that the schedule's start has no signal."""
    grid = build("grids", Part("trailing"), schedule, 2)
    with pytest.raises(BadArgument, match=r"(rho is infinite at the start|starts without signal).*zero terminal SNR"):
        next(sampler_of(sampler)(POINT[None], grid, silent))


@pytest.mark.parametrize("name", names("schedules"))
@pytest.mark.parametrize("sampler", [p for p in SAMPLERS if p.knobs], ids=label)
def test_a_point_is_hit_on_every_schedule(name: str, sampler: Part) -> None:
    schedule = schedule_of(name)
    if needs_signal(sampler) and float(schedule(1.0).alpha) == 0:
        refuses(sampler, schedule)
        return
    for steps in T_LIST:
        hits(sampler, schedule, build("grids", Part("trailing"), schedule, steps), "v")


@pytest.mark.parametrize(
    ("sampler", "name"), [("ddpm", "linear"), ("ddpm", "flow"), ("ddim", "cosine"), ("heun", "vp"), ("euler", "edm")]
)
def test_a_point_is_hit_at_all_thousand_steps(sampler: str, name: str) -> None:
    """T, which for continuous schedules is 1,000; T trailing steps are every entry of the schedule."""
    schedule = schedule_of(name)
    grid = build("grids", Part("trailing"), schedule, 1000)
    entries = torch.arange(1000, -1, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(grid.times, entries, rtol=0, atol=1e-15)
    hits(Part(sampler), schedule, grid, "v")


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear", "sigmoid"])
def test_a_point_is_hit_from_zero_terminal_snr(name: str) -> None:
    schedule = schedule_of(Part(name, {"zero_terminal": True}))
    for sampler in names("samplers"):
        if needs_signal(Part(sampler)):
            refuses(Part(sampler), schedule)
            continue
        for target in ("x0", "v", "flow"):
            for steps in (1, 2, 7):
                hits(Part(sampler), schedule, build("grids", Part("trailing"), schedule, steps), target)
