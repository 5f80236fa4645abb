"""One word, one idea: a public name is defined in one module."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "ramulus"

ALLOWED = frozenset({"Even", "Right", "plan", "sweep", "train", "view"})  # Even() and Right() are written in recipes, the others are commands


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
