"""A forest scored: its rows to whoever holds the weights, the columns back into its nodes' signals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

from ramulus.core.tree import Tree
from ramulus.learn.batch.score_row import ROW, Scored, ScoreRow, lacking, nodes_of, score_rows, write_back
from ramulus.learn.policy.influence import Influence
from ramulus.learn.policy.learner import Learner
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.native.memory import OutOfMemory

SCORED = ("recomputed", "recomputed_tempered", "reference_model", "reference_model_tempered", "value")


async def score(
    learner: Learner,
    forest: Sequence[Tree],
    columns: Collection[str],
    influence: Influence | None = None,
    known: Collection[str] = (),
    tokens: int = ROW,
) -> int:
    """Have a forest scored and write the columns into its nodes' signals; names that no learner computes are left alone.

    `tokens` of a row are tried first; returns those that memory held.

    `influence` is read in the forward pass of "recomputed", or in one of its own. Columns in `known` stay where nodes have them, by the same
    weights, and only paths that lack some are passed.
    """
    before = 2**62
    while True:
        try:
            for rows, names, watched, take in passes(forest, columns, influence, known, tokens):
                take(await learner.score(rows, names, watched))
            return tokens
        except OutOfMemory:
            failed = max(map(len, rows))
            if failed >= before:  # it holds one path
                raise
        before, tokens = failed, failed // 2
        text = f"memory did not hold {failed:,} tokens while log-probs were computed again: this is done with at most half of them at once"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def score_now(
    policy: TorchPolicy, forest: Sequence[Tree], columns: Collection[str], influence: Influence | None = None, **options: Any
) -> None:
    """As `score`, by a policy at hand and without an event loop: for notebooks and loops of one's own."""
    for rows, names, watched, take in passes(forest, columns, influence, **options):
        take(policy.score(rows, names, watched))


_Pass = tuple[list[ScoreRow], list[str], Influence | None, Callable[[Sequence[Scored]], None]]
"""Rows, the columns to ask for, and what takes the answer."""


def passes(
    forest: Sequence[Tree],
    columns: Collection[str],
    influence: Influence | None = None,
    known: Collection[str] = (),
    tokens: int = ROW,
) -> Iterator[_Pass]:
    """What to ask a learner for; each is to be answered before the next is drawn."""
    wanted = [name for name in SCORED if name in columns]
    held = [name for name in wanted if name in known and influence is None]
    nodes = nodes_of(forest) if wanted or influence is not None else []
    for name in held:
        rows = score_rows(forest, lacking(forest, name), tokens)
        yield rows, [name], None, partial(write_back, nodes, rows, again=False)
    wanted = [name for name in wanted if name not in held]
    if wanted or influence is not None:
        rows = score_rows(forest, None, tokens)
        yield rows, wanted, influence, partial(write_back, nodes, rows)
