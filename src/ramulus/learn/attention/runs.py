"""The unbranched runs of a row of trees, and attention on them where there are no kernels: one call of SDPA a run, against its root path."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ramulus.models.variant import CAUSAL, Variant
from ramulus.models.variant import attend as spelled

CALL = 2**11  # what one more call costs, in pairs of query and key (measured on a CPU, forward and backward)
_ROW = 2**5  # what one more gathered key costs, in the same unit


@dataclass(frozen=True)
class Runs:
    """The unbranched runs of a row, in preorder."""

    start: np.ndarray  # [R] first token
    stop: np.ndarray  # [R] one past the last
    before: np.ndarray  # [R] tokens above it on its path
    above: np.ndarray  # [R] the run it hangs from, -1 for none

    def __len__(self) -> int:
        return len(self.start)

    @property
    def length(self) -> np.ndarray:
        """[R] tokens of each run."""
        return self.stop - self.start

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return int((self.before + self.length).max())

    def path(self, run: int) -> list[tuple[int, int]]:
        """Token ranges from the root to the end of a run."""
        ranges = []
        while run >= 0:
            ranges.append((int(self.start[run]), int(self.stop[run])))
            run = int(self.above[run])
        return ranges[::-1]


def runs(parent: np.ndarray, end: np.ndarray) -> Runs:
    """Merge the chains of a row: a token goes on with the run of the one before it if that is its parent and their ends agree."""
    index = np.arange(len(parent))
    first = (parent != index - 1) | (end != np.roll(end, 1))
    first[:1] = True
    start = np.flatnonzero(first)
    stop = np.append(start[1:], len(parent))
    run = np.cumsum(first) - 1
    above = np.where(parent[start] == start, -1, run[parent[start]])
    before = np.zeros(len(start), dtype=np.int64)
    for r in np.flatnonzero(above >= 0):
        before[r] = before[above[r]] + stop[above[r]] - start[above[r]]
    return Runs(start, stop, before, above)


@dataclass(frozen=True)
class PathByPath:
    """The plan of one row for torch's operations: time grows with the paths' lengths, not with the square of the row's."""

    paths: Tensor  # [N] long: the tokens of the path of each run, one after the other
    keys: list[int]  # [R] tokens on each
    queries: list[int]  # [R] the last of them, those of the run itself
    mask: Tensor  # [Q, K], 0 or -inf: its lower right corner, of as many lines and columns as a run has queries and keys, is that of the run

    @classmethod
    def of(cls, row: Runs, device: torch.device, dtype: torch.dtype) -> PathByPath:
        """The plan of the runs of a row; `dtype` is that of queries and keys."""
        ranges = [np.arange(start, stop) for run in range(len(row)) for start, stop in row.path(run)]
        below = row.before > 0  # what begins at a root is plain causal attention
        queries, keys = (int(x[below].max(initial=0)) for x in (row.length, row.before + row.length))
        mask = torch.full((queries, keys), -torch.inf, dtype=dtype, device=device).triu_(keys - queries + 1)
        paths = torch.from_numpy(np.concatenate(ranges)).to(device)
        return cls(paths, (row.before + row.length).tolist(), row.length.tolist(), mask)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, variant: Variant = CAUSAL) -> Tensor:
        """[1, H, T, D], [1, H or fewer, T, D] twice -> [1, T, H, D of values]; tokens behind the runs' are padding and get zeros."""
        rest = query.shape[2] - sum(self.queries)
        wide = torch.promote_types(query.dtype, torch.float32)  # gradients of tokens that paths share are added up in it
        key_value_parts = (x.to(wide).index_select(2, self.paths).to(x.dtype).split(self.keys, 2) for x in (key, value))
        query_parts = query[:, :, : query.shape[2] - rest].split(self.queries, 2)
        parts = [self._one(q, k, v, scale, variant) for q, k, v in zip(query_parts, *key_value_parts, strict=True)]
        out = torch.cat(parts, 2).transpose(1, 2)
        return F.pad(out, (0, 0, 0, 0, 0, rest)) if rest else out

    def _one(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, variant: Variant) -> Tensor:
        """The queries of one run over the keys of its path."""
        grouped, n, length = q.shape[1] != k.shape[1], q.shape[2], k.shape[2]
        if variant.plain(length):
            causal = n == length
            mask = None if causal else fit(self.mask, q)[-n:, -length:]
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        position = torch.arange(length - n, length, device=q.device)[:, None]
        at = torch.arange(length, device=q.device)[None]
        hidden = (at > position) | (at < variant.sight.first(position))
        bias = torch.zeros(n, length, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
        if variant.softcap is None and variant.sinks is None:
            return F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=grouped)
        return spelled(q, k, v, bias[None, None], q.shape[-1] ** -0.5 if scale is None else scale, variant)


def cheaper(row: Runs, tokens: int) -> bool:
    """Whether path by path costs less than a mask of all tokens of the row."""
    keys = row.before + row.length
    pairs = np.where(row.before == 0, row.length * keys / 2, row.length * keys)
    return float((pairs + _ROW * keys + CALL).sum()) < tokens**2 + CALL


def fit(mask: Tensor, query: Tensor) -> Tensor:
    """The mask in the dtype that SDPA wants beside this query; autocast casts both by itself."""
    same = mask.dtype == query.dtype or torch.is_autocast_enabled(query.device.type)
    return mask if same else mask.to(query.dtype)
