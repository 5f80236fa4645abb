"""TreePO's advantages: a leaf against every group of leaves it shares a prefix with (arXiv 2508.17445)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.advantage.group import Lone, check_lone, graded, mean_of, rewards_of
from ramulus.learn.batch.tree_batch import Credits


def levels(leaf: Node, depth: int | None = None) -> list[Node]:
    """The node of each level above a leaf, the root group left out; at most `depth` of them."""
    nodes = [node for node in leaf.line()[1:] for _ in range(node.levels)]
    return nodes if depth is None else nodes[:depth]


def learned(leaf: Node) -> int:
    """Policy tokens on the path of a leaf."""
    return _sampled(leaf.line())


def _sampled(line: Sequence[Node]) -> int:
    """Policy tokens of the nodes of a path."""
    return sum([len(node.tokens) for node in line if node.author is Author.POLICY])


def members(leaves: Sequence[Node]) -> dict[int, list[Node]]:
    """Node id -> the graded leaves at or below it."""
    below: dict[int, list[Node]] = {}
    for leaf in leaves:
        for node in leaf.line():
            below.setdefault(node.id, []).append(leaf)
    return below


def whitened(values: Sequence[np.ndarray], counts: Sequence[int]) -> list[np.ndarray]:
    """Values (each standing for `count` tokens, or one a token) shifted and scaled to mean 0 and sample variance 1 over all tokens."""
    if not sum(counts):
        return list(values)
    sizes = np.array([len(value) for value in values])
    weights = np.repeat(np.array(counts) / np.maximum(sizes, 1), sizes)
    return np.split(scaled(np.concatenate(values), weights, sum(counts)), np.cumsum(sizes)[:-1])


def scaled(values: np.ndarray, weights: np.ndarray, total: float) -> np.ndarray:
    """Values [N], each for `weights` [N] of `total` tokens, shifted and scaled to mean 0 and sample variance 1."""
    if not total:
        return values
    apart = values - float(values @ weights) / (total + 1e-8)
    square = float((apart**2) @ weights) / (total + 1e-8)
    return apart / math.sqrt(square * total / max(total - 1, 1) + 1e-8)


@dataclass(frozen=True)
class SubgroupMean:
    """Mean over levels of (reward - mean of the sub-group), whitened over the tokens of the batch (arXiv 2508.17445, eqs. 5-7).

    `weighting`: every level alike, or by its size. `root`: whether the whole group counts as a level. `reject`: drop sub-groups
    whose rewards are all equal. `depth`: levels looked at, None for all. Sub-groups of one leaf are dropped, as is the deepest level of
    the batch; a leaf without any level has credit 0 before whitening. `lone`: what the only leaf of a tree earns before it (the released code: its
    reward).

    Example:
        >>> from ramulus import Author, SubgroupMean, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaves = [tree.add(tree.root, [2], Author.POLICY, finish="eos", reward=r) for r in (1.0, 0.0)]
        >>> list(SubgroupMean(whiten=False)([tree])[0].leaf.values())
        [0.5, -0.5]
    """

    weighting: Literal["average", "group_size"] = "average"
    root: bool = True
    reject: bool = False
    depth: int | None = None
    whiten: bool = True
    lone: Lone = "zero"

    def __post_init__(self) -> None:
        check_lone(self.lone, "SubgroupMean")
        if self.weighting not in ("average", "group_size"):
            raise ValueError(f"SubgroupMean's weighting is 'average' or 'group_size', got {self.weighting!r}")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"SubgroupMean's depth is at least 1, or None for all levels, got {self.depth}")

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        groups = [graded(tree) for tree in forest]
        lines = [{leaf.parent: leaf.parent.line() if leaf.parent else [] for leaf in leaves} for leaves in groups]
        depths = {above: sum([node.levels for node in line[1:]]) for group in lines for above, line in group.items()}
        deepest = max([depths[leaf.parent] + leaf.levels for leaves in groups for leaf in leaves], default=0)
        deepest = min(deepest, self.depth or deepest)
        flat = np.array([value for leaves, group in zip(groups, lines, strict=True) for value in self.of_tree(leaves, group, deepest - 1)])
        if self.whiten and len(flat):
            tokens = {above: _sampled(line) for group in lines for above, line in group.items()}
            counts = [tokens[leaf.parent] + len(leaf.tokens) for leaves in groups for leaf in leaves]  # a graded leaf is the policy's
            flat = scaled(flat, np.array(counts, dtype=np.float64), sum(counts))
        answers = iter(flat.tolist())
        return [Credits({leaf.id: next(answers) for leaf in leaves}) for leaves in groups]

    def of_tree(self, leaves: Sequence[Node], lines: Mapping[Node | None, Sequence[Node]], most: int) -> list[float]:
        """The raw credit of each leaf, from the first `most` levels of the line that ends above it."""
        whole = [leaf.reward or 0.0 for leaf in leaves]
        if len(whole) > 1 and len(set(whole)) == 1:
            return [0.0] * len(whole)  # as every group's mean is that reward
        rewards: dict[int, list[float]] = {}
        for leaf, reward in zip(leaves, whole, strict=True):
            for node in lines[leaf.parent]:
                rewards.setdefault(node.id, []).append(reward)
        groups = {node: (float(len(group)), mean_of(group)) for node, group in rewards.items() if self.counts(group)}
        root = [(float(len(whole)), mean_of(whole) if len(whole) > 1 or self.lone == "zero" else 0.0)] if self.root and whole else []
        above = {node: root + of_line(line, groups, most) for node, line in lines.items()}
        return [self.of_leaf(reward, above[leaf.parent]) for leaf, reward in zip(leaves, whole, strict=True)]

    def counts(self, group: Sequence[float]) -> bool:
        """Whether a sub-group is one to compare with."""
        return len(group) >= 2 and not (self.reject and len(set(group)) == 1)

    def of_leaf(self, reward: float, parts: Sequence[tuple[float, float]]) -> float:
        """One leaf's mean over the groups that it is in, (size, mean) each."""
        if self.weighting == "average":
            return sum([reward - mean for _, mean in parts]) / len(parts) if parts else 0.0
        return sum([size * (reward - mean) for size, mean in parts]) / sum([size for size, _ in parts]) if parts else 0.0


def of_line(line: Sequence[Node], groups: Mapping[int, tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """The groups of the first `most` levels of a line, once a level."""
    parts: list[tuple[float, float]] = []
    for node in line[1:]:
        if most <= 0:
            break
        if node.id in groups:
            parts += [groups[node.id]] * min(node.levels, most)
        most -= node.levels
    return parts


@dataclass
class Label:
    """A level of a tree as TreePO's code labels it: what its path shares, its children and the leaves that end there."""

    node: Node
    children: list[Label] = field(default_factory=list)
    ends: list[Node] = field(default_factory=list)


def label_tree(tree: Tree, leaves: Sequence[Node]) -> tuple[Label, dict[int, list[Label]]]:
    """The tree of levels, and the labels on each leaf's path, the root first."""
    top = Label(tree.root)
    known: dict[tuple[int, int, int], Label] = {}  # (label above, node, how many of its levels before)
    paths = {}
    for leaf in leaves:
        path = [top]
        for rank, node in enumerate(levels(leaf)):
            key = (id(path[-1]), node.id, rank)
            if key not in known:
                known[key] = Label(node)
                path[-1].children.append(known[key])
            path.append(known[key])
        path[-1].ends.append(leaf)
        paths[leaf.id] = path
    return top, paths


def on_grid(values: Sequence[float], size: int, length: int) -> np.ndarray:
    """A value per level -> a value per token on a fixed grid of `size` tokens; 0 beyond the last level."""
    tokens = np.zeros(length)
    spread = np.repeat(np.asarray(values, dtype=np.float64), size)[:length]
    tokens[: len(spread)] = spread
    return tokens


@dataclass(frozen=True)
class SegmentValue:
    """Value of a level minus that of the level above it, on a grid of `segment` tokens, whitened: in TreePO's released code only.

    A leaf's value is its size-weighted sub-group credit, an inner level's the plain mean of its children; `eta` > 0 discounts the level above
    by eta^(levels to the end).

    Example:
        >>> from ramulus import Author, SegmentValue, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> shared = tree.add(tree.root, [2, 3], Author.POLICY)
        >>> leaves = [tree.add(shared, [token, 6], Author.POLICY, finish="eos", reward=reward) for token, reward in ((4, 1.0), (5, 0.0))]
        >>> [[round(credit, 3) for credit in tokens] for tokens in SegmentValue(2)([tree])[0].token.values()]
        [[0.0, 0.0, 1.323, 1.323], [0.0, 0.0, -1.323, -1.323]]
    """

    segment: int
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise ValueError(f"SegmentValue's segment is at least 1 token, got {self.segment}")

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        groups = [graded(tree) for tree in forest]
        lengths = [learned(leaf) for leaves in groups for leaf in leaves]
        flat: list[np.ndarray] = []
        for tree, leaves in zip(forest, groups, strict=True):
            score = self.scores(leaves)
            top, paths = label_tree(tree, leaves)
            value = _values_of(top, score) | {id(top): 0.0}
            for leaf in leaves:
                path = paths[leaf.id]
                count = len(path) - 1
                discount = [self.eta ** (count - j + 1) if self.eta > 0 else 1.0 for j in range(1, count + 1)]
                steps = [value[id(path[j])] - discount[j - 1] * value[id(path[j - 1])] for j in range(1, count + 1)]
                flat.append(on_grid(steps, self.segment, learned(leaf)))
        answers = iter(whitened(flat, lengths))
        return [Credits(token={leaf.id: next(answers).tolist() for leaf in leaves}) for leaves in groups]

    @staticmethod
    def scores(leaves: Sequence[Node]) -> dict[int, float]:
        """The size-weighted sub-group credit of each leaf, the root and the leaf itself included."""
        answer = {}
        below = members(leaves)
        for leaf in leaves:
            groups = [leaves, *(below[node.id] for node in levels(leaf))]
            total = math.fsum(len(g) * ((leaf.reward or 0.0) - mean_of(rewards_of(g))) for g in groups)
            answer[leaf.id] = total / sum(len(g) for g in groups)
        return answer


@dataclass(frozen=True)
class SegmentZScore:
    """As SegmentValue with rewards as leaf values, each level z-scored among its siblings, not whitened: in TreePO's released code only.

    A level without siblings keeps its value. `lone`: what the only leaf of a tree earns.

    Example:
        >>> from ramulus import Author, SegmentZScore, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> shared = tree.add(tree.root, [2, 3], Author.POLICY)
        >>> leaves = [tree.add(shared, [token, 6], Author.POLICY, finish="eos", reward=reward) for token, reward in ((4, 1.0), (5, 0.0))]
        >>> list(SegmentZScore(2)([tree])[0].token.values())
        [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -1.5, -1.5]]
    """

    segment: int
    lone: Lone = "zero"

    def __post_init__(self) -> None:
        check_lone(self.lone, "SegmentZScore")
        if self.segment < 1:
            raise ValueError(f"SegmentZScore's segment is at least 1 token, got {self.segment}")

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        credits = []
        for tree in forest:
            leaves = graded(tree)
            top, paths = label_tree(tree, leaves)
            single = len(leaves) == 1 and self.lone == "zero"
            rewards = {leaf.id: 0.0 if single else leaf.reward or 0.0 for leaf in leaves}
            value = scored_among_siblings(top, _values_of(top, rewards))
            token: dict[int, list[float] | None] = {}
            for leaf in leaves:
                path = paths[leaf.id]
                steps = [value[id(below)] - value[id(above)] for above, below in itertools.pairwise(path)]
                token[leaf.id] = on_grid(steps, self.segment, learned(leaf)).tolist()
            credits.append(Credits(token=token))
        return credits


def _values_of(top: Label, score: dict[int, float]) -> dict[int, float]:
    """Label -> the plain mean of what ends there and of its children's values, bottom up."""
    order = [top]
    for label in order:
        order.extend(label.children)
    value: dict[int, float] = {}
    for label in reversed(order):
        parts = [score[leaf.id] for leaf in label.ends] + [value[id(child)] for child in label.children]
        value[id(label)] = math.fsum(parts) / len(parts) if parts else 0.0
    return value


def scored_among_siblings(top: Label, value: dict[int, float]) -> dict[int, float]:
    """Values z-scored among siblings (population deviation; 0 where all are alike); only children keep theirs, the root is 0."""
    answer = {id(top): 0.0}
    order = [top]
    for label in order:
        order.extend(label.children)
        siblings = [value[id(child)] for child in label.children]
        mean = math.fsum(siblings) / len(siblings) if siblings else 0.0
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in siblings) / len(siblings)) if siblings else 0.0
        for child in label.children:
            alone = len(siblings) == 1
            answer[id(child)] = (
                value[id(child)] if alone else (value[id(child)] - mean) / deviation if deviation > 1e-8 else 0.0
            )
    return answer
