"""JSON objects in files and lines: what is wrong with one that cannot be read, in one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def object_of(text: bytes) -> dict[str, Any] | None:
    """The JSON object that a text is; None for any other text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def object_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none."""
    try:
        return object_of(path.read_bytes()) or {}
    except OSError:
        return {}


def read_object(path: Path, remedy: str = "") -> dict[str, Any]:
    """The JSON object in a file. Raises OSError, and ValueError, which names the file, what is wrong with it and the remedy, where there is none."""
    wrong: Exception | str = "it is no JSON object"
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    except (ValueError, RecursionError) as error:
        wrong = error
    raise ValueError(f"{path} is damaged ({wrong}){': ' if remedy else ''}{remedy}")


def finite_json(value: Any) -> Any:
    """A value that JSON can hold: null for numbers that are not finite, lists for sets."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [finite_json(item) for item in value]
    return value


def finite_text(content: Any, indent: int | None = None) -> str:
    """JSON that every program reads: null for numbers that are not finite."""
    return json.dumps(finite_json(content), indent=indent, allow_nan=False)
