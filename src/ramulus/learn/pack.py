"""Tree to columns: lay a forest out in preorder on rows within a token budget, with what each leaf weighs and earns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, compress
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.batch import Credits, TreeBatch
from ramulus.learn.fold import fold_down
from ramulus.learn.gate import Weights, weigh
from ramulus.learn.idle import entropy_of, idle
from ramulus.learn.targets import targets

if TYPE_CHECKING:
    from ramulus.learn.mix import Mix, Term

SAMPLED = {
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
        return np.fromiter(chain.from_iterable([node.tokens for node in self.known[0]]), np.int64, self.length)

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
        """The sampled columns [T], with a neutral value where nothing was sampled; ValueError where a node's is not one value a token."""
        nodes, _, sizes = self.known
        drawn = [bool(node.logprobs) for node in nodes]
        some = list(compress(nodes, drawn)), list(compress(sizes.tolist(), drawn)), np.repeat(np.array(drawn, dtype=bool), sizes)
        found = {name: self._recorded(name, neutral, *some) for name, neutral in SAMPLED.items() if name != "behavior"}
        return {"behavior": self._recorded("logprobs", 0.0, *some) + found["kept"]} | found

    def _recorded(self, name: str, neutral: float, nodes: list[Node], sizes: list[int], where: np.ndarray) -> np.ndarray:
        """One of them, from the nodes that were sampled, their sizes and where [T] they are."""
        parts = list(map(attrgetter(name), nodes))
        if list(map(len, parts)) != sizes:
            i = next(i for i, part in enumerate(parts) if len(part) != sizes[i])
            raise ValueError(f"node {nodes[i].id} has {sizes[i]} tokens but {len(parts[i])} values of {name}")
        column = np.full(self.length, neutral)
        column[where] = np.fromiter(chain.from_iterable(parts), np.float64, sum(sizes))
        return column

    def signal(self, name: str) -> np.ndarray:
        """A signal [T], 0 where the tokens are not learned from; ValueError where a node lacks it."""
        column = np.zeros(len(self))
        for _, node, start, stop in self.nodes:
            if node.author in (Author.POLICY, Author.EXPERT) and stop > start:
                if name not in node.signals:
                    raise ValueError(
                        f"node {node.id} has no {name!r} log-probs: call policy.score(forest, {{{name!r}}}) before pack"
                    )
                column[start:stop] = node.signals[name]
        return column


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


@dataclass(frozen=True, slots=True)
class Share:
    """A trained leaf of one term: what each of its learned tokens weighs, and its credit."""

    weight: float
    learned: int  # learned tokens on its path
    leaf: float | None  # credit of the leaf, if it has one value
    token: np.ndarray | None  # [learned] credit of each learned token, root to leaf


def shares(
    trees: Sequence[Tree], credits: Sequence[Credits], term: Term, share: str, gates: Sequence[Weights] | None = None
) -> list[dict[int, Share]]:
    """The trained leaves of one term, per tree by leaf id, with weights that are final for the whole optimizer step."""
    assert term.normaliser is not None  # Mix has seen to it
    counts: list[dict[int, int]] = []
    for tree, credit in zip(trees, credits, strict=True):
        values = credit.token if credit.token is not None else credit.leaf
        learned = learned_tokens(tree, term.authors)
        counts.append({leaf: n for leaf, n in learned.items() if n and values.get(leaf) is not None})
    parts = [
        fork_shares(tree, count) if share == "each_fork" else dict.fromkeys(count, 1.0)
        for tree, count in zip(trees, counts, strict=True)
    ]
    weights = term.normaliser(
        [[(count[leaf], part[leaf]) for leaf in count] for count, part in zip(counts, parts, strict=True)]
    )
    if gates is not None:
        weights = [gated(*each, term) for each in zip(trees, counts, weights, gates, strict=True)]
    return [
        {leaf: share_of(credit, leaf, n, w) for (leaf, n), w in zip(count.items(), weight, strict=True) if w}
        for credit, count, weight in zip(credits, counts, weights, strict=True)
    ]


def learned_tokens(tree: Tree, authors: Sequence[Author]) -> dict[int, int]:
    """How many tokens of these authors are on the path of each leaf, by leaf id, in preorder."""
    found: dict[int, int] = {}
    stack = [(tree.root, 0)]
    while stack:
        node, above = stack.pop()
        count = above + len(node.tokens) if node.author in authors else above
        if node.children:
            stack += [(child, count) for child in reversed(node.children)]
        elif node.parent is not None:
            found[node.id] = count
    return found


def gated(tree: Tree, count: dict[int, int], weights: Sequence[float], gate: Weights, term: Term) -> list[float]:
    """The weights of a tree's trained leaves, in the order of `count`, each times what the gate says of it."""
    by_id = {leaf.id: weigh(leaf, term.side, gate) for leaf in tree.leaves() if leaf.id in count}
    return [weight * by_id[leaf] for leaf, weight in zip(count, weights, strict=True)]


def share_of(credit: Credits, leaf: int, learned: int, weight: float) -> Share:
    """A leaf's share; raises ValueError where its credit does not have one value a learned token."""
    if credit.token is None:
        return Share(weight, learned, credit.leaf[leaf] if credit.node is None else None, None)
    tokens = np.asarray(credit.token[leaf], dtype=np.float64)
    if len(tokens) != learned:
        raise ValueError(f"leaf {leaf} has {learned} learned tokens but its credit holds {len(tokens)} values")
    return Share(weight, learned, None, tokens)


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


@dataclass(frozen=True)
class Selection:
    """The leaves that an optimizer step trains."""

    terms: list[list[dict[int, Share]]]  # of each term, of each tree, by leaf id
    idle: list[set[int]]  # of each tree, those of them that nothing pulls at and that are left out

    def kept(self) -> list[set[int]]:
        """Of each tree the leaves to pack: trained by some term, and not left out."""
        return [{leaf for term in self.terms for leaf in term[i]} - out for i, out in enumerate(self.idle)]


def select(
    trees: Sequence[Tree],
    credits: Sequence[Sequence[Credits]],
    mix: Mix,
    gates: Sequence[Weights] | None = None,
    drop_idle: bool = False,
) -> Selection:
    """Which leaves are trained, with what weights; the arguments are those of `pack`, which packs them.

    Raises ValueError where a mix with a gate is asked without `gates`.
    """
    if mix.gate is not None and gates is None:
        raise ValueError("the mix has a gate: ask mix.gates(forest, state) and hand its answer to pack as gates=...")
    terms = [shares(trees, credit, term, mix.share, gates) for term, credit in zip(mix.terms, credits, strict=True)]
    return Selection(terms, idle(trees, terms, credits, mix) if drop_idle else [set() for _ in trees])


def pack(
    trees: Sequence[Tree],
    credits: Sequence[Sequence[Credits]],
    mix: Mix,
    tokens_per_batch: int = 0,
    dtype: torch.dtype = torch.float32,
    stats: dict[str, float] | None = None,
    gates: Sequence[Weights] | None = None,
    drop_idle: bool = False,
    selection: Selection | None = None,
) -> list[TreeBatch]:
    """The trees of one optimizer step as rows of at most `tokens_per_batch` tokens; leaves that no term trains are left out.

    With `drop_idle` so are leaves without any credit, unless a leash or an entropy bonus pulls at them: gradients stay the same.

    `credits` holds one Credits per term and tree. Denominators are those of all `trees`, so results do not depend on the cutting.
    `stats` is what `mix.measure` answered for the whole forest where `trees` are a part of it; None measures `trees`.
    `gates` holds what `mix.gates` answered for each tree; leaves that the gate closes are left out as well. Raises ValueError where a mix with
    a gate is packed without. `selection` is what `select` answered for the same arguments, where somebody has asked it already.
    """
    chosen = select(trees, credits, mix, gates, drop_idle) if selection is None else selection
    stats = mix.measure(trees, credits, gates) if stats is None else stats
    rows = lay_out(trees, chosen.kept(), tokens_per_batch)
    seen = entropy_of(trees, chosen.idle, chosen.terms, mix)  # it is counted once, on the first row
    return [
        replace(columns(row, chosen.terms, credits, mix, dtype), stats=stats | seen if row is rows[0] else stats)
        for row in rows
    ]


def columns(
    row: Layout, terms: list[list[dict[int, Share]]], credits: Sequence[Sequence[Credits]], mix: Mix, dtype: torch.dtype
) -> TreeBatch:
    """One row's TreeBatch: its layout, and every term's weights and credits folded down the paths of the row's own leaves."""
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
    parts |= {
        name: torch.from_numpy(row.signal(name)).to(dtype) for name in ("recomputed", "frozen") if name in mix.columns
    }
    if mix.value:
        parts |= {
            name: torch.from_numpy(column).to(dtype) for name, column in targets(row, mix, terms, credits).items()
        }
    whole = {name: getattr(row, name) for name in ("token", "position", "parent")}
    nodes = row.known[0]
    each = (row.ends, [int(node.author) for node in nodes], range(len(nodes)), [node.version for node in nodes])
    spread = row.spread(np.array(each, dtype=np.int64).reshape(4, -1), np.int64)
    whole |= dict(zip(("end", "author", "node", "version"), spread, strict=True))
    whole |= {
        "leaf_token": np.array([last for _, _, last in row.leaves], dtype=np.int64),
        "leaf_length": response_lengths(row),
    }
    parts |= {name: torch.from_numpy(column) for name, column in whole.items()}
    return TreeBatch(**parts, nodes=[(node, start, stop) for _, node, start, stop in row.nodes])


def check_sampled(row: Layout, leaves: np.ndarray, term: Term) -> None:
    """Raise ValueError where a token that is trained against the sampler (`leaves` [T] > 0) was not sampled: its ratio would be its probability."""
    for node, start in [(node, start) for _, node, start, stop in row.nodes if stop > start and not node.logprobs]:
        if leaves[start] > 0 and "behavior" in term.estimator.reads(node.author):
            raise ValueError(
                f"node {node.id}, written by {node.author.name}, has no log-probs of a sampler, which Behavior and column='behavior' read: "
                "use Itself() with Everything(), or Recomputed() with column='recomputed', for tokens that were not sampled"
            )


def response_lengths(row: Layout) -> np.ndarray:
    """[K] response tokens on the path of each leaf."""
    nodes, _, sizes = row.known
    size = [0 if node.author is Author.PROMPT else count for node, count in zip(nodes, sizes.tolist(), strict=True)]
    return np.array([sum([size[i] for i in path]) for path in row.paths], dtype=np.int64)
