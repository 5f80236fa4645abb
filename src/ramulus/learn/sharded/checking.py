"""What rank 0 finds wrong with rows before any rank begins: an error on one rank alone would leave the others waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ramulus.learn.batch.score_row import ScoreRow
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy.torch_policy import TorchPolicy, can_be_learned, check_beginnings, temperatures
from ramulus.learn.sharded.share import Piece


def weighed(batch: TreeBatch) -> Tensor:
    """[T] bool: what some term weighs."""
    return can_be_learned(batch.author) & (batch.weight != 0).any(0)


def learns(batch: TreeBatch, part: Piece) -> bool:
    """Whether anything of a piece is weighed."""
    return bool(weighed(batch)[part.start : part.stop].any())


@torch.no_grad()
def check_batches(policy: TorchPolicy, mix: Mix, batches: Sequence[TreeBatch]) -> None:
    """Raise what a policy at hand would, of rows to be learned."""
    for batch in batches:
        target = weighed(batch)
        temperatures(batch.temperature, target, mix.tempered)
        check_places(policy, batch, target)
        values = torch.zeros_like(batch.behavior) if policy.critic is not None else None
        mix.loss(batch.behavior, batch.behavior, batch.entropy, batch, values)


def check_rows(policy: TorchPolicy, rows: Sequence[ScoreRow], columns: Sequence[str]) -> None:
    """Raise what a policy at hand would, of rows to be scored."""
    policy.check_kept(columns)
    for row in rows:
        target = can_be_learned(row.author)
        if row.temperature is not None and any(name.endswith("_tempered") for name in columns):
            temperatures(row.temperature, target, True)
        check_places(policy, row, target)


def check_places(policy: TorchPolicy, row: TreeBatch | ScoreRow, target: Tensor) -> None:
    """Raise ValueError for a path that begins with a learned token or is too long for the model."""
    check_beginnings(row.parent, target.nonzero()[:, 0])
    policy.check_depth(int(row.position.max()) + 1 if len(row) else 0)
