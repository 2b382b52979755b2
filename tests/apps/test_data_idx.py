"""IDX files, their damage, and the download of MNIST and kin."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import struct
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from inkdrop.data import idx as room
from inkdrop.data.fetch import fetch
from inkdrop.data.idx import fashion_mnist, idx, kmnist, mnist, read_idx
from inkdrop.data.survey import survey
from inkdrop.errors import BadArgument, BadData


def packed(values):
    """An IDX file by the letter of its description."""
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.astype(np.uint8).tobytes()


IMAGES = np.arange(5 * 4 * 3).reshape(5, 4, 3) * 4
LABELS = np.array([3, 0, 1, 1, 2])


@pytest.fixture
def place(tmp_path):
    """A folder of IDX files: the training images gzipped, the rest not; the test split has fewer classes."""
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(packed(IMAGES)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(packed(LABELS))
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(packed(IMAGES[:2]))
    (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(packed(np.array([1, 0])))
    return tmp_path


def test_pixels_and_labels_are_those_of_the_files(place):
    data = idx("train", data=place)
    x, cond = data.take([4, 0])
    expected = torch.from_numpy(IMAGES[[4, 0]] / 127.5 - 1).float()[:, None]
    torch.testing.assert_close(x, expected, rtol=0, atol=1.2e-7)  # one ulp of 1
    assert cond.label.tolist() == [2, 3]
    assert (data.shape, data.classes, data.levels, len(data)) == ((1, 4, 3), ("0", "1", "2", "3"), 256, 5)
    test = idx("test", data=place)
    assert (test.classes, len(test), test.take([0])[1].label.tolist()) == (("0", "1", "2", "3"), 2, [1])
    assert idx("test", data=place, classes=("a", "b")).classes == ("a", "b")
    with pytest.raises(BadData, match=r"idx train\[0\]: got label 3, need 0 to 1"):
        idx("train", data=place, classes=("a", "b"))


def test_mnist_has_the_counts_that_its_authors_state(shared):
    folder = shared / "mnist"
    if not folder.is_dir():
        pytest.skip("no mnist/ in the shared data")
    for split, counts in (
        ("train", [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        ("test", [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
    ):
        data = mnist(split, data=folder)
        assert data.shape == (1, 28, 28)
        assert torch.bincount(data.take(range(len(data)))[1].label).tolist() == counts
    # the published MD5 of the uncompressed test images: their pixels are untouched
    raw = packed(read_idx(folder / "t10k-images-idx3-ubyte.gz"))
    assert hashlib.md5(raw, usedforsecurity=False).hexdigest() == "2646ac647ad5339dbf082846283269ea"
    x = data.take([0])[0]
    assert (x.min(), x.max()) == (-1, 1)
    assert x.mean() < -0.7  # ink is white on black


@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6)), st.booleans())
def test_every_array_survives_the_round_trip(tmp_path_factory, values, zipped):
    file = tmp_path_factory.mktemp("idx") / "x"
    file.write_bytes(gzip.compress(packed(values)) if zipped else packed(values))
    assert np.array_equal(read_idx(file), values)


@given(st.data())
def test_damage_is_found_or_harmless(tmp_path_factory, data):
    """A cut anywhere is refused; a changed byte of the gzip is refused or does not change the values."""
    file = tmp_path_factory.mktemp("idx") / "x"
    whole = gzip.compress(packed(IMAGES)) if data.draw(st.booleans(), "zipped") else packed(IMAGES)
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1), "cut")])
    with pytest.raises(BadData, match=str(file)):
        read_idx(file)
    whole = bytearray(gzip.compress(packed(IMAGES)))
    whole[data.draw(st.integers(0, len(whole) - 1), "place")] ^= data.draw(st.integers(1, 255), "flip")
    file.write_bytes(whole)
    with contextlib.suppress(BadData):
        assert np.array_equal(read_idx(file), IMAGES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing, which is not IDX"),
        (b"\x89PNG1234", "starts with 89504e47, which is not IDX"),
        (b"\0\0\x0d\x03" + bytes(12), "IDX of type 0x0d, need unsigned bytes"),
        (b"\0\0\x08\x04" + bytes(16), "starts with 00000804"),
        (b"\0\0\x08\x03\0\0\0\1", "ends inside its header"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "need at most 4,294,967,296"),
        (packed(IMAGES) + b"\0", "declares (5, 4, 3), 60 bytes, but holds more than 60"),
        (packed(IMAGES)[:-1], "declares (5, 4, 3), 60 bytes, but holds 59"),
    ],
)
def test_bad_files_are_one_line_with_the_file(tmp_path, content, message):
    for zipped in (False, True):
        file = tmp_path / "images"
        file.write_bytes(gzip.compress(content) if zipped else content)
        with pytest.raises(BadData) as error:
            read_idx(file)
        assert str(error.value).startswith(f"{file}: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_header_is_not_believed(tmp_path):
    """Sixteen bytes that declare 4 GB do not make the reader reserve them, and a gzip bomb is not unpacked."""
    file = tmp_path / "images"
    bomb = b"\0\0\x08\x03" + struct.pack(">3I", 1, 10, 10) + bytes(50_000_000)
    for content in (b"\0\0\x08\x03" + struct.pack(">3I", 4, 32768, 32767), gzip.compress(bomb, 1)):
        file.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(BadData, match="but holds"):
            read_idx(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4_000_000


def test_what_does_not_fit_together_is_refused(place):
    (place / "t10k-labels.idx1-ubyte").write_bytes(packed(np.array([1, 0, 0])))
    with pytest.raises(
        BadData, match=r"images of shape \(2, 4, 3\) and labels of shape \(3,\), need \(N, H, W\) and \(N,\)"
    ):
        idx("test", data=place)
    (place / "t10k-labels.idx1-ubyte").unlink()
    with pytest.raises(BadData, match=r"no file t10k-labels-idx1-ubyte\[.gz\]"):
        idx("test", data=place)
    (place / "emnist-train-labels-idx1-ubyte").write_bytes(packed(LABELS))
    with pytest.raises(BadData, match="could both be meant; keep one set a folder"):
        idx("train", data=place)
    with pytest.raises(BadData, match="no such folder"):
        idx("train", data=place / "nowhere")
    with pytest.raises(BadArgument, match="data split"):
        mnist("val", data=place)


def test_a_survey_of_idx_files(place):
    found = survey(place)
    assert found.kind == "IDX files"
    assert found.splits == {"train": 5, "test": 2}
    assert found.classes == {"0": 2, "1": 3, "2": 1, "3": 1}
    assert found.sizes == {"4×3": 7}
    assert found.values == (-1.0, pytest.approx(59 * 4 / 127.5 - 1, abs=1e-6))
    assert set(found.duplicates) == {("idx train[0]", "idx test[0]"), ("idx train[1]", "idx test[1]")}
    assert found.command == f"inkdrop train mnist --set data=idx --set data.data={place}"
    (place / "t10k-images.idx3-ubyte").write_bytes(b"damaged")
    broken = survey(place)
    assert not broken.command
    assert "not IDX" in broken.text()


# ---- downloads -------------------------------------------------------------------------------------------------

FILES = {
    "train-images-idx3-ubyte.gz": gzip.compress(packed(IMAGES)),
    "train-labels-idx1-ubyte.gz": gzip.compress(packed(LABELS)),
    "t10k-images-idx3-ubyte.gz": gzip.compress(packed(IMAGES[:2])),
    "t10k-labels-idx1-ubyte.gz": gzip.compress(packed(LABELS[:2])),
}


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class _Mirror(BaseHTTPRequestHandler):
    def do_GET(self):
        folder, _, name = self.path.strip("/").partition("/")
        self.server.asked.append(self.path)
        content = FILES.get(name)
        if content is None or folder == "absent":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write({"damaged": content[:-1] + b"!", "short": content[:-5]}.get(folder, content))

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("INKDROP_CACHE", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Mirror)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_mnist_downloads_once_into_the_cache(mirror, monkeypatch, tmp_path):
    sums = tuple(md5(content) for content in FILES.values())
    for name, function in (("_MNIST", mnist), ("_FASHION", fashion_mnist), ("_KMNIST", kmnist)):
        home = getattr(room, name)
        assert len(set(home.md5)) == 4
        assert len(home.classes) == 10
        monkeypatch.setattr(
            room, name, home._replace(mirrors=(f"{mirror.url}/absent", f"{mirror.url}/good/"), md5=sums)
        )
        with pytest.raises(BadData, match=rf"{function.__name__}: not downloaded yet .* try download=true"):
            function("train")
        data = function("train", download=True)
        assert data.take([0])[1].label.tolist() == [3]
        assert data.classes == home.classes
        asked = len(mirror.asked)
        assert len(function("test", download=True)) == len(function("test")) == 2
        assert len(mirror.asked) == asked, "it asked again for what it has"
        folder = tmp_path / "cache" / function.__name__
        assert sorted(file.name for file in folder.iterdir()) == sorted(FILES), "something else was left"
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged later")
    assert len(kmnist("test", download=True)) == 2, "a damaged cache is fetched again"
    with pytest.raises(BadArgument, match="download: got true with data="):
        mnist("train", data=tmp_path, download=True)


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("absent", "Not Found"), ("damaged", "has the md5"), ("short", "(has the md5|IncompleteRead)")],
)
def test_nothing_is_left_of_a_download_that_fails(mirror, tmp_path, folder, reason):
    name = "train-labels-idx1-ubyte.gz"
    with pytest.raises(
        BadData, match=rf"download of {name}: http://.*{reason}.*; if there is no network, get the file"
    ):
        fetch(tmp_path / "into" / name, [f"{mirror.url}/{folder}"], md5=md5(FILES[name]))
    assert list((tmp_path / "into").iterdir()) == []
    with pytest.raises(BadData, match="sent more than 10 bytes"):
        fetch(tmp_path / "into" / name, [f"{mirror.url}/good"], md5=md5(FILES[name]), limit=10)
    assert list((tmp_path / "into").iterdir()) == []


def test_no_network_and_no_place_to_write_are_one_line(mirror, tmp_path, monkeypatch):
    mirror.shutdown()
    mirror.server_close()
    monkeypatch.setattr(room, "_MNIST", room._MNIST._replace(mirrors=(mirror.url,)))
    with pytest.raises(BadData, match="download of train-images") as error:
        mnist("train", download=True)
    assert "refused" in str(error.value)
    assert "put it into" in str(error.value)
    assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadData, match="set INKDROP_CACHE to another folder"):
        fetch(tmp_path / "file" / "x", [mirror.url], md5="")
