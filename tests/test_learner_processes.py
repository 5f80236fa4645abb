"""Processes of a learner's: what ends them and what does not, and what is left of those that did not start."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from conformance.learners import Tiny, learner, run
from ramulus.learn.policy.children import UNHEARD, begin_child, end_child, portable
from ramulus.learn.policy.torch_learner import Torch
from ramulus.learn.sharded import starting
from ramulus.learn.sharded.factory import Sharded
from ramulus.learn.sharded.starting import start_ranks
from ramulus.learn.sharded.world import STANDING, gather_round
from ramulus.run.placed_ranks import led
from ramulus.run.stage import build_parts
from run_recipe import rl

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No ranks of other tests stand by, and folders of this one's lie in a place of their own."""
    for world in STANDING:
        world.leave()
    STANDING.clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def process(seconds: float) -> Any:
    """One that sleeps."""
    return multiprocessing.get_context("spawn").Process(target=time.sleep, args=(seconds,), daemon=True)


def test_no_signal_ends_a_process_from_its_first_moment_on() -> None:
    one = process(60)
    before = [signal.getsignal(number) for number in UNHEARD]
    begin_child(one)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(one.pid, number)
    one.join(0.5)
    assert one.exitcode is None
    end_child(one)
    assert one.exitcode == -signal.SIGKILL
    assert [signal.getsignal(number) for number in UNHEARD] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(UNHEARD)


def test_a_rank_that_ends_while_it_starts_is_named_at_once_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(starting, "_begin", sys.exit)  # with arguments that it does not take
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"rank [12] ended while it started: status 1; its own message, if it had one, stands above"):
        start_ranks(3, 600.0)
    assert time.monotonic() - start < 60
    assert not list(tmp_path.iterdir())
    assert not multiprocessing.active_children()
    assert not dist.is_initialized()


def test_a_rank_that_ends_before_it_has_joined_is_named(tmp_path: Path) -> None:
    store, one = dist.FileStore(str(tmp_path / "store"), 2), process(0.3)
    store.set("here-1", "")
    begin_child(one)
    with pytest.raises(ConnectionError, match="rank 1 ended while it started: status 0"):
        gather_round([one], store, 2, 5.0, 5.0, "")
    assert not dist.is_initialized()
    assert dist.distributed_c10d._world.group_count == 0, "the next ranks find each other"


@pytest.mark.parametrize("here", [False, True], ids=["before it comes", "before it joins"])
def test_ctrl_c_ends_the_wait_for_ranks(here: bool, tmp_path: Path) -> None:
    store, one = dist.FileStore(str(tmp_path / "store"), 2), process(60)
    if here:
        store.set("here-1", "")
    begin_child(one)
    threading.Timer(0.4, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        gather_round([one], store, 2, 5.0, 60.0, "")
    assert one.exitcode == -signal.SIGKILL


def test_ranks_that_do_not_come_are_waited_for_so_long(tmp_path: Path) -> None:
    one = process(60)
    begin_child(one)
    with pytest.raises(ConnectionError, match=r"the ranks have not started within 0\.5 s: raise it"):
        gather_round([one], dist.FileStore(str(tmp_path / "store"), 2), 2, 5.0, 0.5, "raise it")
    assert one.exitcode == -signal.SIGKILL


def test_a_run_that_is_refused_leaves_no_process_group(tmp_path: Path) -> None:
    refused = replace(rl(), learner=Sharded(ranks=1), response_limit=5000, tokens_per_batch=6000, out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="5000"):
        build_parts(refused, None)
    assert not dist.is_initialized()
    assert not list(tmp_path.glob("ramulus-ranks-*"))


class Fussy(Exception):
    """Cannot be read again: it wants two words."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


def test_an_error_crosses_as_it_is_or_says_the_same() -> None:
    assert isinstance(portable(FileNotFoundError("x")), FileNotFoundError)
    for error in (Fussy("a", "b"), type("Local", (Exception,), {})("ab")):
        crossed = portable(error)
        assert type(crossed) is RuntimeError
        assert str(crossed).endswith(": ab")


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_no_longer_than_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one whose disk is another is named where it saves: it began in another folder."""
    (tmp_path / "its").mkdir()
    (tmp_path / "ours").mkdir()
    monkeypatch.chdir(tmp_path / "its")
    with learner("over two ranks", Tiny()) as one:
        monkeypatch.chdir(tmp_path / "ours")
        with pytest.raises(FileNotFoundError, match=r"what rank 1 wrote of a checkpoint, .*distcp, is not there on .*: put the run's folder, out,"):
            run(one.save(Path("/proc/self/cwd/here")))
        world = one.world
        assert world.seconds == Sharded().timeout
        world.wait_for_others(1.0)
        os.kill(world.processes[0].pid, signal.SIGSTOP)
        world.broken = True
        said = r"a rank has not answered within 1 s: look whether it hangs, or raise learner\.timeout; go on from the last checkpoint"
        with pytest.raises(ChildProcessError, match=said), one._named():
            world.collect((True, None))
    world.leave()
    STANDING.clear()


@pytest.mark.parametrize("kind", [Torch(process=True), Sharded()])
def test_a_mix_that_cannot_be_sent_is_refused_before_work(kind: Any) -> None:
    recipe, lock = rl(), threading.Lock()
    held = replace(recipe.mix, gate=lambda trees: lock)
    with pytest.raises(ValueError, match=r"the mix cannot be sent to the learner's own processes \(TypeError: .*lock.*\): keep locks"):
        replace(recipe, mix=held, learner=kind)
    assert replace(recipe, mix=held).mix is held


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e20])
def test_a_rank_is_waited_for_in_seconds_that_can_be(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"learner\.timeout must be above 0 and at most 1e9 seconds, got"):
        Sharded(timeout=seconds)


def test_the_store_of_ranks_on_one_machine_is_at_that_address_alone() -> None:
    def start(rank: int, host: str, port: int, *_: Any) -> Any:
        socket.create_connection((host, port), 5).close()
        with pytest.raises(OSError, match=r"refused|assign|route|timed out"):
            socket.create_connection(("127.0.0.2", port), 5)
        raise RuntimeError("the rank has looked")

    with pytest.raises(RuntimeError, match="the rank has looked"):
        led(start, 2, 2, "127.0.0.1", True, 5.0, 5.0)
