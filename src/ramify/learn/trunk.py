"""Tree attention with trunks: in preorder, all descendants of a token are one range, so they meet a path they share in one unmasked call.

A stretch of the path above many tokens (a trunk) is taken out of what they gather; the rest stays in the padded groups of gather.py. The
parts are merged by their log-sum-exp, and the backward pass hands every part the merged answer, as ring attention does (2310.01889):
p = exp(s - lse) and delta = sum(dout x out) are then those of the whole softmax. Nothing gathered is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ramify.learn.gather import CALL, ROW, Chunks, Gather, Group, Runs, cut, gather, sizes

MERGE = 2**14  # what merging one query's answer costs, in the units of gather.py
MARGIN = 1.5  # how many times cheaper trunks must look: where they hardly differ, gathering was the faster
EAGER = (1, 4, 16, 64, 256)  # how much more than a trunk's price gathering must cost; the cheapest plan is taken
FORWARD = "_scaled_dot_product_flash_attention_for_cpu"  # what SDPA calls on CPU; it gives the log-sum-exp


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
    keys: list[Tensor]  # long, of each trunk
    first: list[int]
    last: list[int]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, H, T, D], [1, H or fewer, T, D] twice -> [1, T, H, D]."""
        kind = query.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        k, v = key[0].to(cast), value[0].to(cast)
        q = query[0].to(cast).unflatten(0, (len(k), -1)).transpose(1, 2).contiguous()
        out: Tensor = Merged.apply(q, k, v, self, scale)  # type: ignore[no-untyped-call]
        return out.permute(1, 0, 2, 3).flatten(1, 2)[None]

    def blocks(self) -> Iterator[tuple[Tensor, int, int]]:
        """(keys, first, last) of each trunk."""
        return zip(self.keys, self.first, self.last, strict=True)

    def parts(self) -> Iterator[tuple[Group, slice, Tensor, Tensor]]:
        """Each group with its slots among all, and the tokens it asks and gathers."""
        assert self.rest.queries is not None
        assert self.rest.keys is not None
        asked, known = 0, 0
        for group in self.rest.groups:
            slots = slice(asked, asked + group.size * group.queries)
            gathered = slice(known, known + group.size * group.keys)
            asked, known = slots.stop, gathered.stop
            yield group, slots, self.rest.queries[slots], self.rest.keys[gathered]


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

    def plan(self, dtype: torch.dtype, device: torch.device) -> Trunk:
        """What every layer needs."""
        rest = gather(self.felled.row, self.chunks, self.groups, dtype, device)
        keys = [torch.from_numpy(some).to(device) for some in self.felled.keys]
        return Trunk(rest, keys, self.felled.first, self.felled.last)


def trunks(row: Runs, parent: np.ndarray, end: np.ndarray, width: int) -> Felling | None:
    """The cheapest way of felling a row; None where no trunk pays, or this torch lacks the operators."""
    if not (hasattr(torch.ops.aten, FORWARD) and hasattr(torch.ops.aten, FORWARD + "_backward")):
        return None
    found: dict[tuple[int, ...], Felling] = {}
    for eager in EAGER:
        felled = fell(row, parent, end, eager)
        if felled.keys and tuple(felled.first) not in found:
            found[tuple(felled.first)] = Felling.of(felled, width)
    return min(found.values(), key=lambda felling: felling.cost, default=None)


def seats(x: Tensor, size: int) -> Tensor:
    """[Hk, B * N, ...] -> [B, Hk, N, ...]: rows of a group as SDPA wants them."""
    return x.unflatten(1, (size, -1)).transpose(0, 1)


class Merged(torch.autograd.Function):
    """Queries [Hk, T, G, D] (G heads share each of the Hk key heads), keys and values [Hk, T, D] -> answers [Hk, T, G, D].

    Trunks have no mask, so the G heads of a query are simply G queries there; a group calls once for each of the G.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tree: Trunk, scale: float | None) -> Tensor:
        """Answer the groups, then merge in one trunk after the other."""
        attend = getattr(torch.ops.aten, FORWARD)
        assert tree.rest.queries is not None
        assert tree.rest.inverse is not None
        heads, _, shared, size = q.shape
        out = q.new_empty(heads, len(tree.rest.queries), shared, size)
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_empty(out.shape[:3], dtype=wide)
        for group, slots, asked, known in tree.parts():
            some = seats(q.index_select(1, asked), group.size)
            keys, values = (seats(x.index_select(1, known), group.size) for x in (k, v))
            mask = None if group.mask is None else group.mask.to(q.dtype)
            for g in range(shared):
                seats(out[:, slots], group.size)[:, :, :, g], seats(lse[:, slots], group.size)[:, :, :, g] = attend(
                    some[:, :, :, g], keys, values, 0.0, mask is None, attn_mask=mask, scale=scale
                )
        out, lse = (x.index_select(1, tree.rest.inverse) for x in (out.to(wide), lse))
        for keys, first, last in tree.blocks():
            there = slice(first, last)
            found = (x.index_select(1, keys)[None] for x in (k, v))
            more, extra = attend(q[:, there].flatten(1, 2)[None], *found, 0.0, False, scale=scale)
            extra = extra[0].unflatten(1, (-1, shared))
            share = torch.sigmoid(extra - lse[:, there])[..., None]
            out[:, there].lerp_(more[0].unflatten(1, (-1, shared)).to(wide), share)
            lse[:, there] = torch.logaddexp(lse[:, there], extra)
        out = out.to(q.dtype)
        ctx.tree, ctx.scale = tree, scale
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the groups, then of the trunks, each against the merged answer."""
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        dq, dk, dv = of_groups(ctx.tree, ctx.scale, dout, q, k, v, out, lse)
        back = getattr(torch.ops.aten, FORWARD + "_backward")
        for keys, first, last in ctx.tree.blocks():
            there = slice(first, last)
            given, some, answer, level = (x[:, there].flatten(1, 2)[None] for x in (dout, q, out, lse))
            found = (x.index_select(1, keys)[None] for x in (k, v))
            got = back(given, some, *found, answer, level, 0.0, False, scale=ctx.scale)
            gq, gk, gv = (x[0].to(dq.dtype) for x in got)
            dq[:, there] += gq.unflatten(1, (-1, q.shape[2]))
            dk.index_add_(1, keys, gk)
            dv.index_add_(1, keys, gv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def of_groups(
    tree: Trunk, scale: float | None, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the groups' part, in at least float32.

    A slot that answers no token (padding, or a query repeated for a causal chunk) gets an infinite lse: its probabilities are 0.
    """
    back = getattr(torch.ops.aten, FORWARD + "_backward")
    assert tree.rest.queries is not None
    assert tree.rest.inverse is not None
    shape = (len(q), len(tree.rest.queries), *q.shape[2:])
    given, answer = (q.new_zeros(shape).index_copy_(1, tree.rest.inverse, x) for x in (dout, out))
    level = lse.new_full(shape[:3], torch.inf).index_copy_(1, tree.rest.inverse, lse)
    slots_q = lse.new_empty(shape)
    dk, dv = (lse.new_zeros(k.shape) for _ in range(2))
    for group, slots, asked, known in tree.parts():
        some, *told = (
            seats(x, group.size) for x in (q.index_select(1, asked), given[:, slots], answer[:, slots], level[:, slots])
        )
        keys, values = (seats(x.index_select(1, known), group.size) for x in (k, v))
        mask = None if group.mask is None else group.mask.to(q.dtype)
        into = seats(slots_q[:, slots], group.size)
        for g in range(q.shape[2]):
            d, o, s = (x[:, :, :, g] for x in told)
            got = back(d, some[:, :, :, g], keys, values, o, s, 0.0, mask is None, attn_mask=mask, scale=scale)
            into[:, :, :, g] = got[0]
            for total, part in zip((dk, dv), got[1:], strict=True):
                total.index_add_(1, known, part.transpose(0, 1).flatten(1, 2).to(total.dtype))
    return slots_q.index_select(1, tree.rest.inverse), dk, dv
