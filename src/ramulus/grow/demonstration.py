"""Demonstrations as something to grow from, and as something to doubt: partial ones as prefixes, and a check by the verifier."""

from __future__ import annotations

from dataclasses import dataclass

from ramulus.core.recipe_part import needed, with_defaults
from ramulus.core.tree import Tree, correct, demonstrations
from ramulus.grow.branching import Branching, BranchingOptions, Bud, dice
from ramulus.grow.grading import Rewards, grade
from ramulus.grow.stop import Decode


async def verify(tree: Tree, rewards: Rewards, decode: Decode) -> Tree:
    """Grade the demonstrations as if the policy had written them; one that is not correct keeps its verdict and loses its reward.

    Without a reward it is in no mean and no gradient, begins no path, and a gate treats the question as one without a demonstration.
    """
    leaves = demonstrations(tree)
    await grade(tree, rewards, decode, leaves=leaves)
    for leaf in leaves:
        leaf.reward = leaf.reward if correct(leaf) else None
    return tree


@dataclass(frozen=True)
class Hinted:
    """What `branching` grows, and in the first round `n` more paths that go on from the beginning of a demonstration.

    The beginning is a share of the demonstration drawn evenly from [low, high] (as in Prefix-RFT, arXiv 2507.01679), at least one token and
    never all; its first segment is as long as those of `branching`. Such a path's own tokens are the policy's; gates do not count it as solved
    alone. A tree without a demonstration gets no hint.

    Example:
        >>> from ramulus import Author, Hinted, Star, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> shown = tree.add(tree.root, [2, 3, 4, 5], Author.EXPERT, finish="eos", reward=1.0)
        >>> [bud.why for bud in Hinted(Star(2), n=1)(tree)]
        ['star', 'star', 'hint']
    """

    branching: Branching
    n: int = 1
    low: float = 0.1
    high: float = 0.9

    def __post_init__(self) -> None:
        if self.n < 0 or not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"Hinted needs n >= 0 and 0 <= low <= high <= 1, got n={self.n}, low={self.low}, high={self.high}"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """The signals that the rule inside reads."""
        return needed(self.branching)

    @property
    def rounds(self) -> int | None:
        """The rounds of the rule inside; None without a limit."""
        return self.branching.rounds

    def most_paths(self, more: int = 0) -> int | None:
        """Paths of a tree at most, as the rule inside knows it, with the `n` hints and `more` of a rule around this one."""
        return with_defaults(self.branching, BranchingOptions).most_paths(self.n + more)

    def __call__(self, tree: Tree) -> list[Bud]:
        buds = list(self.branching(tree))
        shown = [leaf for leaf in demonstrations(tree) if len(leaf.tokens) > 1]
        if tree.rounds > 0 or not buds or not shown:
            return buds
        random = dice(tree, "hint")
        for i in range(self.n):
            leaf = shown[i % len(shown)]
            length = round(random.uniform(self.low, self.high) * len(leaf.tokens))
            drop = len(leaf.tokens) - min(max(length, 1), len(leaf.tokens) - 1)
            buds.append(Bud(leaf, drop, buds[0].max_tokens, "hint"))
        return buds
