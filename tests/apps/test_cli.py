"""The command line, from outside: each command does what it says, writes what it says, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inkdrop import __version__, picture
from inkdrop.bundle import checkpoints, load, locate
from inkdrop.cli import main
from inkdrop.drive import trace
from inkdrop.files import weights_hash
from inkdrop.find import Part, names
from inkdrop.generate import sample
from inkdrop.jobs import asks_of, with_plan
from inkdrop.plan import grid_of
from inkdrop.recipe import read
from inkdrop.samplers.ddim import ddim
from inkdrop.samplers.heun import heun
from inkdrop.train.snapshots import reconstruct
from inkdrop.train.trainer import Trainer
from runs import files_of, log_of

pytestmark = pytest.mark.app

NET = ("net=unet", "net.width=4", "net.multipliers=[1]", "net.blocks=1", "net.middle_attention=false")
TINY = (*NET, "train.batch=4", "train.steps=6", "train.save_every=3", "train.log_every=1", "plan.steps=3")


def settings(*each: str) -> list[str]:
    return [part for text in each for part in ("--set", text)]


@pytest.fixture
def inkdrop(tmp_path, monkeypatch, capsys):
    """The command line in an empty folder: (stdout, stderr) of a command that must succeed."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        shown = capsys.readouterr()
        assert (end.value.code or 0) == code, shown.err
        assert "Traceback" not in shown.out + shown.err
        return shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 6 updates on digits, made by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(SystemExit) as end:
        main(["train", "digits", "--out", str(folder), *settings(*TINY)])
    assert not end.value.code
    return folder


def picture_of(path: Path | str) -> tuple[str, np.ndarray]:
    """The mode and the pixels of an image file."""
    with Image.open(path) as image:
        return image.mode, np.array(image)


def images_of(folder: Path) -> list[np.ndarray]:
    return [picture_of(path)[1] for path in sorted(folder.glob("[0-9]*.png"))]


def bytes_of(x: torch.Tensor) -> list[np.ndarray]:
    """(N, C, H, W) in [-1, 1] as 8-bit arrays, written here again: round((x + 1)·127.5), in float32."""
    values = np.clip(np.rint((x.numpy() + np.float32(1)) * np.float32(127.5)), 0, 255).astype(np.uint8)
    return [one[0] if len(one) == 1 else one.transpose(1, 2, 0) for one in values]


def same(mine: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return len(mine) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


# ---- train and resume --------------------------------------------------------------------------------------------


def test_training_writes_a_run(run, inkdrop):
    assert {p.name for p in run.iterdir()} == {"recipe.json", "run.json", "stats.jsonl", "checkpoints", "previews"}
    recipe = read(run / "recipe.json")
    assert recipe.net == Part("unet", {"width": 4, "multipliers": [1], "blocks": 1, "middle_attention": False})
    assert (recipe.train.steps, recipe.train.batch, recipe.plan.steps) == (6, 4, 3)
    assert [p.name for p in checkpoints(run)] == ["step-00000003", "step-00000006"]
    assert [line["update"] for line in log_of(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    about = json.loads((run / "run.json").read_text())
    assert about["versions"]["inkdrop"] == __version__
    assert about["versions"]["torch"] == torch.__version__
    assert about["seed"] == 0
    assert about["hardware"]["cores"] == os.cpu_count()
    card = load(run).card
    assert card["updates"] == 6
    assert card["samples"] == 1437
    assert card["parameters"] == sum(p.numel() for p in load(run).denoiser.parameters())


def test_a_run_is_repeated_from_its_recipe_json_alone(run, inkdrop):
    out, err = inkdrop("train", run / "recipe.json", "--out", "again")
    assert "next:    inkdrop sample again -n 16" in out
    assert "stopped at update 6: finished" in err
    assert files_of(locate(Path("again"))) == files_of(locate(run))
    assert log_of(Path("again")) == log_of(run)


def test_the_default_place_is_runs_and_the_recipes_name(inkdrop):
    net = settings("net.width=8", "net.depth=1", "data.count=50", "train.batch=4", "plan.steps=2")
    inkdrop("train", "mixture1d", "--max-steps", 2, *net)
    assert locate(Path("runs/mixture1d")).name == "step-00000002"
    assert picture_of("runs/mixture1d/previews/step-00000002.png")[0] == "L"


def test_a_dry_run_says_what_would_be_and_writes_nothing(inkdrop, tmp_path):
    out, err = inkdrop("train", "digits", "--dry-run", *settings(*TINY))
    assert list(tmp_path.rglob("*")) == []
    assert err == ""
    text, rest = out.split("\n}\n")
    (tmp_path / "recipe.json").write_text(text + "}")
    recipe = read(tmp_path / "recipe.json")
    facts = {line.split("  ")[0].strip(): line for line in rest.splitlines() if line.strip()}
    count = sum(p.numel() for p in Trainer(recipe, None).denoiser.parameters())
    assert f"{count:,}" in facts["parameters"]
    assert f"{20 * count / 1024:.4g} KiB weights and optimiser" in facts["memory"]
    assert "1,437 to train on, 360 held out" in facts["samples"]
    assert "1 × 8 × 8" in facts["shape"]
    assert "10: 0, 1, 2" in facts["classes"]
    assert f"6 updates of 4: {24 / 1437:.1f} epochs" in facts["training"]


def test_max_time_ends_a_run_and_it_can_be_resumed_and_lengthened(inkdrop):
    slow = settings(*TINY, "train.steps=1000000", "train.save_every=1000000", "train.decay=constant")
    _, err = inkdrop("train", "digits", "--out", "run", "--max-time", 0.2, *slow)
    assert "max-time" in err
    reached = load("run").card["updates"]
    assert 1 <= reached < 1000
    _, err = inkdrop("resume", "run", "--max-steps", reached + 2)
    assert f"stopped at update {reached + 2}: max-steps" in err
    inkdrop("resume", "run", "--set", f"train.steps={reached + 3}", "--max-steps", reached + 9)
    assert load("run").card["updates"] == reached + 3
    assert read(Path("run/recipe.json")).train.steps == reached + 3
    _, err = inkdrop("resume", "run")
    assert err == f"stopped at update {reached + 3}: finished\n"


# ---- ema ---------------------------------------------------------------------------------------------------------


def test_an_average_of_another_length_is_made_of_a_run_s_snapshots(run, inkdrop):
    """It is a checkpoint like any other: that of `reconstruct`, which is shown and sampled, and repeats nothing."""
    inkdrop("train", "digits", "--out", "kept", *settings(*TINY, "train.snapshots=1", "train.lr=0.01"))
    out, err = inkdrop("ema", "kept", "--length", 0.1, "--out", "made/tenth")
    assert out == "checkpoint: made/tenth, whose profile differs by 0.00% of its norm\n"
    assert err == ""
    inkdrop("ema", "kept", "--length", 0.2, "--out", "made/fifth")
    tenth, fifth = load("made/tenth"), load("made/fifth")
    expected = reconstruct("kept", 0.1)
    for mine, theirs in zip(tenth.denoiser.parameters(), expected.denoiser.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert (tenth.card["ema_length"], fifth.card["ema_length"]) == (0.1, 0.2)
    assert not torch.equal(sample(tenth, 2), sample(fifth, 2))
    inkdrop("sample", "made/tenth", "-n", 2)
    assert same(images_of(Path("samples")), bytes_of(sample(tenth, 2)))
    _, err = inkdrop("ema", "kept", "--length", 0.1, "--out", "made/tenth", code=2)
    assert err.count("\n") == 1
    assert "made/tenth: " in err
    _, err = inkdrop("ema", run, "--length", 0.1, "--out", "none", code=2)
    assert err.endswith("holds no power-function averages; train with --set train.snapshots=500\n")
    _, err = inkdrop("ema", "kept", "--length", 0.5, "--out", "none", code=2)
    assert err == "inkdrop: ema length: got 0.5, need a number in (0, 0.28]; try 0.08\n"
    assert not Path("none").exists()


# ---- sample ------------------------------------------------------------------------------------------------------


def test_sampling_writes_each_image_a_grid_and_how(run, inkdrop):
    out, _ = inkdrop("sample", run, "-n", 5, "--seed", 7)
    assert out == "samples: samples/grid.png\n"
    expected = sample(load(run), 5, seed=7)
    assert same(images_of(Path("samples")), bytes_of(expected))
    assert {p.name for p in Path("samples").iterdir()} == {f"{i:06d}.png" for i in range(5)} | {
        "grid.png", "sample.json",
    }  # fmt: skip
    picture.save_grid(expected, "expected.png")
    assert Path("samples/grid.png").read_bytes() == Path("expected.png").read_bytes()
    how = json.loads(Path("samples/sample.json").read_text())
    assert (how["seed"], how["count"], how["classes"]) == (7, 5, ["0", "1", "2", "3", "4"])
    assert how["plan"] == json.loads((run / "recipe.json").read_text())["plan"]
    assert how["card"]["updates"] == 6
    assert how["model"] == {"path": str(run), "weights": "ema"}
    assert how["weights"] == weights_hash(load(run).denoiser)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (["--sampler", "ddpm"], {"sampler": "ddpm"}),
        (["--set", "sampler.eta=0.5"], {"sampler": Part("ddim", {"eta": 0.5})}),
        (["--sampler", "heun", "--set", "sampler.space=rho"], {"sampler": Part("heun", {"space": "rho"})}),
        (["--steps", "5"], {"steps": 5}),
        (["--set", "plan.steps=5"], {"steps": 5}),
        (["--grid", "karras", "--set", "grid.power=3"], {"grid": Part("karras", {"power": 3.0})}),
        (["--guidance", "0"], {"guidance": 0}),
        (["--set", "cfg.scale=4"], {"guidance": 4}),
        (["--no-clip"], {"clip": False}),
        (["--class", "3"], {"label": 3}),
        (["--class", "3", "--class", "1"], {"label": [3, 1, 3, 1]}),
        (["--seed", "9"], {"seed": 9}),
    ],
)
def test_every_option_of_sampling_has_its_effect(options, changes, run, inkdrop):
    """What is written is what the Python API makes with the same changes, and not what it makes without."""
    inkdrop("sample", run, "-n", 4, "--out", "out", *options)
    expected = sample(load(run), 4, **{"seed": 0, **changes})
    assert same(images_of(Path("out")), bytes_of(expected))
    assert not torch.equal(expected, sample(load(run), 4))
    plan = json.loads(Path("out/sample.json").read_text())["plan"]
    assert ("clip" in [part["name"] for part in plan["guide"]]) == ("--no-clip" not in options)


def test_raw_weights_can_be_sampled(run, inkdrop):
    inkdrop("sample", run, "-n", 2, "--weights", "raw", "--out", "raw")
    raw = load(run, weights="raw")
    assert same(images_of(Path("raw")), bytes_of(sample(raw, 2)))
    how = json.loads(Path("raw/sample.json").read_text())
    assert (how["model"]["weights"], how["weights"]) == ("raw", weights_hash(raw.denoiser))
    assert not torch.equal(sample(load(run, weights="raw"), 2), sample(load(run), 2))


def test_an_older_checkpoint_can_be_sampled(run, inkdrop):
    older = run / "checkpoints" / "step-00000003"
    inkdrop("sample", older, "-n", 2)
    assert same(images_of(Path("samples")), bytes_of(sample(load(older), 2)))
    assert json.loads(Path("samples/sample.json").read_text())["card"]["updates"] == 3


def test_overwriting_replaces_samples_whole(run, inkdrop, monkeypatch):
    inkdrop("sample", run, "-n", 4)
    before = images_of(Path("samples"))
    _, err = inkdrop("sample", run, "-n", 2, "--seed", 1, code=2)
    assert err == "inkdrop: samples: exists already; choose another --out, or --overwrite\n"
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        _, err = inkdrop("sample", run, "-n", 2, "--seed", 1, "--overwrite", code=2)
    assert "No space left on device" in err
    assert same(images_of(Path("samples")), before), "the older samples are lost"
    inkdrop("sample", run, "-n", 2, "--seed", 1, "--overwrite")
    assert same(images_of(Path("samples")), bytes_of(sample(load(run), 2, seed=1)))
    assert [p.name for p in Path().iterdir()] == ["samples"]


@pytest.mark.parametrize(("name", "factor", "table"), [("ddim", 1, ddim), ("heun", 2, heun)])
def test_progress_counts_the_questions_that_are_asked(name, factor, table, run):
    bundle = with_plan(load(run), {"sampler": name, "steps": 7, "guidance": 3.0}, ())
    assert asks_of(bundle) == 7 * factor - (factor - 1)
    assert asks_of(bundle) == len(trace(table, grid_of(bundle.plan, bundle.schedule))) - 1


# ---- show, list, help --------------------------------------------------------------------------------------------


def test_show_says_what_a_run_holds(run, inkdrop):
    out, err = inkdrop("show", run)
    facts = {line.split("  ")[0].strip(): line for line in out.splitlines() if line.strip()}
    assert "6" in facts["updates"].split()
    assert "1 × 8 × 8" in facts["shape"]
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in facts["classes"]
    assert "unet(width=4, multipliers=[1], blocks=1" in facts["net"]
    assert "ddim, 3 steps of trailing" in facts["sampling"]
    assert err == ""


def test_list_shows_rooms_names_and_knobs(inkdrop):
    out, _ = inkdrop("list")
    for room in ("samplers", "schedules", "targets", "grids", "nets", "data", "losses", "weights", "guide", "recipes"):
        assert room in out
    out, _ = inkdrop("list", "samplers")
    listed = [line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")]
    assert [name for name in listed if name != "name"] == names("samplers")
    out, _ = inkdrop("list", "samplers", "ddim")
    assert ["eta", "float", "0.0"] in [line.split() for line in out.splitlines()]
    assert "Song et al. 2021" in out
    out, _ = inkdrop("list", "schedules", "table")
    assert ["betas", "tuple[float,", "...]", "needed"] in [line.split() for line in out.splitlines()]
    out, _ = inkdrop("--version")
    assert out == f"inkdrop {__version__}\n"


# ---- data of one's own -------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int, size: tuple[int, int], mode: str) -> None:
    """Noise of one size, (width, height); three quarters are called train."""
    rng = np.random.default_rng(0)
    for n in range(count):
        folder.mkdir(parents=True, exist_ok=True)
        bands = len(mode) if mode != "L" else 0
        shape = (size[1], size[0], bands) if bands else (size[1], size[0])
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{n}.png")


FOLDER = ("net.width=4", "net.multipliers=[1]", "net.blocks=1", "net.attention=[]", "net.middle_attention=false")
SHORT = settings(*FOLDER, "train.batch=4", "train.preview_every=2", "plan.steps=2")


@pytest.mark.parametrize(
    ("size", "mode", "shape"),
    [((28, 28), "L", (1, 28, 28)), ((32, 48), "RGB", (3, 48, 32)), ((9, 7), "RGBA", (4, 7, 9))],
)
def test_a_folder_of_images_of_any_shape(size, mode, shape, inkdrop):
    """Channels, size and classes are inferred; what is sampled has the shape of what was there."""
    for name in ("cats", "dogs"):
        write_images(Path("photos") / name, 6, size, mode)
    inkdrop("data", "check", "photos")
    inkdrop("train", "folder", "--data", "photos", "--out", "run", "--max-steps", 2, *SHORT)
    bundle = load("run")
    assert (bundle.shape, bundle.classes, bundle.levels) == (shape, ("cats", "dogs"), 256)
    inkdrop("sample", "run", "-n", 3, "--class", "dogs", "--out", "out", "--guidance", 2)
    made = [picture_of(path) for path in sorted(Path("out").glob("[0-9]*.png"))]
    assert [(kind, one.shape[:2]) for kind, one in made] == [(mode, shape[1:])] * 3
    assert same(images_of(Path("out")), bytes_of(sample(bundle, 3, label=1, guidance=2)))
    assert json.loads(Path("out/sample.json").read_text())["classes"] == ["dogs"] * 3


def test_a_folder_of_arrays_with_5_channels(inkdrop):
    """They cannot be shown as pictures: samples.npy holds them, and the grid shows the first channel."""
    Path("arrays").mkdir()
    rng = np.random.default_rng(0)
    for n in range(8):
        np.save(f"arrays/{n}.npy", rng.uniform(-1, 1, (6, 10, 5)).astype(np.float32))
    inkdrop("train", "folder", "--data", "arrays", "--out", "run", "--max-steps", 2, *SHORT)
    inkdrop("sample", "run", "-n", 3, "--out", "out")
    assert {p.name for p in Path("out").iterdir()} == {"grid.png", "samples.npy", "sample.json"}
    made = np.load("out/samples.npy")
    assert made.dtype == np.float32
    assert made.shape == (3, 5, 6, 10)
    np.testing.assert_array_equal(made, sample(load("run"), 3).numpy())
    _, shown = picture_of("out/grid.png")
    first = bytes_of(torch.from_numpy(made[:1, :1]))[0]
    scale = shown.shape[0] // (2 * 7 + 1)
    np.testing.assert_array_equal(shown[::scale, ::scale][1:7, 1:11], first)


def test_a_run_goes_on_where_its_data_went(inkdrop, tmp_path, monkeypatch):
    """The data's place is kept in full, so that a run can be resumed from any folder; --data says where it is now."""
    write_images(Path("photos"), 8, (8, 8), "RGB")
    inkdrop("train", "folder", "--data", "photos", "--out", "run", "--max-steps", 2, *SHORT)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out, _ = inkdrop("resume", tmp_path / "run", "--max-steps", 3)
    assert "3 of 20,000 updates" in out
    assert f"inkdrop resume {tmp_path / 'run'}" in out
    (tmp_path / "photos").rename(tmp_path / "pictures")
    inkdrop("resume", tmp_path / "run", "--max-steps", 4, code=2)
    inkdrop("resume", tmp_path / "run", "--max-steps", 4, "--data", tmp_path / "pictures")
    assert load(tmp_path / "run").card["updates"] == 4


def test_points_have_a_picture_and_an_array(inkdrop):
    net = settings("net.width=8", "net.depth=1", "data.count=60", "train.batch=4", "plan.steps=2")
    inkdrop("train", "mixture1d", "--out", "run", "--max-steps", 2, *net)
    inkdrop("sample", "run", "-n", 50, "--out", "out")
    np.testing.assert_array_equal(np.load("out/samples.npy"), sample(load("run"), 50).numpy())
    assert {p.name for p in Path("out").iterdir()} == {"grid.png", "samples.npy", "sample.json"}


def test_data_check_names_what_cannot_be_read(inkdrop):
    write_images(Path("photos"), 4, (8, 8), "RGB")
    out, _ = inkdrop("data", "check", "photos")
    assert "4" in out
    content = Path("photos/2.png").read_bytes()
    Path("photos/2.png").write_bytes(content[: len(content) // 2])
    out, _ = inkdrop("data", "check", "photos", code=2)
    assert "2.png" in out


# ---- eval --------------------------------------------------------------------------------------------------------


def test_eval_prints_the_figures_and_writes_them(inkdrop):
    """Points without classes: pixel features, no classifier to train. The same seed gives the same figures."""
    net = settings("net.width=8", "net.depth=1", "data.count=80", "train.batch=4", "plan.steps=2")
    inkdrop("train", "mixture1d", "--out", "run", "--max-steps", 2, *net)
    figures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out, _ = inkdrop("eval", "run", "-n", 60, "--seed", seed, "--out", f"figures/{name}.json")
        figures.append(json.loads(Path(f"figures/{name}.json").read_text()))
        assert f"{figures[-1]['fid']:.4g}" in out
        assert f"{figures[-1]['fid_floor']:.4g}" in out
        assert "60 samples" in out
        assert "sampled by ddim, 2 steps of trailing; no clipping, no guidance" in out
    for one in figures:
        assert one.pop("seconds") >= 0  # the one entry that no two runs share
    assert figures[0] == figures[1]
    assert figures[0]["fid"] != figures[2]["fid"]
    assert (figures[0]["n"], figures[0]["seed"], figures[0]["checkpoint"]["updates"]) == (60, 1, 2)
