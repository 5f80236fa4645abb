"""`ramulus view`: runs and trees in the browser, served on this machine or written as one file."""

from __future__ import annotations

import json
import re
import socket
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from ramulus.engine.remote.listen import bind, is_address, is_loopback, listener
from ramulus.look.viewer.api import Api, BadParameter, Unknown
from ramulus.look.viewer.page import ASSETS, KINDS, assets, step_numbers, write_page
from ramulus.look.viewer.runs import Shelf

LOCAL = ("localhost", "127.0.0.1", "[::1]")
POLICY = "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::([0-9]+))?")


class Hosts:
    """The Host headers that are answered: a page of another name must not read what is served here (DNS rebinding).

    This machine's own names are answered with any port, since a forwarded one differs (ssh -L); others with that of the server.
    """

    def __init__(self, host: str, port: int) -> None:
        self.port, self.anywhere = port, host in ("0.0.0.0", "::")
        self.names = {f"[{host}]" if ":" in host else host.lower()}
        if self.anywhere:  # reached by the machine's name and addresses; an address is nobody else's name
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def __contains__(self, header: str) -> bool:
        match = HOST.fullmatch(header.lower())
        if match is None:
            return False
        name, port = match[1], int((match[2] or "80")[:6])
        known = name in self.names or (self.anywhere and is_address(name.strip("[]")))
        return name in LOCAL or (known and port == self.port)


def guard(app: Any, hosts: Hosts) -> Any:
    """The app behind its rules: known hosts, GET and HEAD only, the same security headers on every answer."""
    from starlette.datastructures import Headers, MutableHeaders

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def headed(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        names = Headers(scope=scope).getlist("host")
        if len(names) != 1 or names[0] not in hosts:
            answer: Any = refusal(400, "this Host is not served here: open the address that `ramulus view` printed")
        elif scope["method"] not in ("GET", "HEAD"):
            answer = refusal(405, "only GET and HEAD are answered", {"allow": "GET, HEAD"})
        else:
            answer = app
        await answer(scope, receive, headed)

    return guarded


def refusal(status: int, text: str, headers: dict[str, str] | None = None) -> Any:
    """An answer with this status and its reason as JSON, which no browser keeps."""
    from starlette.responses import Response

    content = json.dumps({"error": text}).encode()
    return Response(content, status, {"cache-control": "no-store"} | (headers or {}), "application/json")


def application(api: Api, hosts: Hosts) -> Any:
    """The web application; routes without `async` run in threads, so that a long answer holds up no other."""
    from starlette.applications import Starlette
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.responses import Response
    from starlette.routing import Route

    def ask(request: Any) -> Any:
        try:
            answer = api(request.path_params["name"], dict(request.query_params))
        except BadParameter as error:
            return refusal(400, str(error))
        except Unknown as error:
            return refusal(404, str(error))
        return Response(answer, 200, {"cache-control": "no-store"}, "application/json")

    def asset(request: Any) -> Any:
        path = assets().get(request.path_params.get("name", "viewer.html"))
        if path is None:
            return refusal(404, "there is no such page")
        return Response(path.read_bytes(), 200, {"cache-control": "no-cache"}, KINDS[path.suffix])

    async def nothing(request: Any, error: Exception) -> Any:
        return refusal(404, "there is no such page")

    async def failed(request: Any, error: Exception) -> Any:
        return refusal(500, f"{type(error).__name__}: {error}")

    routes = [Route("/", asset), Route("/assets/{name}", asset), Route("/api/{name}", ask)]
    app = Starlette(routes=routes, exception_handlers={404: nothing, Exception: failed})
    app.add_middleware(GZipMiddleware, minimum_size=4096, compresslevel=3)
    return guard(app, hosts)


def server(api: Api, host: str, bound: socket.socket, ready: Callable[[str], None]) -> Any:
    """A uvicorn server of the viewer on a bound socket; `ready` is told the address once it answers."""
    return listener(lambda: application(api, Hosts(host, bound.getsockname()[1])), host, bound, ready, "viewer")


def view(
    runs: Sequence[Path],
    host: str,
    port: int,
    tokenizer: Path | None,
    show: bool,
    out: Path | None,
    steps: str,
    console: Console,
) -> int:
    """Serve the runs until Ctrl-C, or write them into one file; returns the exit status."""
    if not (ASSETS / "viewer.html").is_file():
        raise FileNotFoundError(f"the viewer's page is missing at {ASSETS}: install ramulus again")
    api = Api(Shelf(runs, tokenizer))
    if out is not None:
        write_page(api, out, step_numbers(steps), console)
        return 0
    if steps:
        raise ValueError(f"--steps={steps} chooses what goes into a file: add --out page.html")

    def ready(address: str) -> None:
        count = len(api.shelf.entries)
        console.out(f"{count} {'run' if count == 1 else 'runs'} at {address} (Ctrl-C ends it)", highlight=False)
        if not is_loopback(host):
            console.print(
                "whoever reaches this port can read the runs: there is no password", style="yellow", highlight=False
            )
        if show:
            webbrowser.open(address)

    with bind(host, port) as bound, suppress(KeyboardInterrupt):  # how it ends
        server(api, host, bound, ready).run(sockets=[bound])
    return 0
