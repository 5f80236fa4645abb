"""Adaptive sampling: which paths of a prompt are worth growing from, which prompts are dropped, how many are drawn (arXiv 2509.26628)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ramulus.core.tree import Node, Tree, correct, origin
from ramulus.grow.branching import dice, paths
from ramulus.grow.forks import signal_of, steps_of
from ramulus.grow.prompts import PromptBatch
from ramulus.grow.schedule import State


@dataclass(frozen=True)
class Adaptive:
    """AttnRL's adaptive sampling: prompts by `batch`, growth by difficulty, trees without signal dropped.

    Of G first paths with a share z of right ones, K = G exp(-z) are grown from, rounded up as released or to the `nearest` as in the
    paper (eq. 9); "all" grows from every one. From z = 1/2 on the wrong ones come first, below it the right ones; the rest is drawn.
    `attention`: a prompt with z = 1 is dropped unless its mean influence is above the mean over all such prompts so far, this step's
    included; with `alpha` > 0 that mean is an exponential one and forgets. `even`: trees whose trained paths are all right or all wrong
    are dropped. `unbranched` as in GlobalLocal: whether a path that nothing grows from is trained.

    Paths that go on from a part of a demonstration say nothing of a prompt's difficulty and are none of the G: where a prompt is kept,
    all of them are grown from.

    Example:
        >>> from ramulus import Adaptive, PromptBatch
        >>> Adaptive(PromptBatch(64, target=64 * 30)).asked({})
        64
    """

    batch: PromptBatch
    rounding: Literal["ceil", "nearest", "all"] = "ceil"
    attention: bool = True
    alpha: float = 0.0
    even: bool = True
    unbranched: bool = False

    def __post_init__(self) -> None:
        if self.rounding not in ("ceil", "nearest", "all"):
            raise ValueError(f"Adaptive's rounding is 'ceil', 'nearest' or 'all', got {self.rounding!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"Adaptive's alpha must be in [0, 1] (0: the mean of all so far), got {self.alpha}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the signals that the rule reads."""
        return ("steps", "influence") if self.attention else ()

    @property
    def prompts(self) -> int:
        """Trees of the first step."""
        return self.batch.first

    @property
    def most_trees(self) -> int | None:
        """Trees of a step at most; None where the batch has no bound."""
        return max(self.batch.first, self.batch.most) if self.batch.most else None

    def asked(self, state: State) -> int:
        """Trees of the next step."""
        return self.batch.size(state.get("batch", {}))

    def __call__(self, kept: Sequence[Tree], draws: int, state: State) -> tuple[int, State]:
        """One draw a step; what it left decides the size of the next."""
        if draws == 0:
            return self.asked(state), state
        left = sum(len(self.trained(tree)) for tree in kept)
        return 0, state | {"batch": self.batch.update(left, state.get("batch", {}))}

    def keep(self, tree: Tree) -> bool:
        """Whether any path is trained, and unless not `even`, right and wrong ones."""
        rights = {correct(leaf) > 0 for leaf in self.trained(tree)}
        return len(rights) == 2 if self.even else bool(rights)

    def trained(self, tree: Tree) -> list[Node]:
        """The graded paths that take part in training."""
        return [leaf for leaf in _graded(tree) if self.unbranched or leaf.parent is not origin(leaf)]

    def expand(self, trees: Sequence[Tree], state: State) -> tuple[list[set[int]], State]:
        """Trees after their first round, graded -> the ids of the leaves to grow from in each, and the state after it."""
        leaves = [first(tree) for tree in trees]
        rates = [difficulty(alone) for alone, _ in leaves]
        level = {i: attended(leaves[i][0]) for i, z in enumerate(rates) if self.attention and z == 1}
        if level:
            state = state | {"easy": self.moved(state.get("easy", {}), list(level.values()))}
        bar = state.get("easy", {}).get("mean", 0.0)
        dropped = [level.get(i, math.inf) <= bar for i in range(len(trees))]
        chosen = [set() if drop else self.choose(tree, *own, z) for tree, own, z, drop in zip(trees, leaves, rates, dropped, strict=True)]
        return chosen, state

    def moved(self, easy: State, values: Sequence[float]) -> State:
        """The running mean and the number of prompts in it, after some more."""
        count, mean = easy.get("count", 0), easy.get("mean", 0.0)
        weight = len(values) / (count + len(values)) if self.alpha == 0 or count == 0 else self.alpha
        return {"count": count + len(values), "mean": mean + weight * (math.fsum(values) / len(values) - mean)}

    def choose(self, tree: Tree, leaves: Sequence[Node], helped: set[int], z: float) -> set[int]:
        """The ids of the leaves of one tree to grow from: all that had help, and of the graded ones without, a share `z` of which is right."""
        if self.rounding == "all" or not leaves:
            return {leaf.id for leaf in leaves} | helped
        exact = len(leaves) * math.exp(-z)
        count = math.ceil(exact) if self.rounding == "ceil" else math.floor(exact + 0.5)
        rights, wrongs = ([leaf for leaf in leaves if (correct(leaf) > 0) == side] for side in (True, False))
        rarer, others = (wrongs, rights) if z >= 0.5 else (rights, wrongs)
        if not rarer or not others:
            return {leaf.id for leaf in leaves[:count]} | helped
        drawn = dice(tree, "expand").sample(others, len(others))
        return {leaf.id for leaf in [*rarer, *drawn][:count]} | helped


def _graded(tree: Tree) -> list[Node]:
    """The policy's paths that have a reward, in the order of their buds."""
    return [leaf for leaf in paths(tree) if leaf.reward is not None]


def first(tree: Tree) -> tuple[list[Node], set[int]]:
    """The graded paths that the policy wrote alone, from the prompt on, and the ids of the graded ones that had help."""
    graded = _graded(tree)
    alone = [leaf for leaf in graded if origin(leaf) is tree.root]
    return alone, {leaf.id for leaf in graded} - {leaf.id for leaf in alone}


def difficulty(leaves: Sequence[Node]) -> float:
    """Share of the graded paths without help that are right; 0 where there is none."""
    return math.fsum(correct(leaf) for leaf in leaves) / len(leaves) if leaves else 0.0


def attended(leaves: Sequence[Node]) -> float:
    """Mean influence of the steps of a path, mean over the graded paths without help."""
    means = []
    for leaf in leaves:
        scores = [signal_of(leaf, "influence")[at] for at in steps_of(leaf)]
        means.append(math.fsum(scores) / max(len(scores), 1))
    return math.fsum(means) / max(len(means), 1)
