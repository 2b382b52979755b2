"""The time of a sampler's step without the net, beside diffusers' scheduler.step, interleaved on one thread.

    python bench/overhead.py --out bench/results/overhead.json

Batch 1 of 3×32×32 float32. The net is a no-op: its answer is a tensor that is there already. CPU time of the thread a
question, medians over interleaved runs, so that other work on the machine counts less:

- step: the sampler's generator, its belief and its noise ready, from the first answer on;
- theirs: `scheduler.step`, which turns the net's answer into x0 itself, its noise ready; without set_timesteps and
  scale_model_input, on the same spacing;
- with noise: the same two, with the noise drawn: ours keyed by (seed, image, draw), theirs by torch.randn;
- drive: ours with its noise, through `drive` and a `Denoiser` round the no-op net, so with clock, scale and target.

The requirement is step/theirs at most 1/2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import torch
from torch import Tensor

import inkdrop
from inkdrop.core.ask import Belief, Noise
from inkdrop.core.noise import Keyed
from inkdrop.denoiser import Denoiser, wrap
from inkdrop.drive import drive
from inkdrop.find import Part, build, find

SHAPE = (1, 3, 32, 32)
VP = Part("scaled_linear")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLE = {**BETAS, "timestep_spacing": "trailing"}
KARRAS = {**BETAS, "use_karras_sigmas": True}


class Pair(NamedTuple):
    """A sampler of ours and a scheduler of theirs that do the same."""

    sampler: Part
    scheduler: str
    config: dict[str, Any]
    schedule: Part = VP


PAIRS = [
    Pair(Part("ddim"), "DDIMScheduler", TABLE),
    Pair(Part("ddim", {"eta": 1.0}), "DDIMScheduler", {**TABLE, "eta": 1.0}),
    Pair(Part("ddpm"), "DDPMScheduler", TABLE),
    Pair(Part("euler"), "EulerDiscreteScheduler", TABLE),
    Pair(Part("euler_ancestral"), "EulerAncestralDiscreteScheduler", TABLE),
    Pair(Part("heun"), "HeunDiscreteScheduler", TABLE),
    Pair(Part("dpm2"), "KDPM2DiscreteScheduler", TABLE),
    Pair(Part("dpm2_ancestral"), "KDPM2AncestralDiscreteScheduler", TABLE),
    Pair(Part("dpmpp_2m"), "DPMSolverMultistepScheduler", TABLE),
    Pair(Part("dpmpp_3m"), "DPMSolverMultistepScheduler", {**TABLE, "solver_order": 3}),
    Pair(Part("dpmpp_2m_sde"), "DPMSolverMultistepScheduler", {**TABLE, "algorithm_type": "sde-dpmsolver++"}),
    Pair(Part("dpmpp_2s"), "DPMSolverSinglestepScheduler", BETAS),
    Pair(Part("unipc"), "UniPCMultistepScheduler", TABLE),
    Pair(Part("unipc", {"predictor_order": 3}), "UniPCMultistepScheduler", {**TABLE, "solver_order": 3}),
    Pair(Part("deis"), "DEISMultistepScheduler", {**TABLE, "solver_order": 3}),
    Pair(Part("plms"), "PNDMScheduler", {**TABLE, "skip_prk_steps": True}),
    Pair(Part("ipndm"), "IPNDMScheduler", {}),
    Pair(Part("lms"), "LMSDiscreteScheduler", TABLE),
    Pair(Part("euler"), "EDMEulerScheduler", {}, Part("edm")),
    Pair(Part("dpmpp_2m"), "EDMDPMSolverMultistepScheduler", {}, Part("edm")),
    Pair(Part("euler"), "FlowMatchEulerDiscreteScheduler", {}, Part("flow")),
    Pair(Part("heun"), "FlowMatchHeunDiscreteScheduler", {}, Part("flow")),
]


def ours(pair: Pair, steps: int) -> tuple[Callable[[], float], ...]:
    """Runs of ours, each giving microseconds a question: noise ready, noise drawn, and drive with a Denoiser."""
    schedule = build("schedules", pair.schedule)
    grid = build("grids", Part("uniform" if pair.schedule.name == "edm" else "trailing"), schedule, steps)
    sampler, knobs = find("samplers", pair.sampler.name), pair.sampler.knobs
    x, ready, belief = torch.randn(SHAPE), torch.randn(SHAPE), Belief(torch.randn(SHAPE), torch.randn(SHAPE))
    denoiser = denoiser_of(pair, torch.randn(SHAPE))

    def step(noise: Noise) -> float:
        sampling, asked = sampler(x, grid, noise, **knobs), 0
        next(sampling)
        began = time.thread_time()
        try:
            while True:
                asked += 1
                sampling.send(belief)
        except StopIteration:
            return 1e6 * (time.thread_time() - began) / asked

    def whole() -> float:
        began, steps = time.thread_time(), []
        drive(sampler(x, grid, Keyed(0, [0]), **knobs), denoiser, on_step=steps.append)
        return 1e6 * (time.thread_time() - began) / (len(steps) - 1)

    return lambda: step(lambda x, now, nxt: ready), lambda: step(Keyed(0, [0])), whole


def denoiser_of(pair: Pair, answer: Tensor) -> Denoiser:
    """A Denoiser round a net that does nothing."""
    schedule = build("schedules", pair.schedule)
    target = build("targets", Part("flow" if pair.schedule.name == "flow" else "eps"), schedule)
    return wrap(lambda x, clock: answer, schedule, target)


def theirs(pair: Pair, steps: int) -> tuple[Callable[[], float], ...]:
    """Runs of theirs, each giving microseconds a question in scheduler.step: noise ready, and noise drawn."""
    config = {name: value for name, value in pair.config.items() if name != "eta"}
    extra = {name: value for name, value in pair.config.items() if name == "eta"}
    scheduler = getattr(diffusers, pair.scheduler)(**config)
    start, answer, ready = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    module = sys.modules[type(scheduler).__module__]

    def run() -> float:
        scheduler.set_timesteps(steps)
        x, spent = start, 0.0
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            began = time.thread_time()
            x = scheduler.step(answer, t, x, **extra).prev_sample
            spent += time.thread_time() - began
        return 1e6 * spent / len(scheduler.timesteps)

    def bare() -> float:
        if not hasattr(module, "randn_tensor"):
            return run()
        with mock.patch.object(module, "randn_tensor", return_value=ready):
            return run()

    return bare, run


def name_of(part: Part) -> str:
    knobs = ", ".join(f"{name}={value}" for name, value in part.knobs.items())
    return f"{part.name}({knobs})" if knobs else part.name


def measure(steps: int, repeats: int, pairs: list[Pair]) -> list[dict[str, Any]]:
    """A row for each pair: medians, in microseconds a question."""
    runs = [(*ours(pair, steps), *theirs(pair, steps)) for pair in pairs]
    times: list[list[tuple[float, ...]]] = [[] for _ in runs]
    for repeat in range(repeats + 2):
        for each, heard in zip(runs, times, strict=True):
            found = tuple(one() for one in each)
            if repeat >= 2:  # the first two warm up
                heard.append(found)
    rows = []
    for pair, heard in zip(pairs, times, strict=True):
        step, noisy, driven, other, other_noisy = (statistics.median(column) for column in zip(*heard, strict=True))
        rows.append(
            {
                "sampler": name_of(pair.sampler),
                "diffusers": pair.scheduler,
                "step": round(step, 1),
                "theirs": round(other, 1),
                "ratio": round(step / other, 2),
                "step with noise": round(noisy, 1),
                "theirs with noise": round(other_noisy, 1),
                "ratio with noise": round(noisy / other_noisy, 2),
                "drive": round(driven, 1),
                "schedule": pair.schedule.name,
                "config": pair.config,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    columns = [name for name in rows[0] if name not in ("schedule", "config")]
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row[name]) for name in columns)} |" for row in rows)])


def about() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "inkdrop": inkdrop.__version__,
        "diffusers": diffusers.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--only", help="a sampler's name")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [pair for pair in PAIRS if args.only in (None, pair.sampler.name)]
    rows = measure(args.steps, args.repeats, pairs)
    print(f"CPU microseconds a question, medians of {args.repeats} interleaved runs of {args.steps} steps\n")
    print(table(rows))
    if args.out is not None:
        command = f"python bench/overhead.py --steps {args.steps} --repeats {args.repeats}"
        args.out.write_text(
            json.dumps({"command": command, **about(), "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
