"""Leaves whose credit is zero everywhere: they pull at nothing, so they need no forward and no backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ramulus.core.tree import Node, Tree
from ramulus.learn.batch import Credits

if TYPE_CHECKING:
    from ramulus.learn.mix import Mix
    from ramulus.learn.pack import Share

Trained = Sequence[dict[int, "Share"]]  # of one term, per tree by leaf id


def pulls(leaf: Node, part: Share, credit: Credits, authors: Sequence[object]) -> bool:
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
    """The ids of the trained leaves that change nothing, per tree; none where a leash, an entropy bonus or a value head pulls at all of them.

    Their weights stay in every denominator, so leaving them out is exact.
    """
    if mix.leash or mix.entropy_bonus or mix.value:
        return [set() for _ in trees]
    found = []
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
        found.append(rest - pulled)
    return found


def entropy_of(
    trees: Sequence[Tree], left_out: Sequence[set[int]], terms: Sequence[Trained], mix: Mix
) -> dict[str, float]:
    """`idle/entropy` and `idle/tokens`: sum and number of the sampled entropies on the paths left out, for the gauge of all trained tokens."""
    total, count = 0.0, 0
    for index, (tree, some) in enumerate(zip(trees, left_out, strict=True)):
        for leaf in tree.leaves() if some else ():
            if leaf.id not in some:
                continue
            authors = {
                a for part, term in zip(mix.terms, terms, strict=True) if leaf.id in term[index] for a in part.authors
            }
            for node in leaf.line():
                if node.author in authors and node.logprobs:
                    total += sum(node.entropy)
                    count += len(node.entropy)
    return {"idle/entropy": total, "idle/tokens": float(count)} if count else {}
