"""The public names: each resolves, each is what its room says, and type checkers see the same list."""

from __future__ import annotations

import ast
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import ramulus

ROOT = Path(__file__).parents[1]


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
