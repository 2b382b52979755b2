"""The speed and memory of our U-Net beside diffusers' UNet2DModel with the same weights, interleaved on one thread.

    python bench/nets.py --out bench/results               eager, channels_last, bfloat16
    python bench/nets.py --compile --out bench/results     and torch.compile, whose compiling takes most of the time
    python bench/nets.py --quick                           a quarter of the batch, three rounds

UNet2DModel is made with random weights, every parameter moved, and read by inkdrop.hub: both hold the same numbers.
Before anything is timed their answers, their gradients by the image, and the norm of their gradients by all parameters
must agree to 1e-5 of the largest.

Passes: `forward`, a call without gradients in evaluation mode; `with backward`, a call in training mode (no dropout),
the mean squared error against noise and its gradient for every parameter, none of which is there before.

- time: processor time of the process, in ms, so that other work on the machine counts less. In each round every pass of
  every variant runs once on each side, one right after the other, in turns the first. Medians over rounds; `ratio` is
  the median over rounds of ours/theirs, `quartiles` those of the ratio.
- peak: the most bytes of torch's CPU allocator in use at once, beyond those in use before the call: every allocation
  and every free that torch.profiler records, scratch that kernels take inside and gradients included. The count is
  checked: at the end of a call the gradients must be left, and nothing else, to the byte.
- kept: bytes that the forward pass keeps for the backward pass: distinct storages that autograd saves, without
  parameters.
- off: the largest difference of the answers from those of UNet2DModel in eager float32, over the largest of those.
- compile: processor seconds of the first call, its children (the C++ compiler) included, on one thread from an empty
  cache; `breaks` counts the breaks of the graph.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import resource
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import diffusers
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import inkdrop
from inkdrop.hub.unet import read_unet

CLASS = "UNet2DModel"
PASSES = ("forward", "with backward")
TOLERANCE = 1e-5


class Case(NamedTuple):
    """A config of UNet2DModel and a batch that a CPU can take."""

    name: str
    batch: int
    config: dict[str, Any]


DDPM = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}
"""google/ddpm-cifar10-32."""

SMALL = {
    **DDPM,
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attn_norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
}
"""Three levels for 28×28, time scales and shifts: what a small net of the house is."""

CASES = (Case("MNIST", 64, SMALL), Case("CIFAR-10", 4, DDPM))


class Variant(NamedTuple):
    """How a net is run."""

    name: str
    layout: torch.memory_format = torch.contiguous_format
    half: bool = False
    compiled: bool = False

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)


VARIANTS = (
    Variant("eager"),
    Variant("channels_last", layout=torch.channels_last),
    Variant("bfloat16 autocast", half=True),
)
COMPILED = Variant("torch.compile", compiled=True)


# ---- the two sides -----------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One of the two nets, run in one way on one batch."""

    net: Any  # a module, compiled or not
    answer: Callable[[Any, Tensor, Tensor], Tensor]
    variant: Variant
    x: Tensor
    clock: Tensor
    noise: Tensor
    compiling: dict[str, float] = field(default_factory=dict)
    breaks: int = 0

    def ready(self, name: str) -> None:
        """In the mode of a pass, without gradients."""
        self.net.train(name != "forward")
        self.net.zero_grad(set_to_none=True)

    def run(self, name: str) -> None:
        """A pass."""
        if name == "forward":
            with torch.no_grad():
                self.says()
        else:
            (self.says() - self.noise).square().mean().backward()

    def says(self) -> Tensor:
        with self.variant.autocast():
            y = self.answer(self.net, self.x, self.clock)
        return y.float()

    def gradients(self) -> int:
        """Bytes of the gradients that there are."""
        return sum(p.grad.untyped_storage().nbytes() for p in self.net.parameters() if p.grad is not None)


def ours(net: Any, x: Tensor, clock: Tensor) -> Tensor:
    y: Tensor = net(x, clock)
    return y


def theirs(net: Any, x: Tensor, clock: Tensor) -> Tensor:
    y: Tensor = net(x, clock, return_dict=False)[0]
    return y


Pair = dict[str, Side]
"""inkdrop and diffusers."""


def pair_of(case: Case, batch: int) -> Pair:
    """Both nets with the same weights, and a batch."""
    torch.manual_seed(0)
    other: Any = getattr(diffusers, CLASS)(**case.config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    net = read_unet(dict(other.config) | {"_class_name": CLASS}, copy.deepcopy(other.state_dict()))
    shape = (batch, case.config["in_channels"], *[case.config["sample_size"]] * 2)
    data = (torch.randn(shape), torch.rand(batch) * 999, torch.randn(shape))
    return {
        "inkdrop": Side(net.requires_grad_(), ours, VARIANTS[0], *data),
        "diffusers": Side(other, theirs, VARIANTS[0], *data),
    }


def as_variant(pair: Pair, variant: Variant) -> Pair:
    """The same nets, run in another way; compiled here, with the time that it takes."""
    found = {}
    for name, side in pair.items():
        net = side.net
        if variant.layout is not torch.contiguous_format:
            net = copy.deepcopy(net).to(memory_format=variant.layout)
        x = side.x.contiguous(memory_format=variant.layout)
        found[name] = Side(net, side.answer, variant, x, side.clock, side.noise)
    if variant.compiled:
        torch.compile(lambda x: x + 1)(torch.zeros(64, requires_grad=True)).sum().backward()  # loads what both need
        for side in found.values():
            compile_(side)
    return found


def compile_(side: Side) -> None:
    """Both passes through inductor, from an empty cache."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    side.net = torch.compile(side.net, dynamic=False)  # for this size, whatever was compiled before
    counters.clear()
    with fresh_cache():
        for name in PASSES:
            side.ready(name)
            began = spent()
            side.run(name)
            side.compiling[name] = spent() - began
    side.breaks = sum(counters["graph_break"].values())


def spent() -> float:
    """Processor seconds of the process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


# ---- what is measured --------------------------------------------------------------------------------------------


def check(pair: Pair) -> dict[str, float]:
    """How far answers and gradients are apart, over the largest; too far ends the run."""
    heard: dict[str, dict[str, Any]] = {}
    for name, side in pair.items():
        side.ready("with backward")
        x = side.x.clone().requires_grad_()
        y = side.answer(side.net, x, side.clock)
        (y - side.noise).square().mean().backward()
        norm = torch.stack([p.grad.double().norm() for p in side.net.parameters()]).norm()
        heard[name] = {"answer": y.detach(), "gradient by the image": x.grad, "norm of all gradients": norm}
    apart = {}
    for what, other in heard["diffusers"].items():
        apart[what] = float((heard["inkdrop"][what] - other).abs().max() / other.abs().max())
        if not apart[what] <= TOLERANCE:
            raise SystemExit(f"nets: {what} of the two is {apart[what]:.1e} apart, need at most {TOLERANCE}")
    return apart


def off(side: Side, right: Tensor) -> float:
    """The largest difference of the answers from the right ones, over the largest of those."""
    side.ready("forward")
    with torch.no_grad():
        return float((side.says() - right).abs().max() / right.abs().max())


def peak(side: Side, name: str) -> int:
    """The most bytes of torch's CPU allocator in use at once in a pass, beyond those in use before.

    Raises:
        SystemExit: what is in use at the end is not the gradients, to the byte: then the count missed something.
    """
    side.ready(name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        side.run(name)
    used, most = 0, 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            most = max(most, used)
    if used != side.gradients():
        raise SystemExit(f"nets: {used} bytes are in use after a {name} pass, need {side.gradients()} of gradients")
    return most


def kept(side: Side) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass, without parameters."""
    side.ready("with backward")
    own = {parameter.untyped_storage().data_ptr() for parameter in side.net.parameters()}
    found: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        side.says()
    return sum(found.values())


def measure(pairs: list[Pair], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each variant and pass: times of interleaved rounds, and memory."""
    keys = [(i, name) for i in range(len(pairs)) for name in PASSES]
    times: dict[tuple[int, str], list[dict[str, float]]] = {key: [] for key in keys}
    for turn in range(rounds + 1):
        for i, name in keys:
            found = timed(pairs[i], name, reverse=turn % 2 == 1)
            if turn:  # the first warms up
                times[i, name].append(found)
    for i, name in keys:
        pair, heard = pairs[i], times[i, name]
        ratios = [each["inkdrop"] / each["diffusers"] for each in heard]
        middle = {side: statistics.median(each[side] for each in heard) for side in pair}
        most = {side: peak(pair[side], name) for side in pair}
        yield {
            "variant": pair["inkdrop"].variant.name,
            "pass": name,
            "ms": {side: round(1e3 * value, 2) for side, value in middle.items()},
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(value, 3) for value in quartiles(ratios)],
            "peak": most,
            "peak ratio": round(most["inkdrop"] / most["diffusers"], 3),
        }


def timed(pair: Pair, name: str, *, reverse: bool) -> dict[str, float]:
    """Processor seconds of a pass on each side, one after the other."""
    found = {}
    for key in sorted(pair, reverse=reverse):
        pair[key].ready(name)
        gc.collect()
        began = time.process_time()
        pair[key].run(name)
        found[key] = time.process_time() - began
    return found


def quartiles(numbers: list[float]) -> tuple[float, float]:
    if len(numbers) < 2:
        return numbers[0], numbers[0]
    first, _, last = statistics.quantiles(numbers, n=4, method="inclusive")
    return first, last


def compare(case: Case, batch: int, rounds: int, variants: list[Variant]) -> dict[str, Any]:
    """A case: its agreement and its rows."""
    pair = pair_of(case, batch)
    apart = check(pair)
    pairs = [pair, *(as_variant(pair, variant) for variant in variants if variant.name != "eager")]
    pair["diffusers"].ready("forward")
    with torch.no_grad():
        right = pair["diffusers"].says()
    extra = {
        each["inkdrop"].variant.name: {
            "kept": {key: kept(side) for key, side in each.items()},
            "off": {key: off(side, right) for key, side in each.items()},
            "compile": {key: side.compiling for key, side in each.items()},
            "breaks": {key: side.breaks for key, side in each.items()},
        }
        for each in pairs
    }
    rows = list(measure(pairs, rounds))
    parameters = sum(p.numel() for p in pair["inkdrop"].net.parameters())
    shape = list(pair["inkdrop"].x.shape)
    head = {"net": case.name, "shape": shape, "parameters": parameters, "apart": apart, "config": case.config}
    return {**head, "rows": rows, "variants": extra}


# ---- the report --------------------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> str:
    """A case as markdown: time and memory, then what there is once for each variant."""
    shape = "×".join(str(n) for n in found["shape"])
    lines = [
        f"## {found['net']}: {found['parameters']:,} parameters, batch {shape}",
        "",
        "| variant | pass | inkdrop ms | diffusers ms | ratio | quartiles | inkdrop peak MB | diffusers | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        ms, most = row["ms"], row["peak"]
        spread = "–".join(f"{value:.2f}" for value in row["quartiles"])
        cells = [row["variant"], row["pass"], f"{ms['inkdrop']:.0f}", f"{ms['diffusers']:.0f}", f"{row['ratio']:.2f}"]
        cells += [spread, f"{most['inkdrop'] / 1e6:.1f}", f"{most['diffusers'] / 1e6:.1f}", f"{row['peak ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| variant | {' | '.join(ONCE)} |", f"| --- |{' --- |' * len(ONCE)}"]
    for name, told in found["variants"].items():
        lines.append(f"| {name} | {' | '.join(once(told))} |")
    return "\n".join(lines)


ONCE = (
    "inkdrop kept MB",
    "diffusers kept MB",
    "ratio",
    "inkdrop off",
    "diffusers off",
    "inkdrop compile s (breaks)",
    "diffusers compile s (breaks)",
)


def once(told: dict[str, Any]) -> list[str]:
    """The cells of what there is once for each variant."""
    mine, other = (told["kept"][side] for side in ("inkdrop", "diffusers"))
    cells = [f"{mine / 1e6:.1f}", f"{other / 1e6:.1f}", f"{mine / other:.2f}"]
    cells += [f"{told['off'][side]:.0e}" for side in ("inkdrop", "diffusers")]
    for side in ("inkdrop", "diffusers"):
        seconds = told["compile"][side]
        each = " + ".join(f"{seconds[name]:.0f}" for name in PASSES if name in seconds)
        cells.append(f"{each} ({told['breaks'][side]})" if each else "–")
    return cells


def about() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "inkdrop": inkdrop.__version__,
        "diffusers": diffusers.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def compiler() -> str | None:
    """The C++ compiler that inductor would call; None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, help="5; 3 with --quick")
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one of the two configs")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--quick", action="store_true", help="a quarter of the batch, three rounds")
    parser.add_argument("--out", type=Path, help="a folder for nets.json and nets.md; with --only nets-NAME.*")
    return parser.parse_args()


def command_of(args: argparse.Namespace) -> str:
    only = ["--only", args.only] if args.only else []
    flags = [f"--{name}" for name in ("compile", "quick") if getattr(args, name)]
    return " ".join(["python bench/nets.py --rounds", str(args.rounds), *only, *flags])


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    args.rounds = args.rounds or (3 if args.quick else 5)
    variants, notes = list(VARIANTS), []
    if args.compile and compiler() is not None:
        variants.append(COMPILED)
    else:
        notes.append(f"torch.compile was not run: {'there is no C++ compiler' if args.compile else 'no --compile'}.")
    found = []
    for case in CASES:
        if args.only in (None, case.name):
            batch = max(1, case.batch // 4) if args.quick else case.batch
            found.append(compare(case, batch, args.rounds, variants))
            print(report(found[-1]), "\n", flush=True)
    if args.out is not None:
        command, told = command_of(args), about()
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"command": command, **told, "notes": notes, "cases": found}, indent=1)
        name = "nets" if args.only is None else f"nets-{args.only.lower()}"
        (args.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        head = f"# Nets: speed and memory beside UNet2DModel\n\n`{command}`: torch {told['torch']}, diffusers "
        head += f"{told['diffusers']}, {told['threads']} thread, {told['processor']}.\n\n"
        tables = "\n\n".join([*(report(each) for each in found), *notes])
        (args.out / f"{name}.md").write_text(f"{head}{tables}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
