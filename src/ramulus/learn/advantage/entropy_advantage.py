"""Advantages made over token by token, before they are folded down the tree: the entropy advantage, Clip-Cov and the choice of KL-Cov.

What is nonlinear in an advantage beyond its sign must act on each path's own value, as the paths that share a token may disagree. All use
what was recorded when the tokens were sampled, or scored when the step began, once for the whole step; their papers recompute it at every update.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ramulus.core.recipe_part import needed, with_defaults
from ramulus.core.share import at_most
from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.advantage.group import Advantage, GroupMean
from ramulus.learn.batch.layout import joined
from ramulus.learn.batch.tree_batch import Credits

_Path = list[Node]
"""The nodes of a path that the policy wrote, root to leaf, those without tokens left out."""


def _along(forest: Sequence[Tree], credits: Sequence[Credits]) -> list[list[tuple[int, _Path, np.ndarray]]]:
    """Per tree and trained leaf: its id, its path, and the credit of each of the path's tokens [L]."""
    answer = []
    for tree, credit in zip(forest, credits, strict=True):
        trained, paths = credit.trained(), []
        for leaf in tree.leaves():
            path = [node for node in leaf.line() if node.author is Author.POLICY and node.tokens]
            if leaf.id in trained:
                paths.append((leaf.id, path, credit.along(leaf.id, path)))
        answer.append(paths)
    return answer


def recorded(path: _Path, name: str) -> np.ndarray:
    """`entropy`, or `behavior`, the log-probs before truncation, or a scored column of each token of a path [L]; ValueError where a node has none."""
    if name not in ("entropy", "behavior"):
        if lacking := [node.id for node in path if name not in node.signals]:
            raise ValueError(f"node {lacking[0]} has no {name!r} log-probs: have the forest scored for {{{name!r}}} before crediting")
        return joined([node.signals[name] for node in path])
    for node in path:
        if len(node.column("logprobs" if name == "behavior" else name)) != len(node.tokens):
            raise ValueError(f"node {node.id} has no recorded {name} to read: sample with an engine that records it")
    if name == "entropy":
        return joined([node.entropy for node in path if node.entropy is not None])
    return np.concatenate([np.zeros(0), *(np.asarray(node.logprobs, np.float64) + (node.kept or 0.0) for node in path)])


class MadeOver:
    """What an advantage reads that is made over another one: what that one reads."""

    advantage: Any

    @property
    def needs(self) -> tuple[str, ...]:
        """The signals that the other advantage reads."""
        return needed(self.advantage)

    @property
    def column(self) -> str | None:
        """The log-probs that the other advantage reads."""
        return with_defaults(self.advantage, Advantage).column

    @property
    def unbranched(self) -> bool | None:
        """Whether the other advantage trains paths that nothing branches from."""
        return with_defaults(self.advantage, Advantage).unbranched


@dataclass(frozen=True)
class EntropyAdvantage(MadeOver):
    """Another advantage plus a bonus for uncertain tokens: A + min(alpha H, |A| / kappa) (arXiv 2506.14758).

    H is the entropy as sampled, in nats. With kappa above 1 no credit changes its sign, and what has none gets none.

    Example:
        >>> from ramulus import Author, EntropyAdvantage, Raw, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2, 3], Author.POLICY, logprobs=[-1.0, -1.0], entropy=[0.5, 2.0], finish="eos", reward=1.0)
        >>> EntropyAdvantage(Raw(), alpha=0.5)([tree])[0].token[leaf.id]
        [1.25, 1.5]
    """

    advantage: Any = field(default_factory=GroupMean)
    alpha: float = 0.4
    kappa: float = 2.0
    records: ClassVar[tuple[str, ...]] = ("entropy",)  # what an engine must record for it

    def __post_init__(self) -> None:
        if not self.alpha >= 0 or not self.kappa > 1:
            raise ValueError(f"EntropyAdvantage needs alpha >= 0 and kappa above 1, got {self.alpha} and {self.kappa}")

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        credits = self.advantage(forest)
        return [
            Credits(token={leaf: self.raised(value, recorded(path, "entropy")).tolist() for leaf, path, value in paths}, target=credit.target)
            for credit, paths in zip(credits, _along(forest, credits), strict=True)
        ]

    def raised(self, value: np.ndarray, entropy: np.ndarray) -> np.ndarray:
        """Credits [L] and entropies [L] -> credits with the bonus [L]."""
        return value + np.minimum(self.alpha * entropy, np.abs(value) / self.kappa)


@dataclass(frozen=True)
class ClipCov(MadeOver):
    """Another advantage, 0 on a few tokens whose advantage and log-prob vary together the most (arXiv 2505.22617).

    Of the tokens with `low` < (A - mean A) (log p - mean log p) < `high`, as many as `share` of all, at least one, are drawn with a seed of the
    step's. Means, share and draw are over flattened tokens of the whole step; the tokens stay in every denominator.

    Example:
        >>> from ramulus import Author, ClipCov, Raw, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> right = tree.add(tree.root, [2, 3], Author.POLICY, logprobs=[-0.5, -2.0], finish="eos", reward=1.0)
        >>> wrong = tree.add(tree.root, [4, 5], Author.POLICY, logprobs=[-2.0, -2.0], finish="eos", reward=-1.0)
        >>> list(ClipCov(Raw())([tree])[0].token.values())
        [[0.0, 1.0], [-1.0, -1.0]]
    """

    advantage: Any = field(default_factory=GroupMean)
    share: float = 2e-4
    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not self.low < self.high:
            raise ValueError(
                f"ClipCov needs a share in (0, 1] and low < high, got {self.share}, {self.low} and {self.high}"
            )

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        credits = self.advantage(forest)
        trees, targets = _along(forest, credits), [credit.target for credit in credits]
        paths = [path for tree in trees for path in tree]
        if not sum(len(value) for _, _, value in paths):
            return cut(np.zeros(0), trees, targets)
        value = np.concatenate([value for _, _, value in paths])
        cov = covariance(paths, "behavior")
        near = np.flatnonzero((cov > self.low) & (cov < self.high)).tolist()
        most = min(len(near), max(1, at_most(self.share, len(value))))
        draw = random.Random(f"{forest[0].seed}/{forest[0].step}/clip-cov")
        value[draw.sample(near, most)] = 0.0
        return cut(value, trees, targets)


@dataclass(frozen=True)
class Covarying(MadeOver):
    """`value` on the tokens whose advantage and log-prob vary together the most, 0 on all others: whom KL-Cov holds (arXiv 2505.22617).

    They are the `share` of all tokens, rounded down, at least one, with the largest (A - mean A) (log p - mean log p), with A of `advantage`;
    means and share are over flattened tokens of the whole step, and of equal ones the earlier are taken. p is what `column` says: "behavior", as
    sampled, or "recomputed" or "recomputed_tempered", the policy at the start of the step, which costs a forward pass unless the Mix reads it
    anyway.

    Example:
        >>> from ramulus import Author, Covarying, Raw, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> right = tree.add(tree.root, [2, 3], Author.POLICY, logprobs=[-0.5, -2.0], finish="eos", reward=1.0)
        >>> wrong = tree.add(tree.root, [4, 5], Author.POLICY, logprobs=[-2.0, -2.0], finish="eos", reward=-1.0)
        >>> list(Covarying(Raw(), share=0.25)([tree])[0].token.values())
        [[1.0, 0.0], [0.0, 0.0]]
    """

    advantage: Any = field(default_factory=GroupMean)
    share: float = 2e-4
    value: float = 1.0
    column: str = "behavior"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"Covarying needs a share in (0, 1], got {self.share}")
        if self.column not in ("behavior", "recomputed", "recomputed_tempered"):
            raise ValueError(f"Covarying's column is 'behavior', 'recomputed' or 'recomputed_tempered', got {self.column!r}")

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        trees = _along(forest, self.advantage(forest))
        cov = covariance([path for tree in trees for path in tree], self.column)
        order = np.argsort(-cov, kind="stable")
        value = np.zeros(len(cov))
        value[order[: max(1, at_most(self.share, len(cov)))]] = self.value
        return cut(value, trees, [None] * len(trees))


def covariance(paths: Sequence[tuple[int, _Path, np.ndarray]], column: str) -> np.ndarray:
    """How the advantage and the log-prob of each token of all paths vary together, [N]."""
    if not sum(len(value) for _, _, value in paths):
        return np.zeros(0)
    value = np.concatenate([value for _, _, value in paths])
    logp = np.concatenate([recorded(path, column) for _, path, _ in paths])
    return np.asarray((value - value.mean()) * (logp - logp.mean()))


def cut(value: np.ndarray, trees: Sequence[Sequence[tuple[int, _Path, np.ndarray]]], targets: Sequence[Any]) -> list[Credits]:
    """A value for each token of all paths [N] as the credit of their leaves, with the targets of each tree's."""
    sizes = [len(old) for tree in trees for _, _, old in tree]
    parts = iter(np.split(value, np.cumsum(sizes)[:-1]) if sizes else [])
    return [Credits(token={leaf: next(parts).tolist() for leaf, _, _ in tree}, target=target) for tree, target in zip(trees, targets, strict=True)]
