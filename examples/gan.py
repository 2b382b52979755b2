"""A plain DCGAN (Radford et al. 2016) on digits: two nets against one another, one call of one of them a sample."""

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
options.add_argument("--out", type=Path, default=Path("out"), help="the folder for gan.npy, gan.png and gan.json")
for name, default in (("steps", 3000), ("minutes", 60.0), ("samples", 1000), ("seed", 0)):  # minutes of the processor
    options.add_argument(f"--{name}", type=type(default), default=default)
options.add_argument("--looks", type=int, default=1, help="how often samples are saved on the way: gan-1.npy, ...")
args = options.parse_args()

part = inkdrop.Part("mnist", {"data": str(args.data)}) if args.data else inkdrop.Part("digits")
data = inkdrop.open_data(part, "train")
real = data.take(range(len(data)))[0]
torch.manual_seed(args.seed)
side, latent, width = real.shape[-1] // 4, 64, 48


generator = nn.Sequential(
    *(nn.Linear(latent, 2 * width * side**2), nn.Unflatten(1, (2 * width, side, side)), nn.BatchNorm2d(2 * width)),
    *(nn.ReLU(), nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU()),
    *(nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh()),
)
critic = nn.Sequential(
    *(nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, 2 * width, 4, 2, 1)),
    *(nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(2 * width * side**2, 1)),
)
for module in (*generator, *critic):
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0, 0.02)  # the paper's first weights
rates = {net: torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (generator, critic)}


@torch.no_grad()
def save(name):
    """Samples, each time of the same z."""
    z = torch.randn(args.samples, latent, generator=torch.Generator().manual_seed(args.seed))
    began = time.process_time()
    x, drawing = generator.eval()(z), time.process_time() - began  # in this order
    generator.train()
    args.out.mkdir(parents=True, exist_ok=True)
    np.save(args.out / f"{name}.npy", x.numpy())
    picture.save_grid(x[:100], args.out / f"{name}.png")
    return drawing


def step(net, loss):
    rates[net].zero_grad()
    loss.backward()
    rates[net].step()


spent, update, looks = 0.0, 0, 0
while (done := max(update / args.steps, spent / (60 * args.minutes))) < 1:
    if done >= (looks + 1) / args.looks:
        save(f"gan-{(looks := looks + 1)}")
    began = time.process_time()
    x = real[torch.randint(len(real), (128,))]
    fake = generator(torch.randn(len(x), latent))
    step(critic, F.softplus(-critic(x)).mean() + F.softplus(critic(fake.detach())).mean())
    step(generator, F.softplus(-critic(fake)).mean())
    update, spent = update + 1, spent + time.process_time() - began
drawing = save("gan")
size = sum(p.numel() for net in (generator, critic) for p in net.parameters())
facts = {"parameters": size, "updates": update, "training": spent, "sampling": drawing, "samples": args.samples}
(args.out / "gan.json").write_text(json.dumps(facts))
print(f"{size:,} parameters, {update:,} updates in {spent:.0f} s; {args.samples:,} samples in {drawing:.2f} s")
