"""The tiny run with a reward that hangs at its tenth call while a file called `hang` lies in the folder that HANG names."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from dataclasses import replace
from pathlib import Path as File

from ramulus.core.task import Path, Task
from ramulus.run.config.recipe import Run
from run_recipe import Digits, rl

CALLS = itertools.count(1)
FREE = threading.Event()  # ends what still hangs
share = Digits()


def hangs() -> bool:
    return next(CALLS) > 60 and (File(os.environ["HANG"]) / "hang").exists()


def plain(task: Task, path: Path) -> dict[str, float]:
    if hangs():
        FREE.wait()
    return share(task, path)


async def waits(task: Task, path: Path) -> dict[str, float]:
    if hangs():
        await asyncio.sleep(3600)
    return share(task, path)


async def blocks(task: Task, path: Path) -> dict[str, float]:
    if hangs():
        while not FREE.is_set():
            time.sleep(0.05)
    return share(task, path)


def leaves(task: Task, path: Path) -> dict[str, float]:
    if hangs():
        raise SystemExit(3)
    return share(task, path)


def with_plain() -> Run:
    return replace(rl(), rewards=plain)


def with_waits() -> Run:
    return replace(rl(), rewards=waits)


def with_blocks() -> Run:
    return replace(rl(), rewards=blocks)


def with_leaves() -> Run:
    return replace(rl(), rewards=leaves)
