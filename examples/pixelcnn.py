"""A tiny PixelCNN (van den Oord et al. 2016) on digits: an exact likelihood, one call a *pixel*, so slow samples."""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import inkdrop
from inkdrop import picture

LEVELS, WIDTH, BLOCKS, REACH = 16, 48, 5, 8  # grey levels; REACH: pixels that it sees above, and to each side

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--data", type=Path, help="a folder with the IDX files of MNIST; else the embedded 8×8 digits")
options.add_argument("--out", type=Path, default=Path("out"), help="the folder for pixelcnn.npy, .png and .json")
for name, default in (("steps", 3000), ("minutes", 60.0), ("samples", 1000), ("seed", 0)):  # minutes of the processor
    options.add_argument(f"--{name}", type=type(default), default=default)
args = options.parse_args()
masks = {}


def masked(channels, out, size, own):
    """A convolution that sees the pixels above and to the left; its own place too, if `own`."""
    conv = nn.Conv2d(channels, out, size, padding=size // 2)
    masks[conv] = torch.arange(size**2).view(size, size) < size**2 // 2 + own
    conv.weight.data *= masks[conv]
    return conv


def logits_of(x):
    x = first(torch.stack([x / (LEVELS - 1) * 2 - 1, torch.ones_like(x, dtype=torch.float32)], 1))  # 1: in the picture
    for layers in blocks:
        x = x + layers(x)
    return last(x)


part = inkdrop.Part("mnist", {"data": str(args.data)}) if args.data else inkdrop.Part("digits")
data = inkdrop.open_data(part, "train")
real = ((data.take(range(len(data)))[0][:, 0] + 1) / 2 * (LEVELS - 1)).round().long()
torch.manual_seed(args.seed)
first, last, half, blocks = masked(2, WIDTH, 7, False), nn.Conv2d(WIDTH, LEVELS, 1), WIDTH // 2, []
for _ in range(BLOCKS):
    layers = nn.Conv2d(WIDTH, half, 1), nn.SiLU(), masked(half, half, 3, True), nn.SiLU(), nn.Conv2d(half, WIDTH, 1)
    blocks.append(nn.Sequential(nn.SiLU(), *layers))
weights = [p for layers in (first, *blocks, last) for p in layers.parameters()]
rate = torch.optim.Adam(weights, lr=2e-3)
spent, update = 0.0, 0
while update < args.steps and spent < 60 * args.minutes:
    began = time.process_time()
    x = real[torch.randint(len(real), (64,))]
    loss = F.cross_entropy(logits_of(x), x)
    rate.zero_grad()
    loss.backward()
    rate.step()
    for conv, mask in masks.items():
        conv.weight.data *= mask
    update, spent = update + 1, spent + time.process_time() - began

began = time.process_time()
x = torch.zeros(args.samples, *real.shape[1:], dtype=torch.int64)
with torch.no_grad():
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):  # only what this pixel depends on is computed
            crop = x[:, max(0, i - REACH) : i + 1, max(0, j - REACH) : j + REACH + 1]
            logits = logits_of(crop)[:, :, min(i, REACH), min(j, REACH)]
            x[:, i, j] = logits.softmax(1).multinomial(1)[:, 0]
images, drawing = (2 * x[:, None] / (LEVELS - 1) - 1).float(), time.process_time() - began
args.out.mkdir(parents=True, exist_ok=True)
np.save(args.out / "pixelcnn.npy", images.numpy())
picture.save_grid(images[:100], args.out / "pixelcnn.png")
size, bits = sum(p.numel() for p in weights), loss.item() / math.log(2)
facts = {"parameters": size, "updates": update, "training": spent, "sampling": drawing, "samples": args.samples}
(args.out / "pixelcnn.json").write_text(json.dumps(facts | {"bits": bits}))
print(f"{size:,} parameters, {update:,} updates, {bits:.3f} bits a pixel; {args.samples:,} samples in {drawing:.2f} s")
