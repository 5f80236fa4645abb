"""The seconds in which growth waited for grades and for nothing else."""

from __future__ import annotations

import time
from asyncio import Event
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from ramulus.engine.around import AroundEngine
from ramulus.engine.engine import Engine, Request, Segment


class GatedEngine(AroundEngine):
    """An engine that knows when it is wanted: `seconds` counts the time in which something is being graded and no request is in flight.

    Grading that goes on beside sampling costs no time of its own and is not counted: the tokens took that long anyway.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.seconds = 0.0
        self.requests = self.grades = 0  # in flight
        self.since = 0.0  # when the present wait began
        self.idle, self.open = Event(), Event()  # no request is in flight; new ones may be made
        self.idle.set()
        self.open.set()

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        """One continuation of each request, once no pass of the model keeps the engine `quiet`; they count as in flight meanwhile."""
        await self._opened()
        with self._wanted():
            return await self.engine.sample(requests)

    async def _opened(self) -> None:
        while not self.open.is_set():
            await self.open.wait()

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """While entered, nothing is sampled: requests in flight end first, new ones wait. For passes of a model whose parameters the engine reads."""
        while self.requests or not self.open.is_set():
            await (self.idle.wait() if self.requests else self.open.wait())
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()

    @contextmanager
    def _wanted(self) -> Iterator[None]:
        if self.grades and not self.requests:
            self.seconds += time.monotonic() - self.since
        self.requests += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.requests -= 1
            if not self.requests:
                self.idle.set()
            if self.grades and not self.requests:
                self.since = time.monotonic()

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
