"""Samplers: one generator each, found by name."""
