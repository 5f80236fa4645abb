"""The formula: grad = mask x (1 / reference) x advantage x grad pi."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ramulus.core.recipe_part import with_defaults
from ramulus.core.tree import Author
from ramulus.learn.advantage.group import Advantage
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.leaf_weight import fold
from ramulus.learn.objective.reference import ColumnReader


@dataclass(frozen=True)
class Estimator:
    """The unified policy gradient, grad = 1_stable * (1 / pi_ref) * A * grad pi (arXiv 2509.04419, eq. 6).

    `recomputed_tempered` says at which temperature the parts that name the column `recomputed` take the policy at the start of the step: at that
    of sampling, as verl, TRL, OpenRLHF and slime do, which divide all logits by it first; or at 1. Raises ValueError where the parts name a
    tempered and an untempered column at once.

    Example:
        >>> from ramulus import Behavior, Clip, Estimator, GroupMean
        >>> Estimator(mask=Clip(0.2, 0.28), reference=Behavior(), advantage=GroupMean()).columns
        {'behavior'}
    """

    mask: Any  # Mask
    reference: Any  # Reference
    advantage: Any  # Advantage; pack folds its answer into gain and pain
    leaf: Any = None  # Leaf or None; weighs each path's credit before it is folded
    recomputed_tempered: bool = False

    def __post_init__(self) -> None:
        if {"behavior", "recomputed"} <= self.columns and not self.recomputed_tempered:
            raise ValueError(
                f"a term is tempered or untempered as a whole, but {self.mask}, {self.reference} and {self.leaf} name one column of each: "
                "use Behavior with column='behavior', or Recomputed with column='recomputed', or recomputed_tempered=True"
            )

    @property
    def columns(self) -> set[str]:
        """The log-prob columns that mask, reference and leaf weight read."""
        return {reader.column for reader in self.readers if reader.column is not None}

    @property
    def readers(self) -> list[ColumnReader]:
        """Mask, reference and leaf weight as what may read log-probs."""
        return [with_defaults(part, ColumnReader) for part in (self.mask, self.reference, self.leaf)]

    @property
    def scored(self) -> set[str]:
        """The columns by the names that a learner scores them under; the advantage may read one too."""
        names = {f"{name}_tempered" if name == "recomputed" and self.recomputed_tempered else name for name in self.columns}
        column = with_defaults(self.advantage, Advantage).column
        return names | ({column} if column is not None else set())

    def reads(self, author: Author) -> set[str]:
        """The columns that are read at the tokens of one author."""
        return {column for reader in self.readers if (column := reader.column_of(author)) is not None}

    @property
    def tempered(self) -> bool:
        """Whether log-probs are taken at the temperature each token was sampled at."""
        return self.recomputed_tempered or "recomputed" not in self.columns

    def sees(self, batch: TreeBatch) -> TreeBatch:
        """A term's batch whose column `recomputed` is at the temperature that this term takes it at."""
        return replace(batch, recomputed=batch.recomputed_tempered) if self.recomputed_tempered else batch

    def coefficient(self, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """Log-probs [T], entropy [T], a term's batch -> the factor of grad log pi at each token [T]; nothing is differentiated."""
        ratio = (logp - self.reference(logp, batch)).clamp(-20, 20).exp()
        gain, pain = self.pulls(logp, entropy, batch)
        return ratio * (self.mask(+1, logp, entropy, batch) * gain + self.mask(-1, logp, entropy, batch) * pain)

    def pulls(self, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> tuple[Tensor, Tensor]:
        """Gain and pain [T]: as packed, or folded anew with the leaf weights that the log-probs give."""
        if self.leaf is None:
            return batch.gain, batch.pain
        credit = batch.leaf_weight * batch.leaf_credit
        up, down = (self.leaf(sign, logp, entropy, batch) for sign in (1, -1))
        return fold(up * credit.clamp(min=0), batch), fold(down * credit.clamp(max=0), batch)
