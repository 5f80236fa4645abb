"""Samplers without processes of their own: a carrier that keeps them here, loses them when it is told to, and lets only pickles pass."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ramulus.engine.engine import Request
from ramulus.engine.factory import EngineFactory
from ramulus.engine.local.factory import Local
from ramulus.engine.pool import Lost
from ramulus.run.placed_engine import PlacedEngine
from ramulus.run.sampler import About, Built, SamplerProcess, packed, skeleton_of

SMALL = Local(slots=8, threads=1)


@dataclass
class Here:
    """Carries calls to samplers in this process."""

    built: bytes
    decode: Any = None
    address: str = "127.0.0.1"
    started: list[SamplerProcess] = field(default_factory=list)
    ended: list[SamplerProcess] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=dict)  # after so many more calls of a method, whoever is asked is lost
    hung: dict[str, int] = field(default_factory=dict)  # the same, and it answers nothing

    async def start(self, place: int) -> tuple[Any, About]:
        process = SamplerProcess()
        self.started.append(process)
        await self.strike(process, "begin")
        return process, await process.begin(self.built)

    def end(self, process: Any) -> None:
        self.ended.append(process)

    def finish(self, processes: Sequence[Any]) -> None:
        for process in processes:
            self.end(process)

    async def strike(self, process: Any, name: str) -> None:
        if process in self.ended:
            raise Lost("it is gone")
        for kind in (self.lost, self.hung):
            if name in kind:
                kind[name] -= 1
                if kind[name] < 0:
                    del kind[name]
                    if kind is self.hung:
                        await asyncio.sleep(3600)
                    self.ended.append(process)
                    raise Lost("it is gone")

    async def call(self, process: Any, name: str, *parts: Any) -> Any:
        await self.strike(process, name)
        return pickle.loads(pickle.dumps(await getattr(process, name)(*parts)))

    async def stream(self, process: Any, requests: Sequence[Request], loaded: str) -> AsyncGenerator[Any]:
        await self.strike(process, "sample")
        async for piece in process.sample(packed(requests, self.decode), loaded):
            yield pickle.loads(pickle.dumps(piece))
            await self.strike(process, "answer")

    def keep(self, body: bytes) -> Any:
        return body


def placed(
    model: Any, count: int = 2, timeout: float = 60.0, patience: float = 60.0, faults: dict[str, Any] | None = None,
    factory: EngineFactory = SMALL, **options: Any,
) -> tuple[PlacedEngine, Here]:
    """An engine over so many samplers, with the weights of the model as version 0."""
    threads = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    here = Here(pickle.dumps(Built(factory, skeleton_of(model), None, "cpu", threads, strict)), **(faults or {}))
    engine = PlacedEngine(here, count, int(model.get_input_embeddings().num_embeddings), timeout, patience, None, **options)

    async def begin() -> None:
        await engine.begin()
        await engine.load(dict(model.state_dict()), 0)

    asyncio.run(begin())
    return engine, here
