"""Folders and zips of images: layouts, splits, what is inferred, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import stat
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from inkdrop.core.dataset import Data
from inkdrop.data.folder import folder
from inkdrop.errors import BadArgument, BadData

RNG = np.random.default_rng(0)


def put(path, values):
    """An image at a path: a PNG of an array, or of one colour if given as a tuple."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(np.asarray(values, dtype=getattr(values, "dtype", np.uint8))).save(path)


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def fill(root, names, *shape):
    """An image of noise at each name; the pixels by name."""
    made = {name: noise(*shape) for name in names}
    for name, values in made.items():
        put(root / name, values)
    return made


def taken(data):
    """The images and labels of a data set by file name, as (bytes of the floats, class name)."""
    x, cond = data.take(range(len(data)))
    labels = [None] * len(data) if cond is None else [data.classes[label] for label in cond.label.tolist()]
    root = str(data._store.path) + "/"
    return {data.name(row).removeprefix(root): (x[row], labels[row]) for row in range(len(data))}


def both(root, **options):
    """Train and test together, by file name; they share no file."""
    train, test = (taken(folder(split, data=root, **options)) for split in ("train", "test"))
    assert not set(train) & set(test)
    return train | test


def zipped(root, file, prefix=""):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                out.write(path, prefix + path.relative_to(root).as_posix())
    return file


# ---- layouts ---------------------------------------------------------------------------------------------------


def test_class_folders_give_labels_and_exact_pixels(tmp_path):
    names = [f"{kind}/{i}.png" for kind in ("dog", "Cat", "10", "9") for i in range(5)]
    made = fill(tmp_path, names, 6, 4, 3)
    (tmp_path / "readme.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.png").write_bytes(b"junk")
    put(tmp_path / "dog" / "deep" / "er.png", noise(6, 4, 3))
    data = folder("train", data=tmp_path)
    assert isinstance(data, Data)
    assert (data.shape, data.levels, data.classes) == ((3, 6, 4), 256, ("9", "10", "Cat", "dog"))
    found = both(tmp_path)
    assert found.pop("dog/deep/er.png")[1] == "dog"
    assert set(found) == set(made)
    rows = [4, 0, 9, 4]
    picked = data.take(rows)[1].label.tolist()
    assert [data.classes[label] for label in picked] == [
        data.name(row).removeprefix(f"{tmp_path}/").split("/")[0] for row in rows
    ]
    for name, (x, label) in found.items():
        assert label == name.split("/")[0]
        expected = torch.from_numpy(made[name].transpose(2, 0, 1) / 127.5 - 1).float()
        torch.testing.assert_close(x, expected, rtol=0, atol=1.2e-7)


def test_images_without_folders_have_no_labels(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(9)], 4, 4)
    data = folder("train", data=tmp_path)
    assert (data.shape, data.classes, data.texts) == ((1, 4, 4), (), None)
    assert data.take([0])[1] is None
    assert [data.name(row).rsplit("/")[-1] for row in range(len(data))] == sorted(
        (data.name(row).rsplit("/")[-1] for row in range(len(data))), key=lambda name: int(name[:-4])
    )


@pytest.mark.parametrize("held", ["test", "validation", "val"])
def test_train_and_test_folders_are_the_splits(tmp_path, held):
    fill(tmp_path, [f"train/{kind}/{i}.png" for kind in "ab" for i in range(3)] + [f"{held}/a/x.png"], 4, 4)
    train, test = (folder(split, data=tmp_path) for split in ("train", "test"))
    assert set(taken(train)) == {f"train/{kind}/{i}.png" for kind in "ab" for i in range(3)}
    assert list(taken(test)) == [f"{held}/a/x.png"]
    assert train.classes == test.classes == ("a", "b")
    with pytest.raises(BadArgument, match="has test images of its own; leave it out"):
        folder("train", data=tmp_path, holdout=0.5)


def test_validation_images_do_not_count_beside_test_images(tmp_path):
    fill(tmp_path, [f"{part}/{i}.png" for part in ("train", "val", "test") for i in range(2)], 4, 4)
    assert list(taken(folder("test", data=tmp_path))) == ["test/0.png", "test/1.png"]
    assert list(taken(folder("train", data=tmp_path))) == ["train/0.png", "train/1.png"]


def test_split_names_beside_other_folders_are_classes(tmp_path):
    fill(tmp_path, [f"{kind}/{i}.png" for kind in ("train", "plane", "ship") for i in range(2)], 4, 4)
    assert folder("train", data=tmp_path).classes == ("plane", "ship", "train")


def test_a_lone_folder_is_entered(tmp_path):
    fill(tmp_path, [f"photos/all/{kind}/{i}.png" for kind in "ab" for i in range(2)], 4, 4)
    (tmp_path / "LICENSE").write_text("")
    assert folder("train", data=tmp_path).classes == ("a", "b")
    assert folder("train", data=tmp_path / "photos" / "all" / "a").classes == ()
    fill(tmp_path / "two", [f"{part}/images/{i}.png" for part in ("train", "test") for i in range(2)], 4, 4)
    assert folder("train", data=tmp_path / "two").classes == ()


@pytest.mark.parametrize("form", ["jsonl", "csv", "labels"])
def test_tables_give_labels_and_captions(tmp_path, form):
    made = fill(tmp_path, [f"{i}.png" for i in range(12)], 4, 4)
    rows = [{"file_name": name, "label": f"kind {i % 3}", "text": f'a "{i}", éé'} for i, name in enumerate(made)]
    if form == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif form == "csv":
        lines = [f'{row["file_name"]},"{row["text"].replace(chr(34), chr(34) * 2)}",{row["label"]},1' for row in rows]
        (tmp_path / "metadata.csv").write_text("\ufefffile_name,text,label,width\r\n" + "\r\n".join(lines))
    else:
        (tmp_path / "labels.csv").write_text(
            "Filename,Class\n" + "\n".join(f"./{r['file_name']},{r['label']}" for r in rows)
        )
    put(tmp_path / "stray.png", noise(9, 9))  # not in the table: it does not count
    found = both(tmp_path)
    assert {name: label for name, (_, label) in found.items()} == {row["file_name"]: row["label"] for row in rows}
    data = folder("train", data=tmp_path)
    assert data.classes == ("kind 0", "kind 1", "kind 2")
    if form != "labels":
        captions = {row["file_name"]: row["text"] for row in rows}
        assert data.texts == tuple(captions[data.name(row).rsplit("/")[-1]] for row in range(len(data)))
        assert data.take([0])[1].present == ("label",)


def test_numbers_as_labels_and_tables_beside_their_files(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        fill(tmp_path / part, [f"{i}.png" for i in range(count)], 4, 4)
        rows = [json.dumps({"file_name": f"{i}.png", "label": 11 - i}) for i in range(count)]
        (tmp_path / part / "metadata.jsonl").write_text("\n".join(rows))
    train, test = (folder(split, data=tmp_path) for split in ("train", "test"))
    assert train.classes == test.classes == ("9", "10", "11")
    assert train.take(range(3))[1].label.tolist() == [2, 1, 0]
    assert test.take(range(2))[1].label.tolist() == [2, 1]


def test_a_table_without_labels_or_captions_leaves_the_class_folders(tmp_path):
    made = fill(tmp_path, [f"images/{kind}/{i}.png" for kind in "ab" for i in range(2)], 4, 4)
    (tmp_path / "metadata.csv").write_text("file_name,license\n" + "\n".join(f"{name},CC0" for name in made))
    assert folder("train", data=tmp_path).classes == ("a", "b")


TABLES = {
    'metadata.jsonl:{"file_name": "../a.png", "label": "x"}': "line 1: got '../a.png', leads outside by ..",
    'metadata.jsonl:{"file_name": "/etc/a.png", "label": "x"}': "line 1: got '/etc/a.png', not a relative path",
    'metadata.jsonl:{"file_name": "C:\\\\a.png", "label": "x"}': "not a relative path",
    'metadata.jsonl:{"file_name": "gone.png", "label": "x"}': "metadata.jsonl line 1: no image gone.png",
    'metadata.jsonl:{"file_name": "a.png", "label": [1]}': r"got the label [1], need a string or a whole number",
    'metadata.jsonl:{"file_name": "a.png", "label": true}': "got the label True",
    'metadata.jsonl:{"file_name": "a.png", "label": 0.5}': "got the label 0.5",
    'metadata.jsonl:{"file_name": "a.png", "text": 3}': "got the text 3, need a string",
    'metadata.jsonl:{"label": "x"}': "metadata.jsonl line 1: no file name; need a column file_name",
    'metadata.jsonl:["a.png"]': "line 1: got list, need an object",
    "metadata.jsonl:{a}": "metadata.jsonl line 1: not JSON",
    "metadata.jsonl:" + "[" * 100_000: "metadata.jsonl line 1: not JSON",
    'metadata.jsonl:{"file": "a.png", "label": "x"}\n{"file": "./a.png", "label": "y"}': "line 2: a.png is named twice",
    'metadata.jsonl:{"file": "a.png", "label": "x"}\n{"file": "b.png"}': "line 2: no label, though 1 other images",
    "metadata.csv:file_name,label\na.png,x,z": "metadata.csv line 2: not as many cells as the header has columns",
    "metadata.csv:file_name,label\na.png": "metadata.csv line 2: not as many cells",
    'metadata.csv:file_name,label\n"a.png,x': "not CSV",
    "metadata.csv:name,label\na.png,x": "metadata.csv line 2: no file name",
    "labels.csv:file,label\n\xff": "labels.csv: not UTF-8",
}


@pytest.mark.parametrize("table", TABLES, ids=range(len(TABLES)))
def test_bad_tables_are_one_line_with_the_line(tmp_path, table):
    fill(tmp_path, ["a.png", "b.png"], 4, 4)
    put(tmp_path.parent / "a.png", noise(4, 4))
    name, _, content = table.partition(":")
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(BadData) as error:
        folder("train", data=tmp_path)
    assert TABLES[table] in str(error.value)
    assert "\n" not in str(error.value)


def test_two_tables_in_one_folder_are_refused(tmp_path):
    fill(tmp_path, ["a.png"], 4, 4)
    for name in ("metadata.csv", "labels.csv"):
        (tmp_path / name).write_text("file_name,label\na.png,x")
    with pytest.raises(BadData, match="several of metadata.jsonl, metadata.csv, labels.csv in one folder; keep one"):
        folder("train", data=tmp_path)


# ---- zips and links --------------------------------------------------------------------------------------------


def test_a_zip_reads_as_its_folder(tmp_path):
    made = fill(tmp_path / "set", [f"{kind}/{i}.png" for kind in "ab" for i in range(4)], 4, 4)
    file = zipped(tmp_path / "set", tmp_path / "set.zip", prefix="top/")
    from_folder, from_zip = (both(place) for place in (tmp_path / "set", file))
    assert {f"top/{name}" for name in from_folder} == set(from_zip)
    for name in made:
        assert torch.equal(from_folder[name][0], from_zip[f"top/{name}"][0])
    for split in ("train", "test"):  # the same images are held out, whatever the wrapping
        assert folder(split, data=file).fingerprint == folder(split, data=tmp_path / "set").fingerprint


def test_a_data_set_can_be_handed_to_another_process(tmp_path):
    fill(tmp_path / "set", [f"{i}.png" for i in range(4)], 4, 4)
    data = folder("train", data=zipped(tmp_path / "set", tmp_path / "set.zip"), cache=False)
    x = data.take([0, 1])[0]
    assert torch.equal(pickle.loads(pickle.dumps(data)).take([0, 1])[0], x)


def member(name, content=b"x", **attributes):
    info = zipfile.ZipInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content


@pytest.mark.parametrize(
    ("info", "content", "reason"),
    [
        (*member("../evil.png"), "leads outside by .."),
        (*member("/evil.png"), "not a relative path"),
        (*member("a\\evil.png"), "not a relative path"),
        (*member("link.png", b"/etc/passwd", external_attr=(stat.S_IFLNK | 0o777) << 16), "a link inside a zip"),
        (*member("odd.png", compress_type=zipfile.ZIP_BZIP2), "packed in a way other than stored or deflated"),
    ],
)
def test_unsafe_members_of_a_zip_are_refused(tmp_path, info, content, reason):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        for i in range(3):
            image = io.BytesIO()
            Image.fromarray(noise(4, 4)).save(image, "PNG")
            out.writestr(f"{i}.png", image.getvalue())
        out.writestr(info, content)
    with pytest.raises(BadData, match=r"1 of 4 images cannot be read: .*" + reason.replace("..", r"\.\.")):
        folder("train", data=tmp_path / "x.zip")


def test_a_member_that_unpacks_to_too_much_or_is_damaged_is_refused(tmp_path, monkeypatch):
    fill(tmp_path / "set", [f"{i}.png" for i in range(3)], 4, 4)
    (tmp_path / "set" / "bomb.png").write_bytes(bytes(5_000_000))
    file = zipped(tmp_path / "set", tmp_path / "x.zip")
    monkeypatch.setattr("inkdrop.data.store.FILE_LIMIT", 1 << 20)
    for place in (file, tmp_path / "set"):
        with pytest.raises(BadData, match=r"1 of 4 images cannot be read: bomb.png \(larger than 1 MiB\)"):
            folder("train", data=place)
    (tmp_path / "set" / "bomb.png").unlink()
    whole = bytearray(zipped(tmp_path / "set", file).read_bytes())
    whole[60] ^= 255
    file.write_bytes(whole)
    with pytest.raises(BadData, match=r"1 of 3 images cannot be read: 0.png \(damaged in the zip\)"):
        folder("train", data=file)
    file.write_bytes(whole[:100])
    with pytest.raises(BadData, match="cannot be read as a folder or a zip"):
        folder("train", data=file)


def test_links_are_followed_inside_and_refused_outside(tmp_path):
    root = tmp_path / "set"
    made = fill(root, [f"a/{i}.png" for i in range(3)] + ["b/0.png"], 4, 4)
    put(tmp_path / "secret.png", noise(4, 4))
    (root / "b" / "twin.png").symlink_to(root / "a" / "0.png")
    (tmp_path / "way").symlink_to(root)
    found = both(tmp_path / "way")
    assert set(found) == {*made, "b/twin.png"}
    assert torch.equal(found["b/twin.png"][0], found["a/0.png"][0])
    for target, reason in (
        ("../../secret.png", "leads outside the folder"),
        ("nowhere", "leads nowhere"),
        ("../a", "to a folder"),
    ):
        link = root / "b" / "link.png"
        link.symlink_to(target)
        with pytest.raises(BadData, match=rf"1 of 6 images cannot be read: b/link.png \(a link (that )?{reason}"):
            folder("train", data=root)
        link.unlink()


def test_pipes_are_not_waited_for(tmp_path):
    fill(tmp_path, ["0.png", "1.png"], 4, 4)
    os.mkfifo(tmp_path / "pipe.png")
    assert set(both(tmp_path)) == {"0.png", "1.png"}


# ---- splits ----------------------------------------------------------------------------------------------------


def test_the_held_out_share_is_fixed_by_names_alone(tmp_path):
    names = [f"{i}.png" for i in range(300)]
    fill(tmp_path, names, 2, 2)
    test = set(taken(folder("test", data=tmp_path, holdout=0.2)))
    train = set(taken(folder("train", data=tmp_path, holdout=0.2)))
    assert test | train == set(names)
    assert not test & train
    assert abs(len(test) - 60) < 4 * (300 * 0.2 * 0.8) ** 0.5  # four standard errors of a fair draw
    assert set(taken(folder("test", data=tmp_path))) < test, "a smaller share is part of a larger one"
    fill(tmp_path, [f"more {i}.png" for i in range(50)], 2, 2)
    assert set(taken(folder("test", data=tmp_path, holdout=0.2))) & set(names) == test
    shutil.copytree(tmp_path, tmp_path.parent / "elsewhere", dirs_exist_ok=True)
    assert set(taken(folder("test", data=tmp_path.parent / "elsewhere", holdout=0.2))) & set(names) == test


def test_small_folders_hold_one_out_and_keep_one(tmp_path):
    fill(tmp_path, ["a.png"], 2, 2)
    assert len(folder("train", data=tmp_path)) == 1
    with pytest.raises(BadData, match="no images for the test split: there are 1 images and holdout=0.05"):
        folder("test", data=tmp_path)
    fill(tmp_path, ["b.png"], 2, 2)
    for share in (0.001, 0.999):
        assert [len(folder(split, data=tmp_path, holdout=share)) for split in ("train", "test")] == [1, 1]
    assert len(folder("train", data=tmp_path, holdout=0)) == 2
    with pytest.raises(BadData, match="no images for the test split"):
        folder("test", data=tmp_path, holdout=0)
    with pytest.raises(BadArgument, match=r"data holdout: got 1, need a share in \[0, 1\)"):
        folder("test", data=tmp_path, holdout=1)


# ---- what is inferred ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "bands"),
    [
        ([(2, 2), (2, 2)], 1),
        ([(2, 2), (2, 2, 3)], 3),
        ([(2, 2, 4)] * 2, 4),
        ([(2, 2, 4), (2, 2, 3)], 3),
        ([(2, 2, 4), (2, 2)], 3),
    ],
)
def test_channels_are_inferred_from_all_images(tmp_path, shapes, bands):
    for i, shape in enumerate(shapes):
        put(tmp_path / f"{i}.png", noise(*shape))
    assert {folder(split, data=tmp_path).shape for split in ("train", "test")} == {(bands, 2, 2)}


def test_alpha_and_channels_as_asked(tmp_path):
    for i in range(3):
        put(tmp_path / f"{i}.png", np.array([[[200, 100, 0, 51]]], np.uint8))
    exact = {"white": [0.2 * v + 0.8 * 255 for v in (200, 100, 0)], "black": [0.2 * v for v in (200, 100, 0)]}
    for background, expected in exact.items():
        x = folder("train", data=tmp_path, channels="rgb", background=background).take([0])[0]
        torch.testing.assert_close((x.ravel() + 1) * 127.5, torch.tensor(expected), rtol=0, atol=0.5)
    kept = folder("train", data=tmp_path).take([0])[0]
    torch.testing.assert_close((kept.ravel() + 1) * 127.5, torch.tensor([200.0, 100, 0, 51]), rtol=0, atol=2e-5)
    assert folder("train", data=tmp_path, channels="grey").shape == (1, 1, 1)
    with pytest.raises(BadArgument, match="background: got 'black', but no alpha is laid over it"):
        folder("train", data=tmp_path, background="black")


def test_sixteen_bits_stay_sixteen_and_mix_with_eight(tmp_path):
    put(tmp_path / "0.png", np.array([[0, 1000, 65535]], np.uint16))
    deep = folder("train", data=tmp_path)
    torch.testing.assert_close(
        deep.take([0])[0].ravel(), torch.tensor([-1, 1000 / 32767.5 - 1, 1]), rtol=0, atol=1.2e-7
    )
    assert deep.levels == 65536
    put(tmp_path / "1.png", np.array([[0, 100, 255]], np.uint8))
    found = both(tmp_path)
    torch.testing.assert_close(found["1.png"][0].ravel(), torch.tensor([-1, 100 / 127.5 - 1, 1]), rtol=0, atol=1.2e-7)
    torch.testing.assert_close(found["0.png"][0].ravel(), deep.take([0])[0].ravel(), rtol=0, atol=0)


def test_arrays_of_five_channels(tmp_path):
    made = {f"{i}.npy": RNG.uniform(-1, 1, (3, 4, 5)).astype(np.float32) for i in range(4)}
    for name, values in made.items():
        put(tmp_path / name, values)
    data = folder("train", data=tmp_path)
    assert (data.shape, data.levels) == ((5, 3, 4), None)
    for name, (x, _) in both(tmp_path).items():
        assert np.array_equal(x.numpy(), made[name].transpose(2, 0, 1))
    with pytest.raises(BadArgument, match="npy files are never converted"):
        folder("train", data=tmp_path, channels="rgb")
    put(tmp_path / "9.npy", np.zeros((3, 4, 6), np.float32))
    with pytest.raises(BadData, match=r"several channel counts \(5 channels: 4, 6 channels: 1\)"):
        folder("train", data=tmp_path)
    (tmp_path / "9.npy").unlink()
    put(tmp_path / "9.png", noise(3, 4))
    with pytest.raises(BadData, match=r"4 \.npy files beside 1 pictures"):
        folder("train", data=tmp_path)


def test_mixed_sizes_are_refused_with_the_option_that_helps(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(5)], 32, 32)
    fill(tmp_path, ["wide.png"], 20, 40)
    for split in ("train", "test"):
        with pytest.raises(BadData) as error:
            folder(split, data=tmp_path)
        assert str(error.value) == (
            f"{tmp_path}: images of several sizes (height×width 32×32: 5, 20×40: 1; one is wide.png); "
            "try --set data.resize=crop --set data.size=16, or resize=stretch"
        )
    with pytest.raises(BadData, match=r"images that are not 32×32 .* --set data.size=32"):
        folder("train", data=tmp_path, size=32)
    for size, how, shape in ((16, "crop", (1, 16, 16)), ((12, 8), "stretch", (1, 12, 8))):
        assert folder("train", data=tmp_path, size=size, resize=how).shape == shape
    (tmp_path / "wide.png").unlink()
    assert folder("train", data=tmp_path, size=32).shape == (1, 32, 32)


def test_options_are_checked(tmp_path):
    fill(tmp_path, ["0.png", "1.png"], 4, 4)
    for options, message in (
        ({"resize": "crop"}, "data resize: got 'crop' without a size"),
        ({"resize": "fit", "size": 4}, "data resize: got 'fit', need one of none, crop, stretch"),
        ({"channels": "bgr"}, "data channels: got 'bgr'"),
        ({"size": 0}, "data size: got 0, need one number"),
        ({"size": (4, 4, 4)}, "data size: got"),
    ):
        with pytest.raises(BadArgument, match=message):
            folder("train", data=tmp_path, **options)
    with pytest.raises(BadArgument, match="data split"):
        folder("all", data=tmp_path)
    with pytest.raises(BadArgument, match="row: got 9, need 0 to 0"):
        folder("train", data=tmp_path).take([9])


# ---- what is refused -------------------------------------------------------------------------------------------


def test_nothing_to_read_is_one_line(tmp_path):
    for place, message in (
        (tmp_path, "no images, found nothing; read are PNG"),
        (tmp_path / "gone", "no such folder or zip"),
    ):
        with pytest.raises(BadData, match=message):
            folder("train", data=place)
    (tmp_path / "a.tif").write_bytes(b"II*")
    with pytest.raises(BadData, match=r"no images, found 1 other files \(\.tif\)"):
        folder("train", data=tmp_path)
    with pytest.raises(BadData, match="cannot be read as a folder or a zip"):
        folder("train", data=tmp_path / "a.tif")


def test_unreadable_files_are_named_before_training_starts(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(20)], 4, 4)
    cut = tmp_path / "3.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    mine = [split for split in ("train", "test") if str(cut) in map(str, _names(tmp_path, split))]
    with pytest.raises(BadData, match=r"1 of 20 images cannot be read: 3.png \(cannot be decoded"):
        folder(mine[0], data=tmp_path)
    (tmp_path / "5.png").write_bytes(b"<html>")
    (tmp_path / "x.npy").write_bytes(b"")
    for split in ("train", "test"):
        with pytest.raises(BadData) as error:
            folder(split, data=tmp_path)
        assert "5.png (not a PNG, JPEG, WebP, BMP or GIF image" in str(error.value)
        assert "x.npy (not a .npy file" in str(error.value)
        assert str(error.value).endswith(f"all are listed by: inkdrop data check {tmp_path}")
        assert "\n" not in str(error.value)


def _names(root, split):
    """The files of a split; not decoded, so damaged ones are among them."""
    data = folder(split, data=root, cache=False)
    return [data.name(row) for row in range(len(data))]


def test_images_beside_class_folders_are_refused(tmp_path):
    fill(tmp_path, ["a/0.png", "b/0.png", "stray.png"], 4, 4)
    with pytest.raises(BadData, match=r"both beside and inside class folders: stray.png and a/0.png"):
        folder("train", data=tmp_path)


def test_a_file_that_changes_later_is_named(tmp_path):
    fill(tmp_path, ["0.png", "1.png"], 4, 4)
    data = folder("train", data=tmp_path, cache=False)
    file = tmp_path / data.name(0).rsplit("/")[-1]
    put(file, noise(5, 4))
    with pytest.raises(BadData, match=rf"^{file}: got shape \(5, 4, 1\), need \(4, 4, 1\)"):
        data.take([0])
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(BadData, match=rf"^{file}: "):
        data.take([0])
    file.unlink()
    with pytest.raises(BadData, match=rf"^{file}: No such file"):
        data.take([0])


# ---- memory and identity ---------------------------------------------------------------------------------------


def test_pixels_are_the_same_with_and_without_the_cache(tmp_path, monkeypatch):
    fill(tmp_path, [f"{i}.png" for i in range(6)], 9, 7, 4)
    fill(tmp_path, ["g.png"], 12, 12)
    options = {"data": tmp_path, "size": (5, 6), "resize": "crop", "background": "black"}
    held = folder("train", **options)
    loose = folder("train", **options, cache=False)
    monkeypatch.setattr("inkdrop.data.folder._ROOM", 600)
    full = folder("train", **options)  # the room is used up on the way
    rows = [3, 0, 3, 1]
    for other in (loose, full):
        assert torch.equal(other.take(rows)[0], held.take(rows)[0])
        assert other.fingerprint == held.fingerprint
    for file in tmp_path.iterdir():
        file.unlink()
    held.take(rows)  # needs no file any more
    for other in (loose, full):
        with pytest.raises(BadData):
            other.take(rows)


def test_the_fingerprint_changes_with_pixels_labels_and_options(tmp_path):
    fill(tmp_path, [f"{kind}/{i}.png" for kind in "ab" for i in range(6)], 8, 8)
    options = {"data": tmp_path, "size": 4, "resize": "crop"}
    prints = Counter([folder("train", **options).fingerprint])
    assert folder("train", **options).fingerprint in prints
    assert folder("train", **options, cache=False).fingerprint in prints
    prints[folder("test", **options).fingerprint] += 1
    prints[folder("train", data=tmp_path).fingerprint] += 1
    prints[folder("train", **options | {"size": 3}).fingerprint] += 1
    prints[folder("train", **options | {"resize": "stretch"}).fingerprint] += 1
    prints[folder("train", **options, channels="rgb").fingerprint] += 1
    prints[folder("train", **options, holdout=0.9).fingerprint] += 1
    first = folder("train", **options).name(0)
    pixels = np.array(Image.open(first))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(first)
    prints[folder("train", **options).fingerprint] += 1
    (tmp_path / "b").rename(tmp_path / "c")
    prints[folder("train", **options).fingerprint] += 1
    assert max(prints.values()) == 1
    assert len(prints) == 9


def test_the_fingerprint_changes_with_labels_and_captions_of_a_table(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(4)], 4, 4)
    prints = set()
    for labels, text in (("aabb", "x"), ("abab", "x"), ("aabb", "y")):
        rows = [f"{i}.png,{label},{text}" for i, label in enumerate(labels)]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label,text", *rows]))
        prints.add(folder("train", data=tmp_path).fingerprint)
    assert len(prints) == 3


def test_real_folders_and_zips(shared):
    emoji, photos, cifar = shared / "noto-emoji", shared / "photos256", shared / "cifar10" / "cifar10-5k.zip"
    if not all(place.exists() for place in (emoji, photos, cifar)):
        pytest.skip("no noto-emoji/, photos256/ or cifar10/ in the shared data")
    data = folder("test", data=emoji)
    assert (data.shape, data.classes) == ((3, 64, 64), ())
    captions = dict(zip((data.name(row) for row in range(len(data))), data.texts, strict=True))
    lines = (json.loads(line) for line in (emoji / "images" / "metadata.jsonl").read_text().splitlines())
    stated = {str(emoji / "images" / line["file_name"]): line["text"] for line in lines}
    assert len(captions) > 60
    assert all(stated[file] == text for file, text in captions.items())
    assert folder("test", data=photos, size=64, resize="crop").shape == (3, 64, 64)
    assert folder("test", data=cifar).classes[:2] == ("airplane", "automobile")
