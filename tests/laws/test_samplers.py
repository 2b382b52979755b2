"""Law 3: samplers against distributions whose ideal denoiser, flow and moments are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.noise import Keyed
from inkdrop.core.oracle import Gaussian
from inkdrop.core.schedule import Schedule, Table
from inkdrop.drive import drive, trace
from inkdrop.errors import BadArgument
from inkdrop.find import Part, build, find
from paths import MIXTURE, every_path, every_sampler, needs_signal, run, silent
from specimens import label, normals, sampler_of, schedule_of

# ---- samplers that are one another ---------------------------------------------------------------------------


def subgrids(schedule: Schedule) -> list[Grid]:
    """Every spacing at a few steps, random entries, and a segment that does not end clean."""
    gen = np.random.default_rng(0)
    found = [
        build("grids", Part(name), schedule, n) for name in ("trailing", "leading", "uniform") for n in (1, 2, 7, 20)
    ]
    for size in (3, 12):
        ks = np.sort(gen.choice(np.arange(1, schedule.steps + 1), size, replace=False))[::-1]
        found.append(Grid(schedule, np.append(ks, 0) / schedule.steps))
    return [*found, found[-1][2:-2]]


@pytest.mark.parametrize(
    "part",
    [Part("linear"), Part("cosine"), Part("edm"), Part("flow"), Part("linear", {"zero_terminal": True})],
    ids=label,
)
def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(part: Part) -> None:
    """The same noise gives the same numbers to 1e-12 of the state's size, on every sub-grid."""
    schedule = schedule_of(part)
    for grid in subgrids(schedule):
        x = normals(4, 2, seed=8) * float(grid[0].sigma)
        ddim, ddpm = run(Part("ddim", {"eta": 1.0}), x, grid), run(Part("ddpm"), x, grid)
        torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-12 * max(1.0, float(x.abs().max())))


@every_path
def test_euler_is_ddim_without_noise(path: str) -> None:
    grid = build("grids", Part("trailing"), schedule_of(path), 10)
    x = schedule_of(path).start(normals(3, 2, seed=9))
    assert torch.equal(run(Part("euler"), x, grid), run(Part("ddim", {"eta": 0.0}), x, grid))


def test_euler_on_the_straight_path_is_flow_matching_s() -> None:
    """x ← x + (s' − s)·v with v = eps − x0 (Lipman et al. 2023), written out, from s = 1 to s = 0."""
    for shift in (1.0, 3.0):
        schedule = schedule_of(Part("flow", {"shift": shift}))
        grid = build("grids", Part("uniform"), schedule, 12)
        x = want = normals(3, 2, seed=10)
        for now, nxt in pairwise(grid):
            belief = MIXTURE(Ask(want, now))
            want = want + (nxt.sigma - now.sigma) * (belief.eps - belief.x0)
        for name in ("ddim", "euler"):
            torch.testing.assert_close(run(Part(name), x, grid), want, rtol=0, atol=1e-13)


def test_heun_in_rho_is_karras_algorithm_1() -> None:
    """With D the denoiser and no churn: d = (x − D)/sigma, an Euler step, the mean of both slopes but at the end."""
    schedule = schedule_of("edm")
    grid = build("grids", Part("karras"), schedule, 8)
    x = want = schedule.start(normals(3, 2, seed=11))
    sigmas = [float(level.sigma) for level in grid]
    for i, (now, nxt) in enumerate(pairwise(sigmas)):
        slope = (want - MIXTURE(Ask(want, grid[i])).x0) / now
        ahead = want + (nxt - now) * slope
        if nxt > 0:
            second = (ahead - MIXTURE(Ask(ahead, grid[i + 1])).x0) / nxt
            ahead = want + (nxt - now) * (slope + second) / 2
        want = ahead
    torch.testing.assert_close(run(Part("heun", {"space": "rho"}), x, grid), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_song_s_equation_12(eta: float) -> None:
    """In their letters: a = abar, s(eta) = eta·√((1 − a_s)/(1 − a_t))·√(1 − a_t/a_s)."""
    schedule = schedule_of("linear")
    grid = build("grids", Part("leading"), schedule, 10)
    noise, x = Keyed(3, [0, 1]), normals(2, 2, seed=12)
    want = x
    for now, nxt in pairwise(grid):
        a_t, a_s = float(now.alpha) ** 2, float(nxt.alpha) ** 2
        eps = MIXTURE(Ask(want, now)).eps
        s = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
        x0 = (want - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
        want = math.sqrt(a_s) * x0 + math.sqrt(max(0.0, 1 - a_s - s**2)) * eps
        if eta and not nxt.clean:
            want = want + s * noise(want, now, nxt)
    torch.testing.assert_close(run(Part("ddim", {"eta": eta}), x, grid, seed=3), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("variance", ["beta", "beta-tilde"])
def test_ddpm_is_ho_s_algorithm_2(variance: str) -> None:
    """x ← (x − beta/√(1 − abar)·eps)/√(1 − beta) + √var·z, from betas alone, over all T = 40 steps."""
    schedule = schedule_of(Part("linear", {"steps": 40, "rescale": True}))
    assert isinstance(schedule, Table)
    beta = schedule.betas
    abar = (1 - beta).cumprod(0)
    grid = build("grids", Part("trailing"), schedule, 40)
    noise, x = Keyed(3, [0, 1]), normals(2, 2, seed=13)
    want = x
    for k in range(39, -1, -1):
        level = grid[39 - k]
        eps = MIXTURE(Ask(want, level)).eps
        want = (want - beta[k] / (1 - abar[k]).sqrt() * eps) / (1 - beta[k]).sqrt()
        if k > 0:
            var = beta[k] * (1 if variance == "beta" else (1 - abar[k - 1]) / (1 - abar[k]))
            want = want + var.sqrt() * noise(want, level, level)
    torch.testing.assert_close(run(Part("ddpm", {"variance": variance}), x, grid, seed=3), want, rtol=0, atol=1e-10)


def test_learned_variance_interpolates_the_logarithms() -> None:
    """var = beta^v·beta-tilde^(1 − v) (Nichol & Dhariwal 2021, eq. 15), each pixel with its own v in [0, 1]."""
    grid = build("grids", Part("trailing"), schedule_of("linear"), 5)[:2]
    x = normals(2, 3, seed=14)
    frac = torch.tensor([[0.0, 1.0, 0.3], [0.5, 0.25, 0.0]], dtype=torch.float64)

    def net(ask: Ask) -> Belief:
        return Belief(0 * ask.x, ask.x / ask.level.sigma, var_frac=frac)

    def ends(variance: str) -> Tensor:
        part = Part("ddpm", {"variance": variance})
        return run(part, x, grid, net) - drive(sampler_of(part)(x, grid, lambda y, *_: 0 * y), net)

    noise = Keyed(7, [0, 1])(x, grid[0], grid[1])
    low, high = (ends(variance) / noise for variance in ("beta-tilde", "beta"))
    torch.testing.assert_close(ends("learned") / noise, high**frac * low ** (1 - frac), rtol=1e-10, atol=0)
    with pytest.raises(BadArgument, match="'learned', but this net does not predict a variance; try beta-tilde"):
        run(Part("ddpm", {"variance": "learned"}), x, grid, GAUSSIAN_3)


GAUSSIAN_3 = Gaussian(torch.zeros(3, dtype=torch.float64), 0.5)


# ---- tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "edm", "flow"])
@every_sampler
def test_the_table_is_the_generator(part: Part, schedule: str) -> None:
    """Played back with recorded noise, the float64 coefficients give the sampler's states to 1e-12 of their size. Where
    there are none, for steps that depend on the answers, trace says so."""
    built = schedule_of(schedule)
    grid = build("grids", Part("trailing"), built, 9)
    if needs_signal(part) and schedule == "flow":
        grid = grid[1:]
    if part.name in ("predictor_corrector", "rk45"):
        with pytest.raises(BadArgument, match="not linear in its answers"):
            trace(find("samplers", part.name), grid, **part.knobs)
        return
    x = normals(3, 2, seed=15) * float(grid[0].sigma)
    asked, drawn, keyed = [], [], Keyed(5, range(3))

    def noise(y: Tensor, now: Level, nxt: Level) -> Tensor:
        drawn.append(keyed(y, now, nxt))
        return drawn[-1]

    def ear(ask: Ask) -> Belief:
        asked.append(ask)
        return MIXTURE(ask)

    result = drive(sampler_of(part)(x, grid, noise), ear)
    rows = trace(find("samplers", part.name), grid, **part.knobs)
    registers = {"start": x, **{f"noise_{i}": z for i, z in enumerate(drawn)}}
    assert len(rows) - 1 == len(asked)
    size = 1e-12 * max(1.0, float(x.abs().max()))
    for i, ((state, level), want) in enumerate(zip(rows, [*asked, None], strict=True)):
        got = sum((factor * registers[name] for name, factor in state.items()), torch.zeros_like(x))
        torch.testing.assert_close(got, result if want is None else want.x, rtol=0, atol=size)
        if want is not None and level is not None:
            assert float(level.t) == float(want.level.t)
            registers[f"x0_{i}"] = MIXTURE(Ask(got, level)).x0
    assert {name for row in rows for name in row.state} <= set(registers)


def test_a_sampler_that_is_not_linear_has_no_table() -> None:
    def squares(x: Tensor, grid: Sequence[Level], noise: object) -> object:
        belief = yield Ask(x, grid[0])
        return torch.square(belief.x0)

    def divides(x: Tensor, grid: Sequence[Level], noise: object) -> object:
        belief = yield Ask(x, grid[0])
        return grid[0].alpha / belief.x0

    grid = build("grids", Part("trailing"), schedule_of("linear"), 1)
    for sampler in (squares, divides):
        with pytest.raises(BadArgument, match="not linear in its answers"):
            trace(sampler, grid)


# ---- rows and dtypes -----------------------------------------------------------------------------------------


@every_path
@every_sampler
def test_an_image_does_not_depend_on_its_neighbours(part: Part, path: str) -> None:
    """Row i alone is bit for bit row i of a batch, and moves no other row when it is changed."""
    grid = build("grids", Part("trailing"), schedule_of(path), 6)
    grid = grid[1:] if float(grid[0].alpha) == 0 else grid
    x = normals(5, 2, seed=16) * float(grid[0].sigma)
    whole = run(part, x, grid)
    for i in (0, 3):
        alone = drive(sampler_of(part)(x[i : i + 1], grid, Keyed(7, [i])), MIXTURE)
        assert torch.equal(alone[0], whole[i])
    x[2] = 50.0
    moved = run(part, x, grid)
    assert torch.equal(moved[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])
    assert not torch.equal(moved[2], whole[2])


@every_path
@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_keeps_its_dtype(part: Part, path: str, dtype: torch.dtype) -> None:
    """Levels are float64, 0-dim or one a row, and promote neither; float32 then follows float64 to rounding."""
    grid = build("grids", Part("trailing"), schedule_of(path), 6)
    grid = grid[1:] if float(grid[0].alpha) == 0 else grid
    x = normals(3, 2, seed=17) * float(grid[0].sigma)
    seen: set[torch.dtype] = set()

    def ear(ask: Ask) -> Belief:
        seen.add(ask.x.dtype)
        assert {f.dtype for f in ask.level} == {torch.float64}
        return MIXTURE(ask)

    got = run(part, x.to(dtype), grid, ear)
    assert seen | {got.dtype} == {dtype}
    want = run(part, x, grid)
    allowed = 2e-5 * max(1.0, float(want.abs().max())) if dtype == torch.float32 else 0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=allowed)


# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("ddim", {"eta": 1.5}), r"ddim eta: got 1.5, need a number in \[0, 1\]"),
        (Part("ddim", {"eta": -0.1}), r"ddim eta: got -0.1, need a number in \[0, 1\]"),
        (Part("ddim", {"eta": math.nan}), "ddim eta: got nan"),
        (Part("ddpm", {"variance": "gamma"}), "ddpm variance: got 'gamma', need beta, beta-tilde or learned"),
        (Part("heun", {"space": "lam"}), "heun space: got 'lam', need u or rho"),
    ],
    ids=label,
)
def test_bad_knobs_are_refused_before_the_first_question(part: Part, message: str) -> None:
    grid = build("grids", Part("trailing"), schedule_of("linear"), 2)
    with pytest.raises(BadArgument, match=message):
        next(sampler_of(part)(torch.zeros(1, 2), grid, silent))
