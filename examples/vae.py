"""A variational autoencoder (Kingma & Welling 2014) on digits: a bound on the likelihood, blurred samples."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import inkdrop
from inkdrop import picture

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--data", type=Path, help="a folder with the IDX files of MNIST; else the embedded 8×8 digits")
options.add_argument("--out", type=Path, default=Path("out"), help="the folder for vae.npy, vae.png and vae.json")
for name, default in (("steps", 6000), ("minutes", 60.0), ("samples", 1000), ("seed", 0)):  # minutes of the processor
    options.add_argument(f"--{name}", type=type(default), default=default)
args = options.parse_args()

part = inkdrop.Part("mnist", {"data": str(args.data)}) if args.data else inkdrop.Part("digits")
data = inkdrop.open_data(part, "train")
real = (data.take(range(len(data)))[0] + 1) / 2  # brightness, as a probability
torch.manual_seed(args.seed)
side, latent, width = real.shape[-1] // 4, 16, 48

encoder = nn.Sequential(
    *(nn.Conv2d(1, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.SiLU()),
    *(nn.Flatten(), nn.Linear(2 * width * side**2, 2 * latent)),
)
decoder = nn.Sequential(
    *(nn.Linear(latent, 2 * width * side**2), nn.SiLU(), nn.Unflatten(1, (2 * width, side, side))),
    *(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(width, 1, 4, 2, 1)),
)
weights = [*encoder.parameters(), *decoder.parameters()]
rate = torch.optim.Adam(weights, lr=1e-3)


def bound(x):
    """The negative evidence lower bound in nats an image: reconstruction, and KL(q(z|x) | N(0, 1))."""
    mean, log_var = encoder(x).chunk(2, 1)
    z = mean + (log_var / 2).exp() * torch.randn_like(mean)
    reconstruction = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="none").flatten(1).sum(1)
    return (reconstruction + 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)).mean()


spent, update = 0.0, 0
while update < args.steps and spent < 60 * args.minutes:
    began = time.process_time()
    loss = bound(real[torch.randint(len(real), (128,))])
    rate.zero_grad()
    loss.backward()
    rate.step()
    update, spent = update + 1, spent + time.process_time() - began

began = time.process_time()
with torch.no_grad():
    x = (
        2 * decoder(torch.randn(args.samples, latent)).sigmoid() - 1
    )  # the mean image, as is usual: no noise of the pixels
drawing = time.process_time() - began
args.out.mkdir(parents=True, exist_ok=True)
np.save(args.out / "vae.npy", x.numpy())
picture.save_grid(x[:100], args.out / "vae.png")
size = sum(p.numel() for p in weights)
facts = {"parameters": size, "updates": update, "training": spent, "sampling": drawing, "samples": args.samples}
(args.out / "vae.json").write_text(json.dumps(facts | {"bound": loss.item()}))
print(f"{size:,} parameters, {update:,} updates in {spent:.0f} s, bound {loss:.1f} nats an image")
print(f"{args.samples:,} samples in {drawing:.2f} s: {args.out}")
