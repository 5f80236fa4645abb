"""Recipes times seeds, each a run in a process of its own."""
