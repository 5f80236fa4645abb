"""Rewards that the guard tests send to worker processes; they live in a module of their own so that they can be pickled."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
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


def unpicklable(task: Task, path: Path) -> Any:
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
