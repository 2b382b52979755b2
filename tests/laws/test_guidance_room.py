"""Every guide of the room: about the same x, rows apart, an exact pull, other questions untouched, its own place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling
from inkdrop.core.cond import Cond
from inkdrop.core.level import Level
from inkdrop.core.noise import Keyed
from inkdrop.drive import answer, drive
from inkdrop.errors import BadArgument
from inkdrop.find import Part, build, names
from inkdrop.plan import Plan, check_guide, place_of, sampling
from specimens import label, normals, schedule_of

SHAPE = (2, 3, 2)
LABELS = torch.tensor([0, 2, 1, 2])
COND = Cond(label=LABELS)

# Each guide with the knobs that change its numbers.
GUIDES = [
    Part("clip", {"low": -0.5, "high": 0.75}),
    Part("threshold", {"percentile": 0.9, "bound": 0.5}),
    Part("threshold", {"percentile": 1.0, "bound": 0.3}),
    Part("drift", {"mean": (0.1, -0.2), "std": 0.3}),
    Part("drift", {"mean": 0.1, "slack": 0.05, "std": (0.2, 0.9), "scale": 0.5, "start": 0.9}),
    Part("drift", {"mean": (0.4,)}),
    Part("classifier"),
    Part("classifier", {"scale": 2.5, "shape": "linear", "start": 0.9}),
    Part("autoguidance"),
    Part("autoguidance", {"scale": 0.0, "start": 0.7}),
    Part("cfg", {"scale": 3.0}),
    Part("cfg", {"scale": 3.0, "rescale": 0.7}),
    Part("cfg", {"scale": 0.5, "negative": 1}),
    Part("cfg", {"scale": 4.0, "shape": "cosine", "start": 0.9, "stop": 0.2, "rescale": 1.0, "negative": 0}),
]
every_guide = pytest.mark.parametrize("part", GUIDES, ids=label)
ALL = [Part("clip"), Part("drift", {"mean": 0.1, "std": 0.6}), Part("classifier"), Part("autoguidance")]
ALL += [Part("cfg", {"scale": 2.0, "rescale": 0.5})]


class Net:
    """A smooth answerer of images: x0 = 1.5·tanh(W·x/(1 + sigma) + b[class]), its own W and b for each seed."""

    def __init__(self, seed: int) -> None:
        size = 12
        self.w, self.b = 0.4 * normals(size, size, seed=seed), normals(4, size, seed=seed + 50)
        self.asks: list[Ask] = []

    def x0(self, x: Tensor, ask: Ask) -> Tensor:
        rows = torch.where(ask.cond.null_rows("label"), 3, ask.cond.label)
        sigma = ask.level.over(x.double()).sigma
        scaled = (x.double() / (1 + sigma)).flatten(1) @ self.w
        return (1.5 * torch.tanh(scaled + self.b[rows])).view_as(x).to(x.dtype)

    def __call__(self, ask: Ask) -> Belief:
        self.asks.append(ask)
        level = ask.level.over(ask.x)
        with torch.enable_grad():
            x = ask.x.detach().requires_grad_()
            x0 = self.x0(x, ask)
        pull = (lambda g: torch.autograd.grad(x0, x, g, retain_graph=True)[0]) if ask.pull else None
        frac = ask.cond.label.double()[:, None, None, None].expand_as(ask.x)
        return Belief(x0.detach(), (ask.x - level.alpha * x0.detach()) / level.sigma, frac, pull)


def world() -> dict[str, Net]:
    return {"net": Net(0), "weak": Net(1), "classifier": Net(2), "decode": Net(3)}


def once(parts: Sequence[Part], ask: Ask, nets: dict[str, Net] | None = None) -> Belief:
    """What a sampler is told to one question, through these guides, the sampler's side first."""
    told: list[Belief] = []

    def sampler() -> Sampling:
        told.append((yield ask))
        return ask.x

    work = sampler()
    for part in parts:
        work = build("guide", part, work)
    drive(work, nets or world())
    return told[0]


def states(rows: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return normals(rows, *SHAPE, seed=7).to(dtype)


def test_every_guide_of_the_folder_is_here() -> None:
    assert {part.name for part in GUIDES} == set(names("guide"))


@every_guide
def test_it_does_something(part: Part) -> None:
    """Else the laws below are blind."""
    ask = Ask(states(), schedule_of("vp")(0.5), COND)
    assert not torch.allclose(once([part], ask).x0, world()["net"](ask).x0, rtol=0, atol=0.01)


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
@every_guide
def test_the_belief_is_about_the_x_that_was_asked(part: Part, schedule: str) -> None:
    """alpha·x0 + sigma·eps == x, to rounding: of x0 times alpha, or of eps times sigma, whichever is larger."""
    for t in (0.05, 0.5, 0.95):
        ask = Ask(states(), schedule_of(schedule)(t), COND)
        belief = once([part], ask)
        back = ask.level.alpha * belief.x0 + ask.level.sigma * belief.eps
        size = 1 + float((ask.level.alpha * belief.x0).abs().max())
        torch.testing.assert_close(back, ask.x, rtol=0, atol=1e-13 * size)


@every_guide
def test_the_sampler_asks_what_it_asked_and_its_state_is_not_touched(part: Part) -> None:
    nets, grid = world(), build("grids", Part("trailing"), schedule_of("vp"), 4)
    plan = Plan(sampler=Part("ddim"), guide=(part,))
    x, told = states(), list[tuple[Ask, Belief]]()
    before = x.clone()
    drive(sampling(plan, x, grid, Keyed(0, range(4)), COND, told), nets)
    assert torch.equal(x, before)
    assert [float(ask.level.t) for ask, _ in told] == [float(level.t) for level in grid][:-1]
    assert torch.equal(told[0][0].x, before)


@every_guide
def test_the_learned_variance_is_the_conditional_nets(part: Part) -> None:
    """The nets above say their label as var_frac; at w = 0 there is the weak net's alone, with the same label."""
    belief = once([part], Ask(states(), schedule_of("vp")(0.5), COND))
    assert torch.equal(belief.var_frac[:, 0, 0, 0], LABELS.double())


@every_guide
def test_a_row_does_not_depend_on_its_neighbours(part: Part) -> None:
    """Each row alone, at its own level; 1e-12 for products that a library may sum in another order."""
    schedule, x = schedule_of("vp"), states()
    times = torch.tensor([0.15, 0.5, 0.8, 1.0], dtype=torch.float64)
    whole = once([part], Ask(x, schedule(times), COND))
    for i in range(4):
        row = slice(i, i + 1)
        alone = once([part], Ask(x[row], schedule(float(times[i])), COND.take(row)))
        torch.testing.assert_close(whole.x0[row], alone.x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(whole.eps[row], alone.eps, rtol=1e-11, atol=1e-11)
    turned = once([part], Ask(x.flip(0), schedule(times.flip(0)), Cond(label=LABELS.flip(0))))
    torch.testing.assert_close(turned.x0, whole.x0.flip(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("guides", [[part] for part in GUIDES] + [ALL], ids=lambda g: "+".join(map(label, g)))
def test_the_pull_is_that_of_the_x0_it_comes_with(guides: list[Part]) -> None:
    """v·pull(g) == g·(x0(x + h·v) − x0(x − h·v))/2h, by central differences: error h² = 1e-10, kinks apart."""
    level, x = schedule_of("vp")(0.5), states()
    g, v, h = normals(4, *SHAPE, seed=8), normals(4, *SHAPE, seed=9), 1e-5
    pulled = once(guides, Ask(x, level, COND, pull=True))
    plain = once(guides, Ask(x, level, COND))
    torch.testing.assert_close(pulled.x0, plain.x0, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(pulled.eps, plain.eps, rtol=1e-12, atol=1e-12)
    assert plain.pull is None
    high, low = (once(guides, Ask(x + s * v, level, COND)).x0 for s in (h, -h))
    want = (g * (high - low) / (2 * h)).flatten(1).sum(1)
    torch.testing.assert_close((v * pulled.pull(g)).flatten(1).sum(1), want, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(pulled.pull(2 * g), 2 * pulled.pull(g), rtol=1e-12, atol=1e-12)  # and again


@every_guide
def test_single_precision_stays(part: Part) -> None:
    level = schedule_of("vp")(0.5)
    for at in (level, level.rows(4)):
        belief = once([part], Ask(states(dtype=torch.float32), at, COND, pull=True))
        assert belief.x0.dtype == belief.eps.dtype == belief.pull(belief.x0).dtype == torch.float32
        exact = once([part], Ask(states(), at, COND)).x0.float()
        torch.testing.assert_close(belief.x0, exact, rtol=1e-5, atol=3e-5)


@every_guide
def test_a_question_that_is_not_about_the_net_passes_through(part: Part) -> None:
    """The decoder of latents is asked last, about what is no noisy image: neither clipped nor guided."""
    ask = Ask(3 * states(), schedule_of("vp")(0.5), COND, of="decode")
    nets = world()
    belief = once([part], ask, nets)
    assert [len(net.asks) for net in nets.values()] == [0, 0, 0, 1]
    assert nets["decode"].asks[0] is ask
    assert torch.equal(belief.x0, Net(3)(ask).x0)


def test_stacked_questions_of_guided_samplings_are_answered_as_one() -> None:
    """What a batcher does: two samplings at different levels, guided differently, their questions in one call."""
    schedule, net = schedule_of("vp"), Net(0)

    def sampler(x: Tensor, level: Level, cond: Cond) -> Sampling:
        belief = yield Ask(x, level, cond)
        return belief.x0

    x, works = states(), []
    for rows, t, scale in ((slice(0, 1), 0.3, 3.0), (slice(1, 4), 0.9, 5.0)):
        part = Part("cfg", {"scale": scale, "rescale": 0.7})
        works.append(build("guide", part, sampler(x[rows], schedule(t), COND.take(rows))))
    beliefs = answer([next(work) for work in works], {"net": net})
    assert len(net.asks) == 1
    for work, belief, (rows, t, scale) in zip(
        works, beliefs, ((slice(0, 1), 0.3, 3.0), (slice(1, 4), 0.9, 5.0)), strict=True
    ):
        with pytest.raises(StopIteration) as end:
            work.send(belief)
        part = Part("cfg", {"scale": scale, "rescale": 0.7})
        want = once([part], Ask(x[rows], schedule(t), COND.take(rows))).x0
        torch.testing.assert_close(end.value.value, want, rtol=1e-12, atol=1e-12)


# ---- the order ---------------------------------------------------------------------------------------------------


def test_the_order_is_bounds_corrections_gradients_mixing() -> None:
    assert [[n for n in names("guide") if place_of(Part(n)) == place] for place in (10, 20, 30, 40, 50)] == [
        ["clip", "threshold"], ["drift"], ["classifier"], ["autoguidance"], ["cfg"],
    ]  # fmt: skip
    check_guide(ALL)


def test_all_of_them_together_are_their_formulas_in_that_order() -> None:
    """clip(drift(weak + w·(cfg(net) − weak) − s·(sigma/alpha)·eps of the classifier)), written out."""
    level, x, nets = schedule_of("vp")(0.5), states(), world()
    got = once(ALL, Ask(x, level, COND)).x0
    cond, null = (nets["net"](Ask(x, level, c)).x0 for c in (COND, COND.null()))
    weak, judge = (nets[n](Ask(x, level, COND)) for n in ("weak", "classifier"))
    mixed = null + 2 * (cond - null)
    deviations = [f.flatten(1).std(1)[:, None, None, None] for f in (cond, mixed)]
    mixed = mixed * (0.5 * deviations[0] / deviations[1] + 0.5)
    x0 = weak.x0 + 2 * (mixed - weak.x0) - level.sigma / level.alpha * judge.eps
    mean, std = (getattr(x0, f)(dim=(2, 3), keepdim=True, **k) for f, k in (("mean", {}), ("std", {"correction": 0})))
    torch.testing.assert_close(got, (0.6 * (x0 - mean) / std + 0.1).clamp(-1, 1), rtol=1e-11, atol=1e-11)
    assert float(got.max()) == 1


@pytest.mark.parametrize(
    ("guide", "said"),
    [
        (("cfg", "clip"), "guide: got cfg before clip, need clip, cfg (from the sampler outwards)"),
        (("clip", "cfg", "autoguidance"), "guide: got cfg before autoguidance, need clip, autoguidance, cfg"),
        (("drift", "threshold", "cfg"), "guide: got drift before threshold, need threshold, drift, cfg"),
        (("clip", "threshold"), "guide: clip and threshold do the same work; keep one of them"),
        (("clip", "cfg", "cfg"), "guide: cfg and cfg do the same work; keep one of them"),
    ],
)
def test_another_order_and_two_at_one_place_are_refused(guide: tuple[str, ...], said: str) -> None:
    plan, grid = Plan(guide=tuple(map(Part, guide))), build("grids", Part("trailing"), schedule_of("vp"), 2)
    with pytest.raises(BadArgument) as caught:
        sampling(plan, states(), grid, Keyed(0, range(4)), COND)
    assert str(caught.value).startswith(said)


def test_a_guide_of_ones_own_states_its_place(tmp_path: Any, monkeypatch: Any) -> None:
    code = "def mine(sampling):\n    return sampling\n"
    (tmp_path / "ones_own_guide.py").write_text(code)
    (tmp_path / "ones_own_place.py").write_text(f"PLACE = 25\n{code}")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BadArgument, match="guide ones_own_guide:mine: its module states no PLACE; write PLACE = 25"):
        check_guide([Part("clip"), Part("ones_own_guide:mine")])
    check_guide([Part("drift", {"mean": 0.0}), Part("ones_own_place:mine"), Part("cfg")])
