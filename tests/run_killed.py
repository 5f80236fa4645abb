"""Train in a process of its own that kills itself, as SIGKILL does, at a chosen moment: `python run_killed.py MOMENT NUMBER RECIPE ...`.

The shipped code runs unchanged up to the moment; only then does this file step in.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from rich.console import Console

from ramulus.engine.local.local_engine import LocalEngine
from ramulus.learn.policy import in_process
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.run import checkpoint
from ramulus.run.launch import launch
from ramulus.run.logbook import Logbook


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(tensors: Any, path: Any) -> None:
    path.write_bytes(b"half of what was to be written")
    die()


def half_a_line(self: Logbook, step: int, metrics: Any) -> None:
    self.file.write(b'{"step": 4, "rew')
    self.file.flush()
    die()


MOMENTS = {  # name -> (owner, attribute, what stands in at the moment)
    "growing": (LocalEngine, "sample", die),
    "updating": (TorchPolicy, "update", die),
    "metrics": (Logbook, "write", half_a_line),
    "checkpoint": (in_process, "save_file", half_a_file),
    "renaming": (checkpoint.os, "replace", die),
    "pruning": (checkpoint, "drop_old", die),
}


def arm(moment: str, number: int) -> None:
    """Let the call with this number, from 1, be the last one."""
    owner, name, end = MOMENTS[moment]
    real, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (end if calls == number else real)(*args, **kwargs)

    setattr(owner, name, counted)


if __name__ == "__main__":
    moment, number, recipe, *overrides = sys.argv[1:]
    arm(moment, int(number))
    launch(recipe, overrides, True, False, Console())
