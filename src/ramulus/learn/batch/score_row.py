"""Rows that are read and not learned from, and the way of what was read back into the trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.batch.layout import Layout, column_of, lay_out
from ramulus.learn.batch.tree_batch import Span

Scored = dict[str, Tensor]
"""Column name -> [T], of one row."""

LEARNED = (Author.POLICY, Author.EXPERT)
ROW = 16384  # tokens of a row, or a path where that is longer


@dataclass(frozen=True)
class ScoreRow:
    """A forest in preorder on one row of T tokens with K paths: tensors and plain numbers, to be pickled."""

    token: Tensor  # [T] long
    position: Tensor  # [T] long, depth in the tree
    parent: Tensor  # [T] long, the token before each on its path; its own index for the first
    end: Tensor  # [T] long, one past the last token below this token's node
    author: Tensor  # [T] long
    leaf_token: Tensor  # [K] long, the last token of each path; -1 for a path without tokens
    leaf_author: Tensor  # [K] long
    spans: list[Span]
    temperature: Tensor | None = None  # [T] that each token was sampled at, 1 where not sampled; None: 1 everywhere

    def __len__(self) -> int:
        return int(self.token.shape[0])

    def lines(self) -> list[np.ndarray]:
        """The tokens of each path that the policy ended, root to leaf, as row indices."""
        parent = self.parent.tolist()
        lines = []
        for token, author in zip(self.leaf_token.tolist(), self.leaf_author.tolist(), strict=True):
            if author == Author.POLICY:
                line = [token] if token >= 0 else []
                while line and parent[line[-1]] != line[-1]:
                    line.append(parent[line[-1]])
                lines.append(np.array(line[::-1], dtype=np.int64))
        return lines


def score_rows(forest: Sequence[Tree], keep: Sequence[set[int]] | None = None, tokens: int = ROW) -> list[ScoreRow]:
    """The trees, or of each the paths to the leaves in `keep`, on rows of at most `tokens` tokens, or of one path that is longer."""
    longest = max((sum(len(n.tokens) for n in leaf.line()) for tree in forest for leaf in tree.leaves()), default=0)
    return [score_row(row) for row in lay_out(forest, keep, max(tokens, longest))]


def score_row(row: Layout) -> ScoreRow:
    """A layout as tensors."""
    columns = [row.token, row.position, row.parent, row.spread(row.ends, np.int64)]
    columns += [row.spread(row.authors, np.int64), row.lasts, row.authors[row.tips]]
    token, position, parent, end, author, last, by = map(torch.from_numpy, columns)
    return ScoreRow(token, position, parent, end, author, last, by, row.spans, torch.from_numpy(row.recorded("temperature", 1.0)))


def lacking(forest: Sequence[Tree], name: str) -> list[set[int]]:
    """The ids of the leaves, per tree, on whose paths some learned token has no such signal."""
    return [
        {
            leaf.id
            for leaf in tree.leaves()
            if any(node.tokens and node.author in LEARNED and name not in node.signals for node in leaf.line())
        }
        for tree in forest
    ]


Nodes = Sequence[Mapping[int, Node]]
"""The nodes of each tree by their ids: what spans name."""


def nodes_of(trees: Sequence[Tree]) -> list[dict[int, Node]]:
    """The nodes of each tree by their ids, as long as nothing is cut."""
    return [{node.id: node for node in tree.walk()} for tree in trees]


def write_back(nodes: Nodes, rows: Sequence[ScoreRow], scored: Sequence[Scored], again: bool = True) -> None:
    """Write the columns of rows into the signals of the nodes that their spans name; unless `again`, what a node has stays.

    "influence" goes to all but the prompt of the paths that the policy ended, other columns to nodes that are learned from.
    """
    ended: set[int] = set()
    if any("influence" in columns for columns in scored):
        leaves = [node for tree in nodes for node in tree.values() if node.author is Author.POLICY and not node.children]
        ended = {id(node) for leaf in leaves for node in leaf.line() if node.author is not Author.PROMPT}
    for row, columns in zip(rows, scored, strict=True):
        for name, column in columns.items():
            values = column.double().cpu().numpy()
            for tree, number, start, stop in row.spans:
                node = nodes[tree][number]
                takes = id(node) in ended if name == "influence" else node.author in LEARNED
                if takes and (again or name not in node.signals):
                    node.signals[name] = column_of(values[start:stop])
