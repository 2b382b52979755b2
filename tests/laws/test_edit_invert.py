"""Inversion and interpolation: the way back to noise, exact for the steps that undo it, and arcs between two noises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from inkdrop import open_data
from inkdrop.core.ask import Ask, Belief
from inkdrop.core.grid import Grid
from inkdrop.core.oracle import Gaussian, Mixture
from inkdrop.drive import Step, drive
from inkdrop.edit.invert import Method, invert
from inkdrop.edit.slerp import slerp
from inkdrop.errors import BadArgument, BadShape, InkdropError, UnknownName
from inkdrop.find import Part, build
from inkdrop.generate import sample
from inkdrop.inversion import decode, interpolate, interpolate_seeds
from inkdrop.inversion import invert as invert_model
from inkdrop.plan import Plan
from inkdrop.recipes.digits import digits
from inkdrop.samplers.ddim import ddim
from inkdrop.samplers.heun import heun
from inkdrop.train.loop import fit
from runs import points, untrained
from specimens import denoiser_of, normals, schedule_of, target_of

pytestmark = pytest.mark.long  # left out of the fast tier

MIXTURE = Mixture(
    torch.tensor([[-0.7, 0.2], [0.5, 0.6], [0.3, -0.8]], dtype=torch.float64),
    torch.tensor([0.25, 0.3, 0.2], dtype=torch.float64),
)
GAUSSIAN = Gaussian(torch.tensor([0.3, -0.5], dtype=torch.float64), 0.4)
CLEAN = MIXTURE.sample(16, schedule_of("vp")(0.0), seed=3)


def between(schedule: str, steps: int, high: float = 5.0, low: float = 0.1) -> Grid:
    """Equal steps of t between two interior levels, in rho = sigma/alpha."""
    made = schedule_of(schedule)
    ends = [float(made.time_of(-math.log(rho))) for rho in (high, low)]
    return Grid(made, torch.linspace(*ends, steps + 1, dtype=torch.float64))


# ---- the methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp", "edm", "flow", "continuous_cosine"])
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_the_fixed_point_is_the_inverse_of_ddim_on_its_grid(schedule: str, steps: int) -> None:
    """From a clean sample up to t = 1 and down again: 1e-8 in float64 once iterated enough, on the coarsest grids too;
    and up to t = 0.4 in a single step."""
    grid = build("grids", Part("trailing"), schedule_of(schedule), steps)
    for levels in (grid, Grid(grid.schedule, [0.4, 0.0])):
        oracle = Gaussian(torch.tensor([0.3, -0.5], dtype=torch.float64), 0.9)
        x = oracle.sample(8, grid[-1], seed=4)
        start = drive(invert(x, levels, iterations=80), oracle)
        torch.testing.assert_close(drive(ddim(start, levels, None), oracle), x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
def test_each_iteration_gains_a_factor_of_the_order_of_the_step(schedule: str) -> None:
    """On a curved flow: the round trip's error falls geometrically, at least fivefold an iteration at 60 steps."""
    grid = between(schedule, 60)
    x = MIXTURE.sample(16, grid[-1], seed=5)
    errors = []
    for iterations in (1, 2, 3):
        start = drive(invert(x, grid, iterations=iterations), MIXTURE)
        errors.append(float((drive(ddim(start, grid, None), MIXTURE) - x).square().mean().sqrt()))
    assert all(a > 5 * b for a, b in pairwise(errors)), errors


def order_of(errors: Sequence[float]) -> float:
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
@pytest.mark.parametrize(("method", "order"), [("naive", 1), ("fixed-point", 1), ("heun", 2)])
def test_order_against_the_flow_upwards(method: Method, order: int, schedule: str) -> None:
    """RMS error at the noisy end against the affine flow in closed form; slope on 64 → 128 steps within ±0.15."""
    errors = []
    for steps in (64, 128):
        grid = between(schedule, steps)
        x = GAUSSIAN.sample(16, grid[-1], seed=6)
        got = drive(invert(x, grid, method=method, iterations=4), GAUSSIAN)
        errors.append(float((got - GAUSSIAN.flow(x, grid[-1], grid[0])).square().mean().sqrt()))
    assert order_of(errors) == pytest.approx(order, abs=0.15)


def test_naive_inversion_is_song_s_reversed_step() -> None:
    """x_t/alpha_t = x_s/alpha_s + (rho_t − rho_s)·eps(x_s): Euler's step upwards, for which z and u may be changed to
    any straight variables; from clean the first level is asked about alpha·x."""
    grid = build("grids", Part("trailing"), schedule_of("linear"), 9)
    asked: list[Ask] = []

    def ear(ask: Ask) -> Belief:
        asked.append(ask)
        return MIXTURE(ask)

    got = drive(invert(CLEAN, grid, method="naive"), ear)
    assert [float(ask.level.t) for ask in asked] == [float(grid[-2].t), *reversed(grid.times[1:-1].tolist())]
    torch.testing.assert_close(asked[0].x, grid[-2].alpha * CLEAN, rtol=0, atol=1e-14)
    x = asked[1].x
    for low, high in pairwise(reversed(grid[:-1])):
        x = high.alpha * (x / low.alpha + (high.rho - low.rho) * MIXTURE(Ask(x, low)).eps)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("method", "asks"), [("naive", 9), ("fixed-point", 9 * 4), ("heun", 4 + 8 * 2)])
def test_the_cost_in_asks(method: Method, asks: int) -> None:
    grid, count = build("grids", Part("trailing"), schedule_of("linear"), 9), 0

    def ear(ask: Ask) -> Belief:
        nonlocal count
        count += 1
        return MIXTURE(ask)

    drive(invert(CLEAN, grid, method=method, iterations=4), ear)
    assert count == asks


def test_heun_inversion_is_undone_by_heun_to_second_order() -> None:
    errors = []
    for steps in (40, 80):
        grid = between("vp", steps)
        x = MIXTURE.sample(16, grid[-1], seed=7)
        start = drive(invert(x, grid, method="heun"), MIXTURE)
        errors.append(float((drive(heun(start, grid, None), MIXTURE) - x).square().mean().sqrt()))
    assert order_of(errors) > 1.85
    assert errors[-1] < 3e-4


def test_rows_do_not_meet() -> None:
    grid = build("grids", Part("trailing"), schedule_of("vp"), 6)
    for method in ("naive", "fixed-point", "heun"):
        whole = drive(invert(CLEAN, grid, method=method), MIXTURE)
        assert torch.equal(drive(invert(CLEAN[3:4], grid, method=method), MIXTURE), whole[3:4])


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"method": "euler"}, "invert method: got 'euler', need naive, fixed-point or heun"),
        ({"iterations": 0}, "invert iterations: got 0, need at least 1; try 3"),
    ],
)
def test_bad_knobs_are_refused_before_the_first_question(knobs: dict[str, Any], match: str) -> None:
    with pytest.raises(BadArgument, match=match):
        next(invert(CLEAN, build("grids", Part("trailing"), schedule_of("vp"), 2), **knobs))


# ---- the verbs -----------------------------------------------------------------------------------------------


def model(schedule: str = "cosine") -> Any:
    made = schedule_of(schedule)
    return denoiser_of(MIXTURE, made, target_of("v", made))


IMAGES = CLEAN.float()[:6]


@pytest.mark.parametrize("depth", [0.4, 1.0])
@pytest.mark.parametrize("method", ["fixed-point", "heun"])
def test_a_round_trip_returns_the_images(method: Method, depth: float) -> None:
    """Against a net that answers in float32, from any depth."""
    how: dict[str, Any] = {"depth": depth, "method": method, "steps": 50}
    states = invert_model(model(), IMAGES, iterations=4, **how)
    back = decode(model(), states, **how)
    assert float((back - IMAGES).square().mean().sqrt()) < 2e-3
    naive = invert_model(model(), IMAGES, depth=depth, method="naive", steps=50)
    worse = decode(model(), naive, depth=depth, steps=50)
    assert float((worse - IMAGES).square().mean().sqrt()) > 4e-3


def test_inverted_noise_is_noise() -> None:
    """Of samples of the model the states at t = 1 have mean 0 and covariance I, within 5 standard errors."""
    rows = 1000
    x = MIXTURE.sample(rows, schedule_of("vp")(0.0), seed=8).float()
    z = invert_model(model(), x, steps=50, batch=rows)
    assert bool((z.mean(0).abs() < 5 / rows**0.5).all())
    gap = z.T @ z / rows - torch.eye(2)
    assert bool((gap.abs() < 5 * 2**0.5 / rows**0.5).all()), gap


@pytest.mark.parametrize("guidance", [0, 1, 3])
def test_guidance_is_inverted_with_the_rest(guidance: float) -> None:
    """Round trip of a guided, labelled net; with another class than the inversion's the image changes."""
    bundle = untrained(points(plan=Plan(steps=25, guide=())), (2,), ("a", "b", "c"))
    x = 0.3 * normals(4, 2, seed=9, dtype=torch.float32)
    how: dict[str, Any] = {"depth": 0.5, "guidance": guidance}
    states = invert_model(bundle, x, iterations=8, label="b", **how)
    back = decode(bundle, states, label="b", **how)
    torch.testing.assert_close(back, x, rtol=0, atol=2e-3)
    if guidance:
        assert not torch.allclose(decode(bundle, states, label="c", **how), x, atol=0.02)


def test_a_plan_s_own_sampler_does_not_stand_in_the_way() -> None:
    """A model whose plan is stochastic is inverted and decoded by ddim all the same."""
    bundle = untrained(points(plan=Plan(Part("ddpm"), steps=20, guide=())), (2,))
    x = 0.3 * normals(4, 2, seed=9, dtype=torch.float32)
    back = decode(bundle, invert_model(bundle, x, iterations=8, depth=0.5), depth=0.5)
    torch.testing.assert_close(back, x, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("verb", "options", "error", "match"),
    [
        (invert_model, {"method": "haun"}, UnknownName, "invert method: unknown name 'haun'; did you mean heun"),
        (invert_model, {"sampler": "heun"}, BadArgument, "invert sampler: got heun, but inversion by fixed-point goes"),
        (decode, {"combine": "restart"}, BadArgument, "decode combine: got restart, but inversion by fixed-point"),
        (invert_model, {"depth": 0}, BadArgument, "depth: got 0, which is below the first noisy time"),
        (invert_model, {"depth": 1.5}, BadArgument, r"depth: got 1.5, need a number in \[0, 1\]"),
        (invert_model, {"iterations": 0}, BadArgument, "invert iterations: got 0"),
        (invert_model, {"stepps": 3}, UnknownName, "sample option: unknown name 'stepps'; did you mean steps"),
    ],
)
def test_what_cannot_be_inverted_is_refused(verb: Any, options: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        verb(model(), IMAGES, **{"steps": 3, **options})


def test_a_model_with_classes_is_told_none_unless_asked() -> None:
    """Without a label the null condition; guidance or a model that has no null condition must be told a class."""
    bundle = untrained(points(plan=Plan(steps=4, guide=(Part("cfg", {"scale": 3.0}),))), (2,), ("a", "b"))
    x = 0.3 * normals(3, 2, seed=10, dtype=torch.float32)
    plain = invert_model(bundle, x)
    assert torch.equal(plain, invert_model(bundle, x, label=0, guidance=0))
    assert not torch.allclose(plain, invert_model(bundle, x, label=0), atol=1e-3)
    with pytest.raises(BadArgument, match="guidance: got 3, but there is no class to guide by; give a class"):
        invert_model(bundle, x, guidance=3)
    strict = replace(bundle, recipe=replace(bundle.recipe, train=replace(bundle.recipe.train, null_rate=0.0)))
    with pytest.raises(
        BadArgument, match="class: this model was trained without dropped conditions.*give a class: a, b"
    ):
        invert_model(strict, x, guidance=1)


# ---- slerp ---------------------------------------------------------------------------------------------------


def test_slerp_walks_along_the_arc_at_constant_speed() -> None:
    """Rows of one length keep it; the angle from a is the same share of the whole; the ends are the rows, exactly."""
    a, b = normals(5, 3, 4, seed=11), normals(5, 3, 4, seed=12)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).reshape(5, 1, 1)
    whole = torch.acos(torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)))
    for part in (0.0, 0.2, 0.5, 0.9, 1.0):
        got = slerp(a, b, part)
        torch.testing.assert_close(got.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1), rtol=1e-12, atol=0)
        angle = torch.acos(torch.nn.functional.cosine_similarity(a.flatten(1), got.flatten(1)).clamp(max=1))
        torch.testing.assert_close(angle, part * whole, rtol=0, atol=1e-7)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    each = torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0])
    rows = [slerp(a[i : i + 1], b[i : i + 1], float(each[i])) for i in range(5)]
    torch.testing.assert_close(slerp(a, b, each), torch.cat(rows), rtol=0, atol=1e-7)


def test_slerp_of_rows_that_are_nearly_one_is_a_line() -> None:
    a = normals(2, 6, seed=13)
    for gap in (0.0, 1e-9, 1e-5, 1e-3):
        b = a + gap * normals(2, 6, seed=14)
        torch.testing.assert_close(slerp(a, b, 0.3), 0.7 * a + 0.3 * b, rtol=0, atol=max(1e-12, gap**2))


@pytest.mark.parametrize(
    ("a", "b", "part", "match"),
    [
        (torch.ones(1, 2), torch.ones(1, 3), 0.5, "slerp: got"),
        (torch.ones(1, 2), torch.ones(1, 2), 1.5, r"slerp part: got \[1.5\], need numbers in \[0, 1\]"),
        (torch.ones(1, 2), torch.ones(1, 2), math.nan, "slerp part: got"),
        (torch.ones(1, 2), torch.zeros(1, 2), 0.5, "slerp: got a row of zeros"),
        (torch.ones(1, 2), -torch.ones(1, 2), 0.5, "slerp: got two opposite rows"),
    ],
)
def test_slerp_refuses_what_has_no_arc(a: Tensor, b: Tensor, part: float, match: str) -> None:
    with pytest.raises(InkdropError, match=match):
        slerp(a, b, part)


# ---- interpolation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0.5, 1.0])
def test_the_ends_of_a_way_are_the_images(depth: float) -> None:
    """And what lies between is decoded from the arc between their states."""
    a, b = IMAGES[:3], IMAGES[3:]
    how: dict[str, Any] = {"depth": depth, "steps": 25}
    way = interpolate(model(), a, b, count=5, iterations=6, **how)
    assert way.shape == (3, 5, 2)
    torch.testing.assert_close(way[:, 0], a, rtol=0, atol=5e-3)
    torch.testing.assert_close(way[:, -1], b, rtol=0, atol=5e-3)
    states = [invert_model(model(), end, iterations=6, **how) for end in (a, b)]
    middle = decode(model(), slerp(*states, 0.5), **how)
    torch.testing.assert_close(way[:, 2], middle, rtol=0, atol=1e-5)


def test_via_noise_both_images_get_the_same() -> None:
    seen: list[Tensor] = []
    how: dict[str, Any] = {"depth": 0.5, "steps": 3, "seed": 4, "via": "noise"}
    interpolate(model(), IMAGES[:2], IMAGES[2:4], count=2, **how, on_step=lambda done, step: seen.append(step.x))
    level = schedule_of("cosine")(0.5)
    ends = seen[0].reshape(2, 2, 2)
    noise = [(ends[:, k] - level.alpha * IMAGES[2 * k : 2 * k + 2]) / level.sigma for k in (0, 1)]
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-5)
    assert not torch.allclose(noise[0][0], noise[0][1], atol=0.1)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_between_two_seeds(sampler: str) -> None:
    """The ends are the two seeds' samples; fresh noise is the same along a way, so a stochastic sampler's is smooth."""
    bundle = untrained(points(plan=Plan(Part(sampler), steps=12, guide=())), (2,))
    way = interpolate_seeds(bundle, (3, 8), count=41, number=2, seed=3)
    assert way.shape == (2, 41, 2)
    torch.testing.assert_close(way[:, 0], sample(bundle, 2, seed=3), rtol=0, atol=1e-5)
    if sampler == "ddim":
        torch.testing.assert_close(way[:, -1], sample(bundle, 2, seed=8), rtol=0, atol=1e-5)
    jumps = way.diff(dim=1).norm(dim=2)
    assert float(jumps.max()) < 12 * float(jumps.mean())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"count": 1}, BadArgument, "interpolate count: got 1, need at least 2, the ends"),
        ({"via": "magic"}, UnknownName, "interpolate via: unknown name 'magic'"),
        ({"sampler": "heun"}, BadArgument, "interpolate sampler: got heun, but inversion by fixed-point goes"),
    ],
)
def test_ways_that_cannot_be_are_refused(options: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        interpolate(model(), IMAGES[:2], IMAGES[2:4], **{"steps": 3, **options})


def test_ways_need_as_many_ends() -> None:
    with pytest.raises(BadShape, match="interpolate: got images of"):
        interpolate(model(), IMAGES[:2], IMAGES[2:5])
    with pytest.raises(BadArgument, match="interpolate number: got 0"):
        interpolate_seeds(untrained(points(plan=Plan(steps=2, guide=())), (2,)), (0, 1), number=0)


# ---- a trained net -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_forty_decibels_in_four_hundred_asks(tmp_path: Any) -> None:
    """R24, on digits trained for 300 updates: 40 dB and more at w = 1 and 2, where plain inversion is worse."""
    recipe = digits()
    bundle = fit(replace(recipe, train=replace(recipe.train, steps=300, save_every=300)), tmp_path / "run")
    x, cond = open_data(Part("digits"), "test").take(range(16))
    assert cond is not None
    assert cond.label is not None
    for guidance in (1.0, 2.0):
        found = {}
        for method, steps in (("naive", 100), ("fixed-point", 100), ("heun", 99)):
            asks: list[Step] = []
            how: dict[str, Any] = {"label": cond.label.tolist(), "guidance": guidance, "steps": steps, "method": method}
            heard = {"on_step": lambda done, step, asks=asks: None if step.level.clean else asks.append(step)}
            back = decode(bundle, invert_model(bundle, x, **how, **heard), **how, **heard)
            found[method] = 10 * math.log10(4 / float((back - x).square().mean()))
            assert len(asks) <= 400
        assert min(found["fixed-point"], found["heun"]) >= 40, found
        assert found["fixed-point"] > found["naive"] + 6, found
