"""An Engine behind vLLM servers: weights go to every server as files or straight, one that fails is found or started again."""

from __future__ import annotations

import asyncio
import shutil
import warnings
import weakref
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ramulus.engine.engine import Request, Segment, Weights, named_rules
from ramulus.engine.pool import BETWEEN, Fault, Lost, PoolEngine, Stale, Wrong
from ramulus.engine.pushed import Held, Pushed, pushed
from ramulus.engine.vllm.server import PLUGIN, Greeting, Server, greeting_of
from ramulus.engine.vllm.transfer import Sender, held_weights
from ramulus.engine.vllm.wire import KNOWN_RULES, Malformed, refuse, segment_of

_LOOK = 10.0  # seconds that a server may take to say hello


@dataclass(frozen=True)
class Elsewhere(Pushed):
    """Weights that another process has sent, and it alone can send again."""


class VllmEngine(PoolEngine):
    """Samples from `servers`, whose weights are those of the last `load`; nothing is sampled before the first.

    `reconnect`: seconds for which a lost server that is not ours is looked for; one of ours is started again. Requests that it had are asked again,
    of another server where there is one: their seeds make them the same tokens, so nothing is lost. ConnectionError where no server is left, or
    where somebody else has loaded weights; RuntimeError for answers that cannot be, three times in a row; ValueError for what can never be served.
    `in_flight`: weights are swapped below requests on their way, which go on by the new ones, over keys and values of the new ones; else these end
    first. `weights`: "files", or the way by which tensors go straight into servers: "gloo", "nccl", "ipc"; folders are read as files in any case.

    `features`: "rules", those of KNOWN_RULES alone; callers replay `until` and stop strings. Entropies, what truncation left, and the temperatures
    of a rule are not recorded.
    """

    kind = "vLLM server"

    def __init__(self, servers: Sequence[Server], folder: Path, reconnect: float = 60.0, in_flight: bool = False, weights: str = "files") -> None:
        super().__init__(servers, in_flight)
        self.folder, self.reconnect = folder, reconnect
        hellos = [server.hello for server in servers]
        for server in servers[1:]:
            if differs := server.hello.other_than(hellos[0]):
                raise ConnectionError(f"the vLLM server at {server.url} is not like that at {servers[0].url}: {differs}; serve one model alike")
        if in_flight and hellos[0].vllm.startswith("0.31."):
            raise ValueError(f"vLLM {hellos[0].vllm} does not say which weights sampled a token: take 0.32 or newer, or in_flight=False")
        if weights not in hellos[0].ways:
            newer = "take vLLM 0.32 or newer" if hellos[0].vllm.startswith("0.31.") else PLUGIN
            raise ValueError(f"the vLLM server at {servers[0].url} takes no weights by {weights}: {newer}, or set engine.weights='files'")
        self._senders = {server: Sender(weights, server) for server in servers} if weights != "files" else {}
        self.limit, self.vocabulary, self.rules = hellos[0].limit, hellos[0].vocabulary, hellos[0].rules
        self.features = named_rules(KNOWN_RULES if self.rules else ()) | ({"in_flight"} if in_flight else set())
        self.features |= {"live"} if self._senders else set()
        places = ", ".join(server.url for server in servers)
        self.about = f"vLLM {hellos[0].vllm} at {places}"
        self._end = weakref.finalize(self, _end, [s.process for s in servers if s.process is not None], folder)

    def refuse(self, request: Request) -> None:
        """Raise ValueError for a request that no server could ever serve as it is meant."""
        refuse(request, self.limit, self.vocabulary, self.rules)

    def answers(self, server: Server, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Any]]:
        """What the server says of each, in one HTTP call."""
        return server.generate(self._here.client, requests)

    def settled(self, server: Server, request: Request, content: Any) -> tuple[Segment, int]:
        """The segment of an answer. Raises Wrong for what cannot be."""
        try:
            segment, reused = segment_of(content, request, self.vocabulary)
        except Malformed as error:
            raise Wrong(f"the vLLM server at {server.url} answered {error}") from None
        if not (content["choices"][0].get("weight_versions")):  # before vLLM 0.32
            segment.version = segment.newest = self._version
        return segment, reused

    async def bring_back(self, server: Server, fault: Fault) -> None:
        """Find a server, or start it again. Raises Fault where it fails again."""
        there = await self._found(server, fault)
        if differs := there.other_than(server.hello) if there.instance != server.hello.instance else "":
            raise ConnectionError(f"the vLLM server at {server.url} is not the one it was: {differs}")
        if there.loaded and there.loaded not in self._names:
            raise ConnectionError(f"another run has loaded its weights into the vLLM server at {server.url}: start one for each run")
        known = isinstance(fault, Stale) and there.instance == server.hello.instance  # a load that was refused or broken off may have changed nothing
        server.hello, server.loaded = there, there.loaded if known else ""

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
                return greeting_of(await server.ask(self._here.client, "GET", "hello", patience=_LOOK), server.url)
            except Lost as lost:
                if not isinstance(fault, Lost):
                    raise
                if asyncio.get_running_loop().time() > end:
                    late = f"and has not come back within {self.reconnect:g} s: start it again, and go on with --resume"
                    raise ConnectionError(f"{lost}, {late}") from fault
            await asyncio.sleep(BETWEEN)

    def push(self, weights: Weights, version: int) -> Pushed:
        """Weights in a file that servers read, or as they are for those who send them straight."""
        return held_weights(weights, version) if self._senders and isinstance(weights, Mapping) else pushed(weights, version, self.folder)

    async def give(self, server: Server, new: Pushed) -> None:
        """Have a server take the weights."""
        if isinstance(new, Elsewhere):
            raise Stale(f"the vLLM server at {server.url} has not the weights that were sent to it")
        if isinstance(new, Held):
            send = partial(self._senders[server].send, self._here.client)
            if greeting := await self.sent(server, f"the vLLM server at {server.url}", new, send):
                server.hello, server.loaded = greeting_of(greeting, server.url), new.name
            return
        body = {"path": str(new.path), "name": new.name, "version": new.version, "crc": new.crc, "in_flight": self.in_flight}
        server.hello = greeting_of(await server.ask(self._here.client, "POST", "load", body), server.url)
        server.loaded = new.name

    async def relay(self, *question: Any) -> Any:
        """What its one server answers to whoever sends weights straight into it; asked nothing, its address and greeting."""
        [server] = self.servers
        self._turn()
        return await server.ask(self._here.client, *question) if question else (server.url, server.hello)

    def took(self, word: Any, name: str, version: int) -> None:
        """Note that another process has sent its one server these weights; `word`: what the server answered to them."""
        [server] = self.servers
        server.hello, server.loaded = greeting_of(word, server.url), name
        self._pushed = Elsewhere(Path(), version, name=name)
        self._names.add(name)
        self._affinity.forget()

    async def forget(self, server: Server) -> None:
        """Have a server forget KV."""
        await server.ask(self._here.client, "POST", "reset", {})

    def client(self) -> Any:
        """Connections of an event loop."""
        http = self.servers[0].http
        limits = http.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=60)
        return http.AsyncClient(timeout=http.Timeout(None, connect=10), limits=limits, trust_env=False)

    def close(self) -> None:
        """End the servers that are ours; what was written for them goes. The same happens when the engine is forgotten, or the process ends."""
        for sender in self._senders.values():
            sender.close()
        self._end()


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
