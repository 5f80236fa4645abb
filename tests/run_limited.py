"""Limits its own address space, then samples or learns more than fits: `python run_limited.py engine|update`. Says "the same" where it is."""

from __future__ import annotations

import asyncio
import re
import resource
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch

from ramulus import (
    Author,
    Behavior,
    Clip,
    Estimator,
    GroupMean,
    Mix,
    Request,
    Sampling,
    Scratch,
    Task,
    Term,
    TorchPolicy,
    Tree,
)
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.learn.policy.in_process import InProcess
from ramulus.run.minibatch import minibatches
from ramulus.run.trainer import Trainer, TrainerState

torch.set_num_threads(1)


def limit(megabytes: int) -> None:
    """Let this process take so much more than it has."""
    found = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    most = int(found[1]) * 1024 + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def engine() -> bool:
    """Twelve texts, with keys and values that would take six times what is left."""
    model = Scratch("0123456789+=?", hidden=256, layers=4, heads=4, kv_heads=4)()[0]
    asked = [Request((3, 4 + i), Sampling(40), seed=i) for i in range(12)]
    expected = asyncio.run(LocalEngine(model, slots=8, memory=2**26).sample(asked))
    large = LocalEngine(model, slots=64, memory=2 * 2**30)
    limit(300)
    found = asyncio.run(large.sample(asked))
    return [s.tokens for s in found] == [s.tokens for s in expected] and large._scheduler.memory.nbytes < 2**29


def forest() -> list[Tree]:
    """Four trees of eight paths."""
    trees = []
    for i in range(4):
        tree = Tree.plant(Task(f"t{i}", (1, 2, 3), "t"))
        for k in range(8):
            tokens = [3 + (i + k * j) % 11 for j in range(200)]
            tree.add(tree.root, tokens, Author.POLICY, logprobs=[-2.5] * 200, finish="eos", reward=float(k % 2))
        trees.append(tree)
    return trees


class Small:
    """What `Trainer.accumulate` asks of a trainer."""

    packed, accumulate = Trainer.packed, Trainer.accumulate

    def __init__(self, learner: Any, run: Any, tokens: int) -> None:
        self.learner, self.run, self.tokens, self.stated, self.state = learner, run, tokens, tokens, TrainerState()
        self.begins = run.begins


def update() -> bool:
    """6,400 tokens, of which a quarter fits."""

    class run:
        name, mix = "limited", Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),))
        begins: ClassVar[set[str]] = set()

    model = Scratch("0123456789+=?", hidden=256, layers=6, heads=4, kv_heads=4)()[0]
    learner, trees = InProcess(TorchPolicy(model)), forest()
    [part] = minibatches(trees, run.mix.credit(trees), None, run.mix, 1)
    few = Small(learner, run, 400)
    asyncio.run(few.accumulate(part, {}, few.packed(part, {})))
    expected = [p.grad.clone() for p in model.parameters()]
    learner.policy.discard()
    large = Small(learner, run, 6412)
    limit(150)
    rows, _ = asyncio.run(large.accumulate(part, {}, large.packed(part, {})))
    same = all(torch.allclose(p.grad, g, rtol=1e-3, atol=1e-7) for p, g in zip(model.parameters(), expected))
    return same and len(rows) > 1 and large.tokens < 6412


if __name__ == "__main__":
    sys.stdout.write("the same\n" if {"engine": engine, "update": update}[sys.argv[1]]() else "not the same\n")
