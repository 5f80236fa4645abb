"""The dataclasses of this package by their names, wherever they lie; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2]


def class_named(name: str) -> type | None:
    """The class of this package with a name, each of which is defined once; None where there is none."""
    module = homes().get(name)
    return None if module is None else getattr(importlib.import_module(module), name)


@cache
def homes() -> dict[str, str]:
    """Class: the module that defines it, by the text of the sources."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(("ramulus", *file.relative_to(PACKAGE).with_suffix("").parts))
        found.update(dict.fromkeys(re.findall(r"^class ([A-Z]\w*)", file.read_text(encoding="utf-8"), re.MULTILINE), module))
    return found
