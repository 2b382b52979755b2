"""The denoiser, the clocks and scales that it tells its net, foreign nets, and the loop between samplers and nets."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inkdrop.core.ask import Ask, Belief, Sampling
from inkdrop.core.cond import Cond
from inkdrop.core.level import Level
from inkdrop.core.noise import Keyed
from inkdrop.core.oracle import Gaussian
from inkdrop.denoiser import Denoiser, wrap
from inkdrop.drive import answer, drive, watch
from inkdrop.errors import BadArgument, BadShape, Cancelled, Diverged
from inkdrop.find import Part, build, find, names
from inkdrop.samplers.ddim import ddim
from specimens import TARGETS, normals, schedule_of, target_of


class Waves(nn.Module):
    """A small smooth net of x and time, with a parameter, so that its answers differ at every pixel."""

    def __init__(self, out: int = 1, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=dtype))
        self.out = out
        self.heard: list[tuple[Tensor, Tensor, Cond | None]] = []

    def forward(self, x: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
        self.heard.append((x, clock, cond))
        time = clock.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        y = torch.sin(self.gain * x + 0.001 * time)
        return torch.cat([y] * self.out, dim=1)


# ---- what a net says becomes a belief ------------------------------------------------------------------------

# x0 of each target in the words of its paper, from x and y at (a, s) = (alpha, sigma).
INVERSES: dict[str, Callable[..., Tensor]] = {
    "eps": lambda x, y, a, s: (x - s * y) / a,
    "x0": lambda x, y, a, s: y,
    "v": lambda x, y, a, s: (a * x - s * y) / (a**2 + s**2),
    "score": lambda x, y, a, s: (x + s**2 * y) / a,
    "flow": lambda x, y, a, s: (x - s * y) / (a + s),
    "edm": lambda x, y, a, s: (0.25 * a * x + 0.5 * s * (s**2 + 0.25 * a**2) ** 0.5 * y) / (s**2 + 0.25 * a**2),
}


@pytest.mark.parametrize("name", INVERSES)
@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
def test_the_folded_coefficients_are_the_papers_inverse(schedule: str, name: str) -> None:
    """x0 from the net's own answer, and the eps that completes x = alpha·x0 + sigma·eps."""
    built = schedule_of(schedule)
    if schedule == "flow" and name in ("eps", "score"):
        return
    net = Waves()
    denoiser = Denoiser(net, built, target_of(name, built))
    for t in (0.01, 0.4, 0.97):
        level = built(t)
        x = normals(3, 1, 4, seed=1)
        belief = denoiser(Ask(x, level))
        y = net(x, torch.full((3,), t * 1000 - 1).float(), None)
        a, s = float(level.alpha), float(level.sigma)
        torch.testing.assert_close(belief.x0, INVERSES[name](x, y, a, s), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a * belief.x0 + s * belief.eps, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TARGETS)
def test_levels_of_rows_give_what_one_level_gives(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, in the state's dtype: float64 levels a row never promote a float32 state."""
    schedule = schedule_of("vp")
    denoiser = Denoiser(Waves(), schedule, target_of(name, schedule))
    times = torch.tensor([0.05, 0.5, 0.5, 1.0], dtype=torch.float64)
    x = normals(4, 1, 3, seed=2, dtype=dtype)
    whole = denoiser(Ask(x, schedule(times)))
    assert {whole.x0.dtype, whole.eps.dtype} == {dtype}
    for i, t in enumerate(times.tolist()):
        alone = denoiser(Ask(x[i : i + 1], schedule(t)))
        assert torch.equal(alone.x0[0], whole.x0[i])
        assert torch.equal(alone.eps[0], whole.eps[i])


def test_float32_beliefs_are_float64_beliefs_rounded() -> None:
    """The coefficients are computed in float64 and cast once, so only x and y are rounded: 4 ulp of their terms."""
    schedule = schedule_of("linear")
    target = target_of("v", schedule)
    denoiser = Denoiser(Waves(), schedule, target)
    level = schedule(torch.tensor([0.001, 0.3, 1.0], dtype=torch.float64))
    x = normals(3, 1, 50, seed=3, dtype=torch.float32)
    single, double = denoiser(Ask(x, level)), denoiser(Ask(x.double(), level))
    torch.testing.assert_close(single.x0.double(), double.x0, rtol=0, atol=4 * 2**-24 * 4)
    torch.testing.assert_close(single.eps.double(), double.eps, rtol=0, atol=4 * 2**-24 * 4)


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float32, torch.float64])
def test_a_net_of_any_dtype_hears_its_own_and_the_state_keeps_its(inner: torch.dtype) -> None:
    schedule = schedule_of("linear")
    net = Waves(dtype=inner)
    x = normals(2, 1, 3, seed=4, dtype=torch.float32)
    belief = Denoiser(net, schedule, target_of("v", schedule))(Ask(x, schedule(0.5)))
    assert net.heard[0][0].dtype == inner
    assert net.heard[0][1].dtype == torch.float32
    assert belief.x0.dtype == torch.float32


def test_a_second_half_of_channels_is_the_learned_variance() -> None:
    """Raw in [-1, 1] becomes the fraction (raw + 1)/2 (Nichol & Dhariwal 2021, their code)."""
    schedule = schedule_of("linear")
    x = normals(2, 3, 2, 2, seed=5)
    belief = Denoiser(Waves(2), schedule, target_of("eps", schedule))(Ask(x, schedule(0.5)))
    plain = Denoiser(Waves(1), schedule, target_of("eps", schedule))(Ask(x, schedule(0.5)))
    raw = torch.sin(0.7 * x + 0.499)
    torch.testing.assert_close(belief.var_frac, (raw + 1) / 2, rtol=1e-6, atol=1e-6)  # the clock is float32
    assert torch.equal(belief.x0, plain.x0)
    assert plain.var_frac is None


# ---- clocks and scales ---------------------------------------------------------------------------------------

CLOCKS: dict[str, Callable[[Level], Tensor]] = {
    "lam": lambda level: torch.log(level.sigma / level.alpha) / 4,  # EDM's c_noise = ln(sigma)/4
    "sigma": lambda level: level.sigma * 1000,
    "table": lambda level: level.t * 1000 - 1,
    "time": lambda level: level.t * 1000,
}
SCALES: dict[str, Callable[[Level], Tensor]] = {
    "edm": lambda level: 1 / (level.sigma**2 + level.alpha**2 / 4).sqrt(),
    "unit": lambda level: level.alpha**0,
}


def test_every_clock_and_scale_is_written_out_here() -> None:
    assert (sorted(CLOCKS), sorted(SCALES)) == (names("clocks"), names("scales"))


@pytest.mark.parametrize(("room", "name"), [("clocks", n) for n in CLOCKS] + [("scales", n) for n in SCALES])
def test_clocks_and_scales_match_their_formula(room: str, name: str) -> None:
    for schedule in ("vp", "edm"):
        level = schedule_of(schedule)(torch.tensor([0.001, 0.3, 1.0], dtype=torch.float64))
        want = (CLOCKS if room == "clocks" else SCALES)[name](level)
        torch.testing.assert_close(find(room, name)(level), want, rtol=1e-12, atol=1e-12)


def test_the_net_of_a_table_hears_whole_timesteps() -> None:
    """0..T−1, exact in float32, for each entry of T = 1000 and of T = 100."""
    for part in (Part("linear"), Part("linear", {"steps": 100, "rescale": True})):
        schedule = schedule_of(part)
        net = Waves()
        n = schedule.steps
        level = schedule(torch.arange(1, n + 1, dtype=torch.float64) / n)
        Denoiser(net, schedule, target_of("eps", schedule))(Ask(normals(n, 1), level))
        assert net.heard[0][1].tolist() == list(range(n))


def test_edm_in_full_is_karras_equation_7() -> None:
    """D(x; sigma) = c_skip·x + c_out·F(c_in·x; c_noise), all four of table 1, over the whole range of sigma."""
    schedule = schedule_of("edm")
    net = Waves()
    denoiser = Denoiser(net, schedule, target_of("edm", schedule), find("clocks", "lam"), find("scales", "edm"))
    level = schedule(torch.tensor([0.001, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    x = normals(5, 1, 6, seed=6) * level.sigma.reshape(5, 1, 1)
    s, sd = level.sigma.reshape(5, 1, 1), 0.5
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
    c_in, c_noise = 1 / (s**2 + sd**2).sqrt(), s.log().flatten() / 4
    want = c_skip * x + c_out * net(c_in * x, c_noise.float(), None)
    torch.testing.assert_close(denoiser(Ask(x, level)).x0, want, rtol=1e-10, atol=1e-10)
    scaled = net.heard[-1][0]
    torch.testing.assert_close(scaled, c_in * x, rtol=1e-12, atol=1e-12)


# ---- pull ----------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """y = W·x for rows of D numbers."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
        return x @ self.matrix.T


@pytest.mark.parametrize("name", ["eps", "x0", "v", "flow"])
def test_pull_is_the_transposed_jacobian_of_x0(name: str) -> None:
    """x0 = a·x + b·W·x, so pull(g) = a·g + b·Wᵀ·g; each g anew, for rows of different level, under no_grad too."""
    schedule = schedule_of("vp")
    matrix = normals(3, 3, seed=7)
    denoiser = Denoiser(Linear(matrix), schedule, target_of(name, schedule))
    level = schedule(torch.tensor([0.2, 0.9], dtype=torch.float64))
    x = normals(2, 3, seed=8)
    with torch.no_grad():
        belief = denoiser(Ask(x, level, pull=True))
    plain = denoiser(Ask(x, level))
    a, s = level.alpha[:, None], level.sigma[:, None]
    for seed in (9, 10):
        g = normals(2, 3, seed=seed)
        want = INVERSES[name](
            g, g @ matrix, a, s
        )  # x0 is linear in (x, y), so its transpose is the same map of (g, Wᵀg)
        torch.testing.assert_close(belief.pull(g), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(belief.x0, plain.x0.detach(), rtol=0, atol=0)
    assert not belief.x0.requires_grad
    assert plain.pull is None


def test_pull_of_a_curved_net_is_its_derivative() -> None:
    """v-prediction with y = sin(0.7·x + c): d x0/d x = alpha − sigma·0.7·cos(0.7·x + c), elementwise."""
    schedule = schedule_of("linear")
    denoiser = Denoiser(Waves(), schedule, target_of("v", schedule))
    x, level = normals(2, 1, 3, seed=11), schedule(0.5)
    want = level.alpha - level.sigma * 0.7 * torch.cos(0.7 * x + 0.499)
    got = denoiser(Ask(x, level, pull=True)).pull(torch.ones_like(x))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # the clock 499 is exact, 0.001 in float32 is not


# ---- refusals ------------------------------------------------------------------------------------------------


def test_questions_without_an_answer_are_refused() -> None:
    schedule = schedule_of("linear")
    denoiser = Denoiser(Waves(), schedule, target_of("v", schedule))
    x = normals(2, 1, 3)
    with pytest.raises(BadArgument, match=r"ask: got the clean level \(sigma = 0\)"):
        denoiser(Ask(x, schedule(0.0)))
    with pytest.raises(BadArgument, match="clean level"):
        denoiser(Ask(x, schedule(torch.tensor([0.5, 0.0]))))
    with pytest.raises(BadArgument, match="got a second level `to`, but this denoiser is not a flow map"):
        denoiser(Ask(x, schedule(0.5), to=schedule(0.1)))
    three = Denoiser(Waves(3), schedule, target_of("v", schedule))
    with pytest.raises(BadShape, match=r"net: got an answer of shape \(2, 3, 3\) for x of \(2, 1, 3\), need C or 2C"):
        three(Ask(x, schedule(0.5)))


# ---- anyone's network ----------------------------------------------------------------------------------------


def test_wrap_calls_nets_of_two_and_three_arguments_and_unpacks_sample() -> None:
    schedule = schedule_of("linear")
    target = target_of("eps", schedule)
    x, level, cond = normals(2, 1, 3, seed=12), schedule(0.5), Cond(label=torch.tensor([3, 4]))
    heard: list[Any] = []

    def two(x: Tensor, t: Tensor) -> Tensor:
        heard.append(t.tolist())
        return 0.1 * x

    def three(x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        heard.append(cond)
        return 0.1 * x

    def diffusers_like(sample: Tensor, timestep: Tensor, encoder_hidden_states: Any = None, more: int = 0) -> Any:
        return SimpleNamespace(sample=0.1 * sample)

    def star(*args: Any) -> Tensor:
        heard.append(len(args))
        return 0.1 * args[0]

    class Module(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.1 * x

    want = (x - level.sigma * 0.1 * x) / level.alpha
    for net in (two, diffusers_like, star, Module(), lambda x, t: 0.1 * x):
        torch.testing.assert_close(wrap(net, schedule, target)(Ask(x, level)).x0, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(wrap(three, schedule, target)(Ask(x, level, cond)).x0, want, rtol=1e-13, atol=1e-13)
    assert heard == [[499.0, 499.0], 3, cond]
    with pytest.raises(BadArgument, match=r"the wrapped net takes only \(x, time\); wrap a net of three arguments"):
        wrap(two, schedule, target)(Ask(x, level, cond))
    with pytest.raises(BadArgument, match=r"wrap: the net takes 1 argument\(s\), need \(x, time\)"):
        wrap(lambda x: x, schedule, target)


def test_wrap_keeps_the_parameters_of_a_module() -> None:
    schedule = schedule_of("linear")
    net = Waves()
    assert list(wrap(net, schedule, target_of("eps", schedule)).parameters()) == list(net.parameters())


# ---- the loop ------------------------------------------------------------------------------------------------


def test_stacked_questions_are_answered_as_if_alone() -> None:
    """Different levels, row counts and conditions in one call of the net: every slice is the solo answer, pull too."""
    schedule = schedule_of("vp")
    net = Waves()
    denoiser = Denoiser(net, schedule, target_of("v", schedule))
    asks = [
        Ask(normals(n, 1, 3, seed=n), schedule(t), Cond(label=torch.arange(n)), pull=True)
        for n, t in ((1, 0.1), (3, 0.5), (2, 1.0))
    ]
    stacked = answer(asks, {"net": denoiser})
    assert [len(x) for x, *_ in net.heard] == [6]
    assert net.heard[0][2].label.tolist() == [0, 0, 1, 2, 0, 1]
    for ask, got in zip(asks, stacked, strict=True):
        [alone] = answer([ask], {"net": denoiser})
        g = normals(*ask.x.shape, seed=20)
        for a, b in ((got.x0, alone.x0), (got.eps, alone.eps), (got.pull(g), alone.pull(g))):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    with pytest.raises(BadArgument, match="ask of 'weak': this bundle has only net"):
        answer([asks[0]._replace(of="weak")], {"net": denoiser})
    with pytest.raises(BadArgument, match="only some of the stacked questions have a condition"):
        answer([asks[0], asks[1]._replace(cond=None)], {"net": denoiser})


def test_stacked_learned_variance_is_split_with_its_rows() -> None:
    schedule = schedule_of("vp")
    denoiser = Denoiser(Waves(2), schedule, target_of("v", schedule))
    asks = [Ask(normals(n, 1, 3, seed=n), schedule(t)) for n, t in ((2, 0.1), (1, 0.9))]
    for ask, got in zip(asks, answer(asks, {"net": denoiser}), strict=True):
        torch.testing.assert_close(got.var_frac, denoiser(ask).var_frac.detach(), rtol=1e-13, atol=1e-14)


ORACLE = Gaussian(torch.zeros(2, dtype=torch.float64), 0.5)


def test_watch_shows_each_question_its_answer_and_the_result() -> None:
    schedule = schedule_of("vp")
    grid = build("grids", Part("trailing"), schedule, 4)
    x = normals(3, 2, seed=13)
    seen = list(watch(ddim(x, grid, Keyed(0, range(3))), ORACLE))
    assert [float(step.level.t) for step in seen] == [float(level.t) for level in grid]
    assert torch.equal(seen[0].x, x)
    for step in seen[:-1]:
        assert torch.equal(step.x0, ORACLE(Ask(step.x, step.level)).x0)
    assert torch.equal(seen[-1].x0, drive(ddim(x, grid, Keyed(0, range(3))), ORACLE))
    assert torch.equal(seen[-1].x, seen[-1].x0)


def test_driving_can_be_cancelled_and_left_and_the_sampler_is_closed() -> None:
    schedule = schedule_of("vp")
    grid = build("grids", Part("trailing"), schedule, 4)
    closed = []

    def sampler() -> Sampling:
        try:
            return (yield from ddim(normals(1, 2), grid, Keyed(0, [0])))
        finally:
            closed.append(True)

    calls = []
    with pytest.raises(Cancelled, match="cancelled after 2 questions") as held:
        drive(sampler(), ORACLE, on_step=lambda step: calls.append(step) or len(calls) == 2)
    assert closed == [True], f"left open while {held.type} is held"
    for _ in watch(sampler(), ORACLE):
        break
    assert closed == [True, True]


def test_numbers_that_left_the_finite_are_reported() -> None:
    grid = build("grids", Part("trailing"), schedule_of("vp"), 2)

    def broken(ask: Ask) -> Belief:
        return Belief(ask.x * math.nan, ask.x)

    with pytest.raises(Diverged, match="the result of 2 questions is not finite"):
        drive(ddim(normals(1, 2), grid, Keyed(0, [0])), broken)


def test_nothing_is_recorded_for_gradients_while_driving() -> None:
    schedule = schedule_of("linear")
    denoiser = Denoiser(Waves(), schedule, target_of("v", schedule))
    grid = build("grids", Part("trailing"), schedule, 2)
    assert not drive(ddim(normals(1, 1, 2), grid, Keyed(0, [0])), denoiser).requires_grad
