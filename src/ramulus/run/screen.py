"""A screen that nothing fails on: a closed terminal, a broken pipe or a full disk behind it costs a run its words and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

from rich.console import Console


class Screen:
    """A text stream whose writing never raises; what cannot be written is left out."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """The number of characters, written or not."""
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            with suppress(OSError, ValueError):
                self.stream.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):  # ValueError: it was closed
            pass
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write every line as `write` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream; one that is closed or broken is left as it is."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return bool(self.stream.isatty())
        except ValueError:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def unfailing(console: Console) -> Iterator[None]:
    """While entered, no word on the console or on this process's streams raises."""
    streams: Any = Screen(sys.stdout), Screen(sys.stderr)
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        file = console.file
        if not isinstance(file, Screen):
            console.file = Screen(file)  # type: ignore[assignment]
        try:
            yield
        finally:
            if not isinstance(file, Screen):
                console.file = file


def there_are_streams() -> None:
    """Give a process that was begun without standard streams ones that lead nowhere: else its own files would take their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def complain(text: str) -> None:
    """One sentence on standard error; it may quote a model, and nothing of that reaches the terminal unescaped."""
    plain = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))
    with suppress(OSError, ValueError):  # nobody may be there to read it
        sys.stderr.write(f"ramulus: {plain}\n")


def let_go() -> None:
    """Write out what the streams still hold, or forget it where that fails: at its end Python would report it as a failure of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
