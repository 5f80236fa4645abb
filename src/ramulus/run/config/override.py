"""Set any field of a recipe from the command line: `steps=100 branching.width=16 mix.terms.0.estimator.mask.high=0.28`."""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

Updates = dict[str, Any]
"""A tree of updates: field name or tuple index -> text of the value, or further updates."""


MOVED = {
    ("Mix", "leash"): "mix.kl_coef",
    ("AttentionForks", "delta"): "signals.0.delta: write signals=(ForwardInfluence(delta=...),) in a recipe file",
    ("EntropyForks", "words"): "signals.0.words: write signals=(Concluded(words=...),) in a recipe file, or set branching.closed=None for no words",
}
"""(class, field) that went elsewhere or has another name: what to write now."""

BOOLS = {"true": True, "True": True, "yes": True, "on": True, "false": False, "False": False, "no": False, "off": False}


class UnknownName(ValueError):
    """A dotted path names a field that is not there."""


def override(stages: tuple[Any, ...], assignments: list[str]) -> tuple[Any, ...]:
    """The stages with every `path=value` set; a path may begin with a stage's name, else it means every stage that has the field.

    Raises ValueError naming the path, the value and the wanted type, and for an unknown name the known ones and the closest.
    """
    names = [stage.name for stage in stages]
    pending: list[list[tuple[str, str]]] = [[] for _ in stages]
    for assignment in assignments:
        path, value = split(assignment)
        head, _, rest = path.partition(".")
        only = names.index(head) if head in names and rest else None
        inner = rest if only is not None else path
        errors: list[UnknownName] = []
        for i, stage in enumerate(stages):
            if only is None or only == i:
                try:
                    set_fields(stage, nest([(inner, value)]), probe=True)
                    pending[i].append((inner, value))
                except UnknownName as error:
                    errors.append(error)
        if errors and len(errors) == (1 if only is not None else len(stages)):
            raise errors[-1]
    return tuple(set_fields(stage, nest(pairs)) if pairs else stage for stage, pairs in zip(stages, pending))


def split(assignment: str) -> tuple[str, str]:
    """`path=value` in two; leading dashes are forgiven."""
    path, equals, value = assignment.partition("=")
    path = path.lstrip("-").strip()
    if not equals or not path:
        raise ValueError(
            f"{assignment!r} is no override: write field=value, for example steps=100 or branching.width=16"
        )
    return path, value.strip()


def nest(pairs: list[tuple[str, str]]) -> Updates:
    """Dotted paths as a tree of updates; the later of two values for one path wins."""
    tree: Updates = {}
    for path, value in pairs:
        *way, last = path.split(".")
        at = tree
        for name in way:
            below = at.get(name)
            at[name] = at = below if isinstance(below, dict) else {}
        at[last] = value
    return tree


def set_fields(thing: Any, updates: Updates, path: str = "", probe: bool = False) -> Any:
    """A copy of a frozen dataclass with the updates applied, all at once so that they are validated together.

    With `probe`, names and types are checked and nothing is built.
    """
    known = {f.name: f for f in fields(thing) if f.init}
    hints = field_types(type(thing))
    new: dict[str, Any] = {}
    for name, update in updates.items():
        where = f"{path}.{name}" if path else name
        if name not in known:
            raise UnknownName(unknown(name, list(known), where, type(thing).__name__))
        if not known[name].repr:
            raise ValueError(f"{where} is a secret, and a command line is seen by others and saved: set it in the environment or in the recipe file")
        new[name] = set_value(getattr(thing, name), hints.get(name, Any), update, where, probe)
    if probe:
        return thing
    try:
        return replace(thing, **new)
    except ValueError as error:
        text = " ".join(
            f"{path}.{name}={shown(update)}" if path else f"{name}={shown(update)}" for name, update in updates.items()
        )
        raise ValueError(f"{text}: {error}") from error


def shown(update: Any) -> str:
    return update if isinstance(update, str) else "..."


def set_value(current: Any, hint: Any, update: str | Updates, where: str, probe: bool) -> Any:
    """The new value of one field: parsed text, or a copy of what is there with updates inside."""
    if isinstance(update, dict):
        if is_dataclass(current) and not isinstance(current, type):
            return set_fields(current, update, where, probe)
        if isinstance(current, tuple):
            return set_items(current, hint, update, where, probe)
        raise UnknownName(
            f"{where} is {current!r}, which has no field {next(iter(update))!r}: set {where}=value, or change it in the recipe file"
        )
    return parse(update, hint, current, where)


def set_items(current: tuple[Any, ...], hint: Any, updates: Updates, where: str, probe: bool) -> tuple[Any, ...]:
    """A copy of a tuple with some items changed; names are indices from 0."""
    items = list(current)
    for name, update in updates.items():
        if not name.isdigit() or int(name) >= len(items):
            raise UnknownName(
                f"{where}.{name}: {where} has {len(items)} items, numbered from 0 to {len(items) - 1}; {name!r} is none of them"
            )
        i = int(name)
        args = get_args(hint) if get_origin(hint) is tuple else ()
        item = args[0] if len(args) == 2 and args[1] is Ellipsis else args[i] if i < len(args) else Any
        items[i] = set_value(items[i], item, update, f"{where}.{name}", probe)
    return tuple(items)


def unknown(name: str, known: list[str], where: str, owner: str) -> str:
    if (owner, name) in MOVED:
        return f"{where}: {owner} has no field {name!r} any more, it is {MOVED[owner, name]}"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f" Did you mean {where[: len(where) - len(name)]}{close[0]}?" if close else ""
    return f"{where}: {owner} has no field {name!r}.{guess} It has: {', '.join(known) or 'no fields'}"


def field_types(kind: type) -> dict[str, Any]:
    """The types of a dataclass' fields; none where a name in them cannot be resolved (a class made in a function), and all count as Any."""
    try:
        return typing.get_type_hints(kind)
    except (NameError, AttributeError, TypeError):
        return {}


def parse(text: str, hint: Any, current: Any, where: str) -> Any:
    """The text as a value of the annotated type; for a free type, as a value of the type that is there now."""
    options = list(get_args(hint)) if get_origin(hint) in (typing.Union, types.UnionType) else [hint]
    if Any in options:
        options = free(current)
    for option in sorted(options, key=rank):
        try:
            return parse_as(text, option)
        except ValueError:
            continue
    if is_dataclass(current) and not isinstance(current, type):
        names = ", ".join(f"{where}.{f.name}" for f in fields(current) if f.init)
        raise ValueError(
            f"{where}={text}: {where} is an object, {type(current).__name__}; set one of its fields ({names or 'it has none'}) "
            "or change it in the recipe file"
        )
    raise ValueError(f"{where}={text}: {text!r} is not {describe(options)}; it is {current!r} in the recipe")


def free(current: Any) -> list[Any]:
    """What a field without a type may become: the type that is there now; None in place of an object; a scalar in place of None."""
    if current is None:
        return [type(None), bool, int, float]
    if type(current) is int:
        return [int, float]
    return [type(current)] if isinstance(current, bool | float | str | tuple) else [type(None)]


def rank(option: Any) -> int:
    """The order in which the members of a union are tried: the narrowest first."""
    order = [type(None), bool, int, float, tuple, Path, str]
    plain = get_origin(option) or option
    return -1 if plain is Literal else order.index(plain) if plain in order else len(order)


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
        choices = {"none": None, "None": None, "null": None}
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
            return "one of " + ", ".join(map(str, get_args(option)))
        if origin is tuple:
            inner = [one(arg) for arg in get_args(option) if arg is not Ellipsis]
            return f"a list like a,b of {inner[0] if inner else 'values'}"
        return words.get(origin, f"an object that only a recipe file can make ({getattr(origin, '__name__', origin)})")

    return " or ".join(dict.fromkeys(one(option) for option in options))
