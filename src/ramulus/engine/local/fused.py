"""The forward pass of Llama-like models, read from the model's own parameters without a module call in between."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from ramulus.engine.local.adapters import Matrices
from ramulus.engine.local.forward import ModelForward
from ramulus.engine.local.kv import Reach
from ramulus.models.code import hooked, runs_as
from ramulus.models.variant import Variant

WHOLES = llama.LlamaForCausalLM, mistral.MistralForCausalLM, qwen2.Qwen2ForCausalLM, qwen3.Qwen3ForCausalLM
BACKBONES = llama.LlamaModel, mistral.MistralModel, qwen2.Qwen2Model, qwen3.Qwen3Model
LAYERS = llama.LlamaDecoderLayer, mistral.MistralDecoderLayer, qwen2.Qwen2DecoderLayer, qwen3.Qwen3DecoderLayer
ATTENTIONS = llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention, qwen3.Qwen3Attention
"""What is known, by what it does: any model whose parts run the same code is taken for one of these."""

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
BACKBONE = {"embed_tokens", "layers", "norm", "rotary_emb"}
LINEAR = ("query", "key", "value", "out", "gate", "up", "down")  # fields of Layer
SILU = ("SiLU", "SiLUActivation", "Silu")


@dataclass(frozen=True, slots=True)
class Layer:
    """The parameters of one decoder layer; not copies."""

    before: Tensor  # RMSNorm weight before attention
    query: tuple[Tensor, Tensor | None]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    query_norm: Tensor | None  # over each head (Qwen3)
    key_norm: Tensor | None
    out: tuple[Tensor, Tensor | None]
    after: Tensor  # RMSNorm weight before the MLP
    gate: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]


def recognise(reference: ModelForward) -> FusedForward | None:
    """A fused forward where every part of the model runs the code of Llama's, Mistral's, Qwen2's or Qwen3's (dense); None otherwise.

    What the code reads from the config (scale, windows, rotary kind, epsilon, activation) is taken from the modules; the caller must `verify` it.
    """
    model = reference.model
    backbone = getattr(model, "model", None)
    head = getattr(model, "lm_head", None)
    if backbone is None or children_of(model) != {"model", "lm_head"} or children_of(backbone) != BACKBONE:
        return None
    if not (runs_as(model, WHOLES) and runs_as(backbone, BACKBONES)) or type(backbone.embed_tokens) is not nn.Embedding:
        return None
    if any(hooked(module) for module in model.modules()):
        return None
    if len({layer.scale for layer in reference.survey.layers.values()}) != 1 or reference.geometry.shapes:
        return None
    matrices = Matrices()
    layers, last = [layer_of(block, matrices) for block in backbone.layers], matrices.pair(head)
    epsilon = {getattr(m, "variance_epsilon", None) for m in model.modules() if is_norm(m)}
    if None in layers or last is None or not is_norm(backbone.norm) or len(epsilon) != 1 or None in epsilon:
        return None
    return FusedForward(reference, [layer for layer in layers if layer], last, matrices, epsilon.pop() or 0.0)


def children_of(module: nn.Module) -> set[str]:
    """The names of a module's children."""
    return {name for name, _ in module.named_children()}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is weight * x / rms(x)."""
    return runs_as(module, (llama.LlamaRMSNorm,))


def layer_of(block: Any, matrices: Matrices) -> Layer | None:
    """The parameters of a block that has exactly the parts we know; None otherwise."""
    if children_of(block) != LAYER or children_of(block.self_attn) - {"q_norm", "k_norm"} != ATTENTION or children_of(block.mlp) - {"act_fn"} != MLP:
        return None
    if not (runs_as(block, LAYERS) and runs_as(block.self_attn, ATTENTIONS) and runs_as(block.mlp, (llama.LlamaMLP,))):
        return None
    projections = {name: matrices.pair(getattr(part, name)) for part, names in ((block.self_attn, ATTENTION), (block.mlp, MLP)) for name in names}
    pairs = {name.removesuffix("_proj"): pair for name, pair in projections.items() if pair is not None}
    if type(block.mlp.act_fn).__name__ not in SILU or len(pairs) < len(projections):
        return None  # an adapter of another kind, a quantised layer
    norms = [getattr(block.self_attn, name, None) for name in ("q_norm", "k_norm")]
    if not all(norm is None or is_norm(norm) for norm in (*norms, block.input_layernorm, block.post_attention_layernorm)):
        return None
    weights = [None if norm is None else norm.weight for norm in norms]
    return Layer(
        block.input_layernorm.weight, pairs["q"], pairs["k"], pairs["v"], weights[0], weights[1], pairs["o"],
        block.post_attention_layernorm.weight, pairs["gate"], pairs["up"], pairs["down"],
    )


class FusedForward:
    """Same tensors, same KV, about half the overhead on small models; chosen only after `verify`.

    Layers under adapters are computed as one matrix, from a copy of their merged weights that `refresh` renews.
    """

    name = "fused"

    def __init__(
        self, reference: ModelForward, layers: list[Layer], head: tuple[Tensor, Tensor | None], matrices: Matrices, epsilon: float
    ) -> None:
        self.geometry, self.reference, self.layers, self.epsilon = reference.geometry, reference, layers, epsilon
        self.head, self.matrices = head, matrices
        model = reference.model
        self.embedding = model.model.embed_tokens.weight
        self.norm = model.model.norm.weight
        self.scale = reference.survey.layers[0].scale
        self.variants = [Variant(reference.sights[i]) for i in range(len(layers))]
        self.query_heads = layers[0].query[0].shape[0] // self.geometry.dim
        self.rounding = self.geometry.dtype  # of the rotary factors
        self.cosine = self.sine = torch.empty(0)
        self._merged: tuple[list[Layer], tuple[Tensor, Tensor | None]] | None = None

    def refresh(self) -> None:
        """Forget merged weights, the only thing that is derived from them; the rotary table does not depend on weights."""
        self._merged = None

    def merged(self) -> tuple[list[Layer], tuple[Tensor, Tensor | None]]:
        """The layers and the head with their adapters in the weights; themselves where there are none."""
        if not self.matrices.adapted:
            return self.layers, self.head
        if self._merged is None:
            layers = []
            for layer in self.layers:
                changes: dict[str, Any] = {name: self._whole(getattr(layer, name)) for name in LINEAR}
                layers.append(replace(layer, **changes))
            self._merged = layers, self._whole(self.head)
        return self._merged

    def _whole(self, part: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        return self.matrices.whole(part[0]).to(part[0].dtype), part[1]

    def rotary(self, length: int) -> None:
        """Fill the table of rotary factors [length, 1, dim] from the model's own module; the sine carries the sign of the rotation."""
        g = self.geometry
        positions = torch.arange(length, device=g.device)[None]
        like = torch.empty(0, dtype=self.rounding, device=g.device)
        cosine, sine = self.reference.model.model.rotary_emb(like, positions)
        half = g.dim // 2
        self.cosine = cosine[0][:, None].contiguous()
        self.sine = torch.cat((-sine[0, :, :half], sine[0, :, half:]), -1)[:, None].contiguous()

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, positions: Tensor, reach: Reach, logits: bool) -> Tensor | None:
        """tokens, positions [B, n] -> logits [B, V] after the last token of each row."""
        if reach.slots.capacity > len(self.cosine):
            self.rotary(reach.slots.capacity)
        b, n = tokens.shape
        dim, heads, h = self.geometry.dim, self.query_heads, self.geometry.heads
        flat = positions.flatten()
        cosine, sine = self.cosine[flat], self.sine[flat]  # [N, 1, dim] with N = B x n
        x = F.embedding(tokens.flatten(), self.embedding)  # [N, d]
        layers, head = self.merged()
        for i, layer in enumerate(layers):
            y = self._normed(x, layer.before)
            q, k, v = F.linear(y, *layer.query), F.linear(y, *layer.key), F.linear(y, *layer.value)
            if layer.query_norm is not None and layer.key_norm is not None:
                q = self._normed(q.view(-1, heads, dim), layer.query_norm).flatten(1)
                k = self._normed(k.view(-1, h, dim), layer.key_norm).flatten(1)
            both = torch.cat((q, k), -1).view(-1, heads + h, dim)
            turned = torch.addcmul(both * cosine, both.roll(dim // 2, -1), sine)
            reach.write(i, turned[:, heads:], v.view(-1, h, dim))
            x = _added(x, reach.attend(i, turned[:, :heads], self.scale, self.variants[i]), *layer.out)
            y = self._normed(x, layer.after)
            x = _added(x, F.silu(F.linear(y, *layer.gate)).mul_(F.linear(y, *layer.up)), *layer.down)
        if not logits:
            return None
        last = x if n == 1 else x.view(b, n, -1)[:, -1]
        return F.linear(self._normed(last, self.norm), *head)[:, : self.reference.drawn]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in float32, scaled in the model's dtype, as transformers does it."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, self.epsilon)
        return weight * F.rms_norm(x.float(), weight.shape, None, self.epsilon).to(x.dtype)


def _added(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x + y W^T + bias: [N, d] + [N, m] [d, m]."""
    out = torch.addmm(x, y, weight.t())
    return out if bias is None else out + bias
