"""Linear inverse problems: operators against dense matrices, and restorers against the posterior in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, given
from inkdrop.core.cond import Cond
from inkdrop.core.level import Level
from inkdrop.core.oracle import Gaussian, Mixture
from inkdrop.drive import drive
from inkdrop.edit.operators import Operator, masked
from inkdrop.edit.restore import ddnm, pigdm
from inkdrop.editing import operator_of, restore
from inkdrop.errors import BadArgument, BadShape, InkdropError, UnknownName
from inkdrop.find import Part, build, names
from inkdrop.guide.cfg import cfg
from inkdrop.guide.clip import clip
from inkdrop.plan import Plan, noise_of
from inkdrop.samplers.ddim import ddim
from inkdrop.samplers.heun import heun
from runs import digits, untrained
from specimens import SAMPLERS, denoiser_of, label, normals, sampler_of, schedule_of, target_of

pytestmark = pytest.mark.long  # left out of the fast tier

OPERATORS: list[tuple[Part, tuple[int, ...]]] = [
    (Part("superresolve"), (2, 4, 6)),
    (Part("superresolve", {"factor": 3}), (1, 6, 3)),
    (Part("blur"), (1, 6, 5)),
    (Part("blur", {"std": 0.7, "floor": 0.3}), (2, 4, 4)),
    (Part("gray"), (3, 3, 4)),
    (Part("mask", {"box": (1, 0, 2, 3)}), (2, 4, 5)),
]
every_operator = pytest.mark.parametrize(
    ("part", "shape"), OPERATORS, ids=lambda v: label(v) if isinstance(v, Part) else ""
)


def dense(operator: Operator, shape: tuple[int, ...]) -> Tensor:
    """A as a matrix (measurements, data): its columns are the images of unit vectors."""
    count = math.prod(shape)
    units = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    return operator.apply(units).reshape(count, -1).T


def matrix_operator(a: Tensor) -> Operator:
    """An operator for points (B, D) from its matrix (M, D), solved densely."""
    gram, eye = a @ a.T, torch.eye(len(a), dtype=a.dtype)

    def solve(y: Tensor, p: Tensor | float, q: Tensor | float) -> Tensor:
        whole = torch.as_tensor(p, dtype=a.dtype).reshape(-1, 1, 1) * gram + q * eye
        return torch.linalg.solve(whole.to(y.dtype), y[..., None])[..., 0]

    return Operator((len(a),), lambda x: x @ a.T.to(x.dtype), lambda y: y @ a.to(y.dtype), solve)


# ---- operators -----------------------------------------------------------------------------------------------


def test_every_operator_of_the_room_is_tried() -> None:
    assert {part.name for part, _ in OPERATORS} == set(names("operators"))


@every_operator
def test_transpose_solve_and_inverse_are_those_of_the_matrix(part: Part, shape: tuple[int, ...]) -> None:
    """Aᵀ entry by entry; (a·A·Aᵀ + b·I)⁻¹ and A⁺ by dense linear algebra; A·A⁺·A = A."""
    operator = operator_of(part, shape)
    a = dense(operator, shape)
    y = normals(3, *operator.shape, seed=1)
    flat = y.flatten(1)
    torch.testing.assert_close(operator.transpose(y).flatten(1), flat @ a, rtol=0, atol=1e-13)
    on_range = flat @ torch.linalg.pinv(a).T @ a.T  # where A·Aᵀ is singular, `solve` is asked on the range of A only
    seen = on_range.reshape(y.shape)
    for p, q in ((1.0, 0.3), (0.2, 1.0)):
        whole = p * a @ a.T + q * torch.eye(len(a), dtype=torch.float64)
        torch.testing.assert_close(
            operator.solve(seen, p, q).flatten(1), torch.linalg.solve(whole, on_range.T).T, rtol=0, atol=1e-12
        )
    pseudo = torch.linalg.pinv(a, rtol=1e-10)
    torch.testing.assert_close(operator.inverse(y).flatten(1), flat @ pseudo.T, rtol=0, atol=1e-11)
    x = normals(2, *shape, seed=2)
    torch.testing.assert_close(
        operator.apply(operator.inverse(operator.apply(x))), operator.apply(x), rtol=0, atol=1e-12
    )
    left, right = (operator.apply(x) * y[:2]).sum(), (x * operator.transpose(y[:2])).sum()
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@every_operator
def test_an_operator_is_linear_keeps_dtypes_and_levels_of_rows(part: Part, shape: tuple[int, ...]) -> None:
    operator = operator_of(part, shape)
    x, y = (normals(2, *shape, seed=s) for s in (3, 4))
    torch.testing.assert_close(operator.apply(2 * x - y), 2 * operator.apply(x) - operator.apply(y), rtol=0, atol=1e-13)
    small = operator.apply(x.float())
    assert small.dtype == operator.inverse(small).dtype == operator.transpose(small).dtype == torch.float32
    assert operator.solve(small, torch.tensor(0.5, dtype=torch.float64), 0.1).dtype == torch.float32
    rows = operator.solve(operator.apply(x), torch.tensor([0.5, 2.0]).double().reshape(-1, 1, 1, 1), 0.1)
    alone = operator.solve(operator.apply(x)[1:], 2.0, 0.1)
    torch.testing.assert_close(rows[1:], alone, rtol=0, atol=1e-12)
    assert tuple(operator.apply(x).shape[1:]) == operator.shape


def test_operators_are_what_their_names_say() -> None:
    """Means of squares; a circular convolution with the Gaussian summed over its images; luma; a hole."""
    x = normals(1, 1, 8, 8, seed=5)
    small = operator_of(Part("superresolve", {"factor": 4}), (1, 8, 8)).apply(x)
    assert float(small[0, 0, 1, 0]) == pytest.approx(float(x[0, 0, 4:, :4].mean()), abs=1e-15)
    offsets = np.arange(-40, 41)
    taps = np.exp(-(offsets**2) / 8) / np.exp(-(offsets**2) / 8).sum()
    kernel = np.zeros(8)
    np.add.at(kernel, offsets % 8, taps)
    blurred = x[0, 0].numpy()
    for axis in (0, 1):
        blurred = sum(kernel[k] * np.roll(blurred, k, axis) for k in range(8))
    got = operator_of(Part("blur", {"std": 2.0, "floor": 1e-12}), (1, 8, 8)).apply(x)[0, 0].numpy()
    np.testing.assert_allclose(got, blurred, rtol=0, atol=1e-7)
    colour = normals(1, 3, 2, 2, seed=6)
    grey = operator_of("gray", (3, 2, 2)).apply(colour)
    assert float(grey[0, 0, 1, 1]) == pytest.approx(
        float(colour[0, :, 1, 1] @ torch.tensor([0.299, 0.587, 0.114]).double())
    )
    holed = operator_of(Part("mask", {"box": (2, 3, 4, 5)}), (1, 8, 8)).apply(x)
    assert bool((holed[0, 0, 2:6, 3:8] == 0).all())
    assert int((holed == x).sum()) == 64 - 20


@pytest.mark.parametrize(
    ("part", "shape", "match"),
    [
        (Part("superresolve", {"factor": 1}), (1, 4, 4), "superresolve factor: got 1, need at least 2, and a divisor"),
        (Part("superresolve", {"factor": 3}), (1, 4, 6), "superresolve factor: got 3, .* of the 4 × 6 pixels"),
        (Part("superresolve"), (4,), r"superresolve: got data of shape \(4,\), need images"),
        (Part("blur", {"std": 0}), (1, 4, 4), "blur std: got 0, need a positive number"),
        (Part("blur", {"floor": 1}), (1, 4, 4), r"blur floor: got 1, need a number in \(0, 1\)"),
        (Part("gray"), (1, 4, 4), "gray: got data of 1 channels, need 3"),
        (Part("mask"), (1, 4, 4), "mask: needs a value for 'box'"),
        (Part("mask", {"box": (0, 0, 5, 2)}), (1, 4, 4), r"mask box: got \(0, 0, 5, 2\), need .* within the 4 × 4"),
        (Part("sharpen"), (1, 4, 4), "operators: unknown name 'sharpen'"),
    ],
)
def test_operators_that_cannot_be_are_refused(part: Part, shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(InkdropError, match=match):
        operator_of(part, shape)
    with pytest.raises(BadShape, match="masked: got torch.float32, need bool"):
        masked(torch.ones(2))


# ---- the posterior of a Gaussian -----------------------------------------------------------------------------

MEAN, STD = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64), 0.6
GAUSSIAN = Gaussian(MEAN, STD)
A = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -2.0]], dtype=torch.float64)
ALONG = matrix_operator(A)
Y = torch.tensor([[0.4, 1.1], [-0.2, 0.5]], dtype=torch.float64)


def posterior(y: Tensor, noise: float, x: Tensor | None = None, level: Level | None = None) -> tuple[Tensor, Tensor]:
    """Mean (B, D) and covariance of x0 ~ N(MEAN, STD²) given y = A·x0 + noise and, if given, x = alpha·x0 + sigma·eps:
    by conditioning the joint Gaussian, in other words than the code's."""
    rows, var, values = [A], [noise**2] * 2, [y]
    if x is not None and level is not None:
        rows.append(level.alpha * torch.eye(3, dtype=torch.float64))
        var += [float(level.sigma) ** 2] * 3
        values.append(x)
    h, v = torch.cat(rows), torch.diag(torch.tensor(var, dtype=torch.float64))
    prior = STD**2 * torch.eye(3, dtype=torch.float64)
    gain = prior @ h.T @ torch.linalg.inv(h @ prior @ h.T + v)
    return MEAN + (torch.cat(values, 1) - MEAN @ h.T) @ gain.T, prior - gain @ h @ prior


def told(wrap: Any, x: Tensor, level: Level, net: Any = GAUSSIAN) -> Belief:
    """The belief that reaches a sampler which asks once."""

    def once() -> Sampling:
        return (yield Ask(x, level))

    work = wrap(once())
    with pytest.raises(StopIteration) as end:
        work.send(net(next(work)))
    return end.value.value


@pytest.mark.parametrize("restorer", [ddnm, pigdm])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
@pytest.mark.parametrize("t", [0.02, 0.3, 0.9, 1.0])
def test_of_a_gaussian_the_guided_belief_is_its_posterior_mean(
    t: float, schedule: str, noise: float, restorer: Any
) -> None:
    """E[x0 | x_t, y] in closed form, with sd the data's, from the cleanest levels to alpha = 0 (flow at t = 1)."""
    level = schedule_of(schedule)(t)
    x = GAUSSIAN.sample(2, level, seed=7)
    belief = told(lambda work: restorer(work, Y, ALONG, noise=noise, sd=STD), x, level)
    want, _ = posterior(Y, noise, x, level)
    torch.testing.assert_close(belief.x0, want, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        level.alpha * belief.x0 + level.sigma * belief.eps, x, rtol=0, atol=1e-12 * float(1 + x.abs().max())
    )


def test_rows_at_levels_of_their_own() -> None:
    levels = schedule_of("vp")(torch.tensor([0.3, 0.8], dtype=torch.float64))
    x = normals(2, 3, seed=8)
    for restorer in (ddnm, pigdm):
        both = told(lambda work, r=restorer: r(work, Y, ALONG, noise=0.2, sd=STD), x, levels)
        for i, t in enumerate((0.3, 0.8)):
            want, _ = posterior(Y[i : i + 1], 0.2, x[i : i + 1], schedule_of("vp")(t))
            torch.testing.assert_close(both.x0[i : i + 1], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("restorer", [ddnm, pigdm])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_sampling_gives_the_exact_posterior(noise: float, restorer: Any) -> None:
    """The flow of a Gaussian is affine: it takes the noisy posterior N(m, C + sigma²·I), by its mean and the columns of
    a root of its covariance, to N(m, C), without draws. Heun's own error at 200 steps is below 1e-3."""
    grid = build("grids", Part("karras"), schedule_of("edm"), 200)
    mean, cov = posterior(Y[:1], noise)
    root = torch.linalg.cholesky(cov + grid[0].sigma ** 2 * torch.eye(3))
    start = torch.cat([mean, mean + root.T])
    ends = drive(restorer(heun(start, grid, None), Y[:1].expand(4, 2), ALONG, noise=noise, sd=STD), GAUSSIAN)
    spread = (ends[1:] - ends[0]).T
    torch.testing.assert_close(ends[0], mean[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(spread @ spread.T, cov, rtol=0, atol=1e-3)


def test_the_gradient_knows_what_replacement_does_not() -> None:
    """Of a strongly correlated pair of which the first is measured, pigdm moves the second along, ddnm does not.

    Data (c, c) with c = ±0.8 nearly: at a middling level the exact posterior mean of the second is near the first's.
    """
    pair = Mixture(torch.tensor([[0.8, 0.8], [-0.8, -0.8]]).double(), torch.tensor([0.1, 0.1]).double())
    level, x = schedule_of("vp")(0.6), torch.zeros(1, 2, dtype=torch.float64)
    first = masked(torch.tensor([True, False]))
    y = torch.tensor([[0.8, 0.0]], dtype=torch.float64)
    replaced = told(lambda work: ddnm(work, y, first), x, level, pair).x0
    guided = told(lambda work: pigdm(work, y, first), x, level, pair).x0
    torch.testing.assert_close(replaced, torch.tensor([[0.8, 0.0]], dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(guided[0, 1]) > 0.5


def test_pigdm_s_move_is_the_score_of_the_measurements() -> None:
    """x0 moves by (sigma²/alpha)·∇_x log N(y; A·x0(x), r²·A·Aᵀ + noise²), by torch through a mixture."""
    net = Mixture(torch.tensor([[0.6, -0.2, 0.4], [-0.5, 0.3, 0.0]]).double(), torch.tensor([0.3, 0.2]).double())
    level, noise, sd = schedule_of("vp")(0.5), 0.2, 0.5
    x = normals(2, 3, seed=9).requires_grad_()
    r2 = sd**2 * level.sigma**2 / (level.alpha**2 * sd**2 + level.sigma**2)
    law = torch.distributions.MultivariateNormal(
        net(Ask(x, level)).x0 @ A.T, r2 * A @ A.T + noise**2 * torch.eye(2, dtype=torch.float64)
    )
    frozen = torch.autograd.grad(law.log_prob(Y).sum(), x)[0]
    got = told(lambda work: pigdm(work, Y, ALONG, noise=noise, sd=sd, scale=2.0), x.detach(), level, net).x0
    want = net(Ask(x.detach(), level)).x0 + 2 * level.sigma**2 / level.alpha * frozen
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


# ---- with samplers, nets and guidance ------------------------------------------------------------------------


@pytest.mark.parametrize("part", SAMPLERS, ids=label)
def test_every_sampler_ends_at_what_was_measured(part: Part) -> None:
    """ddnm without noise: A·x = y to 1e-5 in float32, of samples that are not all alike elsewhere."""
    grid = build("grids", Part("trailing"), schedule_of("vp"), 6)
    x, y = grid[0].sigma * normals(2, 3, seed=10, dtype=torch.float32), Y.float()
    got = drive(ddnm(sampler_of(part)(x, grid, noise_of(Plan(part), 0, [0, 1])), y, ALONG), GAUSSIAN)
    torch.testing.assert_close(got @ A.T.float(), y, rtol=0, atol=1e-5)


def test_it_asks_for_a_derivative_only_from_the_onset_on() -> None:
    asked: list[tuple[float, bool]] = []

    def ear(ask: Ask) -> Belief:
        asked.append((float(ask.level.alpha / ask.level.sigma), ask.pull))
        return GAUSSIAN(ask)

    grid = build("grids", Part("trailing"), schedule_of("cosine"), 10)
    drive(pigdm(ddim(normals(2, 3, seed=11), grid, None), Y, ALONG, onset=0.5), ear)
    assert [pull for _, pull in asked] == [snr >= 0.5 for snr, _ in asked]
    assert len({pull for _, pull in asked}) == 2
    with pytest.raises(BadArgument, match=r"pigdm: the answer has no derivative \(pull\); try ddnm"):
        drive(
            pigdm(ddim(normals(2, 3, seed=11), grid, None), Y, ALONG),
            lambda ask: GAUSSIAN(ask._replace(pull=False)),
        )


def test_the_derivative_passes_through_clipping_and_guidance() -> None:
    """Of clip(uncond + w·(cond − uncond)): the move is that of a net which answers so itself, by finite differences."""
    nets = [Gaussian(torch.tensor(m, dtype=torch.float64), 0.5) for m in ([0.9, 0.1, -0.2], [-0.3, 0.4, 0.2])]
    level, x = schedule_of("vp")(0.4), normals(2, 3, seed=12)
    cond = Cond(label=torch.zeros(2, dtype=torch.int64))

    def net(ask: Ask) -> Belief:
        null = ask.cond.null_rows("label")[:, None]
        both = [n(ask) for n in nets]
        pull = None if not ask.pull else (lambda g: torch.where(null, both[1].pull(g), both[0].pull(g)))
        pair = zip(*((b.x0, b.eps) for b in both), strict=True)
        x0, eps = (torch.where(null, second, first) for first, second in pair)
        return Belief(x0, eps, pull=pull)

    def mixed(x: Tensor) -> Tensor:
        c, u = (n(Ask(x, level)).x0 for n in nets)
        return (u + 3 * (c - u)).clamp(-1, 1)

    def once() -> Sampling:
        return (yield Ask(x, level))

    work = cfg(clip(given(pigdm(once(), Y, ALONG, noise=0.3, sd=STD), cond)), scale=3.0)
    with pytest.raises(StopIteration) as end:
        work.send(net(next(work)))
    r2 = STD**2 * level.sigma**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    g = ALONG.transpose(ALONG.solve(Y - mixed(x) @ A.T, r2, 0.09))
    h, columns = 1e-6, []
    for k in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[k] = h
        columns.append(((mixed(x + step) - mixed(x - step)) / (2 * h) * g).sum(1))
    want = mixed(x) + level.sigma**2 / level.alpha * torch.stack(columns, 1)
    assert bool((mixed(x).abs() == 1).any())
    torch.testing.assert_close(end.value.value.x0, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["ddnm", "pigdm"])
def test_the_verb_restores_with_a_trained_form_of_net(method: Any) -> None:
    """Through a float32 Denoiser: mean and covariance of many draws are the posterior's within 5 standard errors."""
    rows, schedule = 1000, schedule_of("cosine")
    net = denoiser_of(GAUSSIAN, schedule, target_of("v", schedule))
    y = Y[:1].float().expand(rows, 2)
    how: dict[str, Any] = {"steps": 30, "sampler": "heun", "batch": rows}
    got = restore(net, y, ALONG, method=method, noise_std=0.3, sd=STD, **how).double()
    mean, cov = posterior(Y[:1], 0.3)
    assert bool(((got.mean(0) - mean[0]).abs() < 5 * cov.diagonal().sqrt() / rows**0.5).all())
    products = (got - got.mean(0))[:, :, None] * (got - got.mean(0))[:, None, :]
    assert bool(((products.mean(0) - cov).abs() < 5 * products.std(0) / rows**0.5).all())


def test_a_model_s_operator_is_found_by_name() -> None:
    bundle = untrained(digits(), (1, 8, 8), tuple("0123456789"))
    x = normals(2, 1, 8, 8, seed=13, dtype=torch.float32).clamp(-1, 1)
    part = Part("superresolve", {"factor": 4})
    y = operator_of(part, bundle.shape).apply(x)
    got = restore(bundle, y, part, steps=4)
    torch.testing.assert_close(operator_of(part, bundle.shape).apply(got), y, rtol=0, atol=1e-5)
    guided = restore(bundle, y, part, steps=4, method="pigdm", label=3, guidance=2.0)
    assert guided.shape == (2, 1, 8, 8)
    assert not torch.allclose(guided, restore(bundle, y, part, steps=4, method="pigdm", label=3), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "dps"}, UnknownName, "restore method: unknown name 'dps'"),
        ({"scale": 2.0}, BadArgument, "restore scale: got 2, which has no effect with ddnm; try method=pigdm"),
        ({"sd": 2.0}, BadArgument, "restore sd: got 2, which has no effect with ddnm without noise"),
        ({"noise_std": -1}, BadArgument, "restore noise: got -1, need a standard deviation of at least 0"),
        ({"method": "pigdm", "sd": 0}, BadArgument, "restore sd: got 0, need a positive"),
        ({"method": "pigdm", "scale": 0}, BadArgument, "pigdm scale: got 0, need a positive finite number"),
        ({"method": "pigdm", "scale": math.inf}, BadArgument, "pigdm scale: got inf"),
        (
            {"measured": torch.zeros(2, 3)},
            BadShape,
            r"restore measurements: got torch.float32 \(2, 3\), need float \(B, 2\)",
        ),
        ({"operator": "gray"}, BadArgument, "restore: a bare denoiser does not know its data; give an Operator"),
    ],
)
def test_what_cannot_be_restored_is_refused(options: dict[str, Any], error: Any, match: str) -> None:
    schedule = schedule_of("cosine")
    net = denoiser_of(GAUSSIAN, schedule, target_of("v", schedule))
    call: dict[str, Any] = {"measured": Y.float(), "operator": ALONG, "steps": 2, **options}
    with pytest.raises(error, match=match):
        restore(net, **call)
