"""What rank 0 tells the ranks to do, and how they do it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramulus.learn.batch.score_row import Scored, ScoreRow
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy.children import portable
from ramulus.learn.policy.in_process import give_back_after, is_large
from ramulus.learn.policy.influence import Influence
from ramulus.learn.policy.learner import Evaluated
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.sharded.checkpoints import read_shards, write_shards
from ramulus.learn.sharded.placing import Spread
from ramulus.learn.sharded.sharded_policy import ShardedPolicy, pad_row
from ramulus.learn.sharded.world import World
from ramulus.native.memory import map_blocks

MAPPED = 2**22  # bytes of a block: layers that are gathered and freed again would leave a fifth of a rank's memory in holes; 4 % of its time
Numbers = Sequence[Mapping[str, Tensor]]
"""By name, of the model and of the reference model if there is one."""


def build_here(
    world: World, structure: dict[str, Any], spread: Spread, threads: int, strict: bool, numbers: Numbers | None = None
) -> ShardedPolicy:
    """This rank's part of a policy; rank 0 has its numbers."""
    if world.rank > 0:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    world.wait_for_others(spread.seconds)
    policy = ShardedPolicy(structure, spread, world.size, numbers)
    world.wait_for_others(spread.seconds, [*policy.mesh.get_all_groups(), *policy.store_mesh.get_all_groups()])
    if spread.device == "cpu" and world.size > 1 and is_large(policy):
        map_blocks(MAPPED)
    return policy


def on_score(policy: ShardedPolicy, rows: Sequence[ScoreRow | None], columns: Sequence[str], influence: Influence | None) -> list[Scored]:
    """Columns of this rank's rows; of a pad nothing that anybody reads."""
    return TorchPolicy.score(policy, [pad_row() if row is None else row for row in rows], columns, influence)


def on_accumulate(policy: ShardedPolicy, mix: Mix, rows: Sequence[TreeBatch | None]) -> list[Evaluated]:
    """Add the gradient of this rank's rows and pads."""
    give_back_after(policy)  # weights that were handed over
    evaluated = [policy.accumulate(mix, row).each(Tensor.cpu) for row in rows]
    give_back_after(policy)
    return evaluated


def on_update(policy: ShardedPolicy, lr: float) -> dict[str, float]:
    """An optimizer step of this rank's shards; the metrics that `update` answers."""
    stats = policy.update(lr)
    give_back_after(policy)  # gradients
    return stats


def on_weights(policy: ShardedPolicy) -> dict[str, Tensor]:
    """All weights, at rank 0."""
    whole = policy.whole(torch.distributed.get_rank() == 0)
    give_back_after(policy)  # what was gathered piece by piece
    return whole


def on_save(policy: ShardedPolicy, folder: Path) -> None:
    """Write this rank's part of a checkpoint."""
    write_shards(policy, folder)


def on_restore(policy: ShardedPolicy, folder: Path, state: dict[str, Any]) -> None:
    """Read this rank's part of one."""
    read_shards(policy, folder, state)


RANK_CALLS: dict[str, Callable[..., Any]] = {
    call.__name__.removeprefix("on_"): call for call in (on_score, on_accumulate, on_update, on_weights, on_save, on_restore)
}
TOGETHER = ("save", "restore")  # an error in these comes to every rank alike, and is answered; one in the others leaves the rest waiting


def obey(world: World) -> None:
    """Do what rank 0 tells until "end". Raises ConnectionError where it is lost."""
    policy: ShardedPolicy | None = None
    while True:
        try:
            name, part = world.hear()
        except RuntimeError as error:
            raise ConnectionError(f"rank {world.rank} has lost rank 0, whose own message says why") from error
        if name == "end":
            return
        if name == "drop":
            policy = None
            continue
        if name == "build":
            policy = build_here(world, *part)
            world.collect((True, None))
            continue
        try:
            answer = True, RANK_CALLS[name](policy, *part)
        except Exception as error:
            if name not in TOGETHER:
                traceback.print_exc()
                raise SystemExit(1) from error
            answer = False, portable(error)
        world.collect(answer)
