"""img2img and variations: cuts of the schedule, on which n steps asked are n steps run, and noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from inkdrop.core.grid import Grid
from inkdrop.core.noise import Keyed
from inkdrop.core.oracle import Gaussian
from inkdrop.core.posterior import mean_coefficients, posterior_variance
from inkdrop.core.schedule import Schedule
from inkdrop.drive import Step
from inkdrop.edit.cut import Cut, lower_grid
from inkdrop.editing import img2img, vary
from inkdrop.errors import BadArgument, BadData, BadShape
from inkdrop.find import Part, build
from inkdrop.generate import sample
from inkdrop.inversion import decode, invert
from inkdrop.plan import Plan
from runs import points, untrained
from specimens import GRIDS, SCHEDULES, denoiser_of, label, normals, schedule_of, target_of

GAUSSIAN = Gaussian(torch.tensor([0.3, -0.5], dtype=torch.float64), 0.4)
IMAGES = normals(5, 2, seed=1, dtype=torch.float32).clamp(-1, 1)


def model(schedule: str = "cosine", **knobs: Any) -> Any:
    made = schedule_of(Part(schedule, knobs))
    return denoiser_of(GAUSSIAN, made, target_of("v", made))


def lower(whole: Schedule, strength: float, steps: int, spacing: str = "trailing") -> Grid:
    return lower_grid(whole, strength, steps, lambda cut: build("grids", Part(spacing), cut, steps))


# ---- cuts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [p for p in SCHEDULES if schedule_of(p).steps >= 50], ids=label)
@pytest.mark.parametrize("spacing", GRIDS)
def test_n_steps_asked_are_n_steps_run_at_any_strength(spacing: str, part: Part) -> None:
    """n + 1 falling times of the whole schedule, from the strength to clean; leading starts below, as it does uncut."""
    whole = schedule_of(part)
    for strength in (0.3, 0.82):
        top = round(strength * whole.steps) / whole.steps
        for steps in (1, 2, 13):
            grid = lower(whole, strength, steps, spacing)
            assert len(grid) == steps + 1
            assert grid[-1].clean
            assert grid.schedule is whole
            first = float(grid[0].t)
            assert first <= top + 1e-12 if spacing == "leading" else first == pytest.approx(top, abs=1e-12)


@pytest.mark.parametrize("part", SCHEDULES, ids=label)
def test_a_cut_has_the_levels_of_its_whole_and_inverts(part: Part) -> None:
    whole = schedule_of(part)
    cut = Cut(whole, 0.6)
    entries = torch.arange(0, cut.steps + 1, dtype=torch.float64)
    mine, theirs = cut(entries / cut.steps), whole(entries / whole.steps)
    torch.testing.assert_close(mine.alpha, theirs.alpha, rtol=1e-10, atol=0)
    torch.testing.assert_close(mine.sigma, theirs.sigma, rtol=1e-10, atol=0)
    torch.testing.assert_close(cut.time_of(theirs.lam[1:]), entries[1:] / cut.steps, rtol=0, atol=1e-7)
    assert cut.preserving == whole.preserving


def test_cut_spacings_are_those_of_their_papers() -> None:
    """trailing: every entry where steps = entries. uniform: strength·(1 − i/n). karras: its formula there."""
    whole = schedule_of("linear")
    grid = lower(whole, 0.4, 400)
    torch.testing.assert_close(grid.times, torch.arange(400, -1, -1, dtype=torch.float64) / 1000, rtol=0, atol=1e-12)
    uniform = lower(whole, 0.4, 8, "uniform")
    torch.testing.assert_close(uniform.times, 0.4 * (1 - torch.arange(9, dtype=torch.float64) / 8), rtol=0, atol=1e-12)
    karras = lower(whole, 0.4, 6, "karras")
    high, low = (float(whole(t).rho) ** (1 / 7) for t in (0.4, 0.001))
    want = [(high + i / 5 * (low - high)) ** 7 for i in range(6)]
    assert [float(level.rho) for level in karras[:-1]] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("spacing", GRIDS)
def test_strength_1_is_the_grid_itself(spacing: str) -> None:
    whole = schedule_of("cosine")
    assert torch.equal(lower(whole, 1.0, 20, spacing).times, build("grids", Part(spacing), whole, 20).times)


# ---- img2img -------------------------------------------------------------------------------------------------


def counted(asks: list[float]) -> Any:
    def heard(done: int, step: Step) -> None:
        if not step.level.clean:
            asks.append(float(step.level.t))

    return heard


def test_strength_0_returns_the_images_and_asks_nothing() -> None:
    asks: list[float] = []
    got = img2img(model(), IMAGES, strength=0, on_step=counted(asks))
    assert torch.equal(got, IMAGES)
    assert got is not IMAGES
    assert asks == []


@pytest.mark.parametrize("strength", [0.013, 0.2, 0.755, 1.0])
def test_as_many_questions_as_steps_from_the_strength_down(strength: float) -> None:
    asks: list[float] = []
    img2img(model(), IMAGES, strength=strength, steps=13, on_step=counted(asks))
    assert len(asks) == 13
    assert asks[0] == pytest.approx(strength, abs=1e-9)


def test_the_start_is_the_image_with_its_own_noise() -> None:
    """x = alpha·x0 + sigma·noise, the noise that of (seed, image), draw 0: that from which sampling starts too."""
    seen: list[Tensor] = []
    img2img(model(), IMAGES, strength=0.5, steps=4, seed=9, first=3, on_step=lambda done, step: seen.append(step.x))
    level, noise = schedule_of("cosine")(0.5), Keyed(9, range(3, 8)).start((5, 2))
    torch.testing.assert_close(seen[0], level.alpha * IMAGES + level.sigma * noise, rtol=0, atol=1e-6)


def test_from_zero_terminal_snr_strength_1_is_sampling() -> None:
    """Bit for bit, whatever the images: nothing of them is left at alpha = 0. Fresh noise is not the start's again."""
    net = model("linear", zero_terminal=True)
    for sampler in ("ddim", "ddpm", "dpmpp_2m_sde"):
        fresh = sample(net, 5, shape=(2,), seed=2, steps=7, sampler=sampler)
        assert torch.equal(img2img(net, IMAGES, strength=1, seed=2, steps=7, sampler=sampler), fresh)


def test_a_stochastic_sampler_s_noise_is_not_the_start_s() -> None:
    """ddpm's state after a step is c0·x0 + ct·x + std·noise: over 3,000 images that noise is not the one that was added
    (a correlation within 4.5 standard errors of 0), and has variance 1."""
    rows, net, seen = 3000, model(), list[Step]()
    img2img(
        net,
        torch.zeros(rows, 2),
        strength=0.5,
        steps=5,
        sampler="ddpm",
        batch=rows,
        on_step=lambda _, s: seen.append(s),
    )
    first, second = seen[0], seen[1]
    c0, ct = mean_coefficients(first.level, second.level)
    std = posterior_variance(first.level, second.level).sqrt()
    fresh, start = (second.x - c0 * first.x0 - ct * first.x) / std, first.x / first.level.sigma
    assert bool(((fresh * start).mean(0).abs() < 4.5 / rows**0.5).all())
    assert bool(((fresh.var(0) - 1).abs() < 4.5 * (2 / rows) ** 0.5).all())


@pytest.mark.parametrize("schedule", ["cosine", "edm", "flow"])
def test_of_a_gaussian_it_is_the_closed_form(schedule: str) -> None:
    """Noised in one jump, then along the probability flow, which is affine: Heun's 200 steps agree to 2e-3."""
    net, strength = model(schedule), 0.6
    got = img2img(net, IMAGES, strength=strength, steps=200, sampler="heun", seed=4)
    level = net.schedule(strength)
    x = (level.alpha * IMAGES + level.sigma * Keyed(4, range(5)).start((5, 2))).double()
    std = float(((level.alpha * 0.4) ** 2 + level.sigma**2).sqrt())
    want = GAUSSIAN.means[0] + 0.4 / std * (x - level.alpha * GAUSSIAN.means[0])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-3)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    net = model()
    whole = img2img(net, IMAGES, strength=0.7, steps=5, sampler="ddpm", seed=3)
    torch.testing.assert_close(
        img2img(net, IMAGES, strength=0.7, steps=5, sampler="ddpm", seed=3, batch=2), whole, rtol=0, atol=1e-6
    )
    alone = img2img(net, IMAGES[3:4], strength=0.7, steps=5, sampler="ddpm", seed=3, first=3)
    torch.testing.assert_close(alone, whole[3:4], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strength": 1.2}, r"strength: got 1.2, need a number in \[0, 1\]"),
        ({"strength": -0.1}, r"strength: got -0.1, need a number in \[0, 1\]"),
        ({"strength": math.nan}, r"strength: got nan, need a number in \[0, 1\]"),
        (
            {"strength": 0.01, "steps": 20},
            "below which the schedule has 10 levels for 20 steps; need at least 0.02, or",
        ),
        ({"strength": 0.019, "steps": 20}, "strength: got 0.019, below which the schedule has 19 levels for 20 steps"),
        ({"strength": 0.0001, "steps": 1}, "strength: got 0.0001, which is below the first noisy time, 0.001"),
        ({"steps": 0}, "sampler steps: got 0, need at least 1"),
    ],
)
def test_a_strength_that_cannot_be_run_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadArgument, match=match):
        img2img(model(), IMAGES, **options)


def test_the_smallest_strength_that_is_named_works() -> None:
    asks: list[float] = []
    img2img(model(), IMAGES, strength=0.02, steps=20, on_step=counted(asks))
    assert len(asks) == 20


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (torch.zeros(0, 1, 4, 4), BadArgument, "img2img images: got none, need at least 1"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), BadShape, r"img2img images: got torch.uint8"),
        (torch.full((1, 1, 4, 4), math.nan), BadData, "img2img images: got values that are not finite"),
        (torch.full((1, 1, 4, 4), 2.0), BadData, r"img2img images: got values in \[2, 2\], need \[-1, 1\]"),
    ],
)
def test_images_that_the_model_could_not_have_made_are_refused(images: Tensor, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        img2img(model(), images, strength=0.5, steps=2)


# ---- variations ----------------------------------------------------------------------------------------------


def test_variations_are_img2img_with_noise_of_their_own() -> None:
    net = model()
    got = vary(net, IMAGES[:2], count=3, strength=0.6, steps=5, seed=7)
    assert got.shape == (2, 3, 2)
    want = img2img(net, IMAGES[:2].repeat_interleave(3, 0), strength=0.6, steps=5, seed=7)
    assert torch.equal(got.flatten(0, 1), want)
    assert len({tuple(row.tolist()) for row in got.flatten(0, 1)}) == 6


def test_variations_have_the_class_of_their_image() -> None:
    bundle = untrained(points(plan=Plan(steps=4, guide=())), (2,), ("a", "b"))
    many = vary(bundle, IMAGES[:2], count=3, label=["b", "a"])
    each = img2img(bundle, IMAGES[:2].repeat_interleave(3, 0), strength=0.5, label=[1, 1, 1, 0, 0, 0])
    assert torch.equal(many.flatten(0, 1), each)
    assert not torch.allclose(
        each, img2img(bundle, IMAGES[:2].repeat_interleave(3, 0), strength=0.5, label=0), atol=1e-3
    )


def test_variations_by_eta_start_from_the_image_s_own_noise() -> None:
    """As eta → 0 they become the round trip of the inversion; more of it moves them further away."""
    net = model()
    options: dict[str, Any] = {"steps": 10, "seed": 1}
    trip = decode(net, invert(net, IMAGES, depth=0.8, iterations=8, **options), depth=0.8, **options)
    spread = []
    for eta in (1e-3, 0.3, 1.0):
        many = vary(net, IMAGES, count=20, strength=0.8, eta=eta, iterations=8, **options)
        spread.append(float((many - trip[:, None]).square().mean().sqrt()))
    assert spread[0] < 1e-2 < 0.05 < spread[1] < spread[2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"count": 0}, "vary count: got 0, need at least 1"),
        ({"eta": 0.0}, r"vary eta: got 0, need a number in \(0, 1\]; at 0 every variation is the image itself"),
        ({"eta": 1.5}, "vary eta: got 1.5"),
        ({"iterations": 4}, "vary iterations: got 4, which has no effect without eta"),
        ({"eta": 0.5, "sampler": "heun"}, "vary sampler: got heun, but inversion by fixed-point goes with the sampler"),
        ({"strength": 0}, "strength: got 0, which is below the first noisy time"),
    ],
)
def test_variations_that_cannot_be_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadArgument, match=match):
        vary(model(), IMAGES, **{"steps": 3, **options})
