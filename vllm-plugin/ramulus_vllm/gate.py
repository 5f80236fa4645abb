"""The server's door, a middleware of vLLM's web application: the key is asked for everywhere, many requests come in one call, weights are whole.

Addresses of its own, all POST with a JSON object but for the first; errors are {"kind": class, "error": text}:

- GET /ramulus/v1/hello: what this server is.
- /ramulus/v1/generate: {"instance", "loaded", "prefixes": [[token]], "requests": [{"prefix": place in the list, and what /inference/v1/generate
  takes}]}; the answer is a line of JSON for each as it is done, {"index", "status", "answer": what /inference/v1/generate answers}. Status 409 for
  callers whose weights are not here.
- /ramulus/v1/fits: {"way", "gpu", "tensors": [[name, dtype, shape]]}: whether such weights can come by "gloo", "nccl" or "ipc"; nothing is changed.
- /ramulus/v1/open: {"instance", "way", "gpu", "join"}: the workers join the sender's group, or find its store.
- /ramulus/v1/load: {"path", "name", "version", "crc", "in_flight", "forget"}: weights from safetensors, under a name of the caller's; done once.
  {"instance", "tensors", "more", ...} in place of the path and its checksum: by the way that is open, while the caller sends.
- /ramulus/v1/reset: the prefix cache goes.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import secrets
from collections.abc import Callable
from typing import Any

from ramulus_vllm.weights import checked, plain

PROTOCOL = 1
OPEN = "RAMULUS_EXPOSE"  # of the environment: others may reach a server without a key
FREE = ("/health", "/ping")  # asked by whoever watches over servers, without a key
INNER = "/inference/v1/generate"


class Refused(Exception):
    """A call that is answered by a status and a sentence."""

    def __init__(self, status: int, kind: str, text: str) -> None:
        super().__init__(text)
        self.status, self.kind = status, kind


class Gate:
    """What every call to the server goes through."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app
        self.instance, self.loaded, self.version = secrets.token_hex(8), "", 0
        self.lock, self.ready = asyncio.Lock(), False
        self.routes = {
            ("GET", "/ramulus/v1/hello"): self.hello,
            ("POST", "/ramulus/v1/generate"): self.generate,
            ("POST", "/ramulus/v1/fits"): self.fits,
            ("POST", "/ramulus/v1/open"): self.open,
            ("POST", "/ramulus/v1/load"): self.load,
            ("POST", "/ramulus/v1/reset"): self.reset,
        }

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            self.admit(scope)
        except Refused as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await answer(send, error.status, {"kind": error.kind, "error": str(error)})
            return
        route = self.routes.get((scope.get("method", ""), scope["path"]))
        if route is None:
            await self.app(scope, receive, send)
            return
        try:
            await route(scope, receive, send)
        except Refused as error:
            await answer(send, error.status, {"kind": error.kind, "error": str(error)})
        except (ValueError, KeyError, TypeError) as error:
            await answer(send, 400, {"kind": "ValueError", "error": str(error)})
        except Exception as error:
            await answer(send, 500, {"kind": "RuntimeError", "error": f"{type(error).__name__}: {error}"})

    def admit(self, scope: dict[str, Any]) -> None:
        """Refuse whoever does not know the key, at every address; without a key, whoever comes from another machine."""
        if scope["path"] in FREE:
            return
        keys = [key for key in (scope["app"].state.args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        if keys:
            given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
            if not any(hmac.compare_digest(given, key.encode()) for key in keys):
                raise Refused(401, "PermissionError", "wrong token")
        elif not os.environ.get(OPEN) and not is_here(scope.get("client")):
            text = f"this server has no key and answers its own machine alone: set VLLM_API_KEY, or {OPEN}=1 to mean it"
            raise Refused(403, "PermissionError", text)

    async def hello(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        engine = scope["app"].state.engine_client
        if engine.errored:
            raise Refused(503, "RuntimeError", "the engine has died")
        await answer(send, 200, self.said(engine))

    def said(self, engine: Any) -> dict[str, Any]:
        """What this server is."""
        import vllm

        config = engine.vllm_config
        model, transfer = config.model_config, config.weight_transfer_config
        return {
            "protocol": PROTOCOL, "vllm": vllm.__version__, "instance": self.instance, "loaded": self.loaded, "version": self.version,
            "model": str(model.model), "vocabulary": model.get_vocab_size(), "limit": model.max_model_len, "dtype": str(model.dtype),
            "logprobs": str(model.logprobs_mode), "transfer": transfer.backend if transfer else None, "rules": bool(model.logits_processors),
            "ways": ways(vllm.__version__), "workers": config.parallel_config.world_size * config.parallel_config.data_parallel_size,
        }  # fmt: skip

    async def generate(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Every request of a call goes its own way through vLLM; its line is sent as it is done."""
        content = plain(await body_of(receive))
        if (content.get("instance"), content.get("loaded")) != (self.instance, self.loaded) or not self.loaded:
            raise Refused(409, "LookupError", "these weights are not here: load them, and ask again")
        prefixes = content["prefixes"]
        calls = [json.dumps(call | {"token_ids": prefixes[call.pop("prefix")]}).encode() for call in content["requests"]]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-ndjson")]})
        left = asyncio.Event()
        watching = asyncio.create_task(gone(receive, left))
        working = [asyncio.create_task(self.one(index, dict(scope), call, left)) for index, call in enumerate(calls)]
        try:
            for done in asyncio.as_completed(working):
                await send({"type": "http.response.body", "body": await done, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            left.set()
            watching.cancel()
            await asyncio.gather(watching, *working, return_exceptions=True)

    async def one(self, index: int, scope: dict[str, Any], body: bytes, left: asyncio.Event) -> bytes:
        """The line of one request."""
        given, status, parts = False, 500, []
        headers = [pair for pair in scope["headers"] if pair[0] == b"authorization"]
        length = (b"content-length", str(len(body)).encode())
        scope |= {"path": INNER, "raw_path": INNER.encode(), "headers": [*headers, (b"content-type", b"application/json"), length]}

        async def receive() -> dict[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        try:
            await self.app(scope, receive, send)
        except Exception as error:
            parts = [json.dumps({"error": {"message": f"{type(error).__name__}: {error}"}}).encode()]
        return b'{"index":%d,"status":%d,"answer":%s}\n' % (index, status, b"".join(parts).strip() or b"null")

    async def fits(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Whether weights can come by a way that is no file; nothing is changed."""
        asked = plain(await body_of(receive))
        await self.told(scope, {"way": asked["way"], "gpu": asked["gpu"], "tensors": asked["tensors"]})
        await answer(send, 200, {})

    async def open(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """The workers join whoever sends."""
        asked = plain(await body_of(receive))
        self.known(asked)
        async with self.lock:
            await self.told(scope, {"way": asked["way"], "gpu": asked["gpu"], "join": asked["join"]})
        await answer(send, 200, {})

    async def told(self, scope: dict[str, Any], said: dict[str, Any]) -> None:
        """Tell the workers of a way for weights. Raises ValueError with what one of them says."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        engine = scope["app"].state.engine_client
        try:
            await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=said))
        except Exception as error:
            if engine.errored:
                raise
            raise ValueError(" ".join(str(error).split())[:400]) from error

    def known(self, asked: dict[str, Any]) -> None:
        """Refuse whoever means a process that was here before."""
        if asked["instance"] != self.instance:
            raise Refused(409, "LookupError", "this is another process than the one that is meant: say hello, and ask again")

    async def load(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Weights, looked at before anything is changed; while they are on their way nobody's weights are here."""
        asked = plain(await body_of(receive))
        name, version, in_flight = str(asked["name"]), int(asked["version"]), bool(asked.get("in_flight"))
        engine, path = scope["app"].state.engine_client, str(asked.get("path") or "")
        async with self.lock:
            if name != self.loaded:
                if path:
                    await asyncio.to_thread(checked, path, asked.get("crc"))
                    update = {"path": path}
                else:
                    self.known(asked)
                    update = {"tensors": asked["tensors"], "more": asked["more"]}
                self.loaded = ""
                await self.take(engine, update, version, in_flight, bool(asked.get("forget", True)))
                self.loaded, self.version = name, version
        await answer(send, 200, self.said(engine))

    async def take(self, engine: Any, update: dict[str, Any], version: int, in_flight: bool, forget: bool) -> None:
        """Requests in flight end first, or are held and go on by the new weights; keys and values of the old ones go, theirs too."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        if not self.ready:
            await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
            self.ready = True
        await engine.pause_generation(mode="keep" if in_flight else "wait", clear_cache=forget)
        try:
            await engine.start_weight_update()
            await engine.update_weights(WeightTransferUpdateRequest(update_info=update))
            await finished(engine, str(version))
            if forget:
                await emptied(engine, in_flight)
        except Exception as error:
            if engine.errored:
                raise
            await engine.pause_generation(mode="abort")  # nothing goes on by weights of which nobody knows what they are
            where = f" in {update['path']}" if "path" in update else ""
            raise ValueError(f"the weights{where} could not be taken ({' '.join(str(error).split())[:300]})") from error
        finally:
            await engine.resume_generation()

    async def reset(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        await body_of(receive)
        await emptied(scope["app"].state.engine_client)
        await answer(send, 200, {})


def ways(version: str) -> list[str]:
    """How weights may come to a vLLM of this version: before 0.32 by files alone."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return ["files", "gloo", "nccl", "ipc"] if (major, minor) >= (0, 32) else ["files"]


async def finished(engine: Any, version: str) -> None:
    """End a weight update under a version; before 0.32 tokens carried none."""
    try:
        await engine.finish_weight_update(version)
    except TypeError:
        await engine.finish_weight_update()


async def emptied(engine: Any, running: bool = False) -> None:
    """Forget the prefix cache, and keys and values of requests that are `running`; what was just broken off may hold blocks for a moment."""
    for _ in range(100):
        if await engine.reset_prefix_cache(reset_running_requests=running):
            return
        await asyncio.sleep(0.05)
    raise RuntimeError("the prefix cache could not be emptied: requests hold it")


def is_here(client: Any) -> bool:
    """Whether a peer is this machine; one without an address came by a socket of the file system."""
    try:
        return client is None or ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


async def gone(receive: Any, left: asyncio.Event) -> None:
    """Set `left` once the caller has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    left.set()


async def body_of(receive: Any) -> bytes:
    """All of a call's body."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def answer(send: Any, status: int, content: dict[str, Any]) -> None:
    """A JSON object."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


