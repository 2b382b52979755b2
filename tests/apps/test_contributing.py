"""CONTRIBUTING's examples, put where they say they go: they lint, are found, train and sample."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n# (src/\S+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))

USE = """
import math
import torch
from inkdrop.core.ask import Ask
from inkdrop.core.cond import Terms
from inkdrop.core.noise import Draw
from inkdrop.core.oracle import Gaussian
from inkdrop.core.schedule import vp
from inkdrop.core.grid import Grid
from inkdrop.drive import drive
from inkdrop.find import build, find, names
from inkdrop.generate import sample
from inkdrop.recipe import denoiser_of, open_data

torch.manual_seed(0)
recipe = find("recipes", "stripes")()
data = open_data(recipe.data, "train")
denoiser = denoiser_of(recipe, data.shape, Terms(classes=len(data.classes)))
x0, cond = data.take(range(len(data)))
optimiser = torch.optim.AdamW(denoiser.parameters(), lr=0.01)
losses = []
for update in range(60):
    loss = build("losses", recipe.loss, denoiser, x0, cond, Draw(0, update, range(len(x0))))["loss"]
    assert loss.shape == (len(x0),)
    optimiser.zero_grad()
    loss.mean().backward()
    optimiser.step()
    losses.append(loss.mean().item())
assert losses[-1] < 0.9 * losses[0], losses
made = sample(denoiser, 4, shape=data.shape, plan=recipe.plan)
assert made.abs().max() <= 1 + 1e-6, "the bound did not hold"
torch.testing.assert_close(find("weights", "soft_snr")(torch.tensor([-20.0, 20.0])), torch.tensor([0.0, 5.0]))

schedule, oracle, errors = vp(), Gaussian(torch.full((1,), 0.7), 0.5), []
x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
for n in (64, 128):
    grid = Grid(schedule, torch.linspace(1, 0.05, n + 1, dtype=torch.float64))
    sd = [math.sqrt((float(level.alpha) * 0.5) ** 2 + float(level.sigma) ** 2) for level in (grid[0], grid[-1])]
    exact = float(grid[-1].alpha) * 0.7 + sd[1] / sd[0] * (x - float(grid[0].alpha) * 0.7)
    errors.append(float((drive(find("samplers", "ralston")(x, grid, None), oracle) - exact).abs().mean()))
assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.15, errors
"""


def with_function(module: str, code: str) -> str:
    """A module with one more function, and its name in __all__."""
    added = re.search(r"^def (\w+)", code)
    assert added is not None
    return module.replace("__all__ = [", f'__all__ = ["{added[1]}", ', 1) + "\n\n" + code


@pytest.mark.app
def test_the_examples_work(tmp_path: Path) -> None:
    assert len(BLOCKS) == 10
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    whole = [name for name, _ in BLOCKS if not (ROOT / name).exists()]
    for name, code in BLOCKS:
        path = tmp_path / name
        if name not in whole:  # a function to add to a file
            code = with_function(path.read_text(encoding="utf-8"), code)
        path.write_text(code, encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff"]
    everything = sorted({name for name, _ in BLOCKS})
    for command in (
        [*ruff, "check", "--fix", *everything],  # sorts __all__ where a name was added
        [*ruff, "format", "--check", *whole],
        [sys.executable, "-W", "error", "-c", USE],
    ):
        env = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
