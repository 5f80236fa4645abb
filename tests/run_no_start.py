"""A recipe whose sampler ends while it starts: its engine is as the environment says."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from typing import Any

import run_small
from ramulus.run.config.recipe import Run


@dataclass(frozen=True)
class Never:
    """An engine that cannot be made."""

    way: str = "killed"  # or: import, memory

    def __call__(self, model: Any, decode: Any = None) -> Any:
        if self.way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.way == "memory":
            return bytearray(2**50)
        import nowhere_to_be_found  # noqa: F401


def killed() -> Run:
    return replace(run_small.grpo(), steps=1, engine=Never())


def missing() -> Run:
    return replace(run_small.grpo(), steps=1, engine=Never("import"))


def memory() -> Run:
    return replace(run_small.grpo(), steps=1, engine=Never("memory"))
