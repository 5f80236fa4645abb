"""The toy engine: exact bookkeeping, and the same draws as the torch sampler."""

from __future__ import annotations

import asyncio
import math
import random

import numpy as np
import pytest
import torch

from ramulus.engine.engine import Request, Sampling, StopRule
from ramulus.engine.local.sampling import SamplingBatch, draw
from ramulus.engine.rng import streams, uniform, uniforms
from ramulus.engine.toy import ToyEngine
from ramulus.engine.toy import draw_token as draw_one


def never(tokens: list[int]) -> str | None:
    return None


def ask(prefix: tuple[int, ...] = (1, 2), seed: int = 0, until=never, **sampling) -> Request:
    return Request(prefix, Sampling(**({"max_tokens": 12} | sampling)), StopRule(), seed, until)


def test_same_seed_same_tokens_whoever_else_samples() -> None:
    async def crowd() -> list[list[int]]:
        toy = ToyEngine()
        return [s.tokens.tolist() for s, in await asyncio.gather(*[toy.sample([ask(seed=i)]) for i in range(20)])]

    together = asyncio.run(crowd())
    alone = [ToyEngine().continuation(ask(seed=i)).tokens.tolist() for i in range(20)]
    assert together == alone
    assert len({tuple(t) for t in alone}) > 15  # seeds matter


def test_records_are_those_of_the_distribution_sampled_from() -> None:
    toy = ToyEngine(vocab=6, seed=3)
    request = ask(max_tokens=40, temperature=0.7, top_p=0.8, top_k=4, min_p=0.05)
    segment = toy.continuation(request)
    context = list(request.prefix)
    for token, logprob, kept, entropy in zip(segment.tokens, segment.logprobs, segment.kept, segment.entropy):
        tempered = toy.probabilities(context, 0.7)
        assert logprob + kept == pytest.approx(math.log(tempered[token]), abs=1e-6)
        assert logprob <= 0
        assert kept < 0
        plain = toy.probabilities(context)
        assert entropy == pytest.approx(-sum(p * math.log(p) for p in plain))
        context.append(token)
    assert segment.temperature == 0.7


def test_user_table_the_longest_suffix_wins() -> None:
    sure = [-math.inf, -math.inf, 0.0]
    toy = ToyEngine(vocab=3, table={(): [0.0, -math.inf, -math.inf], (0,): [-math.inf, 0.0, -math.inf], (0, 1): sure})
    assert toy.continuation(ask(prefix=(2,), max_tokens=4)).tokens.tolist() == [0, 1, 2, 0]


def test_until_max_tokens_version_and_counters() -> None:
    toy = ToyEngine(vocab=4)
    segment = toy.continuation(ask(until=lambda tokens: "eos" if len(tokens) == 5 else None))
    assert (len(segment.tokens), segment.finish) == (5, "eos")
    segment = toy.continuation(ask(max_tokens=3))
    assert (len(segment.tokens), segment.finish) == (3, None)
    asyncio.run(toy.load({(): [9.0, 0.0, 0.0, 0.0]}, 7))
    segment = toy.continuation(ask(temperature=0))
    assert (segment.tokens.tolist(), segment.version, segment.newest) == ([0] * 12, 7, 7)
    assert segment.logprobs.tolist() == [0.0] * 12
    assert (segment.kept, segment.temperature) == (None, 0.0)
    assert toy.counters()["sampled"] == 20


def test_temperature_rule_with_and_without_torch() -> None:
    plain = ToyEngine().continuation(ask(temperature=lambda rows: [0.5 for _ in rows]))
    with_torch = ToyEngine(as_array=torch.tensor).continuation(ask(temperature=lambda logits: torch.full(logits.shape[:1], 0.5)))
    assert plain.temperature.tolist() == with_torch.temperature.tolist() == [0.5] * 12
    assert plain.tokens == with_torch.tokens == ToyEngine().continuation(ask(temperature=0.5)).tokens
    with pytest.raises(ValueError, match=r"temperature rule .* gave -1"):
        ToyEngine().continuation(ask(temperature=lambda rows: [-1.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ToyEngine().continuation(ask(prefix=())), "empty"),
        (lambda: ToyEngine(vocab=3).continuation(ask(prefix=(1, 3))), "token 3 .* vocabulary of 3"),
        (lambda: ToyEngine(vocab=3, table={(): [0.0]}), "1 logits"),
        (lambda: ToyEngine(vocab=3, table={(): [0.0, math.inf, 1.0]}), "NaN or infinite"),
        (lambda: ToyEngine(vocab=3, table={(): [0.0, math.nan, 1.0]}), "NaN or infinite"),
        (lambda: ToyEngine(vocab=3, table={(): [-math.inf] * 3}), "NaN or infinite"),
        (lambda: ToyEngine(vocab=0), "vocab"),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_vectorised_numbers_are_the_scalar_ones_and_uniform() -> None:
    seeds = [0, 1, 2**63 - 1, 12345678901234567]
    for index in (0, 1, 1000):
        column = uniforms(streams(seeds), np.full(4, index, dtype=np.uint64))
        assert column.tolist() == [uniform(seed, index) for seed in seeds]
    many = np.array([uniform(seed, i) for seed in range(50) for i in range(100)])
    assert abs(many.mean() - 0.5) < 0.02
    assert abs(many.std() - 12**-0.5) < 0.01
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("size", [5, 40, 3000])
def test_torch_sampler_draws_the_same_as_the_toy(size: int) -> None:
    """Two implementations, one written with lists, one with tensors: same tokens, same records, over random settings."""
    rng = random.Random(size)
    for _ in range(12):
        rows = 6
        logits = [[rng.gauss(0, 2.5) for _ in range(size)] for _ in range(rows)]
        samplings = [
            Sampling(
                8,
                temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 1.7]),
                top_p=rng.choice([1.0, 0.9, 0.3]),
                top_k=rng.choice([0, 0, 3, 1000]),
                min_p=rng.choice([0.0, 0.0, 0.1]),
            )
            for _ in range(rows)
        ]
        u = [rng.random() for _ in range(rows)]
        knobs = SamplingBatch(samplings, torch.device("cpu"), torch.float64)
        drawn = draw(torch.tensor(logits, dtype=torch.float64), knobs, torch.tensor(u, dtype=torch.float64))
        for i, sampling in enumerate(samplings):
            one = draw_one(logits[i], sampling, float(sampling.temperature), u[i])
            assert drawn.tokens[i] == one.token
            assert drawn.logprobs[i] == pytest.approx(one.logprob, abs=1e-9)
            assert drawn.kept[i] == pytest.approx(one.kept, abs=1e-9)
            assert drawn.entropy[i] == pytest.approx(one.entropy, abs=1e-9)
