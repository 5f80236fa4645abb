"""Values as JSON that reads back as they were: what JSON cannot say is tagged.

`{"$float": "nan"}`, `{"$tuple": [...]}`, `{"$set": [...]}`, `{"$frozenset": [...]}`, `{"$dict": [[key, value], ...]}`,
`{"$text": [code points]}`, and `{"$array": [kind, [...]]}` for a column of another kind than its place has.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")  # two lone surrogates that JSON would read back as one character
TAG = re.compile(rb'"\$(float|tuple|set|frozenset|dict|text|array)":')
FORMER_TAGS = {"!tuple": "$tuple", "!set": "$set", "!items": "$dict"}  # of what reasoning-gym's tasks carried before


def encode(value: Any) -> Any:
    """Plain JSON for a value of str, int, float, bool, None, list, tuple, set, dict and array; TypeError for anything else."""
    kind = type(value)
    if (kind is float and math.isfinite(value)) or (kind is str and value.isascii()) or (kind is list and _finite(value)):
        return value
    if value is None or isinstance(value, int):
        return value
    if kind is array:
        return _column_to_json(value, "d")
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, str):
        return {"$text": [ord(c) for c in value]} if PAIR.search(value) else value
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [encode(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {"$set" if isinstance(value, set) else "$frozenset": sorted((encode(item) for item in value), key=repr)}
    if isinstance(value, dict):
        return keyed({key: encode(item) for key, item in value.items()})
    raise TypeError(f"{value!r:.80} is a {type(value).__name__}")


@lru_cache(maxsize=256)
def _plain_keys(keys: tuple[Any, ...]) -> bool:
    """Whether a dict with these keys is an object of JSON as it is."""
    return all(isinstance(key, str) and key[:1] not in ("$", "!") and (key.isascii() or not PAIR.search(key)) for key in keys)


def keyed(values: dict[Any, Any]) -> dict[str, Any]:
    """Plain JSON for a dict whose values are plain JSON."""
    return values if _plain_keys(tuple(values)) else {"$dict": [[encode(key), value] for key, value in values.items()]}


def columns_to_json(columns: Sequence[Any], usual: str) -> list[Any]:
    """Columns as lists of numbers, each tagged where it is not of the usual kind."""
    if not all(type(values) is array and values.typecode == usual for values in columns):
        return [_column_to_json(values, usual) for values in columns]
    whole: array[Any] = array(usual, b"".join(columns))
    if usual != "i" and not _finite(whole):
        return [_column_to_json(values, usual) for values in columns]
    numbers = FEW_DIGITS(whole) if usual == "f" else whole.tolist()
    ends = accumulate(map(len, columns))
    return [numbers[end - len(values) : end] for values, end in zip(columns, ends, strict=True)]


def _column_to_json(values: Any, usual: str) -> Any:
    """A column as JSON: numbers alone where its type is the usual one, else tagged with its type."""
    if type(values) is not array:
        return encode(values)
    plain = [encode(value) for value in (nine_digits(values) if values.typecode == "f" else values)]
    return plain if values.typecode == usual else {"$array": [values.typecode, plain]}


def nine_digits(values: array[float]) -> list[float]:
    """A float32 column in float64 of nine digits, which tell every float32 from its neighbours."""
    return [float(f"{value:.9g}") for value in values]


FEW_DIGITS: Callable[[array[float]], list[float]] = nine_digits
"""How a float32 column of finite numbers becomes float64 that json writes in few digits; a run hands over a quicker way."""


def _finite(values: Iterable[Any]) -> bool:
    """Whether these are finite numbers, in one pass in C: a sum with a NaN or an infinity in it is not finite."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def untag(content: dict[str, Any]) -> Any:
    """The value that a tagged object stands for; called by the JSON reader from the inside out."""
    if len(content) == 1:
        match content:
            case {"$float": text}:
                return float(text)
            case {"$text": points}:
                return "".join(map(chr, points))
            case {"$array": [kind, items]}:
                return array(kind, items)
            case {"$tuple": items}:
                return tuple(items)
            case {"$set": items}:
                return set(items)
            case {"$frozenset": items}:
                return frozenset(items)
            case {"$dict": pairs}:
                return dict(pairs)
    return content


def decode(value: Any) -> Any:
    """The value that `encode` was given, or that its forerunner for reasoning-gym's tasks was."""
    text = json.dumps(value)
    for former, tag in FORMER_TAGS.items():
        text = text.replace(f'{{"{former}": ', f'{{"{tag}": ')  # a quote inside a text is escaped, so this is no text
    return json.loads(text, object_hook=untag)
