"""Several ranks are one: the same numbers whoever computes them, and nobody waits for one that is in trouble."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from inkdrop.bundle import checkpoints
from inkdrop.errors import BadArgument
from inkdrop.parallel import ALONE, Ranks, shares
from inkdrop.settings import Train
from inkdrop.train.buckets import Buckets
from inkdrop.train.speed import ways
from runs import files_of, log_of

pytestmark = pytest.mark.long
TESTS = Path(__file__).parents[1]
Job = Callable[..., tuple[list[int], list[str]]]


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    """f(folder, size, ...) -> the exit status of each rank, and what each said."""
    server = subprocess.Popen(
        [sys.executable, str(TESTS / "ranked.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdin is not None
    assert server.stdout.readline() == "ready\n"

    def run(folder: Path, size: int, what: str = "fit", **more: Any) -> tuple[list[int], list[str]]:
        asked = {"what": what, "size": size, "folder": str(folder), **more}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        return codes, [Path(f"{folder}-{rank}.err").read_text() for rank in range(size)]

    yield run
    server.stdin.close()
    assert server.wait(timeout=20) == 0
    server.stdout.close()


TRAIN = {"batch": 7, "steps": 24}


@pytest.fixture(scope="module")
def alone(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one rank."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    well(job(folder, 1, train=TRAIN))
    return folder


def well(ended: tuple[list[int], list[str]]) -> None:
    """All ranks of a job ended well; else what they said."""
    codes, said = ended
    assert not any(codes), (codes, said)


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


def same(a: Path, b: Path, atol: float = 1e-6) -> None:
    """Weights, average, moments and the log of two runs agree."""
    assert newest(a).name == newest(b).name
    for name in ("raw", "net", "state"):
        mine, other = (load_file(newest(run) / f"{name}.safetensors") for run in (a, b))
        assert_close(mine, other, rtol=0, atol=atol)
    for mine, other in zip(log_of(a), log_of(b), strict=True):
        assert mine.keys() == other.keys()
        if "loss" in mine:
            assert mine["lr"] == other["lr"]
            assert_close(mine["loss"], other["loss"], rtol=1e-5, atol=1e-6)
            assert_close(mine["grad_norm"], other["grad_norm"], rtol=1e-5, atol=1e-6)
        if "held_out" in mine:
            assert_close(mine["held_out"]["bands"], other["held_out"]["bands"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (4, 1), (2, 3)])
def test_ranks_and_micro_batches_change_no_number(job, alone, tmp_path, size, accumulate, shard):
    """Shares of 7 samples differ in size, so that a mean of means would show."""
    codes, said = job(tmp_path / "run", size, train={**TRAIN, "accumulate": accumulate, "shard": shard})
    assert codes == [0] * size, said
    same(alone, tmp_path / "run")


def test_a_memory_of_losses_and_power_averages_are_those_of_all_ranks(job, tmp_path):
    train = {**TRAIN, "draws": "aware", "snapshots": 8}
    well(job(tmp_path / "one", 1, train=train))
    for shard in (False, True):
        many = tmp_path / f"many-{shard}"
        well(job(many, 2, train={**train, "shard": shard}))
        same(tmp_path / "one", many)
        kept = [
            load_file(run / "averages" / "step-00000008" / "averages.safetensors") for run in (tmp_path / "one", many)
        ]
        assert_close(*kept, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shard", [False, True])
def test_the_same_ranks_go_on_bit_for_bit(job, tmp_path, shard):
    """Stopped at update 12 and resumed, on 2 ranks, is not stopped."""
    train = {**TRAIN, "shard": shard}
    well(job(tmp_path / "whole", 2, train=train))
    well(job(tmp_path / "parts", 2, train=train, max_steps=12))
    well(job(tmp_path / "parts", 2, "resume"))
    assert files_of(newest(tmp_path / "whole")) == files_of(newest(tmp_path / "parts"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


@pytest.mark.parametrize(("first", "then"), [((2, True), (4, True)), ((4, True), (1, False)), ((1, False), (2, True))])
def test_a_checkpoint_goes_on_with_other_ranks(job, alone, tmp_path, first, then):
    """Written by ranks in shares, read by more, by one, or the other way round."""
    (size, shard), (more, sharded) = first, then
    run = tmp_path / "run"
    well(job(run, size, train={**TRAIN, "shard": shard}, max_steps=12))
    well(job(run, more, "resume", train={"shard": sharded}))
    same(alone, run)


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all_and_named_once(job, tmp_path):
    for name, size in (("one", 1), ("two", 2)):
        codes, said = job(tmp_path / name, size, train=TRAIN, trouble="nan")
        assert codes == [0] * size, said
    same(tmp_path / "one", tmp_path / "two")
    lines = [[line for line in log_of(tmp_path / name) if "skipped" in line] for name in ("one", "two")]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1


def test_memory_that_runs_out_on_one_rank_halves_the_parts_of_all(job, alone, tmp_path):
    codes, said = job(tmp_path / "run", 2, train=TRAIN, trouble="memory")
    assert codes == [0, 0], said
    assert [line["out_of_memory"]["accumulate"] for line in log_of(tmp_path / "run") if "out_of_memory" in line] == [2]
    mine, other = (load_file(newest(run) / "raw.safetensors") for run in (alone, tmp_path / "run"))
    assert_close(mine, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("save", "inkdrop: checkpoint: cannot be written (No space left on device)"),
        ("unreadable", "inkdrop: rank 1: points[3]: cannot be read; stopped at update 5; go on from step-00000005"),
    ],
)
def test_what_fails_on_one_rank_ends_all_and_is_said_once(job, tmp_path, trouble, says):
    codes, said = job(tmp_path / "run", 2, train=TRAIN, trouble=trouble)
    assert codes == [2, 2]
    assert said[0].startswith(says)
    assert said[0].count("\n") == 1
    assert said[1] == ""


def test_a_signal_to_one_rank_ends_all_at_one_update_and_they_go_on_bit_for_bit(job, tmp_path):
    well(job(tmp_path / "whole", 2, train=TRAIN))
    codes, said = job(tmp_path / "run", 2, train=TRAIN, trouble="terminate")
    assert codes == [0, 0], said
    assert newest(tmp_path / "run").name == "step-00000006"
    well(job(tmp_path / "run", 2, "resume"))
    assert files_of(newest(tmp_path / "whole")) == files_of(newest(tmp_path / "run"))


@pytest.mark.parametrize(("shard", "trouble"), [(False, "kill"), (True, "kill"), (True, "kill-saving")])
def test_a_rank_that_is_killed_ends_the_others_with_a_line(job, tmp_path, shard, trouble):
    codes, said = job(tmp_path / "run", 2, train={**TRAIN, "save_every": 4, "shard": shard}, trouble=trouble)
    assert codes == [2, -9], said
    last = said[0].splitlines()[-1]  # FSDP warns of itself before
    assert last.startswith("inkdrop: rank 0 of 2: another rank is gone or does not answer")
    assert [path.name for path in checkpoints(tmp_path / "run")] == (
        [] if trouble == "kill-saving" else ["step-00000004"]
    )
    well(job(tmp_path / "run", 2, "resume"))


def test_what_rank_0_refuses_ends_all_and_is_said_once(job, alone):
    codes, said = job(alone, 2, train=TRAIN)
    assert codes == [2, 2]
    assert said[0] == f"inkdrop: {alone}: holds a run already; resume it, or choose another --out\n"
    assert said[1] == ""


def test_a_gradient_that_a_rank_does_not_have_counts_as_zero_and_one_that_none_has_is_none():
    """Three weights in buckets of one; the other rank has 10 for the second, 20 for the first, none for the last."""
    weights = [nn.Parameter(torch.tensor([value])) for value in (1.0, 2.0, 3.0)]
    buckets = Buckets(weights, Other([[0.0, 0.0], [10.0, 1.0], [20.0, 1.0]]), size=4)
    buckets.listen()
    (5 * weights[0]).sum().backward()
    buckets.finish()
    assert [None if weight.grad is None else weight.grad.tolist() for weight in weights] == [[25.0], [10.0], None]


class Other(Ranks):
    """Another rank, which gives these numbers for the buckets: last weight first, each with a 1 where there is one."""

    def __init__(self, gives: list[list[float]]) -> None:
        object.__setattr__(self, "gives", [torch.tensor(each) for each in gives])

    def begin_sum(self, x: torch.Tensor) -> Callable[[], None]:
        x += self.gives.pop(0)
        return lambda: None


def test_fewer_samples_than_ranks_are_refused(job, tmp_path):
    codes, said = job(tmp_path / "run", 4, train={**TRAIN, "batch": 3})
    assert codes == [2] * 4
    assert said[0] == "inkdrop: train.batch: got 3, need at least one sample a rank, 4\n"


def test_shares_have_no_layout_so_channels_last_is_refused_beside_them():
    with pytest.raises(BadArgument, match=r"^train\.channels_last: got true beside train\.shard"):
        Train(shard=True, channels_last=True)
    cpu = torch.device("cpu")
    assert any(way["channels_last"] for way in ways(Train(), cpu, convolves=True))
    assert not any(way["channels_last"] for way in ways(Train(shard=True), cpu, convolves=True))


def test_shares_are_all_places_once_in_order():
    for count in range(9):
        for parts in range(1, 6):
            found = shares(range(3, 3 + count), parts)
            assert [place for part in found for place in part] == list(range(3, 3 + count))
            assert max(map(len, found)) - min(map(len, found)) <= 1


def test_one_process_alone_waits_for_nobody():
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    x = torch.arange(3)
    assert ALONE.cat(x) is x
    assert (ALONE.most(3), ALONE.tell("x"), ALONE.lead(lambda: 5), list(Ranks().share(4))) == (3, "x", 5, [0, 1, 2, 3])
    with pytest.raises(BadArgument, match="as it is"):
        ALONE.agree(BadArgument("as it is"))
