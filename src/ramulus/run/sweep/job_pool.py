"""The processes of a sweep: started in order, as many at once as allowed, watched, and stopped so that every run saves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console

from ramulus.look.progress import Bar
from ramulus.native.memory import LIMIT
from ramulus.run.config.recipe import Run
from ramulus.run.interrupt import Interrupt
from ramulus.run.lock import Lock
from ramulus.run.logbook import clock

LOOK = 0.2  # seconds between two looks at the running processes
STOPPED = {-signal.SIGTERM, 128 + signal.SIGTERM}  # how a run ends that was asked to


def signal_name(number: int) -> str:
    """SIGKILL for 9; the number of one without a name, as those of real time are."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass
class Job:
    """One run of a sweep."""

    label: str
    seed: int
    recipe: str
    folder: Path
    overrides: tuple[str, ...]  # as the user gave them
    extra: tuple[str, ...]  # threads, where nobody else says
    stages: tuple[Run, ...]
    lines: dict[Path, tuple[int, int]] = field(default_factory=dict)  # metrics.jsonl -> (bytes read, lines in them)

    @property
    def name(self) -> str:
        return f"{self.label} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def command(self) -> list[str]:
        own = (f"out={self.folder}", f"seed={self.seed}")
        return [
            sys.executable,
            "-m",
            "ramulus.cli",
            "train",
            self.recipe,
            *own,
            *self.overrides,
            *self.extra,
            "--resume",
        ]

    def finished(self) -> bool:
        return (self.folder / "summary.json").is_file()

    def steps(self) -> int:
        """Steps in metrics.jsonl so far, over all stages."""
        return sum(self.count(stage.folder / "metrics.jsonl") for stage in self.stages)

    def count(self, path: Path) -> int:
        """Lines of a file that only grows, or is cut and grows again."""
        size = path.stat().st_size if path.is_file() else 0
        start, lines = self.lines.get(path, (0, 0))
        if size < start:
            start, lines = 0, 0
        if size > start:
            with open(path, "rb") as file:
                file.seek(start)
                read = file.read(size - start)
            start, lines = start + len(read), lines + read.count(b"\n")
        self.lines[path] = start, lines
        return lines

    def total(self) -> int:
        return sum(stage.steps for stage in self.stages)


class JobPool:
    """The running processes of a sweep, and what is said about them."""

    def __init__(
        self, jobs: list[Job], most: int, environment: dict[str, str], lock: Lock | IO[str], console: Console
    ) -> None:
        self.jobs, self.most, self.environment, self.lock, self.console = jobs, most, environment, lock, console
        self.running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}
        self.done = [job for job in jobs if job.finished()]
        self.waiting = [job for job in jobs if not job.finished()]
        self.failed: dict[str, Job] = {}  # how it failed -> what
        self.before = self.worked()
        self.began = time.monotonic()
        self.total = sum(job.total() for job in jobs)
        self.bar = Bar(console, "sweep", self.total, "", self.before, left=False, transient=False)

    def work(self, interrupt: Interrupt) -> None:
        """Until nothing is left, or a signal comes: it is handed on, and every run saves and ends. What failed is in `failed`."""
        share = int(self.environment.get(LIMIT, 0)) * 2**20 / 1e9
        each = f", each with {share:.1f} GB of what is free" if self.most > 1 and share else ""
        self.say(f"{len(self.jobs)} runs, {len(self.done)} of them finished already, {self.most} at once{each}")
        try:
            with self.bar:
                self.watch(interrupt)
        except Exception as error:  # whatever broke here, the runs save
            self.stop(f"{type(error).__name__}: {error}")
            while self.running:
                time.sleep(LOOK)
                self.collect(stopping=True)
            raise
        finally:  # reached with running processes only when a second signal came
            self.kill()

    def watch(self, interrupt: Interrupt) -> None:
        """Start what is waiting and take in what has ended, until there is nothing of either."""
        stopping = False
        while self.running or (self.waiting and interrupt.signal_name is None):
            while self.waiting and len(self.running) < self.most and interrupt.signal_name is None:
                with interrupt.whole():
                    self.start(self.waiting.pop(0))
            if interrupt.signal_name is not None and not stopping:
                stopping = True
                self.stop(interrupt.signal_name)
            time.sleep(LOOK)
            self.collect(stopping)
            if not self.bar.disable:
                self.show()

    def stop(self, reason: str) -> None:
        """Ask every run to save and end."""
        for _, process, _ in self.running.values():
            process.terminate()
        self.say(f"{reason}: waiting until {', '.join(job.name for job, _, _ in self.running.values())} saved")

    def kill(self) -> None:
        """End every run at once, with all the processes that it started."""
        for _, process, _ in self.running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it leads the session that `start` gave it
        for _, process, _ in self.running.values():
            process.wait()

    def start(self, job: Job) -> None:
        """Start one run, in a session of its own, so that a Ctrl-C reaches it once, from here; where the system refuses, it has failed."""
        try:
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            with open(job.log, "ab") as log:
                process = subprocess.Popen(
                    job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self.environment,
                    start_new_session=True, pass_fds=(self.lock.fileno(),),
                )  # fmt: skip
        except OSError as error:
            self.failed[f"{job.name} could not be started ({error})"] = job
            self.say(f"FAILED    {job.name} could not be started: {error}")
            return
        self.running[process.pid] = job, process, time.monotonic()
        self.say(f"started   {job.name}" + (f", from step {job.steps()}" if job.steps() else ""))

    def collect(self, stopping: bool) -> None:
        """Take the processes that have ended off the list."""
        for number, (job, process, began) in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            del self.running[number]
            if status == 0:
                self.done.append(job)
                count = f"{len(self.done)} of {len(self.jobs)}"
                self.say(f"finished  {job.name} in {clock(time.monotonic() - began)}  ({count}, left {self.left()})")
            elif not (stopping and status in STOPPED):
                how = f"by {signal_name(-status)}" if status < 0 else f"with status {status}"
                self.failed[f"{job.name} ended {how}"] = job
                self.say(f"FAILED    {job.name} ended {how}: see {job.log}")

    def worked(self) -> int:
        """Steps made so far, those of earlier sweeps included."""
        finished = {id(job) for job in self.done}
        return sum(job.total() if id(job) in finished else min(job.steps(), job.total()) for job in self.jobs)

    def left(self) -> str:
        """Time left at the pace so far."""
        now = self.worked()
        pace = (now - self.before) / max(time.monotonic() - self.began, 1e-9)
        return clock((self.total - now) / pace) if pace > 0 else "unknown"

    def show(self) -> None:
        """How far every run is, on a terminal."""
        now = ", ".join(f"{job.name} {job.steps()}/{job.total()}" for job, _, _ in self.running.values())
        self.bar.show(self.worked(), f"{len(self.done)}/{len(self.jobs)} runs  left {self.left()}  {now}")

    def say(self, text: str) -> None:
        self.console.out(text, highlight=False)
