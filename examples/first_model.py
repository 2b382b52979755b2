"""From nothing to samples: train a model of handwritten digits, draw a hundred new ones, look at them."""

import argparse
from pathlib import Path

import inkdrop
from inkdrop.screen import Screen

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--out", type=Path, default=Path("out"), help="the folder for the picture and the run")
options.add_argument("--quick", action="store_true", help="train for a few seconds only")
args = options.parse_args()

# A recipe is a name and its settings; `inkdrop list recipes` shows the others. 600 updates are enough to recognise
# the digits, the recipe's own 4,000 make them good.
settings = ["train.steps=25", "train.batch=32", "plan.steps=10"] if args.quick else ["train.steps=600"]

# Everything about a run is kept in its folder: a second start goes on where the first one stopped, and
# `inkdrop sample out/digits` or `inkdrop.load("out/digits")` need nothing but that folder.
run = args.out / ("digits-quick" if args.quick else "digits")
with Screen() as screen:  # the progress bar
    if run.exists():
        model = inkdrop.resume(run, heard=screen.training())
    else:
        model = inkdrop.fit("digits", run, settings=settings, heard=screen.training())

# Image i of a seed starts from the same noise however many are drawn. The classes come in turn, so in a grid of ten
# columns each digit has its own.
digits = inkdrop.sample(model, 100, seed=0)
inkdrop.save_grid(digits, args.out / "first_model.png", columns=10)
card = model.card
print(f"{card['updates']} updates on {card['samples']} digits; 100 new ones: {args.out / 'first_model.png'}")
