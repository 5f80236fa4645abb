"""What reads the model that an engine samples by waits until the engine is idle, and the engine waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ramulus.run.gated_engine import GatedEngine


class Told:
    """An engine that answers a request once it is told to, and writes down when it was asked and when it answered."""

    limit, about = 8, "told"
    features: frozenset[str] = frozenset()

    def __init__(self, log: list[str]) -> None:
        self.log, self.go = log, asyncio.Event()

    async def sample(self, request: Any) -> Any:
        self.log.append(f"asked {request}")
        await self.go.wait()
        self.log.append(f"answered {request}")
        return request


async def score(engine: GatedEngine, log: list[str], name: str) -> None:
    async with engine.quiet():
        log.append(f"{name} begins")
        for _ in range(3):
            await asyncio.sleep(0)
        log.append(f"{name} ends")


async def story() -> list[str]:
    """A request in flight, two passes that want to be made, then another request."""
    log: list[str] = []
    engine = GatedEngine(Told(log))  # type: ignore[arg-type]
    first = asyncio.ensure_future(engine.sample("first"))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    scores = [asyncio.ensure_future(score(engine, log, name)) for name in ("one pass", "another")]
    for _ in range(3):
        await asyncio.sleep(0)
    assert log == ["asked first"]
    engine.engine.go.set()  # type: ignore[attr-defined]
    await first
    while "one pass begins" not in log:
        await asyncio.sleep(0)
    await asyncio.gather(engine.sample("second"), *scores)  # type: ignore[arg-type]
    return log


def test_passes_and_requests_wait_for_each_other() -> None:
    log = asyncio.run(story())
    assert log[:2] == ["asked first", "answered first"]
    assert {" ".join(log[i : i + 2]) for i in range(0, 8, 2)} == {
        "asked first answered first", "asked second answered second", "one pass begins one pass ends", "another begins another ends"
    }, f"something ran beside something else: {log}"  # fmt: skip


def test_a_pass_that_fails_lets_requests_through_again() -> None:
    async def fails() -> Any:
        engine = GatedEngine(Told([]))  # type: ignore[arg-type]
        engine.engine.go.set()  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="no memory"):
            async with engine.quiet():
                raise RuntimeError("no memory")
        return await asyncio.wait_for(engine.sample("next"), 1)  # type: ignore[arg-type]

    assert asyncio.run(fails()) == "next"
