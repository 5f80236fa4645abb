"""Processes that a learner starts: what crosses to them, and what ends them, which is no signal that a terminal or a scheduler sends to all."""

from __future__ import annotations

import atexit
import pickle
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

UNHEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def begin_child(process: Any) -> None:
    """Start a process of multiprocessing that hears no signal from its first moment on, and ends with this one at the latest."""
    with _held():
        process.start()
    atexit.register(process.kill)  # multiprocessing's own end is a SIGTERM, for which it then waits


def end_child(process: Any) -> None:
    """End it at once."""
    process.kill()
    process.join()
    atexit.unregister(process.kill)


def ignore_signals() -> None:
    """Leave it to whoever started this process what a signal ends, and what is saved before. Of the main thread."""
    for number in UNHEARD:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, UNHEARD)


@contextmanager
def _held() -> Iterator[None]:
    """Inside, signals wait; a process that is started has them waiting for good."""
    resource_tracker.ensure_running()  # its start has signals come again
    former = signal.pthread_sigmask(signal.SIG_BLOCK, UNHEARD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def portable(error: Exception) -> Exception:
    """An error that crosses to another process: itself, or a RuntimeError that says the same where it cannot be pickled and read again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def carried(thing: Any) -> bytes:
    """As bytes for `pickle.loads` there, with the code of what a recipe file, a notebook or a script defines, which that process has not."""
    import cloudpickle

    for name, module in list(sys.modules.items()):
        if name.startswith("recipe_"):
            cloudpickle.register_pickle_by_value(module)
    return bytes(cloudpickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL))
