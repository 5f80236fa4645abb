"""What a forest cost: every token counted once by its source and once by its fate; and `account`, the totals of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from ramulus.core.tree import Author, Tree
from ramulus.look.cost.account import account as account  # part of what this module offers

TRAINED = {Author.POLICY: 1, Author.EXPERT: 2}
IDLE = {Author.POLICY: 4, Author.EXPERT: 8}
ALIVE = 16
Fate = Mapping[int, int]
"""Leaf id -> what an update did with its path: the flags TRAINED and IDLE of every author whose tokens on it a term learns from."""


@dataclass(frozen=True)
class Cost:
    """Token counts of some trees; costs add up. The last four are known where an update has said what it did with each leaf."""

    trees: int = 0
    paths: int = 0  # leaves that the policy wrote
    sampled: int = 0  # unique tokens that the policy sampled and a tree holds
    trajectory: int = 0  # response tokens of all policy paths, shared ones counted once a path
    pruned: int = 0  # sampled tokens that lie under pruned leaves only
    expert: int = 0  # tokens of demonstrations
    trained: int = 0  # sampled tokens with a leaf below that the update went through
    idle: int = 0  # of the others, those with a leaf below that was left out since it had no credit
    excluded: int = 0  # of the others, those with a leaf below that was not pruned: no term learns from it
    trained_expert: int = 0  # tokens of demonstrations that the update went through

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def reused(self) -> int:
        """Tokens that independent paths would have had to sample once more."""
        return self.trajectory - self.sampled

    @property
    def reuse_ratio(self) -> float:
        """Trajectory tokens per sampled token: 1 where nothing is shared, 0 where nothing was sampled."""
        return self.trajectory / self.sampled if self.sampled else 0.0


def cost(trees: Iterable[Tree]) -> Cost:
    """What the trees cost; sharing of the prompt is not counted as reuse."""
    return costs((tree, None) for tree in trees)


def costs(trees: Iterable[tuple[Tree, Fate | None]]) -> Cost:
    """What these trees cost together, each with the fate of its leaves where it is known; then sampled = trained + idle + excluded + pruned."""
    count = dict.fromkeys([field.name for field in fields(Cost)], 0)
    for tree, fate in trees:
        add_tree(count, tree, fate)
    return Cost(**count)


def add_tree(count: dict[str, int], tree: Tree, fate: Fate | None) -> None:
    """Add one tree to the fields of a Cost: one pass from the leaves up."""
    flags = fate or {}
    nodes, up, _ = tree.preorder()
    below = [0] * (len(nodes) + 1)  # policy leaves at or below a node; the last one is above the root
    marks = [0] * (len(nodes) + 1)  # flags of all leaves there
    sizes: dict[int, int] = {}  # sampled tokens by the flags of the leaves below
    trajectory = 0
    for place in range(len(nodes) - 1, -1, -1):
        node, above = nodes[place], up[place]
        size, author = len(node.tokens), node.author
        if node.children:
            paths, mark = below[place], marks[place]
        elif above < 0:
            paths, mark = 0, 0
        else:
            paths = 1 if author is Author.POLICY else 0
            mark = flags.get(node.id, 0) | (ALIVE if paths and node.finish != "pruned" else 0)
        below[above] += paths
        marks[above] |= mark
        if author is Author.POLICY:
            trajectory += size * (paths or 1)
            sizes[mark] = sizes.get(mark, 0) + size
        elif author is Author.EXPERT:
            count["expert"] += size
            count["trained_expert"] += size if mark & TRAINED[Author.EXPERT] else 0
    for mark, size in sizes.items():
        outcome = became(mark)
        if fate is not None or outcome != "excluded":  # else nobody has asked an update
            count[outcome] += size
    for name, number in (("trees", 1), ("paths", below[-1]), ("sampled", sum(sizes.values())), ("trajectory", trajectory)):
        count[name] += number


def became(mark: int) -> str:
    """The fate of a sampled token by the flags of the leaves below it: the best of theirs."""
    if mark & TRAINED[Author.POLICY]:
        return "trained"
    if mark & IDLE[Author.POLICY]:
        return "idle"
    return "excluded" if mark & ALIVE else "pruned"


def fates(cost: Cost, dropped: Cost) -> dict[str, int]:
    """What became of a step's tokens: `cost` of the trees that were learned from, with their fates, and of those that were dropped.

    sampled = trained_policy + idle_tokens + excluded + pruned + dropped_tokens; pruned ones of dropped trees count as pruned.
    """
    return {
        "trained_policy": cost.trained,
        "idle_tokens": cost.idle,
        "excluded": cost.excluded,
        "dropped_tokens": dropped.sampled - dropped.pruned,
        "trained_expert": cost.trained_expert,
    }


def decoding(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, float]:
    """What an engine did between two readings of its counters: tokens sampled, prompt and prefix tokens computed and reused, rows a decode step."""
    done = {name: after[name] - before[name] for name in after}
    rows = done["row_steps"] / done["steps"] if done["steps"] else 0.0
    return {
        "engine_sampled": done["sampled"],
        "prefilled": done["prefilled"],
        "prefix_reused": done["reused"],
        "prefilled_again": done["prefilled_again"],
        "rows": rows,
    }
