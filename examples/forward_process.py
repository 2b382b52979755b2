"""The forward process: one image at six times on its way into noise, under the linear and the cosine schedule."""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageDraw

import inkdrop
from inkdrop import picture

TIMES = (0, 100, 250, 500, 750, 1000)  # of T = 1,000: 0 is clean, T is noise
LEFT, TOP = 60, 20  # pixels for the names of the rows and columns

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--out", type=Path, default=Path("out"), help="the folder for the pictures")
options.add_argument("--quick", action="store_true", help="the same: there is nothing to train here")
args = options.parse_args()
args.out.mkdir(parents=True, exist_ok=True)

# A schedule maps time in [0, 1] to a noise level: how much signal (alpha) and how much noise (sigma) there is.
schedules = {name: inkdrop.build("schedules", inkdrop.Part(name)) for name in ("linear", "cosine")}
x0, _ = inkdrop.open_data(inkdrop.Part("circles"), "train").take([4])
eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))

# x_t = alpha·x0 + sigma·eps reaches any t in one jump. The eps is the same everywhere, so that the pictures differ by
# their noise level alone. log-SNR is log(alpha²/sigma²): 0 where there is as much noise as signal.
pictures = []
print("schedule     t   alpha   sigma  log-SNR")
for name, schedule in schedules.items():
    for t in TIMES:
        level = schedule(t / 1000)
        pictures.append(inkdrop.diffuse(x0, eps, level))
        print(f"{name} {t:7} {level.alpha:7.4f} {level.sigma:7.4f} {2 * level.lam:8.3f}")

sheet = picture.grid(torch.cat(pictures), columns=len(TIMES), scale=4)
page = Image.new("L", (LEFT + sheet.width, TOP + sheet.height), 255)
page.paste(sheet, (LEFT, TOP))
pen = ImageDraw.Draw(page)
for i, name in enumerate(schedules):
    pen.text((4, TOP + (i + 0.45) * sheet.height / 2), name, fill=0, font_size=13)
for j, t in enumerate(TIMES):
    pen.text((LEFT + (j + 0.32) * sheet.width / len(TIMES), 2), f"t = {t}", fill=0, font_size=13)
page.save(args.out / "forward_process.png")

# Linear has spent its signal long before the end: the last third of its steps all look the same. Cosine was made to
# spend them evenly (Nichol and Dhariwal 2021, figure 5).
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
for name, schedule in schedules.items():
    level = schedule(torch.arange(1, 1001) / 1000)
    for axis, curve in zip(axes, (level.alpha, level.sigma, 2 * level.lam), strict=True):
        axis.plot(range(1, 1001), curve, label=name)
for axis, title in zip(axes, ("alpha: signal", "sigma: noise", "log-SNR"), strict=True):
    axis.set(title=title, xlabel="t")
axes[0].legend()
figure.savefig(args.out / "schedules.png", dpi=110)
print(f"pictures: {args.out / 'forward_process.png'}, {args.out / 'schedules.png'}")
