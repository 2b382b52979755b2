"""inkdrop edit, from outside: pictures in, pictures out, kept pixels kept, and every wrong input one line."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.main import get_command

from inkdrop import editing
from inkdrop.bundle import load
from inkdrop.cli import app, main
from inkdrop.edit.operators import Operator
from inkdrop.find import Part
from inkdrop.picture import to_bytes
from inkdrop.train.loop import fit
from runs import digits, points

pytestmark = pytest.mark.app

VALUES = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: pictures, points, and points whose classes were never dropped."""
    folder = tmp_path_factory.mktemp("runs")
    fit(digits(steps=3, save_every=3), folder / "pictures")
    fit(points(steps=2), folder / "points")
    fit(points(steps=2, null_rate=0), folder / "undropped")
    return folder


@pytest.fixture
def inkdrop(tmp_path, monkeypatch, capsys):
    """The command line in a folder of its own, with three pictures, a mask and other files: (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for i, values in enumerate(VALUES):
        Image.fromarray(values, "L").save(f"{i}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :5] = 255
    Image.fromarray(mask, "L").save("mask.png")
    Image.fromarray(255 - mask, "L").save("hole.png")
    Image.fromarray(mask[:4], "L").save("small.png")
    Image.fromarray(np.stack([VALUES[0]] * 3, 2)).save("colour.png")
    np.save("points.npy", np.full((3, 1), 0.25, np.float32))
    np.save("loud.npy", np.full((8, 8), 3.0, np.float32))
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    Path("notes.txt").write_text("no picture")

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["edit", *(str(arg) for arg in args)])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        return end.value.code or 0, shown.out, shown.err

    return run


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def results(folder: str) -> list[np.ndarray]:
    return [pixels(path) for path in sorted(Path(folder).glob("[0-9]*.png"))]


def tensors(*numbers: int) -> Tensor:
    """The pictures as the model sees them: v/127.5 − 1."""
    return torch.from_numpy(VALUES[list(numbers)].astype(np.float32) / 127.5 - 1)[:, None]


def same(folder: str, expected: Tensor) -> bool:
    """Whether the single images of a folder are these (N, 1, H, W), in 8 bits."""
    return np.array_equal(np.stack(results(folder)), to_bytes(expected)[:, 0].numpy())


def record(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "edit.json").read_text())
    return found


# ---- what each command writes --------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [["--keep", "mask.png"], ["--repaint", "hole.png"]])
def test_inpainting_keeps_every_kept_pixel_in_8_bits(option, runs, inkdrop):
    """Through PNG and back, for every sampler tried, with clipping, guidance and RePaint."""
    for i, extra in enumerate(
        ([], ["--sampler", "ddpm"], ["--class", "3", "--guidance", "4"], ["--resample", "2", "--jump", "1"])
    ):
        code, out, _ = inkdrop("inpaint", runs / "pictures", "0.png", "1.png", *option, *extra, "--out", f"out{i}")
        assert (code, out) == (0, f"edits: out{i}/grid.png\n")
        made = results(f"out{i}")
        for before, after in zip(VALUES[:2], made, strict=True):
            assert np.array_equal(after[:, :5], before[:, :5])
            assert not np.array_equal(after[:, 5:], before[:, 5:])
    keep = torch.zeros(8, 8, dtype=torch.bool)
    keep[:, :5] = True
    assert same("out0", editing.inpaint(load(runs / "pictures"), tensors(0, 1), keep))
    assert not np.array_equal(results("out0")[0], results("out3")[0])


def test_the_folder_says_how_it_was_made(runs, inkdrop):
    inkdrop("inpaint", runs / "pictures", "0.png", "2.png", "--keep", "mask.png", "--seed", 5, "--class", 7)
    assert {p.name for p in Path("edits").iterdir()} == {"000000.png", "000001.png", "grid.png", "edit.json"}
    how = record("edits")
    assert how["edit"] == "inpaint"
    assert how["knobs"] == {"resample": 1}
    assert how["asks"] == 3
    assert how["inputs"] == [
        {"file": name, "sha256": sha256(Path(name).read_bytes()).hexdigest()} for name in ("0.png", "2.png", "mask.png")
    ]
    assert (how["seed"], how["classes"]) == (5, ["7", "7"])
    assert how["plan"]["sampler"] == {"name": "ddim", "knobs": {}}
    assert how["card"]["updates"] == 3
    grid = pixels("edits/grid.png")  # two columns, before and after, 8 pixels each, 1 apart, enlarged 8 times
    assert grid.shape == (8 * (2 * 9 + 1), 8 * (2 * 9 + 1))
    small = grid[::8, ::8]
    assert np.array_equal(small[1:9, 1:6], VALUES[0][:, :5])
    assert bool((small[1:9, 6:9] == 128).all())  # what is not kept is grey
    assert np.array_equal(small[10:18, 10:18], results("edits")[1])


def test_outpainting_writes_the_larger_canvas(runs, inkdrop):
    inkdrop("outpaint", runs / "pictures", "0.png", "--left", 3, "--bottom", 2, "--out", "whole")
    inkdrop("outpaint", runs / "pictures", "0.png", "--left", 3, "--bottom", 2, "--windows", "--out", "windows")
    for folder in ("whole", "windows"):
        [made] = results(folder)
        assert made.shape == (10, 11)
        assert np.array_equal(made[:8, 3:], VALUES[0])
    assert not np.array_equal(results("whole")[0], results("windows")[0])
    assert same("windows", editing.outpaint(load(runs / "pictures"), tensors(0), left=3, bottom=2, stride=4))


def test_img2img_runs_as_many_steps_as_asked_and_strength_0_is_the_input(runs, inkdrop):
    inkdrop("img2img", runs / "pictures", "0.png", "1.png", "--strength", 0, "--out", "none")
    assert np.array_equal(np.stack(results("none")), VALUES[:2])
    assert record("none")["asks"] == 0
    inkdrop("img2img", runs / "pictures", "0.png", "1.png", "--strength", 0.3, "--steps", 9, "--out", "some")
    assert record("some")["asks"] == 9
    assert same("some", editing.img2img(load(runs / "pictures"), tensors(0, 1), strength=0.3, steps=9))


def test_inversion_writes_noise_and_how_near_the_round_trip_came(runs, inkdrop):
    options = ("--depth", 0.5, "--steps", 20, "--iterations", 1, "--no-clip")
    code, out, _ = inkdrop("invert", runs / "pictures", "0.png", "1.png", *options)
    assert code == 0
    assert out.startswith("round trip: ")
    how = record("edits")
    assert how["asks"] == 20 * 1 + 20
    noise = torch.from_numpy(np.load("edits/noise.npy"))
    bundle = load(runs / "pictures")
    knobs: dict[str, Any] = {"depth": 0.5, "steps": 20, "clip": False}
    assert torch.equal(noise, editing.invert(bundle, tensors(0, 1), iterations=1, **knobs))
    back = editing.decode(bundle, noise, **knobs)
    assert same("edits", back)
    errors = (back - tensors(0, 1)).square().flatten(1).mean(1)
    assert float(errors.min()) > 1e-9, "too near to be seen"
    assert how["psnr_db"] == pytest.approx((10 * torch.log10(4 / errors)).tolist(), abs=0.02)
    inkdrop("invert", runs / "pictures", "0.png", *options, "--class", 2, "--to", 5, "--out", "to")
    states = editing.invert(bundle, tensors(0), iterations=1, label=2, **knobs)
    assert same("to", editing.decode(bundle, states, label=5, **knobs))
    assert record("to")["decoded as"] == "5"


def test_ways_between_pictures_and_between_seeds(runs, inkdrop):
    bundle = load(runs / "pictures")
    inkdrop("interpolate", runs / "pictures", "0.png", "1.png", "-n", 4, "--out", "way")
    assert same("way", editing.interpolate(bundle, tensors(0), tensors(1), count=4)[0])
    inkdrop(
        "interpolate", runs / "pictures", "0.png", "1.png", "-n", 3, "--via", "noise", "--depth", 0.5, "--out", "noise"
    )
    assert same("noise", editing.interpolate(bundle, tensors(0), tensors(1), count=3, via="noise", depth=0.5)[0])
    inkdrop("interpolate", runs / "pictures", "--seeds", 3, 8, "-n", 5, "--class", 2, "--out", "seeds")
    assert same("seeds", editing.interpolate_seeds(bundle, (3, 8), count=5, label=2)[0])
    assert pixels("seeds/grid.png").shape[1] == 8 * (5 * 9 + 1)


def test_variations_are_written_beside_their_picture(runs, inkdrop):
    bundle = load(runs / "pictures")
    inkdrop("vary", runs / "pictures", "0.png", "1.png", "-n", 3, "--strength", 0.6)
    assert same("edits", editing.vary(bundle, tensors(0, 1), count=3, strength=0.6).flatten(0, 1))
    assert pixels("edits/grid.png").shape == (8 * (2 * 9 + 1), 8 * (4 * 9 + 1))
    inkdrop("vary", runs / "pictures", "0.png", "-n", 3, "--eta", 0.5, "--out", "eta")
    assert same("eta", editing.vary(bundle, tensors(0), count=3, eta=0.5).flatten(0, 1))


def test_restoring_from_a_small_picture_and_from_a_simulated_one(runs, inkdrop):
    bundle, part = load(runs / "pictures"), Part("superresolve", {"factor": 4})
    Image.fromarray(VALUES[0][:2, :2], "L").save("tiny.png")
    tiny = torch.from_numpy(VALUES[0][:2, :2].astype(np.float32) / 127.5 - 1)[None, None]
    knobs = ("--operator", "superresolve", "--set", "operator.factor=4")
    code, out, _ = inkdrop("restore", runs / "pictures", "tiny.png", *knobs)
    assert (code, out) == (0, "edits: edits/grid.png\n")
    made = editing.restore(bundle, tiny, part)
    assert same("edits", made)
    operator = editing.operator_of(part, (1, 8, 8))
    torch.testing.assert_close(operator.apply(made), tiny, rtol=0, atol=1e-5)
    assert record("edits")["operator"] == {"name": "superresolve", "knobs": {"factor": 4}}
    code, out, _ = inkdrop(
        "restore", runs / "pictures", "0.png", *knobs, "--simulate", "--method", "pigdm", "--out", "s"
    )
    assert out.startswith("restored: ")
    assert same("s", editing.restore(bundle, operator.apply(tensors(0)), part, method="pigdm"))
    assert pixels("s/grid.png").shape == (8 * 10, 8 * (3 * 9 + 1))


def test_what_a_mask_operator_hides_plays_no_part(runs, inkdrop):
    hidden = VALUES[0].copy()
    hidden[2:5, 1:4] = 7
    Image.fromarray(hidden, "L").save("hidden.png")
    options = ("--operator", "mask", "--set", "operator.box=2,1,3,3")
    inkdrop("restore", runs / "pictures", "0.png", *options, "--out", "a")
    inkdrop("restore", runs / "pictures", "hidden.png", *options, "--out", "b")
    assert np.array_equal(results("a")[0], results("b")[0])
    assert np.array_equal(np.delete(results("a")[0], slice(2, 5), 0), np.delete(VALUES[0], slice(2, 5), 0))


def test_data_that_are_no_pictures_are_edited_as_arrays(runs, inkdrop):
    code, out, _ = inkdrop("img2img", runs / "points", "points.npy", "--strength", 0.5)
    assert (code, out) == (0, "edits: edits/results.npy\n")
    x = torch.full((3, 1), 0.25)
    made = np.load("edits/results.npy")
    np.testing.assert_array_equal(made, editing.img2img(load(runs / "points"), x, strength=0.5).numpy())


def test_pictures_in_colour_are_read_as_the_model_s(runs, inkdrop):
    """Grey of colour; what is transparent is laid over white, as data are unless their recipe says black."""
    glass = np.stack([VALUES[0]] * 4, 2)
    glass[..., 3] = 255 * (np.arange(8) < 4)
    Image.fromarray(glass, "RGBA").save("glass.png")
    inkdrop("img2img", runs / "pictures", "colour.png", "glass.png", "--strength", 0, "--out", "out")
    whole, half = results("out")
    assert np.array_equal(whole, VALUES[0])
    assert np.array_equal(half[:, :4], VALUES[0][:, :4])
    assert bool((half[:, 4:] == 255).all())


def test_overwriting_replaces_edits_whole_and_nothing_else(runs, inkdrop, monkeypatch):
    command = ("img2img", runs / "pictures", "0.png", "--strength", 0.5)
    inkdrop(*command, "--seed", 1)
    before = results("edits")[0]
    code, _, err = inkdrop(*command)
    assert (code, err) == (2, "inkdrop: edits: exists already; choose another --out, or --overwrite\n")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        code, _, err = inkdrop(*command, "--overwrite")
    assert code == 2
    assert "No space left on device" in err
    assert np.array_equal(results("edits")[0], before), "the older edits are lost"
    code, _, _ = inkdrop(*command, "--overwrite")
    assert code == 0
    assert not np.array_equal(results("edits")[0], before)
    Path("mine").mkdir()
    code, _, err = inkdrop(*command, "--out", "mine", "--overwrite")
    assert code == 2
    assert "mine: is not a folder of edits (no edit.json), so it is not overwritten" in err
    assert not list(Path().glob(".*"))


def test_the_plan_that_is_written_is_the_one_that_was_used(runs, inkdrop):
    """Inversion goes with ddim whatever the model's plan; guidance without a class is none."""
    bundle = load(runs / "pictures")
    assert "cfg" not in [part.name for part in bundle.plan.guide]
    run = runs / "guided"
    if not run.exists():
        recipe = digits(steps=2)
        guided = replace(recipe.plan, sampler=Part("ddpm"), guide=(Part("clip"), Part("cfg", {"scale": 3.0})))
        fit(replace(recipe, plan=guided), run)
    inkdrop("invert", run, "0.png", "--out", "plain")
    plan = record("plain")["plan"]
    assert plan["sampler"] == {"name": "ddim", "knobs": {}}
    assert [part["name"] for part in plan["guide"]] == ["clip"]
    inkdrop("invert", run, "0.png", "--class", 4, "--method", "heun", "--out", "told")
    plan = record("told")["plan"]
    assert plan["sampler"]["name"] == "heun"
    assert plan["guide"][1] == {"name": "cfg", "knobs": {"scale": 3.0}}


# ---- bad input -----------------------------------------------------------------------------------------------

MASK = ("--keep", "mask.png")
BAD: list[tuple[tuple[object, ...], str]] = [
    (("inpaint", "0.png"), "inpaint: got no mask; give --keep MASK (white is kept) or --repaint MASK"),
    (("inpaint", "0.png", *MASK, "--repaint", "hole.png"), "inpaint: got --keep and --repaint; give one of them"),
    (("inpaint", "0.png", "--keep", "small.png"), "small.png: is 8 × 4 pixels (width × height), need 8 × 8; resize it"),
    (("inpaint", "small.png", *MASK), "small.png: is 8 × 4 pixels (width × height), need 8 × 8; resize it to 8 × 8"),
    (("inpaint", "0.png", *MASK, "--resample", 0), "repaint resample: got 0, need at least 1"),
    (("inpaint", "0.png", *MASK, "--jump", 3), "repaint jump: got 3, which has no effect with resample=1"),
    (("inpaint", "0.png", *MASK, "--resample", 2, "--jump", 0), "repaint jump: got 0, need at least 1"),
    (("inpaint", "0.png", *MASK, "--resample", 2, "--noise", "brownian"), "repaint noise: got brownian"),
    (("inpaint", "nothing.png", *MASK), "nothing.png: cannot be read (No such file or directory)"),
    (("inpaint", "broken.png", *MASK), "broken.png:"),
    (("inpaint", "notes.txt", *MASK), "notes.txt: is no picture; give a .png"),
    (("inpaint", "loud.npy", *MASK), "loud.npy: got floats in [3, 3], need [-1, 1]"),
    (("outpaint", "0.png"), "outpaint: nothing to add; give left, right, top or bottom"),
    (("outpaint", "0.png", "--left", -2), "outpaint left: got -2, need at least 0"),
    (("outpaint", "0.png", "--left", 2, "--stride", 9), "windows stride: got 9, need 1 to 8"),
    (
        ("outpaint", "0.png", "--left", 2, "--whole", "--stride", 2),
        "stride: got 2, which has no effect without windows",
    ),
    (("img2img", "0.png", "--strength", 1.5), "strength: got 1.5, need a number in [0, 1]"),
    (("img2img", "0.png", "--strength", -0.5), "strength: got -0.5, need a number in [0, 1]"),
    (
        ("img2img", "0.png", "--strength", 0.1, "--steps", 50),
        "strength: got 0.1, below which the schedule has 10 levels",
    ),
    (("img2img", "0.png", "--steps", 0), "sampler steps: got 0, need at least 1"),
    (("img2img", "0.png", "--sampler", "ddmi"), "samplers: unknown name 'ddmi'; did you mean"),
    (("img2img", "0.png", "--class", 10), "class: got 10, need a number in [0, 9]"),
    (("img2img", "0.png", "--guidance", 2), "guidance: got 2, but there is no class to guide by; give a class"),
    (("img2img", "0.png", "--set", "train.lr=1"), "--set: got 'train.lr=1', but of a trained model only"),
    (("img2img", "0.png", "--set", "operator.factor=2"), "--set: got 'operator.factor=2'"),
    (("img2img", "0.png", "--seed", -1), "seed: got -1"),
    (("invert", "0.png", "--method", "exact"), "invert method: unknown name 'exact'"),
    (("invert", "0.png", "--depth", 0), "depth: got 0, which is below the first noisy time"),
    (("invert", "0.png", "--iterations", 0), "invert iterations: got 0, need at least 1"),
    (("invert", "0.png", "--sampler", "heun"), "invert sampler: got heun, but this goes with the sampler ddim alone"),
    (("invert", "0.png", "--set", "sampler.eta=1"), "invert sampler: got sampler.eta=1, but this goes with"),
    (("invert", "0.png", "--class", 1, "--to", 11), "class: got 11, need a number in [0, 9]"),
    (("interpolate", "0.png"), "interpolate: got 1 pictures, need two, or --seeds"),
    (("interpolate", "0.png", "--seeds", 1, 2), "interpolate pictures: has no effect with --seeds"),
    (("interpolate", "--seeds", 1, 2, "--depth", 0.5), "interpolate depth: has no effect with --seeds"),
    (("interpolate", "0.png", "1.png", "-n", 1), "interpolate count: got 1, need at least 2"),
    (("interpolate", "0.png", "1.png", "--via", "magic"), "interpolate via: unknown name 'magic'"),
    (
        ("interpolate", "0.png", "1.png", "--via", "noise", "--iterations", 2),
        "iterations: has no effect without an inver",
    ),
    (("interpolate", "0.png", "1.png", "--class", 1, "--class", 2), "interpolate: got 2 classes, need one"),
    (("vary", "0.png", "-n", 0), "vary count: got 0, need at least 1"),
    (("vary", "0.png", "--eta", 0), "vary eta: got 0, need a number in (0, 1]"),
    (("vary", "0.png", "--iterations", 2), "vary iterations: got 2, which has no effect without eta"),
    (("restore", "0.png", "--operator", "sharpen"), "operators: unknown name 'sharpen'"),
    (("restore", "0.png", "--operator", "superresolve"), "0.png: is 8 × 8 pixels (width × height), need 4 × 4"),
    (("restore", "0.png", "--operator", "superresolve", "--set", "operator.factor=3"), "superresolve factor: got 3"),
    (("restore", "0.png", "--operator", "blur", "--set", "operator.stdd=3"), "blur knob: unknown name 'stdd'"),
    (("restore", "0.png", "--operator", "gray"), "gray: got data of 1 channels, need 3"),
    (("restore", "0.png", "--operator", "blur", "--method", "dps"), "restore method: unknown name 'dps'"),
    (("restore", "0.png", "--operator", "blur", "--scale", 2), "restore scale: got 2, which has no effect with ddnm"),
    (("restore", "0.png", "--operator", "blur", "--noise-std", -1), "restore noise: got -1"),
]


@pytest.mark.parametrize(("command", "fragment"), BAD, ids=[" ".join(map(str, c)) for c, _ in BAD])
def test_what_cannot_be_edited_is_one_line(command, fragment, runs, inkdrop):
    """Exit code 2, one line that begins with inkdrop, no folder."""
    verb, *rest = command
    code, out, err = inkdrop(verb, runs / "pictures", *rest)
    lines = [line for line in err.strip().splitlines() if not line.endswith(" ...")]  # a task that began
    assert (code, len(lines), out) == (2, 1, ""), err
    assert lines[0].startswith("inkdrop: ")
    assert fragment in lines[0]
    assert not Path("edits").exists()


@pytest.mark.parametrize(
    ("run", "command", "fragment"),
    [
        ("points", ("img2img", "0.png"), "0.png: this model's data of shape (1,) are no pictures; give them as .npy"),
        ("points", ("inpaint", "points.npy", *MASK), "are no pictures, so no mask fits them"),
        ("points", ("outpaint", "points.npy", "--left", 1), "outpaint: got images of shape (1,), need (C, H, W)"),
        ("points", ("restore", "points.npy", "--operator", "blur"), "blur: got data of shape (1,), need images"),
        ("points", ("img2img", "loud.npy"), "loud.npy: got float32 (8, 8), need numbers of shape (1,), or several"),
        ("undropped", ("img2img", "points.npy"), "class: this model was trained without dropped conditions"),
        ("nowhere", ("img2img", "points.npy"), "nowhere: no such folder; give a run folder or a checkpoint in it"),
    ],
)
def test_models_that_cannot_do_it_say_so(run, command, fragment, runs, inkdrop):
    verb, *rest = command
    code, out, err = inkdrop(verb, runs / run, *rest)
    lines = [line for line in err.strip().splitlines() if not line.endswith(" ...")]
    assert (code, len(lines), out) == (2, 1, ""), err
    assert fragment in lines[0]


# ---- the guide -----------------------------------------------------------------------------------------------

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "editing.md"


def test_the_guide_s_commands_are_understood() -> None:
    """Every `inkdrop edit` line parses: verb, arguments, options and their types; and every verb has one."""
    commands = get_command(app).commands["edit"].commands
    lines = [
        shlex.split(line) for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("inkdrop ")
    ]
    for _, edit, verb, *rest in lines:
        assert edit == "edit"
        commands[verb].make_context(verb, rest)
    assert {line[2] for line in lines} == set(commands)


def test_the_guide_s_operator_is_one() -> None:
    """The block that defines it, executed: adjoint, and A·A⁺·A = A."""
    text = GUIDE.read_text(encoding="utf-8")
    block = text[text.index("every_other = Operator(") : text.index("after = restore(model, measured, every_other")]
    names: dict[str, Any] = {"torch": torch, "Operator": Operator}
    exec(block, names)  # noqa: S102
    made, x = names["every_other"], torch.randn(2, 1, 28, 28, dtype=torch.float64)
    y = torch.randn(2, *made.shape, dtype=torch.float64)
    torch.testing.assert_close((made.apply(x) * y).sum(), (x * made.transpose(y)).sum())
    torch.testing.assert_close(made.apply(made.inverse(made.apply(x))), made.apply(x))
