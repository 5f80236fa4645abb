"""What is said while a reward takes long: which one, on which task, for how long."""

from __future__ import annotations

import threading
import time

from rich.console import Console

from ramulus.grow.grading import outstanding
from ramulus.run.logbook import clock

NAMED_AFTER = 15.0  # seconds of one call before it is named; then after twice as long, and so on
LOOK_EVERY = 1.0  # seconds


class SlowRewards:
    """While entered, names on the console the reward that has been at work longest, from a thread: the event loop may be what it holds up."""

    def __init__(self, console: Console) -> None:
        self.console, self.ended = console, threading.Event()

    def __enter__(self) -> SlowRewards:
        threading.Thread(target=self.watch, name="slow rewards", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def watch(self) -> None:
        """Look now and then."""
        patience, named = NAMED_AFTER, None
        while not self.ended.wait(LOOK_EVERY):
            slow = outstanding()
            if not slow or slow[0] is not named:
                patience, named = NAMED_AFTER, slow[0] if slow else None
            if slow and (waited := time.monotonic() - slow[0].since) > patience:
                others = f", {len(slow) - 1} more beside it" if len(slow) > 1 else ""
                line = f"waiting for {slow[0]} for {clock(waited)}{others}; Ctrl-C saves and stops"
                self.console.out(line, highlight=False)
                patience = 2 * waited
