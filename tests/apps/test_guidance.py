"""Guidance from the command line: classifiers trained and asked, weak nets, guides added and dropped, and reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inkdrop.bundle import load
from inkdrop.classifier import load_classifier, with_parts
from inkdrop.cli import main
from inkdrop.evals.features import features_for
from inkdrop.find import Part
from inkdrop.generate import sample
from inkdrop.recipe import open_data
from inkdrop.train.classifier import fit_classifier
from inkdrop.train.loop import fit

pytestmark = pytest.mark.app

NET = ("net=unet", "net.width=4", "net.multipliers=[1]", "net.blocks=1", "net.middle_attention=false")
TINY = (*NET, "schedule.steps=100", "train.batch=4", "train.steps=6", "train.save_every=3", "plan.steps=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 6 updates on digits, with a checkpoint half way."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit("digits", folder, settings=TINY, device="cpu")
    return folder


@pytest.fixture(scope="module")
def judge(run, tmp_path_factory):
    """A classifier of its noisy digits, of 4 updates."""
    folder = tmp_path_factory.mktemp("judges") / "judge"
    fit_classifier(load(run).recipe, folder, steps=4, batch=8, width=8, device="cpu")
    return folder


@pytest.fixture
def inkdrop(tmp_path, monkeypatch, capsys):
    """The command line in an empty folder: stdout, or the line on stderr of a command that must fail."""
    monkeypatch.chdir(tmp_path)

    def command(*args: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        shown = capsys.readouterr()
        assert (end.value.code or 0) == code, shown.err
        assert "Traceback" not in shown.out + shown.err
        return shown.err if code else shown.out

    return command


def made(folder: str = "samples") -> np.ndarray:
    """The images of a sample folder, (N, H, W) bytes."""
    return np.stack([np.array(Image.open(path)) for path in sorted(Path(folder).glob("[0-9]*.png"))])


def as_bytes(x: torch.Tensor) -> np.ndarray:
    return np.clip(np.rint((x[:, 0].numpy() + np.float32(1)) * np.float32(127.5)), 0, 255).astype(np.uint8)


def how(folder: str = "samples") -> dict:
    return json.loads(Path(folder, "sample.json").read_text())


def test_a_classifier_is_trained_from_a_run_and_guides_its_samples(run, inkdrop):
    out = inkdrop("classifier", run, "--out", "judge", "--max-steps", 5, "--width", 8, "--seed", 3)
    made_here = load_classifier("judge")
    assert (made_here.card["updates"], made_here.card["seed"], made_here.knobs["width"]) == (5, 3, 8)
    shares = ", ".join(f"{share:.1%}" for share in made_here.card["accuracy"])
    assert out == f"classifier: judge, right on {shares} of held-out images, from clean to noise\n"
    inkdrop("sample", run, "-n", 4, "--classifier", "judge", "--set", "classifier.scale=9", "--guidance", 0)
    bundle = with_parts(load(run), classifier=made_here)
    expected = sample(bundle, 4, guidance=0, guide=[Part("classifier", {"scale": 9.0})])
    assert np.array_equal(made(), as_bytes(expected))
    assert not np.array_equal(made(), as_bytes(sample(bundle, 4, guidance=0)))
    assert [p["name"] for p in how()["plan"]["guide"]] == ["clip", "classifier", "cfg"]
    assert how()["card"]["classifier"] == made_here.card


def test_an_early_checkpoint_is_a_weak_net(run, inkdrop):
    """--weak brings autoguidance along, with the scale that is its default."""
    early = run / "checkpoints" / "step-00000003"
    for settings, knobs in (((), {}), (("--set", "autoguidance.scale=4"), {"scale": 4.0})):
        inkdrop("sample", run, "-n", 4, "--weak", early, *settings, "--out", f"out{len(settings)}")
        both = with_parts(load(run), weak=load(early))
        expected = sample(both, 4, guide=[Part("autoguidance", knobs)])
        assert np.array_equal(made(f"out{len(settings)}"), as_bytes(expected))
        assert not np.array_equal(as_bytes(expected), as_bytes(sample(both, 4)))
    assert how("out2")["card"]["weak"]["updates"] == 3
    assert how("out2")["card"]["updates"] == 6


@pytest.mark.parametrize(
    ("options", "changes", "guide"),
    [
        (["--guide", "none"], {"guide": ["none"]}, []),
        (["--guide", "none", "--guide", "threshold"], {"guide": ["none", "threshold"]}, ["threshold"]),
        (
            ["--no-clip", "--guide", "threshold", "--set", "threshold.percentile=1"],
            {"clip": False, "guide": [Part("threshold", {"percentile": 1.0})]},
            ["threshold", "cfg"],
        ),
        (
            ["--guide", "drift", "--set", "drift.mean=-0.4", "--set", "drift.std=0.5"],
            {"guide": [Part("drift", {"mean": -0.4, "std": 0.5})]},
            ["clip", "drift", "cfg"],
        ),
        (
            ["--guidance", "5", "--set", "cfg.rescale=0.7", "--set", "cfg.start=0.9", "--set", "cfg.negative=3"],
            {"guide": [Part("cfg", {"scale": 5.0, "rescale": 0.7, "start": 0.9, "negative": 3})]},
            ["clip", "cfg"],
        ),
        (["--noise", "brownian", "--sampler", "ddpm"], {"noise": "brownian", "sampler": "ddpm"}, ["clip", "cfg"]),
        (
            ["--set", "plan.noise=brownian", "--set", "sampler.eta=1"],
            {"noise": "brownian", "sampler": Part("ddim", {"eta": 1.0})},
            ["clip", "cfg"],
        ),
        (["--combine", "restart", "--steps", "8"], {"combine": "restart", "steps": 8}, ["clip", "cfg"]),
        (["--set", "combine=restart", "--set", "plan.steps=8"], {"combine": "restart", "steps": 8}, ["clip", "cfg"]),
        (["--set", "plan.guide=cfg"], {"clip": False}, ["cfg"]),
    ],
)  # fmt: skip
def test_every_option_of_guidance_has_its_effect(options, changes, guide, run, inkdrop):
    """What is written is what the Python API makes with the same changes, and not what it makes without."""
    inkdrop("sample", run, "-n", 4, "--out", "out", *options)
    expected = sample(load(run), 4, **changes)
    assert np.array_equal(made("out"), as_bytes(expected))
    assert not torch.equal(expected, sample(load(run), 4))
    assert [p["name"] for p in how("out")["plan"]["guide"]] == guide
    assert how("out")["plan"]["noise"] == changes.get("noise")
    assert (how("out")["plan"]["combine"] or {}).get("name") == changes.get("combine")


def test_a_score_says_how_its_samples_were_guided(inkdrop):
    """Points without a judge to train; the run is its own weak net, which guides nowhere but is asked."""
    net = ("net.width=8", "net.depth=1", "data.count=80", "data.labelled=true", "train.batch=4", "plan.steps=2")
    fit("mixture1d", "run", settings=net, max_steps=2, device="cpu")
    inkdrop("eval", "run", "-n", 30, "--weak", "run", "--guidance", 2, "--out", "figures.json")
    figures = json.loads(Path("figures.json").read_text())
    assert [p["name"] for p in figures["plan"]["guide"]] == ["autoguidance", "cfg"]
    assert figures["checkpoint"]["weak"]["updates"] == 2


def test_a_score_that_cannot_be_is_refused_before_its_judge_is_trained(run, inkdrop, monkeypatch):
    monkeypatch.setattr("inkdrop.evals.features.features_for", lambda *args, **more: pytest.fail("it was trained"))
    for options, said in (
        (["--guide", "threshold"], "guide: clip and threshold do the same work"),
        (["--guide", "classifier"], "asks a part 'classifier'"),
        (["--guidance", 2, "--set", "cfg.negative=10"], "cfg negative: got 10"),
    ):
        assert said in inkdrop("eval", run, "-n", 4, *options, code=2)
    for options in (["--guide", "none"], ["--noise", "white"], ["--combine", "none"], ["--weak", run]):
        assert "which has no effect" in inkdrop("eval", run, "--nll", *options, code=2)


REFUSED = [
    ("--guide classifier", "asks a part 'classifier', which this model does not have; give it by --classifier PATH"),
    ("--guide autoguidance", "autoguidance: asks a part 'weak', which this model does not have; give it by --weak"),
    ("--guide threshold", "guide: clip and threshold do the same work; keep one of them"),
    ("--guide drift", "drift: needs a value for 'mean'; give --set drift.mean=..."),
    ("--guide nonsense", "guide: unknown name 'nonsense'"),
    ("--set threshold.percentile=0.9", "of a trained model only sampler, grid, combine, plan, clip, cfg can change; "
     "add --guide threshold first"),
    ("--set cfg.rescale=0.5", "cfg rescale: got 0.5, which has no effect at scale 1; try cfg.scale=3"),
    ("--guidance 2 --set cfg.negative=10", "cfg negative: got 10, need a number in [0, 9]"),
    ("--guidance 2 --set cfg.start=50", "cfg start and stop: got 50 and 0, need 0 <= stop < start <= 1"),
    ("--combine twice", "combinators: unknown name 'twice'"),
    ("--set combine.n=2", "there is no combine; name one first"),
    ("--noise pink", "noise: got 'pink', need white or brownian"),
    ("--weak nope", "nope: no such folder"),
    ("--classifier nope", "nope: is no classifier (it has no classifier.json)"),
    ("--classifier JUDGE --set classifier.scale=-1", "classifier scale: got -1, need a finite number of at least 0"),
    ("--classifier JUDGE --set classifier.start=0", "classifier start and stop: got 0 and 0, need"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_work_is_one_line_and_writes_nothing(options, said, run, judge, inkdrop):
    err = inkdrop("sample", run, "-n", 2, *options.replace("JUDGE", str(judge)).split(), code=2)
    assert said in err
    assert err.count("\n") == 1, err
    assert list(Path().iterdir()) == []


def test_a_part_of_another_model_is_refused(run, judge, inkdrop, tmp_path_factory):
    """Another schedule, for the classifier and the weak net alike."""
    other = tmp_path_factory.mktemp("other") / "run"
    fit("digits", other, settings=[*TINY, "schedule=linear", "schedule.rescale=true"], max_steps=1, device="cpu")
    for option, part in (("--classifier", judge), ("--weak", run)):
        err = inkdrop("sample", other, "-n", 2, option, part, code=2)
        assert "was trained with another noise schedule than the model" in err
    err = inkdrop("classifier", run, "--out", judge, code=2)
    assert "exists already" in err


def agreement(bundle, judge, **changes) -> float:
    """The share of 100 samples in which the judge of the demo finds the class that was asked for."""
    x = sample(bundle, 100, seed=5, steps=25, **changes)
    return float((judge.probabilities(x.clamp(-1, 1)).argmax(1) == torch.arange(100) % 10).double().mean())


@pytest.mark.slow
def test_a_trained_classifier_makes_an_unconditional_model_say_what_is_asked(tmp_path):
    """Digits, both trained for some 40 s: without the classifier agreement is by chance (10 %, standard error 3 %)."""
    bundle = fit("digits", tmp_path / "run", settings=["train.steps=400", "train.warmup=40"], device="cpu")
    guided = with_parts(bundle, classifier=fit_classifier(bundle.recipe, steps=400, width=16, device="cpu"))
    data = [open_data(bundle.recipe.data, split) for split in ("train", "test")]
    judge = features_for(*data)
    plain = agreement(guided, judge, guidance=0)
    found = agreement(guided, judge, guidance=0, guide=[Part("classifier", {"scale": 4.0})])
    assert plain < 0.25
    assert found > plain + 0.5
