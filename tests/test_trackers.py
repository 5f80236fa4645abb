"""Screens and trackers that fail cost a run their words and nothing else: every row is written once, and a tracker gets what it missed."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from ramulus.cli import main
from ramulus.core import run_folder
from ramulus.run import trackers
from ramulus.run.launch import launch
from ramulus.run.logbook import Logbook, cut_back
from test_resume import ENV, RECIPE, metrics, same, tensors, train

pytestmark = pytest.mark.usefixtures("torch_as_it_was")
FAKE = '''"""Stands where wandb or trackio would be: every row goes to a file; a file called `broken` makes it fail."""
import json, os, pathlib
HERE = pathlib.Path(os.environ["FAKE"])
def fail():
    if (HERE / "broken").exists():
        raise RuntimeError((HERE / "broken").read_text() or "no [bold]network")
def init(**said):
    fail()
    with open(HERE / "init", "a") as file:
        file.write(json.dumps({k: v for k, v in said.items() if k not in ("config", "tags")}) + "\\n")
    import sys
    return sys.modules[__name__]
def log(numbers, step):
    fail()
    with open(HERE / "log", "a") as file:
        file.write(json.dumps([step, numbers["reward"], numbers["seconds/grow"]]) + "\\n")
def finish():
    pass
class Table:
    def __init__(self, columns=None, data=None, dataframe=None):
        self.rows = data
'''


class Failing(io.StringIO):
    """A screen on which only so many writes succeed."""

    def __init__(self, good: int, error: Exception) -> None:
        super().__init__()
        self.good, self.error = good, error

    def write(self, text: str) -> int:
        self.good -= 1
        if self.good < 0:
            raise self.error
        return super().write(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out, "steps=3") == 0
    return out


@pytest.fixture
def hosted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to which stand-ins for wandb and trackio write."""
    for name in ("wandb", "trackio"):
        (tmp_path / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FAKE", str(tmp_path))
    return tmp_path


def logged(folder: Path) -> list[list[float]]:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def expected(out: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[row["step"], row["reward"], row["seconds"]["grow"]] for row in rows]


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "pipe"), OSError(28, "full"), ValueError("closed"), UnicodeEncodeError("ascii", "⏎", 0, 1, "no")]
)
@pytest.mark.parametrize("good", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_screen_that_fails_changes_nothing(whole: Path, tmp_path: Path, error: Exception, good: int):
    console = Console(file=Failing(good, error))
    assert launch(RECIPE, [f"out={tmp_path / 'run'}", "steps=3"], False, False, console) == 0
    same(whole, tmp_path / "run")


def test_a_terminal_that_fails_under_the_bar_changes_nothing(whole: Path, tmp_path: Path):
    console = Console(file=Failing(3, OSError(5, "gone")), force_terminal=True)
    assert launch(RECIPE, [f"out={tmp_path / 'run'}", "steps=3"], False, False, console) == 0
    same(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_reader_that_goes_away_stops_no_run(whole: Path, tmp_path: Path):
    command = [sys.executable, "-m", "ramulus.cli", "train", RECIPE, f"out={tmp_path / 'run'}", "steps=3"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, env=ENV, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    same(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_run_without_standard_streams_writes_into_its_own_files_alone(whole: Path, tmp_path: Path):
    words = ["-m", "ramulus.cli", "train", RECIPE, f"out={tmp_path / 'run'}", "steps=3"]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, *words], env=ENV, timeout=120)
    assert done.returncode == 0
    same(whole, tmp_path / "run")


def test_a_full_disk_in_the_metrics_is_said_and_made_good(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = Logbook.write
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(self: Logbook, step: int, numbers: dict) -> None:
        if step == 3:  # no file may grow beyond what this one has, and half a row
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.end + 200, limits[1]))
        try:
            real(self, step, numbers)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(Logbook, "write", write)
    with pytest.raises(SystemExit) as stopped:
        main(["train", RECIPE, f"out={tmp_path / 'run'}", "steps=3", "save_every=100"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"cannot write {tmp_path / 'run' / 'metrics.jsonl'}: File too large; free space, then go on with --resume" in said
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert run_folder.steps(tmp_path / "run") == [3], "the step is done and kept"
    monkeypatch.setattr(Logbook, "write", real)
    assert train(tmp_path / "run", "save_every=2") == 0
    assert metrics(tmp_path / "run") == metrics(whole)
    assert all(value.equal(tensors(whole)[name]) for name, value in tensors(tmp_path / "run").items())


@pytest.mark.parametrize("folder", ["trees", "evals"])
def test_what_cannot_be_written_of_a_step_is_said_and_made_good(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
):
    out = tmp_path / "run"
    out.mkdir()
    (out / folder).write_text("in the way")
    with pytest.raises(SystemExit) as stopped:
        main(["train", RECIPE, f"out={out}", "steps=3"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"cannot write {out / folder}" in said
    assert said.count("\n") == 1
    assert len(run_folder.steps(out)) > 0, "the step is done and kept"
    (out / folder).unlink()
    assert train(out) == 0
    same(whole, out)


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda path: path.unlink(), []),
        (lambda path: path.write_bytes(b""), []),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), [1, 2]),
        (lambda path: path.write_bytes(b"\0" * 5000 + path.read_bytes().split(b"\n")[-2] + b"\n"), []),
        (lambda path: path.write_bytes(path.read_bytes() * 2), [1, 2, 3]),
        (lambda path: path.write_bytes(b"[1]\n" + path.read_bytes() + b'{"step": 9}\n{"st'), [1, 2, 3]),
    ],
)
def test_damaged_metrics_are_cut_to_what_is_whole(whole: Path, tmp_path: Path, damage, left: list[int]):
    import shutil

    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / "metrics.jsonl")
    console = Console(file=io.StringIO(), width=300)
    assert launch(RECIPE, [f"out={tmp_path / 'run'}", "steps=4"], True, False, console) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [*left, 4]
    assert (f"has no rows of {3 - len(left)} of the 3 steps done" in console.file.getvalue()) == (len(left) < 3)


def test_rows_are_cut_back_to_a_step(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert cut_back(path, 0) == 0
    rows = [b'{"step": %d}\n' % step for step in (1, 2, 3)]
    for text, step, lost, left in (
        (rows, 2, 0, rows[:2]),
        (rows, 0, 0, []),
        (rows, 5, 2, rows),
        ([rows[1], rows[0]], 2, 0, rows[:2]),
        ([rows[0], rows[0], rows[2]], 3, 1, [rows[0], rows[2]]),
    ):
        path.write_bytes(b"".join(text))
        assert cut_back(path, step) == lost
        assert path.read_bytes() == b"".join(left)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_cannot_begin_is_refused_before_the_run_is_claimed(
    hosted: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    (hosted / "broken").write_text("api_key not configured\n(no-tty)")
    with pytest.raises(SystemExit) as stopped:
        main(["train", RECIPE, f"out={hosted / 'run'}", "steps=1", f"{name}=true"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"{name} cannot be used (RuntimeError: api_key not configured (no-tty)): set it up" in said
    assert f"set {name}=false" in said
    assert not (hosted / "run" / "run.json").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_fails_is_sent_what_it_missed(hosted: Path, name: str):
    out = hosted / "run"
    words = [f"out={out}", f"{name}=true"]
    assert launch(RECIPE, [*words, "steps=1"], False, False, Console(quiet=True)) == 0
    (hosted / "broken").touch()
    console = Console(file=io.StringIO(), width=300)
    assert launch(RECIPE, [*words, "steps=3"], True, False, console) == 0
    assert len(metrics(out)) == 3
    said = console.file.getvalue()
    assert said.count(f"{name} fails (RuntimeError: no [bold]network): the run goes on") == 1
    assert f"{name} has the rows up to step 1 only" in said
    assert logged(hosted) == expected(out)[:1]
    (hosted / "broken").unlink()
    assert launch(RECIPE, words, True, False, Console(quiet=True)) == 0, "a finished run only sends"
    assert logged(hosted) == expected(out)
    ids = {(row.get("id"), row["name"]) for row in map(json.loads, (hosted / "init").read_text().splitlines())}
    assert len(ids) == 1, "it goes on under the same id"
    assert launch(RECIPE, [*words, "steps=1"], False, True, Console(quiet=True)) == 0
    ids |= {(row.get("id"), row["name"]) for row in map(json.loads, (hosted / "init").read_text().splitlines())}
    assert len(ids) == 2, "a fresh run has an id of its own"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sent": 3}', '{"sent": {"wandb": "x"}, "id": null}'])
def test_damaged_notes_on_trackers_stop_no_run(hosted: Path, text: str):
    out = hosted / "run"
    assert launch(RECIPE, [f"out={out}", "wandb=true", "steps=1"], False, False, Console(quiet=True)) == 0
    (out / "trackers.json").write_text(text)
    assert train(out, "steps=2") == 0
    assert [row[0] for row in logged(hosted)] == [1, 2]


def test_a_tracker_that_hangs_holds_up_nothing(hosted: Path, whole: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers, "TRACKER_PATIENCE", 0.2)
    never = threading.Event()
    monkeypatch.setattr(trackers.Hosted, "write", lambda *_: never.wait())
    console = Console(file=io.StringIO(), width=300)
    assert launch(RECIPE, [f"out={hosted / 'run'}", "steps=3", "wandb=true"], False, False, console) == 0
    same(whole, hosted / "run")
    assert "wandb has the rows up to step 0 only" in console.file.getvalue()
    never.set()


def test_tensorboard_that_cannot_be_written_catches_up(whole: Path, tmp_path: Path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    out.mkdir()
    (out / "tensorboard").write_text("in the way")
    console = Console(file=io.StringIO(), width=300)
    assert launch(RECIPE, [f"out={out}", "steps=3", "tensorboard=true"], False, False, console) == 0
    assert "tensorboard fails" in console.file.getvalue()
    same(whole, out)
    (out / "tensorboard").unlink()
    assert launch(RECIPE, [f"out={out}", "steps=4"], True, False, Console(quiet=True)) == 0
    board = EventAccumulator(str(out / "tensorboard"), purge_orphaned_data=True)
    board.Reload()
    assert [event.step for event in board.Scalars("reward")] == [1, 2, 3, 4]
