"""One writer a folder: a live run or evaluation is left alone, a lock that a dead process left is no obstacle."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from ramulus.cli import main
from ramulus.core import run_folder
from ramulus.run import checkpoint, lock
from ramulus.run.lock import LOCK_FILE, Lock, being_read, reading
from test_resume import RECIPE, metrics, start, train

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_live_run_is_left_alone_and_a_killed_one_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    process = start(out, "steps=400", "save_every=2", "eval_every=0")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        before = files(tmp_path)
        for folder, *flags in ([out, "--resume"], [out, "--fresh"], [out], [out.parent / "." / "run", "--resume"]):
            said = refused(capsys, "train", RECIPE, f"out={folder}", *flags)
            assert f"process {process.pid} on {socket.gethostname()} is still at work in {out} since" in said
            assert said.count("\n") == 1
        assert files(tmp_path) == before
    finally:
        process.kill()
        process.communicate()
    assert (out / LOCK_FILE).exists()
    last = len(metrics(out)) + 1
    assert train(out, f"steps={last}") == 0
    assert [row["step"] for row in metrics(out)] == list(range(1, last + 1))
    assert not (out / LOCK_FILE).exists()


def test_a_run_above_or_below_a_live_one_is_refused(tmp_path: Path):
    top, stage = tmp_path / "run", tmp_path / "run" / "2-rl"
    assert train(top, "steps=1") == 0
    with Lock([stage]):
        with pytest.raises(ValueError, match=f"at work in {stage}"):
            train(stage, "steps=1")
        with pytest.raises(ValueError, match=f"at work in {stage}"):
            main_fresh(top)
    assert not (tmp_path / "run.1").exists()
    main_fresh(top)
    assert run_folder.steps(tmp_path / "run.1") == run_folder.steps(top) == [1]
    assert not list(tmp_path.rglob(LOCK_FILE))


def main_fresh(out: Path) -> None:
    from rich.console import Console

    from ramulus.run.launch import launch

    assert launch(RECIPE, [f"out={out}", "steps=1"], False, True, Console(quiet=True)) == 0


def test_a_folder_is_free_again_for_one_at_a_time(tmp_path: Path):
    held = Lock([tmp_path / "a", tmp_path / "b"])
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            Lock([tmp_path / "c", tmp_path / name])
    assert not (tmp_path / "c").exists(), "nothing is left of what was refused"
    held.release()
    assert not list(tmp_path.iterdir())
    won: list[Lock] = []
    lost: list[ValueError] = []

    def ask() -> None:
        try:
            won.append(Lock([tmp_path / "a"]))
        except ValueError as error:
            lost.append(error)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 19)
    won[0].release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 3}', b"\x00" * 40])
def test_what_stands_in_a_lock_that_nobody_holds_is_no_obstacle(tmp_path: Path, content: bytes):
    (tmp_path / LOCK_FILE).write_bytes(content)
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    Lock([tmp_path]).release()
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life every 20 ms."""
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "SILENT", 0.3)


@pytest.mark.usefixtures("quick")
def test_another_host_that_is_silent_has_left_and_one_that_is_not_is_at_work(tmp_path: Path):
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"process": 7, "host": "elsewhere", "since": 0.0}))
    with pytest.warns(UserWarning, match="process 7 on elsewhere has left"):
        Lock([tmp_path]).release()
    path.write_text(json.dumps({"process": 7, "host": "elsewhere", "since": 0.0}))
    over = threading.Event()
    living = threading.Thread(target=lambda: [os.utime(path) for _ in iter(lambda: over.wait(0.02), True)])
    living.start()
    try:
        with pytest.warns(UserWarning, match="has left"), pytest.raises(ValueError, match="process 7 on elsewhere is still at work"):
            Lock([tmp_path])
    finally:
        over.set()
        living.join()


@pytest.mark.usefixtures("quick")
def test_signs_of_life_are_enough_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    with Lock([tmp_path]), pytest.warns(UserWarning, match="has left"), pytest.raises(ValueError, match="still at work"):
        Lock([tmp_path])
    Lock([tmp_path]).release()


def test_a_process_that_was_begun_by_a_dead_one_is_told_apart(tmp_path: Path):
    path = tmp_path / LOCK_FILE
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    path.write_text(json.dumps({"process": child, "host": socket.gethostname(), "since": time.time()}))
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=f"what process {child} on .* began before it ended is still at work"):
            Lock([tmp_path])


def test_a_checkpoint_that_is_being_read_is_not_deleted(tmp_path: Path):
    for step in (1, 2):
        path = run_folder.path_of(tmp_path, step)
        path.mkdir(parents=True)
        (path / "state.json").write_text("{}")
    with reading(run_folder.path_of(tmp_path, 1)):
        assert being_read(run_folder.path_of(tmp_path, 1))
        checkpoint.drop_old(tmp_path, 1, None)
        assert run_folder.steps(tmp_path) == [1, 2]
    checkpoint.drop_old(tmp_path, 1, None)
    assert run_folder.steps(tmp_path) == [2]


def test_an_evaluation_has_its_folder_for_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train(tmp_path / "run", "steps=1") == 0
    words = ["eval", str(tmp_path / "run"), "--tasks", "chain", "--limit", "2", "--samples", "1", "--max-tokens", "4"]
    with Lock([tmp_path / "out"]):
        assert "at work in" in refused(capsys, *words, "--out", str(tmp_path / "out"))
    with Lock([tmp_path / "run"]), pytest.raises(SystemExit) as ended:  # a run at work is no obstacle to measuring it
        main([*words, "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert not (tmp_path / "out" / LOCK_FILE).exists()
