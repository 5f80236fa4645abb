"""A configuration as JSON for resuming, as Python text for people, and the difference of two."""

from __future__ import annotations

import copyreg
import math
import re
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from ramulus.core.recipe_part import everything_in, is_part
from ramulus.run.config.package_classes import FORMER_CLASSES

CLASS = "class"  # the key that names the class of a dataclass in JSON
FORMER_FIELDS = {  # (class, field by the name it had before): its name
    ("ramulus.Mix", "leash"): "kl_coef",
    ("ramulus.Run", "exam"): "final_evaluation",
    ("ramulus.Local", "copy"): "precision",
}
OWN = re.compile(r"(?:ramulus|ramify)\.(?:\w+\.)*(\w+)")  # a part of the package, under its former name too, in whichever room


def qualified(thing: Any) -> str:
    """`module.Name` of a class or function; `ramulus.Name` where it is the package's own, so that a room may move."""
    return _own(f"{thing.__module__}.{thing.__qualname__}")


def _own(name: str) -> str:
    """A qualified name without the rooms of the package; any other text as it is."""
    match = OWN.fullmatch(name)
    return f"ramulus.{FORMER_CLASSES.get(match[1], match[1])}" if match else name


def brought_forward(value: Any) -> Any:
    """JSON of `to_json` as an earlier version wrote it, with the names of today."""
    if isinstance(value, dict):
        kind = _own(str(value.get(CLASS)))
        return {FORMER_FIELDS.get((kind, key), key): brought_forward(item) for key, item in value.items()}
    if isinstance(value, list):
        return [brought_forward(item) for item in value]
    return _own(value) if isinstance(value, str) else value


def is_bare(value: Any) -> bool:
    """Whether an object is its class and nothing more: of one at the top of a module, without attributes of its own."""
    kind = type(value)
    if kind.__module__ == "builtins" or not kind.__qualname__.isidentifier() or getattr(value, "__dict__", None) != {}:
        return False
    try:
        return bool(value.__reduce_ex__(2) == (copyreg.__newobj__, (kind,), None, None, None))  # type: ignore[attr-defined]
    except Exception:  # it keeps something that is not to be seen
        return False


def to_json(value: Any, where: str = "") -> Any:
    """Plain JSON of nested dataclasses, tuples and functions; a dataclass carries its class name under `class`, and no field that its repr hides.

    Raises ValueError, with the dotted path from `where` on, for an object that cannot be written so.
    """
    at = f"{where}." if where else ""
    if is_part(value):
        return {CLASS: qualified(type(value))} | {f.name: to_json(getattr(value, f.name), f"{at}{f.name}") for f in fields(value) if f.repr}
    if isinstance(value, dict):
        return {str(key): to_json(item, f"{at}{key}") for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item, f"{at}{i}") for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((to_json(item) for item in value), key=repr)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        return {
            CLASS: "functools.partial",
            "func": to_json(value.func, where),
            "args": to_json(value.args, where),
            "keywords": to_json(value.keywords, where),
        }
    if hasattr(value, "__qualname__"):
        return qualified(value)
    number = getattr(value, "shape", None) == ()  # of numpy or torch
    if is_bare(value) and not number:
        return {CLASS: qualified(type(value))}
    remedy = f"write {value.item()!r}" if number else "make it a frozen dataclass, so that a run can be saved and compared"
    raise ValueError(f"{where}: " * bool(where) + f"{type(value).__name__} cannot stand in a recipe: {remedy}")


def is_default(field: Field[Any], value: Any) -> bool:
    """Whether a field holds what its class gives it."""
    if field.default is not MISSING:
        return type(field.default) is type(value) and field.default == value
    return field.default_factory is not MISSING and field.default_factory() == value


def with_later_fields(saved: Any, value: Any) -> Any:
    """Saved JSON with the fields that `value` has got since, where they are at their defaults: they change nothing."""
    if is_part(value) and isinstance(saved, dict) and saved.get(CLASS) == qualified(type(value)):
        later = [f for f in fields(value) if f.repr and f.name not in saved and is_default(f, getattr(value, f.name))]
        known = {name: with_later_fields(item, getattr(value, name, None)) for name, item in saved.items()}
        return known | {f.name: to_json(getattr(value, f.name)) for f in later}
    if isinstance(saved, list) and isinstance(value, tuple | list) and len(saved) == len(value):
        return [with_later_fields(item, inner) for item, inner in zip(saved, value)]
    return saved


def holds(saved: Any, path: str) -> bool:
    """Whether nested JSON has something at a dotted path."""
    for word in path.split("."):
        if isinstance(saved, dict) and word not in saved:
            return False
        saved = saved[word] if isinstance(saved, dict) else saved[int(word)]
    return True


def to_python(value: Any, indent: int = 0, width: int = 100) -> str:
    """Python text that builds `value`: fields at their defaults are left out, long calls get a line per field."""
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, float):  # numpy's too
        return repr(float(value)) if math.isfinite(value) else f"float({str(value)!r})"
    if is_part(value):
        shown = [f for f in fields(value) if f.init and f.repr and not is_default(f, getattr(value, f.name))]
        head, tail = f"{type(value).__name__}(", ")"
        parts = [f"{f.name}={to_python(getattr(value, f.name), indent + 4, width)}" for f in shown]
    elif isinstance(value, tuple | list) and value:
        head, tail = ("(", ",)" if len(value) == 1 else ")") if isinstance(value, tuple) else ("[", "]")
        parts = [to_python(item, indent + 4, width) for item in value]
    else:
        return getattr(value, "__qualname__", None) or (f"{type(value).__name__}()" if is_bare(value) else repr(value))
    line = head + ", ".join(parts) + tail
    if indent + len(line) <= width and "\n" not in line:
        return line
    inner = ",\n".join(" " * (indent + 4) + part for part in parts)
    return f"{head}\n{inner},\n{' ' * indent}{tail.strip(',')}"


def recipe_text(run: Any) -> str:
    """A Python module that builds `run`, for people to read; nothing of ramulus ever executes it."""
    text = to_python(run)
    names: dict[str, list[str]] = {}
    kinds = {type(value) for _, value in everything_in(run) if is_part(value) or isinstance(value, Enum) or is_bare(value)}
    for kind in (kind for kind in kinds if re.search(rf"\b{kind.__qualname__}\b", text)):
        names.setdefault(kind.__module__, []).append(kind.__qualname__)
    imports = "\n".join(f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names))
    return f"{imports}\n\nrun = {text}\n"


def changes(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Where two JSON values differ: (dotted path, old, new), deepest first difference only."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get(CLASS) == new.get(CLASS):
        keys = list(old) + [key for key in new if key not in old]
        return [c for key in keys for c in changes(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [c for i, (a, b) in enumerate(zip(old, new)) for c in changes(a, b, f"{path}.{i}")]
    return [] if old == new else [(path, old, new)]
