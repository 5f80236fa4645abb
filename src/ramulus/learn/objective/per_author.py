"""One part for what the policy wrote and another for demonstrations, inside one term: a mask or a reference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramulus.core.tree import Author, Tree
from ramulus.learn.batch.tree_batch import TreeBatch


@dataclass(frozen=True)
class PerAuthor:
    """`expert` on the tokens of demonstrations, `policy` on all others: both masks, or both references.

    A term for rollouts and demonstrations together has one normaliser over both, as the mixed loss of LUFFY has (arXiv 2504.14945, eq. 5).
    """

    policy: Any
    expert: Any

    def __post_init__(self) -> None:
        columns = {self.policy.column, self.expert.column} - {None}
        if len(columns) > 1:
            raise ValueError(
                f"the two parts of PerAuthor read {sorted(columns)}: a term reads one column, so let both name it, or one none"
            )

    @property
    def column(self) -> str | None:
        """The log-prob column that both parts read, or the one that reads any; None where neither does."""
        return self.policy.column or self.expert.column

    def column_of(self, author: Author) -> str | None:
        """What the part for the tokens of one author reads."""
        part = self.expert if author is Author.EXPERT else self.policy
        column: str | None = part.column
        return column

    def choose(self, batch: TreeBatch, policy: Tensor, expert: Tensor) -> Tensor:
        """[T] by each part -> [T]: `expert` on demonstrations' tokens, `policy` elsewhere."""
        return torch.where(batch.author == int(Author.EXPERT), expert, policy)

    def __call__(self, *arguments: Any) -> Tensor:
        return self.choose(arguments[-1], self.policy(*arguments), self.expert(*arguments))

    def measure(self, forest: Sequence[Tree], keep: Sequence[Collection[int]]) -> dict[str, float]:
        """What the parts need of the step."""
        parts = [part for part in (self.policy, self.expert) if hasattr(part, "measure")]
        return {name: value for part in parts for name, value in part.measure(forest, keep).items()}

    def factor(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """What the textbook loss is multiplied by; 1 for a part that only clips."""
        arguments = (sign, logp, entropy, batch)
        factors = [
            part.factor(*arguments) if hasattr(part, "factor") else torch.ones_like(logp)
            for part in (self.policy, self.expert)
        ]
        return self.choose(batch, *factors)

    def clamp(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """Log-probs [T] at which the textbook loss is evaluated: each author's tokens as its mask clamps them."""
        arguments = (sign, logp, entropy, batch)
        return self.choose(batch, self.policy.clamp(*arguments), self.expert.clamp(*arguments))

    def potential(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        """The textbook loss's potential [T]: each author's tokens by its reference."""
        return self.choose(batch, self.policy.potential(logp, batch), self.expert.potential(logp, batch))
