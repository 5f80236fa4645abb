"""A process in another environment that is asked by lines of JSON and answers by them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ramulus.native.memory import LARGE_PAGES


class Piped:
    """The process of a command, `name` in errors; `extra` is added to its environment, without our large pages. Its first line is `hello`."""

    def __init__(self, name: str, command: Sequence[str | Path], threads: int, extra: Mapping[str, str]) -> None:
        usual = {name: value for name, value in os.environ.items() if name != LARGE_PAGES}
        environment = usual | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | extra
        self.name, self.log = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment, text=True, bufsize=1
        )
        self.hello = self.answer()

    def asked(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Send a line, and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line; RuntimeError with the end of its log where it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}:\n{self.log.read()[-3000:]}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()
