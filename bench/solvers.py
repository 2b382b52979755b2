"""Error against the number of questions: every deterministic sampler on every grid, beside diffusers' schedulers.

    python bench/solvers.py --out bench/results                  two mixtures whose ideal denoiser is known
    python bench/solvers.py runs/mnist --out bench/results       and a trained model

The error is the root mean square distance of the results from those of the same start noise with 1,000 questions (heun
in u, 500 steps of `quadratic`, whose own error is far smaller). A budget of n questions is spent on as many steps as it
affords. Their schedulers are tried with each spacing, each choice of sigmas and each order that they offer for the same
table, and answered in the same words (v for a model trained on v). Mixtures in float64, trained models in float32.

On a trained model only those are run that were best of their family at some budget on a problem before, and all with a
plain spacing.

Writes solvers.json, solvers.md and solvers.png.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import torch
from torch import Tensor

import inkdrop
from inkdrop.bundle import load
from inkdrop.core.ask import Ask, Belief
from inkdrop.core.noise import normal
from inkdrop.core.oracle import Mixture
from inkdrop.core.schedule import Table
from inkdrop.drive import drive
from inkdrop.errors import InkdropError
from inkdrop.find import Part, build, find
from inkdrop.generate import cond_of

BUDGETS = (4, 6, 8, 12, 20, 50)


# ---- problems ----------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Something that answers, a table of betas, and start noise."""

    name: str
    schedule: Table
    answer: Callable[[Ask], Belief]
    start: Tensor
    says: str  # what theirs are answered with: epsilon or v_prediction
    truth: Tensor = field(init=False)

    def __post_init__(self) -> None:
        grid = build("grids", Part("quadratic"), self.schedule, 500)
        self.truth = drive(find("samplers", "heun")(self.start, grid, silent), self.answer)

    def error(self, x: Tensor) -> float:
        found = float((x.double() - self.truth.double()).square().mean().sqrt())
        return found if math.isfinite(found) else math.inf


def silent(*_: Any) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def mixtures() -> Iterator[Problem]:
    """Five narrow Gaussians of the plane; twenty of different widths in 64 dimensions, as a small set of images."""
    schedule = build("schedules", Part("linear"))
    angles = torch.arange(5, dtype=torch.float64) * 2 * math.pi / 5
    ring = Mixture(0.8 * torch.stack([angles.cos(), angles.sin()], 1), torch.full((5,), 0.05))
    draws = torch.Generator().manual_seed(0)
    means = torch.rand(20, 64, generator=draws, dtype=torch.float64) * 2 - 1
    cloud = Mixture(means, 0.05 + 0.25 * torch.rand(20, generator=draws, dtype=torch.float64))
    for name, oracle, count in (("ring of 5, 2-D", ring, 256), ("mixture of 20, 64-D", cloud, 256)):
        yield Problem(name, schedule, oracle, normal((count, oracle.means.shape[1]), 0, range(count), 0), "epsilon")


def trained(path: Path, images: int) -> Problem:
    """A trained model, told the classes in turn, without guidance or clipping."""
    bundle = load(path)
    if not isinstance(bundle.schedule, Table):
        raise SystemExit("solvers: theirs need a table of betas, which this model has not")
    cond = cond_of(bundle, images, None, None)
    start = normal((images, *bundle.shape), 0, range(images), 0).float()
    return Problem(
        f"trained on {bundle.recipe.data.name}",
        bundle.schedule,
        lambda ask: bundle.denoiser(ask._replace(cond=cond)),
        start,
        "v_prediction",
    )


# ---- ours --------------------------------------------------------------------------------------------------------

SAMPLERS = [
    Part("ddim"),
    Part("heun"),
    Part("heun", {"space": "rho"}),
    Part("dpm2"),
    Part("dpmpp_2s"),
    Part("dpmpp_2m"),
    Part("dpmpp_3m"),
    *(Part("unipc", {"predictor_order": p, "variant": v}) for p, v in product((1, 2, 3), ("b1", "b2"))),
    *(Part("deis", {"order": order}) for order in (2, 3)),
    *(Part("lms", {"order": order}) for order in (2, 3, 4)),
    Part("plms"),
    Part("ipndm"),
]
GRIDS = {
    part.name if not part.knobs else f"{part.name}({', '.join(f'{k}={v:g}' for k, v in part.knobs.items())})": part
    for part in (
        *(Part(name) for name in ("uniform", "trailing", "leading", "linspace", "quadratic", "power")),
        *(Part("power", {"exponent": exponent, "start": 0.8}) for exponent in (1.0, 1.5)),
        *(Part(name) for name in ("karras", "loguniform")),
        *(Part(name, {"rho_max": 20.0}) for name in ("karras", "loguniform")),
    )
}


def ours(problem: Problem, sampler: Part, grid: str, budget: int) -> float | None:
    """The error of the most steps that the budget affords; None where the two do not go together."""
    function = find("samplers", sampler.name)
    for steps in range(budget, 0, -1):
        asked = 0

        def answer(ask: Ask) -> Belief:
            nonlocal asked
            asked += 1
            return problem.answer(ask)

        try:
            levels = build("grids", GRIDS[grid], problem.schedule, steps)
            if cost(function, levels, sampler.knobs) > budget:
                continue
            x = drive(function(problem.start, levels, silent, **sampler.knobs), answer)
        except InkdropError:
            return None
        if asked > budget:
            raise AssertionError(f"{sampler}: {asked} questions of {budget}")
        return problem.error(x)
    return None


def cost(function: Any, grid: Any, knobs: dict[str, Any]) -> int:
    """How many questions a sampler asks on a grid, run on nothing."""
    nothing, asked = torch.zeros(1, 1, dtype=torch.float64), 0
    sampling = function(nothing, grid, silent, **knobs)
    try:
        next(sampling)
        while True:
            asked += 1
            sampling.send(Belief(nothing, nothing))
    except StopIteration:
        return asked


# ---- theirs ------------------------------------------------------------------------------------------------------

SPACINGS = [{"timestep_spacing": name} for name in ("linspace", "leading", "trailing")]
SIGMAS = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
SIGMAS_OF_LU = [*SIGMAS, {"use_lu_lambdas": True}]


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every scheduler of theirs that integrates the flow, with every choice that changes its steps."""
    yield from (("DDIMScheduler", spacing) for spacing in SPACINGS)
    for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"):
        yield from ((name, choice) for choice in (*SPACINGS, *SIGMAS))
    for prk, spacing in product((True, False), SPACINGS):
        yield "PNDMScheduler", {"skip_prk_steps": prk, **spacing}
    for order, kind, choice in product((2, 3), ("midpoint", "heun"), (*SPACINGS, *SIGMAS_OF_LU)):
        if (order, kind) != (3, "heun"):  # which their third order does not look at
            for final in ({}, {"euler_at_final": True}, {"final_sigmas_type": "sigma_min"}):
                yield "DPMSolverMultistepScheduler", {"solver_order": order, "solver_type": kind, **choice, **final}
    for order, choice in product((2, 3), ({}, *SIGMAS)):
        yield "DPMSolverSinglestepScheduler", {"solver_order": order, "final_sigmas_type": "zero", **choice}
    for order, kind, choice in product((1, 2, 3), ("bh1", "bh2"), (*SPACINGS, *SIGMAS)):
        yield "UniPCMultistepScheduler", {"solver_order": order, "solver_type": kind, **choice}
    for order, choice in product((2, 3), (*SPACINGS, *SIGMAS)):
        yield "DEISMultistepScheduler", {"solver_order": order, **choice}


def theirs(problem: Problem, name: str, config: dict[str, Any], budget: int) -> float | None:
    """The error of the most steps that the budget affords; None where their own code refuses or fails."""
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    betas = problem.schedule.betas.float().numpy()
    house = {"trained_betas": betas, "prediction_type": problem.says, "clip_sample": False, "set_alpha_to_one": True}
    scheduler = kind(**{key: value for key, value in house.items() if key in known}, **config)
    for steps in range(budget, 0, -1):
        try:
            scheduler.set_timesteps(steps)
            if len(scheduler.timesteps) > budget:
                continue
            x = problem.start * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                told = said(problem, scheduler.scale_model_input(x, t).to(x.dtype), float(t))
                x = scheduler.step(told, t, x).prev_sample.to(x.dtype)
        except (
            ValueError,
            IndexError,
            ZeroDivisionError,
            RuntimeError,
            AssertionError,
            InkdropError,
            NotImplementedError,
        ):
            return None
        return problem.error(x)
    return None


def said(problem: Problem, x: Tensor, clock: float) -> Tensor:
    """The answer in their words; between the table's entries our schedule interpolates log-SNR, as theirs do."""
    steps = problem.schedule.steps
    level = problem.schedule(min(max(clock + 1, 1.0), steps) / steps)
    belief = problem.answer(Ask(x, level))
    return belief.eps if problem.says == "epsilon" else level.alpha * belief.eps - level.sigma * belief.x0


# ---- the comparison ----------------------------------------------------------------------------------------------


def name_of(name: str, knobs: dict[str, Any]) -> str:
    shown = ", ".join(str(value) if isinstance(value, str) else f"{key}={value}" for key, value in knobs.items())
    return f"{name}({shown})" if shown else name


class Method(NamedTuple):
    """A way to spend a budget."""

    side: str
    family: str
    name: str
    plain: bool
    error: Callable[[Problem, int], float | None]


def methods() -> list[Method]:
    """All of ours and all of theirs."""
    found = []
    for sampler, grid in product(SAMPLERS, GRIDS):
        name = f"{name_of(sampler.name, sampler.knobs)} on {grid}"
        plain = grid.isidentifier()
        found.append(Method("inkdrop", sampler.name, name, plain, partial(_ours, sampler, grid)))
    for kind, config in configs():
        plain = set(config) <= {
            "timestep_spacing",
            "solver_order",
            "solver_type",
            "skip_prk_steps",
            "final_sigmas_type",
        }
        plain = plain and config.get("final_sigmas_type") != "sigma_min"
        found.append(Method("diffusers", kind, name_of(kind, config), plain, partial(_theirs, kind, config)))
    return found


def _ours(sampler: Part, grid: str, problem: Problem, budget: int) -> float | None:
    return ours(problem, sampler, grid, budget)


def _theirs(kind: str, config: dict[str, Any], problem: Problem, budget: int) -> float | None:
    return theirs(problem, kind, config, budget)


def compare(problem: Problem, among: list[Method]) -> list[dict[str, Any]]:
    """A row for each method: its errors by budget, None where it cannot."""
    rows = []
    for method in among:
        errors = {n: method.error(problem, n) for n in BUDGETS}
        if any(error is not None for error in errors.values()):
            rows.append({"side": method.side, "family": method.family, "method": method.name, "errors": errors})
    return rows


def winners(rows: list[dict[str, Any]]) -> set[str]:
    """The best method of each family at each budget."""
    found = set()
    for (side, family), n in product({(r["side"], r["family"]) for r in rows}, BUDGETS):
        own = [r for r in rows if (r["side"], r["family"]) == (side, family) and r["errors"][n] is not None]
        if own:
            found.add(min(own, key=lambda r, n=n: r["errors"][n])["method"])
    return found


def best(rows: list[dict[str, Any]], side: str, budget: int) -> tuple[float, str]:
    found = [(r["errors"][budget], r["method"]) for r in rows if r["side"] == side and r["errors"][budget] is not None]
    return min(found)


def summary(name: str, rows: list[dict[str, Any]]) -> str:
    """The best of each side by budget, then each family's best."""
    lines = [f"## {name}", "", "| asks | inkdrop | | diffusers | | ratio |", "| --- | --- | --- | --- | --- | --- |"]
    for n in BUDGETS:
        mine, others = best(rows, "inkdrop", n), best(rows, "diffusers", n)
        ratio = mine[0] / others[0]
        lines.append(f"| {n} | {mine[0]:.3g} | {mine[1]} | {others[0]:.3g} | {others[1]} | {ratio:.2f} |")
    head = " | ".join(f"{n} asks" for n in BUDGETS)
    lines += ["", f"| best grid or spacing of | {head} |", f"| --- |{' --- |' * len(BUDGETS)}"]
    for side, family in dict.fromkeys((r["side"], r["family"]) for r in rows):
        cells = " | ".join("–" if e is None else f"{e:.2g}" for e in envelope(rows, side, family))
        lines.append(f"| {family} | {cells} |")
    return "\n".join(lines)


def envelope(rows: list[dict[str, Any]], side: str, family: str) -> list[float | None]:
    """The least error of a family at each budget."""
    own = [r["errors"] for r in rows if (r["side"], r["family"]) == (side, family)]
    return [min((e[n] for e in own if e[n] is not None), default=None) for n in BUDGETS]


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each problem: each family's best over grids or spacings, ours solid and theirs dashed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 4.6), squeeze=False)
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        for side, style, colours in (("inkdrop", "-", plt.cm.Blues), ("diffusers", "--", plt.cm.Oranges)):
            families = list(dict.fromkeys(r["family"] for r in rows if r["side"] == side))
            for i, family in enumerate(families):
                line = [(n, e) for n, e in zip(BUDGETS, envelope(rows, side, family), strict=True) if e is not None]
                colour = colours(0.35 + 0.5 * i / max(1, len(families) - 1))
                axis.plot(*zip(*line, strict=True), style, color=colour, lw=0.9, alpha=0.7)
            top = [best(rows, side, n)[0] for n in BUDGETS]
            axis.plot(BUDGETS, top, style, color=colours(0.95), lw=2.2, marker="o", ms=4, label=f"best of {side}")
        axis.set(xscale="log", yscale="log", title=name, xlabel="asks")
        axis.set_xticks(BUDGETS, map(str, BUDGETS), minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("RMS distance from 1,000 asks")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def about() -> dict[str, Any]:
    return {
        "inkdrop": inkdrop.__version__,
        "diffusers": diffusers.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders of trained models")
    parser.add_argument("--images", type=int, default=16, help="of each trained model")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found, every, good = {}, methods(), set[str]()
    problems = [
        *((problem, True) for problem in mixtures()),
        *((trained(path, args.images), False) for path in args.runs),
    ]
    with torch.no_grad():
        for problem, whole in problems:
            among = [method for method in every if whole or method.plain or method.name in good]
            found[problem.name] = compare(problem, among)
            good |= winners(found[problem.name])
            print(summary(problem.name, found[problem.name]), "\n", flush=True)
    command = " ".join(["python bench/solvers.py", *(f"runs/{path.name}" for path in args.runs)])
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command, **about(), "budgets": BUDGETS, "problems": found}, indent=1)
    (args.out / "solvers.json").write_text(text.replace("Infinity", "null") + "\n", encoding="utf-8")
    tables = "\n\n".join(summary(name, rows) for name, rows in found.items())
    page = f"# Solvers: error against asks\n\n`{command}`: diffusers {diffusers.__version__}.\n\n{tables}\n"
    (args.out / "solvers.md").write_text(page, encoding="utf-8")
    plot(found, args.out / "solvers.png")


if __name__ == "__main__":
    main()
