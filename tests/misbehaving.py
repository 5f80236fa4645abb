"""A server that speaks the protocol of the vLLM plug-in, samples from a formula, and misbehaves as it is told."""

from __future__ import annotations

import json
import math
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from ramulus.engine.rng import mix, uniform

VOCABULARY, LIMIT = 18, 256
Fault = Callable[["Handler", list[dict[str, Any]]], bool]
"""Given the lines of an answer, may change them, or answers itself and says so."""


class Misbehaving(ThreadingHTTPServer):
    """`faults`: what happens to the next calls of generate, one after the other; the last one for ever where `always`. `loading`: is asked before
    weights are taken, by their version, and may refuse them in a sentence."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.instance, self.loaded, self.version = secrets.token_hex(4), "", 0
        self.faults: list[Fault] = []
        self.always, self.calls, self.loads = False, 0, 0
        self.greeting: dict[str, Any] = {}
        self.loading: Callable[[int], str | None] = lambda version: None
        self.connections: list[Any] = []

    def get_request(self) -> Any:
        request = super().get_request()
        self.connections.append(request[0])
        return request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def hello(self) -> dict[str, Any]:
        return {
            "protocol": 1, "vllm": "0.32.0", "instance": self.instance, "loaded": self.loaded, "version": self.version, "vocabulary": VOCABULARY,
            "limit": LIMIT, "rules": True, "logprobs": "processed_logprobs", "transfer": "ramulus",
        } | self.greeting  # fmt: skip

    def sampled(self, prefix: list[int], call: dict[str, Any]) -> dict[str, Any]:
        """Tokens by the seed, the text and the version of the weights."""
        how, tokens = call["sampling_params"], list[int]()
        while len(tokens) < how["max_tokens"] and not (tokens and tokens[-1] in how["stop_token_ids"]):
            state = mix(how["seed"] + 31 * sum(prefix) + 7 * len(prefix) + 1000 * self.version)
            tokens.append(int(uniform(state, len(tokens)) * VOCABULARY))
        content = [{"token_id": token, "logprob": -math.log(2 + token)} for token in tokens]
        span = {"version": str(self.version), "start": 0, "end": len(tokens)}
        choice = {"token_ids": tokens, "finish_reason": "stop", "logprobs": {"content": content}, "weight_versions": [span]}
        return {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    """One call."""

    server: Misbehaving
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.say(200, self.server.hello())

    def do_POST(self) -> None:
        server, content = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])) or "{}")
        if self.path.endswith("/load"):
            server.loads += 1
            if refusal := server.loading(content["version"]):
                self.say(400, {"kind": "ValueError", "error": refusal})
                return
            server.loaded, server.version = content["name"], content["version"]
            self.say(200, server.hello())
        elif self.path.endswith("/generate"):
            server.calls += 1
            if (content["instance"], content["loaded"]) != (server.instance, server.loaded):
                self.say(409, {"kind": "LookupError", "error": "not here"})
                return
            answers = [server.sampled(content["prefixes"][call["prefix"]], call) for call in content["requests"]]
            lines = [{"index": i, "status": 200, "answer": answer} for i, answer in enumerate(answers)]
            fault = server.faults[0] if server.faults else None
            if fault is not None and not server.always:
                server.faults.pop(0)
            if fault is None or not fault(self, lines):
                self.tell(lines)
        else:
            self.say(200, {})

    def say(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def tell(self, lines: list[Any], whole: bool = True) -> None:
        """Lines of an answer; unless `whole`, the connection ends in the middle of it."""
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for line in lines:
            text = (line if isinstance(line, str) else json.dumps(line)).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
        if whole:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


def changed(change: Callable[[dict[str, Any]], Any]) -> Fault:
    """A fault in what the last line says."""

    def fault(handler: Handler, lines: list[dict[str, Any]]) -> bool:
        change(lines[-1]["answer"]["choices"][0])
        return False

    return fault


def half(handler: Handler, lines: list[dict[str, Any]]) -> bool:
    """The connection is lost before the last line."""
    handler.tell(lines[:-1], whole=False)
    return True


def short(handler: Handler, lines: list[dict[str, Any]]) -> bool:
    """A line is missing."""
    del lines[-1]
    return False


def twice(handler: Handler, lines: list[dict[str, Any]]) -> bool:
    """A request is answered twice."""
    lines.insert(0, lines[0])
    return False


def garbage(handler: Handler, lines: list[Any]) -> bool:
    """A line that is none."""
    lines[-1] = '{"index": 1, "stat'
    return False


def died(handler: Handler, lines: list[Any]) -> bool:
    """The engine fails below a request."""
    lines[-1] = {"index": len(lines) - 1, "status": 500, "answer": {"error": {"message": "EngineDeadError"}}}
    return False


def failed(handler: Handler, lines: list[Any]) -> bool:
    """All of it fails."""
    handler.say(500, {"kind": "RuntimeError", "error": "out of memory"})
    return True


def hung(handler: Handler, lines: list[Any]) -> bool:
    """No answer for a while."""
    time.sleep(3)
    return True


FAULTS: dict[str, tuple[Fault, str]] = {
    "NaN": (changed(lambda c: c["logprobs"]["content"][0].update(logprob=math.nan)), "no numbers"),
    "NaN as vLLM writes it": (changed(lambda c: c["logprobs"]["content"][0].update(logprob=-9999.0)), "no numbers"),
    "null": (changed(lambda c: c["logprobs"]["content"][0].update(logprob=None)), "no numbers"),
    "too few log-probs": (changed(lambda c: c["logprobs"]["content"].pop()), "log-probs"),
    "too many tokens": (changed(lambda c: c["token_ids"].append(3)), "log-probs"),
    "no tokens": (changed(lambda c: (c["token_ids"].clear(), c["logprobs"]["content"].clear())), "0 tokens"),
    "other versions": (changed(lambda c: c["weight_versions"][0].update(end=99)), "versions of other tokens"),
    "no log-probs": (changed(lambda c: c.pop("logprobs")), "no answer"),
    "half": (half, "is lost"),
    "short": (short, "unanswered"),
    "twice": (twice, "answered before"),
    "garbage": (garbage, "no line of an answer"),
    "engine died": (died, "EngineDeadError"),
    "failed": (failed, "out of memory"),
    "hung": (hung, "answered nothing for"),
}


@contextmanager
def misbehaving(count: int = 1) -> Iterator[list[Misbehaving]]:
    """Servers that run."""
    servers = [started(Misbehaving()) for _ in range(count)]
    yield servers
    for server in servers:
        stopped(server)


def started(server: Misbehaving) -> Misbehaving:
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


def stopped(server: Misbehaving) -> None:
    server.shutdown()
    server.server_close()
    for connection in server.connections:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
