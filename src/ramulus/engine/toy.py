"""A seeded table model in plain Python: every property of an engine, no torch, no weights, no download."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ramulus.engine.engine import COUNTERS, Decode, Request, Sampling, Segment, Until, Weights
from ramulus.engine.rng import mix, uniform
from ramulus.engine.stops import watched

_Table = Mapping[tuple[int, ...], Sequence[float]]
"""Context (the last few tokens) -> logits of the next token, [V]."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One sampled token with what is recorded of it."""

    token: int
    logprob: float  # of the tempered and truncated distribution
    kept: float  # log of the mass that truncation left
    entropy: float  # nats, untempered


def _softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities [V] of logits [V]; a logit of -inf has probability 0."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def draw_token(logits: Sequence[float], sampling: Sampling, temperature: float, u: float) -> Draw:
    """Sample one token from logits [V] with the uniform number `u`, by inverse CDF.

    The candidates stand in the order of the vocabulary; with top-k, top-p or min-p, in the order of falling probability (ties: the
    lower id first). Top-p is taken of the distribution that top-k left, min-p is relative to the most probable token.
    """
    plain = _softmax(logits)
    entropy = -math.fsum(p * math.log(p) for p in plain if p > 0)
    if temperature == 0:
        return Draw(max(range(len(logits)), key=lambda i: logits[i]), 0.0, 0.0, entropy)
    top = max(logits)
    p = _softmax([(x - top) / temperature for x in logits])  # the difference first: a tiny temperature must not overflow
    order = list(range(len(p)))
    if sampling.truncates:
        order.sort(key=lambda i: -p[i])
    left = truncate(p, order, sampling)
    mass = math.fsum(p[i] for i in left)
    token = pick([p[i] for i in left], u * mass)
    kept = math.log(mass) if len(left) < len(p) else 0.0
    return Draw(left[token], math.log(p[left[token]]) - kept, kept, entropy)


def truncate(p: list[float], order: list[int], sampling: Sampling) -> list[int]:
    """The ids in `order` that top-k, top-p and min-p leave of probabilities p [V]; never empty."""
    if 0 < sampling.top_k < len(p):
        order = order[: sampling.top_k]
    if sampling.top_p < 1:
        goal, before = sampling.top_p * math.fsum(p[i] for i in order), 0.0
        left: list[int] = []
        for i in order:
            if left and before >= goal:
                break
            left.append(i)
            before += p[i]
        order = left
    floor = sampling.min_p * max(p)
    return [i for i in order if p[i] >= floor]


def pick(weights: list[float], target: float) -> int:
    """The first index whose cumulated weight passes `target`; never one of weight zero."""
    total, last = 0.0, 0
    for i, weight in enumerate(weights):
        total += weight
        if weight > 0:
            last = i
            if total > target:
                break
    return last


class ToyEngine:
    """An Engine whose model is a table: logits of the next token by the last one or two tokens.

    `vocab`: number of tokens. `seed`, `order`, `spread`: where `table` has no row, the logits are a hash of (seed, the last `order`
    tokens), spread evenly over [-spread, spread]. `table`: rows of your own, keyed by the last tokens as a tuple; the longest suffix
    of the prefix that is in the table wins, and `()` is the row for everything else.
    `as_array`: what turns logits [[...]] into the array that a temperature rule expects (`torch.tensor` for a rule written with
    torch); without it rules get a list of one list. `decode`: the text of tokens, for stop strings. `limit`: most tokens of a prefix and its
    continuation.

    Same seed, same tokens, always and on every machine with the same `math.exp`. Raises ValueError for an empty prefix, a
    token outside the vocabulary, a text beyond the limit, or a row of the wrong length or of logits that are no numbers.

    Example:
        >>> import asyncio
        >>> from ramulus import Request, Sampling, StopRule, ToyEngine
        >>> engine = ToyEngine(vocab=8, seed=0)
        >>> requests = [Request((1, 2), Sampling(max_tokens=4), StopRule(), seed=7)] * 2
        >>> one, other = asyncio.run(engine.sample(requests))
        >>> one.tokens == other.tokens, len(one.tokens)
        (True, 4)
    """

    def __init__(
        self,
        vocab: int = 8,
        seed: int = 0,
        order: int = 2,
        spread: float = 2.0,
        table: _Table | None = None,
        as_array: Callable[[list[list[float]]], Any] | None = None,
        decode: Decode | None = None,
        limit: int = 2**20,
    ) -> None:
        if vocab < 1:
            raise ValueError(f"vocab must be at least 1, got {vocab}")
        self.vocab, self.seed, self.order, self.spread = vocab, seed, order, spread
        self.as_array, self.decode, self.limit = as_array, decode, limit
        self.features = frozenset({"rules", "until", "entropy", "kept"} | ({"strings"} if decode else set()))
        self.about = f"a table of {vocab} tokens"
        self.version = 0
        self._counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self.table = self._checked(table or {})

    def _checked(self, table: _Table) -> dict[tuple[int, ...], list[float]]:
        for context, row in table.items():
            if len(row) != self.vocab:
                raise ValueError(f"row {context} of the table has {len(row)} logits, the vocabulary has {self.vocab} tokens")
            if not all(x < math.inf for x in row) or max(row) == -math.inf:
                raise ValueError(f"row {context} of the table has logits that are NaN or infinite; -inf may stand beside numbers")
        return {tuple(context): [float(x) for x in row] for context, row in table.items()}

    def logits(self, prefix: Sequence[int]) -> list[float]:
        """Logits [V] of the token after `prefix`."""
        longest = max((len(context) for context in self.table), default=0)
        for n in range(min(longest, len(prefix)), -1, -1):
            row = self.table.get(tuple(prefix[len(prefix) - n :]))
            if row is not None:
                return row
        state = mix(self.seed)
        for token in prefix[-self.order :] if self.order else ():
            state = mix(state ^ mix(token + 1))
        return [(2 * uniform(state, i) - 1) * self.spread for i in range(self.vocab)]

    def probabilities(self, prefix: Sequence[int], temperature: float = 1.0) -> list[float]:
        """The untruncated distribution [V] of the token after `prefix`."""
        return _softmax([x / temperature for x in self.logits(prefix)])

    def counters(self) -> dict[str, int]:
        """Since construction, `sampled` and `row_steps`; the others stay 0."""
        return dict(self._counters)

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        """One continuation of each; yields to the event loop once, so that many requests interleave as with a real engine."""
        for request in requests:
            self._check(request)
        await asyncio.sleep(0)
        return [self.continuation(request) for request in requests]

    def continuation(self, request: Request) -> Segment:
        """What `sample` gives for one request, without an event loop."""
        until, sampling, context = self._check(request), request.sampling, list(request.prefix)
        tokens: list[int] = []
        drawn: list[Draw] = []
        temperatures: list[float] = []
        finish = None
        while len(tokens) < sampling.max_tokens and finish is None:
            logits = self.logits(context)
            temperatures.append(self._temperature(logits, sampling))
            drawn.append(draw_token(logits, sampling, temperatures[-1], uniform(request.seed, len(tokens))))
            context.append(drawn[-1].token)
            tokens.append(drawn[-1].token)
            finish = until(tokens) if until is not None else None
            finish = finish or ("eos" if tokens[-1] in request.stop.ids else None)
        self._counters["sampled"] += len(tokens)
        self._counters["row_steps"] += len(tokens)
        logprobs, entropy, kept = (array("f", [getattr(one, name) for one in drawn]) for name in ("logprob", "entropy", "kept"))
        temperature = array("f", temperatures) if callable(sampling.temperature) else float(sampling.temperature)
        cut = kept if sampling.truncates else None
        return Segment(array("i", tokens), logprobs, finish, self.version, self.version, cut, entropy, temperature)

    def _check(self, request: Request) -> Until | None:
        """What to ask after every token; ValueError for a request that can never be served."""
        if not request.prefix:
            raise ValueError("the prefix of a request is empty: give at least one token (a BOS token, say)")
        wrong = [token for token in request.prefix if not 0 <= token < self.vocab]
        if wrong:
            raise ValueError(f"token {wrong[0]} of the prefix is outside the vocabulary of {self.vocab} tokens")
        n, most = len(request.prefix), request.sampling.max_tokens
        if n + most > self.limit:
            raise ValueError(f"a prefix of {n} tokens and max_tokens={most} make {n + most}, the engine takes {self.limit}: lower max_tokens")
        return watched(request, self.decode)

    def _temperature(self, logits: list[float], sampling: Sampling) -> float:
        if not callable(sampling.temperature):
            return float(sampling.temperature)
        rows = [list(logits)]
        value = float(sampling.temperature(self.as_array(rows) if self.as_array else rows)[0])
        if not 0 <= value < math.inf:
            raise ValueError(f"temperature rule {sampling.temperature} gave {value}: it must be finite and >= 0")
        return value

    async def load(self, weights: Weights, version: int) -> None:
        """Take a new table (a mapping from contexts to logits; None keeps the old one) and a new version number."""
        if weights is not None:
            if not isinstance(weights, Mapping):
                raise TypeError(f"the weights of a toy are a mapping from contexts to logits, got {type(weights).__name__}")
            self.table = self._checked(weights)
        self.version = version

    async def reset(self) -> None:
        """Nothing is remembered from one request to the next."""

    def close(self) -> None:
        """Nothing: it has no processes or threads to end."""
