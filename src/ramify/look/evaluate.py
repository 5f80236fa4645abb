"""Evaluation of a model on tasks: mean@k, unbiased pass@k, maj@k, greedy, lengths; every answer is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ramify.core.task import Task
from ramify.core.tree import Node, Tree, correct
from ramify.engine.engine import Engine, Sampling
from ramify.grow.branching import Star
from ramify.grow.growth import Rewards, grade, grow_forest
from ramify.look.statistics import interval, majority, mean, pass_at_k

Decode = Callable[[Sequence[int]], str]


async def attempts(
    engine: Engine,
    tasks: Sequence[Task],
    rewards: Rewards,
    decode: Decode,
    stop: Any,
    sampling: Sampling,
    n: int,
    seed: int,
) -> list[Tree]:
    """A graded star of n independent attempts at each task."""

    async def judge(tree: Tree) -> None:
        await grade(tree, rewards, decode)

    trees = [Tree.plant(task, seed=seed) for task in tasks]
    return await grow_forest(trees, engine, Star(n), sampling, stop, on_tree=judge)


async def evaluate(
    engine: Engine,
    tasks: Sequence[Task],
    rewards: Rewards,
    decode: Decode,
    stop: Any,
    sampling: Sampling,
    samples: int = 8,
    greedy: bool = True,
    seed: int = 0,
    k: Sequence[int] = (),
) -> dict[str, Any]:
    """Sample each task `samples` times (0: not at all) and once greedily; returns plain JSON with pass@k for each `k`, or powers of two.

    The seeds of the attempts depend on `seed`, the task and the number of the attempt, not on what else is evaluated.
    """
    if not tasks:
        raise ValueError("there is nothing to evaluate: the source has no problems")
    if samples < 1 and not greedy:
        raise ValueError(f"an evaluation needs samples >= 1, or greedy attempts, got samples={samples}")
    wrong = [n for n in k if not 1 <= n <= samples]
    if wrong:
        raise ValueError(f"pass@{wrong[0]} cannot be told from {samples} samples: ask for k between 1 and samples")
    wanted = list(k) or [2**i for i in range(1, samples.bit_length()) if 2**i < samples] + [samples]
    sampled = await attempts(engine, tasks, rewards, decode, stop, sampling, samples, seed) if samples else []
    cold = replace(sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    once = await attempts(engine, tasks, rewards, decode, stop, cold, 1, seed) if greedy else []
    heat = sampling.temperature if isinstance(sampling.temperature, int | float) else repr(sampling.temperature)
    return {"problems": len(tasks), "samples": samples, "temperature": heat} | report(sampled, once, decode, wanted)


def report(sampled: Sequence[Tree], greedy: Sequence[Tree], decode: Decode, ks: Sequence[int]) -> dict[str, Any]:
    """The summary numbers with 95 % bootstrap intervals over problems, and every answer."""
    summary: dict[str, Any] = {}
    intervals: dict[str, tuple[float, float]] = {}
    columns: dict[str, list[float]] = {}
    if sampled:
        marks = [[correct(leaf) for leaf in tree.leaves()] for tree in sampled]
        samples = len(marks[0])
        columns[f"mean@{samples}"] = [mean(row) for row in marks]
        for k in ks:
            columns[f"pass@{k}"] = [pass_at_k(len(row), sum(mark > 0 for mark in row), k) for row in marks]
        if any(leaf.verdict.get("answer") for tree in sampled for leaf in tree.leaves()):
            answers = [[str(leaf.verdict.get("answer", "")) for leaf in tree.leaves()] for tree in sampled]
            columns[f"maj@{samples}"] = [majority(given, row) for given, row in zip(answers, marks)]
    if greedy:
        columns["greedy"] = [correct(leaf) for tree in greedy for leaf in tree.leaves()]
    for name, values in columns.items():
        summary[name], intervals[name] = mean(values), interval(values)
    leaves = [leaf for tree in sampled or greedy for leaf in tree.leaves()]
    summary["reward"] = mean([leaf.reward for leaf in leaves if leaf.reward is not None])
    summary["length"] = mean([len(leaf.response()) for leaf in leaves])
    summary["truncated"] = mean([float(leaf.finish == "length") for leaf in leaves])
    return summary | {"intervals": intervals, "answers": answers_of(sampled, greedy, decode)}


def answers_of(sampled: Sequence[Tree], greedy: Sequence[Tree], decode: Decode) -> list[dict[str, Any]]:
    """Every problem with every attempt at it."""

    def attempt(leaf: Node) -> dict[str, Any]:
        tokens = leaf.response()
        text = {
            "text": decode(tokens),
            "tokens": len(tokens),
            "finish": leaf.finish,
            "reward": leaf.reward,
            "correct": correct(leaf),
        }
        return text | {"verdict": leaf.verdict}

    rows: dict[str, dict[str, Any]] = {}
    for name, trees in (("sampled", sampled), ("greedy", greedy)):
        for tree in trees:
            row = rows.setdefault(
                tree.task.id, {"id": tree.task.id, "problem": tree.task.text, "answer": tree.task.answer}
            )
            row[name] = [attempt(leaf) for leaf in tree.leaves()]
    return list(rows.values())
