"""The dataclasses of this package by their names, wherever they lie; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
FORMER_CLASSES = {"Exam": "FinalEvaluation"}  # class by the name it had before: its name


def class_named(name: str) -> type | None:
    """The class of this package with a name, or with the name that `yaml_name` gives it; None where there is none."""
    module, _, plain = name.rpartition(".")
    modules = [home for home in homes().get(plain, ()) if home.endswith(f".{module}")] if module else homes().get(plain, ())
    return getattr(importlib.import_module(modules[0]), plain) if len(modules) == 1 else None


def yaml_name(kind: type) -> str:
    """The name of a class of this package; with the end of its module, gate.Even, where two have it."""
    twins = homes().get(kind.__name__, ())
    return kind.__name__ if len(twins) < 2 else f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def imports_of(names: Iterable[str]) -> list[str]:
    """The lines that import these classes and functions of this package today, by their former names too; what it does not have is left out."""
    lines: dict[str, list[str]] = {}
    public = re.findall(r"import (\w+) as \1", (PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for name in dict.fromkeys(FORMER_CLASSES.get(name, name) for name in names):
        for home in ("ramulus",) if name in public else homes().get(name, ()):
            lines.setdefault(home, []).append(name)
    return [f"from {home} import {', '.join(lines[home])}" for home in sorted(lines)]


@cache
def homes() -> dict[str, tuple[str, ...]]:
    """Class: the modules that define one of that name, by the text of the sources."""
    modules: dict[str, tuple[str, ...]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(("ramulus", *file.relative_to(PACKAGE).with_suffix("").parts))
        for name in re.findall(r"^class ([A-Z]\w*)", file.read_text(encoding="utf-8"), re.MULTILINE):
            modules[name] = (*modules.get(name, ()), module)
    return modules
