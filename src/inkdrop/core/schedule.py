"""Schedules: functions of time t in [0, 1] that give the noise level (alpha, sigma).

t = 0 is clean and t = 1 is noise. Each schedule has a last noisy time `least` > 0: its domain is {0} ∪ [least, 1].
A table of T betas has least = 1/T; continuous schedules behave as T = 1,000. Everything is float64.

Public functions without positional parameters build schedules and are found by name:
`find("schedules", "cosine")(steps=1000)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from inkdrop.core.level import Level
from inkdrop.errors import BadArgument

__all__ = [
    "Schedule",
    "Table",
    "continuous_cosine",
    "cosine",
    "edm",
    "flow",
    "linear",
    "quadratic",
    "scaled_linear",
    "sigmoid",
    "table",
    "vp",
]

CONTINUOUS_STEPS = 1000  # what T means where a schedule has no table


class Schedule(ABC):
    """A map from time to noise level and back.

    Attributes:
        steps: T, the number of entries of a table; 1,000 for continuous schedules.
        preserving: whether alpha² + sigma² = 1 (variance preserving), so that pure noise is N(0, I).
    """

    steps: int = CONTINUOUS_STEPS
    preserving: bool = True

    @property
    def least(self) -> float:
        """The last noisy time, 1/T: between it and 0 there is no level."""
        return 1 / self.steps

    def __call__(self, t: Tensor | float) -> Level:
        """The level at time t (any shape), float64 on the CPU.

        Raises:
            BadArgument: a time outside {0} ∪ [1/T, 1].
        """
        t = torch.as_tensor(t, dtype=torch.float64).cpu()
        slack = 1e-9
        bad = ~((t == 0) | ((t >= self.least - slack) & (t <= 1 + slack)))
        if bool(bad.any()):
            worst = float(t[bad].flatten()[0])
            raise BadArgument(f"schedule time: got {worst:g}, need 0 or a number in [{self.least:g}, 1]")
        clean = t == 0
        alpha, sigma = self._noisy(t.clamp(self.least, 1))
        one = torch.ones_like(alpha)
        return Level(torch.where(clean, one, alpha), torch.where(clean, 0 * one, sigma), t)

    def time_of(self, lam: Tensor | float) -> Tensor:
        """The time at which log(alpha/sigma) = lam: the inverse of the schedule. lam = +∞ gives 0.

        Raises:
            BadArgument: lam lies outside the schedule's levels.
        """
        lam = torch.as_tensor(lam, dtype=torch.float64).cpu()
        high, low = self._ends
        slack = 1e-9 * max(1.0, abs(high))
        bad = ~((lam == math.inf) | ((lam <= high + slack) & (lam >= low - slack)))
        if bool(bad.any()):
            worst = float(lam[bad].flatten()[0])
            raise BadArgument(f"half log-SNR: got {worst:g}, need +inf or a number in [{low:g}, {high:g}]")
        return torch.where(lam == math.inf, torch.zeros_like(lam), self._time(lam.clamp(low, high)))

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """lam at the least time and at t = 1."""
        high, low = self(torch.tensor([self.least, 1.0], dtype=torch.float64)).lam.tolist()
        return high, low

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(f, g²) of the forward SDE dx = f·x dt + g dw at noisy times t, of t's shape, float64.

        f = d log alpha/dt ≤ 0 and g² = −2·sigma²·dlam/dt > 0 (Song et al. 2021, eq. 5; Kingma et al. 2021, section 2);
        infinite, and refused, where alpha = 0.
        """
        level = self(t)
        if bool(((level.t == 0) | (level.alpha == 0)).any()):
            raise BadArgument("schedule rates: got a time that is clean, or without signal (alpha = 0); need both")
        fall, slope = self._slopes(level.t)
        return fall, -2 * level.sigma**2 * slope

    def start(self, noise: Tensor, level: Level | None = None) -> Tensor:
        """The state x where sampling starts, made of unit normal noise of the same shape.

        Variance-preserving schedules start at N(0, I), as they are trained to end there; the others at sigma·noise.

        Args:
            noise: (B, C, *S).
            level: the first of the grid, which some spacings put below t = 1; the level of t = 1 by default.
        """
        return noise if self.preserving else (self(1.0) if level is None else level).sigma * noise

    def pick(self, u: Tensor) -> Tensor:
        """Training times from uniform numbers u in [0, 1), of the same shape: uniform over the noisy times."""
        return self.least + u.double() * (1 - self.least)

    def _slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d log alpha/dt, dlam/dt) at noisy times, the closed form differentiated."""
        with torch.enable_grad():
            at = t.detach().clone().requires_grad_()
            logs = [f.log() + 0 * at for f in self._noisy(at)]  # 0·t, for alpha may be a constant
            fall, rise = (torch.autograd.grad(f.sum(), at, retain_graph=True)[0] for f in logs)
        return fall, fall - rise

    @abstractmethod
    def _noisy(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) for times in [least, 1]."""

    @abstractmethod
    def _time(self, lam: Tensor) -> Tensor:
        """The time in [least, 1] of a lam within the schedule's levels."""


def _pair(lam: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) with alpha² + sigma² = 1 from lam, accurate at both ends."""
    return torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()


class Table(Schedule):
    """DDPM's table: T betas, beta_k the variance added by the k-th step of the chain.

    abar_k = prod_{j≤k} (1 − beta_j), alpha = √abar, sigma = √(1 − abar) at t_k = k/T. Between two entries log-SNR is
    linear in t; in the last interval of a table with zero terminal SNR, whose end has log-SNR −∞, alpha/sigma is.

    Args:
        betas: (T,) numbers in (0, 1); the last may be 1 (zero terminal SNR).
        zero_terminal: shift and scale √abar so that it ends at exactly 0 (Lin et al. 2024, Algorithm 1).

    Raises:
        BadArgument: no betas, one outside its range, or so many that the signal underflows before the last.
    """

    def __init__(self, betas: Tensor, *, zero_terminal: bool = False) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) < 1:
            raise BadArgument(f"betas: got shape {tuple(betas.shape)}, need a list of at least one number")
        if zero_terminal and len(betas) < 2:
            raise BadArgument("betas: got 1 step, need at least 2 to rescale to zero terminal SNR")
        bad = ~((betas > 0) & (betas <= 1))
        bad[:-1] |= betas[:-1] == 1
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            raise BadArgument(f"betas[{k}]: got {float(betas[k]):g}, need a number in (0, 1) (the last may be 1)")
        self.steps = len(betas)
        log_abar = torch.log1p(-betas).cumsum(0)
        if zero_terminal:
            root = (0.5 * log_abar).exp()
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            log_abar = 2 * root.log()
        lam = 0.5 * (log_abar - torch.log(-torch.expm1(log_abar)))
        lost = _pair(lam[:-1])[0] == 0
        if bool(lost.any()):
            k = int(lost.nonzero()[0])
            raise BadArgument(
                f"betas: no signal is left in float64 after {k + 1} of {len(betas)} steps; try smaller ones"
            )
        self._lam = torch.cat([lam[:1], lam])  # index k is time k/T; index 0 is never read as noisy

    @property
    def betas(self) -> Tensor:
        """(T,) the variance of each step of the chain, 1 − abar_k/abar_{k−1}."""
        abar = torch.sigmoid(2 * self._lam[1:])
        return 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])

    def pick(self, u: Tensor) -> Tensor:
        """Training times from uniform numbers u in [0, 1): uniform over the T entries."""
        return ((u.double() * self.steps).floor().clamp(max=self.steps - 1) + 1) / self.steps

    def _noisy(self, t: Tensor) -> tuple[Tensor, Tensor]:
        k = t * self.steps
        k = torch.where((k - k.round()).abs() < 1e-9, k.round(), k)
        low = k.floor().clamp(1, self.steps).long()
        high = k.ceil().clamp(1, self.steps).long()
        part, a, b = k - low, self._lam[low], self._lam[high]
        lam = torch.where(high == low, a, a + part * (b - a))
        if self._lam[-1] == -math.inf:
            to_zero = (high == self.steps) & (high > low)
            lam = torch.where(to_zero, a + torch.log1p(-part), lam)
        return _pair(lam)

    def _slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the interval that ends at t or holds it; at the first entry, of the interval above."""
        if self.steps == 1:
            raise BadArgument("schedule rates: a table of 1 step has no slope; try one of more steps")
        k = (t * self.steps - 1e-9).ceil().clamp(2, self.steps).long()
        rise = self._lam[k] - self._lam[k - 1]
        slope = self.steps * torch.where(rise == -math.inf, -1 / (k - t * self.steps), rise)  # or alpha/sigma is linear
        return self(t).sigma ** 2 * slope, slope

    def _time(self, lam: Tensor) -> Tensor:
        table = self._lam[1:]
        high = torch.searchsorted(-table, -lam).clamp(1, max(1, self.steps - 1))
        if self.steps == 1:
            return torch.ones_like(lam)
        a, b = table[high - 1], table[high]
        part = torch.where(b == -math.inf, -torch.expm1(lam - a), (lam - a) / (b - a))
        return (high + part.clamp(0, 1)) / self.steps


class _VP(Schedule):
    """The continuous variance-preserving SDE."""

    def __init__(self, beta_min: float, beta_max: float) -> None:
        self.beta_min, self.beta_max = beta_min, beta_max

    def _noisy(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_abar = -0.5 * t**2 * (self.beta_max - self.beta_min) - t * self.beta_min
        return (0.5 * log_abar).exp(), (-torch.expm1(log_abar)).sqrt()

    def _time(self, lam: Tensor) -> Tensor:
        loss = torch.nn.functional.softplus(-2 * lam)  # −log abar
        root: Tensor = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * loss).sqrt()
        return 2 * loss / (self.beta_min + root)


class _Cosine(Schedule):
    """The continuous cosine schedule."""

    def __init__(self, lam_end: float) -> None:
        self.angle = math.pi / 2 - math.atan(math.exp(lam_end))

    def _noisy(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rest = math.pi / 2 - self.angle * t  # sin of the rest is exactly 0 at the end of a zero-terminal schedule
        return torch.sin(rest), torch.cos(rest)

    def _time(self, lam: Tensor) -> Tensor:
        return (math.pi / 2 - torch.atan(lam.exp())) / self.angle


class _EDM(Schedule):
    """Karras et al.'s variance-exploding schedule."""

    preserving = False

    def __init__(self, rho_min: float, rho_max: float, power: float) -> None:
        self.power = power
        self.low, self.high = rho_min ** (1 / power), rho_max ** (1 / power)

    def _noisy(self, t: Tensor) -> tuple[Tensor, Tensor]:
        part = (t - self.least) / (1 - self.least)
        return torch.ones_like(t), (self.low + part * (self.high - self.low)) ** self.power

    def _time(self, lam: Tensor) -> Tensor:
        part: Tensor = ((-lam / self.power).exp() - self.low) / (self.high - self.low)
        return self.least + part * (1 - self.least)


class _Flow(Schedule):
    """The straight path of flow matching."""

    preserving = False

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def _noisy(self, t: Tensor) -> tuple[Tensor, Tensor]:
        below = 1 + (self.shift - 1) * t
        return (1 - t) / below, self.shift * t / below

    def _time(self, lam: Tensor) -> Tensor:
        sigma = torch.sigmoid(-lam)
        return sigma / (self.shift - (self.shift - 1) * sigma)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise BadArgument(f"schedule steps: got {steps}, need at least 1; try 1000")


def _ends(first: float, last: float, steps: int, rescale: bool) -> tuple[float, float]:
    """The ends of a beta ramp, checked, and scaled by 1000/T if asked."""
    _check_steps(steps)
    factor = CONTINUOUS_STEPS / steps if rescale else 1.0
    if not 0 < first * factor <= last * factor < 1:
        scaled = f" (times {factor:g})" if rescale else ""
        raise BadArgument(f"betas: got first={first:g}, last={last:g}{scaled}, need 0 < first <= last < 1")
    return first * factor, last * factor


def linear(
    *, steps: int = 1000, first: float = 1e-4, last: float = 0.02, rescale: bool = False, zero_terminal: bool = False
) -> Table:
    """DDPM's table: beta rises linearly from `first` to `last` (Ho et al. 2020, section 4).

    With `rescale`, both ends are multiplied by 1000/steps, which keeps the end at noise for other T
    (Nichol & Dhariwal 2021, improved-diffusion's "linear").
    """
    first, last = _ends(first, last, steps, rescale)
    return Table(torch.linspace(first, last, steps, dtype=torch.float64), zero_terminal=zero_terminal)


def _root_linear(steps: int, first: float, last: float) -> Tensor:
    return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2


def scaled_linear(
    *, steps: int = 1000, first: float = 8.5e-4, last: float = 0.012, rescale: bool = False, zero_terminal: bool = False
) -> Table:
    """Latent diffusion's table: √beta rises linearly (Rombach et al. 2022, Stable Diffusion's ends)."""
    first, last = _ends(first, last, steps, rescale)
    return Table(_root_linear(steps, first, last), zero_terminal=zero_terminal)


def quadratic(
    *, steps: int = 1000, first: float = 1e-4, last: float = 0.02, rescale: bool = False, zero_terminal: bool = False
) -> Table:
    """DDPM's "quad" table: √beta rises linearly between DDPM's ends (Ho et al. 2020, their code)."""
    first, last = _ends(first, last, steps, rescale)
    return Table(_root_linear(steps, first, last), zero_terminal=zero_terminal)


def sigmoid(
    *, steps: int = 1000, first: float = 1e-4, last: float = 0.02, rescale: bool = False, zero_terminal: bool = False
) -> Table:
    """A sigmoid ramp of betas over [−6, 6] between `first` and `last` (Xu et al. 2022, GeoDiff)."""
    first, last = _ends(first, last, steps, rescale)
    ramp = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64))
    return Table(ramp * (last - first) + first, zero_terminal=zero_terminal)


def cosine(*, steps: int = 1000, offset: float = 0.008, clip: float = 0.999, zero_terminal: bool = False) -> Table:
    """The cosine table: abar(t) = cos²((t + s)/(1 + s)·π/2), betas clipped (Nichol & Dhariwal 2021, eq. 17)."""
    _check_steps(steps)
    if not 0 < clip < 1:
        raise BadArgument(f"cosine clip: got {clip:g}, need a number in (0, 1); try 0.999")
    if offset < 0:
        raise BadArgument(f"cosine offset: got {offset:g}, need at least 0; try 0.008")
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return Table((1 - abar[1:] / abar[:-1]).clamp(max=clip), zero_terminal=zero_terminal)


def table(*, betas: tuple[float, ...], zero_terminal: bool = False) -> Table:
    """Any table of your own betas."""
    return Table(torch.tensor(betas, dtype=torch.float64), zero_terminal=zero_terminal)


def vp(*, beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """Continuous VP: log alpha = −t²·(beta_max − beta_min)/4 − t·beta_min/2 (Song et al. 2021, appendix C)."""
    if not 0 < beta_min <= beta_max < math.inf:
        raise BadArgument(f"vp betas: got {beta_min:g}, {beta_max:g}, need 0 < beta_min <= beta_max, both finite")
    return _VP(beta_min, beta_max)


def continuous_cosine(*, lam_end: float = -7.5) -> Schedule:
    """Continuous cosine: alpha = cos(θ·t), sigma = sin(θ·t), with log(alpha/sigma) = lam_end at t = 1.

    θ = π/2 − atan(e^lam_end); lam_end = −inf gives θ = π/2, zero terminal SNR. See Kingma et al. 2021 and
    Hoogeboom et al. 2023 (whose log-SNR of −15 is lam_end = −7.5).
    """
    if not lam_end < 0:
        raise BadArgument(f"continuous_cosine lam_end: got {lam_end:g}, need a negative number; try -7.5")
    return _Cosine(lam_end)


def edm(*, rho_min: float = 0.002, rho_max: float = 80.0, power: float = 7.0) -> Schedule:
    """EDM (variance exploding): alpha = 1, sigma^{1/power} linear from rho_min to rho_max (Karras et al. 2022, eq. 5).

    Time runs so that n equally spaced times from 1 to 1/T, then clean, are exactly their n-step grid (grids: karras).
    """
    if not (0 < rho_min < rho_max < math.inf and 0 < power < math.inf):
        raise BadArgument(
            f"edm: got rho {rho_min:g}..{rho_max:g}, power {power:g}; need 0 < rho_min < rho_max, power > 0, all finite"
        )
    return _EDM(rho_min, rho_max, power)


def flow(*, shift: float = 1.0) -> Schedule:
    """Flow matching: alpha = 1 − s, sigma = s with s = shift·t/(1 + (shift − 1)·t) (Esser et al. 2024, eq. 23).

    shift = 1 is the straight path of Lipman et al. 2023; larger values spend more time at high noise, for large images.
    """
    if not 0 < shift < math.inf:
        raise BadArgument(f"flow shift: got {shift:g}, need a positive finite number; try 1.0, or 3.0 for large images")
    return _Flow(shift)
