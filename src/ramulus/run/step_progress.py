"""Where a step stands: a few numbers that whoever works counts up, and that a display reads when it likes, so that they cost the step nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from ramulus.core.tree import Tree

SOON, EVERY = 10.0, 30.0  # seconds of a step before its first line where no terminal shows a bar, and between two lines
PHASE_WORDS = {  # phases that may take long, as people call them
    "grow": "growing", "score": "scoring", "update": "updating", "eval": "evaluating", "save": "saving",
}


class TakenRows(list[Any]):
    """A list that counts how many of its items were taken one by one; elsewhere, by another process, it is a plain list."""

    taken = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.taken += 1
            yield item

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self[:],)


@dataclass
class StepProgress:
    """The step under way, or the evaluation after it."""

    counters: Callable[[], Mapping[str, int]]  # of the engine
    step: int = 0  # 0: no step, an evaluation by itself
    phase: Callable[[], str] = str  # what is done now
    since: float = 0.0  # when it began, by time.monotonic()
    before: int = 0  # tokens that the engine had sampled by then
    trees: int = 0  # to be finished in this step, as far as is known
    grown: int = 0
    graded: int = 0
    rows: tuple[TakenRows, ...] = ()  # of each update so far
    answers: int = 0  # of an evaluation
    wanted: int = 0  # answers

    def begin(self, step: int, phase: Callable[[], str], answers: int = 0) -> None:
        """A step begins, or an evaluation of so many answers."""
        self.trees = self.grown = self.graded = self.answers = 0
        self.rows, self.wanted = (), answers
        self.step, self.phase, self.before, self.since = step, phase, self.counters()["sampled"], time.monotonic()

    def count(self, tree: Tree) -> None:
        """A tree of attempts of an evaluation is graded."""
        self.answers += len(tree.leaves())

    def taken(self, batches: list[Any]) -> TakenRows:
        """The rows of an update, to be counted as they are taken."""
        rows = TakenRows(batches)
        self.rows = (*self.rows, rows)
        return rows

    def line(self) -> str:
        """Where it stands, in words; "" between two steps."""
        phase = self.phase()
        if phase not in PHASE_WORDS:
            return ""
        seconds = time.monotonic() - self.since
        sampled = self.counters()["sampled"] - self.before
        speed = f"{sampled} tokens, {sampled / max(seconds, 1e-9):.0f} tok/s"
        parts = {
            "grow": f"{self.grown} of {self.trees} trees grown, {self.graded} graded, {speed}",
            "score": f"{self.trees} trees",
            "update": f"row {sum(min(rows.taken, len(rows)) for rows in self.rows)} of {sum(map(len, self.rows))}",
            "eval": f"{self.answers} of {self.wanted} answers, {speed}",
        }
        detail = f": {parts[phase]}" if phase in parts else ""
        return f"{f'step {self.step}, ' if self.step else ''}{seconds:.0f} s: {PHASE_WORDS[phase]}{detail}"


class Narrator:
    """Says now and then where a step stands, from a thread of its own: where no terminal shows it."""

    def __init__(self, progress: StepProgress, say: Callable[[str], None]) -> None:
        self.progress, self.say, self.ended = progress, say, threading.Event()
        threading.Thread(target=self.watch, name="progress", daemon=True).start()

    def watch(self) -> None:
        """Look now and then."""
        since, last = 0.0, 0.0
        while not self.ended.wait(min(1.0, SOON)):
            if self.progress.since != since:
                since, last = self.progress.since, 0.0
            now = time.monotonic()
            if now - since >= SOON and now - last >= EVERY:
                with suppress(Exception):  # it reads what others write; a line less is no harm
                    if line := self.progress.line():
                        self.say(line)
                        last = now

    def close(self) -> None:
        """End the thread: no more lines."""
        self.ended.set()


@contextmanager
def narrated(progress: StepProgress, console: Console, wanted: bool) -> Iterator[None]:
    """While entered, a console is told now and then where it stands, where that is `wanted`."""
    say = partial(console.out, highlight=False)
    narrator = Narrator(progress, say) if wanted and not console.quiet else None
    try:
        yield
    finally:
        if narrator is not None:
            narrator.close()
