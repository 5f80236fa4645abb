"""Forward context influence: how much the later steps of a response attend to each of its steps (arXiv 2509.26628, eqs. 4-6).

With a the attention of a path's queries to its keys in one head, and steps j and k: M[j, k] is the mean of a over the queries of j
of its sum over them / |k|, y[k] the sum of M[j, k] over j >= k + delta, and FCI the largest y over all layers and heads.

It is read where the model attends, block by block of queries: y[k] is linear in a, so a block is folded over its queries at once and
only a number per head and key of each path stays. Queries that paths share are met once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ramulus.core.tree import Author
from ramulus.learn.attention.compiled import Folding, Stacked
from ramulus.learn.attention.runs import runs
from ramulus.learn.policy.steps import LEVELS, Separators, Steps, segment

if TYPE_CHECKING:
    from ramulus.learn.attention.tree_attention import TreePlan
    from ramulus.learn.batch.score_row import ScoreRow

BLOCK = 64  # queries met at once
HELD = 2**18  # attention weights computed at once on a CPU, where a single key head needs no more
CALM = 60.0  # exp(-60) to exp(60), and the sum of 2^40 of them, are ordinary numbers in float32


@dataclass(frozen=True)
class Trail:
    """One path of a row: its steps, and what each token of it, as a query, adds to the keys before `limit`."""

    line: np.ndarray  # [L] where its tokens stand on the row
    steps: Steps
    prompt: int  # tokens before the response
    level: int  # of the separators
    limit: (
        np.ndarray
    )  # [L] path positions below it are of steps at least delta before the query's, 0 where there are none
    weight: np.ndarray  # [L] one over the size of the query's step, 0 where limit is


def trail(line: np.ndarray, row: ScoreRow, separators: Separators, delta: int) -> Trail:
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
    return Trail(line, steps, prompt, level, np.append(nothing.astype(int), limit), np.append(nothing, weight))


@dataclass(frozen=True)
class Share:
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
class Block:
    """Queries of one run: tokens [first, last) of the row, the last of them with `keys` tokens on its path."""

    first: int
    last: int
    keys: int
    shares: list[Share]


@dataclass(frozen=True)
class Stretch:
    """An unbranched run of a row: where the tokens of its path stand, and its blocks."""

    path: list[tuple[int, int]]
    blocks: list[Block]


@dataclass
class Watch:
    """Adds up one row's influence while a model attends to it, layer by layer."""

    trails: list[Trail]
    cut: Callable[[], list[Stretch]]  # into what torch's operations meet
    base: list[int]  # where each path begins in the columns of `sums`
    step: Tensor  # [F] the column of `best` of each token of each path; the last column is for prompts
    size: Tensor  # [C] tokens of each step
    folding: Folding  # the same for kernels that attend and fold at once
    best: Tensor | None = None  # [C] so far

    @cached_property
    def stretches(self) -> list[Stretch]:
        """The runs that add something; not needed where kernels attend."""
        return self.cut()

    def over(self, way: TreePlan) -> Watched:
        """What to give the model instead of its plan."""
        return Watched(way, self)

    @torch.no_grad()
    def add(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """One layer: [1, H, T, D] and [1, H or fewer, T, D]; in float32 or more, whatever autocast is on."""
        with torch.autocast(query.device.type, enabled=False):
            sums = self.sums(query.shape[1], query)
            query = query[0].to(sums.dtype) * (query.shape[-1] ** -0.5 if scale is None else scale)
            query = query.unflatten(0, (key.shape[1], -1))
            room, calm = self.room(query), bounded(query, key[0].to(sums.dtype))
            for part in self.stretches:
                known = torch.cat([key[0, :, a:b] for a, b in part.path], 1).to(sums.dtype)
                known = known.transpose(1, 2).contiguous()  # a product with it as it lies is the fastest
                for block in part.blocks:
                    self.meet(block, query, known, room, calm, sums)
            self.close(sums)

    def room(self, query: Tensor) -> Tensor:
        """Where attention weights are computed: new memory for every block would cost more than the arithmetic."""
        needed = max(
            (query.shape[1] * (b.last - b.first) * b.keys for s in self.stretches for b in s.blocks), default=0
        )
        return query.new_empty(max(held(query.device), needed))

    def meet(self, block: Block, query: Tensor, known: Tensor, room: Tensor, calm: bool, sums: Tensor) -> None:
        """Queries [Hk, G, T, D], already scaled, of a block with the keys [Hk, D, K] of its path, some key heads at a time."""
        shared, count = query.shape[1], block.last - block.first
        later = torch.full((count, count), -torch.inf, dtype=sums.dtype, device=sums.device).triu_(1)
        shares = [(share, share.weight.to(sums), share.mask(sums)) for share in block.shares]
        asked, known = query[:, :, block.first : block.last].flatten(1, 2), known[:, :, : block.keys]
        some = max(1, held(query.device) // (shared * count * block.keys))
        for h in range(0, known.shape[0], some):
            keys = known[h : h + some]
            heads = keys.shape[0]
            scores = room[: heads * shared * count * block.keys].view(heads, -1, block.keys)
            rows = attention(asked[h : h + some], keys, scores, later, calm)
            inverse = rows.sum(-1)[:, None].reciprocal_()
            into = sums[h * shared : (h + heads) * shared]
            for share, weight, mask in shares:
                self.count(share, folded(rows, weight * inverse, share, mask), into)

    def sums(self, heads: int, like: Tensor) -> Tensor:
        """Room for one layer, [H, F]."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return torch.zeros(heads, len(self.step), dtype=wide, device=like.device)

    def count(self, share: Share, found: Tensor, sums: Tensor) -> None:
        """Add what a share makes of some heads, [H, m, high], to sums [H, F]."""
        for path, row in share.paths:
            at = self.base[path]
            sums[:, at : at + share.high] += found[:, row]

    def close(self, sums: Tensor) -> None:
        """End a layer: the mean over the keys of each step, the largest over heads and layers."""
        step, size = self.step.to(sums.device), self.size.to(sums)
        means = sums.new_zeros(len(sums), len(size)).index_add_(1, step, sums) / size
        best = means.amax(0)
        self.best = best if self.best is None else torch.maximum(self.best, best)

    def scores(self) -> Iterator[tuple[Trail, np.ndarray]]:
        """Each path with the FCI [S] of its steps; 0 for the first one and from the end of the thinking on."""
        if self.best is None:
            raise ValueError(
                "no layer attended to this row: the model must attend through ramulus's registered attention"
            )
        every, at = self.best.double().cpu().numpy(), 0
        for path in self.trails:
            score = every[at : at + len(path.steps.starts)].copy()
            at += len(score)
            score[:1] = 0
            if path.steps.think_end is not None:
                score[path.steps.think_end :] = 0
            yield path, score


def held(device: torch.device) -> int:
    """Attention weights computed at once; elsewhere than on a CPU it is calls that cost."""
    return HELD if device.type == "cpu" else 16 * HELD


def bounded(query: Tensor, key: Tensor) -> bool:
    """Whether no product of queries [..., D], already scaled, with keys [..., D] is too large for its exponential."""
    if (
        not query.numel() or query.device.type != "cpu"
    ):  # asking a GPU costs more than the row maxima that it would spare
        return False
    return float(query.norm(dim=-1).amax() * key.norm(dim=-1).amax()) < CALM


def attention(query: Tensor, key: Tensor, scores: Tensor, later: Tensor, calm: bool) -> Tensor:
    """Causal attention weights [Hk x G, B, K] of the last B tokens, each row up to a factor: [Hk, G x B, D], [Hk, D, K], [B, B].

    `later` is 0 or -inf. They are computed in `scores` [Hk, G x B, K]. A softmax would pass over them more often.
    """
    torch.bmm(query, key, out=scores)
    count = later.shape[0]
    rows = scores.view(-1, count, scores.shape[-1])
    rows[:, :, -count:] += later
    if not calm:
        rows -= rows.amax(-1, keepdim=True)
    return rows.exp_()


def folded(rows: Tensor, weight: Tensor, share: Share, mask: Tensor) -> Tensor:
    """Attention weights [H, B, K] and weights of the queries [H, m, B] -> [H, m, high]; keys from a query's limit on do not count."""
    found = rows.new_empty(*weight.shape[:2], share.high)
    near = rows[:, :, share.low : share.high] * mask if share.low < share.high else None
    for i in range(weight.shape[1]):  # one at a time: a thin matrix product is far slower than so many of one row
        one = weight[:, i : i + 1]
        torch.bmm(one, rows[:, :, : share.low], out=found[:, i : i + 1, : share.low])
        if near is not None:
            torch.bmm(one, near, out=found[:, i : i + 1, share.low :])
    return found


@dataclass(frozen=True)
class Watched:
    """A plan of tree attention that lets a Watch see queries and keys."""

    way: TreePlan
    watch: Watch

    @property
    def length(self) -> int:
        """Tokens that the model must be given."""
        return self.way.length

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return self.way.depth

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, H, T, D], [1, H or fewer, T, D] twice -> [1, T, H, D]."""
        paths = self.way.paths
        if isinstance(paths, Stacked):
            sums = self.watch.sums(query.shape[1], query)
            out = paths.watched(query, key, value, scale, self.watch.folding, sums)
            self.watch.close(sums)
            return out
        self.watch.add(query, key, scale)
        return self.way.attend(query, key, value, scale)


@dataclass(frozen=True)
class Influence:
    """What FCI is asked for: how paths are cut into steps, and how far apart steps must be."""

    separators: Separators
    delta: int = 4

    def __post_init__(self) -> None:
        if self.delta < 1:
            raise ValueError(f"delta is a number of steps, at least 1, got {self.delta}")

    def watch(self, row: ScoreRow) -> Watch:
        """The watch of one row, for all paths on it that the policy ended."""
        trails = [trail(line, row, self.separators, self.delta) for line in row.lines()]
        sizes = [np.diff([*path.steps.starts, path.steps.length]) for path in trails]
        first = np.cumsum([0, *map(len, sizes)])
        step = [
            np.append(np.full(path.prompt, first[-1]), at + np.repeat(np.arange(len(size)), size))
            for path, size, at in zip(trails, sizes, first, strict=False)
        ]
        base = np.cumsum([0, *map(len, step)]).tolist()
        columns = torch.from_numpy(np.concatenate([np.zeros(0, dtype=int), *step]))
        counts = torch.from_numpy(np.concatenate([*sizes, np.ones(1)]))
        return Watch(trails, partial(stretches, row, trails), base, columns, counts, folding(row, trails, base))


def influences(rows: Sequence[ScoreRow], watches: Sequence[Watch]) -> list[Tensor]:
    """[T] of each row: the FCI of each token's step, its mean over the paths seen that share the token, on whichever row; 0 on no such path."""
    nodes: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # of each node so far: sum and number
    for row, watch in zip(rows, watches, strict=True):
        total, seen = (np.zeros(len(row)) for _ in range(2))
        spans = [(nodes.get((tree, node)), slice(start, stop)) for tree, node, start, stop in row.spans]
        for before, place in spans:
            if before is not None:
                total[place], seen[place] = before
        for path, score in watch.scores():
            response = path.line[path.prompt :]
            total[response] += np.repeat(score, np.diff([*path.steps.starts, path.steps.length]))
            seen[response] += 1
        nodes |= {(tree, node): (total[start:stop], seen[start:stop]) for tree, node, start, stop in row.spans}
    found = []
    for row in rows:
        column = np.zeros(len(row))
        for tree, node, start, stop in row.spans:
            total, seen = nodes[tree, node]
            column[start:stop] = total / np.maximum(seen, 1)
        found.append(torch.from_numpy(column))
    return found


def folding(row: ScoreRow, trails: Sequence[Trail], base: Sequence[int]) -> Folding:
    """Of every token that adds something to a path, what and to which columns."""
    used = [np.flatnonzero(path.limit) for path in trails]
    found = [
        np.concatenate([np.zeros(0, dtype=kind), *parts])
        for kind, parts in (
            (np.int64, [path.line[some] for path, some in zip(trails, used, strict=True)]),
            (np.int64, [np.full(len(some), at) for some, at in zip(used, base, strict=False)]),
            (np.int64, [path.limit[some] for path, some in zip(trails, used, strict=True)]),
            (np.float64, [path.weight[some] for path, some in zip(trails, used, strict=True)]),
        )
    ]
    order = np.argsort(found[0], kind="stable")
    asking, at, limit, weight = (column[order] for column in found)
    return Folding(np.searchsorted(asking, np.arange(len(row) + 1)), at, limit, weight)


def stretches(row: ScoreRow, trails: Sequence[Trail]) -> list[Stretch]:
    """The runs of a row with something to add."""
    if not len(row):
        return []
    line = runs(row.parent.numpy(), row.end.numpy())
    paths: list[list[int]] = [[] for _ in range(len(line))]
    for path, one in enumerate(trails):
        run = int(np.searchsorted(line.stop, one.line[-1], side="right")) if len(one.line) else -1
        while run >= 0:
            paths[run].append(path)
            run = int(line.above[run])
    made = []
    for run in range(len(line)):
        blocks = list(blocks_of(line, run, trails, paths[run]))
        if blocks:
            made.append(Stretch(line.path(run), blocks))
    return made


def blocks_of(line: Any, run: int, trails: Sequence[Trail], paths: Sequence[int]) -> Iterator[Block]:
    """The blocks of a run that add anything to a path."""
    start, stop, before = int(line.start[run]), int(line.stop[run]), int(line.before[run])
    for first in range(start, stop, BLOCK):
        end = min(first + BLOCK, stop)
        place = slice(before + first - start, before + end - start)
        shares = []
        for level in range(LEVELS):
            some = [(path, trails[path]) for path in paths if trails[path].level == level]
            share = share_of(some, place)
            if share is not None:
                shares.append(share)
        if shares:
            yield Block(first, end, place.stop, shares)


def share_of(paths: Sequence[tuple[int, Trail]], place: slice) -> Share | None:
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
    return Share(torch.from_numpy(np.stack(weights)), torch.from_numpy(limit), int(used.min()), int(used.max()), where)
