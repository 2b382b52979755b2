"""Evals: how near samples are to the data, on the features of a classifier trained on that data.

They take tensors and `core.dataset.Data`, know nothing of samplers and never print; `score.score` gives all in one.
"""

from __future__ import annotations
