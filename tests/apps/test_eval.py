"""`inkdrop eval`, from outside: what it refuses before it draws, what it says of the model and of its data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inkdrop import drawn
from inkdrop.bundle import load, save
from inkdrop.cli import main
from inkdrop.data.digits import digits as digit_data
from inkdrop.errors import BadArgument
from inkdrop.eval_jobs import check_data
from inkdrop.files import weights_hash
from inkdrop.plan import change
from inkdrop.train.loop import fit
from runs import digits

pytestmark = pytest.mark.app

FEW = ("--features", "pixels", "-n", 40, "--steps", 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits with classes, two updates: the averaged weights are others than the raw ones."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    fit(digits(steps=2), folder)
    return folder


def inkdrop(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["eval", *[str(arg) for arg in args]])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    return int(end.value.code or 0), shown.out, shown.err


@pytest.mark.parametrize(
    ("metric", "knob", "text"),
    [
        ("prdc", "prdc.k=400", "prdc of 40 samples: prdc with k=400: got 360 and 40 rows, need at least 401 of each"),
        ("cmmd", "cmmd.sigma=-1", "sigma: got -1, need more than 0"),
        ("sliced", "sliced.power=0", "need at least 1 of each"),
        ("fid_limit", "fid_limit.points=2", "need at least 128"),
    ],
)
def test_a_metric_that_cannot_be_had_is_refused_before_anything_is_drawn(
    run: Path, capsys: pytest.CaptureFixture[str], metric: str, knob: str, text: str
) -> None:
    code, _, err = inkdrop(capsys, run, *FEW, "--metric", metric, "--set", knob)
    assert (code, text in " ".join(err.split()), "of sampling" in err) == (2, True, False), err


def test_a_metric_of_few_training_images_says_that_it_is_they() -> None:
    from inkdrop.evals.features import Pixels
    from inkdrop.evals.score import check_metrics
    from inkdrop.find import Part

    features, k = Pixels((1, 8, 8)), Part("prdc", {"k": 100})
    check_metrics([k], features, made=400, train=101, test=400)
    with pytest.raises(BadArgument, match="prdc of 100 training images, which stand beside the samples: .*401|101"):
        check_metrics([k], features, made=400, train=100, test=400)
    with pytest.raises(BadArgument, match="fid_limit: got 100 training images.* need at least 128"):
        check_metrics([Part("fid_limit")], features, made=400, train=100, test=400)


def test_figures_say_of_which_model_they_are(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for weights in ("ema", "raw"):
        code, out, err = inkdrop(capsys, run, *FEW, "--json", "--weights", weights)
        assert code == 0, err
        found[weights] = json.loads(out)
        assert found[weights]["model"] == {"path": str(run), "weights": weights}
    assert found["ema"]["weights"] != found["raw"]["weights"]
    assert found["ema"]["weights"] == weights_hash(load(run).denoiser)


def test_data_that_are_others_are_said_to_be(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bundle, data = load(run), digit_data("train")
    assert check_data(bundle, data) == []
    assert "not the data that the model was trained on" in check_data(bundle, digit_data("test"))[0]
    assert check_data(replace(bundle, card={}), digit_data("test")) == [], "models from elsewhere do not say"
    with pytest.raises(BadArgument, match="the data have the classes 0, 1, 2, 3, …, but the model knows ant, bee"):
        check_data(replace(bundle, classes=("ant", "bee")), data)
    save(replace(bundle, card={**bundle.card, "fingerprint": "other"}), tmp_path / "moved")
    code, out, err = inkdrop(capsys, tmp_path / "moved", *FEW)
    assert code == 0, err
    assert "note: these are not the data" in " ".join(out.split())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_pace_of_one_question_is_timed(run: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The clock counts what the net was asked; of a sampler of one question it had timed none."""
    bundle, asked = load(run), 0

    def heard(*args: object) -> None:
        nonlocal asked
        asked += 1

    bundle.denoiser.net.register_forward_hook(heard)
    monkeypatch.setattr(drawn.time, "perf_counter", lambda: float(asked))
    bundle = replace(bundle, recipe=replace(bundle.recipe, plan=change(bundle.plan, sampler="ddim", steps=count)))
    assert drawn.pace(bundle, digit_data("test"), rows=4) == 1 / 4
    assert asked == 2
    assert torch.is_grad_enabled()


def test_asks_count_guidance(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for scale, want in ((1, 2), (4, 4)):
        code, out, err = inkdrop(capsys, run, *FEW, "--guidance", scale, "--json")
        assert (code, json.loads(out)["asks"]) == (0, want), err
