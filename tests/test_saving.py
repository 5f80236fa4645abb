"""A checkpoint is brought to the disk while the run takes its next step: nothing waits for the disk, and nothing that went wrong there is lost."""

from __future__ import annotations

import asyncio
import io
import math
import os
import random
import shutil
import signal
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console

import ramulus
from ramulus.core import run_folder
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.grow.grading import RewardError
from ramulus.learn.policy import in_process
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.native.memory import OutOfMemory
from ramulus.run import checkpoint
from ramulus.run.ahead import AheadRollouts
from ramulus.run.callbacks import Callback, StepDone
from ramulus.run.config.recipe import AdamW
from ramulus.run.config.resume import build, prepare
from ramulus.run.event_loop import run_to_end
from ramulus.run.interrupt import ECHO, Interrupt, Stopped
from ramulus.run.launch import launch
from ramulus.run.saving import Saving
from run_recipe import rl
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

    monkeypatch.setitem(in_process.CALLS, "accumulate", small)
    words = [f"tokens_per_batch={tokens}", "optimizer.decay=constant", "evals=none", "steps=4"]
    with pytest.warns(RuntimeWarning, match="memory did not hold"):
        assert launch(RECIPE, [f"out={tmp_path / 'whole'}", *words], False, False, Console(quiet=True)) == 0
    with pytest.warns(RuntimeWarning, match="memory did not hold"):
        assert launch(RECIPE, [f"out={tmp_path / 'cut'}", *words[:3], "steps=2"], False, False, Console(quiet=True)) == 0
    seen.clear()
    assert launch(RECIPE, [f"out={tmp_path / 'cut'}", *words], True, False, Console(quiet=True)) == 0
    assert max(seen) <= 60
    same(tmp_path / "whole", tmp_path / "cut")


def failing(owner: Any, name: str, number: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the call of a method with this number raise."""
    usual, calls = getattr(owner, name), []

    async def method(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise error
        return await usual(self, *arguments, **options)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(
    ("owner", "method", "number", "saved"),
    [
        (in_process.InProcess, "score", 4, 3),  # nothing was learned of the fourth step
        (in_process.InProcess, "accumulate", 7, 3),
        (LocalEngine, "load", 5, 4),  # the fourth was learned, and its weights did not arrive
    ],
)
def test_what_goes_wrong_in_a_step_loses_none_before_it(
    owner: Any, method: str, number: int, saved: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    failing(owner, method, number, RuntimeError("the machine had enough"), monkeypatch)
    words = [f"out={tmp_path / 'run'}", "save_every=100", "eval_every=3"]
    with pytest.raises(RuntimeError, match="had enough"):
        launch(RECIPE, words, False, False, Console(quiet=True))
    monkeypatch.undo()
    assert run_folder.steps(tmp_path / "run")[-1] == saved
    assert launch(RECIPE, [f"out={tmp_path / 'run'}", "save_every=2"], True, False, Console(quiet=True)) == 0
    same(whole, tmp_path / "run")


def test_trees_that_cannot_be_written_lose_no_step(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ramulus.core import store

    usual = store.write

    def refused(path: Path, trees: Any, append: bool = False) -> int:
        if path.name == "000004.jsonl":
            raise store.StoreError("Task.extra: a date cannot be stored")
        return usual(path, trees, append)

    monkeypatch.setattr(store, "write", refused)
    with pytest.raises(store.StoreError):
        launch(RECIPE, [f"out={tmp_path / 'run'}", "save_every=100"], False, False, Console(quiet=True))
    assert run_folder.steps(tmp_path / "run")[-1] == 4


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal_name == "SIGTERM"
        interrupt.heard -= ECHO
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_grows_ahead_is_given_up_some_time_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramulus.run.interrupt.ENDING", 0.1)

    async def stopped(seconds: float) -> str:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            return await interrupt.ending(asyncio.sleep(seconds, "grown"))

    assert asyncio.run(stopped(0.05)) == "grown"
    with pytest.raises(Stopped, match="SIGTERM"):
        asyncio.run(stopped(60))


class Draws(Callback):
    """Draws at random whenever it is called."""

    def on_step(self, event: StepDone) -> None:
        random.random(), numpy.random.rand(), torch.rand(1)

    on_evaluation = on_checkpoint = on_begin = on_step  # type: ignore[assignment]


def test_a_callback_that_draws_changes_no_run(tmp_path: Path) -> None:
    for name, callbacks in (("one", []), ("other", [Draws()])):
        ramulus.train(rl(), "steps=3", "save_every=1", out=tmp_path / name, callbacks=callbacks, quiet=True)
    ramulus.train(rl(), "steps=6", out=tmp_path / "other", callbacks=[Draws()], resume=True, quiet=True)
    ramulus.train(rl(), "steps=6", out=tmp_path / "one", resume=True, quiet=True)
    same(tmp_path / "one", tmp_path / "other")


def test_what_is_given_as_an_object_now_beats_what_was_overridden_then(tmp_path: Path) -> None:
    ramulus.train(rl(), "steps=2", "eval_every=0", out=tmp_path / "a", quiet=True)
    (tmp_path / "a").rename(tmp_path / "b")
    with prepare((replace(rl(), steps=4, out=str(tmp_path / "b")),), [], resume=True).held:
        pass
    plan = prepare((replace(rl(), steps=4, out=str(tmp_path / "b")),), [], resume=True)
    plan.held.close()
    assert (plan.folder, plan.stages[0].steps, plan.stages[0].eval_every) == (tmp_path / "b", 4, 0)
    plan = prepare((replace(rl(), out=str(tmp_path / "b")),), ["steps=5"], resume=True)
    plan.held.close()
    assert plan.stages[0].steps == 5
    plan = prepare((replace(rl(), out=str(tmp_path / "b")),), [], resume=True)
    plan.held.close()
    assert plan.stages[0].steps == 2, "the object is as it was, and so is what was said beside it"


def test_stages_lie_in_one_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set out=FOLDER"):
        build(f"{RECIPE}:stages", [f"sft.out={tmp_path}"])


def test_a_folder_in_the_home_is_that_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert replace(rl(), out="~/mine").folder == tmp_path / "mine"


@pytest.mark.parametrize("values", [{"lr": math.inf}, {"lr": math.nan}, {"eps": math.inf}, {"weight_decay": math.inf}])
def test_a_rate_is_a_number(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="optimizer"):
        AdamW(**values)


def test_a_stage_that_cannot_be_built_closes_its_learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    usual = in_process.InProcess.close
    monkeypatch.setattr(in_process.InProcess, "close", lambda self: (closed.append(self), usual(self)))
    def refused(*parts: Any) -> None:
        raise ValueError("settings that only show with the tasks at hand")

    monkeypatch.setattr("ramulus.run.stage._check", refused)
    with pytest.raises(ValueError, match="at hand"):
        launch(RECIPE, [f"out={tmp_path / 'run'}"], False, False, Console(quiet=True))
    assert len(closed) == 1
