"""A process that has imported everything and forks one child a run, which kills itself, as SIGKILL does, at a chosen tick of its work.

A tick is a call of the engine, a pass or an update of the learner, a row of metrics, or anything done to a file of the run.
`python run_kill_server.py`, then a line of JSON for each run on standard input; the answers come on standard output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

import run_small
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.learn.policy import in_process
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.run import train_stage
from ramulus.run.launch import launch
from ramulus.run.logbook import Logbook

FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
CALLS: tuple[tuple[Any, str], ...] = (
    (LocalEngine, "sample"), (TorchPolicy, "score"), (TorchPolicy, "accumulate"), (TorchPolicy, "update"),
    (Logbook, "write"), (in_process, "save_file"), (os, "fsync"),
)  # fmt: skip


class Ticks:
    """Counts from the moment when a run looks for its last checkpoint."""

    def __init__(self, folder: str, last: int) -> None:
        self.folder, self.last, self.count, self.on = folder, last, 0, False
        real = train_stage.restore
        train_stage.restore = lambda *rest: self.begin() or real(*rest)  # type: ignore[assignment, func-returns-value]
        for owner, name in CALLS:
            setattr(owner, name, self.counted(getattr(owner, name)))
        sys.addaudithook(self.heard)

    def begin(self) -> None:
        self.on = True

    def tick(self) -> None:
        self.count += self.on
        if self.count == self.last and self.on:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def ticking(*arguments: Any, **named: Any) -> Any:
            self.tick()
            return call(*arguments, **named)

        return ticking

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in FILES and str(arguments[0]).startswith(self.folder):
            self.tick()


def child(ask: dict[str, Any], answer: int) -> None:
    """One run, in a process of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    ticks = Ticks(ask["out"], ask["kill_at"])
    status = launch(ask["recipe"], [f"out={ask['out']}", *ask["overrides"]], True, False, Console(quiet=True))
    os.write(answer, json.dumps({"status": status, "ticks": ticks.count}).encode())


def main() -> None:
    run_small.FIRST.model()  # what it takes is imported once
    print("ready", flush=True)
    for line in sys.stdin:
        read, write = os.pipe()
        number = os.fork()
        if not number:
            try:
                child(json.loads(line), write)
                os._exit(0)
            except BaseException as error:
                os.write(write, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
                os._exit(1)
        os.close(write)
        said = os.read(read, 1 << 16)
        os.close(read)
        _, status = os.waitpid(number, 0)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status)} | json.loads(said or b"{}")), flush=True)


if __name__ == "__main__":
    main()
