"""Sampler processes as actors of Ray: how they are started and ended, how calls are carried to them, and what Ray's errors mean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ramulus.engine.engine import Request
from ramulus.engine.pool import Lost, Stale
from ramulus.run.placed_ranks import INSTALL, end_of, host_of, line_of
from ramulus.run.sampler import About, SamplerProcess, packed

_LOOK = 5.0  # seconds between two looks whether Ray is still there
_ENDING = 10.0  # seconds in which a sampler must have ended what it has started


@dataclass
class RayCarrier:
    """Sampler processes as actors of Ray."""

    ray: Any
    where: Callable[[int], Mapping[str, Any]]  # options of Ray for the actor of a place
    built: bytes
    decode: Any
    address: str  # of this machine, as the actors reach it

    async def start(self, place: int) -> tuple[Any, About]:
        """An actor in a piece of the samplers' group. It is not Ray's to restart: whoever notices that it is lost starts another."""
        actor = self.ray.remote(SamplerProcess).options(**self.where(place), max_restarts=0, max_task_retries=0).remote(alone=True)
        begun = asyncio.ensure_future(self.call(actor, "begin", self.built))
        try:
            while not (await asyncio.wait({begun}, timeout=_LOOK))[0]:
                if not await asyncio.to_thread(self.there):
                    raise ConnectionError("Ray is gone from this machine: go on with --resume, once it is there again")
            return actor, begun.result()
        except BaseException:
            begun.cancel()
            self.end(actor)
            raise

    def there(self) -> bool:
        """Whether Ray is still on this machine."""
        node = self.ray.get_runtime_context().get_node_id()
        return any(one["NodeID"] == node and one["Alive"] for one in self.ray.nodes())

    def end(self, process: Any) -> None:
        """Kill an actor."""
        with suppress(Exception):
            self.ray.kill(process)

    def finish(self, processes: Sequence[Any]) -> None:
        """Have actors end what they have started, if they can in a moment, and kill them."""
        with suppress(Exception):  # one that is lost, or a cluster that is gone
            self.ray.wait([process.close.remote() for process in processes], num_returns=len(processes), timeout=_ENDING)
        for process in processes:
            self.end(process)

    async def call(self, process: Any, name: str, *parts: Any) -> Any:
        """The answer of a method."""
        with self._told(begins=name == "begin"):
            return await getattr(process, name).remote(*parts)

    async def stream(self, process: Any, requests: Sequence[Request], loaded: str) -> AsyncGenerator[Any]:
        """The answers of a sampler's `sample`, one after the other."""
        answers, ended = None, False
        try:
            with self._told():
                body = packed(requests, self.decode, self.ray.cloudpickle.Pickler)
                answers = process.sample.options(num_returns="streaming").remote(body, loaded)
                async for answer in answers:
                    yield await answer
                ended = True
        finally:
            if answers is not None and not ended:
                with suppress(Exception):
                    self.ray.cancel(answers)

    def keep(self, body: bytes) -> Any:
        """The bytes in Ray's object store."""
        return self.ray.put(body)

    @contextmanager
    def _told(self, begins: bool = False) -> Iterator[None]:
        """What Ray raises as what it means: Lost where a process or its machine is gone, else what the process raised.

        ConnectionError where one cannot begin, as another would not: what it is made of is not there.
        """
        errors = self.ray.exceptions
        try:
            yield
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else None
            if begins:
                raise cannot_begin(cause, line_of(error), host_of(error)) from error
            if isinstance(cause, Stale | ValueError | OSError | MemoryError):
                raise cause from None
            raise RuntimeError(f"a sampler failed: {cause or line_of(error)}") from error
        except errors.RayError as error:
            if getattr(error, "actor_init_failed", False) or isinstance(error, errors.RuntimeEnvSetupError):
                raise ConnectionError(f"a sampler cannot start: {end_of(error)}") from error
            raise Lost(end_of(error)) from error


def cannot_begin(cause: Exception | None, line: str, host: str) -> Exception:
    """What a sampler raised when it was to begin, as an error of the run; one that says itself what is wrong stays, with the `host`."""
    if isinstance(cause, ValueError | OSError | MemoryError):
        cause.add_note(f"this is what a sampler on {host} said when it began")
        return cause
    remedy = f": {INSTALL}" if isinstance(cause, ImportError) else ""
    return ConnectionError(f"a sampler cannot start on {host}: {str(cause or '') or line}{remedy}")
