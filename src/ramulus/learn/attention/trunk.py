"""Tree attention with trunks: in preorder, all descendants of a token are one range, so they meet a path they share in one unmasked call.

A stretch of the path above many tokens (a trunk) is taken out of what they gather; the rest stays in the padded groups of gather.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ramulus.learn.attention.gather import CALL, ROW, Chunks, Gather, Rows, Runs, cut, gather, ranged, sizes
from ramulus.learn.attention.merged import merge, provided

MERGE = 2**14  # what one more query of a trunk costs with its merging, in the units of gather.py
# how much more than a trunk's price gathering must cost; the cheapest plan is taken
EAGER = (0.06, 0.25, 1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Felled:
    """A row whose trunks are taken out, as numpy columns."""

    row: Runs  # `near` counts only the tokens above that are still to be gathered
    keys: list[np.ndarray]  # of each trunk, tokens in path order
    first: list[int]  # and the range of tokens that see them all
    last: list[int]


def fell(row: Runs, parent: np.ndarray, end: np.ndarray, eager: float) -> Felled:
    """Walk down the row; the open path above a fork becomes a trunk where gathering it for all runs below costs `eager` times more."""
    top = parent[row.start] == row.start
    above = np.where(top, -1, np.searchsorted(row.stop, parent[row.start], side="right"))
    below = end[row.start]
    runs_below = np.searchsorted(row.start, below) - np.arange(len(row)) - 1
    most = eager * (CALL + (below - row.stop) * MERGE)
    near, left = (np.zeros(len(row), dtype=np.int64) for _ in range(2))  # open path above and below each run
    path = np.zeros(row.depth, dtype=np.int64)
    trunk: list[int] = []
    keys: list[np.ndarray] = []
    for r, (up, deep, n) in enumerate(zip(above.tolist(), row.before.tolist(), row.length.tolist(), strict=True)):
        near[r] = left[up] if up >= 0 else 0
        left[r] = near[r] + n
        path[deep : deep + n] = np.arange(row.start[r], row.stop[r])
        if runs_below[r] * left[r] * ROW > most[r]:
            trunk.append(r)
            keys.append(path[deep + n - left[r] : deep + n].copy())
            left[r] = 0
    return Felled(replace(row, near=near), keys, row.stop[trunk].tolist(), below[trunk].tolist())


@dataclass(frozen=True)
class Trunk:
    """The plan of one row: each trunk's keys and the range of tokens that see them, and the padded groups of what is left."""

    rest: Gather
    keys: list[Rows]  # of each trunk
    first: list[int]
    last: list[int]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, H, T, D], [1, H or fewer, T, D] twice -> [1, T, H, D]."""
        blocks = list(zip(self.keys, self.first, self.last, strict=True))
        return merge(query, key, value, scale, self.rest.groups, blocks)


@dataclass(frozen=True)
class Felling:
    """One way of felling a row, and what it costs in query-key pairs at heads x head size = `width`."""

    felled: Felled
    chunks: Chunks
    groups: list[np.ndarray]
    cost: float

    @classmethod
    def of(cls, felled: Felled, width: int) -> Felling:
        """Price it: the groups of what is left, and a call for each trunk."""
        chunks = cut(felled.row)
        groups, cost = sizes(chunks, width)
        for keys, first, last in zip(felled.keys, felled.first, felled.last, strict=True):
            seen = last - first
            cost += seen * len(keys) + (CALL + seen * MERGE + len(keys) * ROW) / width
        return cls(felled, chunks, groups, cost)

    def plan(self, device: torch.device) -> Trunk:
        """What every layer needs."""
        rest = gather(self.felled.row, self.chunks, self.groups, device)
        keys = [ranged(some, device) for some in self.felled.keys]
        return Trunk(rest, keys, self.felled.first, self.felled.last)


def trunks(row: Runs, parent: np.ndarray, end: np.ndarray, width: int, device: torch.device) -> Felling | None:
    """The cheapest way of felling a row; None where no trunk pays, or this torch lacks the operators."""
    if not provided(device):
        return None
    found: dict[tuple[int, ...], Felling] = {}
    for eager in EAGER:
        felled = fell(row, parent, end, eager)
        if felled.keys and tuple(felled.first) not in found:
            found[tuple(felled.first)] = Felling.of(felled, width)
    return min(found.values(), key=lambda felling: felling.cost, default=None)
