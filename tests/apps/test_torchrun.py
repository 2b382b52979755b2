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

from inkdrop.cli import app
from inkdrop.errors import BadArgument, BadData

pytestmark = pytest.mark.app
LINUX = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are looked for in /proc")
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


def killed(rank: int, folder: Path, *words: str, restarts: int = 0) -> tuple[int, str, str]:
    """A training of two ranks of which one is killed after the first checkpoint: exit code, stdout, stderr."""
    start = [*TORCHRUN, "--max-restarts", str(restarts), "-m", "inkdrop", *TRAIN, "--out", str(folder), *words]
    env, until = {**os.environ, "INKDROP_PATIENCE": "60"}, time.monotonic() + 100
    job = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        while not list((folder / "checkpoints").glob("step-*")):
            assert job.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        process = rank_of(job.pid, rank)
        assert process is not None
        os.kill(process, signal.SIGKILL)
        out, err = job.communicate(timeout=150)
    finally:
        job.terminate()  # torchrun ends its ranks then; nothing, if it has ended
        job.communicate()
    return job.returncode, out, err


@pytest.mark.slow
@LINUX
def test_a_killed_rank_is_started_again_and_the_run_is_that_of_one_process(alone, tmp_path):
    folder = tmp_path / "run"
    code, out, err = killed(1, folder, restarts=3)
    assert code == 0, err
    assert out.count("trained:") == 1
    assert json.loads((folder / "run.json").read_text())["resumed"]
    for name in ("raw", "net"):
        mine, other = (
            load_file(each / "checkpoints/step-00000030" / f"{name}.safetensors") for each in (alone, folder)
        )
        assert_close(mine, other, rtol=0, atol=1e-5)  # sums in another order, through 30 updates of Adam


@pytest.mark.slow
@LINUX
def test_a_killed_rank_without_restarts_ends_the_job_with_a_line(tmp_path):
    """The other rank says what is the matter; torchrun's own report comes besides."""
    code, _, err = killed(0, tmp_path / "run", "--set=train.steps=100000", "--max-steps=100000")
    assert code != 0
    assert "rank 1 of 2: another rank is gone or does not answer" in err
    assert "inkdrop resume" in err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_command_that_ranks_do_not_share_is_refused_by_all(monkeypatch, rank):
    """Or each would run the whole of it, and write over the others."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("demo", "compare", "classifier", "autoencoder", "ema", "edit", "hub"):
        with pytest.raises(BadArgument, match=rf"^{command}: got several processes \(torchrun\), which"):
            app([command], standalone_mode=False)
    with pytest.raises(BadData, match=r"^recipe nowhere\.json"):
        app(["train", "nowhere.json"], standalone_mode=False)


def test_samples_and_scores_of_two_ranks_are_those_of_one(alone, tmp_path, monkeypatch):
    for many in (False, True):
        out = tmp_path / f"samples-{many}"
        run("sample", str(alone), "-n", "5", "--out", str(out), many=many)
        run("eval", str(alone), "-n", "2200", "--steps", "2", "--out", f"{out}.json", many=many)
        run("eval", str(alone), "--nll", "-n", "70", "--steps", "2", "--set=nll.flow_steps=2", "--set=nll.draws=1",
            "--out", f"{out}-nll.json", many=many)  # fmt: skip
        monkeypatch.setenv("INKDROP_CACHE", str(tmp_path / "another"))  # nothing that was drawn is found again
    same = filecmp.dircmp(tmp_path / "samples-False", tmp_path / "samples-True")
    assert same.left_list == same.right_list
    assert not same.diff_files
    for what in ("", "-nll"):
        one, two = (json.loads((tmp_path / f"samples-{many}{what}.json").read_text()) for many in (False, True))
        apart = {name for name in one if one[name] != two[name]}
        assert apart <= {"seconds", "sampling_seconds"}, what
