"""Files that grow while they are read: which lines they hold, and only inside the folders that were given."""

from __future__ import annotations

import gzip
import math
import tempfile
import threading
import zlib
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import IO, Any

from ramulus.core.json_object import object_of

_BLOCK = 1 << 20
EDITIONS = count(1)
_DEEPEST = 8  # levels inside a row of metrics
MARK = 4096  # bytes of a file's beginning and end that tell whether it is still the same one


class Changed(LookupError):
    """A file that is another one than it was a moment ago."""


class Fence:
    """The folders and files that may be read; links that lead out of them are refused."""

    def __init__(self, given: Iterable[Path]) -> None:
        self.given = [path.resolve() for path in given]

    def __call__(self, path: Path) -> Path:
        """The path without links; FileNotFoundError for one outside of what was given."""
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in self.given):
            raise FileNotFoundError(f"{path} lies outside the folders that were given")
        return real

    def has(self, path: Path) -> bool:
        """Whether there is a file or folder at the path that may be read."""
        try:
            return self(path).exists()
        except (OSError, RuntimeError):  # outside, forbidden, or a circle of links
            return False

    def json(self, path: Path) -> dict[str, Any] | None:
        """The object in a small JSON file; None where there is none, or where it is being written."""
        try:
            return object_of(self(path).read_bytes())
        except OSError:
            return None


class Lines:
    """Whole lines of a file, found once: `refresh` reads what was appended, or all again where the file is another one now.

    A torn last line is left for the next time. A gzip file is unpacked into an unnamed temporary file.
    """

    def __init__(self, path: Path, fence: Fence) -> None:
        self.path, self.fence = path, fence
        self.spans: list[tuple[int, int]] = []  # (offset, bytes with the newline) of lines that are not blank
        self.edition = next(EDITIONS)  # another one whenever the file began anew; no two files share one
        self.lock = threading.RLock()
        self.end = 0  # bytes that hold whole lines
        self.seen: tuple[int, int, int] | None = None  # inode, size, time of the last look
        self.marks = (b"", b"")
        self.unpacked: IO[bytes] | None = None

    def refresh(self) -> None:
        """Look at the file again; one that is gone has no lines."""
        with self.lock:
            try:
                real = self.fence(self.path)
                stat = real.stat()
            except OSError:
                self.restart()
                self.seen = None
                return
            now = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if now == self.seen:
                return
            with open(real, "rb") as raw:
                if self.path.suffix == ".gz":
                    self.restart()
                    self.unpacked = unpack(raw)
                    self.scan(self.unpacked)
                else:
                    if self.seen is not None and not self.grew(raw, now):
                        self.restart()
                    self.scan(raw)
                    self.marks = self.measure(raw)
            self.seen = now

    def grew(self, file: IO[bytes], now: tuple[int, int, int]) -> bool:
        """Whether the file still begins with what was read: the same inode, not shorter, the same marks."""
        assert self.seen is not None
        return now[0] == self.seen[0] and now[1] >= self.end and self.measure(file) == self.marks

    def measure(self, file: IO[bytes]) -> tuple[bytes, bytes]:
        """The first and last bytes of what was read."""
        file.seek(0)
        first = file.read(min(MARK, self.end))
        file.seek(max(self.end - MARK, 0))
        return first, file.read(min(MARK, self.end))

    def restart(self) -> None:
        """Forget all lines read so far; those read next are another edition."""
        if self.spans or self.end:
            self.edition = next(EDITIONS)
        self.spans, self.end, self.marks = [], 0, (b"", b"")
        if self.unpacked is not None:
            self.unpacked.close()
            self.unpacked = None

    def scan(self, file: IO[bytes]) -> None:
        """Find the lines after `end`."""
        file.seek(self.end)
        place, pending = self.end, False  # pending: the line that began at `end` has something in it
        while block := file.read(_BLOCK):
            start = 0
            while (at := block.find(b"\n", start)) >= 0:
                if pending or block[start:at].strip():
                    self.spans.append((self.end, place + at + 1 - self.end))
                self.end, start, pending = place + at + 1, at + 1, False
            pending = pending or bool(block[start:].strip())
            place += len(block)
        if pending and is_object(rest := _cut(file, self.end, place - self.end)):  # whole, only its newline is missing
            self.spans.append((self.end, len(rest)))
            self.end = place

    def read(self, places: Iterable[int], most: int | None = None) -> list[bytes]:
        """These lines, or at most so many bytes of each; Changed where they are no longer there."""
        with self.lock:
            try:
                spans = [self.spans[place] for place in places]
            except IndexError:
                raise Changed(f"{self.path.name} changed while it was read: ask again") from None
            spans = [(offset, size if most is None else min(size, most)) for offset, size in spans]
            if not spans:
                return []
            if self.unpacked is not None:
                return [_cut(self.unpacked, *span) for span in spans]
            with open(self.fence(self.path), "rb") as file:
                return [_cut(file, *span) for span in spans]


def is_object(text: bytes) -> bool:
    """Whether this is a whole JSON object: none is the beginning of another."""
    return text.rstrip().endswith(b"}") and object_of(text) is not None


def _cut(file: IO[bytes], offset: int, size: int) -> bytes:
    """Some bytes of a file."""
    file.seek(offset)
    return file.read(size)


def unpack(raw: IO[bytes]) -> IO[bytes]:
    """What a gzip file holds, as far as it can be read, in a temporary file that nobody else sees."""
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with gzip.open(raw, "rb") as file:
            while block := file.read(_BLOCK):
                unpacked.write(block)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        pass  # a killed write: the whole lines before it are shown
    return unpacked


class Metrics:
    """The rows of a metrics.jsonl, read as it grows."""

    def __init__(self, path: Path, fence: Fence) -> None:
        self.lines = Lines(path, fence)
        self.rows: list[dict[str, Any]] = []
        self.taken = 0  # lines that were looked at
        self.newest: dict[str, Any] | None = None
        self.looked: tuple[int, int, int] | None = None  # inode, size, time of the file whose newest row that is
        self.edition = self.lines.edition

    def refresh(self) -> list[dict[str, Any]]:
        """All rows so far, as they were written; a line that is no JSON object with a step is left out."""
        with self.lines.lock:
            self.lines.refresh()
            if self.edition != self.lines.edition:
                self.rows, self.taken, self.edition = [], 0, self.lines.edition
            fresh = self.lines.read(range(self.taken, len(self.lines.spans)))
            self.taken += len(fresh)
            self.rows = self.rows + [row for line in fresh if (row := parse_row(line)) is not None]
            return self.rows

    def forget(self) -> None:
        """Let go of the rows; they are read again when they are asked for."""
        with self.lines.lock:
            self.rows, self.taken = [], 0
            self.lines.restart()
            self.lines.seen = None

    def last(self) -> tuple[dict[str, Any] | None, float]:
        """The last row, and when the file was written, seconds since the epoch (0 where there is none); the others are not kept for it."""
        try:
            real = self.lines.fence(self.lines.path)
            stat = real.stat()
            if self.looked != (now := (stat.st_ino, stat.st_size, stat.st_mtime_ns)):
                self.newest, self.looked = last_row(real), now
        except OSError:
            return None, 0.0
        return self.newest, stat.st_mtime


def parse_row(line: bytes) -> dict[str, Any] | None:
    """One row of metrics; None for a line that is none, or that is nested deeper than any row."""
    row = object_of(line)
    if row is None or not isinstance(row.get("step"), int | float) or not math.isfinite(row["step"]) or _deep(row, _DEEPEST):
        return None
    if "seconds" in row:  # they are added up
        seconds = row["seconds"] if isinstance(row["seconds"], dict) else {}
        row["seconds"] = {name: value for name, value in seconds.items() if isinstance(value, int | float) and math.isfinite(value)}
    return row


def _deep(value: Any, levels: int) -> bool:
    """Whether there are more levels of dicts and lists than so many."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _deep(item, levels - 1) for item in inside if isinstance(item, dict | list))


def last_row(path: Path) -> dict[str, Any] | None:
    """The last row of a metrics.jsonl; only the end of the file is read."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _BLOCK, 0))
        lines = file.read().split(b"\n")
    return next((row for line in reversed(lines[1 if size > _BLOCK else 0 :]) if (row := parse_row(line)) is not None), None)


def is_tree_file(path: Path) -> bool:
    """Whether a file is named and begins as a file of trees does."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")) or not path.is_file():
        return False
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(256).lstrip()
    except (OSError, EOFError, zlib.error):
        return False
    return head.startswith(b'{"format":')
