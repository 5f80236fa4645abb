"""What would happen with a model: how it is sampled and trained, in which precision, what ends its answers, what is refused and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ramulus.engine.local.factory import Local
from ramulus.learn.policy.model import Dtype
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.models.positions import UNBOUNDED, context, rope_limit
from ramulus.models.precision import is_half
from ramulus.models.survey import Survey
from ramulus.native.build import why
from ramulus.native.memory import free_on
from ramulus.native.processors import device_multiplies_bfloat16, device_of
from ramulus.run.evaluation.own_run import source_of
from ramulus.run.lock import reading
from ramulus.run.memory.step import training_bytes
from ramulus.run.runtime import eos_of, quiet
from ramulus.tasks.chat import chat_template

_GB = 1e9
_Rows = list[tuple[str, str]]


def diagnose(name: str, dtype: Dtype = "float32") -> tuple[_Rows, bool]:
    """(what, how it stands) of a model folder, hub name or run, and whether it can be both sampled and trained.

    Raises what loading raises, for a model that cannot be loaded or whose answers could not end.
    """
    quiet()
    source = replace(source_of(name), dtype=dtype)
    with reading(Path(source.path).parent):
        model, tokenizer = source()
    device = device_of("auto")
    if sum(p.nbytes for p in model.parameters()) < free_on(device):
        model = model.to(device)
    rows = [("model", f"{type(model).__name__} ({model.config.model_type}), {sum(p.numel() for p in model.parameters()) / 1e6:,.1f}M parameters")]
    engine, token_bytes = _sampled(model)
    learner, model_survey = _learned(model)
    rows += [("attention", _attention(model_survey))] if model_survey is not None else []
    rows += [("context", _context(model)), ("engine", engine), ("learner", learner), ("precision", _precision(model))]
    rows += [*_tokens(model, tokenizer), *_memory(model, token_bytes)]
    return rows, token_bytes is not None and model_survey is not None


def _sampled(model: Any) -> tuple[str, int | None]:
    """How it is sampled, and bytes of a token's keys and values; None for them where it is refused."""
    try:
        engine = Local(precision="auto")(model)
    except ValueError as error:
        return f"refused: {error}", None
    return engine.about, engine.forward.geometry.token_bytes


def _learned(model: Any) -> tuple[str, Survey | None]:
    try:
        policy = TorchPolicy(model, float32_masters=False, autocast="auto")
    except ValueError as error:
        return f"refused: {error}", None
    own = sum(not layer.plain for layer in policy.survey.layers.values())
    way = f"tree attention by kernels ({why()})" if model.device.type == "cpu" else "tree attention by FlexAttention"
    way += f", in {own} of {len(policy.survey.layers)} layers by torch's operations where a window cuts, and for soft caps and sinks" if own else ""
    return f"{way}; {len(policy.patches)} modules with gradients of their own", policy.survey


def _attention(model_survey: Survey) -> str:
    """The variants of the layers, and how many have each."""
    kinds = Counter(layer.words for layer in model_survey.layers.values())
    return "; ".join(f"{count} layers: {kind}" for kind, count in kinds.items())


def _context(model: Any) -> str:
    most = context(model.config)
    if most >= UNBOUNDED:
        return "as many tokens as memory holds"
    ends = ", where its rotary embedding changes with the length of a text" if rope_limit(model.config) == most else ""
    return f"{most:,} tokens{ends}"


def _precision(model: Any) -> str:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    here, taken = ("multiplies", "bfloat16") if device_multiplies_bfloat16(model.device) else ("does not multiply", "float32")
    place = "processor" if model.device.type == "cpu" else "GPU"
    return f"weights in {dtype}; this {place} {here} bfloat16: autocast=auto takes {taken} for float32 weights"


def _tokens(model: Any, tokenizer: Any) -> Iterator[tuple[str, str]]:
    rows, tokens = int(model.get_input_embeddings().weight.shape[0]), len(tokenizer)
    yield "vocabulary", f"{rows:,} rows of the model, {tokens:,} tokens of the tokenizer ({type(tokenizer).__name__})"
    chats = chat_template(tokenizer)
    yield "chat template", "none: problems are given as they are" if chats is None else "yes: problems are given as a user's turn"
    ends = tokenizer.convert_ids_to_tokens(list(eos_of(model, tokenizer)))
    yield "answers end with", ", ".join(map(str, ends))
    named = ((name, getattr(tokenizer, f"{name}_token")) for name in ("bos", "pad", "unk"))
    yield "special tokens", ", ".join(f"{name} {token}" for name, token in named if token is not None) or "none"


def _memory(model: Any, token_bytes: int | None) -> Iterator[tuple[str, str]]:
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(training_bytes(p.numel(), p.dtype.itemsize) for p in model.parameters())
    copies = " and the float32 copies that it steps" if is_half(model) else ""
    beside = f"{trained / _GB:.2f} GB with gradients and AdamW's two moments{copies}"
    yield "memory", f"{weights / _GB:.2f} GB of weights, {beside}; {free_on(model.device) / _GB:.1f} GB are free"
    if token_bytes is not None:
        yield "keys and values", f"{token_bytes / 1024:.1f} KiB a token, {token_bytes * 1000 * 64 / _GB:.2f} GB for 64 texts of 1,000 tokens"
