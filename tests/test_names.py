"""One word, one idea: a public name is defined in one module, and a name says what it holds, not that one has it."""

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


HAVING = frozenset({"found", "said", "told", "made"})


def having(source: str) -> list[int]:
    """The lines at which a source gives a local, a parameter, an attribute, a function or a class such a name."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name | ast.Attribute):
            names = [node.id if isinstance(node, ast.Name) else node.attr] if isinstance(node.ctx, ast.Store) else []
        elif isinstance(node, ast.arg):
            names = [node.arg]
        elif isinstance(node, ast.alias):
            names = [node.asname or node.name]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            names = [node.name or ""]
        else:
            continue
        lines += [node.lineno for name in names if name in HAVING]
    return sorted(lines)


def test_a_name_says_what_it_holds() -> None:
    files = {file.relative_to(PACKAGE).as_posix(): having(file.read_text()) for file in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in files.items() if lines} == {}, "call it by what it holds"


def test_a_name_that_says_that_one_has_it_is_seen() -> None:
    ways = [
        "found = 1", "a, found = b", "found: int = 1", "if (found := f()): 1", "for found in x: 1", "[found for found in x]", "with a as found: 1",
        "def found(): ...", "class A:\n    async def told(self): ...", "def f(said): ...", "def f(*, made=1): ...", "def f(*found): ...",
        "lambda told: 1", "self.found = 1", "class A:\n    made: int", "import a as found", "from a import told", "try: ...\nexcept E as said: ...",
        "match x:\n    case [*found]: ...", "match x:\n    case A() as found: ...",
    ]  # fmt: skip
    assert [way for way in ways if not having(way)] == []
    assert having("def foundation(): return 'found'  # found") == [], "words inside others, strings and comments are none"
