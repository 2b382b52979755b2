"""Data sets: digits (embedded), toys drawn by formula, IDX files (MNIST and kin), and any folder or zip of images.

Each is one function of a split, "train" or "test", that returns a `core.dataset.Data`; its values lie in [-1, 1].
"""
