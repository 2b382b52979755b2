"""Nets: (x, clock, cond) -> what the target asks for; one constructor function a net, findable by its name."""

from __future__ import annotations
