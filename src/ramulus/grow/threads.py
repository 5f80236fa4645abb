"""Threads that end with the process: a function that hangs in one holds up nothing but itself."""

from __future__ import annotations

import asyncio
import contextvars
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

_T = TypeVar("_T")


class DaemonThreads(Executor):
    """At most `most` threads, made as they are needed; unlike those of a ThreadPoolExecutor, Python does not wait for them at its end."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.reset()

    def reset(self) -> None:
        """Begin without threads, as in a process that was forked."""
        self.calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self.free, self.count = threading.Semaphore(0), 0

    def submit(self, call: Callable[..., _T], /, *arguments: Any, **named: Any) -> Future[_T]:
        """A call for the next thread that is free."""
        future: Future[_T] = Future()
        self.calls.put((future, partial(call, *arguments, **named)))
        if not self.free.acquire(blocking=False) and self.count < self.most:
            self.count += 1
            threading.Thread(target=self.work, name=f"grading-{self.count}", daemon=True).start()
        return future

    def work(self) -> None:
        """Call after call."""
        while True:
            try:
                future, call = self.calls.get_nowait()
            except queue.Empty:
                self.free.release()
                future, call = self.calls.get()
            if future.set_running_or_notify_cancel():
                try:
                    answer = call()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(answer)
                    del answer
            del future, call


THREADS = DaemonThreads(min(32, (os.cpu_count() or 1) + 4))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=THREADS.reset)


async def in_thread(call: Callable[..., _T], *arguments: Any) -> _T:
    """What `call` answers or raises, from a thread that nobody waits for once this is cancelled."""
    run = partial(contextvars.copy_context().run, call, *arguments)
    return await asyncio.get_running_loop().run_in_executor(THREADS, run)
