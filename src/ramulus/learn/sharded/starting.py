"""Processes started on this machine to hold a model together, and what each of them does."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import socket
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ramulus.learn.sharded.calls import obey
from ramulus.learn.sharded.world import World, meet

LOOPBACK = {"linux": "lo", "darwin": "lo0"}
_KNOCK = 20.0  # seconds in which the port of rank 0, which listens by then, must answer


def start_ranks(size: int, seconds: float) -> World:
    """A group of processes on this machine, this one as rank 0; they meet in a folder that nobody else reads, and talk on the loopback device."""
    folder = Path(tempfile.mkdtemp(prefix="ramulus-ranks-"))
    former = os.environ.get("GLOO_SOCKET_IFNAME")
    if former is None and sys.platform in LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    context, processes = multiprocessing.get_context("spawn"), []
    try:
        for rank in range(1, size):
            processes.append(context.Process(target=_begin, args=(str(folder / "store"), rank, size, seconds), daemon=True))
            processes[-1].start()
        world = meet(0, size, size, seconds, store=dist.FileStore(str(folder / "store"), size))
    finally:
        if former is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)
    world.processes, world.folder = processes, folder
    return world


def _begin(store: str, rank: int, size: int, seconds: float) -> None:
    """A rank that rank 0 has started."""
    serve_rank(meet(rank, size, size, seconds, store=dist.FileStore(store, size)))


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
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides what a signal ends, and saves before
        signal.signal(number, signal.SIG_IGN)
    obey(world)
