"""Guidance and clipping: the one convention of w, consistent beliefs, and conditions that are null by mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief, Sampling, given, relay
from inkdrop.core.cond import Cond
from inkdrop.core.level import Level
from inkdrop.core.noise import Keyed
from inkdrop.core.oracle import Gaussian, Mixture
from inkdrop.drive import drive
from inkdrop.errors import BadArgument, BadShape
from inkdrop.find import Part, build
from inkdrop.guide.cfg import cfg
from inkdrop.guide.clip import clip
from inkdrop.plan import Plan, change, sampling
from inkdrop.samplers.ddim import ddim
from inkdrop.samplers.ddpm import ddpm
from inkdrop.samplers.heun import heun
from specimens import normals, schedule_of

MEANS = torch.tensor([[-0.9, 0.4], [0.8, 0.7], [0.2, -1.0]], dtype=torch.float64)
PARTS = [Gaussian(mean, 0.3) for mean in MEANS]
WHOLE = Mixture(MEANS, torch.full((3,), 0.3, dtype=torch.float64))
LABELS = torch.tensor([0, 2, 1, 2])
COND = Cond(label=LABELS)


def branches(x: Tensor, level: Level, labels: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x, label] and E[x0 | x], in closed form, row by row."""
    each = torch.stack([part(Ask(x, level)).x0 for part in PARTS])
    return each[labels, torch.arange(len(x))], WHOLE(Ask(x, level)).x0


class Labelled:
    """The ideal denoiser of the mixture, told which component or not; it counts what it is asked."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []

    def __call__(self, ask: Ask) -> Belief:
        self.asks.append(ask)
        null = ask.cond.null_rows("label")
        conditional, unconditional = branches(ask.x, ask.level, ask.cond.label)
        x0 = torch.where(null[:, None], unconditional, conditional)
        level = ask.level.over(ask.x)
        frac = torch.where(null[:, None], 0.25, 0.75).expand_as(x0)
        return Belief(x0, (ask.x - level.alpha * x0) / level.sigma, frac)


def overhear(work: Sampling, heard: list[tuple[Ask, Belief]]) -> Sampling:
    """Middleware that changes nothing and remembers what the sampler was told."""

    def after(ask: Ask, belief: Belief) -> Belief:
        heard.append((ask, belief))
        return belief

    return relay(work, lambda ask: ask, after)


def start(schedule: str = "vp", steps: int = 5) -> tuple[Tensor, Any]:
    grid = build("grids", Part("trailing"), schedule_of(schedule), steps)
    return normals(4, 2, seed=1) * float(grid[0].sigma), grid


# ---- cfg: one convention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampler", [ddim, ddpm, heun])
def test_w_1_is_conditional_bit_for_bit_and_asks_one_branch(sampler: Any, dtype: torch.dtype) -> None:
    x, grid = start()
    plain, guided = Labelled(), Labelled()
    want = drive(given(sampler(x.to(dtype), grid, Keyed(0, range(4))), COND), plain)
    got = drive(cfg(given(sampler(x.to(dtype), grid, Keyed(0, range(4))), COND), scale=1.0), guided)
    assert torch.equal(got, want)
    assert [len(a.x) for a in guided.asks] == [len(a.x) for a in plain.asks] == [4] * len(plain.asks)
    assert all(a.cond is COND for a in guided.asks)


@pytest.mark.parametrize("sampler", [ddim, ddpm, heun])
def test_w_0_is_unconditional_bit_for_bit_and_asks_one_branch(sampler: Any) -> None:
    x, grid = start()
    heard = Labelled()
    got = drive(cfg(given(sampler(x, grid, Keyed(0, range(4))), COND), scale=0.0), heard)
    assert torch.equal(got, drive(sampler(x, grid, Keyed(0, range(4))), WHOLE))
    assert {len(a.x) for a in heard.asks} == {4}
    assert all(bool(a.cond.null_rows("label").all()) for a in heard.asks)


@pytest.mark.parametrize("scale", [0.5, 2.0, 3.0, 7.5])
@pytest.mark.parametrize("schedule", ["vp", "edm"])
def test_other_w_are_the_closed_form_in_one_ask_of_twice_the_rows(schedule: str, scale: float) -> None:
    """x0 = U + w·(C − U), written out on the mixture, along the whole trajectory; eps is Ho & Salimans' with w + 1."""
    x, grid = start(schedule)
    heard: list[tuple[Ask, Belief]] = []
    net = Labelled()
    got = drive(cfg(overhear(given(ddim(x, grid, None), COND), heard), scale=scale), net)
    assert [len(a.x) for a in net.asks] == [8] * 5
    assert all(a.cond.null_rows("label").tolist() == [False] * 4 + [True] * 4 for a in net.asks)
    assert all(torch.equal(a.cond.label[:4], LABELS) for a in net.asks)
    for ask, belief in heard:
        c, u = branches(ask.x, ask.level, LABELS)
        torch.testing.assert_close(belief.x0, u + scale * (c - u), rtol=1e-12, atol=1e-13)
        eps_c, eps_u = ((ask.x - ask.level.alpha * b) / ask.level.sigma for b in (c, u))
        theirs = scale - 1  # Ho & Salimans' w: (1 + w)·eps(c) − w·eps(∅), their eq. 6
        torch.testing.assert_close(belief.eps, (1 + theirs) * eps_c - theirs * eps_u, rtol=1e-10, atol=1e-11)
        assert bool((belief.var_frac == 0.75).all())  # the conditional branch's

    def closed(ask: Ask) -> Belief:
        c, u = branches(ask.x, ask.level, LABELS)
        x0 = u + scale * (c - u)
        return Belief(x0, (ask.x - ask.level.alpha * x0) / ask.level.sigma)

    torch.testing.assert_close(got, drive(ddim(x, grid, None), closed), rtol=1e-11, atol=1e-11)


def test_guidance_of_rows_with_levels_of_their_own() -> None:
    """As a batcher stacks them: row i of the guided belief is that of row i asked alone."""
    schedule = schedule_of("vp")
    times = torch.tensor([0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    x = normals(4, 2, seed=2)

    def once(ask: Ask) -> Belief:
        def single() -> Sampling:
            return (yield ask)

        work = cfg(single(), scale=3.0)
        question = next(work)
        with pytest.raises(StopIteration) as end:
            work.send(Labelled()(question))
        return end.value.value

    whole = once(Ask(x, schedule(times), COND))
    for i in range(4):
        alone = once(Ask(x[i : i + 1], schedule(float(times[i])), COND.take(slice(i, i + 1))))
        torch.testing.assert_close(whole.x0[i : i + 1], alone.x0, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(whole.eps[i : i + 1], alone.eps, rtol=1e-11, atol=1e-12)


def test_only_what_is_guidable_is_guided() -> None:
    x, grid = start()
    with pytest.raises(BadArgument, match="cfg: there is no condition to guide by; leave guidance out"):
        drive(cfg(ddim(x, grid, None), scale=1.0), Labelled())
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(BadArgument, match="cfg scale: got .*, need a finite number of at least 0; try 1 to 8"):
            cfg(ddim(x, grid, None), scale=bad)


# ---- clip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "edm", "flow"])
def test_a_clipped_belief_is_bounded_and_still_about_the_asker_s_x(schedule: str) -> None:
    """alpha·x0 + sigma·eps == x, each entry in [low, high], and x0 is untouched where it was inside."""
    x, grid = start(schedule)
    told, said = [], []

    def net(ask: Ask) -> Belief:
        x0 = 1.7 * WHOLE(ask).x0
        said.append(Belief(x0, (ask.x - ask.level.alpha * x0) / ask.level.sigma, torch.full_like(x0, 0.5)))
        return said[-1]

    result = drive(clip(overhear(ddim(x, grid, None), told), low=-0.5, high=0.75), net)
    for (ask, belief), raw in zip(told, said, strict=True):
        assert float(belief.x0.min()) >= -0.5
        assert float(belief.x0.max()) <= 0.75
        inside = (raw.x0 > -0.5) & (raw.x0 < 0.75)
        torch.testing.assert_close(belief.x0[inside], raw.x0[inside], rtol=0, atol=0)
        back = ask.level.alpha * belief.x0 + ask.level.sigma * belief.eps
        torch.testing.assert_close(back, ask.x, rtol=1e-13, atol=1e-13)
        assert torch.equal(belief.var_frac, raw.var_frac)
    assert any(bool((raw.x0 > 0.75).any()) for raw in said)
    assert -0.5 <= float(result.min()) < float(result.max()) <= 0.75


def test_clip_tames_the_first_step_of_a_cosine_table() -> None:
    """An error of 1e-3 in eps at alpha_T = 5e-5 is one of 20 in x0, which a clipped belief does not follow."""
    x, grid = start("cosine", 4)

    def net(ask: Ask) -> Belief:
        eps = WHOLE(ask).eps + 1e-3
        return Belief((ask.x - ask.level.sigma * eps) / ask.level.alpha, eps)

    told: list[tuple[Ask, Belief]] = []
    drive(overhear(clip(ddim(x, grid, None)), told), net)
    assert float(told[0][1].x0.abs().max()) > 15
    assert float(drive(clip(ddim(x, grid, None)), net).abs().max()) <= 1


def test_clip_inside_cfg_clips_what_was_guided() -> None:
    """cfg(clip(s)): the sampler is told clip(U + w·(C − U)); clip(cfg(s)) would guide out of the range again."""
    x, grid = start(steps=3)
    right: list[tuple[Ask, Belief]] = []
    wrong: list[tuple[Ask, Belief]] = []
    drive(cfg(clip(overhear(given(ddim(x, grid, None), COND), right)), scale=6.0), Labelled())
    drive(clip(cfg(overhear(given(ddim(x, grid, None), COND), wrong), scale=6.0)), Labelled())
    for ask, belief in right:
        c, u = branches(ask.x, ask.level, LABELS)
        torch.testing.assert_close(belief.x0, (u + 6 * (c - u)).clamp(-1, 1), rtol=1e-12, atol=1e-12)
    assert max(float(b.x0.abs().max()) for _, b in wrong) > 1.2


def test_a_plan_clips_inside_and_guides_outside() -> None:
    x, grid = start(steps=3)
    plan = change(Plan(), guidance=6.0)
    assert [p.name for p in plan.guide] == ["clip", "cfg"]
    got = drive(sampling(plan, x, grid, Keyed(0, range(4)), COND), Labelled())
    want = drive(cfg(clip(given(ddim(x, grid, None), COND)), scale=6.0), Labelled())
    assert torch.equal(got, want)
    assert [p.name for p in change(change(plan, clip=False), clip=True).guide] == ["clip", "cfg"]
    assert change(plan, clip=False, guidance=2.0).guide == (Part("cfg", {"scale": 2.0}),)


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (0.0, 0.0), (float("nan"), 1.0), (-1.0, float("inf"))])
def test_ranges_that_are_none_are_refused(low: float, high: float) -> None:
    with pytest.raises(BadArgument, match="need low < high, both finite; try -1 and 1"):
        clip(iter(()), low=low, high=high)


# ---- pulls and closing ----------------------------------------------------------------------------------------


def test_a_pull_is_that_of_the_x0_it_comes_with() -> None:
    """(d x0/d x)ᵀ·g through guidance and through clipping, against automatic differentiation of the closed forms."""
    level = schedule_of("vp")(0.4)
    x, g = normals(4, 2, seed=3), normals(4, 2, seed=4)

    def net(ask: Ask) -> Belief:
        held = ask.x.detach().requires_grad_()
        null = ask.cond.null_rows("label")
        with torch.enable_grad():
            c, u = branches(held, ask.level, ask.cond.label)
            x0 = torch.where(null[:, None], u, c)
        eps = (held - level.alpha * x0) / level.sigma
        return Belief(x0.detach(), eps.detach(), None, lambda v: torch.autograd.grad(x0, held, v, retain_graph=True)[0])

    def asks() -> Sampling:
        belief = yield Ask(x, level, COND, pull=True)
        return belief.pull(g)

    held = x.clone().requires_grad_()
    c, u = branches(held, level, LABELS)
    guided = u + 3 * (c - u)
    [want] = torch.autograd.grad(guided, held, g, retain_graph=True)
    torch.testing.assert_close(drive(cfg(asks(), scale=3.0), net), want, rtol=1e-11, atol=1e-12)
    [want] = torch.autograd.grad(guided.clamp(-0.5, 0.5), held, g)
    assert bool((guided.abs() > 0.5).any())
    got = drive(cfg(clip(asks(), low=-0.5, high=0.5), scale=3.0), net)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_relay_closes_the_sampler_it_wraps() -> None:
    closed = []

    def sampler() -> Sampling:
        try:
            yield Ask(torch.zeros(1, 2), schedule_of("vp")(0.5), COND)
        finally:
            closed.append(True)
        return torch.zeros(1)

    work = clip(cfg(sampler(), scale=2.0))
    next(work)
    work.close()
    assert closed == [True]


# ---- conditions ----------------------------------------------------------------------------------------------


def test_null_marks_rows_and_fields_and_leaves_the_values() -> None:
    cond = Cond(label=LABELS, image=torch.zeros(4, 1, 2, 2))
    some = cond.null(rows=torch.tensor([True, False, False, True]), only=("label",))
    assert some.null_rows("label").tolist() == [True, False, False, True]
    assert some.null_rows("image").tolist() == [False] * 4
    assert torch.equal(some.label, LABELS)
    again = some.null(rows=torch.tensor([False, True, False, False]))
    assert again.null_rows("label").tolist() == [True, True, False, True]
    assert again.null_rows("image").tolist() == [False, True, False, False]
    assert cond.nulls == {}  # the first is unchanged


def test_take_undoes_cat_also_of_texts_of_different_length() -> None:
    a = Cond(label=torch.tensor([1, 2]), text=torch.ones(2, 3, dtype=torch.int64)).null(torch.tensor([True, False]))
    b = Cond(label=torch.tensor([3]), text=torch.full((1, 5), 2))
    both = Cond.cat([a, b])
    assert len(both) == 3
    assert both.text_mask.sum(1).tolist() == [3, 3, 5]
    assert both.null_rows("label").tolist() == [True, False, False]
    first, last = both.take(slice(0, 2)), both.take([2])
    assert torch.equal(first.label, a.label)
    assert torch.equal(first.text[:, :3], a.text)
    assert torch.equal(first.null_rows("text"), a.null_rows("text"))
    assert torch.equal(last.text, b.text)


def test_conditions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadShape, match="cond: fields of different batch size"):
        Cond(label=LABELS, vec=torch.zeros(3, 2))
    with pytest.raises(BadShape, match=r"cond label: got torch.float32 \(4,\), need int64 \(B,\)"):
        Cond(label=LABELS.float())
    with pytest.raises(BadArgument, match="cond null: got 'text', which is absent; present: label"):
        COND.null(only=("text",))
    with pytest.raises(BadArgument, match="cond cat: got different fields"):
        Cond.cat([COND, Cond(vec=torch.zeros(1, 2))])
