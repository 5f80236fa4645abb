"""examples/loop.py does what it says: both methods raise the reward of the model that they begin with, on public names alone."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[1] / "examples" / "loop.py"


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loop", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "treepo"])
def test_the_loop_learns(loop: ModuleType, method: str) -> None:
    rewards = asyncio.run(loop.train(method, steps=30, lessons=300))
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert last > first + 0.03, rewards


def test_it_stands_on_public_names_alone() -> None:
    found = [node for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in found if (node.module or "").startswith("ramulus")} == {"ramulus"}
