"""A configuration as YAML: `ramulus config` writes it, `--config` reads it. A file may hold a few fields of a recipe, or all of them.

    recipe: treepo                 # what is not said is as there; a file that says everything needs none
    model: Qwen/Qwen2.5-Math-1.5B
    optimizer: {lr: 2e-6}
    branching: {class: Segments, width: 8, depth: 6, length: 256}

A class is one of this package by its name, or FILE.py:NAME.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml

from ramulus.core.recipe_part import is_part
from ramulus.run.config.describe import CLASS, to_json
from ramulus.run.config.override import Blank, Word, whole_value, without_blanks, word_of
from ramulus.run.config.package_classes import class_named, yaml_name
from ramulus.run.config.python_file import cause, read_file
from ramulus.run.config.recipe import Run
from ramulus.run.config.unknown import unknown
from ramulus.run.config.values import NONES, field_types, options_of, parse, type_of_item

RECIPE, STAGES = "recipe", "stages"
IN_FILE = re.compile(r"(.+\.py):(\w+)")


def to_yaml(recipe: str | None, stages: Sequence[Run]) -> str:
    """The whole configuration of a recipe; `read_yaml` gives the same stages back, where no recipe is named too.

    Raises ValueError for what YAML cannot name.
    """
    filled = [{name: value for name, value in to_plain(stage).items() if name != CLASS} for stage in stages]
    named = {RECIPE: recipe} if recipe is not None else {}
    content: dict[str, Any] = named | (filled[0] if len(filled) == 1 else {STAGES: filled})
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=140))


def to_plain(value: Any) -> Any:
    """Mappings, lists and scalars; a dataclass carries its class, and no field that its repr hides."""
    if is_part(value):
        return {CLASS: _named(type(value))} | {f.name: to_plain(getattr(value, f.name)) for f in fields(value) if f.init and f.repr}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if inspect.isfunction(value) or isinstance(value, type):
        return _named(value)
    return value if isinstance(value, float) else to_json(value)


def _named(thing: Any) -> str:
    """How a class or function is written: its name, or FILE.py:NAME for one of the user's."""
    module = thing.__module__
    if module.startswith("ramulus.") and not module.startswith("ramulus.recipes."):
        return yaml_name(thing) if isinstance(thing, type) else str(thing.__qualname__)
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not thing.__qualname__.isidentifier():
        raise ValueError(f"{thing.__qualname__} cannot be named in YAML: define it at the top level of a Python file")
    return f"{Path(file).resolve()}:{thing.__qualname__}"


def read_yaml(file: str, base: str | None, stages_of: Callable[[str], tuple[Run, ...]]) -> tuple[Run, ...]:
    """The stages that a YAML file describes, over those of the recipe that it or `base` names. Raises ValueError with the file and the field."""
    content = _content(file)
    named = content.pop(RECIPE, None)
    if named is not None and not isinstance(named, str):
        raise ValueError(f"{file}: {RECIPE} must be the name or the file of a recipe, got {named!r:.80}: write {RECIPE}: grpo, say")
    if base is not None and named is not None and base != named:
        raise ValueError(f"{file} is over the recipe {named}, not over {base}: leave out one of them")
    if named is not None and named.partition(":")[0].endswith(".py"):
        named = str(Path(file).parent / named)
    stages = stages_of(base or named) if base or named else ()
    listed = content.pop(STAGES, None)
    try:
        return _laid_over(stages, listed, content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _laid_over(stages: tuple[Run, ...], listed: Any, given: dict[str, Any]) -> tuple[Run, ...]:
    """The stages with the fields `given` for all of them and those `listed` for each by its name; new ones where there is no recipe."""
    if listed is None:
        return tuple(_part(Run, given, stage, "") for stage in stages) if stages else (_part(Run, given, None, ""),)
    if not isinstance(listed, list) or not all(isinstance(stage, dict) and isinstance(stage.get("name"), str) for stage in listed):
        raise ValueError(f"{STAGES} is a list of mappings, each with the name of its stage")
    of = {stage["name"]: stage for stage in listed}
    if len(of) < len(listed):
        raise ValueError(f"{STAGES} has two stages of one name: it has {', '.join(stage['name'] for stage in listed)}")
    if stages and (strange := [name for name in of if name not in [stage.name for stage in stages]]):
        raise ValueError(f"the recipe has no stage {strange[0]!r}: it has {', '.join(stage.name for stage in stages)}")
    if stages:
        return tuple(_part(Run, _under(of.get(stage.name, {}), given), stage, "") for stage in stages)
    return tuple(_part(Run, _under(stage, given), None, "") for stage in listed)


def _under(own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A stage's own fields with those that all stages are given under them, mapping by mapping; one of another class is the stage's alone."""
    laid = dict(given) if own.get(CLASS) in (None, given.get(CLASS)) else {}
    for name, item in own.items():
        below = laid.get(name)
        laid[name] = _under(item, below) if isinstance(item, dict) and isinstance(below, dict) else item
    return laid


class _Mappings(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; YAML's own reader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


def _content(file: str) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _Mappings)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{file}{where} is no YAML: {getattr(error, 'problem', None) or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{file} must be a mapping of fields to values, `steps: 100` say")
    return content


def _part(kind: type, given: dict[str, Any], base: Any, where: str) -> Any:
    """An object of a class with the given fields, the others as in `base` where that is one."""
    known, hints = {f.name: f for f in fields(kind) if f.init}, field_types(kind)
    new: dict[str, Any] = {}
    for name, item in given.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in known:
            raise ValueError(unknown(str(name), kind, list(known), path, base))
        if not known[name].repr:
            raise ValueError(f"{path} is a secret, and a configuration is saved: set it in the environment or in the recipe file")
        now = Blank(kind, {}).now(name) if base is None else getattr(base, name)
        new[name] = _value(item, hints.get(name, Any), now, word_of(known[name]), path)
    try:
        return Blank(kind, new).make(where or kind.__name__) if base is None else replace(base, **new)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # of a class that a value of a wrong kind was given
        raise ValueError(cause(error, {}, where)) from error


def _value(item: Any, hint: Any, now: Any, word: Word, where: str) -> Any:
    """What one value of YAML stands for in a field of this type that holds `now`."""
    kinds = [get_origin(option) or option for option in options_of(hint)]
    if isinstance(item, dict):
        kind = _class_at(item[CLASS], where) if CLASS in item else type(now) if is_dataclass(now) else word.usual
        if kind is None and tuple in kinds and dict not in kinds:
            raise ValueError(f"{where} is a list, got {item!r:.80}: write [{{...}}], a mapping for each item")
        if kind is None:
            return item
        return _part(kind, {name: inner for name, inner in item.items() if name != CLASS}, now if type(now) is kind else None, where)
    if isinstance(item, list):
        if list in kinds:
            return item
        items = [_value(inner, type_of_item(hint, i), _at(now, i), Word(), f"{where}.{i}") for i, inner in enumerate(item)]
        return tuple(items)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum) and item is not None:
            return _member(item, kind, where)
    item = item.isoformat() if isinstance(item, date) and str in kinds else item  # YAML takes 2026-11-29 for a day
    text = str(item).lower() if isinstance(item, bool) else str(item)
    if item is not None and (word.read or word.usual) and not (isinstance(item, bool) and not item):
        return without_blanks(whole_value(now, hint, word, text, where, False), where)
    if isinstance(item, str):
        return _text(item, hint, now, where)
    return float(item) if isinstance(item, int) and not isinstance(item, bool) and float in kinds and int not in kinds else item


def _text(item: str, hint: Any, now: Any, where: str) -> Any:
    """What a text stands for: itself, a number such as 1e-6 that YAML takes for text, a function of a file."""
    options = options_of(hint)
    if match := IN_FILE.fullmatch(item):
        function = getattr(read_file(match[1], "give FILE.py:NAME", "file"), match[2], None)
        if callable(function):
            return function
    if str in options or (Any in options and (now is None or isinstance(now, str))):
        return item
    if not any(option in (int, float, bool, Path, Any, type(None)) or get_origin(option) in (Literal, tuple) for option in options):
        raise ValueError(f"{where}: {item!r} is no text for this field: write a mapping with a class, as `ramulus config` does")
    return NONES[item] if item in NONES and type(None) in options else parse(item, hint, now, where)


def _member(item: Any, kind: type[Enum], where: str) -> Enum:
    """The member of an enumeration that a name or a value stands for."""
    name = str(item).rpartition(".")[2]
    for member in kind:
        if member.name == name or (member.value == item and not isinstance(item, bool)):
            return member
    raise ValueError(f"{where} must be one of {', '.join(map(str, to_json(tuple(kind))))}, got {item!r:.80}")


def _at(now: Any, i: int) -> Any:
    """An item of a tuple that is there now."""
    return now[i] if isinstance(now, tuple) and i < len(now) else None


def _class_at(name: Any, where: str) -> type:
    """The dataclass of a name."""
    match = IN_FILE.fullmatch(str(name))
    kind = getattr(read_file(match[1], "give FILE.py:NAME", "file"), match[2], None) if match else class_named(str(name))
    if not isinstance(kind, type) or not is_dataclass(kind):
        raise ValueError(f"{where}: there is no class {name!r}: give one of this package by its name, or FILE.py:NAME")
    return kind
