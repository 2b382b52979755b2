"""Draw the pictures of docs/samplers and of guidance, on mixtures whose exact flow is known.

    python scripts/pictures.py            # writes docs/images/sampler-*.png and guidance.png

One panel a sampler: deterministic ones show twelve paths from noise to data (blue), where they end (red) and where the
exact flow ends (rings); stochastic ones 1,500 samples. Grey is the density of the data. Every panel says what it cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor

from inkdrop.core.ask import Ask, Belief
from inkdrop.core.cond import Cond
from inkdrop.core.grid import Grid
from inkdrop.core.noise import Keyed
from inkdrop.core.oracle import Mixture
from inkdrop.drive import drive
from inkdrop.find import Part, build, find, order_of
from inkdrop.plan import Plan, noise_of, sampling

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

IMAGES = Path(__file__).parents[1] / "docs" / "images"

ANGLES = torch.arange(5, dtype=torch.float64) / 5 * 2 * torch.pi
MIXTURE = Mixture(
    0.8 * torch.stack([ANGLES.sin(), ANGLES.cos()], 1),
    torch.tensor([0.07, 0.1, 0.07, 0.12, 0.08], dtype=torch.float64),
    torch.tensor([1, 1, 2, 1, 1.5], dtype=torch.float64),
)
SCHEDULE = build("schedules", Part("vp"))
REACH = 1.7  # of the axes

# family -> (steps, spacing, samplers)
FAMILIES: dict[str, tuple[int, str, list[Part]]] = {
    "ddim": (10, "trailing", [Part("ddim"), Part("ddim", {"eta": 0.5}), Part("ddpm"), Part("euler_ancestral")]),
    "heun": (10, "loguniform", [Part("heun"), Part("dpm2"), Part("edm", {"churn": 10.0}), Part("dpm2_ancestral")]),
    "dpmpp": (10, "loguniform", [Part("dpmpp_2s"), Part("dpmpp_2m"), Part("dpmpp_3m"), Part("unipc")]),
    "sde": (20, "loguniform", [Part("dpmpp_2s_sde"), Part("dpmpp_2m_sde"), Part("dpmpp_3m_sde"), Part("reverse_sde")]),
    "multistep": (10, "loguniform", [Part("deis"), Part("lms"), Part("plms"), Part("ipndm")]),
    "score": (40, "loguniform", [Part("reverse_sde"), Part("predictor_corrector"), Part("annealed_langevin")]),
    "adaptive": (1, "uniform", [Part("rk45", {"rtol": 1e-1}), Part("rk45", {"rtol": 1e-2}), Part("rk45")]),
}


def density(axes: Axes, data: Mixture = MIXTURE) -> None:
    """The density of the data in grey."""
    side = torch.linspace(-REACH, REACH, 240, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    log_p = data.log_prob(points, SCHEDULE(SCHEDULE.least)).view(240, 240).T
    axes.imshow(
        np.sqrt(log_p.exp().numpy()), extent=(-REACH, REACH, -REACH, REACH), origin="lower", cmap="Greys", vmax=2.2
    )


def run(part: Part, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, int, bool]:
    """(paths (asks + 1, B, 2) of the state, result, asks, whether noise was drawn)."""
    keyed, drawn, states = noise_of(Plan(sampler=part), 0, range(len(x))), [], []

    def noise(y: Tensor, *levels: Any) -> Tensor:
        drawn.append(1)
        return keyed(y, *levels)

    def ear(ask: Ask) -> Belief:
        belief = MIXTURE(ask)
        states.append(ask.x)
        return belief

    result = drive(find("samplers", part.name)(x, grid, noise, **part.knobs), ear)
    return torch.stack([*states, result]), result, len(states), bool(drawn)


def draw_family(name: str) -> None:
    """One picture: a panel for each sampler."""
    steps, spacing, parts = FAMILIES[name]
    grid = build("grids", Part(spacing), SCHEDULE, steps)
    figure, panels = plt.subplots(1, len(parts), figsize=(3.1 * len(parts), 3.7), constrained_layout=True)
    for axes, part in zip(np.atleast_1d(panels), parts, strict=True):
        _, _, _, stochastic = run(part, Keyed(1, range(2)).start((2, 2), torch.float64), grid)
        count = 1500 if stochastic else 12
        start = Keyed(1, range(count)).start((count, 2), torch.float64)
        paths, result, asks, _ = run(part, start, grid)
        density(axes)
        if stochastic:
            axes.plot(*result.T, ".", ms=1.5, color="tab:red", alpha=0.6)
        else:
            exact = run(Part("heun"), start, build("grids", Part("loguniform", {"rho_max": 1e3}), SCHEDULE, 500))[1]
            for i in range(count if name != "adaptive" else 0):  # whose trial steps lead anywhere
                axes.plot(*paths[:, i].T, "-", lw=0.8, color="tab:blue", alpha=0.7)
            axes.plot(*exact.T, "o", ms=7, mfc="none", color="black")
            axes.plot(*result.T, ".", ms=5, color="tab:red")
        knobs = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in part.knobs.items())
        order = order_of(part)
        cost = f"{asks} asks" + (f", order {order}" if order else "")
        axes.set_title(f"{part.name}{f' ({knobs})' if knobs else ''}\n{cost}", fontsize=9)
        axes.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[])
    figure.savefig(IMAGES / f"sampler-{name}.png", dpi=110)
    plt.close(figure)


# ---- guidance ------------------------------------------------------------------------------------------------

CENTRES = torch.tensor([[-0.5, 0.5], [0.1, 0.1], [0.6, -0.6], [0.5, 0.5], [-0.6, -0.5]], dtype=torch.float64)
WIDTHS = torch.tensor([0.12, 0.15, 0.1, 0.1, 0.15], dtype=torch.float64)
ASKED = Mixture(CENTRES[:3], WIDTHS[:3])  # the class asked for
WHOLE = Mixture(CENTRES, WIDTHS)
WEAK = Mixture(CENTRES[:3], WIDTHS[:3] * 2)  # blurs what it knows

GUIDES: list[list[Part]] = [
    [],
    [Part("cfg", {"scale": 3.0})],
    [Part("cfg", {"scale": 3.0, "start": 0.6, "stop": 0.1})],
    [Part("autoguidance", {"scale": 2.0})],
    [Part("classifier", {"scale": 2.0})],
]


def guided_net(ask: Ask) -> Belief:
    """The conditional net, and the unconditional one in rows whose class is null."""
    null = ask.cond.null_rows("label") if ask.cond is not None else torch.zeros(len(ask.x), dtype=torch.bool)
    asked, whole = ASKED(ask), WHOLE(ask)
    x0, eps = (torch.where(null[:, None], b, a) for a, b in ((asked.x0, whole.x0), (asked.eps, whole.eps)))
    return Belief(x0, eps)


def judge(ask: Ask) -> Belief:
    """The exact classifier: ∇ log p(y|x) is the difference of both scores."""
    eps = ASKED(ask).eps - WHOLE(ask).eps
    return Belief((ask.x - ask.level.sigma * eps) / ask.level.alpha, eps)


def draw_guidance() -> None:
    """One picture: a panel for each way to guide."""
    count = 1500
    noise = Keyed(2, range(count))
    grid = build("grids", Part("loguniform"), SCHEDULE, 40)
    figure, panels = plt.subplots(1, len(GUIDES), figsize=(3.1 * len(GUIDES), 3.6), constrained_layout=True)
    for axes, guides in zip(panels, GUIDES, strict=True):
        plan = Plan(sampler=Part("dpmpp_2m"), guide=tuple(guides))
        cond = Cond(label=torch.zeros(count, dtype=torch.int64))
        start = noise.start((count, 2), torch.float64)
        parts: dict[str, Callable[[Ask], Belief]] = {"net": guided_net, "weak": WEAK, "classifier": judge}
        x = drive(sampling(plan, start, grid, noise, cond), parts)
        density(axes, ASKED)
        axes.plot(*x.T, ".", ms=1.5, color="tab:red", alpha=0.6)
        title = "\n".join(f"{g.name} ({', '.join(f'{k}={v:g}' for k, v in g.knobs.items())})" for g in guides)
        axes.set_title(title or "the class itself", fontsize=9)
        axes.plot(*CENTRES[3:].T, "x", color="tab:blue")
        axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[])
    figure.savefig(IMAGES / "guidance.png", dpi=110)
    plt.close(figure)


def main(names: Sequence[str] = (), tell: Callable[[str], None] = print) -> None:
    """Draw the named families, or all."""
    for name in names or (*FAMILIES, "guidance"):
        if name == "guidance":
            draw_guidance()
        else:
            draw_family(name)
        tell(f"docs/images/{'' if name == 'guidance' else 'sampler-'}{name}.png")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
