"""Judge: what a classifier makes of images: which classes, how sure, and whether those that were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inkdrop.errors import BadArgument, BadShape

__all__ = ["Judge"]


class Judge:
    """A tally of a classifier's probabilities over a stream of images, in constant memory.

    Args:
        classes: the class names, K ≥ 2.
        sure: the greatest probability from which on the classifier counts as sure, in (0, 1].

    Attributes:
        n: how many images were seen.
        asked: how often each class was asked for, int64 (K,).

    Raises:
        BadArgument: fewer than 2 classes, or sure outside (0, 1].
    """

    def __init__(self, classes: Sequence[str], *, sure: float = 0.9) -> None:
        if len(classes) < 2:
            raise BadArgument(f"judge: got {len(classes)} classes, need at least 2")
        if not 0 < sure <= 1:
            raise BadArgument(f"judge sure: got {sure}, need a probability in (0, 1]")
        self.classes, self.sure, self.n = tuple(classes), sure, 0
        self._found = torch.zeros(len(classes), dtype=torch.int64)
        self.asked = torch.zeros(len(classes), dtype=torch.int64)
        self._sure, self._agree = 0, 0

    def update(self, probabilities: Tensor, labels: Tensor | None = None) -> None:
        """Take in probabilities (B, K) and, for all batches or for none, the classes asked for: int64 (B,).

        Raises:
            BadShape: another number of classes, or not one label a row.
            BadArgument: a label outside [0, K), labels for some batches only, or probabilities that do not sum to 1.
        """
        k = len(self.classes)
        p = probabilities.detach().to("cpu", torch.float64)
        if p.ndim != 2 or p.shape[1] != k:
            raise BadShape(f"judge: got probabilities of shape {tuple(p.shape)}, need (B, {k})")
        if not bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 1e-4)).all()):
            raise BadArgument("judge: got rows that are no probabilities, need ≥ 0 and sum 1; try softmax(1)")
        if self.n and len(p) and (labels is None) == bool(self.asked.sum()):
            raise BadArgument("judge: got labels for some batches only; give them always or never")
        best, found = p.max(1)
        if labels is not None:
            labels = labels.detach().cpu()
            if labels.shape != found.shape or labels.dtype != torch.int64:
                raise BadShape(f"judge: got labels {labels.dtype} {tuple(labels.shape)}, need int64 ({len(p)},)")
            if bool(((labels < 0) | (labels >= k)).any()):
                raise BadArgument(f"judge: got a label outside 0 to {k - 1}")
            self.asked += labels.bincount(minlength=k)
            self._agree += int((labels == found).sum())
        self._found += found.bincount(minlength=k)
        self._sure += int((best >= self.sure).sum())
        self.n += len(p)

    def merge(self, other: Judge) -> None:
        """Take in all that another judge of the same classes has seen.

        Raises:
            BadArgument: other classes, another bound of sureness, or labels on one side only.
        """
        if (other.classes, other.sure) != (self.classes, self.sure):
            raise BadArgument("judge merge: got another judge, need one of the same classes and bound of sureness")
        if self.n and other.n and bool(self.asked.sum()) != bool(other.asked.sum()):
            raise BadArgument("judge merge: got labels on one side only; give them always or never")
        self.load({name: own + other.state_dict()[name] for name, own in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        """All that it holds: tallies, which add up."""
        counts = torch.tensor([self.n, self._sure, self._agree])
        return {"counts": counts, "found": self._found, "asked": self.asked}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` of a judge of the same classes had said.

        Raises:
            BadShape: another number of classes.
        """
        if state["found"].shape != self._found.shape:
            raise BadShape(f"judge load: got {state['found'].numel()} classes, need {len(self.classes)}")
        self.n, self._sure, self._agree = state["counts"].tolist()
        self._found, self.asked = state["found"].clone(), state["asked"].clone()

    def report(self, expected: Tensor | None = None) -> dict[str, Any]:
        """The figures as plain JSON.

        Args:
            expected: how often each class should occur, (K,) ≥ 0 in any unit; what was asked for by default, and if
                nothing was, equally often.

        Returns:
            n; counts, class name -> images found to be of it; missing, the expected classes never found; deviation, the
            total variation distance ½ Σ |found share − expected share| in [0, 1]; chi2 = Σ (found − n·q)²/(n·q) over
            the classes with expected share q > 0, and its degrees of freedom dof (about dof ± √(2·dof) for independent
            draws of the expected shares); sure, the share with p ≥ sure_at; agree, the share of images found to be
            what was asked for, or None if nothing was.

        Raises:
            BadArgument: no image was seen.
            BadShape: expected of another length.
        """
        k = len(self.classes)
        if self.n == 0:
            raise BadArgument("judge: got no images, need at least 1")
        labelled = bool(self.asked.sum())
        if expected is None:
            expected = self.asked if labelled else torch.ones(k)
        if expected.shape != (k,) or not bool((expected >= 0).all()) or float(expected.sum()) <= 0:
            raise BadShape(f"judge expected: got {tuple(expected.shape)}, need ({k},), ≥ 0 and not all 0")
        share = expected.to(torch.float64) / expected.sum()
        found = self._found.to(torch.float64)
        due = share > 0
        want = self.n * share[due]
        return {
            "n": self.n,
            "counts": dict(zip(self.classes, self._found.tolist(), strict=True)),
            "missing": [name for name, f, d in zip(self.classes, found, due, strict=True) if d and f == 0],
            "deviation": float((found / self.n - share).abs().sum() / 2),
            "chi2": float(((found[due] - want) ** 2 / want).sum()),
            "dof": int(due.sum()) - 1,
            "sure": self._sure / self.n,
            "sure_at": self.sure,
            "agree": self._agree / self.n if labelled else None,
        }
