"""A row of trees: where each node and leaf of a forest stands when it is laid out in preorder within a token budget."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from operator import attrgetter
from typing import Any

import numpy as np

from ramulus.core.tree import Author, Node, Tree

_SAMPLED = {
    "behavior": 0.0,
    "kept": 0.0,
    "temperature": 1.0,
    "entropy": 0.0,
}  # columns and what stands where nothing was sampled


@dataclass
class Layout:
    """A row of pieces of trees: where each node and leaf stands, and columns over its tokens as numpy arrays [T]."""

    nodes: list[tuple[int, Node, int, int]] = field(default_factory=list)  # (tree, node, start, stop)
    above: list[tuple[int, int]] = field(default_factory=list)  # of each, the token before it on its path (-1 for none) and how many there are
    ends: list[int] = field(default_factory=list)  # one past the last token below each of `nodes`
    leaves: list[tuple[int, Node, int]] = field(
        default_factory=list
    )  # (tree, leaf, row index of its path's last token)
    paths: list[list[int]] = field(default_factory=list)  # of each leaf, root to leaf, as indices into `nodes`
    length: int = 0  # tokens

    def __len__(self) -> int:
        return self.length

    def place(self, tree: int, lines: Sequence[Sequence[Node]]) -> None:
        """Append paths (root to leaf each; in preorder, of one tree), every shared node once."""
        self.__dict__.pop("known", None)
        path: list[int] = []  # indices into self.nodes, root to the current leaf
        open_: list[tuple[int, int]] = [(-1, 0)]  # last token on the open path and tokens on it: above the root, and after each of its nodes
        nodes, above, ends = self.nodes, self.above, self.ends
        for line in lines:
            shared = 0
            while shared < len(path) and shared < len(line) and nodes[path[shared]][1] is line[shared]:
                shared += 1
            self._close(path, shared)
            del open_[shared + 1 :]
            before, depth = open_[-1]
            for node in line[shared:]:
                start, count = self.length, len(node.tokens)
                path.append(len(nodes))
                above.append((before, depth))
                if count:
                    self.length = start + count
                    before, depth = self.length - 1, depth + count
                nodes.append((tree, node, start, self.length))
                ends.append(self.length)
                open_.append((before, depth))
            self.leaves.append((tree, line[-1], before))
            self.paths.append(path.copy())
        self._close(path, 0)

    def _close(self, path: list[int], keep: int) -> None:
        for index in path[keep:]:
            self.ends[index] = self.length
        del path[keep:]

    @cached_property
    def known(self) -> tuple[list[Node], np.ndarray, np.ndarray]:
        """The nodes, and [N] each where they start and how many tokens they have; until more are placed."""
        starts = np.array([start for _, _, start, _ in self.nodes], dtype=np.int64)
        return [node for _, node, _, _ in self.nodes], starts, np.diff(starts, append=self.length)

    @property
    def token(self) -> np.ndarray:
        """[T] token ids."""
        return joined([node.tokens for node in self.known[0]], np.int64)

    @property
    def position(self) -> np.ndarray:
        """[T] places on their paths, from 0."""
        _, starts, sizes = self.known
        depths = np.array(self.above, dtype=np.int64).reshape(-1, 2)[:, 1]
        return np.arange(self.length) + np.repeat(depths - starts, sizes)

    @property
    def parent(self) -> np.ndarray:
        """[T] the token before each on its path; its own place for the first."""
        _, starts, sizes = self.known
        parent, some = np.arange(-1, self.length - 1), sizes > 0
        before = np.array(self.above, dtype=np.int64).reshape(-1, 2)[some, 0]
        parent[starts[some]] = np.where(before < 0, starts[some], before)
        return parent

    def sizes(self) -> np.ndarray:
        """[N] tokens of each node."""
        return self.known[2]

    def spread(self, values: Sequence[float] | np.ndarray, dtype: type = np.float64) -> np.ndarray:
        """A value per node -> a value per token [T]; columns of them [..., N] -> [..., T]."""
        return np.repeat(np.asarray(values, dtype=dtype), self.sizes(), axis=-1)

    def sampled(self) -> dict[str, np.ndarray]:
        """The sampled columns [T], with a neutral value where nothing was sampled or recorded; ValueError where a node's is not one value a token."""
        nodes, _, sizes = self.known
        drawn = [bool(node.logprobs) for node in nodes]
        some = list(compress(nodes, drawn)), list(compress(sizes.tolist(), drawn)), np.repeat(np.array(drawn, dtype=bool), sizes)
        found = {name: self._recorded(name, neutral, *some) for name, neutral in _SAMPLED.items() if name != "behavior"}
        return {"behavior": self._recorded("logprobs", 0.0, *some) + found["kept"]} | found

    def temperature(self) -> np.ndarray:
        """[T] that each token was sampled at, 1 where it was not."""
        nodes, _, sizes = self.known
        drawn = [bool(node.logprobs) for node in nodes]
        some = list(compress(nodes, drawn)), list(compress(sizes.tolist(), drawn)), np.repeat(np.array(drawn, dtype=bool), sizes)
        return self._recorded("temperature", 1.0, *some)

    def _recorded(self, name: str, neutral: float, nodes: list[Node], sizes: list[int], where: np.ndarray) -> np.ndarray:
        """One of them, from the nodes that were sampled, their sizes and where [T] they are."""
        column = np.full(self.length, neutral)
        given = [neutral if part is None else part for part in map(attrgetter(name), nodes)]
        if not any(isinstance(part, array) for part in given):
            column[where] = np.repeat(np.array(given, dtype=np.float64), np.array(sizes, dtype=np.int64))
            return column
        parts = [part if isinstance(part, array) else array("d", [part]) * size for part, size in zip(given, sizes, strict=True)]
        if list(map(len, parts)) != sizes:
            i = next(i for i, part in enumerate(parts) if len(part) != sizes[i])
            raise ValueError(f"node {nodes[i].id} has {sizes[i]} tokens but {len(parts[i])} values of {name}")
        column[where] = joined(parts)
        return column

    def signal(self, name: str) -> np.ndarray:
        """A signal [T], 0 where the tokens are not learned from; ValueError where a node lacks it."""
        column = np.zeros(len(self))
        for _, node, start, stop in self.nodes:
            if node.author in (Author.POLICY, Author.EXPERT) and stop > start:
                if name not in node.signals:
                    raise ValueError(
                        f"node {node.id} has no {name!r} log-probs: have the forest scored for {{{name!r}}} before pack"
                    )
                column[start:stop] = node.signals[name]
        return column


def column_of(values: np.ndarray) -> array[float]:
    """Numbers [L] as a signal of a node."""
    return array("d", values.astype(np.float64, copy=False).tobytes())


def joined(columns: Sequence[array[Any]], dtype: type = np.float64) -> np.ndarray:
    """Columns of nodes one after the other, in blocks."""
    kinds = {column.typecode for column in columns}
    if len(kinds) == 1:
        return np.frombuffer(b"".join(columns), kinds.pop()).astype(dtype)
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(column, dtype) for column in columns)])


def lay_out(trees: Sequence[Tree], keep: Sequence[set[int]] | None = None, tokens_per_batch: int = 0) -> list[Layout]:
    """Rows of at most `tokens_per_batch` tokens (0: no limit) that hold every kept leaf once, in preorder.

    A tree that does not fit is cut between leaves and its prefix repeated; `keep` gives the ids of the leaves to keep, per tree.
    Raises ValueError for a path longer than a row.
    """
    rows: list[Layout] = []
    for index, tree in enumerate(trees):
        lines = [leaf.line() for leaf in tree.leaves() if keep is None or leaf.id in keep[index]]
        for piece, size in pieces(lines, tokens_per_batch):
            row = next((row for row in rows if not tokens_per_batch or len(row) + size <= tokens_per_batch), None)
            if row is None:
                rows.append(row := Layout())
            row.place(index, piece)
    return rows


def pieces(lines: Sequence[list[Node]], budget: int) -> list[tuple[list[list[Node]], int]]:
    """Cut the paths of leaves in preorder into runs whose unique tokens fit the budget: (paths, unique tokens) each."""
    cut: list[tuple[list[list[Node]], int]] = []
    piece: list[list[Node]] = []
    size = 0
    before: list[Node] = []
    sums = [0]  # tokens above each node of the line before, and on all of it
    for line in lines:
        common = 0
        while common < len(before) and common < len(line) and line[common] is before[common]:
            common += 1
        del sums[common + 1 :]
        for node in line[common:]:
            sums.append(sums[-1] + len(node.tokens))
        path, shared = sums[-1], sums[common]
        if budget and path > budget:
            raise ValueError(
                f"a path of {path} tokens does not fit in tokens_per_batch={budget}: raise it to at least {path}"
            )
        if piece and budget and size + path - shared > budget:
            cut.append((piece, size))
            piece, size, shared = [], 0, 0
        piece.append(line)
        size += path - shared
        before = line
    return [*cut, (piece, size)] if piece else cut


