"""One vLLM server as a run sees it: what it is, calls of many requests, weights, and what may be wrong with it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ramulus.engine.engine import Request
from ramulus.engine.pool import Lost, Stale, Wrong
from ramulus.engine.remote.client import http_library
from ramulus.engine.remote.listen import is_loopback
from ramulus.engine.vllm.process import Process
from ramulus.engine.vllm.wire import calls_of, said_of

PLUGIN_PROTOCOL = 1  # of the plug-in
WINDOW = ((0, 31), (0, 33))  # of vLLM
PLUGIN = "install vllm-plugin/ into its environment and start it with `python -m ramulus_vllm.serve MODEL`"


@dataclass(frozen=True)
class Greeting:
    """What a server says of itself."""

    vllm: str
    instance: str  # drawn when it started
    loaded: str  # the name of its weights; "" for none that a run gave it
    vocabulary: int
    limit: int
    rules: bool
    ways: tuple[str, ...] = ("files",)  # by which weights may come; an older plug-in says nothing
    workers: int = 1  # processes that hold the model

    def other_than(self, former: Greeting) -> str:
        """What of this server is not as it was known, in words; "" where all is."""
        names = ("vllm", "vocabulary", "limit", "rules", "ways")
        return "; ".join(f"its {n} is {getattr(self, n)!r} and was {getattr(former, n)!r}" for n in names if getattr(self, n) != getattr(former, n))


def greeting_of(content: Any, url: str) -> Greeting:
    """A server's word; ConnectionError, with the remedy, for one that cannot be sampled from as it is."""
    try:
        if content["protocol"] != PLUGIN_PROTOCOL:
            raise ConnectionError(f"the plug-in of the vLLM server at {url} speaks protocol {content['protocol']}, not {PLUGIN_PROTOCOL}: {PLUGIN}")
        major, minor = (int(part) for part in str(content["vllm"]).split(".")[:2])
        known = {"ways": ("files",), "workers": 1} | content
        greeting = Greeting(**{name: known[name] for name in Greeting.__dataclass_fields__} | {"ways": tuple(known["ways"])})
        logprobs, transfer = content["logprobs"], content["transfer"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConnectionError(f"{url} is no vLLM server with ramulus's plug-in ({error}): {PLUGIN}") from None
    if not WINDOW[0] <= (major, minor) <= WINDOW[1]:
        raise ConnectionError(f"the server at {url} is vLLM {greeting.vllm}, and 0.31 to 0.33 are known here: install one of those")
    if logprobs.rpartition(".")[2].lower() != "processed_logprobs" or transfer != "ramulus":
        raise ConnectionError(
            f"the vLLM server at {url} does not answer log-probs of what it samples from, or takes no weights from files "
            f"(logprobs_mode={logprobs}, weight transfer {transfer}): start it with `python -m ramulus_vllm.serve MODEL`"
        )
    return greeting


class Server:
    """A server at `url`, which `key` opens. With a `process` it is ours: it may be ended and started again."""

    def __init__(self, url: str, key: str, timeout: float, process: Process | None = None) -> None:
        self.process, self.timeout, self.key = process, timeout, key
        self._url = url.rstrip("/")
        self.http = http_library()
        self.loaded, self.epoch, self.away = "", 0, False  # the weights it has; how often it was mended; not asked at present
        self.hello: Greeting

    @property
    def url(self) -> str:
        return self.process.url if self.process is not None else self._url

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def greet(self, key: bool = True) -> Any:
        """The server's greeting as it comes, in a call that blocks: (status, content or None)."""
        options: dict[str, Any] = {"timeout": 10.0, "trust_env": False}
        answer = self.http.get(f"{self.url}/ramulus/v1/hello", headers=self.headers if key else {}, **options)
        try:
            return answer.status_code, answer.json()
        except ValueError:
            return answer.status_code, None

    def answers(self) -> bool:
        """Whether it says hello."""
        try:
            return self.greet()[0] == 200
        except self.http.TransportError:
            return False

    def meet(self, expose: bool, patience: float) -> None:
        """Get to know it. ConnectionError where nobody answers for `patience` seconds or it is no server for this; PermissionError for a wrong key,
        and for one that other machines reach without a key."""
        end = time.monotonic() + patience
        while True:
            try:
                status, content = self.greet()
                break
            except self.http.TransportError as error:
                if time.monotonic() > end:
                    reason = str(error) or type(error).__name__
                    raise ConnectionError(f"no vLLM server answers at {self.url} ({reason}): {PLUGIN}, or check urls") from error
                time.sleep(0.1)
        if status in (401, 403):
            raise PermissionError(f"{self.url} refuses the key: set RAMULUS_VLLM_KEY to the VLLM_API_KEY that the server was started with")
        self.hello = greeting_of(content if status == 200 else None, self.url)
        if not expose and not is_loopback(urlsplit(self.url).hostname or "") and self.greet(key=False)[0] == 200:
            raise PermissionError(
                f"the vLLM server at {self.url} answers without a key, so that whoever reaches it can change its weights: start it with VLLM_API_KEY "
                "set, or say expose=True if that is meant"
            )

    async def generate(self, client: Any, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Any]]:
        """(place, answer) of each request as it is done, all in one call. Raises Lost, Stale, Wrong; ValueError for what the server refuses."""
        body = calls_of(requests, self.loaded) | {"instance": self.hello.instance, "loaded": self.loaded}
        left = set(range(len(requests)))
        try:
            call = client.stream("POST", f"{self.url}/ramulus/v1/generate", content=json.dumps(body), headers=self.headers)
            async with asyncio.timeout(self.timeout) as deadline, call as answer:
                if answer.status_code != 200:
                    self.raise_for(answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    deadline.reschedule(asyncio.get_running_loop().time() + self.timeout)
                    place, content = self.read(line, left)
                    left.discard(place)
                    yield place, content
        except TimeoutError:
            raise Lost(f"the vLLM server at {self.url} has answered nothing for {self.timeout:g} s") from None
        except self.http.HTTPError as error:
            raise Lost(f"the vLLM server at {self.url} is lost ({str(error) or type(error).__name__})") from None
        if left:
            raise Lost(f"the vLLM server at {self.url} broke off with {len(left)} of {len(requests)} requests unanswered")

    def read(self, line: str, left: set[int]) -> tuple[int, Any]:
        """A line of an answer, to one of the requests that are left."""
        try:
            content = json.loads(line)
            place, status, answer = content["index"], content["status"], content["answer"]
            if place not in left:
                raise ValueError(f"to request {place}, which is none or was answered before")
        except (ValueError, KeyError, TypeError) as error:
            raise Wrong(f"the vLLM server at {self.url} answered something that is no line of an answer ({error})") from None
        if status >= 500 or answer is None:
            raise Lost(f"the engine of the vLLM server at {self.url} failed ({said_of(answer)})")
        if status != 200:
            raise ValueError(f"the vLLM server at {self.url} refuses a request: {said_of(answer)}")
        return place, answer

    def raise_for(self, status: int, body: bytes) -> None:
        """What an answer without 200 means."""
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        if status == 409:
            raise Stale(f"the vLLM server at {self.url} has not the weights that are meant")
        if status in (401, 403):
            raise PermissionError(f"{self.url} refuses the key: set RAMULUS_VLLM_KEY to the VLLM_API_KEY that the server was started with")
        if status == 400:
            raise ValueError(f"the vLLM server at {self.url} refuses: {said_of(content)}")
        raise Lost(f"the vLLM server at {self.url} failed ({said_of(content) if content else f'status {status}'})")

    async def ask(self, client: Any, method: str, path: str, content: Any = None, patience: float | None = None) -> Any:
        """The JSON of one of the plug-in's other addresses. Raises as `generate` does."""
        patience = self.timeout if patience is None else min(patience, self.timeout)
        try:
            async with asyncio.timeout(patience):
                body = {} if content is None else {"content": json.dumps(content)}
                answer = await client.request(method, f"{self.url}/ramulus/v1/{path}", headers=self.headers, **body)
        except TimeoutError:
            raise Lost(f"the vLLM server at {self.url} has not answered within {patience:g} s") from None
        except self.http.HTTPError as error:
            raise Lost(f"the vLLM server at {self.url} is lost ({str(error) or type(error).__name__})") from None
        if answer.status_code != 200:
            self.raise_for(answer.status_code, answer.content)
        return answer.json()

