"""The examples: each is run as a user runs it, in quick mode, and its pictures are decoded and checked.

A quick run trains for seconds, so its samples are noise; what can be checked is that every panel is what its name says:
the same start noise, this sampler, this model. How good the full runs are is checked by the tests marked slow.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

import inkdrop
from inkdrop.core.noise import normal
from inkdrop.picture import to_bytes

pytestmark = pytest.mark.app

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BASELINES = ("gan", "pixelcnn", "vae")
PROGRAMS = ("circles", "ddpm_vs_ddim", "first_model", "forward_process", "linear_vs_cosine", "numpy_1d", *BASELINES)
GUIDE = ROOT / "docs" / "guides" / "examples.md"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def start(*command: str, cwd: Path, **env: str) -> str:
    """What a Python program prints; warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=cwd,
        env=ENV | env,
        capture_output=True,
        text=True,
        timeout=3600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def quick(name: str, cwd: Path) -> str:
    """Run an example in quick mode; its pictures are in cwd/out."""
    return start(str(EXAMPLES / f"{name}.py"), "--quick", cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all examples run: the run of first_model is found again by ddpm_vs_ddim."""
    return tmp_path_factory.mktemp("examples")


def tiles(sheet: Image.Image, side: int, rows: int, columns: int, *, scale: int, left: int = 0, top: int = 0) -> Tensor:
    """The images of a sheet, (rows·columns, 1, side, side) uint8; its size, gaps and enlargement are checked."""
    pitch = side + 1
    width, height = (columns * pitch + 1) * scale, (rows * pitch + 1) * scale
    assert sheet.width >= left + width
    assert sheet.height == top + height
    pixels = np.asarray(sheet)[top:, left : left + width]
    small = pixels[::scale, ::scale]
    np.testing.assert_array_equal(pixels, small.repeat(scale, 0).repeat(scale, 1))
    assert (small[::pitch] == 255).all()
    assert (small[:, ::pitch] == 255).all()
    inside = small[1:, 1:].reshape(rows, pitch, columns, pitch)[:, :side, :, :side]
    return torch.from_numpy(inside.transpose(0, 2, 1, 3).reshape(-1, 1, side, side).copy())


def assert_drawn(drawn: Tensor, x: Tensor) -> None:
    """The pictures show x: to one grey level, for the last bits of a sum may differ between processes."""
    assert drawn.shape == x.shape
    assert int((drawn.int() - to_bytes(x).int()).abs().max()) <= 1
    assert float(drawn.float().std()) > 20  # of 255: something is to be seen


def start_noise(count: int, side: int, seed: int) -> Tensor:
    return normal((count, 1, side, side), seed, range(count), 0).float()


# ---- the house's rules for examples ------------------------------------------------------------------------------


def notebook() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((EXAMPLES / "mnist.ipynb").read_text(encoding="utf-8"))
    return content


def test_every_example_is_tested_and_in_the_guide() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert files == {f"{name}.py" for name in PROGRAMS} | {"mnist.ipynb"}
    named = set(re.findall(r"^\| `(\S+)`", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
    assert named == files


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_has_at_most_80_lines(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 80


def test_the_notebook_is_short_and_committed_without_outputs() -> None:
    code = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    assert sum(len("".join(cell["source"]).splitlines()) for cell in code) <= 80
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}
    assert [cell["metadata"] for cell in notebook()["cells"]] == [{}] * len(notebook()["cells"])


def test_numpy_1d_is_pure_numpy() -> None:
    text = (EXAMPLES / "numpy_1d.py").read_text(encoding="utf-8")
    origins = re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)
    assert set(origins) - set(sys.stdlib_module_names) == {"matplotlib", "numpy"}


# ---- pictures ----------------------------------------------------------------------------------------------------


def test_first_model(folder: Path) -> None:
    """The grid shows 100 samples of the model in the run folder, digit c in column c."""
    said = quick("first_model", folder)
    model = inkdrop.load(folder / "out" / "digits-quick")
    assert f"{model.card['updates']} updates on 1437 digits" in said
    x = inkdrop.sample(model, 100, seed=0, label=[c for _ in range(10) for c in range(10)])
    assert_drawn(tiles(Image.open(folder / "out" / "first_model.png"), 8, 10, 10, scale=8), x)


def test_forward_process(folder: Path) -> None:
    """The printed levels are the closed forms, and the pictures are alpha·x0 + sigma·eps with one x0 and one eps."""
    said = quick("forward_process", folder)
    times = np.array([0, 100, 250, 500, 750, 1000])
    k = np.arange(1001) / 1000
    cosine = np.cos((k + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = {
        "linear": np.linspace(1e-4, 0.02, 1000),
        "cosine": np.minimum(1 - cosine[1:] / cosine[:-1], 0.999),
    }
    drawn = tiles(Image.open(folder / "out" / "forward_process.png"), 32, 2, 6, scale=4, left=60, top=20)
    values = drawn.double() / 127.5 - 1
    x0, eps = values[0], values[11]  # clean; and the end of the cosine schedule, where alpha is 5e-5
    seen = eps.abs() < 0.99  # beyond it the picture is clipped
    assert 0.6 < float(seen.double().mean()) < 0.75  # P(|z| < 0.99) = 0.678
    for row, (name, beta) in enumerate(betas.items()):
        abar = np.concatenate([[1], np.cumprod(1 - beta)])[times]
        lines = re.findall(rf"^{name} +(\d+) +(\S+) +(\S+) +(\S+)$", said, re.MULTILINE)
        table = np.array(lines, dtype=float)
        np.testing.assert_array_equal(table[:, 0], times)
        np.testing.assert_allclose(table[:, 1], np.sqrt(abar), atol=6e-5)  # printed to four digits
        np.testing.assert_allclose(table[:, 2], np.sqrt(1 - abar), atol=6e-5)
        np.testing.assert_allclose(table[1:, 3], np.log(abar[1:] / (1 - abar[1:])), atol=6e-4)
        assert table[0, 3] == np.inf
        for column, a in enumerate(abar):
            expected = (a**0.5 * x0 + (1 - a) ** 0.5 * eps).clamp(-1, 1)
            assert float((values[6 * row + column] - expected)[seen].abs().max()) <= 2 / 127.5  # roundings of three
    plots = np.asarray(Image.open(folder / "out" / "schedules.png").convert("RGB")).reshape(-1, 3)
    for colour in ((31, 119, 180), (255, 127, 14)):  # a curve of each schedule
        assert int((plots == colour).all(1).sum()) > 500


def test_ddpm_vs_ddim(folder: Path) -> None:
    """Four rows from one start noise: itself, DDPM, DDIM 50 and DDIM 10; the two DDIMs are near one another."""
    said = quick("ddpm_vs_ddim", folder)
    drawn = tiles(Image.open(folder / "out" / "ddpm_vs_ddim.png"), 8, 4, 10, scale=8, left=100)
    model = inkdrop.load(folder / "out" / "digits-quick")
    ways = (("ddpm", 100), ("ddim", 50), ("ddim", 10))
    rows = [start_noise(10, 8, 0), *(inkdrop.sample(model, 10, seed=0, sampler=s, steps=n) for s, n in ways)]
    for row, x in zip(drawn.split(10), rows, strict=True):
        assert_drawn(row, x)
    to_ddpm, to_ddim = ((x - rows[2]).abs().mean() for x in (rows[1], rows[3]))
    assert to_ddpm > 3 * to_ddim > 0
    printed = [float(number) for number in re.findall(r"0\.\d{3}", said.split("mean change")[1])]
    assert printed == pytest.approx([float(to_ddpm), float(to_ddim)], abs=1e-3)


def test_linear_vs_cosine(folder: Path) -> None:
    """Two runs that differ in their schedule alone, each sampled in 10 steps from the same noise."""
    said = quick("linear_vs_cosine", folder)
    runs = {name: folder / "out" / f"{name}-quick" for name in ("linear", "cosine")}
    recipes = {name: json.loads((run / "recipe.json").read_text(encoding="utf-8")) for name, run in runs.items()}
    assert {name: recipe.pop("schedule")["name"] for name, recipe in recipes.items()} == {n: n for n in runs}
    assert recipes["linear"] == recipes["cosine"]
    models = {name: inkdrop.load(run) for name, run in runs.items()}
    assert {model.card["updates"] for model in models.values()} == {recipes["linear"]["train"]["steps"]}
    drawn = tiles(Image.open(folder / "out" / "linear_vs_cosine.png"), 8, 3, 20, scale=6, left=130).split(20)
    assert_drawn(drawn[0], start_noise(20, 8, 0))
    for row, (name, model) in zip(drawn[1:], models.items(), strict=True):
        x = inkdrop.sample(model, 40, seed=0, sampler="ddim", steps=10, guidance=1)
        assert_drawn(row, x[:20])
        assert f"{name}: contrast {x.std():.3f} in 10 steps" in said
    assert float((drawn[1].float() - drawn[2].float()).abs().mean()) > 2  # of 255


def test_circles(folder: Path) -> None:
    """Three panels from one start noise; the printed roundness knows discs from noise."""
    said = quick("circles", folder)
    page = Image.open(folder / "out" / "circles.png")
    model = inkdrop.load(folder / "out" / "circles-quick")
    panels = [start_noise(16, 16, 0)]
    panels += [inkdrop.sample(model, 16, seed=0, sampler=s, steps=n) for s, n in (("ddpm", 100), ("ddim", 50))]
    width = page.width // 3
    for i, x in enumerate(panels):
        assert_drawn(tiles(page, 16, 4, 4, scale=4, left=i * width, top=20), x)
    assert float((panels[1] - panels[2]).abs().mean()) > 0.05
    round_ = [float(number) for number in re.findall(r": (\d\.\d{3})$", said, re.MULTILINE)]
    real = re.search(r"drawn by formula (\S+)", said)
    assert real is not None
    assert 0.95 < float(real[1]) <= 1
    assert max(round_) < 0.6


# ---- the other families ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_trains_and_saves_its_samples(name: str, folder: Path) -> None:
    """The samples are in [-1, 1], the picture shows the first of them, and a seed says all."""
    for out in ("one", "two"):
        start(str(EXAMPLES / f"{name}.py"), "--steps", "12", "--samples", "20", "--out", out, cwd=folder)
    x, again = (np.load(folder / out / f"{name}.npy", allow_pickle=False) for out in ("one", "two"))
    assert (x.shape, x.dtype) == ((20, 1, 8, 8), np.float32)
    assert float(np.abs(x).max()) <= 1
    np.testing.assert_array_equal(x, again)
    facts = json.loads((folder / "one" / f"{name}.json").read_text(encoding="utf-8"))
    assert facts["updates"] == 12
    assert 10_000 < facts["parameters"] < 600_000
    assert min(facts["training"], facts["sampling"]) > 0
    with Image.open(folder / "one" / f"{name}.png") as sheet:
        assert sheet.size[0] > 8


def test_pixelcnn_looks_back_only_and_its_crop_is_exact(tmp_path: Path) -> None:
    """The answer for a pixel depends on the pixels before it alone, and is the same from the crop that is drawn."""
    done = start("-c", LOOK, str(EXAMPLES / "pixelcnn.py"), "--steps", "3", "--samples", "2", cwd=tmp_path)
    assert done.splitlines()[-1] == "looks back"


LOOK = """
import runpy, sys, torch
sys.argv = sys.argv[1:]
kept = runpy.run_path(sys.argv[0], run_name="__main__")
answer, reach = kept["logits_of"], kept["REACH"]
draws = torch.Generator().manual_seed(0)
x = torch.randint(16, (1, 28, 28), generator=draws)
with torch.no_grad():
    whole = answer(x)
    for i, j in ((0, 0), (5, 3), (14, 14), (27, 27), (20, 26), (13, 1)):
        crop = x[:, max(0, i - reach) : i + 1, max(0, j - reach) : j + reach + 1]
        torch.testing.assert_close(answer(crop)[:, :, min(i, reach), min(j, reach)], whole[:, :, i, j])
        other = x.clone()
        other.view(1, -1)[:, 28 * i + j :] = torch.randint(16, (1, 784 - 28 * i - j), generator=draws)
        torch.testing.assert_close(answer(other)[:, :, i, j], whole[:, :, i, j], rtol=0, atol=0)
        if j:
            other = x.clone()
            other[0, i, j - 1] = 15 - other[0, i, j - 1]
            assert (answer(other)[:, :, i, j] != whole[:, :, i, j]).any()
print("looks back")
"""


# ---- NumPy alone -------------------------------------------------------------------------------------------------

KEEP = """
import runpy, sys, numpy
sys.argv = [sys.argv[1], *sys.argv[2:]]
kept = runpy.run_path(sys.argv[0], run_name="__main__")
numpy.savez("kept.npz", data=kept["data"], made=kept["made"], losses=kept["losses"])
"""


@pytest.fixture(scope="module")
def numpy_1d() -> ModuleType:
    spec = importlib.util.spec_from_file_location("numpy_1d", EXAMPLES / "numpy_1d.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numpy_1d_gradient_is_that_of_finite_differences(numpy_1d: ModuleType) -> None:
    rng = np.random.default_rng(3)
    net, _ = numpy_1d.train(rng, 0, sizes=((33, 6), (6, 5), (5, 1)))
    net = [part + 0.3 * rng.standard_normal(part.shape) for part in net]  # biases start at 0: try others
    x, t, eps = rng.standard_normal(9), rng.integers(0, numpy_1d.T, 9), rng.standard_normal(9)
    loss, grads = numpy_1d.loss_and_gradient(net, x, t, eps)
    assert loss == pytest.approx(np.mean((numpy_1d.guess(net, x, t)[0] - eps) ** 2), rel=1e-12)
    h = 1e-5  # central differences: error of order h², 1e-10
    for part, grad in zip(net, grads, strict=True):
        assert grad.shape == part.shape
        for index in np.ndindex(part.shape):
            kept = part[index]
            sides = []
            for sign in (1, -1):
                part[index] = kept + sign * h
                sides.append(numpy_1d.loss_and_gradient(net, x, t, eps)[0])
            part[index] = kept
            assert grad[index] == pytest.approx((sides[0] - sides[1]) / (2 * h), abs=1e-7)


def test_numpy_1d_sampler_turns_the_ideal_guess_into_the_data(
    numpy_1d: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With E[eps | x_t] in closed form for the net, ancestral sampling gives the mixture."""
    m, s, p = numpy_1d.MEANS, numpy_1d.STDS, numpy_1d.SHARES

    def ideal(net: Any, x: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, None]:
        abar = numpy_1d.ABAR[t][:, None]
        var, gap = abar * s**2 + 1 - abar, x[:, None] - np.sqrt(abar) * m
        weight = p * np.exp(-(gap**2) / (2 * var)) / np.sqrt(var)
        return (weight * np.sqrt(1 - abar) * gap / var).sum(1) / weight.sum(1), None

    monkeypatch.setattr(numpy_1d, "guess", ideal)
    made = numpy_1d.sample(None, np.random.default_rng(0), 4000)
    data = numpy_1d.draw(np.random.default_rng(1), 4000)
    assert stats.wasserstein_distance(made, data) < 0.05  # two sets of real numbers: 0.022 ± 0.008


def test_numpy_1d_learns_the_mixture(numpy_1d: ModuleType, folder: Path) -> None:
    """Quick: nearer to the data than half of the distance of the one Gaussian with their mean and variance."""
    said = start("-c", KEEP, str(EXAMPLES / "numpy_1d.py"), "--quick", cwd=folder)
    with np.load(folder / "kept.npz", allow_pickle=False) as kept:
        data, made, losses = kept["data"], kept["made"], kept["losses"]
    far, floor = (float(number) for number in re.findall(r"(?:data|numbers) (\d+\.\d{4})", said))
    assert far == pytest.approx(stats.wasserstein_distance(made, data), abs=1e-4)
    assert 0.005 < floor < 0.05
    mixture = lambda x: sum(p * stats.norm.cdf(x, m, s) for m, s, p in zip(*parts, strict=True))  # noqa: E731
    parts = (numpy_1d.MEANS, numpy_1d.STDS, numpy_1d.SHARES)
    assert stats.kstest(data, mixture).pvalue > 1e-3
    rng = np.random.default_rng(0)
    gaussian = stats.wasserstein_distance(data.mean() + data.std() * rng.standard_normal(len(data)), data)
    untrained = stats.wasserstein_distance(numpy_1d.sample(numpy_1d.train(rng, 0)[0], rng, 500), data)
    assert far < gaussian / 2 < 0.15
    assert far < untrained / 5
    assert losses[-100:].mean() < 0.3 < losses[:10].mean()
    picture = np.asarray(Image.open(folder / "out" / "numpy_1d.png").convert("RGB"))
    assert picture.shape[:2] == (396, 1430)
    assert int((picture.reshape(-1, 3) == (255, 127, 14)).all(1).sum()) > 2000  # the bars of the samples


# ---- the notebook ------------------------------------------------------------------------------------------------


def run_notebook(cwd: Path) -> list[dict[str, Any]]:
    """The code cells after execution."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(EXAMPLES / "mnist.ipynb", as_version=4)
    place = {"metadata": {"path": str(cwd)}}
    NotebookClient(book, timeout=600, kernel_name="python3", resources=place).execute()
    return [cell for cell in book.cells if cell.cell_type == "code"]


def shown(cell: dict[str, Any]) -> Image.Image:
    """The picture that a cell shows."""
    [data] = [o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs without MNIST; the digits emerge from their start noise to what `sample` gives."""
    monkeypatch.setenv("INKDROP_QUICK", "1")
    monkeypatch.delenv("INKDROP_MNIST", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = run_notebook(folder)
    assert all(cell["execution_count"] for cell in cells)
    by_code = {key: next(c for c in cells if key in c["source"]) for key in ("take(", "in inkdrop.steps", "guesses[i]")}
    real, _ = inkdrop.open_data(inkdrop.Part("digits"), "train").take(range(20))
    assert_drawn(tiles(shown(by_code["take("]), 8, 2, 10, scale=8), real)
    model = inkdrop.load(folder / "out" / "notebook-digits-quick")
    states = tiles(shown(by_code["in inkdrop.steps"]), 8, 7, 10, scale=8).split(10)
    guesses = tiles(shown(by_code["guesses[i]"]), 8, 7, 10, scale=8).split(10)
    assert_drawn(states[0], start_noise(10, 8, 1))
    result = inkdrop.sample(model, 10, seed=1, steps=50)
    assert_drawn(states[-1], result)
    assert_drawn(guesses[-1], result)
    assert float((guesses[0].float() - guesses[-1].float()).abs().mean()) > 2


def test_notebook_reads_a_folder_of_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With INKDROP_MNIST the first cells open that folder, and say so where it is wrong."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        head = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels.tobytes())
    code = ["".join(cell["source"]) for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    seen: dict[str, Any] = {}
    monkeypatch.setenv("INKDROP_MNIST", str(tmp_path))
    exec("\n".join(code[:2]), seen)  # noqa: S102
    assert (len(seen["data"]), seen["data"].shape, seen["part"].name) == (24, (1, 28, 28), "mnist")
    first = np.frombuffer((tmp_path / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(24, 1, 28, 28)
    assert_drawn(torch.from_numpy(first[:20].copy()), seen["real"])
    monkeypatch.setenv("INKDROP_MNIST", str(tmp_path / "absent"))
    with pytest.raises(inkdrop.InkdropError, match="no such folder"):
        exec(code[0], {})  # noqa: S102


# ---- full runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_full_circles_are_round(tmp_path: Path) -> None:
    said = start(str(EXAMPLES / "circles.py"), cwd=tmp_path)
    _, ddpm, ddim = (float(number) for number in re.findall(r": (\d\.\d{3})$", said, re.MULTILINE))
    assert min(ddpm, ddim) > 0.9  # 1 is a disc; a square has 3/π = 0.955, two discs that touch 0.67


@pytest.mark.slow
def test_full_numpy_1d_is_near_the_floor(tmp_path: Path) -> None:
    said = start(str(EXAMPLES / "numpy_1d.py"), cwd=tmp_path)
    far, floor = (float(number) for number in re.findall(r"(?:data|numbers) (\d+\.\d{4})", said))
    assert far < 2.5 * max(floor, 0.012)
