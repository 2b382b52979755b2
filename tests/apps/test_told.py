"""What a model is told, from outside: classes, texts, attributes, pictures and masks, recorded so that it repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from albums import KINDS, NAMES, SHAPE, album, codec_folder, pictured, shaken_run
from inkdrop import editing, picture, said
from inkdrop.bundle import load, locate
from inkdrop.cli import main
from inkdrop.codec import load_codec
from inkdrop.edit.pairs import middle_hole
from inkdrop.evals.likelihood import Settings, likelihood
from inkdrop.evals.stream import subset
from inkdrop.find import Part
from inkdrop.generate import sample
from inkdrop.inputs import read_picture
from inkdrop.plan import Plan
from inkdrop.recipe import dump, open_data

pytestmark = pytest.mark.app


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of 2 updates: told words, small pictures, holes; and one of latents."""
    folder = tmp_path_factory.mktemp("runs")
    pictures, codec = album(folder / "album"), codec_folder(folder / "codec")
    plan, few = Plan(steps=2, guide=(Part("clip"),)), {"steps": 2}
    small = Part("lowres", {"factor": 2})
    shaken_run(pictured(pictures, label=True, text=True, attributes=True, plan=plan, **few), folder / "words")
    shaken_run(pictured(pictures, label=True, image=small, plan=plan, **few), folder / "small")
    shaken_run(pictured(pictures, image=Part("hole"), plan=plan, **few), folder / "hole")
    shaken_run(pictured(pictures, text=True, codec=codec, **few), folder / "latent")
    return folder


@pytest.fixture
def inkdrop(tmp_path, monkeypatch, capsys):
    """The command line in an empty folder: (stdout, stderr) of a command that must succeed."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        shown = capsys.readouterr()
        assert not end.value.code, shown.err
        return shown.out, shown.err

    return run


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def images_of(folder: str) -> list[np.ndarray]:
    return [pixels(path) for path in sorted(Path(folder).glob("[0-9]*.png"))]


def same(folder: str, x: Tensor) -> bool:
    """Whether a folder holds these samples, in 8 bits."""
    return all(np.array_equal(a, np.array(picture.image(b))) for a, b in zip(images_of(folder), x, strict=True))


def record_of(folder: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((Path(folder) / "sample.json").read_text())
    return record


def options_of(record: dict[str, Any]) -> list[str]:
    """The command line that a sample.json stands for."""
    each = [("--class", record["classes"]), ("--text", record["texts"]), ("--image", record["images"])]
    each.append(("--negative", record["negatives"]))
    words = [part for name, values in each for value in values or () for part in (name, value)]
    for name, value in (record["attributes"] or [{}])[0].items():
        words += ["--attribute", f"{name}={value!r}"]
    words += ["--mask", record["mask"]] if record["mask"] else []
    return ["-n", str(record["count"]), "--seed", str(record["seed"]), *words]


# ---- sampling ----------------------------------------------------------------------------------------------------


def test_without_words_it_is_the_trainers_preview(runs, inkdrop):
    """And says in sample.json what it was told: the held-out examples in turn, each with its class."""
    for name in ("words", "latent"):
        inkdrop("sample", runs / name, "--out", name)
        last = sorted((runs / name / "previews").iterdir())[-1]
        assert Path(name, "grid.png").read_bytes() == last.read_bytes()
        examples, record = load(runs / name).examples, record_of(name)
        assert record["texts"] == [examples.texts[i % len(examples.texts)] for i in range(16)]
        assert (record["images"], record["mask"], record["negatives"]) == (None, None, None)
    assert (record["classes"], record["attributes"]) == (None, None)
    examples, record = load(runs / "words").examples, record_of("words")
    assert record["classes"] == [KINDS[examples.labels[i % len(examples.labels)]] for i in range(16)]
    rows = [examples.attributes[i % len(examples.attributes)] for i in range(16)]
    assert record["attributes"] == [dict(zip(NAMES, row, strict=True)) for row in rows]


@pytest.mark.long
@pytest.mark.parametrize("name", ["words", "small", "hole"])
def test_what_is_said_to_come_next_runs(name, runs, inkdrop, tmp_path):
    """After a training: with a picture, and a mask, where the model starts from them."""
    (tmp_path / "recipe.json").write_text(json.dumps(dump(load(runs / name).recipe)))
    Image.new("RGB", (8, 8), (200, 30, 90)).save(tmp_path / "PICTURE.png")
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "MASK.png")
    out, _ = inkdrop("train", "recipe.json", "--out", "run")
    [line] = [line for line in out.splitlines() if line.startswith("next:")]
    words = [f"{word}.png" if word in ("PICTURE", "MASK") else word for word in line.split()[2:]]
    inkdrop(*words, "--out", "drawn")
    record = record_of("drawn")
    assert (record["images"] is None, record["mask"] is None) == (name == "words", name != "hole")


@pytest.mark.long
def test_a_class_to_steer_away_from_is_said_by_name_too(runs, inkdrop):
    for name in (1, KINDS[1], 2):
        inkdrop("sample", runs / "words", "--guidance", 3, "--set", f"cfg.negative={name}", "-n", 3, "--out", name)
    assert all(map(np.array_equal, images_of("1"), images_of(KINDS[1])))
    assert not all(map(np.array_equal, images_of("1"), images_of("2")))
    assert record_of(KINDS[1])["plan"]["guide"][-1]["knobs"]["negative"] == 1


def test_an_autoencoder_is_shown_as_one(runs, inkdrop):
    shown = dict(line.split(maxsplit=1) for line in inkdrop("show", runs / "codec")[0].splitlines() if line.strip())
    codec = load_codec(runs / "codec")
    assert shown["shape"].split() == ["3", "×", "8", "×", "8"]
    assert shown["latents"].split() == ["2", "×", "4", "×", "4"]
    assert shown["parameters"].strip() == f"{sum(p.numel() for p in codec.parameters()):,}"
    assert shown["net"].startswith("autoencoder(latent=2")


@pytest.mark.parametrize(
    ("words", "label"),
    [
        (("--class", "2"), [2] * 5),
        (("--class", "two"), [2] * 5),
        (("--class", "two", "--class", "0", "--class", "light"), [2, 0, 1, 2, 0]),
    ],
)
def test_a_class_by_number_or_name_and_several_in_turn(words, label, runs, inkdrop):
    told = ("--text", "a red square", "--attribute", "hue=0.5", "--attribute", "size=-1")
    inkdrop("sample", runs / "words", "-n", 5, "--out", "out", *words, *told)
    vec = {"hue": 0.5, "size": -1.0}
    x = sample(load(runs / "words"), 5, label=label, text="a red square", attributes=vec)
    assert same("out", x)
    record = record_of("out")
    assert record["classes"] == [KINDS[i] for i in label]
    assert record["texts"] == ["a red square"] * 5
    assert record["attributes"] == [vec] * 5


def test_texts_in_turn_and_what_to_steer_away_from(runs, inkdrop):
    texts = ["a red square", "a green square, number 7", "two"]
    words = [part for text in texts for part in ("--text", text)]
    inkdrop("sample", runs / "latent", "-n", 4, "--out", "out", "--guidance", 2.5, "--negative", "blue", *words)
    model, each = load(runs / "latent"), [*texts, texts[0]]
    assert same("out", sample(model, 4, text=each, guidance=2.5, negative="blue"))
    assert not same("out", sample(model, 4, text=each, guidance=2.5))
    assert record_of("out")["texts"] == each
    assert record_of("out")["negatives"] == ["blue"] * 4


def save(x: Tensor, path: str) -> Tensor:
    """A picture as a file, and as it is read again."""
    picture.image(x).save(path)
    return read_picture(Path(path), tuple(x.shape))


def test_pictures_to_start_from_of_either_size(runs, inkdrop):
    """The model's small one, or one of the data's size, which is brought to it; several in turn."""
    model = load(runs / "small")
    whole = [save(torch.rand(SHAPE, generator=torch.Generator().manual_seed(i)) * 2 - 1, f"{i}.png") for i in (0, 1)]
    inkdrop("sample", runs / "small", "-n", 3, "--image", "0.png", "--image", "1.png", "--class", 1, "--out", "out")
    x = torch.stack([whole[0], whole[1], whole[0]])
    assert same("out", sample(model, 3, label=1, image=x))
    assert record_of("out")["images"] == ["0.png", "1.png", "0.png"]
    small = save(functional.avg_pool2d(whole[0][None], 2)[0], "small.png")
    inkdrop("sample", runs / "small", "-n", 2, "--image", "small.png", "--class", 1, "--out", "from-small")
    assert same("from-small", sample(model, 2, label=1, image=small[None]))
    assert not same("from-small", sample(model, 2, label=1, image=-small[None]))


def test_holes_are_filled_where_the_mask_is_black(runs, inkdrop):
    """One mask for several pictures."""
    model = load(runs / "hole")
    x = torch.stack([save(torch.full(SHAPE, level), f"{level}.png") for level in (-1.0, 1.0)])
    keep = middle_hole(1, SHAPE)
    picture.image(keep[0].float() * 2 - 1).save("mask.png")
    inkdrop("sample", runs / "hole", "-n", 2, "--image", "-1.0.png", "--image", "1.0.png", "--mask", "mask.png")
    assert same("samples", sample(model, 2, image=x, mask=keep))
    assert not same("samples", sample(model, 2, image=x, mask=~keep))
    record = record_of("samples")
    assert (record["images"], record["mask"]) == (["-1.0.png", "1.0.png"], "mask.png")


WORDS = [
    ("words", ("--class", "two", "--text", "a", "--text", "b", "--attribute", "size=0.3", "--attribute", "hue=1e-3")),
    ("words", ("--seed", "7")),
    ("latent", ("--text", "a blue square", "--seed", "3")),
    ("small", ("--image", "a.png", "--image", "b.png", "--class", "1")),
    ("hole", ("--image", "a.png", "--image", "b.png", "--mask", "mask.png")),
]


@pytest.mark.parametrize(("run", "words"), WORDS, ids=[f"{run} {i}" for i, (run, _) in enumerate(WORDS)])
def test_a_sample_json_repeats_it(run, words, runs, inkdrop):
    for seed, name in enumerate("ab"):
        save(torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1, f"{name}.png")
    picture.image(middle_hole(1, SHAPE)[0].float() * 2 - 1).save("mask.png")
    inkdrop("sample", runs / run, "-n", 1 if words[0] == "--seed" else 3, *words, "--out", "one")
    inkdrop("sample", runs / run, *options_of(record_of("one")), "--out", "two")
    assert len(images_of("one")) == record_of("one")["count"] >= 1
    assert all(np.array_equal(a, b) for a, b in zip(images_of("one"), images_of("two"), strict=True))
    assert record_of("two") == record_of("one")


def test_a_transparent_picture_is_laid_over_what_the_data_were(runs, inkdrop, tmp_path):
    pictures, image = album(tmp_path / "album", mode="RGBA"), Part("lowres", {"factor": 2})
    black = pictured(pictures, image=image, plan=Plan(steps=2), steps=1)
    black.data.knobs.update(background="black", channels="rgb")
    shaken_run(black, tmp_path / "black")
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save("clear.png")
    for run, level in ((tmp_path / "black", -1.0), (runs / "small", 1.0)):
        inkdrop("sample", run, "-n", 1, "--image", "clear.png", "--out", f"from-{run.name}")
        assert same(f"from-{run.name}", sample(load(run), 1, image=torch.full((1, *SHAPE), level)))


# ---- training and showing ----------------------------------------------------------------------------------------


def told(*each: str) -> list[str]:
    return [part for text in each for part in ("--set", text)]


TINY = ("net.width=4", "net.multipliers=[1]", "net.blocks=1", "net.attention=[]", "train.batch=2", "plan.steps=2")


def test_the_command_line_trains_on_columns_captions_and_pictures(runs, inkdrop):
    columns = told("data.label=kind", "data.attributes=hue,size", "text=bpe", "text.vocabulary=270", "image=lowres")
    more = told("image.factor=2", "train.augment=0.3", "net.augment=true", *TINY)
    command = ("train", "folder", "--data", runs / "album", *columns, *more)
    out, _ = inkdrop(*command, "--dry-run")
    recipe, facts = json.loads(out.split("\n}\n")[0] + "}"), out.split("\n}\n")[1]
    assert recipe["image"] == {"name": "lowres", "knobs": {"factor": 2}}
    rows = {line.split()[0]: line.split()[-1] for line in facts.splitlines() if line.strip()}
    assert [rows[name] for name in ("attributes", "vocabulary", "length", "image")] == ["2", "270", "32", "3"]
    inkdrop(*command, "--max-steps", 1, "--out", "run")
    model = load("run")
    assert (model.classes, model.attributes, model.reader.vocabulary, model.pair.channels) == (KINDS, NAMES, 270, 3)
    out, _ = inkdrop("show", "run")
    for fragment in ("dark, light, two", "hue, size", "bpe(vocabulary=270)", "lowres(factor=2)"):
        assert fragment in out


def test_the_command_line_trains_in_latents(runs, inkdrop):
    tiny = told(*TINY, "plan.guide=none", "data.holdout=0.25")
    inkdrop(
        "train", "folder", "--data", runs / "album", "--codec", runs / "codec", *tiny, "--max-steps", 1, "--out", "run"
    )
    model = load("run")
    assert model.codec.hash == load(runs / "latent").codec.hash
    assert model.recipe.codec == str((runs / "codec").resolve())
    assert "autoencoder(" in inkdrop("show", "run")[0]
    assert sample(model, 2).shape == (2, *SHAPE)


# ---- editing -----------------------------------------------------------------------------------------------------


def edited(folder: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((Path(folder) / "edit.json").read_text())
    return record


def test_edits_are_told_words_too(runs, inkdrop):
    x = save(torch.rand(SHAPE) * 2 - 1, "x.png")[None]
    vec = {"hue": 0.25, "size": 1.0}
    words = ("--class", "light", "--text", "a red", "--attribute", "hue=0.25", "--attribute", "size=1")
    inkdrop("edit", "img2img", runs / "words", "x.png", "--strength", 0.5, *words)
    model = load(runs / "words")
    assert same("edits", editing.img2img(model, x, strength=0.5, label=1, text="a red", attributes=vec))
    record = edited("edits")
    assert (record["classes"], record["texts"], record["attributes"]) == (["light"], ["a red"], vec)
    inkdrop("edit", "img2img", runs / "words", "x.png", "--strength", 0.5, "--text", "a red", "--out", "text")
    assert same("text", editing.img2img(model, x, strength=0.5, text="a red"))
    assert (edited("text")["classes"], edited("text")["attributes"]) == (None, None)


def test_models_of_latents_are_edited(runs, inkdrop):
    model, x = load(runs / "latent"), save(torch.rand(SHAPE) * 2 - 1, "x.png")[None]
    inkdrop("edit", "img2img", runs / "latent", "x.png", "--strength", 0.5, "--text", "a red", "--out", "img2img")
    assert same("img2img", editing.img2img(model, x, strength=0.5, text="a red"))
    keep = middle_hole(1, SHAPE)
    picture.image(keep[0].float() * 2 - 1).save("mask.png")
    inkdrop("edit", "inpaint", runs / "latent", "x.png", "--keep", "mask.png", "--out", "inpaint")
    assert same("inpaint", editing.inpaint(model, x, keep[0]))
    inkdrop("edit", "invert", runs / "latent", "x.png", "--out", "invert")
    states = editing.invert(model, x)
    np.testing.assert_allclose(np.load("invert/noise.npy"), states.numpy(), rtol=0, atol=1e-6)
    assert same("invert", editing.decode(model, states))
    assert edited("invert")["asks"] == 2 * 3 + 2  # three a step of the inversion, one of the decoding
    inkdrop("edit", "vary", runs / "latent", "x.png", "-n", 2, "--out", "vary")
    assert same("vary", editing.vary(model, x, count=2)[0])
    inkdrop("edit", "interpolate", runs / "latent", "--seeds", 1, 2, "-n", 2, "--out", "way")
    assert same("way", editing.interpolate_seeds(model, (1, 2), count=2)[0])


# ---- scoring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["latent", "hole"])
def test_models_are_scored_by_what_comes_with_the_data(run, runs, inkdrop):
    inkdrop("eval", runs / run, "-n", 9, "--out", "figures.json")
    figures = json.loads(Path("figures.json").read_text())
    assert figures["n"] == 9
    model = load(runs / run)
    test = open_data(model.recipe.data, "test")
    x = sample(model, 9, **vars(said.told_by(model, test, range(9)))).clamp(-1, 1)
    train = open_data(model.recipe.data, "train").take(range(29))[0]
    far = torch.cdist(x.flatten(1), train.flatten(1)).min(1).values / (3 * 8 * 8) ** 0.5
    assert figures["nearest"]["mean"] == pytest.approx(float(far.mean()), rel=1e-4)


def test_the_likelihood_is_that_with_the_captions(runs, inkdrop):
    """Of a model that reads: each image with its own caption, not without."""
    few = ("--steps", 3, *told("nll.draws=1", "nll.flow_steps=2", "nll.method=heun"))
    inkdrop("eval", runs / "words", "--nll", "-n", 4, *few, "--out", "figures.json")
    figures = json.loads(Path("figures.json").read_text())
    model = load(runs / "words")
    test = open_data(model.recipe.data, "test")
    rows, how = subset(len(test), 4, seed=0), Settings(steps=3, draws=1, flow_steps=2, method="heun")
    want, without = (likelihood(model.denoiser, data, rows, how) for data in (said.Captioned(test, model.reader), test))
    assert figures["images"] == want["images"]
    assert figures["images"]["bound"] != without["images"]["bound"]


def test_a_checkpoint_holds_what_it_reads_and_decodes_with(runs: Path) -> None:
    assert sorted(p.name for p in locate(runs / "latent").iterdir()) == [
        "bundle.json",
        "codec.safetensors",
        "net.safetensors",
        "raw.safetensors",
        "state.json",
        "state.safetensors",
        "tokenizer.json",
    ]
