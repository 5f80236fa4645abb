"""Tree to columns: lay a forest out in preorder on rows within a token budget, with what each leaf weighs and earns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from ramulus.core.tree import Author, Tree
from ramulus.learn.batch.layout import Layout, lay_out
from ramulus.learn.batch.tree_batch import Credits, TreeBatch
from ramulus.learn.objective.gate import GateWeights
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.packing.fold import fold_down, fold_extra, targets
from ramulus.learn.packing.weights import Selection, select

LOGPROBS = ("recomputed", "recomputed_tempered", "reference_model", "reference_model_tempered")


def pack(
    trees: Sequence[Tree],
    credits: Sequence[Sequence[Credits]],
    mix: Mix,
    tokens_per_batch: int = 0,
    dtype: torch.dtype = torch.float32,
    stats: dict[str, float] | None = None,
    gates: Sequence[GateWeights] | None = None,
    drop_idle: bool = False,
    selection: Selection | None = None,
    begins: Collection[str] = (),
) -> list[TreeBatch]:
    """The trees of one optimizer step as rows of at most `tokens_per_batch` tokens; leaves that no term trains are left out.

    With `drop_idle` so are leaves without any credit, unless a KL term or an entropy bonus pulls at them: gradients stay the same.

    `credits` holds one Credits per term and tree. Denominators are those of all `trees`, so results do not depend on the cutting.
    `stats` is what `mix.measure` answered for the whole forest where `trees` are a part of it; None measures `trees`.
    `gates` holds what `mix.gates` answered for each tree; leaves that the gate closes are left out as well. Raises ValueError where a mix with
    a gate is packed without. `selection` is what `select` answered for the same arguments, where somebody has asked it already.
    `begins` names columns that no tree was scored for, as the first forward pass on the rows gives them (`TreeBatch.begun`).
    """
    chosen = select(trees, credits, mix, gates, drop_idle) if selection is None else selection
    stats = mix.measure(trees, chosen.terms) if stats is None else stats
    rows = lay_out(trees, chosen.kept(), tokens_per_batch)
    return [replace(columns(row, chosen, credits, mix, dtype, begins), stats=stats) for row in rows]


def columns(
    row: Layout, chosen: Selection, credits: Sequence[Sequence[Credits]], mix: Mix, dtype: torch.dtype, begins: Collection[str] = ()
) -> TreeBatch:
    """One row's TreeBatch: its layout, and every term's weights and credits folded down the paths of the row's own leaves."""
    terms, scored = chosen.terms, mix.columns.difference(begins)
    folded = [
        fold_down(row, term, credit, part.authors) for part, term, credit in zip(mix.terms, terms, credits, strict=True)
    ]
    for part, one in zip(mix.terms, folded, strict=True):
        if "behavior" in part.estimator.columns:
            check_sampled(row, one["leaves"], part)
    parts: dict[str, Any] = {
        name: torch.from_numpy(np.stack([f[name] for f in folded])).to(dtype)
        for name in ("weight", "leaves", "gain", "pain", "leaf_credit", "leaf_weight")
    }
    parts |= {name: torch.from_numpy(column).to(dtype) for name, column in row.sampled().items()}
    parts |= {name: torch.from_numpy(row.signal(name)).to(dtype) for name in LOGPROBS if name in scored}
    if chosen.extra is not None:
        parts["extra_weight"] = torch.from_numpy(fold_extra(row, chosen.extra)).to(dtype)
    if mix.value:
        parts |= {
            name: torch.from_numpy(column).to(dtype) for name, column in targets(row, mix, terms, credits).items()
        }
    whole = {name: getattr(row, name) for name in ("token", "position", "parent")}
    nodes = row.known[0]
    each = row.ends, row.authors, np.arange(len(nodes)), np.fromiter(map(attrgetter("version"), nodes), np.int64, len(nodes))
    spread = row.spread(np.stack(each), np.int64)
    whole |= dict(zip(("end", "author", "node", "version"), (*spread[:3], by_token(spread[3], row)), strict=True))
    whole |= {
        "sampled": row.spread(row.drawn, np.bool_),
        "leaf_token": row.lasts,
        "leaf_length": response_lengths(row),
    }
    parts |= {name: torch.from_numpy(column) for name, column in whole.items()}
    return TreeBatch(**parts, begins=tuple(sorted(begins)), spans=row.spans)


def by_token(version: np.ndarray, row: Layout) -> np.ndarray:
    """The versions [T] of nodes, with those of the tokens of nodes that several sampled."""
    nodes, starts, _ = row.known
    for node, start in [(node, start) for node, start in zip(nodes, starts, strict=True) if node.versions is not None]:
        version[start : start + len(node.tokens)] = node.versions
    return version


def check_sampled(row: Layout, leaves: np.ndarray, term: Term) -> None:
    """Raise ValueError where a token that is trained against the sampler (`leaves` [T] > 0) was not sampled: its ratio would be its probability."""
    nodes, starts, sizes = row.known
    strange = np.flatnonzero((sizes > 0) & ~row.drawn)
    for number in strange[leaves[starts[strange]] > 0]:
        node = nodes[number]
        if "behavior" in term.estimator.reads(node.author):
            raise ValueError(
                f"node {node.id}, written by {node.author.name}, has no log-probs of a sampler, which Behavior and column='behavior' read: "
                "use Itself() with Everything(), or Recomputed() with column='recomputed', for tokens that were not sampled"
            )


def response_lengths(row: Layout) -> np.ndarray:
    """[K] response tokens on the path of each leaf."""
    size = np.where(row.authors == Author.PROMPT, 0, row.sizes())
    leaf, node = row.pairs
    return np.bincount(leaf, size[node], len(row.tips)).astype(np.int64)
