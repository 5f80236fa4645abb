"""What travels between a client and an engine server: plain JSON, columns as base64 of little-endian arrays; nothing is ever unpickled.

A call to sample: {"instance", "loaded", "prefixes": [column], "kinds": [{"sampling", "stop"}], "requests": [[prefix, kind, seed]]}, where the
first two numbers of a request are places in the lists: the branches of a tree share both. Its answer: {"segments": [...]} and what `Hello` has.
Every call and every answer carries PROTOCOL in the header `ramulus-protocol`.
"""

from __future__ import annotations

import base64
import json
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from ramulus.engine.engine import Request, Sampling, Segment, StopRule

PROTOCOL = 1
HEADER = "ramulus-protocol"
_COLUMNS = {"i": 4, "f": 4, "d": 8}  # type codes of the array module: bytes of an item
RULE = "rule"  # the key that names the class of a temperature rule
ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ValueError, TypeError, FileNotFoundError, RuntimeError, MemoryError)}
"""What an engine may raise that its caller is told as it is."""

Rules = Mapping[str, type]
"""The temperature rules that a server builds: class name -> frozen dataclass."""


@dataclass(frozen=True)
class Hello:
    """What a server says of itself with every answer.

    `instance`: drawn when it started, so that a client sees that it is another one. `loaded`: the name that a client gave to the weights
    it has; "" while they are those it started with.
    """

    instance: str
    loaded: str
    version: int
    model: str
    vocabulary: int
    limit: int
    features: tuple[str, ...]
    counters: dict[str, int]

    def other_than(self, former: Hello) -> str:
        """What of this server is not as it was `known`, in words; "" where all is."""
        names = ("vocabulary", "limit", "features", "model")
        differs = (name for name in names if getattr(self, name) != getattr(former, name))
        return "; ".join(f"its {name} is {getattr(self, name)!r} and was {getattr(former, name)!r}" for name in differs)


def hello_of(content: Mapping[str, Any]) -> Hello:
    """A server's word; ValueError where something is missing."""
    try:
        return Hello(**{f.name: content[f.name] for f in fields(Hello)} | {"features": tuple(content["features"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"the answer lacks {error}") from None


def json_bytes(content: Any) -> bytes:
    """JSON as it travels; floats come back as they were."""
    return json.dumps(content, separators=(",", ":")).encode()


def to_column(values: array[Any]) -> str:
    """An array as text: its type code, a colon, and its bytes."""
    if sys.byteorder == "big":
        values = array(values.typecode, values)
        values.byteswap()
    return f"{values.typecode}:{base64.b64encode(values).decode()}"


def of_column(text: str) -> array[Any]:
    """The array of a column's text; ValueError for what is none."""
    code, colon, content = text.partition(":")
    if code not in _COLUMNS or not colon:
        raise ValueError(f"a column begins with one of {', '.join(_COLUMNS)} and a colon, got {text[:8]!r}")
    raw = base64.b64decode(content, validate=True)
    if len(raw) % _COLUMNS[code]:
        raise ValueError(f"a column of {code!r} has {_COLUMNS[code]} bytes an item, got {len(raw)} bytes")
    values: array[Any] = array(code, raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def rule_to_json(value: Any) -> Any:
    """A temperature: a number as it is, a frozen dataclass as its class name and fields; ValueError for any other rule."""
    if isinstance(value, int | float):
        return value
    if not is_dataclass(value) or isinstance(value, type):
        raise ValueError(f"the temperature rule {value!r} cannot be sent to an engine server: make it a frozen dataclass that the server knows")
    try:
        content = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return {RULE: type(value).__name__, "fields": json.loads(json.dumps(content))}
    except TypeError as error:
        raise ValueError(f"the temperature rule {value!r} cannot be sent to an engine server: {error}") from None


def rule_of_json(content: Any, rules: Rules) -> Any:
    """The temperature that `rule_to_json` wrote, built from the rules that are known and nothing else."""
    if isinstance(content, int | float):
        return content
    name = content[RULE]
    if name not in rules:
        names = ", ".join(sorted(rules)) or "none"
        raise ValueError(f"this engine server does not know the temperature rule {name!r}: it knows {names}; sample with engine=Local() for others")
    values = {f.name: content["fields"][f.name] for f in fields(rules[name]) if f.init and f.name in content["fields"]}
    if unknown := sorted(content["fields"].keys() - values.keys()):
        raise ValueError(f"the temperature rule {name} of this engine server has no field {unknown[0]!r}: install the same ramulus on both sides")
    return rules[name](**values)


def kind_to_json(sampling: Sampling, stop: StopRule) -> dict[str, Any]:
    """How a request is sampled and where it ends."""
    plain = {f.name: getattr(sampling, f.name) for f in fields(sampling)}
    return {"sampling": plain | {"temperature": rule_to_json(sampling.temperature)}, "stop": {"ids": sorted(stop.ids), "strings": stop.strings}}


def kind_of_json(content: Mapping[str, Any], rules: Rules) -> tuple[Sampling, StopRule]:
    """The sampling and the stop rule that `kind_to_json` wrote, checked by their constructors."""
    settings = content["sampling"]
    sampling = Sampling(**settings | {"temperature": rule_of_json(settings["temperature"], rules)})
    return sampling, StopRule(frozenset(int(token) for token in content["stop"]["ids"]), tuple(content["stop"]["strings"]))


def requests_to_json(requests: Sequence[Request]) -> dict[str, Any]:
    """Many requests; what they share is said once. ValueError for one with an `until`, which stays here."""
    if any(request.until is not None for request in requests):
        raise ValueError("until is a function, which an engine server cannot ask: say it as a StopRule, or ask it of what comes back")
    prefixes: dict[Any, int] = {}
    kinds: dict[str, int] = {}
    texts: dict[tuple[int, int], str] = {}  # the objects live as long as the requests
    rows = []
    for request in requests:
        pair = (id(request.sampling), id(request.stop))
        if pair not in texts:
            texts[pair] = json.dumps(kind_to_json(request.sampling, request.stop))
        prefix = prefixes.setdefault(tuple(request.prefix), len(prefixes))
        rows.append([prefix, kinds.setdefault(texts[pair], len(kinds)), request.seed])
    return {
        "prefixes": [to_column(array("i", prefix)) for prefix in prefixes],
        "kinds": [json.loads(text) for text in kinds],
        "requests": rows,
    }


def requests_of_json(content: Mapping[str, Any], rules: Rules) -> list[Request]:
    """The requests again, as the engine takes them; ValueError for what is none."""
    try:
        prefixes = [tuple(of_column(text)) for text in content["prefixes"]]
        kinds = [kind_of_json(kind, rules) for kind in content["kinds"]]
        rows = [(prefixes[prefix], *kinds[kind], int(seed)) for prefix, kind, seed in content["requests"]]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"this is no call to sample ({type(error).__name__}: {error}): install the same ramulus on both sides") from None
    return [Request(prefix=prefix, sampling=sampling, stop=stop, seed=seed) for prefix, sampling, stop, seed in rows]


def segment_to_json(segment: Segment) -> dict[str, Any]:
    """A segment; columns that nobody recorded are null."""
    content = {f.name: getattr(segment, f.name) for f in fields(segment)}
    return {name: to_column(value) if isinstance(value, array) else value for name, value in content.items()}


def segment_of_json(content: Mapping[str, Any]) -> Segment:
    """The segment that `segment_to_json` wrote."""
    names = ("tokens", "logprobs", "kept", "entropy", "temperature", "versions")
    columns = {name: of_column(content[name]) for name in names if isinstance(content.get(name), str)}
    return Segment(**dict(content) | columns)
