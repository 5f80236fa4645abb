"""Rewards that the guard tests send to worker processes; they live in a module of their own so that they can be pickled."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ramulus.core.task import Path, Task


def length(task: Task, path: Path) -> float:
    return float(len(path.text))


async def slow_length(task: Task, path: Path) -> float:
    await asyncio.sleep(0.01)
    return float(len(path.text))


@dataclass(frozen=True)
class Parts:
    scale: float = 1.0

    def __call__(self, task: Task, path: Path) -> dict[str, Any]:
        print("what a reward prints must not disturb the answer")
        return {"reward": self.scale * (path.text == task.answer), "correct": float(path.text == task.answer)}


def spin(task: Task, path: Path) -> float:
    while path.text == "spin":
        pass
    return 1.0


def power(task: Task, path: Path) -> float:
    return float(9**9 ** int(path.text) % 7)  # for 9 one call into C that computes for hours


def sleep(task: Task, path: Path) -> float:
    time.sleep(float(path.text))
    return 1.0


def stubborn(task: Task, path: Path) -> float:
    """Ignores every signal that can be ignored."""
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGPROF, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def leave(task: Task, path: Path) -> float:
    os._exit(3)


def crash(task: Task, path: Path) -> float:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0.0


def hoard(task: Task, path: Path) -> float:
    return float(len(bytearray(3 * 2**30)))


def wrong_type(task: Task, path: Path) -> float:
    return 1.0 + path.text  # type: ignore[operator,no-any-return]


def quit(task: Task, path: Path) -> float:
    sys.exit(1)


def no_json(task: Task, path: Path) -> Any:
    return lambda: 1


def process(task: Task, path: Path) -> float:
    return float(os.getpid())


def spawn_and_spin(task: Task, path: Path) -> float:
    """Leaves the id of a child process in the file named by the response."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(path.text, "w") as file:
        file.write(str(child.pid))
    while True:
        pass


def square(n: int) -> int:
    return n * n


def loaded() -> list[str]:
    return sorted(sys.modules)


class Mark:
    """Unpickling it leaves a file: proof that whoever unpickled it ran code."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (self.file,)


def line_to_parent() -> socket.socket:
    """The worker's own line, as code that took the worker over would find it."""
    frame = sys._getframe()
    while "pipe" not in frame.f_locals:
        frame = frame.f_back  # type: ignore[assignment]
    return frame.f_locals["pipe"]  # type: ignore[no-any-return]


def forge(kind: str, file: str) -> float:
    """Answer in the worker's place with what is no answer, then hang."""
    pickled = pickle.dumps((Mark(file), None, None))
    caused = json.dumps({"failure": "f", "cause": "hacked"}).encode()
    frames = {
        "pickle": struct.pack("!I", len(pickled)) + pickled,
        "no JSON": struct.pack("!I", 3) + b"{]}",
        "no ASCII": struct.pack("!I", 3) + b'"\xff"',
        "deep": struct.pack("!I", 200_000) + b"[" * 200_000,
        "long number": struct.pack("!I", 10_010) + b'{"value":' + b"9" * 10_000 + b"}",
        "shape": struct.pack("!I", 8) + b"[1,2,3] ",
        "more": struct.pack("!I", 22) + b'{"value":1,"cause":"x"',
        "cause": struct.pack("!I", len(caused)) + caused,
        "huge": struct.pack("!I", 2**32 - 1) + b"x" * 10,
        "bytes": pickled,
        "half": struct.pack("!I", 1000) + b'{"value":',
    }
    line_to_parent().sendall(frames[kind])
    time.sleep(60)
    return 1.0


def drip(n: int) -> float:
    """A byte every tenth of a second."""
    line = line_to_parent()
    line.sendall(struct.pack("!I", 1000))
    for _ in range(n):
        line.sendall(b" ")
        time.sleep(0.1)
    return 1.0


def forge_ready(n: int) -> float:
    """Answer twice: the second one is there before the next call asks."""
    line_to_parent().sendall(struct.pack("!I", 11) + b'{"value":1}')
    return 2.0


def long_text(n: int) -> str:
    return "x" * n


def numbers() -> Any:
    return {"reward": Fraction(1, 2), "parts": (1, 2.5, True, None), "text": "\ud800 \u00e9"}


def surroundings() -> dict[str, Any]:
    """What the process sees and may do."""
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=0.2)
        reached = "connected"
    except OSError as error:
        reached = type(error).__name__
    return {"names": sorted(os.environ), "listing": os.listdir("."), "home": os.path.expanduser("~"), "folder": os.getcwd(), "reached": reached}


def dial(port: int) -> str:
    """Try to reach a server of the parent's."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return "reached"
    except OSError as error:
        return type(error).__name__


def write_much(n: int) -> int:
    """Write `n` bytes into a file of the working folder."""
    with open("file", "wb") as file:
        for _ in range(n // 2**20):
            file.write(b"x" * 2**20)
        file.flush()
    return os.path.getsize("file")


def open_many(n: int) -> int:
    """Open `n` files at once."""
    held = [open(os.devnull) for _ in range(n)]  # noqa: SIM115
    return len(held)


def hide_child(file: str) -> float:
    """Leave a process in a session of its own, and hang."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    with open(file, "w") as note:
        note.write(str(child.pid))
    while True:
        pass


def note_and_answer(file: str, n: int) -> int:
    """Leave a line in a file for every time that this really runs."""
    with open(file, "a") as lines:
        lines.write(f"{n}\n")
    return n


def die_once(file: str, number: int) -> float:
    """Die by a signal, as if somebody had sent it, but not where that was done before."""
    if not os.path.exists(file):
        with open(file, "w"):
            pass
        os.kill(os.getpid(), number)
        time.sleep(5)
    return 1.0
