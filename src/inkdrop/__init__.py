"""inkdrop: train, sample, evaluate, distil, export and serve your own diffusion models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Ask": "inkdrop.core.ask",
    "Belief": "inkdrop.core.ask",
    "Bundle": "inkdrop.bundle",
    "Cond": "inkdrop.core.cond",
    "Data": "inkdrop.core.dataset",
    "Denoiser": "inkdrop.denoiser",
    "Grid": "inkdrop.core.grid",
    "InkdropError": "inkdrop.errors",
    "InkdropWarning": "inkdrop.errors",
    "Level": "inkdrop.core.level",
    "Part": "inkdrop.find",
    "Plain": "inkdrop.model",
    "Plan": "inkdrop.plan",
    "Recipe": "inkdrop.recipe",
    "Schedule": "inkdrop.core.schedule",
    "Target": "inkdrop.core.target",
    "build": "inkdrop.find",
    "diffuse": "inkdrop.core.forward",
    "fit": "inkdrop.train.loop",
    "fit_autoencoder": "inkdrop.train.autoencoder",
    "load": "inkdrop.bundle",
    "names": "inkdrop.find",
    "open_data": "inkdrop.recipe",
    "resume": "inkdrop.train.loop",
    "sample": "inkdrop.generate",
    "save": "inkdrop.bundle",
    "save_grid": "inkdrop.picture",
    "steps": "inkdrop.generate",
    "wrap": "inkdrop.denoiser",
}

__all__ = [
    "Ask",
    "Belief",
    "Bundle",
    "Cond",
    "Data",
    "Denoiser",
    "Grid",
    "InkdropError",
    "InkdropWarning",
    "Level",
    "Part",
    "Plain",
    "Plan",
    "Recipe",
    "Schedule",
    "Target",
    "build",
    "diffuse",
    "fit",
    "fit_autoencoder",
    "load",
    "names",
    "open_data",
    "resume",
    "sample",
    "save",
    "save_grid",
    "steps",
    "wrap",
]

if TYPE_CHECKING:
    from inkdrop.bundle import Bundle, load, save
    from inkdrop.core.ask import Ask, Belief
    from inkdrop.core.cond import Cond
    from inkdrop.core.dataset import Data
    from inkdrop.core.forward import diffuse
    from inkdrop.core.grid import Grid
    from inkdrop.core.level import Level
    from inkdrop.core.schedule import Schedule
    from inkdrop.core.target import Target
    from inkdrop.denoiser import Denoiser, wrap
    from inkdrop.errors import InkdropError, InkdropWarning
    from inkdrop.find import Part, build, names
    from inkdrop.generate import sample, steps
    from inkdrop.model import Plain
    from inkdrop.picture import save_grid
    from inkdrop.plan import Plan
    from inkdrop.recipe import Recipe, open_data
    from inkdrop.train.autoencoder import fit_autoencoder
    from inkdrop.train.loop import fit, resume


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import inkdrop` itself is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'inkdrop' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
