"""Ctrl-C, SIGTERM and a lost terminal (SIGHUP): finish what must be whole, abandon what can be done again, save, and stop."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from ramulus.run.event_loop import GRACE

_T = TypeVar("_T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 0.5  # seconds in which a further signal is the same one: launchers hand on what the whole process group got
ENDING = 10.0  # seconds that trees of later steps may go on growing after a signal
HANG_UP = getattr(signal, "SIGHUP", None)  # the terminal is gone; nohup has it ignored


class Stopped(Exception):
    """A signal asked the run to stop; what was asked for was abandoned."""


class Interrupt:
    """While entered, the first signal asks to stop, and the second one stops at once, as signals usually do.

    Work that changes nothing lasting (growing, evaluating) runs inside `abandonable` and is cancelled; all else is finished first.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.heard = 0.0  # when
        self.running: asyncio.Task[Any] | None = None
        self._holding = self._held = False

    def __enter__(self) -> Interrupt:
        here = threading.current_thread() is threading.main_thread()  # elsewhere Python hears no signal
        heard = [*SIGNALS, *([HANG_UP] if HANG_UP and signal.getsignal(HANG_UP) is not signal.SIG_IGN else [])] if here else []
        self.old = {number: signal.signal(number, self.hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal and cancel what may be abandoned."""
        if self.signal_name is not None and time.monotonic() - self.heard < ECHO:
            return
        if self.signal_name is not None and self._holding:
            self._held = True
            return
        if self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name, self.heard = signal.Signals(number).name, time.monotonic()
        if self.running is not None:
            self.running.get_loop().call_soon_threadsafe(self.running.cancel)
            threading.Thread(target=self.insist, args=(self.running,), daemon=True).start()

    def insist(self, task: asyncio.Task[Any]) -> None:
        """Stop what holds up the event loop, so that it hears of nothing: a coroutine that blocks, a reward's say."""
        reached = threading.Event()
        task.get_loop().call_soon_threadsafe(reached.set)
        if not reached.wait(GRACE) and self.running is task:
            task.get_loop().set_exception_handler(lambda *_: None)  # how the run then ends is said once, by whoever began it
            self.heard = -math.inf  # what comes now is no echo of the first one
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, a second signal waits until all is done: what has begun is known to whoever must end it."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            if self._held:
                self._held = False
                raise KeyboardInterrupt

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signal_name is not None:
            raise Stopped(self.signal_name)

    async def abandonable(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Await work that a signal may cancel; raises Stopped then."""
        if self.signal_name is not None:
            work.close()
            raise Stopped(self.signal_name)
        self.running = asyncio.ensure_future(work)
        try:
            return await self.running
        except asyncio.CancelledError:
            if self.signal_name is None:
                raise
            raise Stopped(self.signal_name) from None
        finally:
            self.running = None

    async def ending(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Await work that goes on for a while after a signal, as it could not be done again alike, and is given up then; raises Stopped."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=1.0))[0]:
                if self.signal_name is not None and time.monotonic() - self.heard > ENDING:
                    raise Stopped(self.signal_name)
            return task.result()
        finally:
            task.cancel()


@contextmanager
def own_signals() -> Iterator[None]:
    """Signals go afterwards to whom they went before: Ray takes SIGTERM for itself where it begins."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
