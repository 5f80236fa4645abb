"""A learner in a process of its own: what crosses the pipe is pickled, and no live object is shared."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from ramulus.learn.policy.children import begin_child, carried, end_child, ignore_signals, portable
from ramulus.learn.policy.in_process import CALLS, Thread
from ramulus.learn.policy.learner import Called
from ramulus.learn.policy.torch_policy import TorchPolicy


class Separate(Called):
    """A Learner in another process on this machine, with as many threads of torch as this one; engines take its weights from `weights`.

    `build` makes the policy there. What it raises, and what any call raises, is raised here.
    """

    features: frozenset[str] = frozenset()

    def __init__(self, build: Callable[[], TorchPolicy]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        strict = torch.are_deterministic_algorithms_enabled()
        self.process = context.Process(target=_serve, args=(theirs, carried(build), torch.get_num_threads(), strict), daemon=True)
        self.thread, self.version = Thread(), 0
        begin_child(self.process)
        theirs.close()
        try:
            self._take()
        except BaseException:
            self.close()
            raise

    def _ask(self, name: str, *arguments: Any) -> Any:
        call = carried((name, arguments))
        try:
            self.pipe.send_bytes(call)
        except OSError as error:
            raise self._gone() from error
        return self._take()

    def _take(self) -> Any:
        try:
            good, answer, self.version = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if not good:
            raise answer
        return answer

    def _gone(self) -> ChildProcessError:
        self.process.join(5)
        return ChildProcessError(
            f"the learner's process ended with status {self.process.exitcode}: its own message stands above; "
            "go on from the last checkpoint with --resume"
        )

    async def call(self, name: str, *arguments: Any) -> Any:
        """What the other process answers."""
        return await self.thread.do(self._ask, name, *arguments)

    def close(self) -> None:
        """End the process."""
        end_child(self.process)
        self.pipe.close()
        self.thread.close()


def _serve(pipe: Connection, build: bytes, threads: int, strict: bool) -> None:
    """Answer calls until the other end is gone."""
    ignore_signals()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        policy: TorchPolicy = pickle.loads(build)()
    except Exception as error:
        pipe.send_bytes(answer_bytes(False, error, 0))
        return
    pipe.send_bytes(answer_bytes(True, None, policy.version))
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        try:
            name, arguments = pickle.loads(call)
            answer, good = CALLS[name](policy, *arguments), True
        except Exception as error:
            answer, good = error, False
        pipe.send_bytes(answer_bytes(good, answer, policy.version))


def answer_bytes(good: bool, answer: Any, version: int) -> bytes:
    """An answer for the pipe."""
    return pickle.dumps((good, answer if good else portable(answer), version))
