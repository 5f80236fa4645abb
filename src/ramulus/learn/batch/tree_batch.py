"""The tree as columns: a forest in preorder on one row of T tokens, ready for one forward and backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ramulus.core.tree import Node

Span = tuple[int, int, int, int]
"""(tree, node id, start, stop): the tokens [start, stop) of a row are those of this node of the forest's tree with this number."""


@dataclass(frozen=True)
class Credits:
    """What an advantage answers for one tree; exactly one of the three is given.

    `leaf`: a value per leaf. `node`: a value per node, counted once for every trained leaf below it. `token`: per leaf, a value
    for each of its learned tokens, root to leaf. Keys are node ids; a leaf that is absent or None is excluded: in no gradient,
    denominator, KL or entropy. With `node`, `leaf` says which leaves are trained (any value that is not None).

    Example:
        >>> from ramulus import Credits
        >>> Credits({4: 1.0, 7: None}).trained()
        {4}
    """

    leaf: dict[int, float | None] = field(default_factory=dict)
    node: dict[int, float] | None = None
    token: dict[int, list[float] | None] | None = None
    target: dict[int, list[float]] | None = None  # beside `token`: what a value head should have said of each

    def trained(self) -> set[int]:
        """The ids of the leaves that are trained."""
        values = self.token if self.token is not None else self.leaf
        return {leaf for leaf, value in values.items() if value is not None}

    def along(self, leaf: int, path: Sequence[Node]) -> np.ndarray:
        """The credit of each token of the learned nodes on the path of a trained leaf, [L]."""
        if self.token is not None:
            return np.asarray(self.token[leaf], dtype=np.float64)
        each = [self.leaf[leaf] if self.node is None else self.node.get(node.id, 0.0) for node in path]
        return np.repeat(np.asarray(each, dtype=np.float64), [len(node.tokens) for node in path])


@dataclass
class TreeBatch:
    """A forest in preorder on one row of T tokens with K trained leaves, for M terms of a Mix: tensors and plain numbers, to be pickled.

    Example:
        >>> from ramulus import Author, Behavior, Clip, Estimator, GroupMean, Mix, Task, Term, Tree, pack
        >>> mix, tree = Mix((Term(Estimator(Clip(), Behavior(), GroupMean(std=False))),)), Tree.plant(Task("t", (1, 2), "t"))
        >>> leaves = [tree.add(tree.root, [3], Author.POLICY, logprobs=[-2.5], finish="eos", reward=r) for r in (1.0, 0.0)]
        >>> [batch] = pack([tree], mix.credit([tree]), mix)
        >>> batch.parent.tolist()  # both last tokens are predicted from the end of the prompt
        [0, 0, 1, 1]
    """

    token: Tensor  # [T] long
    position: Tensor  # [T] long, depth in the tree: rotary embeddings are those of the separate sequences
    parent: (
        Tensor  # [T] long, the row index whose logits predict this token; its own index for the first token of a prompt
    )
    end: Tensor  # [T] long, one past the last token below this token's node: k is visible to q iff k <= q < end[k]
    author: Tensor  # [T] long
    node: Tensor  # [T] long, serial of the node in this row
    behavior: Tensor  # [T] log-prob of the tempered distribution before truncation; 0 where not sampled
    kept: Tensor  # [T]
    temperature: Tensor  # [T], 1 where not sampled
    entropy: Tensor  # [T] nats as sampled, 0 where not sampled
    sampled: Tensor  # [T] bool: has the log-prob of a sampler
    weight: Tensor  # [M, T] sum over this row's trained leaves below of share x gate x normaliser
    leaves: Tensor  # [M, T] their number
    gain: Tensor  # [M, T] sum over them of weight x max(A, 0)
    pain: Tensor  # [M, T] sum over them of weight x min(A, 0)
    leaf_token: Tensor  # [K] long, row index of the last token of each trained leaf
    leaf_length: Tensor  # [K] long, response tokens on its path
    leaf_credit: Tensor  # [M, K] mean advantage over its learned tokens
    leaf_weight: Tensor  # [M, K] weight of each of its tokens, 0 where the term does not train it
    version: Tensor | None = None  # [T] long, of the policy that sampled each token; 0 where not sampled
    recomputed: Tensor | None = None  # [T] log-prob of the policy at the start of the step, untempered
    recomputed_tempered: Tensor | None = None  # [T] at the temperature of sampling
    reference_model: Tensor | None = None  # [T] log-prob of the reference model, untempered
    reference_model_tempered: Tensor | None = None  # [T] at the temperature of sampling
    extra_weight: Tensor | None = None  # [T] of the KL term and the entropy bonus; None: the sum of the terms' weights
    target: Tensor | None = None  # [T] what the value is regressed to: the mean over the trained leaves below
    target_spread: Tensor | None = None  # [T] their variance around it
    target_weight: Tensor | None = None  # [T] the sum of their weights
    begins: tuple[str, ...] = ()  # columns that are what the first forward pass on this row says: no update of the step came before it
    spans: list[Span] = field(default_factory=list)  # what stands where; trees are numbered as `pack` was given them
    stats: dict[str, float] = field(default_factory=dict)  # of the whole step, from `Mix.measure`: TERM/NAME

    def __len__(self) -> int:
        return int(self.token.shape[0])

    def to(self, device: torch.device | str) -> TreeBatch:
        """The batch with all tensors on `device`; spans and stats are shared with this one."""
        here: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in here.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def begun(self, tempered: Tensor, plain: Tensor) -> TreeBatch:
        """With the columns that this row's first forward pass gives, from what it says now: log-probs [T] at the temperature of sampling and at 1."""
        logprobs = {"recomputed": plain, "recomputed_tempered": tempered}
        columns: dict[str, Any] = {name: logprobs[name].detach() for name in self.begins}
        return replace(self, begins=(), **columns) if columns else self

    def term(self, m: int) -> TreeBatch:
        """What the estimator of term m sees: the [M, ...] columns reduced to theirs."""
        names = ("weight", "leaves", "gain", "pain", "leaf_credit", "leaf_weight")
        stats = {name.removeprefix(f"{m}/"): v for name, v in self.stats.items() if name.startswith(f"{m}/")}
        return replace(self, stats=stats, **{name: getattr(self, name)[m] for name in names})
