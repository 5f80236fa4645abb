"""Weights and credits of leaves, folded down their paths onto the tokens of a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ramulus.core.tree import Author
from ramulus.learn.batch.layout import Layout
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.objective.mix import Mix
from ramulus.learn.packing.weights import Extra, TrainedLeaf


def fold_down(
    row: Layout, term: list[dict[int, TrainedLeaf]], credits: Sequence[Credits], authors: Sequence[Author]
) -> dict[str, np.ndarray]:
    """One term on one row: weight, leaves, gain and pain [T]; credit and weight per leaf [K]."""
    parts = [term[tree].get(leaf.id) for tree, leaf, _ in row.leaves]
    learned = np.isin(row.authors, authors)
    trained = np.array([part is not None for part in parts], dtype=bool)
    leaf, node = row.pairs
    both = learned[node] & trained[leaf]
    leaf, node = leaf[both], node[both]  # every learned node under every trained leaf
    leaf_weight = np.array([part.weight if part else 0.0 for part in parts])
    weight, value = leaf_weight[leaf], values(row, parts, credits, leaf, node)
    count, size = len(row.nodes), row.sizes()
    by_pair = (
        weight,
        np.ones(len(node)),
        np.where(value > 0, weight * value, 0.0),
        np.where(value > 0, 0.0, weight * value),
    )
    by_token = np.repeat([np.bincount(node, column, count) for column in by_pair], size, axis=1)
    tokens = np.bincount(leaf, size[node], len(parts))
    credit_sum = np.bincount(leaf, value * size[node], len(parts))
    for k, part in enumerate(parts):
        if part is not None and part.token is not None:
            credit_sum[k] = fold_tokens(row, [i for i in row.paths[k].tolist() if learned[i]], part, by_token[2], by_token[3])
    folded = dict(zip(("weight", "leaves", "gain", "pain"), by_token, strict=True))
    return folded | {"leaf_credit": credit_sum / np.maximum(tokens, 1), "leaf_weight": leaf_weight}


def fold_extra(row: Layout, extra: Sequence[Extra]) -> np.ndarray:
    """What the KL term and the entropy bonus weigh at each token [T], by a normaliser of their own."""
    weight = np.zeros(len(row.nodes))
    for (tree, leaf, _), path in zip(row.leaves, row.paths, strict=True):
        if leaf.id in extra[tree]:
            mine, authors = extra[tree][leaf.id]
            weight[path[np.isin(row.authors[path], list(authors))]] += mine
    return np.repeat(weight, row.sizes())


def values(
    row: Layout, parts: Sequence[TrainedLeaf | None], credits: Sequence[Credits], leaf: np.ndarray, node: np.ndarray
) -> np.ndarray:
    """The credit of each pair of a trained leaf and a learned node above it; 0 where it differs from token to token."""
    value = np.array([part.leaf if part and part.leaf is not None else 0.0 for part in parts], dtype=np.float64)[leaf]
    if all(credit.node is None for credit in credits):
        return value
    own = np.array([(credits[tree].node or {}).get(one.id, 0.0) for tree, one, _, _ in row.nodes], dtype=np.float64)
    return np.where(
        np.array([part is not None and part.leaf is None for part in parts], dtype=bool)[leaf], own[node], value
    )


def fold_tokens(row: Layout, along: Sequence[int], part: TrainedLeaf, gain: np.ndarray, pain: np.ndarray) -> float:
    """Add a leaf's token credits to gain and pain [T] of the nodes `along` its path; returns their sum."""
    assert part.token is not None
    earned, seen = 0.0, 0
    for index in along:
        start, stop = row.nodes[index][2:]
        here = part.token[seen : seen + stop - start]
        gain[start:stop] += part.weight * np.maximum(here, 0)
        pain[start:stop] += part.weight * np.minimum(here, 0)
        earned += float(here.sum())
        seen += stop - start
    return earned


def targets(
    row: Layout, mix: Mix, terms: Sequence[Sequence[dict[int, TrainedLeaf]]], credits: Sequence[Sequence[Credits]]
) -> dict[str, np.ndarray]:
    """What a row's values are regressed to [T]: mean target over the trained leaves below, its spread, and their weights' sum."""
    where = {(tree, id(node)): (start, stop) for tree, node, start, stop in row.nodes}
    weight, first, second = np.zeros((3, len(row)))
    for part, term, credit in zip(mix.terms, terms, credits, strict=True):
        for tree, leaf, _ in row.leaves:
            trained, target = term[tree].get(leaf.id), credit[tree].target
            if trained is None or target is None:
                continue
            wanted, seen = np.asarray(target[leaf.id]), 0
            for node in leaf.line():
                if node.author not in part.authors:
                    continue
                start, stop = where[tree, id(node)]
                here = wanted[seen : seen + stop - start]
                seen += stop - start
                weight[start:stop] += trained.weight
                first[start:stop] += trained.weight * here
                second[start:stop] += trained.weight * here**2
    some = np.where(weight > 0, weight, 1.0)
    mean = first / some
    return {"target": mean, "target_spread": np.maximum(second / some - mean**2, 0.0), "target_weight": weight}
