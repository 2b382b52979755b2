"""Eleven comparisons of diffusion models that the field's papers make, each run again on MNIST with small nets.

    python bench/lessons.py --data PATH --work lessons                 all of it; start it twice to use two cores
    python bench/lessons.py --data PATH --work lessons --row 3         one comparison
    python bench/lessons.py --data PATH --work lessons --report        write results and plots from what is there

A net of at most 0.6 M parameters, one thread, and as many updates as --minutes of a processor afford: the pace of each
kind of training is measured first, so that what else the machine does later changes nothing. N = 1,000 samples, scored
by KID, FID, precision and recall (k = 5) and missing digits in the features of a classifier trained on MNIST; nothing
is told to the models but pixels, except in row 6. Rows 1, 3 and 7 have three seeds and t-intervals over them. Every
training, set of samples and figure is kept in --work: stopped at any time, the same command goes on, and a second
process of it takes what the first has not begun.

Writes bench/results/lessons.json and lessons.md, and docs/images/lessons-*.png.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from lesson_pages import write_pages
from paces import paces
from torch import Tensor

import inkdrop
from inkdrop.bundle import load
from inkdrop.core.dataset import Data
from inkdrop.evals.classifier import Classifier
from inkdrop.evals.features import features_for
from inkdrop.evals.likelihood import Settings, likelihood
from inkdrop.evals.prdc import prdc
from inkdrop.evals.score import reference_shelf, score
from inkdrop.evals.stream import subset
from inkdrop.find import Part
from inkdrop.generate import evaluating, sample
from inkdrop.jobs import guided_asks_of
from inkdrop.plan import change
from inkdrop.recipe import Recipe, open_data
from inkdrop.train.loop import choose, fit, resume
from inkdrop.train.record import write_atomically
from inkdrop.train.trainer import Trainer

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
SEEDED = ("base", "linear", "eps", "v", "flow")


# ---- what is trained ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A training: what differs from the base, which is cosine, x0, T = 1000, averaged weights, no classes."""

    name: str
    settings: tuple[str, ...] = ()
    told: bool = False  # the class
    net: str = "full"

    @property
    def kind(self) -> str:
        """Trainings of one kind take equally long for an update."""
        return f"{self.net}{'-learned' if 'loss=hybrid' in self.settings else ''}{'-told' if self.told else ''}"


MODELS = {
    "base": Model("base"),
    "linear": Model("linear", ("schedule=linear",)),
    "eps": Model("eps", ("target=eps",)),
    "v": Model("v", ("target=v",)),
    "flow": Model("flow", ("schedule=flow", "target=flow", "clock=time")),
    "v-learned": Model("v-learned", ("target=v", "net.learned_variance=true", "loss=hybrid")),
    "constant": Model("constant", ("train.decay=constant",)),
    "told": Model("told", ("train.null_rate=0.1",), told=True),
    "T100": Model("T100", ("schedule.steps=100",)),
    "T250": Model("T250", ("schedule.steps=250",)),
    "blind": Model("blind", ("clock=lesson_parts:blind",)),
    "tiny": Model("tiny", net="tiny"),
}
NETS = {
    True: {"full": Part("unet_mnist", {"width": 14}), "tiny": Part("unet_tiny", {"width": 16})},
    False: {"full": Part("unet_digits", {"width": 12}), "tiny": Part("unet_digits", {"width": 8})},
}
"""On MNIST, and on the embedded digits, which are there to try the program."""

BASELINES = {"gan": (0, 1, 2, 3, 4), "vae": SEEDS, "pixelcnn": SEEDS}


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Whether this process alone works at something."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


class Lessons:
    """The work folder, what is in it, and how the rest is made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.n = args, args.work, args.samples
        self.mnist = args.data is not None
        self.data = str(args.data.resolve()) if self.mnist else ""
        part = Part("mnist", {"data": self.data}) if self.mnist else Part("digits")
        self.train, self.test = (open_data(part, split) for split in ("train", "test"))
        self.work.mkdir(parents=True, exist_ok=True)
        os.environ["INKDROP_CACHE"] = str(self.work / "cache")
        judge = features_for(self.train, self.test)
        assert isinstance(judge, Classifier)
        self.judge = judge
        rows = subset(len(self.test), self.n, seed=0, draw=1)
        self.real = torch.cat([judge(self.test.take(rows[i : i + 500])[0]) for i in range(0, len(rows), 500)])

    # ---- trainings -----------------------------------------------------------------------------------------------

    def recipe(self, model: Model, seed: int) -> Recipe:
        """How a model is trained, but for the number of updates."""
        made = choose("mnist" if self.mnist else "digits", data=self.args.data)
        data = made.data if model.told else Part("lesson_parts:unlabelled", {"data": self.data})
        made = replace(made, data=data, net=NETS[self.mnist][model.net])
        plain = ("loss=simple", "target=x0", "sampler=ddim", "plan.steps=10", "plan.guide=clip", "train.null_rate=0.0")
        usual = ("train.batch=64", "train.lr=2e-3", "train.precision=auto") if self.mnist else ()
        return choose(made, settings=(*plain, *usual, f"train.seed={seed}", *model.settings))

    def updates(self, kind: str) -> int:
        """How many updates the processor time affords, for a kind of model or a baseline: measured once, for all."""
        models = {model.kind: model for model in MODELS.values()}
        makers = {
            kind: lambda m=model: Trainer(self.recipe(m, 0), None, trust=True).step for kind, model in models.items()
        }
        known, path = paces(self.work / "pace.json", makers), self.work / "pace-baselines.json"
        with (self.work / "pace-baselines.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                found = {name: self.example(name, 0, self.work / "tried" / name, 100, 10) for name in BASELINES}
                write_atomically(path, {name: facts["training"] / facts["updates"] for name, facts in found.items()})
        return max(10, round(60 * self.args.minutes / (known | json.loads(path.read_text()))[kind]))

    def example(self, name: str, seed: int, out: Path, updates: int, samples: int) -> Any:
        """Run an example, and give what it says of itself."""
        command = [sys.executable, str(HERE.parent / "examples" / f"{name}.py"), "--out", str(out)]
        command += ["--steps", str(updates), "--minutes", "1000000", "--seed", str(seed), "--samples", str(samples)]
        command += [*(["--data", self.data] if self.mnist else []), *(["--looks", "5"] if name == "gan" else [])]
        subprocess.run(command, check=True)
        return json.loads((out / f"{name}.json").read_text())

    def trained(self, name: str, seed: int = 0) -> Path | None:
        """The run folder, trained to its end; None if another process is at it."""
        run, model = self.work / "runs" / f"{name}-{seed}", MODELS[name]
        done = run / "done.json"
        if done.exists() or self.args.report:
            return run if done.exists() else None
        with held(self.work / "locks" / f"{name}-{seed}") as mine:
            if not mine or done.exists():
                return run if mine else None
            steps = self.updates(model.kind)
            made = self.recipe(model, seed)
            every = {"warmup": min(200, steps // 5), "save_every": max(1, steps // 4), "preview_every": steps}
            made = replace(made, train=replace(made.train, steps=steps, **every))
            say(f"training {name}, seed {seed}: {steps:,} updates")
            began = time.process_time()
            bundle = resume(run, trust=True) if (run / "recipe.json").exists() else fit(made, run, trust=True)
            if bundle.card["updates"] < bundle.recipe.train.steps:  # a signal ends a training in good order
                raise SystemExit(f"stopped in the training of {name}, seed {seed}; the same command goes on")
            facts = {"processor_seconds": round(time.process_time() - began, 1), **bundle.card}
            write_atomically(done, facts)
        return run

    def baseline(self, name: str, seed: int) -> Path | None:
        """The folder of an example's samples, trained for as long as the others; None if another process is at it."""
        out = self.work / "baselines" / f"{name}-{seed}"
        if (out / f"{name}.json").exists() or self.args.report:
            return out if (out / f"{name}.json").exists() else None
        with held(self.work / "locks" / f"{name}-{seed}") as mine:
            if not mine:
                return None
            if not (out / f"{name}.json").exists():
                say(f"training {name}, seed {seed}")
                self.example(name, seed, out, self.updates(name), self.n)
        return out

    # ---- samples and figures -------------------------------------------------------------------------------------

    def figures(self, key: str, x: Callable[[], tuple[Tensor, dict[str, Any]]], labels: Tensor | None = None) -> Any:
        """Figures of samples, made once; x gives the samples and what there is to say of them."""
        path = self.work / "figures" / f"{key}.json"
        if path.exists() or (self.args.report and key != "real"):
            return json.loads(path.read_text()) if path.exists() else None
        with held(self.work / "locks" / f"figures-{key}") as mine:
            if not mine:
                return None
            made, facts = x()
            shelf = reference_shelf(self.train, self.test, self.judge)
            found = score(made.split(500), self.train, self.test, self.judge, labels=labels, shelf=shelf)
            seen = torch.cat([self.judge(part) for part in made.split(500)])
            balls = prdc(self.real, seen)
            row = {
                "key": key,
                "n": found["n"],
                "kid": found["kid"]["mean"],
                "kid_se": found["kid"]["se"],
                "fid": found["fid"],
                "fid_se": (found["intervals"]["fid"] or {}).get("se"),
                "precision": balls.precision,
                "recall": balls.recall,
                "sure": found["classes"]["sure"],
                "agree": found["classes"]["agree"],
                "deviation": found["classes"]["deviation"],
                "missing": found["classes"]["missing"],
                "copies": found["nearest"]["rate"],
                **facts,
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path.with_suffix(".npy"), made[:64].numpy())
            write_atomically(path, row)
        return row

    def sampled(self, name: str, seed: int = 0, weights: str = "ema", exact: bool = False, **how: Any) -> Any:
        """Figures of a training's samples, by ddim and 50 steps unless told; None if another process is at it.

        The net runs in the precision of its training, its input and the sampler in float32; exact: all do.
        """
        run = self.trained(name, seed)
        if run is None:
            return None
        how = {"sampler": "ddim", "steps": 50, **how}
        words = ([v.name, *v.knobs.values()] if isinstance(v, Part) else [v] for v in how.values())
        text = "-".join(str(word) for each in words for word in each)
        key = f"{name}-{seed}-{text}{'' if weights == 'ema' else '-raw'}{'-float32' if exact else ''}"

        def draw() -> tuple[Tensor, dict[str, Any]]:
            bundle = load(run, weights=weights, trust=True)
            plan = change(bundle.plan, **how)
            bundle = replace(bundle, recipe=replace(bundle.recipe, plan=plan))
            say(f"sampling {key}")
            half = bundle.recipe.train.precision == "bfloat16" and not exact
            bundle.denoiser.net.to(memory_format=torch.channels_last if half else torch.contiguous_format)
            began = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                x = sample(bundle, self.n, seed=0, batch=250).clamp(-1, 1)
            spent = time.process_time() - began
            return x, {"asks": guided_asks_of(bundle), "sampling": spent, **json.loads((run / "done.json").read_text())}

        labels = torch.arange(self.n) % len(self.train.classes) if MODELS[name].told else None
        return self.figures(key, draw, labels)

    def drawn(self, name: str, seed: int, look: int | None = None) -> Any:
        """Figures of a baseline's samples."""
        out = self.baseline(name, seed)
        if out is None:
            return None
        file = out / f"{name}{'' if look is None else f'-{look}'}.npy"
        facts = json.loads((out / f"{name}.json").read_text())
        x = lambda: (torch.from_numpy(np.load(file, allow_pickle=False)).clamp(-1, 1), facts)  # noqa: E731
        return self.figures(f"{file.stem}-{seed}", x)

    def bits(self, name: str, variance: str) -> Any:
        """Bits a dimension of held-out images by the chain, with this variance of its steps."""
        run, path = self.trained(name), self.work / "figures" / f"bits-{name}-{variance}.json"
        if run is None:
            return None
        if path.exists() or self.args.report:
            return json.loads(path.read_text()) if path.exists() else None
        with held(self.work / "locks" / path.stem) as mine:
            if not mine:
                return None
            if path.exists():
                return json.loads(path.read_text())
            bundle = load(run, trust=True)
            held_out: Data = open_data(bundle.recipe.data, "test")
            rows = subset(len(held_out), self.args.likelihood, seed=0)
            how = Settings(variance=variance, clip=True, flow_steps=2, draws=1)
            say(f"likelihood of {name}, variance {variance}")
            with evaluating(bundle.denoiser):
                found = likelihood(bundle.denoiser, held_out, rows, how, seed=0)["bound"]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, {key: found[key] for key in ("bits", "se")})
        return {key: found[key] for key in ("bits", "se")}

    def floor(self) -> Any:
        """Figures of as many training images."""
        rows = subset(len(self.train), self.n, seed=0, draw=2)
        return self.figures("real", lambda: (self.train.take(rows)[0], {}))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# ---- the rows ----------------------------------------------------------------------------------------------------


def ddpm(variance: str) -> Part:
    return Part("ddpm", {"variance": variance})


def row_1(do: Lessons) -> Iterator[tuple[str, int, Any]]:
    for steps in do.args.grid_steps:
        for name in ("linear", "base"):
            for seed in SEEDS:
                yield (
                    f"{'cosine' if name == 'base' else name}, {steps} steps",
                    seed,
                    do.sampled(name, seed, steps=steps),
                )


def row_2(do: Lessons) -> Iterator[tuple[str, int, Any]]:
    yield f"DDPM, {do.args.chain} steps", 0, do.sampled("base", sampler="ddpm", steps=do.args.chain)
    for steps in (50, 20, 10):
        yield f"DDIM, {steps} steps", 0, do.sampled("base", steps=steps)
    yield "DDIM, 50 steps in float32", 0, do.sampled("base", exact=True)


def row_3(do: Lessons) -> Iterator[tuple[str, int, Any]]:
    for name in ("eps", "base", "v", "flow"):
        for steps in (50, 10):
            for seed in SEEDS:
                yield f"{'x0' if name == 'base' else name}, {steps} steps", seed, do.sampled(name, seed, steps=steps)


def row_4(do: Lessons) -> Iterator[tuple[str, int, Any]]:
    for name, variance in (("v", "beta"), ("v", "beta-tilde"), ("v-learned", "learned")):
        bits = do.bits(name, variance)
        for steps in (50, 20, 10):
            found = do.sampled(name, sampler=ddpm(variance), steps=steps)
            yield f"{variance}, {steps} steps", 0, None if found is None or bits is None else {**found, "bits": bits}


def row_5(do: Lessons) -> Iterator[tuple[str, int, Any]]:
    for name, text in (("base", "rate falls to 0"), ("constant", "rate stays")):
        for weights in ("ema", "raw"):
            yield f"{text}, {weights}", 0, do.sampled(name, weights=weights)


def row_6(do: Lessons) -> Iterator[tuple[str, int, Any]]:
    for w in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0):
        yield f"w = {w:g}", 0, do.sampled("told", sampler="unipc", steps=12, guidance=w)


def row_7(do: Lessons) -> Iterator[tuple[str, int, Any]]:
    for steps in (50, 10):
        for seed in SEEDS:
            yield f"diffusion, DDIM {steps}", seed, do.sampled("base", seed, steps=steps)
    for name, seeds in BASELINES.items():
        for seed in seeds:
            yield {"gan": "GAN", "vae": "VAE", "pixelcnn": "PixelCNN"}[name], seed, do.drawn(name, seed)
    for look in (1, 2, 3, 4):
        for seed in BASELINES["gan"]:
            yield f"GAN at {look}/5 of the training", seed, do.drawn("gan", seed, look)


def row_8(do: Lessons) -> Iterator[tuple[str, int, Any]]:
    for name, steps in (("T100", 100), ("T250", 250), ("base", do.args.chain)):
        yield f"T = {steps}, DDPM, {steps} steps", 0, do.sampled(name, sampler="ddpm", steps=steps)
        yield f"T = {steps}, DDIM, 20 steps", 0, do.sampled(name, steps=20)


def row_9(do: Lessons) -> Iterator[tuple[str, int, Any]]:
    for steps in sorted({*do.args.grid_steps, 20}, reverse=True):
        for variance in ("beta", "beta-tilde"):
            yield f"{variance}, {steps} steps", 0, do.sampled("base", sampler=ddpm(variance), steps=steps)


def row_10(do: Lessons) -> Iterator[tuple[str, int, Any]]:
    for name, text in (("base", "told the time"), ("blind", "not told")):
        for sampler in ("ddim", "ddpm"):
            yield f"{text}, {sampler}, 50 steps", 0, do.sampled(name, sampler=sampler)


def row_11(do: Lessons) -> Iterator[tuple[str, int, Any]]:
    for name in ("tiny", "base"):
        yield f"{'two levels' if name == 'tiny' else 'three levels'}", 0, do.sampled(name)


ROWS = {int(name.removeprefix("row_")): row for name, row in list(globals().items()) if name.startswith("row_")}


def results(do: Lessons) -> dict[str, Any]:
    """All that is there, row by row; nothing is made that takes long."""
    about = {"inkdrop": inkdrop.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    about |= {"machine": platform.machine(), "threads": 1, "minutes": do.args.minutes, "samples": do.n}
    about |= {"data": "MNIST" if do.mnist else "embedded digits"}
    about |= {"judge": {"hash": do.judge.hash, "accuracy": do.judge.accuracy}, "real": do.floor()}
    files = [file for name in ("pace", "pace-baselines") if (file := do.work / f"{name}.json").exists()]
    pace = {name: seconds for file in files for name, seconds in json.loads(file.read_text()).items()}
    command = f"python bench/lessons.py --data PATH --work lessons --minutes {do.args.minutes:g} --samples {do.n}"
    rows = {
        str(number): [{"setting": s, "seed": seed, **found} for s, seed, found in ROWS[number](do) if found is not None]
        for number in do.args.row
    }
    return {"command": command, **about, "seconds_an_update": pace, "rows": rows}


def plan(do: Lessons) -> None:
    """Say what there is to do, and about how long it takes, before it begins."""
    wanted = [(name, seed) for name in MODELS for seed in (SEEDS if name in SEEDED else (0,))]
    todo = [f"{n}-{s}" for n, s in wanted if not (do.work / "runs" / f"{n}-{s}" / "done.json").exists()]
    others = [f"{n}-{s}" for n, seeds in BASELINES.items() for s in seeds]
    others = [key for key in others if not list((do.work / "baselines" / key).glob("*.json"))]
    trainings = len(todo) + len(others)
    say(f"{trainings} trainings to do, {trainings * do.args.minutes:.0f} minutes of the processor; then the sampling")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="MNIST's folder; without it the embedded digits, to try the program")
    parser.add_argument("--work", type=Path, default=Path("lessons"), help="where all is kept")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the processor, for each training")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--likelihood", type=int, default=64, help="held-out images for bits a dimension")
    parser.add_argument("--chain", type=int, default=1000, help="steps of a whole chain")
    parser.add_argument("--grid-steps", type=int, nargs="+", default=(250, 50, 10))
    parser.add_argument("--row", type=int, nargs="+", default=sorted(ROWS), choices=sorted(ROWS))
    parser.add_argument("--report", action="store_true", help="only write results and plots of what is there")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "images")
    parser.add_argument("--page", type=Path, help="the page of the documents whose tables are written: comparisons.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    do = Lessons(args)
    if not args.report:
        plan(do)
        while True:  # what another process is at is asked for again, until all is there
            missing = 0
            for number in args.row:
                for setting, seed, found in ROWS[number](do):
                    missing += found is None
                    if found is not None:
                        text = (
                            f"KID {1000 * found['kid']:8.2f} ± {1000 * found['kid_se']:5.2f}  FID {found['fid']:7.2f}"
                        )
                        say(f"row {number:2} {setting:32} seed {seed}  {text}")
            if not missing:
                break
            time.sleep(20)
    record = results(do)
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "lessons.json", record)
    write_pages(record, do.work, args.out / "lessons.md", args.images, args.page)
    say(f"written: {args.out / 'lessons.md'}")


if __name__ == "__main__":
    main()
