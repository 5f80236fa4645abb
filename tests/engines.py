"""Small models and questions for the engine tests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ramulus.engine.engine import Engine, Request, Sampling, Segment, StopRule
from ramulus.native.build import Unavailable, library


def compiles() -> bool:
    """Whether there is a C compiler here."""
    try:
        library("decode.c", {})
    except Unavailable:
        return False
    return True


KERNELS = pytest.mark.skipif(not compiles(), reason="needs a C compiler")
OWN = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)  # floats in a vector of this processor
LANES = [n if n == OWN else pytest.param(n, marks=pytest.mark.slow) for n in (4, 8, 16)]  # others are spelled out, which compilers do slowly
"""Widths of vector; 16 is two of AVX2's, and what AVX-512 has. A build takes seconds."""
VOCABULARY = 48
WAYS: dict[str, dict[str, Any]] = {"compiled": {}, "fused": {"native": False}, "transformers": {"fast": False}}
"""Options of LocalEngine by the name of the forward that they choose."""
EVERY_WAY = [pytest.param(way, marks=KERNELS) if way == "compiled" else way for way in WAYS]
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "attention_bias": True}),
}


def small(kind: str = "qwen2", dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Any:
    """A random model with weights large enough that attention and position matter."""
    config, model, extra = KINDS[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    made = model(config(**({"vocab_size": VOCABULARY, "max_position_embeddings": 256} | sizes | extra | fields)))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.to(dtype)


def never(tokens: list[int]) -> str | None:
    return None


def ask(prefix: tuple[int, ...] | list[int], seed: int = 0, until: Any = never, ids: tuple[int, ...] = (), **sampling: Any) -> Request:
    return Request(tuple(prefix), Sampling(**({"max_tokens": 8} | sampling)), StopRule(frozenset(ids)), seed, until)


async def one(engine: Engine, request: Request) -> Segment:
    """One continuation, by a call of its own."""
    return (await engine.sample([request]))[0]


def run(engine: Engine, requests: list[Request]) -> list[Segment]:
    async def all_of_them() -> list[Segment]:
        return await asyncio.gather(*[one(engine, request) for request in requests])

    return asyncio.run(all_of_them())


def line(n: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def mixed(count: int, longest: int = 60, most: int = 30) -> list[Request]:
    """Requests of unequal prefixes and lengths."""
    generator = torch.Generator().manual_seed(count)
    sizes = torch.randint(1, longest, (count, 2), generator=generator).tolist()
    return [ask(line(n, i), seed=i, max_tokens=1 + m % most) for i, (n, m) in enumerate(sizes)]


@torch.no_grad()
def scored(model: nn.Module, request: Request, segment: Segment, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs [L] of a segment's tokens by the model's plain forward over the whole text, in float64."""
    text = torch.tensor([[*request.prefix, *segment.tokens]])
    logits = model(text).logits[0, len(request.prefix) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(segment.tokens.tolist())[:, None])[:, 0]


def drawn_from(segment: Segment) -> torch.Tensor:
    """Log-probs [L] of the tempered distribution before truncation, in float64."""
    logprobs = torch.tensor(segment.logprobs.tolist(), dtype=torch.float64)
    return logprobs if segment.kept is None else logprobs + torch.tensor(segment.kept.tolist(), dtype=torch.float64)


def worst(model: nn.Module, requests: list[Request], segments: list[Segment]) -> float:
    """Largest difference between recorded and plain log-probs over all tokens of untempered requests."""
    return max(
        float((drawn_from(s) - scored(model, r, s)).abs().max())
        for r, s in zip(requests, segments)
    )
