"""Masks that weigh tokens instead of clipping their ratio, and the product of several masks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ramulus.core.recipe_part import with_defaults
from ramulus.core.share import at_least
from ramulus.core.tree import Author, Tree
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.entropy_signal import flattened
from ramulus.learn.objective.mask import Mask, unmoved
from ramulus.learn.objective.reference import logprobs_of


@dataclass(frozen=True)
class Product:
    """Several masks at once: a token is trusted as far as all of them trust it.

    Example:
        >>> from ramulus import Clip, HighEntropy, Product
        >>> len(Product((Clip(), HighEntropy(share=0.2))).parts)
        2
    """

    parts: tuple[Any, ...]  # Masks

    def __post_init__(self) -> None:
        if not self.parts or len(self.columns) > 1:
            raise ValueError(f"a Product multiplies masks that take their ratio against one column, got {self.parts}")

    @property
    def masks(self) -> list[Mask]:
        """The parts, with what they leave unsaid."""
        return [with_defaults(part, Mask) for part in self.parts]

    @property
    def columns(self) -> set[str]:
        """The log-prob columns that the parts take ratios against."""
        return {mask.column for mask in self.masks if mask.column is not None}

    @property
    def column(self) -> str | None:
        """The one column that the parts take ratios against; None where none reads one."""
        return next(iter(self.columns), None)

    def column_of(self, author: Author) -> str | None:
        """What some part reads at the tokens of one author; None where none does."""
        return next((column for mask in self.masks if (column := mask.column_of(author)) is not None), None)

    def measure(self, forest: Sequence[Tree], keep: Sequence[Collection[int]]) -> dict[str, float]:
        """What the parts need of the step; a signal that several of them share is measured once."""
        sources = dict.fromkeys(mask.signal or part for part, mask in zip(self.parts, self.masks, strict=True) if mask.measure is not None)
        return {name: value for source in sources for name, value in source.measure(forest, keep).items()}

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        answer = torch.ones_like(logp)
        for part in self.parts:
            answer = answer * part(sign, logp, entropy, batch)
        return answer

    def factor(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """What the textbook loss is multiplied by."""
        answer = torch.ones_like(logp)
        for mask in self.masks:
            answer = answer * mask.factor(sign, logp, entropy, batch)
        return answer

    def clamp(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor | None:
        """Log-probs moved to the edge of the region that all parts trust; None where one of them does not know it."""
        moved = logp
        for mask in self.masks:
            edge = mask.clamp(sign, logp, entropy, batch)
            if edge is None:
                return None
            moved = torch.where((edge - logp).abs() > (moved - logp).abs(), edge, moved)
        return moved


@dataclass(frozen=True)
class HighEntropy:
    """Only the forking tokens: the `share` of the step's trained tokens that were sampled at the highest entropy (arXiv 2506.01939).

    As many as `share` of them, rounded up; over the whole step, each token counted as often as trained leaves lie below it. Tokens of one
    entropy, such as one token below several leaves, are in or out together: those at the threshold are in. Denominators stay those of all tokens,
    unless `rescale`: then the sampled tokens that are chosen share the weight of all sampled ones. 1 on tokens that the policy did not write,
    which were not sampled: they are neither counted nor rescaled.

    Example:
        >>> from ramulus import Clip, HighEntropy, Product
        >>> len(Product((Clip(), HighEntropy(0.2))).parts)
        2
    """

    share: float = 0.2
    rescale: bool = False
    records: ClassVar[tuple[str, ...]] = ("entropy",)  # what an engine must record for it

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"HighEntropy's share must be in (0, 1], got {self.share}")

    def measure(self, forest: Sequence[Tree], keep: Sequence[Collection[int]]) -> dict[str, float]:
        """The threshold in nats, and the share of tokens at or above it; 0 and 1 where no sampled token is trained."""
        entropy, counts = flattened(forest, keep)
        threshold, chosen = 0.0, 1.0
        if len(entropy):
            order = np.argsort(-entropy, kind="stable")
            wanted = at_least(self.share, int(counts.sum()))
            threshold = float(entropy[order[np.searchsorted(np.cumsum(counts[order]), wanted)]])
            chosen = float(counts[entropy >= threshold].sum() / counts.sum())
        return {f"forks/{self.share:g}/threshold": threshold, f"forks/{self.share:g}/share": chosen}

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        if f"forks/{self.share:g}/threshold" not in batch.stats:
            raise ValueError(f"the batch holds no statistics for {self}: pack with a mix whose mask measures them")
        # a float32 column rounds to either side of a threshold in float64: compare as rounded
        threshold = batch.entropy.new_tensor(batch.stats[f"forks/{self.share:g}/threshold"])
        chosen = (batch.entropy >= threshold).to(logp.dtype)
        chosen = chosen / batch.stats[f"forks/{self.share:g}/share"] if self.rescale else chosen
        return torch.where(batch.author == int(Author.POLICY), chosen, 1.0)

    factor = __call__
    clamp = unmoved


@dataclass(frozen=True)
class ImportanceWeight:
    """The recomputed policy over the distribution that really sampled the token, both at the start of the step, at most `cap`.

    Truncated importance sampling (arXiv 1802.01561): it makes `Recomputed`, which pretends that the untempered policy sampled, right in
    expectation per token as far as the cap lets it; under `recomputed_tempered` it corrects for the engine's arithmetic alone. 1 on tokens that
    the policy did not write. Truncation by top-p and the like is not undone.

    Example:
        >>> from ramulus import ImportanceWeight
        >>> ImportanceWeight(cap=2.0).cap
        2.0
    """

    cap: float = 2.0
    column: ClassVar[str | None] = "recomputed"

    def __post_init__(self) -> None:
        if not self.cap >= 1:
            raise ValueError(f"ImportanceWeight's cap must be at least 1, got {self.cap}")

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        return torch.where(batch.author == int(Author.POLICY), sampler_weight(batch).clamp(max=self.cap), 1.0)

    factor = __call__
    clamp = unmoved


@dataclass(frozen=True)
class IcePop:
    """The recomputed policy over the distribution that sampled a token, 0 outside [low, high]: tokens on which both are far apart are left out.

    IcePop, token-level masked importance sampling, as OpenRLHF, slime, verl and NeMo-RL have it. They stay in the denominators. Usual with
    `recomputed_tempered`, so that the weight is the engine's arithmetic alone. 1 on tokens that the policy did not write.

    Example:
        >>> from ramulus import Clip, IcePop, Product
        >>> Product((Clip(column="recomputed"), IcePop(low=0.5, high=5.0))).column
        'recomputed'
    """

    low: float = 0.5
    high: float = 5.0
    column: ClassVar[str | None] = "recomputed"

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(f"IcePop needs 0 <= low <= 1 <= high, got low={self.low} and high={self.high}")

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        weight = sampler_weight(batch)
        kept = torch.where((weight >= self.low) & (weight <= self.high), weight, 0.0)
        return torch.where(batch.author == int(Author.POLICY), kept, 1.0)

    factor = __call__
    clamp = unmoved


def sampler_weight(batch: TreeBatch) -> Tensor:
    """The recomputed policy over the distribution that sampled each token [T]; 1 where nothing was recorded."""
    return (logprobs_of(batch, "recomputed") - batch.behavior).clamp(-20, 20).exp()
