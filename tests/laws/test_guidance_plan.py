"""Guides in plans and recipes: changed, set, written and read again; and what a model cannot be guided by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from inkdrop.bundle import Bundle
from inkdrop.classifier import with_parts
from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, UnknownName
from inkdrop.find import Part
from inkdrop.generate import evaluating, parts_of, sample, steps
from inkdrop.model import Plain
from inkdrop.plan import Plan, change, needs_of
from inkdrop.recipe import Recipe, dump, read, set_knobs
from runs import points, untrained

CLASSES = ("ant", "bee", "7")
CLIP, CFG, AUTO, JUDGE = (
    Part("clip"),
    Part("cfg", {"scale": 3.0, "start": 0.9}),
    Part("autoguidance"),
    Part("classifier"),
)
FULL = Plan(guide=(CLIP, CFG))


def model(seed: int = 0, **train: Any) -> Bundle:
    """Three classes of points of the plane, and random weights."""
    return untrained(points(plan=Plan(steps=4, guide=()), **train), (2,), CLASSES, seed=seed)


# ---- change ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "guide"),
    [
        ({"guide": ["autoguidance"]}, (CLIP, AUTO, CFG)),
        ({"guide": ["cfg"]}, (CLIP, CFG)),  # it is there, with its knobs
        ({"guide": [Part("cfg", {"scale": 2.0})]}, (CLIP, Part("cfg", {"scale": 2.0}))),
        ({"guide": ["none"]}, ()),
        ({"guide": ["none", "threshold", "classifier"]}, (Part("threshold"), JUDGE)),
        ({"guide": ["threshold"], "clip": False}, (Part("threshold"), CFG)),
        ({"guide": ["none"], "guidance": 2, "clip": True}, (CLIP, Part("cfg", {"scale": 2.0}))),
        ({"guidance": 5}, (CLIP, Part("cfg", {"scale": 5.0, "start": 0.9}))),
        ({"guidance": 1}, (CLIP, Part("cfg", {"scale": 1.0}))),  # where its other knobs have no effect
    ],
)
def test_guides_are_added_in_their_order_or_taken_away(changes: dict[str, Any], guide: tuple[Part, ...]) -> None:
    assert change(FULL, **changes) == replace(FULL, guide=guide)


def test_combinator_and_noise_are_changed_and_dropped() -> None:
    plan = change(FULL, combine="restart", noise="brownian")
    assert (plan.combine, plan.noise) == (Part("restart"), "brownian")
    assert change(plan, steps=9) == replace(plan, steps=9)
    assert change(plan, combine="none") == replace(plan, combine=None)
    with pytest.raises(BadArgument, match="noise: got 'pink', need white or brownian"):
        change(FULL, noise="pink")


def test_a_plan_knows_which_parts_it_asks() -> None:
    assert needs_of(FULL) == {}
    assert needs_of(change(FULL, guide=["autoguidance", "classifier"])) == {
        "classifier": "classifier", "weak": "autoguidance",
    }  # fmt: skip


# ---- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        FULL,
        Plan(guide=()),
        Plan(combine=Part("restart"), noise="brownian"),
        Plan(noise="white", guide=(Part("drift", {"mean": [0.1, 0.2], "std": 0.3}), Part("cfg", {"negative": 2}))),
    ],
)
def test_a_plan_is_what_its_json_says(plan: Plan) -> None:
    recipe = points(plan=plan)
    plain = dump(recipe)
    assert read(plain) == recipe
    assert plain["plan"]["combine"] == (None if plan.combine is None else {"name": "restart", "knobs": {}})
    assert plain["plan"]["noise"] == plan.noise
    assert read(dump(set_knobs(recipe, ["plan.steps=7"]))).plan == replace(plan, steps=7)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["plan.guide=none"], {"guide": ()}),
        (["plan.guide=[]"], {"guide": ()}),
        (["plan.guide=cfg"], {"guide": (CFG,)}),
        (["plan.guide=cfg,threshold"], {"guide": (Part("threshold"), CFG)}),
        (["plan.guide=none", "plan.guide=cfg", "cfg.scale=2"], {"guide": (Part("cfg", {"scale": 2}),)}),
        (["plan.guide=clip,drift", "drift.mean=[0.1,0.2]"], {"guide": (CLIP, Part("drift", {"mean": [0.1, 0.2]}))}),
        (["plan.guide=drift", "drift.mean=-0.4"], {"guide": (Part("drift", {"mean": -0.4}),)}),
        (["plan.noise=brownian"], {"noise": "brownian"}),
        (["plan.noise=brownian", "plan.noise=null"], {}),
        (["combine=restart"], {"combine": Part("restart")}),
        (["combine=restart", "combine=none"], {}),
    ],
)
def test_settings_reach_every_field_of_the_plan(settings: list[str], expected: dict[str, Any]) -> None:
    assert set_knobs(points(plan=FULL), settings).plan == replace(FULL, **expected)


def test_a_combinators_knobs_are_set_and_checked() -> None:
    from inkdrop.find import find, knobs

    name, param = next(iter(knobs(find("combinators", "restart")).items()))
    recipe = set_knobs(points(plan=FULL), ["combine=restart", f"combine.{name}={param.default}"])
    assert recipe.plan.combine == Part("restart", {name: param.default})
    assert read(dump(recipe)) == recipe


@pytest.mark.parametrize(
    ("setting", "error", "said"),
    [
        ("combine.times=2", BadArgument, "--set: got combine.times, but there is no combine; name one first"),
        ("combine=restrat", UnknownName, "combinators: unknown name 'restrat'; did you mean restart"),
        ("combine=ddim", BadArgument, "combinators: got 'ddim', which is one of the samplers"),
        ("plan.noise=pink", BadArgument, "plan.noise: got 'pink'"),
        ("plan.guide=clpi", UnknownName, "guide: unknown name 'clpi'; did you mean clip"),
        ("plan.guide=clip,none", UnknownName, "guide: unknown name 'none'"),
        ("cfg.scael=2", UnknownName, "cfg knob: unknown name 'scael'; did you mean scale"),
        ("cfg.shape=sine", BadArgument, "cfg.shape: got 'sine', need"),
        ("cfg.negative=bee", BadArgument, "cfg.negative: got 'bee', need int | None"),
        ("plan.sampler=ddim", UnknownName, "plan knob: unknown name 'sampler'; known: guide, noise, steps"),
    ],
)
def test_settings_that_cannot_work_are_one_line(setting: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        set_knobs(points(plan=FULL), [setting])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"combine": {"name": "restart", "knobz": {}}}, "recipe.plan.combine field: unknown name 'knobz'"),
        ({"combine": "restart"}, "recipe.plan.combine: got str, need a JSON object"),
        ({"noise": "pink"}, "recipe.plan.noise: got 'pink'"),
    ],
)
def test_a_recipe_json_that_says_something_else(plan: dict[str, Any], said: str) -> None:
    plain = dump(points(plan=FULL))
    with pytest.raises((BadArgument, UnknownName)) as caught:
        read({**plain, "plan": {**plain["plan"], **plan}})
    assert str(caught.value).startswith(said)


# ---- models ------------------------------------------------------------------------------------------------------


def test_a_weak_net_guides_by_its_formula_on_a_one_step_grid() -> None:
    """One DDIM step into clean gives x0 itself: weak + w·(net − weak), each with the class that was asked for."""
    strong, weak = model(), model(seed=1)
    both = with_parts(strong, weak=weak)
    net, other = (sample(m, 6, seed=1, steps=1) for m in (strong, weak))
    for w in (0.5, 3.0):
        got = sample(both, 6, seed=1, steps=1, guide=[Part("autoguidance", {"scale": w})])
        torch.testing.assert_close(got, other + w * (net - other))
    shown = list(steps(both, 6, seed=1, steps=1, guide=[Part("autoguidance", {"scale": 3.0})]))
    assert torch.equal(shown[-1].x0, got)
    assert torch.equal(sample(both, 6, seed=1), sample(strong, 6, seed=1)), "an idle part changes nothing"
    assert set(parts_of(both)) == {"net", "weak"}
    assert (set(parts_of(strong)), strong.parts) == ({"net"}, {})


def test_the_card_says_what_the_parts_are() -> None:
    weak = replace(model(seed=1), card={"updates": 7})
    both = with_parts(replace(model(), card={"updates": 99}), weak=weak)
    assert both.card == {"updates": 99, "weak": {"updates": 7}}


def test_every_part_is_put_into_evaluation_and_back() -> None:
    """Dropout of the weak net would make the same seed different."""
    both = with_parts(model(), weak=model(seed=1))
    for part in parts_of(both).values():
        part.train()
    kinds = []
    hooks = [
        p.net.register_forward_pre_hook(lambda net, _: kinds.append(net.training)) for p in parts_of(both).values()
    ]
    sample(both, 2, guide=["autoguidance"])
    for hook in hooks:
        hook.remove()
    assert kinds == [False] * 8
    assert all(part.training for part in parts_of(both).values())
    net = nn.Linear(1, 1).train()
    with evaluating(net):
        assert not net.training
    assert net.training


WIDER = untrained(points(), (3,), CLASSES)
OTHER = untrained(points(), (2,), ("ant", "bee"))
PLAIN = untrained(points(plan=Plan(steps=4, guide=())), (2,))


def undropped() -> Bundle:
    return replace(model(), recipe=set_knobs(model().recipe, ["train.null_rate=0"]))


def rescheduled() -> Bundle:
    return untrained(replace(points(), schedule=Part("cosine", {"steps": 100, "offset": 0.01})), (2,), CLASSES)


def of(make: Any, *guides: Part | str, **more: Any) -> Any:
    return lambda: sample(make(), 3, guide=list(guides), **more)


REFUSED = [
    ("weak", of(model, "autoguidance"), "autoguidance: asks a part 'weak', which this model does not have; give it"),
    ("judge", of(model, "classifier"), "classifier: asks a part 'classifier', which this model does not have"),
    ("both bounds", of(model, "threshold", "clip"), "guide: threshold and clip do the same work; keep one"),
    ("class 3", of(model, Part("cfg", {"scale": 2, "negative": 3})), "cfg negative: got 3, need a number in [0, 2]"),
    ("class -1", of(model, Part("cfg", {"scale": 2, "negative": -1})), "cfg negative: got -1, need a number in [0, 2]"),
    ("plain", of(lambda: PLAIN, "cfg"), "cfg: there is no condition to guide by"),
    ("plain negative", of(lambda: PLAIN, Part("cfg", {"scale": 2, "negative": 0})), "cfg: there is no condition"),
    ("undropped", of(undropped, Part("cfg", {"scale": 2})), "guidance: got 2, but this model was trained without"),
    ("rescale", of(model, Part("cfg", {"rescale": 0.7})), "cfg rescale: got 0.7, which has no effect at scale 1"),
    ("drift", of(model, Part("drift", {"mean": 0.0})), "drift: got samples of shape (2,), need spatial axes"),
    ("no mean", of(model, "drift"), "drift: needs a value for 'mean'"),
    ("bare", of(lambda: model().denoiser, "autoguidance", shape=(2,)), "autoguidance: asks a part 'weak'"),
    ("shape", lambda: with_parts(model(), weak=WIDER), "weak: made for samples of shape (3,), but the model"),
    ("classes", lambda: with_parts(model(), weak=OTHER), "weak: knows 2 (ant, bee) classes, the model 3 (ant, bee, 7)"),
    ("schedule", lambda: with_parts(model(), weak=rescheduled()), "weak: was trained with another noise schedule"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_a_model_cannot_be_guided_by_is_one_line(make: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is compared in full
        make()
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_negative_class_needs_no_dropped_conditions() -> None:
    """Its branch is conditional: x0 = neg + w·(cond − neg) of a model that has no null branch."""
    bundle, asked = undropped(), {"seed": 1, "steps": 1}
    cond, negative = (sample(bundle, 3, label=label, **asked) for label in ([0, 1, 2], 2))
    got = sample(bundle, 3, guide=[Part("cfg", {"scale": 3.0, "negative": 2})], **asked)
    torch.testing.assert_close(got, negative + 3 * (cond - negative))
    torch.testing.assert_close(got[2], cond[2])  # the negative class itself


def test_a_plain_model_is_sampled_like_a_bundle() -> None:
    own = Plain(model().denoiser, (2,), CLASSES, Plan(steps=2, guide=()), guidable=True)
    assert sample(own, 2).shape == (2, 2)
    cond = Cond(label=torch.tensor([0, 1]))
    assert torch.equal(sample(own, 2, cond=cond), sample(own, 2))


def test_a_recipe_whose_guides_clash_is_refused_before_training() -> None:
    from inkdrop.train.trainer import Trainer

    recipe: Recipe = set_knobs(points(), ["plan.guide=clip,threshold"])
    with pytest.raises(BadArgument, match="guide: clip and threshold do the same work"):
        Trainer(recipe, None)
