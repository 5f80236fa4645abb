"""Trees at rest: one JSON line a tree, lossless, written and read one tree at a time.

A line is `{"format": 3, "step": ..., "task": {...}, "nodes": [...], ...}` with the nodes in preorder, each naming its
parent by its place in that list (`up`). Fields that equal their default are left out, so a changed default needs a new
FORMAT. Columns are lists of numbers: those of a sampler in the fewest digits that name the float32, signals in those of
the float64. What JSON cannot say is tagged (`tagged_json.py`).
"""

from __future__ import annotations

import gzip
import json
import os
import warnings
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from functools import cache
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import IO, Any

from ramulus.core.tagged_json import TAG, columns_to_json, encode, keyed, untag
from ramulus.core.task import Task
from ramulus.core.tree import PER_TOKEN, Author, Node, Tree

FORMAT = 3
TREES_AT_ONCE = 6  # trees whose lines are made at once: more are hardly quicker
QUICK: Callable[[Any], bytes] | None = None
"""A quicker encoder of plain values than json's, from whoever has one: a run hands over orjson's."""

LINKS = {"parent", "children", "root", "task"}  # fields that the layout of a line says
RESTORE: dict[str, Callable[[Any], Any]] = {
    "author": Author,
    "prompt": tuple,
    "unexpanded": tuple,
    "demonstrations": lambda rows: tuple(tuple(row) for row in rows),
}
_KINDS = {"tokens": "i", "versions": "i"} | dict.fromkeys(PER_TOKEN, "f")  # of the columns; signals are "d"
KNOWN: dict[type[Any], set[str]] = {}  # the names a record may have; asking anew at every node would double the time


class StoreError(ValueError):
    """A line that is no tree, or a value that JSON lines cannot hold."""


class TornLine(UserWarning):
    """The last line of a file was cut off, as a killed write leaves it."""


@cache
def _plan(kind: type[Any]) -> list[tuple[str, Callable[[Any], Any], Any, Any, bool]]:
    """Of each stored field of a record its name, what reads it, its default, the type of one that reading fills in by itself (never 0.0, which
    -0.0 equals), and whether a tuple in it is stored as a plain list. What a record derives is no argument of it, and is not stored."""
    plan: list[tuple[str, Callable[[Any], Any], Any, Any, bool]] = []
    for field in fields(kind):
        if field.init and field.name not in LINKS:
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            filled = None if default == 0.0 and isinstance(default, float) else type(default)
            plan.append((field.name, attrgetter(field.name), default, filled, field.name in RESTORE))
    return plan


def _fill(records: Sequence[dict[str, Any]], things: Sequence[Node] | Sequence[Tree] | Sequence[Task]) -> None:
    """Put the plain fields of many Nodes, Trees or Tasks into their records, defaults left out; a field of all of them at a time."""
    for name, read, default, filled, listed in _plan(type(things[0])):  # type: ignore[arg-type]
        stored = [(record, value) for record, value in zip(records, map(read, things), strict=True) if type(value) is not filled or value != default]
        if stored:
            try:
                column = _column([value for _, value in stored], name, listed)
            except (TypeError, RecursionError) as error:
                raise StoreError(f"{type(things[0]).__name__}.{name}: {error}") from error
            for (record, _), value in zip(stored, column, strict=True):
                record[name] = value


def _column(values: list[Any], name: str, listed: bool) -> list[Any]:
    """One field of many records as plain JSON."""
    if name in _KINDS:
        return columns_to_json(values, _KINDS[name])
    if name == "signals":
        columns = iter(columns_to_json(list(chain.from_iterable(map(dict.values, values))), "d"))
        return [keyed({key: next(columns) for key in signals}) for signals in values]
    if all(issubclass(kind, int | NoneType) for kind in set(map(type, values))):
        return values
    return [list(value) if listed and isinstance(value, tuple) else encode(value) for value in values]


def _written(line: dict[str, Any]) -> bytes:
    """Plain values as ASCII JSON; by json itself where the quick encoder cannot say it so: other letters, integers beyond 64 bits."""
    if QUICK is not None:
        with suppress(TypeError):
            text = QUICK(line)
            if text.isascii():
                return text
    return json.dumps(line, allow_nan=False, separators=(",", ":")).encode("ascii")


def dump(tree: Tree) -> bytes:
    """One tree as one line of ASCII JSON, newline included; StoreError names a value that cannot be stored."""
    try:
        return _dump([tree])[0]
    except (TypeError, ValueError, RecursionError) as error:
        remedy = "use plain str, int, float, bool, None, list, tuple, set and dict"
        raise StoreError(f"cannot store the tree of task {tree.task.id!r}: {error}; {remedy}") from error


def _dump(trees: Sequence[Tree]) -> list[bytes]:
    """The lines of some trees: field by field over all of their nodes, which is quicker than node by node."""
    lines: list[dict[str, Any]] = [{"format": FORMAT, "step": tree.step} for tree in trees]
    _fill(lines, trees)
    nodes: list[Node] = []
    records: list[dict[str, Any]] = []
    for tree, line in zip(trees, lines, strict=True):
        order = tree.preorder()
        line |= {"task": {}, "nodes": [{"up": up} if up >= 0 else {} for up in order.up]}
        nodes += order.nodes
        records += line["nodes"]
    _fill([line["task"] for line in lines], [tree.task for tree in trees])
    _fill(records, nodes)
    for record in records:
        if record.get("newest") == record.get("version"):
            record.pop("newest", None)  # reading fills it in
    return [_written(line) + b"\n" for line in lines]


def load(line: bytes) -> Tree:
    """One line as a tree; StoreError says what is wrong with it."""
    return _plant(_parse(line))


def _parse(line: bytes) -> dict[str, Any]:
    """The JSON of one line, brought to this FORMAT."""
    try:
        content = json.loads(line, object_hook=untag if TAG.search(line) else None)
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"not JSON ({error})") from error
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise StoreError("not a tree: a JSON object with a `format` number is wanted")
    if version > FORMAT:
        raise StoreError(f"format {version} is of a newer ramulus, this one reads up to {FORMAT}: upgrade ramulus")
    try:
        for old in range(version, FORMAT):
            content = UPGRADES[old](content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"not a tree: {type(error).__name__} {error}") from error
    return content


def _from_lists(content: dict[str, Any]) -> dict[str, Any]:
    """Format 1, whose sampled columns are float64."""
    for record in content.get("nodes", ()):
        record |= {name: array("d", record[name]) for name in PER_TOKEN if name in record}
    return content


def _from_2(content: dict[str, Any]) -> dict[str, Any]:
    """Format 2, where the log-probs of the reference model were the signal `frozen`, and a verdict said whether a schedule lets its path grow."""
    unexpanded = [record["id"] for record in content.get("nodes", ()) if record.get("verdict", {}).pop("expanded", 1.0) == 0]
    content |= {"unexpanded": unexpanded} if unexpanded else {}
    for record in content.get("nodes", ()):
        if "frozen" in record.get("signals", {}):
            record["signals"] = {"reference_model" if name == "frozen" else name: column for name, column in record["signals"].items()}
    return content


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_lists, 2: _from_2}
"""From a format to the next: `UPGRADES[1]` turns the JSON of a format 1 line into that of format 2."""


def _plant(content: dict[str, Any]) -> Tree:
    """The tree that a line's JSON describes."""
    try:
        task = _build(Task, content.pop("task"))
        records = content.pop("nodes")
        content.pop("format")
        nodes: list[Node] = []
        for place, record in enumerate(records):
            up = record.pop("up", None)
            if (up is None) != (place == 0) or (up is not None and not 0 <= up < place):
                raise StoreError(f"node {place} hangs under {up}, which is no node before it")
            node = _build(Node, record)
            nodes.append(node)
            if up is not None:
                node.parent = nodes[up]
                nodes[up].children.append(node)
        return _build(Tree, content, task=task, root=nodes[0])
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StoreError(f"not a tree: {type(error).__name__} {error}") from error


def _build(kind: type[Any], record: dict[str, Any], **links: Any) -> Any:
    """A dataclass from its record; a field it does not know is an error, so nothing is lost silently."""
    if kind not in KNOWN:
        KNOWN[kind] = {field.name for field in fields(kind) if field.init} - LINKS
    unknown = sorted(record.keys() - KNOWN[kind])
    if unknown:
        raise StoreError(f"unknown {kind.__name__} fields {unknown}: of a newer ramulus? upgrade ramulus to read it")
    return kind(**{k: RESTORE[k](value) if k in RESTORE else value for k, value in record.items()}, **links)


def _open(path: Path, mode: str) -> IO[bytes]:
    """The file as bytes, through gzip where its name ends in `.gz`."""
    return gzip.open(path, mode, compresslevel=3) if path.suffix == ".gz" else open(path, mode)  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """(number from 1, line, whole) of every line that is not blank; only the last can lack its end."""
    if not path.is_file():
        raise FileNotFoundError(f"no trees at {path}: there is no such file; check the path of the run")
    number = 0
    with _open(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line, line.endswith(b"\n")
        except EOFError:  # a gzip stream without its end
            yield number + 1, b"", False
        except (gzip.BadGzipFile, zlib.error) as error:
            raise StoreError(f"{path} after line {number}: damaged gzip data ({error})") from error


def _parsed(path: Path, strict: bool) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """(number, line with its newline, its JSON) of every line; a bad one raises, a torn last one is reported."""
    for number, line, whole in _lines(path):
        try:
            content = _parse(line)
        except StoreError as error:
            if whole or strict:
                raise StoreError(f"{path} line {number}: {error}") from error
            text = f"{path} line {number}: the file is cut off here (a killed write?), its torn end is skipped"
            warnings.warn(text, TornLine, stacklevel=3)
            return
        yield number, line if whole else line + b"\n", content


def read(path: str | os.PathLike[str], strict: bool = False) -> Iterator[Tree]:
    """The trees of a file, one at a time; `.gz` is unpacked.

    A last line that a killed write cut off is skipped with a TornLine warning, or raises where `strict`. Any other bad
    line raises StoreError with the file and the line number.
    """
    for number, _, content in _parsed(Path(path), strict):
        try:
            yield _plant(content)
        except StoreError as error:
            raise StoreError(f"{path} line {number}: {error}") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError (a full disk) into one that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = "free space or choose another output folder"
        raise OSError(error.errno, f"cannot write trees to {path}: {error.strerror}; {remedy}") from error


class Writer:
    """A file of trees that is open for writing, one tree at a time; a context manager.

    `append` goes on after what is there and first takes away a torn last line. OSError (a full disk) names the file.
    """

    def __init__(self, path: str | os.PathLike[str], append: bool = False) -> None:
        self.path = Path(path)
        if append and self.path.is_file():
            _mend(self.path)
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = _open(self.path, "ab" if append else "wb")

    def write(self, tree: Tree) -> int:
        """Write one tree; returns the bytes of its line before compression."""
        return self.put(dump(tree))

    def put(self, line: bytes) -> int:
        """Write one line that `dump` made."""
        with _writing(self.path):
            return self.file.write(line)

    def flush(self) -> None:
        """Hand what was written to the system, so that a killed process loses nothing before this point."""
        with _writing(self.path):
            self.file.flush()

    def close(self) -> None:
        """Flush and close; closing twice is harmless."""
        with _writing(self.path):
            self.file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write(path: str | os.PathLike[str], trees: Iterable[Tree], append: bool = False) -> int:
    """Write trees as they come; returns how many."""
    count, rest = 0, iter(trees)
    with Writer(path, append) as writer:
        while some := list(islice(rest, TREES_AT_ONCE)):
            try:
                lines: Iterable[bytes] = _dump(some)
            except (TypeError, ValueError, RecursionError):
                lines = map(dump, some)  # to say which it is, and write those before it
            for line in lines:
                writer.put(line)
            count += len(some)
    return count


def _mend(path: Path) -> None:
    """Take away a torn last line, or end a whole one, so that the next tree starts a line of its own."""
    if path.suffix == ".gz":
        whole = all(whole for _, _, whole in _lines(path))
    else:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            whole = file.read(1) in (b"", b"\n")
    if not whole:
        _rewrite(path)


def _rewrite(path: Path) -> None:
    """Replace the file, atomically, by its whole lines; a damaged one raises and leaves it alone."""
    beside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with Writer(beside) as writer:
            for _, line, _ in _parsed(path, strict=False):
                writer.put(line)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
