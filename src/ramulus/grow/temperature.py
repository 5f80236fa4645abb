"""Temperatures that depend on the token: HAPO's, by the entropy of the next-token distribution (arXiv 2509.16591)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar, Literal

import numpy as np

from ramulus.core.tree import Author, Tree

SMALLEST = 1e-8  # nats; entropies of a step below it count as it, as in the released code
STATS = ("pivot", "rms", "above", "below")  # what a step is measured by
_BASES = (1e-20, 1e20)  # that float32 holds, and all temperatures by them
_APART = 1e-6  # of tau's product from 1, so that float32 does not round temperatures to 0
_SAMPLED = 1e-6  # nats; the same for the token to be sampled


@dataclass(frozen=True)
class ByEntropy:
    """Hotter where the model wavers, colder where it is sure: base (1 + tau x), by log-entropy against the step before (arXiv 2509.16591, eq. 8).

    x is the distance from the pivot, a quantile of log-entropy: "zscore" by the root mean square distance, held in [-limit, limit];
    "signed" by that of the most extreme token on its side, in [-1, 1]; "released" the size of that, as the released code does by a slip.
    `stats` are numbers of the step before, from `measure`; None (the first step) samples at `base`. They count every sampled token once, also
    one that several paths share: they describe what the sampler meets, and no gradient is taken from them.

    Example:
        >>> from ramulus import ByEntropy, Sampling
        >>> Sampling(512, temperature=ByEntropy(tau=0.1)).temperature.tau
        0.1
    """

    base: float = 1.0
    tau: float = 0.1
    pivot: float = 0.8
    kind: Literal["zscore", "signed", "released"] = "zscore"
    limit: float = 5.0
    stats: dict[str, float] | None = None
    features: ClassVar[frozenset[str]] = frozenset({"of_entropy", "positive", "stats"})
    records: ClassVar[tuple[str, ...]] = ("entropy",)  # what an engine must record for it

    def __post_init__(self) -> None:
        if not _BASES[0] <= self.base <= _BASES[1] or not 0 <= self.pivot <= 1:
            least, most = _BASES
            raise ValueError(f"ByEntropy needs base above 0 ({least:g} to {most:g}) and a pivot in [0, 1], got {self.base} and {self.pivot}")
        if self.kind not in ("zscore", "signed", "released"):
            raise ValueError(f"ByEntropy's kind is 'zscore', 'signed' or 'released', got {self.kind!r}")
        most = self.limit if self.kind == "zscore" else 1.0
        if not (most > 0 and 0 <= self.tau * most <= 1 - _APART):
            raise ValueError(
                f"ByEntropy's temperature must stay above 0: tau * {most:g} must be in [0, {1 - _APART:g}], got tau={self.tau}"
            )
        if self.stats is not None:
            self.check(self.stats)

    def check(self, stats: Any) -> None:
        """Raise ValueError for stats that are none of `measure`'s, so that no token is asked of them."""
        needed = ("pivot", "rms") if self.kind == "zscore" else STATS
        if not isinstance(stats, Mapping) or not set(needed) <= set(stats) <= set(STATS):
            raise ValueError(f"ByEntropy's stats are numbers named {', '.join(STATS)} (None for the first step), got {stats!r}")
        for name, value in stats.items():
            if not isinstance(value, Real) or not math.isfinite(value) or (name != "pivot" and value < 0):
                raise ValueError(f"ByEntropy's stats must be finite, and but for pivot at least 0, got {name}={value!r}: take them from measure")

    def measure(self, forest: Sequence[Tree]) -> dict[str, float] | None:
        """Plain JSON for the next step's `stats`: pivot and scales of the policy's tokens; None where nothing was sampled."""
        nodes = [node for tree in forest for node in tree.walk() if node.author is Author.POLICY]
        if without := [node.id for node in nodes if node.logprobs and node.entropy is None]:
            raise ValueError(f"node {without[0]} has no recorded entropies for ByEntropy to measure: sample with an engine that records them")
        entropies = [np.asarray(node.entropy, dtype=np.float64) for node in nodes if node.entropy]
        return self.statistics(np.concatenate(entropies)) if entropies else None

    def statistics(self, entropy: Sequence[float] | np.ndarray) -> dict[str, float]:
        """Entropies [N] > 0 in number -> pivot, root mean square distance from it, and what turns distances in them into [-1, 1] on both sides."""
        logs = np.sort(np.log(np.maximum(entropy, SMALLEST)))
        pivot = float(logs[round(self.pivot * (len(logs) - 1))])
        rms = math.sqrt(max(float(np.mean((logs - pivot) ** 2)), 1e-8))
        above, below = (max(float(side) / rms, 1e-8) for side in (logs[-1] - pivot, pivot - logs[0]))
        return {"pivot": pivot, "rms": rms, "above": 1 / above, "below": 1 / below}

    def given(self, stats: dict[str, float] | None) -> ByEntropy:
        """This rule with the numbers of the step before."""
        return replace(self, stats=stats)

    def __call__(self, logits: Any) -> Any:
        """logits [B, V] -> temperatures [B]."""
        logp = logits.log_softmax(-1)
        return self.of_entropy(-(logp.exp() * logp.clamp(min=-1e4)).sum(-1))  # a token of probability 0 has no share

    def of_entropy(self, entropy: Any) -> Any:
        """Entropies [B] in nats, of the untempered distributions -> temperatures [B]; engines that have them at hand call this."""
        if self.stats is None:
            return entropy.new_full(entropy.shape, self.base)
        apart = (entropy.clamp(min=_SAMPLED).log() - self.stats["pivot"]) / (self.stats["rms"] + 1e-6)
        if self.kind == "zscore":
            return self.base * (1 + self.tau * apart.clamp(-self.limit, self.limit))
        h = (apart.clamp(min=0) * self.stats["above"] + apart.clamp(max=0) * self.stats["below"]).clamp(-1, 1)
        return self.base * (1 + self.tau * (h.abs() if self.kind == "released" else h))
