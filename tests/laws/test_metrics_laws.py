"""Metrics: closed forms, streams that are saved and merged, the bias of FID, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from inkdrop.errors import BadArgument, BadShape
from inkdrop.evals.frechet import Moments, frechet
from inkdrop.evals.frechet_limit import frechet_limit
from inkdrop.evals.inception_score import InceptionScore
from inkdrop.evals.judge import Judge
from inkdrop.evals.mmd import CUBIC, DISTANCE, gaussian, mmd
from inkdrop.evals.prdc import prdc
from inkdrop.evals.sliced import sliced_wasserstein, wasserstein_line
from inkdrop.evals.ssim import ssim
from inkdrop.evals.stream import Reservoir


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def probabilities(rows: int, classes: int, seed: int) -> Tensor:
    return (3 * normal(rows, classes, seed=seed)).softmax(1)


# ---- streams: saved, merged, read by several ---------------------------------------------------------------------

MAKERS: dict[str, tuple[Callable[[], Any], Callable[[int], Tensor]]] = {
    "moments": (lambda: Moments(3), lambda n: normal(n, 3, seed=1)),
    "judge": (lambda: Judge("abc"), lambda n: probabilities(n, 3, 2)),
    "reservoir": (lambda: Reservoir(7, seed=5), lambda n: normal(n, 3, seed=3)),
    "inception_score": (lambda: InceptionScore(3, splits=4), lambda n: probabilities(n, 3, 4)),
}


def said(kept: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = kept.state_dict()
    return state


@pytest.mark.parametrize("name", MAKERS)
def test_a_stream_goes_on_from_what_was_saved(name: str) -> None:
    make, draw = MAKERS[name]
    x, whole, first = draw(40), make(), make()
    whole.update(x[:17])
    first.update(x[:17])
    saved = {key: value.clone() for key, value in said(first).items()}
    first.update(x[17:])  # what is saved is not changed by what goes on
    second = make()
    second.load(saved)
    whole.update(x[17:])
    second.update(x[17:])
    for key, value in said(whole).items():
        assert_close(said(second)[key], value, rtol=0, atol=0)


@given(cut=st.integers(min_value=0, max_value=40))
@pytest.mark.parametrize("name", MAKERS)
def test_what_two_ranks_saw_is_what_one_would_have_seen(name: str, cut: int) -> None:
    """Bit for bit where it is a choice or a count of places; to rounding where sums are added in another order."""
    make, draw = MAKERS[name]
    x, whole, left, right = draw(40), make(), make(), make()
    placed = {"first": cut} if name in ("reservoir", "inception_score") else {}
    whole.update(x)
    left.update(x[:cut])
    right.update(x[cut:], **placed)
    before = {key: value.clone() for key, value in said(right).items()}
    left.merge(right)
    for key, value in said(whole).items():
        exact = name == "reservoir"
        assert_close(said(left)[key], value, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-12)
        assert_close(said(right)[key], before[key], rtol=0, atol=0)


def test_merging_what_does_not_fit_is_refused() -> None:
    refused: list[tuple[Any, Any, type, str]] = [
        (Reservoir(7), Reservoir(8), BadArgument, "need size 7"),
        (Reservoir(7, seed=1), Reservoir(7), BadArgument, "need size 7, seed 1"),
        (InceptionScore(3), InceptionScore(4), BadShape, "need"),
        (InceptionScore(3, splits=2), InceptionScore(3), BadShape, "need"),
        (InceptionScore(3, seed=1), InceptionScore(3), BadArgument, "need 1"),
        (Judge("abc"), Judge("abd"), BadArgument, "same classes"),
        (Judge("abc"), Judge("abc", sure=0.5), BadArgument, "same classes"),
        (Moments(3), Moments(4), BadShape, "need 3"),
    ]
    for one, other, error, text in refused:
        with pytest.raises(error, match=text):
            one.merge(other)
    one, other = Reservoir(7), Reservoir(7)
    for each in (one, other):
        each.update(normal(5, 2, seed=0))
    with pytest.raises(BadArgument, match="a place twice"):
        one.merge(other)
    with pytest.raises(BadShape, match="need"):
        one.update(normal(5, 3, seed=0))
    one, other = Judge("ab"), Judge("ab")
    one.update(probabilities(4, 2, 0), torch.zeros(4, dtype=torch.int64))
    other.update(probabilities(4, 2, 0))
    with pytest.raises(BadArgument, match="on one side only"):
        one.merge(other)
    for kept, state in ((Moments(2), Moments(3)), (Judge("ab"), Judge("abc")), (InceptionScore(2), InceptionScore(3))):
        with pytest.raises(BadShape, match="load"):
            kept.load(state.state_dict())


# ---- Inception Score ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [4, 5, 10])
def test_splits_meet_all_classes_however_they_were_asked_for(classes: int) -> None:
    """Sure images of every class in turn score nearly K; dealt by place mod 10, a split of ten classes met one."""
    score = InceptionScore(classes)
    score.update(torch.eye(classes, dtype=torch.float64).repeat(2000 // classes, 1))
    found = score.report()
    assert 0.93 * classes < found.mean < classes  # 200 images a split: shares vary by chance
    assert found.std < 0.05 * classes


def test_inception_score_has_its_bounds() -> None:
    """K for sure and even, 1 for always the same or never sure; between, exp of the mutual information."""
    eye = torch.eye(5, dtype=torch.float64)
    for rows, want in ((eye.repeat(4, 1), 5.0), (eye[:1].repeat(20, 1), 1.0), (torch.full((20, 5), 0.2), 1.0)):
        score = InceptionScore(5, splits=1)
        score.update(rows)
        assert score.report().mean == pytest.approx(want, rel=1e-12)
        assert score.report().std == 0
    p = probabilities(50, 4, 6)
    score = InceptionScore(4, splits=1)
    score.update(p)
    want = math.exp(float((p * (p / p.mean(0)).log()).sum(1).mean()))
    assert score.report().mean == pytest.approx(want, rel=1e-12)
    few = InceptionScore(4, splits=10)
    few.update(p[:3])
    assert few.report().splits == 3
    with pytest.raises(BadArgument, match="no images"):
        InceptionScore(4).report()
    with pytest.raises(BadArgument, match="no probabilities"):
        score.update(2 * p)
    with pytest.raises(BadShape, match="need"):
        score.update(p[:, :3])
    with pytest.raises(BadArgument, match="at least 2 and 1"):
        InceptionScore(1)


# ---- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 3])
def test_mmd_of_a_gaussian_kernel_is_the_closed_form(dim: int) -> None:
    """E k(x, y) of N(m, a²) and N(0, b²) is (s²/v)^{D/2}·exp(−|m|²/(2v)), v = s² + a² + b²; unbiased over 400 draws."""
    sigma, spread, shift = 1.5, 0.7, 0.4

    def expected(gap: float, a: float, b: float) -> float:
        v = sigma**2 + a**2 + b**2
        return float((sigma**2 / v) ** (dim / 2) * math.exp(-dim * gap**2 / (2 * v)))

    want = expected(0, 1, 1) + expected(0, spread, spread) - 2 * expected(shift, 1, spread)
    found = [
        mmd(normal(30, dim, seed=2 * i), spread * normal(20, dim, seed=2 * i + 1) + shift, gaussian(sigma))
        for i in range(400)
    ]
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    assert abs(float(values.mean()) - want) < 4 * float(values.std()) / 20
    assert all(f.biased > f.value for f in found)


def test_cmmd_is_the_published_formula() -> None:
    """1,000·(mean k(x, x') + mean k(y, y') − 2·mean k(x, y)) with all pairs, as Jayasumana et al. compute it."""
    x, y = 5 * normal(40, 6, seed=7), 5 * normal(30, 6, seed=8) + 2

    def k(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-((a[:, None] - b).square().sum(2)) / (2 * 10.0**2))

    want = float(k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean())
    assert mmd(x, y, gaussian(10)).biased == pytest.approx(want, rel=1e-10)
    with pytest.raises(BadArgument, match="sigma"):
        gaussian(0)


def test_energy_distance_is_that_of_scipy() -> None:
    """scipy's is the root of the V-statistic on the line; the unbiased one leaves out the zeros of the diagonal."""
    stats = pytest.importorskip("scipy.stats")
    x, y = normal(40, 1, seed=9), 1.3 * normal(25, 1, seed=10) + 0.5
    found = mmd(x, y, DISTANCE)
    assert math.sqrt(found.biased) == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]), rel=1e-12)
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    assert found.value == pytest.approx(float(2 * torch.cdist(x, y).mean() - sum(within)), rel=1e-10)


@pytest.mark.parametrize("kernel", [CUBIC, DISTANCE, gaussian(2.0)])
def test_a_kernel_knows_its_diagonal(kernel: Any) -> None:
    x = normal(6, 4, seed=11)
    assert_close(kernel.own(x), kernel.pairs(x, x).diagonal(), rtol=1e-12, atol=1e-12)


# ---- sliced Wasserstein ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(40, 40), (30, 45), (7, 1)])
def test_wasserstein_on_the_line_is_that_of_scipy(sizes: tuple[int, int]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = normal(sizes[0], 2, seed=12), 2 * normal(sizes[1], 2, seed=13) - 1
    want = [stats.wasserstein_distance(x[:, i], y[:, i]) for i in range(2)]
    assert_close(wasserstein_line(x, y, power=1), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_wasserstein_squared_is_the_best_pairing() -> None:
    """W₂² of two sets of 5 points is the least mean squared distance over all 120 pairings."""
    from itertools import permutations

    x, y = normal(5, 1, seed=14), 1.7 * normal(5, 1, seed=15) + 0.3
    least = min(float((x - y[list(order)]).square().mean()) for order in permutations(range(5)))
    assert float(wasserstein_line(x, y)) == pytest.approx(least, rel=1e-12)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimension() -> None:
    """The mean of (u·δ)² over the sphere is |δ|²/D: 4,000 lines, so to 4·√(2/4000) of it, and half that of its root."""
    x, shift = normal(60, 3, seed=16), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = sliced_wasserstein(x, x + shift, directions=4000)
    assert found == pytest.approx(float(shift.norm()) / math.sqrt(3), rel=2 * math.sqrt(2 / 4000))
    assert sliced_wasserstein(x, x, directions=10) == 0
    assert sliced_wasserstein(x[:, :1], x[:, :1] + 2, directions=1) == pytest.approx(2, rel=1e-12)
    with pytest.raises(BadArgument, match="directions"):
        sliced_wasserstein(x, x, directions=0)


# ---- precision, recall, density, coverage ------------------------------------------------------------------------


def test_prdc_tells_fidelity_from_diversity() -> None:
    """Copies of a half: precise, half recalled; everywhere and more: recalled, not precise; far away: nothing."""
    real = normal(400, 2, seed=17)
    half = real[real[:, 0] > 0] + 1e-6
    kept, wide, away = (prdc(real, x, k=3) for x in (half, 4 * normal(400, 2, seed=18), real + 100))
    assert kept.precision == 1
    assert 0.4 < kept.recall < 0.6
    assert 0.4 < kept.coverage < 0.6
    assert wide.precision < 0.5
    assert wide.recall > 0.9
    assert (away.precision, away.recall, away.density, away.coverage) == (0, 0, 0, 0)
    same = [prdc(normal(500, 2, seed=s), normal(500, 2, seed=s + 1)).density for s in range(20, 40, 2)]
    assert np.mean(same) == pytest.approx(1, abs=0.05)  # Naeem et al., section 3.2: its expectation is 1
    with pytest.raises(BadArgument, match="at least 6 of each"):
        prdc(real, real[:5])
    with pytest.raises(BadArgument, match="k: got 0"):
        prdc(real, real, k=0)


def test_coverage_of_equal_distributions_is_known() -> None:
    """1 − (N−1)…(N−k)/((2N−1)…(2N−k)) for N points of each (Naeem et al., section 3.3); over 40 draws."""
    n, k = 60, 3
    want = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    found = [prdc(normal(n, 4, seed=2 * s), normal(n, 4, seed=2 * s + 1), k=k).coverage for s in range(40)]
    assert np.mean(found) == pytest.approx(want, abs=4 * np.std(found) / math.sqrt(40))


# ---- the bias of FID ---------------------------------------------------------------------------------------------


def test_fid_is_biased_upward_and_converges_and_its_limit_is_not() -> None:
    """Samples of the reference itself: FID(N) falls as D-dependent/N to 0, and the line in 1/N meets 0 at infinity."""
    dim = 16
    mean, cov = torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)

    def fid(n: int, seed: int) -> float:
        x = normal(n, dim, seed=seed)
        return frechet(mean, cov, x.mean(0), x.T.cov())

    sizes = (100, 200, 400, 800, 1600)
    found = [float(np.mean([fid(n, seed) for seed in range(8)])) for n in sizes]
    assert all(one > two > 0 for one, two in pairwise(found))
    expansion = [(dim + dim * (dim + 1) / 4) / n for n in sizes]  # |mean|² and, to first order, ¼·|cov − 1|²
    assert found == pytest.approx(expansion, rel=0.15)
    limits = [frechet_limit(mean, cov, normal(800, dim, seed=seed)) for seed in range(8)]
    assert abs(float(np.mean([one.limit for one in limits]))) < 0.15 * found[3]
    assert all(one.slope > 0 for one in limits)
    assert limits[0].least == 400
    with pytest.raises(BadArgument, match="at least 32"):
        frechet_limit(mean, cov, normal(31, dim, seed=0))
    with pytest.raises(BadArgument, match="at least 3"):
        frechet_limit(mean, cov, normal(64, dim, seed=0), points=2)


# ---- SSIM --------------------------------------------------------------------------------------------------------


def test_ssim_of_constants_and_opposites_is_the_closed_form() -> None:
    """Constant images have no variance: (2ab + c1)/(a² + b² + c1) of values in [0, 2]; an image and itself have 1."""
    a, b = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), -0.5)
    c1 = 0.02**2
    want = (2 * 1.2 * 0.5 + c1) / (1.2**2 + 0.5**2 + c1)
    assert float(ssim(a, b)) == pytest.approx(want, rel=1e-6)
    x = normal(3, 2, 20, 24, seed=40).tanh()
    assert_close(ssim(x, x), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(ssim(x, -x)[1:], ssim(x[1:], -x[1:]), rtol=1e-12, atol=0)  # rows do not see one another
    assert bool((ssim(x, -x) < -0.5).all())
    for bad in ({"window": 4}, {"window": 1}, {"sigma": 0.0}):
        with pytest.raises(BadArgument, match="window"):
            ssim(x, x, **bad)
    with pytest.raises(BadShape, match="at least the window"):
        ssim(x[..., :10], x[..., :10])
