"""Keys and values of the active rows, and what attention needs to know of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ramulus.models.variant import CAUSAL, FULL, Sight, Variant, attend

ROUND = 32  # lengths are rounded up to a multiple of this, so that few shapes occur


@dataclass(frozen=True)
class Geometry:
    """What one token costs to remember."""

    layers: int
    heads: int  # key and value heads
    dim: int  # of one head
    dtype: torch.dtype
    device: torch.device
    shapes: tuple[tuple[int, int, int], ...] = ()  # key heads, key and value dimensions of each layer where these differ: the rest is unused

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token over all layers."""
        return self.layers * 2 * self.heads * self.dim * self.dtype.itemsize


def rounded(length: int) -> int:
    """`length` rounded up to a multiple of ROUND."""
    return -(-length // ROUND) * ROUND


class Copying(Protocol):
    """Kernels that copy between slots, and that read nothing but what was written."""

    def copy(self, store: Tensor, moves: list[tuple[int, int, int]]) -> None:
        """Of each (source, target, n) the first n positions of one row of the store over another, in this order."""
        ...


class Slots:
    """KV of `rows` sequences of up to `capacity` tokens: store [layers, 2, rows, heads, capacity, dim]."""

    def __init__(self, geometry: Geometry, kernels: Copying | None = None) -> None:
        self.geometry, self.kernels = geometry, kernels
        self.drop()

    def drop(self) -> None:
        """Give the memory back."""
        self._adopt(self._empty(0, 0))

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.rows * self.capacity * self.geometry.token_bytes

    def resize(self, rows: int, capacity: int, keep: int) -> None:
        """Make room for `rows` sequences of `capacity` tokens; the first `keep` rows survive."""
        if (rows, capacity) == (self.rows, self.capacity):
            return
        old, held = self.store, self.capacity
        if not keep:
            self.drop()
            del old  # before the new one is made: both at once may not fit
        store = self._empty(rows, capacity)
        if keep:
            store[:, :, :keep, :, :held] = old[:, :, :keep]
        self._adopt(store)

    def renew(self, rows: int, capacity: int, kept: list[tuple[int, int]]) -> None:
        """Make room for `rows` sequences of `capacity` tokens; slot i begins with the first n positions of what was the slot kept[i] = (slot, n)."""
        old = self.store
        if not kept:
            self.drop()
            del old  # before the new one is made: both at once may not fit
        store = self._empty(rows, capacity)
        for target, (source, n) in enumerate(kept):
            store[:, :, target, :, :n] = old[:, :, source, :, :n]
        self._adopt(store)

    def _empty(self, rows: int, capacity: int) -> Tensor:
        g = self.geometry
        make = torch.zeros if self.kernels is None else torch.empty  # without: masked positions are multiplied by 0, and 0 x NaN is NaN
        return make(g.layers, 2, rows, g.heads, capacity, g.dim, dtype=g.dtype, device=g.device)

    def _adopt(self, store: Tensor) -> None:
        self.store = store
        self.rows, self.capacity = store.shape[2], store.shape[4]
        self.flat = store.flatten(0, 1).flatten(1, 3).unbind(0)  # 2 x layers of [rows x heads x capacity, dim]
        g, device = self.geometry, store.device
        self.base = torch.arange(self.rows * g.heads, device=device).view(self.rows, 1, g.heads) * self.capacity  # of each row and head in flat
        self._shape = 0, 0
        self._dense: tuple[Tensor, ...] = ()
        self.line = torch.arange(self.capacity, device=device)
        self.zero, self.never = (torch.tensor(x, dtype=g.dtype, device=device) for x in (0.0, float("-inf")))

    def dense(self, rows: int, length: int) -> tuple[Tensor, ...]:
        """The first positions of the first rows: 2 x layers of [rows, heads, length, dim]."""
        if self._shape != (rows, length):
            self._shape = rows, length
            self._dense = self.store[:, :, :rows, :, :length].flatten(0, 1).unbind(0)
        return self._dense

    def put(self, row: int, chunks: list[tuple[Tensor, int]]) -> int:
        """Write the first n tokens of each chunk [layers, 2, heads, >= n, dim], one after the other, to the start of a row; returns their sum."""
        total = sum(n for _, n in chunks)
        if total:
            torch.cat([chunk.narrow(3, 0, n) for chunk, n in chunks], 3, out=self.store[:, :, row, :, :total])
        return total

    def get(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of positions [start, stop) of a row: [layers, 2, heads, stop - start, dim]."""
        return self.store[:, :, row, :, start:stop].clone()

    def move(self, moves: list[tuple[int, int, int]]) -> None:
        """Of each (source, target, n) copy the first n positions of one row over another, in this order."""
        if self.kernels is not None and moves:
            self.kernels.copy(self.store, moves)
            return
        for source, target, n in moves:
            self.store[:, :, target, :, :n] = self.store[:, :, source, :, :n]


class Reach:
    """One forward pass over the slots: where its tokens are written, and what each may look at.

    positions [B, n] long on the device, 0-based, with n tokens a row; `rows` [B] the slots they belong to, None for slots 0..B-1;
    `length` >= the highest position + 1; `valid` [B, n] bool marks real tokens, None when all are.
    """

    def __init__(
        self, slots: Slots, positions: Tensor, length: int, rows: Tensor | None = None, valid: Tensor | None = None
    ) -> None:
        self.n = positions.shape[1]
        self.slots, self.rows, self.positions, self.length = slots, rows, positions, length
        self.chosen = None if valid is None else valid.flatten().nonzero()[:, 0]
        self.index: Tensor | None = None  # where keys and values go in slots.flat; made when asked for
        self._bias: dict[Sight, Tensor] = {}
        self._folded: dict[tuple[Sight, int], Tensor] = {}  # by sight and query heads of a key head

    def bias(self, sight: Sight) -> Tensor:
        """[B, 1, n, length], added to the scores of layers with this sight."""
        if sight not in self._bias:
            line, positions = self.slots.line[: self.length], self.positions[:, :, None]
            visible = line <= positions
            if sight.cuts(self.length):
                visible &= line >= sight.first(positions)
            self._bias[sight] = torch.where(visible, self.slots.zero, self.slots.never)[:, None]
        return self._bias[sight]

    @cached_property
    def views(self) -> tuple[Tensor, ...]:
        """Keys and values of each layer, [rows, heads, length, dim]."""
        return self.slots.dense(len(self.positions) if self.rows is None else self.slots.rows, self.length)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Remember key and value [B x n, heads, dim] of one layer."""
        index = self._index()
        g = self.slots.geometry
        for part, flat in ((key, self.slots.flat[2 * layer]), (value, self.slots.flat[2 * layer + 1])):
            source = part if self.chosen is None else part[self.chosen]
            if g.shapes:
                source = F.pad(source, (0, g.dim - source.shape[2], 0, g.heads - source.shape[1]))
            flat.index_copy_(0, index, source.reshape(-1, source.shape[2]).to(flat.dtype))

    def _index(self) -> Tensor:
        """Where each token's heads begin in slots.flat: [tokens x heads]."""
        if self.index is None:
            b, base = len(self.positions), self.slots.base
            index = (base[:b] if self.rows is None else base[self.rows]) + self.positions[:, :, None]
            self.index = (index if self.chosen is None else index.flatten(0, 1)[self.chosen]).flatten()
        return self.index

    def _seen(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, length, dim] of one layer."""
        key, value = self.views[2 * layer], self.views[2 * layer + 1]
        if self.rows is not None:
            key, value = key[self.rows], value[self.rows]
        if self.slots.geometry.shapes:
            heads, one, other = self.slots.geometry.shapes[layer]
            key, value = key[:, :heads, :, :one], value[:, :heads, :, :other]
        return key, value

    def attend(self, layer: int, query: Tensor, scale: float, variant: Variant = CAUSAL) -> Tensor:
        """query [B x n, query heads, dim] over all that is written and visible -> [B x n, query heads x dim of values].

        With one token a row, the query heads of a group are folded into the query dimension: keys and values are read once.
        """
        key, value = self._seen(layer)
        sight = variant.sight if variant.sight.cuts(self.length) else FULL
        tokens, many, dim = query.shape
        query = query.to(key.dtype)
        spelled = variant.softcap is not None or variant.sinks is not None
        if self.n > 1 or spelled:
            spread = query.view(-1, self.n, many, dim).transpose(1, 2)
            if spelled:
                out = attend(spread, key, value, self.bias(sight), scale, variant)
            else:
                out = F.scaled_dot_product_attention(spread, key, value, attn_mask=self.bias(sight), scale=scale, enable_gqa=True)
            return out.transpose(1, 2).reshape(tokens, -1)
        folded = query.view(tokens, key.shape[1], -1, dim)
        kind = sight, folded.shape[2]
        if kind not in self._folded:
            self._folded[kind] = self.bias(sight).expand(-1, 1, folded.shape[2], -1)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=self._folded[kind], scale=scale)
        return out.reshape(tokens, -1)
