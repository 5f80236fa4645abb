"""Advantages without a group's deviation: REINFORCE, REINFORCE++, imitation of what was right, and LUFFY's split baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ramulus.core.tree import Node, Tree, correct
from ramulus.learn.advantage.group import Lone, Over, check_lone, graded, mean_of, rewards_of
from ramulus.learn.advantage.subgroup import whitened
from ramulus.learn.batch.tree_batch import Credits


@dataclass(frozen=True)
class Raw:
    """The reward itself (REINFORCE).

    Example:
        >>> from ramulus import Author, Raw, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaves = [tree.add(tree.root, [2], Author.POLICY, finish="eos", reward=r) for r in (1.0, 0.0)]
        >>> list(Raw()([tree])[0].leaf.values())
        [1.0, 0.0]
    """

    over: Over = "policy"

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [Credits({leaf.id: leaf.reward for leaf in graded(tree, self.over)}) for tree in forest]


@dataclass(frozen=True)
class Signed:
    """+1 for a reward above `above`, else -1 (SRFT's self-rollouts; `grpo_balance` of LUFFY's code).

    Example:
        >>> from ramulus import Author, Signed, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaves = [tree.add(tree.root, [2], Author.POLICY, finish="eos", reward=r) for r in (1.0, 0.0)]
        >>> list(Signed()([tree])[0].leaf.values())
        [1.0, -1.0]
    """

    above: float = 0.0
    over: Over = "policy"

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [
            Credits({n.id: 1.0 if (n.reward or 0.0) > self.above else -1.0 for n in graded(tree, self.over)})
            for tree in forest
        ]


@dataclass(frozen=True)
class Right:
    """1 for every correct path, the others in no mean and no gradient: with `side=Author.EXPERT` it keeps the rare right rollouts of a
    question that a gate sends to its demonstration."""

    over: Over = "policy"

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [Credits({leaf.id: 1.0 for leaf in graded(tree, self.over) if correct(leaf)}) for tree in forest]


@dataclass(frozen=True)
class Whitened:
    """REINFORCE++: discounted rewards to go, shifted and scaled over all learned tokens of the batch (arXiv 2501.03262, eqs. 8-9).

    Example:
        >>> from ramulus import Author, Task, Tree, Whitened
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaves = [tree.add(tree.root, [2], Author.POLICY, finish="eos", reward=r) for r in (1.0, 0.0)]
        >>> [round(credit, 3) for credit in Whitened()([tree])[0].leaf.values()]
        [0.707, -0.707]
    """

    gamma: float = 1.0
    over: Over = "policy"

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"Whitened's gamma is a discount in [0, 1], got {self.gamma}")

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        groups = [graded(tree, self.over) for tree in forest]
        lengths = [_own(leaf) for leaves in groups for leaf in leaves]
        flat = [self.to_go(leaf, n) for leaf, n in zip((x for leaves in groups for x in leaves), lengths, strict=True)]
        answers = iter(whitened(flat, lengths))
        if self.gamma == 1:
            return [Credits({leaf.id: float(next(answers)[0]) for leaf in leaves}) for leaves in groups]
        return [Credits(token={leaf.id: next(answers).tolist() for leaf in leaves}) for leaves in groups]

    def to_go(self, leaf: Node, count: int) -> np.ndarray:
        """The reward as each token sees it: [1] undiscounted, else one value a learned token."""
        left = np.arange(count)[::-1] if self.gamma < 1 else np.zeros(1)
        return np.asarray((leaf.reward or 0.0) * self.gamma**left)


@dataclass(frozen=True)
class SplitMean:
    """GroupMean whose mean and deviation are those of the policy's leaves but which credits demonstrations too (`grpo_split` of LUFFY's code).

    A deviation of 0, or of a single leaf, counts as 1; a tree without a graded policy leaf has the mean 0. `lone`: what the policy's only leaf
    earns, and a demonstration that is the only leaf; with "reward" a single leaf's mean is 0, as in that code.

    Example:
        >>> from ramulus import Author, SplitMean, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> authors = (Author.POLICY, 0.0), (Author.POLICY, 1.0), (Author.EXPERT, 1.0)
        >>> leaves = [tree.add(tree.root, [2], author, finish="eos", reward=reward) for author, reward in authors]
        >>> list(SplitMean(std=False)([tree])[0].leaf.values())
        [-0.5, 0.5, 0.5]
    """

    std: bool = True
    eps: float = 1e-6
    lone: Lone = "zero"

    def __post_init__(self) -> None:
        check_lone(self.lone, "SplitMean")

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [self.credit(tree) for tree in forest]

    def credit(self, tree: Tree) -> Credits:
        """The credits of one tree."""
        ours, leaves = rewards_of(graded(tree)), graded(tree, "all")
        if len(leaves) == 1 and self.lone == "zero":
            return Credits({leaves[0].id: 0.0})
        mean = mean_of(ours) if len(ours) > 1 or (ours and self.lone == "zero") else 0.0
        spread = math.sqrt(math.fsum((r - mean) ** 2 for r in ours) / (len(ours) - 1)) if len(ours) > 1 else 0.0
        scale = 1 / ((spread or 1.0) + self.eps) if self.std else 1.0
        return Credits({leaf.id: ((leaf.reward or 0.0) - mean) * scale for leaf in leaves})


def _own(leaf: Node) -> int:
    """Tokens on a leaf's path by the leaf's own author: those that are learned from."""
    return sum(len(node.tokens) for node in leaf.line() if node.author is leaf.author)
