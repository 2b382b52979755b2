"""R21: a run on a stream that was stopped goes on where it stood, and reads nothing from the start."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("datasets")
import datasets

from inkdrop.bundle import locate
from inkdrop.data.parquet_lanes import Lane
from inkdrop.errors import BadArgument
from inkdrop.find import Part
from inkdrop.recipe import Recipe, open_data
from inkdrop.train.loop import fit, resume
from inkdrop.train.trainer import Trainer
from runs import digits, files_of, log_of

pytestmark = pytest.mark.long

WINDOW, LANES, BATCH = 8, 2, 4


def png(number: int) -> bytes:
    """A picture that says its number."""
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), number % 256, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 rows in four files, of which six are held out."""
    datasets.disable_progress_bars()
    root, first = tmp_path_factory.mktemp("rows"), 0
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for i, count in enumerate((17, 30, 5, 23)):
        numbers = range(first, first + count)
        made = {
            "image": [{"bytes": png(3 * n), "path": None} for n in numbers],
            "text": [f"number {n}" for n in numbers],
        }
        datasets.Dataset.from_dict(made, features=features).to_parquet(str(root / f"{i}.parquet"), batch_size=4)
        first += count
    return root


def streamed(files: Path, *, text: bool = False, window: int = WINDOW, **train: Any) -> Recipe:
    """30 updates, in which each lane's two files are read almost twice."""
    made = digits(**{"steps": 30, "batch": BATCH, "preview_every": 20, "save_every": 10, **train})
    named = {"data": str(files), "held": 6, "lanes": LANES, "window": window}
    recipe = replace(made, data=Part("parquet_stream", {**named, "caption": "text"} if text else named))
    return replace(recipe, text=Part("bpe", {"vocabulary": 260})) if text else recipe


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The position in its lane of each row that is read."""
    positions: list[int] = []
    forwards = Lane._forwards

    def counted(self: Lane, state: dict[str, Any]) -> Iterator[Any]:
        return noted(forwards(self, state), self._next * self._window)

    def noted(rows: Iterator[Any], at: int) -> Iterator[Any]:
        for i, row in enumerate(rows):
            positions.append(at + i)
            yield row

    monkeypatch.setattr(Lane, "_forwards", counted)
    return positions


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_unbroken_one_and_reads_from_its_window_on(text, workers, files, read, tmp_path):
    recipe = streamed(files, workers=workers, text=text)
    fit(recipe, tmp_path / "whole")
    fit(recipe, tmp_path / "run", max_steps=21)
    read.clear()
    resume(tmp_path / "run")
    each = BATCH // LANES
    first, last = 21 * each // WINDOW * WINDOW, 30 * each
    assert sorted(read) == sorted(list(range(first, math.ceil(last / WINDOW) * WINDOW)) * LANES)
    assert files_of(locate(tmp_path / "run")) == files_of(locate(tmp_path / "whole"))
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


@pytest.mark.parametrize(("window", "batch"), [(WINDOW, BATCH), (1, 12)])
def test_what_is_saved_is_the_state_of_the_update_not_of_what_was_read_ahead(files, tmp_path, window, batch):
    """A lane remembers where its newest eight windows began: with small ones what was read ahead is beyond them."""
    states = []
    for workers in (0, 1):
        fit(streamed(files, workers=workers, window=window, batch=batch), tmp_path / str(workers), max_steps=20)
        saved = [json.loads(p.read_text()) for p in sorted((tmp_path / str(workers)).glob("checkpoints/*/state.json"))]
        assert [each["update"] for each in saved] == [10, 20]
        states.append([each["stream"] for each in saved])
        assert [lane["window"] for lane in states[-1][0]] == [10 * batch // LANES // window] * LANES
    assert states[0] == states[1]


def test_the_state_of_ranks_is_of_each_lane_that_of_the_one_that_has_read_it(files):
    """Two streams read a lane each; the state of both together is that of one which has read all."""
    whole, *parts = (open_data(streamed(files).data, "train") for _ in range(3))
    for update in range(10):
        rows = whole.rows_of(update, BATCH)
        whole.take(rows)
        for rank, part in enumerate(parts):
            part.take(rows[rank * BATCH // LANES : (rank + 1) * BATCH // LANES])
    states = [part.state(10, BATCH) for part in parts]
    assert states[0] != states[1]
    assert whole.merged(states) == whole.merged(states[::-1]) == whole.state(10, BATCH)


def test_a_return_takes_the_stream_back_too(files, read, monkeypatch, tmp_path):
    """Three skips at 21 to 23 take the run back to 20."""
    losses = Trainer.losses

    def troubled(self, rows, places=None):
        terms = losses(self, rows, places)
        if 21 <= self.update <= 23 and not self.guard.rollbacks:
            terms["loss"] = terms["loss"] * math.nan
        return terms

    monkeypatch.setattr(Trainer, "losses", troubled)
    for workers in (0, 1):
        read.clear()
        fit(streamed(files, workers=workers, skips=3), tmp_path / str(workers))
        assert read.count(0) == LANES, "the stream was read from its start a second time"
    assert files_of(locate(tmp_path / "0")) == files_of(locate(tmp_path / "1"))
    assert log_of(tmp_path / "0") == log_of(tmp_path / "1")
    assert any("rollback" in line for line in log_of(tmp_path / "0"))


def test_a_batch_that_the_lanes_do_not_divide_is_refused_at_once(files):
    with pytest.raises(BadArgument, match=r"train\.batch: got 5, need a multiple of the stream's 2 lanes"):
        Trainer(streamed(files, batch=5), None)
