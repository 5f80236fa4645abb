"""Which leaves an optimizer step trains: what each token of theirs weighs, and which are left out since nothing pulls at them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.objective.gate import GateWeights, side_of, weigh
from ramulus.learn.objective.mix import Mix, Term


class TrainedLeaf(NamedTuple):
    """A trained leaf of one term: what each of its learned tokens weighs, and its credit."""

    weight: float
    learned: int  # learned tokens on its path
    leaf: float | None  # credit of the leaf, if it has one value
    token: np.ndarray | None  # [learned] credit of each learned token, root to leaf


def trained_leaves(
    trees: Sequence[Tree], credits: Sequence[Credits], term: Term, share: str, gates: Sequence[GateWeights] | None = None
) -> list[dict[int, TrainedLeaf]]:
    """The trained leaves of one term, per tree by leaf id, with weights that are final for the whole optimizer step."""
    assert term.normaliser is not None  # Mix has seen to it
    counts: list[dict[int, int]] = []
    for tree, credit in zip(trees, credits, strict=True):
        trained, learned = credit.trained(), learned_tokens(tree, term.authors)
        counts.append({leaf: n for leaf, n in learned.items() if n and leaf in trained})
    parts = [
        fork_shares(tree, count) if share == "each_fork" else dict.fromkeys(count, 1.0)
        for tree, count in zip(trees, counts, strict=True)
    ]
    weights = term.normaliser(
        [[(count[leaf], part[leaf]) for leaf in count] for count, part in zip(counts, parts, strict=True)]
    )
    if gates is not None:
        weights = [_gated(*each, term) for each in zip(trees, counts, weights, gates, strict=True)]
    return [
        {leaf: trained_leaf(credit, leaf, n, w) for (leaf, n), w in zip(count.items(), weight, strict=True) if w}
        for credit, count, weight in zip(credits, counts, weights, strict=True)
    ]


def learned_tokens(tree: Tree, authors: Sequence[Author]) -> dict[int, int]:
    """How many tokens of these authors are on the path of each leaf, by leaf id, in preorder."""
    nodes, up, tips = tree.preorder()
    counts: list[int] = []
    for node, above in zip(nodes, up, strict=True):
        counts.append((counts[above] if above >= 0 else 0) + (len(node.tokens) if node.author in authors else 0))
    return {nodes[tip].id: counts[tip] for tip in tips if tip}


def _gated(tree: Tree, count: dict[int, int], weights: Sequence[float], gate: GateWeights, term: Term) -> list[float]:
    """The weights of a tree's trained leaves, in the order of `count`, each times what the gate says of it."""
    by_id = {leaf.id: weigh(leaf, term.side, gate) for leaf in tree.leaves() if leaf.id in count}
    return [weight * by_id[leaf] for leaf, weight in zip(count, weights, strict=True)]


def trained_leaf(credit: Credits, leaf: int, learned: int, weight: float) -> TrainedLeaf:
    """A trained leaf of one term; raises ValueError where its credit does not have one value a learned token."""
    if credit.token is None:
        return TrainedLeaf(weight, learned, credit.leaf[leaf] if credit.node is None else None, None)
    tokens = np.asarray(credit.token[leaf], dtype=np.float64)
    if len(tokens) != learned:
        raise ValueError(f"leaf {leaf} has {learned} learned tokens but its credit holds {len(tokens)} values")
    return TrainedLeaf(weight, learned, None, tokens)


def fork_shares(tree: Tree, trained: dict[int, int]) -> dict[int, float]:
    """Leaf shares split equally at each fork, scaled so that they sum to the number of trained leaves."""
    below: dict[int, int] = {}
    lines = {leaf.id: leaf.line() for leaf in tree.leaves() if leaf.id in trained}
    for line in lines.values():
        for node in line:
            below[node.id] = below.get(node.id, 0) + 1
    answer = {}
    for leaf, line in lines.items():
        part = float(len(lines))
        for node in line[:-1]:
            part /= sum(1 for child in node.children if child.id in below)
        answer[leaf] = part
    return answer


Extra = dict[int, tuple[float, frozenset[Author]]]
"""Leaf id -> what the KL term and the entropy bonus weigh at each of its tokens, and whose tokens those are."""


@dataclass(frozen=True)
class Selection:
    """The leaves that an optimizer step trains: asked once, then read by packing, statistics, annotations and the ledger."""

    terms: list[list[dict[int, TrainedLeaf]]]  # of each term, of each tree, by leaf id
    idle: list[set[int]]  # of each tree, those of them that nothing pulls at and that are left out
    extra: list[Extra] | None = None  # of each tree, where the Mix has a normaliser of its own

    def kept(self) -> list[set[int]]:
        """The leaves to pack, of each tree: trained by some term, and not left out."""
        return [{leaf for term in self.terms for leaf in term[i]} - out for i, out in enumerate(self.idle)]


def select(
    trees: Sequence[Tree],
    credits: Sequence[Sequence[Credits]],
    mix: Mix,
    gates: Sequence[GateWeights] | None = None,
    drop_idle: bool = False,
) -> Selection:
    """Which leaves are trained, with what weights; the arguments are those of `pack`, which packs them.

    Raises ValueError where a mix with a gate is asked without `gates`.
    """
    if mix.gate is not None and gates is None:
        raise ValueError("the mix has a gate: ask mix.gates(forest, state) and hand its answer to pack as gates=...")
    terms = [trained_leaves(trees, credit, term, mix.share, gates) for term, credit in zip(mix.terms, credits, strict=True)]
    left_out = idle(trees, terms, credits, mix) if drop_idle else [set() for _ in trees]
    return Selection(terms, left_out, extras(trees, terms, mix, gates) if mix.normaliser is not None else None)


def extras(trees: Sequence[Tree], terms: Sequence[Trained], mix: Mix, gates: Sequence[GateWeights] | None) -> list[Extra]:
    """The weights of every leaf that some term trains by the Mix's own normaliser: a leaf counts once, times what the gate says of it.

    Where terms of several sides train it, that is the sum of what the gate says of each side, at most 1 or the largest of them.
    """
    assert mix.normaliser is not None
    per_tree: list[dict[int, tuple[float, frozenset[Author], int]]] = []
    for index, tree in enumerate(trees):
        chosen: dict[int, tuple[float, frozenset[Author], int]] = {}
        trained = {leaf: 1 for term in terms for leaf in term[index]}
        parts = fork_shares(tree, trained) if mix.share == "each_fork" else dict.fromkeys(trained, 1.0)
        for leaf in tree.leaves():
            mine = [part for part, term in zip(mix.terms, terms, strict=True) if leaf.id in term[index]]
            if mine:
                opened = 1.0 if gates is None else openings(leaf, mine, gates[index])
                authors = frozenset(author for part in mine for author in part.authors)
                count = sum(len(node.tokens) for node in leaf.line() if node.author in authors)
                chosen[leaf.id] = parts[leaf.id] * opened, authors, count
        per_tree.append(chosen)
    weights = mix.normaliser([[(count, share) for share, _, count in chosen.values()] for chosen in per_tree])
    return [
        {leaf: (weight, authors) for (leaf, (_, authors, _)), weight in zip(chosen.items(), each, strict=True)}
        for chosen, each in zip(per_tree, weights, strict=True)
    ]


def openings(leaf: Node, terms: Sequence[Term], gate: GateWeights) -> float:
    """How far a gate opens a leaf to these terms together: the sum over their sides, at most 1 or the largest of them."""
    weights = [weigh(leaf, side, gate) for side in sorted({side_of(leaf, term.side) for term in terms}, key=str)]
    return min(math.fsum(weights), max(1.0, *weights))


Trained = Sequence[dict[int, TrainedLeaf]]  # of one term, per tree by leaf id


def pulls(leaf: Node, part: TrainedLeaf, credit: Credits, authors: Sequence[object]) -> bool:
    """Whether a trained leaf of a term has credit anywhere on its path."""
    if part.token is not None:
        return bool(part.token.any())
    if part.leaf is not None:
        return part.leaf != 0
    nodes = credit.node or {}
    return any(nodes.get(node.id, 0.0) != 0 for node in leaf.line() if node.author in authors)


def idle(
    trees: Sequence[Tree], terms: Sequence[Trained], credits: Sequence[Sequence[Credits]], mix: Mix
) -> list[set[int]]:
    """The ids of the trained leaves that change nothing, per tree; none where a KL term, an entropy bonus or a value head pulls at all of them.

    Their weights stay in every denominator, so leaving them out is exact.
    """
    if mix.kl_coef or mix.entropy_bonus or mix.value:
        return [set() for _ in trees]
    dropped = []
    for index, tree in enumerate(trees):
        parts = [(leaf, part) for term in terms for leaf, part in term[index].items()]
        rest = {leaf for leaf, _ in parts} - {leaf for leaf, part in parts if part.leaf}
        several = rest & {leaf for leaf, part in parts if part.leaf is None}  # whose credit is not one value a path
        pulled = {
            leaf.id
            for leaf in (tree.leaves() if several else ())
            if leaf.id in several
            and any(
                pulls(leaf, term[index][leaf.id], credit[index], part.authors)
                for part, term, credit in zip(mix.terms, terms, credits, strict=True)
                if leaf.id in term[index]
            )
        }
        dropped.append(rest - pulled)
    return dropped


def idle_entropy(trees: Sequence[Tree], chosen: Selection, mix: Mix) -> dict[str, float]:
    """Sum and number of the sampled entropies on the paths left out: one more row for `gauges.merge`, whose entropy is that of all trained paths."""
    total, count, terms = 0.0, 0, chosen.terms
    for index, (tree, some) in enumerate(zip(trees, chosen.idle, strict=True)):
        for leaf in tree.leaves() if some else ():
            if leaf.id not in some:
                continue
            authors = {
                a for part, term in zip(mix.terms, terms, strict=True) if leaf.id in term[index] for a in part.authors
            }
            for node in leaf.line():
                if node.author in authors and node.entropy:
                    total += sum(node.entropy)
                    count += len(node.entropy)
    return {"entropy/sum": total, "entropy/count": float(count)} if count else {}
