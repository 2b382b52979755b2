"""Diffusion from first principles, in NumPy alone: numbers become noise, and a small net learns the way back.

Training and sampling are algorithms 1 and 2 of DDPM (Ho, Jain and Abbeel 2020); the gradient is written out by hand.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

T = 200  # steps of the chain; DDPM's betas times 1000/T, so that the shorter chain also ends in noise
BETA = np.linspace(1e-4, 0.02, T) * 1000 / T
ABAR = np.cumprod(1 - BETA)  # x_t = √abar·x0 + √(1 − abar)·eps reaches any t in one jump
MEANS, STDS, SHARES = np.array([-1.2, 0.0, 1.0]), np.array([0.16, 0.1, 0.24]), np.array([0.3, 0.3, 0.4])


def draw(rng, n):  # n numbers of the mixture: the data
    kind = rng.choice(3, n, p=SHARES)
    return MEANS[kind] + STDS[kind] * rng.standard_normal(n)


def guess(net, x, t):  # the net's guess of eps, and what each layer was given, which the gradient needs
    wave = t[:, None] * 10_000 ** (-np.arange(16) / 16)  # fast and slow waves of t: near times alike, far ones not
    given = [np.concatenate([x[:, None], np.sin(wave), np.cos(wave)], axis=1)]
    for w, b in zip(net[:-2:2], net[1:-2:2], strict=True):
        given.append(np.tanh(given[-1] @ w + b))
    return (given[-1] @ net[-2] + net[-1])[:, 0], given


def loss_and_gradient(net, x, t, eps):  # of mean (guess − eps)²; the chain rule runs from the last layer to the first
    y, given = guess(net, x, t)
    back, grads = 2 * (y - eps)[:, None] / len(x), []
    for w, h in zip(net[-2::-2], given[::-1], strict=True):
        grads = [h.T @ back, back.sum(0), *grads]
        back = back @ w.T * (1 - h**2)  # tanh' = 1 − tanh²
    return np.mean((y - eps) ** 2), grads


def train(rng, steps, sizes=((33, 96), (96, 96), (96, 1)), batch=512, rate=1e-2):
    net = [part for a, b in sizes for part in (rng.standard_normal((a, b)) / np.sqrt(a), np.zeros(b))]
    adam, losses = [(np.zeros_like(p), np.zeros_like(p)) for p in net], np.zeros(steps)
    for k in range(steps):
        t, eps = rng.integers(0, T, batch), rng.standard_normal(batch)
        x = np.sqrt(ABAR[t]) * draw(rng, batch) + np.sqrt(1 - ABAR[t]) * eps
        losses[k], grads = loss_and_gradient(net, x, t, eps)
        now = rate * (1 + np.cos(np.pi * k / steps)) / 2  # a rate that falls to 0 lets the net settle
        for p, g, (m, v) in zip(net, grads, adam, strict=True):  # Adam: running means of g and of g²
            m += 0.1 * (g - m)
            v += 0.001 * (g**2 - v)
            p -= now * (m / (1 - 0.9 ** (k + 1))) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
    return net, losses


def sample(net, rng, n):
    x = rng.standard_normal(n)
    for t in reversed(range(T)):  # take a little of the guessed noise out, put less fresh noise in, none at the end
        x = (x - BETA[t] / np.sqrt(1 - ABAR[t]) * guess(net, x, np.full(n, t))[0]) / np.sqrt(1 - BETA[t])
        x += (t > 0) * np.sqrt(BETA[t] * (1 - ABAR[t - 1]) / (1 - ABAR[t])) * rng.standard_normal(n)
    return x


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("out"), help="the folder for the picture")
    options.add_argument("--quick", action="store_true", help="train for a few seconds only")
    args, rng = options.parse_args(), np.random.default_rng(0)
    steps, n = (1_000, 2_000) if args.quick else (6_000, 10_000)
    net, losses = train(rng, steps)
    data, more, made = draw(rng, n), draw(rng, n), sample(net, rng, n)
    far, floor = (np.abs(np.sort(x) - np.sort(data)).mean() for x in (made, more))  # 1-Wasserstein distances
    print(f"{steps} steps, {n} samples: distance to the data {far:.4f}; of as many real numbers {floor:.4f}")
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    axes[0].plot(np.sqrt(np.stack([ABAR, 1 - ABAR], axis=1)), label=["signal √abar", "noise √(1 − abar)"])
    axes[1].semilogx(np.convolve(losses, np.ones(50) / 50, "valid"), label="mean of 50 steps")
    axes[2].hist([data, made], bins=60, density=True, label=["original", "sampled"])
    for axis, title in zip(axes, ("schedule over t", "loss over steps", "density over x"), strict=True):
        axis.legend(title=title)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "numpy_1d.png", dpi=110)
