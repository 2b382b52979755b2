"""Arrays, and the embedded digits."""

from __future__ import annotations

import hashlib
import io
from importlib.resources import files

import numpy as np
import pytest
import torch

from inkdrop.core.dataset import Data
from inkdrop.data.arrays import Arrays
from inkdrop.data.digits import digits
from inkdrop.errors import BadArgument, BadData, BadShape


def arrays(values, labels=None, **kw):
    return Arrays(values, labels, title="toy train", source="made here", **kw)


def test_uint8_is_spread_over_minus_one_to_one_exactly():
    x, cond = arrays(torch.tensor([[0], [51], [255]], dtype=torch.uint8)).take([2, 0, 1])
    assert cond is None
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[:, 0], torch.tensor([1.0, -1.0, -0.6]), rtol=0, atol=6e-8)  # half an ulp of 1
    x, _ = arrays(torch.arange(17, dtype=torch.uint8)[:, None], levels=17).take(range(17))
    assert x[:, 0].tolist() == [v / 8 - 1 for v in range(17)]  # eighths are exact


def test_floats_stand_for_themselves_and_rows_keep_their_labels():
    values = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    data = arrays(values, torch.tensor([2, 0, 1, 0]), classes=["a", "b", "c"])
    x, cond = data.take([3, 1])
    torch.testing.assert_close(x, values[[3, 1]].float(), rtol=0, atol=0)
    assert cond.label.tolist() == [0, 0]
    assert data.take([2])[1].label.tolist() == [1]
    assert isinstance(data, Data)
    assert (data.shape, data.levels, len(data), data.name(2)) == ((3,), None, 4, "toy train[2]")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([[0.0], [1.5]]), r"toy train\[1\]: got values in \[1.5, 1.5\], need \[-1, 1\]; 1 of 2 rows"),
        (torch.tensor([[0.0], [float("nan")]]), r"toy train\[1\]: got values in \[nan"),
        (torch.tensor([[float("-inf")], [0.0]]), r"toy train\[0\]: got values in \[-inf"),
    ],
)
def test_floats_out_of_range_name_the_row(values, message):
    with pytest.raises(BadData, match=message):
        arrays(values)


def test_integers_above_their_levels_name_the_row():
    with pytest.raises(BadData, match=r"toy train\[1\]: got values in \[17, 17\], need 0 to 16"):
        arrays(torch.tensor([[16], [17]], dtype=torch.uint8), levels=17)


def test_labels_are_checked():
    x = torch.zeros(2, 1)
    with pytest.raises(BadData, match=r"toy train\[1\]: got label 2, need 0 to 1"):
        arrays(x, torch.tensor([0, 2]), classes=["a", "b"])
    with pytest.raises(BadArgument, match="labels without class names"):
        arrays(x, torch.tensor([0, 1]))
    with pytest.raises(BadArgument, match="class names without labels"):
        arrays(x, classes=["a"])
    with pytest.raises(BadArgument, match="a name twice in a, a"):
        arrays(x, torch.tensor([0, 1]), classes=["a", "a"])
    with pytest.raises(BadShape, match=r"need integers of shape \(2,\)"):
        arrays(x, torch.tensor([0.0, 1.0]), classes=["a", "b"])
    with pytest.raises(BadShape, match=r"need \(N, C, \*S\)"):
        arrays(torch.zeros(0, 1))
    with pytest.raises(BadShape, match="need uint8 or a floating point type"):
        arrays(torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_outside_are_refused(row):
    with pytest.raises(BadArgument, match=f"toy train row: got {row}, need 0 to 1"):
        arrays(torch.zeros(2, 1)).take([0, row])


def test_the_fingerprint_is_of_content_labels_names_and_preprocessing():
    base = {"values": torch.zeros(2, 1), "labels": torch.tensor([0, 1]), "classes": ["a", "b"]}
    changed = [
        {"values": torch.tensor([[0.0], [1e-7]])},
        {"values": torch.zeros(2, 1, 1)},
        {"values": torch.zeros(2, 1, dtype=torch.float64)},
        {"labels": torch.tensor([1, 0])},
        {"classes": ["a", "c"]},
        {"preprocessing": "mirrored"},
        {"levels": 3},
    ]
    prints = [arrays(**base | change).fingerprint for change in [{}, *changed]]
    assert len(set(prints)) == len(prints)
    assert arrays(**base).fingerprint == prints[0]
    assert len(bytes.fromhex(prints[0])) == 32


def test_the_embedded_digits_are_those_of_scikit_learn():
    """The hashes are of sklearn.datasets.load_digits() of scikit-learn 1.9.1, images and target as uint8."""
    with np.load(io.BytesIO((files("inkdrop.data") / "digits.npz").read_bytes()), allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    assert (images.shape, images.dtype, labels.dtype) == ((1797, 8, 8), np.uint8, np.uint8)
    assert (
        hashlib.sha256(images.tobytes()).hexdigest()
        == "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
    )
    assert (
        hashlib.sha256(labels.tobytes()).hexdigest()
        == "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0"
    )
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

    parts = [digits(split) for split in ("train", "test")]
    taken = [part.take(range(len(part))) for part in parts]
    train, test = ([np.rint((row.numpy() + 1) * 8).astype(np.uint8).tobytes() for row in x] for x, _ in taken)
    assert (len(train), len(test)) == (1437, 360)
    assert not set(train) & set(test)
    by_image = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    assert len(by_image) == 1797  # no image twice, so the two lines above and below prove a partition
    assert set(train) | set(test) == set(by_image)
    for rows, (_, cond) in zip((train, test), taken, strict=True):
        assert [by_image[row] for row in rows] == cond.label.tolist()


def test_the_split_of_the_digits_is_stratified_and_fixed():
    counts = torch.bincount(digits("test").take(range(360))[1].label)
    share = torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180]) * 360 / 1797
    assert ((counts - share).abs() <= 1).all()
    prints = {split: digits(split).fingerprint for split in ("train", "test")}
    assert prints["train"].startswith("2bb7e853"), "the split changed: every published figure on digits goes with it"
    assert prints["test"].startswith("cada584d")
    with pytest.raises(BadArgument, match="data split: got 'val', need one of train, test"):
        digits("val")


def test_the_digits_say_where_they_come_from():
    source = digits("test").source
    licence = (files("inkdrop.data") / "DIGITS_LICENSE.txt").read_text(encoding="utf-8")
    for part in ("E. Alpaydin, C. Kaynak", "1998", "CC BY 4.0", "10.24432/C50P49"):
        assert part in source
        assert part in licence
