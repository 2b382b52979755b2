"""Guidance and clipping: middleware round any sampler, found by name."""
