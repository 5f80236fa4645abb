"""An allocation that fails halves what is done at once and goes on: the same tokens, the same gradients, nothing twice, and it is said."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ramulus.engine.engine import Request, Sampling, Segment, StopRule
from ramulus.engine.local.kv import Slots
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.engine.local.prefill import Prefill
from ramulus.engine.local.samples import Samples
from ramulus.engine.local.scheduler import Scheduler
from ramulus.learn.policy.model import Scratch
from ramulus.native.memory import OutOfMemory, allocation_failed

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
ERRORS = [RuntimeError(CPU), MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")]


def fails(at: int, what: Callable[..., Any], error: BaseException, times: int = 1) -> Callable[..., Any]:
    """What does as `what` does, but at the call number `at` and some after it."""
    calls = iter(range(10**9))

    def other(*arguments: Any, **options: Any) -> Any:
        if at <= next(calls) < at + times:
            raise error
        return what(*arguments, **options)

    return other


def model() -> Any:
    return Scratch("0123456789+=?", hidden=64, layers=2, heads=4, kv_heads=2, seed=3)()[0]


def requests(count: int = 12) -> list[Request]:
    ends = StopRule(frozenset({1}))
    return [Request((3, 4 + i % 3, 5, 6 + i % 5), Sampling(12 + i), ends, seed=i) for i in range(count)]


def sampled(engine: LocalEngine, asked: list[Request]) -> list[Segment]:
    return asyncio.run(engine.sample(asked))


@pytest.mark.parametrize("error", ERRORS, ids=["torch", "python", "cuda"])
def test_what_says_that_there_is_no_memory(error: BaseException) -> None:
    assert allocation_failed(error)
    assert allocation_failed(OutOfMemory("x"))
    assert not allocation_failed(RuntimeError("shapes differ"))
    assert not allocation_failed(ValueError("out of memory"))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("where", "name", "at"),
    [
        (Slots, "_empty", 1),  # the first slots
        (Samples, "room", 3),  # in the middle of decoding
        (Prefill, "_pass", 0),
        (Scheduler, "step", 2),
        (Scheduler, "_end", 1),  # after a step was counted
    ],
)
def test_the_engine_halves_and_draws_the_same_tokens(
    where: type, name: str, at: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sampled(LocalEngine(model(), slots=8, native=native), requests())
    engine = LocalEngine(model(), slots=8, native=native)
    failing = fails(at, getattr(where, name), ERRORS[at % len(ERRORS)])
    monkeypatch.setattr(where, name, lambda *arguments: failing(*arguments))
    with pytest.warns(RuntimeWarning, match="from here on 4 decode together") as said:
        found = sampled(engine, requests())
    assert len([w for w in said if "decode together" in str(w.message)]) == 1
    assert [segment.tokens for segment in found] == [segment.tokens for segment in expected]
    assert [segment.finish for segment in found] == [segment.finish for segment in expected]
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert engine.counters()["sampled"] == sum(len(segment.tokens) for segment in expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sampled(engine, requests())
    assert [segment.tokens for segment in again] == [segment.tokens for segment in expected]


def test_the_engine_halves_until_one_row_is_left_and_then_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(model(), slots=8)
    failing = fails(0, Scheduler.step, RuntimeError(CPU), times=10**6)
    monkeypatch.setattr(Scheduler, "step", lambda *arguments: failing(*arguments))
    with pytest.warns(RuntimeWarning, match="from here on 1 decode"), pytest.raises(OutOfMemory, match="out of memory: .*DefaultCPUAllocator"):
        sampled(engine, requests())
    monkeypatch.undo()
    assert all(len(segment.tokens) for segment in sampled(engine, requests()))


def test_a_longer_text_than_before_is_still_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(model(), slots=8, memory=2**20)
    failing = fails(0, Scheduler.step, MemoryError(), times=3)
    monkeypatch.setattr(Scheduler, "step", lambda *arguments: failing(*arguments))
    with pytest.warns(RuntimeWarning):
        sampled(engine, requests())
    long = Request((3, 4), Sampling(900), seed=1)
    assert sampled(engine, [long])[0].tokens == sampled(LocalEngine(model(), slots=8), [long])[0].tokens


def test_other_errors_reach_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = fails(0, Scheduler.step, RuntimeError("shapes differ"))
    monkeypatch.setattr(Scheduler, "step", lambda *arguments: failing(*arguments))
    with pytest.raises(RuntimeError, match="shapes differ"):
        sampled(LocalEngine(model(), slots=8), requests())
