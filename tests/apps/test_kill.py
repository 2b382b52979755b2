"""R2: runs that are killed (SIGKILL) at random times, again and again, are the unbroken run when they are done."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import kills
from inkdrop.bundle import checkpoints, load, locate, read_manifest
from runs import files_of, log_of

pytestmark = pytest.mark.app

SAVE_EVERY, STEPS, KEEP = 4, 24, 2


class Server:
    """The warm process, and the runs that it forks."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, kills.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert self.line().startswith("ready")

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def run(self, run: Path, *, kill_after: float | None = None, inside: str | None = None) -> tuple[int, float]:
        """A run's exit status and how long it lived, in seconds.

        Args:
            run: its folder; begun if it has no recipe.json, else resumed.
            kill_after: seconds, after which it gets SIGKILL.
            inside: kill it that long after it has come to this phase, rather than after its start.
        """
        shared = run.parent / f"{run.name}.shared"
        shared.write_bytes(bytes(kills.FORM.size))
        what = "resume" if (run / "recipe.json").is_file() else "fit"
        self.say(f"{what} {run} {shared}")
        pid, began = int(self.line()), time.monotonic()
        if kill_after is not None:
            while inside is not None and kills.read(shared)[0] not in (inside, "end"):
                time.sleep(0.0002)
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # the server has not waited for it yet, so that the id is still its own
        self.say("wait")
        again, status = map(int, self.line().split())
        assert again == pid
        return status, time.monotonic() - began

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def unbroken(server, tmp_path_factory) -> tuple[Path, float]:
    """A run that was never killed, and how long it takes; the first is slower, for what it loads."""
    folder = tmp_path_factory.mktemp("kills")
    server.run(folder / "first")
    status, seconds = server.run(folder / "unbroken")
    assert status == 0
    return folder / "unbroken", seconds


def assert_sound(run: Path) -> tuple[str, int, int]:
    """What a kill left: every checkpoint there is loads, and no finished save is lost. What it hit."""
    phase, done, saved = kills.read(run.parent / f"{run.name}.shared")
    there = checkpoints(run) if run.exists() else []
    for folder in there:
        record = read_manifest(folder)
        assert {"net.safetensors", "raw.safetensors", "state.safetensors", "state.json"} <= set(record["files"])
    newest = int(there[-1].name[5:]) if there else 0
    if there:
        load(there[-1])
    assert newest >= saved, "a save that had returned is lost"
    assert done - newest <= SAVE_EVERY, f"{done - newest} updates have to be repeated"
    return phase, done, newest


def kill_until(server: Server, folder: Path, whole: tuple[Path, float], count: int, inside: int) -> Counter[str]:
    """Kill `count` times at uniformly random times, then within saves until `inside` were hit; compare finished runs.

    A run is killed three times before it is left to end; each time it lives a uniform share of the time that an
    unbroken one takes, or of 10 ms from the start of a save.
    """
    unbroken, seconds = whole
    chance, seen, number = random.Random(2), Counter[str](), 0
    while sum(seen.values()) < count or seen["save"] < inside:
        assert number < 2 * (count + inside), f"too few kills hit a save: {dict(seen)}"
        number += 1
        run = folder / f"run-{number}"
        for _ in range(3):
            within = sum(seen.values()) >= count
            after = chance.uniform(0, 0.01) if within else chance.uniform(0, seconds)
            status, _ = server.run(run, kill_after=after, inside="save" if within else None)
            phase, done, newest = assert_sound(run)
            print(f"run {number}: status {status}, in {phase} at update {done}, newest checkpoint {newest}")
            if status == 0:
                break
            assert status == -signal.SIGKILL
            seen[phase] += 1
        server.run(run)
        assert_same(run, unbroken)
    return seen


def assert_same(run: Path, unbroken: Path) -> None:
    """Weights, average, optimiser, progress, log, previews; nothing is left of saves that were cut off."""
    assert [p.name for p in checkpoints(run)] == [p.name for p in checkpoints(unbroken)]
    for mine, theirs in zip(checkpoints(run), checkpoints(unbroken), strict=True):
        assert files_of(mine) == files_of(theirs)
    states = [json.loads((locate(each) / "state.json").read_text()) for each in (run, unbroken)]
    assert [{k: v for k, v in state.items() if k != "seconds"} for state in states] == [
        {k: v for k, v in states[1].items() if k != "seconds"}
    ] * 2
    assert log_of(run) == log_of(unbroken)
    assert json.loads((run / "run.json").read_text())["updates"] == STEPS
    pictures = [{p.name: p.read_bytes() for p in (each / "previews").iterdir()} for each in (run, unbroken)]
    assert pictures[0] == pictures[1]
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_runs_killed_at_random_times_are_the_unbroken_run(server, unbroken, tmp_path, record_property):
    seen = kill_until(server, tmp_path, unbroken, count=20, inside=4)
    record_property("phases", dict(seen))
    print(dict(seen))
    assert sum(seen.values()) >= 20
    assert seen["save"] >= 4


@pytest.mark.slow
def test_two_hundred_kills(server, unbroken, tmp_path, record_property):
    """200 at uniformly random times, of which and of more, aimed at saves, at least 20 hit the inside of one."""
    seen = kill_until(server, tmp_path, unbroken, count=200, inside=20)
    record_property("phases", dict(seen))
    print(dict(seen))
    assert seen["save"] >= 20


def test_the_unbroken_run_trained(unbroken):
    """Otherwise all would be equal: weights moved, dropout was at work, and checkpoints came and went."""
    run, _ = unbroken
    assert [p.name for p in checkpoints(run)] == [f"step-{STEPS - SAVE_EVERY * i:08d}" for i in range(KEEP)][::-1]
    losses = [line["loss"] for line in log_of(run) if "loss" in line]
    assert len(losses) == STEPS
    first, last = (files_of(folder) for folder in checkpoints(run))
    assert first["raw.safetensors"] != last["raw.safetensors"]
