"""What a sampler process is: the recipe's engine, built from the structure of a model, its weights given later. It knows nothing of Ray."""

from __future__ import annotations

import asyncio
import io
import os
import pickle
import platform
import warnings
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ramulus.engine.engine import Live, Request, Segment, SleepingEngine
from ramulus.engine.factory import EngineFactory, SentEngine, engine_traits
from ramulus.engine.pool import Stale
from ramulus.engine.weight_bytes import state_of_bytes
from ramulus.run.doctor import version_of

_DECODE = "decode"  # what a call says in place of the thing that both sides have: the text of tokens

_Done = list[tuple[int, Segment]]
"""(place among the requests, what was sampled) of what was done by the same turn."""


@dataclass(frozen=True)
class Built:
    """What a sampler is made of. `model`: its parameters are on the meta device, all else is as in the driver."""

    factory: EngineFactory
    model: Any
    decode: Any
    device: str
    threads: int
    strict: bool  # torch's deterministic algorithms


@dataclass(frozen=True)
class About:
    """What a sampler says of itself when it begins."""

    process: int
    host: str
    limit: int
    features: frozenset[str]
    engine: str
    versions: Mapping[str, str]


def versions() -> dict[str, str]:
    """The versions of the packages that must be alike on both sides."""
    names = ("ramulus", "torch", "transformers")
    return {name: version_of(name) or "from its sources" for name in names} | {"python": platform.python_version()}


def packed(thing: Any, decode: Any, pickler: type[pickle.Pickler] = pickle.Pickler) -> bytes:
    """A thing as bytes; `decode`, which the other side has, travels as a word."""

    class Known(pickler):  # type: ignore[valid-type, misc]
        def persistent_id(self, obj: Any) -> str | None:
            return _DECODE if obj is decode and decode is not None else None

    room = io.BytesIO()
    Known(room, protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    return room.getvalue()


def unpacked(body: bytes, decode: Any) -> Any:
    """What `packed` wrote, in a process of the same run."""

    class Known(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return decode

    return Known(io.BytesIO(body)).load()


class SamplerProcess:
    """One engine behind calls that Ray carries; its methods run in one event loop."""

    def __init__(self, alone: bool = False) -> None:
        self.loaded = ""  # the name of its weights
        self.new_warnings: list[str] = []  # warnings that nobody has been told of
        if alone:  # nothing else is in this process, and nobody sees what it writes
            warnings.showwarning = self._warned

    def _warned(self, message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        """Keep what ramulus itself warns of."""
        if Path(filename).is_relative_to(Path(__file__).parents[1]):
            self.new_warnings.append(str(message))

    async def begin(self, body: bytes) -> About:
        """Build the engine; nothing it says means anything before the first load."""
        import torch

        built: Built = pickle.loads(body)
        torch.set_num_threads(built.threads)
        torch.use_deterministic_algorithms(built.strict)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        reads = engine_traits(built.factory).reads_model
        self.decode, self.model = built.decode, with_numbers(built.model, built.device) if reads else built.model
        self.engine = built.factory(self.model, built.decode)
        self.asleep = False
        features = frozenset(self.engine.features) - {"in_place", "live"}
        return About(os.getpid(), platform.node(), self.engine.limit, features, self.engine.about, versions())

    async def sample(self, body: bytes, loaded: str) -> AsyncIterator[tuple[_Done, dict[str, int], list[str]]]:
        """What is done by the same turn, together, the engine's counters and what it warned of, until all is. Raises Stale without the weights
        that are meant."""
        if loaded != self.loaded or self.asleep:
            raise Stale("it has not the weights that are meant")
        requests: Sequence[Request] = unpacked(body, self.decode)
        tasks = {asyncio.ensure_future(self.engine.sample([request])): place for place, request in enumerate(requests)}
        left = set(tasks)
        try:
            while left:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                ready = [(tasks[task], task.result()[0]) for task in done]
                texts, self.new_warnings = self.new_warnings, []
                yield ready, dict(self.engine.counters()), texts
        finally:
            for task in left:
                task.cancel()

    async def load(self, weights: Any, name: str, version: int) -> None:
        """Take weights: a path, or bytes of safetensors; done once, however often it is asked."""
        if name == self.loaded and not self.asleep:
            return
        self._wake()
        handle = weights if isinstance(weights, str) else state_of_bytes(weights)
        if "live" in self.engine.features and isinstance(handle, dict):
            handle = Live(handle, lambda: version)  # nobody changes them
        try:
            await self.engine.load(handle, version)
        except BaseException:
            self.loaded = ""  # where it slept, there are no numbers any more
            raise
        self.loaded = name

    async def relay(self, *question: Any) -> Any:
        """What the engine answers to the driver, which sends weights straight into it."""
        return await cast(SentEngine, self.engine).relay(*question)

    async def took(self, word: Any, name: str, version: int) -> None:
        """The weights that it was sent are those that are meant from now on."""
        cast(SentEngine, self.engine).took(word, name, version)
        self.loaded = name

    async def sleep(self) -> None:
        """Give back the memory of keys, values and weights until the next load."""
        if not self.asleep:
            await cast(SleepingEngine, self.engine).sleep()
            self.sizes = {storage: storage.nbytes() for storage in _storages(self.model)}
            for storage in self.sizes:
                storage.resize_(0)
            self.asleep = True

    def _wake(self) -> None:
        """Have room for weights again."""
        if self.asleep:
            for storage, size in self.sizes.items():
                storage.resize_(size)
            self.asleep = False

    async def reset(self) -> None:
        """Have the engine drop its KV; weights stay."""
        await self.engine.reset()

    async def close(self) -> None:
        """End what the engine has started."""
        self.engine.close()


class RankProcess:
    """A rank of a learner over many processes."""

    def serve(self, *where: Any) -> None:
        """Do what rank 0 tells until it says that this was all."""
        from ramulus.learn.sharded.starting import serve_at

        serve_at(*where)


def _storages(model: Any) -> list[Any]:
    """The memory of a model's parameters, tied ones once; none of those that have no numbers."""
    return list({p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters() if not p.is_meta}.values())


def with_numbers(model: Any, device: str) -> Any:
    """The model on a device with small numbers in place of none, so that an engine's self-check has something to compare; tied stays tied."""
    import torch

    from ramulus.models.structure import copied

    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for parameter in model.parameters():
        numbers = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, 0.02, generator=generator).to(device, parameter.dtype)
        parameters[id(parameter)] = torch.nn.Parameter(numbers, parameter.requires_grad)
    return copied(model, parameters).to(device)


def skeleton_of(model: Any) -> Any:
    """The model without its numbers, as it is before a learner changes anything in it."""
    from ramulus.models.structure import copied, elsewhere

    return copied(model, elsewhere(model, "meta"))
