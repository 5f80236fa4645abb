"""Runs that go wrong, each in a known way: a recipe file whose functions are named after the rules of run/advice.py."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

from ramulus.core.task import Path, Task
from ramulus.engine.engine import Decode, Engine
from ramulus.engine.local.factory import Local
from ramulus.grow.branching import Star
from ramulus.grow.schedule import Fixed
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior
from ramulus.run.config.recipe import AdamW, Run
from ramulus.tasks.math import Boxed
from run_recipe import MODEL, rl


@dataclass(frozen=True)
class Ones:
    """The share of ones, of which no share is right: what a model can run after without ever solving anything."""

    def __call__(self, task: Task, path: Path) -> dict[str, float]:
        return {"reward": path.text.count("1") / path.length, "correct": 0.0}


@dataclass(frozen=True)
class Noise:
    """Something that nobody can learn, and that pulls at the weights for ever."""

    def __call__(self, task: Task, path: Path) -> float:
        return crc32(path.text.encode()) % 97 / 97


@dataclass(frozen=True)
class Stale:
    """An engine with weights of its own that never takes the learner's new ones."""

    slots: int

    def __call__(self, model: Any, decode: Decode) -> Engine:
        return Local(self.slots)(deepcopy(model), decode)


def good() -> Run:
    """A run that goes as it should: nothing is said of it."""
    mix = Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),))
    return replace(
        rl(), name="astray", evals=None, mix=mix, schedule=Fixed(4), branching=Star(8), minibatches=1, steps=10, eval_every=0, save_every=100,
        optimizer=AdamW(lr=1e-3, clip=10.0),
    )  # fmt: skip


def more_trees_than_problems() -> Run:
    return replace(good(), schedule=Fixed(41), branching=Star(2), steps=1)


def more_minibatches_than_trees() -> Run:
    return replace(good(), minibatches=5, steps=1)


def everything_truncated() -> Run:
    return replace(good(), response_limit=1, branching=Star(24), steps=2, model=replace(MODEL, alphabet=MODEL.alphabet + "abcdefghijklmnopqrstuvw"))


def no_answer_found() -> Run:
    return replace(good(), rewards=Boxed(), steps=3)


def no_group_mixed() -> Run:
    return replace(good(), rewards=lambda task, path: 1.0, steps=4)


def one_path_a_tree() -> Run:
    return replace(good(), branching=Star(1), steps=4)


def entropy_collapsing() -> Run:
    return replace(good(), rewards=Ones(), steps=18, optimizer=AdamW(lr=0.05, clip=10.0))


def mismatch_growing() -> Run:
    return replace(good(), engine=Stale(8), rewards=Noise(), steps=8, optimizer=AdamW(lr=0.01, clip=10.0))


def gradient_always_clipped() -> Run:
    return replace(good(), optimizer=AdamW(lr=1e-3, clip=1e-3))
