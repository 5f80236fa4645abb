"""Entropies by the learner, for engines that record none."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from conformance.subjects import scratch
from engines import small
from ramulus.engine.engine import Request, Sampling, Segment
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.grow.temperature import ByEntropy
from ramulus.learn.objective.token_weight import HighEntropy
from ramulus.learn.policy.in_process import InProcess
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.run.scored_engine import ScoredEngine, with_entropies

RULE = ByEntropy(tau=0.15, stats={"pivot": 0.2, "rms": 0.7, "above": 0.8, "below": 0.6})


class Silent:
    """The local engine without what the learner is to supply."""

    limit, about = 64, "silent"
    features = frozenset({"rules"})

    def __init__(self, engine: LocalEngine) -> None:
        self.engine, self.told = engine, list[Segment]()

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        self.told = await self.engine.sample(requests)
        heat = [None if callable(r.sampling.temperature) else s.temperature for r, s in zip(requests, self.told)]
        return [replace(s, entropy=None, temperature=t) for s, t in zip(self.told, heat)]

    async def load(self, weights: Any, version: int) -> None: ...
    async def reset(self) -> None: ...
    def close(self) -> None: ...
    def counters(self) -> dict[str, int]:
        return {}


def requests(count: int = 12, **sampling: Any) -> list[Request]:
    return [Request((1, 2, *[3] * (i % 3)), Sampling(**({"max_tokens": 3 + i} | sampling)), seed=i) for i in range(count)]


@pytest.mark.parametrize("heat", [1.0, 0.6, RULE])
def test_entropies_and_temperatures_are_those_that_an_engine_would_record(heat: Any) -> None:
    model = small()
    engine, learner = Silent(LocalEngine(model)), InProcess(TorchPolicy(model))

    async def story() -> list[list[Segment]]:
        scored = ScoredEngine(engine, learner)
        return await asyncio.gather(*(scored.sample(requests(temperature=heat)) for _ in range(3)))

    for segments in asyncio.run(story()):
        for segment, told in zip(segments, engine.told, strict=True):
            assert segment.entropy is not None
            assert told.entropy is not None
            assert segment.entropy.tolist() == pytest.approx(told.entropy.tolist(), abs=2e-5)
            assert isinstance(segment.temperature, array) == callable(heat)
            assert segment.temperature == pytest.approx(told.temperature, abs=1e-5)
    learner.close()


def test_calls_that_wait_share_a_pass_and_a_failure() -> None:
    model = small()
    learner, calls = InProcess(TorchPolicy(model)), list[int]()
    real = learner.score

    async def counted(rows: Any, columns: Any, influence: Any = None) -> Any:
        calls.append(len(rows))
        if len(calls) == 3:
            raise RuntimeError("no")
        return await real(rows, columns, influence)

    learner.score = counted  # type: ignore[method-assign]

    async def story() -> None:
        scored = ScoredEngine(Silent(LocalEngine(model)), learner)
        await asyncio.gather(*(scored.sample(requests(2)) for _ in range(8)))
        assert len(calls) <= 2
        calls[:] = [0, 0]
        assert all(isinstance(e, RuntimeError) for e in await asyncio.gather(scored.sample(requests(2)), return_exceptions=True))
        assert len((await scored.sample(requests(2)))[0].entropy or ()) == 3, "it goes on"

    asyncio.run(story())
    learner.close()


def test_only_who_needs_them_gets_them() -> None:
    model, _ = scratch(0)
    engine, learner = Silent(LocalEngine(model)), InProcess(TorchPolicy(model))
    for part in (RULE, HighEntropy()):
        scored, asks_learner = with_entropies(engine, learner, [part])
        assert (scored.features, asks_learner) == ({"rules", "entropy"}, True)
    assert with_entropies(engine, learner, [object()]) == (engine, False)
    full = LocalEngine(model)
    assert with_entropies(full, learner, [RULE]) == (full, False)
    hot = requests(1, temperature=lambda logits: logits[:, 0] * 0 + 1)
    with pytest.raises(ValueError, match="does not record the temperatures of"):
        asyncio.run(ScoredEngine(engine, learner).sample(hot))
    learner.close()


@pytest.mark.parametrize("cancelled", [{0}, {1}, {0, 1}, {0, 1, 2}], ids=str)
def test_callers_that_are_cancelled_take_no_other_with_them(cancelled: set[int]) -> None:
    model = small()
    learner = InProcess(TorchPolicy(model))
    real, passes = learner.score, list[asyncio.Event]()

    async def slow(rows: Any, columns: Any, influence: Any = None) -> Any:
        passes.append(asyncio.Event())
        await passes[-1].wait()
        return await real(rows, columns, influence)

    learner.score = slow  # type: ignore[method-assign]

    async def story() -> None:
        scored = ScoredEngine(Silent(LocalEngine(model)), learner)
        calls = [asyncio.ensure_future(scored.sample(requests(2)))]
        while not passes:
            await asyncio.sleep(0)
        calls += [asyncio.ensure_future(scored.sample(requests(2))) for _ in range(2)]
        while len(scored.waiting) < 2:
            await asyncio.sleep(0)
        for place in cancelled:
            calls[place].cancel()
        await asyncio.sleep(0)
        while not all(call.done() for call in calls):
            for ready in passes:
                ready.set()
            await asyncio.sleep(0)
        for place, answer in enumerate(await asyncio.gather(*calls, return_exceptions=True)):
            assert isinstance(answer, asyncio.CancelledError) if place in cancelled else answer[0].entropy
        again = asyncio.ensure_future(scored.sample(requests(2)))
        while not again.done():
            for ready in passes:
                ready.set()
            await asyncio.sleep(0)
        assert again.result()[0].entropy, "it goes on"

    asyncio.run(asyncio.wait_for(story(), 30))
    learner.close()
