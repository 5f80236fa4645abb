"""Generalised advantage estimation (arXiv 1506.02438): credit from a learned value of every state, and what that value should have been."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.advantage.group import graded
from ramulus.learn.advantage.subgroup import whitened
from ramulus.learn.batch.layout import joined
from ramulus.learn.batch.tree_batch import Credits


@dataclass(frozen=True)
class GAE:
    """PPO's advantages of every token of every path (eq. 16), from `signals["value"]`: the value of the state before each token.

    The reward comes with the last token; a path's targets are its advantages plus values, before `whiten` shifts and scales the advantages
    over all learned tokens. In a tree each path has its own; a shared token learns from all below it.

    Example:
        >>> from ramulus import GAE, Author, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2, 3], Author.POLICY, finish="eos", reward=1.0, signals={"value": [0.25, 0.5]})
        >>> [credit] = GAE(lam=1.0, whiten=False)([tree])
        >>> credit.token[leaf.id], credit.target[leaf.id]
        ([0.75, 0.5], [1.0, 1.0])
    """

    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True

    needs: ClassVar[tuple[str, ...]] = ("value",)

    def __post_init__(self) -> None:
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError(f"GAE's gamma and lam are in [0, 1], got {self.gamma} and {self.lam}")

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        paths = [{leaf: _values_of(leaf) for leaf in graded(tree)} for tree in forest]
        raw = [self.of_path(leaf, values) for tree in paths for leaf, values in tree.items()]
        credit = iter(whitened(raw, [len(values) for values in raw]) if self.whiten else raw)
        plain = iter(raw)
        return [
            Credits(
                token={leaf.id: next(credit).tolist() for leaf in tree},
                target={leaf.id: (next(plain) + values).tolist() for leaf, values in tree.items()},
            )
            for tree in paths
        ]

    def of_path(self, leaf: Node, values: np.ndarray) -> np.ndarray:
        """The advantage of each learned token, [learned]."""
        if not len(values):
            return values
        answer = self.gamma * np.append(values[1:], 0.0) - values
        answer[-1] += leaf.reward or 0.0
        window = 1  # answer[t] holds the sum over the next `window` errors, each discounted
        while window < len(answer):
            answer = np.append(answer[:-window] + (self.gamma * self.lam) ** window * answer[window:], answer[-window:])
            window *= 2
        return answer


def _values_of(leaf: Node) -> np.ndarray:
    """The values of a path's policy tokens, [learned]; ValueError where a node has none."""
    nodes = [node for node in leaf.line() if node.author is Author.POLICY and node.tokens]
    missing = [node.id for node in nodes if "value" not in node.signals]
    if missing:
        raise ValueError(
            f"node {missing[0]} has no values: score the forest with an ActorCritic, {{'value'}}, before crediting"
        )
    return joined([node.signals["value"] for node in nodes])
