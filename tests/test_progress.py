"""What long commands say while they work: a bar with the time left on a terminal, nothing that moves elsewhere."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ramulus.engine.engine import Request, Sampling
from ramulus.engine.toy import ToyEngine
from ramulus.grow.branching import Star
from ramulus.run.config.recipe import Exam
from ramulus.run.evaluation.bench import TaskSets, copy, grow_trees, open_bench
from ramulus.run.evaluation.exam import answers, counted
from run_recipe import MODEL


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
        bench = open_bench(str(folder), "cpu", 1, 8)
        asked = TaskSets(("chain",), 3, {}, {"template": None, "system": None, "limit": 64})
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
def test_an_examination_counts_its_answers(terminal: bool) -> None:
    exam, out = Exam(samples=2, temperatures=(0.3, 0.5)), console(terminal)
    assert (answers(exam, 10, True), answers(exam, 10, False)) == (70, 30)
    request = Request((1,), Sampling(3), lambda tokens: None, 0)
    with counted(ToyEngine(), out, 2) as engine:
        same = [asyncio.run(engine.sample(request)).tokens for _ in range(2)]
    assert same[0] == same[1] == ToyEngine().continuation(request).tokens
    assert ("2/2" in said(out)) == terminal
    assert bool(said(out)) == terminal


def test_a_pipe_gets_plain_text_even_from_a_notebook() -> None:
    """Kernels set FORCE_COLOR, which rich takes for a terminal."""
    command = [sys.executable, "-m", "ramulus.cli", "recipes"]
    done = subprocess.run(command, env=os.environ | {"FORCE_COLOR": "1"}, capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
    assert "\x1b" not in done.stdout
