"""The model's own forward pass over our KV, for any architecture that goes through transformers' AttentionInterface."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ramulus.engine.local.kv import Geometry, Reach
from ramulus.models.positions import context
from ramulus.models.survey import configs_of, plain_way, survey
from ramulus.models.variant import Variant

_NAME = "ramulus_decode"


class Forward(Protocol):
    """Runs tokens through the model, writing and reading KV through a Reach."""

    name: str
    geometry: Geometry

    def __call__(self, tokens: Tensor, positions: Tensor, reach: Reach, logits: bool) -> Tensor | None:
        """tokens, positions [B, n] long -> logits [B, V] after the last token of each row; None when not asked for."""
        ...

    def refresh(self) -> None:
        """Weights have changed: forget what was derived from them."""
        ...


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    ramulus_reach: Any = None, ramulus_sights: Any = None, **arguments: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query [B, H, n, D], key, value [B, h, n, D] -> [B, n, H, D]."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    b, _, n, _ = query.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B x n, heads, D]
    variant = Variant(ramulus_sights[layer], arguments.get("softcap"), arguments.get("s_aux"))
    ramulus_reach.write(layer, key, value)
    out = ramulus_reach.attend(layer, query, query.shape[-1] ** -0.5 if scaling is None else scaling, variant)
    return out.view(b, n, query.shape[1], -1).to(query.dtype), None


# No mask function is registered under this name, on purpose: transformers then builds no mask and hands down None.
AttentionInterface.register(_NAME, _attention)


def bare(model: nn.Module) -> Any:
    """The transformers model inside a peft wrapper (adapters in place), or the model itself."""
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return model
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(f"peft method {config.peft_type} puts virtual tokens before the prompt, which the engine does not do: use LoRA")
    return model.get_base_model()  # type: ignore[operator]


class ModelForward:
    """Calls the transformers model itself: reads the trainer's weights in place, whatever the layers look like.

    The attention implementation of the model's configs and its training mode are switched around each call and put back. Raises ValueError for
    a model that cannot be sampled this way.
    """

    name = "transformers"

    def __init__(self, model: nn.Module) -> None:
        self.model = bare(model)
        self.title = f"{type(self.model).__name__} (model_type {self.model.config.model_type!r})"
        try:
            self.survey = survey(self.model)
        except ValueError as error:
            raise ValueError(f"{self.title} cannot be sampled by the local engine: {error}") from error
        if self.survey.calls != len(self.survey.layers):
            raise ValueError(
                f"{self.title} cannot be sampled by the local engine: its {len(self.survey.layers)} layers attend {self.survey.calls} times a "
                "token, and the engine remembers one key a layer"
            )
        self.modules, self.configs = list(self.model.modules()), configs_of(self.model)
        self.keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.drawn: int | None = getattr(self.model, "ramulus_tokens", None)  # the ids below it are drawn; None: all that the head has
        self.sights = self.survey.sights
        self.geometry = self._geometry()
        self.limit = context(self.model.config)
        self.last = torch.tensor([-1], device=self.geometry.device)

    def refresh(self) -> None:
        """Nothing is derived from the weights."""

    @contextmanager
    def switched(self, implementation: str) -> Iterator[None]:
        """Inference with another attention implementation; both put back afterwards."""
        before = [config._attn_implementation for config in self.configs]
        training = [module for module in self.modules if module.training]
        for config in self.configs:
            config._attn_implementation = implementation
        for module in training:
            module.__dict__["training"] = False  # setattr of nn.Module costs ten times as much
        try:
            with torch.no_grad():
                yield
        finally:
            for config, old in zip(self.configs, before, strict=True):
                config._attn_implementation = old
            for module in training:
                module.__dict__["training"] = True

    def __call__(self, tokens: Tensor, positions: Tensor, reach: Reach, logits: bool) -> Tensor | None:
        """tokens, positions [B, n] -> logits [B, V] after the last token of each row, of the ids that are drawn."""
        options = {"ramulus_reach": reach, "ramulus_sights": self.sights}
        if self.keeps and tokens.shape[1] > 1:  # an index, not a number, for which Gemma 4 leaves tokens out of its last layers
            options["logits_to_keep"] = self.last
        with self.switched(_NAME):
            out = self.model(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True, **options)
        return out.logits[:, -1, : self.drawn] if logits else None

    def plain(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens, positions [B, n], those from 0 on if None -> logits [B, n, V] of the model without any of our attention, to compare with."""
        with self.switched(plain_way(self.model, self.survey)):
            return self.model(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True).logits[..., : self.drawn]

    def _geometry(self) -> Geometry:
        shapes, (heads, dim) = self.survey.shapes, self.survey.widest
        dtype = functools.reduce(torch.promote_types, (layer.dtype for layer in self.survey.layers.values()))
        device = self.model.get_input_embeddings().weight.device
        return Geometry(len(shapes), heads, dim, dtype, device, () if set(shapes) == {(heads, dim, dim)} else shapes)
