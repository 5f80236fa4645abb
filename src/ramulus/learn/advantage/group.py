"""Advantages: what credit each leaf earns, from the forest alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ramulus.core.recipe_part import RecipePart
from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.batch.tree_batch import Credits


class Advantage(RecipePart, Protocol):
    """A forest -> the credits of each of its trees; the rest is what one may say of itself.

    Example:
        >>> from ramulus import Author, Credits, Task, Tree, graded
        >>> def halved(forest):  # any callable is one
        ...     return [Credits({leaf.id: leaf.reward / 2 for leaf in graded(tree)}) for tree in forest]
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2], Author.POLICY, finish="eos", reward=1.0)
        >>> halved([tree])[0].leaf == {leaf.id: 0.5}
        True
    """

    column: str | None = None  # the log-probs that it reads of each node: "recomputed" or "recomputed_tempered" have the forest scored before
    unbranched: bool | None = None  # whether it trains paths that nothing branches from; None where it makes no difference between paths

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]: ...


Over = Literal["policy", "all", "expert"]
Lone = Literal["zero", "reward"]
"""What a leaf earns that is alone in its group: nothing, as there is nothing to compare it with, or its reward, as in verl, TRL and their forks."""

AUTHORS = {"policy": (Author.POLICY,), "expert": (Author.EXPERT,), "all": tuple(Author)}


def graded(tree: Tree, over: Over = "policy") -> list[Node]:
    """The leaves that carry a reward: those the policy wrote, the demonstrations, or all of them."""
    authors = AUTHORS[over]
    return [leaf for leaf in tree.leaves() if leaf.reward is not None and leaf.author in authors]


def rewards_of(leaves: Sequence[Node]) -> list[float]:
    """The rewards of graded leaves."""
    return [leaf.reward for leaf in leaves if leaf.reward is not None]


def mean_of(rewards: Sequence[float]) -> float:
    """Their mean; exactly the one value where all are alike, so that rounding leaves no credit behind."""
    return rewards[0] if len(set(rewards)) == 1 else math.fsum(rewards) / len(rewards)


def check_lone(lone: str, name: str) -> None:
    """Raise ValueError for a setting that no lone leaf can earn by."""
    if lone not in ("zero", "reward"):
        raise ValueError(f"{name}'s lone is 'zero' or 'reward', got {lone!r}")


@dataclass(frozen=True)
class Constant:
    """The same credit for every graded leaf (SFT with 1).

    With over="expert" a path that the policy wrote on from a part of a demonstration is left out.

    Example:
        >>> from ramulus import Author, Constant, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2], Author.EXPERT, finish="eos", reward=1.0)
        >>> Constant(1.0)([tree])[0].leaf == {leaf.id: 1.0}
        True
    """

    value: float = 1.0
    over: Over = "all"

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [Credits({leaf.id: self.value for leaf in graded(tree, self.over)}) for tree in forest]


@dataclass(frozen=True)
class GroupMean:
    """Reward minus the mean of its group: GRPO with `std` (arXiv 2402.03300, section 4.1.2), Dr.GRPO without (2503.20783),
    RLOO with `leave_one_out` (2402.14740, eq. 8).

    `over` says whether the baseline runs over the leaves the policy wrote or over the demonstrations as well. The standard
    deviation is the sample's. `lone`: what a leaf earns that is alone in its group.

    Example:
        >>> from ramulus import Author, GroupMean, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaves = [tree.add(tree.root, [2], Author.POLICY, finish="eos", reward=r) for r in (1.0, 0.0)]
        >>> list(GroupMean(std=False)([tree])[0].leaf.values())
        [0.5, -0.5]
    """

    std: bool = True
    leave_one_out: bool = False
    over: Over = "policy"
    eps: float = 1e-6
    lone: Lone = "zero"

    def __post_init__(self) -> None:
        check_lone(self.lone, "GroupMean")
        if self.over not in ("policy", "all"):
            raise ValueError(f"GroupMean's over is 'policy' or 'all', got {self.over!r}")

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [self.credit(graded(tree, self.over)) for tree in forest]

    def credit(self, leaves: Sequence[Node]) -> Credits:
        """The credits of one group."""
        rewards = rewards_of(leaves)
        if len(rewards) < 2:
            return Credits({leaf.id: leaf.reward if self.lone == "reward" else 0.0 for leaf in leaves})
        mean = mean_of(rewards)
        apart = [reward - mean for reward in rewards]
        scale = len(rewards) / (len(rewards) - 1) if self.leave_one_out else 1.0
        if self.std:
            scale /= math.sqrt(math.fsum(a * a for a in apart) / (len(rewards) - 1)) + self.eps
        return Credits({leaf.id: a * scale for leaf, a in zip(leaves, apart, strict=True)})
