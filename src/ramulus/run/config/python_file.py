"""A Python file of the user's as a module; its folder is not put on the import path."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ramulus.run.config.describe import FORMER_CLASSES
from ramulus.run.config.unknown import MOVED


def read_file(file: str, remedy: str, what: str = "recipe") -> ModuleType:
    """The module of a file. Raises FileNotFoundError, with the remedy, where it is not there."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} at {file}: {remedy}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up here
    try:
        with naming_the_new():
            spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "ramify":
            raise
        raise ImportError(f"{file} imports ramify, which is called ramulus now: change its imports") from error
    return module


@contextmanager
def naming_the_new() -> Iterator[None]:
    """A ValueError with today's name for a recipe that gives a field, or imports a class, by the name it had before."""
    try:
        yield
    except ImportError as error:
        match = re.search(r"cannot import name '(\w+)' from '(ramulus\b[\w.]*)'", str(error))
        if match is None or match[1] not in FORMER_CLASSES:
            raise
        raise ValueError(f"{match[2]} has no {match[1]!r} any more, it is {FORMER_CLASSES[match[1]]}") from error
    except TypeError as error:
        match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if match is None or match.groups() not in MOVED:
            raise
        raise ValueError(f"{match[1]} has no field {match[2]!r} any more, it is {MOVED[match[1], match[2]]}") from error
