"""What does early pruning of low-value paths cost? `python -m benchmarks.pruning --model runs/quickstart/sft`.

Grows the same test problems' trees with and without each rule. Every pruned path is then grown on to its end, several times over: the
share of those ends that are right is what pruning throws away, beside the share right of all other paths. Also the tokens that
the pruned paths would still have cost. Prints a Markdown table and a line of JSON; `--seeds` says over how many seeds the
medians and the spread are taken.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.pairing import Spread, record, spread, table
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree, correct
from ramulus.engine.engine import Request, Sampling
from ramulus.grow.grading import grade
from ramulus.grow.growth import grow_forest, seed_of
from ramulus.grow.segments import Segments
from ramulus.grow.worth import Agreement, LowValue, MeanLogprob
from ramulus.look.cost.ledger import cost
from ramulus.run.evaluation.loaded_model import LoadedModel, load_model
from ramulus.tasks.chain import ChainAnswer, ChainSum
from ramulus.tasks.problem import render

REWARDS = [(ChainAnswer(), 1.0, "chain")]


@dataclass(frozen=True, eq=False)
class Lines:
    """The partial results of a chain of sums: what stands behind `=` in every whole line."""

    loaded: LoadedModel

    def __call__(self, tokens: list[int]) -> list[str]:
        return [line.rpartition("=")[2] for line in self.loaded.decode(tokens).split("\n")[:-1]]


def rules(loaded: LoadedModel, budget: int) -> dict[str, tuple[LowValue, ...]]:
    """The contenders by name."""
    estimates = {
        "log-prob of the last 8 tokens": MeanLogprob(8),
        "log-prob of the whole path": MeanLogprob(),
        "agreement of partial sums": Agreement(Lines(loaded)),
    }
    return {"no pruning": ()} | {name: (LowValue(worth, budget),) for name, worth in estimates.items()}


async def grown_on(
    loaded: LoadedModel, trees: Sequence[Tree], stop: Any, sampling: Sampling, times: int
) -> tuple[list[float], list[int]]:
    """Of every pruned path, `times` ends: whether each is right, and the tokens it still took."""

    async def end(tree: Tree, leaf: Node, number: int) -> tuple[float, int]:
        response = leaf.response()
        most = stop.max_tokens - len(response)
        seed = seed_of(tree, leaf) ^ (number + 1)
        request = Request(
            tuple(leaf.prefix()), Sampling(most, sampling.temperature), stop.rule, seed, stop.until(response, most)
        )
        (segment,) = await loaded.engine.sample([request])
        ghost = Tree.plant(tree.task)
        ghost.add(ghost.root, response + list(segment.tokens), Author.POLICY, finish=segment.finish or "length")
        await grade(ghost, REWARDS, loaded.decode)
        return correct(ghost.leaves()[0]), len(segment.tokens)

    pruned = [(tree, leaf) for tree in trees for leaf in tree.leaves() if leaf.finish == "pruned"]
    ends = await asyncio.gather(*(end(tree, leaf, number) for tree, leaf in pruned for number in range(times)))
    return [right for right, _ in ends], [tokens for _, tokens in ends]


async def measure(
    loaded: LoadedModel, tasks: Sequence[Task], pruning: tuple[LowValue, ...], args: argparse.Namespace, seed: int
) -> dict[str, float]:
    """One seed of one rule."""
    stop = loaded.stop(tasks, 64, 64)
    sampling = Sampling(stop.max_tokens)
    sampler = Segments(args.width, 8, 8, 2, rerolls=args.budget if pruning else 0)
    trees = [Tree.plant(task, seed=seed) for task in tasks]
    await grow_forest(trees, loaded.engine, sampler, sampling, stop, pruning)
    rights, tokens = await grown_on(loaded, trees, stop, sampling, args.times)
    for tree in trees:
        await grade(tree, REWARDS, loaded.decode)
    graded = [leaf for tree in trees for leaf in tree.leaves() if leaf.reward is not None]
    if len(graded) != args.width * len(trees):
        raise AssertionError(f"{len(graded)} paths ended where {args.width * len(trees)} were wanted")
    spent = cost(trees)
    mixed = [tree for tree in trees if len({leaf.reward for leaf in tree.leaves() if leaf.reward is not None}) > 1]
    return {
        "pruned": len(rights) / args.times / (len(graded) + len(rights) / args.times),
        "pruned right": sum(rights) / len(rights) if rights else 0.0,
        "others right": sum(correct(leaf) for leaf in graded) / len(graded),
        "tokens saved a pruned path": sum(tokens) / len(tokens) if tokens else 0.0,
        "sampled tokens a path": spent.sampled / len(graded),
        "mixed trees": len(mixed) / len(trees),
    }


def main() -> None:
    """Measure every rule on every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="runs/quickstart/1-sft", help="a model folder or run that knows the quickstart's task"
    )
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--budget", type=int, default=2, help="paths of a tree that may be pruned")
    parser.add_argument("--times", type=int, default=4, help="ends of each pruned path")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    loaded = load_model(args.model, args.device, args.threads, 256)
    tasks = render(ChainSum(args.problems, "test")(), loaded.tokenizer)
    rows: list[dict[str, Any]] = []
    for name, pruning in rules(loaded, args.budget).items():
        runs = [asyncio.run(measure(loaded, tasks, pruning, args, seed)) for seed in range(args.seeds)]
        spreads: dict[str, Spread] = {key: spread([run[key] for run in runs]) for key in runs[0]}
        rows.append({"rule": name} | {key: str(value) for key, value in spreads.items()})
    print(table(rows))
    record("pruning", rows, args.device)


if __name__ == "__main__":
    main()
