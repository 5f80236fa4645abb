"""Where a tree grows next: buds, the rules that choose them, and the plain star of GRPO."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ramulus.core.recipe_part import with_defaults
from ramulus.core.tree import Author, Node, Tree


@dataclass(frozen=True)
class Bud:
    """One place to grow: `drop` tokens before the end of `node`.

    `levels`: how many levels (segments, as TreePO counts them) the path has at the bud; None leaves that to Tree.cut.

    Example:
        >>> from ramulus import Bud, Task, Tree
        >>> Bud(Tree.plant(Task("t", (1,), "t")).root, why="root").drop
        0
    """

    node: Node
    drop: int = 0
    max_tokens: int | None = None  # None takes those of the Sampling
    why: str = ""  # for the viewer
    levels: int | None = None

    def __post_init__(self) -> None:
        if self.drop < 0:
            raise ValueError(f"a bud drops 0 or more tokens of its node, got {self.drop}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"a bud's max_tokens must be at least 1 (None: the sampling's), got {self.max_tokens}")


class Branching(Protocol):
    """One round of growth, a pure function of the tree; [] means that the tree is finished.

    Example:
        >>> from ramulus import Branching, Star, Task, Tree
        >>> rule: Branching = Star(4)
        >>> len(rule(Tree.plant(Task("t", (1,), "t")))), rule.needs
        (4, ())
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the node signals it reads; `run` supplies them between rounds, see run/signals.py."""
        ...

    @property
    def rounds(self) -> int | None:
        """After how many rounds it reads them; None reads them after every round."""
        ...

    def __call__(self, tree: Tree) -> list[Bud]: ...


class BranchingOptions(Protocol):
    """What a branching rule may say of itself beside that.

    Example:
        >>> from ramulus import BranchingOptions, Star
        >>> rule: BranchingOptions = Star(4)
        >>> rule.most_paths(), rule.most_paths(more=2)
        (4, 6)
    """

    def most_paths(self, more: int = 0) -> int | None:
        """Paths of a tree at most, with `more` that a rule around this one begins in the first round; None where nobody knows.

        One around another that says nothing grows as many as that one.
        """
        inner = wrapped(self)
        return None if inner is None else with_defaults(inner, BranchingOptions).most_paths(more)


def wrapped(rule: Any) -> Branching | None:
    """The rule that another one is around, which holds it as `branching`; None for one that stands alone."""
    inner: Any = getattr(rule, "branching", None)
    return inner if callable(inner) else None  # a number is how often something branches


def innermost(rule: Branching) -> Branching:
    """The rule that stands alone in those around it."""
    while (inner := wrapped(rule)) is not None:
        rule = inner
    return rule


@dataclass(frozen=True)
class Star:
    """`n` independent paths from the root in one round: a GRPO group (arXiv 2402.03300); Star(0) samples nothing.

    Example:
        >>> from ramulus import Star, Task, Tree
        >>> len(Star(8)(Tree.plant(Task("t", (1,), "t"))))
        8
    """

    n: int

    needs: ClassVar[tuple[str, ...]] = ()
    rounds: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(f"Star(n) grows n paths, got n={self.n}: use Star(8) for a group of 8")

    def __call__(self, tree: Tree) -> list[Bud]:
        return [Bud(tree.root, why="star") for _ in range(self.n)] if tree.rounds == 0 else []

    def most_paths(self, more: int = 0) -> int:
        """Paths of a tree, with `more` of a rule around this one."""
        return self.n + more


def paths(tree: Tree) -> list[Node]:
    """The leaves that the policy wrote, in the order in which their buds were made; demonstrations are left out."""
    return sorted((leaf for leaf in tree.leaves() if leaf.author is Author.POLICY), key=lambda leaf: leaf.id)


def depth(node: Node) -> int:
    """Levels (segments) from the root to the end of this node."""
    return sum(above.levels for above in node.line())


def length(node: Node) -> int:
    """Response tokens from the prompt to the end of this node."""
    return sum([len(above.tokens) for above in node.line() if above.author is not Author.PROMPT])


def own_length(leaf: Node) -> int:
    """Tokens of the policy's own part of a path: from the end of the prompt, or of the part of a demonstration that it goes on from."""
    return sum([len(node.tokens) for node in own_line(leaf)])


def own_depth(leaf: Node) -> int:
    """Levels of the policy's own part of a path."""
    return sum([node.levels for node in own_line(leaf)])


def own_line(leaf: Node) -> list[Node]:
    """The nodes of that part, from its end to its beginning."""
    nodes, node = [], leaf
    while node.parent is not None and node.author is not Author.EXPERT:
        nodes.append(node)
        node = node.parent
    return nodes


def path_lengths(leaves: Sequence[Node]) -> list[int]:
    """The `length` of each of many paths; what they share is added up once."""
    lengths: dict[Node | None, int] = {None: 0}  # down to a node
    for leaf in leaves:
        line, node = [], leaf.parent
        while node is not None and node not in lengths:
            line.append(node)
            node = node.parent
        total = lengths[node]
        for above in reversed(line):
            lengths[above] = total = total + (len(above.tokens) if above.author is not Author.PROMPT else 0)
    return [lengths[leaf.parent] + len(leaf.tokens) for leaf in leaves]


def dice(tree: Tree, purpose: str) -> random.Random:
    """Random numbers that depend on the tree, its round and a purpose, and on nothing else."""
    return random.Random(f"{tree.seed}/{tree.task.id}/{tree.visit}/{tree.rounds}/{purpose}")
