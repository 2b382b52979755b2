"""Comparing: several models, samplers, steps or guidance scales on the same data and from the same noise."""
