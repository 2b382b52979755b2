"""Draw the pictures of docs/guides/editing.md with a model of MNIST.

    python scripts/edit_pictures.py runs/mnist out          # every picture, into the folder out
    python scripts/edit_pictures.py runs/mnist out vary     # one of them

The pictures are the first of each digit in the test set of the run's data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from inkdrop import load
from inkdrop.bundle import Bundle
from inkdrop.edit_jobs import padded
from inkdrop.editing import (
    decode,
    img2img,
    inpaint,
    interpolate,
    interpolate_seeds,
    invert,
    operator_of,
    outpaint,
    restore,
    vary,
)
from inkdrop.find import Part
from inkdrop.picture import grid
from inkdrop.recipe import open_data

Rows = list[tuple[str, Tensor]]


def _inpaint(model: Bundle, x: Tensor) -> Rows:
    keep = torch.ones(1, 28, 28, dtype=torch.bool)
    keep[:, 14:] = False
    told = inpaint(model, x, keep, steps=100, resample=10, label=list(range(10)), guidance=2.0)
    return [
        ("given", torch.where(keep, x, torch.zeros(()))),
        ("replacement", inpaint(model, x, keep, steps=100)),
        ("RePaint,\n10 passes", inpaint(model, x, keep, steps=100, resample=10)),
        ("RePaint, told\nits class", told),
    ]


def _outpaint(model: Bundle, x: Tensor) -> Rows:
    x = x[[7, 2, 4]]
    return [
        ("given", padded(x, left=28, right=28, top=0, bottom=0)),
        ("whole canvas", outpaint(model, x, left=28, right=28, steps=100, resample=10)),
        ("windows,\n14 apart", outpaint(model, x, left=28, right=28, steps=100, resample=10, windows=True, stride=14)),
    ]


def _img2img(model: Bundle, x: Tensor) -> Rows:
    strengths = (0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1)

    def row(digit: int) -> Tensor:
        return torch.cat([img2img(model, x[[digit]], strength=s, steps=50, seed=1) for s in strengths])

    def told(digit: int, label: int) -> Tensor:
        each = [img2img(model, x[[digit]], strength=s, steps=50, seed=1, label=label, guidance=2.0) for s in strengths]
        return torch.cat(each)

    return [("", row(2)), ("", row(5)), ("as a 9", told(4, 9)), ("as a 7", told(1, 7))]


def _interpolate(model: Bundle, x: Tensor) -> Rows:
    a, b = x[[7]], x[[9]]
    return [
        ("inversion, depth 1", interpolate(model, a, b, count=10, steps=50)[0]),
        ("inversion, depth 0.7", interpolate(model, a, b, count=10, steps=50, depth=0.7)[0]),
        ("noise, depth 0.7", interpolate(model, a, b, count=10, steps=50, depth=0.7, via="noise", seed=3)[0]),
        ("seeds 1 and 2\nof class 3", interpolate_seeds(model, (1, 2), count=10, steps=50, label=3)[0]),
    ]


def _vary(model: Bundle, x: Tensor) -> Rows:
    x = x[[5]]
    by_strength = [
        (f"strength {s}", torch.cat([x, vary(model, x, count=9, strength=s, steps=50)[0]])) for s in (0.5, 0.7, 0.85)
    ]
    by_eta = [
        (f"eta {eta:g}", torch.cat([x, vary(model, x, count=9, strength=1.0, eta=eta, steps=50)[0]]))
        for eta in (0.3, 0.6, 1.0)
    ]
    return [*by_strength, *by_eta]


def _invert(model: Bundle, x: Tensor) -> Rows:
    noise = invert(model, x, steps=100)
    of_class = invert(model, x, steps=100, label=list(range(10)))
    decoded = [(f"decoded as {label}", decode(model, of_class, steps=100, label=label)) for label in (0, 8)]
    return [("data", x), ("noise", noise / 3), ("round trip", decode(model, noise, steps=100)), *decoded]


def _restore(model: Bundle, x: Tensor) -> Rows:
    rows: Rows = []
    parts = (Part("superresolve", {"factor": 4}), Part("blur", {"std": 2.0}), Part("mask", {"box": (8, 8, 12, 12)}))
    for part in parts:
        operator, noise_std = operator_of(part, model.shape), 0.02 if part.name == "blur" else 0.0
        y = operator.apply(x)
        y = y + noise_std * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        rows += [
            ("data", x),
            ("measured", operator.inverse(y) if part.name == "superresolve" else y),
            ("ddnm", restore(model, y, part, steps=100, sampler="ddpm", noise_std=noise_std)),
            ("pigdm", restore(model, y, part, method="pigdm", steps=100, noise_std=noise_std)),
        ]
    return rows


PICTURES: dict[str, Callable[[Bundle, Tensor], Rows]] = {
    "img2img": _img2img,
    "inpaint": _inpaint,
    "interpolate": _interpolate,
    "invert": _invert,
    "outpaint": _outpaint,
    "restore": _restore,
    "vary": _vary,
}


def sheet(rows: Rows) -> Image.Image:
    """Rows of pictures (N, 1, H, W), each with its name at the left."""
    font = ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 13)
    drawn = [grid(x.clamp(-1, 1), columns=len(x), scale=2) for _, x in rows]
    left = 14 + int(max(font.getlength(line) for name, _ in rows for line in name.split("\n")))
    size = (left + max(p.width for p in drawn), sum(p.height + 4 for p in drawn) - 4)
    page, y = Image.new("L", size, 255), 0
    for (name, _), picture in zip(rows, drawn, strict=True):
        page.paste(picture, (left, y))
        place = (4, y + picture.height / 2)
        ImageDraw.Draw(page).multiline_text(place, name, fill=0, font=font, anchor="lm")
        y += picture.height + 4
    return page


def main(run: str, out: str, names: Sequence[str]) -> None:
    """Draw the named pictures, or all."""
    model, folder = load(run), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    x, cond = open_data(model.recipe.data, "test").take(range(100))
    if cond is None or cond.label is None:
        raise SystemExit("edit_pictures: needs a model of the ten digits")
    labels = cond.label
    x = x[[int((labels == digit).nonzero()[0]) for digit in range(10)]]
    for name in names or PICTURES:
        sheet(PICTURES[name](model, x)).save(folder / f"edit-{name}.png", optimize=True)
        print(folder / f"edit-{name}.png")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
