"""Attention of groups and trunks as one autograd function, on CPU: nothing gathered is kept for the backward pass, and no head is repeated.

Rows stand as [T, G, Hk, D], the G heads of a key head beside each other for every token: those of a group are then simply G times as many
queries, a range of tokens needs no copy, and a gather moves whole rows. Parts are merged by their log-sum-exp, and the backward pass hands
every part the merged answer, as ring attention does (2310.01889): p = exp(s - lse) and delta = sum(dout x out) are those of the whole softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from ramulus.learn.attention.gather import Group, Rows

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"  # what SDPA calls on CPU; it gives the log-sum-exp


def provided(device: torch.device) -> bool:
    """Whether this torch has the operators, and the device is theirs."""
    return device.type == "cpu" and all(hasattr(torch.ops.aten, name) for name in (FORWARD, FORWARD + "_backward"))


def merge(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    groups: Sequence[Group],
    trunks: Sequence[tuple[Rows, int, int]] = (),
) -> Tensor:
    """[1, H, T, D], [1, H or fewer, T, D] twice -> [1, T, H, D]; `trunks` are keys and the range of tokens that see them all.

    Every token is asked by one group, and then by trunks of other keys.
    """
    kind = query.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    out: Tensor = Merged.apply(query.to(cast), key.to(cast), value.to(cast), scale, groups, trunks)  # type: ignore[no-untyped-call]
    return out


class Merged(torch.autograd.Function):
    """As `merge`, in the dtype of its inputs; sums are in at least float32."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        groups: Sequence[Group],
        trunks: Sequence[tuple[Rows, int, int]],
    ) -> Tensor:
        """Answer the groups, then merge in one trunk after the other."""
        attend = getattr(torch.ops.aten, FORWARD)
        k, v = (x[0].transpose(0, 1).contiguous() for x in (key, value))
        q = beside(query[0].transpose(0, 1), key.shape[1])
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = q.new_empty(q.shape, dtype=wide), q.new_empty(q.shape[:3], dtype=wide)
        for group in groups:
            keys, values = (asked(x, group.known, group.size) for x in (k, v))
            mask = group.mask(q.shape[1], q.dtype)
            parts = [
                attend(some, keys, values, 0.0, mask is None, attn_mask=mask, scale=scale)
                for some in split(rows(q, group.asked), group)
            ]
            for into, found in zip((out, lse), zip(*parts, strict=True), strict=True):
                put(into, group, join(found, group, q.shape[1]))
        for where, first, last in trunks:
            here = slice(first, last)
            more, extra = attend(whole(q[here]), *(asked(x, where, 1) for x in (k, v)), 0.0, False, scale=scale)
            extra = extra[0].t().view_as(lse[here])
            share = torch.sigmoid(extra - lse[here])[..., None]
            out[here].lerp_(more[0].transpose(0, 1).view_as(out[here]).to(wide), share)
            torch.logaddexp(lse[here], extra, out=lse[here])
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = scale, groups, trunks
        return apart(out)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the groups, then of the trunks, each against the merged answer."""
        q, k, v, out, lse = ctx.saved_tensors
        scale, groups, trunks = ctx.plan
        back = getattr(torch.ops.aten, FORWARD + "_backward")
        given = beside(dout[0], k.shape[1])
        dq = lse.new_empty(q.shape)
        dk, dv = (lse.new_zeros(x.shape) for x in (k, v))
        for group in groups:
            of_group(group, scale, (given, q, k, v, out, lse), (dq, dk, dv))
        for where, first, last in trunks:
            here = slice(first, last)
            keys, values = (asked(x, where, 1) for x in (k, v))
            level = lse[here].flatten(0, 1).t()[None]
            gq, gk, gv = back(
                whole(given[here]), whole(q[here]), keys, values, whole(out[here]), level, 0.0, False, scale=scale
            )
            dq[here] += gq[0].transpose(0, 1).reshape(dq[here].shape)
            add(dk, where, gk[0].transpose(0, 1))
            add(dv, where, gv[0].transpose(0, 1))
        dq, dk, dv = (x.to(q.dtype).transpose(0, 1)[None] for x in (apart(dq), dk, dv))
        return dq, dk, dv, None, None, None


def of_group(
    group: Group, scale: float | None, known: tuple[Tensor, ...], total: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Set or add one group's gradients: `known` holds dout, q, k, v, out, lse, `total` dq, dk, dv.

    A slot that answers no token gets an infinite lse: its probabilities are 0.
    """
    back = getattr(torch.ops.aten, FORWARD + "_backward")
    given, q, k, v, out, lse = known
    keys, values = (asked(x, group.known, group.size) for x in (k, v))
    level = rows(lse, group.asked)
    if group.idle is not None:
        level = level.index_fill(0, group.idle, torch.inf)
    told = (split(x, group) for x in (*(rows(x, group.asked) for x in (given, q, out)), level))
    mask = group.mask(q.shape[1], q.dtype)
    found = [
        back(dout, some, keys, values, answer, high, 0.0, mask is None, attn_mask=mask, scale=scale)
        for dout, some, answer, high in zip(*told, strict=True)
    ]
    gq, *gkv = zip(*found, strict=True)
    put(total[0], group, join(gq, group, q.shape[1]))
    for into, parts in zip(total[1:], gkv, strict=True):
        for part in parts:
            add(into, group.known, part.transpose(1, 2).flatten(0, 1))


def beside(x: Tensor, heads: int) -> Tensor:
    """[T, H, D] -> [T, G, Hk, D]."""
    return x.unflatten(1, (heads, -1)).transpose(1, 2).contiguous()


def apart(x: Tensor) -> Tensor:
    """[T, G, Hk, D] -> [T, H, D]."""
    return x.transpose(1, 2).flatten(1, 2)


def rows(x: Tensor, where: Rows) -> Tensor:
    """Some rows of x [T, ...]; a range is no copy."""
    return x[where] if isinstance(where, slice) else x.index_select(0, where)


def asked(x: Tensor, where: Rows, size: int) -> Tensor:
    """[T, Hk, D] -> [B, Hk, K, D]."""
    return rows(x, where).unflatten(0, (size, -1)).transpose(1, 2)


def whole(x: Tensor) -> Tensor:
    """[N, G, Hk, D] -> [1, Hk, N * G, D], without a copy."""
    return x.flatten(0, 1).transpose(0, 1)[None]


def split(x: Tensor, group: Group) -> list[Tensor]:
    """[B * Q, G, Hk, ...] -> what one call each takes: all as [B, Hk, Q * G, ...], or where the call is causal G of [B, Hk, Q, ...]."""
    x = x.unflatten(0, (group.size, -1))
    return [one.transpose(1, 2) for one in (x.unbind(2) if group.causal else (x.flatten(1, 2),))]


def join(parts: Sequence[Tensor], group: Group, shared: int) -> Tensor:
    """What `split` took apart."""
    found = [part.transpose(1, 2) for part in parts]
    every = torch.stack(found, 2) if group.causal else found[0].unflatten(1, (-1, shared))
    return every.flatten(0, 1)


def put(total: Tensor, group: Group, part: Tensor) -> None:
    """Write a group's slots [B * Q, ...] where its tokens stand."""
    part = part if group.slots is None else part.index_select(0, group.slots)
    if isinstance(group.tokens, slice):
        total[group.tokens] = part
    else:
        total.index_copy_(0, group.tokens, part.to(total.dtype))


def add(total: Tensor, where: Rows, part: Tensor) -> None:
    """Add rows where they came from."""
    if isinstance(where, slice):
        total[where] += part
    else:
        total.index_add_(0, where, part.to(total.dtype))
