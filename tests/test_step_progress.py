"""What is shown while a step lasts: counts that are right at its end, on a terminal and in plain lines, and none where steps are quick."""

from __future__ import annotations

import io
import pickle
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ramulus.run import step_progress
from ramulus.run.config.recipe import FinalEvaluation, Run
from ramulus.run.config.resume import prepare
from ramulus.run.interrupt import Interrupt
from ramulus.run.launch import run_stages
from ramulus.run.step_progress import StepProgress, TakenRows
from ramulus.run.train_stage import Session
from run_recipe import rl

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


@dataclass(frozen=True)
class Slow:
    """Takes its time."""

    def __call__(self, task: Any, path: Any) -> float:
        time.sleep(0.03)
        return float(path.text[:1].isdigit())


def said(run: Run, out: Path, terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=300, force_terminal=terminal)
    plan = prepare((replace(run, out=str(out)),), [])
    with plan.held, Interrupt() as interrupt:
        run_stages(plan, Session(console, interrupt))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_step_shows_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(step_progress, "SOON", 0.01)
    monkeypatch.setattr(step_progress, "EVERY", 0.01)
    run = replace(rl(), steps=1, rewards=Slow(), minibatches=1, tokens_per_batch=28, final_evaluation=FinalEvaluation(samples=2, temperatures=()))
    text = said(run, tmp_path / "run", terminal)
    grown = [tuple(map(int, found)) for found in re.findall(r"step 1, \d+ s: growing: (\d+) of (\d+) trees grown, (\d+) graded, \d+ tokens", text)]
    assert grown
    assert all(graded <= done <= trees for done, trees, graded in grown)
    assert [graded for _, _, graded in grown] == sorted(graded for _, _, graded in grown)
    if not terminal:  # there each line is kept, not painted over
        rows = [tuple(map(int, found)) for found in re.findall(r"updating: row (\d+) of (\d+)", text)]
        assert any(taken > 0 for taken, _ in rows)
        assert all(taken <= count for taken, count in rows)
        assert re.search(r"step 1, \d+ s: evaluating: \d+ of 12 answers", text)
        assert re.search(r"^\d+ s: evaluating: \d+ of 12 answers", text, re.M), "the final evaluation"


def test_quick_steps_show_none(tmp_path: Path) -> None:
    assert "growing" not in said(replace(rl(), steps=2), tmp_path / "run", False)


def test_rows_are_counted_as_they_are_taken_and_travel_as_a_list() -> None:
    progress = StepProgress(lambda: {"sampled": 7})
    progress.begin(3, lambda: "update")
    rows = progress.taken([1, 2, 3])
    for _ in zip(range(2), rows):
        assert "row" in progress.line()
    assert re.fullmatch(r"step 3, 0 s: updating: row [23] of 3", progress.line())
    assert type(pickle.loads(pickle.dumps(rows))) is list
    assert pickle.loads(pickle.dumps(TakenRows([4]))) == [4]
    progress.begin(4, lambda: "pack")
    assert progress.line() == "", "what takes no time is not shown"
