"""Oracles: distributions whose ideal denoiser is known in closed form. Call one like a denoiser.

With x = alpha·x0 + sigma·eps, the ideal answer is x0 = E[x0 | x], and eps = (x − alpha·x0)/sigma. Points are (B, D).
Asked to pull, they answer with the exact vector-Jacobian product of x0 by x, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.level import Level
from inkdrop.errors import BadShape

__all__ = ["Dataset", "Gaussian", "Mixture", "Point"]


def _answer(ask: Ask, mean: Callable[[Tensor], Tensor]) -> Belief:
    """The belief whose x0 is mean(x), x in float64; with its pull if that was asked for."""
    level = ask.level.over(ask.x)

    def belief(exact: Tensor, pull: Callable[[Tensor], Tensor] | None) -> Belief:
        x0 = exact.to(ask.x.dtype)
        return Belief(x0, (ask.x - level.alpha * x0) / level.sigma, pull=pull)

    if not ask.pull:
        return belief(mean(ask.x.double()), None)
    with torch.enable_grad():
        x = ask.x.detach().double().requires_grad_()
        exact = mean(x)
    return belief(exact.detach(), lambda g: torch.autograd.grad(exact, x, g.double(), retain_graph=True)[0].to(g.dtype))


class Mixture:
    """A mixture of K isotropic Gaussians: p(x0) = Σ_k w_k N(m_k, s_k²·I).

    The noisy marginal is Σ_k w_k N(alpha·m_k, v_k·I) with v_k = alpha²·s_k² + sigma², and
    E[x0 | x] = Σ_k r_k(x)·(m_k + alpha·s_k²/v_k·(x − alpha·m_k)) with responsibilities r.

    Args:
        means: (K, D).
        stds: (K,), ≥ 0.
        weights: (K,), positive; equal by default; normalised here.
    """

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor | None = None) -> None:
        if means.ndim != 2 or stds.shape != means.shape[:1]:
            raise BadShape(
                f"mixture: got means {tuple(means.shape)} and stds {tuple(stds.shape)}, need (K, D) and (K,)"
            )
        self.means, self.stds = means.double(), stds.double()
        weights = torch.ones(len(means)) if weights is None else weights
        self.weights = weights.double() / weights.double().sum()

    def _parts(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """(log w_k N(x; alpha·m_k, v_k), x − alpha·m_k, v_k), of shapes (B, K), (B, K, D), (B or 1, K)."""
        alpha, sigma = level.alpha.reshape(-1, 1), level.sigma.reshape(-1, 1)
        var = (alpha * self.stds) ** 2 + sigma**2
        gap = x.double()[:, None] - alpha[..., None] * self.means
        square = (gap**2).sum(-1) / var
        dim = self.means.shape[1]
        return self.weights.log() - 0.5 * (square + dim * (2 * math.pi * var).log()), gap, var

    def __call__(self, ask: Ask) -> Belief:
        """The ideal answer about x of shape (B, D), in x's dtype."""

        def mean(x: Tensor) -> Tensor:
            log_parts, gap, var = self._parts(x, ask.level)
            shrink = ask.level.alpha.reshape(-1, 1) * self.stds**2 / var
            each = self.means + shrink[..., None] * gap
            return (log_parts.softmax(1)[..., None] * each).sum(1)

        return _answer(ask, mean)

    def log_prob(self, x: Tensor, level: Level) -> Tensor:
        """log p_t(x) in nats, (B,), of the noisy marginal at this level."""
        return self._parts(x, level)[0].logsumexp(1)

    def moments(self, level: Level) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of the noisy marginal."""
        mean = level.alpha * (self.weights @ self.means)
        var = (level.alpha * self.stds) ** 2 + level.sigma**2
        gap = level.alpha * self.means - mean
        cov = (self.weights * var).sum() * torch.eye(len(mean), dtype=torch.float64)
        return mean, cov + torch.einsum("k,ki,kj->ij", self.weights, gap, gap)

    def sample(self, count: int, level: Level, seed: int = 0) -> Tensor:
        """(count, D) float64 draws from the noisy marginal."""
        gen = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=gen)
        std = ((level.alpha * self.stds) ** 2 + level.sigma**2).sqrt()[which, None]
        noise = torch.randn(count, self.means.shape[1], generator=gen, dtype=torch.float64)
        return level.alpha * self.means[which] + std * noise


class Gaussian(Mixture):
    """One isotropic Gaussian N(mean, std²·I); its probability flow is affine and known exactly.

    Args:
        mean: (D,).
        std: > 0.
    """

    def __init__(self, mean: Tensor, std: float) -> None:
        super().__init__(mean[None], torch.tensor([std], dtype=torch.float64))

    def flow(self, x: Tensor, now: Level, nxt: Level) -> Tensor:
        """Where the probability-flow ODE takes x (B, D) from one level to another.

        x' = alpha'·m + √(v'/v)·(x − alpha·m) with v = alpha²·std² + sigma².
        """
        std = [((lv.alpha * self.stds[0]) ** 2 + lv.sigma**2).sqrt() for lv in (now, nxt)]
        return nxt.alpha * self.means[0] + std[1] / std[0] * (x - now.alpha * self.means[0])


class Point(Mixture):
    """All mass at one point (D,): every sampler that ends clean must return exactly it."""

    def __init__(self, point: Tensor) -> None:
        super().__init__(point[None], torch.zeros(1))


class Dataset:
    """A data set as its own ideal denoiser: E[x0 | x] = Σ_i softmax_i(−|x − alpha·d_i|²/(2·sigma²))·d_i.

    What a net with unlimited capacity would learn, memorising the data (Karras et al. 2022, appendix B.3).

    Args:
        samples: (N, *shape), the clean data.
    """

    def __init__(self, samples: Tensor) -> None:
        self.shape = tuple(samples.shape[1:])
        self._points = Mixture(samples.flatten(1), torch.zeros(len(samples)))

    def __call__(self, ask: Ask) -> Belief:
        """The ideal answer about x of shape (B, *shape)."""
        if tuple(ask.x.shape[1:]) != self.shape:
            raise BadShape(
                f"dataset oracle: got x of shape {tuple(ask.x.shape)}, need (B, {', '.join(map(str, self.shape))})"
            )
        flat = self._points(ask._replace(x=ask.x.flatten(1)))
        pull = flat.pull
        shaped = None if pull is None else (lambda g: pull(g.flatten(1)).view_as(g))
        return Belief(flat.x0.view_as(ask.x), flat.eps.view_as(ask.x), pull=shaped)
