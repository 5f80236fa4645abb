"""What an engine is: prefixes in, tokens out, never trees."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, Protocol, cast

from ramulus.models.weights import Weights as Weights  # part of what this module offers

Until = Callable[[list[int]], str | None]
"""Given the tokens sampled so far in this request, says why the text ends here, or None; asked after every token."""

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""


class Live(dict[str, Any]):
    """Name -> tensor of a learner's own parameters. `version`: how many updates they have had; with another than at the load, they are others.

    Pickled it is a copy, whose version stays.
    """

    def __init__(self, parameters: Mapping[str, Any], version: Callable[[], int]) -> None:
        super().__init__(parameters)
        self.version = version

    def __reduce__(self) -> tuple[Any, ...]:
        return Live, (dict(self), partial(int, self.version()))


Temperature = Callable[[Any], Any]
"""A frozen dataclass that maps logits [B, V] to temperatures [B]; the engine evaluates it at every token.

A class attribute `features`, a frozenset of the names in RULE_FEATURES, says what more it can do.
"""

HOTTEST = 1e38  # of temperatures that are numbers: float32 holds it

RULE_FEATURES = {
    "of_entropy": "its method of_entropy maps entropies [B] in nats, which the engine has already, to temperatures [B]",
    "positive": "it never answers 0, which is greedy",
    "stats": "measure(forest) gives plain JSON, and given(stats) the rule for the next step; given(None) that for the first",
}


def rule_features(temperature: float | Temperature) -> frozenset[str]:
    """The names in RULE_FEATURES that a temperature has; a number has none."""
    return getattr(temperature, "features", frozenset())


class EntropyRule(Protocol):
    """A temperature rule with the feature "of_entropy"."""

    def of_entropy(self, entropy: Any) -> Any:
        """Entropies [B] in nats -> temperatures [B]."""
        ...


def entropy_rule(temperature: float | Temperature) -> EntropyRule | None:
    """A temperature that has the feature "of_entropy"; None for another."""
    return cast(EntropyRule, temperature) if "of_entropy" in rule_features(temperature) else None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature first, then top-k, top-p and min-p on the tempered distribution.

    Example:
        >>> from ramulus import Sampling
        >>> Sampling(max_tokens=512, temperature=0.7, top_p=0.95).top_k
        0
    """

    max_tokens: int
    temperature: float | Temperature = 1.0  # 0 is greedy: the sampled distribution is one token, its log-prob 0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("max_tokens", self.max_tokens), ("top_k", self.top_k)):
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not callable(self.temperature) and not (isinstance(self.temperature, Real) and 0 <= self.temperature <= HOTTEST):
            raise ValueError(f"temperature must be a number from 0 (greedy) to {HOTTEST:g}, or a rule, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all), got {self.top_k}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must be in [0, 1), got {self.min_p}")

    @property
    def truncates(self) -> bool:
        """Whether top-p, top-k or min-p may cut something off."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True, slots=True)
class StopRule:
    """Where a continuation ends, as data that any server honours; what ends it is its last token or part of its text.

    `ids`: the text ends after one of these, with the finish "eos". `strings`: it ends at the token that completes one of these, with the finish
    "stop"; an engine without the feature "strings" takes none. The most tokens are those of `Sampling.max_tokens`.

    Example:
        >>> from ramulus import StopRule
        >>> StopRule(ids=frozenset({0}), strings=("</answer>",)).strings
        ('</answer>',)
    """

    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.strings, str) or not all(self.strings):
            raise ValueError(f"strings is a tuple of texts that are not empty, got {self.strings!r}")


@dataclass(frozen=True, slots=True)
class Request:
    """Continue `prefix`; the same seed gives the same tokens. Picklable where its `until` and its temperature rule are.

    `until` has the first word on each token, then `stop`. An engine without the feature "until" takes none: its caller asks afterwards.

    Example:
        >>> Request((1, 2), Sampling(max_tokens=8), StopRule(frozenset({0})), seed=3).stop.ids
        frozenset({0})
    """

    prefix: tuple[int, ...]
    sampling: Sampling
    stop: StopRule = StopRule()
    seed: int = 0
    until: Until | None = None


@dataclass(slots=True)
class Segment:
    """What was sampled for one request. Columns are arrays [L], "i" for tokens and "f" for the others; what was not recorded is None, not zero.

    Example:
        >>> from array import array
        >>> segment = Segment(array("i", [5, 0]), array("f", [-0.5, -0.25]), "eos", version=3, newest=3)
        >>> segment.entropy is None
        True
    """

    tokens: array[int]
    logprobs: array[float]  # log mu(token), of the tempered and truncated distribution really sampled from
    finish: str | None  # "eos", "stop", or what `until` said; None when max_tokens ran out first
    version: int = 0  # of the weights that sampled its first token
    newest: int = 0  # of those that sampled its last token
    kept: array[float] | None = None  # log of the mass that truncation left; None: nothing was cut, or the engine has no feature "kept"
    entropy: array[float] | None = None  # nats, of the untempered distribution
    temperature: array[float] | float | None = None  # a number where all tokens share it
    versions: array[int] | None = None  # "i", of the weights that sampled each token, where weights were swapped below it; None: all by `version`


FEATURES = {
    "rules": "temperature rules on logits: any, unless it names those it knows (`named_rules`)",
    "until": "asks `until` after every token",
    "strings": "honours stop strings",
    "entropy": "records the entropy of what each token was drawn from",
    "kept": "records what truncation left",
    "in_flight": "swaps weights below requests on their way, which go on by the new ones",
    "sleep": "gives the memory of its keys and values back until it samples again",
    "in_place": "reads the parameters of the learner's model, so that `load(None, version)` takes what they are now",
    "live": "takes the learner's own parameters, as `Live`, and sends them on from where they are",
}

_NAMED = "rules/"  # what begins a feature that names a temperature rule


def named_rules(names: Iterable[str]) -> frozenset[str]:
    """The features of an engine that knows the temperature rules whose classes have these names, and no others."""
    named = frozenset(_NAMED + name for name in names)
    return named | {"rules"} if named else named


def known_rules(features: Collection[str]) -> list[str] | None:
    """The names of the temperature rules that an engine with these features knows; None where it takes any."""
    named = sorted(name.removeprefix(_NAMED) for name in features if name.startswith(_NAMED))
    return named if named or "rules" not in features else None


class Engine(Protocol):
    """Anything that can continue prefixes. Nothing else of an engine is used outside its room.

    Example:
        >>> from ramulus import Engine, ToyEngine
        >>> engine: Engine = ToyEngine(vocab=8, seed=0)
        >>> "until" in engine.features, engine.counters()["sampled"]
        (True, 0)
    """

    @property
    def limit(self) -> int:
        """Most tokens of prefix and continuation together."""
        ...

    @property
    def features(self) -> frozenset[str]:
        """What it can do beyond plain sampling: names of FEATURES, and with "rules" those of `named_rules` where it does not take any rule."""
        ...

    @property
    def about(self) -> str:
        """In a line for a person: where and how it computes, and what makes it slower than it could be."""
        ...

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        """One continuation of each request, in order. ValueError, before any is sampled, for one that can never be served."""
        ...

    async def load(self, weights: Weights, version: int) -> None:
        """Take new weights; KV of older weights is never reused after this."""
        ...

    async def reset(self) -> None:
        """Forget all KV and keep the weights: what comes is as if nothing had been sampled."""
        ...

    def counters(self) -> Mapping[str, int]:
        """Since construction, under `COUNTERS`' names."""
        ...

    def close(self) -> None:
        """End the processes that belong to it, if any; nothing follows."""
        ...


class SleepingEngine(Engine, Protocol):
    """An engine with the feature "sleep"."""

    async def sleep(self) -> None:
        """Give the memory of keys and values back until it samples again."""
        ...


COUNTERS = ("sampled", "prefilled", "reused", "prefilled_again", "passes", "steps", "row_steps")
"""Tokens `sampled`; prefix tokens `prefilled` and `reused` from KV, `prefilled_again` those of the former that had been dropped; prefill `passes`;
decode `steps`, `row_steps` the rows in them."""


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
