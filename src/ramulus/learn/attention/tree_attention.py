"""Tree attention for transformers: token k is visible to q iff k <= q < end[k].

Registered as "ramulus_tree" through transformers' AttentionInterface. No mask builder has that name, so transformers builds no mask and
looks for no packed sequences; the plan reaches every layer as the keyword `tree` of the model call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from ramulus.learn.attention.kernels import Stacked, kernels
from ramulus.learn.attention.runs import PathByPath, Runs, cheaper, fit, runs
from ramulus.models.survey import attending_by
from ramulus.models.variant import CAUSAL, Sight, Variant
from ramulus.native.build import why

_NAME = "ramulus_tree"
_BLOCK = 128  # FlexAttention's tile
Way = Literal["auto", "stack", "flex", "paths", "dense"]
"""stack: compiled kernels, on a CPU in float32, float64 or bfloat16. flex: FlexAttention's block mask, for CUDA. paths: one call of SDPA an
unbranched run. dense: a T x T mask. auto: stack or flex where they can be had, else the cheaper of the others."""


@dataclass(frozen=True)
class TreePlan:
    """How every layer attends on one row, made once per row."""

    length: int  # T tokens the model must be given: those of the row, and the padding that flex wants
    depth: int  # tokens on the longest path
    device: torch.device
    dtype: torch.dtype  # of queries and keys
    mask: Tensor | None = None  # [1, 1, T, T], 0 or -inf
    paths: Stacked | PathByPath | None = None
    blocks: BlockMask | None = None
    row: Runs | None = None
    sights: Mapping[int, Sight] = field(default_factory=dict)  # by layer, where they are known

    @cached_property
    def variants(self) -> PathByPath:
        """The plan of layers with windows, soft caps, sinks, or values of another size than keys."""
        if not isinstance(self.paths, PathByPath):
            assert self.row is not None
            return PathByPath.of(self.row, self.device, self.dtype)
        return self.paths

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, variant: Variant = CAUSAL) -> Tensor:
        """[1, H, T, D], [1, H or fewer, T, D] twice -> [1, T, H, D]."""
        if not variant.plain(self.depth) or key.shape[-1] != value.shape[-1]:
            return self.variants.attend(query, key, value, scale, variant)
        if self.paths is not None:
            return self.paths.attend(query, key, value, scale)
        grouped = query.shape[1] != key.shape[1]
        if self.blocks is not None:
            flex: Any = compiled() if query.is_cuda else flex_attention
            out = flex(query, key, value, block_mask=self.blocks, scale=scale, enable_gqa=grouped)
            return out.transpose(1, 2)
        assert self.mask is not None
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=fit(self.mask, query), scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)


def plan(
    parent: Tensor, end: Tensor, dtype: torch.dtype = torch.float32, way: Way = "auto", sights: Mapping[int, Sight] | None = None
) -> TreePlan:
    """Plan one row of T tokens.

    `parent` and `end` [T] as in TreeBatch, on the device of the model; `dtype` is that of queries and keys; `sights` is what the model's layers
    see, by their index. Raises ValueError for an unknown way, one that cannot be had here, or an empty row.
    """
    if way not in get_args(Way):
        raise ValueError(f"tree attention is one of {', '.join(map(repr, get_args(Way)))}, got {way!r}")
    if not len(parent):
        raise ValueError("a row without tokens has nothing to attend to: pack at least one path")
    row = runs(parent.cpu().numpy(), end.cpu().numpy())
    build = partial(TreePlan, depth=row.depth, device=parent.device, dtype=dtype, row=row, sights=sights or {})
    if way == "flex" or (way == "auto" and parent.is_cuda and dtype != torch.float64):
        length, blocks = block_mask(end)
        return build(length, blocks=blocks)
    if way in ("auto", "stack") and (stack := stacked(row, parent.device, dtype, way == "stack")):
        return build(len(parent), paths=stack)
    if way == "paths" or (way == "auto" and cheaper(row, len(parent))):
        return build(len(parent), paths=PathByPath.of(row, parent.device, dtype))
    return build(len(parent), mask=dense_mask(end, dtype))


def stacked(row: Runs, device: torch.device, dtype: torch.dtype, wanted: bool) -> Stacked | None:
    """The plan of the compiled kernels; where there are none for this device and dtype None, or ValueError if they are `wanted`."""
    if device.type == "cpu" and kernels(dtype) is not None:
        return Stacked.of(row)
    if wanted:
        raise ValueError(
            f"attention 'stack' cannot be had on {device} in {dtype}: it runs on a CPU in float32, float64 or bfloat16 by compiled "
            f"kernels (here: {why()}); use 'auto'"
        )
    return None


def visible(end: Tensor) -> Tensor:
    """end [T] -> [T, T] bool: may query (row) see key (column)?"""
    index = torch.arange(len(end), device=end.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])


def dense_mask(end: Tensor, dtype: torch.dtype) -> Tensor:
    """end [T] -> [1, 1, T, T], 0 where visible and -inf elsewhere; additive, because every attention takes it alike."""
    return torch.zeros(len(end), len(end), dtype=dtype, device=end.device).masked_fill_(~visible(end), -torch.inf)[
        None, None
    ]


def block_mask(end: Tensor) -> tuple[int, BlockMask]:
    """end [T] -> T padded to whole tiles, and FlexAttention's mask for it; padding sees itself alone.

    A tile of keys j < i is seen by tile i of queries somewhere iff its largest end lies beyond the tile's first query, and everywhere iff
    its smallest end lies beyond its last: no T x T mask is built.
    """
    length = -(-len(end) // _BLOCK) * _BLOCK
    end = torch.cat([end, torch.arange(len(end), length, device=end.device) + 1])
    tiles = end.view(-1, _BLOCK)
    first = torch.arange(0, length, _BLOCK, device=end.device)
    below = first[None, :] < first[:, None]
    everywhere = below & (tiles.amin(1)[None, :] >= first[:, None] + _BLOCK)
    somewhere = below & (tiles.amax(1)[None, :] > first[:, None]) & ~everywhere
    somewhere |= torch.eye(len(first), dtype=torch.bool, device=end.device)

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    mask = BlockMask.from_kv_blocks(
        *listed(somewhere), *listed(everywhere), BLOCK_SIZE=_BLOCK, mask_mod=rule, seq_lengths=(length, length)
    )
    return length, mask


def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """[N, N] bool -> how many tiles of keys each tile of queries sees [1, 1, N], and which, those first [1, 1, N, N]."""
    count = tiles.sum(1, dtype=torch.int32)
    order = torch.argsort(tiles.to(torch.int32), dim=1, descending=True, stable=True).to(torch.int32)
    return count[None, None], order[None, None].contiguous()


@functools.cache
def compiled() -> Callable[..., Any]:
    """FlexAttention, compiled once per process: uncompiled it builds the whole score matrix."""
    return torch.compile(flex_attention)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: TreePlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of "ramulus_tree": [1, H, T, D] -> [1, T, H, D].

    Raises ValueError for a call without a plan, or with what the tree's attention does not provide.
    """
    if tree is None:
        raise ValueError(
            f"{_NAME} attention was called without a plan: call model(..., tree=plan(parent, end)) inside attending(model)"
        )
    _refuse(module, tree, query, attention_mask, dropout, kwargs)
    return tree.attend(query, key, value, scaling, variant_of(module, tree, kwargs)).contiguous(), None


def variant_of(module: nn.Module, tree: TreePlan, options: dict[str, Any]) -> Variant:
    """What a layer asks for: its sight as it was surveyed, else as its arguments say."""
    sight = tree.sights.get(getattr(module, "layer_idx", -1))
    return Variant(sight or Sight(window=options.get("sliding_window")), options.get("softcap"), options.get("s_aux"))


def _refuse(
    module: nn.Module, tree: TreePlan, query: Tensor, mask: Tensor | None, dropout: float, options: dict[str, Any]
) -> None:
    """Raise ValueError for an attention that would silently be another one."""
    name = type(module).__name__
    if tuple(query.shape[::2]) != (1, tree.length):
        got = f"{query.shape[0]} rows of {query.shape[2]} tokens"
        raise ValueError(f"{name} got {got}, the plan is for one of {tree.length}: pack and plan one row at a time")
    if mask is not None:
        raise ValueError(
            f"{name} was given an attention mask beside the tree's: call the model with attention_mask=None"
        )
    if dropout:
        raise ValueError(
            f"{name} wants attention dropout {dropout}, which tree attention lacks: set attention_dropout=0 or call model.eval()"
        )
    if options.get("position_bias") is not None:
        raise ValueError(f"{name} needs attention with position_bias, which tree attention lacks: use a model without it (Qwen3, Llama, Gemma 3)")


def attending(model: nn.Module, name: str = _NAME) -> AbstractContextManager[None]:
    """Let `model` attend along trees, or by another implementation, and as before afterwards."""
    return attending_by(model, name)


AttentionInterface.register(_NAME, tree_attention)
