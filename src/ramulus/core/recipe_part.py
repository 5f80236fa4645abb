"""Parts of a recipe: what one may say of itself beside what it computes, what holds of one that says nothing, and which parts lie in others.

Any callable is a mask, an advantage or a rule: nothing has to be derived from. The protocol of a kind (Mask, Reference, Leaf, Advantage,
Schedule) writes down what one of it may say, each with a default, and whoever wants to know asks through `with_defaults`. Parts that are
dataclasses may hold others, in fields and in tuples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from inspect import getattr_static
from typing import Any, Protocol, TypeVar, cast

_Kind = TypeVar("_Kind")

_UNSAID = object()


class RecipePart(Protocol):
    """What any part of a recipe may say of itself.

    Example:
        >>> from ramulus import GAE, EntropyAdvantage
        >>> GAE().needs, EntropyAdvantage().records
        (('value',), ('entropy',))
    """

    needs: tuple[str, ...] = ()  # the signals that it reads in trees, which somebody provides (run/signals.py)
    records: tuple[str, ...] = ()  # what an engine must record of the tokens for it: "entropy"


def with_defaults(part: object, kind: Callable[..., _Kind]) -> _Kind:
    """A part as one of a kind (its protocol): what the part says, and the protocol's defaults for what it leaves out."""
    return cast(_Kind, _WithDefaults(part, kind))


class _WithDefaults:
    """Looks a name up in a part, else in its protocol, whose methods and properties then see this object."""

    def __init__(self, part: object, kind: object) -> None:
        self._part, self._kind = part, kind

    def __call__(self, *given: Any) -> Any:
        return self._part(*given)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        own = getattr(self._part, name, _UNSAID)
        if own is not _UNSAID:
            return own
        default = getattr_static(self._kind, name)
        return default.__get__(self) if hasattr(default, "__get__") else default


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


def readers(thing: Any) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """(part, the signals that it says it needs) of a thing and of everything in it that needs any, outermost first."""
    if (callable(thing) or is_part(thing)) and not isinstance(thing, type) and (names := with_defaults(thing, RecipePart).needs):
        yield thing, names
    for _, value in inside(thing):
        yield from readers(value)


def needed(*things: Any) -> tuple[str, ...]:
    """The signals that some of these parts read, or a part in them."""
    return tuple(dict.fromkeys(name for _, names in readers(things) for name in names))
