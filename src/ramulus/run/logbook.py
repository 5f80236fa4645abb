"""What a run says while it works: a progress display or plain lines, metrics.jsonl, TensorBoard, wandb, trackio."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape

from ramulus.look.progress import Bar
from ramulus.run.config.describe import to_json
from ramulus.run.config.recipe import Run

SPOKEN = 2.0  # seconds between the details of steps where no terminal shows a bar


class Board(Protocol):
    """Somewhere numbers are drawn."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars for TensorBoard; what lies after `step` is purged."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'TensorBoard is not installed: pip install "ramulus[tensorboard]", or tensorboard=false'
            ) from error
        self.summary = Summary
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(self.summary(value=values), step)  # one event for all: add_scalar takes fifteen times as long

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """wandb, or trackio, which has the same calls; a resumed run goes on under the same id."""

    def __init__(self, module: str, run: Run) -> None:
        try:
            self.module = importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f'{module} is not installed: pip install "ramulus[{module}]", or {module}=false'
            ) from error
        place = hashlib.blake2b(str(run.folder.resolve()).encode(), digest_size=6).hexdigest()
        resume = {"id": f"{run.name}-{place}", "resume": "allow"} if module == "wandb" else {"resume": "allow"}
        self.module.init(project="ramulus", name=run.name, config=to_json(run), **resume)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.module.log(metrics, step=step)

    def close(self) -> None:
        self.module.finish()


def boards(run: Run, step: int) -> list[Board]:
    """What the run asked for; TensorBoard also where nobody decided and it is installed."""
    wanted: list[Board] = []
    if run.tensorboard or (run.tensorboard is None and importlib.util.find_spec("tensorboard")):
        wanted.append(TensorBoard(run.folder, step))
    return wanted + [Hosted(name, run) for name in ("wandb", "trackio") if getattr(run, name)]


class Logbook:
    """Writes a run's metrics; `size` bytes of metrics.jsonl are kept and the rest, of steps to be done again, is cut off."""

    def __init__(self, run: Run, console: Console, step: int = 0, size: int = 0) -> None:
        self.run, self.console, self.last = run, console, 0.0
        self.path = run.folder / "metrics.jsonl"
        self.file = open(self.path, "ab")  # noqa: SIM115
        self.file.truncate(size)
        self.boards = boards(run, step)
        self.bar = Bar(console, run.name, run.steps, "steps", step, left=False, transient=False)
        self.bar.start()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """One step: a line of JSON for programs, numbers for the boards, a line for people."""
        try:
            self.file.write(json.dumps({"step": step} | finite(metrics), allow_nan=False).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise OSError(
                f"cannot write {self.path}: {error.strerror}; free space, then go on with --resume"
            ) from error
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        numbers |= {f"seconds/{name}": value for name, value in metrics["seconds"].items()}
        for board in self.boards:
            board.write(step, numbers)
        self.show(step, metrics)

    def show(self, step: int, metrics: dict[str, Any]) -> None:
        """The progress bar, or a plain line; its details every few seconds."""
        line, left = spoken(metrics), f"left {clock((self.run.steps - step) * metrics['seconds']['mean'])}"
        if not self.bar.disable:
            self.bar.show(step, left, (line, details(metrics)))
            if "eval/mean" in metrics:
                self.say(f"step {step}  {held_out(metrics)}")
            return
        self.say(f"{self.run.name} {step}/{self.run.steps}  {line}  {left}")
        if step in (1, self.run.steps) or time.monotonic() - self.last > SPOKEN:
            self.last = time.monotonic()
            self.say(f"    {details(metrics)}")

    def say(self, text: str) -> None:
        """A line for people, above the bar where there is one; markup in it is shown as it is."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def size(self) -> int:
        """Bytes of metrics.jsonl, all of them on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """Stop the display and close every file."""
        self.bar.stop()
        self.file.close()
        for board in self.boards:
            board.close()


def finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with None in place of what JSON has no number for."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


def spoken(metrics: dict[str, Any]) -> str:
    """The step in one line: reward or loss, speed, reuse, evaluation."""
    seconds = metrics["seconds"]
    parts = []
    if metrics.get("paths"):
        parts += [
            f"reward {metrics['reward']:.3f}",
            f"passed {metrics['pass_rate']:.0%}",
            f"length {metrics['length']:.0f}",
        ]
        parts.append(
            f"{metrics['sampled'] / max(seconds['grow'], 1e-9):.0f} tok/s  reuse {metrics['reuse_ratio']:.2f}x"
        )
    elif "loss" in metrics:
        parts += [f"loss {metrics['loss']:.3f}", f"{metrics['trained'] / max(seconds['step'], 1e-9):.0f} tok/s"]
    if "eval/mean" in metrics:
        parts.append(held_out(metrics))
    if metrics["dropped"]:
        kept = metrics["trees"] - metrics["dropped"]
        short = f", {metrics['wanted']} were wanted: no more draws" if kept < metrics.get("wanted", 0) else ""
        parts.append(f"learned from {kept} of {metrics['trees']} trees in {metrics.get('draws', 1)} draws{short}")
    if metrics["not_finite"]:
        parts.append("the gradient was not finite, its update was left out")
    elif metrics["skipped"] and not metrics["updates"]:
        parts.append("no signal, weights unchanged")
    return "  ".join(parts)


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
    return f"held out: mean {metrics['eval/mean']:.3f}, greedy {metrics['eval/greedy']:.3f}"


def clock(seconds: float) -> str:
    """1:02:03 or 4:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
