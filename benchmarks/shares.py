"""How biased is the gradient when a tree's leaves weigh alike, and when they are split at each fork? `python -m benchmarks.shares`.

A table model over few tokens, small enough that every response can be listed, gives the true gradient of the expected reward. Trees
are grown by several samplers; `pack` weighs their leaves by `each_leaf` or `each_fork`; the baseline is the true mean, so it adds no
bias of its own. The bias is the distance of the mean estimate from the true gradient, over the length of the true gradient, with
what chance alone would give taken off; the spread is over independent batches of trees.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.pairing import record, table
from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.engine.engine import Sampling
from ramulus.engine.toy import ToyEngine
from ramulus.grow.allocation import ByLogprob
from ramulus.grow.branching import Branching, Star
from ramulus.grow.growth import grow_forest
from ramulus.grow.segments import Segments
from ramulus.grow.stop import Stop
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Everything
from ramulus.learn.objective.mix import ConstantLength, Mix, Term
from ramulus.learn.objective.reference import Itself
from ramulus.learn.packing.pack import pack

VOCABULARY, LONGEST, PROMPT, EOS = 5, 6, (1,), 0
SAMPLERS: dict[str, Branching] = {
    "Star(8)": Star(8),
    "Segments, even, no fallback": Segments(8, 3, 2, 2, fallback=None),
    "Segments, even": Segments(8, 3, 2, 2),
    "Segments, unlikely paths first, no fallback": Segments(
        8, 6, 1, 2, first=2, allocation=ByLogprob(temperature=0.2), fallback=None
    ),
    "Segments, unlikely paths first": Segments(8, 6, 1, 2, first=2, allocation=ByLogprob(temperature=0.2)),
}


def reward(response: Sequence[int]) -> float:
    """1 for responses whose tokens sum to a multiple of 3."""
    return float(sum(response) % 3 == 0)


def gradient(engine: ToyEngine, prefix: Sequence[int], token: int) -> np.ndarray:
    """d log pi(token | prefix) by every logit of the table [V^2, V], flattened."""
    answer = np.zeros((VOCABULARY, VOCABULARY, VOCABULARY))
    context = (*PROMPT, *prefix)[-2:]
    place = (0, context[0]) if len(context) == 1 else context
    answer[place] = -np.asarray(engine.probabilities((*PROMPT, *prefix)))
    answer[place][token] += 1
    return answer.ravel()


def truth(engine: ToyEngine) -> tuple[float, np.ndarray]:
    """The expected reward and its gradient, over every response there is."""
    mean, total = 0.0, np.zeros(VOCABULARY**3)
    stack: list[tuple[tuple[int, ...], float, np.ndarray]] = [((), 1.0, np.zeros(VOCABULARY**3))]
    while stack:
        response, chance, score = stack.pop()
        if len(response) == LONGEST or response[-1:] == (EOS,):
            mean += chance * reward(response)
            total += chance * reward(response) * score
            continue
        for token, p in enumerate(engine.probabilities((*PROMPT, *response))):
            stack.append(((*response, token), chance * p, score + gradient(engine, response, token)))
    return mean, total


@dataclass(frozen=True)
class Centred:
    """Reward minus a known constant."""

    baseline: float

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [
            Credits({leaf.id: reward(leaf.response()) - self.baseline for leaf in tree.leaves()}) for tree in forest
        ]


def estimate(
    engine: ToyEngine, trees: list[Tree], baseline: float, share: Literal["each_leaf", "each_fork"]
) -> np.ndarray:
    """The mean over trees of the packed gradient."""
    mix = Mix((Term(Estimator(Everything(), Itself(), Centred(baseline)), normaliser=ConstantLength(1)),), share=share)
    total = np.zeros(VOCABULARY**3)
    for tree in trees:
        (row,) = pack([tree], mix.credit([tree]), mix)
        pull = (row.gain + row.pain)[0].tolist()
        token, parent = row.token.tolist(), row.parent.tolist()
        for t, pulled in enumerate(pull):
            if pulled:
                prefix, at = [], parent[t]
                while at != parent[at]:
                    prefix.append(token[at])
                    at = parent[at]
                total += pulled * gradient(engine, prefix[::-1], token[t])
    return total / len(trees)


def measure(sampler: Branching, batches: int, trees: int) -> dict[str, str]:
    """Relative bias under both shares, and the relative standard deviation of one tree's estimate."""
    engine = ToyEngine(VOCABULARY, seed=1, order=2, spread=2.0)
    mean, exact = truth(engine)
    found: dict[str, list[np.ndarray]] = {"each_leaf": [], "each_fork": []}
    for batch in range(batches):
        forest = [Tree.plant(Task(f"{i}", PROMPT, ""), seed=batch) for i in range(trees)]
        asyncio.run(grow_forest(forest, engine, sampler, Sampling(LONGEST), Stop((EOS,), LONGEST)))
        for share in ("each_leaf", "each_fork"):
            found[share].append(estimate(engine, forest, mean, share))  # type: ignore[arg-type]
    row = {}
    for share, estimates in found.items():
        values = np.stack(estimates)
        noise = values.var(0, ddof=1).sum() / batches
        bias = math.sqrt(max(((values.mean(0) - exact) ** 2).sum() - noise, 0.0))
        size = float(np.linalg.norm(exact))
        row[f"bias, {share}"] = f"{bias / size:.3f} (chance {math.sqrt(noise) / size:.3f})"
        row[f"deviation of a tree, {share}"] = f"{math.sqrt(values.var(0, ddof=1).sum() * trees) / size:.2f}"
    return row


def main() -> None:
    """Print the table of all samplers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--trees", type=int, default=400, help="trees of a batch")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = [
        {"sampler": name} | measure(rule, args.batches, args.trees) for name, rule in SAMPLERS.items()
    ]
    print(table(rows))
    record("shares", rows)


if __name__ == "__main__":
    main()
