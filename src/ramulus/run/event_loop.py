"""Coroutines run to their end from anywhere: a program, a thread, a notebook whose own event loop is running."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")
_Work = tuple[asyncio.AbstractEventLoop, "asyncio.Task[Any] | None"]
GRACE = 5.0  # seconds in which an event loop hears of anything, unless something blocks it


def run_to_end(work: Coroutine[Any, Any, _T]) -> _T:
    """What the coroutine answers or raises; where this thread's event loop is running, from a thread of its own, for which this one waits."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    future: Future[_T] = Future()
    context, running = contextvars.copy_context(), Future[_Work]()

    async def kept() -> _T:
        running.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await work

    def beside() -> None:
        try:
            future.set_result(context.run(asyncio.run, kept()))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=beside, name="run", daemon=True)
    try:
        thread.start()
        return future.result()
    finally:
        if not future.done():  # a signal ended the wait: the work ends before anybody goes on without it
            _end(running, thread)


def _end(running: Future[_Work], thread: threading.Thread) -> None:
    """Cancel the work of another thread and wait for its end, unless it never began or something blocks its event loop."""
    try:
        loop, task = running.result(GRACE)
    except TimeoutError:
        return
    heard = threading.Event()

    def cancel() -> None:
        heard.set()
        if task is not None:
            task.cancel()

    try:
        loop.call_soon_threadsafe(cancel)
    except RuntimeError:
        heard.set()  # it has ended meanwhile
    if heard.wait(GRACE):
        thread.join()
