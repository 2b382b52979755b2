"""Linear beside cosine: two trainings of the same net with the same budget, sampled in 10 steps from the same noise."""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import inkdrop
from inkdrop import picture
from inkdrop.screen import Screen

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--out", type=Path, default=Path("out"), help="the folder for the picture and the runs")
options.add_argument("--quick", action="store_true", help="train for a few seconds only")
args = options.parse_args()
budget = ["train.steps=25", "train.batch=32", "plan.steps=10"] if args.quick else ["train.steps=600"]

# The same seed: the same first weights, the same images in the same order, the same eps. Only the noise levels differ.
rows = {}
for schedule in ("linear", "cosine"):
    run = args.out / f"{schedule}{'-quick' if args.quick else ''}"
    with Screen() as screen:
        heard = screen.training(f"training, {schedule}")
        if run.exists():
            model = inkdrop.resume(run, heard=heard)
        else:
            model = inkdrop.fit("digits", run, settings=[f"schedule={schedule}", *budget], heard=heard)
    # Both schedules end in noise, so both samplings can start from the same. No guidance here: it sharpens both, and
    # so hides what few steps cost, which is contrast.
    count = 40 if args.quick else 200
    few, many = (inkdrop.sample(model, count, seed=0, sampler="ddim", steps=n, guidance=1) for n in (10, 50))
    rows["start noise"] = next(inkdrop.steps(model, 20, seed=0)).x
    rows[f"{schedule}, 10 steps"] = few[:20]
    print(f"{schedule}: contrast {few.std():.3f} in 10 steps, {many.std():.3f} in 50")

data = inkdrop.open_data(model.recipe.data, "test")
print(f"real digits: contrast {data.take(range(len(data)))[0].std():.3f}")

# A row a schedule, a column a digit.
sheet = picture.grid(torch.cat(list(rows.values())), columns=20, scale=6)
page = Image.new("L", (130 + sheet.width, sheet.height), 255)
page.paste(sheet, (130, 0))
for i, name in enumerate(rows):
    ImageDraw.Draw(page).text((4, (i + 0.4) * sheet.height / len(rows)), name, fill=0, font_size=13)
page.save(args.out / "linear_vs_cosine.png")
print(f"{model.card['updates']} updates each; picture: {args.out / 'linear_vs_cosine.png'}")
