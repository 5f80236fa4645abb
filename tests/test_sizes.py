"""House rules that can be counted: sizes, names, and who may print.

Lines of a function are those from `def` to its end without its docstring; lines of a file are all of them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "ramulus"
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = {"util", "utils", "manager", "handler", "helper", "helpers", "base", "v2"}
PRINTERS = {"cli.py", "run/logbook.py"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def length(function: Function) -> int:
    """Lines of a function, signature included, docstring left out."""
    first = function.body[0]
    said = ast.get_docstring(function) is not None
    return (function.end_lineno or 0) - function.lineno + 1 - ((first.end_lineno or 0) - first.lineno + 1 if said else 0)


def words(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", name)}


def faults(place: str, source: str) -> list[str]:
    """Which of the rules the file at `place` (relative to the package) breaks."""
    lines = source.count("\n") + 1 - source.endswith("\n")
    tree = ast.parse(source)
    found = []
    if lines > 400:
        found.append(f"{place} has {lines} lines: 400 is the most")
    if place.startswith("recipes/") and lines >= 50:
        found.append(f"{place} has {lines} lines: a recipe stays under 50")
    if words(Path(place).stem) & FORBIDDEN:
        found.append(f"{place}: find a better name")
    for node in ast.walk(tree):
        where = f"{place}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, Function) and length(node) > 40:
            found.append(f"{where} {node.name} has {length(node)} lines: 40 is the most")
        if isinstance(node, ast.ClassDef) and words(node.name) & FORBIDDEN:
            found.append(f"{where} class {node.name}: find a better name")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write") and place not in PRINTERS:
            found.append(f"{where} prints: only {sorted(PRINTERS)} do")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_house_rules(file: Path) -> None:
    assert faults(file.relative_to(PACKAGE).as_posix(), file.read_text()) == []


def test_every_module_says_what_it_is() -> None:
    assert [str(file) for file in FILES if not ast.get_docstring(ast.parse(file.read_text()))] == []


BODY = "    x = 1\n" * 39


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("learn/a.py", "x = 1\n" * 401),
        ("recipes/a.py", "x = 1\n" * 50),
        ("learn/a.py", f"def f():\n{BODY}    return x\n"),
        ("learn/a.py", f"class A:\n    async def f(self):\n{BODY.replace('    x', '        x')}        return x\n"),
        ("learn/utils.py", ""),
        ("learn/pack_v2.py", ""),
        ("learn/a.py", "class TreeManager: ..."),
        ("learn/a.py", "class BaseTree: ..."),
        ("learn/a.py", "class TREEHandler: ..."),
        ("learn/a.py", "class TreeV2: ..."),
        ("learn/a.py", "def f():\n    print(1)"),
        ("learn/a.py", "import sys\nsys.stdout.write('x')"),
    ],
)
def test_a_fault_is_seen(place: str, source: str) -> None:
    assert len(faults(place, source)) == 1


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("learn/a.py", "x = 1\n" * 400),
        ("recipes/a.py", "x = 1\n" * 49),
        ("learn/a.py", f'def f():\n    """{chr(10) * 9}"""\n{BODY}'),
        ("learn/database.py", "class Baseline: ..."),
        ("run/logbook.py", "print(1)"),
    ],
)
def test_what_is_allowed_passes(place: str, source: str) -> None:
    assert faults(place, source) == []
