"""Advantages of nodes: better than the whole tree, and better than their parent (TreeRL, arXiv 2506.11902; AttnRL, 2509.26628)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ramulus.core.tree import Node, Tree, origin
from ramulus.learn.advantage.group import Lone, check_lone, graded, mean_of, rewards_of
from ramulus.learn.advantage.subgroup import members
from ramulus.learn.batch.tree_batch import Credits


@dataclass(frozen=True)
class GlobalLocal:
    """A node's value against the tree's plus its value against its parent's, over the root of the leaves below it.

    With V the mean reward of the policy's graded leaves below a node and c their number:
    paper (2506.11902, section 3.2; 2509.26628, eqs. 12-14): A = (V - V(root) + V - V(parent)) / sqrt(c).
    released (TreeRL's code): u = sum of (reward - mean of the others' rewards) / sqrt(trained leaves below) / c, and
    A = d + u with d = u - u(parent); where |d| < 1e-8 a node below the first takes its parent's d.

    A path that nothing branches from counts in every mean and is not trained, unless `unbranched`. `trained` > 0 trains that
    many paths of a tree: a right one first, then others drawn with the tree's own seed. Paths that go on from a part of a demonstration
    are a tree of their own, rooted where that part ends: what they earn says nothing of the question's value without help. `lone`: what the only
    leaf of such a tree earns in the released form, whose code gives it its reward; in the paper's it is 0.

    Example:
        >>> from ramulus import Author, GlobalLocal, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaves = [tree.add(tree.root, [2], Author.POLICY, finish="eos", reward=r) for r in (1.0, 0.0)]
        >>> GlobalLocal(unbranched=True)([tree])[0].node is not None
        True
    """

    form: Literal["paper", "released"] = "paper"
    unbranched: bool = False
    trained: int = 0
    lone: Lone = "zero"

    def __post_init__(self) -> None:
        check_lone(self.lone, "GlobalLocal")
        if self.form not in ("paper", "released"):
            raise ValueError(f"GlobalLocal's form is 'paper' or 'released', got {self.form!r}")
        if self.trained < 0:
            raise ValueError(f"GlobalLocal's trained is a number of paths, or 0 for all, got {self.trained}")

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [self.credit(tree) for tree in forest]

    def credit(self, tree: Tree) -> Credits:
        """The credit of every node of one tree, and which leaves are trained."""
        leaves = graded(tree)
        if not leaves:
            return Credits(node={})
        places = begun(leaves)
        trainable = {leaf.id for root, own in places for leaf in own if self.unbranched or leaf.parent is not root}
        chosen = self.choose(tree, [leaf for leaf in leaves if leaf.id in trainable])
        trained = {leaf.id for leaf in chosen}
        value: dict[int, float] = {}
        for root, own in places:
            below = members(own)
            if self.form == "released" and (len(own) > 1 or self.lone == "reward"):
                value |= released(root, below, trained)
            else:
                value |= paper(root, below)
        return Credits({leaf.id: leaf.reward for leaf in chosen}, node=value)

    def choose(self, tree: Tree, leaves: list[Node]) -> list[Node]:
        """The leaves that are trained."""
        if not self.trained or len(leaves) <= self.trained:
            return leaves
        dice = random.Random(f"{tree.seed}/{tree.task.id}/{tree.visit}/trained")
        order = dice.sample(leaves, len(leaves))
        best = max(order, key=lambda leaf: leaf.reward or 0.0)
        rest = [leaf for leaf in order if leaf is not best][: self.trained - 1]
        return [leaf for leaf in leaves if leaf is best or leaf in rest]


def begun(leaves: Sequence[Node]) -> list[tuple[Node, list[Node]]]:
    """(where the policy began, the leaves that it wrote from there) of each such place."""
    places: dict[int, tuple[Node, list[Node]]] = {}
    for leaf in leaves:
        root = origin(leaf)
        places.setdefault(root.id, (root, []))[1].append(leaf)
    return list(places.values())


def paper(root: Node, below: dict[int, list[Node]]) -> dict[int, float]:
    """Node id -> (global + local) / sqrt(leaves), of every node above a graded leaf and below the root."""
    mean = {node: mean_of(rewards_of(leaves)) for node, leaves in below.items()}
    whole = mean[root.id]
    return {
        node.id: (mean[node.id] - whole + mean[node.id] - mean[node.parent.id]) / math.sqrt(len(below[node.id]))
        for node in root.walk()
        if node is not root and node.parent is not None and node.id in below
    }


def released(root: Node, below: dict[int, list[Node]], trained: set[int]) -> dict[int, float]:
    """Node id -> what TreeRL's code with its published flags assigns; 0 where no trained leaf lies below."""
    leaves = below[root.id]
    total, n = math.fsum(rewards_of(leaves)), len(leaves)
    apart = {leaf.id: (leaf.reward or 0.0) - (total - (leaf.reward or 0.0)) / max(n - 1, 1) for leaf in leaves}
    state: dict[int, float] = {}
    step: dict[int, float] = {}
    for node in root.walk():  # parents first
        if node.id not in below:
            continue
        here = below[node.id]
        used = sum(leaf.id in trained for leaf in here)
        state[node.id] = math.fsum(apart[leaf.id] for leaf in here) / math.sqrt(used) / len(here) if used else 0.0
        if node is root or node.parent is None:
            continue
        step[node.id] = state[node.id] - state[node.parent.id]
        if abs(step[node.id]) < 1e-8 and node.parent.id in step:
            step[node.id] = step[node.parent.id]
    return {node: d + state[node] for node, d in step.items()}
