"""A reward that hangs is named on the screen, and one signal ends the run in order; a run works in a thread and under a running event loop."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from ramulus.core import run_folder
from ramulus.grow import threads as grow_threads
from ramulus.grow.grading import RewardError
from ramulus.grow.threads import DaemonThreads
from ramulus.run import interrupt, slow_rewards
from ramulus.run.config.find import find
from ramulus.run.launch import launch
from test_resume import ENV, RECIPE, metrics, same, train

HANGING = str(Path(__file__).with_name("run_hanging.py"))
pytestmark = pytest.mark.usefixtures("torch_as_it_was")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out) == 0
    return out


@pytest.fixture
def hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a file called `hang` makes rewards hang; quick to lose patience."""
    monkeypatch.setenv("HANG", str(tmp_path))
    monkeypatch.setattr(slow_rewards, "NAMED_AFTER", 0.1)
    monkeypatch.setattr(slow_rewards, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(interrupt, "GRACE", 0.2)
    (tmp_path / "hang").touch()
    return tmp_path


class Listening(io.StringIO):
    """A screen; the first time that a text is written to it, something is done."""

    def __init__(self, text: str, act) -> None:
        super().__init__()
        self.text, self.act = text, act

    def write(self, text: str) -> int:
        if self.text in text and self.act is not None:
            act, self.act = self.act, None
            act()
        return super().write(text)


@pytest.mark.parametrize("kind", ["plain", "waits", "blocks"])
def test_one_signal_ends_a_run_whose_reward_hangs(whole: Path, hang: Path, kind: str):
    screen = Listening("waiting for reward", lambda: os.kill(os.getpid(), signal.SIGINT))
    words = [f"out={hang / 'run'}", "save_every=100"]
    began = time.monotonic()
    status = launch(f"{HANGING}:with_{kind}", words, False, False, Console(file=screen, width=300))
    said = screen.getvalue()
    assert status == 130
    assert f"waiting for reward {kind!r} on task" in said
    assert "stopped" in said
    assert "--resume" in said
    assert time.monotonic() - began < 20
    (step,) = run_folder.steps(hang / "run")
    assert step - len(metrics(hang / "run")) in (0, 1), "what was done is kept; a step that was being evaluated is pending"
    (hang / "hang").unlink()
    assert train(hang / "run", "save_every=2", recipe=f"{HANGING}:with_{kind}") == 0
    told, expected = ([row["reward"] for row in metrics(out)] for out in (hang / "run", whole))
    assert told == expected
    find(HANGING).FREE.set()


def test_a_reward_that_ends_the_process_is_a_reward_that_fails(hang: Path):
    with pytest.raises(RewardError, match=r"reward 'leaves' on task .* raised SystemExit: 3; let it return a number"):
        launch(f"{HANGING}:with_leaves", [f"out={hang / 'run'}"], False, False, Console(quiet=True))
    assert run_folder.steps(hang / "run"), "what was done is kept"


@pytest.mark.slow
def test_a_process_with_a_hanging_reward_ends_at_once(hang: Path):
    """Python waits for no thread of a reward at its end."""
    command = [sys.executable, "-m", "ramulus.cli", "train", f"{HANGING}:with_plain", f"out={hang / 'run'}"]
    env = ENV | {"HANG": str(hang), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 100
    while not run_folder.steps(hang / "run"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    assert "stopped by SIGINT, everything done so far is saved" in out


def test_threads_end_with_the_process_and_are_used_again():
    threads, gate = DaemonThreads(2), threading.Event()
    assert threads.submit(threading.current_thread).result(5).daemon
    futures = [threads.submit(gate.wait) for _ in range(5)]
    time.sleep(0.05)
    assert [future.running() for future in futures] == [True, True, False, False, False]
    gate.set()
    assert all(future.result(5) for future in futures)
    names = {threads.submit(threading.current_thread).result(5).name for _ in range(20)}
    assert len(names) <= 2
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 / 0).result(5)


def test_calls_that_hang_and_are_given_up_take_no_thread_from_others(monkeypatch: pytest.MonkeyPatch):
    """As many as there are threads, twice over, some of them still without a thread."""
    monkeypatch.setattr(grow_threads, "THREADS", DaemonThreads(3))
    gate = threading.Event()

    async def given_up() -> None:
        calls = [asyncio.ensure_future(grow_threads.in_thread(gate.wait)) for _ in range(5)]
        await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    for _ in range(2):
        asyncio.run(given_up())
        assert asyncio.run(asyncio.wait_for(grow_threads.in_thread(lambda: 3), 5)) == 3
    assert grow_threads.THREADS.count <= 3
    gate.set()
    end = time.monotonic() + 5
    while grow_threads.THREADS.forsaken and time.monotonic() < end:
        time.sleep(0.01)
    assert not grow_threads.THREADS.forsaken, "threads of calls that were given up end with them"


# where a run is begun


def test_a_run_under_a_running_event_loop_is_the_same(whole: Path, tmp_path: Path):
    async def notebook() -> int:
        return train(tmp_path / "run")

    assert asyncio.run(notebook()) == 0
    same(whole, tmp_path / "run")


def test_a_run_in_a_thread_is_the_same_and_its_errors_are_raised(whole: Path, tmp_path: Path):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, tmp_path / "run").result(60) == 0
        with pytest.raises(ValueError, match="no task of rl is left to train on"):
            pool.submit(train, tmp_path / "other", "prompt_limit=1", "on_long=drop").result(60)
    same(whole, tmp_path / "run")


def test_a_signal_stops_a_run_under_a_running_event_loop(whole: Path, tmp_path: Path):
    screen = Listening("rl 2/6", lambda: os.kill(os.getpid(), signal.SIGINT))

    async def notebook() -> int:
        return launch(RECIPE, [f"out={tmp_path / 'run'}"], False, False, Console(file=screen, width=300))

    before = signal.getsignal(signal.SIGINT)
    assert asyncio.run(notebook()) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped by SIGINT, everything done so far is saved" in screen.getvalue()
    assert train(tmp_path / "run") == 0
    same(whole, tmp_path / "run")
