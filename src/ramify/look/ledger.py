"""What a forest cost: tokens sampled, reused and pruned, counted from the trees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from ramify.core.tree import Author, Tree


@dataclass(frozen=True)
class Cost:
    """Token counts of some trees; costs add up."""

    trees: int = 0
    paths: int = 0  # leaves that the policy wrote
    sampled: int = 0  # unique tokens that the policy sampled and a tree holds
    trajectory: int = 0  # response tokens of all policy paths, shared ones counted once a path
    pruned: int = 0  # sampled tokens that lie under pruned leaves only
    expert: int = 0  # tokens of demonstrations

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
    return sum((tree_cost(tree) for tree in trees), Cost())


def tree_cost(tree: Tree) -> Cost:
    """What one tree cost: one pass from the leaves up."""
    nodes = list(tree.walk())
    paths: dict[int, int] = {}  # policy leaves at or below a node
    alive: dict[int, int] = {}  # those of them that were not pruned
    sampled = trajectory = pruned = expert = 0
    for node in reversed(nodes):
        if not node.children and node.parent is not None and node.author is Author.POLICY:
            paths[node.id] = 1
            alive[node.id] = int(node.finish != "pruned")
        else:
            paths[node.id] = sum(paths[child.id] for child in node.children)
            alive[node.id] = sum(alive[child.id] for child in node.children)
        if node.author is Author.POLICY:
            sampled += len(node.tokens)
            trajectory += len(node.tokens) * max(paths[node.id], 1)
            pruned += len(node.tokens) if not alive[node.id] else 0
        elif node.author is Author.EXPERT:
            expert += len(node.tokens)
    return Cost(1, paths[tree.root.id], sampled, trajectory, pruned, expert)


def decoding(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, float]:
    """What an engine did between two readings of its counters: prompt and prefix tokens computed and reused, rows a decode step."""
    done = {name: after[name] - before[name] for name in after}
    rows = done["row_steps"] / done["steps"] if done["steps"] else 0.0
    return {
        "prefilled": done["prefilled"],
        "prefix_reused": done["reused"],
        "prefilled_again": done["prefilled_again"],
        "rows": rows,
    }
