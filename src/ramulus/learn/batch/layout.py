"""A row of trees: where each node and leaf of a forest stands when it is laid out in preorder within a token budget."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, compress, repeat
from operator import attrgetter
from typing import Any

import numpy as np

from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.batch.tree_batch import Span

_SAMPLED = {
    "behavior": 0.0,
    "kept": 0.0,
    "temperature": 1.0,
    "entropy": 0.0,
}  # columns and what stands where nothing was sampled


@dataclass(frozen=True)
class Subtree:
    """A tree, or a part of it, in preorder: with every leaf all nodes above it, each once."""

    tree: int  # its number in the forest
    nodes: list[Node]
    up: list[int]  # of each the place of its parent in `nodes`, -1 for the root
    tips: list[int]  # the places of its leaves

    def __len__(self) -> int:
        return sum(map(len, map(attrgetter("tokens"), self.nodes)))

    def with_leaves(self, tips: Sequence[int]) -> Subtree:
        """The part of it at or above these leaves."""
        if len(tips) == len(self.tips):
            return self
        places: set[int] = set()
        for place in tips:
            while place >= 0 and place not in places:
                places.add(place)
                place = self.up[place]
        old = sorted(places)
        new = dict(zip(old, range(len(old))))
        up = [new.get(self.up[place], -1) for place in old]
        return Subtree(self.tree, [self.nodes[place] for place in old], up, [new[place] for place in tips])


@dataclass
class Layout:
    """A row of pieces of trees: where each node and leaf stands, and columns over its tokens as numpy arrays [T].

    What is derived of the pieces is derived when it is asked for: no piece comes after that.
    """

    pieces: list[Subtree] = field(default_factory=list)
    length: int = 0  # tokens

    def __len__(self) -> int:
        return self.length

    def place(self, piece: Subtree, size: int) -> None:
        """Append a piece of that many tokens."""
        self.pieces.append(piece)
        self.length += size

    @cached_property
    def known(self) -> tuple[list[Node], np.ndarray, np.ndarray]:
        """The nodes, and [N] each where they start and how many tokens they have."""
        nodes = [node for piece in self.pieces for node in piece.nodes]
        sizes = np.fromiter(map(len, map(attrgetter("tokens"), nodes)), np.int64, len(nodes))
        return nodes, np.cumsum(sizes) - sizes, sizes

    @cached_property
    def authors(self) -> np.ndarray:
        """[N] who wrote each node."""
        return np.fromiter(map(attrgetter("author"), self.known[0]), np.int64, len(self.known[0]))

    @cached_property
    def above(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[N] each: the parent of each node, N for none, how many nodes are above it, and how many tokens."""
        nodes, _, sizes = self.known
        counts = [len(piece.nodes) for piece in self.pieces]
        up = np.fromiter(chain.from_iterable(piece.up for piece in self.pieces), np.int64, len(nodes))
        parents = np.where(up < 0, len(nodes), up + np.repeat(np.cumsum(counts) - counts, counts))
        jump = np.append(parents, len(nodes))  # to an ancestor twice as far at every turn
        sums = np.stack((np.append(np.ones_like(sizes), 0), np.append(sizes, 0)))[:, jump]
        while (jump < len(nodes)).any():
            sums += sums[:, jump]
            jump = jump[jump]
        return parents, sums[0, :-1], sums[1, :-1]

    @cached_property
    def tips(self) -> np.ndarray:
        """[K] the numbers of the leaves."""
        counts = [len(piece.nodes) for piece in self.pieces]
        places = [place + first for piece, first in zip(self.pieces, accumulate(counts, initial=0)) for place in piece.tips]
        return np.array(places, dtype=np.int64)

    @cached_property
    def before(self) -> np.ndarray:
        """[N + 1] the token before each node on its path, -1 for none."""
        _, starts, sizes = self.known
        stops, size = np.append(starts + sizes, 0), np.append(sizes, 1)
        above = np.append(self.above[0], len(sizes))
        while (empty := size[above] == 0).any():
            above = np.where(empty, np.append(self.above[0], len(sizes))[above], above)
        return stops[above] - 1

    @cached_property
    def nodes(self) -> list[tuple[int, Node, int, int]]:
        """(tree, node, start, stop) of each node."""
        nodes, starts, sizes = self.known
        trees = chain.from_iterable(repeat(piece.tree, len(piece.nodes)) for piece in self.pieces)
        return list(zip(trees, nodes, starts.tolist(), (starts + sizes).tolist(), strict=True))

    @property
    def spans(self) -> list[Span]:
        """(tree, node id, start, stop) of each node."""
        return [(tree, node.id, start, stop) for tree, node, start, stop in self.nodes]

    @cached_property
    def leaves(self) -> list[tuple[int, Node, int]]:
        """(tree, leaf, row index of its path's last token) of each leaf; -1 for a path without tokens."""
        trees = chain.from_iterable(repeat(piece.tree, len(piece.tips)) for piece in self.pieces)
        return list(zip(trees, map(self.known[0].__getitem__, self.tips), self.lasts.tolist(), strict=True))

    @property
    def lasts(self) -> np.ndarray:
        """[K] row index of the last token of each leaf's path, -1 for none."""
        _, starts, sizes = self.known
        tips = self.tips
        return np.where(sizes[tips] > 0, (starts + sizes)[tips] - 1, self.before[tips])

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Every leaf with every node on its path, root to leaf: their numbers [P] each."""
        parents, levels, _ = self.above
        counts = levels[self.tips] + 1
        places, node = np.cumsum(counts) - 1, self.tips
        line = np.empty(int(counts.sum()), dtype=np.int64)
        while len(node):
            line[places] = node
            some = parents[node] < len(parents)
            places, node = places[some] - 1, parents[node][some]
        return np.repeat(np.arange(len(counts)), counts), line

    @property
    def paths(self) -> list[np.ndarray]:
        """The numbers of the nodes on each leaf's path, root to leaf."""
        leaf, node = self.pairs
        return np.split(node, np.flatnonzero(np.diff(leaf)) + 1) if len(leaf) else []

    @property
    def ends(self) -> np.ndarray:
        """[N] one past the last token below each node."""
        _, starts, sizes = self.known
        leaf, node = self.pairs
        ends = np.zeros_like(starts)
        ends[node] = (starts + sizes)[self.tips][leaf]  # of several leaves the last one stays
        return ends

    @property
    def token(self) -> np.ndarray:
        """[T] token ids."""
        return joined([node.tokens for node in self.known[0]], np.int64)

    @property
    def position(self) -> np.ndarray:
        """[T] places on their paths, from 0."""
        _, starts, sizes = self.known
        return np.arange(self.length) + np.repeat(self.above[2] - starts, sizes)

    @property
    def parent(self) -> np.ndarray:
        """[T] the token before each on its path; its own place for the first."""
        _, starts, sizes = self.known
        parent, some = np.arange(-1, self.length - 1), sizes > 0
        before = self.before[:-1][some]
        parent[starts[some]] = np.where(before < 0, starts[some], before)
        return parent

    def sizes(self) -> np.ndarray:
        """[N] tokens of each node."""
        return self.known[2]

    def spread(self, values: Sequence[float] | np.ndarray, dtype: type = np.float64) -> np.ndarray:
        """A value per node -> a value per token [T]; columns of them [..., N] -> [..., T]."""
        return np.repeat(np.asarray(values, dtype=dtype), self.sizes(), axis=-1)

    @cached_property
    def drawn(self) -> np.ndarray:
        """[N] bool: the nodes that have the log-probs of a sampler."""
        return np.fromiter(map(len, map(attrgetter("logprobs"), self.known[0])), np.int64, len(self.known[0])) > 0

    @cached_property
    def _drawn(self) -> tuple[list[Node], np.ndarray, np.ndarray]:
        """Those nodes, how many tokens they have, and where [T] these are."""
        return list(compress(self.known[0], self.drawn.tolist())), self.sizes()[self.drawn], self.spread(self.drawn, np.bool_)

    def sampled(self) -> dict[str, np.ndarray]:
        """The sampled columns [T], with a neutral value where nothing was sampled or recorded; ValueError where a node's is not one value a token."""
        columns = {name: self.recorded(name, neutral) for name, neutral in _SAMPLED.items() if name != "behavior"}
        return {"behavior": self.recorded("logprobs", 0.0) + columns["kept"]} | columns

    def recorded(self, name: str, neutral: float) -> np.ndarray:
        """One of them; as `temperature`, 1 where nothing was sampled, [T] what each token was sampled at."""
        nodes, sizes, where = self._drawn
        column, parts = np.full(self.length, neutral), list(map(attrgetter(name), nodes))
        kinds = set(map(type, parts))
        if array not in kinds:
            numbers = [neutral if part is None else part for part in parts]
            column[where] = numbers[0] if len(set(numbers)) == 1 else np.repeat(np.array(numbers, dtype=np.float64), sizes)
            return column
        if len(kinds) > 1:
            rest = zip(parts, sizes.tolist(), strict=True)
            parts = [
                part if isinstance(part, array) else array("d", [neutral if part is None else part]) * size for part, size in rest
            ]
        if list(map(len, parts)) != sizes.tolist():
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
        if not tree.root.children or (keep is not None and not keep[index]):
            continue
        whole = Subtree(index, *tree.preorder())
        tips = whole.tips if keep is None else [place for place in whole.tips if whole.nodes[place].id in keep[index]]
        if not tips:
            continue
        piece = whole.with_leaves(tips)
        size = len(piece)
        fits = not tokens_per_batch or size <= tokens_per_batch
        parts = [(piece, size)] if fits else [(part, len(part)) for part in map(piece.with_leaves, leaf_runs(piece, tokens_per_batch))]
        for part, size in parts:
            row = next((row for row in rows if not tokens_per_batch or len(row) + size <= tokens_per_batch), None)
            if row is None:
                rows.append(row := Layout())
            row.place(part, size)
    return rows


def leaf_runs(piece: Subtree, budget: int) -> list[list[int]]:
    """Cut leaves in preorder into runs whose paths have at most `budget` unique tokens; ValueError for a path that has more."""
    runs: list[list[int]] = [[]]
    places: set[int] = set()
    size = 0
    for leaf in piece.tips:
        new, more = not_in(places, piece, leaf)
        if runs[-1] and size + more > budget:
            runs.append([])
            places, size = set(), 0
            new, more = not_in(places, piece, leaf)
        if size + more > budget:
            raise ValueError(
                f"a path of {more} tokens does not fit in tokens_per_batch={budget}: raise it to at least {more}"
            )
        runs[-1].append(leaf)
        places.update(new)
        size += more
    return runs


def not_in(places: set[int], piece: Subtree, leaf: int) -> tuple[list[int], int]:
    """The nodes of a leaf's path that are not there yet, and how many tokens they have."""
    new = []
    place = leaf
    while place >= 0 and place not in places:
        new.append(place)
        place = piece.up[place]
    return new, sum([len(piece.nodes[place].tokens) for place in new])
