"""A vLLM server that the run starts itself, at this machine's own address, and ends with itself."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MILD = ("INFO ", "WARNING ", "Warning: ")  # of lines that do not
WORDS = ("error", "exception", "no module")  # what a line of a log says that tells why


@dataclass
class Process:
    """One server process after another at one address: `python -m ramulus_vllm.serve` of the environment that has vLLM."""

    python: str
    model: Path  # a folder with config.json; the weights come later
    options: Sequence[str]
    log: Path
    threads: int | None = None
    patience: float = 600.0  # seconds that it may take to start
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    port: int = 0
    running: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to start it; `wait` until it answers. Its standard input is ours: it ends when we do, however that happens."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        words = [self.python, "-m", "ramulus_vllm.serve", str(self.model), "--port", str(self.port), *self.options]
        left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RAMULUS_TOKEN", "VLLM_SERVER_DEV_MODE", "LD_PRELOAD")
        environment = {name: value for name, value in os.environ.items() if name not in left_out}
        environment |= {"VLLM_API_KEY": self.key, "RAMULUS_TIED": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        with self.log.open("ab") as log:
            log.truncate(0)
            self.running = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True)

    def wait(self, answers: Callable[[], bool]) -> None:
        """Until it `answers`. RuntimeError, with what its log says, where it ends instead or takes too long."""
        end = time.monotonic() + self.patience
        while self.running is not None and not answers():
            if self.running.poll() is not None:
                raise RuntimeError(f"the vLLM server ended while it started: {self.reason()}")
            if time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"the vLLM server has not started within {self.patience:g} s: {self.reason()}")
            time.sleep(0.1)

    def reason(self) -> str:
        """The line of its log that says why, and where the log is."""
        with suppress(OSError):
            lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            grave = [line for line in lines if not any(level in line for level in MILD)]
            telling = [line for line in grave if any(word in line.lower() for word in WORDS)] or lines
            if telling:
                return f"{telling[-1].rpartition(') ')[2][:300]} (all of it: {self.log})"
        return f"it wrote nothing to {self.log}"

    def stop(self) -> None:
        """End it and all processes of its own, at once: it keeps nothing that is needed."""
        if self.running is None:
            return
        with suppress(OSError):
            os.killpg(self.running.pid, signal.SIGKILL)
        self.running.wait()
        if self.running.stdin is not None:
            with suppress(OSError):
                self.running.stdin.close()
        self.running = None
