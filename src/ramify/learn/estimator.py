"""The formula: grad = mask x (1 / reference) x advantage x grad pi."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ramify.learn.batch import TreeBatch


@dataclass(frozen=True)
class Estimator:
    """The unified policy gradient, grad = 1_stable * (1 / pi_ref) * A * grad pi (arXiv 2509.04419, eq. 6).

    Raises ValueError where mask and reference name a tempered and an untempered column at once.
    """

    mask: Any  # Mask
    reference: Any  # Reference
    advantage: Any  # Advantage; pack folds its answer into gain and pain

    def __post_init__(self) -> None:
        if {"behavior", "recomputed"} <= self.columns:
            raise ValueError(
                f"a term is tempered or untempered as a whole, but {self.mask} and {self.reference} name one column of each: "
                "use Behavior with column='behavior', or Recomputed with column='recomputed'"
            )

    @property
    def columns(self) -> set[str]:
        """The log-prob columns that mask and reference read."""
        return {part.column for part in (self.mask, self.reference) if getattr(part, "column", None)}

    @property
    def tempered(self) -> bool:
        """Whether log-probs are taken at the temperature each token was sampled at."""
        return "recomputed" not in self.columns

    def coefficient(self, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """Log-probs [T], entropy [T], a term's batch -> the factor of grad log pi at each token [T]; nothing is differentiated."""
        ratio = (logp - self.reference(logp, batch)).clamp(-20, 20).exp()
        return ratio * (
            self.mask(+1, logp, entropy, batch) * batch.gain + self.mask(-1, logp, entropy, batch) * batch.pain
        )
