"""Guidance against closed forms: mixtures whose scores, posteriors and guided densities are known exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, given
from inkdrop.core.cond import Cond
from inkdrop.core.grid import Grid
from inkdrop.core.level import Level
from inkdrop.core.noise import Keyed
from inkdrop.core.oracle import Gaussian, Mixture
from inkdrop.core.posterior import posterior_variance
from inkdrop.drive import drive, overhear
from inkdrop.errors import BadArgument, BadShape
from inkdrop.find import Part, build
from inkdrop.guide.autoguidance import autoguidance
from inkdrop.guide.cfg import cfg, guided
from inkdrop.guide.classifier import classifier
from inkdrop.guide.drift import drift
from inkdrop.guide.strength import strength
from inkdrop.guide.threshold import threshold
from inkdrop.samplers.ddim import ddim
from inkdrop.samplers.ddpm import ddpm
from inkdrop.samplers.heun import heun
from specimens import normals, schedule_of

MEANS = torch.tensor([[-0.9, 0.4], [0.8, 0.7], [0.2, -1.0]], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / 6
PARTS = [Gaussian(mean, float(std)) for mean, std in zip(MEANS, STDS, strict=True)]
WHOLE = Mixture(MEANS, STDS, WEIGHTS)
BROAD = Mixture(MEANS + 0.1, STDS + 0.3, WEIGHTS)  # what a weak net has learned
LABELS = torch.tensor([0, 2, 1, 2])
COND = Cond(label=LABELS)
every_kind = pytest.mark.parametrize("kind", ["vp", "edm", "flow"])


def chosen(values: list[Tensor], labels: Tensor) -> Tensor:
    """Row i of the value of its label."""
    return torch.stack(values)[labels, torch.arange(len(labels))]


class Net:
    """The ideal denoiser of a mixture, told which component or not; it keeps what it is asked."""

    def __init__(self, whole: Mixture = WHOLE, parts: list[Gaussian] | None = None) -> None:
        self.whole, self.parts, self.asks = whole, parts or PARTS, list[Ask]()

    def __call__(self, ask: Ask) -> Belief:
        self.asks.append(ask)
        plain = Ask(ask.x, ask.level)
        told = chosen([part(plain).x0 for part in self.parts], ask.cond.label)
        x0 = torch.where(ask.cond.null_rows("label")[:, None], self.whole(plain).x0, told)
        return Belief(x0, (ask.x - ask.level.over(x0).alpha * x0) / ask.level.over(x0).sigma)


def log_class(x: Tensor, level: Level, labels: Tensor) -> Tensor:
    """log p(y | x_t) of the mixture by Bayes' rule, (B,)."""
    joint = [part.log_prob(x, level) + w.log() for part, w in zip(PARTS, WEIGHTS, strict=True)]
    return chosen(joint, labels) - WHOLE.log_prob(x, level)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇ of a (B,) function of rows."""
    with torch.enable_grad():
        held = x.detach().requires_grad_()
        [found] = torch.autograd.grad(function(held).sum(), held)
    return found


class Judge:
    """The exact classifier of the mixture, as the house asks one."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []

    def __call__(self, ask: Ask) -> Belief:
        self.asks.append(ask)
        eps = -ask.level.sigma * gradient(lambda x: log_class(x, ask.level, ask.cond.label), ask.x)
        return Belief((ask.x - ask.level.sigma * eps) / ask.level.alpha, eps)


def start(kind: str = "vp", steps: int = 6) -> tuple[Tensor, Grid]:
    """Noise, and a grid; of the flow schedule from its second level on, as its first has no signal."""
    grid = build("grids", Part("trailing"), schedule_of(kind), steps + (kind == "flow"))[kind == "flow" :]
    return normals(4, 2, seed=1) * float(grid[0].sigma), grid


def run(guide: Callable[[Sampling], Sampling], parts: Any, sampler: Any = ddim, kind: str = "vp") -> Any:
    """The result, and what the sampler asked and was told."""
    (x, grid), told = start(kind), list[tuple[Ask, Belief]]()
    return drive(guide(given(overhear(sampler(x, grid, Keyed(0, range(4))), told), COND)), parts), told


# ---- classifier-free guidance ------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("w", [0.5, 2.0, 7.5])
def test_cfg_is_the_score_of_the_geometric_mixture(kind: str, w: float) -> None:
    """eps = −sigma·∇ log [p(x)^{1−w}·p(x|y)^w], by automatic differentiation of the log densities, all along."""
    _, told = run(lambda s: cfg(s, scale=w), Net(), kind=kind)
    for ask, belief in told:

        def log_density(x: Tensor, level: Level = ask.level) -> Tensor:
            return (1 - w) * WHOLE.log_prob(x, level) + w * chosen([p.log_prob(x, level) for p in PARTS], LABELS)

        want = -ask.level.sigma * gradient(log_density, ask.x)
        torch.testing.assert_close(belief.eps, want, rtol=1e-9, atol=1e-9)


@every_kind
@pytest.mark.parametrize("sampler", [ddim, ddpm, heun])
def test_between_gaussians_of_one_width_cfg_samples_the_gaussian_beyond(kind: str, sampler: Any) -> None:
    """p(x)^{1−w}·p(x|y)^w of N(m0, s²) and N(m1, s²) is N(m0 + w·(m1 − m0), s²) at every level: whole trajectories."""
    ends = [Gaussian(torch.tensor(m, dtype=torch.float64), 0.3) for m in ([0.1, -0.2], [0.6, 0.3])]
    beyond = Gaussian(ends[0].means[0] + 3 * (ends[1].means[0] - ends[0].means[0]), 0.3)
    got, _ = run(lambda s: cfg(s, scale=3.0), Net(ends[0], [ends[1]] * 3), sampler, kind)
    x, grid = start(kind)
    torch.testing.assert_close(got, drive(sampler(x, grid, Keyed(0, range(4))), beyond), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_a_negative_class_stands_in_place_of_the_null_condition(scale: float) -> None:
    """x0 = E[x0|x, 1] + w·(E[x0|x, y] − E[x0|x, 1]); a row of that class itself is not guided."""
    net = Net()
    _, told = run(lambda s: cfg(s, scale=scale, negative=1), net)
    for ask, belief in told:
        each = [part(Ask(ask.x, ask.level)).x0 for part in PARTS]
        want = each[1] + scale * (chosen(each, LABELS) - each[1])
        torch.testing.assert_close(belief.x0, want, rtol=1e-12, atol=1e-12)
    assert not any(bool(ask.cond.null_rows("label").any()) for ask in net.asks)
    assert {len(ask.x) for ask in net.asks} == {4 if scale == 0 else 8}


def test_any_strength_and_any_negative_condition_can_be_written_in_python() -> None:
    """w of one's own, and a condition of one row or of one for each."""
    for negative in (Cond(label=torch.tensor([1])), Cond(label=torch.tensor([1, 1, 1, 1]))):
        _, told = run(lambda s, n=negative: guided(s, lambda level: 1 + 4 * level.t**2, n), Net())
        for ask, belief in told:
            each = [part(Ask(ask.x, ask.level)).x0 for part in PARTS]
            want = each[1] + (1 + 4 * ask.level.t**2) * (chosen(each, LABELS) - each[1])
            torch.testing.assert_close(belief.x0, want, rtol=1e-12, atol=1e-12)


def test_outside_its_interval_guidance_is_conditional_in_one_branch() -> None:
    """stop < t ≤ start, on a grid of t = 1, 5/6, ..., 1/6 (rounded to a table of 1,000): both ends on the grid."""
    net, grid = Net(), start()[1]
    _, told = run(lambda s: cfg(s, scale=4.0, start=float(grid[1].t), stop=float(grid[4].t)), net)
    assert [len(ask.x) for ask in net.asks] == [4, 8, 8, 8, 4, 4]
    for i, (ask, belief) in enumerate(told):
        told_class = Net()(ask._replace(cond=COND)).x0
        assert torch.equal(belief.x0, told_class) == (i in (0, 4, 5))
        assert (net.asks[i].cond is COND) == (i in (0, 4, 5))


def test_rows_outside_the_interval_are_bit_equal_beside_rows_inside() -> None:
    """Rows at levels of their own, asked together: 1/3 and 0.1 do not survive u + 1·(c − u)."""

    def net(ask: Ask) -> Belief:
        x0 = torch.where(ask.cond.null_rows("label")[:, None], ask.x / 3, ask.cond.label[:, None] - 0.1 * ask.x)
        return Belief(x0, -x0)

    x, level = normals(4, 2, seed=9), schedule_of("vp")(torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64))

    def asks() -> Sampling:
        return (yield Ask(x, level, COND)).x0

    cond, null = LABELS[:, None] - 0.1 * x, x / 3
    got = drive(cfg(asks(), scale=3.0, start=0.7, stop=0.2), net)
    assert [torch.equal(a, b) for a, b in zip(got, cond, strict=True)] == [True, False, False, True]
    assert not torch.equal(null + (cond - null), cond), "the test is blind"
    got = drive(cfg(asks(), scale=0.0, start=0.7, stop=0.2), net)
    assert [torch.equal(a, b) for a, b in zip(got, null, strict=True)] == [False, True, True, False]
    assert [torch.equal(a, b) for a, b in zip(got, cond, strict=True)] == [True, False, False, True]


@pytest.mark.parametrize(("shape", "ends"), [("linear", (2.0, 0.0)), ("cosine", (2.0, 0.0)), ("constant", (1.0, 1.0))])
def test_the_shapes_have_the_scale_as_their_mean_and_grow_towards_clean(shape: Any, ends: tuple[float, float]) -> None:
    """Means over the interval by the midpoint rule, with error h²; at its ends w − rest is f·(scale − rest)."""
    for rest, scale in ((1.0, 5.0), (0.0, 2.0)):
        how = strength("x", scale=scale, rest=rest, start=0.9, stop=0.2, shape=shape)

        def at(t: Any, how: Any = how) -> Tensor:
            t = torch.as_tensor(t, dtype=torch.float64)
            return how(Level(t, t, t))

        inner = 0.2 + 0.7 * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        assert abs(float(at(inner).mean()) - scale) < 1e-5
        assert bool((at(inner).diff() <= 0).all())
        assert torch.equal(at([0.05, 0.2, 0.91, 1.0]), torch.full((4,), rest, dtype=torch.float64))
        for t, f in zip((0.2 + 1e-8, 0.9), ends, strict=True):
            assert abs(float(at(t)) - (rest + f * (scale - rest))) < 1e-6
    if shape == "cosine":  # 1 + cos(π/4) at a quarter
        assert abs(float(at(0.2 + 0.7 / 4)) - 2 * (1 + 2**-0.5)) < 1e-12


@pytest.mark.parametrize("part", [0.3, 1.0])
def test_rescale_brings_the_deviation_of_a_row_back(part: float) -> None:
    """Lin et al. 2024: x0·(φ·std(cond)/std(guided) + 1 − φ); at φ = 1 it is the conditional deviation, row by row."""
    _, told = run(lambda s: cfg(s, scale=5.0, rescale=part), Net())
    for ask, belief in told:
        c, u = (Net()(ask._replace(cond=cond)).x0 for cond in (COND, COND.null()))
        plain = u + 5 * (c - u)
        ratio = c.std(1, keepdim=True) / plain.std(1, keepdim=True)
        torch.testing.assert_close(belief.x0, part * plain * ratio + (1 - part) * plain, rtol=1e-11, atol=1e-11)
        if part == 1:
            torch.testing.assert_close(belief.x0.std(1), c.std(1), rtol=1e-11, atol=1e-11)


def test_rescale_leaves_a_constant_row() -> None:
    """It has no deviation to bring back; nothing becomes NaN, neither x0 nor its pull."""

    def net(ask: Ask) -> Belief:
        x0 = torch.where(ask.cond.null_rows("label")[:, None], 0.1, 0.3).expand_as(ask.x).clone()
        return Belief(x0, (ask.x - ask.level.alpha * x0) / ask.level.sigma, pull=lambda g: g)

    def asks() -> Sampling:
        belief = yield Ask(normals(4, 2, seed=3), schedule_of("vp")(0.5), COND, pull=True)
        return torch.stack([belief.x0, belief.pull(torch.ones_like(belief.x0))])

    x0, pulled = drive(cfg(asks(), scale=3.0, rescale=0.5), net)
    torch.testing.assert_close(x0, torch.full_like(x0, 0.7))
    assert bool(pulled.isfinite().all())


# ---- classifier guidance -----------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("sampler", [ddim, ddpm, heun])
def test_with_the_exact_classifier_the_unconditional_net_becomes_the_conditional_one(kind: str, sampler: Any) -> None:
    """Bayes' rule, ∇ log p(x|y) = ∇ log p(x) + ∇ log p(y|x), at scale 1 and on whole trajectories."""
    net, judge = Net(), Judge()
    got, told = run(lambda s: cfg(classifier(s), scale=0.0), {"net": net, "classifier": judge}, sampler, kind)
    want, _ = run(lambda s: s, Net(), sampler, kind)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert len(net.asks) == len(judge.asks) == len(told)
    assert all(bool(ask.cond.null_rows("label").all()) for ask in net.asks)
    assert all(torch.equal(ask.cond.label, LABELS) for ask in judge.asks)


@every_kind
def test_classifier_guidance_adds_its_score_and_keeps_out_of_the_interval(kind: str) -> None:
    """eps − s·sigma·∇ log p(y|x) beside the conditional net; without a question to the classifier elsewhere."""
    judge, grid = Judge(), start(kind)[1]
    guide = {"scale": 2.5, "start": float(grid[1].t), "stop": float(grid[3].t)}
    _, told = run(lambda s: classifier(s, **guide), {"net": Net(), "classifier": judge}, kind=kind)
    assert [float(ask.level.t) for ask in judge.asks] == [float(grid[i].t) for i in (1, 2)]
    for i, (ask, belief) in enumerate(told):
        eps = Net()(ask._replace(cond=COND)).eps
        if i in (1, 2):
            eps = eps - 2.5 * ask.level.sigma * gradient(lambda x, a=ask: log_class(x, a.level, LABELS), ask.x)
        torch.testing.assert_close(belief.eps, eps, rtol=1e-10, atol=1e-10)


def test_under_ddpm_it_is_the_papers_mean_shift_to_first_order() -> None:
    """Exactly s·(alpha_s/alpha_t)·beta·∇ log p(y|x_t); their s·Σ·∇ with Σ = beta or beta-tilde differs by O(step)."""
    schedule, x, s, errors = schedule_of("vp"), normals(4, 2, seed=5), 1.7, []
    for step in (0.02, 0.01, 0.005):
        grid = Grid(schedule, [0.6, 0.6 - step])

        def mean(guide: Callable[[Sampling], Sampling], grid: Grid = grid) -> Tensor:
            work = given(ddpm(x, grid, lambda x, now, nxt: torch.zeros_like(x)), COND)
            return drive(guide(work), {"net": Net(), "classifier": Judge()})

        shift = mean(lambda w: classifier(w, scale=s)) - mean(lambda w: w)
        now, nxt = grid
        push = s * gradient(lambda x, lv=now: log_class(x, lv, LABELS), x)
        beta, tilde = (posterior_variance(now, nxt, choice) for choice in ("beta", "beta-tilde"))
        torch.testing.assert_close(shift, nxt.alpha / now.alpha * beta * push, rtol=1e-11, atol=1e-12)
        errors.append([float((var * push - shift).norm() / shift.norm()) for var in (beta, tilde)])
    for coarse, fine in itertools.pairwise(errors):
        assert all(1.7 < a / b < 2.3 for a, b in zip(coarse, fine, strict=True)), errors


def test_where_there_is_no_signal_the_classifier_cannot_guide() -> None:
    """Zero terminal SNR: refused before any question, and possible from a start below 1."""
    schedule = build("schedules", Part("linear", {"zero_terminal": True}))
    grid = build("grids", Part("trailing"), schedule, 4)
    parts = {"net": Net(), "classifier": Judge()}
    work = lambda: given(ddim(normals(4, 2, seed=1), grid, None), COND)  # noqa: E731
    with pytest.raises(
        BadArgument, match="classifier: cannot guide where there is no signal .* try classifier.start=0"
    ):
        drive(classifier(work()), parts)
    assert parts["net"].asks == parts["classifier"].asks == []
    drive(classifier(work(), start=0.99), parts)
    assert (len(parts["net"].asks), len(parts["classifier"].asks)) == (4, 3)
    for cond in (None, Cond(vec=torch.zeros(4, 1)), COND.null()):
        with pytest.raises(BadArgument, match="classifier: there is no class to guide towards"):
            drive(classifier(given(ddim(*start(), None), cond)), parts)


# ---- autoguidance ------------------------------------------------------------------------------------------------


@every_kind
def test_autoguidance_is_its_formula_in_two_questions(kind: str) -> None:
    """weak + w·(net − weak), both told the class; inside the interval alone."""
    grid = start(kind)[1]
    parts = {"net": Net(), "weak": Net(BROAD, [Gaussian(m, 0.6) for m in MEANS])}
    _, told = run(lambda s: autoguidance(s, scale=2.5, start=float(grid[1].t), stop=float(grid[4].t)), parts, kind=kind)
    assert (len(parts["net"].asks), len(parts["weak"].asks)) == (6, 3)
    assert all(torch.equal(ask.cond.label, LABELS) and not ask.cond.nulls for ask in parts["weak"].asks)
    for i, (ask, belief) in enumerate(told):
        net, weak = (parts[name](ask._replace(cond=COND)) for name in ("net", "weak"))
        w = 2.5 if i in (1, 2, 3) else 1.0
        torch.testing.assert_close(belief.x0, weak.x0 + w * (net.x0 - weak.x0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(belief.eps, weak.eps + w * (net.eps - weak.eps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("w", "asked"), [(1.0, (6, 0)), (0.0, (0, 6))])
def test_autoguidance_of_1_is_the_net_and_of_0_the_weak_one_bit_for_bit(w: float, asked: tuple[int, int]) -> None:
    parts = {"net": Net(), "weak": Net(BROAD)}
    got, _ = run(lambda s: autoguidance(s, scale=w), parts)
    assert (len(parts["net"].asks), len(parts["weak"].asks)) == asked
    assert torch.equal(got, run(lambda s: s, Net() if w else Net(BROAD))[0])


def test_beside_autoguidance_cfg_mixes_the_net_alone() -> None:
    """w·s·cond − w·(s − 1)·uncond − (w − 1)·weak(cond): a total guidance of w·s."""
    parts = {"net": Net(), "weak": Net(BROAD)}
    _, told = run(lambda s: cfg(autoguidance(s, scale=2.0), scale=3.0), parts)
    assert [len(ask.x) for ask in parts["net"].asks] == [8] * 6
    assert [len(ask.x) for ask in parts["weak"].asks] == [4] * 6
    for ask, belief in told:
        c, u = (Net()(ask._replace(cond=cond)).x0 for cond in (COND, COND.null()))
        want = 6 * c - 4 * u - Net(BROAD)(ask._replace(cond=COND)).x0
        torch.testing.assert_close(belief.x0, want, rtol=1e-11, atol=1e-11)


def test_beside_cfg_of_0_autoguidance_is_unconditional() -> None:
    parts = {"net": Net(), "weak": Net(BROAD)}
    run(lambda s: cfg(autoguidance(s, scale=2.0), scale=0.0), parts)
    for part in parts.values():
        assert [bool(ask.cond.null_rows("label").all()) for ask in part.asks] == [True] * 6


# ---- thresholding and drift --------------------------------------------------------------------------------------


def told_of(guide: Callable[[Sampling], Sampling], x0: Tensor) -> Tensor:
    """What a sampler hears where the net says x0."""

    def asks() -> Sampling:
        return (yield Ask(torch.zeros_like(x0), schedule_of("vp")(0.5))).x0

    return drive(guide(asks()), lambda ask: Belief(x0, -x0))


@pytest.mark.parametrize(("percentile", "bound"), [(0.995, 1.0), (0.8, 1.0), (0.5, 0.7), (1.0, 1.0)])
def test_threshold_scales_each_row_by_its_own_quantile(percentile: float, bound: float) -> None:
    """Row by row by torch.quantile; a row that is within the bound stays as it is, one outlier does not save a row."""
    x0 = normals(5, 3, 4, 5, seed=6) * torch.tensor([0.1, 0.5, 1.0, 2.0, 9.0], dtype=torch.float64)[:, None, None, None]
    got = told_of(lambda s: threshold(s, percentile=percentile, bound=bound), x0)
    for row, was in zip(got, x0, strict=True):
        s = max(bound, float(was.abs().flatten().quantile(percentile)))
        torch.testing.assert_close(row, was.clamp(-s, s) * (bound / s), rtol=1e-13, atol=1e-13)
    assert float(got.abs().max()) <= bound + 1e-15
    assert torch.equal(got[0], x0[0])
    assert float(x0[4].abs().max()) > 20


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of each image."""
    flat = x.flatten(2)
    return flat.mean(2), flat.std(2, correction=0)


def test_drift_brings_each_channel_of_each_image_to_the_statistics() -> None:
    x0 = 0.7 * normals(4, 3, 5, 4, seed=7) + 0.4
    mean, std = moments(told_of(lambda s: drift(s, mean=(-0.1, 0.0, 0.3), std=0.2), x0))
    torch.testing.assert_close(mean, torch.tensor([[-0.1, 0.0, 0.3]], dtype=torch.float64).expand(4, 3))
    torch.testing.assert_close(std, torch.full((4, 3), 0.2, dtype=torch.float64))
    moved = told_of(lambda s: drift(s, mean=0.25), x0)  # contrast is left alone
    torch.testing.assert_close(moments(moved)[0], torch.full((4, 3), 0.25, dtype=torch.float64))
    torch.testing.assert_close(moved - moments(moved)[0][..., None, None], x0 - moments(x0)[0][..., None, None])


def test_drift_leaves_what_is_within_the_slack_and_goes_part_of_the_way() -> None:
    x0 = 0.5 * normals(40, 1, 5, 4, seed=8)
    (m, s), (mean, std) = moments(x0), moments(told_of(lambda w: drift(w, mean=0.05, std=0.5, slack=0.1), x0))
    torch.testing.assert_close(mean, m.clamp(-0.05, 0.15), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std, s.clamp(0.4, 0.6), rtol=1e-12, atol=1e-12)
    within = (m > -0.05) & (m < 0.15) & (s > 0.4) & (s < 0.6)
    assert 3 < int(within.sum()) < 37
    half = told_of(lambda w: drift(w, mean=0.05, std=0.5, slack=0.1, scale=0.5), x0)
    whole = told_of(lambda w: drift(w, mean=0.05, std=0.5, slack=0.1), x0)
    torch.testing.assert_close(half, (x0 + whole) / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole[within], x0[within], rtol=1e-12, atol=1e-12)
    assert torch.equal(told_of(lambda w: drift(w, mean=0.05, start=0.4), x0), x0)  # the question is at t = 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drift_only_moves_a_constant_channel(dtype: torch.dtype) -> None:
    """Its rounding is no contrast: stretching the last bit of one pixel to 0.5 would paint a spot on it."""
    x0 = torch.full((1, 2, 8, 8), 0.1, dtype=dtype)
    x0[0, 1, 3, 3] = torch.nextafter(x0[0, 1, 3, 3], torch.tensor(1.0, dtype=dtype))
    got = told_of(lambda s: drift(s, mean=0.3, std=0.5), x0)
    torch.testing.assert_close(got, torch.full_like(x0, 0.3), rtol=0, atol=1e-6)

    def asks() -> Sampling:
        belief = yield Ask(torch.zeros_like(x0), schedule_of("vp")(0.5), pull=True)
        return belief.pull(torch.ones_like(x0))

    pulled = drive(drift(asks(), mean=0.3, std=0.5), lambda ask: Belief(x0, -x0, pull=lambda g: g))
    assert torch.equal(pulled, torch.zeros_like(x0)), "its mean is given, so it does not move with x"


# ---- what is refused ---------------------------------------------------------------------------------------------

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (cfg, {"scale": 1.0, "rescale": 0.7}, "cfg rescale: got 0.7, which has no effect at scale 1; try cfg.scale=3"),
    (cfg, {"scale": 0.0, "rescale": 0.7}, "cfg rescale: got 0.7, which has no effect at scale 0"),
    (cfg, {"scale": 3.0, "rescale": 1.5}, "cfg rescale: got 1.5, need a number in [0, 1]; try 0.7"),
    (cfg, {"negative": 3}, "cfg negative: got 3, which has no effect at scale 1"),
    (cfg, {"start": 0.5}, "cfg: start, stop and shape have no effect at scale 1, which guides nowhere"),
    (
        cfg,
        {"scale": 0.5, "shape": "cosine"},
        "cfg shape: got 'cosine' at scale 0.5, need a scale of more than 1 for it",
    ),
    (cfg, {"scale": 3.0, "shape": "sine"}, "cfg shape: got 'sine', need constant, linear, cosine"),
    (
        cfg,
        {"scale": 3.0, "start": 0.2, "stop": 0.2},
        "cfg start and stop: got 0.2 and 0.2, need 0 <= stop < start <= 1",
    ),
    (cfg, {"scale": 3.0, "start": 80.0}, "cfg start and stop: got 80 and 0, need"),
    (autoguidance, {"scale": -1.0}, "autoguidance scale: got -1, need a finite number of at least 0"),
    (autoguidance, {"scale": 1.0, "stop": 0.5}, "autoguidance: start, stop and shape have no effect at scale 1"),
    (classifier, {"scale": float("inf")}, "classifier scale: got inf, need a finite number of at least 0"),
    (classifier, {"scale": 0.0, "shape": "linear"}, "classifier: start, stop and shape have no effect at scale 0"),
    (threshold, {"percentile": 0.0}, "threshold percentile: got 0, need a number in (0, 1]; try 0.995"),
    (threshold, {"percentile": 99.5}, "threshold percentile: got 99.5, need a number in (0, 1]"),
    (threshold, {"bound": -1.0}, "threshold bound: got -1, need a positive finite number"),
    (drift, {"mean": float("nan")}, "drift mean: got [nan], need finite numbers"),
    (drift, {"mean": ()}, "drift mean: got [], need finite numbers"),
    (drift, {"mean": 0.0, "std": 0.0}, "drift std: got [0.0], need positive finite numbers"),
    (drift, {"mean": 0.0, "slack": -0.1}, "drift slack: got -0.1, need a finite number of at least 0"),
    (drift, {"mean": 0.0, "scale": 1.5}, "drift scale: got 1.5, need a number in (0, 1]"),
    (drift, {"mean": 0.0, "scale": 0.0}, "drift scale: got 0, need a number in (0, 1]"),
]


@pytest.mark.parametrize(("guide", "knobs", "said"), REFUSED, ids=[f"{g.__name__} {k}" for g, k, _ in REFUSED])
def test_a_knob_that_cannot_work_is_refused_at_once(guide: Any, knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(BadArgument) as caught:
        guide(iter(()), **knobs)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_samples_that_have_no_channels_or_no_spread_are_refused() -> None:
    with pytest.raises(BadShape, match=r"drift: got samples of shape \(3,\), need spatial axes"):
        told_of(lambda s: drift(s, mean=0.0), normals(2, 3))
    with pytest.raises(BadShape, match="drift: got 3 numbers for 2 channels; give one, or one a channel"):
        told_of(lambda s: drift(s, mean=(0.0, 0.0, 0.0)), normals(2, 2, 4))
    one = Ask(normals(2, 1), schedule_of("vp")(0.5), Cond(label=torch.tensor([0, 1])))
    work = cfg((lambda: (yield one))(), scale=3.0, rescale=0.5)
    with pytest.raises(BadShape, match=r"cfg rescale: got rows of shape \(1,\), need at least 2 numbers"):
        drive(work, lambda ask: Belief(ask.x, ask.x))
    with pytest.raises(BadArgument, match="cfg negative: got class 1, but the condition has no class"):
        drive(cfg(given(ddim(*start(), None), Cond(vec=torch.zeros(4, 1))), scale=3.0, negative=1), Net())
