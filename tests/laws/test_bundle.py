"""R1, R4: a checkpoint is all that is needed, whole or refused; and an image is the same in any batch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inkdrop.bundle import checkpoints, load, locate, read_manifest, save
from inkdrop.cli import main
from inkdrop.core.noise import Keyed
from inkdrop.errors import BadArgument, BadCheckpoint
from inkdrop.files import remove_folder, write_folder
from inkdrop.find import Part
from inkdrop.generate import sample
from inkdrop.plan import Plan
from inkdrop.train.loop import fit
from inkdrop.train.trainer import Trainer
from runs import digits, points, untrained

CLASSES = ("ant", "bee", "cat")
FILES = ("bundle.json", "net.safetensors", "raw.safetensors", "state.safetensors", "state.json")


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of images: two checkpoints and the last preview."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    fit(digits(), run)
    return run


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A copy of its newest checkpoint, to be damaged."""
    return Path(shutil.copytree(locate(trained), tmp_path / "checkpoint"))


# ---- R1: self-describing -----------------------------------------------------------------------------------------


@pytest.mark.app
def test_a_fresh_process_makes_the_trainers_preview_from_the_checkpoint_alone(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    for name in ("recipe.json", "run.json", "stats.jsonl"):
        (run / name).unlink()
    command = [sys.executable, "-W", "error", "-m", "inkdrop", "sample", "run", "-n", "16", "--out", "samples"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = sorted((run / "previews").iterdir())[-1]
    assert last.name == f"{locate(run).name}.png"
    assert (tmp_path / "samples" / "grid.png").read_bytes() == last.read_bytes()


def test_what_is_saved_is_loaded(tmp_path):
    recipe = replace(
        points(dropout=0.1, plan=Plan(sampler=Part("ddpm", {"variance": "beta"}), steps=7)),
        schedule=Part("table", {"betas": [0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8]}),
        target=Part("edm", {"sd": 0.6}),
        clock=Part("lam", {"scale": 0.3}),
        scale=Part("edm", {"sd": 0.6}),
    )
    bundle = untrained(recipe, (1,), CLASSES)
    bundle.levels, bundle.card = 17, {"data": "points", "updates": 3}
    save(bundle, tmp_path / "one")
    again = load(tmp_path / "one")
    assert (again.recipe, again.shape, again.classes) == (recipe, (1,), CLASSES)
    assert (again.levels, again.card) == (17, bundle.card)
    assert not again.denoiser.training
    mine, theirs = bundle.denoiser.state_dict(), again.denoiser.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert torch.equal(sample(again, 5, seed=3), sample(bundle, 5, seed=3))
    assert again.schedule.steps == 7
    with pytest.raises(BadCheckpoint, match="has no raw weights"):
        load(tmp_path / "one", weights="raw")
    with pytest.raises(BadCheckpoint, match="can be sampled, not resumed"):
        Trainer(points(), None).load(tmp_path / "one")


def test_a_run_means_its_newest_checkpoint(trained, tmp_path):
    assert [p.name for p in checkpoints(trained)] == ["step-00000004", "step-00000006"]
    assert locate(trained).name == "step-00000006"
    assert locate(trained / "checkpoints" / "step-00000004").name == "step-00000004"
    for wrong, match in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "holds no checkpoint")):
        with pytest.raises(BadCheckpoint, match=match):
            load(wrong)


# ---- R4: an image and its neighbours -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [Part("ddim"), Part("ddim", {"eta": 1.0}), Part("ddpm"), Part("heun")])
def test_an_image_is_the_same_at_any_count_and_batch(sampler):
    """Equal start noise bit for bit; results within float32 rounding, as convolutions round by batch size."""
    plan = Plan(sampler=sampler, steps=4, guide=(Part("clip"), Part("cfg", {"scale": 2.0})))
    bundle = untrained(replace(digits(), plan=plan), (1, 8, 8), CLASSES)
    starts: dict[str, list[torch.Tensor]] = {}

    def draw(name: str, count: int, **how: int) -> torch.Tensor:
        starts[name] = []

        def listen(done, step):
            if step.number == 0:
                starts[name].append(step.x)

        return sample(bundle, count, seed=11, on_step=listen, **how)

    whole = draw("16 at once", 16)
    assert (whole[0] - whole[3]).abs().max() > 0.1, "images of one class differ by their noise"
    parts = {"4 of them": draw("4 of them", 4), "one by one": draw("one by one", 5, batch=1)}
    parts["by 7"] = draw("by 7", 16, batch=7)
    parts["from 7"] = draw("from 7", 5, first=7)
    all_starts = torch.cat(starts["16 at once"])
    assert torch.equal(all_starts, Keyed(11, range(16)).start((16, 1, 8, 8)))
    for name, x in parts.items():
        at = slice(7, 12) if name == "from 7" else slice(0, len(x))
        assert torch.equal(torch.cat(starts[name]), all_starts[at]), name
        torch.testing.assert_close(x, whole[at], rtol=0, atol=1e-4)
    assert not torch.equal(sample(bundle, 4, seed=12), parts["4 of them"])


# ---- damaged and foreign -----------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    """One bit of a byte in the middle, where bundle.json still is JSON: in a digit of a hash."""
    content = bytearray(file.read_bytes())
    place = len(content) // 2
    if file.name == "bundle.json":
        place = content.index(b'"net.safetensors": "') + 30
        content[place] = ord("1") if content[place] != ord("1") else ord("2")
    else:
        content[place] ^= 4
    file.write_bytes(content)


DAMAGE = {
    "missing": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "empty": lambda file: file.write_bytes(b""),
    "flipped": flip,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line(name, damage, checkpoint, capsys):
    DAMAGE[damage](checkpoint / name)
    with pytest.raises(BadCheckpoint) as error:
        load(checkpoint)
    assert ("no checkpoint" if (name, damage) == ("bundle.json", "missing") else name) in one_line(error)
    with pytest.raises(SystemExit) as end:
        main(["sample", str(checkpoint), "--out", str(checkpoint.parent / "out")])
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert shown.err.strip().splitlines() == [f"inkdrop: {error.value}"]
    assert shown.out == ""
    assert not (checkpoint.parent / "out").exists()


def rewrite(checkpoint: Path, **changes: object) -> None:
    """Another manifest with a sha256 that fits, as one would write who means harm: {} or None deletes."""
    record = json.loads((checkpoint / "bundle.json").read_text())
    del record["sha256"]
    record = {key: value for key, value in {**record, **changes}.items() if value is not None}
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (checkpoint / "bundle.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "inkdrop-bundle-9"}, "is not of the format inkdrop-bundle-1"),
        ({"recipe": None}, "lacks recipe"),
        ({"recipe": []}, "need a JSON object"),
        ({"recipe": {"data": {"name": "digits"}}}, "net: is missing"),
        ({"recipe": {"data": {"name": "digits"}, "net": {"name": "unet"}, "nett": 1}}, "did you mean net"),
        ({"recipe": {"data": {"name": "digits"}, "net": {"name": "unett"}}}, "did you mean unet"),
        ({"recipe": {"data": {"name": "digits"}, "net": {"name": "unet", "knobs": {"width": -2}}}}, "unet width"),
        ({"recipe": {"data": {"name": "digits"}, "net": {"name": "mlp"}}}, "does not fit this net"),
        ({"shape": [1, 0, 8]}, "need positive sizes"),
        ({"shape": "1x8x8"}, "need positive sizes"),
        ({"shape": [1, 8, 1e99]}, "need positive sizes"),
        ({"shape": [3, 8, 8]}, "does not fit this net"),
        ({"classes": "abc"}, "need a list of names"),
        ({"classes": []}, "does not fit this net"),
        ({"card": 3}, "must be JSON objects"),
        ({"files": []}, "must be JSON objects"),
        ({"files": {}}, "has no ema weights"),
        ({"files": {"../../net.safetensors": "0"}}, "corrupt"),
    ],
)
def test_a_foreign_manifest_is_one_line(changes, match, checkpoint, capsys):
    rewrite(checkpoint, **changes)
    with pytest.raises(BadCheckpoint, match=match) as error:
        load(checkpoint)
    one_line(error)
    with pytest.raises(SystemExit) as end:
        main(["sample", str(checkpoint), "--out", str(checkpoint.parent / "out")])
    assert end.value.code == 2
    assert capsys.readouterr().err.strip() == f"inkdrop: {error.value}"


@pytest.mark.parametrize("content", ["", "[]", "3", '{"format": 1}', "{", "\x00\xff"])
def test_a_manifest_that_is_something_else_is_one_line(content, checkpoint):
    (checkpoint / "bundle.json").write_text(content)
    with pytest.raises(BadCheckpoint, match=r"bundle\.json") as error:
        load(checkpoint)
    one_line(error)


EVIL = 'import pathlib\npathlib.Path({!r}).write_text("was here")\n\n\ndef thing(*args, **knobs):\n    raise OSError\n'


@pytest.mark.parametrize(
    "slot", ["data", "net", "schedule", "target", "clock", "scale", "loss", "sampler", "grid", "guide", "weight"]
)
def test_a_checkpoint_imports_no_code_of_its_own(slot, checkpoint, tmp_path, monkeypatch):
    """A part, or the weight of a loss, named "module:thing" is refused before the module is looked at."""
    trace = tmp_path / "trace"
    (tmp_path / "evil.py").write_text(EVIL.format(str(trace)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    recipe = json.loads((checkpoint / "bundle.json").read_text())["recipe"]
    evil = {"name": "evil:thing", "knobs": {}}
    if slot == "weight":
        recipe["loss"] = {"name": "simple", "knobs": {"weight": "evil:thing"}}
    elif slot == "guide":
        recipe["plan"]["guide"] = [evil]
    else:
        (recipe["plan"] if slot in ("sampler", "grid") else recipe)[slot] = evil
    rewrite(checkpoint, recipe=recipe)
    with pytest.raises(BadCheckpoint, match=r"would import evil:thing.*trust") as error:
        load(checkpoint)
    one_line(error)
    assert not trace.exists()


def test_os_system_is_refused(checkpoint):
    recipe = json.loads((checkpoint / "bundle.json").read_text())["recipe"]
    rewrite(checkpoint, recipe={**recipe, "net": {"name": "os:system", "knobs": {}}})
    with pytest.raises(BadCheckpoint, match="would import os:system"):
        load(checkpoint)


OWN_NET = """
from inkdrop.nets.mlp import mlp

def small(shape, *, classes: int = 0, width: int = 8):
    return mlp(shape, classes=classes, width=width, depth=1)
"""


def test_with_trust_ones_own_net_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(OWN_NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    bundle = fit(replace(points(steps=2), net=Part("own_nets:small", {"width": 12})), tmp_path / "run")
    with pytest.raises(BadCheckpoint, match="own_nets:small"):
        load(tmp_path / "run")
    again = load(tmp_path / "run", trust=True)
    assert torch.equal(sample(again, 3), sample(bundle, 3))


# ---- whole or not at all -----------------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*"))


@pytest.mark.parametrize(
    ("failure", "raised", "match"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), BadArgument, "No space left on device.*free some space"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), BadArgument, "Permission denied"),
        (RuntimeError("first line\nsecond"), BadArgument, "first line"),
        (BadArgument("mine"), BadArgument, "^mine$"),
        (KeyboardInterrupt("mine"), KeyboardInterrupt, "mine"),
    ],
)
def test_a_writer_that_fails_half_way_leaves_nothing(failure, raised, match, tmp_path):
    def half(path: Path) -> None:
        path.write_bytes(b"half")
        assert not (tmp_path / "final").exists()
        raise failure

    with pytest.raises(raised, match=match) as error:
        write_folder(tmp_path / "final", {"first": lambda p: p.write_text("whole"), "second": half})
    one_line(error)
    assert left(tmp_path) == []


def test_a_folder_is_written_whole_and_never_over_another(tmp_path):
    writers = {"a": lambda p: p.write_text("1"), "b": lambda p: p.write_bytes(b"2")}
    write_folder(tmp_path / "deep" / "final", writers)
    assert left(tmp_path) == ["a", "b", "deep", "final"]
    with pytest.raises(BadArgument, match="exists already"):
        write_folder(tmp_path / "deep" / "final", writers)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadArgument, match="cannot be written"):
        write_folder(tmp_path / "file" / "final", writers)
    remove_folder(tmp_path / "deep" / "final")
    assert left(tmp_path) == ["deep", "file"]


def test_what_is_half_deleted_is_no_checkpoint(trained, tmp_path, monkeypatch):
    run = Path(shutil.copytree(trained, tmp_path / "run"))

    def killed(path: Path) -> None:
        (path / "net.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(locate(run))
    assert [p.name for p in checkpoints(run)] == ["step-00000004"]
    load(run)


@contextmanager
def files_of_at_most(size: int):
    """The system itself cuts files off at this many bytes, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_save_that_the_system_cuts_off_leaves_nothing(size, tmp_path):
    bundle = untrained(points(), (1,), CLASSES)
    big = {"weight": torch.zeros(2000)}
    with files_of_at_most(size), pytest.raises(BadArgument, match="cannot be written .*File too large") as error:
        save(bundle, tmp_path / "final", raw=big)
    one_line(error)
    assert left(tmp_path) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk of 64 KiB can be mounted here")
    try:
        bundle = untrained(points(), (1,), CLASSES)
        save(bundle, disk / "small")
        with pytest.raises(BadArgument, match=r"final: cannot be written \(.*No space left.*free some space") as error:
            save(bundle, disk / "final", raw={"weight": torch.zeros(50_000)})
        one_line(error)
        assert [p.name for p in disk.iterdir()] == ["small"]
        load(disk / "small")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("where", ["net", "raw", "state"])
def test_nothing_that_is_not_finite_is_saved(where, tmp_path):
    bundle = untrained(points(), (1,))
    bad = {"deep.weight": torch.tensor([1.0, float("inf")])}
    if where == "net":
        next(bundle.denoiser.parameters()).data[0] = float("nan")
    with pytest.raises(BadArgument, match="is not finite; nothing was saved"):
        save(bundle, tmp_path / "final", **({} if where == "net" else {where: bad}))
    assert left(tmp_path) == []


def test_the_manifest_names_every_file_and_its_hash(trained):
    """The format as one would read it without inkdrop."""
    folder = locate(trained)
    record = json.loads((folder / "bundle.json").read_text())
    assert set(record["files"]) == set(FILES) - {"bundle.json"} == {p.name for p in folder.iterdir()} - {"bundle.json"}
    for name, want in record["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == want
    assert record["shape"] == [1, 8, 8]
    assert record["classes"] == [str(n) for n in range(10)]
    assert record["range"] == [-1, 1]
    assert record["card"]["updates"] == 6
    assert read_manifest(folder)["recipe"] == record["recipe"]
