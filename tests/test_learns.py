"""A policy that learns: GRPO, DAPO, RLOO and TreePO raise the reward of a model with random weights, from sampler to optimizer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest

from ramulus.core.task import Path, Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.engine import Sampling
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.grow.branching import Star
from ramulus.grow.grading import grade
from ramulus.grow.growth import grow_forest
from ramulus.grow.segments import Segments
from ramulus.grow.stop import Stop
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.advantage.subgroup import SubgroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip, DualClip, Everything
from ramulus.learn.objective.mix import Mix, SequenceMean, Term
from ramulus.learn.objective.reference import Behavior, Itself, Recomputed
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.model import Scratch
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.torch_policy import TorchPolicy

LETTERS = "abcd"
MODEL = Scratch(LETTERS + "?", hidden=32, layers=1, heads=2, kv_heads=1, max_positions=32, init_std=0.1)


def echo(task: Task, path: Path) -> float:
    """How much of a full-length text is the letter that was asked for."""
    return path.text.count(task.answer) / 8


@dataclass(frozen=True)
class Way:
    """A sampler and what is learned from its trees."""

    branching: Any
    mix: Mix


def way(branching: Any, mask: Any, reference: Any, advantage: Any, **options: Any) -> Way:
    return Way(branching, Mix((Term(Estimator(mask, reference, advantage), **options),)))


TREE = Segments(width=8, depth=4, length=2, branching=2)
WAYS = {
    "grpo": way(Star(8), Clip(), Behavior(), GroupMean(), normaliser=SequenceMean()),
    "grpo, recomputed": way(Star(8), Clip(column="recomputed"), Recomputed(), GroupMean(), normaliser=SequenceMean()),
    "dapo": way(Star(8), DualClip(0.2, 0.28), Behavior(), GroupMean()),
    "rloo": way(Star(8), Everything(), Itself(), GroupMean(std=False, leave_one_out=True)),
    "treepo": way(TREE, DualClip(0.2, 0.28, 10.0), Behavior(), SubgroupMean()),
}


async def train(how: Way, steps: int, worst: bool = False) -> list[float]:
    """Mean reward of each step's policy paths; with `worst` the reward learned from is turned around."""
    model, tokenizer = MODEL()
    engine, policy = LocalEngine(model, slots=32, memory=2**24), TorchPolicy(model)
    stop = Stop((tokenizer.eos_token_id,), 8)
    rewards = []
    tasks = [
        Task(f"{i}", tuple(tokenizer.encode(f"{a}{b}{c}?")), f"{a}{b}{c}?", answer=c)
        for i, (a, b, c) in enumerate(product(LETTERS, repeat=3))
    ]
    for step in range(steps):
        forest = [Tree.plant(task, seed=3, step=step, visit=step) for task in tasks[step % 4 * 16 :][:16]]
        await grow_forest(forest, engine, how.branching, Sampling(8), stop)
        for tree in forest:
            await grade(tree, ((echo, 1.0, "echo"),), tokenizer.decode)
        leaves = [leaf for tree in forest for leaf in tree.leaves() if leaf.author is Author.POLICY]
        rewards.append(sum(leaf.reward or 0.0 for leaf in leaves) / len(leaves))
        for leaf in leaves if worst else ():
            leaf.reward = -(leaf.reward or 0.0)
        score_now(policy, forest, how.mix.columns)
        for batch in pack(forest, how.mix.credit(forest), how.mix, tokens_per_batch=1024):
            policy.accumulate(how.mix, batch)
        policy.update(6e-3)
        await engine.load(None, policy.version)
    return rewards


@pytest.mark.parametrize("name", WAYS)
def test_the_reward_rises(name: str) -> None:
    rewards = asyncio.run(train(WAYS[name], 24))
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert first < 0.25
    assert last > 0.4, "one letter for every question would earn 0.25"


def test_the_sign_matters() -> None:
    rewards = asyncio.run(train(WAYS["treepo"], 12, worst=True))
    assert sum(rewards[-3:]) / 3 < 0.05


def test_training_repeats_bit_for_bit() -> None:
    assert asyncio.run(train(WAYS["treepo"], 4)) == asyncio.run(train(WAYS["treepo"], 4))
