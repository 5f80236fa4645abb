"""A row of trees: where each node and leaf of a forest stands when it is laid out in preorder within a token budget."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, compress
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
    before: list[int] = field(default_factory=list)  # of each, the token before it on its path, -1 for none
    depths: list[int] = field(default_factory=list)  # of each, how many tokens are above it
    ends: list[int] = field(default_factory=list)  # one past the last token below each of `nodes`
    leaves: list[tuple[int, Node, int]] = field(
        default_factory=list
    )  # (tree, leaf, row index of its path's last token)
    paths: list[list[int]] = field(default_factory=list)  # of each leaf, root to leaf, as indices into `nodes`
    length: int = 0  # tokens

    def __len__(self) -> int:
        return self.length

    def place(self, tree: int, root: Node, ids: set[int]) -> None:
        """Append the nodes of a tree with these ids in preorder, every one once; with a leaf come all above it."""
        self.__dict__.pop("known", None)
        self.__dict__.pop("pairs", None)
        nodes, ends, length = self.nodes, self.ends, self.length
        stack: list[tuple[Node, int, int, list[int]]] = [(root, -1, 0, [])]  # a node, the last token before it, how many there are, its path
        while stack:
            node, before, depth, above = stack.pop()
            self.before.append(before)
            self.depths.append(depth)
            path, start = [*above, len(nodes)], length
            if count := len(node.tokens):
                length += count
                before, depth = length - 1, depth + count
            nodes.append((tree, node, start, length))
            ends.append(length)
            if node.children:
                stack += [(child, before, depth, path) for child in node.children[::-1] if child.id in ids]
                continue
            self.leaves.append((tree, node, before))
            self.paths.append(path)
            for index in path:
                ends[index] = length
        self.length = length

    @cached_property
    def known(self) -> tuple[list[Node], np.ndarray, np.ndarray]:
        """The nodes, and [N] each where they start and how many tokens they have; until more are placed."""
        starts = np.array([start for _, _, start, _ in self.nodes], dtype=np.int64)
        return [node for _, node, _, _ in self.nodes], starts, np.diff(starts, append=self.length)

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Every leaf with every node on its path, root to leaf: their numbers [P] each; until more are placed."""
        sizes = np.fromiter(map(len, self.paths), np.int64, len(self.paths))
        return np.repeat(np.arange(len(sizes)), sizes), np.fromiter(chain.from_iterable(self.paths), np.int64, int(sizes.sum()))

    @property
    def token(self) -> np.ndarray:
        """[T] token ids."""
        return joined([node.tokens for node in self.known[0]], np.int64)

    @property
    def position(self) -> np.ndarray:
        """[T] places on their paths, from 0."""
        _, starts, sizes = self.known
        return np.arange(self.length) + np.repeat(np.array(self.depths, dtype=np.int64) - starts, sizes)

    @property
    def parent(self) -> np.ndarray:
        """[T] the token before each on its path; its own place for the first."""
        _, starts, sizes = self.known
        parent, some = np.arange(-1, self.length - 1), sizes > 0
        before = np.array(self.before, dtype=np.int64)[some]
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
        columns = {name: self._recorded(name, neutral, *some) for name, neutral in _SAMPLED.items() if name != "behavior"}
        return {"behavior": self._recorded("logprobs", 0.0, *some) + columns["kept"]} | columns

    def temperature(self) -> np.ndarray:
        """[T] that each token was sampled at, 1 where it was not."""
        nodes, _, sizes = self.known
        drawn = [bool(node.logprobs) for node in nodes]
        some = list(compress(nodes, drawn)), list(compress(sizes.tolist(), drawn)), np.repeat(np.array(drawn, dtype=bool), sizes)
        return self._recorded("temperature", 1.0, *some)

    def _recorded(self, name: str, neutral: float, nodes: list[Node], sizes: list[int], where: np.ndarray) -> np.ndarray:
        """One of them, from the nodes that were sampled, their sizes and where [T] they are."""
        column, given = np.full(self.length, neutral), list(map(attrgetter(name), nodes))
        kinds = set(map(type, given))
        if array not in kinds:
            numbers = [neutral if part is None else part for part in given]
            column[where] = np.repeat(np.array(numbers, dtype=np.float64), np.array(sizes, dtype=np.int64))
            return column
        if len(kinds) > 1:
            rest = zip(given, sizes, strict=True)
            given = [
                part if isinstance(part, array) else array("d", [neutral if part is None else part]) * size for part, size in rest
            ]
        if list(map(len, given)) != sizes:
            i = next(i for i, part in enumerate(given) if len(part) != sizes[i])
            raise ValueError(f"node {nodes[i].id} has {sizes[i]} tokens but {len(given[i])} values of {name}")
        column[where] = joined(given)
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
    kinds = set(map(attrgetter("typecode"), columns))
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
        if keep is not None and not keep[index]:
            continue
        leaves = [leaf for leaf in tree.leaves() if keep is None or leaf.id in keep[index]]
        whole = at_or_above(leaves)
        fits = not tokens_per_batch or whole[1] <= tokens_per_batch
        for ids, size in [whole] if fits else [at_or_above(run) for run in leaf_runs(leaves, tokens_per_batch)]:
            if not ids:
                continue
            row = next((row for row in rows if not tokens_per_batch or len(row) + size <= tokens_per_batch), None)
            if row is None:
                rows.append(row := Layout())
            row.place(index, tree.root, ids)
    return rows


def at_or_above(leaves: Sequence[Node]) -> tuple[set[int], int]:
    """The ids of these leaves and of all nodes above them, and how many tokens these nodes have."""
    ids: set[int] = set()
    size = 0
    for leaf in leaves:
        node: Node | None = leaf
        while node is not None and node.id not in ids:
            ids.add(node.id)
            size += len(node.tokens)
            node = node.parent
    return ids, size


def leaf_runs(leaves: Sequence[Node], budget: int) -> list[list[Node]]:
    """Cut leaves in preorder into runs whose paths have at most `budget` unique tokens; ValueError for a path that has more."""
    cut: list[list[Node]] = [[]]
    ids: set[int] = set()
    size = 0
    for leaf in leaves:
        new = [node for node in leaf.line() if node.id not in ids]
        more = sum([len(node.tokens) for node in new])
        if cut[-1] and size + more > budget:
            cut.append([])
            ids, size, new = set(), 0, leaf.line()
            more = sum([len(node.tokens) for node in new])
        if size + more > budget:
            raise ValueError(
                f"a path of {more} tokens does not fit in tokens_per_batch={budget}: raise it to at least {more}"
            )
        cut[-1].append(leaf)
        ids.update(node.id for node in new)
        size += more
    return cut
