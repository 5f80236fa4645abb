"""The engine of a run whose samplers are placed on a cluster: a pool whose calls are carried by whoever placed them."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ramulus.engine.engine import Request, Segment, Weights, together
from ramulus.engine.factory import SenderFactory
from ramulus.engine.pool import TRIES, Lost, PoolEngine, Stale
from ramulus.engine.pushed import Held, Pushed, pushed
from ramulus.engine.stops import check_request
from ramulus.engine.weight_bytes import to_bytes
from ramulus.run.sampler import About, versions

_T = TypeVar("_T")


class Carrier(Protocol):
    """Whoever starts sampler processes and carries calls to them. What it raises where a process is gone is `Lost`."""

    address: str  # of this machine, as the processes reach it

    async def start(self, place: int) -> tuple[Any, About]:
        """A new process in a place, in which the engine has begun."""
        ...

    def end(self, process: Any) -> None:
        """End a process at once, whatever it does."""
        ...

    def finish(self, processes: Sequence[Any]) -> None:
        """Have processes end what they have started, then end them."""
        ...

    def call(self, process: Any, name: str, *parts: Any) -> Awaitable[Any]:
        """The answer of one of its methods."""
        ...

    def stream(self, process: Any, requests: Sequence[Request], loaded: str) -> AsyncGenerator[Any]:
        """What `sample` answers, piece by piece."""
        ...

    def keep(self, body: bytes) -> Any:
        """A handle for bytes that many processes will read."""
        ...


@dataclass(frozen=True, kw_only=True)
class Handed(Pushed):
    """Weights that the carrier keeps."""

    handle: Any = None


@dataclass
class PlacedSampler:
    """One process after another in one place."""

    place: int
    process: Any = None
    about: About | None = None
    loaded: str = ""
    epoch: int = 0
    away: bool = False
    counted: dict[str, int] = field(default_factory=dict)  # by the present process
    before: dict[str, int] = field(default_factory=dict)  # by those that were lost

    @property
    def name(self) -> str:
        where = f" (process {self.about.process} on {self.about.host})" if self.about else ""
        return f"sampler {self.place}{where}"


class PlacedEngine(PoolEngine):
    """Samples in the processes of a carrier.

    `timeout`: seconds in which a process must have answered something, `patience` those in which it must have started: one that has not is ended,
    and another started in its place. `folder`: where weights are written for all to read; None hands them to the carrier. `rests`: the processes
    are to sleep whenever nothing is sampled until the next load. `sender`: by which weights go straight into the engine of each process; None has
    the processes take them.
    """

    def __init__(
        self, carrier: Carrier, count: int, vocabulary: int, timeout: float, patience: float, folder: Path | None,
        rests: bool = False, sender: SenderFactory | None = None,
    ) -> None:
        super().__init__([PlacedSampler(place) for place in range(count)])
        self.carrier, self.vocabulary, self.timeout, self.patience = carrier, vocabulary, timeout, patience
        self.folder, self.rests = folder, rests
        self._senders = [sender(partial(self.call, server, "relay"), carrier.address, timeout) for server in self.servers] if sender else []

    async def begin(self) -> None:
        """Start all processes beside each other. ConnectionError where one cannot be, or is not like this one."""
        await together(self._begun(server) for server in self.servers)
        first = self.servers[0].about
        self.limit, self.in_flight = first.limit, "in_flight" in first.features
        self.features = first.features | ({"live"} if self._senders else set())
        hosts = len({server.about.host for server in self.servers})
        self.about = f"{len(self.servers)} sampler{'s' * (len(self.servers) > 1)} on {hosts} machine{'s' * (hosts > 1)}, each by {first.engine}"

    async def _begun(self, server: PlacedSampler) -> None:
        """Start a process; one that is lost meanwhile, or hangs, gives way to another."""
        for left in range(TRIES - 1, -1, -1):
            try:
                return await self._start(server)
            except Lost as lost:
                if not left:
                    raise
                warnings.warn(f"{lost}: another is started in its place", stacklevel=2)

    async def _start(self, server: PlacedSampler) -> None:
        name = f"sampler {server.place}"
        try:
            server.process, server.about = await self._within(self.patience, self.carrier.start(server.place), f"{name} has not started")
        except Lost as lost:
            raise Lost(str(lost) if name in str(lost) else f"{name} was lost while it started: {lost}") from lost
        assert server.about is not None
        here, there = versions(), server.about.versions
        if differs := [f"{name} {there.get(name)} and here {here[name]}" for name in here if there.get(name) != here[name]]:
            raise ConnectionError(f"{server.name} has {', '.join(differs)}: install the same on all machines of the cluster")

    async def _within(self, seconds: float, work: Awaitable[_T], what: str) -> _T:
        """What some work answers; Lost where it takes longer."""
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError:
            raise Lost(f"{what} within {seconds:g} s") from None

    async def call(self, server: PlacedSampler, name: str, *parts: Any) -> Any:
        """One call. Raises a Fault that names the sampler."""
        try:
            return await self._within(self.timeout, self.carrier.call(server.process, name, *parts), f"{server.name} has not answered")
        except Lost as lost:
            raise Lost(str(lost) if server.name in str(lost) else f"{server.name} is lost ({lost})") from lost

    def refuse(self, request: Request) -> None:
        """Raise ValueError for a request that can never be served."""
        check_request(request, self.limit, self.vocabulary)

    async def answers(self, server: PlacedSampler, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Any]]:
        """What the sampler says of each, in one call."""
        stream = self.carrier.stream(server.process, requests, server.loaded)
        try:
            while True:
                try:
                    piece = await self._within(self.timeout, anext(stream), f"{server.name} has answered nothing")
                except StopAsyncIteration:
                    return
                except Stale as stale:
                    raise Stale(f"{server.name}: {stale}") from None
                except Lost as lost:
                    raise Lost(str(lost) if server.name in str(lost) else f"{server.name} is lost ({lost})") from lost
                server.counted = piece[1]
                for text in piece[2]:
                    warnings.warn(f"{server.name}: {text}", stacklevel=2)
                for place, segment in piece[0]:
                    yield place, segment
        finally:
            await stream.aclose()

    def settled(self, server: PlacedSampler, request: Request, content: Segment) -> tuple[Segment, int]:
        """The segment as it came."""
        return content, 0

    async def bring_back(self, server: PlacedSampler, fault: Exception) -> None:
        """Another process in place of a lost one; one that is there without weights stays."""
        if not isinstance(fault, Lost):
            server.loaded = ""
            return
        warnings.warn(f"{fault}: another is started in its place, and what it had not answered is asked again", stacklevel=2)
        await asyncio.to_thread(self.carrier.end, server.process)
        former = server.about
        server.before = {name: server.counted.get(name, 0) + server.before.get(name, 0) for name in {**server.counted, **server.before}}
        server.counted, server.loaded = {}, ""
        await self._start(server)
        assert server.about is not None
        if former is not None and (server.about.limit, server.about.features) != (former.limit, former.features):
            raise ConnectionError(f"{server.name} is not like the one that was lost: {server.about.engine}, and before {former.engine}")

    def push(self, weights: Weights, version: int) -> Pushed:
        """Weights in a file that all read, with the carrier, or as they are for servers that get them straight."""
        if self._senders and isinstance(weights, Mapping):
            return self._senders[0].hold(weights, version)
        if self.folder is not None or not isinstance(weights, dict):
            return pushed(weights, version, self.folder or Path(), "cluster.folder")
        return Handed(Path(), version, handle=self.carrier.keep(to_bytes(weights)))

    async def give(self, server: PlacedSampler, new: Pushed) -> None:
        """Have a sampler take the weights."""
        if isinstance(new, Held):
            if (word := await self.sent(server, server.name, new, self._senders[server.place].send)) is not None:
                await self.call(server, "took", word, new.name, new.version)
                server.loaded = new.name
            return
        try:
            await self.call(server, "load", new.handle if isinstance(new, Handed) else str(new.path), new.name, new.version)
        except FileNotFoundError as error:
            remedy = "set cluster.folder to one that all machines share, or cluster.weights=objects"
            raise ConnectionError(f"{server.name} does not find the weights in {new.path}: {remedy}") from error
        server.loaded = new.name

    async def forget(self, server: PlacedSampler) -> None:
        """Have it forget KV."""
        await self.call(server, "reset")

    async def sleep(self) -> None:
        """Have all samplers give their memory back until the next load, or until somebody asks."""
        self._turn()
        await together(self._sleep(home) for home, server in enumerate(self.servers) if not server.away)

    async def _sleep(self, home: int) -> None:
        server, epoch = self.servers[home], self.servers[home].epoch
        try:
            await self.call(server, "sleep")
        except Lost as lost:
            await self._recover(home, epoch, lost)

    def counters(self) -> dict[str, int]:
        """Tokens sampled that came here; all else as the samplers last said, lost ones included."""
        counted = {name: sum(s.counted.get(name, 0) + s.before.get(name, 0) for s in self.servers) for name in self._counters}
        return counted | {"sampled": self._counters["sampled"]}

    def close(self) -> None:
        """End the senders and the sampler processes."""
        for sender in self._senders:
            sender.close()
        self.carrier.finish([server.process for server in self.servers if server.process is not None])
