"""R6: the reference programs' figures on the same features and pictures, as bench/agree.sh wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

import agreement
from inkdrop.evals.frechet import Moments, frechet
from inkdrop.evals.inception import Inception
from inkdrop.evals.inception_net import InceptionNet
from inkdrop.evals.inception_score import InceptionScore
from inkdrop.evals.interval import parts_of
from inkdrop.evals.kid import kid, subset_mmd
from inkdrop.evals.perceptual import maps_of, perceptual
from inkdrop.evals.prdc import prdc
from inkdrop.evals.psnr import psnr
from inkdrop.evals.resize import clean, to_rgb
from inkdrop.evals.ssim import ssim

THEIRS: dict[str, Any] = json.loads((agreement.GOLDEN / "metrics.json").read_text())


def both(name: str) -> tuple[Tensor, Tensor]:
    real, made = (torch.from_numpy(x) for x in agreement.features(name))
    return real, made


def picture(name: str) -> Tensor:
    """A picture of the folder, (1, C, H, W) in [-1, 1]."""
    pixels = np.array(Image.open(agreement.GOLDEN / f"{name}.png"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.parametrize("name", agreement.SETS)
def test_fid_is_theirs(name: str) -> None:
    """pytorch-fid and torch-fidelity take roots of a product that is not symmetric; R6 asks for 0.1 %.

    Without full rank ("flat") theirs is inexact: sqrtm of a singular product is regularised or loses half the digits.
    """
    moments = [Moments(x.shape[1]) for x in both(name)]
    for each, x in zip(moments, both(name), strict=True):
        for part in x.split(57):
            each.update(part)
    ours = frechet(moments[0].mean, moments[0].cov, moments[1].mean, moments[1].cov)
    rel = 1e-4 if name == "flat" else 1e-8
    for program in ("pytorch_fid", "torch_fidelity"):
        assert ours == pytest.approx(THEIRS["distances"][name][program], rel=rel), program


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("name", agreement.SETS)
def test_precision_recall_density_and_coverage_are_those_of_prdc(name: str, k: int) -> None:
    real, made = both(name)
    found = prdc(real, made, k=k)._asdict()
    want = THEIRS["distances"][name][f"prdc_{k}"]
    assert found == pytest.approx({**want, "k": k}, rel=1e-12)
    assert 0 < want["precision"] < 1 or name == "flat"  # the sets overlap in part, so that no figure is trivial


def test_kid_is_that_of_torch_fidelity_on_the_same_subsets() -> None:
    """Mean and spread over the very rows that it drew; and ours over rows of our own is near by."""
    real, made = both("narrow")
    theirs = THEIRS["kernel"]
    values = torch.tensor([subset_mmd(real[a], made[b]) for a, b in theirs["rows"]], dtype=torch.float64)
    assert float(values.mean()) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert float(values.std(correction=0)) == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-8)
    own = kid(real, made, subsets=100, size=60)
    apart = abs(own.mean - float(values.mean()))
    assert apart < 4 * float(values.std()) * (1 / 12 + 1 / 100) ** 0.5


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_is_that_of_torch_fidelity(splits: int) -> None:
    """It cuts the stream into runs, ours deals it out: the rows are put so that both have the same parts."""
    p = torch.from_numpy(agreement.logits()).softmax(1)
    score = InceptionScore(p.shape[1], splits=splits)
    runs = [iter(rows) for rows in p.chunk(splits)]
    for part in torch.stack([next(runs[split]) for split in parts_of(len(p), splits, 0).tolist()]).split(31):
        score.update(part)
    theirs = THEIRS["inception_score"][str(splits)]
    assert score.report().mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert score.report().std == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", agreement.PICTURES)
def test_resizing_is_that_of_clean_fid(name: str) -> None:
    """Bit for bit, on files of grey and colour that are enlarged, shrunk and left alone."""
    found = clean(to_rgb(picture(name)), 299)[0].permute(1, 2, 0)
    theirs = THEIRS["resizing"][name]
    assert_close(found[7::41, 5::41], torch.tensor(theirs["lattice"]), rtol=0, atol=0)
    assert float(found.double().sum()) == pytest.approx(theirs["sum"], rel=1e-12)


@pytest.mark.parametrize("name", ["odd", "large"])
def test_reconstruction_is_that_of_piq_skimage_and_lpips(name: str) -> None:
    x = picture(name)
    pixels = np.array(Image.open(agreement.GOLDEN / f"{name}.png"))
    y = torch.from_numpy(agreement.blurred(pixels)).permute(2, 0, 1)[None] / 127.5 - 1
    theirs = THEIRS["reconstruction"][name]
    assert float(ssim(x, y)) == pytest.approx(theirs["piq"], rel=1e-5)  # float32 pixels on our side
    assert float(ssim(x, y)) == pytest.approx(theirs["skimage"], rel=1e-5)
    assert float(psnr(x, y)) == pytest.approx(theirs["psnr"], rel=1e-5)
    assert float(perceptual(maps_of(alexnet()), x, y)) == pytest.approx(theirs["lpips"], rel=1e-4)


class Scaling(nn.Module):
    """What lpips does to an image first."""

    def forward(self, x: Tensor) -> Tensor:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        return (x - shift.view(3, 1, 1)) / scale.view(3, 1, 1)


def alexnet() -> nn.Sequential:
    """The trunk of lpips with the numbers that agree.py filled it with."""
    widths = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
    layers, names = [Scaling()], ["slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10"]
    for i, (sizes, name) in enumerate(zip(widths, names, strict=True)):
        conv = nn.Conv2d(*sizes)
        filled = agreement.weights({f"{name}.{part}": tuple(p.shape) for part, p in conv.state_dict().items()})
        conv.load_state_dict({part.rpartition(".")[2]: torch.from_numpy(value) for part, value in filled.items()})
        layers += [nn.MaxPool2d(3, 2), conv, nn.ReLU()] if i in (1, 2) else [conv, nn.ReLU()]
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights under pytorch-fid's names, filled with the numbers that agree.py gave to its net."""
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    shapes = {name: tuple(value.shape) for name, value in InceptionNet().state_dict().items()}
    torch.save({name: torch.from_numpy(value) for name, value in agreement.weights(shapes).items()}, file)
    return file


def test_inception_has_the_names_of_pytorch_fid() -> None:
    ours = [name for name in InceptionNet().state_dict() if not name.endswith("tracked")]
    assert sorted(ours) == THEIRS["inception"]["keys"]


@pytest.mark.parametrize("name", ["odd", "large", "side"])
@pytest.mark.parametrize("resize", ["clean", "pytorch-fid"])
def test_inception_is_that_of_pytorch_fid_and_clean_fid(name: str, resize: Any, weights: Path) -> None:
    """The same features from the same file of pixels, preprocessing included; float32 in another order of sums."""
    x = picture(name)
    found = Inception(tuple(x.shape[1:]), weights, resize=resize)(x)
    want = torch.tensor(THEIRS["inception"][name][resize])
    assert_close(found[0, ::16], want, rtol=1e-3, atol=1e-3 * float(want.std()))


def test_inception_scores_are_those_of_torch_fidelity(weights: Path) -> None:
    x = picture("side")
    net = Inception((3, 299, 299), weights)
    theirs = THEIRS["inception"]["torch_fidelity"]
    want = torch.tensor(theirs["features"])
    assert_close(net(x)[0, ::16], want, rtol=1e-3, atol=1e-3 * float(want.std()))
    read = net.read(net(x))
    assert_close(read[0, ::16], torch.tensor(theirs["probabilities"]), rtol=1e-2, atol=1e-9)
    assert float(read.sum()) == pytest.approx(1, abs=1e-5)
