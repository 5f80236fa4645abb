"""A checkpoint is brought to the disk while the run takes its next step: nothing waits for the disk, and nothing that went wrong there is lost."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ramulus.core import run_folder
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.run import checkpoint
from ramulus.run.launch import launch
from test_resume import RECIPE, same

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that saves every step or two."""
    out = tmp_path_factory.mktemp("saving") / "run"
    assert launch(RECIPE, [f"out={out}"], False, False, Console(quiet=True)) == 0
    return out


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
