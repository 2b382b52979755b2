"""DDPM beside DDIM: the same model and the same start noise, in 1,000, 50 and 10 steps."""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import inkdrop
from inkdrop import picture
from inkdrop.screen import Screen

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--out", type=Path, default=Path("out"), help="the folder for the picture and the run")
options.add_argument("--quick", action="store_true", help="train for a few seconds only, and 100 steps for DDPM")
args = options.parse_args()

# One model for all three: the noise that a net was trained to see does not say how it is to be sampled.
settings = ["train.steps=25", "train.batch=32", "plan.steps=10"] if args.quick else ["train.steps=600"]
run = args.out / ("digits-quick" if args.quick else "digits")  # the run of first_model.py, if it is there
with Screen() as screen:
    if run.exists():
        model = inkdrop.resume(run, heard=screen.training())
    else:
        model = inkdrop.fit("digits", run, settings=settings, heard=screen.training())

# The first state of a sampling is its start noise. It depends on the seed and on nothing else.
rows = {"start noise": next(inkdrop.steps(model, 10, seed=0)).x}

# DDPM puts fresh noise in at every step and needs many; DDIM follows the noise where it leads, so that few steps go to
# nearly the same image as many (Song, Meng and Ermon 2021).
for sampler, steps in (("ddpm", 100 if args.quick else 1000), ("ddim", 50), ("ddim", 10)):
    began = time.perf_counter()
    rows[f"{sampler.upper()} {steps}"] = inkdrop.sample(model, 10, seed=0, sampler=sampler, steps=steps)
    print(f"{sampler.upper()} {steps:4} steps: {time.perf_counter() - began:6.2f} s")

# A row a sampler, a column a digit.
sheet = picture.grid(torch.cat(list(rows.values())), columns=10)
page = Image.new("L", (100 + sheet.width, sheet.height), 255)
page.paste(sheet, (100, 0))
for i, name in enumerate(rows):
    ImageDraw.Draw(page).text((4, (i + 0.4) * sheet.height / len(rows)), name, fill=0, font_size=13)
page.save(args.out / "ddpm_vs_ddim.png")

_, ddpm, many, few = rows.values()
far = (ddpm - many).abs().mean(), (few - many).abs().mean()
print(f"mean change of a pixel (of 2) from DDIM 50 to DDPM {far[0]:.3f}, to DDIM 10 {far[1]:.3f}")
print(f"picture: {args.out / 'ddpm_vs_ddim.png'}")
