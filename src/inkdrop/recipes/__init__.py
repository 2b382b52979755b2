"""Recipes: functions without arguments that return a Recipe, found by name; change one with dataclasses.replace."""
