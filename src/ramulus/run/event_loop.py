"""Coroutines run to their end from anywhere: a program, a thread, a notebook whose own event loop is running."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")


def run_to_end(work: Coroutine[Any, Any, _T]) -> _T:
    """What the coroutine answers or raises; where this thread's event loop is running, from a thread of its own, for which this one waits."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    future: Future[_T] = Future()
    context = contextvars.copy_context()

    def beside() -> None:
        try:
            future.set_result(context.run(asyncio.run, work))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=beside, name="run", daemon=True).start()
    return future.result()
