"""Forward context influence: how much the later steps of a response attend to each of its steps (arXiv 2509.26628, eqs. 4-6).

With a the attention of a path's queries to its keys in one head, and steps j and k: M[j, k] is the mean of a over the queries of j
of its sum over them / |k|, y[k] the sum of M[j, k] over j >= k + delta, and FCI the largest y over all layers and heads.

It is read where the model attends, block by block of queries: y[k] is linear in a, so a block is folded over its queries at once and
only a number per head and key of each path stays. Queries that paths share are met once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ramulus.core.tree import Author
from ramulus.learn.attention.kernels import Folding, Stacked
from ramulus.learn.attention.runs import runs
from ramulus.learn.policy.steps import LEVELS, Separators, Steps, segment
from ramulus.models.variant import CAUSAL, Sight, Variant

if TYPE_CHECKING:
    from ramulus.learn.attention.tree_attention import TreePlan
    from ramulus.learn.batch.score_row import ScoreRow

BLOCK = 64  # queries met at once
SCORES = 2**18  # attention weights computed at once on a CPU, where a single key head needs no more
LARGEST = 60.0  # exp(-60) to exp(60), and the sum of 2^40 of them, are ordinary numbers in float32


@dataclass(frozen=True)
class PathSteps:
    """One path of a row: its steps, and what each token of it, as a query, adds to the keys before `limit`."""

    line: np.ndarray  # [L] where its tokens stand on the row
    steps: Steps
    prompt: int  # tokens before the response
    level: int  # of the separators
    limit: (
        np.ndarray
    )  # [L] path positions below it are of steps at least delta before the query's, 0 where there are none
    weight: np.ndarray  # [L] one over the size of the query's step, 0 where limit is


def path_steps(line: np.ndarray, row: ScoreRow, separators: Separators, delta: int) -> PathSteps:
    """Cut the path of these tokens of a row into steps."""
    prompt = int((row.author.numpy()[line] == Author.PROMPT).sum())
    response = row.token.numpy()[line[prompt:]].tolist()
    steps = segment(response, separators)
    starts = np.array([*steps.starts, steps.length])
    number = np.searchsorted(starts, np.arange(len(response)), side="right") - 1
    early = number - delta + 1  # the first step that is too near
    limit = np.where(early >= 2, prompt + starts[np.maximum(early, 0)], 0)  # the first step never counts
    weight = np.where(limit > 0, 1 / np.diff(starts)[number], 0.0)
    nothing = np.zeros(prompt)
    level = separators.level(response)
    return PathSteps(line, steps, prompt, level, np.append(nothing.astype(int), limit), np.append(nothing, weight))


@dataclass(frozen=True)
class PathGroup:
    """What a block of B queries adds to some paths that are cut by the same separators."""

    weight: Tensor  # [m, B]
    limit: Tensor  # [B]
    low: int  # every query with a weight sees the keys before this one
    high: int  # and none those from this one on
    paths: list[tuple[int, int]]  # (path, row of weight)

    def mask(self, like: Tensor) -> Tensor:
        """[B, high - low], 1 where a key from `low` on is before a query's limit and 0 where it is not."""
        index = torch.arange(self.low, self.high, device=like.device)
        return (index < self.limit.to(like.device)[:, None]).to(like.dtype)


@dataclass(frozen=True)
class QueryBlock:
    """Queries of one run: tokens [first, last) of the row, the last of them with `keys` tokens on its path."""

    first: int
    last: int
    keys: int
    groups: list[PathGroup]


@dataclass(frozen=True)
class RunBlocks:
    """An unbranched run of a row: where the tokens of its path stand, and its blocks."""

    path: list[tuple[int, int]]
    blocks: list[QueryBlock]


@dataclass
class RowInfluence:
    """Adds up one row's influence while a model attends to it, layer by layer."""

    stepped: list[PathSteps]
    cut: Callable[[], list[RunBlocks]]  # into what torch's operations meet
    base: list[int]  # where each path begins in the columns of `sums`
    step: Tensor  # [F] the column of `best` of each token of each path; the last column is for prompts
    size: Tensor  # [C] tokens of each step
    folding: Folding  # the same for kernels that attend and fold at once
    best: Tensor | None = None  # [C] so far

    @cached_property
    def runs(self) -> list[RunBlocks]:
        """The runs that add something; not needed where kernels attend."""
        return self.cut()

    def over(self, way: TreePlan) -> WatchedPlan:
        """What to give the model instead of its plan."""
        return WatchedPlan(way, self)

    @torch.no_grad()
    def add_layer(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """One layer: [1, H, T, D] and [1, H or fewer, T, D]; in float32 or more, whatever autocast is on."""
        with torch.autocast(query.device.type, enabled=False):
            sums = self.new_sums(query.shape[1], query)
            query = query[0].to(sums.dtype) * (query.shape[-1] ** -0.5 if scale is None else scale)
            query = query.unflatten(0, (key.shape[1], -1))
            space, small = self.new_scores(query), products_are_small(query, key[0].to(sums.dtype))
            for part in self.runs:
                path_keys = torch.cat([key[0, :, a:b] for a, b in part.path], 1).to(sums.dtype)
                path_keys = path_keys.transpose(1, 2).contiguous()  # a product with it as it lies is the fastest
                for block in part.blocks:
                    self.add_block(block, query, path_keys, space, small, sums)
            self.end_layer(sums)

    def new_scores(self, query: Tensor) -> Tensor:
        """Where attention weights are computed: new memory for every block would cost more than the arithmetic."""
        needed = max(
            (query.shape[1] * (b.last - b.first) * b.keys for s in self.runs for b in s.blocks), default=0
        )
        return query.new_empty(max(scores_at_once(query.device), needed))

    def add_block(self, block: QueryBlock, query: Tensor, path_keys: Tensor, space: Tensor, small: bool, sums: Tensor) -> None:
        """Queries [Hk, G, T, D], already scaled, of a block with the keys [Hk, D, K] of its path, some key heads at a time."""
        shared, count = query.shape[1], block.last - block.first
        causal = torch.full((count, count), -torch.inf, dtype=sums.dtype, device=sums.device).triu_(1)
        groups = [(group, group.weight.to(sums), group.mask(sums)) for group in block.groups]
        queries, path_keys = query[:, :, block.first : block.last].flatten(1, 2), path_keys[:, :, : block.keys]
        some = max(1, scores_at_once(query.device) // (shared * count * block.keys))
        for h in range(0, path_keys.shape[0], some):
            keys = path_keys[h : h + some]
            heads = keys.shape[0]
            scores = space[: heads * shared * count * block.keys].view(heads, -1, block.keys)
            rows = _attention(queries[h : h + some], keys, scores, causal, small)
            inverse = rows.sum(-1)[:, None].reciprocal_()
            into = sums[h * shared : (h + heads) * shared]
            for group, weight, mask in groups:
                self.add_group(group, folded(rows, weight * inverse, group, mask), into)

    def new_sums(self, heads: int, like: Tensor) -> Tensor:
        """Room for one layer, [H, F]."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return torch.zeros(heads, len(self.step), dtype=wide, device=like.device)

    def add_group(self, group: PathGroup, values: Tensor, sums: Tensor) -> None:
        """Add what a group makes of some heads, [H, m, high], to sums [H, F]."""
        for path, row in group.paths:
            at = self.base[path]
            sums[:, at : at + group.high] += values[:, row]

    def end_layer(self, sums: Tensor) -> None:
        """End a layer: the mean over the keys of each step, the largest over heads and layers."""
        step, size = self.step.to(sums.device), self.size.to(sums)
        means = sums.new_zeros(len(sums), len(size)).index_add_(1, step, sums) / size
        best = means.amax(0)
        self.best = best if self.best is None else torch.maximum(self.best, best)

    def scores(self) -> Iterator[tuple[PathSteps, np.ndarray]]:
        """Each path with the FCI [S] of its steps; 0 for the first one and from the end of the thinking on."""
        if self.best is None:
            raise ValueError(
                "no layer attended to this row: the model must attend through ramulus's registered attention"
            )
        every, at = self.best.double().cpu().numpy(), 0
        for path in self.stepped:
            score = every[at : at + len(path.steps.starts)].copy()
            at += len(score)
            score[:1] = 0
            if path.steps.think_end is not None:
                score[path.steps.think_end :] = 0
            yield path, score


def scores_at_once(device: torch.device) -> int:
    """Attention weights computed at once; elsewhere than on a CPU it is calls that cost."""
    return SCORES if device.type == "cpu" else 16 * SCORES


def products_are_small(query: Tensor, key: Tensor) -> bool:
    """Whether no product of queries [..., D], already scaled, with keys [..., D] is too large for its exponential."""
    if (
        not query.numel() or query.device.type != "cpu"
    ):  # asking a GPU costs more than the row maxima that it would spare
        return False
    return float(query.norm(dim=-1).amax() * key.norm(dim=-1).amax()) < LARGEST


def _attention(query: Tensor, key: Tensor, scores: Tensor, causal: Tensor, small: bool) -> Tensor:
    """Causal attention weights [Hk x G, B, K] of the last B tokens, each row up to a factor: [Hk, G x B, D], [Hk, D, K], [B, B].

    `causal` is 0 or -inf. They are computed in `scores` [Hk, G x B, K]. A softmax would pass over them more often.
    """
    torch.bmm(query, key, out=scores)
    count = causal.shape[0]
    rows = scores.view(-1, count, scores.shape[-1])
    rows[:, :, -count:] += causal
    if not small:
        rows -= rows.amax(-1, keepdim=True)
    return rows.exp_()


def folded(rows: Tensor, weight: Tensor, group: PathGroup, mask: Tensor) -> Tensor:
    """Attention weights [H, B, K] and weights of the queries [H, m, B] -> [H, m, high]; keys from a query's limit on do not count."""
    sums = rows.new_empty(*weight.shape[:2], group.high)
    near = rows[:, :, group.low : group.high] * mask if group.low < group.high else None
    for i in range(weight.shape[1]):  # one at a time: a thin matrix product is far slower than so many of one row
        one = weight[:, i : i + 1]
        torch.bmm(one, rows[:, :, : group.low], out=sums[:, i : i + 1, : group.low])
        if near is not None:
            torch.bmm(one, near, out=sums[:, i : i + 1, group.low :])
    return sums


@dataclass(frozen=True)
class WatchedPlan:
    """A plan of tree attention that lets a RowInfluence see queries and keys."""

    way: TreePlan
    watch: RowInfluence

    @property
    def length(self) -> int:
        """Tokens that the model must be given."""
        return self.way.length

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return self.way.depth

    @property
    def sights(self) -> Mapping[int, Sight]:
        """What the layers see."""
        return self.way.sights

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, variant: Variant = CAUSAL) -> Tensor:
        """[1, H, T, D], [1, H or fewer, T, D] twice -> [1, T, H, D]. Raises ValueError for a layer whose attention weights are others."""
        if not variant.plain(self.depth) or key.shape[-1] != value.shape[-1]:
            raise ValueError(
                f"influence is read from plain attention, and on a path of {self.depth} tokens this model has windows, soft caps, sinks or values of "
                "another size than keys: use a model without, or a branching rule that needs no influence"
            )
        paths = self.way.paths
        if isinstance(paths, Stacked):
            sums = self.watch.new_sums(query.shape[1], query)
            out = paths.watched(query, key, value, scale, self.watch.folding, sums)
            self.watch.end_layer(sums)
            return out
        self.watch.add_layer(query, key, scale)
        return self.way.attend(query, key, value, scale)


@dataclass(frozen=True)
class Influence:
    """What FCI is asked for: how paths are cut into steps, and how far apart steps must be."""

    separators: Separators
    delta: int = 4

    def __post_init__(self) -> None:
        if self.delta < 1:
            raise ValueError(f"delta is a number of steps, at least 1, got {self.delta}")

    def watch(self, row: ScoreRow) -> RowInfluence:
        """The watch of one row, for all paths on it that the policy ended."""
        stepped = [path_steps(line, row, self.separators, self.delta) for line in row.lines()]
        sizes = [np.diff([*path.steps.starts, path.steps.length]) for path in stepped]
        first = np.cumsum([0, *map(len, sizes)])
        step = [
            np.append(np.full(path.prompt, first[-1]), at + np.repeat(np.arange(len(size)), size))
            for path, size, at in zip(stepped, sizes, first, strict=False)
        ]
        base = np.cumsum([0, *map(len, step)]).tolist()
        columns = torch.from_numpy(np.concatenate([np.zeros(0, dtype=int), *step]))
        counts = torch.from_numpy(np.concatenate([*sizes, np.ones(1)]))
        return RowInfluence(stepped, partial(blocks_of_runs, row, stepped), base, columns, counts, folding(row, stepped, base))


def influences(rows: Sequence[ScoreRow], watches: Sequence[RowInfluence]) -> list[Tensor]:
    """[T] of each row: the FCI of each token's step, its mean over the paths seen that share the token; 0 on no such path.

    A node may stand on several rows, and several times on one, each time with others of its paths.
    """
    nodes: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # of each node so far: sum and number
    for row, watch in zip(rows, watches, strict=True):
        total, seen = (np.zeros(len(row)) for _ in range(2))
        for path, score in watch.scores():
            response = path.line[path.prompt :]
            total[response] += np.repeat(score, np.diff([*path.steps.starts, path.steps.length]))
            seen[response] += 1
        for tree, node, start, stop in row.spans:
            before = nodes.get((tree, node), (0.0, 0.0))
            nodes[tree, node] = before[0] + total[start:stop], before[1] + seen[start:stop]
    columns = []
    for row in rows:
        column = np.zeros(len(row))
        for tree, node, start, stop in row.spans:
            total, seen = nodes[tree, node]
            column[start:stop] = total / np.maximum(seen, 1)
        columns.append(torch.from_numpy(column))
    return columns


def folding(row: ScoreRow, stepped: Sequence[PathSteps], base: Sequence[int]) -> Folding:
    """The Folding of a row: for every token that adds to a path, how much and to which columns."""
    used = [np.flatnonzero(path.limit) for path in stepped]
    columns = [
        np.concatenate([np.zeros(0, dtype=kind), *parts])
        for kind, parts in (
            (np.int64, [path.line[some] for path, some in zip(stepped, used, strict=True)]),
            (np.int64, [np.full(len(some), at) for some, at in zip(used, base, strict=False)]),
            (np.int64, [path.limit[some] for path, some in zip(stepped, used, strict=True)]),
            (np.float64, [path.weight[some] for path, some in zip(stepped, used, strict=True)]),
        )
    ]
    order = np.argsort(columns[0], kind="stable")
    asking, at, limit, weight = (column[order] for column in columns)
    return Folding(np.searchsorted(asking, np.arange(len(row) + 1)), at, limit, weight)


def blocks_of_runs(row: ScoreRow, stepped: Sequence[PathSteps]) -> list[RunBlocks]:
    """The runs of a row with something to add."""
    if not len(row):
        return []
    line = runs(row.parent.numpy(), row.end.numpy())
    paths: list[list[int]] = [[] for _ in range(len(line))]
    for path, one in enumerate(stepped):
        run = int(np.searchsorted(line.stop, one.line[-1], side="right")) if len(one.line) else -1
        while run >= 0:
            paths[run].append(path)
            run = int(line.above[run])
    run_blocks = []
    for run in range(len(line)):
        blocks = list(blocks_of(line, run, stepped, paths[run]))
        if blocks:
            run_blocks.append(RunBlocks(line.path(run), blocks))
    return run_blocks


def blocks_of(line: Any, run: int, stepped: Sequence[PathSteps], paths: Sequence[int]) -> Iterator[QueryBlock]:
    """The blocks of a run that add anything to a path."""
    start, stop, before = int(line.start[run]), int(line.stop[run]), int(line.before[run])
    for first in range(start, stop, BLOCK):
        end = min(first + BLOCK, stop)
        place = slice(before + first - start, before + end - start)
        groups = []
        for level in range(LEVELS):
            some = [(path, stepped[path]) for path in paths if stepped[path].level == level]
            group = group_of(some, place)
            if group is not None:
                groups.append(group)
        if groups:
            yield QueryBlock(first, end, place.stop, groups)


def group_of(paths: Sequence[tuple[int, PathSteps]], place: slice) -> PathGroup | None:
    """What the queries at some path positions add to paths cut by the same separators; None for nothing.

    Such paths agree on the steps before a token they share, but not on the size of a step that they leave together.
    """
    limit = np.zeros(place.stop - place.start, dtype=np.int64)
    rows: dict[bytes, int] = {}
    weights: list[np.ndarray] = []
    where = []
    for path, one in paths:
        there = one.weight[place]
        if not there.any():
            continue
        weight = np.append(there, np.zeros(len(limit) - len(there)))  # a path may end here
        limit[: len(there)] = np.maximum(limit[: len(there)], one.limit[place])
        row = rows.setdefault(weight.tobytes(), len(rows))
        if row == len(weights):
            weights.append(weight)
        where.append((path, row))
    if not where:
        return None
    used = limit[np.any(weights, axis=0)]
    return PathGroup(torch.from_numpy(np.stack(weights)), torch.from_numpy(limit), int(used.min()), int(used.max()), where)
