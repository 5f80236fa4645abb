"""Tree to columns: lay a forest out in preorder on rows within a token budget, then fold each leaf's credit down its path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ramify.core.tree import Author, Node, Tree
from ramify.learn.batch import Credits, TreeBatch
from ramify.learn.gate import Weights, weigh
from ramify.learn.idle import entropy_of, idle
from ramify.learn.targets import targets

if TYPE_CHECKING:
    from ramify.learn.mix import Mix, Term

SAMPLED = {
    "behavior": 0.0,
    "kept": 0.0,
    "temperature": 1.0,
    "entropy": 0.0,
}  # columns and what stands where nothing was sampled


@dataclass
class Layout:
    """A row of pieces of trees: per-token columns as numpy arrays [T], and where each node and leaf stands."""

    token: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    nodes: list[tuple[int, Node, int, int]] = field(default_factory=list)  # (tree, node, start, stop)
    ends: list[int] = field(default_factory=list)  # one past the last token below each of `nodes`
    leaves: list[tuple[int, Node, int]] = field(
        default_factory=list
    )  # (tree, leaf, row index of its path's last token)

    def __len__(self) -> int:
        return len(self.token)

    def place(self, tree: int, leaves: Sequence[Node]) -> None:
        """Append the paths of `leaves` (in preorder, of one tree), every shared node once."""
        open_nodes: list[int] = []  # indices into self.nodes, root to the current leaf
        for leaf in leaves:
            line = leaf.line()
            shared = 0
            while shared < len(open_nodes) and shared < len(line) and self.nodes[open_nodes[shared]][1] is line[shared]:
                shared += 1
            self._close(open_nodes, shared)
            for node in line[shared:]:
                open_nodes.append(len(self.nodes))
                self._append(tree, node, open_nodes)
            self.leaves.append((tree, leaf, self._last(open_nodes)))
        self._close(open_nodes, 0)

    def _close(self, open_nodes: list[int], keep: int) -> None:
        for index in open_nodes[keep:]:
            self.ends[index] = len(self.token)
        del open_nodes[keep:]

    def _last(self, open_nodes: Sequence[int]) -> int:
        """Row index of the last token on the open path, -1 if it holds none."""
        return next(
            (stop - 1 for _, _, start, stop in (self.nodes[i] for i in reversed(open_nodes)) if stop > start), -1
        )

    def _append(self, tree: int, node: Node, open_nodes: Sequence[int]) -> None:
        before, start, count = self._last(open_nodes[:-1]), len(self.token), len(node.tokens)
        depth = self.position[before] + 1 if before >= 0 else 0
        self.token.extend(node.tokens)
        self.position.extend(range(depth, depth + count))
        if count:
            self.parent.append(before if before >= 0 else start)
            self.parent.extend(range(start, start + count - 1))
        self.nodes.append((tree, node, start, start + count))
        self.ends.append(start + count)

    def spread(self, values: Sequence[float] | np.ndarray, dtype: type = np.float64) -> np.ndarray:
        """A value per node -> a value per token [T]."""
        return np.repeat(np.asarray(values, dtype=dtype), [stop - start for _, _, start, stop in self.nodes])

    def sampled(self, name: str) -> np.ndarray:
        """A sampled column [T], with its neutral value where nothing was sampled."""
        column = np.full(len(self), SAMPLED[name])
        for _, node, start, stop in self.nodes:
            if node.logprobs:
                column[start:stop] = np.add(node.logprobs, node.kept) if name == "behavior" else getattr(node, name)
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
        leaves = [leaf for leaf in tree.leaves() if keep is None or leaf.id in keep[index]]
        for piece, size in pieces(leaves, tokens_per_batch):
            row = next((row for row in rows if not tokens_per_batch or len(row) + size <= tokens_per_batch), None)
            if row is None:
                rows.append(row := Layout())
            row.place(index, piece)
    return rows


def pieces(leaves: Sequence[Node], budget: int) -> list[tuple[list[Node], int]]:
    """Cut leaves in preorder into runs whose unique tokens fit the budget: (leaves, unique tokens) each."""
    cut: list[tuple[list[Node], int]] = []
    piece: list[Node] = []
    size = 0
    before: list[Node] = []
    for leaf in leaves:
        line = leaf.line()
        path = sum(len(node.tokens) for node in line)
        if budget and path > budget:
            raise ValueError(
                f"a path of {path} tokens does not fit in tokens_per_batch={budget}: raise it to at least {path}"
            )
        shared = 0
        for ours, theirs in zip(line, before, strict=False):
            if ours is not theirs:
                break
            shared += len(ours.tokens)
        if piece and budget and size + path - shared > budget:
            cut.append((piece, size))
            piece, size, shared = [], 0, 0
        piece.append(leaf)
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
        learned = {
            leaf.id: sum(len(n.tokens) for n in leaf.line() if n.author in term.authors)
            for leaf in tree.leaves()
            if values.get(leaf.id) is not None
        }
        counts.append({leaf: n for leaf, n in learned.items() if n})
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


def pack(
    trees: Sequence[Tree],
    credits: Sequence[Sequence[Credits]],
    mix: Mix,
    tokens_per_batch: int = 0,
    dtype: torch.dtype = torch.float32,
    stats: dict[str, float] | None = None,
    gates: Sequence[Weights] | None = None,
    drop_idle: bool = False,
) -> list[TreeBatch]:
    """The trees of one optimizer step as rows of at most `tokens_per_batch` tokens; leaves that no term trains are left out.

    With `drop_idle` so are leaves without any credit, unless a leash or an entropy bonus pulls at them: gradients stay the same.

    `credits` holds one Credits per term and tree. Denominators are those of all `trees`, so results do not depend on the cutting.
    `stats` is what `mix.measure` answered for the whole forest where `trees` are a part of it; None measures `trees`.
    `gates` holds what `mix.gates` answered for each tree; leaves that the gate closes are left out as well. Raises ValueError where a mix with
    a gate is packed without.
    """
    if mix.gate is not None and gates is None:
        raise ValueError("the mix has a gate: ask mix.gates(forest, state) and hand its answer to pack as gates=...")
    terms = [shares(trees, credit, term, mix.share, gates) for term, credit in zip(mix.terms, credits, strict=True)]
    keep = [{leaf for term in terms for leaf in term[index]} for index in range(len(trees))]
    still: list[set[int]] = idle(trees, terms, credits, mix) if drop_idle else [set() for _ in trees]
    stats = mix.measure(trees, credits, gates) if stats is None else stats
    rows = lay_out(trees, [some - out for some, out in zip(keep, still, strict=True)], tokens_per_batch)
    seen = entropy_of(trees, still, terms, mix)  # it is counted once, on the first row
    return [
        replace(columns(row, terms, credits, mix, dtype), stats=stats | seen if row is rows[0] else stats)
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
    parts |= {name: torch.from_numpy(row.sampled(name)).to(dtype) for name in SAMPLED}
    parts |= {
        name: torch.from_numpy(row.signal(name)).to(dtype) for name in ("recomputed", "frozen") if name in mix.columns
    }
    if mix.value:
        parts |= {
            name: torch.from_numpy(column).to(dtype) for name, column in targets(row, mix, terms, credits).items()
        }
    return TreeBatch(
        token=torch.tensor(row.token, dtype=torch.long),
        position=torch.tensor(row.position, dtype=torch.long),
        parent=torch.tensor(row.parent, dtype=torch.long),
        end=torch.from_numpy(row.spread(row.ends, np.int64)),
        author=torch.from_numpy(row.spread([int(node.author) for _, node, _, _ in row.nodes], np.int64)),
        node=torch.from_numpy(row.spread(range(len(row.nodes)), np.int64)),
        version=torch.from_numpy(row.spread([node.version for _, node, _, _ in row.nodes], np.int64)),
        leaf_token=torch.tensor([last for _, _, last in row.leaves], dtype=torch.long),
        leaf_length=torch.tensor([response_length(leaf) for _, leaf, _ in row.leaves], dtype=torch.long),
        **parts,
    )


def check_sampled(row: Layout, leaves: np.ndarray, term: Term) -> None:
    """Raise ValueError where a token that is trained against the sampler (`leaves` [T] > 0) was not sampled: its ratio would be its probability."""
    for _, node, start, stop in row.nodes:
        if stop > start and leaves[start] > 0 and not node.logprobs and "behavior" in term.estimator.reads(node.author):
            raise ValueError(
                f"node {node.id}, written by {node.author.name}, has no log-probs of a sampler, which Behavior and column='behavior' read: "
                "use Itself() with Everything(), or Recomputed() with column='recomputed', for tokens that were not sampled"
            )


def response_length(leaf: Node) -> int:
    """Response tokens on the path of a leaf."""
    return sum(len(node.tokens) for node in leaf.line() if node.author is not Author.PROMPT)


def fold_down(
    row: Layout, term: list[dict[int, Share]], credits: Sequence[Credits], authors: Sequence[Author]
) -> dict[str, np.ndarray]:
    """One term on one row: weight, leaves, gain and pain [T]; credit and weight per leaf [K]."""
    where = {(tree, id(node)): index for index, (tree, node, _, _) in enumerate(row.nodes)}
    sums = {name: np.zeros(len(row.nodes)) for name in ("weight", "leaves", "gain", "pain")}
    loose = {"gain": np.zeros(len(row)), "pain": np.zeros(len(row))}  # credits that differ from token to token
    leaf_credit, leaf_weight = [], []
    for tree, leaf, _ in row.leaves:
        part = term[tree].get(leaf.id)
        leaf_weight.append(part.weight if part else 0.0)
        earned, seen = 0.0, 0
        for node in leaf.line() if part else ():
            if part is None or node.author not in authors:
                continue
            index = where[tree, id(node)]
            sums["weight"][index] += part.weight
            sums["leaves"][index] += 1
            if part.token is not None:
                here = part.token[seen : seen + len(node.tokens)]
                start, stop = row.nodes[index][2:]
                loose["gain"][start:stop] += part.weight * np.maximum(here, 0)
                loose["pain"][start:stop] += part.weight * np.minimum(here, 0)
                earned += float(here.sum())
            else:
                value = part.leaf if part.leaf is not None else (credits[tree].node or {}).get(node.id, 0.0)
                sums["gain" if value > 0 else "pain"][index] += part.weight * value
                earned += value * len(node.tokens)
            seen += len(node.tokens)
        leaf_credit.append(earned / seen if seen else 0.0)
    spread = {name: row.spread(column) for name, column in sums.items()}
    spread["gain"] += loose["gain"]
    spread["pain"] += loose["pain"]
    return spread | {"leaf_credit": np.array(leaf_credit), "leaf_weight": np.array(leaf_weight)}
