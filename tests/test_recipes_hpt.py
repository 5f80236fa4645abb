"""The recipes hpt, luffy, srft and sft_then_grpo run, learn from both sides, and resume bit for bit with the gate's state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kept import tensors
from ramulus.core.store import read
from ramulus.core.tree import Author
from ramulus.run import checkpoint
from ramulus.run.launch import launch

RECIPES = Path(__file__).with_name("run_hpt.py")


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


def train(name: str, out: Path, *words: str, resume: bool = False) -> list[dict]:
    """The metrics of every step of the last stage."""
    launch(f"{RECIPES}:{name}", [f"out={out}", *words], resume, False, Console(quiet=True))
    (file,) = [path for path in out.rglob("metrics.jsonl") if "sft" not in path.parent.name or path.parent == out]
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", ["hpt", "luffy", "srft", "sft_then_grpo"])
def test_a_recipe_trains(name: str, tmp_path: Path) -> None:
    lines = train(name, tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["updates"] == 1 and 0 < line["grad_norm"] < 1e3 for line in lines)


def test_hpt_shows_the_demonstration_where_every_rollout_fails(tmp_path: Path) -> None:
    lines = train("hpt", tmp_path)
    seen: set[bool] = set()
    for line, file in zip(lines, sorted((tmp_path / "trees").glob("*.jsonl")), strict=True):
        trees = list(read(file))
        failed = []
        for tree in trees:
            leaves = tree.leaves()
            failed.append(not any(leaf.verdict["correct"] for leaf in leaves if leaf.author is Author.POLICY))
            trained = {leaf.author for leaf in leaves if any(name.startswith("credit/") for name in leaf.verdict)}
            assert trained == {Author.EXPERT if failed[-1] else Author.POLICY}
        assert line["gate_expert"] == pytest.approx(sum(failed) / len(failed))
        assert line["gate_policy"] == pytest.approx(1 - line["gate_expert"])
        seen |= set(failed)
    assert seen == {True, False}, "both ways were taken"


def test_the_smooth_gate_remembers_and_resumes(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train("smooth", whole)
    train("smooth", parts, "steps=2")
    train("smooth", parts, "steps=4", resume=True)
    state, other = checkpoint.read_state(whole, 4), checkpoint.read_state(parts, 4)
    kept, again = tensors(whole, 4), tensors(parts, 4)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert state["mix"] == other["mix"]
    assert len(state["mix"]) == 4
    assert max(sum(counts) for counts in state["mix"].values()) > 3, "earlier visits count"
