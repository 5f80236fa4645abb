"""What the tests of grow share: engines that record, shuffle arrivals or count steps, and a decode for toy tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.engine.engine import Request, Segment, together
from ramulus.engine.toy import ToyEngine
from ramulus.grow.growth import grow_forest

EOS = 0
LETTERS = ("", "a", "b", "\\boxed{", "{", "}", " c", "d")  # text of the toy tokens 0 to 7


def decode(tokens: list[int]) -> str:
    """The text of toy tokens."""
    return "".join(LETTERS[token] for token in tokens)


def plant(name: str = "t", seed: int = 0, visit: int = 0, prompt: tuple[int, ...] = (1, 2)) -> Tree:
    """A young tree."""
    return Tree.plant(Task(name, prompt, name), seed=seed, visit=visit)


async def grow_tree(tree: Tree, *how: Any) -> Tree:
    """One tree grown by itself."""
    (grown,) = await grow_forest([tree], *how)
    return grown


def chain(tree: Tree, sizes: list[int], finish: str | None = "eos", logprob: float = -1.0) -> Node:
    """A path of segments of the given sizes, its leaf ended by `finish`."""
    node = tree.root
    for size in sizes:
        node = tree.add(node, [1] * size, Author.POLICY, logprobs=[logprob] * size)
    node.finish = finish
    return node


class Recorder(ToyEngine):
    """A toy engine that keeps every request with its answer."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.seen: list[tuple[Request, Segment]] = []

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        segments = await super().sample(requests)
        self.seen += [(request, replace(segment, tokens=segment.tokens[:])) for request, segment in zip(requests, segments)]
        return segments


class Shuffled(ToyEngine):
    """A toy engine whose answers come back in an order that has nothing to do with that of the requests."""

    calls = 0

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        return await together(self.one(request) for request in requests)

    async def one(self, request: Request) -> Segment:
        self.calls += 1
        for _ in range(self.calls * 7 % 11):
            await asyncio.sleep(0)
        return self.continuation(request)


class Clock(ToyEngine):
    """A toy engine with unbounded slots and a clock of its own: every running request gets one token a tick.

    A prompt that begins with token `slow` gets one only every tenth tick.
    """

    def __init__(self, slow: int = -1, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.slow, self.now = slow, 0
        self.running: list[tuple[int, asyncio.Future[None]]] = []
        self.ticking: asyncio.Task[None] | None = None

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        return await together(self.one(request) for request in requests)

    async def one(self, request: Request) -> Segment:
        segment = self.continuation(request)
        cost = len(segment.tokens) * (10 if request.prefix[0] == self.slow else 1)
        done = asyncio.get_running_loop().create_future()
        self.running.append((self.now + cost, done))
        if self.ticking is None or self.ticking.done():
            self.ticking = asyncio.create_task(self.tick())
        await done
        return segment

    async def tick(self) -> None:
        """Advance the clock whenever everybody waits."""
        while self.running:
            for _ in range(30):  # let every tree that can go on send its requests
                await asyncio.sleep(0)
            self.now += 1
            for due, done in [job for job in self.running if job[0] <= self.now]:
                self.running.remove((due, done))
                done.set_result(None)
            for _ in range(30):
                await asyncio.sleep(0)
