"""What a run says while it works: a progress display or plain lines, and metrics.jsonl."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from ramulus.core.json_object import finite_text, object_of
from ramulus.look.progress import Bar
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import replace_text
from ramulus.run.step_progress import Narrator, StepProgress

RECENT = 10  # steps whose rewards are averaged beside a step's own
_SPOKEN = 2.0  # seconds between the details of steps where no terminal shows a bar


class Logbook:
    """Writes a run's metrics; of metrics.jsonl the rows of the first `step` steps are kept and the rest, of steps to be done again, is cut off."""

    def __init__(self, run: Run, console: Console, step: int = 0, pause: float = 0.0) -> None:
        self.run, self.console, self.pause = run, console, pause
        self.last = self.detailed = 0.0  # when a step was shown, and its details
        self.narrator: Narrator | None = None
        self.path = run.folder / "metrics.jsonl"
        lost = cut_back(self.path, step)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self.end = self.path.stat().st_size
        self.rewards: deque[float] = deque(maxlen=RECENT)
        self.held_out: tuple[int, float] | None = None  # step and mean of the latest evaluation
        for row in rows_of(self.path):
            self.take_in(row["step"], row)
        self.bar = Bar(console, run.name, run.steps, "steps", step, left=False, transient=False)
        self.bar.start()
        if lost:
            self.say(f"{self.path} has no rows of {lost} of the {step} steps done: they were lost, and training goes on without them")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """One step: a line of JSON, whole or not at all. Raises OSError."""
        line = memoryview(finite_text({"step": step} | metrics).encode() + b"\n")
        try:
            written = 0
            while written < len(line):
                written += self.file.write(line[written:])
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(self.end)
            raise OSError(
                f"cannot write {self.path}: {error.strerror}; free space, then go on with --resume"
            ) from error
        self.end += len(line)

    def follow(self, progress: StepProgress) -> None:
        """Show where a step stands while it lasts: below the bar, or in a line now and then."""
        if not self.bar.disable:
            self.bar.line = progress.line
        elif not self.console.quiet:
            self.narrator = Narrator(progress, lambda line: self.say(f"{self.run.name} {line}"))

    def take_in(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep what later steps are shown beside."""
        if metrics.get("paths"):
            self.rewards.append(metrics["reward"])
        if (score := held_out_score(metrics)) is not None:
            self.held_out = step, score

    def show(self, step: int, metrics: dict[str, Any]) -> None:
        """The progress bar, or a plain line, at most one in `pause` seconds; its details every few seconds."""
        self.take_in(step, metrics)
        line, left = self.spoken(metrics), f"left {clock((self.run.steps - step) * metrics['seconds']['mean'])}"
        if not self.bar.disable:
            self.bar.show(step, left, (line, details(metrics)))
            if held_out_score(metrics) is not None:
                self.say(f"step {step}  {held_out(metrics)}")
            return
        now, bound = time.monotonic(), step in (1, self.run.steps) or held_out_score(metrics) is not None
        if not bound and now - self.last < self.pause:
            return
        self.last = now
        self.say(f"{self.run.name} {step}/{self.run.steps}  {line}  {left}")
        if step in (1, self.run.steps) or now - self.detailed > _SPOKEN:
            self.detailed = now
            self.say(f"    {details(metrics)}")

    def spoken(self, metrics: dict[str, Any]) -> str:
        """The step in one line: reward or loss, beside them what the last steps and the latest evaluation gave; speed, reuse, evaluation."""
        parts = step_words(metrics, mean(self.rewards) if len(self.rewards) > 1 else None)
        if held_out_score(metrics) is not None:
            parts.append(held_out(metrics))
        elif self.held_out is not None:
            parts.append(f"held out {self.held_out[1]:.3f} at step {self.held_out[0]}")
        return "  ".join([*parts, *exceptions(metrics)])

    def say(self, text: str) -> None:
        """A line for people, above the bar where there is one; markup in it is shown as it is."""
        self.console.out(text, highlight=False)

    def keep(self) -> None:
        """Have every row on the disk. Raises OSError."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}; free space, then go on with --resume") from error

    def close(self) -> None:
        """Stop the display and close the file."""
        if self.narrator is not None:
            self.narrator.close()
        self.bar.stop()
        self.file.close()


def cut_back(path: Path, step: int) -> int:
    """Leave one row for each of the steps 1 to `step` in a metrics.jsonl; returns for how many of them there is none. Raises OSError."""
    place, count = 0, 0
    with open(path, "a+b") as file:
        file.seek(0)
        for line in file:
            if count == step or step_of_row(line) != count + 1:
                break
            place, count = place + len(line), count + 1
        if count == step:
            file.truncate(place)
            return 0
        file.seek(0)
        rows = {number: line for line in file if (number := step_of_row(line)) is not None and number <= step}
    replace_text(path, b"".join(rows[number] for number in sorted(rows)).decode())
    return step - len(rows)


def step_of_row(line: bytes) -> int | None:
    """The step of a whole row of metrics; None for what is none."""
    row = object_of(line) if line.endswith(b"\n") else None
    step = (row or {}).get("step")
    return step if isinstance(step, int) and step > 0 else None


def rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """Every row of a metrics.jsonl that can be read."""
    with open(path, "rb") as file:
        yield from filter(None, map(object_of, file))


def step_words(metrics: dict[str, Any], recent: float | None) -> list[str]:
    """Reward or loss, speed, reuse; `recent` is the mean reward of the last steps."""
    seconds = metrics["seconds"]
    parts = []
    if metrics.get("paths"):
        parts += [
            f"reward {metrics['reward']:.3f}" + (f" (last {RECENT}: {recent:.3f})" if recent is not None else ""),
            *([f"passed {metrics['pass_rate']:.0%}"] if "pass_rate" in metrics else []),
            f"length {metrics['length']:.0f}",
        ]
        parts.append(
            f"{metrics['sampled'] / max(seconds['grow'], 1e-9):.0f} tok/s  reuse {metrics['reuse_ratio']:.2f}x"
        )
    elif "loss" in metrics:
        parts += [f"loss {metrics['loss']:.3f}", f"{metrics['trained'] / max(seconds['step'], 1e-9):.0f} tok/s"]
    return parts


def exceptions(metrics: dict[str, Any]) -> list[str]:
    """What was left out of a step, and updates that were not made."""
    parts = []
    if metrics["dropped"]:
        trained = metrics["trees"] - metrics["dropped"]
        short = f", {metrics['wanted']} were wanted: no more draws" if trained < metrics.get("wanted", 0) else ""
        parts.append(f"learned from {trained} of {metrics['trees']} trees in {metrics.get('draws', 1)} draws{short}")
    if metrics["not_finite"]:
        parts.append("the gradient was not finite, its update was left out")
    elif metrics["skipped"] and not metrics["updates"]:
        parts.append("no signal, weights unchanged")
    return parts


def details(metrics: dict[str, Any]) -> str:
    """The other numbers of a step: entropy, shares of credit clipped high and low, KL and ratios to the sampler, gradient, tokens, seconds."""
    parts = [f"entropy {metrics['entropy']:.3f}"] if "entropy" in metrics else []
    if "kl_sampler" in metrics:
        parts += [
            f"clipped {metrics['clip_high']:.1%} high, {metrics['clip_low']:.1%} low",
            f"KL {max(metrics['kl_sampler'], 0.0):.1e}",
            f"ratio {metrics['ratio_min']:.2f} to {metrics['ratio_max']:.2f}",
        ]
    parts += [f"gradient {metrics['grad_norm']:.2f}"] if "grad_norm" in metrics else []
    if "explained_variance" in metrics:
        parts.append(f"value head explains {metrics['explained_variance']:.0%}")
    tokens = ", ".join(f"{metrics[name]} {name}" for name in ("sampled", "reused", "trained") if metrics[name])
    phases = {name: s for name, s in metrics["seconds"].items() if name not in ("step", "mean")}
    spent = ", ".join(f"{name} {s:.2f}" for name, s in phases.items() if s >= 0.005 or name in ("grow", "update"))
    return "  ".join([*parts, f"tokens: {tokens or 'none'}", f"seconds: {spent}"])


def held_out(metrics: dict[str, Any]) -> str:
    """The evaluation of a step in words."""
    if "eval/mean" in metrics:
        return f"held out: mean {metrics['eval/mean']:.3f}, greedy {metrics['eval/greedy']:.3f}"
    return f"held out: reward {metrics['eval/reward']:.3f}, greedy {metrics.get('eval/greedy_reward', math.nan):.3f}"


def held_out_score(metrics: Mapping[str, Any]) -> float | None:
    """What an evaluation is judged by: the share that is correct, or the reward where none says so; None where there was none."""
    return metrics.get("eval/mean", metrics.get("eval/reward"))


def clock(seconds: float) -> str:
    """Seconds as 1:02:03, or as 4:05 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
