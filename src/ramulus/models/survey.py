"""What a model asks of attention, layer by layer, written down in one plain pass over a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ramulus.models.errors import sentence
from ramulus.models.variant import Sight, sight_of

NAME = "ramulus_survey"
SURVEYED = 5  # tokens of the survey
LONGEST = 96  # tokens of a text by which a model is checked
FAR = 2**16  # the last positions at which it is, where it has more
HARMLESS = {  # arguments of attention that change nothing, or that are read where the model attends
    "sliding_window", "softcap", "s_aux", "dropout", "position_ids", "cache_position", "use_cache", "is_causal",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
}  # fmt: skip


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention was given."""

    sight: Sight
    heads: int  # key and value heads
    key: int  # dimensions of a key
    value: int  # dimensions of a value
    scale: float
    dtype: torch.dtype  # of keys and values
    softcap: bool
    sinks: bool

    @property
    def spelled(self) -> bool:
        """Whether attention has to be spelled out."""
        return self.softcap or self.sinks

    @property
    def plain(self) -> bool:
        """Whether this is ordinary causal attention."""
        return not self.spelled and self.sight == Sight() and self.key == self.value

    @property
    def words(self) -> str:
        """What it is, for a person."""
        sight = self.sight
        span = f"windows of {sight.window}" if sight.window else f"chunks of {sight.chunk}" if sight.chunk else "full"
        more = [name for name, there in (("soft caps", self.softcap), ("sinks", self.sinks)) if there]
        sizes = f"{self.heads} key heads of {self.key}" + (f", values of {self.value}" if self.value != self.key else "")
        return ", ".join([span, *more, sizes])


class Survey:
    """The layers by their index; `calls` says how many times they attended."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerAttention] = {}
        self.calls = 0

    def past_windows(self, tokens: int) -> int:
        """So many tokens, or as many more as reach past the longest window that LONGEST tokens reach past."""
        sizes = {sight.window or sight.chunk or 0 for sight in self.sights.values()}
        return max(tokens + size for size in {0, *sizes} if tokens + size <= LONGEST)

    @property
    def sights(self) -> dict[int, Sight]:
        """The Sight of each layer, by its index."""
        return {index: layer.sight for index, layer in self.layers.items()}

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Key heads, dimensions of a key and of a value of each layer."""
        return tuple((layer.heads, layer.key, layer.value) for _, layer in sorted(self.layers.items()))

    @property
    def widest(self) -> tuple[int, int]:
        """Key heads and dimensions that hold the keys and the values of every layer, as an engine keeps them."""
        return max(heads for heads, *_ in self.shapes), max(max(sides) for _, *sides in self.shapes)

    def note(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, options: dict[str, Any]) -> None:
        """Write one call down. Raises ValueError for what is not attention of each token to those before it."""
        foreign = sorted(name for name, x in options.items() if name not in HARMLESS and name != NAME and x is not None and x is not False)
        if foreign:
            raise ValueError(f"its attention uses {', '.join(foreign)}, which is not implemented")
        if isinstance(mask, MaskRule):
            sight = mask.sight
        elif mask is None:
            sight = Sight(window=options.get("sliding_window"))
        else:
            sight = None
        if sight is None or options.get("is_causal") is False:
            raise ValueError("its attention mask is neither causal nor a sliding window nor chunks")
        if not query.shape[2] == key.shape[2] == SURVEYED:
            raise ValueError(f"its attention meets {key.shape[2]} keys for {SURVEYED} tokens")
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            raise ValueError(f"its {type(module).__name__} does not say which layer it is of (layer_idx)")
        spelled = [options.get(name) is not None for name in ("softcap", "s_aux")]
        dtype = torch.promote_types(key.dtype, value.dtype)
        layer = LayerAttention(sight, key.shape[1], key.shape[3], value.shape[3], scale, dtype, *spelled)
        if self.layers.setdefault(index, layer).sight != sight:
            raise ValueError(f"its layer {index} attends in more than one way")
        self.calls += 1


class MaskRule:
    """Stands for a mask that transformers would build. Not a tensor, so that a model that changes its masks fails at once."""

    def __init__(self, sight: Sight | None) -> None:
        self.sight = sight


def mask(*unused: Any, mask_function: Any, local_size: int | None = None, **more: Any) -> MaskRule:
    """What transformers calls to build a mask: it is understood, not built."""
    return MaskRule(sight_of(mask_function, local_size or None))


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls in every layer while a model is surveyed; plain causal attention."""
    model_survey = options.get(NAME)
    if model_survey is None:
        raise ValueError("its forward does not hand keyword arguments down to attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    model_survey.note(module, query, key, value, attention_mask, scale, options)
    key, value = (x.to(query.dtype) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


def configs_of(model: nn.Module) -> list[Any]:
    """The configs that say by which implementation a model's modules attend."""
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation")}.values())


@contextmanager
def attending_by(model: nn.Module, name: str) -> Iterator[None]:
    """Let `model` attend by the implementation `name`, and as before afterwards."""
    configs = configs_of(model)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old


def plain_way(model: nn.Module, model_survey: Survey) -> str:
    """The implementation by which a model's plain forward does all that its layers ask."""
    spelled = any(layer.spelled for layer in model_survey.layers.values())
    return "sdpa" if getattr(model, "_supports_sdpa", False) and not spelled else "eager"


@torch.no_grad()
def survey(model: Any) -> Survey:
    """What the layers of a transformers causal LM ask of attention. Raises ValueError that says what cannot be had, without the model's name.

    Of a model on torch's meta device the shapes alone.
    """
    model_survey = Survey()
    size = int(model.get_input_embeddings().num_embeddings)
    line = torch.arange(SURVEYED, device=model.get_input_embeddings().weight.device)[None]
    options: dict[str, Any] = {NAME: model_survey, "use_cache": line.is_meta}  # with it transformers looks for no packed texts, in numbers
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = torch.tensor([-1], device=line.device)  # not a number, for which Gemma 4 cuts masks
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with attending_by(model, NAME):
            model(input_ids=(line + 1) % size, position_ids=line, return_dict=True, **options)
    except (TypeError, AttributeError, RuntimeError, IndexError, KeyError, NotImplementedError) as error:
        if MaskRule.__name__ in str(error):
            raise ValueError("its layers compute with the attention mask themselves, in ways that are not known") from error
        raise ValueError(f"its forward fails on {SURVEYED} tokens ({type(error).__name__}: {message_of(error)})") from error
    finally:
        for module in training:
            module.training = True
    layers = int(model.config.get_text_config().num_hidden_layers)
    if sorted(model_survey.layers) != list(range(layers)) and model_survey.calls < layers:  # layers may be used several times
        raise ValueError(
            f"of its {layers} layers {sorted(model_survey.layers)} go through transformers' AttentionInterface; the others (linear attention, "
            "convolution, attention of their own) keep a state that trees and remembered keys do not have"
        )
    return model_survey


def message_of(error: Exception) -> str:
    """The first line of a library's error."""
    return sentence(error, "no message")
