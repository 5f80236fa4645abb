"""A Python file of the user's as a module; its folder is not put on the import path. What goes wrong in it is one sentence with its line."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ramulus.core.recipe_part import is_part
from ramulus.run.config.kinds import check_kinds
from ramulus.run.config.package_classes import FORMER_CLASSES, class_named, imports_of
from ramulus.run.config.unknown import MOVED, unknown


def read_file(file: str, remedy: str, what: str = "recipe") -> ModuleType:
    """The module of a file. Raises FileNotFoundError, with the remedy, where it is not there, and ValueError, with the line, where it fails."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} at {file}: {remedy}")
    spec = importlib.util.spec_from_file_location(module_name(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up here
    with told_by_line(file, vars(module)):
        spec.loader.exec_module(module)
    return module


def module_name(path: Path) -> str:
    """The name of a file's module: recipe_NAME, with a digest of the path where another file has that."""
    usual, place = f"recipe_{path.stem}", str(path.resolve())
    there = getattr(sys.modules.get(usual), "__file__", None)
    return usual if there is None or str(Path(there).resolve()) == place else f"{usual}_{hashlib.blake2b(place.encode(), digest_size=6).hexdigest()}"


@contextmanager
def told_by_line(file: str, names: dict[str, Any]) -> Iterator[None]:
    """Errors of a file's own code as one sentence with its line; `names` are the file's. Of this package's own the line is all that is added.

    Raises ValueError, and ImportError for what is not installed.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and _ours(error):
            raise type(error)(f"{_place(file, error)}: {error}") from error
        raise (error if _ours(error) else ValueError(f"{_place(file, error)}: {type(error).__name__}: {error}")) from error
    except ImportError as error:
        if (moved := _moved(file, error)) is not None:
            raise ImportError(moved) from error
        raise (error if _ours(error) else ImportError(f"{_place(file, error)}: {error}")) from error
    except SyntaxError as error:
        line = f": {error.text.strip()!r}" if error.text else ""
        raise ValueError(f"{error.filename or file}, line {error.lineno}: {error.msg}{line}") from error
    except (KeyboardInterrupt, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # whatever the file does, SystemExit too
        raise ValueError(f"{_place(file, error)}: {cause(error, names)}") from error


def _frames(error: BaseException) -> list[Any]:
    """The frames between here and where an error arose, outermost first."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _ours(error: BaseException) -> bool:
    """Whether it was raised in this package, whose sentences need nothing added."""
    return str(_frames(error)[-1].f_globals.get("__name__", "")).startswith("ramulus.")


def _place(file: str, error: BaseException) -> str:
    """The file and the last line of it on the way to an error; of a class or function of another file of the user's too."""
    here = Path(file).resolve()
    there = [number for frame, number in traceback.walk_tb(error.__traceback__) if Path(frame.f_code.co_filename).resolve() == here]
    return f"{file}, line {there[-1]}" if there else file


def _moved(file: str, error: ImportError) -> str | None:
    """What a file should import in place of what this package had at an earlier time; None for another error."""
    module, missing = error.name or "", re.search(r"cannot import name '(\w+)' from '(ramulus\b[\w.]*)'", str(error))
    source = Path(file).read_bytes() if Path(file).is_file() else b""  # a shipped recipe is named without its file
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
    if module.split(".")[0] == "ramify":
        names = [alias.name for node in imports if (node.module or "").split(".")[0] == "ramify" for alias in node.names]
        lines = "".join(f"\n  {line}" for line in imports_of(names))
        return f"{file} imports ramify, which is called ramulus now: change its imports" + f" to{lines}" * bool(lines)
    gone = module.startswith("ramulus.") and isinstance(error, ModuleNotFoundError)
    names = [alias.name for node in imports if gone and node.module == module for alias in node.names] + ([missing[1]] if missing else [])
    lines = "; ".join(imports_of(names))
    there = f"there is no {module} any more"
    if missing:
        there = f"{missing[2]} has no {missing[1]!r} any more" + f", it is {FORMER_CLASSES.get(missing[1])}" * (missing[1] in FORMER_CLASSES)
    return f"{_place(file, error)}: {there}: write {lines}" if lines else None


def cause(error: BaseException, names: dict[str, Any], where: str = "") -> str:
    """What is wrong, in words: a field that is not there, a value of a wrong type in the part at the dotted path `where`, or what Python says."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and match is not None:
        if match.groups() in MOVED:
            return f"{match[1]} has no field {match[2]!r} any more, it is {MOVED[match[1], match[2]]}"
        kind = names.get(match[1]) or class_named(match[1])
        if isinstance(kind, type) and is_dataclass(kind):
            return unknown(match[2], kind, [field.name for field in fields(kind) if field.init], match[2])
    for frame in _frames(error):
        part = frame.f_locals.get("self") if frame.f_code.co_name == "__post_init__" else None
        if is_part(part):
            try:
                check_kinds(part, where)
            except ValueError as wrong:
                return str(wrong)
    return f"{where}: " * bool(where) + f"{type(error).__name__}: {error}"
