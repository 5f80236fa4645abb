"""examples/own_reward.py does what it says: one's own problems, reward and held-out set, on public names alone."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[1] / "examples" / "own_reward.py"
pytestmark = pytest.mark.usefixtures("torch_as_it_was")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_reward", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = example.main(tmp_path, steps=2)
    assert len(result.metrics) == 2
    said = capsys.readouterr().out
    assert "of the answers to held-out problems are right" in said
    assert "2 steps" in said


@pytest.mark.slow
def test_it_learns(example: ModuleType, tmp_path: Path) -> None:
    metrics = example.main(tmp_path, steps=40).metrics
    assert metrics[0]["reward"] < 0.3
    assert metrics[-1]["eval/mean"] > 0.6, "on pairs of letters that it was not trained on"


def test_it_stands_on_public_names_alone() -> None:
    found = [node for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in found if (node.module or "").startswith("ramulus")} == {"ramulus"}
