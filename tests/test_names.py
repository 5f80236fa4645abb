"""One word, one idea: a public name is defined in one module. Those of before that are not yet are listed, and the list only gets shorter."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "ramulus"

ALLOWED = frozenset(
    """
ABOUT Answers BLOCK COLUMNS COUNTS Call Cut Decode Difference Even FATES FLAGS FORMAT KERNELS KINDS LEFT_OUT LEVELS NAME Outcome
PATIENCE Pass Path Place Plan ROW Right Row Runs SAMPLED SPOKEN STEPS STYLE Scores Source State Steps T Table Text Weights along
attention build check choose columns_of compare cut differences digest draw draws dump file_of fill gated graded
joined label learned library load mean merge number numbers of_step own percent place plain plan prune quantile rank read refuse rows rules
run sampled serve short show shown softmax source_of spoken stages_of sweep table tables together train values_of verify version view worked
write
""".split()  # noqa: SIM905
)


def public(source: str) -> set[str]:
    """The public names that a module defines at its top."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def twice(sources: list[str]) -> set[str]:
    """The names that more than one of these modules defines."""
    return {name for name, count in Counter(name for source in sources for name in public(source)).items() if count > 1}


def test_a_public_name_is_defined_once() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "recipes"]  # each of those has a recipe()
    found = twice([file.read_text() for file in files])
    assert sorted(found - ALLOWED) == [], "defined in more than one module: find another word for one of them"
    assert sorted(ALLOWED - found) == [], "defined once now: take it off the list"


def test_a_name_defined_twice_is_seen() -> None:
    assert twice(["def plan(): ...", "plan: int = 3", "class Plan: ...", "_plan = 1"]) == {"plan"}
