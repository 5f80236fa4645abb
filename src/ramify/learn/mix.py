"""Mix: a sum of terms of the one formula, and the three things that are not advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ramify.core.tree import Author, Tree
from ramify.learn.batch import Credits, TreeBatch
from ramify.learn.estimator import Estimator

Leaves = Sequence[
    Sequence[tuple[int, float]]
]  # per tree and trained leaf: (learned tokens, share); shares of a tree sum to its leaves
Normaliser = Callable[[Leaves], list[list[float]]]
"""The trained leaves of a whole optimizer step -> what each token of each leaf weighs."""


@dataclass(frozen=True)
class TokenMean:
    """Every trained token of the optimizer step weighs the same (DAPO, arXiv 2503.14476, eq. 8)."""

    def __call__(self, leaves: Leaves) -> list[list[float]]:
        total = sum(n * share for tree in leaves for n, share in tree)
        return [[share / total for _, share in tree] for tree in leaves]


@dataclass(frozen=True)
class SequenceMean:
    """Every leaf weighs the same, spread over its tokens (GRPO, arXiv 2402.03300, eq. 3)."""

    def __call__(self, leaves: Leaves) -> list[list[float]]:
        total = sum(share for tree in leaves for _, share in tree)
        return [[share / total / n for n, share in tree] for tree in leaves]


@dataclass(frozen=True)
class ConstantLength:
    """Every leaf's token sum over one fixed length (Dr.GRPO, arXiv 2503.20783, section 3.2)."""

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"ConstantLength needs a length of at least 1 token, got {self.length}")

    def __call__(self, leaves: Leaves) -> list[list[float]]:
        total = sum(share for tree in leaves for _, share in tree)
        return [[share / total / self.length for _, share in tree] for tree in leaves]


@dataclass(frozen=True)
class QuestionMean:
    """Every question of the step weighs 1/Q, its leaves alike, each spread over its tokens."""

    def __call__(self, leaves: Leaves) -> list[list[float]]:
        return [[share / (len(tree) * len(leaves) * n) for n, share in tree] for tree in leaves]


@dataclass(frozen=True)
class Term:
    """One estimator on the tokens of some authors."""

    estimator: Estimator
    authors: tuple[Author, ...] = (Author.POLICY,)
    normaliser: Normaliser = field(default_factory=TokenMean)
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        wrong = [author for author in self.authors if author not in (Author.POLICY, Author.EXPERT)]
        if wrong or not self.authors:
            raise ValueError(f"a term learns from POLICY or EXPERT tokens, got {self.authors}")


@dataclass(frozen=True)
class Mix:
    """A sum of terms, a KL leash to a frozen model and an entropy bonus.

    Leash and bonus are weighted by the sum of the terms' weights. `share` says how a tree's leaves share its weight: all alike, or
    split equally at each fork.
    """

    terms: tuple[Term, ...]
    leash: float = 0.0  # coefficient of KL(pi || frozen), k3 estimate of http://joschu.net/blog/kl-approx.html
    entropy_bonus: float = 0.0
    share: Literal["each_leaf", "each_fork"] = "each_leaf"

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a Mix needs at least one term")
        if not (math.isfinite(self.leash) and self.leash >= 0 and math.isfinite(self.entropy_bonus)):
            raise ValueError(
                f"leash must be a finite number of at least 0 and entropy_bonus finite, got {self.leash} and {self.entropy_bonus}"
            )
        if self.share not in ("each_leaf", "each_fork"):
            raise ValueError(f"share is 'each_leaf' or 'each_fork', got {self.share!r}")

    @property
    def columns(self) -> set[str]:
        """The log-prob columns that some part reads."""
        named = {column for term in self.terms for column in term.estimator.columns}
        return named | {"frozen"} if self.leash else named

    def credit(self, forest: Sequence[Tree]) -> list[list[Credits]]:
        """Every term's credits for the whole forest, term by term, tree by tree."""
        return [term.estimator.advantage(forest) for term in self.terms]

    def loss(self, tempered: Tensor, plain: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """A scalar whose gradient is the estimate; its value is not the textbook loss (`gauges.surrogate` gives that).

        `tempered` and `plain` are log-probs [T] at the sampling temperature and at 1.
        """
        total = plain.new_zeros(())
        for m, term in enumerate(self.terms):
            logp = tempered if term.estimator.tempered else plain
            coefficient = term.estimator.coefficient(logp.detach(), entropy.detach(), batch.term(m))
            total = total - term.coefficient * (coefficient * logp).sum()
        return total + self.extras(plain, entropy, batch)

    def extras(self, plain: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """The additive terms that are no advantages: leash and entropy bonus."""
        total = plain.new_zeros(())
        weight = batch.weight.sum(0)
        if self.leash:
            if batch.frozen is None:
                raise ValueError(
                    "the leash needs the frozen model's log-probs: score the forest for 'frozen' before packing"
                )
            apart = (batch.frozen - plain).clamp(-20, 20)
            total = total + self.leash * (weight * (apart.exp() - apart - 1)).sum()
        if self.entropy_bonus:
            total = total - self.entropy_bonus * (weight * entropy).sum()
        return total
