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
        self.counts, self.idle, self.waiting, self.count = threading.Lock(), 0, 0, 0  # threads without work, calls without a thread, threads
        self.forsaken: set[Future[Any]] = set()  # calls at work that nobody waits for

    def submit(self, call: Callable[..., _T], /, *arguments: Any, **named: Any) -> Future[_T]:
        """A call for the next thread that is free."""
        future: Future[_T] = Future()
        with self.counts:
            self.waiting += 1
            self.calls.put((future, partial(call, *arguments, **named)))
            self.staff()
        return future

    def staff(self) -> None:
        """Begin a thread where a call has none and one more may be; whoever asks holds `counts`."""
        if self.waiting > self.idle and self.count < self.most:
            self.count += 1
            threading.Thread(target=self.work, name=f"grading-{self.count}", daemon=True).start()

    def work(self) -> None:
        """Take calls from the queue and run them one after another, until the process ends."""
        while True:
            with self.counts:
                self.idle += 1
            future, call = self.calls.get()
            with self.counts:
                self.idle -= 1
                self.waiting -= 1
            if future.set_running_or_notify_cancel():
                try:
                    answer = call()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(answer)
                    del answer
            with self.counts:
                if future in self.forsaken:
                    self.forsaken.discard(future)
                    return
            del future, call

    def forsake(self, future: Future[Any]) -> None:
        """Nobody waits for a call any more: where it is at work, its thread ends with it, and another may take its place now."""
        with self.counts:
            if future.running() and future not in self.forsaken:
                self.forsaken.add(future)
                self.count -= 1
                self.staff()


THREADS = DaemonThreads(min(32, (os.cpu_count() or 1) + 4))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=THREADS.reset)


async def in_thread(call: Callable[..., _T], *arguments: Any) -> _T:
    """What `call` answers or raises, from a thread that nobody waits for once this is cancelled."""
    run = partial(contextvars.copy_context().run, call, *arguments)
    future = THREADS.submit(run)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        THREADS.forsake(future)
        raise
