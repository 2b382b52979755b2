"""The classifier of noisy images: its gradient, its files, its training, and what it cannot do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inkdrop.classifier import NoisyClassifier, load_classifier, save_classifier, with_parts
from inkdrop.core.ask import Ask
from inkdrop.core.cond import Cond
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument, BadCheckpoint, BadData, BadShape, InkdropError
from inkdrop.find import Part
from inkdrop.generate import sample
from inkdrop.nets.encoder import Encoder
from inkdrop.recipe import open_data
from inkdrop.train.classifier import accuracy, fit_classifier
from runs import digits, points, untrained
from specimens import normals, schedule_of

CLASSES = ("ant", "bee", "cow")
LABELS = torch.tensor([0, 2, 1, 2])
COND = Cond(label=LABELS)
SMALL = {"width": 8, "dropout": 0.1}


def perturbed(made: NoisyClassifier, seed: int = 0) -> NoisyClassifier:
    """Every weight moved, as fresh residual branches end in zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return made.eval()


def judge(schedule: str = "vp", shape: tuple[int, ...] = (2, 6, 5), seed: int = 0) -> NoisyClassifier:
    return perturbed(NoisyClassifier(Part(schedule), shape, CLASSES, SMALL), seed)


def states(schedule: str, t: float) -> tuple[Tensor, Level]:
    level = schedule_of(schedule)(t)
    return (level.alpha**2 + level.sigma**2).sqrt() * normals(4, 2, 6, 5, seed=3), level


# ---- the answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
@pytest.mark.parametrize("t", [0.1, 0.6])
def test_its_belief_is_that_of_the_score_of_the_class(schedule: str, t: float) -> None:
    """eps = −sigma·∇ log p(y|x_t) by central differences of its own log-softmax; alpha·x0 + sigma·eps == x."""
    made, (x, level) = judge(schedule).double(), states(schedule, t)
    belief = made(Ask(x, level, COND, of="classifier"))
    torch.testing.assert_close(level.alpha * belief.x0 + level.sigma * belief.eps, x, rtol=1e-12, atol=1e-12)
    v, h = normals(4, 2, 6, 5, seed=4), 1e-4 * float(level.sigma)

    def log_p(x: Tensor) -> Tensor:
        return made.logits(x, level).log_softmax(1)[torch.arange(4), LABELS]

    want = -level.sigma * (log_p(x + h * v) - log_p(x - h * v)) / (2 * h)
    torch.testing.assert_close((belief.eps * v).flatten(1).sum(1), want, rtol=1e-6, atol=1e-8)
    assert float(want.detach().abs().max()) > 1e-3, "a classifier that tells nothing: the test is blind"


def test_its_pull_is_that_of_its_x0() -> None:
    """v·pull(g) == g·(x0(x + h·v) − x0(x − h·v))/2h: a second derivative of the net."""
    made, (x, level) = judge().double(), states("vp", 0.7)
    g, v, h = normals(4, 2, 6, 5, seed=5), normals(4, 2, 6, 5, seed=6), 1e-5
    belief = made(Ask(x, level, COND, pull=True))
    high, low = (made(Ask(x + s * v, level, COND)).x0 for s in (h, -h))
    want = (g * (high - low) / (2 * h)).flatten(1).sum(1)
    torch.testing.assert_close((v * belief.pull(g)).flatten(1).sum(1), want, rtol=1e-6, atol=1e-7)
    bend = (v * belief.pull(g)).flatten(1).sum(1) - (v * g).flatten(1).sum(1) / level.alpha
    assert float(bend.abs().max()) > 1e-3, "without the second derivative it would be g/alpha"
    assert made(Ask(x, level, COND)).pull is None


def test_rows_are_apart_and_each_has_its_level() -> None:
    made, x = judge().double(), normals(4, 2, 6, 5, seed=7)
    times = torch.tensor([0.1, 0.4, 0.8, 1.0], dtype=torch.float64)
    whole = made(Ask(x, schedule_of("vp")(times), COND))
    for i in range(4):
        row = slice(i, i + 1)
        alone = made(Ask(x[row], schedule_of("vp")(float(times[i])), COND.take(row)))
        torch.testing.assert_close(whole.x0[row], alone.x0, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(whole.eps[row], alone.eps, rtol=1e-11, atol=1e-11)


def test_rows_without_a_class_have_no_score() -> None:
    """They are what they are told beside others, and the others what they are alone."""
    made, (x, level) = judge().double(), states("vp", 0.5)
    some = made(Ask(x, level, COND.null(torch.tensor([True, False, False, True])), pull=True))
    whole = made(Ask(x, level, COND, pull=True))
    assert torch.equal(some.eps[[0, 3]], torch.zeros_like(x[:2]))
    torch.testing.assert_close(some.x0[[0, 3]], x[[0, 3]] / level.alpha)
    assert torch.equal(some.eps[1:3], whole.eps[1:3])
    g = normals(4, 2, 6, 5, seed=5)
    torch.testing.assert_close(some.pull(g)[[0, 3]], g[[0, 3]] / level.alpha)
    torch.testing.assert_close(some.pull(g)[1:3], whole.pull(g)[1:3])


def test_it_hears_unit_variance_and_a_thousand_times_t() -> None:
    """At rho = 80 as at 0.002, for any schedule; the weights' dtype inside, the state's outside."""
    made, heard = judge("edm"), list[tuple[Tensor, Tensor]]()
    made.net.register_forward_pre_hook(lambda net, given: heard.append(given))
    for t in (0.001, 0.5, 1.0):
        x, level = states("edm", t)
        belief = made(Ask(x, level, COND))
        assert belief.x0.dtype == belief.eps.dtype == torch.float64
        inner, clock = heard[-1]
        torch.testing.assert_close(inner, normals(4, 2, 6, 5, seed=3).float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(clock, torch.full((4,), 1000 * t))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 9), (1, 28, 28), (2, 33, 5)])
def test_an_encoder_takes_any_image(shape: tuple[int, ...]) -> None:
    """Each row alone as in the batch, other at another time; evaluation is deterministic and training is not."""
    net = Encoder(shape, 3, width=8, dropout=0.5).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * normals(*p.shape, seed=p.numel()))
    x, clock = normals(3, *shape, seed=8), torch.tensor([5.0, 300.0, 999.0], dtype=torch.float64)
    y = net(x, clock)
    assert y.shape == (3, 3)
    for i in range(3):
        torch.testing.assert_close(net(x[i : i + 1], clock[i : i + 1]), y[i : i + 1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(net(x, clock.flip(0)), y, rtol=0.01)
    assert torch.equal(net(x, clock), y)
    assert not torch.equal(net.train()(x, clock), y)


# ---- files -------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    made = NoisyClassifier(Part("cosine", {"steps": 100}), (2, 6, 5), CLASSES, SMALL, {"accuracy": [0.5], "seed": 3})
    save_classifier(perturbed(made), tmp_path / "judge")
    assert sorted(p.name for p in (tmp_path / "judge").iterdir()) == ["classifier.json", "classifier.safetensors"]
    read = load_classifier(tmp_path / "judge")
    assert (read.part, read.shape, read.classes, read.knobs, read.card) == (
        made.part, made.shape, made.classes, made.knobs, made.card,
    )  # fmt: skip
    x, level = normals(4, 2, 6, 5, seed=3, dtype=torch.float32), schedule_of(made.part)(0.5)
    assert torch.equal(read.logits(x, level), made.logits(x, level))
    assert not read.training
    assert not any(p.requires_grad for p in read.parameters())
    with pytest.raises(BadArgument, match="exists already"):
        save_classifier(made, tmp_path / "judge")


@pytest.mark.parametrize("name", ["classifier.json", "classifier.safetensors"])
def test_a_flipped_byte_a_cut_and_a_missing_file_are_refused(name: str, tmp_path: Path) -> None:
    save_classifier(judge(), tmp_path / "judge")
    file = tmp_path / "judge" / name
    content = file.read_bytes()
    places = [len(content) // 3, len(content) - 40]
    for broken in [*(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in places), content[:-30], b""]:
        file.write_bytes(broken)
        with pytest.raises(BadCheckpoint) as caught:
            load_classifier(tmp_path / "judge")
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(BadCheckpoint):
        load_classifier(tmp_path / "judge")


def sealed(path: Path, **changes: Any) -> None:
    """Rewrite a card with its hash put right: what someone else could have written."""
    record = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    content = json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True)
    record["sha256"] = hashlib.sha256(content.encode()).hexdigest()
    path.write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other-1"}, "is not of the format inkdrop-classifier-1"),
        ({"schedule": {"name": "os:system", "knobs": {}}}, "would import os:system, code outside inkdrop"),
        ({"schedule": {"name": "vp", "knobs": {"beta_min": "a:b"}}}, "would import a:b, code outside inkdrop"),
        ({"schedule": {"name": "pv", "knobs": {}}}, "cannot be read as a classifier"),
        ({"shape": [2, 3]}, "cannot be read as a classifier"),
        ({"net": {"wdth": 8}}, "cannot be read as a classifier"),
        ({"net": {"width": 16}}, "does not fit this net"),
        ({"classes": ["ant", "bee"]}, "does not fit this net"),
        ({"classes": None}, "cannot be read as a classifier"),
    ],
)
def test_a_card_that_says_something_else_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_classifier(judge(), tmp_path / "judge")
    sealed(tmp_path / "judge" / "classifier.json", **changes)
    with pytest.raises(BadCheckpoint, match=said) as caught:
        load_classifier(tmp_path / "judge")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="nope: is no classifier .* make one with: inkdrop classifier RUN"):
        load_classifier(tmp_path / "nope")


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    made = judge()
    made.net.stem.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(BadArgument, match="a weight is not finite; nothing was saved"):
        save_classifier(made, tmp_path / "judge")
    assert list(tmp_path.iterdir()) == []


# ---- training ----------------------------------------------------------------------------------------------------


def test_the_same_seed_trains_the_same_classifier() -> None:
    def fit(seed: int, before: int) -> dict[str, Tensor]:
        torch.manual_seed(before)  # whatever was drawn before
        return fit_classifier(digits(), steps=3, batch=8, width=8, seed=seed, device="cpu").net.state_dict()

    first, again, other = fit(1, 7), fit(1, 8), fit(2, 7)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_noise_and_order_are_keyed_by_seed_and_update(monkeypatch: pytest.MonkeyPatch) -> None:
    from inkdrop.train import classifier as module

    keys, rows = list[tuple[int, int, int]](), list[list[int]]()

    class Spy(module.Draw):
        def __init__(self, seed: int, update: int, places: Any) -> None:
            super().__init__(seed, update, places)
            keys.append((seed, update, len(places)))

    taken = module.rows_of
    monkeypatch.setattr(module, "Draw", Spy)
    monkeypatch.setattr(module, "rows_of", lambda *key: rows.append(taken(*key)) or rows[-1])
    fit_classifier(digits(), steps=3, batch=8, width=8, seed=5, device="cpu")
    assert keys[:3] == [(5, 0, 8), (5, 1, 8), (5, 2, 8)]
    assert rows == [taken(i, 8, 1437, 5) for i in range(3)]
    assert {seed for seed, _, _ in keys} == {5}


def test_a_folder_that_exists_is_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="exists already; choose another --out"):
        fit_classifier(digits(), tmp_path, steps=10, on_progress=lambda *_: pytest.fail("it was trained"))


def test_it_learns_more_the_less_noise_there_is(tmp_path: Path) -> None:
    """Digits in some 3 s: far above chance (0.1) where the image is seen, near it in noise, and said in its card."""
    told: list[tuple[int, int]] = []
    made = fit_classifier(
        digits(), tmp_path / "judge", steps=100, batch=32, lr=1e-2, width=8, device="cpu",
        on_progress=lambda done, total, text: told.append((done, total)),
    )  # fmt: skip
    found = made.card["accuracy"]
    assert found[0] > 0.7
    assert found[0] > found[2] > found[4]
    assert 0.05 < found[4] < 0.35
    assert told[-1] == (100, 100)
    test = open_data(digits().data, "test")
    assert [round(a, 4) for a in accuracy(made, test)] == found
    assert (made.card["held_out"], made.card["samples"], made.card["updates"]) == (360, 1437, 100)
    assert load_classifier(tmp_path / "judge").card == made.card


def test_accuracy_is_a_share_of_the_held_out_images() -> None:
    """A classifier that says 3 to everything is right on the share of threes, in every band."""
    test = open_data(digits().data, "test")
    made = NoisyClassifier(Part("cosine", {"steps": 100}), (1, 8, 8), test.classes, SMALL).eval()
    with torch.no_grad():
        made.net.head[-1].weight.zero_()
        made.net.head[-1].bias.copy_(torch.arange(10) == 3)
    share = float((test.take(range(len(test)))[1].label == 3).double().mean())
    assert accuracy(made, test, bands=4) == [share] * 4


def test_a_model_is_guided_by_the_classifier_of_its_own_noise() -> None:
    """On a one-step grid from t = 1: x0 + s·(sigma²/alpha)·∇ log p(y|x), of the start noise."""
    recipe = replace(digits(), schedule=Part("vp"))
    bundle = untrained(recipe, (1, 8, 8), CLASSES)
    guided = with_parts(bundle, classifier=judge("vp", (1, 8, 8)))
    asked = {"seed": 2, "steps": 1, "clip": False}
    got = sample(guided, 3, guide=[Part("classifier", {"scale": 1.5})], **asked) - sample(bundle, 3, **asked)
    level = bundle.schedule(1.0)
    x = bundle.schedule.start(normals_of(2, 3), level)
    cond = Cond(label=torch.arange(3))
    want = -1.5 * level.sigma / level.alpha * guided.parts["classifier"](Ask(x, level, cond)).eps
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def normals_of(seed: int, count: int) -> Tensor:
    from inkdrop.core.noise import Keyed

    return Keyed(seed, range(count)).start((count, 1, 8, 8))


# ---- what is refused ---------------------------------------------------------------------------------------------

X, LEVEL = normals(4, 2, 6, 5, dtype=torch.float32), schedule_of("vp")(0.5)
FLAT = schedule_of("flow")(1.0)
REFUSED = [
    (BadArgument, "a question without a class", lambda: judge()(Ask(X, LEVEL))),
    (BadArgument, "a question without a class", lambda: judge()(Ask(X, LEVEL, Cond(vec=torch.zeros(4, 1))))),
    (BadArgument, "a class outside [0, 2]", lambda: judge()(Ask(X, LEVEL, Cond(label=LABELS + 1)))),
    (BadArgument, "a level without signal (alpha = 0)", lambda: judge("flow")(Ask(X, FLAT, COND))),
    (BadShape, "net x: got shape (4, 2, 6, 4), need (B, 2, 6, 5)", lambda: judge()(Ask(X[..., :4], LEVEL, COND))),
    (BadShape, "classifier shape: got (2,), need images", lambda: Encoder((2,), 3)),
    (BadShape, "classifier shape: got (1, 3, 8), need images", lambda: Encoder((1, 3, 8), 3)),
    (BadArgument, "classifier: got 1 classes, need at least 2", lambda: Encoder((1, 8, 8), 1)),
    (BadArgument, "classifier width: got 7, need an even number", lambda: Encoder((1, 8, 8), 3, width=7)),
    (BadArgument, "classifier blocks: got 0", lambda: Encoder((1, 8, 8), 3, blocks=0)),
    (BadArgument, "classifier dropout: got 1", lambda: Encoder((1, 8, 8), 3, dropout=1.0)),
    (BadArgument, "train.steps: got 0", lambda: fit_classifier(digits(), steps=0)),
    (BadArgument, "train.lr: got 0", lambda: fit_classifier(digits(), lr=0.0)),
    (BadShape, "classifier shape: got (1,), need images", lambda: fit_classifier(points(), steps=1, device="cpu")),
    (
        BadData,
        "has 0 classes, need at least 2",
        lambda: fit_classifier(replace(digits(), data=Part("mixture1d", {"count": 9})), steps=1),
    ),
    (
        BadArgument,
        "classifier: was trained with another noise schedule",
        lambda: with_parts(untrained(digits(), (1, 8, 8), CLASSES), classifier=judge("vp", (1, 8, 8))),
    ),
]


@pytest.mark.parametrize(("error", "said", "make"), REFUSED, ids=[row[1] for row in REFUSED])
def test_what_cannot_be_is_one_line(error: type[InkdropError], said: str, make: Any) -> None:
    with pytest.raises(error) as caught:
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
