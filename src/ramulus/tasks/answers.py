r"""Where in a response the answer stands: the whole text, its last line, the last \boxed{...}, or between tags."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Extract = Callable[[str], str | None]
"""A frozen dataclass that finds the answer in a response; None where there is none."""

_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{|\\.|[{}]", re.DOTALL)


def last_box(text: str) -> str | None:
    r"""Content of the \boxed{...} (or \fbox{...}) that closes last; an unfinished one does not count. One pass, linear."""
    open_at: list[int] = []  # where the content of each open brace begins; -1 for a brace that is no box
    found: str | None = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = open_at.pop() if open_at else -1
            if start >= 0:
                found = text[start : match.start()]
        elif token == "{":
            open_at.append(-1)
        elif token.endswith("{") and len(token) > 2:  # a box; the escaped brace \{ has two characters
            open_at.append(match.end())
    return found


@dataclass(frozen=True)
class Whole:
    """The whole response, stripped."""

    def __call__(self, text: str) -> str | None:
        return text.strip() or None


@dataclass(frozen=True)
class LastLine:
    """The last line that is not blank; with a `prefix`, what follows it there, and nothing if the line does not begin with it."""

    prefix: str = ""

    def __call__(self, text: str) -> str | None:
        lines = text.rstrip().rsplit("\n", 1)
        line = lines[-1].strip()
        return line[len(self.prefix) :].strip() or None if line.startswith(self.prefix) else None


@dataclass(frozen=True)
class LastBox:
    r"""The content of the \boxed{...} that closes last, stripped."""

    def __call__(self, text: str) -> str | None:
        found = last_box(text)
        return found.strip() or None if found is not None else None


@dataclass(frozen=True)
class Tagged:
    """What stands between the last complete pair of <tag> and </tag>, stripped."""

    tag: str = "answer"

    def __call__(self, text: str) -> str | None:
        close = text.rfind(f"</{self.tag}>")
        start = text.rfind(f"<{self.tag}>", 0, max(close, 0))
        return text[start + len(self.tag) + 2 : close].strip() or None if close >= 0 and start >= 0 else None
