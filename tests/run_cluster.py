"""Recipes of run_small.py for runs on a cluster: a few steps, saved after each."""

from __future__ import annotations

from dataclasses import replace

import run_small
from ramulus import Local
from ramulus.run.config.recipe import Run


def few(run: Run) -> Run:
    """Three steps."""
    return replace(run, steps=3, save_every=1, engine=Local(slots=64))


def grpo() -> Run:
    return few(run_small.grpo())


def treepo() -> Run:
    return few(run_small.treepo())


def hapo() -> Run:
    return few(run_small.hapo())


def attnrl() -> Run:
    return few(run_small.attnrl())
