"""Engine servers for tests: `ramulus serve` in a process of its own, which can be killed, stopped and started again at the same address."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ramulus.engine.remote.client import RemoteEngine

TOKEN = "a token of the tests"
ENVIRONMENT = {"RAMULUS_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}


@dataclass
class Server:
    """One server process after another at one address."""

    model: str
    options: Sequence[str] = ()
    port: int = 0
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        words = ["serve", self.model, "--port", str(self.port), "--threads", "1", *self.options]
        command = [sys.executable, "-c", "from ramulus.cli import main; main()", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | ENVIRONMENT, text=True)
        assert self.process.stdout is not None
        self.port = int(re.search(r"http://127.0.0.1:(\d+)/", self.process.stdout.readline())[1])  # type: ignore[index]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process; SIGKILL is waited for."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.communicate()

    def engine(self, token: str = TOKEN, timeout: float = 60.0, reconnect: float = 30.0) -> RemoteEngine:
        return RemoteEngine(self.url, token, timeout, reconnect)


@contextmanager
def served(model: str, *options: str) -> Iterator[Server]:
    """A server that is killed at the end."""
    server = Server(model, options)
    server.start()
    try:
        yield server
    finally:
        server.signal(signal.SIGKILL)
