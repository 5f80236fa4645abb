"""Messages between a process and its workers: four bytes of length, then that many bytes, within a size and a deadline."""

from __future__ import annotations

import socket
import struct
import time

LENGTH = struct.Struct("!I")
LARGEST_ANSWER = 2**20  # bytes that a worker may send


def send(line: socket.socket, message: bytes, deadline: float | None = None) -> None:
    """Send one message; raises TimeoutError at `deadline` (of time.monotonic), OSError where the other side is gone."""
    _set_deadline(line, deadline)
    line.sendall(LENGTH.pack(len(message)) + message)


def receive(line: socket.socket, most: int | None = None, deadline: float | None = None) -> bytes:
    """The next message; raises EOFError at the end, TimeoutError at `deadline`, ValueError for one of more than `most` bytes."""
    (length,) = LENGTH.unpack(_exactly(line, LENGTH.size, deadline))
    if most is not None and length > most:
        raise ValueError(f"{length} bytes are announced, at most {most} are taken")
    return _exactly(line, length, deadline)


def _exactly(line: socket.socket, count: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        _set_deadline(line, deadline)  # for every piece: a message that drips in must not take longer
        part = line.recv(min(count - len(parts), 2**16))
        if not part:
            raise EOFError("the other side closed the line")
        parts += part
    return bytes(parts)


def _set_deadline(line: socket.socket, deadline: float | None) -> None:
    line.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
