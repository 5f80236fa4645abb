"""Tree attention that costs no more than its paths: queries of one unbranched run against the gathered keys of its root path.

Runs are cut into chunks of queries, chunks of similar size share one padded call, and a run that starts at a root is plain causal
attention. Everything here is planned once per row with numpy; a layer only gathers and calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # most queries of one chunk: its last keys are masked, so a longer one wastes more
CALL = 2**20  # what one more call costs, in query-key pairs x heads x head size (measured on CPU, forward and backward)
ROW = 2**13  # what gathering one row of keys or queries costs, in the same unit; copies are slow beside arithmetic


@dataclass(frozen=True)
class Runs:
    """The unbranched runs of a row, in preorder."""

    start: np.ndarray  # [R] first token
    stop: np.ndarray  # [R] one past the last
    before: np.ndarray  # [R] tokens above it on its path
    near: np.ndarray  # [R] the last of them, those that are gathered: all, unless trunks are met apart

    def __len__(self) -> int:
        return len(self.start)

    @property
    def length(self) -> np.ndarray:
        """[R] tokens."""
        return self.stop - self.start

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return int((self.before + self.length).max())


def runs(parent: np.ndarray, end: np.ndarray) -> Runs:
    """Merge the chains of a row: a token goes on with the run of the one before it if that is its parent and their ends agree."""
    index = np.arange(len(parent))
    first = (parent != index - 1) | (end != np.roll(end, 1))
    first[0] = True
    start = np.flatnonzero(first)
    stop = np.append(start[1:], len(parent))
    run = np.cumsum(first) - 1
    above = np.where(parent[start] == start, -1, run[parent[start]])
    before = np.zeros(len(start), dtype=np.int64)
    for r in np.flatnonzero(above >= 0):
        before[r] = before[above[r]] + stop[above[r]] - start[above[r]]
    return Runs(start, stop, before, before)


@dataclass(frozen=True)
class Chunks:
    """Queries that are answered together: the tokens [start, stop) of one run, as [C] columns."""

    run: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    queries: (
        np.ndarray
    )  # rows in the call: the tokens, and for a causal chunk those above them, whose answers are dropped
    keys: np.ndarray  # tokens gathered: the path up to `stop`
    causal: np.ndarray  # query i sees keys 0..i: no mask


def cut(row: Runs, most: int = CHUNK) -> Chunks:
    """Cut long runs into even chunks; where the path above is short, its queries are repeated instead and no mask is needed."""
    length, path = row.length, row.near + row.length
    count = np.where(row.near == 0, 1, -(-length // most))
    size = -(-length // count)
    masked = length * (row.near + (length + size) / 2)
    causal = (row.near == 0) | (path * path / 2 < masked)
    count = np.where(causal, 1, count)
    run = np.repeat(np.arange(len(row)), count)
    nth = np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
    start = row.start[run] + length[run] * nth // count[run]
    stop = row.start[run] + length[run] * (nth + 1) // count[run]
    keys = row.near[run] + stop - row.start[run]
    return Chunks(run, start, stop, np.where(causal[run], keys, stop - start), keys, causal[run])


def bucket(queries: np.ndarray, keys: np.ndarray, call: float) -> list[np.ndarray]:
    """Put chunks of similar size together: one more goes in where its padding costs less than a call of its own."""
    groups: list[np.ndarray] = []
    order = np.lexsort((queries, keys, np.ceil(np.log2(queries))))
    begin, wide, deep = 0, 0, 0
    for i, chunk in enumerate(order.tolist()):
        q, k = int(queries[chunk]), int(keys[chunk])
        wider, deeper = max(wide, q), max(deep, k)
        if i > begin and (i + 1 - begin) * wider * deeper - (i - begin) * wide * deep > call + q * k:
            groups.append(order[begin:i])
            begin, wider, deeper = i, q, k
        wide, deep = wider, deeper
    return [*groups, order[begin:]] if len(order) else groups


@dataclass(frozen=True)
class Group:
    """Chunks padded to Q queries and K keys and answered by one call."""

    size: int  # B chunks
    queries: int  # Q
    keys: int  # K
    mask: Tensor | None  # [1 or B, 1, Q, K], 0 or -inf; None for causal groups

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[B * Q, H, D], [B * K, H or fewer, D] twice -> [B * Q, H, D]."""
        q, k, v = (x.unflatten(0, (self.size, -1)).transpose(1, 2) for x in (query, key, value))
        mask = None if self.mask is None else fit(self.mask, q)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)


def fit(mask: Tensor, query: Tensor) -> Tensor:
    """The mask in the dtype that SDPA wants beside this query; autocast casts both by itself."""
    same = mask.dtype == query.dtype or torch.is_autocast_enabled(query.device.type)
    return mask if same else mask.to(query.dtype)


@dataclass(frozen=True)
class Gather:
    """The plan of one row.

    All groups are gathered at once and split: a gather for each would give each a gradient of the whole row's size.
    """

    groups: list[Group]
    queries: (
        Tensor | None
    )  # [sum of B * Q] long, group after group; None where one path is the whole row and nothing is gathered
    keys: Tensor | None  # [sum of B * K] long
    inverse: Tensor | None  # [T] long: where each token's answer stands in the concatenated groups

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, H, T, D] each, keys and values with as many heads or fewer -> [1, T, H, D]."""
        kind = query.device.type  # under autocast SDPA would cast every group's copies
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        q, k, v = (x[0].transpose(0, 1).to(cast) for x in (query, key, value))
        if self.queries is None or self.keys is None or self.inverse is None:
            return self.groups[0].attend(q, k, v, scale)[None]
        asked = q.index_select(0, self.queries).split([g.size * g.queries for g in self.groups])
        known = (x.index_select(0, self.keys).split([g.size * g.keys for g in self.groups]) for x in (k, v))
        parts = [g.attend(*some, scale) for g, *some in zip(self.groups, asked, *known, strict=True)]
        return torch.cat(parts).index_select(0, self.inverse)[None]


def sizes(chunks: Chunks, width: int) -> tuple[list[np.ndarray], float]:
    """The groups of chunks, causal ones first, and what they cost in query-key pairs at heads x head size = `width`."""
    groups: list[np.ndarray] = []
    cost = 0.0
    for causal in (True, False):
        members = np.flatnonzero(chunks.causal == causal)
        for group in bucket(chunks.queries[members], chunks.keys[members], CALL / width):
            groups.append(members[group])
            rows, keys = chunks.queries[groups[-1]].max(), chunks.keys[groups[-1]].max()
            cost += CALL / width + len(group) * (rows * keys * (0.5 if causal else 1.0) + (rows + keys) * ROW / width)
    return groups, cost


def gather(row: Runs, chunks: Chunks, groups: list[np.ndarray], dtype: torch.dtype, device: torch.device) -> Gather:
    """Write the index of every group in one sweep over the row, keeping the current root path in a buffer."""
    total = int(row.stop[-1])
    shape = [(len(g), int(chunks.queries[g].max()), int(chunks.keys[g].max())) for g in groups]
    queries = [np.zeros((b, q), dtype=np.int64) for b, q, _ in shape]
    keys = [np.zeros((b, k), dtype=np.int64) for b, _, k in shape]
    inverse = np.zeros(total, dtype=np.int64)
    base = np.cumsum([0, *(b * q for b, q, _ in shape)])
    seat = {int(chunk): (g, i) for g, group in enumerate(groups) for i, chunk in enumerate(group)}
    path, last = np.zeros(row.depth, dtype=np.int64), -1
    for chunk, run in enumerate(chunks.run.tolist()):
        if run != last:
            path[row.before[run] : row.before[run] + row.length[run]] = np.arange(row.start[run], row.stop[run])
            last = run
        g, i = seat[chunk]
        n, q = int(chunks.keys[chunk]), int(chunks.queries[chunk])
        answered = int(chunks.stop[chunk] - chunks.start[chunk])
        deep = int(row.before[run] + chunks.stop[chunk] - row.start[run])
        keys[g][i, :n] = path[deep - n : deep]
        queries[g][i, :q] = path[deep - q : deep]
        slot = base[g] + i * shape[g][1] + q - answered
        inverse[chunks.start[chunk] : chunks.stop[chunk]] = np.arange(slot, slot + answered)
    made = [
        Group(b, q, k, None if chunks.causal[group[0]] else masked(chunks, group, dtype).to(device))
        for (b, q, k), group in zip(shape, groups, strict=True)
    ]
    if len(row) == 1:
        return Gather(made, None, None, None)
    flat = [np.concatenate([x.reshape(-1) for x in index]) for index in (queries, keys)]
    return Gather(made, *(torch.from_numpy(x).to(device) for x in (*flat, inverse)))


def masked(chunks: Chunks, group: np.ndarray, dtype: torch.dtype) -> Tensor:
    """[1 or B, 1, Q, K]: query i of a chunk sees the keys before the chunk and its own up to i; 0 there, -inf elsewhere."""
    offset = np.unique(chunks.keys[group] - chunks.queries[group])
    if len(offset) > 1:
        offset = chunks.keys[group] - chunks.queries[group]
    query, key = torch.arange(int(chunks.queries[group].max())), torch.arange(int(chunks.keys[group].max()))
    seen = key[None, None, :] <= query[None, :, None] + torch.from_numpy(offset)[:, None, None]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None]
