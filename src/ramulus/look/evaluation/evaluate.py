"""Evaluation of a model on tasks: mean@k, unbiased pass@k, maj@k, greedy, lengths; every answer is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree, called_correct
from ramulus.engine.engine import Decode, Engine, Sampling
from ramulus.grow.branching import Branching, Star
from ramulus.grow.grading import Rewards, grade
from ramulus.grow.growth import grow_forest
from ramulus.look.evaluation.measures import Row, report_of, scores_of
from ramulus.tasks.grading_budget import grading_budget

OnGraded = Callable[[Tree], None]


async def sample_graded(
    engine: Engine, tasks: Sequence[Task], branching: Branching, sampling: Sampling, stop: Any, rewards: Rewards, decode: Decode,
    seed: int = 0, visit: int = 0, on_graded: OnGraded | None = None,
) -> list[Tree]:
    """A grown and graded tree of each task, none waiting for another; `on_graded` is told of each as it is done."""

    async def judge(tree: Tree) -> None:
        await grade(tree, rewards, decode)
        if on_graded is not None:
            on_graded(tree)

    trees = [Tree.plant(task, seed=seed, visit=visit) for task in tasks]
    with grading_budget():  # equal answers are graded once
        return await grow_forest(trees, engine, branching, sampling, stop, on_tree=judge)


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
    on_graded: OnGraded | None = None,
) -> dict[str, Any]:
    """Sample each task `samples` times (0: not at all) and once greedily; returns plain JSON with pass@k and maj@k for each `k`, or powers of two.

    The seeds of the attempts depend on `seed`, the task and the number of the attempt, not on what else is evaluated.
    `on_graded` is told of each tree of attempts as it is done.
    """
    wanted = numbers(samples, greedy, k)
    if not tasks:
        raise ValueError("there is nothing to evaluate: the source has no problems")
    kinds = {"sampled": (samples, sampling)} if samples else {}
    kinds |= {"greedy": (1, cold(sampling))} if greedy else {}
    forests = {
        kind: await sample_graded(engine, tasks, Star(n), how, stop, rewards, decode, seed, on_graded=on_graded)
        for kind, (n, how) in kinds.items()
    }
    rows = answers_of(forests, decode)
    settings = {"problems": len(tasks), "samples": samples, "temperature": temperature_of(sampling)}
    return settings | report_of(scores_of(rows, wanted), rows) | {"answers": rows}


def numbers(samples: int, greedy: bool, k: Sequence[int] = ()) -> list[int]:
    """The numbers k to report: those asked for, or powers of two and all; ValueError for what so many samples cannot tell."""
    if samples < 1 and not greedy:
        raise ValueError(f"an evaluation needs samples >= 1, or greedy attempts, got samples={samples}")
    wrong = [n for n in k if not 1 <= n <= samples]
    if wrong:
        raise ValueError(f"pass@{wrong[0]} cannot be told from {samples} samples: ask for k between 1 and samples")
    if k or samples < 1:
        return sorted(set(k))
    return [2**i for i in range(1, samples.bit_length()) if 2**i < samples] + [samples]


def cold(sampling: Sampling) -> Sampling:
    """Sampling without chance: the most probable token each time, within the same limits."""
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)


def temperature_of(sampling: Sampling) -> float | str:
    """The temperature, as JSON can say it."""
    return sampling.temperature if isinstance(sampling.temperature, int | float) else repr(sampling.temperature)


def answers_of(forests: Mapping[str, Sequence[Tree]], decode: Decode | None) -> list[Row]:
    """Every problem with every attempt at it, from graded trees by kind (sampled, tree, greedy); no texts without `decode`."""
    rows: dict[str, Row] = {}
    for kind, trees in forests.items():
        for tree in trees:
            task = tree.task
            row = rows.setdefault(task.id, {"id": task.id, "problem": task.text, "answer": task.answer})
            row[kind] = [attempt(leaf, decode) for leaf in tree.leaves()]
            if kind == "tree":
                row["tree_tokens"] = sum(len(node.tokens) for node in tree.walk() if node.author is Author.POLICY)
    return list(rows.values())


def attempt(leaf: Node, decode: Decode | None) -> dict[str, Any]:
    """One path as plain JSON."""
    tokens = leaf.response()
    text = {"text": decode(tokens)} if decode is not None else {}
    record = {"tokens": len(tokens), "finish": leaf.finish, "reward": leaf.reward, "correct": called_correct(leaf)}
    return text | record | {"verdict": leaf.verdict}
