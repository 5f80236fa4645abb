"""Whether the fields of a configuration hold what their types say: what the command line checks by itself, a Python file does not."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ramulus.core.recipe_part import everything_in, inside, is_part
from ramulus.run.config.values import describe, field_types, has_text, options_of

BUILDERS = ("engine", "learner")  # fields that hold what builds an object from what it is given


def check_kinds(thing: Any, where: str = "") -> None:
    """Raise ValueError, naming the field, the value and the wanted type, for a field of a wrong type, or with a class for an object, in a part of
    this package or inside one."""
    for above, part in everything_in(thing, where):
        kind = type(part)
        hints = field_types(kind) if is_part(part) and kind.__module__.startswith("ramulus.") else {}
        for name, value in inside(part) if hints else ():
            path = f"{above}.{name}" if above else f"{kind.__name__}: {name}"
            refuse_classes(value, name, path)
            options = options_of(hints.get(name, Any))
            if not any(fits(value, option) for option in options):
                raise ValueError(f"{path} must be {_wanted(options)}, got {value!r:.80}{_remedy(value, options)}")


def refuse_classes(value: Any, name: str, path: str) -> None:
    """Raise ValueError where a field holds a class, or a tuple with one, in place of an object; but what builds engines or learners may be one."""
    for place, item in ((path, value), *((f"{path}.{i}", item) for i, item in enumerate(value if isinstance(value, tuple) else ()))):
        if isinstance(item, type) and (name not in BUILDERS or isinstance(getattr(item, "traits", None), property)):
            raise ValueError(f"{place} is the class {item.__name__}: write {item.__name__}(), with its settings in the brackets")


def take_numbers(thing: Any) -> None:
    """Put Python's own numbers where the parts of a configuration, or tuples in them, hold numpy's: no others are saved or seeded by."""
    for _, part in everything_in(thing):
        for name, value in inside(part) if is_part(part) else ():
            if (number := own_number(value)) is not value:
                object.__setattr__(part, name, number)  # equal to what was there, so that nobody who holds the part sees a change


def own_number(value: Any) -> Any:
    """A number as Python's own, and a tuple of them; anything else as it is."""
    if isinstance(value, Real) and not isinstance(value, int | float):
        return int(value) if isinstance(value, Integral) else float(value)
    if type(value) is tuple and any(own_number(item) is not item for item in value):
        return tuple(map(own_number, value))
    return value


def fits(value: Any, option: Any) -> bool:
    """Whether a value is of one type; True for types that cannot be told."""
    origin, args = get_origin(option) or option, get_args(option)
    if option is Any or isinstance(option, typing.TypeVar | str):
        return True
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, inner) for inner in args)
    if origin in (bool, type(None), None):
        return value is None if origin is None else isinstance(value, origin)
    if origin in (int, float):
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
    if origin is tuple:
        inner = args[:1] * len(value) if isinstance(value, tuple) and args[1:] == (Ellipsis,) else args
        return isinstance(value, tuple) and (not args or len(inner) == len(value)) and all(map(fits, value, inner))
    if origin is Callable:
        return callable(value)
    if origin in (str, Path, dict) or (is_dataclass(origin) and isinstance(origin, type)):
        return isinstance(value, origin)
    return True


def _wanted(options: list[Any]) -> str:
    """The kinds of value that a field takes, in words for an error."""
    words = {option: f"{option.__name__}(...)" for option in options if isinstance(option, type) and is_dataclass(option)}
    words |= {option: "a part that can be called" for option in options if (get_origin(option) or option) is Callable}
    words |= {option: "a tuple of such parts" for option in options if (get_origin(option) or option) is tuple and not has_text(get_args(option)[0])}
    plain = [option for option in options if option not in words]
    return " or ".join([*dict.fromkeys(words.values()), *([describe(plain)] if plain else [])])


def _remedy(value: Any, options: list[Any]) -> str:
    """What to write instead, where that is plain."""
    numbers = {option for option in options if option in (int, float)}
    if value is None:
        return ": leave it out for what is usual"
    if getattr(value, "shape", None) == () and any(fits(value.item(), option) for option in options):  # of numpy or torch
        return f": write {value.item()!r}"
    if isinstance(value, tuple | list) and len(value) == 1 and numbers:
        return f": write {value[0]!r} alone"
    if isinstance(value, int | float) and not numbers and any((get_origin(option) or option) is tuple for option in options):
        return ": write a list, also of one"
    if isinstance(value, str) and numbers:
        return ": leave out the quotes"
    if isinstance(value, float) and value.is_integer() and numbers == {int}:
        return f": write {int(value)}"
    if isinstance(value, list) and any((get_origin(option) or option) is tuple for option in options):
        return ": write (a, b) or (a,) in place of a list"
    return ""
