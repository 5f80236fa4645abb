"""What is said while problems are answered, by an evaluation or for a look at trees."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from ramulus.engine.engine import Engine
from ramulus.look.progress import Bar
from ramulus.run.logbook import clock
from ramulus.run.step_progress import SOON

SPOKEN = 2.0  # seconds between lines where no terminal shows a bar


class Count:
    """Problems done: a bar with the time left on a terminal, else a line now and then, and none for what takes no time."""

    def __init__(self, console: Console, title: str, total: int, done: int, engine: Engine) -> None:
        self.console, self.total, self.before, self.done, self.engine = console, total, done, float(done), engine
        self.start = self.last = time.monotonic()
        self.sampled = engine.counters()["sampled"]  # by then
        if done:
            console.out(f"going on after {done} of {total} problems", highlight=False)
        self.bar = Bar(console, Path(title).name, total, "problems", done)
        if done < total:
            self.bar.start()

    def add(self, share: float) -> None:
        """Some answers to a problem are there: a share of them."""
        self.done += share
        self.bar.show(round(self.done, 6), f"{self.speed():.0f} tok/s")
        self.tell("", round(self.done, 2), SOON)

    def chunk(self, name: str, done: int, total: int) -> None:
        """Print that so many problems of a set are answered and on the disk, where no terminal shows a bar."""
        self.tell(f"{name} ", done, SPOKEN, total)

    def tell(self, name: str, done: float, pause: float, total: int | None = None) -> None:
        """A line where no terminal shows a bar and nothing was said for `pause` seconds."""
        now, total = time.monotonic(), self.total if total is None else total
        if self.bar.disable and now - self.last > pause:
            left = (now - self.start) / max(self.done - self.before, 1e-9) * (self.total - self.done)
            text = f"{name}{done:g}/{total} problems  {self.speed():.0f} tok/s  left {clock(max(left, 0.0))}"
            self.console.out(text, highlight=False)
            self.last = now

    def speed(self) -> float:
        """Tokens sampled in a second."""
        return (self.engine.counters()["sampled"] - self.sampled) / max(time.monotonic() - self.start, 1e-9)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()
