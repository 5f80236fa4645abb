"""Tree attention that costs no more than its paths: queries of one unbranched run against the gathered keys of its root path.

Runs are cut into chunks of queries, chunks of similar size share one padded call, and a run that starts at a root is plain causal
attention. Everything here is planned once per row with numpy; a layer only gathers and calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ramulus.learn.attention.merged import merge, provided, rows

CHUNK = 256  # most queries of one chunk: its last keys are masked, so a longer one wastes more
CAUSAL = 256  # fewest tokens of a run from a root that are met in a causal call: with fewer, a mask is the faster
MASKED = 1.12  # what a pair under a mask costs beside one without
CALL = 2**20  # what one more call costs, in query-key pairs x heads x head size (measured on CPU, forward and backward)
ROW = 2**12  # what one more row of keys or queries costs, in the same unit; copies are slow beside arithmetic
MOST = 1024  # keys of one group, unless one chunk has more: copies that fit into a core's cache
Rows = slice | Tensor
"""Rows of a tensor: a range, which needs no copy, or their numbers [N] long."""


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
    keys: np.ndarray  # tokens gathered: the path up to `stop`
    causal: np.ndarray  # a whole long run from a root: no mask

    @property
    def queries(self) -> np.ndarray:
        """[C] tokens."""
        return self.stop - self.start


def cut(row: Runs, most: int = CHUNK) -> Chunks:
    """Cut long runs into even chunks, but for those that begin at a root."""
    length = row.length
    count = np.where(row.near == 0, 1, -(-length // most))
    run = np.repeat(np.arange(len(row)), count)
    nth = np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
    start = row.start[run] + length[run] * nth // count[run]
    stop = row.start[run] + length[run] * (nth + 1) // count[run]
    return Chunks(run, start, stop, row.near[run] + stop - row.start[run], ((row.near == 0) & (length >= CAUSAL))[run])


def bucket(queries: np.ndarray, keys: np.ndarray, call: float) -> list[np.ndarray]:
    """Put chunks of similar size together: one more goes in where its padding costs less than a call of its own."""
    groups: list[np.ndarray] = []
    order = np.lexsort((queries, keys, np.ceil(np.log2(queries))))
    begin, wide, deep = 0, 0, 0
    for i, chunk in enumerate(order.tolist()):
        q, k = int(queries[chunk]), int(keys[chunk])
        wider, deeper = max(wide, q), max(deep, k)
        padded = (i + 1 - begin) * wider * deeper - (i - begin) * wide * deep > call + q * k
        if i > begin and (padded or (i + 1 - begin) * deeper > MOST):
            groups.append(order[begin:i])
            begin, wider, deeper = i, q, k
        wide, deep = wider, deeper
    return [*groups, order[begin:]] if len(order) else groups


@dataclass(frozen=True)
class Group:
    """Chunks padded to Q queries and K keys and answered by one call; a slot is one of its B x Q queries."""

    size: int  # B chunks
    queries: int  # Q
    keys: int  # K
    asked: Rows  # [B * Q] the token of each slot
    known: Rows  # [B * K] its keys
    tokens: Rows  # the tokens that are answered
    slots: Tensor | None = None  # and their slots; None where no slot is padding
    idle: Tensor | None = None  # the other slots
    offset: Tensor | None = None  # [1 or B] query i sees the keys up to offset + i; None for causal calls
    masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, repr=False, compare=False)  # made so far

    @property
    def causal(self) -> bool:
        """Whether query i sees keys 0 to i."""
        return self.offset is None

    def mask(self, shared: int, dtype: torch.dtype) -> Tensor | None:
        """[1 or B, 1, Q * shared, K] for `shared` heads of a query one after the other: 0 or -inf; None where causal."""
        if self.offset is None:
            return None
        if (shared, dtype) not in self.masks:
            device = self.offset.device
            query = torch.arange(self.queries, device=device).repeat_interleave(shared)
            seen = torch.arange(self.keys, device=device) <= (query + self.offset[:, None])[:, :, None]
            zeros = torch.zeros(seen.shape, dtype=dtype, device=device)
            self.masks[shared, dtype] = zeros.masked_fill_(~seen, -torch.inf)[:, None]
        return self.masks[shared, dtype]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """The answers of its tokens by SDPA: [T, H, D], [T, H or fewer, D] twice -> [N, H, D]."""
        given = (query, self.asked), (key, self.known), (value, self.known)
        q, k, v = (rows(x, where).unflatten(0, (self.size, -1)).transpose(1, 2) for x, where in given)
        grouped = q.shape[1] != k.shape[1]
        mask = self.mask(1, q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        out = out.transpose(1, 2).flatten(0, 1)
        return out if self.slots is None else out.index_select(0, self.slots)


def fit(mask: Tensor, query: Tensor) -> Tensor:
    """The mask in the dtype that SDPA wants beside this query; autocast casts both by itself."""
    same = mask.dtype == query.dtype or torch.is_autocast_enabled(query.device.type)
    return mask if same else mask.to(query.dtype)


@dataclass(frozen=True)
class Gather:
    """The plan of one row: groups that answer every token once."""

    groups: list[Group]
    inverse: Tensor  # [T] long: where each token's answer stands when those of all groups follow each other

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, H, T, D] each, keys and values with as many heads or fewer -> [1, T, H, D]."""
        if provided(query.device):
            return merge(query, key, value, scale, self.groups)
        kind = query.device.type  # under autocast SDPA would cast every group's copies
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        q, k, v = (x[0].transpose(0, 1).to(cast) for x in (query, key, value))
        parts = [group.attend(q, k, v, scale) for group in self.groups]
        return torch.cat(parts).index_select(0, self.inverse)[None]


def sizes(chunks: Chunks, width: int) -> tuple[list[np.ndarray], float]:
    """The groups of chunks, causal ones first, and what they cost in query-key pairs at heads x head size = `width`."""
    groups: list[np.ndarray] = []
    cost = 0.0
    for causal in (True, False):
        members = np.flatnonzero(chunks.causal == causal)
        for group in bucket(chunks.queries[members], chunks.keys[members], CALL / width):
            groups.append(members[group])
            q, k = int(chunks.queries[groups[-1]].max()), int(chunks.keys[groups[-1]].max())
            pairs = q * (q / 2 + CAUSAL) if causal else q * k * MASKED
            cost += CALL / width + len(group) * (pairs + (q + k) * ROW / width)
    return groups, cost


def gather(row: Runs, chunks: Chunks, groups: list[np.ndarray], device: torch.device) -> Gather:
    """Write the index of every group in one sweep over the row, keeping the current root path in a buffer."""
    known = [np.zeros((len(g), int(chunks.keys[g].max())), dtype=np.int64) for g in groups]
    seat = {int(chunk): (g, i) for g, group in enumerate(groups) for i, chunk in enumerate(group)}
    path, last = np.zeros(row.depth, dtype=np.int64), -1
    for chunk, run in enumerate(chunks.run.tolist()):
        if run != last:
            path[row.before[run] : row.before[run] + row.length[run]] = np.arange(row.start[run], row.stop[run])
            last = run
        g, i = seat[chunk]
        n, deep = int(chunks.keys[chunk]), int(row.before[run] + chunks.stop[chunk] - row.start[run])
        known[g][i, :n] = path[deep - n : deep]
    made = [group_of(chunks, group, keys, device) for group, keys in zip(groups, known, strict=True)]
    order = np.concatenate([np.arange(chunks.start[c], chunks.stop[c]) for group in groups for c in group])
    return Gather(made, torch.from_numpy(np.argsort(order)).to(device))


def group_of(chunks: Chunks, group: np.ndarray, known: np.ndarray, device: torch.device) -> Group:
    """The chunks `group` with their keys [B, K]."""
    count, causal = chunks.queries[group], bool(chunks.causal[group[0]])
    most = int(count.max())
    at = np.arange(most)
    used = (at < count[:, None]).reshape(-1)
    asked = np.where(at < count[:, None], chunks.start[group][:, None] + at, 0).reshape(-1)
    tokens, slots, idle = asked[used], None, None
    if not used.all():
        slots, idle = (torch.from_numpy(np.flatnonzero(x)).to(device) for x in (used, ~used))
    offset = chunks.keys[group] - count
    offset = offset[:1] if (offset == offset[0]).all() else offset
    ask, keys, answered = (ranged(index, device) for index in (asked, known.reshape(-1), tokens))
    shift = None if causal else torch.from_numpy(offset).to(device)
    return Group(len(group), most, known.shape[1], ask, keys, answered, slots, idle, shift)


def ranged(index: np.ndarray, device: torch.device) -> Rows:
    """Row numbers as a range, if they are one."""
    first = int(index[0])
    if (index == np.arange(first, first + len(index))).all():
        return slice(first, first + len(index))
    return torch.from_numpy(index).to(device)
