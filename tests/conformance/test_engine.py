"""What every engine promises: tokens by their seeds, log-probs of its model, stops, limits, errors, loading, forgetting, cancelling."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from conformance.subjects import ALPHABET, ENGINES, Subject
from engines import KERNELS
from ramulus.engine.engine import (
    COUNTERS,
    FEATURES,
    Live,
    Request,
    Sampling,
    Segment,
    StopRule,
    known_rules,
    named_rules,
)
from ramulus.grow.temperature import ByEntropy
from vllm_servers import NEEDS

MARKS = {"compiled": KERNELS, "remote toy": pytest.mark.slow, "remote local": pytest.mark.slow, "vllm": NEEDS}  # a server takes seconds to start
KINDS = [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in ENGINES]


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with ENGINES[request.param](tmp_path_factory.mktemp("model")) as made:
        yield made


def requests(count: int = 12, **sampling: object) -> list[Request]:
    """Prefixes that share a beginning and some that do not, of unequal lengths."""
    settings = [Sampling(**({"max_tokens": 3 + i} | sampling)) for i in range(count)]  # type: ignore[arg-type]
    return [Request((1, 2, *([3] * (i % 4)), 4 + i % 3), settings[i], seed=i) for i in range(count)]


def logprobs(subject: Subject, request: Request, segment: Segment, other: bool = False, temperature: float = 1.0) -> list[float]:
    """Of a segment's tokens, by the model's own forward pass."""
    plain, text, answers = subject.plain_of_other if other else subject.plain, list(request.prefix), []
    for token in segment.tokens:
        answers.append(float((plain(text) / temperature).log_softmax(-1)[token]))
        text.append(token)
    return answers


def same(one: list[Segment], another: list[Segment]) -> bool:
    return [(s.tokens, s.finish) for s in one] == [(s.tokens, s.finish) for s in another]


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(subject: Subject) -> None:
    first = subject.sample(requests())
    asyncio.run(subject.engine.reset())
    assert subject.sample(requests()) == first
    assert not same(subject.sample([replace(r, seed=r.seed + 100) for r in requests()]), first)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_model(subject: Subject, temperature: float) -> None:
    asked = requests(temperature=temperature)
    for request, segment in zip(asked, subject.sample(asked), strict=True):
        assert len(segment.tokens) == len(segment.logprobs) == request.sampling.max_tokens
        assert segment.finish is None
        wanted = logprobs(subject, request, segment, temperature=temperature)
        assert segment.logprobs.tolist() == pytest.approx(wanted, abs=2e-5)


def test_many_at_once_are_as_one_by_one(subject: Subject) -> None:
    asked = requests()
    many, single = subject.sample(asked), [subject.sample([request])[0] for request in asked]
    for one, other in zip(many, single, strict=True):
        common = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens)) if a != b), len(one.tokens))
        assert common > 0
        assert one.logprobs[:common].tolist() == pytest.approx(other.logprobs[:common].tolist(), abs=2e-5)


def test_a_stop_id_ends_a_text_and_is_its_last_token(subject: Subject) -> None:
    whole = subject.sample(requests())
    stop = StopRule(ids=frozenset({whole[5].tokens[2]}))
    for before, after in zip(whole, subject.sample([replace(r, stop=stop) for r in requests()]), strict=True):
        cut = next((i + 1 for i, token in enumerate(before.tokens) if token in stop.ids), None)
        assert (after.finish == "eos") == (cut is not None)
        assert after.tokens == before.tokens[:cut]
        assert after.logprobs.tolist() == pytest.approx(before.logprobs[:cut].tolist(), abs=2e-5)


def test_what_was_not_recorded_is_absent(subject: Subject) -> None:
    [segment] = subject.sample(requests(1, top_k=3))
    assert subject.engine.features - named_rules(known_rules(subject.engine.features) or ()) <= set(FEATURES)
    for name in ("entropy", "kept"):
        column = getattr(segment, name)
        assert (column is not None) == (name in subject.engine.features)
        assert column is None or len(column) == len(segment.tokens)
    assert subject.sample(requests(1))[0].kept is None, "nothing was cut"


def test_entropies_are_those_of_the_untempered_model(subject: Subject) -> None:
    if "entropy" in subject.engine.features:
        [request] = requests(1, temperature=0.5)
        [segment] = subject.sample([request])
        assert segment.entropy is not None
        text = list(request.prefix)
        for token, entropy in zip(segment.tokens, segment.entropy, strict=True):
            p = subject.plain(text).softmax(-1)
            assert entropy == pytest.approx(float(-(p * p.log()).sum()), abs=2e-5)
            text.append(token)


def test_truncation_draws_from_what_is_left(subject: Subject) -> None:
    [request] = requests(1, top_k=2, max_tokens=12)
    [segment] = subject.sample([request])
    text = list(request.prefix)
    for token, logprob in zip(segment.tokens, segment.logprobs, strict=True):
        top = subject.plain(text).log_softmax(-1).topk(2)
        assert token in top.indices
        assert logprob == pytest.approx(float(subject.plain(text)[token] - subject.plain(text)[top.indices].logsumexp(0)), abs=2e-5)
        text.append(token)


def test_a_temperature_rule_is_applied_at_every_token(subject: Subject) -> None:
    assert "rules" in subject.engine.features
    rule = ByEntropy(tau=0.1, stats={"pivot": 0.1, "rms": 0.5, "above": 1.0, "below": 1.0})
    [request] = requests(1, temperature=rule, max_tokens=10)
    [segment] = subject.sample([request])
    text = list(request.prefix)
    for token, logprob in zip(segment.tokens, segment.logprobs, strict=True):
        logits = subject.plain(text)
        temperature = float(rule(logits[None].float())[0])
        assert logprob == pytest.approx(float((logits / temperature).log_softmax(-1)[token]), abs=1e-4)
        text.append(token)


@pytest.mark.parametrize(
    ("prefix", "tokens", "message"),
    [((), 4, "prefix of a request is empty"), ((1, 10**6), 4, "token 1000000 of the prefix is outside"), ((1, 2), None, "lower max_tokens")],
)
def test_what_can_never_be_served_is_refused(subject: Subject, prefix: tuple[int, ...], tokens: int | None, message: str) -> None:
    wrong = Request(prefix, Sampling(tokens or subject.engine.limit + 1))
    sampled = subject.engine.counters()["sampled"]
    with pytest.raises(ValueError, match=message):
        subject.sample([*requests(2), wrong])
    assert subject.engine.counters()["sampled"] == sampled, "before any is sampled"
    assert len(subject.sample(requests(2))) == 2, "it goes on"


def test_a_version_s_tokens_never_come_from_older_weights(subject: Subject) -> None:
    asked = requests()

    async def work() -> tuple[list[Segment], list[Segment]]:
        before = await subject.engine.sample(asked)
        await subject.engine.load(subject.other, 7)
        return before, await subject.engine.sample(asked)

    before, after = asyncio.run(work())
    assert {(s.version, s.newest) for s in before} == {(0, 0)}
    assert {(s.version, s.newest) for s in after} == {(7, 7)}
    for request, segment in zip(asked, after, strict=True):
        assert segment.logprobs.tolist() == pytest.approx(logprobs(subject, request, segment, other=True), abs=2e-5)


def test_requests_in_flight_end_before_weights_are_loaded(subject: Subject) -> None:
    asked = requests()

    async def work() -> list[Segment]:
        flying = asyncio.ensure_future(subject.engine.sample(asked))
        await asyncio.sleep(0)
        await subject.engine.load(subject.other, 3)
        return await flying

    for request, segment in zip(asked, asyncio.run(work()), strict=True):
        assert segment.version == segment.newest
        wanted = logprobs(subject, request, segment, other=segment.version == 3)
        assert segment.logprobs.tolist() == pytest.approx(wanted, abs=2e-5)


def test_what_was_cancelled_leaves_it_as_good_as_before(subject: Subject) -> None:
    whole = subject.sample(requests())

    async def work() -> list[Segment]:
        flying = asyncio.ensure_future(subject.engine.sample(requests(max_tokens=40)))
        await asyncio.sleep(0)
        flying.cancel()
        await asyncio.gather(flying, return_exceptions=True)
        await subject.engine.reset()
        return await subject.engine.sample(requests())

    assert same(asyncio.run(work()), whole)


async def slept(subject: Subject) -> None:
    before = await subject.engine.sample(requests())
    await subject.engine.sleep()  # type: ignore[attr-defined]
    assert same(await subject.engine.sample(requests()), before)


def two(tokens: list[int]) -> str | None:
    return "two" if len(tokens) == 2 else None


async def asked_until(subject: Subject) -> None:
    [segment] = await subject.engine.sample([replace(requests(1)[0], until=two)])
    assert (segment.finish, len(segment.tokens)) == ("two", 2)


async def stopped_by_text(subject: Subject) -> None:
    stop = StopRule(strings=tuple(ALPHABET))
    segments = await subject.engine.sample([replace(request, stop=stop) for request in requests()])
    assert "stop" in {segment.finish for segment in segments}


@dataclass(frozen=True)
class Halved:
    """A temperature rule of one's own."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.full(logits.shape[:1], 0.5)


async def ruled(subject: Subject) -> None:
    asked = subject.engine.sample(requests(2, temperature=Halved()))
    if known_rules(subject.engine.features) is None:
        assert len(await asked) == 2
    else:
        with pytest.raises(ValueError, match=r"the temperature rule.*Halved"):
            await asked
    rule = ByEntropy(tau=0.1, stats={"pivot": 0.1, "rms": 0.5, "above": 1.0, "below": 1.0})
    assert len(await subject.engine.sample(requests(2, temperature=rule))) == 2


async def recorded(subject: Subject) -> None:
    [segment] = await subject.engine.sample(requests(1, top_k=3))
    assert "entropy" not in subject.engine.features or segment.entropy is not None
    assert "kept" not in subject.engine.features or segment.kept is not None


async def swapped(subject: Subject) -> None:
    flying = asyncio.ensure_future(subject.engine.sample(requests()))
    await subject.engine.load(subject.other, 3)
    assert all(segment.version <= segment.newest for segment in await flying)


async def read_in_place(subject: Subject) -> None:
    await subject.engine.load(None, 5)
    assert {segment.version for segment in await subject.engine.sample(requests())} == {5}


async def sent_live(subject: Subject) -> None:
    await subject.engine.load(Live(subject.other, lambda: 6), 6)
    assert {segment.version for segment in await subject.engine.sample(requests())} == {6}


PROMISES = {
    "rules": ruled, "until": asked_until, "strings": stopped_by_text, "entropy": recorded, "kept": recorded, "in_flight": swapped, "sleep": slept,
    "in_place": read_in_place, "live": sent_live,
}  # fmt: skip


def test_what_it_lists_it_can_do(subject: Subject) -> None:
    assert set(PROMISES) == set(FEATURES)
    for feature in sorted(subject.engine.features & set(FEATURES)):
        asyncio.run(PROMISES[feature](subject))


def test_counters_only_grow(subject: Subject) -> None:
    before = dict(subject.engine.counters())
    segments = subject.sample(requests())
    after = dict(subject.engine.counters())
    assert set(after) == set(COUNTERS)
    assert after["sampled"] - before["sampled"] == sum(len(s.tokens) for s in segments)
    assert all(after[name] >= before[name] for name in COUNTERS)


def test_what_crosses_can_be_pickled(subject: Subject) -> None:
    asked = requests(3)
    segments = subject.sample(asked)
    assert pickle.loads(pickle.dumps(asked)) == asked
    assert pickle.loads(pickle.dumps(segments)) == segments
    assert asyncio.run(subject.engine.sample([])) == []


def test_the_checks_can_fail() -> None:
    with ENGINES["toy"](None) as made:  # type: ignore[arg-type]
        [request] = requests(1)
        [segment] = made.sample([request])
        segment.logprobs[0] += 1e-3
        assert segment.logprobs.tolist() != pytest.approx(logprobs(made, request, segment), abs=2e-5)
        assert torch.equal(made.plain([1, 2]), made.plain([1, 2]))
