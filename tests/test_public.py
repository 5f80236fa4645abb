"""The public names: each resolves, each is what its room says, and type checkers see the same list."""

from __future__ import annotations

import ast
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import ramify

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ramify.__all__)
def test_each_name_resolves(name: str) -> None:
    (module,) = [module for module, names in ramify.HOMES.items() if name in names]
    home = import_module(f"ramify.{module}")
    assert getattr(ramify, name) is getattr(home, name)
    assert getattr(ramify, name).__module__ == f"ramify.{module}", "the name is defined elsewhere: name that module"
    assert name in dir(ramify)


def test_type_checkers_see_the_same_names() -> None:
    source = (ROOT / "src/ramify/__init__.py").read_text()
    seen = {
        ((node.module or "").removeprefix("ramify."), alias.name, alias.asname)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ramify.")
        for alias in node.names
    }
    assert seen == {(module, name, name) for module, names in ramify.HOMES.items() for name in names}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ramify' has no attribute 'Forest'"):
        ramify.Forest  # noqa: B018


def test_the_version_is_that_of_the_package() -> None:
    assert ramify.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
