"""R25: the memory that a run will need, told beforehand and measured in a real update, within 15 % (seen: 1 %)."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from inkdrop.find import Part
from inkdrop.recipe import Recipe, dump
from inkdrop.screen import print_dry_run
from inkdrop.settings import Train
from inkdrop.train import resident
from inkdrop.train.dry import dry_run, in_use, peak_memory
from inkdrop.train.resident import Need, need_of
from inkdrop.train.trainer import Trainer
from runs import digits, points


def measured(recipe: Recipe) -> int:
    """The most bytes in use in the second update of a run: what torch allocates in it, and what was there before.

    Gradients of the first are set free in the second, which the profiler does not see, as it did not see them come:
    they are left out on both sides.
    """
    trainer = Trainer(recipe, None)
    trainer.step()
    tensors = [*trainer.denoiser.net.state_dict().values(), *trainer.ema.net.state_dict().values()]
    tensors += [value for entry in trainer.optimiser.state_dict()["state"].values() for value in entry.values()]
    trainer.optimiser.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer.step()
    used = in_use(seen)
    gradients = sum(p.grad.untyped_storage().nbytes() for p in trainer.denoiser.net.parameters())
    x0, cond = trainer.ahead._newest.batch  # stays for another try of the update
    told = () if cond is None else vars(cond).values()
    batch = sum(t.untyped_storage().nbytes() for t in (x0, *told) if isinstance(t, torch.Tensor))
    left = used[-1] - gradients  # the batch, unless it is NumPy's, as a folder's is
    assert min(abs(left - batch), abs(left)) < 0.01 * gradients + 4096, "the profiler missed something"
    return sum(t.untyped_storage().nbytes() for t in tensors) + max(used)


def pictures(folder: Path, size: int = 28) -> Part:
    """A folder of 12 pictures."""
    from PIL import Image

    folder.mkdir()
    for i in range(12):
        Image.new("L", (size, size), 20 * i).save(folder / f"{i:02d}.png")
    return Part("folder", {"data": str(folder)})


CASES = [
    ("unet_digits", {}, 32, 1, "float32"),
    ("unet_digits", {}, 32, 4, "float32"),
    ("unet_mnist", {}, 16, 1, "float32"),
    ("unet_mnist", {}, 16, 4, "bfloat16"),
    ("dit", {"width": 64, "depth": 3, "heads": 4, "patch": 4}, 32, 1, "float32"),
    ("dit", {"width": 64, "depth": 3, "heads": 4, "patch": 4}, 30, 4, "bfloat16"),
    ("mlp", {"width": 512, "depth": 3}, 3, 1, "float32"),
]


def assert_near(recipe: Recipe) -> None:
    told, real = dry_run(recipe)["bytes_peak"], measured(recipe)
    print(f"{recipe.net.name}: told {told:,}, measured {real:,}, ratio {told / real:.3f}")
    assert told == pytest.approx(real, rel=0.15)


@pytest.mark.long
@pytest.mark.parametrize("change", [{}, {"accumulate": 4}, {"precision": "bfloat16"}, {"batch": 3}])
@pytest.mark.parametrize("make", [points, digits])
def test_the_memory_of_small_runs_is_told(make, change):
    assert_near(make(**{"batch": 32, "steps": 2, **change}))


@pytest.mark.slow
@pytest.mark.parametrize(("net", "knobs", "batch", "accumulate", "precision"), CASES)
def test_the_memory_of_larger_nets_is_told(net, knobs, batch, accumulate, precision, tmp_path):
    train = Train(batch=batch, accumulate=accumulate, precision=precision, null_rate=0)
    assert_near(Recipe(data=pictures(tmp_path / "p"), net=Part(net, knobs), train=train))


@pytest.mark.long
def test_more_micro_batches_need_less_memory_for_the_same_batch():
    """The parts that do not depend on the batch stay, the activations are those of a quarter."""
    one, four = (dry_run(digits(batch=64, accumulate=n)) for n in (1, 4))
    assert (one["micro_batch"], four["micro_batch"]) == (64, 16)
    assert one["bytes_fixed"] == four["bytes_fixed"]
    assert four["bytes_activations"] < 0.3 * one["bytes_activations"]
    assert one["bytes_peak"] == one["bytes_fixed"] + one["bytes_activations"]


@pytest.mark.parametrize(
    ("batch", "accumulate", "sizes", "need"),
    [
        (32, 1, [8, 16], Need(100 + 3 * 32, 0.5 + 0.25 * 32)),
        (32, 4, [2, 4], Need(100 + 3 * 8, 4 * (0.5 + 0.25 * 8))),
        (512, 1, [32, 64], Need(100 + 3 * 512, 0.5 + 0.25 * 512)),
        (1, 1, [1], Need(103, 0.75)),
    ],
)
def test_memory_and_time_of_smaller_batches_are_continued_along_a_line(batch, accumulate, sizes, need, monkeypatch):
    """A micro-batch of n takes 100 + 3·n bytes and 0.5 + n / 4 seconds, here."""
    asked: list[int] = []

    def measured(recipe: Recipe, size: int, *, trust: bool) -> Need:
        asked.append(size)
        return Need(100 + 3 * size, 0.5 + size / 4)

    monkeypatch.setattr(resident, "_measured", measured)
    assert need_of(points(batch=batch, accumulate=accumulate)) == need
    assert asked == sizes


@pytest.mark.long
def test_a_dry_run_says_what_a_process_needs(capsys):
    """Measured in processes of their own: more than torch's own bytes, and a time."""
    facts = dry_run(points(), process=True)
    assert facts["bytes_process"] > facts["bytes_peak"]
    assert 0 < facts["seconds_update"] < 60
    print_dry_run(points(), facts)
    assert re.search(r"about \S+ s here, at \S+ s an update", capsys.readouterr().out)
    print_dry_run(points(), dry_run(points()))
    assert "here, at" not in capsys.readouterr().out


@pytest.mark.long
def test_a_dry_run_says_nothing_of_its_own_and_changes_nothing():
    """The profiler would write two lines to stderr."""
    code = "from inkdrop.train.dry import dry_run\nfrom runs import points\nprint(dry_run(points())['micro_batch'])"
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    env = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**env, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr, done.returncode) == ("8\n", "", 0)


def test_what_came_before_the_look_does_not_go_in_it():
    """And what goes between two looks leaves no trace at its address."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        old = [torch.zeros(1000 + i) for i in range(50)]
    half, old = old[:25], old[25:]
    old.clear()
    again = [torch.zeros(1025 + i) for i in range(25)]  # mostly at the addresses of those that went
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        one = torch.zeros(10)
        half.clear()
        again.clear()
        two = torch.zeros(20)
        del one
    assert in_use(seen) == [40, 120, 80]
    assert len(two) == 20


def test_garbage_that_is_collected_meanwhile_is_not_counted(monkeypatch):
    trainer = Trainer(digits(batch=32), None)
    told, losses = peak_memory(trainer), trainer.losses

    def collecting(*args):
        gc.collect()
        return losses(*args)

    monkeypatch.setattr(trainer, "losses", collecting)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):  # it sees only those go that it saw come
        cycle = [torch.zeros(10**6)]
    cycle.append(cycle)
    del cycle
    assert peak_memory(trainer) == told


def test_the_fixed_part_is_twenty_bytes_a_parameter():
    facts = dry_run(replace(points(), net=Part("mlp", {"width": 8, "depth": 1})))
    assert facts["bytes_fixed"] == 20 * facts["parameters"]
    assert facts["bytes_peak"] > facts["bytes_fixed"]
    assert torch.is_grad_enabled()


GROWING = [  # the smaller batch grows mostly by libraries and weights, the larger by activations
    ({"width": 32, "multipliers": [1, 2]}, 32, {}),
    ({"width": 32, "multipliers": [1, 2]}, 128, {"precision": "bfloat16", "channels_last": True}),
    ({"width": 64, "multipliers": [1, 2, 2], "attention": [1]}, 24, {}),
    ({"width": 64, "multipliers": [1, 2, 2], "attention": [1]}, 48, {"accumulate": 2}),
]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
@pytest.mark.parametrize(("knobs", "batch", "change"), GROWING)
def test_the_growth_of_the_process_is_told(knobs, batch, change):
    """Beside a real run of two updates in a process of its own; 1 % seen."""
    recipe = digits(batch=batch, **change)
    recipe = replace(recipe, net=Part("unet", knobs))
    code = (
        "import json, sys\nfrom inkdrop.recipe import read\nfrom inkdrop.train.allocator import keeping_memory\n"
        "from inkdrop.train.trainer import Trainer\n"
        "def status(name):\n    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))\n"
        "recipe, before = read(json.load(sys.stdin)), status('VmRSS')\n"
        "with keeping_memory():\n    trainer = Trainer(recipe, None, device='cpu')\n"
        "    trainer.step(), trainer.step(), trainer.step()\nprint(status('VmHWM') - before)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(dump(recipe)),
        capture_output=True,
        text=True,
        env=env,
        check=True,
    )
    told, real = need_of(recipe).bytes, int(done.stdout)
    print(f"told {told:,}, measured {real:,}, ratio {told / real:.3f}")
    assert told == pytest.approx(real, rel=0.15)
