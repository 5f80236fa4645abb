"""References: the policy that the likelihood gradient is divided by (arXiv 2509.04419, section 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from ramulus.core.recipe_part import RecipePart
from ramulus.core.tree import Author, Tree
from ramulus.learn.batch.tree_batch import TreeBatch

Measure = Callable[[Sequence[Tree], Sequence[Collection[int]]], dict[str, float]]
"""(the step's trees, the ids of the leaves that count in each) -> numbers of the whole step, which `batch.stats` then holds."""


class ColumnReader(RecipePart, Protocol):
    """What a mask, a reference or a leaf weight may say of the log-probs that it reads."""

    column: str | None = None  # "behavior", as sampled, or "recomputed", at the start of the step; None reads neither

    def column_of(self, author: Author) -> str | None:
        """What it reads at the tokens of one author."""
        return self.column


class Reference(ColumnReader, Protocol):
    """(log-probs [T], batch) -> log pi_ref [T]; the rest is what one may say of itself.

    Example:
        >>> import torch
        >>> from ramulus import Estimator, Everything, GroupMean
        >>> def even(logp, batch):  # any callable is one; this one has every token as probable as the others of a hundred
        ...     return torch.full_like(logp, 0.01).log()
        >>> Estimator(Everything(), even, GroupMean()).columns  # it reads nothing that is recorded or scored
        set()
    """

    measure: Measure | None = None

    def __call__(self, logp: Tensor, batch: TreeBatch) -> Tensor: ...

    def potential(self, logp: Tensor, batch: TreeBatch) -> Tensor | None:
        """What the textbook loss multiplies the advantage by [T]; None where no such loss is known."""
        return None


@dataclass(frozen=True)
class Itself:
    """The current policy: the ratio is 1 (SFT, REINFORCE, RLOO).

    Example:
        >>> from ramulus import Everything, Estimator, GroupMean, Itself
        >>> rloo = Estimator(Everything(), Itself(), GroupMean(std=False, leave_one_out=True))
        >>> rloo.columns
        set()
    """

    def __call__(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        return logp

    def potential(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        """What the textbook loss multiplies the advantage by: log pi."""
        return logp


@dataclass(frozen=True)
class Behavior:
    """The distribution that really sampled the token: tempered, before truncation.

    Example:
        >>> from ramulus import Behavior, Clip, Estimator, GroupMean
        >>> Estimator(Clip(), Behavior(), GroupMean()).tempered
        True
    """

    column: ClassVar[str | None] = "behavior"

    def __call__(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        return batch.behavior

    def potential(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        """The importance ratio [T]."""
        return (logp - batch.behavior).clamp(-20, 20).exp()


@dataclass(frozen=True)
class Recomputed:
    """The policy at the start of the step, evaluated by the learner: at temperature 1, or with the Estimator's `recomputed_tempered` at that of
    sampling, as `old_log_prob` is in verl, TRL, OpenRLHF and slime. The two are one where the temperature of sampling is 1.

    Example:
        >>> from ramulus import Clip, Estimator, GroupMean, Recomputed
        >>> Estimator(Clip(column="recomputed"), Recomputed(), GroupMean()).columns
        {'recomputed'}
    """

    column: ClassVar[str | None] = "recomputed"

    def __call__(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        return logprobs_of(batch, "recomputed")

    def potential(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        """The importance ratio [T]."""
        return (logp - logprobs_of(batch, "recomputed")).clamp(-20, 20).exp()


def logprobs_of(batch: TreeBatch, column: str) -> Tensor:
    """A log-prob column [T]; raises ValueError where the batch was packed without it."""
    value = getattr(batch, column)
    if value is None:
        raise ValueError(f"the batch holds no {column!r} log-probs: score the forest for them before packing")
    return value
