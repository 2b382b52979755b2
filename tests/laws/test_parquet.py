"""Parquet: tables at random and as streams: every row once an epoch, the same rows for any rank, worker and restart."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("datasets")
import datasets

from inkdrop.core.dataset import Data
from inkdrop.data.parquet import hub, mixed, parquet
from inkdrop.data.parquet_stream import Stream, hub_stream, parquet_stream
from inkdrop.errors import BadArgument, BadCheckpoint, BadData
from inkdrop.train.order import rows_of
from inkdrop.train.prefetch import Prefetch

pytestmark = pytest.mark.long

COUNTS = (17, 30, 5, 23)
NAMES = ["red", "green", "blue"]


def png(number: int) -> bytes:
    """A picture that says its number."""
    pixels = np.full((4, 4, 3), number % 256, np.uint8)
    pixels[0, 0] = number // 256, 7, 9
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def number_of(x: torch.Tensor) -> list[int]:
    """The numbers of pictures (B, 3, 4, 4) in [-1, 1]."""
    return [round((v + 1) * 127.5) for v in x[:, 0, 2, 2].tolist()]


def write(root: Path, counts: tuple[int, ...] = COUNTS, **columns: object) -> Path:
    """Parquet files whose rows count on from 0, in row groups of 4, with classes, captions and a number."""
    root.mkdir(parents=True, exist_ok=True)
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), "text": datasets.Value("string")}
    features = datasets.Features({**kinds, "hue": datasets.Value("float32")})
    first = 0
    for i, count in enumerate(counts):
        numbers = range(first, first + count)
        made = {
            "image": [{"bytes": png(n), "path": None} for n in numbers],
            "label": [n % 3 for n in numbers],
            "text": [f"thing {n}" if n % 4 else "" for n in numbers],
            "hue": [n / 8 for n in numbers],
        }
        datasets.Dataset.from_dict(made, features=features).to_parquet(str(root / f"{i}.parquet"), batch_size=4)
        first += count
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets.disable_progress_bars()
    return write(tmp_path_factory.mktemp("parquet"))


def plain(root: Path, made: dict[str, list[object]], image: object = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(made.values()))) if made else 2
    table = {"img": [png(n) for n in range(rows)] if image is None else image, **made}
    datasets.Dataset.from_dict(table).to_parquet(str(root / "0.parquet"))
    return root


# ---- at random ---------------------------------------------------------------------------------------------------


def test_every_row_is_what_was_put_in_and_is_of_one_split(files):
    seen: list[int] = []
    for split in ("train", "test"):
        data = parquet(split, data=files, attributes=("hue",), holdout=0.2)
        assert isinstance(data, Data)
        assert (data.shape, data.classes, data.levels) == ((3, 4, 4), tuple(NAMES), 256)
        rows = np.random.default_rng(0).permutation(len(data)).tolist()
        x, cond = data.take(rows)
        numbers = number_of(x)
        assert [f"{files} row {n}" for n in numbers] == [data.name(row) for row in rows]
        assert cond.label.tolist() == [n % 3 for n in numbers]
        assert cond.vec[:, 0].tolist() == [n / 8 for n in numbers]
        assert [data.texts[row] for row in rows] == [f"thing {n}" if n % 4 else None for n in numbers]
        assert all((int(mixed(np.array([n], np.uint64))[0]) < 0.2 * 2**64) == (split == "test") for n in numbers)
        seen += numbers
    assert sorted(seen) == list(range(sum(COUNTS)))
    again = parquet("test", data=files, attributes=("hue",), holdout=0.2)
    assert again.fingerprint == data.fingerprint != parquet("test", data=files, holdout=0.2).fingerprint


def test_the_hash_of_row_numbers_is_splitmix64():
    """The first outputs for the seed 1234567 that the generator's authors' C code prints (Rosetta Code lists them)."""
    step = 0x9E3779B97F4A7C15
    start = 1234567 * pow(step, -1, 2**64) % 2**64  # the state is the seed + k·step
    numbers = np.array([(start + k) % 2**64 for k in range(3)], np.uint64)
    assert mixed(numbers).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_labels_are_names_numbers_or_strings(tmp_path):
    for name, values, classes in (
        ("strings", ["b", "A", "c10", "c9", "b"], ("A", "b", "c9", "c10")),
        ("numbers", [7, 10, 9, 7, 7], ("7", "9", "10")),
    ):
        data = parquet("train", data=plain(tmp_path / name, {"kind": values}), label="kind", holdout=0)
        assert data.classes == classes
        assert [classes[i] for i in data.take(range(5))[1].label] == [str(v) for v in values]
        stream = parquet_stream("test", data=tmp_path / name, label="kind", held=3)
        assert stream.classes == classes


def test_what_cannot_be_read_is_one_clear_line(tmp_path, files):
    outside = [{"bytes": None, "path": "/etc/passwd"}] * 2
    cases = {
        r"no column 'sort'; there are image, label, text, hue": (files, {"label": "sort"}),
        r"no column of images; there are img2": (_renamed(tmp_path / "a"), {}),
        r"row \d: holds no image but '/etc/passwd'; files outside": (plain(tmp_path / "b", {}, outside), {}),
        r"got int in 'img', need an encoded image": (plain(tmp_path / "c", {}, [1, 2]), {}),
        r"row \d: got the label None, need one of 1 class": (plain(tmp_path / "d", {"label": ["x", None]}), {}),
        r"got 'x' for kind, need a finite number": (
            plain(tmp_path / "e", {"kind": ["x", "y"]}),
            {"attributes": ("kind",)},
        ),
        r"row 0: not a PNG, JPEG": (plain(tmp_path / "f", {}, [b"junk", b"junk"]), {}),
        r"nothing: No such file": (tmp_path / "nothing", {}),
        r"no \*\.parquet, found nothing": (_empty(tmp_path / "g"), {}),
        r"0\.parquet: not a whole parquet file": (_cut(tmp_path / "h"), {}),
        r"long/0\.parquet: not a whole parquet file": (_long(tmp_path / "long"), {}),
        r"cannot be read as parquet": (_garbled(tmp_path / "i"), {}),
    }
    for said, (root, options) in cases.items():
        with pytest.raises(BadData, match=said) as caught:
            parquet("train", data=root, holdout=0, **options)
        assert "\n" not in str(caught.value)


def _renamed(root: Path) -> Path:
    root.mkdir()
    datasets.Dataset.from_dict({"img2": [b"x", b"y"]}).to_parquet(str(root / "0.parquet"))
    return root


def _empty(root: Path) -> Path:
    root.mkdir()
    return root


def _cut(root: Path) -> Path:
    file = plain(root, {}) / "0.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    return root


def _long(root: Path) -> Path:
    file = plain(root, {}) / "0.parquet"
    file.write_bytes(file.read_bytes()[:-8] + b"\xff\xff\xff\x7fPAR1")
    return root


def _garbled(root: Path) -> Path:
    file = plain(root, {}) / "0.parquet"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[-8:-4], "little")
    data[-8 - length : -8] = bytes(length)
    file.write_bytes(bytes(data))
    return root


def test_the_hub_answers_through_datasets_and_says_when_it_cannot(files, monkeypatch, tmp_path):
    def load(repo: str, config: str | None, *, split: str, revision: str | None, streaming: bool) -> object:
        assert (repo, config, split, revision) == ("user/name", "small", "train", "abc")
        found = [str(file) for file in sorted(files.glob("*.parquet"))]
        if streaming:
            return datasets.IterableDataset.from_parquet(found)
        return datasets.Dataset.from_parquet(found, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load)
    named = {"repo": "user/name", "config": "small", "revision": "abc"}
    ours, local = hub("train", **named, holdout=0.2), parquet("train", data=files, holdout=0.2)
    torch.testing.assert_close(ours.take(range(len(ours)))[0], local.take(range(len(local)))[0], rtol=0, atol=0)
    with pytest.raises(BadData, match=r"does not say how many rows it has; give --set data\.count="):
        hub_stream("train", **named)
    flow = hub_stream("train", **named, held=4, count=sum(COUNTS), window=5)
    same = parquet_stream("train", data=files, held=4, window=5)
    torch.testing.assert_close(flow.take(range(40))[0], same.take(range(40))[0], rtol=0, atol=0)

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for function in (hub, hub_stream):
        with pytest.raises(BadData, match=r"hub data user/name: cannot be had \(ConnectionError: no route\); if there"):
            function("train", repo="user/name")


# ---- streams -----------------------------------------------------------------------------------------------------


def epochs(stream: Stream, count: int, batch: int = 6) -> list[int]:
    """The numbers of the rows of so many updates."""
    return [n for update in range(count) for n in number_of(stream.take(stream.rows_of(update, batch))[0])]


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_stream_gives_every_row_once_an_epoch_in_a_new_order(files, lanes):
    """A lane's epoch is its files' rows, 66 = 12 + 30 + 5 + 23 − 4 in one lane, 17 − 5 + 5 = 17 and 53 in two."""
    stream = parquet_stream("train", data=files, held=5, lanes=lanes, window=8)
    test = parquet_stream("test", data=files, held=5)
    assert number_of(test.take(range(5))[0]) == [0, 1, 2, 3, 4]
    assert len(stream) == sum(COUNTS) - 5
    firsts = np.cumsum([0, *COUNTS])
    own = [
        [n for i in range(lane, 4, lanes) for n in range(firsts[i], firsts[i + 1]) if n > 4] for lane in range(lanes)
    ]
    for lane, numbers in enumerate(own):
        size = len(numbers)
        rows = [position * lanes + lane for position in range(3 * size)]
        got = number_of(stream.take(rows)[0])
        # a window may reach into the next epoch, so whole windows are counted: 8 epochs' worth of rows, 8·size of them
        counted = Counter(number_of(stream.take([p * lanes + lane for p in range(8 * size)])[0]))
        assert counted == Counter(dict.fromkeys(numbers, 8))
        assert got[:size] != numbers
        assert got[:size] != got[size : 2 * size]
    unmixed = parquet_stream("train", data=files, held=5, window=1)
    size = len(unmixed)
    orders = {tuple(number_of(unmixed.take(range(e * size, (e + 1) * size))[0])) for e in range(5)}
    assert len(orders) > 1, "the order of the files is another in another epoch"


def test_a_stream_is_the_same_in_any_order_of_asking_and_of_any_seed_another(files):

    def make(**options: int) -> Stream:
        return parquet_stream("train", data=files, held=5, window=4, **options)

    stream = make(lanes=2)
    straight = number_of(stream.take(range(300))[0])
    shuffled = np.random.default_rng(1).permutation(300).tolist()[:40]
    assert number_of(make(lanes=2).take(shuffled)[0]) == [straight[row] for row in shuffled]
    assert [make(lanes=2).texts[row] for row in (7, 3)] == [
        f"thing {straight[r]}" if straight[r] % 4 else None for r in (7, 3)
    ]
    assert number_of(make(lanes=2, seed=1).take(range(60))[0]) != straight[:60]
    assert make(lanes=2).fingerprint == stream.fingerprint
    assert len({make(**knobs).fingerprint for knobs in ({}, {"lanes": 2}, {"seed": 1})}) == 3


def test_a_state_takes_a_stream_up_in_the_middle_and_reads_no_more_than_it_must(files, monkeypatch):
    """From every update of two epochs, through JSON: the same numbers, and not a window read before the state's."""

    def counted(opened: list[int], own: Callable[[dict[str, Any]], Any], state: dict[str, Any]) -> Any:
        opened.append(state["epoch"])
        return own(state)

    options = {"data": files, "held": 5, "lanes": 2, "window": 4}
    whole = parquet_stream("train", **options)
    expected = [number_of(whole.take(whole.rows_of(update, 6))[0]) for update in range(24)]
    going = parquet_stream("train", **options)
    for update in range(24):
        state = json.loads(json.dumps(going.state(update, 6)))
        if update % 5 == 1:
            fresh = parquet_stream("train", **options)
            fresh.restore(state)
            opened: list[int] = []
            for lane in fresh._lanes:
                monkeypatch.setattr(lane, "_forwards", partial(counted, opened, lane._forwards))
            got = [number_of(fresh.take(fresh.rows_of(u, 6))[0]) for u in range(update, min(update + 4, 24))]
            assert got == expected[update : update + 4]
            assert opened == [state[0]["epoch"], state[1]["epoch"]], "each lane is opened once, at the state"
            assert [s["window"] for s in state] == [3 * update // 4] * 2
        going.take(going.rows_of(update, 6))
    with pytest.raises(BadArgument, match="got 1 lanes, need 2"):
        going.restore(state[:1])
    with pytest.raises(BadCheckpoint, match="the stream's state cannot be read"):
        going.restore([{"window": 1}] * 2)


def test_ranks_read_their_own_lanes_and_make_the_global_batch_together(files):
    whole = parquet_stream("train", data=files, held=5, lanes=4, window=4)
    for update in range(5):
        rows = whole.rows_of(update, 8)
        together: list[int] = []
        for rank in range(2):
            alone = parquet_stream("train", data=files, held=5, lanes=4, window=4)
            together += number_of(alone.take(rows[rank * 4 : rank * 4 + 4])[0])
            assert [i for i, lane in enumerate(alone._lanes) if lane._windows] == [2 * rank, 2 * rank + 1]
        assert together == number_of(whole.take(rows)[0])
    with pytest.raises(BadArgument, match=r"train\.batch: got 6, need a multiple of the stream's 4 lanes"):
        whole.rows_of(0, 6)


def test_prefetch_of_a_stream_and_of_a_table_is_equal_at_any_number_of_workers(files):
    table = parquet("train", data=files, holdout=0.1)
    rows = [rows_of(update, 6, len(table), seed=1) for update in range(30)]

    def of_table(update: int) -> torch.Tensor:
        return table.take(rows[update])[0]

    def of_stream(stream: Stream, update: int) -> torch.Tensor:
        return stream.take(stream.rows_of(update, 6))[0]

    for name in ("table", "stream"):
        results = []
        for workers in (0, 1, 2, 4):
            stream = parquet_stream("train", data=files, held=5, lanes=2, window=4)
            make = of_table if name == "table" else partial(of_stream, stream)
            with Prefetch(make, workers=workers, last=30) as batches:
                results.append(torch.stack([batches.take(update) for update in range(3, 30)]))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_what_is_asked_of_a_stream_is_checked(files, tmp_path):
    for options, said in (
        ({"lanes": 5}, "lanes: got 5, but .* has 4 files"),
        ({"lanes": 0}, "lanes: got 0, need at least 1"),
        ({"window": 0}, "window: got 0, need at least 1"),
        ({"held": 0}, "held: got 0, need at least 1"),
        ({"seed": -1}, "seed: got -1"),
    ):
        with pytest.raises(BadArgument, match=said):
            parquet_stream("train", data=files, **options)
    small = write(tmp_path, (6, 3))
    with pytest.raises(BadData, match="all 3 rows are held out"):
        parquet_stream("train", data=write(tmp_path / "one", (3,)))
    empty = parquet_stream("train", data=small, held=6, lanes=2)
    assert number_of(empty.take([1])[0])[0] in (6, 7, 8)
    with pytest.raises(BadData, match="lane 0 of the stream holds no samples; try fewer lanes"):
        empty.take([0])
    with pytest.raises(BadArgument, match="row: got -1, need at least 0"):
        empty.take([-1])
