"""Inpainting: what is known stays known, in every state of every sampler; RePaint's passes; hooks; windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, given, revise
from inkdrop.core.cond import Cond
from inkdrop.core.forward import diffuse
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.noise import Keyed
from inkdrop.core.oracle import Gaussian, Mixture
from inkdrop.drive import drive, trace
from inkdrop.edit.hook import hook
from inkdrop.edit.inpaint import inpaint, repaint
from inkdrop.edit.windows import windows
from inkdrop.editing import VERBS
from inkdrop.errors import BadArgument, BadShape
from inkdrop.find import Part, build
from inkdrop.generate import sample, steps
from inkdrop.guide.cfg import cfg
from inkdrop.painting import inpaint as paint
from inkdrop.painting import outpaint
from inkdrop.plan import Plan, noise_of
from inkdrop.samplers.ddim import ddim
from inkdrop.samplers.ddpm import ddpm
from specimens import SAMPLERS, denoiser_of, label, normals, sampler_of, schedule_of, target_of

pytestmark = pytest.mark.long  # left out of the fast tier

MIXTURE = Mixture(
    torch.tensor([[0.8, 0.8, 0.5], [-0.8, -0.8, -0.1]], dtype=torch.float64), torch.tensor([0.2, 0.2]).double()
)
KEEP = torch.tensor([True, False, True])
every_sampler = pytest.mark.parametrize("part", SAMPLERS, ids=label)


def grid_for(part: Part, schedule: str, count: int = 8) -> Grid:
    """A grid from pure noise to clean; from the second level where a sampler refuses to start without signal."""
    return build("grids", Part("trailing"), schedule_of(schedule), count)


def case(rows: int, grid: Grid, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Known values, their noise, and a start that carries both where they are kept."""
    known, unit = MIXTURE.sample(rows, schedule_of("vp")(0.0), seed=1).to(dtype), normals(rows, 3, seed=2, dtype=dtype)
    return known, unit, torch.where(KEEP, diffuse(known, unit, grid[0]), grid[0].sigma * unit)


# ---- replacement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["vp", "edm", "linear"])
@every_sampler
def test_every_sampler_ends_at_what_is_known(part: Part, schedule: str) -> None:
    """To 1e-6 in float32: the belief of a known entry is a point mass, which every sampler must hit."""
    grid = grid_for(part, schedule)
    known, _, x = case(4, grid, torch.float32)
    noise = noise_of(Plan(part), 3, range(4))
    got = drive(inpaint(sampler_of(part)(x, grid, noise), known, KEEP), MIXTURE)
    torch.testing.assert_close(got[:, KEEP], known[:, KEEP], rtol=0, atol=1e-6)
    assert not torch.allclose(got[:, ~KEEP], known[:, ~KEEP], atol=0.05)


def heard_noise(part: Part, grid: Grid, rows: int) -> tuple[list[tuple[Level, Tensor]], Tensor]:
    """The eps = (x − alpha·known)/sigma of known entries at every question, and the one that went in."""
    known, unit, x = case(rows, grid)
    heard: list[tuple[Level, Tensor]] = []

    def ear(ask: Ask) -> Belief:
        heard.append((ask.level, ((ask.x - ask.level.alpha * known) / ask.level.sigma)[:, KEEP]))
        return MIXTURE(ask)

    gen = torch.Generator().manual_seed(3)
    drive(
        inpaint(
            sampler_of(part)(x, grid, lambda y, *_: torch.randn(y.shape, generator=gen, dtype=y.dtype)), known, KEEP
        ),
        ear,
    )
    return heard, unit[:, KEEP]


NOISY = ("ddpm", "euler_ancestral", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
STOCHASTIC = [
    p for p in SAMPLERS if (p.name in NOISY or p.knobs.get("eta")) and p.knobs.get("variance") != "beta"
]  # ddpm's variance beta is not that of a point, by design
DETERMINISTIC = [p for p in SAMPLERS if p.name in ("ddim", "euler", "heun", "unipc", "deis", "lms", "dpmpp_2m")]


@pytest.mark.parametrize("schedule", ["vp", "edm"])
@pytest.mark.parametrize("part", [p for p in DETERMINISTIC if p not in STOCHASTIC], ids=label)
def test_a_deterministic_sampler_carries_the_known_with_the_noise_it_began_with(part: Part, schedule: str) -> None:
    """The state is alpha·known + sigma·eps with one and the same eps at every question, to float64 rounding."""
    heard, unit = heard_noise(part, grid_for(part, schedule), 3)
    for level, eps in heard:
        scale = float((level.alpha**2 + level.sigma**2).sqrt() / level.sigma)  # what rounding of x is in eps
        torch.testing.assert_close(eps, unit, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("part", STOCHASTIC, ids=label)
def test_a_stochastic_sampler_carries_the_known_at_its_level_of_noise(part: Part) -> None:
    """(x − alpha·known)/sigma of 4,000 rows is a unit normal at every question on the grid: mean and variance within
    4.5 standard errors; and it is not the noise that went in."""
    rows = 4000
    grid = grid_for(part, "vp")
    heard, unit = heard_noise(part, grid, rows)
    on_grid = [eps for level, eps in heard if float(level.t) in grid.times.tolist()]
    assert len(on_grid) >= 7
    for eps in on_grid:
        assert bool((eps.mean(0).abs() < 4.5 / rows**0.5).all())
        assert bool(((eps.var(0) - 1).abs() < 4.5 * (2 / rows) ** 0.5).all())
    assert float((on_grid[-1] - unit).abs().mean()) > 0.3


def test_what_is_not_known_is_left_to_the_net() -> None:
    """Where entries are independent, the others are drawn bit for bit as without inpainting."""
    oracle, grid = Gaussian(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), 0.4), grid_for(Part("ddpm"), "vp")
    known, unit, x = case(5, grid)
    plain = drive(ddpm(grid[0].sigma * unit, grid, Keyed(0, range(5))), oracle)
    held = drive(inpaint(ddpm(x, grid, Keyed(0, range(5))), known, KEEP), oracle)
    assert torch.equal(held[:, ~KEEP], plain[:, ~KEEP])


def test_a_held_belief_agrees_with_its_question_and_pulls_only_what_is_free() -> None:
    ask = Ask(normals(2, 3, seed=5), schedule_of("vp")(0.4), pull=True)

    def once() -> Sampling:
        return (yield ask)

    known = normals(2, 3, seed=6)
    work = inpaint(once(), known, KEEP)
    next(work)
    with pytest.raises(StopIteration) as end:
        work.send(MIXTURE(ask))
    belief = end.value.value
    torch.testing.assert_close(ask.level.alpha * belief.x0 + ask.level.sigma * belief.eps, ask.x, rtol=0, atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: torch.where(KEEP, known, MIXTURE(ask._replace(x=x, pull=False)).x0), ask.x
    )
    g = normals(2, 3, seed=7)
    torch.testing.assert_close(belief.pull(g), torch.einsum("bi,bicj->cj", g, jacobian), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "keep", [torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[True, False]]), torch.ones(2, 2, 3, dtype=torch.bool)]
)
def test_a_mask_that_does_not_fit_is_refused(keep: Tensor) -> None:
    with pytest.raises(BadShape, match="inpaint keep: got torch"):
        next(inpaint(ddim(torch.zeros(2, 3), grid_for(Part("ddim"), "vp"), None), torch.zeros(2, 3), keep))
    with pytest.raises(BadShape, match="inpaint keep: got torch"):
        paint(denoiser(), torch.zeros(2, 3), keep)


# ---- RePaint -------------------------------------------------------------------------------------------------


def lugmayr(total: int, jump: int, resample: int) -> list[tuple[int, int]]:
    """The downward steps of get_schedule_jump, their code (guided_diffusion/scheduler.py), as (t, t − 1)."""
    jumps = dict.fromkeys(range(0, total - jump, jump), resample - 1)
    t, ts = total, []
    while t >= 1:
        t -= 1
        ts.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump):
                t += 1
                ts.append(t)
    ts.append(-1)
    return [(a, b) for a, b in pairwise(ts) if b < a]


@pytest.mark.parametrize(("total", "jump", "resample"), [(13, 4, 3), (21, 10, 10), (9, 1, 2), (5, 4, 1)])
def test_repaint_goes_down_and_up_as_its_authors_do(total: int, jump: int, resample: int) -> None:
    """Level k of theirs (k = total − 1 … 0, then −1) is our grid's entry total − 1 − k; they go up in single steps."""
    grid = build("grids", Part("trailing"), schedule_of("linear"), total)
    asked: list[int] = []

    def ear(ask: Ask) -> Belief:
        asked.append(grid.times.tolist().index(float(ask.level.t)))
        return MIXTURE(ask)

    x = normals(1, 3, seed=8)
    drive(repaint(ddim, x, grid, Keyed(0, [0]), jump=jump, resample=resample), ear)
    assert [total - 1 - k for k in asked] == [t for t, _ in lugmayr(total, jump, resample)]


def variance_of(sampler: Callable[..., Sampling], grid: Grid, std: float) -> float:
    """The variance that a linear sampler makes of exact noise, for data N(0, std²) and its ideal denoiser."""
    rows = trace(sampler, grid)
    first = grid[0]
    registers: dict[str, dict[str, float]] = {
        "start": {"start": math.hypot(float(first.alpha) * std, float(first.sigma))}
    }
    total: dict[str, float] = {}
    for row, (state, level) in enumerate(rows):
        total = {}
        for name, factor in state.items():
            for source, value in registers.get(name, {name: 1.0}).items():
                total[source] = total.get(source, 0.0) + factor * value
        if level is not None:
            alpha, sigma = float(level.alpha), float(level.sigma)
            k = alpha * std**2 / ((alpha * std) ** 2 + sigma**2)
            registers[f"x0_{row}"] = {source: k * value for source, value in total.items()}
    return sum(value**2 for value in total.values())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp"])
def test_repaint_keeps_the_distribution_of_an_exact_sampler(schedule: str) -> None:
    """ddpm is exact for N(0, 1) with the variance beta, and for a point with beta-tilde: so is its RePaint, exactly."""
    grid = build("grids", Part("trailing"), schedule_of(schedule), 12)[:-1]
    for variance, std, want in (("beta", 1.0, 1.0), ("beta-tilde", 0.0, float(grid[-1].sigma) ** 2)):
        again = partial(repaint, partial(ddpm, variance=variance), jump=3, resample=4)
        assert variance_of(again, grid, std) == pytest.approx(want, rel=1e-10)


def test_one_pass_is_the_sampler_itself() -> None:
    grid, x = grid_for(Part("dpmpp_2m"), "vp"), normals(2, 3, seed=9)
    for part in (Part("ddpm"), Part("dpmpp_2m")):
        plain = drive(sampler_of(part)(x, grid, Keyed(0, [0, 1])), MIXTURE)
        assert torch.equal(drive(repaint(sampler_of(part), x, grid, Keyed(0, [0, 1]), resample=1), MIXTURE), plain)


def test_more_passes_bend_what_is_drawn_to_what_is_known() -> None:
    """Of a mixture of (0.8, 0.8) and (−0.8, −0.8) with the first entry known to be 0.8, the second must be near 0.8."""
    rows = 400
    model, keep = denoiser(), torch.tensor([True, False, False])
    known = torch.tensor([[0.8, 0.0, 0.0]]).expand(rows, 3)
    wrong = [
        float((paint(model, known, keep, resample=passes, jump=5, steps=40)[:, 1] < 0).float().mean())
        for passes in (2, 10)
    ]
    plain = float((paint(model, known, keep, steps=40)[:, 1] < 0).float().mean())
    assert plain > 0.1 > wrong[1]
    assert plain > wrong[0] > wrong[1]


def denoiser() -> Any:
    schedule = schedule_of("cosine")
    return denoiser_of(MIXTURE, schedule, target_of("v", schedule))


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"jump": 0}, "repaint jump: got 0, need at least 1"),
        ({"resample": 0}, "repaint resample: got 0, need at least 1"),
    ],
)
def test_passes_below_one_are_refused(knobs: dict[str, int], match: str) -> None:
    with pytest.raises(BadArgument, match=match):
        next(repaint(ddim, torch.zeros(1, 3), grid_for(Part("ddim"), "vp"), Keyed(0, [0]), **knobs))


# ---- the verbs -----------------------------------------------------------------------------------------------


def pictures(shape: tuple[int, ...] = (1, 4, 4), schedule: str = "cosine", **knobs: Any) -> Any:
    """A net of pictures whose every pixel is N(−0.1, 0.5²) by itself, whatever the canvas."""
    made = schedule_of(Part(schedule, knobs))

    def oracle(ask: Ask) -> Belief:
        level = ask.level.over(ask.x)
        shrink = level.alpha * 0.25 / (level.alpha**2 * 0.25 + level.sigma**2)
        x0 = -0.1 + shrink * (ask.x + 0.1 * level.alpha)
        return revise(ask, Belief(x0, x0), x0)

    return denoiser_of(oracle, made, target_of("v", made))


def test_the_verb_keeps_every_kept_pixel_and_draws_the_others_as_sample_does() -> None:
    model, images = pictures(), normals(3, 1, 4, 4, seed=10, dtype=torch.float32).clamp(-1, 1)
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:, 1:] = True
    got = paint(model, images, keep, seed=4, steps=6)
    torch.testing.assert_close(got[..., keep], images[..., keep], rtol=0, atol=1e-6)
    fresh = sample(model, 3, shape=(1, 4, 4), seed=4, steps=6)
    torch.testing.assert_close(got[..., ~keep], fresh[..., ~keep], rtol=0, atol=1e-6)
    torch.testing.assert_close(paint(model, images, keep, seed=4, steps=6, batch=2), got, rtol=0, atol=1e-6)
    alone = paint(model, images[2:], keep, seed=4, steps=6, first=2)
    torch.testing.assert_close(alone, got[2:], rtol=0, atol=1e-6)


def test_the_start_carries_the_known_pixels_of_a_variance_exploding_schedule() -> None:
    """At EDM's sigma = 80 the known pixels are in the start too: x = known + 80·noise."""
    model, images, seen = pictures(schedule="edm"), torch.full((1, 1, 4, 4), 0.9), []
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[0, 0] = False
    paint(model, images, keep, steps=3, on_step=lambda done, step: seen.append(step.x))
    unit = Keyed(0, [0]).start((1, 1, 4, 4))
    torch.testing.assert_close(seen[0], torch.where(keep, 0.9, 0.0) + 80 * unit, rtol=1e-6, atol=1e-6)


def test_outpainting_keeps_the_picture_and_draws_round_it() -> None:
    model, images = pictures(), normals(2, 1, 4, 4, seed=11, dtype=torch.float32).clamp(-1, 1)
    got = outpaint(model, images, left=1, right=2, top=3, steps=5, seed=6)
    assert got.shape == (2, 1, 7, 7)
    torch.testing.assert_close(got[..., 3:, 1:5], images, rtol=0, atol=1e-6)
    fresh = sample(model, 2, shape=(1, 7, 7), steps=5, seed=6)
    torch.testing.assert_close(got[..., :3, :], fresh[..., :3, :], rtol=0, atol=1e-6)


def test_outpainting_asks_in_windows_where_the_net_takes_one_size_only() -> None:
    """And the default stride is half a window: of pixels that are independent, windows make the same as the whole."""
    free, asked = pictures(), []

    def one_size(ask: Ask) -> Belief:
        if ask.x.shape[2:] != (4, 4):
            raise BadShape(f"net: got {tuple(ask.x.shape)}, need 4 × 4")
        asked.append(len(ask.x))
        return free(ask)

    class Strict(type(free)):
        def forward(self, ask: Ask) -> Belief:
            return one_size(ask)

    strict = Strict(free.net, free.schedule, free.target, free.clock)
    images = normals(1, 1, 4, 4, seed=12, dtype=torch.float32).clamp(-1, 1)
    got = outpaint(strict, images, right=4, bottom=2, steps=4)
    assert set(asked) == {3 * 2}
    torch.testing.assert_close(got, outpaint(free, images, right=4, bottom=2, steps=4), rtol=0, atol=1e-5)
    with pytest.raises(BadShape, match="need 4 × 4"):
        outpaint(strict, images, right=4, windows=False, steps=4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "outpaint: nothing to add; give left, right, top or bottom"),
        ({"left": -1}, "outpaint left: got -1, need at least 0"),
        ({"left": 2, "windows": False, "stride": 2}, "stride: got 2, which has no effect without windows"),
        ({"left": 2, "stride": 5}, "windows stride: got 5, need 1 to 4"),
        ({"left": 2, "jump": 3}, "repaint jump: got 3, which has no effect with resample=1"),
        ({"left": 2, "resample": 0}, "repaint resample: got 0"),
        ({"left": 2, "resample": 2, "noise": "brownian"}, "repaint noise: got brownian"),
        ({"left": 2, "batch": 0}, "outpaint batch: got 0"),
    ],
)
def test_outpainting_refuses_what_has_no_sense(options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadArgument, match=match):
        outpaint(pictures(), torch.zeros(1, 1, 4, 4), **{"steps": 2, **options})


@pytest.mark.parametrize(("fill", "match"), [(True, "keeps every pixel"), (False, "keeps no pixel")])
def test_a_mask_of_one_kind_is_refused(fill: bool, match: str) -> None:
    with pytest.raises(BadArgument, match=match):
        paint(pictures(), torch.zeros(1, 1, 4, 4), torch.full((4, 4), fill))


# ---- hooks ---------------------------------------------------------------------------------------------------


def test_a_hook_sees_every_belief_and_may_change_it() -> None:
    """Pinned x0 of one entry is where sampling ends, and None changes nothing, bit for bit."""
    model, seen = denoiser(), []

    def watch(ask: Ask, belief: Belief) -> None:
        seen.append((ask, belief))

    plain = sample(model, 4, shape=(3,), steps=5, seed=1)
    assert torch.equal(sample(model, 4, shape=(3,), steps=5, seed=1, see=watch), plain)
    assert [float(ask.level.t) for ask, _ in seen] == [1.0, 0.8, 0.6, 0.4, 0.2]
    pinned = sample(model, 4, shape=(3,), steps=5, see=lambda ask, belief: torch.where(KEEP, 0.25, belief.x0))
    torch.testing.assert_close(pinned[:, KEEP], torch.full((4, 2), 0.25), rtol=0, atol=1e-6)
    last = list(steps(model, 4, shape=(3,), steps=5, seed=1, see=lambda ask, belief: 0 * belief.x0))[-1]
    assert torch.equal(last.x0, torch.zeros(4, 3))
    with pytest.raises(BadShape, match=r"hook: got an x0 of torch.float64 \(4, 3\), need torch.float32 \(4, 3\)"):
        sample(model, 4, shape=(3,), steps=5, see=lambda ask, belief: belief.x0.double())


def test_a_hook_in_a_verb_sees_what_was_edited() -> None:
    seen = []
    images = torch.zeros(1, 1, 4, 4)
    keep = torch.arange(16).reshape(4, 4) % 2 == 0
    paint(pictures(), images, keep, steps=3, see=lambda ask, belief: seen.append(belief.x0[..., keep]))
    assert len(seen) == 3
    assert all(bool((x0 == 0).all()) for x0 in seen)


def test_a_hooked_belief_agrees_with_its_question() -> None:
    told: list[tuple[Ask, Belief]] = []
    grid, x = grid_for(Part("ddim"), "vp"), normals(2, 3, seed=13)

    def listen(work: Sampling) -> Sampling:
        return hook(hook(work, lambda ask, belief: told.append((ask, belief))), lambda ask, belief: 0.5 * belief.x0)

    drive(listen(ddim(x, grid, None)), MIXTURE)
    for ask, belief in told:
        torch.testing.assert_close(
            ask.level.alpha * belief.x0 + ask.level.sigma * belief.eps, ask.x, rtol=0, atol=1e-12
        )
        torch.testing.assert_close(belief.x0, 0.5 * MIXTURE(ask).x0, rtol=0, atol=0)


# ---- windows -------------------------------------------------------------------------------------------------


def tilted(ask: Ask) -> Belief:
    """x0 of a pixel depends on its whole row of the window that is asked about, on the level, and on the class."""
    x0 = torch.tanh(ask.x) + 0.3 * ask.x.mean(-1, keepdim=True) ** 2 + ask.level.over(ask.x).t
    if ask.cond is not None:
        x0 = x0 + 0.1 * ask.cond.label.reshape(-1, 1, 1, 1) * ~ask.cond.null_rows("label").reshape(-1, 1, 1, 1)
    belief = revise(ask, Belief(x0, x0, torch.sigmoid(ask.x)), x0)
    if not ask.pull:
        return belief

    def pull(g: Tensor) -> Tensor:
        rows = 0.6 * ask.x.mean(-1, keepdim=True) / ask.x.shape[-1]
        return g * (1 - torch.tanh(ask.x) ** 2) + rows * g.sum(-1, keepdim=True)

    return belief._replace(pull=pull)


def asked_once(ask: Ask, wrap: Callable[[Sampling], Sampling], net: Callable[[Ask], Belief] = tilted) -> Belief:
    def once() -> Sampling:
        return (yield ask)

    work = wrap(once())
    with pytest.raises(StopIteration) as end:
        work.send(net(next(work)))
    return end.value.value


def test_a_windowed_belief_is_the_mean_over_the_windows_on_each_pixel() -> None:
    """Written out by loops over a 5 × 7 canvas of 3 × 4 windows, 2 apart, the last of which ends with the canvas."""
    ask = Ask(normals(2, 1, 5, 7, seed=14), schedule_of("vp")(0.5), pull=True)
    total, frac, pulled, count = (torch.zeros(2, 1, 5, 7, dtype=torch.float64) for _ in range(4))
    g = normals(2, 1, 5, 7, seed=15)
    places = [(slice(i, i + 3), slice(j, j + 4)) for i in (0, 2) for j in (0, 2, 3)]
    for a, b in places:
        count[..., a, b] += 1
    for a, b in places:
        part = tilted(ask._replace(x=ask.x[..., a, b]))
        total[..., a, b] += part.x0
        frac[..., a, b] += part.var_frac
        pulled[..., a, b] += part.pull((g / count)[..., a, b])
    belief = asked_once(ask, partial(windows, size=(3, 4), stride=2))
    torch.testing.assert_close(belief.x0, total / count, rtol=0, atol=1e-14)
    torch.testing.assert_close(belief.var_frac, frac / count, rtol=0, atol=1e-14)
    torch.testing.assert_close(belief.pull(g), pulled, rtol=0, atol=1e-13)
    torch.testing.assert_close(ask.level.alpha * belief.x0 + ask.level.sigma * belief.eps, ask.x, rtol=0, atol=1e-13)


def test_windows_tell_each_row_its_own_condition_under_guidance() -> None:
    """cfg outside doubles the rows, windows outside that multiply them: row i still hears its own class and level."""
    schedule = schedule_of("vp")
    x, cond = normals(3, 1, 4, 6, seed=16), Cond(label=torch.tensor([2, 0, 1]))
    tile = partial(windows, size=(4, 4), stride=1)
    whole = asked_once(Ask(x, schedule(0.5), cond), lambda work: tile(cfg(given(work, cond), scale=3.0)))
    for i in range(3):
        alone = cond.take(slice(i, i + 1))
        row = asked_once(
            Ask(x[i : i + 1], schedule(0.5), alone), lambda work, c=alone: tile(cfg(given(work, c), scale=3.0))
        )
        torch.testing.assert_close(whole.x0[i : i + 1], row.x0, rtol=0, atol=1e-14)
    levels = asked_once(Ask(x, schedule(torch.tensor([0.2, 0.5, 0.9])), cond), tile)
    middle = asked_once(Ask(x[1:2], schedule(0.5), cond.take(slice(1, 2))), tile)
    torch.testing.assert_close(levels.eps[1:2], middle.eps, rtol=0, atol=1e-13)


def test_windows_refuse_gaps_small_canvases_and_pictures_as_conditions() -> None:
    ask = Ask(normals(1, 1, 4, 4, seed=17), schedule_of("vp")(0.5))
    for stride in (0, 4):
        with pytest.raises(BadArgument, match=f"windows stride: got {stride}, need 1 to 3"):
            asked_once(ask, partial(windows, size=(3, 3), stride=stride))
    with pytest.raises(BadShape, match=r"got a canvas of \(4, 4\), need at least \(5, 3\)"):
        asked_once(ask, partial(windows, size=(5, 3), stride=1))
    image = ask._replace(cond=Cond(image=torch.zeros(1, 1, 4, 4)))
    with pytest.raises(BadArgument, match="windows: got a condition with an image"):
        asked_once(image, partial(windows, size=(3, 3), stride=1))


def test_the_verbs_are_those_of_the_page() -> None:
    assert set(VERBS) == {
        "inpaint", "outpaint", "img2img", "invert", "decode", "interpolate", "interpolate_seeds", "vary", "restore",
    }  # fmt: skip
