r"""Braces and boxed answers in LaTeX text: what \{ escapes, what closes what, where a \boxed{...} is complete."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

BOX = "\\boxed"
BOX_REACH = 16  # characters before its brace in which the command and some spaces fit

_MARKS = re.compile(r"(\\boxed|\\fbox)\s{0,10}\{|\\.|[{}]", re.DOTALL)


class Closed(NamedTuple):
    """A closing brace and the brace that it closes."""

    start: int  # where the content begins; -1 where its opening brace is not in this text
    end: int  # the place of the closing brace
    command: str  # \boxed or \fbox, where one stands before the opening brace


def closed(text: str) -> Iterator[Closed]:
    r"""The closing braces of a text in order; \{ and \} are letters, and \\boxed is a line break and a word. One pass, linear."""
    open_at: list[tuple[int, str]] = []
    for match in _MARKS.finditer(text):
        mark = match.group()
        if mark == "}":
            start, command = open_at.pop() if open_at else (-1, "")
            yield Closed(start, match.start(), command)
        elif mark == "{" or match[1]:
            open_at.append((match.end(), match[1] or ""))


def last_box(text: str) -> str | None:
    r"""Content of the \boxed{...} (or \fbox{...}) that closes last; an unfinished one does not count."""
    found = None
    for pair in closed(text):
        if pair.command:
            found = pair
    return None if found is None else text[found.start : found.end]


def has_box(text: str) -> bool:
    r"""Whether there is a complete \boxed{...} anywhere in a text."""
    return any(pair.command == BOX for pair in closed(text))


def ends_in_box(text: str, closing: int) -> tuple[bool, bool]:
    r"""(whether one of the last `closing` braces completes a \boxed{...}, whether the text reaches back far enough to tell)."""
    last = list(closed(text))[-closing:] if closing else []
    if any(pair.command == BOX for pair in last):
        return True, True
    return False, all(pair.start > BOX_REACH for pair in last)
