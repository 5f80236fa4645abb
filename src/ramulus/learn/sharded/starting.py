"""Processes started on this machine to hold a model together, and what each of them does."""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import socket
import sys
import tempfile
import threading
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ramulus.learn.policy.children import begin_child, end_child, ignore_signals
from ramulus.learn.sharded.calls import obey
from ramulus.learn.sharded.world import World, gather_round, meet, variable_set

LOOPBACK = {"linux": "lo", "darwin": "lo0"}
_KNOCK = 20.0  # seconds in which the port of rank 0, which listens by then, must answer


def start_ranks(size: int, seconds: float) -> World:
    """A group of processes on this machine, this one as rank 0; they meet in a folder that nobody else reads, and talk on the loopback device.

    ConnectionError where one ends while it starts.
    """
    folder = Path(tempfile.mkdtemp(prefix="ramulus-ranks-"))
    interface = LOOPBACK.get(sys.platform, "") if "GLOO_SOCKET_IFNAME" not in os.environ else ""
    context, processes = multiprocessing.get_context("spawn"), []
    try:
        with variable_set("GLOO_SOCKET_IFNAME", interface):
            for rank in range(1, size):
                process = context.Process(target=_begin, args=(str(folder / "store"), rank, size, seconds), daemon=True)
                begin_child(process)
                processes.append(process)
        world = gather_round(processes, dist.FileStore(str(folder / "store"), size), size, seconds, seconds, "raise learner.timeout", interface)
    except BaseException:
        for process in processes:
            end_child(process)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    world.folder = folder
    return world


def _begin(path: str, rank: int, size: int, seconds: float) -> None:
    """A rank that rank 0 has started."""
    ignore_signals()
    joined = threading.Event()

    def end_with_rank_0() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        if not joined.is_set():  # from then on its connection says so
            os._exit(1)

    threading.Thread(target=end_with_rank_0, daemon=True).start()
    store = dist.FileStore(path, size)
    store.set(f"here-{rank}", "")
    world = meet(rank, size, size, seconds, store=dist.PrefixStore("ranks", store))
    joined.set()
    serve_rank(world)


def serve_at(rank: int, host: str, port: int, size: int, local: int, seconds: float, interface: str = "") -> None:
    """A rank that somebody has started elsewhere; all meet at rank 0's store. `interface`: of gloo, "" leaves it."""
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        socket.create_connection((host, port), _KNOCK).close()
    except OSError as error:  # torch would try for as long as ranks wait for each other
        raise ConnectionError(
            f"{platform.node()} does not reach rank 0 at {host}:{port} ({error.strerror or error}): open the ports between the machines, or name the "
            "right network in GLOO_SOCKET_IFNAME"
        ) from error
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))
    store.set(f"here-{rank}", "")
    serve_rank(meet(rank, size, local, seconds, store=dist.PrefixStore("ranks", store)))


def serve_rank(world: World) -> None:
    """Do what rank 0 tells, until it says that this was all; raises ConnectionError where it is lost."""
    ignore_signals()
    obey(world)
