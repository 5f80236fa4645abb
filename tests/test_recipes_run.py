"""Every recipe takes ten steps on the quickstart's model, and one that is cut off after five goes on bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ramulus.core import run_folder
from ramulus.run.launch import launch
from test_resume import metrics, same

RECIPE = str(Path(__file__).parent / "run_small.py")
ONE_STAGE = ("sft", "grpo", "dapo", "treepo", "treerl", "attnrl", "early", "hapo", "hpt", "luffy", "srft", "ramulus")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_as_it_was")]


def train(variant: str, out: Path, *changes: str) -> None:
    assert launch(f"{RECIPE}:{variant}", [f"out={out}", *changes], True, False, Console(quiet=True)) == 0


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_folder.path_of(out, step) / "model" / "model.safetensors")


@pytest.mark.parametrize("variant", ONE_STAGE)
def test_ten_steps_and_on_after_five(tmp_path: Path, variant: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(variant, whole)
    steps = metrics(whole)
    assert len(steps) == 10
    assert sum(step["updates"] > 0 for step in steps) >= 8
    assert all(step["grad_norm"] > 0 for step in steps if step["updates"])
    shutil.copytree(whole, cut)
    shutil.rmtree(run_folder.path_of(cut, 10))
    train(variant, cut)
    same(whole, cut)


def test_learning_rate_zero_is_a_control(tmp_path: Path) -> None:
    train("grpo", tmp_path / "moved", "steps=2", "save_every=1")
    train("grpo", tmp_path / "still", "steps=2", "save_every=1", "optimizer.lr=0")
    first, last = (weights(tmp_path / "still", step) for step in (1, 2))
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert metrics(tmp_path / "still")[-1]["grad_norm"] > 0
    first, last = (weights(tmp_path / "moved", step) for step in (1, 2))
    assert not all(torch.equal(first[name], last[name]) for name in first)


def test_two_stages(tmp_path: Path) -> None:
    train("sft_then_grpo", tmp_path)
    assert [len(metrics(stage)) for stage in sorted(tmp_path.glob("*-*"))] == [10, 10]
