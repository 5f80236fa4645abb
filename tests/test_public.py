"""The public names: each resolves, each is what its room says, and type checkers see the same list."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path

import pytest

import ramulus

ROOT = Path(__file__).parents[1]
PAGES = sorted({ROOT / "README.md", *ROOT.glob("docs/*.md")} - {ROOT / "docs/architecture.md"})  # that one is about what lies inside
RECIPES = [*sorted(ROOT.glob("src/ramulus/recipes/*.py")), *sorted(ROOT.glob("examples/*.py"))]
APART = ("adapters", "models", "recipes")  # imported from there: adapters need libraries of their own


@pytest.mark.parametrize("name", ramulus.__all__)
def test_each_name_resolves(name: str) -> None:
    (module,) = [module for module, names in ramulus.HOMES.items() if name in names]
    home = import_module(f"ramulus.{module}")
    assert getattr(ramulus, name) is getattr(home, name)
    assert getattr(ramulus, name).__module__ == f"ramulus.{module}", "the name is defined elsewhere: name that module"
    assert name in dir(ramulus)


def test_type_checkers_see_the_same_names() -> None:
    source = (ROOT / "src/ramulus/__init__.py").read_text()
    seen = {
        ((node.module or "").removeprefix("ramulus."), alias.name, alias.asname)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ramulus.")
        for alias in node.names
    }
    assert seen == {(module, name, name) for module, names in ramulus.HOMES.items() for name in names}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ramulus' has no attribute 'Forest'"):
        ramulus.Forest  # noqa: B018


def test_the_version_is_that_of_the_package() -> None:
    assert ramulus.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def definitions() -> Iterator[tuple[str, str, bool]]:
    """Every class and function that a module defines at its top for others: the module, the name, whether it is a class."""
    for file in sorted((ROOT / "src/ramulus").rglob("*.py")):
        module = file.relative_to(ROOT / "src").with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for node in ast.parse(file.read_text()).body if module.split(".")[1:2] != ["recipes"] else ():
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                yield module, node.name, isinstance(node, ast.ClassDef)


DEFINED = list(definitions())
CLASSES = [name for module, name, is_class in DEFINED if is_class and module.split(".")[1] not in APART]


def imports(source: str) -> set[str]:
    """The classes and functions that a source takes from the rooms of ramulus by itself."""
    taken = {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[1:2] not in ([], *([part] for part in APART))
        for alias in node.names
    }
    return {name for module, name, _ in DEFINED if (module, name) in taken}


def mentions(page: str) -> set[str]:
    """The classes that a page names as code, and what its examples import. One of two that share a name is taken from where it is, as Even is."""
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    prose = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    words = {word for code in [*prose, *examples] for word in re.findall(r"(?<![\w.])[A-Z]\w+", code)}
    statements = [line for example in examples for line in re.findall(r"^from [\w.]+ import [^\n]+$", example, re.MULTILINE)]
    others = {word for line in statements if not line.startswith("from ramulus") for word in re.findall(r"\w+", line)}
    return {word for word in words - others if CLASSES.count(word) == 1} | imports("\n".join(statements))


def missing(names: Collection[str]) -> list[str]:
    """Those of the names that cannot be imported from ramulus."""
    return sorted({*names} - {*ramulus.__all__})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_public(page: Path) -> None:
    assert missing(mentions(page.read_text())) == [], "export it in ramulus/__init__.py, with an Example in its docstring"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_what_a_recipe_imports_is_public(recipe: Path) -> None:
    assert missing(imports(recipe.read_text())) == [], "export it in ramulus/__init__.py, with an Example in its docstring"


def test_what_is_named_and_not_public_is_seen() -> None:
    example = "from collections.abc import Sequence\nfrom ramulus.engine.engine import Decode, together\nTree()"
    assert mentions(f"A `LatestPart(3)`, `GAE()`, an `Even` and a Star:\n```python\n{example}\n```") == {"GAE", "Tree", "together"}
    assert missing({"GAE", "together"}) == ["together"]
    assert imports("from ramulus.adapters.trl import TreeRollouts\nfrom ramulus.recipes import grpo\nfrom ramulus import Star") == set()
