"""Credit written into trees, so that whoever reads them later sees what each path and token was worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.batch.layout import column_of
from ramulus.learn.batch.score_row import Nodes
from ramulus.learn.batch.tree_batch import Credits, TreeBatch
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.packing.weights import Selection, TrainedLeaf


def names(mix: Mix) -> list[str]:
    """What each term's credit is called: `credit/` and its advantage, numbered from the second of the same on."""
    kinds = [type(term.estimator.advantage).__name__ for term in mix.terms]
    again = [kinds[:i].count(kind) + 1 for i, kind in enumerate(kinds)]
    return [f"credit/{kind}" if nth == 1 else f"credit/{kind}/{nth}" for kind, nth in zip(kinds, again, strict=True)]


def annotate(forest: Sequence[Tree], mix: Mix, credits: Sequence[Sequence[Credits]], selection: Selection) -> None:
    """Write each term's credit into `verdict` of the leaves it trains: the mean over their learned tokens, as a float.

    Where credit differs along a path, `signals` of its nodes hold it too: [L], the mean over the trained leaves below; nodes with
    no learned token have none. `credits` is what `mix.credit` answered, `selection` what `select` did. No reward, token or log-prob is touched.
    """
    for name, term, answers, trees in zip(names(mix), mix.terms, credits, selection.terms, strict=True):
        for tree, answer, trained in zip(forest, answers, trees, strict=True):
            annotate_tree(tree, answer, trained, term, name)


def annotate_tree(tree: Tree, answer: Credits, trained: dict[int, TrainedLeaf], term: Term, name: str) -> None:
    """One term's credit on one tree."""
    below: dict[int, list[np.ndarray]] = {}
    nodes: dict[int, Node] = {}
    for leaf in tree.leaves():
        part = trained.get(leaf.id)
        if part is None:
            continue
        if part.leaf is not None:  # one value for the whole path
            leaf.verdict[name] = float(part.leaf)
            continue
        along = [node for node in leaf.line() if node.author in term.authors and node.tokens]
        values = np.split(answer.along(leaf.id, along), np.cumsum([len(node.tokens) for node in along])[:-1])
        leaf.verdict[name] = float(np.concatenate(values).mean())
        for node, value in zip(along, values, strict=True):
            nodes[node.id] = node
            below.setdefault(node.id, []).append(value)
    if answer.node is not None or answer.token is not None:
        for number, node in nodes.items():
            node.signals[name] = column_of(np.mean(below[number], axis=0))


def annotate_ratio(nodes: Nodes, batch: TreeBatch, tempered: Tensor) -> None:
    """Write into `signals["ratio"]` [L] of a row's trained, sampled nodes what the policy now makes of each token over what its sampler did.

    `nodes` are those that `nodes_of` found of the trees that were packed, `tempered` [T] the log-probs that the row's update begins from.
    """
    ratio = column_of((tempered - batch.behavior).clamp(-20, 20).exp().double().round(decimals=6).cpu().numpy())
    trained = ((batch.weight != 0).any(0) & batch.sampled & (batch.author == int(Author.POLICY))).tolist()
    for tree, number, start, stop in batch.spans:
        if stop > start and trained[start]:
            nodes[tree][number].signals["ratio"] = ratio[start:stop]
