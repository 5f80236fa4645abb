"""What grading processes may spend on one step, what fell to that, and the outcomes that equal calls share."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class GradingBudget:
    """Seconds of computing for all calls of a step. Once they are spent no further call is begun: it is refused, and counted."""

    seconds: float = math.inf
    spent: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)  # of outcomes by cause: timeout, memory, died, refused
    shared: dict[bytes, Future[Any]] = field(default_factory=dict)  # by what was asked
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def refuses(self) -> bool:
        """Whether all seconds are spent, so that no further call is begun."""
        with self.lock:
            return self.spent >= self.seconds

    def note(self, cause: str | None, seconds: float) -> None:
        """Add what a call took and how it ended; called from the threads of workers."""
        with self.lock:
            self.spent += seconds
            if cause is not None:
                self.counts[cause] += 1

    def metrics(self) -> dict[str, int]:
        """Calls that a limit ended, whose process was lost, and that the budget refused."""
        with self.lock:
            cut, lost, refused = (
                self.counts["timeout"] + self.counts["memory"],
                self.counts["died"],
                self.counts["refused"],
            )
        return {"grades_cut": cut, "graders_lost": lost, "grades_refused": refused}


_CURRENT: ContextVar[GradingBudget | None] = ContextVar("grading budget", default=None)


def current_budget() -> GradingBudget | None:
    """The budget of the enclosing `grading_budget`; None outside of one."""
    return _CURRENT.get()


@contextmanager
def grading_budget(seconds: float = math.inf) -> Iterator[GradingBudget]:
    """A budget for every call that is made inside, also by tasks that are begun there."""
    budget = GradingBudget(seconds)
    token = _CURRENT.set(budget)
    try:
        yield budget
    finally:
        _CURRENT.reset(token)
