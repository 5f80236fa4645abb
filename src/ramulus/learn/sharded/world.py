"""The processes that hold one model together: how they find each other, and how rank 0 tells the others what to do."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ramulus.learn.policy.children import carried, end_child

LONGEST_WAIT = timedelta(days=20)  # for which a rank waits to be told something: growing trees takes its time


@dataclass
class World:
    """This process among those that train one model."""

    rank: int
    size: int
    local: int  # ranks on this machine
    control: Any = field(repr=False)  # the process group of what is told
    seconds: float = 0.0  # for which ranks wait for each other; all but rank 0 wait longer to be told something
    processes: list[Any] = field(default_factory=list, repr=False)  # ranks that this one has started, from 1 on
    folder: Path | None = None  # where they met
    broken: bool = False  # a rank is lost, or in the middle of something

    def tell(self, name: str, parts: Sequence[Any]) -> None:
        """Have every rank called for something, each with its part; by rank 0. What cannot be pickled is raised before anything is sent."""
        messages = [carried((name, part)) for part in parts]
        self.broken = name not in ("end", "drop")  # until all have answered
        dist.scatter_object_list([None], messages, 0, self.control)

    def hear(self) -> tuple[str, Any]:
        """What this rank is told next."""
        heard: list[Any] = [None]
        dist.scatter_object_list(heard, None, 0, self.control)
        return pickle.loads(heard[0])  # type: ignore[no-any-return]

    def collect(self, answer: Any) -> list[Any]:
        """The answers of all ranks, at rank 0; elsewhere nothing. Raises torch's error where one is missing after `seconds`."""
        answers: list[Any] = [None] * self.size
        dist.gather_object(answer, answers if self.rank == 0 else None, 0, self.control)
        return answers if self.rank == 0 else []

    def wait_for_others(self, seconds: float, groups: Sequence[Any] = ()) -> None:
        """Have this rank wait for so long from now on, in other groups too; where torchrun made the world, no learner was known yet."""
        self.seconds = seconds
        for group in (dist.group.WORLD, *([self.control] if self.rank == 0 else []), *groups):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def lost(self, error: BaseException) -> str:
        """Which ranks that this one started have ended, or what else an error of the connection comes from, in words, with what to do."""
        for process in self.processes:
            process.join(0.5)
        ended = [f"rank {rank} ended with status {p.exitcode}" for rank, p in enumerate(self.processes, 1) if p.exitcode is not None]
        if not ended and any(word in str(error) for word in ("imed out", "imeout")):
            return f"a rank has not answered within {self.seconds:g} s: look whether it hangs, or raise learner.timeout"
        return f"{' and '.join(ended) or 'a rank was lost'}: its own message stands above"

    def leave(self) -> None:
        """End the ranks that this one has started, and the group."""
        for process in self.processes:
            end_child(process)
        leave_group()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


STANDING: list[World] = []
"""The world that torchrun made, if this process is of one."""


def meet(rank: int, size: int, local: int, seconds: float, **where: Any) -> World:
    """Join the group; `where` is how torch's processes find each other."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % min(local, torch.cuda.device_count()))  # a rank may see its own alone
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=seconds), **where)
    control = dist.new_group(backend="gloo", timeout=LONGEST_WAIT if rank > 0 else timedelta(seconds=seconds))
    return World(rank, size, local, control, seconds)


def leave_group() -> None:
    """Leave the process group, if this process is in one."""
    with suppress(Exception):
        dist.destroy_process_group()
    dist.distributed_c10d._world.group_count = 0  # by which ranks find each other's groups: one that came to nothing was counted, too


def gather_round(ranks: Sequence[Any], store: Any, local: int, seconds: float, patience: float, remedy: str, interface: str = "") -> World:
    """The world of this process, as rank 0, and of ranks that it has started, once all have come to the store and joined.

    `interface`: of gloo, "" leaves it. ConnectionError where one ends before, or has not come within `patience` seconds; then all are ended.
    """
    joined: list[World | BaseException] = []

    def join() -> None:
        try:
            joined.append(meet(0, len(ranks) + 1, local, seconds, store=dist.PrefixStore("ranks", store)))
        except BaseException as error:
            joined.append(error)

    meeting = threading.Thread(target=join, name="meeting", daemon=True)  # whose waiting nothing ends before its time
    try:
        wait_for(ranks, store, patience, remedy)
        with variable_set("GLOO_SOCKET_IFNAME", interface):
            meeting.start()
            while meeting.is_alive():
                meeting.join(0.05)
                check_all_there(ranks)
        if isinstance(joined[0], BaseException):
            raise joined[0]
    except BaseException:
        for process in ranks:
            end_child(process)
        leave_group()
        raise
    joined[0].processes = list(ranks)
    return joined[0]


def wait_for(ranks: Sequence[Any], store: Any, patience: float, remedy: str) -> None:
    """Until all ranks have come to the store. ConnectionError where one does not."""
    limit = time.monotonic() + patience
    while ranks and not store.check([f"here-{rank}" for rank in range(1, len(ranks) + 1)]):
        check_all_there(ranks, 0.05)
        if time.monotonic() > limit:
            raise ConnectionError(f"the ranks have not started within {patience:g} s: {remedy}")


def check_all_there(ranks: Sequence[Any], seconds: float = 0.0) -> None:
    """Raise ConnectionError for a rank that has ended; each is waited for so long."""
    for rank, process in enumerate(ranks, 1):
        process.join(seconds)
        if process.exitcode is not None:
            why = getattr(process, "why", "") or f"status {process.exitcode}; its own message, if it had one, stands above"
            raise ConnectionError(f"rank {rank} ended while it started: {why}")


@contextmanager
def variable_set(name: str, value: str) -> Iterator[None]:
    """A variable set meanwhile, unless it is to be empty."""
    if value:
        os.environ[name] = value
    try:
        yield
    finally:
        if value:
            os.environ.pop(name, None)
