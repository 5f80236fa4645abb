"""One part for what the policy wrote and another for demonstrations, inside one term: a mask or a reference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramulus.core.recipe_part import with_defaults
from ramulus.core.tree import Author, Tree
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mask import Mask
from ramulus.learn.objective.reference import ColumnReader, Reference


@dataclass(frozen=True)
class PerAuthor:
    """`expert` on the tokens of demonstrations, `policy` on all others: both masks, or both references.

    A term for rollouts and demonstrations together has one normaliser over both, as the mixed loss of LUFFY has (arXiv 2504.14945, eq. 5).

    Example:
        >>> from ramulus import Behavior, Estimator, Everything, GroupMean, PerAuthor, Shaped
        >>> luffy = Estimator(Everything(), PerAuthor(policy=Behavior(), expert=Shaped(0.1)), GroupMean(std=False, over="all"))
        >>> luffy.columns
        {'behavior'}
    """

    policy: Any
    expert: Any

    def __post_init__(self) -> None:
        if len(self.columns) > 1:
            raise ValueError(
                f"the two parts of PerAuthor read {sorted(self.columns)}: a term reads one column, so let both name it, or one none"
            )

    @property
    def columns(self) -> set[str]:
        """The log-prob columns that the two parts read."""
        return {column for author in (Author.POLICY, Author.EXPERT) if (column := self.column_of(author)) is not None}

    @property
    def column(self) -> str | None:
        """The log-prob column that both parts read, or the one that reads any; None where neither does."""
        return next(iter(self.columns), None)

    def column_of(self, author: Author) -> str | None:
        """What the part for the tokens of one author reads."""
        return with_defaults(self.expert if author is Author.EXPERT else self.policy, ColumnReader).column_of(author)

    @property
    def masks(self) -> tuple[Mask, Mask]:
        """The two parts as masks, with what they leave unsaid."""
        return with_defaults(self.policy, Mask), with_defaults(self.expert, Mask)

    def choose(self, batch: TreeBatch, policy: Tensor, expert: Tensor) -> Tensor:
        """[T] by each part -> [T]: `expert` on demonstrations' tokens, `policy` elsewhere."""
        return torch.where(batch.author == int(Author.EXPERT), expert, policy)

    def __call__(self, *arguments: Any) -> Tensor:
        return self.choose(arguments[-1], self.policy(*arguments), self.expert(*arguments))

    def measure(self, forest: Sequence[Tree], keep: Sequence[Collection[int]]) -> dict[str, float]:
        """What the parts need of the step."""
        asked = [mask.measure for mask in self.masks]
        return {name: value for measure in asked if measure is not None for name, value in measure(forest, keep).items()}

    def factor(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """What the textbook loss is multiplied by; 1 for a part that only clips."""
        policy, expert = (mask.factor(sign, logp, entropy, batch) for mask in self.masks)
        return self.choose(batch, policy, expert)

    def clamp(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor | None:
        """Log-probs [T] at which the textbook loss is evaluated: each author's tokens as its mask clamps them; None where one of them has none."""
        policy, expert = (mask.clamp(sign, logp, entropy, batch) for mask in self.masks)
        return None if policy is None or expert is None else self.choose(batch, policy, expert)

    def potential(self, logp: Tensor, batch: TreeBatch) -> Tensor | None:
        """The textbook loss's potential [T]: each author's tokens by its reference; None where one of them has none."""
        policy, expert = (with_defaults(part, Reference).potential(logp, batch) for part in (self.policy, self.expert))
        return None if policy is None or expert is None else self.choose(batch, policy, expert)
