"""Recipes of run_small.py that sample in another process: the server at RAMULUS_URL, or here where there is none."""

from __future__ import annotations

import os
from dataclasses import replace

import run_small
from ramulus import Local, Remote
from ramulus.run.config.recipe import Run


def elsewhere(run: Run) -> Run:
    """Four steps, saved after each."""
    url = os.environ.get("RAMULUS_URL")
    return replace(run, steps=4, save_every=1, engine=Remote(url, timeout=60.0, reconnect=60.0) if url else Local(slots=64))


def grpo() -> Run:
    return elsewhere(run_small.grpo())


def treepo() -> Run:
    return elsewhere(run_small.treepo())


def attnrl() -> Run:
    return elsewhere(run_small.attnrl())


def hapo() -> Run:
    return elsewhere(run_small.hapo())
