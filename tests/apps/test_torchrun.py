"""Whole commands under torchrun: a rank that is killed, samples and scores of two ranks."""

from __future__ import annotations

import filecmp
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

pytestmark = pytest.mark.app
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = ["train", "digits", "--max-steps", "30"]
TRAIN += [f"--set=train.{field}" for field in ("batch=9", "save_every=5", "preview_every=15", "workers=0")]
TRAIN += ["--set=net=unet", "--set=net.width=4", "--set=net.multipliers=1", "--set=net.blocks=1", "--set=plan.steps=2"]


def run(*words: str, many: bool = False) -> str:
    """What a command prints on stdout."""
    start = [*TORCHRUN, "-m", "inkdrop"] if many else [sys.executable, "-m", "inkdrop"]
    done = subprocess.run([*start, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(*TRAIN, "--out", str(folder))
    return folder


def rank_of(launcher: int, rank: int) -> int | None:
    """The process of a rank that a torchrun has started; None if there is none yet."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = re.search(r"^PPid:\s*(\d+)", (process / "status").read_text(), re.M)
            names = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent and int(parent[1]) == launcher and f"RANK={rank}".encode() in names:
            return int(process.name)
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are looked for in /proc")
def test_a_killed_rank_is_started_again_and_the_run_is_that_of_one_process(alone, tmp_path):
    folder, patience = tmp_path / "run", {**os.environ, "INKDROP_PATIENCE": "60"}
    restart = [*TORCHRUN, "--max-restarts", "3", "-m", "inkdrop", *TRAIN, "--out", str(folder)]
    with subprocess.Popen(restart, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=patience) as job:
        until = time.monotonic() + 100
        while not list((folder / "checkpoints").glob("step-*")):
            assert job.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        killed = rank_of(job.pid, 1)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        out, err = job.communicate(timeout=150)
    assert job.returncode == 0, err
    assert out.count("trained:") == 1
    assert json.loads((folder / "run.json").read_text())["resumed"]
    for name in ("raw", "net"):
        mine, other = (
            load_file(each / "checkpoints" / "step-00000030" / f"{name}.safetensors") for each in (alone, folder)
        )
        assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_killed_rank_without_restarts_ends_the_job_with_a_line(tmp_path):
    """The other rank says what is the matter; torchrun's own report comes besides."""
    folder = tmp_path / "run"
    with subprocess.Popen(
        [*TORCHRUN, "-m", "inkdrop", *TRAIN, "--out", str(folder), "--set=train.steps=100000", "--max-steps=100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "INKDROP_PATIENCE": "60"},
    ) as job:
        until = time.monotonic() + 100
        while not list((folder / "checkpoints").glob("step-*")):
            assert job.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        killed = rank_of(job.pid, 0)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        _, err = job.communicate(timeout=100)
    assert job.returncode != 0
    assert "rank 1 of 2: another rank is gone or does not answer" in err
    assert "inkdrop resume" in err


def test_samples_and_scores_of_two_ranks_are_those_of_one(alone, tmp_path, monkeypatch):
    for many in (False, True):
        out = tmp_path / f"samples-{many}"
        run("sample", str(alone), "-n", "5", "--out", str(out), many=many)
        run("eval", str(alone), "-n", "300", "--steps", "2", "--out", f"{out}.json", many=many)
        monkeypatch.setenv("INKDROP_CACHE", str(tmp_path / "another"))  # nothing that was drawn is found again
    same = filecmp.dircmp(tmp_path / "samples-False", tmp_path / "samples-True")
    assert same.left_list == same.right_list
    assert not same.diff_files
    one, two = (json.loads((tmp_path / f"samples-{many}.json").read_text()) for many in (False, True))
    apart = {name for name in one if one[name] != two[name]}
    assert apart <= {"seconds", "sampling_seconds"}
