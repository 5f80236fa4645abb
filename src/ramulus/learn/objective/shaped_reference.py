"""References that shape the likelihood gradient: for demonstrations, whose behaviour policy is unknown, and in place of a clip.

Each has a potential u(log pi) that its textbook loss multiplies the advantage by; the reference is then pi / (du / dlog pi). The ratio
shaped is pi itself, pi_ref being taken as 1, or pi / pi_old where `column` names the log-probs of pi_old.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.reference import logprobs_of

_COLUMNS = (None, "behavior", "recomputed")


@dataclass(frozen=True)
class One:
    """A behaviour policy taken as certain: the ratio is the probability itself (offline RL, arXiv 2509.04419, table 1).

    Example:
        >>> import torch
        >>> from ramulus import One
        >>> One().potential(torch.tensor([0.25, 0.5]).log(), None).tolist()
        [0.25, 0.5]
    """

    def __call__(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        return torch.zeros_like(logp)

    def potential(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        """The probability [T] of each token."""
        return logp.exp()


@dataclass(frozen=True)
class Shaped:
    """LUFFY's policy shaping u = f(pi) = pi / (pi + gamma) (arXiv 2504.14945, eq. 6), or f(pi) / f(pi_old) with a column.

    The gradient is that of pi, times gamma / (pi + gamma)^2: tokens far from the policy pull more.

    Example:
        >>> import torch
        >>> from ramulus import Shaped
        >>> shaped = Shaped(gamma=0.1).potential(torch.tensor([0.1, 0.9]).log(), None)
        >>> [round(float(f), 2) for f in shaped]
        [0.5, 0.9]
    """

    gamma: float = 0.1
    column: str | None = None

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"Shaped's gamma must be above 0, got {self.gamma}")
        _check(self.column, "Shaped")

    def __call__(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        log_slope = math.log(self.gamma) - 2 * (logp.exp() + self.gamma).log()  # of f, over pi
        return self.scale(batch) - log_slope

    def scale(self, batch: TreeBatch) -> Tensor | float:
        """log f(pi_old), or 0."""
        if self.column is None:
            return 0.0
        old = logprobs_of(batch, self.column)
        return old - (old.exp() + self.gamma).log()

    def potential(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        """f(pi), or f(pi) / f(pi_old)."""
        log_f = logp - (logp.exp() + self.gamma).log()
        return (log_f - self.scale(batch)).exp()


@dataclass(frozen=True)
class Power:
    """u = r^exponent: 0.5 is the square root (options of LUFFY's code)."""

    exponent: float = 0.5
    column: str | None = None

    def __post_init__(self) -> None:
        if not self.exponent > 0:
            raise ValueError(f"Power's exponent must be above 0, got {self.exponent}")
        _check(self.column, "Power")

    def __call__(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        return logp - self.exponent * (logp - old_of(batch, self.column)) - math.log(self.exponent)

    def potential(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        """The ratio to that power."""
        return (self.exponent * (logp - old_of(batch, self.column))).exp()


@dataclass(frozen=True)
class Blend:
    """u = log_weight x log r + weight x r: SFT and offline RL on one token (options `logp` and `p_logp` of LUFFY's code)."""

    log_weight: float = 0.1
    weight: float = 1.0
    column: str | None = None

    def __post_init__(self) -> None:
        if not (self.log_weight >= 0 and self.weight >= 0 and self.log_weight + self.weight > 0):
            raise ValueError(f"Blend's weights are at least 0 and not both 0, got {self.log_weight} and {self.weight}")
        _check(self.column, "Blend")

    def __call__(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        ratio = (logp - old_of(batch, self.column)).exp()
        return logp - (self.log_weight + self.weight * ratio).log()

    def potential(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        """The blend."""
        log_ratio = logp - old_of(batch, self.column)
        return self.log_weight * log_ratio + self.weight * log_ratio.exp()


@dataclass(frozen=True)
class Capped:
    """CISPO: the importance ratio, clipped to [1 - low, 1 + high], is a constant weight of log pi (arXiv 2506.13585, eqs. 4-5).

    No token loses its gradient. The paper sets no floor: low=1.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from ramulus import Capped
        >>> batch = SimpleNamespace(behavior=torch.tensor([0.5, 0.5]).log())  # of a TreeBatch it reads nothing else
        >>> [round(float(w), 2) for w in Capped(high=0.28).weight(torch.tensor([0.3, 0.9]).log(), batch)]
        [0.6, 1.28]
    """

    low: float = 1.0
    high: float = 0.28
    column: str = "behavior"

    def __post_init__(self) -> None:
        if not (0 <= self.low <= 1 and self.high >= 0):
            raise ValueError(f"Capped needs 0 <= low <= 1 and high >= 0, got low={self.low}, high={self.high}")
        if self.column not in _COLUMNS[1:]:
            raise ValueError(f"Capped's column is 'behavior' or 'recomputed', got {self.column!r}")

    def __call__(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        return logp - self.weight(logp, batch).log()

    def weight(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        """The clipped ratio."""
        return (logp - logprobs_of(batch, self.column)).clamp(-20, 20).exp().clamp(1 - self.low, 1 + self.high)

    def potential(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        """log pi times the weight."""
        return self.weight(logp, batch).detach() * logp


def old_of(batch: TreeBatch, column: str | None) -> Tensor | float:
    """log pi_old [T], or 0."""
    return 0.0 if column is None else logprobs_of(batch, column)


def _check(column: str | None, name: str) -> None:
    """Raise ValueError for a column that no ratio can be taken against."""
    if column not in _COLUMNS:
        raise ValueError(f"{name}'s column is None, 'behavior' or 'recomputed', got {column!r}")


@dataclass(frozen=True)
class Probable:
    """A mask that trusts tokens whose probability lies in [low, high], whatever the sign (bounds on the shaped ratio in LUFFY's code)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"Probable needs 0 <= low < high <= 1, got low={self.low}, high={self.high}")

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        p = logp.exp()
        return ((p >= self.low) & (p <= self.high)).to(logp.dtype)

    def clamp(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """Log-probs moved to the edge of the trusted region where they lie beyond it."""
        return logp.clamp(math.log(self.low) if self.low else -math.inf, math.log(self.high))
