"""What lies in a configuration: its parts, which are dataclasses in fields and in tuples, by their dotted paths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any


def is_part(value: Any) -> bool:
    """Whether a value is an object of a dataclass."""
    return is_dataclass(value) and not isinstance(value, type)


def inside(thing: Any) -> list[tuple[str, Any]]:
    """(name, value) of every field of a part, (index, item) of a tuple or list; [] for anything else."""
    if is_part(thing):
        return [(field.name, getattr(thing, field.name, None)) for field in fields(thing)]
    return [(str(i), item) for i, item in enumerate(thing)] if isinstance(thing, tuple | list) else []


def everything_in(thing: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of a thing, of all fields in it and of those items of tuples and lists that may hold parts, outermost first."""
    yield path, thing
    named = is_part(thing)
    for name, value in inside(thing):
        if named or isinstance(value, tuple | list) or is_part(value):
            yield from everything_in(value, f"{path}.{name}" if path else name)


def parts_of(thing: Any) -> Iterator[Any]:
    """Every part in a configuration, outermost first."""
    return (value for _, value in everything_in(thing) if is_part(value))


def paths_to(name: str, thing: Any) -> list[str]:
    """The dotted paths of the first three fields of that name, wherever they lie in a thing."""
    return [path for path, _ in everything_in(thing) if path.rpartition(".")[2] == name][:3]
