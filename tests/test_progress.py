"""What long commands say while they work: a bar with the time left on a terminal, nothing that moves elsewhere."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ramulus.core.task import Task
from ramulus.engine.toy import ToyEngine
from ramulus.grow.branching import Star
from ramulus.grow.stop import Stop
from ramulus.look.before_after import reward_line, turned
from ramulus.run.config.recipe import FinalEvaluation
from ramulus.run.evaluation.final_evaluation import answer_count, evaluate_model
from ramulus.run.evaluation.loaded_model import copy, grow_trees, load_model
from ramulus.run.evaluation.task_sets import ProblemOptions, TaskSets
from ramulus.run.logbook import Logbook
from run_recipe import MODEL, rl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved small model."""
    model, tokenizer = MODEL()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def console(terminal: bool) -> Console:
    return Console(file=StringIO(), force_terminal=terminal, width=120)


def said(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_rollout_counts_its_trees(folder: Path, tmp_path: Path, terminal: bool) -> None:
    threads, out = torch.get_num_threads(), console(terminal)
    try:
        bench = load_model(str(folder), "cpu", 1, 8)
        asked = TaskSets(("chain",), 3, ProblemOptions(prompt_limit=64))
        assert grow_trees(bench, asked, Star(2), 1.0, 8, 0, tmp_path / "trees.jsonl", out) == 0
    finally:
        torch.set_num_threads(threads)
    assert ("3/3" in said(out)) == terminal
    assert ("\x1b" in said(out)) == terminal
    assert "3 trees, 6 paths" in said(out)


@pytest.mark.parametrize("terminal", [True, False])
def test_export_counts_its_bytes(folder: Path, tmp_path: Path, terminal: bool) -> None:
    out = console(terminal)
    copy(folder, tmp_path / "copy", out)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()
    }
    assert bool(said(out)) == terminal
    assert ("export" in said(out)) == terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_an_evaluation_counts_its_answers(terminal: bool) -> None:
    how, out = FinalEvaluation(samples=2, temperatures=(0.3, 0.5)), console(terminal)
    assert (answer_count(how, 10, True), answer_count(how, 10, False)) == (70, 30)
    run = replace(rl(), rewards=lambda task, path: float(path.length > 1), response_limit=4)
    tasks = [Task(str(i), (1, i), "?") for i in range(3)]
    decode, stop = str, Stop((0,), 4)
    found = asyncio.run(evaluate_model(run, how, ToyEngine(), tasks, decode, stop, True, out))
    assert [len(row["sampled"]) for row in found["answers"]] == [2, 2, 2]
    assert sorted(found["cooler"]) == ["0.3", "0.5"]
    assert ("21/21" in said(out)) == terminal
    assert bool(said(out)) == terminal


def test_a_pipe_gets_plain_text_even_from_a_notebook() -> None:
    """Kernels set FORCE_COLOR, which rich takes for a terminal."""
    command = [sys.executable, "-m", "ramulus.cli", "recipes"]
    done = subprocess.run(command, env=os.environ | {"FORCE_COLOR": "1"}, capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_step_is_shown_beside_the_last_ones_and_the_latest_evaluation(tmp_path: Path) -> None:
    """Also after a run goes on, from the rows of the steps before."""
    out = console(False)
    run, seconds = replace(rl(), out=str(tmp_path), steps=20), {"step": 1.0, "mean": 1.0, "grow": 1.0, "update": 0.5}
    usual = {"paths": 4, "pass_rate": 0.5, "length": 7.0, "sampled": 9, "reused": 0, "trained": 9, "reuse_ratio": 1.0, "dropped": 0}
    usual |= {"trees": 1, "not_finite": 0, "skipped": 0, "updates": 1, "seconds": seconds}
    for start, stop in ((1, 3), (4, 13)):
        logbook = Logbook(run, out, start - 1)
        for step in range(start, stop + 1):
            metrics = usual | {"reward": step / 10} | ({"eval/mean": 0.25, "eval/greedy": 0.5} if step == 2 else {})
            logbook.write(step, metrics)
            logbook.show(step, metrics)
        logbook.close()
    lines = {int(line.split()[1].split("/")[0]): line for line in said(out).splitlines() if line.startswith(run.name)}
    assert "reward 0.100  passed" in lines[1]
    assert "reward 0.200 (last 10: 0.150)" in lines[2]
    assert "held out: mean 0.250, greedy 0.500" in lines[2]
    assert "reward 0.400 (last 10: 0.250)" in lines[4]
    assert "reward 1.300 (last 10: 0.850)" in lines[13]
    assert "held out 0.250 at step 2" in lines[13]


def test_rewards_as_bars() -> None:
    assert reward_line([0.0, 0.5, 1.0], "treepo") == "reward over 3 steps of treepo: 0.00 ▁▅█ 1.00"
    assert reward_line([0.5] * 4, "x") == "reward over 4 steps of x: 0.50 ▁▁▁▁ 0.50"
    assert reward_line([0.1, 0.2], "x") == ""
    line = reward_line([i / 1000 for i in range(1000)], "x")
    assert line.split()[-2].count("█") >= 4
    assert len(line.split()[-2]) == 60


def test_a_problem_that_turned() -> None:
    answers = [{"id": str(i), "problem": f"P{i}", "greedy": [{"correct": float(i == 0), "text": f"a\n{i}"}]} for i in range(3)]
    now = [row | {"greedy": [{"correct": 1.0 if row["id"] != "1" else 0.0, "text": "[b]\x1b"}]} for row in answers]
    lines = list(turned({"answers": answers}, {"answers": now}))
    assert lines[0].endswith("P2")
    assert lines[1].endswith("a⏎2")
    assert "\x1b" not in lines[2]
    assert list(turned({"answers": answers}, {"answers": answers})) == []


def test_a_problem_whose_reward_calls_nothing_correct() -> None:
    def answered(reward: float) -> dict:
        return {"answers": [{"id": "0", "problem": "P", "greedy": [{"correct": None, "reward": reward, "text": f"a {reward}"}]}]}

    problem, before, after = turned(answered(0.0), answered(0.75))
    assert (problem.endswith("P"), before, after) == (True, "  before, reward 0.00: a 0.0", "  after, reward 0.75:  a 0.75")
    assert list(turned(answered(0.25), answered(0.75))) == []
    assert list(turned(answered(0.0), answered(0.0))) == []
