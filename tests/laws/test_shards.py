"""Shards and prefetch: samples of tar files are what was put in, at any number of workers, and damage is one line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inkdrop.core.dataset import Data
from inkdrop.data.folder import folder
from inkdrop.data.shards import shards
from inkdrop.data.shards_index import Fields, Index, index_of
from inkdrop.errors import BadArgument, BadData
from inkdrop.train.order import rows_of
from inkdrop.train.prefetch import Prefetch, pinned

pytestmark = pytest.mark.long

RNG = np.random.default_rng(0)
KINDS = ("2", "10", "cat")


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write(file: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as tar:
        for name, data in members.items():
            put(tar, name, data)
    return file


def fill(root: Path, counts: tuple[int, ...] = (7, 1, 12), *, side: int = 6) -> dict[str, np.ndarray]:
    """Shards of so many samples with classes, captions and fields; the pixels by key."""
    made = {}
    for i, count in enumerate(counts):
        members: dict[str, bytes] = {}
        for j in range(count):
            key = f"part{i}/{j:04d}" if j % 2 else f"{i:02d}{j:04d}" + "x" * 90  # long names take headers of their own
            made[key] = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
            at = len(made)
            about = {"kind": KINDS[at % 3], "said": f"thing {key}", "hue": at / 8, "size": -at}
            members[f"{key}.{'webp' if j % 3 == 2 else 'png'}"] = png(made[key], "WEBP" if j % 3 == 2 else "PNG")
            members[f"{key}.cls"] = f"{KINDS[at % 3]}\n".encode()
            members[f"{key}.seg.png"] = png(255 - made[key])
            members |= {f"{key}.txt": f"a caption of {key}".encode()} if j % 4 else {}
            members[f"{key}.json"] = json.dumps(about).encode()
        write(root / f"{i}.tar", members, (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[i % 2])
    return made


def key_of(data: Data, row: int) -> str:
    """The key in a sample's name, FOLDER/SHARD.tar/KEY.png."""
    return data.name(row).split(".tar/", 1)[1].split(".")[0]


# ---- what is in them ---------------------------------------------------------------------------------------------


def test_every_sample_is_what_was_put_in_and_is_of_one_split(tmp_path):
    made = fill(tmp_path)
    seen = []
    for split in ("train", "test"):
        data = shards(split, data=tmp_path, attributes=("hue", "size"), holdout=0.3)
        assert isinstance(data, Data)
        assert (data.shape, data.levels, data.classes) == ((3, 6, 6), 256, KINDS)
        assert data.attributes == ("hue", "size")
        rows = RNG.permutation(len(data)).tolist()
        x, cond = data.take(rows)
        for i, row in enumerate(rows):
            key = key_of(data, row)
            at = list(made).index(key) + 1
            torch.testing.assert_close(
                x[i], torch.from_numpy(made[key].transpose(2, 0, 1) / 127.5 - 1).float(), rtol=0, atol=1.2e-7
            )
            assert data.classes[cond.label[i]] == KINDS[at % 3]
            assert cond.vec[i].tolist() == [at / 8, -at]
            number = int(key[-4:] if "/" in key else key[2:6])
            assert data.texts[row] == (f"a caption of {key}" if number % 4 else None)
            place = int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) / 2**64
            assert (place < 0.3) == (split == "test")
            seen.append(key)
    assert sorted(seen) == sorted(made)


def test_fields_of_json_are_read_where_they_are_named(tmp_path):
    made = fill(tmp_path)
    data = shards("train", data=tmp_path, label="kind", caption="said", holdout=0.3)
    _, cond = data.take(range(len(data)))
    for row in range(len(data)):
        key = key_of(data, row)
        assert data.texts[row] == f"thing {key}"
        assert data.classes[cond.label[row]] == KINDS[(list(made).index(key) + 1) % 3]
    assert list(data.texts) == data.texts[:]
    for wrong, said in (
        ({"label": "sort"}, "no field 'sort'; there are hue, kind, said, size"),
        (
            {"caption": "sort"},
            "no text in the field 'sort'",
        ),
    ):
        with pytest.raises(BadData, match=said):
            shards("train", data=tmp_path, **wrong)
    with pytest.raises(BadData, match="got 'cat' for kind, need a finite number|for kind, need a finite number"):
        shards("train", data=tmp_path, attributes=("kind",))


def test_the_split_is_by_key_alone_so_that_sharding_anew_moves_no_sample(tmp_path):
    made = {f"{i:03d}": RNG.integers(0, 256, (4, 4), dtype=np.uint8) for i in range(60)}
    for name, step in (("a", 60), ("b", 7)):
        keys = list(made)
        for first in range(0, 60, step):
            write(tmp_path / name / f"{first}.tar", {f"{k}.png": png(made[k]) for k in keys[first : first + step]})
    held = []
    for name in "ab":
        data = shards("test", data=tmp_path / name, holdout=0.2)
        held.append({key_of(data, row) for row in range(len(data))})
    assert held[0] == held[1]
    assert 0 < len(held[0]) < 60
    none = shards("train", data=tmp_path / "b", holdout=0)
    assert [key_of(none, row) for row in range(60)] == list(made)
    with pytest.raises(BadData, match="no images for the test split: 0 of 60 are held out"):
        shards("test", data=tmp_path / "b", holdout=0)
    one = shards("test", data=tmp_path / "b", holdout=1e-9)
    assert len(one) == 1, "at least one is held out"
    most = shards("train", data=tmp_path / "b", holdout=0.999_999)
    assert len(most) == 1, "at least one is not"


def test_shards_of_a_folder_s_files_are_the_folder(tmp_path):
    """The same pictures as a folder and as shards give equal tensors, by name."""
    for i in range(40):
        pixels = RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        (tmp_path / "f").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "f" / f"{i}.png")
    for part in range(3):
        files = sorted((tmp_path / "f").glob("*.png"))[part::3]
        write(tmp_path / "s" / f"{part}.tar", {file.name: file.read_bytes() for file in files})
    loose, packed = folder("train", data=tmp_path / "f", holdout=0), shards("train", data=tmp_path / "s", holdout=0)
    ours = {key_of(packed, row): packed.take([row])[0][0] for row in range(40)}
    x, cond = loose.take(range(40))
    assert cond is None
    for row in range(40):
        torch.testing.assert_close(ours[Path(loose.name(row)).stem], x[row], rtol=0, atol=0)


# ---- the index ---------------------------------------------------------------------------------------------------


def test_the_index_is_made_once_and_again_when_a_shard_or_the_cache_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("INKDROP_CACHE", str(tmp_path / "cache"))
    made = fill(tmp_path / "data")
    first = shards("train", data=tmp_path / "data", holdout=0)
    kept = sorted((tmp_path / "cache" / "shards").iterdir())
    assert len(kept) == 6, "two files a shard, and nothing half written"
    scans = []

    def counted(shard: Path, fields: Fields) -> Index:
        scans.append(shard.name)
        return index_of(shard, fields)

    monkeypatch.setattr("inkdrop.data.shards_cache.index_of", counted)
    again = shards("train", data=tmp_path / "data", holdout=0)
    assert (scans, again.fingerprint) == ([], first.fingerprint)
    members = next(file for file in kept if file.suffix == ".members")
    flipped = bytearray(members.read_bytes())
    flipped[20] ^= 1
    members.write_bytes(bytes(flipped))
    mended = shards("train", data=tmp_path / "data", holdout=0)
    assert len(scans) == 1, "a damaged entry is made again"
    torch.testing.assert_close(mended.take(range(20))[0], first.take(range(20))[0], rtol=0, atol=0)
    scans.clear()
    extra = {
        f"new/{i}.{end}": data for i in range(2) for end, data in (("png", png(made["part0/0001"])), ("cls", b"9"))
    }
    write(tmp_path / "data" / "1.tar", extra)
    grown = shards("train", data=tmp_path / "data", holdout=0)
    assert scans == ["1.tar"]
    assert grown.fingerprint != first.fingerprint
    assert grown.classes == ("2", "9", "10", "cat")
    assert shards("test", data=tmp_path / "data").fingerprint != shards("train", data=tmp_path / "data").fingerprint


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path):
    fill(tmp_path, (3, 200))
    data = shards("train", data=tmp_path, holdout=0)
    data._source._open.clear()
    file = tmp_path / "0.tar"
    file.write_bytes(file.read_bytes() + bytes(512))
    with pytest.raises(BadData, match=r"0\.tar: has changed since it was indexed; start again"):
        data.take([0])


def test_few_shards_are_open_at_once_and_each_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("inkdrop.data.shards._OPEN", 3)
    for i in range(12):
        write(tmp_path / f"{i}.tar", {f"{i}.png": png(np.full((4, 4), i, np.uint8))})
    data = shards("train", data=tmp_path, holdout=0)

    def count() -> int:
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            try:
                found += os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path))
            except OSError:
                continue
        return found

    for _ in range(2):
        x, _ = data.take(range(12))
        assert x[:, 0, 0, 0].tolist() == pytest.approx([i / 127.5 - 1 for i in range(12)])
        assert count() <= 3
    del data
    assert count() == 0


# ---- what is refused ---------------------------------------------------------------------------------------------

GOOD = {"a.png": png(np.zeros((4, 4), np.uint8)), "b.png": png(np.ones((4, 4), np.uint8))}


def damaged(file: Path, at: int, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= byte
    file.write_bytes(bytes(data))


def linked(file: Path, kind: bytes) -> None:
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)


REFUSED = {
    "upwards": (lambda f: write(f, GOOD | {"../../c.png": b"x"}), r"0\.tar: '../../c\.png': leads outside by \.\."),
    "absolute": (lambda f: write(f, {"/etc/c.png": b"x"} | GOOD), r"'/etc/c\.png': not a relative path"),
    "a symbolic link": (lambda f: linked(f, tarfile.SYMTYPE), r"'a\.png': no plain file"),
    "a hard link": (lambda f: linked(f, tarfile.LNKTYPE), r"'a\.png': no plain file"),
    "a device": (lambda f: linked(f, tarfile.CHRTYPE), r"'a\.png': no plain file"),
    "cut inside a member": (
        lambda f: (write(f, GOOD), os.truncate(f, 560)),
        r"0\.tar: 'a\.png': cut off: it ends at byte 58\d of 560",
    ),
    "cut inside a header": (lambda f: (write(f, GOOD), os.truncate(f, 1300)), r"0\.tar: not a whole tar"),
    "cut between members": (
        lambda f: (write(f, GOOD), os.truncate(f, 1024)),
        r"not a whole tar \(cut off: its end mark",
    ),
    "a damaged first header": (lambda f: (write(f, GOOD), damaged(f, 5, 1)), r"0\.tar: not a whole tar"),
    "a damaged later header": (lambda f: (write(f, GOOD), damaged(f, 1029, 1)), r"damaged header at byte 1,024"),
    "empty": (lambda f: f.write_bytes(b""), r"0\.tar: not a whole tar \(empty file\)"),
    "not a tar": (lambda f: f.write_bytes(b"junk" * 999), r"0\.tar: not a whole tar"),
    "compressed": (lambda f: f.write_bytes(gzip.compress(b"x" * 4096)), r"0\.tar: compressed.*gunzip it first"),
    "no image": (lambda f: write(f, {"a.cls": b"1", "b.mp3": b"x"}), r"no images in 1 tar shards; 1 keys without an"),
    "two images": (lambda f: write(f, GOOD | {"a.jpg": b"x"}), r"a\.jpg beside a\.png: two members of one kind"),
    "half labels": (lambda f: write(f, GOOD | {"b.cls": b"1"}), r"0\.tar/a\.png: no label, though others have one"),
    "an empty label": (lambda f: write(f, GOOD | {"a.cls": b" "}), r"a\.png: got the label ''"),
    "a long label": (lambda f: write(f, GOOD | {"a.cls": b"1" * (1 << 21)}), r"a\.cls: 2,097,152 bytes of text"),
    "junk for an image": (lambda f: write(f, GOOD | {"c.png": b"junk"}), r"0\.tar/c\.png: not a PNG, JPEG"),
    "sizes": (lambda f: write(f, GOOD | {"c.png": png(np.ones((4, 6), np.uint8))}), "images of several sizes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_malformed_or_unsafe_is_one_clear_line(tmp_path, case):
    make, said = REFUSED[case]
    make(tmp_path / "0.tar")
    with pytest.raises(BadData, match=said) as caught:
        shards("train", data=tmp_path, holdout=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (
            png(np.zeros((4, 6), np.uint8)),
            r"4×6 pixels among images of 4×4; try --set data\.resize=crop --set data\.size=4",
        ),
        (png(np.zeros((4, 4, 3), np.uint8)), r"a colour image among grey ones; try --set data\.channels=rgb"),
        (png(np.zeros((4, 4), np.uint16)), r"uint16 among images of uint8"),
        (png(RNG.integers(0, 256, (4, 4), dtype=np.uint8))[:-30], r"cannot be decoded \("),
        (b"", r"an empty file"),
    ],
    ids=["size", "colour", "bits", "cut off", "empty"],
)
def test_an_image_unlike_the_probed_ones_is_refused_by_its_name_when_it_is_taken(tmp_path, odd, said):
    members = {f"{i:03d}.png": png(np.full((4, 4), i, np.uint8)) for i in range(130)}
    write(tmp_path / "0.tar", members | {"001.png": odd})
    data = shards("train", data=tmp_path, holdout=0)
    data.take([0, 2])
    with pytest.raises(BadData, match=r"0\.tar/001\.png: " + said):
        data.take([0, 1, 2])


def test_other_places_are_named(tmp_path):
    with pytest.raises(BadData, match="nothing: No such file"):
        shards("train", data=tmp_path / "nothing")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(BadData, match=r"no shards \(\*\.tar\), found \.zip"):
        shards("train", data=tmp_path)
    write(tmp_path / "0.tar", GOOD)
    for rows in [2], [-1]:
        with pytest.raises(BadArgument, match="need 0 to 1"):
            shards("train", data=tmp_path, holdout=0).take(rows)
    with pytest.raises(BadArgument, match="need a share in"):
        shards("train", data=tmp_path, holdout=1)


# ---- prefetch ----------------------------------------------------------------------------------------------------


def test_batches_are_the_same_at_any_number_of_workers_also_taken_up_in_the_middle(tmp_path):
    """Epochs of 20 in batches of 6: every other batch crosses or nears the end of one; a run taken up at 5 goes on."""
    fill(tmp_path)
    data = shards("train", data=tmp_path, holdout=0)
    rows = [rows_of(update, 6, len(data), seed=3) for update in range(12)]

    def make(update: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(0.002 * (update * 7 % 3))  # so that they do not end in the order in which they began
        x, cond = data.take(rows[update])
        return x, cond.label

    expected = [make(update) for update in range(12)]
    assert not torch.equal(expected[0][0], expected[1][0])
    for workers in (0, 1, 2, 4):
        for first in (0, 5):
            with Prefetch(make, workers=workers, last=12) as batches:
                for update in range(first, 12):
                    for got, want in zip(batches.take(update), expected[update], strict=True):
                        torch.testing.assert_close(got, want, rtol=0, atol=0)
                with pytest.raises(BadArgument, match="got update 12, need 0 to 11"):
                    batches.take(12)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_at_its_own_update_and_a_second_try_can_pass(workers):
    broken = {4}

    def make(update: int) -> int:
        if update in broken:
            raise BadData(f"photos/{update}.png: cannot be read")
        return update

    with Prefetch(make, workers=workers) as batches:
        assert [batches.take(update) for update in range(4)] == [0, 1, 2, 3]
        for _ in range(2):
            with pytest.raises(BadData, match=r"photos/4\.png: cannot be read"):
                batches.take(4)
        broken.clear()
        assert [batches.take(update) for update in (4, 5, 2, 3, 9)] == [4, 5, 2, 3, 9], "a rollback, and a jump"


def test_what_was_begun_before_a_rollback_is_not_given_out_after_it():
    """The trainer went back and changed something (here the round), so that the batches are other ones."""
    now, go = ["first"], threading.Event()
    begun = threading.Event()

    def make(update: int) -> str:
        mine = now[0]
        if update == 1 and mine == "first":
            begun.set()
            go.wait(10)
        return f"{update} {mine}"

    with Prefetch(make, workers=2, depth=2) as batches:
        assert batches.take(0) == "0 first"
        assert begun.wait(10)
        now[0] = "second"
        assert batches.take(0) == "0 second"
        go.set()
        time.sleep(0.02)
        assert [batches.take(update) for update in (1, 2)] == ["1 second", "2 second"]


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_is_made_ahead_than_asked_for(workers):
    lock, made = threading.Lock(), []

    def make(update: int) -> int:
        with lock:
            made.append(update)
        return update

    with Prefetch(make, workers=workers, depth=5, last=9) as batches:
        for update in range(9):
            batches.take(update)
            deadline = time.monotonic() + 5
            while len(made) < min(9, update + 6) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.005)
            assert sorted(made) == list(range(min(9, update + 6)))
    assert sorted(made) == list(range(9)), "each once, none beyond the last"


def test_an_interrupt_leaves_no_thread_behind():
    """Ctrl-C while the trainer waits for a batch that never comes: the wait ends at once, and the threads end."""
    slow = threading.Event()

    def make(update: int) -> int:
        if update:
            slow.wait(30)
        return update

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]

    def wait() -> None:
        with batches:
            assert threads() == [], "none before the first batch is asked for"
            assert batches.take(0) == 0
            assert len(threads()) == 3
            press.start()
            try:
                batches.take(1)
            finally:
                slow.set()  # reads end by themselves

    batches = Prefetch(make, workers=3)
    press = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            wait()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 10, "the wait was not ended"
    assert threads() == []
    with pytest.raises(BadArgument, match="got a batch after the end"):
        batches.take(1)
    batches.close()


def test_what_is_asked_of_it_is_checked():
    for options, said in (
        ({"workers": -1}, "workers: got -1, need at least 0"),
        ({"workers": 2, "depth": 0}, "depth: got 0, need at least 1"),
        ({"workers": 0, "depth": 3}, "depth: got 3, need none where workers is 0"),
    ):
        with pytest.raises(BadArgument, match=said):
            Prefetch(lambda update: update, **options)
    x = torch.zeros(2)
    assert torch.cuda.is_available() or pinned((x, None))[0] is x


# ---- the page ----------------------------------------------------------------------------------------------------


def test_the_plan_of_a_billion_images_prints_what_its_page_says():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "big-data.md").read_text(encoding="utf-8")
    program, said = re.search(r"```python\n(N, epochs.*?)```\n\n```text\n(.*?)```", page, re.DOTALL).groups()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == said


def test_a_sample_of_a_shard_takes_the_bytes_that_the_plan_counts(tmp_path):
    """A header of 512 bytes and the content in blocks of 512, for each member; 44 bytes of index."""
    members = {f"{i:05d}.{kind}": bytes(size) for i in range(400) for kind, size in (("png", 6144), ("txt", 100))}
    shard = write(tmp_path / "0.tar", members, tarfile.USTAR_FORMAT)
    assert 0 <= shard.stat().st_size - 400 * 7680 <= 10_240 + 1024
    assert index_of(shard, Fields()).members.nbytes == 400 * 44
