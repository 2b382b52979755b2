"""The forward chain and its jump, the posterior by brute-force Bayes, and the terms of the variational bound."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import log_ndtr
from scipy.stats import ks_2samp, norm
from torch import Tensor

from inkdrop.core.forward import chain_agrees, diffuse, step
from inkdrop.core.level import Level
from inkdrop.core.noise import generator
from inkdrop.core.posterior import decoder_bits, kl_normal, mean_coefficients, posterior_variance
from inkdrop.core.schedule import Schedule, Table
from inkdrop.errors import BadArgument
from inkdrop.find import Part
from specimens import SCHEDULES, label, normals, schedule_of

every_schedule = pytest.mark.parametrize("part", SCHEDULES, ids=label)
TABLES = [p for p in SCHEDULES if isinstance(schedule_of(p), Table)]


def pairs_of(schedule: Schedule) -> list[tuple[Level, Level]]:
    """(s, t) pairs with s below t: neighbours, far apart, down to clean and up to the very end."""
    n = schedule.steps
    ks = [(0, 1), (0, n), (1, 2), (1, n), (n // 2, n // 2 + 1), (n // 4, 3 * n // 4), (n - 1, n)]
    found = {(a, b) for a, b in ks if 0 <= a < b <= n}
    return [(schedule(a / n), schedule(b / n)) for a, b in sorted(found)]


# ---- forward -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", TABLES, ids=label)
def test_a_step_of_the_chain_is_ddpm_s(part: Part) -> None:
    """q(x_k | x_{k−1}) = N(√(1 − beta_k)·x_{k−1}, beta_k) (Ho et al. 2020, eq. 2), at every entry."""
    schedule = schedule_of(part)
    assert isinstance(schedule, Table)
    levels = schedule(torch.arange(schedule.steps + 1, dtype=torch.float64) / schedule.steps)
    now, nxt = Level(*(f[:-1] for f in levels)), Level(*(f[1:] for f in levels))
    one = torch.ones(schedule.steps, 1, dtype=torch.float64)
    keep, fresh = step(one, 0 * one, now, nxt)[:, 0], step(0 * one, one, now, nxt)[:, 0]
    torch.testing.assert_close(keep, (1 - schedule.betas).sqrt(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fresh**2, schedule.betas, rtol=1e-9, atol=1e-13)


@every_schedule
def test_chain_and_jump_have_the_same_law(part: Part) -> None:
    """Exactly, through up to 60 levels ending at t = 1; relative to the end's own variance (6,400 for EDM)."""
    schedule = schedule_of(part)
    n = schedule.steps
    ks = sorted({round(k * n / min(n, 60)) for k in range(min(n, 60) + 1)})
    levels = [schedule(k / n) for k in ks]
    mean_gap, var_gap = chain_agrees(levels)
    assert float(mean_gap) < 1e-13
    assert float(var_gap) < 1e-13 * max(1.0, float(levels[-1].sigma) ** 2)


@pytest.mark.parametrize("name", ["linear", "cosine", "edm", "flow"])
def test_chain_and_jump_agree_by_sampling(name: str) -> None:
    """A two-sample Kolmogorov–Smirnov test of 20,000 draws of each, with fixed seeds: p must not be small.

    The same test sees a chain whose fresh noise is 10 % too strong.
    """
    schedule = schedule_of(name)
    levels = [schedule(k / 1000) for k in range(0, 901, 60)]
    draws = torch.from_numpy(generator(1, 2, 3).standard_normal((len(levels) + 2, 20_000)))
    x0 = torch.where(draws[0] > 0, 0.8, -0.3) + 0.05 * draws[1]
    x, wrong = x0, x0
    for (now, nxt), eps in zip(pairwise(levels), draws[3:], strict=True):
        x, wrong = step(x, eps, now, nxt), step(wrong, 1.1 * eps, now, nxt)
    other = torch.from_numpy(generator(1, 2, 4).standard_normal((2, 20_000)))
    jump = diffuse(torch.where(other[0] > 0, 0.8, -0.3) + 0.05 * other[1], draws[2], levels[-1])
    assert ks_2samp(x.numpy(), jump.numpy()).pvalue > 0.01
    assert ks_2samp(wrong.numpy(), jump.numpy()).pvalue < 1e-3


def test_diffuse_takes_one_level_or_one_a_row() -> None:
    schedule = schedule_of("linear")
    times = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    x0, eps = normals(3, 2, 4, seed=1, dtype=torch.float32), normals(3, 2, 4, seed=2, dtype=torch.float32)
    rows = diffuse(x0, eps, schedule(times))
    assert rows.dtype == torch.float32
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(rows[i], diffuse(x0[i : i + 1], eps[i : i + 1], schedule(t))[0], rtol=0, atol=0)
        abar = float(torch.prod(1 - schedule.betas[: round(t * 1000)]))  # type: ignore[attr-defined]
        want = math.sqrt(abar) * x0[i].double() + math.sqrt(1 - abar) * eps[i].double()
        torch.testing.assert_close(rows[i].double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_step_of_float32_rows_keeps_float64_coefficients(dtype: torch.dtype) -> None:
    """beta = sigma_t² − a²·sigma_s² subtracts two numbers near 1: in float32 it would lose three digits of 1e-4."""
    schedule = schedule_of("linear")
    k = torch.tensor([10.0, 300.0, 700.0, 999.0], dtype=torch.float64)
    now, nxt = schedule(k / 1000), schedule((k + 1) / 1000)
    ones = torch.ones(4, 1, dtype=dtype)
    got = step(0 * ones, ones, now, nxt)
    assert got.dtype == dtype
    betas = 1e-4 + (0.02 - 1e-4) * k / 999
    rtol = 2e-7 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(got[:, 0].double() ** 2, betas, rtol=2 * rtol, atol=0)


def test_steps_towards_clean_and_chains_from_noise_are_refused() -> None:
    schedule = schedule_of("vp")
    x = torch.zeros(1)
    with pytest.raises(BadArgument, match="next level is less noisy"):
        step(x, x, schedule(0.5), schedule(0.4))
    with pytest.raises(BadArgument, match="at least 2 levels, the first of them clean"):
        chain_agrees([schedule(0.5), schedule(1.0)])
    with pytest.raises(BadArgument, match="at least 2 levels"):
        chain_agrees([schedule(0.0)])


# ---- posterior -----------------------------------------------------------------------------------------------


def bayes(x0: float, xt: float, s: Level, t: Level) -> tuple[float, float]:
    """Mean and variance of q(x_s | x_t, x0) ∝ q(x_s | x0)·q(x_t | x_s), summed over a fine grid of x_s.

    The grid covers the posterior itself, found by a coarse pass, so that narrow ones are resolved too.
    """
    alpha_s, sigma_s, alpha_t, sigma_t = (float(f) for f in (s.alpha, s.sigma, t.alpha, t.sigma))
    keep = alpha_t / alpha_s
    fresh = sigma_t**2 - keep**2 * sigma_s**2
    low, high = alpha_s * x0 - 12 * sigma_s, alpha_s * x0 + 12 * sigma_s
    for _ in range(6):
        z = np.linspace(low, high, 4001)
        log_p = -((z - alpha_s * x0) ** 2) / (2 * sigma_s**2) - (xt - keep * z) ** 2 / (2 * fresh)
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        mean = float(p @ z)
        var = float(p @ (z - mean) ** 2)
        low, high = mean - 12 * math.sqrt(var), mean + 12 * math.sqrt(var)
    return mean, var


@every_schedule
def test_posterior_is_bayes_rule(part: Part) -> None:
    """Mean and beta-tilde for neighbours and far pairs, also from alpha_t = 0, with x_t where it plausibly is."""
    schedule = schedule_of(part)
    for s, t in pairs_of(schedule):
        if s.clean:
            continue
        x0, xt = 0.37, float(t.alpha * 0.37 + 0.8 * t.sigma)
        mean, var = bayes(x0, xt, s, t)
        c0, ct = mean_coefficients(t, s)
        # the brute force subtracts nearly equal numbers when s and t are neighbours: 1e-16/beta of the variance
        scale = math.sqrt(var)
        assert float(c0 * x0 + ct * xt) == pytest.approx(mean, abs=1e-8 * scale, rel=1e-9)
        assert float(posterior_variance(t, s)) == pytest.approx(var, rel=1e-8)


@pytest.mark.parametrize("part", TABLES, ids=label)
def test_both_variances_on_a_table_are_ddpm_s(part: Part) -> None:
    """beta_k, and beta-tilde_k = beta_k·(1 − abar_{k−1})/(1 − abar_k) (Ho et al. 2020, eq. 7, section 3.2)."""
    schedule = schedule_of(part)
    assert isinstance(schedule, Table)
    beta = schedule.betas
    abar = (1 - beta).cumprod(0)
    tilde = beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    level = schedule(torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps)
    now, nxt = Level(*(f[1:] for f in level)), Level(*(f[:-1] for f in level))
    torch.testing.assert_close(posterior_variance(now, nxt, "beta"), beta[1:], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(posterior_variance(now, nxt, "beta-tilde"), tilde, rtol=1e-8, atol=1e-14)


@every_schedule
def test_nothing_is_random_into_the_clean_level(part: Part) -> None:
    schedule = schedule_of(part)
    for choice in ("beta", "beta-tilde"):
        for t in (schedule.least, 1.0):
            assert float(posterior_variance(schedule(t), schedule(0.0), choice)) == 0.0  # type: ignore[arg-type]
            c0, ct = mean_coefficients(schedule(t), schedule(0.0))
            assert (float(c0), float(ct)) == (1.0, 0.0)


@every_schedule
def test_the_posterior_keeps_the_forward_marginal(part: Part) -> None:
    """If x_t ~ q(x_t | x0), one posterior step gives exactly N(alpha_s·x0, sigma_s²): the identity behind DDIM."""
    for s, t in pairs_of(schedule_of(part)):
        c0, ct = mean_coefficients(t, s)
        torch.testing.assert_close(c0 + ct * t.alpha, s.alpha, rtol=1e-12, atol=1e-14)
        total = ct**2 * t.sigma**2 + posterior_variance(t, s)
        torch.testing.assert_close(total, s.sigma**2, rtol=1e-11, atol=1e-15)


def test_other_variances_are_refused() -> None:
    schedule = schedule_of("linear")
    with pytest.raises(BadArgument, match="variance: got 'gamma', need beta or beta-tilde"):
        posterior_variance(schedule(1.0), schedule(0.5), "gamma")  # type: ignore[arg-type]


# ---- densities of the bound ----------------------------------------------------------------------------------


def as64(*numbers: float) -> list[Tensor]:
    return [torch.tensor(n, dtype=torch.float64) for n in numbers]


@pytest.mark.parametrize(
    ("mean_a", "var_a", "mean_b", "var_b"),
    [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 0.7), (1.0, 1e-3, 1.1, 2e-3), (-2.0, 4.0, 1.0, 0.3)],
)
def test_kl_is_the_integral_in_bits(mean_a: float, var_a: float, mean_b: float, var_b: float) -> None:
    a, b = norm(mean_a, math.sqrt(var_a)), norm(mean_b, math.sqrt(var_b))

    def integrand(z: float) -> float:
        return float(a.pdf(z) * (a.logpdf(z) - b.logpdf(z)) / math.log(2))

    reach = 12 * math.sqrt(var_a)
    want = quad(integrand, mean_a - reach, mean_a + reach, points=[mean_a], epsabs=1e-12, epsrel=1e-12)[0]
    assert float(kl_normal(*as64(mean_a, var_a, mean_b, var_b))) == pytest.approx(want, rel=1e-10, abs=1e-12)


def test_kl_is_zero_only_between_equals_and_broadcasts() -> None:
    mean, var = normals(4, 1, seed=3), normals(1, 5, seed=4).exp()
    assert float(kl_normal(mean, var, mean, var).abs().max()) == 0.0
    other = kl_normal(mean, var, mean + 0.1, 2 * var)
    assert other.shape == (4, 5)
    assert float(other.min()) > 0


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 1.0), (0.3, 0.02), (-1.0, 1e-3), (5.0, 0.5), (0.123, 40.0), (0.9, 1e-6)]
)
def test_the_decoder_is_a_probability_over_all_levels(levels: int, mean: float, std: float) -> None:
    """Σ 2^{−bits} = 1 over every value a channel can take, also where nearly all mass is in an end's tail."""
    x0 = torch.linspace(-1, 1, levels, dtype=torch.float64)
    bits = decoder_bits(x0, *as64(mean, std), levels=levels)
    assert bool((bits >= 0).all())
    assert float((-bits * math.log(2)).exp().sum()) == pytest.approx(1.0, abs=1e-9)


def test_the_decoder_is_the_difference_of_two_cdfs() -> None:
    """Against scipy's normal distribution where that is accurate; 8-bit pixels as float32, as data sets give them."""
    pixels = torch.arange(256)
    x0 = (pixels.float() / 127.5) - 1
    bits = decoder_bits(x0, *as64(0.1, 0.3))
    assert bits.dtype == torch.float64
    centre = pixels.numpy() / 127.5 - 1
    high, low = centre + 1 / 255, centre - 1 / 255
    high[-1], low[0] = np.inf, -np.inf
    dist = norm(0.1, 0.3)
    want = -np.log2(np.where(centre > 0.1, dist.sf(low) - dist.sf(high), dist.cdf(high) - dist.cdf(low)))
    np.testing.assert_allclose(bits.numpy(), want, rtol=0, atol=2e-5)  # float32 pixels: 6e-8/0.3²·2 nats


def test_far_tails_of_the_decoder_are_finite_and_right() -> None:
    """100 and 40,000 standard deviations out, the mass of an interval is that of its nearer end to all digits."""
    half = 1 / 255
    for std in (1e-2, 2.5e-5):
        x0, mean = as64(-1 + 2 * 3 / 255, 1 - 1e-3)
        [sd] = as64(std)
        near = (float(x0) + half - float(mean)) / std
        got = float(decoder_bits(x0, mean, sd))
        assert math.isfinite(got)
        assert got == pytest.approx(-float(log_ndtr(near)) / math.log(2), rel=1e-9)
        mirrored = float(decoder_bits(-x0, -mean, sd))
        assert mirrored == pytest.approx(got, rel=1e-12)


def test_the_decoder_needs_two_levels() -> None:
    with pytest.raises(BadArgument, match="decoder levels: got 1, need at least 2"):
        decoder_bits(torch.zeros(1), torch.zeros(1), torch.ones(1), levels=1)
