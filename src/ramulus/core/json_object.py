"""JSON objects in files and lines: what is wrong with one that cannot be read, in one sentence."""

from __future__ import annotations

import json
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
