"""Layers of transformers models with products in bfloat16 and gradients of their own, for CPU: weights are narrowed once an update.

What lies along the residuals stays as the model has it, norms and angles are computed in float32, products are summed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from ramulus.learn.attention.tree_attention import tree_attention
from ramulus.learn.policy import half_kernels
from ramulus.learn.policy.fused_layers import Patch, is_gated, is_known_norm, norm
from ramulus.learn.policy.half_kernels import BFLOAT16, WHOLE_VECTORS
from ramulus.learn.policy.narrow import Narrow
from ramulus.models.code import runs_as

HALF_ATTENTIONS = (llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention)  # queries and keys are turned as they come


class Norm(torch.autograd.Function):
    """x [..., d] in float32 or bfloat16, weight [d] -> weight x / rms(x), in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Keep x and one number a row."""
        out, inverse = half_kernels.norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and weight, each as it is."""
        x, weight, inverse = ctx.saved_tensors
        dx, dweight = half_kernels.norm_backward(x, weight, inverse, dout)
        return dx, dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


class HalfProduct(torch.autograd.Function):
    """x [N, d] in bfloat16 times weights that lie under each other, with a bias or none -> [N, sum of their rows]; some heads of it turned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, narrow: Tensor, bias: Tensor | None, turn: Turn | None, *weights: Tensor) -> Tensor:
        """`narrow` is the weights in bfloat16."""
        ctx.save_for_backward(x, narrow)
        ctx.turn, ctx.kinds = turn, [(len(weight), weight.dtype) for weight in weights]
        out = x @ narrow.t() if bias is None else torch.addmm(bias.to(BFLOAT16), x, narrow.t())
        return out if turn is None else turn(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """One product for all weights."""
        x, narrow = ctx.saved_tensors
        wanted, first = ctx.needs_input_grad, 4
        dout = dout if ctx.turn is None else ctx.turn(dout.clone(memory_format=torch.contiguous_format), back=True)
        dx = dout @ narrow if wanted[0] else None
        dbias = dout.sum(0, dtype=torch.float32) if wanted[2] else None
        return dx, None, dbias, None, *_split(dout.t() @ x if any(wanted[first:]) else None, ctx.kinds, wanted[first:])


@dataclass(frozen=True)
class Turn:
    """Turns queries and keys by the angles of their positions, in place."""

    heads: int  # of both
    size: int
    cos: Tensor  # [T, size] float32
    sin: Tensor  # [T, size]

    def __call__(self, rows: Tensor, back: bool = False) -> Tensor:
        """The first heads of rows [T, all heads x size]."""
        half_kernels.rotate(rows.view(len(rows), -1, self.size), self.heads, self.cos, self.sin, back)
        return rows


class HalfGated(torch.autograd.Function):
    """x [N, d], both [2 I, d] of gate and up, down [d, I], all in bfloat16 -> down(silu(gate(x)) up(x)); keeps gate and up alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, both: Tensor, down: Tensor, *weights: Tensor) -> Tensor:
        """`weights` are those of gate, up and down, which take the gradients."""
        opened = x @ both.t()
        ctx.save_for_backward(x, both, down, opened)
        ctx.kinds = [(len(weight), weight.dtype) for weight in weights]
        return half_kernels.gated_forward(opened) @ down.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """What is between is made again."""
        x, both, down, opened = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        middle, dopened = half_kernels.gated_backward(opened, dout.contiguous() @ down)
        dx = dopened @ both if wanted[0] else None
        dboth = dopened.t() @ x if wanted[3] or wanted[4] else None
        ddown = dout.t() @ middle if wanted[5] else None
        return dx, None, None, *_split(dboth, ctx.kinds[:2], wanted[3:5]), *_split(ddown, ctx.kinds[2:], wanted[5:])


def _split(stacked: Tensor | None, kinds: list[tuple[int, torch.dtype]], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradient of weights that lie under each other as one each, in the dtype of its weight; None where it is not wanted."""
    if stacked is None:
        return [None] * len(kinds)
    parts = stacked.split([rows for rows, _ in kinds])
    return [part.to(kind) if want else None for part, (_, kind), want in zip(parts, kinds, wanted, strict=True)]


def half_gated(module: Any, narrow: Narrow, x: Tensor) -> Tensor:
    """What a gated feed-forward module's forward answers."""
    gate, up, down = (layer.weight for layer in (module.gate_proj, module.up_proj, module.down_proj))
    flat = x.to(BFLOAT16).reshape(-1, x.shape[-1])
    out: Tensor = HalfGated.apply(flat, narrow.stacked(gate, up), narrow.stacked(down), gate, up, down)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def product(narrow: Narrow, x: Tensor, *layers: nn.Linear, turn: Turn | None = None) -> Tensor:
    """x [N, d] -> what the layers answer, beside each other."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat([*biases])
    out: Tensor = HalfProduct.apply(x, narrow.stacked(*weights), bias, turn, *weights)  # type: ignore[no-untyped-call]
    return out


def half_attended(
    module: Any,
    narrow: Narrow,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What an attention module's forward answers, on a tree."""
    size = module.head_dim
    key_heads, query_heads = (layer.weight.shape[0] // size for layer in (module.k_proj, module.q_proj))
    turn = Turn(query_heads + key_heads, size, *(angle[0].float().contiguous() for angle in position_embeddings))
    x = hidden_states.to(BFLOAT16).reshape(-1, hidden_states.shape[-1])
    rows = product(narrow, x, module.q_proj, module.k_proj, module.v_proj, turn=turn).view(len(x), -1, size)
    query, key, value = (part.transpose(0, 1)[None] for part in rows.split((query_heads, key_heads, key_heads), 1))
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    out, _ = tree_attention(module, query, key, value, attention_mask, scaling=module.scaling, sliding_window=window, **options)
    return product(narrow, out.reshape(len(x), -1), module.o_proj).view(hidden_states.shape), None


def half_patches(model: nn.Module, narrow: Narrow) -> list[Patch]:
    """The modules of a model on a CPU whose forward can be replaced where it computes in bfloat16, and by what; others stay as they are."""
    if any(p.dtype not in (torch.float32, BFLOAT16) or p.device.type != "cpu" for p in model.parameters()) or half_kernels.half_library() is None:
        return []
    ways: tuple[Any, ...] = (is_known_norm, partial(norm, kind=Norm), ()), (is_gated, half_gated, (narrow,)), (is_attention, half_attended, (narrow,))
    whole = [module for module in model.modules() if all(size % WHOLE_VECTORS == 0 for p in module.parameters() for size in p.shape)]
    return [(module, partial(forward, module, *more)) for module in whole for knows, forward, more in ways if knows(module)]


def is_attention(module: Any) -> bool:
    """Whether a module attends with plain layers and turns whole heads."""
    named = type(module).__name__ in {kind.__name__ for kind in HALF_ATTENTIONS}
    if not named or not runs_as(module, HALF_ATTENTIONS) or module.head_dim % (2 * WHOLE_VECTORS):
        return False
    layers = [module.q_proj, module.k_proj, module.v_proj, module.o_proj]
    turned = (getattr(module.config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return all(type(layer) is nn.Linear for layer in layers) and turned in (None, 1.0)
