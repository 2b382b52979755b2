"""The UCI handwritten digits: 1,797 real images of 8 × 8 pixels, embedded in the package."""

from __future__ import annotations

import hashlib
import io
from importlib.resources import files

import numpy as np
import torch

from inkdrop.core.dataset import Data
from inkdrop.data.arrays import Arrays, check_split

__all__ = ["digits"]

_SOURCE = (
    "UCI Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998), the 1,797 test images that "
    "scikit-learn ships; CC BY 4.0; doi 10.24432/C50P49"
)
_TEST = 360


def digits(split: str) -> Data:
    """The UCI handwritten digits: 8 × 8 grey, 10 classes, 1,437 to train on and 360 held out.

    Pixels are integers v in 0..16 and become v/8 − 1, so levels = 17. The split is fixed and stratified: within each
    class the rows are ranked by SHA-256 of "inkdrop digits ROW", a row's quantile is (rank + 1/2)/(size of its
    class), and the 360 rows of the lowest quantile are the test split. Both splits keep the order of the file. The
    same 13 people wrote both, so scores on the test split say little about other people's hands.

    Args:
        split: "train" or "test".

    Raises:
        BadArgument: another split.
    """
    check_split(split)
    packed = (files("inkdrop.data") / "digits.npz").read_bytes()
    with np.load(io.BytesIO(packed), allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"].astype(np.int64)
    rows = _rows(labels, split == "test")
    return Arrays(
        torch.from_numpy(images[rows][:, None]),
        torch.from_numpy(labels[rows]),
        title=f"digits {split}",
        source=_SOURCE,
        classes=[str(digit) for digit in range(10)],
        levels=17,
    )


def _rows(labels: np.ndarray, held_out: bool) -> np.ndarray:
    """The row numbers of a split, ascending, int64 (n,)."""
    draws = [hashlib.sha256(f"inkdrop digits {row}".encode()).hexdigest() for row in range(len(labels))]
    quantile: dict[int, float] = {}
    for digit in range(10):
        members = sorted(np.flatnonzero(labels == digit).tolist(), key=lambda row: draws[row])
        quantile |= {row: (rank + 0.5) / len(members) for rank, row in enumerate(members)}
    chosen = sorted(quantile, key=lambda row: (quantile[row], draws[row]))[:_TEST]
    mask = np.zeros(len(labels), dtype=bool)
    mask[chosen] = True
    return np.flatnonzero(mask == held_out)
