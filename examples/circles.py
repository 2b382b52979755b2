"""Circles: a two-level U-Net learns to draw discs in 20 epochs; DDPM in 1,000 steps beside DDIM in 50."""

import argparse
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import inkdrop
from inkdrop import picture
from inkdrop.screen import Screen

EPOCHS, BATCH = 20, 16
QUICK = ["data.size=16", "data.count=128", "train.batch=16", "train.steps=30", "plan.steps=5"]


def roundness(x):
    """Area²/(2π · moment of inertia) of what is brighter than half: 1 for a disc, less for any other shape."""
    inside = (x[:, 0] > (x.amax((1, 2, 3)) - 1)[:, None, None] / 2).double()
    area, inertia = inside.sum((1, 2)), 0
    for place in torch.meshgrid(*(torch.arange(n).double() for n in x.shape[2:]), indexing="ij"):
        middle = (inside * place).sum((1, 2)) / area
        inertia += (inside * ((place - middle[:, None, None]) ** 2 + 1 / 12)).sum((1, 2))  # 1/12: a pixel's own
    return (area**2 / (2 * math.pi * inertia)).mean()


options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--out", type=Path, default=Path("out"), help="the folder for the picture and the run")
options.add_argument("--quick", action="store_true", help="train for a few seconds only, and 100 steps for DDPM")
args = options.parse_args()

# The recipe: 2,048 discs, DDPM's linear schedule, a net of two levels. Small batches make 20 epochs many updates. It
# guesses v, not DDPM's eps: after so short a training, DDIM would carry the errors of eps to the end as grain, which
# DDPM's fresh noise washes out.
settings = [f"train.batch={BATCH}", f"train.steps={EPOCHS * 2048 // BATCH}", "train.preview_every=640"]
run = args.out / ("circles-quick" if args.quick else "circles")
with Screen() as screen:
    if run.exists():
        model = inkdrop.resume(run, heard=screen.training())
    else:
        model = inkdrop.fit("circles", run, settings=QUICK if args.quick else settings, heard=screen.training())

many = 100 if args.quick else 1000
panels = {
    "the same start noise": next(inkdrop.steps(model, 16, seed=0)).x,
    f"DDPM, {many} steps": inkdrop.sample(model, 16, seed=0, sampler="ddpm", steps=many),
    "DDIM, 50 steps": inkdrop.sample(model, 16, seed=0, sampler="ddim", steps=50),
}
real, _ = inkdrop.open_data(model.recipe.data, "test").take(range(16))
print(f"roundness (1 is a disc): drawn by formula {roundness(real):.3f}")

sheets = [picture.grid(x, columns=4) for x in panels.values()]
page = Image.new("L", (sum(sheet.width + 10 for sheet in sheets), 20 + sheets[0].height), 255)
for i, (name, sheet) in enumerate(zip(panels, sheets, strict=True)):
    page.paste(sheet, (i * (sheet.width + 10), 20))
    ImageDraw.Draw(page).text((i * (sheet.width + 10) + 4, 2), name, fill=0, font_size=13)
    print(f"{name}: {roundness(panels[name]):.3f}")
page.save(args.out / "circles.png")
print(f"{model.card['updates']} updates; picture: {args.out / 'circles.png'}")
