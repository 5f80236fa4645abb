"""Early pruning of low-value paths, promised by TreePO's abstract (arXiv 2508.17445) and absent from its code: estimates, and a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from ramulus.core.recipe_part import needed
from ramulus.core.tree import Author, Node, Tree
from ramulus.grow.allocation import logprobs
from ramulus.grow.branching import depth, paths

Worth = Callable[[Tree, Sequence[Node]], list[float | None]]
"""(tree, living paths) -> an estimate of each path's value; None where nothing can be told. Higher is better.

It may say its `needs`, as any RecipePart."""


@dataclass(frozen=True)
class MeanLogprob:
    """The mean log-prob (nats) of a path's last `tokens` tokens as sampled; 0 takes the whole path.

    Example:
        >>> from ramulus import Author, MeanLogprob, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2, 3], Author.POLICY, logprobs=[-0.5, -1.5])
        >>> MeanLogprob()(tree, [leaf]), MeanLogprob(tokens=1)(tree, [leaf])
        ([-1.0], [-1.5])
    """

    tokens: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"MeanLogprob's tokens must be >= 0 (0: the whole path), got {self.tokens}")

    def __call__(self, tree: Tree, living: Sequence[Node]) -> list[float | None]:
        columns = [logprobs(leaf)[-self.tokens :] for leaf in living]
        return [math.fsum(values) / len(values) if values else None for values in columns]


@dataclass(frozen=True)
class Agreement:
    """The share of the tree's other paths that reached the same partial answer.

    `partial` gives the partial answers in a response's tokens, in order (intermediate results, say). A path's last one is compared
    with what all other paths, ended and pruned ones too, have at the same place; below `least` such paths nothing can be told. Paths
    that branched after the answer share it and agree with each other: a crowd of late branches is sure of itself.

    Example:
        >>> from ramulus import Agreement, Author, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaves = [tree.add(tree.root, [token], Author.POLICY) for token in (2, 2, 3)]
        >>> Agreement(partial=lambda tokens: [str(token) for token in tokens])(tree, leaves)
        [0.5, 0.5, 0.0]
    """

    partial: Callable[[list[int]], Sequence[str]]
    least: int = 2

    def __post_init__(self) -> None:
        if self.least < 1:
            raise ValueError(f"Agreement needs at least 1 other path to compare with, got least={self.least}")

    def __call__(self, tree: Tree, living: Sequence[Node]) -> list[float | None]:
        partials = {leaf.id: self.partial(leaf.response()) for leaf in paths(tree)}
        return [self.share(partials[leaf.id], [partials[other] for other in partials if other != leaf.id]) for leaf in living]

    def share(self, mine: Sequence[str], others: Sequence[Sequence[str]]) -> float | None:
        """The share of the others that say the same at the place of my last partial answer."""
        at = len(mine) - 1
        votes = [theirs[at] == mine[at] for theirs in others if 0 <= at < len(theirs)]
        return sum(votes) / len(votes) if len(votes) >= self.least else None


@dataclass(frozen=True)
class Estimated:
    """A signal that something else wrote along the path, at the path's last token.

    A run with a value head (`mix.value`, with an advantage such as GAE) supplies "value" after every round, for one more forward pass over
    the trees of the round: the value of the state before the token.

    Example:
        >>> from ramulus import Author, Estimated, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2, 3], Author.POLICY, signals={"value": [0.25, 0.75]})
        >>> Estimated()(tree, [leaf])
        [0.75]
    """

    signal: str = "value"

    @property
    def needs(self) -> tuple[str, ...]:
        """The signal, for who supplies it."""
        return (self.signal,)

    def __call__(self, tree: Tree, living: Sequence[Node]) -> list[float | None]:
        return [self.last(leaf) for leaf in living]

    def last(self, leaf: Node) -> float | None:
        """The signal at the last token that carries it."""
        for node in reversed(leaf.line()):
            if node.author is Author.POLICY and (values := node.column(self.signal)):
                return values[-1]
        return None


@dataclass(frozen=True)
class LowValue:
    """Prunes living paths whose estimated value lies below `below`, the worst first, within a budget.

    At most `budget` paths of a tree are ever pruned by any rule, at least `keep` stay alive in a round, and no path ends before it has
    `after` levels. `below` is in the units of `worth`; None compares within the tree: a path must lie `margin` (same units) under the
    median of the living ones. What is saved is spent anew by Segments(rerolls=budget): pruned paths then use up no width, so the
    survivors branch more. A pruned path earns no reward and is in no mean and no gradient: what training then sees is biased towards
    paths that look good early, which is why no recipe prunes unless asked.

    Example:
        >>> from ramulus import Author, LowValue, MeanLogprob, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaves = [tree.add(tree.root, [2], Author.POLICY, logprobs=[logp]) for logp in (-0.1, -0.2, -3.0)]
        >>> LowValue(MeanLogprob(), budget=1, margin=1.0)(tree) == [leaves[2]]
        True
    """

    worth: Worth
    budget: int
    below: float | None = None
    margin: float = 0.0
    keep: int = 1
    after: int = 1

    def __post_init__(self) -> None:
        if self.budget < 1 or self.keep < 1 or self.after < 1:
            raise ValueError(
                f"LowValue needs budget, keep and after of at least 1, got {self.budget}, {self.keep} and {self.after}"
            )
        if self.margin < 0 or not math.isfinite(self.margin):
            raise ValueError(f"LowValue's margin must be a number of at least 0, got {self.margin}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The signals that the estimate reads."""
        return needed(self.worth)

    def __call__(self, tree: Tree) -> list[Node]:
        known = paths(tree)
        living = [leaf for leaf in known if leaf.finish is None and leaf.id >= tree.fresh]
        left = min(self.budget - sum(leaf.finish == "pruned" for leaf in known), len(living) - self.keep)
        if left < 1:
            return []
        rated = [
            (value, leaf.id, leaf)
            for leaf, value in zip(living, self.worth(tree, living), strict=True)
            if value is not None
        ]
        if not rated:
            return []
        edge = self.below if self.below is not None else median(value for value, _, _ in rated) - self.margin
        worst = sorted((value, serial) for value, serial, leaf in rated if value < edge and depth(leaf) >= self.after)[
            :left
        ]
        chosen = {serial for _, serial in worst}
        return [leaf for leaf in living if leaf.id in chosen]
