"""Recipes of run_small.py for runs on a cluster: a few steps, saved after each."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import run_small
from ramulus import Local
from ramulus.run.config.recipe import Run


@dataclass(frozen=True)
class Held:
    """A rule by which no step begins before it may: the last one that may is in the file that the environment names, if there is one."""

    branching: Any

    @property
    def needs(self) -> tuple[str, ...]:
        return self.branching.needs

    @property
    def rounds(self) -> int | None:
        return self.branching.rounds

    def __call__(self, tree: Any) -> Any:
        last = Path(os.environ.get("RAMULUS_TEST_LAST_STEP", "/nowhere"))
        while last.exists() and tree.step > int(last.read_text() or 0):
            time.sleep(0.05)
        return self.branching(tree)


def few(run: Run) -> Run:
    """Three steps."""
    return replace(run, steps=3, save_every=1, engine=Local(slots=64))


def held() -> Run:
    """`grpo`, for tests that strike at it in the midst of its steps."""
    return replace(grpo(), branching=Held(grpo().branching))


def held_treepo() -> Run:
    return replace(treepo(), branching=Held(treepo().branching))


def grpo() -> Run:
    return few(run_small.grpo())


def treepo() -> Run:
    return few(run_small.treepo())


def hapo() -> Run:
    return few(run_small.hapo())


def attnrl() -> Run:
    return few(run_small.attnrl())
