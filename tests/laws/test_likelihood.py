"""Law 5, likelihood: the bound term by term and the flow's density, against closed forms and papers' formulas."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.testing import assert_close

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.cond import Cond
from inkdrop.core.grid import Grid
from inkdrop.core.noise import normal
from inkdrop.core.oracle import Dataset, Gaussian, Mixture
from inkdrop.core.schedule import Schedule, Table
from inkdrop.data.arrays import Arrays
from inkdrop.denoiser import Denoiser, wrap
from inkdrop.errors import BadArgument, BadData, Diverged, InkdropError
from inkdrop.evals.bound import Bound, bound
from inkdrop.evals.likelihood import Settings, likelihood
from inkdrop.evals.nll import NLL, asks_of, dequantise, nll
from inkdrop.evals.shelf import Shelf
from inkdrop.find import Part, build
from inkdrop.parallel import Ranks
from specimens import denoiser_of, label, normals, schedule_of, target_of

pytestmark = pytest.mark.long  # left out of the fast tier

LN2 = math.log(2)
STD = 0.5
GAUSSIAN = Gaussian(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64), STD)
MIXTURE = Mixture(
    torch.tensor([[0.6, 0.5, 0.0], [-0.5, 0.2, 0.4], [0.0, -0.7, -0.3]], dtype=torch.float64),
    torch.tensor([0.15, 0.3, 0.1]),
    torch.tensor([0.5, 0.3, 0.2]),
)
PATHS = [Part("vp"), Part("edm"), Part("flow"), Part("continuous_cosine"), Part("linear", {"zero_terminal": True})]
every_path = pytest.mark.parametrize("path", PATHS, ids=label)


def grid_of(schedule: Schedule, steps: int, spacing: str = "uniform") -> Grid:
    grid: Grid = build("grids", Part(spacing), schedule, steps)
    return grid


def noisy(schedule: Schedule, steps: int = 100) -> Grid:
    """`steps` noisy levels from t = 1 to the least, as `likelihood` spaces them; EDM's own time is spaced already."""
    if float(schedule(1.0).sigma) > 1:
        return Grid(schedule, torch.linspace(1, schedule.least, steps, dtype=torch.float64))
    return Settings(flow_steps=steps).flow(schedule)


# ---- the bound, written out --------------------------------------------------------------------------------------


def written_out(
    oracle: Callable[[Ask], Belief], x0: Tensor, schedule: Table, variance: str, levels: int | None, seed: int
) -> Bound:
    """Ho et al. 2020 in their letters, from the betas alone: eq. 7 for the posterior, eq. 13 for the decoder."""
    beta = schedule.betas.numpy()
    abar = np.cumprod(1 - beta)
    total, x = len(beta), x0.numpy()
    rows = {"steps": [], "x0_mse": [], "eps_mse": []}
    decoder = np.zeros(len(x))
    for i, k in enumerate(range(total - 1, -1, -1)):
        eps = normal(x0.shape, seed, range(len(x)), i).numpy()
        x_t = np.sqrt(abar[k]) * x + np.sqrt(1 - abar[k]) * eps
        answer = oracle(Ask(torch.from_numpy(x_t), schedule((k + 1) / total)))
        guess = answer.x0.numpy()
        rows["x0_mse"].append(((guess - x) ** 2).mean(1))
        rows["eps_mse"].append((((x_t - np.sqrt(abar[k]) * guess) / np.sqrt(1 - abar[k]) - eps) ** 2).mean(1))
        below = abar[k - 1] if k else 1.0
        tilde = beta[k] * (1 - below) / (1 - abar[k]) if k else beta[1] * (1 - abar[0]) / (1 - abar[1])
        frac = {"beta": 1.0, "beta-tilde": 0.0}.get(variance)
        frac = answer.var_frac.numpy() if frac is None else frac
        var = beta[k] ** frac * tilde ** (1 - frac)
        if k:
            means = [np.sqrt(below) * beta[k] / (1 - abar[k]) * y for y in (x, guess)]
            means = [m + np.sqrt(1 - beta[k]) * (1 - below) / (1 - abar[k]) * x_t for m in means]
            kl = 0.5 * (np.log(var / tilde) + (tilde + (means[0] - means[1]) ** 2) / var - 1)
            rows["steps"].append(kl.mean(1) / LN2)
        elif levels is None:
            decoder = -norm(guess, np.sqrt(var)).logpdf(x).mean(1) / LN2
        else:
            cdf, half = norm(guess, np.sqrt(var)).cdf, 1 / (levels - 1)
            top = np.where(x > 1 - half, 1.0, cdf(x + half))
            decoder = -np.log2(top - np.where(x < -1 + half, 0.0, cdf(x - half))).mean(1)
    prior = 0.5 * ((1 - abar[-1]) - 1 - np.log(1 - abar[-1]) + abar[-1] * x**2).mean(1) / LN2
    steps, x0_mse, eps_mse = (torch.from_numpy(np.array(rows[name])) for name in ("steps", "x0_mse", "eps_mse"))
    return Bound(torch.from_numpy(prior), steps, torch.from_numpy(decoder), x0_mse, eps_mse)


TABLE = schedule_of(Part("linear", {"steps": 60, "rescale": True}))
CONTINUOUS = normals(5, 3, seed=1) * STD
DISCRETE = (normals(40, 6, seed=2) * 4).round().clamp(-8, 8) / 8  # 17 values, as the digits have


def with_variance(oracle: Callable[[Ask], Belief]) -> Callable[[Ask], Belief]:
    """The oracle, and a variance that is learned as a smooth function of x."""
    return lambda ask: oracle(ask)._replace(var_frac=torch.sigmoid(3 * ask.x))


@pytest.mark.parametrize("variance", ["beta", "beta-tilde", "learned"])
@pytest.mark.parametrize(
    ("oracle", "x0", "levels"),
    [(GAUSSIAN, CONTINUOUS, None), (MIXTURE, CONTINUOUS, None), (Dataset(DISCRETE[:30]), DISCRETE[22:30], 17)],
    ids=["gaussian", "mixture", "dataset"],
)
def test_every_term_is_the_papers(
    oracle: Callable[[Ask], Belief], x0: Tensor, levels: int | None, variance: str
) -> None:
    """All T terms of a table, each image's own, with the same noise."""
    answers = with_variance(oracle)
    got = bound(answers, x0, grid_of(TABLE, 60, "trailing"), levels=levels, variance=variance, seed=4)
    assert_close(got, written_out(answers, x0, TABLE, variance, levels, 4), rtol=1e-7, atol=1e-10)


def test_a_clipped_chain_is_that_of_clipped_answers_and_never_worse() -> None:
    """Every term but the error of eps, which stays the net's own; data lie in [-1, 1], so clipping can only help."""
    data = DISCRETE[:30]
    wild = lambda ask: (own := Dataset(data)(ask))._replace(x0=2 * own.x0 + 0.3)  # noqa: E731
    tame = lambda ask: (own := wild(ask))._replace(x0=own.x0.clamp(-1, 1))  # noqa: E731
    grid = grid_of(TABLE, 60, "trailing")
    got, bare = (bound(wild, data, grid, levels=17, clip=clip, seed=4) for clip in (True, False))
    want = written_out(tame, data, TABLE, "beta", 17, 4)
    assert_close(got._replace(eps_mse=want.eps_mse), want, rtol=1e-7, atol=1e-10)
    assert_close(got.eps_mse, bare.eps_mse)
    assert bool((got.total <= bare.total + 1e-12).all())
    assert bare.total.mean() > 1.5 * got.total.mean()


def test_a_dataset_knows_its_own_images_and_not_others() -> None:
    """Of its 30 images the ideal denoiser must learn which it is, log2 30 bits in all; of others it is sure and wrong.

    The finite steps of the chain add up to 0.3 bits here, with the variance that is best for points.
    """
    schedule = schedule_of(Part("linear", {"steps": 250, "rescale": True}))
    grid = grid_of(schedule, 250, "trailing")
    got = bound(Dataset(DISCRETE[:30]), DISCRETE, grid, levels=17, variance="beta-tilde").total * 6
    error = float(got[:30].std()) / math.sqrt(30)
    assert -4 * error < float(got[:30].mean()) - math.log2(30) < 4 * error + 0.3
    assert error < 0.2
    assert float(got[30:].min()) > 100


def test_the_learned_variance_ends_at_the_two_fixed_ones() -> None:
    grid = grid_of(TABLE, 60, "trailing")
    for frac, choice in ((0.0, "beta-tilde"), (1.0, "beta")):
        learned = bound(
            lambda ask, v=frac: MIXTURE(ask)._replace(var_frac=torch.full_like(ask.x, v)),
            CONTINUOUS,
            grid,
            levels=None,
            variance="learned",
        )
        assert_close(learned, bound(MIXTURE, CONTINUOUS, grid, levels=None, variance=choice), rtol=1e-10, atol=1e-12)


def test_the_terms_are_the_total_and_a_row_is_its_images() -> None:
    """The total is the sum; an image's terms depend on its key alone, not on its neighbours."""
    grid = grid_of(TABLE, 7)
    whole = bound(MIXTURE, CONTINUOUS, grid, levels=None, images=[4, 8, 1, 0, 9])
    want = [math.fsum([float(whole.prior[i]), *whole.steps[:, i].tolist(), float(whole.decoder[i])]) for i in range(5)]
    assert_close(whole.total, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (whole.steps.shape, whole.x0_mse.shape) == ((6, 5), (7, 5))
    part = bound(MIXTURE, CONTINUOUS[[2, 0]], grid, levels=None, images=[1, 4])
    assert_close(part, Bound(*(f[..., [2, 0]] for f in whole)), rtol=0, atol=0)
    other = bound(MIXTURE, CONTINUOUS, grid, levels=None, images=[4, 8, 1, 0, 9], seed=1)
    assert bool((other.x0_mse != whole.x0_mse).all())
    alike = bound(lambda ask: Belief(0 * ask.x, ask.x), torch.zeros(1, 4000, dtype=torch.float64), grid, levels=None)
    assert len(set(alike.eps_mse.flatten().tolist())) == 7  # terms do not share their noise


# ---- the bound on data whose likelihood is known -----------------------------------------------------------------


def expected(schedule: Schedule, grid: Grid) -> float:
    """The bound's expectation on the isotropic Gaussian, in bits a dimension, all terms in closed form.

    The best denoiser is wrong by E = std²·sigma²/(alpha²·std² + sigma²) a dimension, so that with variance beta
    L = (bt/b − 1 − log(bt/b) + c0²·E/b)/2, c0 = alpha_s·b/sigma_t²; the decoder's is (log(2π·sigma²) + E/sigma²)/2.
    """
    start, square = float(schedule.start(torch.ones(()))), STD**2 + float((GAUSSIAN.means**2).mean())
    alpha, sigma = float(grid[0].alpha), float(grid[0].sigma)
    nats = 0.5 * (sigma**2 / start**2 - 1 - math.log(sigma**2 / start**2) + alpha**2 * square / start**2)
    for now, nxt in pairwise(grid):
        a, s = float(now.alpha), float(now.sigma)
        error = STD**2 * s**2 / (a**2 * STD**2 + s**2)
        if nxt.clean:
            return (nats + 0.5 * (math.log(2 * math.pi * s**2) + error / s**2)) / LN2
        b = s**2 - (a / float(nxt.alpha) * float(nxt.sigma)) ** 2
        ratio = float(nxt.sigma) ** 2 / s**2
        nats += 0.5 * (ratio - 1 - math.log(ratio) + float(nxt.alpha) ** 2 * b / s**4 * error)
    raise AssertionError("the grid does not end clean")


ENTROPY = 0.5 * math.log2(2 * math.pi * math.e * STD**2)


@every_path
def test_the_bound_of_a_gaussian_is_its_closed_form_and_tends_to_the_entropy(path: Part) -> None:
    """Above the entropy, by a gap that falls as 1/T (10, 100, 1000); the estimate is within 4 standard errors of it."""
    schedule = schedule_of(path)
    gaps = [expected(schedule, grid_of(schedule, steps)) - ENTROPY for steps in (10, 100, 1000)]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] > 0
    x0 = GAUSSIAN.sample(400, schedule(0.0), seed=5)
    for steps, gap in zip((10, 100), gaps, strict=False):
        # the entropy's own estimate shares its noise with the bound's: their difference is sharper
        got = bound(GAUSSIAN, x0, grid_of(schedule, steps), levels=None, seed=steps).total
        over = got + GAUSSIAN.log_prob(x0, schedule(0.0)) / (3 * LN2)
        assert abs(float(over.mean()) - gap) < 4 * float(over.std()) / 20


@pytest.mark.parametrize("path", [Part("vp"), Part("continuous_cosine")], ids=label)
def test_the_bound_of_a_mixture_lies_above_its_likelihood_and_comes_near(path: Part) -> None:
    """E[bound] − E[−log p] ≥ 0 and falls with T; each within its standard error."""
    schedule = schedule_of(path)
    x0 = MIXTURE.sample(1000, schedule(0.0), seed=6)
    want = -MIXTURE.log_prob(x0, schedule(0.0)) / (3 * LN2)
    over = [bound(MIXTURE, x0, grid_of(schedule, n), levels=None).total - want for n in (5, 20, 80)]
    gaps = [float(each.mean()) for each in over]
    errors = [float(each.std()) / math.sqrt(1000) for each in over]
    assert gaps[0] > 2 * gaps[1] > 10 * errors[1]
    assert gaps[1] > 2 * gaps[2] > 0
    assert gaps[2] < 0.1 + 3 * errors[2]


@every_path
def test_the_prior_is_what_sampling_starts_from(path: Part) -> None:
    """KL(N(alpha·x0, sigma²) ‖ N(0, s²)) with s = 1, or sigma(1); 0 where nothing of x0 is left; by integration."""
    schedule = schedule_of(path)
    start = float(schedule.start(torch.ones(())))
    got = bound(MIXTURE, CONTINUOUS, grid_of(schedule, 4), levels=None).prior
    level = schedule(1.0)
    for row, value in zip(CONTINUOUS[:2].tolist(), got.tolist(), strict=False):
        kl = 0.0
        for x0 in row:
            here, there = norm(float(level.alpha) * x0, float(level.sigma)), norm(0, start)
            kl += here.expect(lambda z, a=here, b=there: a.logpdf(z) - b.logpdf(z)) / LN2 / 3
        assert value == pytest.approx(kl, rel=1e-6, abs=1e-10)
    if float(level.alpha) == 0:
        assert float(got.abs().max()) == 0


def test_bad_bounds_are_refused() -> None:
    grid = grid_of(TABLE, 4)

    def of(message: str, over: Grid = grid, **knobs: object) -> None:
        with pytest.raises(BadArgument, match=message):
            bound(MIXTURE, CONTINUOUS, over, **{"levels": None, **knobs})  # type: ignore[arg-type]

    of("must end clean", grid[:-1])
    of("must end clean", grid[-1:])
    of("variance: got 'gamma', need beta, beta-tilde or learned", variance="gamma")
    of("got 'learned', but this net does not predict a variance; try beta", variance="learned")
    of("got 'beta-tilde', but one step has no beta-tilde", grid[-2:], variance="beta-tilde")
    of("levels: got 1, need at least 2", levels=1)
    with pytest.raises(Diverged, match="a term is not finite"):
        bound(lambda ask: Belief(ask.x / 0, ask.x), CONTINUOUS, grid, levels=None)
    one = bound(MIXTURE, CONTINUOUS, grid[-2:], levels=None)  # a grid of one step: prior and decoder alone
    assert one.steps.shape == (0, 5)


# ---- the flow's density ------------------------------------------------------------------------------------------


@every_path
def test_the_flow_of_a_gaussian_is_exact_on_every_schedule(path: Part) -> None:
    """−log2 of N(x_1; 0, s²) times the flow's constant Jacobian, where x_1 is where the affine flow takes x."""
    schedule = schedule_of(path)
    grid = noisy(schedule)
    low, top = grid[-1], grid[0]
    x = GAUSSIAN.sample(6, low, seed=7)
    got = nll(GAUSSIAN, x, grid, trace="exact")
    end = GAUSSIAN.flow(x, low, top)
    stretch = [float((lv.alpha * STD) ** 2 + lv.sigma**2) ** 0.5 for lv in (low, top)]
    start = norm(0, float(schedule.start(torch.ones(()))))
    want = -(start.logpdf(end.numpy()).mean(1) + math.log(stretch[1] / stretch[0])) / LN2
    assert_close(got.bits, torch.from_numpy(want), rtol=0, atol=1e-5)
    assert_close(got.end, end, rtol=0, atol=1e-4 * float(top.sigma))
    if float(top.alpha) == 0:  # nothing is left of the data: the model's density is the data's
        assert_close(got.bits, -GAUSSIAN.log_prob(x, low) / (3 * LN2), rtol=0, atol=1e-5)


@every_path
def test_the_flow_of_a_mixture_is_its_density_at_the_starting_level(path: Part) -> None:
    """Exact trace: within 1e-4 bits a dimension, once N(0, s²) at the end is exchanged for the mixture's law."""
    schedule = schedule_of(path)
    grid = noisy(schedule, 120)
    x = MIXTURE.sample(16, grid[-1], seed=8)
    got = nll(MIXTURE, x, grid, trace="exact")
    start = norm(0, float(schedule.start(torch.ones(()))))
    model = torch.from_numpy(start.logpdf(got.end.numpy()).sum(1))
    bits = got.bits + (model - MIXTURE.log_prob(got.end, grid[0])) / (3 * LN2)
    assert_close(bits, -MIXTURE.log_prob(x, grid[-1]) / (3 * LN2), rtol=0, atol=1e-4)
    if float(grid[0].alpha) == 0:
        assert_close(got.bits, -MIXTURE.log_prob(x, grid[-1]) / (3 * LN2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
def test_random_probes_are_unbiased_within_their_standard_error(trace: str) -> None:
    """48 probes on 100 points: z-scores against the exact trace are Student's t, of mean square 1.04 ± 0.15."""
    grid = noisy(schedule_of("flow"), 16)
    x = MIXTURE.sample(100, grid[-1], seed=9)
    exact = nll(MIXTURE, x, grid, trace="exact", method="heun")
    got = nll(MIXTURE, x, grid, trace=trace, probes=48, method="heun", seed=3)  # type: ignore[arg-type]
    assert_close(got.end, exact.end)
    z = (got.bits - exact.bits) / got.se
    assert float(z.abs().max()) < 4.5
    assert float((z**2).mean()) == pytest.approx(1.04, abs=4 * 0.15)
    assert abs(float(z.mean())) < 4 / math.sqrt(100)
    assert_close(got.se, got.each.std(0) / math.sqrt(48))


@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
def test_probes_are_uncorrelated_between_dimensions(trace: str) -> None:
    """A linear answer x0 = A·x whose A is ½ off its diagonal, where any lean of the probes adds up; 6,400 probes."""
    matrix = 0.5 * (torch.ones(6, 6) - torch.eye(6)).double()

    def linear(ask: Ask) -> Belief:
        x0 = ask.x @ matrix
        return Belief(x0, (ask.x - ask.level.alpha * x0) / ask.level.sigma, pull=lambda g: g @ matrix)

    grid, x = noisy(schedule_of("flow"), 2), 0.1 * normals(100, 6, seed=14)
    exact = nll(linear, x, grid, trace="exact")
    over = (nll(linear, x, grid, trace=trace, probes=64).each - exact.bits).flatten()  # type: ignore[arg-type]
    assert abs(float(over.mean())) < 4 * float(over.std()) / math.sqrt(6400)


def test_signs_are_exact_where_the_jacobian_is_a_multiple_of_one() -> None:
    """gᵀ(c·1)g = c·D for g = ±1: one Rademacher probe is exact on an isotropic Gaussian, a normal one is not."""
    grid = noisy(schedule_of("vp"), 10)
    x = GAUSSIAN.sample(4, grid[-1], seed=10)
    exact = nll(GAUSSIAN, x, grid, trace="exact")
    assert_close(nll(GAUSSIAN, x, grid).bits, exact.bits, rtol=0, atol=1e-9)
    assert float((nll(GAUSSIAN, x, grid, trace="gaussian").bits - exact.bits).abs().min()) > 1e-4


def test_every_question_carries_the_condition() -> None:
    """Of the bound and of the flow alike, and only the flow asks for the derivative."""
    cond, asked = Cond(label=torch.arange(5)), list[Ask]()

    def ear(ask: Ask) -> Belief:
        asked.append(ask)
        return MIXTURE(ask)

    bound(ear, CONTINUOUS, grid_of(TABLE, 3), levels=None, cond=cond)
    nll(ear, CONTINUOUS, noisy(schedule_of("flow"), 2), cond=cond)
    assert [ask.pull for ask in asked] == [False] * 3 + [True] * 4
    assert all(ask.cond is cond for ask in asked)


def test_probes_are_keyed_by_image_and_draw() -> None:
    grid = noisy(schedule_of("flow"), 5)
    x = MIXTURE.sample(3, grid[-1], seed=11)
    whole = nll(MIXTURE, x, grid, trace="gaussian", probes=2, images=[7, 2, 5], draw=1)
    part = nll(MIXTURE, x[[2]], grid, trace="gaussian", probes=2, images=[5], draw=1)
    assert_close(part.each, whole.each[:, [2]], rtol=0, atol=0)
    first, second = whole.each
    again = nll(MIXTURE, x, grid, trace="gaussian", probes=2, images=[7, 2, 5], draw=2).each
    assert len({float(v[0]) for v in (first, second, *again)}) == 4


@pytest.mark.parametrize(("method", "order"), [("rk4", 4), ("heun", 2)])
def test_the_error_of_the_integral_falls_with_the_methods_order(method: str, order: int) -> None:
    """On a grid smooth in u, against 240 steps; the slope within ±0.15. The asks are those that are counted."""
    schedule = schedule_of("flow")
    asked = 0

    def value(steps: int) -> Tensor:
        nonlocal asked
        u = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        grid, asked = Grid(schedule, u), 0

        def count() -> None:
            nonlocal asked
            asked += 1

        found = nll(MIXTURE, x, grid, trace="exact", method=method, on_ask=count)  # type: ignore[arg-type]
        assert asked == asks_of(grid, method) == steps * (4 if method == "rk4" else 2)  # type: ignore[arg-type]
        return found.bits

    x = MIXTURE.sample(8, schedule(0.1), seed=12)
    truth = value(240)
    errors = [float((value(n) - truth).square().mean().sqrt()) for n in (30, 60)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("target", ["x0", "v", "flow"])
def test_a_denoisers_derivative_gives_the_same_in_float32(target: str) -> None:
    """Through the target's two coefficients and autograd: every target, to float32's rounding over 30 steps."""
    schedule = schedule_of("flow")
    grid = noisy(schedule, 30)
    x = MIXTURE.sample(5, grid[-1], seed=13)
    denoiser = denoiser_of(MIXTURE, schedule, target_of(target, schedule))
    got = nll(denoiser, x.float(), grid, trace="exact")
    assert got.end.dtype == torch.float32
    assert not got.each.requires_grad
    assert_close(got.bits, nll(MIXTURE, x, grid, trace="exact").bits, rtol=0, atol=2e-4)


def test_bad_flows_are_refused() -> None:
    grid = noisy(schedule_of("flow"), 4)
    x = CONTINUOUS

    def of(message: str, over: Grid = grid, **knobs: object) -> None:
        with pytest.raises(BadArgument, match=message):
            nll(MIXTURE, x, over, **knobs)  # type: ignore[arg-type]

    of(r"got a grid of 1 noisy level\(s\), need at least 2", grid[:1])
    of("trace: got 'sum', need rademacher, gaussian or exact", trace="sum")
    of("method: got 'euler', need rk4 or heun", method="euler")
    of("probes: got 3, but the exact trace has none", trace="exact", probes=3)
    of("probes: got 0, need at least 1", probes=0)
    with pytest.raises(BadArgument, match="carry no derivative"):
        nll(lambda ask: MIXTURE(ask._replace(pull=False)), x, grid)
    with pytest.raises(Diverged, match="not finite; try more steps"):
        nll(lambda ask: GAUSSIAN(ask)._replace(eps=ask.x / 0), x, grid)
    with pytest.raises(BadArgument, match="one probe has no standard error"):
        _ = nll(MIXTURE, x, grid).se


# ---- discrete data -----------------------------------------------------------------------------------------------


def test_dequantised_data_are_uniform_over_their_bins() -> None:
    """Within half a bin of the value, of the moments of U(−½, ½), rounded back to the value; keyed."""
    x = (torch.randint(17, (50, 400), generator=torch.Generator().manual_seed(0)) / 8 - 1).float()
    got = dequantise(x, 17, seed=2)
    part = (got.double() - x.double()) * 8
    assert float(part.abs().max()) <= 0.5 + 1e-6
    assert float(part.mean()) == pytest.approx(0, abs=4 / math.sqrt(12 * x.numel()))
    assert float(part.var()) == pytest.approx(1 / 12, rel=4 * math.sqrt(0.8 / x.numel()))
    assert torch.equal((got * 8).round() / 8, x)
    assert torch.equal(dequantise(x[3:5], 17, seed=2, images=[3, 4]), got[3:5])
    assert bool((dequantise(x, 17, seed=2, draw=1) != got).float().mean() > 0.99)
    with pytest.raises(BadArgument, match="levels: got 1, need at least 2"):
        dequantise(x, 1)


WIDE = Gaussian(torch.tensor([0.1, -0.2, 0.0], dtype=torch.float64), 0.4)
VALUES = torch.randint(40, 216, (12, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def arrays(values: Tensor = VALUES, levels: int | None = 256) -> Arrays:
    return Arrays(values, title="points", source="made up", levels=levels)


def ideal(oracle: Callable[[Ask], Belief], schedule: Schedule) -> Denoiser:
    return denoiser_of(oracle, schedule, target_of("v", schedule))


def test_likelihood_reports_both_for_each_image() -> None:
    """Against the pieces it is made of, and against the probabilities of the bins under the data's true law.

    The flow is exact and the bins are narrow, so −log2 P of a bin is what the flow must say, up to the noise of
    dequantisation, which is in its standard error.
    """
    schedule = schedule_of("flow")
    denoiser, data = ideal(WIDE, schedule), arrays()
    rows = [0, 2, 3, 5, 8, 11, 1]
    how = Settings(steps=20, flow_steps=12, draws=4, trace="exact")
    got = likelihood(denoiser, data, rows, how, seed=5, batch=3)
    x, _ = data.take(rows)
    chain = bound(denoiser, x, grid_of(schedule, 20, "trailing"), levels=256, seed=5, images=rows)
    assert_close(torch.tensor(got["images"]["bound"], dtype=torch.float64), chain.total, rtol=1e-6, atol=1e-6)
    for name, part in (("prior", chain.prior), ("steps", chain.steps.sum(0)), ("decoder", chain.decoder)):
        assert got["bound"][name] == pytest.approx(float(part.mean()), rel=1e-6, abs=1e-9)
    assert sum(term["bits"] for term in got["bound"]["terms"]) == pytest.approx(
        got["bound"]["steps"] + got["bound"]["decoder"]
    )
    assert got["bound"]["terms"][4]["eps_mse"] == pytest.approx(float(chain.eps_mse[4].mean()), rel=1e-5)
    assert got["bound"]["bits"] == pytest.approx(float(chain.total.mean()), rel=1e-6)
    assert got["bound"]["se"] == pytest.approx(float(chain.total.std()) / math.sqrt(7), rel=1e-5)
    level = schedule(schedule.least)
    law = norm(float(level.alpha) * WIDE.means[0].numpy(), float((level.alpha * 0.4) ** 2 + level.sigma**2) ** 0.5)
    half = 1 / 255
    want = -np.log2(law.cdf(x.numpy() + half) - law.cdf(x.numpy() - half)).mean(1)
    flow, se = (np.array(got["images"][name]) for name in ("flow", "flow_se"))
    assert np.abs(flow - want).max() < 5 * se.max()
    assert se.max() < 0.02
    assert np.abs(flow - want).mean() < 2 * se.mean()
    each = [dequantise(x, 256, seed=5, images=rows, draw=k) for k in range(4)]
    direct = [nll(denoiser, y, how.flow(schedule), trace="exact").bits + math.log2(255 / 2) for y in each]
    assert_close(torch.from_numpy(flow), torch.stack(direct).mean(0), rtol=1e-5, atol=1e-5)
    assert_close(torch.from_numpy(se), torch.stack(direct).std(0) / math.sqrt(4), rtol=1e-3, atol=1e-5)
    assert got["flow"]["bits"] == pytest.approx(flow.mean())
    assert got["flow"]["se_of_draws"] == pytest.approx(math.sqrt((se**2).sum()) / 7)
    assert (got["bound"]["asks"], got["flow"]["asks"], got["flow"]["derivatives"]) == (20, 4 * 4 * 11, 3)
    assert (got["n"], got["dim"], got["levels"], got["uniform"]) == (7, 3, 256, 8.0)


def test_likelihood_clips_the_chain_where_told() -> None:
    schedule, far = schedule_of("vp"), Gaussian(torch.full((3,), 3.0, dtype=torch.float64), 0.4)
    denoiser, data = ideal(far, schedule), arrays()
    clipped, bare = (
        likelihood(denoiser, data, range(4), Settings(steps=6, flow_steps=2, draws=1, clip=clip))
        for clip in (True, False)
    )
    chain = bound(denoiser, data.take(range(4))[0], grid_of(schedule, 6, "trailing"), levels=256, clip=True)
    assert_close(torch.tensor(clipped["images"]["bound"], dtype=torch.float64), chain.total, rtol=1e-6, atol=1e-6)
    assert clipped["bound"]["bits"] < bare["bound"]["bits"]
    assert clipped["images"]["flow"] == bare["images"]["flow"]


def test_an_images_figures_do_not_depend_on_the_others() -> None:
    denoiser, how = ideal(WIDE, schedule_of("vp")), Settings(steps=3, flow_steps=4, probes=2, draws=1)
    many = likelihood(denoiser, arrays(), range(6), how, batch=4)["images"]
    few = likelihood(denoiser, arrays(), [4, 1], how, batch=1)["images"]
    for name in ("bound", "flow", "flow_se"):
        assert few[name] == pytest.approx([many[name][4], many[name][1]], rel=1e-6)
    assert likelihood(denoiser, arrays(), range(2), replace(how, probes=1))["images"]["flow_se"] is None


@dataclass(frozen=True)
class Beside(Ranks):
    """A rank that is a thread of this process: what each has handed in lies on one table."""

    table: list[Tensor] = field(default_factory=list)
    gate: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def agree(self, error: Exception | None) -> None:
        if error is not None:
            raise error

    def cat(self, x: Tensor) -> Tensor:
        self.table[self.rank] = x
        self.gate.wait()
        whole = torch.cat(self.table)
        self.gate.wait()
        return whole


@pytest.mark.parametrize(("count", "batch"), [(3, 4), (8, 4), (10, 2)])
def test_ranks_share_the_batches_and_all_say_what_one_says(count: int, batch: int) -> None:
    """Of three ranks two have no batch, one has none, two have two batches."""
    how = Settings(steps=3, flow_steps=3, probes=2)
    rows, table, gate = [7, 1, 4, 0, 5, 2, 9, 11, 3, 8][:count], [torch.empty(0)] * 3, threading.Barrier(3)
    asked = [list[int]() for _ in range(3)]

    def of(rank: int) -> dict[str, Any]:
        beside = Beside(rank, 3, table=table, gate=gate)
        heard = lambda done, total, text: asked[rank].append(total)  # noqa: E731
        return likelihood(
            ideal(WIDE, schedule_of("vp")), arrays(), rows, how, batch=batch, ranks=beside, on_progress=heard
        )

    with ThreadPoolExecutor(3) as pool:
        found = [job.result(timeout=60) for job in [pool.submit(of, rank) for rank in range(3)]]
    want = likelihood(ideal(WIDE, schedule_of("vp")), arrays(), rows, how, batch=batch)
    for each in found:
        assert {**each, "seconds": 0} == {**want, "seconds": 0}
    assert all(len(each) == each[0] for each in asked), "no rank asks for another's batches"


def test_what_was_stopped_goes_on_with_the_same_figures(monkeypatch, tmp_path) -> None:
    """Stopped in the flow of the third of four batches: the chain's batches and two of the flow are not asked again."""
    monkeypatch.setenv("INKDROP_CACHE", str(tmp_path))
    how, rows = Settings(steps=3, flow_steps=3), [7, 1, 4, 0, 5, 2, 9]
    shelf, heard = Shelf("likelihood", {"of": "a test"}), list[tuple[int, int]]()
    denoiser, told = ideal(WIDE, schedule_of("vp")), list[float]()

    def run(stop: int, shelf: Shelf | None) -> dict[str, Any]:
        def progress(done: int, total: int, text: str) -> None:
            heard.append((done, total))
            if done == stop:
                raise KeyboardInterrupt

        heard.clear()
        how_long = lambda seconds, asks: told.append(seconds)  # noqa: E731
        return likelihood(
            denoiser, arrays(), rows, how, batch=2, shelf=shelf, on_progress=progress, on_estimate=how_long
        )

    want, counted = run(0, None), 0
    with pytest.raises(KeyboardInterrupt):
        run(4 * 3 + 2 * 16 + 3, shelf)

    def counting(*args: Any) -> None:
        nonlocal counted
        counted += 1

    denoiser.net.register_forward_hook(counting)
    with monkeypatch.context() as without:
        without.setattr("inkdrop.evals.likelihood._Work.seconds", lambda self: 1.0)  # it asks, too
        got = run(0, shelf)
    assert {**got, "seconds": 0} == {**want, "seconds": 0}
    assert heard == [(i, 4 * 19) for i in range(1, 4 * 19 + 1)]
    assert counted == 2 * 16
    run(0, shelf)
    assert (counted, told[-1]) == (2 * 16, 0)


def test_the_error_is_that_of_the_draws_whose_probes_share_their_noise() -> None:
    """Two probes of one draw see the same dequantised x, so the standard error is over the draws' means."""
    denoiser, rows = ideal(MIXTURE, schedule_of("flow")), [2, 0, 7]
    got = likelihood(denoiser, arrays(), rows, Settings(steps=2, flow_steps=3, trace="gaussian", probes=2, draws=3))
    x, _ = arrays().take(rows)
    grid = Settings(flow_steps=3).flow(schedule_of("flow"))
    each = [
        nll(denoiser, dequantise(x, 256, images=rows, draw=k), grid, trace="gaussian", probes=2, images=rows, draw=k)
        for k in range(3)
    ]
    want = torch.stack([one.bits for one in each]).std(0) / math.sqrt(3)
    assert_close(torch.tensor(got["images"]["flow_se"], dtype=torch.float64), want, rtol=1e-4, atol=1e-6)


def test_what_it_costs_is_told_first() -> None:
    told, done = [], []
    likelihood(
        ideal(WIDE, schedule_of("vp")),
        arrays(),
        range(5),
        Settings(steps=7, flow_steps=3, method="heun"),
        batch=2,
        on_estimate=lambda seconds, asks: told.append((seconds, asks, len(done))),
        on_progress=lambda at, total, text: done.append((at, total)),
    )
    [(seconds, asks, before)] = told
    assert 0 < seconds < 30
    assert (asks, before) == ((7, 2 * 2 * 2), 0)
    assert done == [(i, 3 * 15) for i in range(1, 46)]


class Untold(nn.Module):
    """A net of (x, time) alone."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return 0 * x


@pytest.mark.parametrize(
    ("data", "rows", "how", "message"),
    [
        (arrays(torch.rand(4, 3), None), range(4), {}, "the data are continuous"),
        (arrays(), range(1), {}, "images: got 1, need at least 2"),
        (arrays(), range(4), {"steps": 0}, "steps: got 0"),
        (arrays(), range(4), {"flow_steps": 1}, "flow_steps: got 1, need at least 2"),
        (arrays(), range(4), {"draws": 0}, "draws: got 0, need at least 1"),
        (arrays(), range(4), {"start": 1e-9}, r"start: got 1e-09, need a time in \[0.001, 1\)"),
        (arrays(), range(4), {"grid": "nothing"}, "unknown grids 'nothing'|nothing"),
    ],
    ids=lambda value: None if isinstance(value, Arrays) else str(value),
)
def test_bad_requests_are_refused_before_the_work(data: Arrays, rows: range, how: dict, message: str) -> None:
    schedule = schedule_of("vp")
    denoiser = wrap(Untold(), schedule, target_of("v", schedule))
    with pytest.raises(InkdropError, match=message) as found:
        likelihood(denoiser, data, rows, Settings(**how))
    assert "continuous" not in message or found.type is BadData


def test_results_are_named_tuples_of_float64() -> None:
    got = nll(MIXTURE, CONTINUOUS.float(), noisy(schedule_of("flow"), 3))
    assert isinstance(got, NLL)
    assert got.each.dtype == torch.float64
    terms = bound(MIXTURE, CONTINUOUS.float(), grid_of(TABLE, 3), levels=None)
    assert {f.dtype for f in terms} == {torch.float64}
