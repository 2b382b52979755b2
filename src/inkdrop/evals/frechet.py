"""Fréchet distance between Gaussians, and streaming moments to feed it: FID, whatever the features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from inkdrop.errors import BadArgument, BadShape

__all__ = ["Moments", "frechet"]


class Moments:
    """Mean and covariance of a stream of features, in float64 and in memory O(D²), whatever the number of rows.

    Two sets of n_a and n_b rows with sums of squared deviations M_a and M_b merge, with delta = mean_b − mean_a, into

        mean = mean_a + delta·n_b/(n_a + n_b),    M = M_a + M_b + delta delta^T · n_a·n_b/(n_a + n_b),

    which does not cancel as E[x²] − E[x]² does.

    Args:
        dim: D, the length of a feature vector, ≥ 1.

    Attributes:
        n: how many rows were seen.
        mean: (D,) float64.

    Raises:
        BadArgument: dim below 1.

    Reference:
        Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
        COMPSTAT 1982; here for vectors.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise BadArgument(f"moments dim: got {dim}, need at least 1")
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Take in rows x of shape (B, D).

        Raises:
            BadShape: rows of another length.
            BadArgument: a feature that is not finite.
        """
        dim = len(self.mean)
        if x.ndim != 2 or x.shape[1] != dim:
            raise BadShape(f"moments: got shape {tuple(x.shape)}, need (B, {dim})")
        if len(x) == 0:
            return
        rows = x.detach().to("cpu", torch.float64)
        if not bool(rows.isfinite().all()):
            raise BadArgument("moments: got a feature that is not finite, need finite features; check the samples")
        mean = rows.mean(0)
        centred = rows - mean
        self._add(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Take in all that another accumulator of the same dim has seen.

        Raises:
            BadShape: another dim.
        """
        if len(other.mean) != len(self.mean):
            raise BadShape(f"moments merge: got dim {len(other.mean)}, need {len(self.mean)}")
        if other.n:
            self._add(other.n, other.mean, other._scatter)

    def state_dict(self) -> dict[str, Tensor]:
        """All that it holds; with `load` another one goes on from it."""
        return {"n": torch.tensor(self.n), "mean": self.mean, "scatter": self._scatter}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` of one of the same dim had said.

        Raises:
            BadShape: another dim.
        """
        if state["mean"].shape != self.mean.shape:
            raise BadShape(f"moments load: got dim {state['mean'].numel()}, need {len(self.mean)}")
        self.n, self.mean, self._scatter = int(state["n"]), state["mean"].clone(), state["scatter"].clone()

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.n + n
        delta = mean - self.mean
        self.mean = self.mean + delta * (n / total)
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.n = total

    @property
    def cov(self) -> Tensor:
        """The unbiased covariance M/(n − 1): (D, D) float64, symmetric, of rank at most n − 1.

        Raises:
            BadArgument: fewer than 2 rows were seen.
        """
        if self.n < 2:
            raise BadArgument(f"moments: got {self.n} rows, need at least 2 for a covariance")
        return self._scatter / (self.n - 1)


def frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The squared Fréchet (2-Wasserstein) distance between N(mean_a, A) and N(mean_b, B).

        d² = |mean_a − mean_b|² + tr A + tr B − 2 tr (A^{1/2} B A^{1/2})^{1/2}

    A^{1/2} and B^{1/2} come from symmetric eigendecompositions with rounding below 0 clamped; the last trace is the sum
    of the singular values of A^{1/2} B^{1/2}, which are the roots of the eigenvalues of A^{1/2} B A^{1/2} without their
    squaring (so without losing half the digits). Covariances without full rank need no added diagonal, and the result
    is always real and finite.

    Args:
        mean_a: (D,).
        cov_a: (D, D), symmetric and positive semi-definite.
        mean_b: (D,).
        cov_b: (D, D), symmetric and positive semi-definite.

    Returns:
        d² ≥ 0, in squared units of the features; 0 for equal arguments, up to rounding.

    Raises:
        BadShape: shapes that do not fit together.
        BadArgument: a number that is not finite, or a covariance that is not symmetric or has a negative eigenvalue.

    Reference:
        Dowson & Landau, "The Fréchet distance between multivariate normal distributions", J. Multivariate Analysis 12,
        1982; Heusel et al., "GANs trained by a two time-scale update rule", 2017, eq. 6.
    """
    mean_a, cov_a, mean_b, cov_b = (m.detach().to("cpu", torch.float64) for m in (mean_a, cov_a, mean_b, cov_b))
    dim = mean_a.numel()
    for what, got, need in (
        ("mean_a", mean_a, (dim,)),
        ("cov_a", cov_a, (dim, dim)),
        ("mean_b", mean_b, (dim,)),
        ("cov_b", cov_b, (dim, dim)),
    ):
        if got.shape != need:
            raise BadShape(f"frechet {what}: got shape {tuple(got.shape)}, need {need}")
        if not bool(got.isfinite().all()):
            raise BadArgument(f"frechet {what}: got a number that is not finite")
    root_a, root_b = _root(cov_a, "cov_a"), _root(cov_b, "cov_b")
    overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    gap = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(0.0, float(gap))


def _root(cov: Tensor, what: str) -> Tensor:
    """The symmetric positive semi-definite root of a covariance (D, D) float64."""
    scale = float(cov.abs().max())
    if not torch.allclose(cov, cov.T, rtol=0, atol=1e-8 * scale):
        raise BadArgument(f"frechet {what}: got a matrix that is not symmetric, need a covariance")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    if float(values[0]) < -1e-6 * scale * len(cov):
        raise BadArgument(f"frechet {what}: got the eigenvalue {float(values[0]):g}, need a covariance, ≥ 0")
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
