"""What an engine is: prefixes in, tokens out, never trees."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Until = Callable[[list[int]], str | None]
"""Given the tokens sampled so far in this request, says why the text ends here, or None; called after every token that may end it."""

Temperature = Callable[[Any], Any]
"""A frozen dataclass that maps logits [B, V] to temperatures [B]; the engine evaluates it at every token.

With a method `of_entropy` it is given the entropies [B], which the engine has already; an attribute `positive` that is true says that it never
answers 0, which is greedy.
"""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature first, then top-k, top-p and min-p on the tempered distribution."""

    max_tokens: int
    temperature: float | Temperature = 1.0  # 0 is greedy: the sampled distribution is one token, its log-prob 0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if isinstance(self.temperature, int | float) and not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all), got {self.top_k}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must be in [0, 1), got {self.min_p}")


@dataclass(frozen=True, slots=True)
class Request:
    """Continue `prefix`; the same seed gives the same tokens. `ends`: `until` answers None after any other token but the last of max_tokens, so
    an engine need not ask; None says nothing."""

    prefix: tuple[int, ...]
    sampling: Sampling
    until: Until
    seed: int
    ends: frozenset[int] | None = None


@dataclass(slots=True)
class Segment:
    """What was sampled for one request; every list is [L]."""

    tokens: list[int]
    logprobs: list[float]  # log mu(token), of the tempered and truncated distribution really sampled from
    kept: list[float]  # log of the mass that truncation left; 0 where nothing was cut
    entropy: list[float]  # nats, of the untempered distribution
    temperature: list[float]
    finish: str | None  # what `until` said; None when max_tokens ran out first
    version: int  # of the weights that sampled it


class Engine(Protocol):
    """Anything that can continue a prefix."""

    async def sample(self, request: Request) -> Segment:
        """Sample one continuation."""
        ...

    async def load(self, weights: Any, version: int) -> None:
        """Take new weights; KV of older weights is never reused after this."""
        ...


async def sample_all(engine: Engine, requests: Sequence[Request]) -> list[Segment]:
    """One continuation of each request, in order, the first failure ending all: through `sample_many(requests)` where the engine has it.

    An engine whose class, or itself, has a `sample` of its own and inherits `sample_many` is asked by that `sample`.
    """
    if sampling_many(engine):
        return list(await engine.sample_many(requests))  # type: ignore[attr-defined]
    return await together(engine.sample(request) for request in requests)


def sampling_many(engine: Engine) -> bool:
    """Whether `sample_many` says what `sample` says, for many requests at once."""
    if "sample" in getattr(engine, "__dict__", {}):
        return "sample_many" in vars(engine)
    for kind in type(engine).__mro__:
        if "sample_many" in vars(kind) or "sample" in vars(kind):
            return "sample_many" in vars(kind)
    return hasattr(engine, "sample_many")


async def together(coroutines: Iterable[Awaitable[Any]]) -> list[Any]:
    """All results in order; the first failure stops the rest and is raised as it is."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
