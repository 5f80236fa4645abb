"""The entropy signal of HAPO, and the clip and the redistribution of credit that it drives (arXiv 2509.16591)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ramulus.core.tree import Author, Tree
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mask import Clip, unmoved
from ramulus.learn.objective.reference import logprobs_of

NOTHING = "untrained"  # a number of a step that trains none of the policy's tokens
RANKS = 128  # intervals between the quantiles that a rank is read from


def flattened(forest: Sequence[Tree], keep: Sequence[Collection[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Entropies as sampled [N] of the policy's tokens, and how many kept leaves lie below each [N]: what flattened rows would hold.

    `keep` gives the ids of the leaves that count, per tree. Raises ValueError for a policy token without a recorded entropy.
    """
    values: list[Sequence[float]] = []
    counts: list[int] = []
    for tree, kept in zip(forest, keep, strict=True):
        below: dict[int, int] = {}
        for leaf in tree.leaves():
            for node in leaf.line() if leaf.id in kept else ():
                below[node.id] = below.get(node.id, 0) + 1
        for node in tree.walk():
            if node.id in below and node.author is Author.POLICY and node.tokens:
                if node.entropy is None or len(node.entropy) != len(node.tokens):
                    raise ValueError(
                        f"node {node.id} has no recorded entropies to take quantiles of: sample with an engine that records them"
                    )
                values.append(node.entropy)
                counts.append(below[node.id])
    if not values:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    return np.concatenate([np.asarray(v, dtype=np.float64) for v in values]), np.repeat(
        counts, [len(v) for v in values]
    )


def quantiles(values: np.ndarray, counts: np.ndarray, shares: Sequence[float]) -> list[float]:
    """Nearest-rank quantiles of values [N], each standing for `counts` [N] of them, N > 0."""
    order = np.argsort(values, kind="stable")
    running = np.cumsum(counts[order])
    ranks = [round(share * (int(running[-1]) - 1)) for share in shares]
    return [float(values[order[i]]) for i in np.searchsorted(running, ranks, side="right")]


@dataclass(frozen=True)
class EntropySignal:
    """How far a token's entropy lies above (h > 0) or below (h < 0) a quantile of the step, in [-1, 1] (arXiv 2509.16591, eq. 6).

    `scale`: "extremes" divides log-entropy's distance from the pivot by that of the step's most extreme token on its side, as published;
    "rank" takes the token's rank among the step's, which no single token can rescale. `signed=False` gives |h|, as the released code does
    by a slip. Quantiles are of the entropies as sampled of all the step's trained tokens, each as often as trained leaves lie below it; h is
    taken from the entropy now. Entropies beyond those of the step have |h| = 1.

    Example:
        >>> from ramulus import EntropySignal, Redistribution
        >>> Redistribution(beta=1.0, signal=EntropySignal(scale="rank")).signal.scale
        'rank'
    """

    pivot: float = 0.8
    signed: bool = True
    scale: Literal["extremes", "rank"] = "extremes"
    eps: float = 1e-8  # nats; the smallest entropy that is told from 0
    records: ClassVar[tuple[str, ...]] = ("entropy",)  # what an engine must record for it

    def __post_init__(self) -> None:
        if not 0 <= self.pivot <= 1 or not self.eps > 0:
            raise ValueError(f"EntropySignal needs a pivot in [0, 1] and eps above 0, got {self.pivot} and {self.eps}")
        if self.scale not in ("extremes", "rank"):
            raise ValueError(f"EntropySignal's scale is 'extremes' or 'rank', got {self.scale!r}")

    def measure(self, forest: Sequence[Tree], keep: Sequence[Collection[int]]) -> dict[str, float]:
        """Pivot and scales of the step, for `__call__`, which then answers 0 where none of the policy's tokens is trained."""
        entropy, counts = flattened(forest, keep)
        return self.statistics(entropy, counts) if len(entropy) else {self.name(NOTHING): 1.0}

    def statistics(self, entropy: np.ndarray, counts: np.ndarray) -> dict[str, float]:
        """Entropies [N] > 0 in number and how often each counts [N] -> the same."""
        logs = np.log(np.maximum(entropy, self.eps))
        if self.scale == "rank":
            levels = quantiles(logs, counts, [i / RANKS for i in range(RANKS + 1)])
            return {self.name(f"rank/{i}"): value for i, value in enumerate(levels)}
        (pivot,) = quantiles(logs, counts, [self.pivot])
        rms = math.sqrt(max(float(np.average((logs - pivot) ** 2, weights=counts)), 1e-8))
        above, below = (max(float(side.max()) / rms, 1e-8) for side in (logs - pivot, pivot - logs))
        values = {"pivot": pivot, "rms": rms, "above": 1 / above, "below": 1 / below}
        return {self.name(name): value for name, value in values.items()}

    def name(self, what: str) -> str:
        """What a number is called in `batch.stats`."""
        return f"entropy/{self.pivot:g}/{what}" if self.scale == "extremes" else f"entropy/{what}"

    def __call__(self, entropy: Tensor, stats: dict[str, float]) -> Tensor:
        """Entropies [...] in nats and the step's numbers -> h [...]; raises ValueError where they were not measured."""
        if self.name(NOTHING) in stats:
            return torch.zeros_like(entropy)
        if self.name("pivot" if self.scale == "extremes" else "rank/0") not in stats:
            raise ValueError(f"the batch holds no statistics for {self}: pack with a mix whose mask measures them")
        logs = entropy.clamp(min=self.eps).log()
        if self.scale == "rank":
            knots = logs.new_tensor([stats[self.name(f"rank/{i}")] for i in range(RANKS + 1)])
            apart = _rank(logs, knots) - self.pivot
            above, below = (1 / max(side, 1 / RANKS) for side in (1 - self.pivot, self.pivot))
        else:
            apart = (logs - stats[self.name("pivot")]) / stats[self.name("rms")]
            above, below = stats[self.name("above")], stats[self.name("below")]
        h = torch.where(apart > 0, apart * above, apart * below).clamp(-1, 1)
        return h if self.signed else h.abs()


def _rank(x: Tensor, knots: Tensor) -> Tensor:
    """The share in [0, 1] of the values whose quantiles are `knots` [N + 1] that lie below x [...]; the middle of a run of ties."""
    x = x.contiguous()
    left, right = torch.searchsorted(knots, x), torch.searchsorted(knots, x, right=True)
    last = len(knots) - 1
    under, over = knots[(left - 1).clamp(min=0)], knots[left.clamp(max=last)]
    inside = left - 1 + (x - under) / (over - under).where(over > under, torch.ones_like(x))
    inside = torch.where(left == 0, 0.0, torch.where(left > last, float(last), inside))
    return torch.where(right > left, (left + right - 1) / 2, inside) / last


def widths(h: Tensor, low: float, high: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Signal [T] -> how far the ratio may fall below 1 and rise above it, [T] each (arXiv 2509.16591, eqs. 12-13)."""
    return low * (1 - alpha * h.clamp(max=0)), high * (1 + alpha * h.clamp(min=0))


def redistribution(h: Tensor, ratio: Tensor, left: Tensor, right: Tensor, beta: float) -> Tensor:
    """What the advantage of a token is multiplied by, [T] (arXiv 2509.16591, eqs. 10-11).

    1 + beta h where entropy is high and the ratio has left the neutral zone (1 - left / 2, 1 + right / 2), or where entropy is low and the ratio
    is inside it; 1 elsewhere.
    """
    neutral = (ratio > 1 - left / 2) & (ratio < 1 + right / 2)
    return torch.where(torch.where(h > 0, ~neutral, neutral), 1 + beta * h, 1.0)


@dataclass(frozen=True)
class AdaptiveClip:
    """A clip whose left side widens where entropy is low and whose right side where it is high (arXiv 2509.16591, eqs. 12-13).

    At h = -1 the ratio may fall to 1 - low (1 + alpha), at h = 1 it may rise to 1 + high (1 + alpha). `ceiling`: of the ratio where the advantage
    is negative (dual clip, arXiv 1912.09729, eq. 5); None for none. The ratio is taken against `column`.

    Example:
        >>> from ramulus import AdaptiveClip, EntropySignal
        >>> AdaptiveClip(0.2, 0.28, alpha=1.0, signal=EntropySignal(pivot=0.8)).column
        'recomputed'
    """

    low: float = 0.2
    high: float = 0.28
    alpha: float = 1.0
    ceiling: float | None = None
    signal: EntropySignal = field(default_factory=EntropySignal)
    column: str = "recomputed"

    def __post_init__(self) -> None:
        Clip(self.low, self.high, self.column)
        if not (self.alpha >= 0 and self.low * (1 + self.alpha) < 1):
            raise ValueError(
                f"AdaptiveClip needs alpha >= 0 and low * (1 + alpha) < 1, got alpha={self.alpha}, low={self.low}"
            )
        if self.ceiling is not None and self.ceiling <= 1:
            raise ValueError(f"AdaptiveClip's ceiling must be above 1, or None, got {self.ceiling}")

    def measure(self, forest: Sequence[Tree], keep: Sequence[Collection[int]]) -> dict[str, float]:
        """What the signal needs of the step."""
        return self.signal.measure(forest, keep)

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        ratio = (logp - logprobs_of(batch, self.column)).clamp(-20, 20).exp()
        left, right = widths(self.signal(entropy, batch.stats), self.low, self.high, self.alpha)
        inside = ratio <= 1 + right if sign > 0 else ratio >= 1 - left
        if sign < 0 and self.ceiling is not None:
            inside &= ratio <= self.ceiling
        return inside.to(logp.dtype)

    def clamp(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """Log-probs moved to the edge of the trusted region where they lie beyond it."""
        old = logprobs_of(batch, self.column)
        left, right = widths(self.signal(entropy, batch.stats), self.low, self.high, self.alpha)
        if sign > 0:
            return torch.minimum(logp, old + right.log1p())
        moved = torch.maximum(logp, old + (-left).log1p())
        return moved if self.ceiling is None else torch.minimum(moved, old + math.log(self.ceiling))


@dataclass(frozen=True)
class Redistribution:
    """Credit amplified where entropy is high and the ratio moves, shrunk where it is low and the ratio rests (arXiv 2509.16591, eqs. 10-11).

    A factor from 1 - beta to 1 + beta. The neutral zone reaches half of `low` and `high` from ratio 1; with `alpha` above 0 it is
    that of AdaptiveClip's widened sides, as in the released code.

    Example:
        >>> from ramulus import Redistribution
        >>> Redistribution(beta=1.0, low=0.2, high=0.28).beta
        1.0
    """

    beta: float = 1.0
    low: float = 0.2
    high: float = 0.28
    alpha: float = 0.0
    signal: EntropySignal = field(default_factory=EntropySignal)
    column: str = "recomputed"

    def __post_init__(self) -> None:
        AdaptiveClip(self.low, self.high, self.alpha, None, self.signal, self.column)
        if not 0 <= self.beta <= 1:
            raise ValueError(
                f"Redistribution's beta must be in [0, 1], got {self.beta}: above 1 credit would change its sign"
            )

    def measure(self, forest: Sequence[Tree], keep: Sequence[Collection[int]]) -> dict[str, float]:
        """What the signal needs of the step."""
        return self.signal.measure(forest, keep)

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        ratio = (logp - logprobs_of(batch, self.column)).clamp(-20, 20).exp()
        h = self.signal(entropy, batch.stats)
        return redistribution(h, ratio, *widths(h, self.low, self.high, self.alpha), self.beta)

    factor = __call__
    clamp = unmoved
