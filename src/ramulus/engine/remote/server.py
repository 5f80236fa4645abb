"""The server's side: any Engine behind four addresses, a token and one sentence for every error."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ramulus.engine.engine import Engine, named_rules
from ramulus.engine.remote.wire import (
    ERRORS,
    HEADER,
    PROTOCOL,
    Hello,
    Rules,
    json_bytes,
    requests_of_json,
    segment_to_json,
)

_CROSS = {"strings", "entropy", "kept", "in_flight"}  # features that need no function and no memory of the client here
OCTETS = "application/octet-stream"


class Refused(Exception):
    """A call that is answered by a status and a sentence."""

    def __init__(self, status: int, kind: str, text: str) -> None:
        super().__init__(text)
        self.status, self.kind = status, kind


@dataclass
class Served:
    """An engine as a web application (ASGI): GET /hello, POST /sample, /load and /reset, all under /v1 and behind the token.

    `model`, `vocabulary`: what clients are told of it. `rules`: temperature rules that requests may name. `read`: turns pushed bytes into
    weights for `engine.load`. A client that goes away has its requests cancelled. Errors of the engine reach the client as they are:
    {"kind": class, "error": text} with status 400; 401 is a wrong token, 409 weights that are not the caller's, 426 another protocol.
    """

    engine: Engine
    token: str = field(repr=False)
    model: str
    vocabulary: int
    rules: Rules
    read: Callable[[bytes], Any]
    instance: str = field(default_factory=lambda: secrets.token_hex(8))
    loaded: str = ""
    version: int = 0

    def __post_init__(self) -> None:
        if not self.token:
            raise ValueError("an engine server needs a token: anybody on this machine could reach it")
        self.loading = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request
        from starlette.responses import Response

        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            content = await self.answer(request)
            status = 200
        except Refused as refused:
            status, content = refused.status, {"kind": refused.kind, "error": str(refused)} | asdict(self.hello())
            if status == 401:  # to whom nothing more is said
                content = {"kind": refused.kind, "error": str(refused)}
        except Gone:
            return
        headers = {HEADER: str(PROTOCOL), "cache-control": "no-store", "x-content-type-options": "nosniff"}
        with suppress(OSError):
            await Response(json_bytes(content), status, headers, "application/json")(scope, receive, send)

    async def answer(self, request: Any) -> dict[str, Any]:
        """What a call is answered; raises Refused."""
        self.admit(request.headers)
        calls: dict[tuple[str, str], Callable[[Any], Awaitable[dict[str, Any]]]] = {
            ("GET", "/v1/hello"): self.greet,
            ("POST", "/v1/sample"): self.sample,
            ("POST", "/v1/load"): self.load,
            ("POST", "/v1/reset"): self.reset,
        }
        call = calls.get((request.method, request.url.path))
        if call is None:
            raise Refused(404, "LookupError", f"an engine server has no {request.method} {request.url.path}")
        try:
            return await call(request) | asdict(self.hello())
        except (Refused, Gone):
            raise
        except Exception as error:
            kind = next((name for name, known in ERRORS.items() if isinstance(error, known)), "RuntimeError")
            text = str(error) if kind == type(error).__name__ else f"{type(error).__name__}: {error}"
            raise Refused(400, kind, text) from error

    def admit(self, headers: Mapping[str, str]) -> None:
        """Refuse whoever does not know the token or speaks another protocol."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), self.token.encode()):
            raise Refused(401, "PermissionError", "wrong token")
        if headers.get(HEADER) != str(PROTOCOL):
            other = headers.get(HEADER, "none")
            raise Refused(426, "RuntimeError", f"the server speaks protocol {PROTOCOL}, the client {other}: install the same ramulus on both sides")

    def hello(self) -> Hello:
        """What is said of this engine with every answer."""
        rules = named_rules(self.rules) if "rules" in self.engine.features else frozenset()
        features = tuple(sorted((self.engine.features & _CROSS) | rules))
        return Hello(
            self.instance, self.loaded, self.version, self.model, self.vocabulary, self.engine.limit, features, dict(self.engine.counters())
        )

    async def greet(self, request: Any) -> dict[str, Any]:
        return {}

    async def sample(self, request: Any) -> dict[str, Any]:
        """Segments of many requests, by the weights that the caller means."""
        content = parsed(await request.body())
        async with self.loading:  # a load whose client has gone may not be over
            here = self.instance, self.loaded
        if (content.get("instance"), content.get("loaded")) != here:
            raise Refused(409, "LookupError", "these weights are not here: load them, and ask again")
        requests = requests_of_json(content, self.rules)
        segments = await while_there(request, self.engine.sample(requests))
        return {"segments": [segment_to_json(segment) for segment in segments]}

    async def load(self, request: Any) -> dict[str, Any]:
        """Weights from the body, or from a folder on this machine, under a name of the caller's; done once, however often it is asked."""
        name, version = request.query_params.get("name", ""), request.query_params.get("version", "")
        if not name or not version.isdecimal():
            raise ValueError(f"load wants a name and a version, got {name!r} and {version!r}")
        body = await request.body()
        async with self.loading:
            if name != self.loaded:
                pushed = request.headers.get("content-type") == OCTETS
                weights = self.read(body) if pushed else folder_of(parsed(body))
                await self.engine.load(weights, int(version))
                self.loaded, self.version = name, int(version)
        return {}

    async def reset(self, request: Any) -> dict[str, Any]:
        await self.engine.reset()
        return {}


class Gone(Exception):
    """The client has hung up."""


async def while_there(request: Any, work: Awaitable[Any]) -> Any:
    """The result of some work, which is cancelled when the client hangs up (Gone)."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())  # after the body, only a disconnect is received
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Gone
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


def parsed(body: bytes) -> dict[str, Any]:
    """A JSON object; ValueError for anything else."""
    content = json.loads(body)  # its error is a ValueError
    if not isinstance(content, dict):
        raise ValueError(f"a call is a JSON object, got {type(content).__name__}")
    return content


def folder_of(content: dict[str, Any]) -> str:
    """The folder that a call names, if it is here; ValueError otherwise."""
    folder = Path(str(content.get("folder", "")))
    if not folder.is_absolute() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"the engine server sees no folder of safetensors at {folder}: push the tensors, or name a folder on its machine")
    return str(folder)
