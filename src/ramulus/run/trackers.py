"""TensorBoard, wandb, trackio and MLflow: each follows metrics.jsonl in a thread of its own, so that none can stop, slow or change a run.

What a tracker missed, since it failed or the run was killed, it gets with the next row or the next `--resume`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from html import escape
from pathlib import Path
from typing import Any, Protocol

from ramulus.core import store
from ramulus.core.json_object import object_in
from ramulus.core.store import StoreError
from ramulus.core.tree import Author
from ramulus.engine.engine import Decode
from ramulus.look.viewer.show import decoder_of
from ramulus.run.callbacks import Callback, CheckpointSaved, StepDone, TrainingBegun, TrainingEnded
from ramulus.run.config.describe import to_json
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import replace_text

FILE = "trackers.json"
TRACKER_PATIENCE = 20.0  # seconds that a run waits at its end for a tracker to take the last rows
HOSTED = ("wandb", "trackio", "mlflow")


Table = list[dict[str, Any]]
"""Some completions of a step: a dict each, with the same keys."""


class Board(Protocol):
    """Somewhere numbers and tables are drawn."""

    def write(self, step: int, metrics: dict[str, float], table: Table) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars and completions for TensorBoard; what lies after `step` is purged."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self.summary = Summary
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float], table: Table) -> None:
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(self.summary(value=values), step)  # one event for all: add_scalar takes fifteen times as long
        if table:
            self.writer.add_text("completions", markdown(table), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """wandb, or trackio, which has the same calls; a resumed run goes on under the same id."""

    def __init__(self, module: str, run: Run, id: str) -> None:
        self.module = importlib.import_module(module)
        how = run.tracking
        options = {"project": how.project, "group": how.group or run.name, "config": to_json(run)}
        if module == "wandb":
            options |= {"id": id, "name": tracked_name(run), "tags": list(how.tags)}
        else:  # there a run goes on by its name, and tags are a part of its configuration
            options |= {"name": id, "config": options["config"] | {"tags": list(how.tags)}}
        self.run = self.module.init(resume="allow", **options)  # trackio's log() knows the run of its own thread alone

    def write(self, step: int, metrics: dict[str, float], table: Table) -> None:
        columns = list(table[0]) if table else []
        rows = [list(row.values()) for row in table]
        drawn = {"completions": self.module.Table(columns, rows) if self.module.__name__ == "wandb" else self.frame(table)} if table else {}
        self.run.log(metrics | drawn, step=step)

    def frame(self, table: Table) -> Any:
        """A table as trackio takes it."""
        return self.module.Table(dataframe=importlib.import_module("pandas").DataFrame(table))

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """MLflow, where MLFLOW_TRACKING_URI says; the project is an experiment, and a resumed run goes on in the same one."""

    def __init__(self, run: Run, id: str) -> None:
        module = importlib.import_module("mlflow")
        self.client, how = module.MlflowClient(), run.tracking
        there = self.client.get_experiment_by_name(how.project)
        experiment = there.experiment_id if there is not None else self.client.create_experiment(how.project)
        runs = self.client.search_runs([experiment], f"tags.ramulus_id = '{id}'", max_results=1)
        tags = {"ramulus_id": id, "group": how.group or run.name} | dict.fromkeys(how.tags, "true")
        self.run = runs[0] if runs else self.client.create_run(experiment, tags=tags, run_name=tracked_name(run))
        self.id = self.run.info.run_id
        if not runs:
            self.client.log_dict(self.id, to_json(run), "run.json")
        self.metric = module.entities.Metric

    def write(self, step: int, metrics: dict[str, float], table: Table) -> None:
        now = int(time.time() * 1000)
        names = {name: re.sub(r"[^\w./ :-]", "_", name.replace("@", "_at_")) for name in metrics}  # what MLflow takes
        rows = [self.metric(names[name], float(value), now, step) for name, value in metrics.items() if math.isfinite(value)]
        self.client.log_batch(self.id, metrics=rows)
        if table:
            columns = {name: [row[name] for row in table] for name in table[0]}
            self.client.log_table(self.id, columns, f"completions/{step:06d}.json")

    def close(self) -> None:
        self.client.set_terminated(self.id)


def tracked_name(run: Run) -> str:
    """What a run is called where people see it; every seed has a name of its own."""
    return f"{run.tracking.name or run.name}-seed{run.seed}"


def plain_name(name: str) -> str:
    """A name of letters, digits, dots, dashes and underscores, as part of an id: services refuse slashes, colons and quotes there."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"


MARKS = re.compile(r"[\\`*_~\[\]()!|:#+-]")  # what Markdown, or a renderer that makes links of addresses, takes for more than text
BREAK = re.compile(r"\r\n?|[\n\v\f\x1c-\x1e\x85\u2028\u2029]")


def markdown(table: Table) -> str:
    """A table for TensorBoard; what a model wrote cannot break its cells."""
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value: Any) -> str:
    """Text inside a Markdown table, which shows as it was written: no mark-up of a model's becomes a picture, a link or another cell."""
    text = MARKS.sub(lambda match: f"&#{ord(match[0])};", escape(str(value)))
    return BREAK.sub("<br>", text)


def completions(run: Run, step: int, decode: Decode | None) -> Table:
    """The paths of a step's first trees, where its trees were written and a table is due; at most `tracking.completions` of them."""
    how, file = run.tracking, run.folder / "trees" / f"{step:06d}.jsonl"
    if not how.completions or (step != 1 and step % how.every) or not file.is_file():
        return []
    decode = decode or decoder_of(file) or str
    table: Table = []
    for tree in store.read(file):
        for leaf in (leaf for leaf in tree.leaves() if leaf.author is Author.POLICY):
            if len(table) == how.completions:
                return table
            row = {"step": step, "problem": tree.task.text, "answer": tree.task.answer, "completion": decode(leaf.response())}
            table.append(row | {"reward": leaf.reward, "finish": leaf.finish, "tokens": len(leaf.response())})
    return table


class Follower:
    """Sends every row of a run's metrics after step `sent` to a board, with completions where a table is due; after a failure it opens the board
    anew at the next row."""

    def __init__(self, name: str, opened: Callable[[int], Board], run: Run, sent: int, decode: Decode | None = None) -> None:
        self.name, self.opened, self.run, self.sent, self.decode = name, opened, run, sent, decode
        self.path = run.folder / "metrics.jsonl"
        self.board: Board | None = None
        self.failure = ""
        self.unread = False  # whether it was said that a file of trees is damaged
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
                    self.board.write(step, numbers, self.table(step))
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

    def table(self, step: int) -> Table:
        """The completions of a step; none, which is said once, of a file that cannot be read: the numbers go on."""
        try:
            return completions(self.run, step, self.decode)
        except (StoreError, OSError) as error:
            if not self.unread:
                self.say(f"{self.name} gets no completions of step {step} ({brief_error(error)}); the numbers go on")
            self.unread = True
            return []

    def close_board(self) -> None:
        """Close the board that rows go to, if one is open."""
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

    def __init__(self, run: Run, step: int, decode: Decode | None = None) -> None:
        """Of a run that has done `step` steps; `decode` is the text of its tokens. ImportError for a tracker that is not installed."""
        self.path = run.folder / FILE
        saved = object_in(self.path)
        self.id = str(saved.get("id") or (former_id(run) if step else f"{plain_name(tracked_name(run))}-{secrets.token_hex(4)}"))
        counts = saved["sent"] if isinstance(saved.get("sent"), dict) else {}
        sent = {name: min(count, step) for name, count in counts.items() if isinstance(count, int)}
        self.followers = [Follower(name, opened, run, sent.get(name, step), decode) for name, opened in trackers_of(run, self.id)]

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
            yield name, lambda step, name=name: Mlflow(run, id) if name == "mlflow" else Hosted(name, run, id)  # type: ignore[misc]


def present(module: str) -> None:
    """ImportError where a tracker is not installed."""
    if importlib.util.find_spec(module) is None:
        title = "TensorBoard" if module == "tensorboard" else module
        raise ImportError(f'{title} is not installed: pip install "ramulus[{module}]", or {module}=false')


def former_id(run: Run) -> str:
    """What a run was called that began before ids were kept."""
    place = hashlib.blake2b(str(run.folder.resolve()).encode(), digest_size=6).hexdigest()
    return f"{run.name}-{place}" if run.wandb else run.name


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
