"""The seconds in which growth waited for grades and for nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ramulus.engine.engine import Engine, Request, Segment, sample_all


class Waiting:
    """An engine that knows when it is wanted: `seconds` counts the time in which something is being graded and no request is in flight.

    Grading that goes on beside sampling costs no time of its own and is not counted: the tokens took that long anyway.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.seconds = engine, 0.0
        self.requests = self.grades = 0  # in flight
        self.since = 0.0  # when the present wait began

    async def sample(self, request: Request) -> Segment:
        """Sample one continuation."""
        with self._wanted():
            return await self.engine.sample(request)

    async def sample_many(self, requests: Sequence[Request]) -> list[Segment]:
        """Sample one continuation of each."""
        with self._wanted():
            return await sample_all(self.engine, requests)

    @contextmanager
    def _wanted(self) -> Iterator[None]:
        if self.grades and not self.requests:
            self.seconds += time.monotonic() - self.since
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1
            if self.grades and not self.requests:
                self.since = time.monotonic()

    async def load(self, weights: Any, version: int) -> None:
        """Hand new weights on."""
        await self.engine.load(weights, version)

    @contextmanager
    def grading(self) -> Iterator[None]:
        """While entered, something is being graded."""
        if not self.grades and not self.requests:
            self.since = time.monotonic()
        self.grades += 1
        try:
            yield
        finally:
            self.grades -= 1
            if not self.grades and not self.requests:
                self.seconds += time.monotonic() - self.since
