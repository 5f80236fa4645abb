"""What a value head is regressed to, packed: the returns of all paths below a token, folded as credit is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ramulus.learn.batch import Credits, TreeBatch

if TYPE_CHECKING:
    from ramulus.learn.mix import Mix
    from ramulus.learn.pack import Layout, Share


def regression(value: Tensor, batch: TreeBatch) -> Tensor:
    """Half the weighted squared error of values [T] to each path's targets, as PPO sums it over flattened paths (arXiv 1707.06347, eq. 9).

    The paths below a shared token have one mean target there and a spread around it, which no gradient sees.
    """
    assert batch.target is not None
    assert batch.target_weight is not None
    assert batch.target_spread is not None
    return 0.5 * (batch.target_weight * ((value - batch.target) ** 2 + batch.target_spread)).sum()


def targets(
    row: Layout, mix: Mix, terms: Sequence[Sequence[dict[int, Share]]], credits: Sequence[Sequence[Credits]]
) -> dict[str, np.ndarray]:
    """What a row's values are regressed to [T]: mean target over the trained leaves below, its spread, and their weights' sum."""
    where = {(tree, id(node)): (start, stop) for tree, node, start, stop in row.nodes}
    weight, first, second = np.zeros((3, len(row)))
    for part, term, credit in zip(mix.terms, terms, credits, strict=True):
        for tree, leaf, _ in row.leaves:
            share, given = term[tree].get(leaf.id), credit[tree].target
            if share is None or given is None:
                continue
            wanted, seen = np.asarray(given[leaf.id]), 0
            for node in leaf.line():
                if node.author not in part.authors:
                    continue
                start, stop = where[tree, id(node)]
                here = wanted[seen : seen + stop - start]
                seen += stop - start
                weight[start:stop] += share.weight
                first[start:stop] += share.weight * here
                second[start:stop] += share.weight * here**2
    some = np.where(weight > 0, weight, 1.0)
    mean = first / some
    return {"target": mean, "target_spread": np.maximum(second / some - mean**2, 0.0), "target_weight": weight}
