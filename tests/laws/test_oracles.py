"""The oracles' closed forms, against quadrature, Tweedie's formula and a numerical solution of the flow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import norm
from torch import Tensor

from inkdrop.core.ask import Ask
from inkdrop.core.oracle import Dataset, Gaussian, Mixture, Point
from inkdrop.errors import BadShape
from inkdrop.find import Part
from specimens import label, normals, schedule_of

KINDS = [Part("vp"), Part("cosine"), Part("edm"), Part("flow")]
every_kind = pytest.mark.parametrize("part", KINDS, ids=label)

MEANS = torch.tensor([[-0.7, 0.2], [0.5, 0.6], [0.3, -0.8]], dtype=torch.float64)
STDS = torch.tensor([0.1, 0.3, 0.05], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
PLANE = Mixture(MEANS, STDS, WEIGHTS)


@every_kind
@pytest.mark.parametrize("t", [0.01, 0.3, 0.7, 1.0])
def test_a_mixture_on_the_line_is_bayes_rule_by_quadrature(part: Part, t: float) -> None:
    """E[x0 | x] = ∫ x0·p(x0)·N(x; alpha·x0, sigma²) dx0 / p(x), and p(x) is that integral without x0.

    A sum over 80,001 points, 1/20 of the narrowest width apart: for smooth densities exact to rounding.
    """
    level = schedule_of(part)(t)
    alpha, sigma = float(level.alpha), float(level.sigma)
    weights, means, stds = [0.25, 0.75], [-0.6, 0.4], [0.2, 0.1]
    oracle = Mixture(*(torch.tensor(f, dtype=torch.float64) for f in ([[m] for m in means], stds, weights)))
    x = np.array([alpha * 0.1 + 0.5 * sigma, alpha * -0.6 - sigma, alpha * 0.4])
    x0 = np.linspace(-4, 4, 80_001)
    prior = sum(w * norm.pdf(x0, m, s) for w, m, s in zip(weights, means, stds, strict=True))
    joint = prior * norm.pdf(x[:, None], alpha * x0, sigma) * (x0[1] - x0[0])
    ask = Ask(torch.from_numpy(x)[:, None], level)
    np.testing.assert_allclose(oracle(ask).x0[:, 0].numpy(), joint @ x0 / joint.sum(1), rtol=0, atol=1e-10)
    np.testing.assert_allclose(oracle.log_prob(ask.x, level).numpy(), np.log(joint.sum(1)), rtol=1e-10, atol=1e-10)


@every_kind
def test_eps_is_minus_sigma_times_the_score(part: Part) -> None:
    """Tweedie: E[eps | x] = −sigma·∇ log p_t(x), the gradient by automatic differentiation of log_prob."""
    schedule = schedule_of(part)
    for t in (0.002, 0.1, 0.5, 0.9):
        level = schedule(t)
        x = PLANE.sample(20, level, seed=3).requires_grad_()
        [score] = torch.autograd.grad(PLANE.log_prob(x, level).sum(), x)
        belief = PLANE(Ask(x.detach(), level))
        torch.testing.assert_close(belief.eps, -level.sigma * score, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            level.alpha * belief.x0 + level.sigma * belief.eps, x.detach(), rtol=1e-12, atol=1e-13
        )


@every_kind
def test_density_integrates_to_one_and_has_the_stated_moments(part: Part) -> None:
    """By a sum over a grid of 400 × 400 points covering ten deviations: a smooth density sums to rounding error."""
    schedule = schedule_of(part)
    for t in (0.3, 1.0):
        level = schedule(t)
        mean, cov = PLANE.moments(level)
        reach = 10 * cov.diagonal().sqrt()
        axes = [
            torch.linspace(float(m - r), float(m + r), 401, dtype=torch.float64)
            for m, r in zip(mean, reach, strict=True)
        ]
        points = torch.cartesian_prod(*axes)
        cell = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
        p = PLANE.log_prob(points, level).exp() * cell
        assert float(p.sum()) == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(p @ points, mean, rtol=0, atol=1e-5 * float(reach.max()))
        gap = points - mean
        torch.testing.assert_close((p[:, None] * gap).T @ gap, cov, rtol=1e-4, atol=1e-6 * float(reach.max()) ** 2)


def test_samples_have_the_moments_of_the_marginal() -> None:
    """50,000 draws: the mean within 4.5·sd/√n, each covariance within 4.5·√2·var/√n."""
    n = 50_000
    for part in KINDS:
        level = schedule_of(part)(0.4)
        mean, cov = PLANE.moments(level)
        x = PLANE.sample(n, level, seed=1)
        spread = cov.diagonal().sqrt()
        assert bool(((x.mean(0) - mean).abs() < 4.5 * spread / n**0.5).all())
        assert bool(((x.T.cov() - cov).abs() < 4.5 * 2**0.5 * spread.outer(spread) / n**0.5).all())


@every_kind
def test_the_gaussian_s_flow_solves_its_ode(part: Part) -> None:
    """d(x/alpha)/drho = eps (Karras et al. 2022, eq. 4 in these variables), by DOP853 from t = 0.9 down to 0.05."""
    schedule = schedule_of(part)
    now, nxt = schedule(0.9), schedule(0.05)
    mean, std = torch.tensor([0.3, -0.4], dtype=torch.float64), 0.3

    def slope(rho: float, z: np.ndarray) -> np.ndarray:
        # eps = rho·(z − m)/(std² + rho²): the posterior mean of a Gaussian under z = x0 + rho·eps
        return rho * (z - mean.numpy()) / (std**2 + rho**2)

    x = torch.tensor([[1.3, -0.2]], dtype=torch.float64) * now.sigma
    z = solve_ivp(slope, (float(now.rho), float(nxt.rho)), (x / now.alpha)[0].numpy(), "DOP853", rtol=1e-12, atol=1e-13)
    want = float(nxt.alpha) * torch.from_numpy(z.y[:, -1])[None]
    torch.testing.assert_close(Gaussian(mean, std).flow(x, now, nxt), want, rtol=1e-9, atol=1e-9)


def test_one_component_and_a_split_one_are_the_same() -> None:
    """A Gaussian is a mixture of itself with itself: weights must not matter between equal parts."""
    level = schedule_of("vp")(0.4)
    x = normals(9, 3, seed=2)
    mean, stds = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.tensor([0.4, 0.4], dtype=torch.float64)
    twice = Mixture(mean.repeat(2, 1), stds, torch.tensor([0.9, 0.1]))
    for a, b in zip(Gaussian(mean, 0.4)(Ask(x, level))[:2], twice(Ask(x, level))[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_a_point_believes_in_itself() -> None:
    level = schedule_of("flow")(1.0)
    point = torch.tensor([0.25, -0.5], dtype=torch.float64)
    belief = Point(point)(Ask(normals(5, 2), level))
    torch.testing.assert_close(belief.x0, point.expand(5, 2), rtol=0, atol=1e-15)


@every_kind
def test_a_data_set_is_its_own_ideal_denoiser(part: Part) -> None:
    """The softmax over distances, in numpy, for images; near clean it is the nearest image, far out their mean."""
    schedule = schedule_of(part)
    images = normals(30, 1, 2, 3, seed=4)
    oracle = Dataset(images)
    level = schedule(0.5)
    x = level.alpha * images[:4] + level.sigma * normals(4, 1, 2, 3, seed=5)
    flat, data = x.reshape(4, -1).numpy(), images.reshape(30, -1).numpy()
    square = ((flat[:, None] - float(level.alpha) * data[None]) ** 2).sum(-1)
    weight = np.exp(-(square - square.min(1, keepdims=True)) / (2 * float(level.sigma) ** 2))
    want = (weight / weight.sum(1, keepdims=True)) @ data
    belief = oracle(Ask(x, level))
    torch.testing.assert_close(belief.x0, torch.from_numpy(want).reshape(4, 1, 2, 3), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(belief.eps, (x - level.alpha * belief.x0) / level.sigma, rtol=1e-12, atol=1e-12)
    near = schedule(schedule.least)
    clear = oracle(Ask(near.alpha * images[7:9] + 0.1 * near.sigma, near)).x0
    torch.testing.assert_close(clear, images[7:9], rtol=0, atol=1e-6)


def test_levels_of_rows_are_the_levels_of_each_row() -> None:
    schedule = schedule_of("vp")
    times = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    x = normals(3, 2, seed=6)
    whole = PLANE(Ask(x, schedule(times)))
    for i, t in enumerate(times.tolist()):
        alone = PLANE(Ask(x[i : i + 1], schedule(t)))
        torch.testing.assert_close(whole.x0[i : i + 1], alone.x0, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(whole.eps[i : i + 1], alone.eps, rtol=1e-12, atol=1e-14)


def test_answers_have_the_state_s_dtype() -> None:
    level = schedule_of("edm")(0.5)
    x: Tensor = normals(3, 2, dtype=torch.float32)
    belief = PLANE(Ask(x, level))
    assert (belief.x0.dtype, belief.eps.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(belief.x0.double(), PLANE(Ask(x.double(), level)).x0, rtol=1e-6, atol=1e-7)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadShape, match=r"mixture: got means \(3, 2\) and stds \(2,\)"):
        Mixture(MEANS, STDS[:2])
    with pytest.raises(BadShape, match=r"dataset oracle: got x of shape \(1, 3\), need \(B, 2\)"):
        Dataset(torch.zeros(4, 2))(Ask(torch.zeros(1, 3), schedule_of("vp")(0.5)))


@every_kind
def test_a_pull_is_the_transposed_jacobian(part: Part) -> None:
    """Central differences of x0 along g: the Jacobian of an ideal denoiser is symmetric, alpha/sigma²·Cov(x0 | x), so
    (d x0/d x)ᵀ·g is its derivative in the direction g. Rows are asked at their own levels."""
    schedule = schedule_of(part)
    level = schedule(torch.linspace(0.3, 0.9, 6, dtype=torch.float64))
    x, g, h = normals(6, 2, seed=5), normals(6, 2, seed=6), 1e-6
    ahead, behind = (PLANE(Ask(x + sign * h * g, level)).x0 for sign in (1, -1))
    belief = PLANE(Ask(x, level, pull=True))
    torch.testing.assert_close(belief.pull(g), (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)
    assert PLANE(Ask(x, level)).pull is None
    assert belief.pull(g.float()).dtype == torch.float32


def test_a_gaussian_s_pull_is_its_shrinkage() -> None:
    """x0 = m + k·(x − alpha·m) with k = alpha·s²/(alpha²·s² + sigma²): the pull is k·g."""
    level = schedule_of("vp")(0.4)
    k = float(level.alpha) * 0.09 / (float(level.alpha) ** 2 * 0.09 + float(level.sigma) ** 2)
    belief = Gaussian(torch.tensor([0.3, -0.1]), 0.3)(Ask(normals(3, 2), level, pull=True))
    torch.testing.assert_close(belief.pull(normals(3, 2, seed=1)), k * normals(3, 2, seed=1), rtol=1e-12, atol=0)


def test_a_data_set_s_pull_has_the_shape_of_its_images() -> None:
    """Shaped and flat ask for the same product."""
    data, level = normals(5, 1, 2, 2), schedule_of("vp")(0.5)
    x, g = normals(3, 1, 2, 2, seed=1), normals(3, 1, 2, 2, seed=2)
    got = Dataset(data)(Ask(x, level, pull=True)).pull(g)
    flat = Mixture(data.flatten(1), torch.zeros(5))(Ask(x.flatten(1), level, pull=True)).pull(g.flatten(1))
    assert torch.equal(got, flat.view(3, 1, 2, 2))
