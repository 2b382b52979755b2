"""Losses: one function each, found by name; weights of the loss by noise level in weights.py."""
