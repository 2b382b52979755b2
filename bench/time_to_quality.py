"""Time to quality on MNIST: how long a training takes until its samples fall under two levels of FID and KID.

    python bench/time_to_quality.py train diffusers --minutes 30 --data PATH --work DIR
    python bench/time_to_quality.py train strong --minutes 10 --data PATH --work DIR
    python bench/time_to_quality.py train ours --seed 0 --minutes 5 --data PATH --work DIR      (seeds 0, 1 and 2)
    python bench/time_to_quality.py score --data PATH --work DIR
    python bench/time_to_quality.py table --work DIR --out bench/results

The arms. Those of `diffusers` and `strong` are plain loops on the same UNet2DModel of 3.9 M parameters:

- diffusers: what the defaults of its example train_unconditional.py are: eps, linear betas, T = 1,000, batch 16, AdamW
  of 1e-4 (betas 0.95 and 0.999, decay 1e-6) after 500 updates of warm-up (its cosine decay over 100 epochs is flat in
  this time), gradients clipped to 1, float32, no average of the weights.
- strong: what is known to help: v, the cosine table, min-SNR 5, batch 64, AdamW of 1e-3 that falls as the square root
  of the share of time that is left, an average of decay 0.995, bfloat16 with attention as plain matrix products.
- ours: the recipe `mnist` as it is, but without being told the classes; `ours-class`, which is told them; and rows that
  take one of its choices back each, or make one more (`ABLATIONS`); `SAMPLED` are other samplers of the same model.

The clock counts updates alone: not the reading of files, snapshots, or scores. It is the wall's, on a machine that does
nothing else; with --clock processor it is that of the processor, of all threads together, over the two cores, so that
runs can be tried out beside other work. Both are kept. Snapshots are taken at the minutes of --at, and scored by 2,000
samples (asked of the classes in turn where it is told them) against the 10,000 held-out digits on the features of the
house's classifier: DDIM with 50 steps for the plain loops, the recipe's own plan for ours. Stages are kept in --work
and are not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inkdrop.bundle import Bundle, load
from inkdrop.bundle import save as save_bundle
from inkdrop.core.dataset import Data
from inkdrop.data.arrays import Arrays
from inkdrop.data.idx import mnist
from inkdrop.denoiser import wrap
from inkdrop.evals.features import features_for
from inkdrop.evals.frechet import Moments, frechet
from inkdrop.evals.kid import kid
from inkdrop.find import Part, build
from inkdrop.generate import sample
from inkdrop.model import Plain
from inkdrop.plan import Plan
from inkdrop.train.allocator import keeping_memory
from inkdrop.train.ema import Ema
from inkdrop.train.loop import choose
from inkdrop.train.record import describe_run
from inkdrop.train.trainer import Trainer

MINUTES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 25.0, 30.0)
COUNT = 2000
CORES = 2
"""Of the machine whose minutes --clock processor counts: a run on one thread has half a minute in a minute."""
LEVELS = (("diffusers", 30.0), ("strong", 10.0))
"""Whose scores are the two levels, and after how many minutes."""

_LARGE = ("train.batch=128", "train.lr=1e-3", "train.warmup=200")
ABLATIONS = {
    "ours-float32": ("train.precision=float32",),
    "ours-large-batch": _LARGE,
    "ours-plain-weight": ("loss.weight=uniform",),
    "ours-before": ("train.precision=float32", *_LARGE, "loss.weight=uniform"),
    "ours-channels-last": ("train.channels_last=true",),
    "ours-spread": ("train.draws=spread",),
}
"""What each row sets differently from `ours`; `ours-before` takes all back, to what the recipe was."""
SAMPLED = {"ours-ddim-50": ("ddim", 50), "ours-ddim-16": ("ddim", 16), "ours-unipc-32": ("unipc", 32)}
"""Rows of the last snapshots of `ours`, sampled otherwise."""


def unlabelled(split: str, *, data: Path) -> Data:
    """MNIST without its classes."""
    known = mnist(split, data=data)
    x = known.take(range(len(known)))[0]
    values = ((x + 1) * 127.5).round().to(torch.uint8)
    return Arrays(values, title=f"mnist {split}", source=known.source)


class Clock:
    """Minutes of training: of the processor over the cores, and of the wall, both without what is left out.

    Args:
        kind: "wall" or "processor", which one is meant by `minutes`.
    """

    def __init__(self, kind: str = "wall") -> None:
        self.kind, self.processor, self.wall = kind, 0.0, 0.0

    @property
    def minutes(self) -> float:
        return self.wall if self.kind == "wall" else self.processor

    @contextlib.contextmanager
    def running(self) -> Any:
        """Count what is done inside."""
        began, wall = time.process_time(), time.monotonic()
        yield
        self.processor += (time.process_time() - began) / CORES / 60
        self.wall += (time.monotonic() - wall) / 60


class PlainLoop:
    """A training loop as one writes it by hand, on diffusers' net.

    Args:
        kind: "diffusers" or "strong".
        x: all images, (N, 1, 28, 28) in [-1, 1].
        seed: of weights, order, times and noise.
    """

    def __init__(self, kind: str, x: Tensor, seed: int) -> None:
        self.strong, self.x = kind == "strong", x
        torch.manual_seed(seed)
        self.net = their_net(plain_attention=self.strong)
        self.average = Ema(self.net, 0.995 if self.strong else 0.0)  # of decay 0: the weights themselves
        self.batch = 64 if self.strong else 16
        schedule = build("schedules", Part("cosine" if self.strong else "linear"))
        level = schedule(torch.arange(1, 1001, dtype=torch.float64) / 1000)
        self.alpha, self.sigma = level.alpha.float(), level.sigma.float()
        self.optimiser = (
            torch.optim.AdamW(self.net.parameters(), lr=1e-3, weight_decay=0.0)
            if self.strong
            else torch.optim.AdamW(self.net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        )
        self.update, self.order = 0, torch.empty(0, dtype=torch.int64)

    last = math.inf

    def rate(self, share: float) -> float:
        """The learning rate of the next update, when this share of the minutes is over."""
        warm = min(1.0, (self.update + 1) / (100 if self.strong else 500))
        return warm * (1e-3 * math.sqrt(max(0.0, 1 - share)) if self.strong else 1e-4)

    def step(self, share: float) -> float:
        """One update."""
        if len(self.order) < self.batch:
            self.order = torch.randperm(len(self.x))
        rows, self.order = self.order[: self.batch], self.order[self.batch :]
        x0, t = self.x[rows], torch.randint(1000, (self.batch,))
        eps, alpha, sigma = torch.randn_like(x0), self.alpha[t, None, None, None], self.sigma[t, None, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.strong):
            y = self.net(alpha * x0 + sigma * eps, t).sample
        wanted = alpha * eps - sigma * x0 if self.strong else eps
        ratio = (self.alpha[t] / self.sigma[t]).square()
        weight = ratio.clamp(max=5) / (ratio + 1) if self.strong else torch.ones_like(ratio)
        loss = (weight * (y.float() - wanted).square().flatten(1).mean(1)).mean()
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(share)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimiser.step()
        self.average.update(self.net, self.update)
        self.update += 1
        return float(loss.detach())

    def save(self, folder: Path) -> None:
        """Keep the net that is to be scored."""
        folder.mkdir(parents=True)
        save_file(self.average.net.state_dict(), folder / "net.safetensors")


def their_net(*, plain_attention: bool) -> nn.Module:
    """UNet2DModel with 3.9 M parameters for 28×28."""
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import Attention, AttnProcessor

    net: nn.Module = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    if plain_attention:
        for module in net.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
    return net


class OurLoop:
    """The recipe `mnist` with settings, step by step; its learning rate falls over the minutes that it has.

    Args:
        arm: "ours", "ours-class" or an ablation.
        data: the folder with MNIST.
        seed: of the run.
        minutes: that it has.
        settings: more of them.
        clock: of the minutes.
    """

    def __init__(self, arm: str, data: Path, seed: int, minutes: float, settings: list[str], clock: str) -> None:
        recipe = choose("mnist", data=data, settings=[f"train.seed={seed}", *ABLATIONS.get(arm, ()), *settings])
        if arm != "ours-class":
            recipe = replace(recipe, data=Part("time_to_quality:unlabelled", {"data": str(data)}))
            guide = tuple(part for part in recipe.plan.guide if part.name != "cfg")
            recipe = replace(recipe, plan=replace(recipe.plan, guide=guide))
        timer, probe = Clock(clock), Trainer(recipe, None, device="cpu")
        with keeping_memory():  # as Trainer.run does
            for k in range(24):
                timer = Clock(clock) if k == 8 else timer
                with timer.running():
                    probe.step()
        pace = timer.minutes / 16
        steps = max(10, int(minutes / pace))
        recipe = replace(recipe, train=replace(recipe.train, steps=steps, warmup=min(recipe.train.warmup, steps // 5)))
        self.trainer = Trainer(recipe, None, device="cpu")

    @property
    def update(self) -> int:
        return self.trainer.update

    @property
    def last(self) -> float:
        return self.trainer.recipe.train.steps

    def step(self, share: float) -> float:
        """One update."""
        return self.trainer.step()["loss"]

    def save(self, folder: Path) -> None:
        """Keep the averaged model."""
        save_bundle(self.trainer.bundle(), folder)


_OF_TRAINING = (
    *("arm", "seed", "minutes", "whole", "processor", "wall", "updates", "loss", "clock", "threads"),
    *("settings", "command"),
)


def train(args: argparse.Namespace) -> None:
    """Train an arm, with snapshots."""
    run = args.work / f"{args.arm}{args.tag}-{args.seed}"
    data = mnist("train", data=args.data)
    if args.arm in ("diffusers", "strong"):
        loop: PlainLoop | OurLoop = PlainLoop(args.arm, data.take(range(len(data)))[0], args.seed)
    else:
        loop = OurLoop(args.arm, args.data, args.seed, args.minutes, args.set, args.clock)
    clock, losses = Clock(args.clock), list[float]()
    kept = contextlib.ExitStack()
    if isinstance(loop, OurLoop):
        kept.enter_context(keeping_memory())  # as Trainer.run does
    for at in [m for m in args.at or MINUTES if m < args.minutes] + [args.minutes]:
        while clock.minutes < at and loop.update < loop.last:
            with clock.running():
                losses.append(loop.step(clock.minutes / args.minutes))
            if loop.update % 200 == 0:
                loss = sum(losses[-200:]) / 200
                print(f"{run.name} {clock.minutes:.2f} min update {loop.update} loss {loss:.4f}", flush=True)
        folder = run / f"{at:05.1f}"
        if not folder.exists():
            loop.save(folder)
            about = {
                "arm": args.arm + args.tag,
                "seed": args.seed,
                "minutes": at,
                "whole": args.minutes,
                "processor": clock.processor,
                "wall": clock.wall,
                "updates": loop.update,
                "loss": sum(losses[-200:]) / len(losses[-200:]),
                "clock": clock.kind,
                "threads": torch.get_num_threads(),
                "settings": args.set,
                "command": f"train {args.arm} --seed {args.seed} --minutes {args.minutes:g}",
            }
            (run / f"{at:05.1f}.json").write_text(json.dumps(about, indent=1) + "\n")


def _other_samplers(work: Path) -> None:
    """Put the last snapshots of `ours` beside themselves, to be sampled otherwise."""
    for run in sorted(work.glob("ours-[0-9]")):
        last = max(run.glob("*.json"), key=lambda p: float(p.stem))
        known = {k: v for k, v in json.loads(last.read_text()).items() if k in _OF_TRAINING}
        for arm, (sampler, steps) in SAMPLED.items():
            there = work / f"{arm}-{known['seed']}" / last.name
            if not there.exists():
                there.parent.mkdir(exist_ok=True)
                about = {**known, "arm": arm, "how": {"sampler": sampler, "steps": steps}}
                there.write_text(json.dumps(about, indent=1) + "\n")
                there.with_suffix("").symlink_to(last.with_suffix("").resolve())


def open_model(known: dict[str, Any], folder: Path) -> tuple[Plain | Bundle, dict[str, Any]]:
    """What is to be sampled, and how."""
    arm = known["arm"]
    if not arm.startswith(("diffusers", "strong")):
        return load(folder, weights="ema", trust=True, device="cpu"), known.get("how", {})
    net = their_net(plain_attention=True)
    net.load_state_dict(load_file(folder / "net.safetensors"))
    strong = arm.startswith("strong")
    schedule = build("schedules", Part("cosine" if strong else "linear"))
    target = build("targets", Part("v" if strong else "eps"), schedule)
    plan = Plan(sampler=Part("ddim"), steps=50, guide=(Part("clip"),))
    return Plain(wrap(net.eval(), schedule, target), (1, 28, 28), plan=plan), {}


def scorer(data: Path) -> Callable[[Tensor], dict[str, Any]]:
    """f(samples) -> FID and KID against the held-out digits."""
    train_set, test = mnist("train", data=data), mnist("test", data=data)
    features = features_for(train_set, test)
    real = Moments(features.dim)
    reference = torch.cat([features(test.take(range(i, i + 1000))[0]) for i in range(0, len(test), 1000)])
    real.update(reference)

    def score(x: Tensor) -> dict[str, Any]:
        made, found = Moments(features.dim), torch.cat([features(part) for part in x.split(1000)])
        made.update(found)
        return {
            "fid": frechet(made.mean, made.cov, real.mean, real.cov),
            "kid": kid(found, reference, subsets=100, size=1000, seed=0)._asdict(),
            "features": {"hash": features.hash, "accuracy": getattr(features, "accuracy", None)},
            "n": len(x),
        }

    return score


def score(args: argparse.Namespace) -> None:
    """Score every snapshot that has none."""
    judge = scorer(args.data)
    floor = args.work / "floor.json"
    _other_samplers(args.work)
    if not floor.exists():
        rows = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))[:COUNT]
        floor.write_text(json.dumps(judge(mnist("train", data=args.data).take(rows.tolist())[0])) + "\n")
    found = args.work.glob(f"{args.only}/*.json")
    for about in sorted(found, key=lambda p: (p.parent.name, -float(p.stem))):
        known = json.loads(about.read_text())
        if "fid" in known or (args.at and known["minutes"] not in args.at):
            continue
        model, how = open_model(known, about.with_suffix(""))
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            x = sample(model, COUNT, seed=0, batch=250, **how)
        known["how"] = how
        known |= {**judge(x.float().clamp(-1, 1)), "sampling": round(time.process_time() - began, 1)}
        about.write_text(json.dumps(known, indent=1) + "\n")
        figures = f"FID {known['fid']:.3f} KID {1000 * known['kid']['mean']:.1f}"
        print(about.parent.name, about.stem, f"updates {known['updates']}", figures, flush=True)


def levels_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """FID and KID of the two levels."""
    found = {}
    for arm, minutes in LEVELS:
        [row] = [r for r in rows if r["arm"] == arm and r["minutes"] == minutes]
        found[arm] = {"fid": row["fid"], "kid": row["kid"]["mean"]}
    return found


def reached(run: list[dict[str, Any]], level: dict[str, float]) -> float | None:
    """The minutes of the first snapshot from which on FID and KID are at or under a level; None if there is none."""
    under = [r["fid"] <= level["fid"] and r["kid"]["mean"] <= level["kid"] for r in run]
    first = next((i for i in range(len(run)) if all(under[i:])), None)
    return None if first is None else float(run[first]["minutes"])


def table(args: argparse.Namespace) -> None:
    """All runs, their last scores and when they came under the levels, as Markdown and JSON."""
    rows = [json.loads(p.read_text()) for p in sorted(args.work.glob("*/*.json"))]
    rows = [row for row in rows if "fid" in row]
    levels, floor = levels_of(rows), json.loads((args.work / "floor.json").read_text())
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (r["arm"], r["seed"], r["whole"], r["minutes"])):
        runs.setdefault(f"{row['arm']}, seed {row['seed']}, {row['whole']:g} min", []).append(row)
    lines = [
        "| run | updates | FID | KID × 1000 | minutes to level 1 | minutes to level 2 |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| {COUNT:,} training images | | {floor['fid']:.2f} | {1000 * floor['kid']['mean']:.1f} | | |",
    ]
    for name, run in runs.items():
        end, times = run[-1], [reached(run, level) for level in levels.values()]
        spoken = " | ".join("not" if t is None else f"{t:g}" for t in times)
        lines.append(f"| {name} | {end['updates']:,} | {end['fid']:.2f} | {1000 * end['kid']['mean']:.1f} | {spoken} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out is not None:
        about = {
            "command": "python bench/time_to_quality.py table --work DIR --out bench/results",
            "run": describe_run(args.seed),
            "ablations": ABLATIONS,
            "sampled": SAMPLED,
            "levels": levels,
            "floor": floor,
            "rows": rows,
        }
        (args.out / "time_to_quality.json").write_text(json.dumps(about, indent=1) + "\n")
        (args.out / "time_to_quality.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("train", "score", "table"))
    parser.add_argument("arm", nargs="?", default="ours")
    parser.add_argument("--data", type=Path, help="a folder with the four IDX files of MNIST")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--at", type=float, nargs="*")
    parser.add_argument("--tag", default="")
    parser.add_argument("--only", default="*")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    {"train": train, "score": score, "table": table}[args.what](args)


if __name__ == "__main__":
    import sys

    sys.modules["time_to_quality"] = sys.modules["__main__"]
    sys.path.insert(0, str(Path(__file__).parent))
    main()
