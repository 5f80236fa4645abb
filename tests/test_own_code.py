"""The code of one's own parts belongs to what a run is: a change of it is said where a run goes on, and refused where it would join a sweep."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ramulus.run.config.own_code import _reached, changed_code, code_digests
from ramulus.run.config.resume import prepare
from ramulus.run.sweep.sweep import planned_jobs

TEXT = '''
import helpers_beside
LIMIT = 3
def near(a, b):
    return abs(a - b) < LIMIT
def score(task, path):
    return float(near(len(path), helpers_beside.TARGET))
def unused():
    return 1
'''


def module(folder: Path, text: str, name: str = "own_rewards") -> Any:
    """The module in a file of that text, as if it were imported anew."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    if not (folder / "helpers_beside.py").exists():
        (folder / "helpers_beside.py").write_text("TARGET = 4\n")
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(autouse=True)
def _path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_rewards", "helpers_beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        ("LIMIT = 3", "LIMIT = 5", True),
        ("abs(a - b)", "abs(b - a)", True),
        ("def score(task, path):", "def score(task, path):\n    # a word", False),
        ("return 1", "return 2", False),
        ("def unused", "def more():\n    return 3\n\n\ndef unused", False),
    ],
)
def test_what_a_reward_needs_counts_and_nothing_else(old: str, new: str, differs: bool, tmp_path: Path) -> None:
    before = code_digests(module(tmp_path, TEXT).score)
    after = code_digests(module(tmp_path, TEXT.replace(old, new)).score)
    assert set(before) == {"own_rewards.py", "helpers_beside.py"}
    assert (before != after) == differs
    assert changed_code([before], [after]) == (["own_rewards.py"] if differs else [])
    assert code_digests(partial(module(tmp_path, TEXT).score)) == before


def test_a_module_beside_it_counts(tmp_path: Path) -> None:
    before = code_digests(module(tmp_path, TEXT).score)
    (tmp_path / "helpers_beside.py").write_text("TARGET = 5\n")
    assert changed_code([before], [code_digests(module(tmp_path, TEXT).score)]) == ["helpers_beside.py"]


def test_lambdas_methods_and_objects(tmp_path: Path) -> None:
    text = TEXT + "short = lambda task, path: 1.0\nclass Kind:\n    def __call__(self, task, path):\n        return near(1, 2)\n"
    made = module(tmp_path, text)
    digests = [code_digests(thing) for thing in (made.short, made.Kind(), made.score)]
    assert all(digests)
    assert code_digests(made.Kind().__call__) == digests[1]
    assert code_digests(len, "text", 3, json.dumps, Path(), pytest.raises) == {}


RECIPE = '''
from dataclasses import replace
from pathlib import Path
from tests.run_recipe import rl
def score(task, path):
    return float(len(path.tokens) == 1)
def recipe():
    return replace(rl(), rewards=score)
def other():
    return replace(rl(), rewards=score, steps=9)
'''


def test_a_changed_reward_is_said_when_a_run_goes_on_and_refused_in_a_sweep(tmp_path: Path) -> None:
    file, out = tmp_path / "own_recipe.py", tmp_path / "sweep"
    file.write_text(RECIPE)
    folder = out / "own_recipe" / "seed-0"
    with (plan := prepare(str(file), [f"out={folder}", "seed=0"])).held:
        plan.save()
    with (again := prepare(str(file), [f"out={folder}"], resume=True)).held:
        assert again.notes == ()
    file.write_text(RECIPE + "def third():\n    return recipe()\n")
    assert len(planned_jobs([str(file)], [], [0], out, 1)) == 1
    file.write_text(RECIPE.replace("== 1", "== 2"))
    with (again := prepare(str(file), [f"out={folder}"], resume=True)).held:
        assert again.notes == ("the code in own_recipe.py that the recipe uses was changed",)
    with pytest.raises(ValueError, match=r"holds another run: the code in own_recipe\.py that the recipe uses was changed"):
        planned_jobs([str(file)], [], [0], out, 1)


LINES = "import near.by", "from near import by", "from near.by import TARGET", "from . import by", "from .by import TARGET"


@pytest.mark.parametrize("line", LINES)
def test_modules_in_folders_and_beside_by_a_dot_count(line: str, tmp_path: Path) -> None:
    place = tmp_path if "." in line.split()[1][:1] else tmp_path / "near"
    place.mkdir(exist_ok=True)
    file = tmp_path / "mine.py"
    file.write_text(f"{line}\ndef score(task, path):\n    return by and TARGET and near\n")
    texts = []
    for target in (4, 5):
        (place / "by.py").write_text(f"TARGET = {target}\n")
        texts.append(sorted(_reached(file, "score")))
    assert texts[0] != texts[1]
