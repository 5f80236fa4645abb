"""The fused forward over a copy of the weights laid out for few rows at a time: what a CPU decodes fastest from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ramulus.engine.local.fused import FusedForward, Layer
from ramulus.engine.local.kv import Reach

Part = tuple[Tensor, Tensor | None]
"""Weight [m, k] and bias [m] of one linear layer."""

TINY = 2**22  # bytes in float32 of matrices that stay in a core's cache: there half precision saves nothing, and costs conversions


def joined(parts: Sequence[Part], dtype: torch.dtype, norm: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights [m, k] of stacked layers, that of the norm before them folded in, and their biases [m]; None where no part has one."""
    weight = torch.cat([w for w, _ in parts])
    if norm is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = weight.to(wide) * norm.to(wide)
    biases = [w.new_zeros(len(w)) if b is None else b for w, b in parts]
    return weight.to(dtype), None if all(b is None for _, b in parts) else torch.cat(biases).to(dtype)


class Matrix:
    """x W^T + b over its own copy of W, parts stacked, the weight of the norm before it folded in.

    In float32 and float64 the copy is [k, m], which BLAS multiplies faster than [m, k] when x has few rows and W is small;
    in half precision it is oneDNN's blocked layout, which spares it reordering W at every call.
    """

    def __init__(self, parts: Sequence[Part], dtype: torch.dtype, norm: Tensor | None = None, order: Tensor | None = None) -> None:
        self.parts, self.dtype, self.norm, self.order = parts, dtype, norm, order
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights as they are now."""
        dtype = self.dtype
        weight, bias = joined(self.parts, dtype, self.norm)
        if self.order is not None:
            weight, bias = weight[self.order], None if bias is None else bias[self.order]
        self.bias, self.blocked = bias, dtype == torch.bfloat16 and halves()
        self.nbytes = weight.nbytes
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 64) if self.blocked else weight.t().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """[N, k] -> [N, m]."""
        if self.blocked:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def silu(self, x: Tensor) -> Tensor:
        """[N, k] -> silu of [N, m]."""
        if self.blocked:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")
        return F.silu(self(x), inplace=True)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y W^T + b: [N, m], [N, k] -> [N, m]."""
        if self.blocked:
            return torch.ops.mkldnn._linear_pointwise.binary(y, x, self.weight, self.bias, "add")
        out = torch.addmm(x, y, self.weight)
        return out if self.bias is None else out.add_(self.bias)


class PackedLayer:
    """The matrices of one decoder layer; `order` and `pairs` put the rows of queries and keys, and their norms, in pairs."""

    def __init__(self, layer: Layer, dtype: torch.dtype, order: Tensor, pairs: Tensor) -> None:
        self.qkv = Matrix((layer.query, layer.key, layer.value), dtype, layer.before, order)
        self.out = Matrix((layer.out,), dtype)
        self.gate, self.up = (Matrix((part,), dtype, layer.after) for part in (layer.gate, layer.up))
        self.down = Matrix((layer.down,), dtype)
        self.source, self.pairs = layer, pairs

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All of them."""
        return self.qkv, self.out, self.gate, self.up, self.down

    def head_norms(self) -> tuple[Tensor, Tensor] | None:
        """Weights of the norms over each query and key head (Qwen3), in pairs; None without."""
        q, k = self.source.query_norm, self.source.key_norm
        return None if q is None or k is None else (q[self.pairs], k[self.pairs])


def size_of_copy(fused: FusedForward) -> int:
    """Bytes that packing would take."""
    return elements(fused) * working_dtype(fused).itemsize


def working_dtype(fused: FusedForward, small: int | None = None) -> torch.dtype:
    """That of packed matrices and KV: the model's, or float32 for half precision where the processor lacks it or the matrices take at most `small`
    bytes in float32 (None: TINY)."""
    dtype = fused.geometry.dtype
    if dtype.itemsize >= 4 or (4 * elements(fused) > (TINY if small is None else small) and halves()):
        return dtype
    return torch.float32


def halves() -> bool:
    """Whether this processor multiplies bfloat16."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def elements(fused: FusedForward) -> int:
    """Numbers in all matrices."""
    parts = [
        part
        for layer in fused.layers
        for part in (layer.query, layer.key, layer.value, layer.out, layer.gate, layer.up, layer.down)
    ]
    return sum(weight.numel() for weight, _ in (*parts, fused.head))


class PackedForward(FusedForward):
    """Fewer operations a step than the fused forward, from a copy of all matrices that `refresh` renews.

    The two halves of every head are interleaved in queries and keys alike, which leaves their products as they are and makes the
    rotation one complex product, in float32 at least.
    """

    name = "packed"

    def __init__(self, fused: FusedForward) -> None:
        super().__init__(fused.reference, fused.layers, fused.epsilon)
        dtype = working_dtype(fused)
        g = self.geometry = replace(fused.geometry, dtype=dtype)
        self.wide = torch.float64 if g.dtype == torch.float64 else torch.float32
        pairs = torch.arange(g.dim).view(2, -1).t().flatten()  # 0, dim/2, 1, dim/2 + 1, ...
        turning = (torch.arange(self.query_heads + g.heads)[:, None] * g.dim + pairs).flatten()
        order = torch.cat((turning, torch.arange(len(turning), len(turning) + g.heads * g.dim)))
        self.packed = [PackedLayer(layer, dtype, order, pairs) for layer in self.layers]
        self.last = Matrix((self.head,), dtype, self.norm)
        self.floor = torch.tensor(self.epsilon, dtype=self.wide)
        self.turn = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return self.last.nbytes + sum(matrix.nbytes for layer in self.packed for matrix in layer.matrices)

    def refresh(self) -> None:
        """Renew the copy."""
        for layer in self.packed:
            for matrix in layer.matrices:
                matrix.refresh()
        self.last.refresh()

    def rotary(self, length: int) -> None:
        """Fill the tables; `turn` [length, 1, dim / 2] complex holds cosine and sine of each pair."""
        super().rotary(length)
        half = self.geometry.dim // 2
        self.turn = torch.complex(self.cosine[..., :half].to(self.wide), self.sine[..., half:].to(self.wide))

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, positions: Tensor, reach: Reach, logits: bool) -> Tensor | None:
        """tokens, positions [B, n] -> logits [B, V] after the last token of each row."""
        if reach.slots.capacity > len(self.cosine):
            self.rotary(reach.slots.capacity)
        b, n = tokens.shape
        heads = self.query_heads
        rotation = self.turn.index_select(0, positions.flatten())  # [N, 1, dim / 2] complex
        x = F.embedding(tokens.flatten(), self.embedding).to(self.geometry.dtype)  # [N, d] with N = B x n
        for i, layer in enumerate(self.packed):
            turned = self._turned(layer.qkv(self._unit(x)), layer, rotation)  # [N, all heads, dim]
            reach.write_both(i, turned[:, heads:])
            x = layer.out.added(x, reach.attend(i, turned[:, :heads], self.scale))
            y = self._unit(x)
            x = layer.down.added(x, layer.gate.silu(y).mul_(layer.up(y)))
        if not logits:
            return None
        return self.last(self._unit(x if n == 1 else x.view(b, n, -1)[:, -1]))

    def _unit(self, x: Tensor) -> Tensor:
        """RMSNorm without its weight, [N, d] or [N, heads, d], computed in float32 at least."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.wide)
        return (x * torch.addcmul(self.floor, size, size, value=1 / x.shape[-1]).rsqrt_()).to(x.dtype)

    def _turned(self, qkv: Tensor, layer: PackedLayer, rotation: Tensor) -> Tensor:
        """Projections [N, all heads x dim] -> rotated queries and keys, then values, [N, all heads, dim]."""
        heads, h, dim = self.query_heads, self.geometry.heads, self.geometry.dim
        qkv = qkv.view(-1, heads + 2 * h, dim)
        norms = layer.head_norms()
        if norms is not None:
            qkv[:, :heads] = norms[0] * self._unit(qkv[:, :heads])
            qkv[:, heads : heads + h] = norms[1] * self._unit(qkv[:, heads : heads + h])
        turned = qkv.to(self.wide)
        torch.view_as_complex(turned.view(len(qkv), -1, dim // 2, 2))[:, : heads + h].mul_(rotation)
        return turned.to(qkv.dtype)
