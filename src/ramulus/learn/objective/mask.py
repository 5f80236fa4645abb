"""Masks: where, and how far, an update is trusted (the stabilisation mask of arXiv 2509.04419, section 2.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.reference import ColumnReader, Measure, logprobs_of


class Mask(ColumnReader, Protocol):
    """(sign of the advantage, log-probs [T], entropy [T], batch) -> factor [T], real and >= 0; nothing of it is differentiated.

    The rest is what one may say of itself.

    Example:
        >>> import torch
        >>> from ramulus import Behavior, Estimator, GroupMean
        >>> def sure(sign, logp, entropy, batch):  # any callable is one
        ...     return (entropy < 0.5).to(logp.dtype)
        >>> Estimator(sure, Behavior(), GroupMean()).mask(1, torch.zeros(2), torch.tensor([0.1, 0.9]), None).tolist()
        [1.0, 0.0]
    """

    measure: Measure | None = None
    signal: Any = None  # the EntropySignal by which it holds the policy's entropy against entropies as sampled

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor: ...

    def clamp(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor | None:
        """Log-probs [T] at which the textbook loss is evaluated; None where no such loss is known."""
        return None

    def factor(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """What the textbook loss is multiplied by [T], where the mask is more than a clip."""
        return torch.ones_like(logp)


def unmoved(mask: Any, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
    """The `clamp` of a mask that moves nothing: log-probs [T] as they are."""
    return logp


@dataclass(frozen=True)
class Everything:
    """Trust every token.

    Example:
        >>> from ramulus import Constant, Estimator, Everything, Itself
        >>> Estimator(Everything(), Itself(), Constant(1.0)).columns
        set()
    """

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        return torch.ones_like(logp)

    clamp = unmoved


@dataclass(frozen=True)
class Clip:
    """PPO's clip as a mask (arXiv 1707.06347, eq. 7), with DAPO's higher ceiling (arXiv 2503.14476, eq. 10).

    The ratio is taken against `column`: `behavior` (as sampled) or `recomputed` (start of the step).

    Example:
        >>> from ramulus import Clip
        >>> Clip(low=0.2, high=0.28).column
        'behavior'
    """

    low: float = 0.2
    high: float = 0.2
    column: str = "behavior"

    def __post_init__(self) -> None:
        if not (0 <= self.low < 1 and self.high >= 0):
            raise ValueError(f"Clip needs 0 <= low < 1 and high >= 0, got low={self.low}, high={self.high}")
        if self.column not in ("behavior", "recomputed"):
            raise ValueError(f"Clip's column is 'behavior' or 'recomputed', got {self.column!r}")

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        ratio = (logp - logprobs_of(batch, self.column)).clamp(-20, 20).exp()
        return (ratio <= 1 + self.high if sign > 0 else ratio >= 1 - self.low).to(logp.dtype)

    def clamp(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """Log-probs moved to the edge of the trusted region where they lie beyond it."""
        old = logprobs_of(batch, self.column)
        return (
            torch.minimum(logp, old + math.log1p(self.high))
            if sign > 0
            else torch.maximum(logp, old + math.log1p(-self.low))
        )


@dataclass(frozen=True)
class Behind:
    """Trust a token only where the policy has yet to come back to `column`: positive credit below its log-prob, negative above it.

    Under credit of one size and either sign this is a pull |log r| towards the old policy (KL-Cov, arXiv 2505.22617).

    Example:
        >>> from ramulus import Behind
        >>> Behind().column
        'behavior'
    """

    column: str = "behavior"

    def __post_init__(self) -> None:
        if self.column not in ("behavior", "recomputed"):
            raise ValueError(f"Behind's column is 'behavior' or 'recomputed', got {self.column!r}")

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        old = logprobs_of(batch, self.column)
        return (logp < old if sign > 0 else logp > old).to(logp.dtype)

    def clamp(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """Log-probs moved to the old ones where they lie beyond."""
        old = logprobs_of(batch, self.column)
        return torch.minimum(logp, old) if sign > 0 else torch.maximum(logp, old)


@dataclass(frozen=True)
class DualClip:
    """Clip, and for negative advantages a ceiling on the ratio as well (arXiv 1912.09729, eq. 5).

    Example:
        >>> from ramulus import DualClip
        >>> DualClip(0.2, 0.28, ceiling=10.0).ceiling
        10.0
    """

    low: float = 0.2
    high: float = 0.2
    ceiling: float = 3.0
    column: str = "behavior"

    def __post_init__(self) -> None:
        Clip(self.low, self.high, self.column)
        if self.ceiling <= 1:
            raise ValueError(f"DualClip's ceiling must be above 1, got {self.ceiling}")

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        inside = Clip(self.low, self.high, self.column)(sign, logp, entropy, batch)
        if sign > 0:
            return inside
        ratio = (logp - logprobs_of(batch, self.column)).clamp(-20, 20).exp()
        return inside * (ratio <= self.ceiling).to(logp.dtype)

    def clamp(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """Log-probs moved to the edge of the trusted region where they lie beyond it."""
        moved = Clip(self.low, self.high, self.column).clamp(sign, logp, entropy, batch)
        return moved if sign > 0 else torch.minimum(moved, logprobs_of(batch, self.column) + math.log(self.ceiling))
