"""The text of one value on the command line as a value of the wanted type."""

from __future__ import annotations

import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ramulus.core.recipe_part import is_part

BOOLS = {"true": True, "True": True, "yes": True, "on": True, "false": False, "False": False, "no": False, "off": False}
NONES = {"none": None, "None": None, "null": None}


def options_of(hint: Any) -> list[Any]:
    """The members of a union; any other type alone."""
    return list(get_args(hint)) if get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def type_of_item(hint: Any, i: int) -> Any:
    """The type of an item of a tuple."""
    args = next((get_args(option) for option in options_of(hint) if get_origin(option) is tuple), ())
    return args[0] if len(args) == 2 and args[1] is Ellipsis else args[i] if i < len(args) else Any


def parse(text: str, hint: Any, current: Any, where: str) -> Any:
    """The text as a value of the annotated type; for a free type, as a value of the type that is there now."""
    options = options_of(hint)
    if Any in options:
        options = free(current)
    for option in sorted(options, key=_rank):
        try:
            return parse_as(text, option)
        except ValueError:
            continue
    if is_part(current):
        names = ", ".join(f"{where}.{f.name}" for f in fields(current) if f.init)
        raise ValueError(
            f"{where}={text}: {where} is an object, {type(current).__name__}; set one of its fields ({names or 'it has none'}) "
            "or change it in the recipe file"
        )
    raise ValueError(f"{where}={text}: {text!r} is not {describe(options)}; it is {current!r} in the recipe")


def has_text(hint: Any) -> bool:
    """Whether some text is a value of the type: whether it is not an object, None or a dict alone."""
    return any(option is Any or _rank(option) not in (0, 99) for option in options_of(hint))


def free(current: Any) -> list[Any]:
    """What a field without a type may become: the type that is there now; None in place of an object; a scalar in place of None."""
    if current is None:
        return [type(None), bool, int, float]
    if type(current) is int:
        return [int, float]
    return [type(current)] if isinstance(current, bool | float | str | tuple) else [type(None)]


def _rank(option: Any) -> int:
    """The order in which the members of a union are tried: the narrowest first; 99 for what no text is."""
    order = [type(None), bool, int, float, tuple, Path, str]
    plain = get_origin(option) or option
    return -1 if plain is Literal else order.index(plain) if plain in order else 99


def parse_as(text: str, option: Any) -> Any:
    """The text as one type; ValueError where it is not."""
    origin = get_origin(option) or option
    if origin in (int, float, str, Path):
        value = origin(text)
        if value != value:  # NaN
            raise ValueError("not a number")
        return value
    if origin is tuple:
        return parse_tuple(text, get_args(option))
    if origin is Literal:
        choices = {str(choice): choice for choice in get_args(option)}
    elif origin is bool:
        choices = BOOLS
    elif origin is type(None):
        choices = NONES
    else:
        raise ValueError(f"{option} cannot be written on a command line")
    if text not in choices:
        raise ValueError(f"one of {', '.join(choices)} is wanted")
    return choices[text]


def parse_tuple(text: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`1,2` or `(1, 2)` as a tuple of the annotated items."""
    parts = [part.strip().strip("'\"") for part in text.strip("()[]").split(",") if part.strip()]
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(parts)
    elif not args:
        args = (str,) * len(parts)
    if len(args) != len(parts):
        raise ValueError(f"{len(args)} items wanted")
    return tuple(parse_as(part, arg) for part, arg in zip(parts, args))


def describe(options: list[Any]) -> str:
    """The wanted types in words."""
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "None",
        Path: "a path",
    }

    def one(option: Any) -> str:
        origin = get_origin(option) or option
        if origin is Literal:
            return "one of " * (len(get_args(option)) > 1) + ", ".join(map(str, get_args(option)))
        if origin is tuple:
            inner = [one(arg) for arg in get_args(option) if arg is not Ellipsis]
            return f"a list like a,b of {inner[0] if inner else 'values'}"
        if option is Any:
            return "values"
        return words.get(origin, f"an object that only a recipe file can make ({getattr(origin, '__name__', origin)})")

    return " or ".join(dict.fromkeys(one(option) for option in options))


def field_types(kind: type) -> dict[str, Any]:
    """The types of a dataclass' fields; none where a name in them cannot be resolved (a class made in a function), and all count as Any."""
    try:
        return typing.get_type_hints(kind)
    except (NameError, AttributeError, TypeError):
        return {}
