"""The model's own forward pass over our KV, for any architecture that goes through transformers' AttentionInterface."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ramulus.engine.local.kv import Geometry, Reach, Slots, rounded

NAME = "ramulus_decode"
FOREIGN = ("softcap", "s_aux", "position_bias", "head_mask")  # attention arguments that our attention does not honour
SHIFTING = ("dynamic", "longrope")  # rotary embeddings that change with the length of the sequence: remembered keys would be stale
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # of the self-check, relative; half precision: HALF
HALF = 6e-2


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


class Survey:
    """Stands in for a Reach in one plain causal pass and writes down what attention was asked to do."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.shapes: set[tuple[int, int, int, torch.dtype, torch.device]] = set()
        self.window: int | None = None
        self.foreign: set[str] = set()
        self.scales: set[float] = set()

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Note the shapes; keep both for `attend`."""
        self.layers.append(layer)
        self.shapes.add((key.shape[1], key.shape[2], value.shape[2], key.dtype, key.device))
        self.key, self.value = key, value

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Plain causal attention over one row: [n, query heads, dim] -> [n, query heads x dim of values]."""
        self.scales.add(scale)
        q, k, v = (x.transpose(0, 1)[None] for x in (query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1).flatten(1)

    def note(self, arguments: dict[str, Any]) -> None:
        """Remember arguments that would change the result."""
        self.foreign |= {name for name in FOREIGN if arguments.get(name) is not None}
        window = arguments.get("sliding_window")
        if window is not None:
            self.window = min(window, self.window or window)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    ramulus_reach: Any = None, **arguments: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query [B, H, n, D], key, value [B, h, n, D] -> [B, n, H, D]."""
    if ramulus_reach is None:
        raise ValueError("its forward does not hand keyword arguments down to attention")
    if isinstance(ramulus_reach, Survey):
        ramulus_reach.note(arguments)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    b, _, n, _ = query.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B x n, heads, D]
    ramulus_reach.write(layer, key, value)
    out = ramulus_reach.attend(layer, query, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.view(b, n, query.shape[1], -1), None


# No mask function is registered under this name, on purpose: transformers then builds no mask and hands down None.
AttentionInterface.register(NAME, attention)


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

    The attention implementation of the model's config and its training mode are switched around each call and put back.
    """

    name = "transformers"

    def __init__(self, model: nn.Module) -> None:
        self.model = bare(model)
        self.title = f"{type(self.model).__name__} (model_type {self.model.config.model_type!r})"
        self.modules = list(self.model.modules())
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        self.survey = self._survey()
        self.geometry = self._geometry()
        self.limit = self._limit()

    def refresh(self) -> None:
        """Nothing is derived from the weights."""

    @contextmanager
    def switched(self, implementation: str) -> Iterator[None]:
        """Inference with another attention implementation; both put back afterwards."""
        config = self.model.config
        before = config._attn_implementation
        training = [module for module in self.modules if module.training]
        config._attn_implementation = implementation
        for module in training:
            module.__dict__["training"] = False  # setattr of nn.Module costs ten times as much
        try:
            with torch.no_grad():
                yield
        finally:
            config._attn_implementation = before
            for module in training:
                module.__dict__["training"] = True

    def __call__(self, tokens: Tensor, positions: Tensor, reach: Reach | Survey, logits: bool) -> Tensor | None:
        """tokens, positions [B, n] -> logits [B, V] after the last token of each row."""
        with self.switched(NAME):
            out = self.model(
                input_ids=tokens, position_ids=positions, use_cache=False, ramulus_reach=reach, return_dict=True, **self.last_only
            )
        return out.logits[:, -1] if logits else None

    def plain(self, tokens: Tensor) -> Tensor:
        """tokens [n] -> logits [n, V] of the model without any of our attention, to compare with."""
        with self.switched("sdpa" if getattr(self.model, "_supports_sdpa", False) else "eager"):
            return self.model(input_ids=tokens[None], use_cache=False, return_dict=True).logits[0]

    def _survey(self) -> Survey:
        n = 4
        device = next(self.model.parameters()).device
        survey = Survey()
        line = torch.arange(n, device=device)[None]
        try:
            self(line % int(self.model.get_input_embeddings().num_embeddings), line, survey, logits=False)  # type: ignore[arg-type]
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.title} cannot be sampled by the local engine: {error}") from error
        return survey

    def _geometry(self) -> Geometry:
        survey = self.survey
        layers = self.model.config.get_text_config().num_hidden_layers
        if sorted(survey.layers) != list(range(layers)):
            raise ValueError(
                f"{self.title} cannot be sampled by the local engine: of its {layers} layers {sorted(set(survey.layers))} go through "
                "transformers' AttentionInterface; the others (linear attention, convolution, attention of their own) keep a state "
                "that the engine does not hold"
            )
        if survey.foreign:
            raise ValueError(
                f"{self.title} cannot be sampled by the local engine: its attention uses "
                f"{', '.join(sorted(survey.foreign))}, which is not implemented"
            )
        if len(survey.shapes) != 1 or any(shape[1] != shape[2] for shape in survey.shapes):
            raise ValueError(
                f"{self.title} cannot be sampled by the local engine: keys and values must have one shape in all layers, "
                f"found (heads, key dim, value dim) {sorted(shape[:3] for shape in survey.shapes)}"
            )
        heads, dim, _, dtype, device = next(iter(survey.shapes))
        return Geometry(layers, heads, dim, dtype, device)

    def _limit(self) -> int:
        """Most tokens of prefix and continuation together. Inside a sliding window or chunk attention is full attention."""
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
        if kinds & set(SHIFTING):
            raise ValueError(
                f"{self.title} cannot be sampled by the local engine: its rotary embedding ({', '.join(sorted(kinds & set(SHIFTING)))}) changes "
                "with the length of the sequence, so remembered keys would be stale; set rope_type to 'default', 'linear', 'yarn' or 'llama3'"
            )
        limits = [getattr(config, "max_position_embeddings", None), getattr(config, "attention_chunk_size", None), self.survey.window]
        return min([int(limit) for limit in limits if limit] or [2**31])


def verify(forward: Forward, reference: ModelForward) -> float:
    """Self-check: a padded prefill of two unequal rows and three decode steps against the model's plain forward.

    Returns the relative error of the logits; raises ValueError naming the architecture when it is too large.
    """
    geometry = forward.geometry
    lengths = [min(11, reference.limit), min(8, reference.limit)]
    vocabulary = int(reference.model.get_input_embeddings().num_embeddings)
    generator = torch.Generator().manual_seed(0)
    lines = [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]
    slots = Slots(geometry)
    slots.resize(3, rounded(max(lengths)), 0)
    _prefill(forward, slots, lines, [n - 3 for n in lengths], [2, 1])
    for row, source in ((0, 2), (1, 1)):
        slots.move([(source, row, max(lengths))])
    worst = 0.0
    truth = [reference.plain(line.to(geometry.device)) for line in lines]
    for step in range(3):
        at = torch.tensor([[n - 3 + step] for n in lengths], device=geometry.device)
        tokens = torch.stack([line[n - 3 + step : n - 2 + step] for line, n in zip(lines, lengths)]).to(geometry.device)
        logits = forward(tokens, at, Reach(slots, at, slots.capacity), True)
        assert logits is not None
        for ours, theirs, n in zip(logits.double(), truth, lengths):
            expected = theirs[n - 3 + step].double()
            spread = (expected - expected.mean()).norm().clamp(min=1e-12)
            worst = max(worst, float((ours - expected).norm() / spread))
    if not worst <= TOLERANCE.get(reference.geometry.dtype, HALF):
        raise ValueError(
            f"{reference.title} cannot be sampled by the local engine: decoding over remembered keys and values gives other logits than "
            f"its plain forward (relative error {worst:.1e}), so its tokens depend on more than those"
        )
    return worst


def _prefill(forward: Forward, slots: Slots, lines: list[Tensor], lengths: list[int], rows: list[int]) -> None:
    n, device = max(lengths), slots.geometry.device
    tokens = torch.stack([F.pad(line[:m], (0, n - m)) for line, m in zip(lines, lengths)]).to(device)
    positions = torch.arange(n, device=device).expand(len(lines), n).contiguous()
    valid = positions < torch.tensor(lengths, device=device)[:, None]
    forward(tokens, positions, Reach(slots, positions, slots.capacity, torch.tensor(rows, device=device), valid), False)
