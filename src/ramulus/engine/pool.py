"""An engine over several samplers in other processes: requests of one turn travel together, one that fails is mended, what it had is asked again."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from ramulus.engine.affinity import Affinity
from ramulus.engine.engine import COUNTERS, Request, Segment, Weights, together
from ramulus.engine.pushed import Held, Pushed

TRIES = 3  # faults in a row, without an answer between, after which a call is given up
BETWEEN = 0.2  # seconds more between one try and the next

_Asked = tuple[Request, "asyncio.Future[Segment]"]


class Fault(ConnectionError):
    """Something is wrong with a sampler, in a sentence; what was asked of it is asked again."""


class Lost(Fault):
    """The sampler is not there, does not answer, or its engine has died."""


class Stale(Fault):
    """The sampler is there, without the weights that are meant."""


class Wrong(Fault):
    """The sampler answered what cannot be."""


class Sampler(Protocol):
    """One of the places that a pool asks."""

    loaded: str  # the name of the weights it has; "" where that is not known
    epoch: int  # how often it was mended or loaded
    away: bool  # not asked at present


@dataclass
class _Loop:
    """What belongs to the event loop in which the engine is used."""

    client: Any
    loading: asyncio.Lock  # one load at a time
    mending: list[asyncio.Lock]  # of each sampler
    open: asyncio.Event  # requests may be sent
    idle: asyncio.Event  # none is in flight
    tasks: set[asyncio.Task[None]]  # calls on their way


class PoolEngine:
    """Samples from `servers`, whose weights are those of the last `load`; nothing is sampled before the first.

    One that has others, after a load that failed or was broken off, is given these again before it is asked.
    What a lost one had not answered is asked of another where there is one, else again once it is back: seeds make it the same tokens. `in_flight`:
    weights are swapped below requests on their way; else these end first. What kind of samplers they are is said by whoever derives from this:
    `refuse`, `answers`, `settled`, `bring_back`, `give`, `forget`, `push`, `client` and `close`.
    """

    limit: int
    features: frozenset[str]
    about: str
    kind = "sampler"

    def __init__(self, servers: Sequence[Any], in_flight: bool = False) -> None:
        self.servers, self.in_flight = list(servers), in_flight
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._affinity, self._names = Affinity(), set[str]()
        self._pushed: Pushed | None = None
        self._former: Pushed | None = None  # during a load those that samplers still may have
        self._pending: list[_Asked] = []
        self._flying = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._here: _Loop

    def refuse(self, request: Request) -> None:
        """Raise ValueError for a request that can never be served."""
        raise NotImplementedError

    def answers(self, server: Any, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Any]]:
        """(place, answer) of each request as it is done, all in one call. Raises a Fault."""
        raise NotImplementedError

    def settled(self, server: Any, request: Request, content: Any) -> tuple[Segment, int]:
        """What an answer says, and how many tokens of the prefix needed no pass. Raises Wrong for what cannot be."""
        raise NotImplementedError

    async def bring_back(self, server: Any, fault: Fault) -> None:
        """Have a sampler that failed there again; by itself, one that is there is taken to have no weights, and one that is lost stays so.

        Raises a Fault where it fails once more, ConnectionError where it is gone for good.
        """
        if isinstance(fault, Lost):
            raise fault
        server.loaded = ""

    async def give(self, server: Any, new: Pushed) -> None:
        """Have a sampler take weights. Raises a Fault."""
        raise NotImplementedError

    async def forget(self, server: Any) -> None:
        """Have it forget KV."""
        raise NotImplementedError

    def push(self, weights: Weights, version: int) -> Pushed:
        """Put weights where samplers find them; called in a thread."""
        raise NotImplementedError

    def client(self) -> Any:
        """What a new event loop needs to talk to samplers."""
        return None

    def close(self) -> None:
        """End what is ours."""
        raise NotImplementedError

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        """A continuation of each request; what other callers ask in the same turn of the event loop travels in the same call."""
        for request in requests:
            self.refuse(request)
        if not requests:
            return []
        here = self._turn()
        while not here.open.is_set():
            await here.open.wait()
        if self._pushed is None:
            raise ValueError(f"a {self.kind} has no weights before the first load: load the learner's")
        loop = asyncio.get_running_loop()
        if not self._pending:
            loop.call_soon(self._leave)
        pairs = [(request, loop.create_future()) for request in requests]
        self._pending += pairs
        self._count(1)
        try:
            return list(await asyncio.gather(*(future for _, future in pairs)))
        finally:
            for _, future in pairs:
                future.cancel()
            self._count(-1)

    def _count(self, more: int) -> None:
        """Calls of `sample` in flight."""
        self._flying += more
        (self._here.idle.clear if self._flying else self._here.idle.set)()

    def _leave(self) -> None:
        """Send what was asked in this turn, a call for each sampler."""
        pairs, self._pending = [pair for pair in self._pending if not pair[1].done()], []
        for home, group in self._shared(pairs).items():
            self._carry(home, group)

    def _shared(self, pairs: Sequence[_Asked]) -> dict[int, list[_Asked]]:
        """Requests by the sampler that each goes to."""
        present = [i for i, server in enumerate(self.servers) if not server.away] or list(range(len(self.servers)))
        groups: dict[int, list[_Asked]] = {}
        for pair in pairs:
            groups.setdefault(self._affinity(pair[0].prefix, present), []).append(pair)
        return groups

    def waits(self, server: Any) -> bool:
        """Whether somebody waits for what this sampler alone can answer, so that no load may come."""
        alone = not server.away or all(other.away for other in self.servers if other is not server)
        return bool(self._flying) and not self.in_flight and alone

    def _carry(self, home: int, pairs: list[_Asked], tries: int = 0) -> None:
        """Begin a call; it is broken off once nobody waits for any of it."""
        task = asyncio.get_running_loop().create_task(self._call(home, pairs, tries))
        self._here.tasks.add(task)
        task.add_done_callback(self._here.tasks.discard)
        left = len(pairs)

        def settled(future: asyncio.Future[Segment]) -> None:
            nonlocal left
            left -= 1
            if not left and future.cancelled():
                task.cancel()

        for _, future in pairs:
            future.add_done_callback(settled)

    async def _call(self, home: int, pairs: list[_Asked], tries: int) -> None:
        """One call to one sampler; what it leaves unanswered is asked again."""
        server, before = self.servers[home], sum(future.done() for _, future in pairs)
        epoch = server.epoch
        try:
            try:
                if server.loaded not in [one.name for one in (self._pushed, self._former) if one is not None]:
                    raise Stale(f"a {self.kind} has not the weights that are meant")
                async with aclosing(self.answers(server, [request for request, _ in pairs])) as answers:
                    async for place, content in answers:
                        self._settle(server, pairs[place], content)
                return
            except Fault as fault:
                left = [pair for pair in pairs if not pair[1].done()]
                tries = 1 if sum(future.done() for _, future in pairs) > before else tries + 1
                if tries > TRIES:
                    raise RuntimeError(f"{fault}, {tries} times in a row: look at the server, and at whether the weights are finite") from fault
                await self._recover(home, epoch, fault)
                await asyncio.sleep(BETWEEN * (tries - 1))
            for place, group in self._shared(left).items():
                self._carry(place, group, tries)
        except Exception as error:  # whoever waits is told
            for _, future in pairs:
                if not future.done():
                    future.set_exception(error)

    def _settle(self, server: Any, pair: _Asked, content: Any) -> None:
        """Hand over what was sampled for a request; Wrong for what cannot be."""
        request, future = pair
        segment, reused = self.settled(server, request, content)
        if future.done():
            return
        counters = self._counters
        counters["sampled"] += len(segment.tokens)
        counters["reused"] += reused
        counters["prefilled"] += len(request.prefix) - reused
        future.set_result(segment)

    @property
    def _version(self) -> int:
        return self._pushed.version if self._pushed is not None else 0

    async def _recover(self, home: int, epoch: int, fault: Fault) -> None:
        """Mend a sampler, beside the others where there are others."""
        server = self.servers[home]
        if isinstance(fault, Wrong):
            warnings.warn(f"{fault}: it is asked again", stacklevel=2)
            return
        others = [other for other in self.servers if other is not server and not other.away]
        if isinstance(fault, Lost) and others:
            if not server.away:
                server.away = True
                task = asyncio.get_running_loop().create_task(self._mend_alone(home, epoch, fault))
                self._here.tasks.add(task)
                task.add_done_callback(self._here.tasks.discard)
            return
        try:
            await self._mend(home, epoch, fault)
        except Lost as lost:
            if isinstance(fault, Lost):
                raise
            await self._recover(home, epoch, lost)

    async def _mend_alone(self, home: int, epoch: int, fault: Fault) -> None:
        """Mend a sampler while the others do its work; where that fails it stays away, with a warning."""
        try:
            await self._mend(home, epoch, fault)
        except Exception as error:  # whatever it is, nobody waits for this and would be told
            warnings.warn(f"{self.kind} {home} stays away ({type(error).__name__}: {error}); the run goes on with its others", stacklevel=2)

    async def _mend(self, home: int, epoch: int, fault: Fault) -> None:
        """Have a sampler back, with the weights that are meant. ConnectionError where that fails."""
        server = self.servers[home]
        async with self._here.mending[home]:
            if server.epoch > epoch:
                return  # somebody has done so meanwhile
            for tries in range(1, TRIES + 1):
                try:
                    await self.bring_back(server, fault)
                    while self._pushed is not None and server.loaded != self._pushed.name:  # a load may come between
                        await self._given(server, self._pushed)
                    break
                except Fault as another:
                    if tries == TRIES or (isinstance(another, Lost) and not isinstance(fault, Lost)):
                        raise
                    fault = another
            server.epoch, server.away = server.epoch + 1, False

    async def _given(self, server: Any, new: Pushed) -> None:
        """Have a sampler take weights; where that fails it is not known what it has, and while it did others may have come to be meant."""
        try:
            await self.give(server, new)
        except BaseException as error:
            server.loaded = ""
            if new is self._pushed or not isinstance(error, Exception):
                raise

    async def sent(self, server: Any, name: str, new: Held, send: Callable[[Held, bool], Awaitable[Any]]) -> Any:
        """What a sampler, called so, answers once it was sent weights from where they are; None where these have been learned further, so that it
        waits for the next. ConnectionError where no next ones may come."""
        if not new.changed:
            word = await send(new, self.in_flight)
            if not new.changed:
                return word
        if self.waits(server):
            remedy = "load weights again, or have copies of them sent: engine.weights='files', or with a cluster cluster.weights='objects'"
            raise ConnectionError(f"{name} wants weights that have been learned further since they were loaded: {remedy}")
        await asyncio.sleep(BETWEEN)
        return None

    async def load(self, weights: Weights, version: int) -> None:
        """Give every sampler the tensors, or the path of a folder of safetensors, or of such a file, that its machine can read.

        Where that fails for one, all go on by the weights before.
        """
        here = self._turn()
        async with here.loading:
            new = await asyncio.to_thread(self.push, weights, version)
            if not self.in_flight:
                here.open.clear()
            former = self._pushed
            try:
                while self._flying and not self.in_flight:
                    await here.idle.wait()
                self._former, self._pushed = former, new
                self._names.add(new.name)
                await together(self._load_into(home) for home, server in enumerate(self.servers) if not server.away)
            except BaseException:
                self._pushed = former
                new.drop()
                raise
            finally:
                self._former = None
                here.open.set()
            self._affinity.forget()
            if former is not None:
                former.drop()

    async def _load_into(self, home: int) -> None:
        """The weights that are meant now into one sampler; one that fails meanwhile is mended, which does the same."""
        server, epoch = self.servers[home], self.servers[home].epoch
        try:
            async with self._here.mending[home]:
                assert self._pushed is not None
                await self._given(server, self._pushed)
                server.epoch += 1
        except Fault as fault:
            await self._recover(home, epoch, fault)

    async def reset(self) -> None:
        """Forget KV, keep weights."""
        self._turn()
        self._affinity.forget()
        await together(self.forget(server) for server in self.servers if not server.away)

    def counters(self) -> Mapping[str, int]:
        """Tokens sampled, and of prefixes computed and reused; passes and steps are the samplers' own affair and stay 0."""
        return dict(self._counters)

    def _turn(self) -> _Loop:
        """What belongs to the running event loop; another one begins with connections of its own."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            locks = [asyncio.Lock() for _ in self.servers]
            self._here = _Loop(self.client(), asyncio.Lock(), locks, asyncio.Event(), asyncio.Event(), set())
            self._here.open.set()
            self._here.idle.set()
            self._loop, self._flying, self._pending = loop, 0, []
        return self._here
