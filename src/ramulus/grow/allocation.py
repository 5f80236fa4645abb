"""How a round's branches are shared out among the living paths, and how many the first round has (arXiv 2508.17445)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ramulus.core.tree import Author, Node, Tree

Allocation = Callable[[Sequence[Node], int, int, int], list[int]]
"""(living paths [a], branches to share out >= a, segment length, training step) -> branches of each [a], all >= 1."""

First = Callable[[Tree, int, int, int], int]
"""(tree, branching factor, width, segment length) -> paths of the first round, 1 to width."""


@dataclass(frozen=True)
class Even:
    """Gives every path as much; the remainder goes to the last path, as published, or with `spread` one each to the first ones."""

    spread: bool = False

    def __call__(self, leaves: Sequence[Node], total: int, segment: int, step: int) -> list[int]:
        each, rest = divmod(total, len(leaves))
        if self.spread:
            return [each + (i < rest) for i in range(len(leaves))]
        return [each] * (len(leaves) - 1) + [each + rest]


@dataclass(frozen=True)
class Ramp:
    """A softmax temperature from `low` to `high` along half a sine over `total` training steps; down with `rising=False`."""

    total: int
    low: float = 0.5
    high: float = 10.0
    rising: bool = True

    def __post_init__(self) -> None:
        if self.total < 1:
            raise ValueError(f"Ramp's total is the number of training steps, at least 1, got {self.total}")
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(
                f"Ramp needs 0 < low <= high, got low={self.low} and high={self.high}: use rising=False to go down"
            )

    def __call__(self, step: int) -> float:
        """The temperature at a step; steps beyond `total` keep the last one."""
        wave = math.sin(math.pi * min(max(step, 0), self.total) / self.total - math.pi / 2)
        return (self.low + self.high) / 2 + (self.high - self.low) / 2 * (wave if self.rising else -wave)


@dataclass(frozen=True)
class ByLogprob:
    """One branch for every path and the rest by softmax(-+(x - min x) / T), rounded by largest remainder.

    x is the log-prob of the path as sampled: its `sum`, its `mean`, or the mean over its last segment's tokens (`last`,
    section 4.4 of arXiv 2508.17445). `favour` the low ones or the high ones. T is a number or a rule on the training step
    (Ramp). Equal remainders go to the earlier path.
    """

    over: Literal["sum", "mean", "last"] = "last"
    favour: Literal["low", "high"] = "low"
    temperature: float | Ramp = 1.0

    def __post_init__(self) -> None:
        if self.over not in ("sum", "mean", "last"):
            raise ValueError(f"ByLogprob's over is 'sum', 'mean' or 'last', got {self.over!r}")
        if self.favour not in ("low", "high"):
            raise ValueError(f"ByLogprob's favour is 'low' or 'high', got {self.favour!r}")
        if isinstance(self.temperature, int | float) and not 0 < self.temperature < math.inf:
            raise ValueError(
                f"ByLogprob's temperature must be above 0, got {self.temperature}: a small one favours more sharply"
            )

    def __call__(self, leaves: Sequence[Node], total: int, segment: int, step: int) -> list[int]:
        scores = [self.statistic(logprobs(leaf), segment) for leaf in leaves]
        temperature = self.temperature if isinstance(self.temperature, int | float) else self.temperature(step)
        sign = -1.0 if self.favour == "low" else 1.0
        weights = softmax([sign * (x - min(scores)) / temperature for x in scores])
        return [1 + more for more in largest_remainder(weights, total - len(leaves))]

    def statistic(self, logps: list[float], segment: int) -> float:
        """The number by which a path is judged."""
        if self.over == "last":
            logps = logps[-segment:]
        total = math.fsum(logps)
        return total if self.over == "sum" else total / max(len(logps), 1)


@dataclass(frozen=True)
class MoreFirst:
    """More divergence at the start: a first round of U{low..high} paths, `high` capped at the width (paper: 2 to 8).

    `low` 0 takes the branching factor. With `shared` one draw serves every tree of a training step.
    """

    high: int = 8
    low: int = 0
    shared: bool = False

    def __post_init__(self) -> None:
        if self.low < 0 or self.high < max(self.low, 1):
            raise ValueError(f"MoreFirst needs 0 <= low <= high and high >= 1, got low={self.low} and high={self.high}")

    def __call__(self, tree: Tree, branching: int, width: int, segment: int) -> int:
        low = min(self.low or branching, width)
        if self.high < low:
            raise ValueError(f"MoreFirst(high={self.high}) is below the branching factor {low}: raise high, or set low")
        one = f"{tree.seed}/{tree.step}/first" if self.shared else f"{tree.seed}/{tree.task.id}/{tree.visit}/first"
        return random.Random(one).randint(low, min(self.high, width))


@dataclass(frozen=True)
class FirstByTokens:
    """A first round as wide as a token budget per round allows: clamp(tokens // segment // prompts, 1, width)."""

    tokens: int
    prompts: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.prompts < 1:
            raise ValueError(
                f"FirstByTokens needs tokens and prompts of at least 1, got {self.tokens} and {self.prompts}"
            )

    def __call__(self, tree: Tree, branching: int, width: int, segment: int) -> int:
        return min(max(self.tokens // segment // self.prompts, 1), width)


def logprobs(leaf: Node) -> list[float]:
    """The sampled log-probs along a path, root to leaf; tokens of other authors have none."""
    return [value for node in leaf.line() if node.author is Author.POLICY for value in node.logprobs]


def softmax(scores: Sequence[float]) -> list[float]:
    """Shares that sum to 1."""
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def largest_remainder(shares: Sequence[float], seats: int) -> list[int]:
    """Whole numbers that sum to `seats`: shares rounded down, the rest to the largest remainders, ties to the earlier."""
    wanted = [share * seats for share in shares]
    given = [math.floor(value) for value in wanted]
    order = sorted(range(len(shares)), key=lambda i: given[i] - wanted[i])  # a stable sort: ties keep their order
    for i in order[: seats - sum(given)]:
        given[i] += 1
    return given
