"""The toys have the moments of their formulas, within four standard errors (the draws are fixed: no test is flaky)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from inkdrop.data.toy import checkerboard, circles, mixture1d, moons, spirals
from inkdrop.errors import BadArgument

POINTS = [mixture1d, moons, spirals, checkerboard]


def values(data):
    x, cond = data.take(range(len(data)))
    return x.double().numpy(), None if cond is None else cond.label.numpy()


def close(samples, mean, errors=4.0):
    """The mean of samples (N, ...) is `mean` within some standard errors of it."""
    off = np.abs(samples.mean(0) - mean) / (samples.std(0) / math.sqrt(len(samples)))
    assert (off < errors).all(), off


@pytest.mark.parametrize("toy", [*POINTS, circles], ids=lambda toy: toy.__name__)
def test_train_and_test_are_different_draws_and_each_is_fixed(toy):
    train, test, again = (values(toy(split, count=300))[0] for split in ("train", "test", "train"))
    assert np.array_equal(train, again)
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}
    other = toy("train", count=300, seed=1)
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in values(other)[0]}
    assert toy("train", count=300).fingerprint == toy("train", count=300).fingerprint != other.fingerprint
    with pytest.raises(BadArgument, match="data split: got 'dev'"):
        toy("dev")
    with pytest.raises(BadArgument, match="count: got 0"):
        toy("train", count=0)


def test_mixture1d_has_the_distribution_function_of_its_mixture():
    means, stds, weights = (-0.5, 0.1, 0.7), (0.1, 0.02, 0.05), (2.0, 1.0, 1.0)
    x, labels = values(mixture1d("train", means=means, stds=stds, weights=weights, count=20_000, labelled=True))

    def cdf(at):
        return sum(w / 4 * stats.norm.cdf(at, m, s) for m, s, w in zip(means, stds, weights, strict=True))

    assert stats.kstest(x[:, 0], cdf).statistic < 1.63 / math.sqrt(20_000)  # Kolmogorov's bound at 1 %
    close(labels[:, None] == np.arange(3), np.array([0.5, 0.25, 0.25]))
    for k in range(3):
        close(x[labels == k], means[k])
        close((x[labels == k] - means[k]) ** 2, stds[k] ** 2)


def test_mixture1d_rejects_what_falls_outside_rather_than_clipping_it():
    x, _ = values(mixture1d("train", means=(0.9,), stds=(0.04,), weights=(1.0,), count=100_000))
    expected = stats.truncnorm(-1.9 / 0.04, 2.5, 0.9, 0.04)
    close(x, expected.mean())  # clipping would put the mean five standard errors away
    assert x.max() < 1
    with pytest.raises(BadArgument, match=r"15.9% of the mixture is outside \[-1, 1\], need at most 1%"):
        mixture1d("train", means=(0.9,), stds=(0.1,), weights=(1.0,))
    with pytest.raises(BadArgument, match="got 1 means, 2 stds and 1 weights"):
        mixture1d("train", means=(0.9,), stds=(0.1, 0.1), weights=(1.0,))


def test_moons_lie_on_two_half_circles():
    x, labels = values(moons("train", std=0.0, labelled=True, count=20_000))
    u = x * 1.5 / 0.8 + [0.5, 0.25]
    upper, lower = u[labels == 0], u[labels == 1]
    close(labels, 0.5)
    np.testing.assert_allclose(np.hypot(*upper.T), 1, atol=3e-7)  # x is float32
    np.testing.assert_allclose(np.hypot(*(lower - [1, 0.5]).T), 1, atol=3e-7)
    assert upper[:, 1].min() > -3e-7
    assert lower[:, 1].max() < 0.5 + 3e-7
    close(upper, [0, 2 / math.pi])
    close(lower, [1, 0.5 - 2 / math.pi])
    close((upper - [0, 2 / math.pi]) ** 2, [0.5, 0.5 - 4 / math.pi**2])
    noisy, _ = values(moons("train", std=0.1, count=20_000))
    assert np.abs(noisy).max() <= 1
    near = np.minimum(*(np.abs(np.hypot(*(noisy * 1.5 / 0.8 + [0.5, 0.25] - c).T) - 1) for c in ([0, 0], [1, 0.5])))
    assert 0.05 < near.mean() < 0.1 * 1.5 / 0.8  # the mean distance of noise from a line is 0.8 std; ends lie nearer


def test_spirals_wind_and_have_their_second_moment():
    x, labels = values(spirals("train", std=0.0, turns=1.5, labelled=True, count=20_000))
    r = np.hypot(*x.T)
    angle = np.arctan2(*(x * np.where(labels == 0, 1, -1)[:, None]).T[::-1])
    turned = np.exp(1j * angle) * np.exp(-1j * 2 * math.pi * 1.5 * r / 0.8)
    np.testing.assert_allclose(turned[r > 0.01], 1, atol=1e-4)  # float32 of a radius of 0.01
    close((r / 0.8) ** 2, 0.5)
    assert stats.kstest((r / 0.8) ** 2, "uniform").statistic < 1.63 / math.sqrt(20_000)
    noisy, _ = values(spirals("train", std=0.05, count=20_000))
    close((noisy**2).sum(1), 0.32 + 2 * 0.05**2)
    close(noisy, 0)


@pytest.mark.parametrize("cells", [3, 4])
def test_checkerboard_fills_the_dark_cells_evenly(cells):
    x, _ = values(checkerboard("train", cells=cells, count=20_000))
    i, j = np.minimum(np.floor((x + 1) / 2 * cells).astype(int), cells - 1).T
    assert ((i + j) % 2 == 0).all()
    counts = np.unique(i * cells + j, return_counts=True)[1]
    assert len(counts) == (cells * cells + 1) // 2
    assert stats.chisquare(counts).pvalue > 1e-3
    inner = (x + 1) / 2 * cells - np.stack([i, j], 1)
    assert max(stats.kstest(inner[:, k], "uniform").statistic for k in (0, 1)) < 1.63 / math.sqrt(20_000)


def test_circles_are_whole_round_discs_of_the_stated_sizes():
    data = circles("train", size=24, count=1000)
    assert (data.shape, data.levels, data.classes) == ((1, 24, 24), 256, ())
    cover = (values(data)[0][:, 0] + 1) / 2
    bright = cover.max((1, 2))  # a disc of radius 3 covers a whole pixel
    cover = cover / bright[:, None, None]
    area = cover.sum((1, 2))
    r = np.sqrt(area / math.pi - 1 / 12)  # ∫ clip(r − d + 1/2, 0, 1) 2πd dd = π(r² + 1/12)
    assert 2.98 < r.min() < 3.1
    assert 7.9 < r.max() < 8.02
    close(r, 5.5)
    close((r - 5.5) ** 2, 5**2 / 12)
    close(bright, 0.75)
    assert bright.min() + 1 / 255 >= 0.5
    middle = np.arange(24) + 0.5
    x, y = (np.einsum(f"bij,{axis}->b", cover, middle) / area for axis in "ji")
    assert min((x - r).min(), (y - r).min()) > -0.05
    assert max((x + r).max(), (y + r).max()) < 24.05
    close((x - r) / (24 - 2 * r), 0.5)
    fine = (np.arange(24 * 16) + 0.5) / 16
    for i in range(10):  # the independent drawing: 256 points a pixel
        inside = np.hypot(fine[None, :] - x[i], fine[:, None] - y[i]) < r[i]
        drawn = inside.reshape(24, 16, 24, 16).mean((1, 3))
        np.testing.assert_allclose(cover[i], drawn, atol=0.12)  # the ramp is not the exact area of a cut pixel


def test_knobs_of_toys_are_checked():
    for call in (
        lambda: circles("train", size=15),
        lambda: checkerboard("train", cells=1),
        lambda: moons("train", std=-0.1),
        lambda: moons("train", std=math.nan),
        lambda: spirals("train", turns=9),
        lambda: mixture1d("train", seed=-1),
        lambda: mixture1d("train", weights=(0, 0, 0)),
    ):
        with pytest.raises(BadArgument, match="need"):
            call()
