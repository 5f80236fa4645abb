"""Tree attention by compiled kernels, on a CPU: the root path on a stack, met by every run below it (native/attention.c)."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ramulus.learn.attention.runs import Runs
from ramulus.native.build import Unavailable, library

ADDRESS = ctypes.c_void_p
_KERNELS = {
    "ramulus_attention_lanes": (ctypes.c_int64, ()),
    "ramulus_attention_room": (ctypes.c_int64, (ADDRESS, ADDRESS)),
    "ramulus_attention": (None, (*(ADDRESS,) * 6, ctypes.c_double, *(ADDRESS,) * 3)),
    "ramulus_attention_backward": (None, (*(ADDRESS,) * 6, ctypes.c_double, *(ADDRESS,) * 6)),
}
FLAGS: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.float64: ("-DREAL=double",), torch.bfloat16: ("-DBFLOAT16",)}


@dataclass(frozen=True)
class Folding:
    """What queries add to the keys of some paths: entries [first[t], first[t + 1]) of token t, each `weight` times its attention in every head
    to the keys before `limit` on its path, added to sums [H, columns] from column `base` on. Trees of a row have columns of their own."""

    first: np.ndarray  # [T + 1]
    base: np.ndarray  # [N]
    limit: np.ndarray  # [N]
    weight: np.ndarray  # [N]
    cast: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False, compare=False)  # made so far

    def weights(self, dtype: torch.dtype) -> Tensor:
        """The weights as the kernels of a dtype read them."""
        if dtype not in self.cast:
            self.cast[dtype] = torch.from_numpy(self.weight).to(dtype)
        return self.cast[dtype]


def kernels(dtype: torch.dtype) -> Any:
    """The kernels for a dtype, None where there are none."""
    if dtype not in FLAGS:
        return None
    try:
        return library("attention.c", _KERNELS, *FLAGS[dtype])
    except Unavailable as error:
        warn(str(error))
        return None


@functools.cache
def warn(reason: str) -> None:
    """Say once in a process that there are no kernels."""
    warnings.warn(f"tree attention on a CPU takes torch's operations, which are slower than its kernels: {reason}", stacklevel=2)


@dataclass(frozen=True)
class Stacked:
    """The plan of one row: its runs, and where its trees begin."""

    start: np.ndarray  # [R] as in Runs
    stop: np.ndarray  # [R]
    before: np.ndarray  # [R]
    tree: np.ndarray  # [trees + 1] the first run of each tree, then R
    depth: int  # tokens on the longest path
    c_row: np.ndarray = field(init=False, repr=False)  # the row as attention.c reads it

    def __post_init__(self) -> None:
        columns = self.start, self.stop, self.before, self.tree
        words = *(x.ctypes.data for x in columns), len(self.tree) - 1, self.depth
        object.__setattr__(self, "c_row", np.array(words, dtype=np.uint64))

    @classmethod
    def of(cls, row: Runs) -> Stacked:
        """The plan of the runs of a row."""
        tree = np.append(np.flatnonzero(row.before == 0), len(row))
        start, stop, before = (np.ascontiguousarray(x, dtype=np.int64) for x in (row.start, row.stop, row.before))
        return cls(start, stop, before, tree.astype(np.int64), row.depth)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, H, T, D], [1, H or fewer, T, D] twice -> [1, T, H, D]."""
        return self.watched(query, key, value, scale, None, None)

    def watched(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        folding: Folding | None,
        sums: Tensor | None,
    ) -> Tensor:
        """As `attend`; what `folding` says is added to `sums` [H, columns] on the way, in the dtype of the query or float32 for bfloat16.

        Under autocast all tensors are met in its dtype, as by SDPA.
        """
        if torch.is_autocast_enabled(query.device.type):
            query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
        if not (key.shape == value.shape and query.dtype == key.dtype == value.dtype and query.shape[3] == key.shape[3]):
            shapes = ", ".join(f"{tuple(x.shape)} in {x.dtype}" for x in (query, key, value))
            raise ValueError(f"the compiled kernels want heads of one size and one dtype, got {shapes}: use attention='dense'")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = Attention.apply(query, key, value, scale, self, folding, sums)  # type: ignore[no-untyped-call]
        return out


class Attention(torch.autograd.Function):
    """Attention on a packed row by the kernels; bfloat16 is summed in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        plan: Stacked,
        folding: Folding | None,
        sums: Tensor | None,
    ) -> Tensor:
        """[1, H, T, D], [1, Hk, T, D] twice -> [1, T, H, D]."""
        query, key, value = (_together(x) for x in (query, key, value))
        _, heads, tokens, dim = query.shape
        out, level = query.new_empty(1, tokens, heads, dim), query.new_empty(tokens, heads, dtype=wide(query.dtype))
        call = _Call(query, key, plan)
        call.run("ramulus_attention", (query, key, value), (watching(folding, sums),), scale, (out, level))
        ctx.save_for_backward(query, key, value, out, level)
        ctx.plan = scale, plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, level = ctx.saved_tensors
        scale, plan = ctx.plan
        dout = _together(dout.to(query.dtype).transpose(1, 2))
        grads = [x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (query, key, value)]
        call = _Call(query, key, plan)
        tensors = (query, key, value, dout)
        call.run("ramulus_attention_backward", tensors, (), scale, (out, level, *(strides(x) for x in grads)))
        return *grads, None, None, None, None


class _Call:
    """One call of a kernel: the row, the shape and the room to work in."""

    def __init__(self, query: Tensor, key: Tensor, plan: Stacked) -> None:
        self.library = kernels(query.dtype)
        shape = (query.shape[1], key.shape[1], query.shape[3], torch.get_num_threads())
        self.row, self.shape = plan.c_row, np.array(shape, dtype=np.int64)
        size = self.library.ramulus_attention_room(self.row.ctypes.data, self.shape.ctypes.data)
        self.room = query.new_empty(size, dtype=wide(query.dtype))

    def run(
        self, name: str, tensors: Sequence[Tensor], more: Sequence[np.ndarray], scale: float, rest: Sequence[Any]
    ) -> None:
        """Call it: tensors by their strides, then whatever follows."""
        arrays = [self.row, self.shape, *(strides(x) for x in tensors), *more]
        after = [*rest, self.room]
        first, last = ([address(x) for x in part] for part in (arrays, after))
        getattr(self.library, name)(*first, scale, *last)


def address(x: Any) -> int:
    """Where an array or a tensor begins."""
    return int(x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the kernels of a dtype add up in."""
    return torch.promote_types(dtype, torch.float32)


def _together(x: Tensor) -> Tensor:
    """A tensor whose last dimension lies together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> np.ndarray:
    """[1, H, T, D] as attention.c reads it: where it begins, from token to token, from head to head."""
    return np.array((x.data_ptr(), x.stride(2), x.stride(1)), dtype=np.uint64)


def watching(folding: Folding | None, sums: Tensor | None) -> np.ndarray:
    """A folding as attention.c reads it; nothing to fold is no column."""
    if folding is None or sums is None:
        return np.zeros(6, dtype=np.uint64)
    columns = folding.first, folding.base, folding.limit, folding.weights(sums.dtype)
    return np.array((*map(address, columns), sums.data_ptr(), sums.shape[1]), dtype=np.uint64)
