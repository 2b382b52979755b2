"""The exceptions of inkdrop.

    Exception
    ├── ValueError
    │   └── InkdropError            something that the caller can put right
    │       ├── BadArgument         a value outside what is allowed
    │       ├── BadShape            a tensor of the wrong shape or dtype
    │       ├── UnknownName         no such sampler, net, recipe, knob...; the nearest names are given
    │       ├── BadCheckpoint       a checkpoint with a missing, foreign or corrupt file
    │       ├── BadData             a file or folder that cannot be read as what it should be
    │       ├── MissingExtra        an optional package is not installed; the pip line is given
    │       └── Diverged            training or sampling left the finite numbers
    └── RuntimeError
        ├── Busy                    a queue is full; try again later
        ├── Cancelled               whoever started it stopped it
        └── Lost                    another process of the same job is gone

Every message is one line: what, got, allowed, and what to try. The command line prints it and exits with 2.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable

__all__ = [
    "BadArgument",
    "BadCheckpoint",
    "BadData",
    "BadShape",
    "Busy",
    "Cancelled",
    "Diverged",
    "InkdropError",
    "InkdropWarning",
    "Lost",
    "MissingExtra",
    "UnknownName",
    "warn",
]


class InkdropError(ValueError):
    """The root of every error that a caller can put right.

    Attributes:
        echo: whether another process of the same job says it already.
    """

    echo = False


class BadArgument(InkdropError):
    """A value outside what is allowed."""


class BadShape(InkdropError):
    """A tensor of the wrong shape or dtype."""


class UnknownName(InkdropError):
    """A name that stands for nothing; the message gives the nearest names that do."""

    def __init__(self, what: str, got: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(got, names, n=3, cutoff=0.5)
        nearest = " or ".join([", ".join(near[:-1]), near[-1]] if near[1:] else near)
        hint = f"did you mean {nearest}?" if near else f"known: {', '.join(names) or 'none'}"
        super().__init__(f"{what}: unknown name {got!r}; {hint}")
        self.got, self.known = got, names


class BadCheckpoint(InkdropError):
    """A checkpoint folder with a missing, foreign or corrupt file."""


class BadData(InkdropError):
    """A file or a folder that cannot be read as what it should be."""


class MissingExtra(InkdropError):
    """An optional package is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f'{what} needs {package}, which is not installed; try: pip install "inkdrop[{extra}]"')


class Diverged(InkdropError):
    """Training or sampling left the finite numbers."""


class Busy(RuntimeError):
    """A queue is full; the same request may pass later."""


class Cancelled(RuntimeError):
    """Whoever started it stopped it."""


class Lost(RuntimeError):
    """Another process of the same job is gone, or does not answer."""


class InkdropWarning(UserWarning):
    """Something that runs but is probably not what was meant."""


def warn(text: str) -> None:
    """Say, as an InkdropWarning, what runs but is probably not what was meant."""
    warnings.warn(text, InkdropWarning, stacklevel=3)
