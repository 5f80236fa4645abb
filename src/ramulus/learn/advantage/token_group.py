"""HAPO's group average: a group's mean and deviation over its tokens instead of its paths (arXiv 2509.16591, eq. 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ramulus.core.tree import Node, Tree
from ramulus.learn.advantage.group import Lone, check_lone, graded, mean_of, rewards_of
from ramulus.learn.advantage.subgroup import learned
from ramulus.learn.batch.tree_batch import Credits


@dataclass(frozen=True)
class TokenGroupMean:
    """Each reward minus the group's mean over tokens, by the deviation over tokens: long paths weigh more (arXiv 2509.16591, eq. 9).

    The token mean is over flattened paths: a token that several leaves share counts once for each of them. So credit sums to 0 over the flattened
    tokens of a tree. `fallback`: where a credit of the group reaches it, the whole group takes GRPO's over paths, as in the released code (5.0
    there). `lone`: what a path earns that is alone in its group (there its reward, where padding made the group fall back). `width`: tokens of
    the padded rows of that code, whose padding counts as reward 0 in this test alone; 0 leaves it out.

    Example:
        >>> from ramulus import Author, Task, TokenGroupMean, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaves = [tree.add(tree.root, [2], Author.POLICY, finish="eos", reward=r) for r in (1.0, 0.0)]
        >>> list(TokenGroupMean(std=False)([tree])[0].leaf.values())
        [0.5, -0.5]
    """

    std: bool = True
    eps: float = 1e-6
    fallback: float | None = None
    width: int = 0
    lone: Lone = "zero"

    def __post_init__(self) -> None:
        check_lone(self.lone, "TokenGroupMean")
        if not self.eps > 0 or (self.fallback is not None and not self.fallback > 0) or self.width < 0:
            raise ValueError(
                f"TokenGroupMean needs eps above 0, fallback above 0 or None, width >= 0, got {self.eps}, {self.fallback} and {self.width}"
            )

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [self.credit(graded(tree)) for tree in forest]

    def credit(self, leaves: Sequence[Node]) -> Credits:
        """The credits of one group."""
        rewards, lengths = rewards_of(leaves), [learned(leaf) for leaf in leaves]
        if not sum(lengths):
            return Credits(dict.fromkeys((leaf.id for leaf in leaves), 0.0))
        alike = len({r for r, n in zip(rewards, lengths, strict=True) if n}) == 1
        total = math.fsum(r * n for r, n in zip(rewards, lengths, strict=True))
        mean = next(r for r, n in zip(rewards, lengths, strict=True) if n) if alike else total / sum(lengths)
        scale = 1.0
        if self.std:
            square = math.fsum(n * (r - mean) ** 2 for r, n in zip(rewards, lengths, strict=True)) / sum(lengths)
            scale = 1 / (math.sqrt(square) + self.eps)
        values = [(reward - mean) * scale for reward in rewards]
        seen = [value for value, n in zip(values, lengths, strict=True) if n]
        seen += [-mean * scale] if self.width > min(lengths) else []
        if len(leaves) < 2 or (self.fallback is not None and max(map(abs, seen)) >= self.fallback):
            values = self.over_paths(rewards)
        return Credits({leaf.id: value for leaf, value in zip(leaves, values, strict=True)})

    def over_paths(self, rewards: Sequence[float]) -> list[float]:
        """GRPO's credit of each path: (reward - mean) / (standard deviation + eps), and for a lone path by `lone`."""
        if len(rewards) < 2:
            return [reward / (1 + self.eps) if self.lone == "reward" else 0.0 for reward in rewards]
        mean = mean_of(rewards)
        deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
        return [(reward - mean) / (deviation + self.eps) for reward in rewards]
