"""A checkpoint is brought to the disk while the run takes its next step: nothing waits for the disk, and nothing that went wrong there is lost."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ramulus.core import run_folder
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.grow.grading import RewardError
from ramulus.learn.policy import in_process
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.native.memory import OutOfMemory
from ramulus.run import checkpoint
from ramulus.run.ahead import AheadRollouts
from ramulus.run.event_loop import run_to_end
from ramulus.run.launch import launch
from ramulus.run.saving import Saving
from test_resume import RECIPE, same

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


def test_the_next_step_samples_while_a_checkpoint_is_brought_to_the_disk(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sampled, waited = threading.Event(), []
    write_files, put, sample = checkpoint.write_files, checkpoint.put, LocalEngine.sample

    async def noted(*arguments: Any) -> Any:
        sampled.clear()
        return await write_files(*arguments)

    def slow_disk(part: Path, final: Path, there: bool) -> None:
        waited.append(final.name == "step-000006" or sampled.wait(60))  # after the last step nothing is sampled
        put(part, final, there)

    async def told(self: LocalEngine, *arguments: Any, **options: Any) -> Any:
        sampled.set()
        return await sample(self, *arguments, **options)

    monkeypatch.setattr(checkpoint, "write_files", noted)
    monkeypatch.setattr(checkpoint, "put", slow_disk)
    monkeypatch.setattr(LocalEngine, "sample", told)
    assert launch(RECIPE, [f"out={tmp_path / 'run'}"], False, False, Console(quiet=True)) == 0
    assert len(waited) > 2
    assert all(waited), "no step was sampled while a checkpoint was under way"
    same(whole, tmp_path / "run")


@pytest.mark.parametrize("moment", ["put", "drop_old", "seal"])
def test_what_goes_wrong_on_the_disk_later_ends_the_run_in_a_sentence(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    real, calls = getattr(checkpoint, moment), 0

    def full(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= 3:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint, moment, full)
    with pytest.raises(OSError, match="No space left on device"):
        launch(RECIPE, [f"out={tmp_path / 'run'}"], False, False, Console(quiet=True))
    left = run_folder.steps(tmp_path / "run")
    assert left[-1] < 6
    assert not run_folder.wrong_with(run_folder.path_of(tmp_path / "run", left[-1]))
    monkeypatch.undo()
    assert launch(RECIPE, [f"out={tmp_path / 'run'}"], True, False, Console(quiet=True)) == 0
    same(whole, tmp_path / "run")


def written(step: int) -> Callable[[Path], Awaitable[dict[str, Any]]]:
    async def files(part: Path) -> dict[str, Any]:
        (part / "weights").write_text(str(step))
        return {}

    return files


def test_a_wait_that_is_cancelled_leaves_the_checkpoint_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a second Ctrl-C does: what is saved next waits for the one before, and neither deletes the other's files."""
    go, put, told = threading.Event(), checkpoint.put, []
    monkeypatch.setattr(checkpoint, "put", lambda *arguments: (go.wait(60), put(*arguments)))
    run: Any = SimpleNamespace(folder=tmp_path, keep=2, keep_optimizer=True)

    async def work() -> None:
        saving = Saving(run, lambda step, path: told.append(step))
        await saving.save(1, written(1), {"pending": None}, None, lambda: None)
        for _ in range(2):
            wait = asyncio.ensure_future(saving.settled())
            await asyncio.sleep(0)
            wait.cancel()
            with pytest.raises(asyncio.CancelledError):
                await wait
        second = asyncio.ensure_future(saving.save(2, written(2), {"pending": None}, None, lambda: None))
        await asyncio.sleep(0.01)
        assert not second.done()
        assert run_folder.steps(tmp_path) == []
        go.set()
        await second
        await saving.settled()
        saving.close()

    asyncio.run(work())
    assert (run_folder.steps(tmp_path), told) == ([1, 2], [1, 2])
    assert [(run_folder.path_of(tmp_path, step) / "weights").read_text() for step in (1, 2)] == ["1", "2"]


def once_full(monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """The disk is full when the checkpoint of step 2 is brought there."""
    put, left = checkpoint.put, [times]

    def full(part: Path, final: Path, there: bool) -> None:
        if final.name == "step-000002" and left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        put(part, final, there)

    monkeypatch.setattr(checkpoint, "put", full)


def test_what_went_wrong_on_the_disk_is_said_beside_another_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    once_full(monkeypatch)
    update, get, numbers = TorchPolicy.update, AheadRollouts.get, [0]

    async def noted(self: AheadRollouts, number: int, cursor: Any) -> Any:
        numbers.append(number)
        return await get(self, number, cursor)

    def fail(self: TorchPolicy, lr: float) -> dict[str, float]:
        if numbers[-1] == 3:
            raise RuntimeError("something in the update")
        return update(self, lr)

    monkeypatch.setattr(AheadRollouts, "get", noted)
    monkeypatch.setattr(TorchPolicy, "update", fail)
    with pytest.raises(RuntimeError, match="something in the update") as raised:
        launch(RECIPE, [f"out={tmp_path / 'run'}", "save_every=1"], False, False, Console(quiet=True))
    assert ["cannot save step 2" in note for note in raised.value.__notes__] == [True]


def test_a_run_that_ends_early_saves_anew_what_could_not_be_saved_before(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    once_full(monkeypatch)
    real = AheadRollouts.get

    async def get(self: AheadRollouts, number: int, cursor: Any) -> Any:
        if number == 3:
            raise RewardError("no reward")
        return await real(self, number, cursor)

    monkeypatch.setattr(AheadRollouts, "get", get)
    with pytest.raises(RewardError):
        launch(RECIPE, [f"out={tmp_path / 'run'}", "save_every=1"], False, False, Console(quiet=True))
    assert run_folder.steps(tmp_path / "run") == [1, 2]
    monkeypatch.undo()
    assert launch(RECIPE, [f"out={tmp_path / 'run'}"], True, False, Console(quiet=True)) == 0
    same(whole, tmp_path / "run")


def test_a_kill_between_two_checkpoints_of_one_step_leaves_the_first(whole: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in run_folder.steps(run):
        path = run_folder.path_of(run, step)
        if step == 6:
            path.rename(path.with_name(f".{path.name}.old.part"))
        else:
            shutil.rmtree(path)
    console = Console(file=io.StringIO(), width=200)
    assert launch(RECIPE, [f"out={run}", "steps=7"], True, False, console) == 0
    assert "going on after step 6 of 7" in console.file.getvalue()


def test_trees_are_on_the_disk_before_the_checkpoint_that_goes_on_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sync, synced = checkpoint.sync, []
    monkeypatch.setattr(checkpoint, "sync", lambda path: (synced.append(path), sync(path)))
    run = tmp_path / "run"
    assert launch(RECIPE, [f"out={run}"], False, False, Console(quiet=True)) == 0
    names = [path.relative_to(run).as_posix() for path in synced]
    trees = sorted(path.name for path in (run / "trees").iterdir())
    assert sorted(name.removeprefix("trees/") for name in names if name.startswith("trees/")) == trees
    for name in trees:
        following = [other for other in names[names.index(f"trees/{name}") :] if other.endswith("state.json")]
        assert following[0].startswith("checkpoints/.step-")
        assert int(following[0][18:24]) >= int(name[:6])


def test_whoever_goes_on_after_a_signal_finds_the_work_of_another_thread_ended():
    """As in a notebook, whose own event loop is running: the second Ctrl-C comes out of the wait."""
    begun, ended, threads = threading.Event(), [], []

    async def work() -> None:
        threads.append(threading.current_thread())
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)  # saves
            ended.append(True)

    async def notebook() -> None:
        threading.Thread(target=lambda: begun.wait(20) and os.kill(os.getpid(), signal.SIGINT)).start()
        old = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                run_to_end(work())
        finally:
            signal.signal(signal.SIGINT, old)
        assert ended == [True]
        assert not threads[0].is_alive()

    asyncio.run(notebook())


@pytest.mark.parametrize("tokens", ["auto", "256"])
def test_rows_that_memory_did_not_hold_stay_halved_at_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: str):
    real, seen = in_process.accumulated, []

    def small(policy: TorchPolicy, mix: Any, batches: Any, left: Any = None) -> Any:
        seen.append(max(len(batch.token) for batch in batches))
        if seen[-1] > 60:
            policy.discard()
            raise OutOfMemory("no room")
        return real(policy, mix, batches, left)

    monkeypatch.setattr(in_process, "accumulated", small)
    words = [f"tokens_per_batch={tokens}", "optimizer.decay=constant", "evals=none", "steps=4"]
    with pytest.warns(RuntimeWarning, match="memory did not hold"):
        assert launch(RECIPE, [f"out={tmp_path / 'whole'}", *words], False, False, Console(quiet=True)) == 0
    with pytest.warns(RuntimeWarning, match="memory did not hold"):
        assert launch(RECIPE, [f"out={tmp_path / 'cut'}", *words[:3], "steps=2"], False, False, Console(quiet=True)) == 0
    seen.clear()
    assert launch(RECIPE, [f"out={tmp_path / 'cut'}", *words], True, False, Console(quiet=True)) == 0
    assert max(seen) <= 60
    same(tmp_path / "whole", tmp_path / "cut")
