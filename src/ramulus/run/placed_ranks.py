"""Ranks of a learner over many processes that somebody starts for rank 0, wherever they are."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ramulus.learn.sharded.starting import LOOPBACK
from ramulus.learn.sharded.world import World, gather_round
from ramulus.models.errors import sentence
from ramulus.native.meeting import store_on

INSTALL = "install there what this machine has, or see to it that PYTHONPATH leads to it there"


@dataclass
class PlacedRank:
    """A rank as `World` sees the processes that it started."""

    ray: Any
    actor: Any
    served: Any  # of its whole life
    exitcode: int | str | None = None
    why: str = ""

    def join(self, seconds: float = 5.0) -> None:
        """Wait for its end, for a while."""
        ray = self.ray
        if self.exitcode is None and ray.wait([self.served], timeout=seconds)[0]:
            try:
                ray.get(self.served)
                self.exitcode = 0
            except ray.exceptions.RayTaskError as error:
                self.exitcode, self.why = 1, line_of(error.cause if isinstance(error.cause, Exception) else error)
            except ray.exceptions.RayError as error:
                self.exitcode, self.why = "unknown (its process is gone)", end_of(error)

    def kill(self) -> None:
        """End it at once."""
        with suppress(Exception):
            self.ray.kill(self.actor)


def led(start: Callable[..., PlacedRank], size: int, local: int, host: str, alone: bool, seconds: float, patience: float) -> World:
    """The world of so many ranks, `local` of them on a machine; this process is rank 0, and they find it at `host`.

    `start`: has a rank serve at a store. `alone`: all are on this machine, and talk on its loopback device. ConnectionError where one does not come.
    """
    interface = LOOPBACK.get(sys.platform, "") if alone and "GLOO_SOCKET_IFNAME" not in os.environ else ""
    port, store = store_on(host, seconds)
    ranks: list[PlacedRank] = []
    try:
        for rank in range(1, size):
            ranks.append(start(rank, host, port, size, local, seconds, interface))
        return gather_round(ranks, store, local, seconds, patience, "raise cluster.patience, or look at the cluster", interface)
    except BaseException:
        for placed in ranks:
            placed.kill()
        raise


def line_of(error: BaseException) -> str:
    """The first sentence of an error."""
    return sentence(error).partition(". ")[0].rstrip(".")


def end_of(error: Any) -> str:
    """Why a process of Ray's has ended, in a sentence, from Ray's error."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    where = f" on {host_of(error)}" if host_of(error) else ""
    if getattr(error, "actor_init_failed", False):  # a traceback of there, whose last line is the cause
        return f"its process{where} says {lines[-1]}: {INSTALL}"
    if "running low on memory" in str(error):
        return f"Ray killed its process{where} because the machine's memory was nearly used up: lower engine.memory_mb or what else runs there"
    if "SYSTEM_ERROR" in str(error):
        return f"its process{where} ended without a word: killed, as by the system when memory is used up, or crashed; Ray's logs there say more"
    return line_of(error)


def host_of(error: BaseException) -> str:
    """The address of the machine that an error of Ray's came from, "" where it does not say."""
    match = re.search(r"\bip[=:] ?([\w.:]*\w)", str(error))
    return match[1] if match else ""
