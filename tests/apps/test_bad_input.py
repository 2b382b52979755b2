"""R9: whatever is asked wrongly is answered with one line that says what, got, allowed and try; exit code 2."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from albums import album, codec_folder, pictured
from inkdrop import jobs
from inkdrop.bundle import load
from inkdrop.cli import main
from inkdrop.errors import BadArgument, Busy, Cancelled
from inkdrop.find import Part
from inkdrop.train.loop import fit
from inkdrop.train.trainer import Trainer
from runs import digits, points

pytestmark = pytest.mark.app


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs with classes, without, and with classes that were never dropped; and models that are told more."""
    folder = tmp_path_factory.mktemp("runs")
    fit(points(steps=2), folder / "classes")
    fit(replace(points(steps=2), data=Part("mixture1d", {"count": 90})), folder / "plain")
    fit(points(steps=2, null_rate=0), folder / "undropped")
    fit(digits(steps=2), folder / "pictures")
    pictures, codec = album(folder / "album", count=12), codec_folder(folder / "codec")
    for name, asked in {
        "words": {"text": True, "attributes": True},
        "small": {"image": Part("lowres", {"factor": 2})},
        "hole": {"image": Part("hole")},
        "latent": {"label": True, "codec": codec},
    }.items():
        Trainer(pictured(pictures, **asked), folder / name).save()
    Trainer(replace(digits(), data=Part("folder", {"data": str(pictures)})), folder / "few").save()
    for name in "ab":
        picture(folder / "large" / f"{name}.png", (16, 12))
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "model_index.json").write_text("{}")
    (folder / "lone").mkdir()
    (folder / "lone" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    picture(folder / "8.png", (8, 8))
    picture(folder / "4.png", (4, 4))
    picture(folder / "5.png", (5, 5))
    picture(folder / "mask.png", (8, 8), "L")
    return folder


@pytest.fixture
def inkdrop(tmp_path, monkeypatch, capsys):
    """The command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        shown = capsys.readouterr()
        return end.value.code or 0, shown.out, shown.err

    return run


@pytest.fixture
def idle(monkeypatch):
    """What is to be refused fails at once where it is not, instead of training for minutes."""

    def step(*args: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(Trainer, "step", step)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(answer: tuple[int, str, str], fragment: str) -> None:
    code, out, err = answer
    assert code == 2, (code, out, err)
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("inkdrop: ")
    assert fragment in lines[0]
    assert "Traceback" not in out + err
    assert out == ""


# ---- recipes and their knobs -------------------------------------------------------------------------------------

TINY = ("net=unet", "net.width=4", "net.multipliers=[1]", "net.blocks=1", "train.batch=2", "plan.steps=2")

TRAIN = [
    ("train.steps=0", "train.steps: got 0, need at least 1"),
    ("train.batch=-1", "train.batch: got -1, need at least 1"),
    ("train.lr=0", "train.lr: got 0.0, need more than 0"),
    ("train.lr=fast", "train.lr: got 'fast'"),
    ("train.ema=1", "train.ema: got 1.0, need a number in [0, 1)"),
    ("train.null_rate=1", "train.null_rate: got 1.0, need a number in [0, 1)"),
    ("train.seed=-1", "train.seed: got -1, need an integer in [0, 2^63)"),
    ("train.decay=linear", "train.decay: got linear, need cosine or constant"),
    ("train.betas=[0.9,1]", "train.betas: got (0.9, 1.0), need two numbers in [0, 1)"),
    ("train.stpes=9", "train knob: unknown name 'stpes'; did you mean steps"),
    ("trian.steps=9", "--set slot: unknown name 'trian'; did you mean train?"),
    ("net", "--set: got 'net', need slot.knob=value"),
    ("schedule=cosin", "schedules: unknown name 'cosin'; did you mean cosine?"),
    ("schedule.steps=0", "schedule steps: got 0, need at least 1"),
    ("schedule.stpes=9", "cosine knob: unknown name 'stpes'; did you mean steps"),
    ("schedule=table", "table: needs a value for 'betas'"),
    ("schedule=table schedule.betas=[0.5,2]", "betas[1]: got 2, need a number in (0, 1)"),
    ("schedule.zero_terminal=true target=eps", "target eps: cannot be inverted at t = 1"),
    ("schedule.zero_terminal=true target=score", "target score: cannot be inverted at t = 1"),
    ("schedule.zero_terminal=true grid=karras grid.rho_max=Infinity", "cannot be spaced; try rho_max=80"),
    ("grid=karras grid.rho_max=-1", "karras rho_max: got -1, need a positive number; try 80"),
    ("schedule.zero_terminal=true clock=lam", "clock lam: is infinite at t = 1"),
    ("schedule.zero_terminal=true sampler=heun sampler.space=rho", "rho is infinite at the start of this grid"),
    ("target=epsilon", "targets: unknown name 'epsilon'; did you mean eps?"),
    ("net=unte", "nets: unknown name 'unte'; did you mean unet"),
    ("net.width=wide", "unet.width: got 'wide', need int"),
    ("net.width=5", "unet width: got 5, need an even number"),
    ("net.wdth=8", "unet knob: unknown name 'wdth'; did you mean width"),
    ("net.classes=3", "unet.classes: got 3, but the data have 10"),
    ("net.learned_variance=true", "cannot train a learned variance"),
    ("net=nosuch.module:thing", "No module named 'nosuch'"),
    ("net=:thing", "nets: got ':thing', need one of dit"),
    ("net=os:getcwd", "net os:getcwd: gives a str, need a torch.nn.Module"),
    ("data=os:getcwd", "data os:getcwd: gives a str, need a core.dataset.Data"),
    ("data=digts", "data: unknown name 'digts'; did you mean digits?"),
    ("data=mixture1d", "unet shape: got (1,), need (C, H, W)"),
    ("data=circles", "no condition to guide by"),
    ("data.seed=1", "digits knob: unknown name 'seed'; known: none"),
    ("loss.weight=snrr", "weights: unknown name 'snrr'; did you mean snr"),
    ('loss.weight_knobs={"gamma":5}', "loss weight uniform: has no knobs, got gamma"),
    ('loss.weight=min_snr loss.weight_knobs={"gama":5}', "min_snr knob: unknown name 'gama'; did you mean gamma?"),
    ("plan.steps=0", "steps: got 0, need at least 1"),
    ("plan.steps=1001", "steps: got 1001, need at most 1000"),
    ("plan.sampler=ddim", "plan knob: unknown name 'sampler'; known: guide, noise, steps"),
    ("sampler.eta=2", "ddim eta: got 2, need a number in [0, 1]"),
    ("sampler=heun sampler.eta=0.5", "heun knob: unknown name 'eta'; known: space"),
    ("sampler=ddpm sampler.variance=learned", "this net does not predict a variance"),
    ("grid.offset=1", "trailing knob: unknown name 'offset'"),
    ("cfg.scale=-1", "cfg scale: got -1, need a finite number of at least 0"),
    ("train.null_rate=0 cfg.scale=2", "trained without dropped conditions (train.null_rate=0)"),
    ("clip.low=2", "clip: got [2, 1], need low < high"),
    ("text=bpe", "has no captions to read; leave text out (--set text=none)"),
    ("text=bpee", "readers: unknown name 'bpee'; did you mean bpe?"),
    ("text.length=9", "--set: got text.length, but there is no text; name one first, as in text=bpe"),
    ("image=lowres image.factor=3", "lowres factor: got 3, need at least 2, and a divisor of 8 and 8"),
    ("image=gray", "gray: got data of shape (1, 8, 8), need colour pictures"),
    ("image=blur", "pairs: got 'blur', which is one of the operators"),
    ("image=hole image.most=2", "hole: got least 0.25 and most 2, need 0 < least ≤ most ≤ 1"),
    ("image.factor=2", "--set: got image.factor, but there is no image; name one first, as in image=lowres"),
    ("train.augment=0.5", "train.augment: got 0.5, but there is no image condition to noise"),
    ("train.augment=1", "train.augment: got 1.0, need a number in [0, 1)"),
    ("image=lowres train.augment=0.5", "this net is not told how noisy its image is; try augment=true"),
    ("image=lowres net=dit net.depth=1 net.width=8 net.image=2", "dit.image: got 2, but the data have 1; leave it out"),
    ("codec=nope plan.guide=none", "nope: no such folder; give an autoencoder's folder, or make one with: inkdrop"),
    ("codec=nope", "clip: got a model of latents, which have no range; train with --set plan.guide=cfg"),
    ("codec.kl=1", "--set: got codec.kl, but a codec has no knobs; give its folder, as codec=PATH"),
    ("net.augment=true", "unet augment: got true, but no image to be told about"),
    ("net.vocabulary=300", "unet.vocabulary: got 300, but the data have 0; leave it out"),
]


@pytest.mark.parametrize(("settings", "fragment"), TRAIN, ids=[row[0] for row in TRAIN])
@pytest.mark.usefixtures("idle")
def test_a_recipe_that_cannot_work(settings, fragment, inkdrop, tmp_path):
    each = [part for text in (*TINY, *settings.split(" ")) for part in ("--set", text)]
    refused(inkdrop("train", "digits", "--out", "run", "--max-steps", "1", *each), fragment)
    assert tree(tmp_path) == {}


COMMANDS = [
    ("train digitz", "recipes: unknown name 'digitz'; did you mean digits?"),
    ("train nope.json", "recipe nope.json: cannot be read as JSON"),
    ("train folder", "folder: needs a value for 'data'; give --data PATH"),
    ("train folder --data nope", "nope: no such folder or zip"),
    ("train folder --data .", "no images"),
    ("train digits --data .", "--data: got ., but the data set digits takes none; try: inkdrop train folder"),
    ("train mnist", "not downloaded yet"),
    ("train mnist --data .", "no file train-images-idx3-ubyte"),
    ("train digits --max-steps 0", "max_steps: got 0, need more than 0"),
    ("train digits --max-time -1", "max_time: got -1, need more than 0"),
    ("train digits --max-time nan", "max_time: got nan, need more than 0"),
    ("train digits --device tpu", "device: got 'tpu', which is not to be had here"),
    ("resume nope", "nope: is no run folder"),
    ("resume RUNS/classes --set net.width=16", "resume --set: got 'net.width=16', need train.*"),
    ("resume RUNS/classes --set train.setps=9", "train knob: unknown name 'setps'; did you mean steps"),
    ("resume RUNS/classes --max-steps 1", "max_steps: got 1, but the run is at update 2"),
    ("show nope", "nope: no such folder"),
    ("show .", ".: holds no checkpoint"),
    ("sample RUNS/codec", "codec: is an autoencoder, in whose latents a model is trained; see: inkdrop train RECIPE"),
    (
        "sample RUNS/pipeline",
        "looks like a folder of diffusers; read it first: inkdrop hub read FOLDER --out CHECKPOINT",
    ),
    ("show RUNS/pipeline", "looks like a folder of diffusers; read it first: inkdrop hub read"),
    (
        "hub read RUNS/lone --out made",
        "what the net predicts; copy its pipeline's scheduler/scheduler_config.json into it",
    ),
    ("hub read RUNS/pipeline --out made --sampler foo", "samplers: unknown name 'foo'"),
    ("hub read RUNS/pipeline --out made --grid foo", "grids: unknown name 'foo'"),
    ("eval RUNS/few -n 2", "eval: got 11 training and 1 held-out images, need at least 2 of each; try a model of more"),
    ("eval nope", "nope: no such folder"),
    ("eval RUNS/pictures -n 1", "eval: got 1 samples, need at least 2"),
    ("eval RUNS/pictures --out RUNS", "is a folder, need a file"),
    ("eval RUNS/pictures --out RUNS/pictures/recipe.json/x.json", "recipe.json is no folder that can be written"),
    ("eval RUNS/pictures --data .", "digits knob: unknown name 'data'"),
    ("list rooms", "room: unknown name 'rooms'"),
    ("sample RUNS/classes --sampler restart", "got 'restart', which is one of the combinators"),
    ("sample RUNS/classes --set nll.draws=2", "which goes with eval --nll alone"),
    ("sample RUNS/classes/recipe.json", "is a file; give a run folder"),
    ("list samplers ddin", "samplers: unknown name 'ddin'; did you mean ddim, deis or ddpm?"),
    ("data check nope", "nope: no such folder or zip"),
    ("sample nope", "nope: no such folder"),
    ("sample RUNS", "holds no checkpoint"),
    ("sample RUNS/classes -n 0", "sample count: got 0, need at least 1"),
    ("sample RUNS/classes --seed -1", "seed: got -1, need an integer in [0, 2^64)"),
    ("sample RUNS/classes --sampler dimm", "samplers: unknown name 'dimm'; did you mean ddim"),
    ("sample RUNS/classes --steps 0", "steps: got 0, need at least 1"),
    ("sample RUNS/classes --steps 101", "steps: got 101, need at most 100"),
    ("sample RUNS/classes --grid kras", "grids: unknown name 'kras'; did you mean karras?"),
    ("sample RUNS/classes --sampler heun --set sampler.eta=0.5", "heun knob: unknown name 'eta'"),
    ("sample RUNS/classes --set sampler.eta=-1", "ddim eta: got -1"),
    ("sample RUNS/classes --set sampler.eta=x", "ddim.eta: got 'x', need float"),
    ("sample RUNS/classes --set net.width=16", "--set: got 'net.width=16', but of a trained model only sampler, grid"),
    ("sample RUNS/classes --set cfg.scale=2", "--set: got 'cfg.scale=2', but of a trained model only"),
    ("sample RUNS/classes --guidance -1", "cfg scale: got -1"),
    ("sample RUNS/classes --class 3", "class: got 3, need a number in [0, 2]"),
    ("sample RUNS/classes --class component", "class: unknown name 'component'; did you mean component 2"),
    ("sample RUNS/plain --class 0", "class: got '0', but this model has no classes"),
    ("sample RUNS/plain --guidance 2", "no condition to guide by"),
    ("sample RUNS/undropped --guidance 2", "trained without dropped conditions"),
    ("sample RUNS/classes --weights mean", "weights: got 'mean', need ema or raw"),
    ("sample RUNS/classes --device tpu", "device: got 'tpu'"),
    ("sample RUNS/classes --text x", "text: got 'x', but this model reads none; leave it out"),
    ("sample RUNS/classes --negative x", "negative: has no effect without guidance"),
    ("sample RUNS/classes --negative x --guidance 2", "negative: got 'x', but this model reads none"),
    ("sample RUNS/classes --attribute hue=1", "attributes: got some, but this model takes none; leave them out"),
    ("sample RUNS/pictures --image RUNS/8.png", "to change one, try: inkdrop edit img2img RUN PICTURE"),
    ("sample RUNS/pictures --mask RUNS/8.png", "fill holes; try: inkdrop edit inpaint RUN PICTURE --keep MASK"),
    (
        "sample RUNS/classes --guidance 2 --set cfg.negative=component",
        "cfg negative: unknown name 'component'; did you mean component 2",
    ),
    ("sample RUNS/words --class 0", "class: got '0', but this model has no classes"),
    ("sample RUNS/words --attribute hue", "--attribute: got 'hue', need NAME=NUMBER"),
    ("sample RUNS/words --attribute hue=red", "--attribute: got 'hue=red', need NAME=NUMBER"),
    ("sample RUNS/words --attribute hue=1", "attributes: size is missing; give all of hue, size"),
    ("sample RUNS/words --attribute hue=1 --attribute heu=1", "attribute: unknown name 'heu'; did you mean hue?"),
    ("sample RUNS/words --attribute hue=1 --attribute hue=2", "--attribute: got hue twice; give it once"),
    ("sample RUNS/words --attribute hue=nan --attribute size=1", "attribute hue: got nan, need a finite number"),
    (
        "sample RUNS/words --guide cfg --set cfg.negative=1 --set cfg.scale=2",
        "cfg negative: got class 1, but this model",
    ),
    ("sample RUNS/small", "image: this model starts from a picture; give"),
    ("sample RUNS/small --image RUNS/nope.png", "nope.png: cannot be read"),
    ("sample RUNS/small --image RUNS/words", "words: is a folder; give its files"),
    ("sample RUNS/small --image RUNS/album/metadata.csv", "metadata.csv: is no picture; give a .png"),
    ("sample RUNS/small --image RUNS/5.png", "5.png: is 5 × 5 pixels (width × height), need 4 × 4 or 8 × 8; resize it"),
    ("sample RUNS/small --image RUNS/4.png --image RUNS/8.png", "--image: got pictures of two sizes; give all of one"),
    ("sample RUNS/small --image RUNS/4.png -n 0", "sample count: got 0, need at least 1"),
    ("sample RUNS/small --image RUNS/8.png --mask RUNS/mask.png", "not trained to fill holes; leave it out"),
    ("sample RUNS/small --image RUNS/8.png --guidance 2", "cfg: there is no condition to guide by"),
    ("sample RUNS/hole --image RUNS/8.png", "image: this model fills holes; give a mask too (--mask"),
    ("sample RUNS/hole --mask RUNS/mask.png", "image: this model starts from a picture; give"),
    ("sample RUNS/hole --image RUNS/8.png --mask RUNS/5.png", "5.png: is 5 × 5 pixels (width × height), need 8 × 8"),
    ("sample RUNS/latent --clip", "clip: got a model of latents, which have no range; sample with --no-clip"),
    ("sample RUNS/latent --guide threshold", "threshold: got a model of latents, which have no range"),
    ("eval RUNS/latent --nll", "eval --nll: got a model of latents, whose likelihood of pictures is not known"),
    ("eval RUNS/small --nll", "eval --nll: got a model that starts from a picture, whose likelihood"),
    ("edit img2img RUNS/small RUNS/8.png", "img2img: this model starts from a picture of its own"),
    ("edit img2img RUNS/words RUNS/8.png --attribute hue=1", "attributes: size is missing; give all of hue, size"),
    (
        "edit img2img RUNS/words RUNS/8.png --guidance 2",
        "guidance: got 2, but there is no text to guide by; give a text",
    ),
    ("edit img2img RUNS/latent RUNS/8.png --text a", "text: got 'a', but this model reads none"),
    ("edit outpaint RUNS/latent RUNS/8.png --left 2", "outpaint: got a model of latents, need one of pictures"),
    ("edit restore RUNS/latent RUNS/8.png --operator gray --simulate", "restore: got a model of latents, need one of"),
    ("classifier RUNS/latent --out judge", "classifier: the model works on latents, and this learns the classes of"),
    ("train folder --data RUNS/album --codec nope --set plan.guide=none", "nope: no such folder"),
    (
        "train folder --data RUNS/album --codec RUNS/8.png --set plan.guide=none",
        "8.png: is a file; give an autoencoder's",
    ),
    ("train folder --data RUNS/album --codec RUNS/album --set plan.guide=none", "album: is no autoencoder"),
    (
        "train folder --data RUNS/album --codec RUNS/codec",
        "clip: got a model of latents, which have no range; train with --set plan.guide=none",
    ),
    (
        "train folder --data RUNS/album --codec RUNS/codec --dry-run",
        "clip: got a model of latents, which have no range; train with --set plan.guide=none",
    ),
    (
        "train folder --data RUNS/large --codec RUNS/codec --set plan.guide=none",
        "the autoencoder takes (3, 8, 8); of a folder try --set data.size=8 --set data.resize=stretch",
    ),
    (
        "train folder --data RUNS/album --codec RUNS/codec --set plan.guide=none --set data.channels=grey",
        "the autoencoder takes (3, 8, 8); of a folder try --set data.channels=rgb",
    ),
    ("train folder --data RUNS/album --set text=bpe --set text.length=1", "bpe: got vocabulary 512 and length 1"),
    ("train folder --data RUNS/album --set text=pretrained", "pretrained: got no model, need a folder or a hub id"),
    (
        "train folder --data RUNS/album --set data.label=kin",
        "metadata.csv line 2: no column 'kin'; there are file_name",
    ),
    (
        "train folder --data RUNS/album --set data.attributes=hue,text",
        "metadata.csv line 2: got 'a red square, number 0'",
    ),
    ("train digits --set data.label=kind", "digits knob: unknown name 'label'"),
]


@pytest.mark.parametrize(("command", "fragment"), COMMANDS, ids=[row[0] for row in COMMANDS])
@pytest.mark.usefixtures("idle")
def test_a_command_that_cannot_work(command, fragment, inkdrop, runs, tmp_path):
    before = tree(runs)
    refused(inkdrop(*command.replace("RUNS", str(runs)).split(" ")), fragment)
    assert tree(tmp_path) == {}
    assert tree(runs) == before


USAGE = [
    ("", "Usage"),
    ("nope", "No such command 'nope'"),
    ("train", "Missing argument"),
    ("train digits --foo", "No such option: --foo"),
    ("train digits --max-steps many", "Invalid value for '--max-steps'"),
    ("sample runs/x -n many", "Invalid value for '-n'"),
    ("sample a b", "unexpected extra argument"),
]


@pytest.mark.parametrize(("command", "fragment"), USAGE, ids=[row[0] or "nothing" for row in USAGE])
def test_a_command_line_that_cannot_be_read(command, fragment, inkdrop, tmp_path):
    code, out, err = inkdrop(*command.split())
    assert code == 2
    assert fragment in out + err
    assert "Traceback" not in out + err
    assert tree(tmp_path) == {}


def test_the_tables_are_long_enough():
    assert len(TRAIN) + len(COMMANDS) >= 30
    assert len({row[0] for row in (*TRAIN, *COMMANDS)}) == len(TRAIN) + len(COMMANDS)


# ---- recipe.json -------------------------------------------------------------------------------------------------

BASE = {"data": {"name": "digits"}, "net": {"name": "unet", "knobs": {"width": 4}}}
JSON = [
    ("{", "cannot be read as JSON"),
    ([1], "recipe: got list, need a JSON object"),
    ({"data": {"name": "digits"}}, "recipe.net: is missing"),
    ({**BASE, "sampler": {"name": "ddim"}}, "recipe field: unknown name 'sampler'"),
    ({**BASE, "shedule": {"name": "cosine"}}, "recipe field: unknown name 'shedule'; did you mean schedule"),
    ({**BASE, "net": {"name": "unet", "width": 4}}, "recipe.net field: unknown name 'width'; known: knobs, name"),
    ({**BASE, "net": {"knobs": {}}}, "recipe.net.name: is missing"),
    ({**BASE, "net": "unet"}, "recipe.net: got str, need a JSON object"),
    ({**BASE, "net": {"name": "unet", "knobs": {"wdth": 4}}}, "unet knob: unknown name 'wdth'; did you mean width"),
    ({**BASE, "train": {"steps": "x"}}, "recipe.train.steps: got 'x'"),
    ({**BASE, "train": {"stpes": 3}}, "recipe.train field: unknown name 'stpes'; did you mean steps"),
    ({**BASE, "train": {"steps": 0}}, "train.steps: got 0, need at least 1"),
    ({**BASE, "plan": {"steps": 0}}, "steps: got 0, need at least 1"),
    ({**BASE, "plan": {"guide": "clip"}}, "recipe.plan.guide: got 'clip'"),
    ({**BASE, "plan": {"guide": [{"name": "clip", "knobz": {}}]}}, "recipe.plan.guide field: unknown name 'knobz'"),
    ({**BASE, "plan": {"guide": [{"name": "clpi"}]}}, "guide: unknown name 'clpi'; did you mean clip?"),
]


@pytest.mark.parametrize(("content", "fragment"), JSON)
@pytest.mark.usefixtures("idle")
def test_a_recipe_json_that_says_something_else(content, fragment, inkdrop, tmp_path):
    (tmp_path / "recipe.json").write_text(content if isinstance(content, str) else json.dumps(content))
    refused(inkdrop("train", "recipe.json", "--out", "run"), fragment)
    assert list(tree(tmp_path)) == ["recipe.json"]


# ---- data --------------------------------------------------------------------------------------------------------


def picture(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 100).save(path)


def damaged(folder: Path) -> None:
    for n in range(4):
        picture(folder / f"{n}.png", (8, 8))
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])


def mixed(folder: Path) -> None:
    for n in range(4):
        picture(folder / f"{n}.png", (8, 8 + n))


def out_of_range(folder: Path) -> None:
    folder.mkdir()
    for n in range(4):
        np.save(folder / f"{n}.npy", np.full((8, 8, 5), 1.0 + n, dtype=np.float32))


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (Path.mkdir, "no images"),
        (damaged, "2.png"),
        (mixed, "size"),
        (out_of_range, "[-1, 1]"),
    ],
)
@pytest.mark.usefixtures("idle")
def test_a_folder_that_cannot_be_trained_on(make, fragment, inkdrop, tmp_path):
    make(tmp_path / "photos")
    before = tree(tmp_path)
    small = [part for text in ("net.width=4", "net.attention=[]", "train.batch=2") for part in ("--set", text)]
    refused(inkdrop("train", "folder", "--data", "photos", "--out", "run", "--max-steps", "1", *small), fragment)
    assert tree(tmp_path) == before


# ---- disks and the rest ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("idle")
def test_what_is_there_is_not_written_over(inkdrop, runs, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    before = tree(tmp_path)
    refused(inkdrop("sample", runs / "classes", "--out", "notes"), "notes: exists already")
    refused(inkdrop("sample", runs / "classes", "--out", "notes", "--overwrite"), "not a folder of samples")
    refused(inkdrop("sample", runs / "classes", "--out", "notes/mine.txt/x"), "cannot be made")
    refused(inkdrop("train", "digits", "--out", "notes"), "notes: is not an empty folder")
    refused(inkdrop("train", "digits", "--out", runs / "classes"), "holds a run already; resume it")
    refused(inkdrop("train", "digits", "--out", "notes/mine.txt/x"), "cannot be made")
    for command in (
        ["autoencoder", "digits"],
        ["classifier", runs / "pictures"],
        ["hub", "read", runs / "pipeline"],
        ["hub", "write", runs / "pictures"],
    ):
        code, out, err = inkdrop(*command, "--out", "notes")
        assert (code, out, err) == (2, "", "inkdrop: notes: exists already; choose another --out\n")  # no --overwrite
    assert tree(tmp_path) == before


def full(*args: object, **how: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")


@pytest.mark.parametrize("place", ["PIL.Image.Image.save", "safetensors.torch.save_file", "os.fsync"])
def test_a_full_disk_is_one_line(place, inkdrop, runs, tmp_path, monkeypatch):
    """While samples are written, and while a run is: whatever has its final name is whole."""
    each = [part for text in (*TINY, "cfg.scale=1") for part in ("--set", text)]
    monkeypatch.setattr(place, full)
    if place != "safetensors.torch.save_file":
        refused_late(inkdrop("sample", runs / "pictures", "-n", "2", "--out", "samples"), "No space left on device")
        assert tree(tmp_path) == {}
    refused_late(inkdrop("train", "digits", "--out", "run", "--max-steps", "1", *each), "No space left on device")
    for name, content in tree(tmp_path).items():
        if "checkpoints" in Path(name).parts:  # the disk had room for that one
            load(Path(name).parent)
            continue
        assert Path(name).name in ("recipe.json", "run.json", "stats.jsonl", "step-00000001.png"), name
        if name.endswith(".png"):
            with Image.open(tmp_path / name) as image:
                image.load()
        else:
            [json.loads(line) for line in (content.splitlines() if name.endswith("l") else [content])]


def refused_late(answer: tuple[int, str, str], fragment: str) -> None:
    """After the work has begun, so that progress was shown before the line."""
    code, _, err = answer
    lines = err.strip().splitlines()
    assert code == 2
    assert [line for line in lines if line.startswith("inkdrop: ")] == lines[-1:]
    assert fragment in lines[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BadArgument("mine"), "inkdrop: mine"),
        (Busy("later"), "inkdrop: later"),
        (Cancelled("stopped"), "inkdrop: stopped"),
        (PermissionError(13, "Permission denied", "/etc/x"), "inkdrop: /etc/x: Permission denied"),
    ],
)
def test_every_error_of_the_house_is_one_line(error, line, inkdrop, runs, monkeypatch):
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(jobs, "open_bundle", fail)
    code, _, err = inkdrop("sample", runs / "classes")
    assert (code, err) == (2, f"{line}\n")


def test_a_defect_of_the_house_is_not_hidden(inkdrop, runs, monkeypatch):
    monkeypatch.setattr(jobs, "open_bundle", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["sample", str(runs / "classes")])


def test_a_warning_is_one_line_too(tmp_path):
    """From outside, for the tests turn warnings into errors; this schedule does not end in noise."""
    code = "import sys; from inkdrop.cli import main; main(sys.argv[1:])"
    each = [part for text in (*TINY, "schedule=linear", "schedule.steps=20") for part in ("--set", text)]
    command = [sys.executable, "-c", code, "train", "digits", "--dry-run", *each]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("inkdrop: warning: schedule: at t = 1 a share")


def test_a_strangers_recipe_imports_no_code(inkdrop, tmp_path, monkeypatch):
    """recipe.json may name "my.module:thing" only with --trust, to train and to resume; nothing is called before."""
    called = []
    monkeypatch.setattr("os.system", lambda command: called.append(command))
    fit(points(steps=2), tmp_path / "run", max_steps=1)
    plain = json.loads((tmp_path / "run" / "recipe.json").read_text())
    for slot in ("data", "net"):
        foreign = json.dumps({**plain, slot: {"name": "os:system", "knobs": {}}})
        (tmp_path / "foreign.json").write_text(foreign)
        (tmp_path / "run" / "recipe.json").write_text(foreign)
        refused(inkdrop("train", "foreign.json", "--out", "out"), "would import os:system")
        refused(inkdrop("resume", "run"), "would import os:system")
        assert called == []
    refused(inkdrop("train", "foreign.json", "--out", "out", "--trust"), "os:system")
    assert not (tmp_path / "out").exists()
