"""TreePO's sampler: fixed-length segments, a branching budget, fallback to finished paths (arXiv 2508.17445)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ramulus.core.recipe_part import needed, with_defaults
from ramulus.core.tree import Author, Node, Tree, origin
from ramulus.grow.allocation import Allocation, Even, First, MoreFirst
from ramulus.grow.branching import Bud, depth, dice, own_depth, own_length, paths
from ramulus.grow.fallback import Answered, Cut, CutOptions, RandomCut, Seeds


@dataclass(frozen=True)
class Segments:
    """Up to `width` paths of at most `depth` segments of `length` tokens, every living path branching `branching`-fold a round.

    A round with a living and f just finished paths, F finished in all, grows max(a, min(width - F, b f + b a)) branches:
    the budget of finished siblings goes to the survivors, and F + branches never exceeds `width`. `allocation` shares them
    out. When nothing lives and F < width, `seeds` orders the finished paths and `fallback` cuts each of them for up to b
    new paths, until `width` paths have ended; `fallback=None` ends the tree instead. After a cut at c tokens a path has
    ceil(c / length) levels. Pruned paths use up width, except for the first `rerolls` of a tree, which are sampled anew.

    `tokens` > 0 sizes the tree by response tokens, every shared token counted once: the width aimed at is F + (tokens -
    those of finished paths) / (tokens a living path added so far + length), or per finished path in fallback, between
    `least` and `width`, estimated anew before each round. An estimate: living paths may go on beyond their next segment.

    Example:
        >>> from ramulus import Segments, Task, Tree
        >>> rule = Segments(width=4, depth=3, length=8)
        >>> [bud.max_tokens for bud in rule(Tree.plant(Task("t", (1,), "t")))]
        [8, 8]
    """

    width: int
    depth: int
    length: int
    branching: int = 2
    first: int | First | None = None  # paths of the first round; None takes `branching`, MoreFirst() diverges more
    allocation: Allocation = field(default_factory=Even)
    seeds: Seeds = field(default_factory=Answered)
    fallback: Cut | None = field(default_factory=RandomCut)
    tokens: int = 0
    least: int = 1
    rerolls: int = 0

    rounds: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for name in ("width", "depth", "length", "branching"):
            if getattr(self, name) < 1:
                raise ValueError(f"Segments needs {name} of at least 1, got {getattr(self, name)}")
        if self.width < self.branching:
            raise ValueError(
                f"Segments has width {self.width} below its branching factor {self.branching}: "
                f"raise width to {self.branching} or more, or lower branching"
            )
        if isinstance(self.first, int) and not 1 <= self.first <= self.width:
            raise ValueError(f"the first round of Segments has 1 to width={self.width} paths, got first={self.first}")
        if isinstance(self.first, MoreFirst) and self.first.high < (self.first.low or self.branching):
            raise ValueError(f"{self.first} is below the branching factor {self.branching}: raise high, or set low")
        if names := needed(self.first):
            raise ValueError(
                f"{self.first} needs the signal {names[0]!r}, but the first round is chosen before anything is sampled: leave needs out of the class"
            )
        if self.tokens < 0 or self.rerolls < 0:
            raise ValueError(f"Segments needs tokens and rerolls >= 0 (0: none), got {self.tokens} and {self.rerolls}")
        if not 1 <= self.least <= self.width:
            raise ValueError(f"Segments needs 1 <= least <= width={self.width}, got least={self.least}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The signals that the parts inside read."""
        return needed(self.allocation, self.seeds, self.fallback)

    def __call__(self, tree: Tree) -> list[Bud]:
        known = paths(tree)
        if not known:
            count = min(max(self.first_round(tree), 1), self.width)
            return [Bud(tree.root, 0, self.length, "first") for _ in range(count)]
        living = [leaf for leaf in known if leaf.finish is None and own_depth(leaf) < self.depth]
        alive = {leaf.id for leaf in living}
        ended = [leaf for leaf in known if leaf.id not in alive]
        if living:
            return self.branch(tree, living, ended)
        return self.fall_back(tree, ended) if self.fallback is not None else []

    def most_paths(self, more: int = 0) -> int:
        """Paths of a tree at most, rerolls among them; `more` of a rule around this one may be above `width` with those of the first round."""
        first = self.width if callable(self.first) else self.first or self.branching
        return max(self.width + self.rerolls, first + more)

    def first_round(self, tree: Tree) -> int:
        """Paths of the first round."""
        if self.first is None or isinstance(self.first, int):
            return self.first or self.branching
        return self.first(tree, self.branching, self.width, self.length)

    def branch(self, tree: Tree, living: list[Node], ended: list[Node]) -> list[Bud]:
        """Share this round's branches out among the living paths."""
        finished = self.count(ended)
        just = sum(leaf.id >= tree.fresh for leaf in ended)
        room = max(self.target(living, ended) - finished, 0)
        total = max(len(living), min(room, self.branching * (just + len(living))))
        counts = self.allocation(living, total, self.length, tree.step)
        buds = [[Bud(leaf, 0, self.length, "branch")] * count for leaf, count in zip(living, counts, strict=True)]
        return [bud for group in buds for bud in group]

    def fall_back(self, tree: Tree, ended: list[Node]) -> list[Bud]:
        """Grow again from finished paths, up to `branching` from each; from the prompt where no seed is left."""
        assert self.fallback is not None
        rest = self.target([], ended) - self.count(ended)
        chance = dice(tree, "fallback")
        order: Sequence[Node] = self.seeds([leaf for leaf in ended if leaf.finish != "pruned"], chance, self.length)
        if with_defaults(self.fallback, CutOptions).one:
            order = order[:1]
        buds: list[Bud] = []
        for leaf in order or [tree.root]:
            if rest <= 0:
                break
            count = min(self.branching, rest)
            buds += [self.bud(leaf, self.cut(leaf, chance))] * count
            rest -= count
        return buds

    def cut(self, leaf: Node, chance: random.Random) -> int:
        """How many of a seed's own tokens are kept, never so many that no level would be left."""
        assert self.fallback is not None
        whole = own_length(leaf)
        if whole == 0:
            return 0
        at = self.fallback(leaf, chance, self.length)
        if not 0 <= at < whole:
            raise ValueError(
                f"{self.fallback} cut a path of {whole} tokens at {at}: a cut keeps 0 to {whole - 1} of them"
            )
        return at if math.ceil(at / self.length) < self.depth else self.length * (self.depth - 1)

    def bud(self, leaf: Node, at: int) -> Bud:
        """The bud after the first `at` tokens of a path's own part."""
        begin = origin(leaf)
        if at == 0:
            return Bud(begin, 0, self.length, "restart")
        return Bud(leaf, own_length(leaf) - at, self.length, "fallback", levels=depth(begin) + math.ceil(at / self.length))

    def count(self, ended: list[Node]) -> int:
        """Ended paths that use up width."""
        return len(ended) - min(sum(leaf.finish == "pruned" for leaf in ended), self.rerolls)

    def target(self, living: list[Node], ended: list[Node]) -> int:
        """The width aimed at: `width`, or in token mode what the tokens left are likely to pay for."""
        if not self.tokens:
            return self.width
        spent, young = sizes(ended), sizes(living)
        used = sum(spent.values())
        if living:
            each = sum(size for node, size in young.items() if node not in spent) / len(living) + self.length
        else:
            each = max(used / len(ended), 1.0)
        more = math.floor((self.tokens - used) / each)
        return min(max(self.count(ended) + more, self.least), self.width)


def sizes(leaves: Sequence[Node]) -> dict[int, int]:
    """Node id -> tokens, of every response node on the paths of these leaves, once each."""
    return {node.id: len(node.tokens) for leaf in leaves for node in leaf.line() if node.author is not Author.PROMPT}
