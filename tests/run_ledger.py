"""Tiny runs whose tokens meet every fate, as a user's recipe file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import run_forks
import run_hpt
from ramulus.core.task import Path, Task
from ramulus.grow.branching import Star
from ramulus.grow.pruning import Length
from ramulus.grow.schedule import Dynamic, Fixed
from ramulus.grow.segments import Segments
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior
from ramulus.run.config.recipe import Run
from run_recipe import rl
from run_recipe import sft as demonstrations

PLAIN = Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),))
SHORT: dict[str, Any] = {"steps": 3, "evals": None, "eval_every": 0, "trees_every": 1, "save_every": 10}


@dataclass(frozen=True)
class Even:
    """1 for a response of an even number of digits, else 0: many groups are all right or all wrong."""

    def __call__(self, task: Task, path: Path) -> dict[str, float]:
        right = float(sum(c.isdigit() for c in path.text) % 2 == 0)
        return {"reward": right, "correct": right}


@dataclass(frozen=True)
class Flat:
    """The same for every response."""

    def __call__(self, task: Task, path: Path) -> float:
        return 1.0


def star() -> Run:
    """Groups of which some are all alike, and over-long answers taken out."""
    return replace(
        rl(), branching=Star(3), schedule=Fixed(6), rewards=Even(), mix=PLAIN, filter_overlong=True, minibatches=1, **SHORT
    )  # fmt: skip


def segments() -> Run:
    """Trees that are pruned, dropped, cut into rows and trained in two parts."""
    made = replace(
        rl(), rewards=Even(), mix=PLAIN, pruning=(Length(shortest=3),), schedule=Dynamic(4, draws=2), **SHORT
    )
    return replace(made, branching=Segments(3, 3, 4, 2), tokens_per_batch=30)


def flat() -> Run:
    """No signal at all."""
    return replace(star(), rewards=Flat(), filter_overlong=False, minibatches=2)


def kl() -> Run:
    """A KL term and an entropy bonus pull at every path."""
    return replace(rl(), **SHORT | {"evals": rl().evals, "eval_every": 3, "save_every": 1})


def ahead() -> Run:
    """The first round of the next step's trees grows in this step."""
    return replace(run_forks.segments(), **SHORT | {"save_every": 1, "steps": 4})


def forks() -> Run:
    """Unbranched roots are in no gradient."""
    return replace(run_forks.recipe(), **SHORT)


def gate() -> Run:
    """A question is learned from its paths or from its demonstration."""
    return replace(run_hpt.hpt(), **SHORT)


def careful() -> Run:
    """Demonstrations that fail their check, and paths that go on from one."""
    return replace(run_hpt.careful(), **SHORT)


def luffy() -> Run:
    return replace(run_hpt.luffy(), **SHORT)


def sft() -> Run:
    return replace(demonstrations(), **SHORT)
