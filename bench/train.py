"""The speed and memory of training beside diffusers' and denoising-diffusion-pytorch's loops, interleaved.

    python bench/train.py --out bench/results                       both nets
    python bench/train.py --only MNIST --rounds 9
    python bench/train.py --peer FOLDER                             also denoising-diffusion-pytorch, installed there
    python bench/train.py --curves 60 --mnist FOLDER                the loss of float32 and of the fastest way, 3 seeds

Every side trains the same UNet2DModel from the same weights on batches of the same size, with AdamW (1e-4, betas 0.95
and 0.999, decay 1e-6), clipping at 1, and an average of the weights after each update:

- inkdrop: `Trainer.step` with the defaults of Train; read by inkdrop.hub from UNet2DModel.
- inkdrop auto: the same with what `--speed auto` chooses on this machine, in this run.
- diffusers: the loop of their example train_unconditional.py in plain torch: DDPMScheduler.add_noise, mse_loss,
  clip_grad_norm_, torch.optim.AdamW as it is by default, their cosine learning rates, EMAModel.
- denoising-diffusion-pytorch: GaussianDiffusion's loss, Adam and EMA (every ten updates) as their Trainer has them,
  round the same UNet2DModel. It imports torchvision and accelerate, which are not needed for that: empty modules stand
  in for them.

All run with freed memory kept in the process, as our runs have it by themselves and the others do not.

Time is processor time, so that other work on the machine counts less, and wall time beside it. In each round every
side makes one update, forwards and backwards in turns; medians. `peak` is the most bytes of torch's CPU allocator in
use at once in an update, with all that was there before it. `share` is the part of the machine's own best rate, of the
products and convolutions measured in the same run, at which the net's operations are done: FLOPs of a forward and a
backward pass (torch.utils.flop_counter), what is computed twice counted once.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import nets
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from inkdrop.data.arrays import Arrays
from inkdrop.find import Part
from inkdrop.hub.unet import part_of, read_unet
from inkdrop.recipe import Recipe
from inkdrop.settings import Train
from inkdrop.train.allocator import keeping_memory
from inkdrop.train.loop import quickened
from inkdrop.train.trainer import Trainer

MNIST = {**nets.SMALL, "layers_per_block": 2, "resnet_time_scale_shift": "default"}
"""3.9 million parameters, 28×28."""


class Case(NamedTuple):
    """A net and its batch."""

    name: str
    batch: int
    config: dict[str, Any]


CASES = (Case("MNIST", 64, MNIST), Case("CIFAR-10", 16, nets.DDPM))
Update = Callable[[], float]


def pictures(split: str, *, channels: int = 1, side: int = 28, count: int = 256) -> Arrays:
    """Images of uniform noise: the time of an update does not depend on what they show."""
    draws = torch.Generator().manual_seed(len(split))
    values = torch.randint(0, 256, (count, channels, side, side), generator=draws, dtype=torch.uint8)
    return Arrays(values, title=f"pictures {split}", source="uniform noise")


# ---- the sides ---------------------------------------------------------------------------------------------------


def recipe_of(case: Case) -> Recipe:
    """Their config, data of its size, and their settings."""
    side, channels = case.config["sample_size"], case.config["in_channels"]
    net, _ = part_of({**case.config, "_class_name": nets.CLASS})
    train = Train(batch=case.batch, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, ema=0.9999, null_rate=0.0)
    data = Part("train:pictures", {"channels": channels, "side": side})
    return Recipe(data=data, net=net, schedule=Part("linear"), target=Part("eps"), train=train)


def ours(recipe: Recipe, other: Any) -> tuple[Update, Trainer]:
    """Our loop with their weights."""
    trainer = Trainer(recipe, None, device="cpu")
    weights = read_unet(
        dict(other.config) | {"_class_name": nets.CLASS}, copy.deepcopy(other.state_dict())
    ).state_dict()
    for net in (trainer.denoiser.net, trainer.ema.net):
        net.load_state_dict(weights)
    return lambda: trainer.step()["loss"], trainer


def theirs(case: Case, other: Any) -> Update:
    """The loop of train_unconditional.py: a batch of images, noised, predicted, and what follows."""
    model = copy.deepcopy(other).train()
    data, noise_scheduler = pictures("train", **sizes(case)), diffusers.DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 500, 10_000)
    ema_model = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def update() -> float:
        clean_images, _ = data.take(torch.randint(0, len(data), (case.batch,)).tolist())
        noise = torch.randn_like(clean_images)
        timesteps = torch.randint(0, 1000, (case.batch,)).long()
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
        loss = functional.mse_loss(model(noisy_images, timesteps).sample.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema_model.step(model.parameters())
        return float(loss.detach())

    return update


def peers(case: Case, other: Any) -> Update:
    """The loop of denoising-diffusion-pytorch's Trainer: Adam, EMA every ten updates, no learning-rate schedule."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    net = copy.deepcopy(other).train()

    class Wrapped(torch.nn.Module):
        channels = out_dim = case.config["in_channels"]
        self_condition = random_or_learned_sinusoidal_cond = False

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, time: Tensor, _: Tensor | None = None) -> Tensor:
            return self.net(x, time, return_dict=False)[0]

    side, data = case.config["sample_size"], pictures("train", **sizes(case))
    model = GaussianDiffusion(Wrapped(), image_size=side, timesteps=1000, objective="pred_noise")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(model, beta=0.995, update_every=10)

    def update() -> float:
        images, _ = data.take(torch.randint(0, len(data), (case.batch,)).tolist())
        loss = model((images + 1) / 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return float(loss.detach())

    return update


def sizes(case: Case) -> dict[str, int]:
    return {"channels": case.config["in_channels"], "side": case.config["sample_size"]}


def stand_in(folder: Path) -> None:
    """Let denoising-diffusion-pytorch be imported from a folder, without what its training loop does not call."""
    sys.path.append(str(folder))
    for name, parts in (("torchvision", ("transforms", "utils")), ("accelerate", ("Accelerator",))):
        module = types.ModuleType(name)
        for part in parts:
            setattr(module, part, None)
        sys.modules.setdefault(name, module)


# ---- what is measured --------------------------------------------------------------------------------------------


def peak(update: Update, parameters: int, *, gradients: bool) -> int:
    """The most bytes in use at once in an update: what torch allocates in it beyond what was there before.

    Args:
        update: after its first, so that the moments are there.
        parameters: of the net: four times four bytes of each are there, weight, average and moments.
        gradients: whether those of the update before are still there at its beginning, and freed in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        update()
    used = most = 4 * parameters * (4 + gradients)
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            most = max(most, used)
    return most


def rates() -> dict[str, float]:
    """The best FLOP/s of this machine: products of 2048×2048, and a 3×3 convolution of 128 channels of 32×32."""
    found: dict[str, float] = {}
    square, x = torch.randn(2048, 2048), torch.randn(16, 128, 32, 32).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(128, 128, 3, 3).contiguous(memory_format=torch.channels_last)
    for kind in (torch.float32, torch.bfloat16):
        a, h, k = square.to(kind), x.to(kind), kernel.to(kind)
        for name, run, flops in (
            ("product", lambda a=a: a @ a, 2 * 2048**3),
            ("convolution", lambda h=h, k=k: functional.conv2d(h, k, padding=1), 2 * 16 * 1024 * 128 * 128 * 9),
        ):
            run()
            found[f"{name} {str(kind)[6:]}"] = flops / min(spent(run) for _ in range(5))
    return found


def spent(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def flops(trainer: Trainer, case: Case) -> int:
    """Of a forward and a backward pass of the net, in float32 without our second computing."""
    net, side = trainer.denoiser.net.eval(), case.config["sample_size"]  # in eval nothing is computed twice
    x = torch.randn(case.batch, case.config["in_channels"], side, side)
    with FlopCounterMode(display=False) as counter:
        net(x, torch.rand(case.batch) * 999).square().mean().backward()
    net.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def compare(case: Case, rounds: int, peer: bool) -> dict[str, Any]:
    """A case: its sides' times, rates and memory."""
    torch.manual_seed(0)
    other = getattr(diffusers, nets.CLASS)(**case.config)
    recipe, heard = recipe_of(case), []
    default, trainer = ours(recipe, other)
    quick = quickened(recipe, lambda kind, facts: heard.append(facts), "cpu")
    sides: dict[str, Update] = {
        "diffusers": theirs(case, other),
        "inkdrop": default,
        "inkdrop auto": ours(quick, other)[0],
    }
    if peer:
        sides["denoising-diffusion-pytorch"] = peers(case, other)
    parameters, work = sum(p.numel() for p in other.parameters()), flops(trainer, case)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            wall = time.monotonic()
            busy = spent(sides[name])
            if turn:
                times[name].append((busy, time.monotonic() - wall))
    best, rows = rates(), []
    for name, update in sides.items():
        busy, wall = (statistics.median(each) for each in zip(*times[name], strict=True))
        ratios = [b[0] / a[0] for a, b in zip(times[name], times["diffusers"], strict=True)]
        rows.append(
            {
                "side": name,
                "ms": round(1e3 * busy, 1),
                "wall ms": round(1e3 * wall, 1),
                "images/s": round(case.batch / busy, 2),
                "faster": round(statistics.median(ratios), 3),
                "quartiles": [round(value, 3) for value in nets.quartiles(ratios)],
                "gflops": round(work / busy / 1e9, 1),
                "peak": peak(update, parameters, gradients="inkdrop" in name),
            }
        )
    chosen = heard[0]["chosen"]
    head = {"net": case.name, "batch": case.batch, "parameters": parameters, "flops": work, "chosen": chosen}
    return {**head, "auto": heard[0]["lines"], "rates": best, "rows": rows, "config": case.config}


def curves(updates: int, mnist: Path, seeds: int = 3) -> list[dict[str, Any]]:
    """The loss of float32 and of bfloat16 with channels last, from the same weights, data, times and noise."""
    rows = []
    for seed in range(seeds):
        found: dict[str, list[float]] = {}
        for name, way in (("float32", {}), ("fast", {"precision": "bfloat16", "channels_last": True})):
            train = Train(batch=16, lr=1e-3, warmup=10, steps=updates, null_rate=0.0, seed=seed, **way)
            data = Part("mnist", {"data": str(mnist.resolve())})
            trainer = Trainer(replace(recipe_of(CASES[0]), data=data, train=train), None, device="cpu")
            found[name] = [trainer.step()["loss"] for _ in range(updates)]
        rows.append({"seed": seed, **found})
        last = {name: statistics.mean(values[-updates // 3 :]) for name, values in found.items()}
        print(f"seed {seed}: mean loss of the last third {last}", flush=True)
    return rows


# ---- the report --------------------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> str:
    """A case as markdown."""
    rate = found["rates"]
    lines = [
        f"## {found['net']}: {found['parameters']:,} parameters, batch {found['batch']}",
        "",
        "| loop | processor ms | wall ms | images/s | faster | quartiles | peak MB | GFLOP/s | share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        kind = found["chosen"]["precision"] if row["side"] == "inkdrop auto" else "float32"
        share = 1e9 * row["gflops"] / max(rate[f"{what} {kind}"] for what in ("product", "convolution"))
        spread = "–".join(f"{value:.2f}" for value in row["quartiles"])
        cells = [row["side"], f"{row['ms']:.0f}", f"{row['wall ms']:.0f}", f"{row['images/s']:.1f}"]
        cells += [f"{row['faster']:.2f}×", spread, f"{row['peak'] / 1e6:.0f}", f"{row['gflops']:.0f}", f"{share:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    told = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in rate.items())
    return "\n".join([*lines, "", f"Best of this machine, GFLOP/s: {told}.", "", "```text", *found["auto"], "```"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one of the two nets")
    parser.add_argument("--peer", type=Path, help="a folder with denoising_diffusion_pytorch, ema_pytorch and einops")
    parser.add_argument("--curves", type=int, help="loss curves of so many updates instead")
    parser.add_argument("--mnist", type=Path, help="a folder of MNIST's IDX files, for --curves")
    parser.add_argument("--out", type=Path, help="a folder for train-NAME.json and .md")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    told = {**nets.about(), "command": " ".join(["python", *sys.argv])}
    if args.peer is not None:
        stand_in(args.peer)
    with keeping_memory():
        if args.curves:
            write(args.out, "train-curves", {**told, "curves": curves(args.curves, args.mnist)}, None)
            return
        for case in CASES:
            if args.only in (None, case.name):
                found = compare(case, args.rounds, args.peer is not None)
                print(report(found), "\n", flush=True)
                write(args.out, f"train-{case.name.lower()}", {**told, "case": found}, report(found))


def write(out: Path | None, name: str, record: dict[str, Any], text: str | None) -> None:
    """The record as JSON, and for people where there is a text."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if text is not None:
        head = f"`{record['command']}`: torch {record['torch']}, diffusers {record['diffusers']}, {record['threads']} "
        head += f"thread(s), {record['processor']}; the machine was shared with other work.\n\n"
        (out / f"{name}.md").write_text(f"# Training beside other loops\n\n{head}{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
