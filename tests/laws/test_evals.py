"""Law 5, R6 and R16: Fréchet and kernel distances are their closed forms; copies are flagged; floors stand beside."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from inkdrop.data.arrays import Arrays
from inkdrop.data.digits import digits
from inkdrop.data.idx import mnist
from inkdrop.errors import BadArgument, BadData, BadShape
from inkdrop.evals import stream
from inkdrop.evals.classifier import Classifier, _shift, classifier
from inkdrop.evals.features import Pixels, features_for
from inkdrop.evals.frechet import Moments, frechet
from inkdrop.evals.judge import Judge
from inkdrop.evals.kid import kid
from inkdrop.evals.mmd import CUBIC, mmd
from inkdrop.evals.nearest import Copies, Near, copy_threshold, nearest
from inkdrop.evals.score import score
from inkdrop.evals.stream import Reservoir, chunks, subset

seeds = st.integers(min_value=0, max_value=2**31)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=draws(seed))


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


# ---- Fréchet distance --------------------------------------------------------------------------------------------


def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(normal(dim, dim, seed=1)).Q


def closed_forms() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    eye, a, b = torch.eye(5, dtype=torch.float64), normal(5, seed=2), normal(5, seed=3)
    gap = float((a - b).square().sum())
    yield a, 4 * eye, b, 9 * eye, gap + 5 * (2 - 3) ** 2
    p, q = torch.rand(2, 5, dtype=torch.float64, generator=draws(4))
    spread = float((p.sqrt() - q.sqrt()).square().sum())
    yield a, p.diag(), b, q.diag(), gap + spread
    turn = rotation(5)
    yield a, turn @ p.diag() @ turn.T, b, turn @ q.diag() @ turn.T, gap + spread
    one = torch.ones(1, dtype=torch.float64)
    yield one, 4 * one[None], 3 * one, 0.25 * one[None], 2**2 + (2 - 0.5) ** 2
    yield a, 4 * eye, b, 0 * eye, gap + 5 * 4.0


@pytest.mark.parametrize("case", list(closed_forms()), ids=["isotropic", "diagonal", "commuting", "1-D", "point"])
def test_frechet_is_the_closed_form(case: tuple[Tensor, Tensor, Tensor, Tensor, float]) -> None:
    *gaussians, want = case
    assert frechet(*gaussians) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("dim", [3, 64])
def test_frechet_is_that_of_pytorch_fid(dim: int) -> None:
    """The formula of pytorch-fid (and clean-fid): the trace of scipy's sqrtm of the product; R6 asks for 0.1 %."""
    linalg = pytest.importorskip("scipy.linalg")
    x = normal(600, dim, seed=5).relu() @ normal(dim, dim, seed=6)
    y = 0.7 * normal(400, dim, seed=7) + 0.3 * normal(dim, seed=8)
    (mu1, sigma1), (mu2, sigma2) = ((z.numpy().mean(0), np.cov(z.numpy(), rowvar=False)) for z in (x, y))
    covmean = linalg.sqrtm(sigma1.dot(sigma2)).real
    want = (mu1 - mu2).dot(mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(covmean)
    a, b = Moments(dim), Moments(dim)
    for part in x.split(77):
        a.update(part)
    b.update(y)
    assert frechet(a.mean, a.cov, b.mean, b.cov) == pytest.approx(want, rel=1e-9)


def test_frechet_without_full_rank() -> None:
    """tr (AB)^{1/2} is also the nuclear norm of the small matrix X Y^T, and the limit of adding eps to the diagonal."""
    dim = 32
    x, y = normal(10, dim, seed=9), normal(12, dim, seed=10) + 1
    (mean_a, a), (mean_b, b) = moments_of(x), moments_of(y)
    small = (x - mean_a) @ (y - mean_b).T / math.sqrt(9 * 11)
    trace = torch.linalg.matrix_norm(small, "nuc")
    want = float((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * trace)
    got = frechet(mean_a, a, mean_b, b)
    assert got == pytest.approx(want, rel=1e-7)  # roots of rounding, 1e-16, in 20 empty directions
    eye = torch.eye(dim, dtype=torch.float64)
    gaps = [abs(frechet(mean_a, a + eps * eye, mean_b, b + eps * eye) - got) for eps in (1e-4, 1e-6, 1e-8)]
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.3)  # the error of regularising is O(√eps)
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.3)


@given(seeds, st.integers(1, 8), st.integers(2, 12), st.integers(2, 12))
def test_frechet_is_a_squared_distance(seed: int, dim: int, m: int, n: int) -> None:
    """Symmetric, 0 for equal arguments of any rank, above 0 otherwise, and |v|² for a shift by v."""
    x, y = normal(m, dim, seed=seed), 2 * normal(n, dim, seed=seed + 1)
    a, b = moments_of(x), moments_of(y)
    there = frechet(*a, *b)
    assert there == pytest.approx(frechet(*b, *a), rel=1e-6, abs=1e-9)
    assert there > 1e-6
    shift = normal(dim, seed=seed + 2)
    rounding = 1e-12 * float(a[1].trace()) * dim
    assert frechet(*a, *a) <= rounding
    assert frechet(*a, a[0] + shift, a[1]) == pytest.approx(float(shift.square().sum()), rel=1e-9, abs=rounding)


@pytest.mark.parametrize("n", [100, 400])
def test_frechet_of_samples_is_biased_upward_by_one_over_n(n: int) -> None:
    """Against the truth N(0, I_d) the mean is (d + d(d + 1)/4)/n to first order; the next order is below d/n of it."""
    dim, repeats = 4, 400
    zero, eye = torch.zeros(dim), torch.eye(dim)
    values = torch.tensor([frechet(*moments_of(normal(n, dim, seed=1000 * n + i)), zero, eye) for i in range(repeats)])
    want = (dim + dim * (dim + 1) / 4) / n
    se = float(values.std()) / math.sqrt(repeats)
    assert abs(float(values.mean()) - want) < 4 * se + want * dim / n


def test_frechet_refuses_what_is_no_covariance() -> None:
    mean, eye = torch.zeros(2), torch.eye(2)
    with pytest.raises(BadShape, match="cov_b"):
        frechet(mean, eye, mean, torch.eye(3))
    with pytest.raises(BadArgument, match="not symmetric"):
        frechet(mean, torch.tensor([[1.0, 0.5], [0.0, 1.0]]), mean, eye)
    with pytest.raises(BadArgument, match="eigenvalue"):
        frechet(mean, -eye, mean, eye)
    with pytest.raises(BadArgument, match="not finite"):
        frechet(mean, eye, torch.tensor([0.0, torch.nan]), eye)


@given(seeds, st.lists(st.integers(0, 30), min_size=2, max_size=6).filter(lambda sizes: sum(sizes) >= 2))
@settings(max_examples=25)
def test_moments_do_not_depend_on_the_chunks(seed: int, sizes: list[int]) -> None:
    x = normal(sum(sizes), 3, seed=seed)
    parts = x.split(sizes)
    one, two = Moments(3), Moments(3)
    for i, part in enumerate(parts):
        (one if i % 2 else two).update(part)
    one.merge(two)
    assert one.n == len(x)
    assert_close((one.mean, one.cov), moments_of(x), rtol=1e-10, atol=1e-12)


def test_moments_survive_a_large_offset() -> None:
    """Values on a grid of 2^-10 about 2^30 are exact; E[x²] − E[x]² would keep no digit of their covariance."""
    x = (normal(5000, 3, seed=11) * 1024).round() / 1024
    seen = Moments(3)
    for part in (x + 2.0**30).split(64):
        seen.update(part)
    assert_close(seen.cov, torch.cov(x.T), rtol=0, atol=1e-6)  # 2^30 · 1e-16 · a few, in a mean that is subtracted
    with pytest.raises(BadArgument, match="not finite"):
        seen.update(torch.full((1, 3), torch.nan))
    with pytest.raises(BadArgument, match="at least 2"):
        _ = Moments(3).cov


# ---- kernel distance ---------------------------------------------------------------------------------------------


def double_sum(x: Tensor, y: Tensor) -> float:
    def k(a: Tensor, b: Tensor) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i, j in product(range(m), repeat=2) if i != j) / (m * (m - 1))
    within_y = sum(k(y[i], y[j]) for i, j in product(range(n), repeat=2) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


def test_mmd_is_the_double_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(7, 4, seed=12), normal(5, 4, seed=13) + 0.5
    whole = mmd(x, y, CUBIC)
    monkeypatch.setattr("inkdrop.evals.mmd._CHUNK", 3)
    assert mmd(x, y, CUBIC) == pytest.approx(whole, rel=1e-12)
    assert mmd(x, y, CUBIC)[0] == pytest.approx(double_sum(x, y), rel=1e-12)
    assert mmd(y, x, CUBIC)[0] == pytest.approx(double_sum(x, y), rel=1e-12)
    assert kid(x[:5], y, size=1000).mean == pytest.approx(double_sum(x[:5], y), rel=1e-12)


def expected_kernel(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """E (a·b/d + 1)³ of independent Gaussians, by their raw moments up to the third."""

    def raw(mu: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        third = torch.einsum("i,j,k->ijk", mu, mu, mu)
        for where in ("ij,k->ijk", "ik,j->ijk", "jk,i->ijk"):
            third = third + torch.einsum(where, cov, mu)
        return mu, cov + torch.outer(mu, mu), third

    d = len(mean_a)
    one, two, three = ((p * q).sum() for p, q in zip(raw(mean_a, cov_a), raw(mean_b, cov_b), strict=True))
    return float(1 + 3 * one / d + 3 * two / d**2 + three / d**3)


@pytest.mark.parametrize("equal", [True, False])
def test_mmd_is_unbiased_and_its_standard_error_true(equal: bool) -> None:
    """Its mean over draws of Gaussians is the closed form; se² is its variance, twice that where both are equal.

    The ratio of mean se² to the variance over 600 draws is itself known to about 10 % (variance of a variance).
    """
    dim, n, repeats = 3, 50, 600
    factor = torch.eye(dim, dtype=torch.float64) if equal else 0.5 * torch.eye(dim) + 0.2 * normal(dim, dim, seed=14)
    shift = torch.zeros(dim) if equal else torch.tensor([0.8, 0.0, -0.3])
    a = torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
    b = shift.to(torch.float64), factor @ factor.T
    want = expected_kernel(*a, *a) + expected_kernel(*b, *b) - 2 * expected_kernel(*a, *b)
    found = []
    for i in range(repeats):
        x, y = normal(n, dim, seed=3 * i + 1), normal(n, dim, seed=3 * i + 2) @ factor.T + shift
        found.append(mmd(x, y, CUBIC)[:2])
    values, errors = torch.tensor(found, dtype=torch.float64).T
    assert abs(float(values.mean()) - want) < 4 * float(values.std()) / math.sqrt(repeats)
    ratio = float(errors.square().mean() / values.var())
    assert (1.6 if equal else 0.75) < ratio < (2.5 if equal else 1.3)


def test_kid_takes_subsets_of_both() -> None:
    """The mean over subsets has the whole's MMD² as its limit; std is that of the subsets; the seed picks them."""
    x, y = normal(40, 3, seed=15), normal(30, 3, seed=16) + 0.4
    many = kid(x, y, subsets=1000, size=10)
    whole, jackknife, _ = mmd(x, y, CUBIC)
    assert abs(many.mean - whole) < 4 * many.std / math.sqrt(1000)
    assert many.se == pytest.approx(math.hypot(jackknife, many.std / math.sqrt(1000)))
    assert (many.subsets, many.size) == (1000, 10)
    one, two = kid(x, y, subsets=1, size=10), kid(x, y, subsets=2, size=10)
    assert one.std == 0
    assert two.std == pytest.approx(abs(one.mean - two.mean))  # of two values: half their difference
    assert kid(x, y, subsets=2, size=10) == two
    assert kid(x, y, subsets=2, size=10, seed=1).mean != two.mean
    assert kid(x, y).size == 30
    assert kid(x, x.clone()).std == 0


def test_kid_refuses() -> None:
    x = normal(4, 3, seed=17)
    with pytest.raises(BadArgument, match="at least 2 of each"):
        kid(x, x[:1])
    with pytest.raises(BadShape, match="need"):
        kid(x, x[:, :2])
    with pytest.raises(BadArgument, match="not finite"):
        mmd(x, x / 0, CUBIC)
    with pytest.raises(BadArgument, match="subsets=0"):
        kid(x, x, subsets=0)


# ---- streams -----------------------------------------------------------------------------------------------------


def test_reservoir_keeps_every_row_equally_often() -> None:
    """4 of 10 rows over 500 seeds: each is kept 0.4 ± 4·√(0.24/500) of the time, however the stream is cut."""
    x = torch.arange(10.0)[:, None]
    times = torch.zeros(10)
    for seed in range(500):
        whole, parts = Reservoir(4, seed=seed), Reservoir(4, seed=seed)
        whole.update(x)
        for part in x.split(3):
            parts.update(part)
        assert_close(whole.rows, parts.rows, rtol=0, atol=0)
        kept = whole.rows[:, 0].long()
        assert len(kept.unique()) == 4
        times[kept] += 1
    assert float((times / 500 - 0.4).abs().max()) < 4 * math.sqrt(0.24 / 500)


def test_subset_is_a_random_choice_of_rows() -> None:
    picked = [subset(50, 20, seed=s, draw=d) for s, d in ((0, 0), (0, 1), (1, 0))]
    for rows in picked:
        assert rows == sorted(set(rows))
        assert len(rows) == 20
        assert 0 <= rows[0] <= rows[-1] < 50
    assert picked[0] != picked[1] != picked[2] != picked[0]
    assert subset(3, 20, seed=0) == [0, 1, 2]


def test_chunks_are_the_data_set_in_order() -> None:
    data = digits("test")
    rows = [5, 3, 200, 7, 9]
    x, cond = data.take(rows)
    parts = list(chunks(data, rows=rows, size=2))
    assert [first for first, _, _ in parts] == [0, 2, 4]
    assert_close(torch.cat([part for _, part, _ in parts]), x, rtol=0, atol=0)
    assert_close(torch.cat([y for _, _, y in parts if y is not None]), cond.label, rtol=0, atol=0)
    assert sum(len(part) for _, part, _ in chunks(data)) == 360


# ---- the classifier ----------------------------------------------------------------------------------------------


def sides(shape: tuple[int, ...], n: int, seed: int) -> Arrays:
    """Two classes of noise: bright on the left, bright on the right."""
    label = torch.arange(n) % 2
    x = 0.3 * torch.randn(n, *shape, generator=draws(seed)) - 0.4
    half = shape[-1] // 2
    x[label == 0, ..., :half] += 0.8
    x[label == 1, ..., -half:] += 0.8
    x = x.clamp(-1, 1)
    return Arrays(x, label, title="sides", source="drawn for this test", classes=("left", "right"))


@pytest.fixture(scope="module")
def judge_of_digits() -> Classifier:
    found = features_for(digits("train"), digits("test"))
    assert isinstance(found, Classifier)
    return found


def test_classifier_of_digits_is_right_and_sure(judge_of_digits: Classifier) -> None:
    """≥ 97 % right on held-out digits; sure of ≥ 90 % of them, and then ≥ 99 % right; sure of next to no noise.

    Without images of nothing in its training it is sure of 86 % of uniform noise and of 70 % of clipped Gaussian noise,
    which it is never shown.
    """
    test = digits("test")
    x, cond = test.take(range(len(test)))
    p = judge_of_digits.probabilities(x)
    best, found = p.max(1)
    right = found == cond.label
    assert judge_of_digits.accuracy == pytest.approx(float(right.double().mean()))
    assert judge_of_digits.accuracy >= 0.97
    sure = best >= 0.9
    assert float(sure.double().mean()) >= 0.9
    assert float(right[sure].double().mean()) >= 0.99
    uniform = torch.rand(500, 1, 8, 8, generator=draws(0)) * 2 - 1
    for noise in (uniform, torch.randn(500, 1, 8, 8, generator=draws(1)).clamp(-1, 1)):
        assert float((judge_of_digits.probabilities(noise).max(1).values >= 0.9).double().mean()) < 0.05


def test_classifier_treats_rows_alone(judge_of_digits: Classifier) -> None:
    """float32 rounding of sums of 576 terms is all that the batch may change."""
    x, _ = digits("test").take(range(40))
    whole = judge_of_digits.features(x)
    assert whole.shape == (40, judge_of_digits.dim)
    assert_close(torch.cat([judge_of_digits(row[None]) for row in x]), whole, rtol=1e-4, atol=1e-5)
    assert_close(judge_of_digits.features(x.flip(0)).flip(0), whole, rtol=1e-4, atol=1e-5)
    assert_close(judge_of_digits.read(whole), judge_of_digits.net(x).softmax(1), rtol=1e-4, atol=1e-6)
    assert float(whole.std()) > 0.1


def test_classifier_is_cached_and_keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same weights, the second time from the cache; a damaged entry is made again."""
    train, test = sides((1, 6, 6), 64, 1), sides((1, 6, 6), 64, 2)
    heard: list[tuple[int, int]] = []
    before = torch.get_rng_state()

    def make(cache: str, *, seed: int = 0, epochs: int = 4) -> Classifier:
        monkeypatch.setenv("INKDROP_CACHE", str(tmp_path / cache))
        heard.clear()
        return classifier(train, test, seed=seed, epochs=epochs, on_progress=lambda d, t, _: heard.append((d, t)))

    first = make("a")
    assert heard[-1] == (4, 4)
    x, _ = test.take(range(64))
    again = make("a")
    assert heard == []
    assert (again.hash, again.accuracy, again.card) == (first.hash, first.accuracy, first.card)
    assert_close(again.features(x), first.features(x), rtol=0, atol=0)
    assert make("b").hash == first.hash
    assert heard
    assert len({first.hash, make("a", seed=1).hash, make("a", epochs=5).hash}) == 3
    assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    files = sorted(p.name for p in (tmp_path / "b").rglob("*") if p.is_file())
    assert files == ["classifier.json", "classifier.safetensors"]
    weights = next((tmp_path / "b").rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 0xFF
    weights.write_bytes(content)
    assert make("b").hash == first.hash
    assert heard
    assert make("b").hash == first.hash
    assert heard == []


@pytest.mark.parametrize("shape", [(1, 4, 4), (5, 7, 4), (3, 48, 32)])
def test_classifier_learns_images_of_any_shape(shape: tuple[int, ...]) -> None:
    made = classifier(sides(shape, 96, 3), sides(shape, 96, 4), epochs=8)
    assert made.accuracy >= 0.95
    assert made.probabilities(sides(shape, 96, 4).take([0, 1])[0]).argmax(1).tolist() == [0, 1]


def test_classifier_learns_without_holding_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = sides((1, 6, 6), 64, 1), sides((1, 6, 6), 64, 2)
    held = classifier(train, test, epochs=3)
    monkeypatch.setattr("inkdrop.evals.classifier._HELD_BYTES", 0)
    monkeypatch.setattr("inkdrop.evals.classifier._load", lambda *_: None)
    assert classifier(train, test, epochs=3).hash == held.hash


def test_shifts_are_all_the_shifts() -> None:
    """±1 pixel of 8 each way; what comes in from outside is the background."""
    x, fill = torch.rand(1, 2, 8, 8, generator=draws(5)), torch.tensor([-1.0, 0.5])[:, None, None]
    got = _shift(x.expand(400, -1, -1, -1), fill, draws(6))
    found = set()
    for dy, dx in product((-1, 0, 1), repeat=2):
        want = fill.expand(2, 8, 8).clone()
        for i, j in product(range(8), repeat=2):
            if 0 <= i + dy < 8 and 0 <= j + dx < 8:
                want[:, i, j] = x[0, :, i + dy, j + dx]
        found |= set((got - want).abs().amax((1, 2, 3)).lt(1e-6).nonzero()[:, 0].tolist())
        assert (got - want).abs().amax((1, 2, 3)).lt(1e-6).sum() > 400 / 9 / 3
    assert len(found) == 400


def test_classifier_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = sides((1, 6, 6), 8, 0)
    plain = Arrays(torch.zeros(8, 1, 6, 6), title="plain", source="drawn")
    with pytest.raises(BadData, match="classes"):
        classifier(plain, plain)
    with pytest.raises(BadShape, match="4 × 4"):
        classifier(sides((1, 3, 6), 8, 0), good)
    with pytest.raises(BadArgument, match="epochs"):
        classifier(good, good, epochs=0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INKDROP_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadArgument, match="INKDROP_CACHE"):
        classifier(good, good)


@pytest.mark.slow
def test_classifier_of_mnist(shared: Path) -> None:
    train, test = mnist("train", data=shared / "mnist"), mnist("test", data=shared / "mnist")
    assert classifier(train, test).accuracy >= 0.99


def test_pixels_are_averages() -> None:
    x = torch.rand(3, 2, 16, 24, generator=draws(7))
    made = Pixels((2, 16, 24))
    assert made.dim == 2 * 8 * 8
    assert_close(made(x), x.reshape(3, 2, 8, 2, 8, 3).mean((3, 5)).flatten(1))
    assert_close(Pixels((2,))(x[0, 0, :, :2]), x[0, 0, :, :2])
    assert_close(Pixels((3, 2, 16, 24))(x[None]), x.reshape(1, 3, 2, 8, 2, 8, 3).mean((4, 6)).flatten(1))
    assert Pixels((2, 16, 24)).hash == made.hash != Pixels((2, 24, 16)).hash
    plain = Arrays(x * 2 - 1, title="plain", source="drawn")
    assert features_for(plain, plain).name == "pixels"


# ---- the judge ---------------------------------------------------------------------------------------------------


def test_judge_counts() -> None:
    """Figures worked out by hand, the same however the stream is cut; chi2 is scipy's."""
    chisquare = pytest.importorskip("scipy.stats").chisquare
    rows = [[0.9, 0.1, 0, 0], [0.89, 0.11, 0, 0], [0, 1, 0, 0], [0.4, 0, 0.6, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
    p, labels = torch.tensor(rows, dtype=torch.float64), torch.tensor([0, 1, 1, 2, 0, 0])
    whole, parts = Judge("abcd"), Judge("abcd")
    whole.update(p, labels)
    for part in ([0, 1], [2], [3, 4, 5]):
        parts.update(p[part], labels[part])
    got = whole.report()
    assert got == parts.report()
    assert got["counts"] == {"a": 3, "b": 1, "c": 2, "d": 0}
    assert got["missing"] == []  # d was not asked for
    assert (got["n"], got["sure"], got["agree"], got["dof"]) == (6, 4 / 6, 4 / 6, 2)
    assert got["deviation"] == pytest.approx(0.5 * (abs(1 - 2) + abs(2 - 1)) / 6)
    assert got["chi2"] == pytest.approx(chisquare([3, 1, 2], [3, 2, 1]).statistic)
    even = whole.report(torch.ones(4))
    assert even["missing"] == ["d"]
    assert even["chi2"] == pytest.approx(chisquare([3, 1, 2, 0]).statistic)
    free = Judge("abcd", sure=0.5)
    free.update(p)
    assert (free.report()["agree"], free.report()["sure"], free.report()["dof"]) == (None, 1.0, 3)


def test_judge_refuses() -> None:
    judge, p = Judge("ab"), torch.tensor([[0.5, 0.5]])
    with pytest.raises(BadArgument, match="no images"):
        judge.report()
    with pytest.raises(BadArgument, match="softmax"):
        judge.update(p * 3)
    judge.update(p, torch.tensor([1]))
    with pytest.raises(BadArgument, match="always or never"):
        judge.update(p)
    with pytest.raises(BadArgument, match="0 to 1"):
        judge.update(p, torch.tensor([2]))


# ---- copies ------------------------------------------------------------------------------------------------------


def test_nearest_is_the_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many small chunks of both sides; a planted copy is at distance 0 exactly."""
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 4 * 64 * 50)
    train = digits("train")
    pool, _ = train.take(range(len(train)))
    x = torch.rand(120, 1, 8, 8, generator=draws(8)) * 2 - 1
    x[17], x[119] = pool[1003], pool[2]
    near = nearest(x, train)
    table = (x.double()[:, None] - pool.double()[None]).square().mean((2, 3, 4)).sqrt()
    assert_close(near.distance, table.amin(1), rtol=1e-6, atol=0)
    assert near.rows == table.argmin(1).tolist()
    assert (near.rows[17], near.distance[17].item(), near.rows[119], near.distance[119].item()) == (1003, 0, 2, 0)
    with pytest.raises(BadData, match="need \\[-1, 1\\]"):
        nearest(x * 2, train)


def test_copies_are_counted_by_the_rule_for_held_out_images() -> None:
    held_out = torch.arange(1, 251).double().flip(0) / 100
    assert copy_threshold(held_out) == 0.03  # the 3rd smallest of 250
    tied = torch.cat([torch.zeros(5), torch.ones(95)]).double()
    copies = Copies(tied, keep=2)
    assert copies.threshold == 0
    near = nearest(digits("test").take([4, 5])[0], digits("train"))
    copies.update(near._replace(distance=torch.tensor([0.5, 0.0]).double(), rows=[7, 8]))
    copies.update(near._replace(distance=torch.tensor([0.1, 0.0]).double(), rows=[9, 6]))
    got = copies.report()
    assert (got["n"], got["copies"], got["rate"], got["held_out_rate"]) == (4, 2, 0.5, 0.05)
    assert got["mean"] == pytest.approx(0.15)
    assert got["pairs"] == [{"sample": 1, "train": 8, "distance": 0.0}, {"sample": 3, "train": 6, "distance": 0.0}]


# ---- all in one --------------------------------------------------------------------------------------------------


def scored(x: Tensor, made: Classifier, labels: Tensor | None = None, size: int = 100, **knobs: int) -> dict:
    return score(x.split(size), digits("train"), digits("test"), made, labels=labels, subsets=20, **knobs)


def test_score_is_its_parts(judge_of_digits: Classifier) -> None:
    """Every figure again by another way; the cut into batches does not matter; it is plain JSON without NaN."""
    train, test = digits("train"), digits("test")
    x, cond = train.take(range(300))
    noisy = (x + 0.3 * torch.randn(x.shape, generator=draws(9))).clamp(-1, 1)
    got = scored(noisy, judge_of_digits, cond.label)
    other = scored(noisy, judge_of_digits, cond.label, size=77)
    for key in ("fid", "fid_floor"):
        assert got[key] == pytest.approx(other[key], rel=1e-4)
    assert got["classes"] == other["classes"]
    assert got["nearest"] == other["nearest"]
    json.dumps(got, allow_nan=False)
    real, _ = test.take(range(360))
    f, g = (judge_of_digits(images).double() for images in (noisy, real))
    assert got["fid"] == pytest.approx(frechet(*moments_of(f), *moments_of(g)), rel=1e-4)
    assert got["kid"]["se"] == pytest.approx(
        math.hypot(mmd(f, g, CUBIC)[1], got["kid"]["std"] / math.sqrt(20)), rel=1e-4
    )
    assert abs(got["kid"]["mean"] - mmd(f, g, CUBIC)[0]) < 5 * got["kid"]["std"] / math.sqrt(20)
    h = judge_of_digits(train.take(subset(1437, 300, seed=0, draw=1))[0]).double()
    assert got["fid_floor"] == pytest.approx(frechet(*moments_of(h), *moments_of(g)), rel=1e-4)
    assert abs(got["kid_floor"]["mean"] - mmd(h, g, CUBIC)[0]) < 5 * got["kid_floor"]["std"] / math.sqrt(20)
    agree = judge_of_digits.probabilities(noisy).argmax(1) == cond.label
    assert got["classes"]["agree"] == pytest.approx(float(agree.double().mean()))
    assert got["classes_real"]["agree"] == got["features"]["accuracy"] == judge_of_digits.accuracy
    assert (got["n"], got["floor_n"], got["resize"], got["reference"]) == (300, 300, "none", "test")
    assert got["features"]["hash"] == judge_of_digits.hash
    assert got["splits"]["test"] == {"n": 360, "source": test.source, "fingerprint": test.fingerprint}
    assert [w for w in got["warnings"] if "2,048" in w and "KID" in w]
    assert not [w for w in got["warnings"] if "rank" in w]


def test_score_flags_planted_copies_and_missing_classes(judge_of_digits: Classifier) -> None:
    train, test = digits("train"), digits("test")
    real, cond = test.take(range(360))
    real, labels = real[cond.label != 3], cond.label[cond.label != 3]
    planted = [11, 500, 1436]
    x = torch.cat([real[:20], train.take(planted)[0], real[20:]])
    got = scored(x, judge_of_digits)
    near = got["nearest"]
    assert [(p["sample"], p["train"]) for p in near["pairs"][:3]] == [(20 + i, row) for i, row in enumerate(planted)]
    clean = scored(real, judge_of_digits, labels)
    assert near["copies"] == clean["nearest"]["copies"] + 3
    assert near["held_out_rate"] == 4 / 360  # ⌈3.6⌉ of 360, no ties
    assert clean["nearest"]["threshold"] == pytest.approx(
        float(nearest(test.take(range(360))[0], train)[0].sort()[0][3])
    )
    assert clean["classes"]["missing"] == []  # no 3 was asked for
    assert (got["classes"]["missing"] == ["3"]) == (got["classes"]["counts"]["3"] == 0)
    assert got["classes"]["deviation"] > 0.05
    assert clean["classes"]["deviation"] < 0.02


def test_scores_grow_with_the_damage(judge_of_digits: Classifier) -> None:
    """From real held-out images (distance 0) through more and more noise: both distances rise, sureness falls."""
    x, _ = digits("test").take(range(360))
    noise = torch.randn(x.shape, generator=draws(10))
    found = [scored((x + level * noise).clamp(-1, 1), judge_of_digits) for level in (0, 0.3, 0.6, 1.2)]
    assert found[0]["fid"] < 1e-4 * found[1]["fid"]
    assert found[0]["kid"]["mean"] < 0 < found[0]["fid_floor"]
    for a, b in pairwise(found):
        assert a["fid"] < b["fid"]
        assert a["kid"]["mean"] + 3 * a["kid"]["se"] < b["kid"]["mean"]
        assert a["classes"]["sure"] > b["classes"]["sure"]
    assert found[1]["fid"] > found[1]["fid_floor"]


def test_a_judge_that_is_often_wrong_is_named(judge_of_digits: Classifier) -> None:
    train, test = digits("train"), digits("test")
    x, _ = train.take(range(40))
    wrong = dataclasses.replace(judge_of_digits, accuracy=0.55)
    got = score([x], train, test, wrong, held_out=30)
    assert [w for w in got["warnings"] if "right on only 55.0% of held-out images" in w]
    assert not [w for w in score([x], train, test, judge_of_digits, held_out=30)["warnings"] if "right on only" in w]


def test_score_without_classes_says_so() -> None:
    train, test = digits("train"), digits("test")
    x, cond = train.take(range(50))
    got = score([x], train, test, Pixels((1, 8, 8)), labels=cond.label, held_out=30)
    assert (got["classes"], got["classes_real"], got["features"]["accuracy"]) == (None, None, None)
    assert got["nearest"]["held_out_n"] == 30
    assert got["nearest"]["copies"] == 50
    for part in ("weaker", "not checked", "full rank"):
        assert [w for w in got["warnings"] if part in w], part
    same = score([x], train, train, Pixels((1, 8, 8)), held_out=30)
    assert [w for w in same["warnings"] if "are the training images" in w]
    tiny = Arrays(torch.rand(40, 1, 8, 8), title="tiny", source="drawn")
    assert [w for w in score([x], tiny, test, Pixels((1, 8, 8)))["warnings"] if "floor is of 40" in w]
    for held_out in (99, 100):
        real = Arrays(test.take(range(held_out))[0], title="real", source="drawn")
        few = [
            w for w in score([x], train, real, Pixels((1, 8, 8)))["warnings"] if "held-out images: figures that" in w
        ]
        assert len(few) == (held_out < 100)


def test_score_holds_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many come: neighbours are looked up for a chunk's worth at once, with the same figures."""
    train, test, made = digits("train"), digits("test"), Pixels((1, 8, 8))
    x, _ = train.take(range(300))
    x = (x + 0.2 * torch.randn(x.shape, generator=draws(11))).clamp(-1, 1)
    whole = score([x], train, test, made, held_out=40)
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 4 * 64 * 50)
    looks: list[int] = []

    def spy(query: Tensor, data: Arrays) -> Near:
        looks.append(len(query))
        return nearest(query, data)

    for module in ("score", "shelf"):
        monkeypatch.setattr(f"inkdrop.evals.{module}.nearest", spy)
    parts = score(x.split(20), train, test, made, held_out=40)
    assert parts["nearest"].pop("mean") == pytest.approx(whole["nearest"].pop("mean"), rel=1e-12)
    assert parts["nearest"] == whole["nearest"]
    assert looks == [40, 60, 60, 60, 60, 60]


def test_score_hears_its_progress() -> None:
    """The total is right from the start where labels say how many samples come, else from the last sample on."""
    train, test = digits("train"), digits("test")
    x, cond = train.take(range(60))
    every = 30 + 60 + 60 + 360 + 60  # neighbours of held-out images, samples, their neighbours, FID's two sides
    for labels in (None, cond.label):
        heard: list[tuple[int, int, str]] = []

        def hear(*call: Any, heard: list[tuple[int, int, str]] = heard) -> None:
            heard.append(call)

        score(x.split(20), train, test, Pixels((1, 8, 8)), held_out=30, labels=labels, on_progress=hear)
        assert heard[-1][0] == every
        assert all(a[0] < b[0] for a, b in pairwise(heard))
        known = [
            total for _, total, text in heard if labels is not None or text in ("held-out images", "training images")
        ]
        assert set(known) == {every}


def test_score_refuses() -> None:
    train, test, made = digits("train"), digits("test"), Pixels((1, 8, 8))
    x, cond = train.take(range(4))
    for batches in ([], [x[:1]], [x[:0], x[:1]]):
        with pytest.raises(BadArgument, match="samples, need at least 2"):
            score(batches, train, test, made)
    with pytest.raises(BadShape, match="need float"):
        score([x[:, :, :7]], train, test, made)
    for bad in (x + 1.5, x / 0):
        with pytest.raises(BadData, match="samples"):
            score([bad], train, test, made)
    for labels in (cond.label[:3], torch.cat([cond.label, cond.label])):
        with pytest.raises(BadShape, match="one a sample"):
            score([x], train, test, made, labels=labels)
    with pytest.raises(BadShape, match="int64"):
        score([x], train, test, made, labels=cond.label.float())
