"""Norms and gated feed-forward layers of transformers models with gradients of their own, for CPU: less memory traffic, less kept.

Stock layers spell them out in small operations, each of which writes a new tensor as large as its input and keeps it for the backward pass;
on a CPU that traffic costs as much as the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama as llama

from ramulus.models.code import runs_as

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")  # weight * x / rms(x), in at least float32
Patch = tuple[nn.Module, Callable[..., Any]]


class RMSNorm(torch.autograd.Function):
    """x [..., d], weight [d] -> weight * x / sqrt(mean(x^2) + eps), all in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Keep x and one number a row."""
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x / rms: dx = (g - n mean(g n)) / rms for g = weight * dout, and dweight = sum(dout n)."""
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        n = (x * inverse).view(-1, width)
        flat = dout.reshape(-1, width)
        product = n * flat
        dweight = product.sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        along = torch.mv(product, weight).div_(width)[:, None]
        dx = torch.addcmul(n.mul_(along).neg_(), flat, weight, out=product).mul_(inverse.view(-1, 1))
        return dx.view_as(x), dweight, None


class Gated(torch.autograd.Function):
    """x [..., d], weights of gate and up [I, d] and of down [d, I] -> down(silu(gate(x)) * up(x)).

    Keeps gate and up alone; their product is made again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Two tensors [N, I] are kept, a third lives for a moment."""
        flat = x.view(-1, x.shape[-1])
        opened, risen = flat @ gate.t(), flat @ up.t()
        ctx.save_for_backward(x, gate, up, down, opened, risen)
        return (F.silu(opened).mul_(risen) @ down.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Every product of width I is made in place of one that is no longer needed."""
        x, gate, up, down, opened, risen = ctx.saved_tensors
        flat, flat_dout = x.view(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
        wanted = ctx.needs_input_grad
        middle = F.silu(opened)
        inner = flat_dout @ down
        ddown = flat_dout.t() @ (middle * risen) if wanted[3] else None
        drisen = middle.mul_(inner)
        dopened = torch.ops.aten.silu_backward.grad_input(inner.mul_(risen), opened, grad_input=inner)
        dx = (dopened @ gate).addmm_(drisen, up).view_as(x) if wanted[0] else None
        return dx, *(d.t() @ flat if want else None for d, want in ((dopened, wanted[1]), (drisen, wanted[2]))), ddown


def norm(module: Any, x: Tensor, kind: type[torch.autograd.Function] = RMSNorm) -> Tensor:
    """What an RMSNorm module's forward answers, by this kind of computation."""
    out: Tensor = kind.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


def gated(module: Any, x: Tensor) -> Tensor:
    """What a gated feed-forward module's forward answers."""
    weights = module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight
    out: Tensor = Gated.apply(x, *weights)  # type: ignore[no-untyped-call]
    return out


def patches(model: nn.Module) -> list[Patch]:
    """The modules of a float32 model on a CPU whose forward can be replaced, and by what; adapters and unknown layers stay as they are."""
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return []
    ways: tuple[Any, ...] = (is_known_norm, norm), (is_gated, gated)
    return [(module, partial(forward, module)) for module in model.modules() for knows, forward in ways if knows(module)]


def is_known_norm(module: Any) -> bool:
    """Whether a module is an RMSNorm of a known name that computes as Llama's does."""
    return type(module).__name__ in NORMS and runs_as(module, (llama.LlamaRMSNorm,))


def is_gated(module: Any) -> bool:
    """Whether a module is down(silu(gate(x)) * up(x)) of plain layers without bias."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    plain = all(type(layer) is nn.Linear and layer.bias is None for layer in layers)
    known = type(module).__name__ in ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP") and runs_as(module, (llama.LlamaMLP,))
    return silu and plain and known


@contextmanager
def fused(chosen: Sequence[Patch]) -> Iterator[None]:
    """Inside, the modules that `patches` found are computed as above."""
    modules: list[tuple[Any, Any]] = list(chosen)
    for module, forward in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in modules:
            del module.forward
