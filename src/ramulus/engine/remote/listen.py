"""A web application at an address of this machine, by uvicorn."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

OPTIONS: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False, "lifespan": "off"}


def is_address(name: str) -> bool:
    """Whether this is an IP address and no name."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a server that listens there."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address; OSError names it and the remedy."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, so that asyncio turns Nagle's waiting off: 40 ms a call
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:  # the latter for a port that is no port
        bound.close()
        remedy = "leave --port out for a free one, or check --host"
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot serve at {host} port {port}: {reason}; {remedy}") from error
    return bound


def listener(
    application: Callable[[], Any], host: str, bound: socket.socket, ready: Callable[[str], None], extra: str, **options: Any
) -> Any:
    """A uvicorn server of an application on a bound socket; `ready` is told the address once it answers. ImportError names the extra."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(f'serving needs Starlette and uvicorn: pip install "ramulus[{extra}]"') from error
    options |= {"http": _timed()}
    port = bound.getsockname()[1]
    name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            ready(f"http://{name}:{port}/")

    return Server(uvicorn.Config(application(), timeout_graceful_shutdown=2, **OPTIONS | options))


TICK = 2.5  # seconds between two looks at a connection
IDLE, UNREAD = 4, 24  # looks after which one that asks nothing, or takes nothing of its answer, is closed


def _timed() -> Any:
    """uvicorn's protocol with an end to connections on which nothing happens: half a request, or an answer that nobody takes."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Timed(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.last: Any = None
            self.looks = 0
            self.look()

        def look(self) -> None:
            if self.transport.is_closing():
                return
            busy, unsent = self.cycle is not None and not self.cycle.response_complete, self.transport.get_write_buffer_size()
            now = (self.cycle, busy, unsent)
            self.looks = self.looks + 1 if now == self.last and (unsent or not busy) else 0
            self.last = now
            if self.looks >= (UNREAD if busy else IDLE):
                self.transport.abort()
            else:
                self.loop.call_later(TICK, self.look)

    return Timed
