"""What a part of a recipe may say of itself beside what it computes, and what holds of one that says nothing.

Any callable is a mask, an advantage or a rule: nothing has to be derived from. The protocol of a kind (Mask, Reference, Leaf, Advantage,
Schedule) writes down what one of it may say, each with a default, and whoever wants to know asks through `with_defaults`.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import getattr_static
from typing import Any, Protocol, TypeVar, cast

_Kind = TypeVar("_Kind")

_UNSAID = object()


class RecipePart(Protocol):
    """What any part of a recipe may say of itself."""

    needs: tuple[str, ...] = ()  # the signals that it reads, which somebody provides (run/signals.py)
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
