"""Plans: labels, guidance and clipping as stated, the steps that a notebook sees, and what does not go together."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from inkdrop.condition import labels_of
from inkdrop.core.ask import Ask
from inkdrop.core.brownian import Brownian
from inkdrop.core.cond import Cond
from inkdrop.core.noise import Keyed
from inkdrop.core.schedule import cosine, flow
from inkdrop.core.target import v, x0
from inkdrop.denoiser import wrap
from inkdrop.errors import BadArgument, BadShape, InkdropError, UnknownName
from inkdrop.find import Part
from inkdrop.generate import sample, steps
from inkdrop.plan import Plan, change, grid_of, noise_of
from inkdrop.recipe import Recipe, dump, read, set_knobs
from runs import digits, points, untrained

CLASSES = ("ant", "bee", "7")
CLIP = Part("clip")


def cfg(scale: float) -> Part:
    return Part("cfg", {"scale": scale})


@pytest.fixture
def model():
    """Three classes of points of the plane, and random weights."""
    return untrained(points(plan=Plan(steps=4, guide=())), (2,), CLASSES)


@pytest.fixture
def unlabelled():
    return untrained(points(plan=Plan(steps=4, guide=())), (2,))


# ---- labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "count", "expected"),
    [
        (None, 5, [0, 1, 2, 0, 1]),
        (2, 3, [2, 2, 2]),
        ("bee", 2, [1, 1]),
        ("7", 2, [2, 2]),  # a name comes before a number
        ("0", 2, [0, 0]),
        (["bee", 0, "2", "7"], 4, [1, 0, 2, 2]),
        ((1, 0), 2, [1, 0]),
        (np.array([2, 0]), 2, [2, 0]),
        (torch.tensor([2, 0]), 2, [2, 0]),
    ],
)
def test_labels_are_numbers_names_or_one_an_image(label, count, expected):
    got = labels_of(label, count, CLASSES)
    assert got.dtype == torch.int64
    assert got.tolist() == expected


def test_by_default_classes_come_in_turn_from_the_first_image_on():
    assert labels_of(None, 4, CLASSES, first=5).tolist() == [2, 0, 1, 2]
    assert labels_of(None, 4, ()) is None


@pytest.mark.parametrize(
    ("label", "classes", "error", "match"),
    [
        (0, (), BadArgument, "this model has no classes; leave it out"),
        ("ant", (), BadArgument, "this model has no classes"),
        (3, CLASSES, BadArgument, r"got 3, need a number in \[0, 2\], or a name: ant, bee, 7"),
        (-1, CLASSES, BadArgument, "got -1"),
        ("-1", CLASSES, BadArgument, "got -1"),
        ("8", CLASSES, BadArgument, "got 8"),
        ("been", CLASSES, UnknownName, "did you mean bee"),
        ("²", CLASSES, UnknownName, "class: unknown name"),
        ("--1", CLASSES, UnknownName, "class: unknown name"),
        ("1.0", CLASSES, UnknownName, "class: unknown name"),
        ("", CLASSES, UnknownName, "class: unknown name"),
        ([1.5, 0, 1], CLASSES, BadArgument, "got 1.5, need a whole number"),
        ([0, 1], CLASSES, BadShape, "got 2 labels for 3 images"),
        ([], CLASSES, BadShape, "got 0 labels for 3 images"),
    ],
)
def test_a_wrong_label_is_refused(label, classes, error, match):
    with pytest.raises(error, match=match):
        labels_of(label, 3, classes)


# ---- guidance ----------------------------------------------------------------------------------------------------


def test_a_guidance_of_1_is_no_guidance_bit_for_bit(model):
    plain = sample(model, 6, seed=1)
    assert torch.equal(sample(model, 6, seed=1, guidance=1), plain)
    assert not torch.equal(sample(model, 6, seed=1, guidance=1.5), plain)


def test_a_guidance_of_0_is_unconditional_bit_for_bit(model):
    null = sample(model, 6, seed=1, cond=Cond(label=torch.zeros(6, dtype=torch.int64)).null())
    assert torch.equal(sample(model, 6, seed=1, guidance=0), null)
    assert not torch.equal(sample(model, 6, seed=1), null)


def test_guidance_follows_its_formula_on_a_one_step_grid(model):
    """One DDIM step into clean gives x0 itself: x0 = uncond + w·(cond − uncond)."""
    cond, null = (sample(model, 6, seed=1, steps=1, guidance=w) for w in (1, 0))
    for w in (0.5, 3.0):
        torch.testing.assert_close(sample(model, 6, seed=1, steps=1, guidance=w), null + w * (cond - null))


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_guidance_needs_classes(scale, unlabelled):
    with pytest.raises(BadArgument, match="no condition to guide by"):
        sample(unlabelled, 2, guidance=scale)


@pytest.mark.parametrize("draw", [sample, steps])
def test_guidance_needs_conditions_dropped_in_training(draw, model):
    """Else there is no unconditional branch; refused at the call, and w = 1, which asks none, is not."""
    trained = replace(model, recipe=set_knobs(model.recipe, ["train.null_rate=0"]))
    for scale in (0, 0.5, 2):
        with pytest.raises(BadArgument, match=f"got {scale:g}, but this model was trained.*null_rate=0"):
            draw(trained, 3, guidance=scale)
    with pytest.raises(BadArgument, match="null_rate=0"):
        draw(trained, 3, plan=Plan(steps=2, guide=(cfg(3.0),)))
    assert torch.equal(sample(trained, 3, guidance=1), sample(model, 3))


# ---- clipping ----------------------------------------------------------------------------------------------------


def test_pictures_are_clipped_unless_told_otherwise():
    """A net that shouts: x0 is in [-1, 1] at every step by default, and is not with clip=False."""
    recipe = digits()
    assert [part.name for part in Recipe(data=recipe.data, net=recipe.net).plan.guide] == ["clip"]
    bundle = untrained(replace(recipe, plan=Plan(steps=4)), (1, 8, 8), CLASSES)
    with torch.no_grad():
        bundle.denoiser.net.head[-1].weight.mul_(20)
    clipped = list(steps(bundle, 4))
    assert all(step.x0.abs().max() <= 1 for step in clipped)
    assert all(step.x0.abs().max() == 1 for step in clipped[:-1]), "nothing was clipped: the test is blind"
    assert any(step.x0.abs().max() > 1.5 for step in steps(bundle, 4, clip=False))
    assert sample(bundle, 4).abs().max() <= 1


def test_what_is_guided_is_clipped_after_guidance():
    """cfg is nearest the net, so that no step leaves the range whatever the scale."""
    bundle = untrained(replace(digits(), plan=Plan(steps=4)), (1, 8, 8), CLASSES)
    shown = list(steps(bundle, 4, guidance=30.0))
    assert max(float(step.x0.abs().max()) for step in shown) == 1
    assert max(float(step.x0.abs().max()) for step in steps(bundle, 4, guidance=30.0, clip=False)) > 1.5


# ---- change ------------------------------------------------------------------------------------------------------


def test_what_is_not_changed_stays():
    plan = Plan(Part("ddim", {"eta": 0.5}), Part("leading", {"offset": 1}), 7, (CLIP, cfg(3.0)))
    assert change(plan) == plan
    assert change(plan, steps=9) == replace(plan, steps=9)
    with pytest.raises(BadArgument, match="steps: got 0"):
        change(plan, steps=0)
    assert change(plan, sampler="ddpm") == replace(plan, sampler=Part("ddpm"))
    assert change(plan, sampler="ddim") == replace(plan, sampler=Part("ddim")), "a name comes with its own defaults"
    assert change(plan, grid=Part("karras", {"power": 3.0})).grid == Part("karras", {"power": 3.0})


@pytest.mark.parametrize(
    ("guide", "changes", "expected"),
    [
        ((CLIP,), {"guidance": 2}, (CLIP, cfg(2.0))),
        ((CLIP, cfg(3.0)), {"guidance": 0}, (CLIP, cfg(0.0))),
        ((), {"guidance": 2, "clip": True}, (CLIP, cfg(2.0))),
        ((cfg(2.0),), {"clip": True}, (CLIP, cfg(2.0))),
        ((CLIP, cfg(2.0)), {"clip": False}, (cfg(2.0),)),
        ((CLIP, cfg(2.0)), {"clip": False, "guidance": 1}, (cfg(1.0),)),
        ((Part("clip", {"low": 0.0}), cfg(2.0)), {"clip": True}, (Part("clip", {"low": 0.0}), cfg(2.0))),
        ((), {"clip": False}, ()),
    ],
)
def test_guidance_and_clipping_are_changed_in_place(guide, changes, expected):
    """clip stays inside, cfg nearest the net."""
    assert change(Plan(guide=guide), **changes).guide == expected


# ---- steps and sample --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [None, 0, 2.5])
@pytest.mark.parametrize("grid", ["trailing", "karras", "uniform"])
def test_the_steps_are_those_of_the_printed_grid(grid, guidance, model):
    """Whatever the guidance: one row an image, at the levels of the grid, from the start noise to the result."""
    plan = replace(model.plan, grid=Part(grid), steps=5)
    changes = {} if guidance is None else {"guidance": guidance}
    shown = list(steps(model, 6, seed=2, plan=plan, **changes))
    printed = grid_of(plan, model.schedule)
    assert [step.number for step in shown] == list(range(6))
    assert [float(step.level.t) for step in shown] == [float(level.t) for level in printed]
    assert torch.equal(shown[0].x, model.schedule.start(Keyed(2, range(6)).start((6, 2)), printed[0]))
    assert {tuple(step.x.shape) for step in shown} == {tuple(step.x0.shape) for step in shown} == {(6, 2)}
    for now, nxt in pairwise(shown):  # DDIM, written out
        eps = (now.x - now.level.alpha * now.x0) / now.level.sigma
        expected = nxt.level.alpha * now.x0 + nxt.level.sigma * eps
        torch.testing.assert_close(nxt.x, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(shown[-1].x0, sample(model, 6, seed=2, plan=plan, **changes))
    assert shown[-1].level.clean


def test_the_answers_shown_are_guided(model):
    """At the first step, where cond and null were asked about the same x."""
    first = {w: next(steps(model, 6, seed=2, guidance=w)).x0 for w in (0, 1, 3)}
    torch.testing.assert_close(first[3], first[0] + 3 * (first[1] - first[0]))


def test_leaving_the_steps_early_leaves_the_model_as_it_was(model):
    expected = sample(model, 3)
    model.denoiser.train()
    loop = steps(model, 3)
    for step in loop:
        assert not model.denoiser.net.training
        if step.number == 1:
            break
    loop.close()
    assert model.denoiser.net.training
    assert torch.equal(sample(model, 3), expected)
    assert model.denoiser.net.training
    with pytest.raises(BadArgument):
        sample(model, 3, steps=0)
    with pytest.raises(BadArgument):
        steps(model, 3, steps=0)
    with pytest.raises(RuntimeError, match="mine"):
        sample(model, 3, on_step=lambda done, step: (_ for _ in ()).throw(RuntimeError("mine")))
    assert model.denoiser.net.training


def test_a_count_need_not_be_a_multiple_of_the_batch(model):
    told: list[tuple[int, int, int]] = []
    x = sample(model, 7, seed=4, batch=3, on_step=lambda done, step: told.append((done, len(step.x), step.number)))
    assert x.shape == (7, 2)
    assert told == [(done, rows, n) for done, rows in ((0, 3), (3, 3), (6, 1)) for n in range(5)]
    torch.testing.assert_close(x, sample(model, 7, seed=4), rtol=1e-5, atol=1e-5)
    each = [0, 0, 1, 1, 2, 2, 0]
    torch.testing.assert_close(
        sample(model, 7, seed=4, batch=3, label=each), sample(model, 7, seed=4, label=each), rtol=1e-5, atol=1e-5
    )
    assert not torch.equal(sample(model, 7, seed=4, label=each), x)


def test_an_image_is_of_the_class_that_was_asked_for(model):
    """Row by row, what is made of a list of labels is what is made of each label."""
    mixed = sample(model, 3, seed=5, label=["bee", "ant", "7"])
    for row, label in enumerate(("bee", "ant", "7")):
        alone = sample(model, 3, seed=5, label=label)
        torch.testing.assert_close(mixed[row], alone[row], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(mixed[(row + 1) % 3], alone[(row + 1) % 3], atol=1e-3)


def test_a_bare_denoiser_is_sampled_by_its_shape():
    """A net of one's own: it sees every level of a plan without guidance, and no condition."""
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def net(x, time):
        asked.append((x, time))
        return torch.zeros_like(x)

    denoiser = wrap(net, cosine(steps=40), v())
    x = sample(denoiser, 3, shape=(2, 5), steps=4, seed=6)
    assert [float(time[0]) for _, time in asked] == [39, 29, 19, 9]
    start = Keyed(6, range(3)).start((3, 2, 5))
    assert torch.equal(asked[0][0], start)
    levels = grid_of(Plan(steps=4), denoiser.schedule)
    expected = start.double()
    for now, nxt in pairwise(levels):  # y = 0: x0 = alpha·x, eps = sigma·x
        expected = (nxt.alpha * now.alpha + nxt.sigma * now.sigma) * expected
    torch.testing.assert_close(x, expected.float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(BadArgument, match="give shape="):
        sample(denoiser, 3)


def test_a_grid_that_starts_below_the_end_starts_from_its_own_level():
    """Leading's first of 10 levels on the straight path is t = 0.901: the start is 0.901·noise, not noise."""
    denoiser = wrap(lambda x, time: torch.zeros_like(x), flow(), x0())
    first = next(steps(denoiser, 3, shape=(2,), plan=Plan(grid=Part("leading"), steps=10, guide=()), seed=6))
    assert float(first.level.t) == pytest.approx(0.901)
    torch.testing.assert_close(first.x, 0.901 * Keyed(6, range(3)).start((3, 2)))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"count": 0}, BadArgument, "need at least 1"),
        ({"batch": 0}, BadArgument, "need at least 1"),
        ({"seed": -1}, BadArgument, "seed: got -1"),
        ({"seed": 2**64}, BadArgument, "seed: got"),
        ({"first": -1}, BadArgument, "image: got -1"),
        ({"steps": 0}, BadArgument, "steps: got 0"),
        ({"steps": 101}, BadArgument, "steps: got 101"),
        ({"sampler": "ddmi"}, UnknownName, "did you mean ddpm, ddim or edm"),
        ({"sampler": Part("heun", {"eta": 0.5})}, UnknownName, "heun knob: unknown name 'eta'"),
        ({"grid": "karas"}, UnknownName, "did you mean karras"),
        ({"guidance": -1}, BadArgument, "cfg scale: got -1"),
        ({"guidance": float("nan")}, BadArgument, "cfg scale: got nan"),
        ({"guidence": 2}, UnknownName, "did you mean guidance"),
        ({"label": 5}, BadArgument, "class: got 5"),
        ({"label": 0, "cond": Cond(label=torch.tensor([0, 1]))}, BadArgument, "got cond beside label"),
        ({"cond": Cond(label=torch.tensor([0]))}, BadShape, "got 1 rows for 2 images"),
        ({"cond": Cond(vec=torch.zeros(2, 3))}, BadArgument, "got vec, this net takes label"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(options, error, match, model):
    with pytest.raises(error, match=match) as caught:
        sample(model, **{"count": 2, **options})
    assert isinstance(caught.value, InkdropError)
    assert "\n" not in str(caught.value)


# ---- recipes as JSON ---------------------------------------------------------------------------------------------


def test_a_recipe_is_what_its_json_says():
    recipe = points(dropout=0.25, plan=Plan(Part("ddim", {"eta": 0.5}), Part("uniform"), 9, (CLIP, cfg(1.5))))
    plain = dump(recipe)
    assert read(plain) == recipe
    assert plain["plan"]["guide"][1] == {"name": "cfg", "knobs": {"scale": 1.5}}
    changed = set_knobs(recipe, ["cfg.scale=4", "sampler.eta=0", "grid=karras", "plan.steps=3", "train.lr=0.5"])
    assert changed.plan == Plan(Part("ddim", {"eta": 0}), Part("karras"), 3, (CLIP, Part("cfg", {"scale": 4})))
    assert changed.train.lr == 0.5
    assert set_knobs(recipe, ["net=unet"]).net == Part("unet"), "another part comes without the old one's knobs"


def test_weights_are_where_the_net_says():
    """What `untrained` gives is a model whose answers depend on x, time and class: else the laws above are blind."""
    model = untrained(points(), (2,), CLASSES)
    grid = grid_of(Plan(steps=2), model.schedule)
    x, cond = torch.ones(1, 2), Cond(label=torch.tensor([0]))

    def ask(x=x, level=grid[0], cond=cond):
        return model.denoiser.predict(Ask(x, level, cond))[0]

    others = (ask(x=2 * x), ask(level=grid[1]), ask(cond=Cond(label=torch.tensor([1]))), ask(cond=cond.null()))
    assert all((ask() - other).abs().max() > 1e-3 for other in others)
    assert isinstance(model.denoiser.net, nn.Module)


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        (Plan(), Keyed),
        (Plan(sampler=Part("dpmpp_2m_sde")), Brownian),
        (Plan(sampler=Part("dpmpp_2m_sde"), combine=Part("restart")), Keyed),
        (Plan(sampler=Part("dpmpp_2m_sde"), noise="white"), Keyed),
        (Plan(sampler=Part("ddpm"), noise="brownian"), Brownian),
    ],
)
def test_noise_is_the_plan_s_or_the_sampler_s_own(plan, kind):
    """A path cannot go back up, so a combinator draws white noise."""
    assert type(noise_of(plan, 0, range(2))) is kind


def test_restart_goes_round_an_sde_solver():
    """It would be refused by a Brownian path, and is not: dpmpp_2m_sde with restart on a trained-shape model."""
    plan = Plan(Part("dpmpp_2m_sde"), Part("loguniform"), 12, (), Part("restart", {"low": 0.1, "high": 5.0}))
    denoiser = wrap(lambda x, time: torch.zeros_like(x), cosine(steps=40), v())
    asked = len(list(steps(denoiser, 2, shape=(3,), plan=plan))) - 1
    assert asked > 12


def test_a_hook_rewrites_what_the_sampler_is_told_and_the_steps_show_it(model):
    """With x0 always 0.25, ddim is x_s = alpha_s·0.25 + sigma_s·(x − alpha·0.25)/sigma and ends at 0.25."""
    shown = list(steps(model, 3, seed=1, see=lambda ask, belief: torch.full_like(belief.x0, 0.25)))
    assert all(bool((step.x0 == 0.25).all()) for step in shown)
    for now, nxt in pairwise(shown):
        eps = (now.x - now.level.alpha * 0.25) / now.level.sigma
        torch.testing.assert_close(nxt.x, nxt.level.alpha * 0.25 + nxt.level.sigma * eps, rtol=1e-5, atol=1e-5)
    seen = []
    plain = sample(model, 3, seed=1, see=lambda ask, belief: seen.append(ask.level))
    assert torch.equal(plain, sample(model, 3, seed=1))
    assert [float(level.t) for level in seen] == grid_of(model.plan, model.schedule).times[:-1].tolist()
