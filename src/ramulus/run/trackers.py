"""TensorBoard, wandb and trackio: each follows metrics.jsonl in a thread of its own, so that none can stop, slow or change a run.

What a tracker missed, since it failed or the run was killed, it gets with the next row or the next `--resume`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from ramulus.run.callbacks import Callback, CheckpointSaved, StepDone, TrainingBegun, TrainingEnded
from ramulus.run.config.describe import to_json
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import replace_text

FILE = "trackers.json"
TRACKER_PATIENCE = 20.0  # seconds that a run waits at its end for a tracker to take the last rows
HOSTED = ("wandb", "trackio")


class Board(Protocol):
    """Somewhere numbers are drawn."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars for TensorBoard; what lies after `step` is purged."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self.summary = Summary
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(self.summary(value=values), step)  # one event for all: add_scalar takes fifteen times as long
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """wandb, or trackio, which has the same calls; a resumed run goes on under the same id."""

    def __init__(self, module: str, run: Run, id: str) -> None:
        self.module = importlib.import_module(module)
        named = {"id": id, "name": run.name} if module == "wandb" else {"name": id}
        self.module.init(project="ramulus", config=to_json(run), resume="allow", **named)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.module.log(metrics, step=step)

    def close(self) -> None:
        self.module.finish()


class Follower:
    """Sends every row of a metrics.jsonl after step `sent` to a board; after a failure it opens the board anew at the next row."""

    def __init__(self, name: str, opened: Callable[[int], Board], path: Path, sent: int) -> None:
        self.name, self.opened, self.path, self.sent = name, opened, path, sent
        self.board: Board | None = None
        self.failure = ""
        self.place = 0  # bytes of the file that were read
        self.news, self.ending = threading.Event(), False
        self.say: Callable[[str], None] = lambda text: None
        self.thread = threading.Thread(target=self.follow, name=name, daemon=True)

    def open(self) -> None:
        """Open the board; raises ValueError with its words and the remedy."""
        try:
            self.board = self.opened(self.sent)
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"{self.name} cannot be used ({brief_error(error)}): set it up (is there a key, a network?), or set {self.name}=false"
            ) from error

    def start(self, say: Callable[[str], None]) -> None:
        """Begin to send; what goes wrong is told to `say`."""
        self.say = say
        self.news.set()
        self.thread.start()

    def follow(self) -> None:
        """Send what is new whenever there is news, until the end."""
        while True:
            self.news.wait()
            self.news.clear()
            ending = self.ending  # asked first: no row is written after that
            self.send()
            if ending:
                with suppress(Exception, SystemExit):
                    self.close_board()
                return

    def send(self) -> None:
        """All rows that are new."""
        try:
            for step, numbers, end in _rows(self.path, self.place):
                if step > self.sent:
                    self.board = self.board or self.opened(self.sent)
                    self.board.write(step, numbers)
                    self.sent = step
                self.place = end
        except (Exception, SystemExit) as error:
            if not self.failure:
                self.say(f"{self.name} fails ({brief_error(error)}): the run goes on, and what it misses is sent when it works again")
            self.failure = brief_error(error)
            with suppress(Exception, SystemExit):
                self.close_board()
        else:
            if self.failure:
                self.say(f"{self.name} works again and has every row up to step {self.sent}")
            self.failure = ""

    def close_board(self) -> None:
        """Let the board go."""
        board, self.board = self.board, None
        if board is not None:
            board.close()

    def end(self) -> None:
        """Wait for the last rows, but not for ever."""
        if not self.thread.is_alive():
            return
        self.ending = True
        self.news.set()
        self.thread.join(TRACKER_PATIENCE)
        if self.thread.is_alive() or self.failure:
            self.say(f"{self.name} has the rows up to step {self.sent} only: the same command with --resume sends it the others")


class Trackers(Callback):
    """The trackers of a stage, and what each has got so far, which is kept in trackers.json of its folder."""

    def __init__(self, run: Run, step: int) -> None:
        """Of a run that has done `step` steps. ImportError for a tracker that is not installed."""
        self.path = run.folder / FILE
        saved = saved_in(self.path)
        self.id = str(saved.get("id") or (former_id(run) if step else f"{run.name}-{secrets.token_hex(4)}"))
        counts = saved["sent"] if isinstance(saved.get("sent"), dict) else {}
        sent = {name: min(count, step) for name, count in counts.items() if isinstance(count, int)}
        metrics = run.folder / "metrics.jsonl"
        self.followers = [Follower(name, opened, metrics, sent.get(name, step)) for name, opened in trackers_of(run, self.id)]

    def open(self, strict: bool) -> None:
        """Open those that are elsewhere, in this thread; one that fails raises ValueError where that is `strict`, else it is tried again later."""
        for follower in self.followers:
            if follower.name in HOSTED:
                with nullcontext() if strict else suppress(ValueError):
                    follower.open()

    def on_begin(self, event: TrainingBegun) -> None:
        """Send what is there, then what comes."""
        for follower in self.followers:
            follower.start(event.say)
        self.keep()

    def on_step(self, event: StepDone) -> None:
        """There is a new row."""
        for follower in self.followers:
            follower.news.set()

    def on_checkpoint(self, event: CheckpointSaved) -> None:
        """Write down what each has got."""
        self.keep()

    def on_end(self, event: TrainingEnded) -> None:
        """Send the last rows."""
        for follower in self.followers:
            follower.end()
        with suppress(OSError):  # then more is sent again than is needed
            self.keep()

    def keep(self) -> None:
        """Write down what each has got. Raises OSError."""
        if self.followers:
            sent = {follower.name: follower.sent for follower in self.followers}
            replace_text(self.path, json.dumps({"id": self.id, "sent": sent}))

    def behind(self, step: int) -> bool:
        """Whether some tracker has not got every row up to a step."""
        return any(follower.sent < step for follower in self.followers)


def trackers_of(run: Run, id: str) -> Iterator[tuple[str, Callable[[int], Board]]]:
    """Name and opener of each tracker that the run asked for; TensorBoard also where it is installed and nobody decided. Raises ImportError."""
    if run.tensorboard or (run.tensorboard is None and importlib.util.find_spec("tensorboard")):
        present("tensorboard")
        yield "tensorboard", lambda step: TensorBoard(run.folder, step)
    for name in HOSTED:
        if getattr(run, name):
            present(name)
            yield name, lambda step, name=name: Hosted(name, run, id)  # type: ignore[misc]


def present(module: str) -> None:
    """ImportError where a tracker is not installed."""
    if importlib.util.find_spec(module) is None:
        title = "TensorBoard" if module == "tensorboard" else module
        raise ImportError(f'{title} is not installed: pip install "ramulus[{module}]", or {module}=false')


def former_id(run: Run) -> str:
    """What a run was called that began before ids were kept."""
    place = hashlib.blake2b(str(run.folder.resolve()).encode(), digest_size=6).hexdigest()
    return f"{run.name}-{place}" if run.wandb else run.name


def saved_in(path: Path) -> dict[str, Any]:
    """trackers.json; {} where it is missing or damaged."""
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


def _rows(path: Path, start: int) -> Iterator[tuple[int, dict[str, float], int]]:
    """(step, its numbers, where it ends) of every whole row from a byte on."""
    with open(path, "rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            row = json.loads(line)
            yield row["step"], flat_numbers(row), start


def flat_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row but its step, with the seconds of its phases."""
    plain = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
    return plain | {f"seconds/{name}": value for name, value in row.get("seconds", {}).items()}


def brief_error(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(": ")
