"""Law 1: lam falls strictly, time_of inverts, closed forms match, and what lies outside is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from inkdrop.core.schedule import Schedule, Table
from inkdrop.errors import BadArgument
from inkdrop.find import Part, find, knobs, names
from specimens import OWN_BETAS, SCHEDULES, label, schedule_of

every_schedule = pytest.mark.parametrize("part", SCHEDULES, ids=label)


def entries(schedule: Schedule) -> torch.Tensor:
    """The times k/T of all T entries."""
    return torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps


# ---- lam -----------------------------------------------------------------------------------------------------


@every_schedule
def test_lam_falls_strictly_at_entries_and_between_them(part: Part) -> None:
    """Also through cosine's clipped entry: 1 − beta = 0.001 there still falls. What clipping breaks, and what is
    exempted below, is the closed form of abar."""
    schedule = schedule_of(part)
    times = torch.cat([torch.linspace(schedule.least, 1, 3001, dtype=torch.float64), entries(schedule)]).unique()
    assert bool((schedule(times).lam.diff() < 0).all())


@every_schedule
def test_the_clean_end_is_exact_and_preserving_means_what_it_says(part: Part) -> None:
    schedule = schedule_of(part)
    clean = schedule(0.0)
    assert (float(clean.alpha), float(clean.sigma), float(clean.lam)) == (1.0, 0.0, math.inf)
    assert clean.clean
    level = schedule(entries(schedule))
    off = (level.alpha**2 + level.sigma**2 - 1).abs().max()
    assert (float(off) < 1e-14) == schedule.preserving
    torch.testing.assert_close(level.rho, level.sigma / level.alpha, rtol=0, atol=0)
    torch.testing.assert_close(level.lam, torch.log(level.alpha) - torch.log(level.sigma), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(level.snr, (2 * level.lam).exp(), rtol=1e-12, atol=0)


@every_schedule
def test_time_of_inverts_at_entries_between_them_and_at_infinity(part: Part) -> None:
    """|d lam/dt| ≥ 1 everywhere and lam carries an error of 1e-16·(1 + |lam|), so 1e-12 is generous and tight."""
    schedule = schedule_of(part)
    between = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for times in (entries(schedule), schedule.least + between * (1 - schedule.least)):
        torch.testing.assert_close(schedule.time_of(schedule(times).lam), times, rtol=0, atol=1e-12)
    assert float(schedule.time_of(math.inf)) == 0.0
    assert float(schedule.time_of(schedule(1.0).lam)) == pytest.approx(1.0, abs=1e-14)


@every_schedule
def test_level_at_time_of_lam_has_that_lam(part: Part) -> None:
    schedule = schedule_of(part)
    high = float(schedule(schedule.least).lam)
    lam = torch.linspace(max(float(schedule(1.0).lam), -10.0), high, 1001, dtype=torch.float64)
    # near pure noise of a zero-terminal schedule lam ~ log(1 − t): one ulp of t·T is about 1e-15·e^10 = 2e-11 of lam
    exact = float(schedule(1.0).alpha) > 0
    torch.testing.assert_close(schedule(schedule.time_of(lam)).lam, lam, rtol=1e-12, atol=1e-12 if exact else 1e-9)


@every_schedule
def test_any_shape_of_time_gives_levels_of_that_shape_in_float64_on_the_cpu(part: Part) -> None:
    schedule = schedule_of(part)
    single, pair = schedule(1.0), schedule(torch.tensor([[1.0], [0.0]], dtype=torch.float32))
    assert single.alpha.shape == ()
    assert pair.sigma.shape == (2, 1)
    assert {f.dtype for f in (*single, *pair)} == {torch.float64}
    torch.testing.assert_close(pair.alpha[0, 0], single.alpha, rtol=0, atol=0)


# ---- closed forms, written out once more in numpy ------------------------------------------------------------


def ramp(steps: int, first: float, last: float) -> np.ndarray:
    return np.array([first + (last - first) * k / max(steps - 1, 1) for k in range(steps)])


def linear(steps: int = 1000, first: float = 1e-4, last: float = 0.02, rescale: bool = False) -> np.ndarray:
    return ramp(steps, first, last) * (1000 / steps if rescale else 1)


def rooted(steps: int, first: float, last: float) -> np.ndarray:
    return ramp(steps, math.sqrt(first), math.sqrt(last)) ** 2


def quadratic(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    return rooted(steps, first, last)


def scaled_linear(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> np.ndarray:
    return rooted(steps, first, last)


def sigmoid(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    return first + (last - first) / (1 + np.exp(-ramp(steps, -6, 6)))


def cosine(steps: int = 1000, offset: float = 0.008, clip: float = 0.999) -> np.ndarray:
    def f(t: float) -> float:
        return math.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2

    return np.array([min(1 - f((k + 1) / steps) / f(k / steps), clip) for k in range(steps)])


def own(betas: tuple[float, ...]) -> np.ndarray:
    return np.array(betas)


def abar_of(betas: np.ndarray, zero_terminal: bool = False) -> np.ndarray:
    """abar by products; with zero_terminal, Lin et al. 2024's Algorithm 1, line by line."""
    abar = np.cumprod(1.0 - betas)
    if zero_terminal:
        root = np.sqrt(abar)
        first, last = root[0], root[-1]
        root = root - last
        root = root * first / (first - last)
        abar = root**2
    return abar


def vp(t: np.ndarray, beta_min: float = 0.1, beta_max: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """The integral of beta(s) = beta_min + s·(beta_max − beta_min) by numerical quadrature."""
    total = np.array([quad(lambda s: beta_min + s * (beta_max - beta_min), 0, end, epsabs=1e-14)[0] for end in t])
    return np.exp(-total / 2), np.sqrt(1 - np.exp(-total))


def continuous_cosine(t: np.ndarray, lam_end: float = -7.5) -> tuple[np.ndarray, np.ndarray]:
    """Hoogeboom et al. 2023: logSNR(t) = −2·log tan(π·t/2), with t stretched so that t = 1 has 2·lam_end."""
    stretched = t * 2 / math.pi * math.atan(math.exp(-lam_end))
    tan = np.tan(math.pi * stretched / 2)
    return 1 / np.sqrt(1 + tan**2), tan / np.sqrt(1 + tan**2)


def edm(t: np.ndarray, rho_min: float = 0.002, rho_max: float = 80.0, power: float = 7.0) -> Any:
    """Karras et al. 2022, eq. 5, with N = 1000: entry i is at t = 1 − i/N."""
    i = 1000 * (1 - t)
    root = rho_max ** (1 / power) + i / 999 * (rho_min ** (1 / power) - rho_max ** (1 / power))
    return np.ones_like(t), root**power


def flow(t: np.ndarray, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Shifting divides alpha/sigma of the straight path by `shift`."""
    odds = np.divide(1 - t, shift * t)
    return odds / (1 + odds), 1 / (1 + odds)


TABLES: dict[str, Callable[..., np.ndarray]] = {
    "cosine": cosine,
    "linear": linear,
    "quadratic": quadratic,
    "scaled_linear": scaled_linear,
    "sigmoid": sigmoid,
    "table": own,
}
CONTINUOUS: dict[str, Callable[..., Any]] = {
    "continuous_cosine": continuous_cosine,
    "edm": edm,
    "flow": flow,
    "vp": vp,
}


def test_every_schedule_has_its_formula_written_out_here() -> None:
    assert sorted([*TABLES, *CONTINUOUS]) == names("schedules"), "write the new schedule's formula into this file"


@pytest.mark.parametrize("part", [p for p in SCHEDULES if p.name in TABLES], ids=label)
def test_tables_match_their_formula(part: Part) -> None:
    """At every entry. sigma² = 1 − abar by subtraction is good to 1e-16/1e-4; hence 1e-11 for both."""
    plain = {name: value for name, value in part.knobs.items() if name != "zero_terminal"}
    betas = TABLES[part.name](**plain)
    abar = abar_of(betas, part.knobs.get("zero_terminal", False))
    schedule = schedule_of(part)
    assert isinstance(schedule, Table)
    level = schedule(entries(schedule))
    np.testing.assert_allclose(level.alpha.numpy(), np.sqrt(abar), rtol=1e-11, atol=0)
    np.testing.assert_allclose(level.sigma.numpy(), np.sqrt(1 - abar), rtol=1e-11, atol=0)
    np.testing.assert_allclose(schedule.betas.numpy(), 1 - abar / np.append(1.0, abar[:-1]), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("part", [p for p in SCHEDULES if p.name in CONTINUOUS], ids=label)
def test_continuous_schedules_match_their_formula(part: Part) -> None:
    schedule = schedule_of(part)
    t = np.linspace(schedule.least, 1, 333)
    t = t[:-1] if schedule(1.0).alpha == 0 else t  # the exact end has a test of its own
    alpha, sigma = CONTINUOUS[part.name](t, **part.knobs)
    level = schedule(torch.from_numpy(t))
    np.testing.assert_allclose(level.alpha.numpy(), alpha, rtol=2e-11, atol=0)
    np.testing.assert_allclose(level.sigma.numpy(), sigma, rtol=2e-11, atol=0)


def test_numbers_of_the_papers() -> None:
    """DDPM's abar_T = 4.04e-5; Stable Diffusion's 0.9991 and 0.00466; Lin et al.'s table 1 of SNR(T); cosine's T."""
    assert float(schedule_of("linear")(1.0).alpha) ** 2 == pytest.approx(4.0358e-5, rel=1e-4)
    stable = schedule_of("scaled_linear")
    assert float(stable(0.001).alpha) ** 2 == pytest.approx(0.99915, abs=1e-12)
    assert float(stable(1.0).snr) == pytest.approx(0.004682, rel=1e-3)  # Lin et al. 2024, table 1: 0.004682
    assert float(stable(1.0).alpha) == pytest.approx(0.068265, rel=1e-4)  # the same table
    assert float(schedule_of("linear")(1.0).snr) == pytest.approx(4.036e-5, rel=1e-3)
    assert float(schedule_of("cosine")(1.0).snr) == pytest.approx(2.428e-9, rel=1e-3)
    assert float(schedule_of("continuous_cosine")(1.0).lam) == pytest.approx(-7.5, abs=1e-11)


def test_cosine_is_its_closed_form_wherever_it_is_not_clipped() -> None:
    """abar(k/T) = f(k/T)/f(0) holds at entry k as long as no beta up to k was clipped; at T = 1000 only the last is."""
    schedule = schedule_of("cosine")
    t = np.arange(1, 1001) / 1000
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    got = schedule(torch.from_numpy(t)).alpha.numpy() ** 2
    np.testing.assert_allclose(got[:-1], f[:-1], rtol=1e-9)
    assert int((schedule.betas >= 0.999 * (1 - 1e-9)).sum()) == 1
    assert float(schedule.betas[-1]) == pytest.approx(0.999, rel=1e-9)


def test_between_entries_log_snr_is_linear_in_time() -> None:
    for part in (Part("linear"), Part("table", {"betas": OWN_BETAS})):
        schedule = schedule_of(part)
        t = np.random.default_rng(0).uniform(schedule.least, 1, 500)
        knots = entries(schedule)
        expected = np.interp(t, knots.numpy(), schedule(knots).lam.numpy())
        np.testing.assert_allclose(schedule(torch.from_numpy(t)).lam.numpy(), expected, rtol=1e-10, atol=1e-11)


def test_in_the_last_interval_of_a_zero_terminal_table_rho_inverse_is_linear() -> None:
    schedule = schedule_of(Part("linear", {"zero_terminal": True}))
    a = float(1 / schedule(0.999).rho)
    for part in (0.25, 0.5, 0.9):
        assert float(1 / schedule(0.999 + part / 1000).rho) == pytest.approx(a * (1 - part), rel=1e-9)


HAVE_ZERO = [
    p for p in SCHEDULES if p.knobs.get("zero_terminal") or p.name == "flow" or 1.0 in p.knobs.get("betas", ())
]
HAVE_ZERO += [p for p in SCHEDULES if p.knobs.get("lam_end") == -math.inf]


@pytest.mark.parametrize("part", HAVE_ZERO, ids=label)
def test_zero_terminal_snr_is_exactly_zero(part: Part) -> None:
    end = schedule_of(part)(1.0)
    assert float(end.alpha) == 0.0
    assert float(end.sigma) == pytest.approx(1.0, abs=1e-15)
    assert float(end.snr) == 0.0
    assert float(end.lam) == -math.inf


def test_rescaling_keeps_the_first_entry_and_the_end_of_a_rescaled_ramp_stays_noise() -> None:
    """Lin et al.'s algorithm keeps √abar_1; improved-diffusion's factor 1000/T keeps SNR(T) of one order for any T."""
    for name in ("linear", "cosine", "scaled_linear"):
        plain, zero = schedule_of(name), schedule_of(Part(name, {"zero_terminal": True}))
        torch.testing.assert_close(zero(zero.least).alpha, plain(plain.least).alpha, rtol=1e-13, atol=0)
    ends = [float(schedule_of(Part("linear", {"steps": n, "rescale": True}))(1.0).lam) for n in (100, 250, 1000)]
    assert max(ends) - min(ends) < 0.6
    assert float(schedule_of(Part("linear", {"steps": 100}))(1.0).lam) > -0.5  # without it most of the signal is left


def test_shift_moves_log_snr_by_a_constant() -> None:
    """Esser et al. 2024, eq. 23: half log-SNR falls by log(shift) at every time."""
    t = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    gap = schedule_of("flow")(t).lam - schedule_of(Part("flow", {"shift": 3.0}))(t).lam
    torch.testing.assert_close(gap, torch.full_like(t, math.log(3.0)), rtol=1e-12, atol=1e-12)


# ---- start and training times --------------------------------------------------------------------------------


@every_schedule
def test_training_times_fill_the_domain_uniformly(part: Part) -> None:
    """u = (i + 1/2)/n must reach every entry of a table equally often, and a continuous schedule's whole range."""
    schedule = schedule_of(part)
    n = 20 * schedule.steps
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    times = schedule.pick(u)
    schedule(times)  # refuses times outside its domain
    if isinstance(schedule, Table):
        found, counts = times.unique(return_counts=True)
        torch.testing.assert_close(found, entries(schedule), rtol=0, atol=1e-15)
        assert set(counts.tolist()) == {20}
    else:
        assert bool((times.diff() > 0).all())
        torch.testing.assert_close(times.diff(), torch.full_like(u[1:], (1 - schedule.least) / n), rtol=1e-9, atol=0)
    ends = schedule.pick(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([schedule.least, 1.0], dtype=torch.float64), rtol=0, atol=1e-15)


@every_schedule
def test_start_is_what_the_forward_process_ends_in(part: Part) -> None:
    """Unit noise for variance-preserving schedules, sigma(1)·noise for the others."""
    schedule = schedule_of(part)
    noise = torch.linspace(-2, 2, 5)
    want = noise if schedule.preserving else float(schedule(1.0).sigma) * noise
    torch.testing.assert_close(schedule.start(noise), want)
    level = schedule(1.0 if schedule.steps == 1 else 0.5)  # where a spacing starts that leaves the end out
    part_way = noise if schedule.preserving else float(level.sigma) * noise
    torch.testing.assert_close(schedule.start(noise, level), part_way)
    assert schedule.start(noise).dtype == torch.float32


# ---- refusals ------------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, math.inf])
def test_times_outside_the_domain_are_refused(part: Part, bad: float) -> None:
    with pytest.raises(BadArgument, match="schedule time: got"):
        schedule_of(part)(bad)


@every_schedule
def test_there_is_no_level_between_clean_and_the_least_time(part: Part) -> None:
    schedule = schedule_of(part)
    with pytest.raises(BadArgument, match="need 0 or a number in"):
        schedule(schedule.least / 2)
    with pytest.raises(BadArgument, match="half log-SNR: got"):
        schedule.time_of(float(schedule(schedule.least).lam) + 0.1)
    end = float(schedule(1.0).lam)
    if end > -math.inf:
        with pytest.raises(BadArgument, match="half log-SNR: got"):
            schedule.time_of(end - 0.1)
    with pytest.raises(BadArgument, match="half log-SNR: got nan"):
        schedule.time_of(math.nan)


@pytest.mark.parametrize("name", [n for n in names("schedules") if "steps" in knobs(find("schedules", n))])
def test_tables_of_no_steps_are_refused(name: str) -> None:
    with pytest.raises(BadArgument, match="schedule steps: got 0, need at least 1"):
        schedule_of(Part(name, {"steps": 0}))
