"""`inkdrop eval` and `inkdrop compare`, from outside: resumed to the bit, keyed by what matters, plain JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import Environment, nodes

import inkdrop
from inkdrop import drawn
from inkdrop.bundle import load
from inkdrop.cli import main
from inkdrop.compare.question import names_of, read_budget
from inkdrop.compare.report import render
from inkdrop.compare.run import _balls
from inkdrop.data.digits import digits
from inkdrop.drawn import Samples, identity
from inkdrop.errors import BadArgument
from inkdrop.evals.classifier import Classifier
from inkdrop.evals.features import Pixels, features_for
from inkdrop.evals.nearest import nearest
from inkdrop.find import Part
from inkdrop.jobs import asks_of, guided_asks_of, with_plan
from inkdrop.plan import change

pytestmark = pytest.mark.app

TINY = ("train.batch=8", "train.steps=4", "net.width=8", "plan.steps=3")


def settings(*each: str) -> list[str]:
    return [part for text in each for part in ("--set", text)]


def run(*args: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    assert (end.value.code or 0) == code


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of digits, two of one recipe with other seeds."""
    folder = tmp_path_factory.mktemp("compare")
    for name, more in (("a0", ()), ("a1", ("train.seed=1",)), ("b0", ("schedule=linear",))):
        run("train", "digits", "--out", folder / name, *settings(*TINY, *more))
    return folder


def figures_of(path: Path) -> dict[str, Any]:
    """What an evaluation wrote, without what differs from run to run."""
    record = json.loads(path.read_text())
    return {key: value for key, value in record.items() if key not in ("seconds", "sampling_seconds")}


def test_eval_is_resumed_to_the_bit(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it samples, the same command goes on; the figures are those of one that was not."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "inkdrop", "eval", str(runs / "a0"), "-n", "600", "--steps", "20"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    monkeypatch.setenv("INKDROP_CACHE", str(cut))
    features_for(digits("train"), digits("test"))
    shutil.copytree(cut, whole)
    first = subprocess.Popen(
        [*command, "--out", str(tmp_path / "killed.json")],
        env=env | {"INKDROP_CACHE": str(cut)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 900
    while not list(cut.glob("samples/*/drawn-*")) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert [path.name for path in cut.glob("samples/*/drawn-*")] != []
    assert not list(cut.glob("samples/*/seen-*"))
    assert not (tmp_path / "killed.json").exists()
    said = {}
    for name, cache in (("again", cut), ("unbroken", whole)):
        done = subprocess.run(
            [*command, "--out", str(tmp_path / f"{name}.json")],
            env=env | {"INKDROP_CACHE": str(cache)},
            capture_output=True,
            text=True,
            check=True,
        )
        said[name] = done.stderr
    assert re.search(r"(256|512) are in the cache; (344|88) samples of 20 asks each: about", said["again"])
    assert "600 samples of 20 asks each: about" in said["unbroken"]
    assert figures_of(tmp_path / "again.json") == figures_of(tmp_path / "unbroken.json")
    assert not list(cut.glob("samples/*/drawn-*"))


def test_eval_prints_one_line_of_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("eval", runs / "a0", "-n", 60, "--sampler", "heun", "--steps", 2, "--json")
    shown = capsys.readouterr()
    [line] = shown.out.splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert (found["n"], found["resize"], found["reference"], found["seed"]) == (60, "none", "test", 0)
    assert (found["plan"]["sampler"]["name"], found["plan"]["steps"], found["asks"]) == ("heun", 2, 3)
    assert len(found["features"]["hash"]) == 12
    assert found["intervals"]["over"] == "images"
    assert found["intervals"]["fid"]["low"] < found["fid"] < found["intervals"]["fid"]["high"]
    assert found["intervals"]["kid"]["value"] == found["kid"]["mean"]
    for key in ("hardware", "versions", "commit", "threads", "seconds", "sampling_seconds"):
        assert key in found
    assert found["versions"]["torch"] == torch.__version__


def test_the_cache_is_keyed_by_all_that_matters(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another weight, plan, seed, batch, data or extractor is another entry; another place of the same data is not."""
    train, test, pixels = digits("train"), digits("test"), Pixels((1, 8, 8))
    bundle = load(runs / "a0")

    def at(model: Any = bundle, seed: int = 0, features: Any = pixels, batch: int = 256, data: Any = train) -> Path:
        return Samples(model, 10, seed, data, test, features, batch).shelf().folder

    changed = load(runs / "a0")
    with torch.no_grad():
        next(changed.denoiser.parameters()).view(-1)[0] += 1e-6
    other = Pixels((1, 8, 8))
    other.hash = "0" * 12
    ways = [at(), at(changed), at(seed=1), at(batch=128), at(features=other), at(data=test), at(load(runs / "b0"))]
    ways += [at(with_plan(bundle, {"steps": 4}, ())), at(with_plan(bundle, {"sampler": "ddpm"}, ()))]
    ways += [at(with_plan(bundle, {"sampler": "ddim"}, ["sampler.eta=0.5"])), at(load(runs / "a0", weights="raw"))]
    assert len(set(ways)) == len(ways)
    assert at(load(runs / "a0")) == at()
    json.dumps(identity(bundle), allow_nan=False)


def test_ranks_on_gpus_of_one_kind_share_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert drawn._kind(torch.device("cuda:0")) == drawn._kind(torch.device("cuda:1")) == "a GPU"
    assert drawn._kind(torch.device("cpu")) == "cpu"


def test_what_is_seen_is_of_the_seeds_samples(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image by image those of `sample`, whatever the batch, and their nearest training images."""
    monkeypatch.setenv("INKDROP_CACHE", str(tmp_path))
    train, test, pixels, bundle = digits("train"), digits("test"), Pixels((1, 8, 8)), load(runs / "a0")
    x = inkdrop.sample(bundle, 25, seed=3)
    samples = Samples(bundle, 25, 3, train, test, pixels, batch=7)
    assert samples.missing(samples.shelf()) == 25
    [found] = samples.seen(samples.shelf())
    torch.testing.assert_close(found["features"], pixels(x.clamp(-1, 1)), rtol=0, atol=1e-4)  # float32 of other batches
    assert found["row"].tolist() == nearest(x.clamp(-1, 1), train).rows
    assert samples.labels().tolist() == [i % 10 for i in range(25)]
    assert samples.missing(samples.shelf()) == 0


def test_compare_writes_a_report_and_goes_on(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three runs at two numbers of steps; asked again, nothing is drawn; another question is refused."""
    models = [runs / name for name in ("a0", "a1", "b0")]
    asked = ["-n", 80, "--steps", 2, "--steps", 4, "--out", tmp_path / "out"]
    run("compare", *models, *asked)
    shown = capsys.readouterr()
    assert "a0, 2 steps: 80 images, 2 asks each: about" in shown.err
    assert "in all about" in shown.err
    record = json.loads((tmp_path / "out" / "compare.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    labels = [entry["label"] for entry in record["entries"]]
    assert labels == [f"{name}, {steps} steps" for name in ("a0", "a1", "b0") for steps in (2, 4)]
    assert [group["entries"] for group in record["recipes"]] == [
        ["a0, 2 steps", "a1, 2 steps"],
        ["a0, 4 steps", "a1, 4 steps"],
    ]
    over = {(d["a"], d["b"]): d["over"] for d in record["differences"]}
    assert over["a0, 2 steps", "a0, 4 steps"] == "training seeds"
    assert over["a0, 2 steps", "b0, 2 steps"] == "images"
    first = record["entries"][0]
    kids = {entry["label"]: entry["kid"]["mean"] for entry in record["entries"]}
    for d in record["differences"]:
        if d["over"] == "images" and d["metric"] == "kid":
            assert d["value"] == kids[d["a"]] - kids[d["b"]]
            assert d["se"] > 0
    assert first["n"] == 80
    assert {0 <= record["floor"][key] <= 1 for key in ("precision", "recall")} == {True}
    assert 0 <= first["precision"] <= 1
    assert first["seconds_a_thousand"] == pytest.approx(first["seconds"] / 80 * 1000)
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        assert all(label in text for label in labels)
        assert f"{first['fid']:.2f}" in text
    assert {p.name for p in (tmp_path / "out" / "pictures").iterdir()} == {"cost.png", "trade.png", "samples.png"}
    kid, fid = record["differences"][:2]
    text = (tmp_path / "out" / "report.md").read_text()
    shown = [f"| KID × 1000 | {1000 * kid['value']:.4g} | {1000 * kid['low']:.4g} to {1000 * kid['high']:.4g} |"]
    shown += [f"| FID | {fid['value']:.4g} | {fid['low']:.4g} to {fid['high']:.4g} |"]
    assert all(row in text for row in shown), "in the units of the table of entries"
    told = [{**d, "clear": i < 4} for i, d in enumerate(record["differences"])]
    render(tmp_path / "out", record | {"differences": told})
    for name, yes, no in (("report.html", "<td>yes</td>", "<td>no</td>"), ("report.md", "| yes |", "| no |")):
        text = (tmp_path / "out" / name).read_text()
        assert (text.count(yes), text.count(no)) == (4, len(told) - 4)
    monkeypatch.setattr(drawn, "sample", lambda *_, **__: pytest.fail("a sample was drawn again"))
    monkeypatch.setattr(Classifier, "__call__", lambda *_: pytest.fail("an image was looked at again"))
    run("compare", *models, *asked)
    again = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert again["entries"] == record["entries"]
    assert again["differences"] == record["differences"]
    run("compare", *models[:2], *asked, code=2)
    assert "holds another comparison" in capsys.readouterr().err


def test_no_template_reads_a_method_of_dict_as_a_figure() -> None:
    """In Jinja d.clear is dict.clear, which is always true; d["clear"] is the figure."""
    files = [*Path(inkdrop.__file__).parent.rglob("*.j2")]
    assert len(files) > 2
    for file in files:
        tree = Environment().parse(file.read_text())
        called = {id(call.node) for call in tree.find_all(nodes.Call)}
        read = {get.attr for get in tree.find_all(nodes.Getattr) if id(get) not in called}
        assert not read & set(dir(dict)), file.name


def test_a_budget_bounds_the_images_of_all_alike(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run("compare", runs / "a0", "-n", 5000, "--steps", 2, "--steps", 3, "--budget", "300asks", "--out", out)
    record = json.loads((out / "compare.json").read_text())
    assert [entry["n"] for entry in record["entries"]] == [60, 60]  # 300 // (2 + 3)
    assert "5000 were asked for" in (out / "report.md").read_text()
    assert record["features"]["name"] == "classifier"
    run("compare", runs / "a0", "--steps", 2, "--steps", 3, "--budget", "100asks", "--out", tmp_path / "no", code=2)
    assert "too little for 50 images of each of 2 entries, which take about 250 asks" in capsys.readouterr().err
    few = ["compare", runs / "a0", "-n", 10, "--steps", 2, "--steps", 3, "--out", tmp_path / "no"]
    run(*few, "--budget", "40asks", code=2)
    assert "too little for 10 images of each of 2 entries, which take about 50 asks" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_guidance_is_counted_in_what_an_entry_costs(runs: Path, tmp_path: Path) -> None:
    """Two rows of the net a step: in the table, in the plot and in the budget."""
    ways = ["--guidance", 1, "--guidance", 4, "--budget", "700asks"]
    run("compare", runs / "a0", *ways, "-n", 900, "--features", "pixels", "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [entry["asks"] for entry in record["entries"]] == [3, 6]
    assert record["n"] == 77  # 700 // (3 + 6)
    assert "| 6 |" in (tmp_path / "out" / "report.md").read_text()


def test_asks_of_guides_are_counted(runs: Path) -> None:
    bundle, nets = load(runs / "a0"), {"weak": 1, "classifier": 1}
    for guides, asks in (
        ([], 4),
        ([Part("cfg", {"scale": 0.0})], 4),
        ([Part("cfg", {"scale": 3.0, "rescale": 0.7})], 8),
        ([Part("cfg", {"scale": 3.0, "stop": 0.5})], 6),  # trailing: t = 1 and 0.75 are guided
        (["autoguidance"], 8),
        (["classifier"], 8),
        (["autoguidance", Part("cfg", {"scale": 3.0})], 12),  # the weak net is asked one branch
        (["threshold", Part("drift", {"mean": [0.0]})], 4),
    ):
        plan = change(bundle.plan, steps=4, guide=["none", *guides])
        of = replace(bundle, recipe=replace(bundle.recipe, plan=plan), parts=nets)
        assert guided_asks_of(of) == asks, guides
        assert asks_of(of) == 4


def test_copies_and_checkpoints_of_a_run_are_not_seeds(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds of a recipe differ by their seed and are equally far; of these alone nothing is drawn again."""

    def compare(*models: Path, out: str) -> dict[str, Any]:
        ways = ["-n", 60, "--features", "pixels", "--steps", 2, "--steps", 3, "--out", tmp_path / out]
        run("compare", *models, *ways)
        found: dict[str, Any] = json.loads((tmp_path / out / "compare.json").read_text())
        return found

    for seed, name in enumerate(("whole", "half")):
        run("train", "digits", "--out", tmp_path / name, *settings(*TINY, f"train.seed={seed}", "train.save_every=2"))
    copy = shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    [early, _] = sorted((tmp_path / "half" / "checkpoints").iterdir())
    record = compare(tmp_path / "whole", copy, early, out="copies")
    assert record["recipes"] == []
    assert {d["over"] for d in record["differences"]} == {"images"}
    assert [entry["updates"] for entry in record["entries"]] == [4, 4, 4, 4, 2, 2]
    same = next(d for d in record["differences"] if (d["a"], d["b"]) == ("whole, 2 steps", "copy, 2 steps"))
    assert (same["value"], same["low"], same["clear"]) == (0, 0, False)
    monkeypatch.setattr("inkdrop.compare.run.redraw", lambda *_, **__: pytest.fail("a bootstrap of seeds"))
    assert {d["over"] for d in compare(runs / "a0", runs / "a1", out="seeds")["differences"]} == {"training seeds"}


def test_models_that_start_from_a_picture_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid shows samples that are told and drawn as those that are scored."""
    monkeypatch.setenv("INKDROP_CACHE", str(tmp_path / "cache"))
    run("train", "digits", "--out", tmp_path / "hole", *settings(*TINY, "net=unet", "image=hole"))
    ways = ["-n", 60, "--steps", 2, "--steps", 3, "--features", "pixels", "--out", tmp_path / "out"]
    drawn_grids = list[torch.Tensor]()
    monkeypatch.setattr("inkdrop.picture.save_grid", lambda x, *_, **__: drawn_grids.append(x))
    run("compare", tmp_path / "hole", *ways)
    [shown] = drawn_grids
    test, pixels = digits("test"), Pixels((1, 8, 8))
    for steps, x in zip((2, 3), shown.split(10), strict=True):
        bundle = with_plan(load(tmp_path / "hole"), {"steps": steps}, ())
        samples = Samples(bundle, 60, 0, digits("train"), test, pixels)
        [scored] = samples.seen(samples.shelf())
        torch.testing.assert_close(pixels(x), scored["features"][:10], rtol=0, atol=1e-4)
        edge = test.take(range(10))[0]
        assert torch.equal(x[..., 0, :], edge[..., 0, :])


def test_precision_and_recall_see_all_classes_of_samples_that_come_class_by_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inkdrop.compare.run._BALLS", 100)
    noise = torch.randn(2, 300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real, made = torch.cat([noise[0, :150], noise[0, 150:] + 9]), torch.cat([noise[1, :150], noise[1, 150:] + 9])
    [found] = _balls([made], real, 0)
    assert found["precision"] is not None
    assert found["recall"] is not None
    assert min(found["precision"], found["recall"]) > 0.8


def test_names_of_models(tmp_path: Path) -> None:
    """As short as tells them apart."""
    one, two = Path("runs/a/checkpoints/step-4"), Path("runs/b/checkpoints/step-4")
    assert names_of([one, two, Path("runs/c"), tmp_path / "." / "d"]) == ["a/step-4", "b/step-4", "c", "d"]
    assert names_of([Path("x/runs/a"), Path("y/runs/a"), Path(".")]) == ["x/runs/a", "y/runs/a", Path.cwd().name]
    with pytest.raises(BadArgument, match="got c twice"):
        names_of([Path("c"), Path("c")])


def test_any_name_of_a_folder_is_reported(runs: Path, tmp_path: Path) -> None:
    """No formula in plots, no cell in tables and no tag in pages."""
    odd = shutil.copytree(runs / "a0", tmp_path / "a$x_$b|<b>")
    out = tmp_path / "out"
    ways = ["-n", 60, "--steps", 2, "--steps", 3, "--features", "pixels"]
    run("compare", odd, *ways, "--out", out)
    text = (out / "report.md").read_text()
    assert r"a$x_$b\|\<b>, 2 steps" in text
    floor = json.loads((out / "compare.json").read_text())["floor"]
    assert f"| {floor['precision']:.3f} | {floor['recall']:.3f} | | |" in text
    assert f"<td>{floor['precision']:.3f}</td><td>{floor['recall']:.3f}</td>" in (out / "report.html").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {8, 7}
    assert "<b>" not in (out / "report.html").read_text()
    assert "(pictures/trade.png)" in text


def test_precision_of_too_few_images_has_no_plot(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inkdrop.compare.run._BALLS", 5)
    out = tmp_path / "out"
    run("compare", runs / "a0", "-n", 6, "--steps", 2, "--steps", 3, "--features", "pixels", "--out", out)
    assert json.loads((out / "compare.json").read_text())["floor"] == {"precision": None, "recall": None}
    assert "trade" not in (out / "report.md").read_text()
    assert "Fidelity" not in (out / "report.html").read_text()
    assert not (out / "pictures" / "trade.png").exists()


def test_compare_takes_other_features(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are a part of the question; what is set is theirs alone."""
    ways, pixels = ["compare", runs / "a0", "-n", 60, "--steps", 2, "--steps", 3], ["--features", "pixels"]
    run(*ways, *pixels, "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["features"]["name"] == "pixels"
    assert record["entries"][0]["classes"] is None
    run(*ways, "--out", tmp_path / "out", code=2)
    assert "holds another comparison" in capsys.readouterr().err
    run(*ways, *pixels, "--set", "plan.steps=9", "--out", tmp_path / "no", code=2)
    assert "need features.KNOB=VALUE" in capsys.readouterr().err


def test_budgets_are_read() -> None:
    assert read_budget("90s") == ("seconds", 90)
    assert read_budget("1.5h") == ("seconds", 5400)
    assert read_budget("2000asks") == ("asks", 2000)
    for bad in ("90", "s", "-3s", "0asks", "infs", "nanm"):
        with pytest.raises(BadArgument, match="budget: got"):
            read_budget(bad)


def test_compare_refuses(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, text in (
        ([runs / "a0"], "one model and one way"),
        ([runs / "a0", runs / "b0" / ".." / "a0"], "a0 twice, need each model once"),
        ([runs / "a0", "--steps", 2, "--steps", 3, "--steps", 2], "compare steps: got 2 twice, need each once"),
        ([runs / "a0", "--guidance", 0, "--guidance", 0], "compare guidance: got 0.0 twice"),
        ([runs / "a0", runs / "b0", "-n", 5], "need at least 6"),
    ):
        run("compare", *args, "--out", tmp_path / "new", code=2)
        assert text in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    run("compare", runs / "a0", runs / "b0", "--out", tmp_path / "mine", code=2)
    assert "is not the folder of a comparison" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    for text in ("[1]", "{"):
        (tmp_path / "mine" / "plan.json").write_text(text)
        run("compare", runs / "a0", runs / "b0", "--out", tmp_path / "mine", code=2)
        assert "plan.json: cannot be read" in capsys.readouterr().err
