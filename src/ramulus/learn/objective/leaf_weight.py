"""Path-level weights: ratios of whole sequences (GSPO, GMPO) and weights of rows (SRFT), computed per leaf and folded down the tree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.reference import ColumnReader, logprobs_of


class Leaf(ColumnReader, Protocol):
    """(sign of the advantage, log-probs [T], entropy [T], a term's batch) -> factor of each leaf's credit [K], at least 0.

    Example:
        >>> import torch
        >>> from ramulus import Behavior, Clip, Estimator, GroupMean
        >>> def halved(sign, logp, entropy, batch):  # any callable is one; this one takes what is wrong half as seriously
        ...     return torch.ones_like(batch.leaf_weight) * (1.0 if sign > 0 else 0.5)
        >>> Estimator(Clip(), Behavior(), GroupMean(), halved).columns
        {'behavior'}
    """

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor: ...

    def potential(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor | None:
        """What the textbook loss multiplies a leaf's weight times credit by [K], where it is differentiated through the factor; else None."""
        return None


def along(x: Tensor, batch: TreeBatch) -> Tensor:
    """x [T] -> its sum over the learned tokens of each leaf's path [K], in O(T + K).

    A running sum in preorder adds each token where it stands and takes it off where its subtree ends; in float64, as sums of
    other paths come and go in it.
    """
    own = torch.where(batch.leaves > 0, x, torch.zeros_like(x)).double()
    steps = torch.cat([own, own.new_zeros(1)]).index_add(0, batch.end, -own)
    return steps.cumsum(0)[batch.leaf_token].to(x.dtype)


def fold(v: Tensor, batch: TreeBatch) -> Tensor:
    """v [K] -> at each learned token the sum over the leaves below it [T]: those with t <= leaf_token < end[t]."""
    placed = v.new_zeros(len(batch) + 1, dtype=torch.float64).index_add(0, batch.leaf_token + 1, v.double())
    before = placed.cumsum(0)
    index = torch.arange(len(batch), device=v.device)
    return ((before[batch.end] - before[index]) * (batch.leaves > 0)).to(v.dtype)


def mean_along(x: Tensor, batch: TreeBatch) -> Tensor:
    """x [T] -> its mean over the learned tokens of each leaf's path [K]; 0 where there are none."""
    return along(x, batch) / along(torch.ones_like(x), batch).clamp(min=1)


@dataclass(frozen=True)
class SequenceRatio:
    """GSPO: the geometric mean of a path's token ratios, clipped as one number (arXiv 2507.18071, eqs. 5-7).

    Goes with Everything() and Itself(): the factor is the ratio where it is inside the clip, else 0.

    Example:
        >>> from ramulus import Author, Constant, Estimator, Everything, Itself, Mix, SequenceRatio, Task, Term, Tree, pack
        >>> mix, tree = Mix((Term(Estimator(Everything(), Itself(), Constant(), SequenceRatio())),)), Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2, 3], Author.POLICY, logprobs=[-1.0, -2.0], finish="eos", reward=1.0)
        >>> [batch] = pack([tree], mix.credit([tree]), mix)
        >>> moved = batch.behavior + torch.tensor([0.0, 0.2, 0.4])  # the prompt, and two tokens that have become more probable
        >>> round(float(SequenceRatio().ratio(moved, batch.term(0))), 3)
        1.35
    """

    low: float = 3e-4
    high: float = 4e-4
    column: str = "behavior"

    def __post_init__(self) -> None:
        Clip(self.low, self.high, self.column)  # it checks its values

    def ratio(self, logp: Tensor, batch: TreeBatch) -> Tensor:
        """The geometric mean [K] of the token ratios of each leaf's path."""
        return mean_along(logp - logprobs_of(batch, self.column), batch).clamp(-20, 20).exp()

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        ratio = self.ratio(logp, batch)
        return ratio * (ratio <= 1 + self.high if sign > 0 else ratio >= 1 - self.low)

    def potential(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """The clipped ratio [K] of each leaf's path."""
        ratio = self.ratio(logp, batch)
        return ratio.clamp(max=1 + self.high) if sign > 0 else ratio.clamp(min=1 - self.low)


CLIP = Clip(low=1 - math.exp(-0.4), high=math.exp(0.4) - 1)


@dataclass(frozen=True)
class GeometricMean:
    """GMPO: the geometric mean of a path's token ratios, each clipped first (arXiv 2507.20673, eq. 4).

    Goes with the same Clip as mask, which takes the gradient of the clipped tokens, and with Itself(). The paper's range is [e^-0.4, e^0.4].

    Example:
        >>> from ramulus import Author, Constant, Estimator, Clip, Everything, GeometricMean, Itself, Mix, Task, Term, Tree, pack
        >>> mix, tree = Mix((Term(Estimator(Clip(0.2, 0.2), Itself(), Constant(), GeometricMean(Clip(0.2, 0.2)))),)), Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2, 3], Author.POLICY, logprobs=[-1.0, -2.0], finish="eos", reward=1.0)
        >>> [batch] = pack([tree], mix.credit([tree]), mix)
        >>> moved = batch.behavior + torch.tensor([0.0, 0.0, 1.0])  # the second token is cut off at a ratio of 1.2
        >>> round(float(GeometricMean(Clip(0.2, 0.2))(1, moved, batch.entropy, batch.term(0))), 3)
        1.095
    """

    clip: Clip = CLIP

    @property
    def column(self) -> str:
        """What the clip reads."""
        return self.clip.column

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        apart = self.clip.clamp(sign, logp, entropy, batch) - logprobs_of(batch, self.column)
        return mean_along(apart, batch).clamp(-20, 20).exp()

    def potential(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        """The geometric mean [K], as the weight itself."""
        return self(sign, logp, entropy, batch)


@dataclass(frozen=True)
class EntropyWeight:
    """SRFT: `scale` x exp(`slope` x mean entropy of the path), a constant of the gradient; 1 for negative credit (arXiv 2506.19767, eqs. 7-10).

    (0.5, -1) on demonstrations, (0.1, +1) on the policy's own right paths.

    Example:
        >>> from ramulus import Author, Constant, Estimator, EntropyWeight, Everything, Itself, Mix, Task, Term, Tree, pack
        >>> mix, tree = Mix((Term(Estimator(Everything(), Itself(), Constant(), EntropyWeight(0.1, 1.0))),)), Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2, 3], Author.POLICY, logprobs=[-1.0, -2.0], finish="eos", reward=1.0)
        >>> [batch] = pack([tree], mix.credit([tree]), mix)
        >>> entropy = torch.tensor([0.0, 0.5, 1.5])  # the mean along the path is 1 nat
        >>> round(float(EntropyWeight(0.1, 1.0)(1, batch.behavior, entropy, batch.term(0))), 3)
        0.272
    """

    scale: float
    slope: float

    def __call__(self, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor:
        if sign < 0:
            return torch.ones_like(batch.leaf_weight)
        return self.scale * (self.slope * mean_along(entropy, batch)).exp()
