"""An Engine behind vLLM servers: requests of one turn travel together, weights go to every server, one that fails is mended and asked again."""

from __future__ import annotations

import asyncio
import shutil
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramulus.engine.engine import COUNTERS, Request, Segment, together
from ramulus.engine.vllm.affinity import Affinity
from ramulus.engine.vllm.pushed import Pushed, pushed
from ramulus.engine.vllm.server import Fault, Greeting, Lost, Server, Wrong, greeting_of
from ramulus.engine.vllm.wire import Malformed, refuse, segment_of

TRIES = 3  # faults in a row, without an answer between, after which a call is given up
LOOK, PAUSE = 10.0, 0.2  # seconds that a server may take to say hello, and between two looks for one that is lost

_Asked = tuple[Request, "asyncio.Future[Segment]"]


@dataclass
class _Loop:
    """What belongs to the event loop in which the engine is used."""

    client: Any
    loading: asyncio.Lock  # one load at a time
    mending: list[asyncio.Lock]  # of each server
    open: asyncio.Event  # requests may be sent
    idle: asyncio.Event  # none is in flight
    tasks: set[asyncio.Task[None]]  # calls on their way


class VllmEngine:
    """Samples from `servers`, whose weights are those of the last `load`; nothing is sampled before the first.

    `reconnect`: seconds for which a lost server that is not ours is looked for; one of ours is started again. Requests that it had are asked again,
    of another server where there is one: their seeds make them the same tokens, so nothing is lost. ConnectionError where no server is left, or
    where somebody else has loaded weights; RuntimeError for answers that cannot be, three times in a row; ValueError for what can never be served.
    `in_flight`: weights are swapped below requests on their way, which go on by the new ones, over keys and values of the new ones; else these end
    first.

    `features`: "rules", of which it knows ByEntropy; callers replay `until` and stop strings. Entropies, what truncation left, and the temperatures
    of a rule are not recorded.
    """

    def __init__(self, servers: Sequence[Server], folder: Path, reconnect: float = 60.0, in_flight: bool = False) -> None:
        self.servers, self.folder, self.reconnect, self.in_flight = list(servers), folder, reconnect, in_flight
        hellos = [server.hello for server in servers]
        for server in servers[1:]:
            if differs := server.hello.other_than(hellos[0]):
                raise ConnectionError(f"the vLLM server at {server.url} is not like that at {servers[0].url}: {differs}; serve one model alike")
        if in_flight and hellos[0].vllm.startswith("0.31."):
            raise ValueError(f"vLLM {hellos[0].vllm} does not say which weights sampled a token: take 0.32 or newer, or in_flight=False")
        self.limit, self.vocabulary, self.rules = hellos[0].limit, hellos[0].vocabulary, hellos[0].rules
        self.features = frozenset({"rules"} if self.rules else ())
        places = ", ".join(server.url for server in servers)
        self.about = f"vLLM {hellos[0].vllm} at {places}"
        self._end = weakref.finalize(self, _end, [s.process for s in servers if s.process is not None], folder)
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._affinity, self._pushed, self._names = Affinity(), None, set[str]()
        self._pending: list[_Asked] = []
        self._flying = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._here: _Loop

    _pushed: Pushed | None

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        """A continuation of each request; what other callers ask in the same turn of the event loop travels in the same call."""
        for request in requests:
            refuse(request, self.limit, self.vocabulary, self.rules)
        if not requests:
            return []
        here = self._turn()
        while not here.open.is_set():
            await here.open.wait()
        if self._pushed is None:
            raise ValueError("a vLLM server has no weights before the first load: load the learner's")
        loop = asyncio.get_running_loop()
        if not self._pending:
            loop.call_soon(self._leave)
        asked = [(request, loop.create_future()) for request in requests]
        self._pending += asked
        self._count(1)
        try:
            return list(await asyncio.gather(*(future for _, future in asked)))
        finally:
            for _, future in asked:
                future.cancel()
            self._count(-1)

    def _count(self, more: int) -> None:
        """Calls of `sample` in flight."""
        self._flying += more
        (self._here.idle.clear if self._flying else self._here.idle.set)()

    def _leave(self) -> None:
        """Send what was asked in this turn, a call for each server."""
        asked, self._pending = [pair for pair in self._pending if not pair[1].done()], []
        for home, group in self._shared(asked).items():
            self._carry(home, group)

    def _shared(self, asked: Sequence[_Asked]) -> dict[int, list[_Asked]]:
        """Requests by the server that each goes to."""
        present = [i for i, server in enumerate(self.servers) if not server.away] or list(range(len(self.servers)))
        groups: dict[int, list[_Asked]] = {}
        for pair in asked:
            groups.setdefault(self._affinity(pair[0].prefix, present), []).append(pair)
        return groups

    def _carry(self, home: int, asked: list[_Asked], tries: int = 0) -> None:
        """Begin a call; it is broken off once nobody waits for any of it."""
        task = asyncio.get_running_loop().create_task(self._call(home, asked, tries))
        self._here.tasks.add(task)
        task.add_done_callback(self._here.tasks.discard)
        left = len(asked)

        def settled(future: asyncio.Future[Segment]) -> None:
            nonlocal left
            left -= 1
            if not left and future.cancelled():
                task.cancel()

        for _, future in asked:
            future.add_done_callback(settled)

    async def _call(self, home: int, asked: list[_Asked], tries: int) -> None:
        """One call to one server; what it leaves unanswered is asked again."""
        server, before = self.servers[home], sum(future.done() for _, future in asked)
        epoch = server.epoch
        try:
            try:
                async with aclosing(server.generate(self._here.client, [request for request, _ in asked])) as answers:
                    async for place, content in answers:
                        self._settle(server, asked[place], content)
                return
            except Fault as fault:
                left = [pair for pair in asked if not pair[1].done()]
                tries = 1 if sum(future.done() for _, future in asked) > before else tries + 1
                if tries > TRIES:
                    raise RuntimeError(f"{fault}, {tries} times in a row: look at the server, and at whether the weights are finite") from fault
                await self._recover(home, epoch, fault)
                await asyncio.sleep(PAUSE * (tries - 1))
            for place, group in self._shared(left).items():
                self._carry(place, group, tries)
        except Exception as error:  # whoever waits is told
            for _, future in asked:
                if not future.done():
                    future.set_exception(error)

    def _settle(self, server: Server, asked: _Asked, content: Any) -> None:
        """Hand over what was sampled for a request; Wrong for what cannot be."""
        request, future = asked
        try:
            segment, reused = segment_of(content, request, self.vocabulary)
        except Malformed as error:
            raise Wrong(f"the vLLM server at {server.url} answered {error}") from None
        if future.done():
            return
        if not (content["choices"][0].get("weight_versions")):  # before vLLM 0.32
            segment.version = segment.newest = self._version
        counters = self._counters
        counters["sampled"] += len(segment.tokens)
        counters["reused"] += reused
        counters["prefilled"] += len(request.prefix) - reused
        future.set_result(segment)

    @property
    def _version(self) -> int:
        return self._pushed.version if self._pushed is not None else 0

    async def _recover(self, home: int, epoch: int, fault: Fault) -> None:
        """Mend a server, beside the others where there are others."""
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
        await self._mend(home, epoch, fault)

    async def _mend_alone(self, home: int, epoch: int, fault: Fault) -> None:
        """The same while others do its work; where it cannot be mended it stays away."""
        try:
            await self._mend(home, epoch, fault)
        except (ConnectionError, RuntimeError, ValueError) as error:
            warnings.warn(f"{error}; the run goes on with its other servers", stacklevel=2)

    async def _mend(self, home: int, epoch: int, fault: Fault) -> None:
        """Have a server back, with the weights that are meant. ConnectionError where that fails."""
        server = self.servers[home]
        async with self._here.mending[home]:
            if server.epoch > epoch:
                return  # somebody has done so meanwhile
            for tries in range(1, TRIES + 1):
                try:
                    await self._bring_back(server, fault)
                    break
                except Fault as another:
                    if tries == TRIES:
                        raise
                    fault = another
            server.epoch, server.away = server.epoch + 1, False

    async def _bring_back(self, server: Server, fault: Fault) -> None:
        """Find a server, or start it again, and give it its weights. Raises Fault where it fails again."""
        there = await self._found(server, fault)
        if differs := there.other_than(server.hello) if there.instance != server.hello.instance else "":
            raise ConnectionError(f"the vLLM server at {server.url} is not the one it was: {differs}")
        if there.loaded and there.loaded not in self._names:
            raise ConnectionError(f"another run has loaded its weights into the vLLM server at {server.url}: start one for each run")
        server.hello, server.loaded = there, ""
        while self._pushed is not None and server.loaded != self._pushed.name:  # a load may come between
            await self._give(server, self._pushed)

    async def _found(self, server: Server, fault: Fault) -> Greeting:
        """A server's word once it is there again: one of ours is started again, another is looked for."""
        if isinstance(fault, Lost):
            remedy = "it is started again" if server.process is not None else f"it is looked for for {self.reconnect:g} s"
            warnings.warn(f"{fault}: {remedy}, and what it had not answered is asked again", stacklevel=2)
            if server.process is not None:
                await asyncio.to_thread(_restart, server)
        end = asyncio.get_running_loop().time() + self.reconnect
        while True:
            try:
                return greeting_of(await server.ask(self._here.client, "GET", "hello", patience=LOOK), server.url)
            except Lost as lost:
                if asyncio.get_running_loop().time() > end:
                    late = f"and has not come back within {self.reconnect:g} s: start it again, and go on with --resume"
                    raise ConnectionError(f"{lost}, {late}") from fault
            await asyncio.sleep(PAUSE)

    async def load(self, weights: Any, version: int) -> None:
        """Give every server the tensors, or the path of a folder of safetensors, or of such a file, that its machine can read."""
        here = self._turn()
        async with here.loading:
            new = await asyncio.to_thread(pushed, weights, version, self.folder)
            if not self.in_flight:
                here.open.clear()
            former = self._pushed
            try:
                while self._flying and not self.in_flight:
                    await here.idle.wait()
                self._pushed = new
                self._names.add(new.name)
                await together(self._load_into(home) for home, server in enumerate(self.servers) if not server.away)
            except BaseException:
                self._pushed = former
                new.drop()
                raise
            finally:
                here.open.set()
            self._affinity.forget()
            if former is not None:
                former.drop()

    async def _load_into(self, home: int) -> None:
        """The weights that are meant now into one server; one that fails meanwhile is mended, which does the same."""
        server, epoch = self.servers[home], self.servers[home].epoch
        try:
            async with self._here.mending[home]:
                assert self._pushed is not None
                await self._give(server, self._pushed)
                server.epoch += 1
        except Fault as fault:
            await self._recover(home, epoch, fault)

    async def _give(self, server: Server, new: Pushed) -> None:
        """Have a server read the weights."""
        asked = {"path": str(new.path), "name": new.name, "version": new.version, "crc": new.crc, "in_flight": self.in_flight}
        server.hello = greeting_of(await server.ask(self._here.client, "POST", "load", asked), server.url)
        server.loaded = new.name

    async def reset(self) -> None:
        """Forget KV, keep weights."""
        here = self._turn()
        self._affinity.forget()
        await together(server.ask(here.client, "POST", "reset", {}) for server in self.servers if not server.away)

    def counters(self) -> Mapping[str, int]:
        """Tokens sampled, and of prefixes computed and reused; passes and steps are the servers' own affair and stay 0."""
        return dict(self._counters)

    def close(self) -> None:
        """End the servers that are ours; what was written for them goes. The same happens when the engine is forgotten, or the process ends."""
        self._end()

    def _turn(self) -> _Loop:
        """What belongs to the running event loop; another one begins with connections of its own."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            http = self.servers[0].http
            limits = http.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=60)
            client = http.AsyncClient(timeout=http.Timeout(None, connect=10), limits=limits, trust_env=False)
            self._here = _Loop(client, asyncio.Lock(), [asyncio.Lock() for _ in self.servers], asyncio.Event(), asyncio.Event(), set())
            self._here.open.set()
            self._here.idle.set()
            self._loop, self._flying, self._pending = loop, 0, []
        return self._here


def _restart(server: Server) -> None:
    """Another process for a server of ours, once it answers."""
    assert server.process is not None
    server.process.stop()
    server.process.start()
    server.process.wait(server.answers)


def _end(processes: Sequence[Any], folder: Path) -> None:
    """End our servers, and remove what was written for them."""
    for process in processes:
        process.stop()
    shutil.rmtree(folder, ignore_errors=True)


