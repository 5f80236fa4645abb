"""Set any field of a recipe from the command line: `steps=100 branching.width=16 mix.terms.0.estimator.mask.high=0.28`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, get_args, get_origin

from ramulus.core.recipe_part import is_part, paths_to
from ramulus.run.config.short_names import long_name
from ramulus.run.config.unknown import unknown
from ramulus.run.config.values import BOOLS, NONES, field_types, free, has_text, options_of, parse, type_of_item

TEXT = ""  # the key of the text that a whole is set to, beside those of its parts
Updates = dict[str, Any]
"""A tree of updates: the text of a value under TEXT, further updates under field names and tuple indices."""


class UnknownName(ValueError):
    """A dotted path names a field that is not there."""


@dataclass(frozen=True)
class Blank:
    """An object that is still to be made: its class and what is known of its fields."""

    kind: type
    given: dict[str, Any]

    def now(self, name: str) -> Any:
        """What a field will hold as things are; None where it must yet be given."""
        field = next(field for field in fields(self.kind) if field.name == name)
        usual = field.default_factory() if field.default_factory is not MISSING else None if field.default is MISSING else field.default
        return self.given.get(name, usual)

    def make(self, where: str) -> Any:
        """The object. Raises ValueError, naming the field, where one without a default was not given."""
        needed = [f.name for f in fields(self.kind) if f.init and f.default is MISSING and f.default_factory is MISSING]
        if missing := [name for name in needed if name not in self.given]:
            raise ValueError(f"{where} is to be {self.kind.__name__}, which needs {missing[0]}: set {where}.{missing[0]}=... as well")
        return self.kind(**{name: without_blanks(value, f"{where}.{name}") for name, value in self.given.items()})


@dataclass(frozen=True)
class Word:
    """How a field that holds an object is written on the command line; the metadata of a dataclass field, under "word".

    `usual` is the class that `true` and a dotted path into None make; None where a word must come first. `read` tells what any other word
    stands for: an object or a Blank. Raises ValueError for one that stands for nothing.
    """

    usual: type | None = None
    read: Callable[[str], Any] | None = None


def override(stages: tuple[Any, ...], assignments: list[str]) -> tuple[Any, ...]:
    """The stages with every `path=value` set; a path may begin with a stage's name, else it means every stage that has the field.

    A whole and its parts may be set together, in any order: the parts are set in what the whole was set to. Short names that other trainers have
    for a field are taken for it.

    Raises ValueError naming the path, the value and the wanted type, and for an unknown name the known ones and the closest.
    """
    names = [stage.name for stage in stages]
    settings: list[tuple[int | None, str, str]] = []
    for assignment in assignments:
        path, value = split(assignment)
        head, _, rest = path.partition(".")
        only = names.index(head) if head in names and rest else None
        settings.append((only, path if only is None else rest, value))
    pending: list[list[tuple[str, str]]] = [[] for _ in stages]
    for only, named, value in settings:
        errors: list[UnknownName] = []
        meant = range(len(stages)) if only is None else [only]
        for i in meant:
            path = long_name(named, stages[i])
            longer = [(long_name(above, stages[i]), text) for of, above, text in settings if of in (None, i)]
            wholes = [(above, text) for above, text in longer if path.startswith(f"{above}.")]
            try:
                set_fields(stages[i], nest([*wholes, (path, value)]), probe=True)
                pending[i].append((path, value))
            except UnknownName as error:
                errors.append(error)
        if len(errors) == len(meant):
            raise errors[-1]
    return tuple(set_fields(stage, nest(pairs)) if pairs else stage for stage, pairs in zip(stages, pending))


def split(assignment: str) -> tuple[str, str]:
    """`path=value` in two; leading dashes are forgiven."""
    path, equals, value = assignment.partition("=")
    path = path.lstrip("-").strip()
    if not equals or not all(path.split(".")):
        raise ValueError(
            f"{assignment!r} is no override: write field=value, for example steps=100 or branching.width=16"
        )
    return path, value.strip()


def nest(pairs: list[tuple[str, str]]) -> Updates:
    """Dotted paths as a tree of updates; the later of two values for one path wins."""
    tree: Updates = {}
    for path, value in pairs:
        at = tree
        for name in path.split("."):
            at = at.setdefault(name, {})
        at[TEXT] = value
    return tree


def set_fields(thing: Any, updates: Updates, path: str = "", probe: bool = False) -> Any:
    """A copy of a frozen dataclass, or a Blank made, with the updates applied, all at once so that they are validated together.

    With `probe`, names and types are checked and nothing is built.
    """
    kind: type = thing.kind if isinstance(thing, Blank) else type(thing)
    known = {f.name: f for f in fields(kind) if f.init}
    hints = field_types(kind)
    new: dict[str, Any] = {}
    for name, update in updates.items():
        where = f"{path}.{name}" if path else name
        if name not in known:
            raise UnknownName(unknown(name, kind, list(known), where, thing))
        if not known[name].repr:
            raise ValueError(f"{where} is a secret, and a command line is seen by others and saved: set it in the environment or in the recipe file")
        current = thing.now(name) if isinstance(thing, Blank) else getattr(thing, name)
        new[name] = set_value(current, hints.get(name, Any), word_of(known[name]), update, where, probe)
    if probe:
        return thing
    try:
        return Blank(kind, thing.given | new).make(path) if isinstance(thing, Blank) else replace(thing, **new)
    except ValueError as error:
        text = " ".join(f"{path}.{name}={_shown(update)}" if path else f"{name}={_shown(update)}" for name, update in updates.items())
        raise ValueError(f"{text}: {error}") from error


def word_of(field: Field[Any]) -> Word:
    """How a field's object is written: its "word", or what the "read" of a field in a lower room makes of a text."""
    return field.metadata.get("word") or Word(None, field.metadata.get("read"))


def _shown(update: Updates) -> str:
    """The text of an update, or that there is more inside."""
    return str(update[TEXT]) if set(update) == {TEXT} else "..."


def set_value(current: Any, hint: Any, word: Word, update: Updates, where: str, probe: bool) -> Any:
    """The new value of one field: what its text stands for, with the updates of its parts inside."""
    parts = {name: inner for name, inner in update.items() if name != TEXT}
    if TEXT in update:
        current = whole_value(current, hint, word, update[TEXT], where, bool(parts))
    if not parts:
        return current if probe else without_blanks(current, where)
    if isinstance(current, str) and word.read is not None:
        current = word.read(current)
    if current is None and TEXT not in update and word.usual is not None:
        current = Blank(word.usual, {})
    if is_part(current):
        return set_fields(current, parts, where, probe)
    if isinstance(current, tuple):
        return set_items(current, hint, parts, where, probe)
    if isinstance(current, dict) or (current is None and TEXT not in update and any(get_origin(option) is dict for option in options_of(hint))):
        return (current or {}) | {name: item(hint, inner, f"{where}.{name}") for name, inner in parts.items()}
    raise UnknownName(partless(current, hint, word, next(iter(parts)), where))


def whole_value(current: Any, hint: Any, word: Word, text: str, where: str, parted: bool) -> Any:
    """What the text of a whole field stands for; `parted`: fields of it are set as well."""
    if text not in NONES and (word.read is not None or (word.usual is not None and BOOLS.get(text))):
        if BOOLS.get(text) and word.usual is not None:
            return Blank(word.usual, {})
        if word.read is not None and (str not in options_of(hint) or parted):
            try:
                return word.read(text)
            except ValueError as error:
                raise ValueError(f"{where}={text}: {error}") from None
    return parse(text, hint, current, where)


def item(hint: Any, update: Updates, where: str) -> Any:
    """The new value of one key of a dictionary."""
    if set(update) != {TEXT}:
        raise UnknownName(f"{where} has no fields: set {where}=value")
    inner = next((get_args(option)[1] for option in options_of(hint) if get_origin(option) is dict), Any)
    for option in [*free(None), str] if inner is Any else [inner]:
        try:
            return parse(update[TEXT], option, None, where)
        except ValueError:
            continue
    raise ValueError(f"{where}={update[TEXT]}: not {inner}")


def partless(current: Any, hint: Any, word: Word, name: str, where: str) -> str:
    """The sentence for a path that goes into something without parts."""
    if current is None and word.read is not None:
        return f"{where} is None, which has no field {name!r}: say first what it is, {where}=..., or make it in the recipe file"
    remedy = f"set {where}=value" if has_text(hint) and not (current is None and hint is Any) else "make it in the recipe file"
    return f"{where} is {current!r}, which has no field {name!r}: {remedy}"


def without_blanks(value: Any, where: str) -> Any:
    """The value, with every Blank in it made."""
    if isinstance(value, tuple):
        return tuple(without_blanks(item, f"{where}.{i}") for i, item in enumerate(value))
    return value.make(where) if isinstance(value, Blank) else value


def set_items(current: tuple[Any, ...], hint: Any, updates: Updates, where: str, probe: bool) -> tuple[Any, ...]:
    """A copy of a tuple with some items changed; names are indices from 0."""
    items = list(current)
    for name, update in updates.items():
        if not name.isdigit() or int(name) >= len(items):
            places = [f"{where}.{path}" for path in paths_to(name, current)]
            numbered = f"{len(items)} items, numbered from 0 to {len(items) - 1}; {name!r} is none of them"
            numbered += f", but {' and '.join(places)} {'are' if places[1:] else 'is'} there" if places else ""
            there = numbered if items else "no items: make them in the recipe file"
            raise UnknownName(f"{where}.{name}: {where} has {there}")
        i = int(name)
        items[i] = set_value(items[i], type_of_item(hint, i), Word(), update, f"{where}.{name}", probe)
    return tuple(items if probe else (without_blanks(item, f"{where}.{i}") for i, item in enumerate(items)))
