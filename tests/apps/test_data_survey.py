"""What `inkdrop data check` says of a folder: it agrees with what training on it does."""

from __future__ import annotations

import dataclasses
import json
import shlex
import zipfile

import numpy as np
import pytest
from PIL import Image

from albums import NAMES, album
from inkdrop.cli import main
from inkdrop.data.folder import folder
from inkdrop.data.survey import survey
from inkdrop.errors import BadData

RNG = np.random.default_rng(0)


def put(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def options(command, root):
    """The knobs that a suggested command sets."""
    words = shlex.split(command)
    assert words[:5] == ["inkdrop", "train", "folder", "--data", str(root)]
    settings = dict(word.removeprefix("data.").split("=") for word in words[5:] if word != "--set")
    return {name: int(value) if value.isdigit() else value for name, value in settings.items()}


def test_a_sound_folder(tmp_path):
    root = tmp_path / "my pictures"
    for kind, count in (("cat", 30), ("dog", 20)):
        for i in range(count):
            put(root / kind / f"{i}.png", noise(6, 4, 3))
    found = survey(root)
    assert found.total == 50
    assert found.sizes == {"6×4": 50}
    assert found.modes == {"RGB": 50}
    assert found.classes == {"cat": 30, "dog": 20}
    assert found.splits == {split: len(folder(split, data=root)) for split in ("train", "test")}
    assert "(with fewer than 100 held out, scores say little" in found.text()
    assert "fewer than" not in dataclasses.replace(found, splits={"train": 1900, "test": 100}).text()
    assert (found.unreadable, found.duplicates, found.notes, found.reason) == ((), (), (), "")
    assert found.values == (-1, 1)
    assert options(found.command, root) == {}
    assert "50 of 50 images can be read" in found.text()
    assert found.text().endswith(f"to train: inkdrop train folder --data '{root}'")
    json.dumps(dataclasses.asdict(found))


def test_every_unreadable_file_is_listed_with_its_reason(tmp_path):
    for i in range(8):
        put(tmp_path / f"{i}.png", noise(9, 9))
    whole = (tmp_path / "0.png").read_bytes()
    bad = {
        "cut.png": whole[:-40],
        "empty.png": b"",
        "page.jpg": b"<html>no picture</html>",
        "half.webp": whole[:20],
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    put(tmp_path / "loud.npy", np.array([[0.0, 3.0]]))
    (tmp_path / "out.png").symlink_to("/etc/hostname")
    found = survey(tmp_path)
    reasons = dict(found.unreadable)
    assert set(reasons) == {*bad, "loud.npy", "out.png"}
    assert reasons["empty.png"] == "an empty file"
    assert "truncated" in reasons["cut.png"]
    assert reasons["page.jpg"].startswith("not a PNG, JPEG")
    assert reasons["loud.npy"] == "got floats in [0, 3], need [-1, 1]; scale them before saving"
    assert "outside the folder" in reasons["out.png"]
    text = found.text()
    assert all(f"{name}: {reason}" in text for name, reason in reasons.items())
    assert "8 of 14 images can be read" in text
    assert (found.total, found.command) == (14, "")
    assert "6 files cannot be read; remove or mend them" in text
    for name in reasons:
        (tmp_path / name).unlink()
    assert options(survey(tmp_path).command, tmp_path) == {}


def test_mixed_sizes_get_the_option_that_works(tmp_path):
    for i, shape in enumerate([(40, 30), (64, 64), (64, 64)]):
        put(tmp_path / f"{i}.png", noise(*shape))
    found = survey(tmp_path)
    assert found.sizes == {"40×30": 1, "64×64": 2}
    knobs = options(found.command, tmp_path)
    assert knobs == {"resize": "crop", "size": 24}
    assert folder("train", data=tmp_path, **knobs).shape == (1, 24, 24)


def test_what_no_option_helps_has_a_reason(tmp_path):
    put(tmp_path / "0.png", noise(4, 4))
    put(tmp_path / "1.npy", noise(4, 4))
    found = survey(tmp_path)
    assert found.command == ""
    assert "1 .npy files beside 1 pictures" in found.reason
    (tmp_path / "1.npy").unlink()
    assert "there are 1 images" in survey(tmp_path).reason
    put(tmp_path / "a" / "2.png", noise(4, 4))
    put(tmp_path / "a" / "3.png", noise(5, 5))
    found = survey(tmp_path)
    assert "both beside and inside class folders" in found.text()
    assert found.sizes == {"4×4": 2, "5×5": 1}  # looked at all the same
    (tmp_path / "0.png").unlink()
    (tmp_path / "a" / "metadata.csv").write_text("file_name,label\n2.png,x\n../3.png,y")
    assert "a/metadata.csv line 3: got '../3.png', leads outside" in survey(tmp_path).reason


def test_duplicates_are_of_pixels_and_told_across_splits(tmp_path):
    same = noise(5, 5)
    put(tmp_path / "train" / "a.png", same)
    put(tmp_path / "train" / "b.bmp", same)  # another file, the same pixels
    put(tmp_path / "train" / "c.png", same.reshape(5, 5).T)
    put(tmp_path / "test" / "d.png", same)
    found = survey(tmp_path)
    assert found.duplicates == (("test/d.png", "train/a.png", "train/b.bmp"),)
    assert found.notes == ("1 groups of duplicates are in both splits, so scores on the test split flatter",)
    assert "test/d.png = train/a.png = train/b.bmp" in found.text()
    (tmp_path / "test" / "d.png").unlink()
    put(tmp_path / "test" / "wide.png", np.zeros((2, 8), np.uint8))
    put(tmp_path / "test" / "tall.png", np.zeros((8, 2), np.uint8))  # the same bytes, another shape
    found = survey(tmp_path)
    assert (found.duplicates, found.notes) == ((("train/a.png", "train/b.bmp"),), ())


def test_notes_tell_what_the_rules_do(tmp_path):
    for i in range(3):
        put(tmp_path / "opaque" / f"{i}.png", np.dstack([noise(4, 4, 3), np.full((4, 4), 255, np.uint8)]))
        put(tmp_path / "floats" / f"{i}.npy", RNG.uniform(0, 1, (4, 4)))
    assert survey(tmp_path / "opaque").notes == ("alpha is opaque everywhere; --set data.channels=rgb leaves it out",)
    found = survey(tmp_path / "floats")
    assert found.notes[1:] == ("no float is below 0; if they were meant as [0, 1], save 2·x − 1",)
    assert found.modes == {"npy float64": 3}
    put(tmp_path / "floats" / "3.npy", RNG.uniform(-1, 1, (4, 4)))
    assert survey(tmp_path / "floats").notes == (".npy is read as (H, W, C): 4×4 pixels of 1 channels",)
    put(tmp_path / "opaque" / "2.png", noise(4, 4, 4))
    assert survey(tmp_path / "opaque").notes == ()
    (tmp_path / "opaque" / "labels.csv").write_text("file,label\n0.png,x\n2.png,y")
    assert survey(tmp_path / "opaque").notes[0] == "1 images do not count in this layout: 1.png"


def test_zips_are_surveyed_in_place(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        for name in ("test/a/0.png", "test/b/0.png", "test/b/1.png"):
            put(tmp_path / "one.png", noise(4, 4, 3))
            out.write(tmp_path / "one.png", name)
    found = survey(tmp_path / "x.zip")
    assert found.classes == {"a": 1, "b": 2}
    assert found.splits == {"test": 3}
    assert "no images for the train split: all are in a folder test/" in found.reason


@pytest.mark.parametrize("name", ["nowhere", "empty", "text.txt"])
def test_nothing_to_look_at_is_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(BadData) as error:
        survey(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_the_layout_of_arrays_is_said(tmp_path):
    """(C, H, W) arrays are read as (H, W, C), so the survey says what it saw, and doubts what looks transposed."""
    for name, shape in (("last", (16, 16, 5)), ("first", (5, 16, 16))):
        put(tmp_path / name / "0.npy", RNG.uniform(-1, 1, shape).astype(np.float32))
        put(tmp_path / name / "1.npy", RNG.uniform(-1, 1, shape).astype(np.float32))
    last, first = survey(tmp_path / "last").notes, survey(tmp_path / "first").notes
    assert ".npy is read as (H, W, C): 16×16 pixels of 5 channels" in last
    assert any("5×16 pixels of 16 channels; if the files are (C, H, W), transpose them" in note for note in first)


def settings(command):
    """What a suggested command sets, as it is said."""
    words = shlex.split(command)
    return [words[i + 1] for i, word in enumerate(words) if word == "--set"]


def table(root, header, *rows):
    """Pictures 0.png, 1.png ... and a metadata.csv with a row for each."""
    for i in range(len(rows)):
        put(root / f"{i}.png", noise(4, 4))
    lines = [f"file_name,{header}", *(f"{i}.png,{row}" for i, row in enumerate(rows))]
    (root / "metadata.csv").write_text("\n".join(lines))
    return survey(root)


@pytest.mark.long
def test_a_table_is_said_and_its_command_trains_on_all_of_it(tmp_path, capsys):
    """As far as a dry run: classes, attributes and captions arrive at the model."""
    found = survey(album(tmp_path / "album", count=40))
    assert (found.captions, found.kinds) == (32, {"kind": 3})
    assert found.numbers == {"hue": (0, 0.975), "size": (-1, 0.5)}
    for line in (
        "captions    32 of 40",
        "as class    kind (3 values): ",
        "numbers     hue (0 to 0.975), size (-1 to 0.5)",
    ):
        assert line in found.text()
    assert settings(found.command) == ["data.label=kind", "data.attributes=hue,size", "text=bpe"]
    small = [part for knob in ("net.width=4", "net.multipliers=[1]", "net.attention=[]") for part in ("--set", knob)]
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(found.command)[1:], *small, "--dry-run"])
    shown = capsys.readouterr()
    assert not end.value.code, shown.err
    rows = dict(line.split(maxsplit=1) for line in shown.out.splitlines() if line[:1].isalpha())
    assert rows["classes"].split() == ["3:", "dark,", "light,", "two"]
    assert int(rows["attributes"]) == len(NAMES)
    assert int(rows["vocabulary"]) > 0


def test_only_what_fits_is_suggested(tmp_path):
    """No second class beside label; no row names, no fractions as class, no numbers far from 1; odd names quoted."""
    found = table(
        tmp_path / "a", "label,colour,id,year", "x,red,0,1990", "y,red,1,1991", "x,blue,2,1990", "y,blue,3,1992"
    )
    assert found.classes == {"x": 2, "y": 2}
    assert found.kinds == {"colour": 2}
    assert found.numbers == {"id": (0, 3), "year": (1990, 1992)}
    assert settings(found.command) == ["data.attributes=id"]
    found = table(tmp_path / "b", '1,"a,b"', "red,0.5", "red,0.25", "blue,0.5", "blue,0.25")
    assert (found.kinds, list(found.numbers)) == ({"1": 2}, ["a,b"])
    assert settings(found.command) == ['data.label="1"', 'data.attributes=["a,b"]']
    assert folder("train", data=tmp_path / "b", label="1", attributes=("a,b",)).classes == ("blue", "red")
    found = table(tmp_path / "d", "part", "1", "2", "1", "2")  # whole numbers could be either, and are said as both
    assert (found.kinds, found.numbers, settings(found.command)) == (
        {"part": 2},
        {"part": (1, 2)},
        ["data.attributes=part"],
    )
    found = table(tmp_path / "c", "name,text", "one,", "two,", "three,", "four,")  # captions, all of them empty
    assert (found.captions, found.kinds, found.numbers, settings(found.command)) == (0, {}, {}, [])


def test_a_class_of_folders_is_not_given_up_for_a_table(tmp_path):
    """A table counts only if it is asked for a column; where that would take the folders' classes, it is not."""
    for kind in ("cat", "dog"):
        for i in range(4):
            put(tmp_path / kind / f"{i}.png", noise(4, 4))
    rows = [f"{kind}/{i}.png,{i / 4}" for kind in ("cat", "dog") for i in range(4)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,hue", *rows]))
    found = survey(tmp_path)
    assert (found.classes, found.numbers) == ({"cat": 4, "dog": 4}, {"hue": (0, 0.75)})
    assert settings(found.command) == []
