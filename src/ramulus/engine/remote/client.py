"""An Engine that is served by another process: it knows the protocol, and nothing of what is behind it."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from ramulus.engine.engine import Request, Segment
from ramulus.engine.remote.wire import (
    ERRORS,
    HEADER,
    PROTOCOL,
    Hello,
    hello_of,
    json_bytes,
    requests_to_json,
    segment_of_json,
)
from ramulus.engine.weight_bytes import to_bytes

FIRST = 3.0  # seconds in which a server that is just starting may appear
RESUMED = 10  # times in one call that a server which was there again, for a while, is looked for anew
AS_PRINTED = "write http://127.0.0.1:PORT/, as `ramulus serve` prints it"
PAUSE = (0.05, 1.0)  # seconds between two attempts: the first, and the longest
OCTETS, PLAIN = {"content-type": "application/octet-stream"}, {"content-type": "application/json"}


class RemoteEngine:
    """Samples from an engine served at `url` (`ramulus serve`), which `token` opens.

    `timeout`: seconds that a call may take; TimeoutError after it. Where a load fails here, what follows is by the weights before, which are pushed
    again if the server took the others after all. `reconnect`: seconds for which a lost server is asked again, each time. One that was
    started again is given the weights it should have and asked the same once more: a request's seed makes it the same tokens, so nothing is
    lost. ConnectionError where nobody answers, where the server is another one (vocabulary, limit, features, model), or where somebody
    else has loaded weights into it; PermissionError for a wrong token; what the engine itself raises comes as it is. Pushed weights are
    kept as bytes until the next ones, to be pushed again.

    `limit`, `features`: of the served engine, without those that need its process: "until" (callers replay it), "in_place" and "live" (`load` wants a
    folder that the server's machine has, or tensors), "sleep".
    """

    def __init__(self, url: str, token: str, timeout: float = 600.0, reconnect: float = 60.0) -> None:
        check_url(url)
        if not token:
            raise ValueError("an engine server wants a token: set RAMULUS_TOKEN to what `ramulus serve` printed")
        self.url, self.timeout, self.reconnect = url.rstrip("/"), timeout, reconnect
        self._headers = {"authorization": f"Bearer {token}", HEADER: str(PROTOCOL)}
        self._http = http_library()
        try:
            self._http.URL(self.url)
        except self._http.InvalidURL as error:
            raise ValueError(f"url={url!r} is no address ({error}): {AS_PRINTED}") from error
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Any = None
        self._lock = asyncio.Lock()
        self._hello = self._greet()
        self._home, self._loaded = self._hello.instance, self._hello.loaded  # where the weights are that are meant, and their name
        self._names = {self._loaded} - {""}  # of all weights that this client met at first or has asked for, whatever came of that
        self._push: tuple[str, bytes, dict[str, str]] | None = None  # the last load: address, body, headers
        self._before = {name: -count for name, count in self._hello.counters.items()}  # counted by lost servers, less what others asked for
        self.limit, self.features = self._hello.limit, frozenset(self._hello.features)
        self.vocabulary, self.about = self._hello.vocabulary, f"the engine server at {self.url}"

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        """A continuation of each request, all in one call; raises what the served engine raises."""
        if not requests:
            return []
        content = requests_to_json(requests)
        while True:
            async with self._turn():  # whoever asks while weights are on their way is answered by the new ones
                stamp = {"instance": self._home, "loaded": self._loaded}
            status, answer = await self._ask("POST", "/v1/sample", json_bytes(content | stamp), PLAIN)
            if status != 409:
                return [segment_of_json(segment) for segment in answer["segments"]]
            await self._mend()

    async def load(self, weights: Any, version: int) -> None:
        """Give the server the tensors, or the absolute path of a folder of safetensors on its machine; its KV goes."""
        if weights is None:
            raise ValueError("an engine in another process cannot read the learner's weights in place: load a folder or tensors")
        name = secrets.token_hex(8)
        path = f"/v1/load?{urlencode({'name': name, 'version': version})}"
        async with self._turn():
            if isinstance(weights, str | os.PathLike):
                push = (path, json_bytes({"folder": str(Path(weights).absolute())}), PLAIN)
            else:
                push = (path, to_bytes(weights), OCTETS)
            self._names.add(name)
            await self._ask("POST", *push)
            self._push, self._loaded, self._home = push, name, self._hello.instance

    async def reset(self) -> None:
        """Forget KV, keep weights."""
        self._turn()
        await self._ask("POST", "/v1/reset", b"", PLAIN)

    def counters(self) -> Mapping[str, int]:
        """What the served engine has counted since this client met it, servers that were lost included; as of the last answer."""
        return {name: count + self._before.get(name, 0) for name, count in self._hello.counters.items()}

    def close(self) -> None:
        """Nothing to end: the server is not ours."""

    async def _mend(self) -> None:
        """Give a server that was started again, or has taken weights of a load that failed here, those that it should have."""
        async with self._turn():
            await self._ask("GET", "/v1/hello", b"", {})
            there = self._hello
            if (there.instance, there.loaded) == (self._home, self._loaded):
                return  # it has them by now
            if there.loaded and there.loaded not in self._names:
                raise ConnectionError(f"another client has loaded its weights into the engine server at {self.url}: start one server for each run")
            if self._push is not None:
                await self._ask("POST", *self._push)
            elif there.loaded != self._loaded:
                why = "has taken the weights of a load that failed here" if there.loaded else "was started again"
                raise ConnectionError(f"the engine server at {self.url} {why}, without those it had before: load weights")
            self._home = self._hello.instance

    async def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """(status, content) of a call that was answered by 200 or 409; a lost server is asked again."""
        lost: float | None = None
        pause, again = PAUSE[0], RESUMED
        while True:
            begun = time.monotonic()
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await self._client.request(method, self.url + path, content=body, headers=self._headers | headers)
                return self._read(answer)
            except TimeoutError as error:
                raise TimeoutError(
                    f"the engine server at {self.url} has not answered within {self.timeout:g} s: look whether it hangs, or raise timeout"
                ) from error
            except self._http.TransportError as error:
                was_there = time.monotonic() - begun > PAUSE[1] and not isinstance(error, self._http.ConnectError | self._http.ConnectTimeout)
                if lost is None or (was_there and again):
                    lost, pause, again = time.monotonic(), PAUSE[0], again - 1
                if time.monotonic() - lost + pause > self.reconnect:
                    raise ConnectionError(self._lost(error)) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE[1])

    def _greet(self) -> Hello:
        """The server's first word; it may just be starting."""
        start, headers = time.monotonic(), self._headers
        while True:
            try:
                options: dict[str, Any] = {"timeout": min(self.timeout, 30.0), "trust_env": False}
                answer = self._http.get(f"{self.url}/v1/hello", headers=headers, **options)
                return hello_of(self._content(answer))
            except self._http.ReadTimeout as error:
                raise TimeoutError(f"the engine server at {self.url} is there and does not answer: look whether it hangs") from error
            except self._http.TransportError as error:
                if time.monotonic() - start > min(FIRST, self.reconnect):
                    raise ConnectionError(self._lost(error)) from error
            time.sleep(PAUSE[0])

    def _read(self, answer: Any) -> tuple[int, dict[str, Any]]:
        """An answer's status and content, and what it says of the server written down."""
        content = self._content(answer)
        there = hello_of(content)
        if there.instance != self._hello.instance:
            if differs := there.other_than(self._hello):
                raise ConnectionError(f"the engine server at {self.url} is not the one it was: {differs}")
            self._before = dict(self.counters())
            self._hello = there
        else:  # answers may overtake each other
            counted = {name: max(count, self._hello.counters.get(name, 0)) for name, count in there.counters.items()}
            self._hello = replace(there, counters=counted)
        return answer.status_code, content

    def _content(self, answer: Any) -> dict[str, Any]:
        """What was answered by 200 or 409; everything else is raised."""
        try:
            content = answer.json()
            text, kind = (str(content[name]) for name in ("error", "kind")) if answer.status_code != 200 else ("", "")
        except (ValueError, KeyError, TypeError):
            content = None
        if not isinstance(content, dict) or HEADER not in answer.headers:
            raise ConnectionError(f"{self.url} (status {answer.status_code}) is no engine server: check url, start one with `ramulus serve`")
        if answer.status_code == 401:
            raise PermissionError(f"{self.url} refuses the token: set RAMULUS_TOKEN to what `ramulus serve` printed")
        if answer.status_code not in (200, 409):
            raise ERRORS.get(kind, ConnectionError)(text)
        return content

    def _lost(self, error: Exception) -> str:
        reason = str(error) or type(error).__name__
        return f"no engine server answers at {self.url} ({reason}): start one with `ramulus serve`, or check url"

    def _turn(self) -> asyncio.Lock:
        """The lock of whoever changes weights, in the running loop, which gets connections of its own."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            limits = self._http.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=60)
            self._client = self._http.AsyncClient(timeout=self._http.Timeout(None, connect=10), limits=limits, trust_env=False)
            self._loop, self._lock = loop, asyncio.Lock()
        return self._lock


def check_url(url: str) -> None:
    """Raise ValueError for an address that cannot be one of a server."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not any(c.isspace() for c in url)
    except ValueError:  # its port is none
        good = False
    if not good:
        raise ValueError(f"url={url!r} is no address of a server: {AS_PRINTED}")


def http_library() -> Any:
    """httpx2; ImportError names the extra."""
    try:
        import httpx2
    except ImportError as error:
        raise ImportError('an engine in another process needs httpx2: pip install "ramulus[remote]"') from error
    return httpx2
