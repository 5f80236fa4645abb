"""How large a model is, from its config alone: built on torch's meta device, so that nothing is loaded or allocated."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from ramulus.models.errors import sentence

KERNELS = ("llama", "mistral", "qwen2", "qwen3")  # the model types that the compiled kernels decode
_QWEN = {
    "model_type": "qwen2", "dtype": "bfloat16", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "vocab_size": 152064,
    "tie_word_embeddings": False,
}  # fmt: skip


def _qwen(hidden: int, inner: int, layers: int, heads: int, key_heads: int, **other: Any) -> dict[str, Any]:
    widths = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return _QWEN | widths | {"num_attention_heads": heads, "num_key_value_heads": key_heads} | other


_SMALLER: dict[str, Any] = {"vocab_size": 151936, "tie_word_embeddings": True}
PUBLISHED = {  # configs as their authors publish them, of the models that the shipped recipes name and of their sisters
    "Qwen/Qwen2.5-0.5B": _qwen(896, 4864, 24, 14, 2, **_SMALLER),
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen(896, 4864, 24, 14, 2, **_SMALLER),
    "Qwen/Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2, **_SMALLER),
    "Qwen/Qwen2.5-Math-1.5B": _qwen(1536, 8960, 28, 12, 2, **_SMALLER, max_position_embeddings=4096),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen(1536, 8960, 28, 12, 2, vocab_size=151936, max_position_embeddings=131072),
    "Qwen/Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4),
    "Qwen/Qwen2.5-Math-7B": _qwen(3584, 18944, 28, 28, 4, max_position_embeddings=4096),
    "Qwen/Qwen2.5-14B": _qwen(5120, 13824, 48, 40, 8),
    "Qwen/Qwen2.5-32B": _qwen(5120, 27648, 64, 40, 8),
}


@dataclass(frozen=True)
class Sizes:
    """Numbers that memory and time depend on. Widths are those of one token in one layer."""

    kind: str  # the config's model_type
    layers: int
    hidden: int
    heads: int  # of queries
    dim: int  # of a head
    key: int  # of the keys of all key heads; values are as wide
    inner: int  # of the feed-forward layer; of all experts that one token visits
    vocabulary: int
    parameters: int  # tied ones once
    active: int  # parameters that a token is multiplied with: without the embeddings, and of experts those it visits
    linear: tuple[tuple[str, int, int], ...]  # name, inputs and outputs of each linear layer but the output layer
    positions: int  # the longest text
    remembered: int = 0  # numbers of keys and values that an engine keeps of a token: in every layer those of the widest one; 0: 2 x key
    dtype: str = "float32"  # of the weights
    norms: int = 2  # of a layer, beside those of the heads
    head_norms: bool = False  # of queries and keys
    packed: bool = False  # queries, keys and values are one matrix
    experts: int = 0  # that a token visits
    kept: float = 0.0  # bytes that a layer keeps of a token for the backward pass, where it was measured

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.dim

    @property
    def matrices(self) -> int:
        """Numbers in the linear layers, the output layer among them."""
        return sum(inputs * outputs for _, inputs, outputs in self.linear) + self.vocabulary * self.hidden

    def adapters(self, rank: int, targets: tuple[str, ...] | str) -> int:
        """Numbers in low-rank adapters of the layers with these names; a text means all."""
        return rank * sum(inputs + outputs for inputs, outputs in self._adapted(targets))

    def merged(self, targets: tuple[str, ...] | str) -> int:
        """Numbers in the matrices to which such adapters are added."""
        return sum(inputs * outputs for inputs, outputs in self._adapted(targets))

    def _adapted(self, targets: tuple[str, ...] | str) -> list[tuple[int, int]]:
        return [(inputs, outputs) for name, inputs, outputs in self.linear if isinstance(targets, str) or name.rpartition(".")[2] in targets]

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of the keys and values of one token."""
        return (self.remembered or self.layers * 2 * self.key) * itemsize


def sizes_of(config: Any) -> Sizes:
    """The sizes of a causal LM with this transformers config; ValueError where it has no usual attention layers."""
    import torch
    from transformers import AutoModelForCausalLM

    own_code = type(config).__module__.startswith("transformers_modules")  # which was allowed to run when the config was read
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=own_code)
    return sizes_of_model(model)


def sizes_of_model(model: Any) -> Sizes:
    """The sizes of a transformers causal LM, on whichever device; LoRA adapters on it are left out.

    Where layers differ, those of the largest. Raises ValueError for a config that does not say what is needed.
    """
    try:
        return _sizes_of_model(model)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(f"the memory of a {kind!r} cannot be planned: {sentence(error)}") from error


def _sizes_of_model(model: Any) -> Sizes:
    from torch import nn

    text, head = model.config.get_text_config(), model.get_output_embeddings()
    heads, hidden = (_largest(text, name) for name in ("num_attention_heads", "hidden_size"))
    if not heads or not hidden:
        raise ValueError(f"the memory of a {model.config.model_type!r} cannot be planned: its config names no attention heads or no width")
    dim = _largest(text, "head_dim") or hidden // heads
    named = {name.replace(".base_layer", ""): layer for name, layer in model.named_modules() if ".lora_" not in name and layer is not head}
    linear = tuple((name, layer.in_features, layer.out_features) for name, layer in named.items() if type(layer) is nn.Linear)
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    parameters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    chosen, experts = _largest(text, "num_experts_per_tok"), _largest(text, "num_experts") or _largest(text, "num_local_experts")
    inner = _largest(text, "intermediate_size") or 4 * hidden
    layers, active = int(text.num_hidden_layers), parameters - (0 if head is None or _tied(model) else vocabulary * hidden)
    routed = chosen if experts and any(".experts" in name for name in named) else 0
    if routed:
        inner = routed * (_largest(text, "moe_intermediate_size") or inner)
        active -= sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) * (experts - routed) // experts
    latent = _largest(text, "qk_nope_head_dim") + _largest(text, "qk_rope_head_dim")  # of MLA
    key = _widest_key(text, heads, max(dim, latent))
    positions = _largest(text, "max_position_embeddings") or 2**31
    more = remembered_numbers(model), str(next(model.parameters()).dtype).removeprefix("torch."), *layer_traits(named), routed
    return Sizes(model.config.model_type, layers, hidden, heads, dim, key, inner, vocabulary, parameters, active, linear, positions, *more)


def layer_traits(named: dict[str, Any]) -> tuple[int, bool, bool]:
    """Of modules by their names: norms of the first layer of the outermost list, norms of heads there, queries, keys and values in one matrix."""
    first = next((name for name in named if name.endswith(".0")), "")
    below = {name.removeprefix(f"{first}.") for name in named if first and name.startswith(f"{first}.")}
    ends = {name.rpartition(".")[2] for name in below}
    norms = sum("." not in name and "norm" in name for name in below)
    return norms or 2, bool(ends & {"q_norm", "k_norm"}), bool(ends & {"qkv_proj", "query_key_value", "c_attn", "Wqkv"})


def remembered_numbers(model: Any) -> int:
    """Numbers of keys and values that an engine keeps of a token, by the survey that it makes, of a model without weights; 0 where that fails."""
    import torch

    from ramulus.models.survey import survey

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            bare = type(base)(copy.deepcopy(base.config))
        seen = survey(bare.to(torch.bfloat16))  # in which torch groups experts
    except Exception:  # a class that is made in another way, operations without shapes of their own
        return 0
    heads, dim = seen.widest
    return len(seen.layers) * 2 * heads * dim


def _widest_key(text: Any, heads: int, dim: int) -> int:
    """Width of the keys of all key heads, in the layer where it is largest."""
    each = [(_largest(one, "num_key_value_heads") or heads) * (_largest(one, "head_dim") or dim) for one in _by_layer(text)]
    return max(each, default=(_largest(text, "num_key_value_heads") or heads) * dim)


def _by_layer(text: Any) -> list[Any]:
    """The configs of the layers, of a config whose layers have their own."""
    return list(text.per_layer_config) if getattr(text, "per_layer_attributes", None) else []


def _largest(config: Any, name: str) -> int:
    """A number of a config, the largest where it says one for each layer; 0 where it says none."""
    try:
        values = getattr(config, name, None)
    except RuntimeError:  # transformers' word for layers that have one each
        values = [getattr(layer, name, None) for layer in _by_layer(config)]
    numbers = values if isinstance(values, list | tuple) else [values]
    return max((int(number) for number in numbers if number), default=0)


def _tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight
