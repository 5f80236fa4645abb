"""Which paths are not worth going on with; asked after every round of growth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ramulus.core.tree import Node, Tree
from ramulus.grow.branching import length, paths
from ramulus.grow.stop import Decode, repeats

Pruning = Callable[[Tree], list[Node]]
"""A pure function of the tree -> nodes; every policy leaf at or below them ends as `pruned` and gets no reward.

It may say its `needs`, as any RecipePart."""


@dataclass(frozen=True)
class Repetition:
    """Paths that still live and whose last segment says the same thing over and over.

    Some run of `width` occurs at least `times` times: of characters where `decode` is given (TreePO's test has 32 and 8),
    of tokens where it is not. To stop such paths but grade them, use Stop(repetition=Repeats()).
    """

    width: int = 16
    times: int = 8
    decode: Decode | None = None

    def __post_init__(self) -> None:
        if self.width < 1 or self.times < 2:
            raise ValueError(f"Repetition needs width >= 1 and times >= 2, got {self.width} and {self.times}")

    def __call__(self, tree: Tree) -> list[Node]:
        young = [leaf for leaf in paths(tree) if leaf.id >= tree.fresh and leaf.finish is None]
        return [leaf for leaf in young if self.repetitive(leaf.tokens)]

    def repetitive(self, tokens: Iterable[int]) -> bool:
        """The test, on the tokens of one segment."""
        return repeats(self.decode(list(tokens)) if self.decode else tuple(tokens), self.width, self.times)


@dataclass(frozen=True)
class Length:
    """Ended paths shorter than `shortest` response tokens, and any path longer than `longest`; 0 sets no limit."""

    shortest: int = 0
    longest: int = 0

    def __post_init__(self) -> None:
        if self.shortest < 0 or self.longest < 0 or (self.longest and self.longest < self.shortest):
            raise ValueError(f"Length needs 0 <= shortest <= longest (0: none), got {self.shortest} and {self.longest}")

    def __call__(self, tree: Tree) -> list[Node]:
        return [leaf for leaf in paths(tree) if leaf.id >= tree.fresh and self.outside(leaf)]

    def outside(self, leaf: Node) -> bool:
        """Whether the length of a path is out of bounds."""
        size = length(leaf)
        return (leaf.finish is not None and size < self.shortest) or (self.longest > 0 and size > self.longest)
