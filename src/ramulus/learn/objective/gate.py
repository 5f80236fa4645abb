"""Gates: from whom each question is learned, its rollouts or its demonstrations (arXiv 2509.04419, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ramulus.core.tree import Author, Node, Tree, correct, demonstrations, origin

_State = dict[str, Any]
"""Plain JSON that the trainer hands in and takes back, and keeps in every checkpoint."""

GateWeights = dict[Author | str, float]
"""What the leaves of one tree weigh: by author, and by name for terms whose `side` asks for it."""

Gate = Callable[[Tree, _State], tuple[GateWeights, _State]]
"""(a graded tree, state) -> (its weights, state)."""

_ROLLOUTS: GateWeights = {Author.POLICY: 1.0, Author.EXPERT: 0.0, "off": 0.0}  # learned from alone

MOST = 300  # terms of a continued fraction


def marks(tree: Tree) -> list[float]:
    """1 for each graded path that the policy solved alone, else 0; one that began from a demonstration says nothing of the policy."""
    return [correct(leaf) for leaf in tree.leaves() if alone(leaf)]


def draws(tree: Tree) -> list[float]:
    """The share of solved paths below each node that grew from the prompt: paths that share a beginning are one draw, not several."""
    tops = [[leaf for leaf in top.leaves() if alone(leaf)] for top in tree.root.children]
    return [math.fsum(correct(leaf) for leaf in leaves) / len(leaves) for leaves in tops if leaves]


def alone(leaf: Node) -> bool:
    """Whether the policy wrote a graded path without help."""
    return leaf.author is Author.POLICY and leaf.reward is not None and origin(leaf).author is Author.PROMPT


def demonstrated(tree: Tree) -> bool:
    """Whether there is a demonstration to learn from."""
    return bool(demonstrations(tree))


def side_of(leaf: Node, side: Author | str | None) -> Author | str:
    """Whose weight a leaf takes by a term's `side`: that of its author where that is None."""
    return side if side is not None else Author.EXPERT if leaf.author is Author.EXPERT else Author.POLICY


def weigh(leaf: Node, side: Author | str | None, weights: GateWeights) -> float:
    """A leaf's weight: that of `side`, or of its author where that is None. Raises ValueError for a side that the gate does not know."""
    side = side_of(leaf, side)
    if side not in weights:
        raise ValueError(
            f"a term's side is {side!r}, but the gate weighs {list(weights)}: take one of these, or another gate"
        )
    return weights[side]


def openness(gates: Sequence[GateWeights] | None) -> dict[str, float]:
    """Metrics of a step: the mean weight of rollouts and of demonstrations, over its questions."""
    if not gates:
        return {}
    sides = {"gate_policy": Author.POLICY, "gate_expert": Author.EXPERT}
    return {name: math.fsum(weights.get(side, 0.0) for weights in gates) / len(gates) for name, side in sides.items()}


@dataclass(frozen=True)
class Even:
    """Every question is learned from its rollouts and its demonstrations alike (LUFFY, SRFT)."""

    def __call__(self, tree: Tree, state: _State) -> tuple[GateWeights, _State]:
        return {Author.POLICY: 1.0, Author.EXPERT: 1.0, "off": 1.0}, state


@dataclass(frozen=True)
class Switch:
    """HPT: rollouts where the share of solved ones is above `threshold`, else the demonstration (arXiv 2509.04419, eqs. 8-10).

    Published thresholds: 0 (Qwen2.5-Math), 2/8 (LLaMA-3.1-8B); below 0 it never shows a demonstration. Up to the share `off` the
    demonstration is learned by the term whose side is "off" (off-policy RL in the released code). A question without a graded rollout
    counts as one that none solved; one without a demonstration stays with its rollouts.

    Example:
        >>> from ramulus import Author, Switch, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaves = [
        ...     tree.add(tree.root, [2], author, finish="eos", reward=reward)
        ...     for author, reward in ((Author.POLICY, 0.0), (Author.EXPERT, 1.0))
        ... ]
        >>> weights, state = Switch(threshold=0.0)(tree, {})
        >>> weights[Author.POLICY], weights[Author.EXPERT]
        (0.0, 1.0)
    """

    threshold: float = 0.0
    off: float | None = None

    def __post_init__(self) -> None:
        if not self.threshold <= 1 or (self.off is not None and not self.threshold <= self.off <= 1):
            raise ValueError(f"Switch needs threshold <= off <= 1, got threshold={self.threshold} and off={self.off}")

    def __call__(self, tree: Tree, state: _State) -> tuple[GateWeights, _State]:
        solved, slack = marks(tree), 1e-9  # a threshold such as 1/3 is not exact
        rate = sum(solved) / len(solved) if solved else 0.0
        off = self.threshold if self.off is None else self.off
        if not demonstrated(tree) or rate > off + slack:
            return dict(_ROLLOUTS), state
        shown = rate <= self.threshold + slack
        return {Author.POLICY: 0.0, Author.EXPERT: float(shown), "off": float(not shown)}, state


@dataclass(frozen=True)
class Smooth:
    """Weighs rollouts by the probability that the policy's solve rate lies above `threshold`, demonstrations by the rest.

    The solve rate of a question has a Beta posterior, kept across visits by task id, so that one unlucky draw flips nothing. Paths that
    share a beginning count as one draw. At each visit the earlier counts are multiplied by `memory`, because the policy has moved on
    since. `prior` holds the counts before any visit (Jeffreys' by default). A question without a demonstration stays with its rollouts.

    Example:
        >>> from ramulus import Author, Smooth, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2], Author.POLICY, finish="eos", reward=1.0)
        >>> weights, state = Smooth(threshold=0.1)(tree, {})
        >>> weights[Author.POLICY] > weights[Author.EXPERT]
        True
    """

    threshold: float = 0.1
    memory: float = 0.7
    prior: tuple[float, float] = (0.5, 0.5)

    def __post_init__(self) -> None:
        if not (0 < self.threshold < 1 and 0 <= self.memory <= 1 and min(self.prior) > 0):
            raise ValueError(
                f"Smooth needs 0 < threshold < 1, 0 <= memory <= 1 and a prior above 0, got {self.threshold}, {self.memory} and {self.prior}"
            )

    def __call__(self, tree: Tree, state: _State) -> tuple[GateWeights, _State]:
        solved = draws(tree)
        good, bad = (self.memory * count for count in state.get(tree.task.id, (0.0, 0.0)))
        good, bad = good + math.fsum(solved), bad + len(solved) - math.fsum(solved)
        state = state | {tree.task.id: [good, bad]} if solved else state
        if not demonstrated(tree):
            return dict(_ROLLOUTS), state
        below = beta_cdf(self.threshold, self.prior[0] + good, self.prior[1] + bad)
        return {Author.POLICY: 1.0 - below, Author.EXPERT: below, "off": 0.0}, state


SOFT = (
    ((1, 1, 1), (0, 0, 1), (0.125, 0.5, 0.5), (0.25, 1, 0.25), (0.5, 0.5, 0.125), (1, 0.25, 0), (1, 0.125, 0), (1, 0, 0), (1, 0, 0)),
    ((1, 1, 1), (0, 1, 1), (0.125, 1, 0.5), (0.25, 1, 0.25), (0.5, 1, 0.125), (1, 1, 0), (1, 1, 0), (1, 1, 0), (1, 1, 0)),
    ((1, 1, 1), (0, 0, 1), (0.125, 0, 0.5), (0.25, 0, 0.25), (0.5, 0, 0.125), (1, 0, 0), (1, 0, 0), (1, 0, 0), (1, 0, 0)),
)  # fmt: skip
"""HPT's three soft tables: (rollouts, off-policy RL on the demonstration, SFT on it) for 0 to 8 correct rows of 8."""


@dataclass(frozen=True)
class Soft:
    """Weights by how many of a question's graded leaves are correct, its demonstrations counted (HPT's code, where they have no effect).

    A question without a demonstration stays with its rollouts.

    Example:
        >>> from ramulus import Author, Soft, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaves = [
        ...     tree.add(tree.root, [2], author, finish="eos", reward=reward)
        ...     for author, reward in ((Author.POLICY, 0.0), (Author.EXPERT, 1.0))
        ... ]
        >>> weights, state = Soft()(tree, {})  # one of two is right
        >>> weights[Author.POLICY], weights[Author.EXPERT]
        (0.5, 0.125)
    """

    table: Sequence[tuple[float, float, float]] = SOFT[0]

    def __call__(self, tree: Tree, state: _State) -> tuple[GateWeights, _State]:
        if not demonstrated(tree):
            return dict(_ROLLOUTS), state
        graded = [leaf for leaf in tree.leaves() if leaf.reward is not None]
        solved = math.fsum(correct(leaf) for leaf in graded) / max(len(graded), 1)
        policy, off, sft = self.table[round((len(self.table) - 1) * solved)]
        return {Author.POLICY: policy, Author.EXPERT: sft, "off": off}, state


def beta_cdf(x: float, a: float, b: float) -> float:
    """P(X <= x) for X ~ Beta(a, b): the regularised incomplete beta function, by Lentz's continued fraction."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, that of the mirror image does not
        return 1.0 - beta_cdf(1 - x, b, a)
    front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    total, up, down = 1.0, 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1))
    total = down
    for i in range(1, MOST):
        for part in (
            i * (b - i) * x / ((a + 2 * i - 1) * (a + 2 * i)),
            -(a + i) * (a + b + i) * x / ((a + 2 * i) * (a + 2 * i + 1)),
        ):
            down, up = 1.0 / (1.0 + part * down), 1.0 + part / up
            total *= down * up
        if abs(down * up - 1.0) < 1e-14:
            break
    return min(math.exp(front) * total / a, 1.0)
