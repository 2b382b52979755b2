"""The figures of the reference programs, as golden numbers that the tests hold ours to.

    bash bench/agree.sh          makes an environment of its own in build/agree and writes tests/golden/metrics.json

Run by agree.sh in that environment: pytorch-fid, torch-fidelity, clean-fid, prdc, lpips, piq and scikit-image, none of
which inkdrop needs. What they are given comes from tests/agreement.py, by numpy alone. Inception's own weights are not
needed: both sides are filled with the same keyed numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import agreement

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "pytorch-fid", "torch-fidelity", "clean-fid", "prdc")
PACKAGES += ("lpips", "piq", "scikit-image", "scikit-learn")
KEPT = slice(None, None, 16)  # of 2,048 features


def declare_operators() -> torch.library.Library:
    """Declare torchvision's own operators, none of which is used here: its wheel for CUDA cannot load them on a CPU."""
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    named = re.findall(r'register_\w+\("(?:torchvision::)?(\w+)"', (folder / "_meta_registrations.py").read_text())
    declared = torch.library.Library("torchvision", "DEF")
    for name in sorted(set(named)):
        declared.define(f"{name}(Tensor x) -> Tensor")
    return declared


def distances() -> dict:
    """FID, precision, recall, density and coverage of each set of features."""
    from prdc import compute_prdc
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    found = {}
    for name in agreement.SETS:
        real, made = agreement.features(name)
        ours = [(x.mean(0), np.cov(x, rowvar=False)) for x in (real, made)]
        theirs = [fid_features_to_statistics(torch.from_numpy(x)) for x in (real, made)]
        with contextlib.redirect_stdout(io.StringIO()):
            found[name] = {
                "pytorch_fid": float(calculate_frechet_distance(*ours[0], *ours[1])),
                "torch_fidelity": fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"],
                **{f"prdc_{k}": {n: float(v) for n, v in compute_prdc(real, made, k).items()} for k in (3, 5)},
            }
    return found


def kernel() -> dict:
    """KID over given subsets."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, made = agreement.features("narrow")
    draws = np.random.RandomState(7)
    rows = [[draws.choice(len(x), 60, replace=False).tolist() for x in (real, made)] for _ in range(12)]
    found = kid_features_to_metric(
        *(torch.from_numpy(x) for x in (real, made)), kid_subsets=12, kid_subset_size=60, rng_seed=7, verbose=False
    )
    return {"rows": rows, **found}


def inception_score() -> dict:
    from torch_fidelity.metric_isc import isc_features_to_metric

    scores = torch.from_numpy(agreement.logits())
    return {str(n): isc_features_to_metric(scores, splits=n, shuffle=False) for n in (1, 10)}


def resizing() -> dict:
    """clean-fid's resizing of the fixed pictures: a coarse lattice of its pixels, and the sum of all."""
    from cleanfid.resize import build_resizer

    resize, found = build_resizer("clean"), {}
    for name in agreement.PICTURES:
        pixels = np.array(Image.open(agreement.GOLDEN / f"{name}.png"))
        pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
        out = resize(pixels)
        found[name] = {"lattice": out[7::41, 5::41].tolist(), "sum": float(out.astype(np.float64).sum())}
    return found


def reconstruction() -> dict:
    """SSIM by piq and scikit-image, PSNR by scikit-image, and the perceptual distance by lpips without its weights."""
    import lpips
    import piq
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    distance = lpips.LPIPS(pretrained=False, net="alex", pnet_rand=True, lpips=False, verbose=False)
    state = distance.net.state_dict()
    filled = agreement.weights({name: tuple(value.shape) for name, value in state.items()})
    distance.net.load_state_dict({name: torch.from_numpy(value) for name, value in filled.items()})
    found = {}
    for name in ("odd", "large"):
        pixels = np.array(Image.open(agreement.GOLDEN / f"{name}.png"))
        other = agreement.blurred(pixels)
        x, y = (torch.from_numpy(p.astype(np.float64)).permute(2, 0, 1)[None] for p in (pixels, other))
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        found[name] = {
            "piq": float(piq.ssim(x / 255, y / 255, downsample=False)),
            "skimage": float(structural_similarity(pixels, other, channel_axis=2, data_range=255, **window)),
            "psnr": float(peak_signal_noise_ratio(pixels, other, data_range=255)),
            "lpips": float(distance((x / 127.5 - 1).float(), (y / 127.5 - 1).float()).detach()),
        }
    return found


def inception() -> dict:
    """Features and scores of Inception-v3 filled with keyed numbers, by the code of three programs."""
    import pytorch_fid.inception as theirs
    from cleanfid.resize import build_resizer
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    shapes = {}

    def state(*_: object, **__: object) -> dict:
        bare = theirs._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        shapes.update({name: tuple(value.shape) for name, value in bare.state_dict().items()})
        return {name: torch.from_numpy(value) for name, value in agreement.weights(shapes).items()}

    theirs.load_state_dict_from_url = state
    net = theirs.InceptionV3([3], resize_input=True, normalize_input=True).eval()
    bare = theirs.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state(), Path(folder) / "weights.pth")
        fidelity = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(Path(folder) / "weights.pth"),
        )
    found: dict = {"keys": sorted(name for name in shapes if not name.endswith("tracked"))}
    for name in ("odd", "large", "side"):
        pixels = np.array(Image.open(agreement.GOLDEN / f"{name}.png"))
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        clean = torch.from_numpy(build_resizer("clean")(pixels)).permute(2, 0, 1)[None]
        with torch.no_grad():
            found[name] = {
                "pytorch-fid": net(x / 255)[0].flatten()[KEPT].tolist(),
                "clean": bare((clean - 128) / 128)[0].flatten()[KEPT].tolist(),
            }
            if name == "side":  # torch-fidelity resizes as TensorFlow does; at 299 nothing is resized
                features, scores = fidelity(x)
                found["torch_fidelity"] = {
                    "features": features.flatten()[KEPT].tolist(),
                    "probabilities": scores.softmax(1).flatten()[KEPT].tolist(),
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=agreement.GOLDEN)
    out = parser.parse_args().out
    declared = declare_operators()
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    for name in agreement.PICTURES:
        pixels = agreement.picture(name)
        Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(out / f"{name}.png", optimize=True)
    figures = {
        "command": "bash bench/agree.sh",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "distances": distances(),
        "kernel": kernel(),
        "inception_score": inception_score(),
        "resizing": resizing(),
        "reconstruction": reconstruction(),
        "inception": inception(),
    }
    (out / "metrics.json").write_text(json.dumps(figures, indent=None, separators=(", ", ": ")) + "\n")
    del declared
    print(f"wrote {out / 'metrics.json'}")


if __name__ == "__main__":
    main()
