r"""Braces and boxed answers in LaTeX text: what \{ escapes, what closes what, where a \boxed{...} is complete.

A box may be written with two backslashes, as text that went through JSON has it. One pass, linear, in all of this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

BOX = "\\boxed"
BOX_REACH = 16  # characters before its brace in which the command and some spaces fit

_MARKS = re.compile(r"(?:\\|(?<=\\))(boxed|fbox)\s{0,10}\{|\\.|[{}]", re.DOTALL)
_BARE = re.compile(
    r"\\boxed(?:\s{0,10}(\d(?:[\d.,/]*\d)?|[-+]?\\[dt]?frac\s?(?:\d\d|\{[^{}]{1,60}\}\{[^{}]{1,60}\})|\\text\w*\{[^{}]{1,60}\}|\\pi)"
    r"|\s{1,10}([-+]\d(?:[\d.,/]*\d)?|[A-Z]))(?![\w\\^{(+*/-])"
)  # \boxed 5: a number, a fraction, words in a font command or a capital letter by itself
_JOINT = re.compile(
    r"(?:\s|[,;&~$]|\band\b|\bor\b|\\(?:text|mbox|quad|qquad|[,;:!() ]|(?=boxed|fbox))|\{\s*(?:,\s*)?(?:and|or)\s*\}){0,40}"
)


class Closed(NamedTuple):
    """A closing brace and the brace that it closes."""

    start: int  # where the content begins; -1 where its opening brace is not in this text
    end: int  # the place of the closing brace
    command: str  # \boxed or \fbox, where one stands before the opening brace
    begin: int = -1  # where that command begins


def closed(text: str) -> Iterator[Closed]:
    r"""The closing braces of a text in order; \{ and \} are letters."""
    open_at: list[tuple[int, str, int]] = []
    for match in _MARKS.finditer(text):
        mark = match.group()
        if mark == "}":
            start, command, begin = open_at.pop() if open_at else (-1, "", -1)
            yield Closed(start, match.start(), command, begin)
        elif mark == "{" or match[1]:
            open_at.append((match.end(), f"\\{match[1]}" if match[1] else "", match.start()))


def last_box(text: str) -> str | None:
    r"""The answer of a response: content of the \boxed{...} (or \fbox{...}) that closes last; an unfinished one does not count.

    Boxes with nothing but `and`, `or`, commas and spaces between them are one answer, joined by commas: \boxed{1} and \boxed{2}.
    \boxed 5 without braces counts where it comes last.
    """
    run: list[Closed] = []
    for pair in closed(text):
        if pair.command:
            gap = text[run[-1].end + 1 : pair.begin] if run and 0 < pair.begin - run[-1].end <= 60 else "-"
            run = [*run, pair] if len(run) < 64 and joins(gap) else [pair]
    end = run[-1].end if run else 0
    for match in _BARE.finditer(text, end):
        return match[1] or match[2]
    boxes = list(
        dict.fromkeys(
            text[pair.start : pair.end].strip() if len(run) > 1 else text[pair.start : pair.end] for pair in run
        )
    )
    return ", ".join(boxes) if boxes else None


def joins(gap: str) -> bool:
    """Whether what stands between two boxes makes them parts of one answer: a conjunction or a comma, or nothing at all."""
    return (
        _JOINT.fullmatch(gap) is not None
        and (gap.strip(" ~$\\") == "" or re.search(r"[,;&]|and|or", gap) is not None)
        and "\n\n" not in gap
    )


def has_box(text: str) -> bool:
    r"""Whether there is a complete \boxed{...} anywhere in a text."""
    return any(pair.command == BOX for pair in closed(text))


def ends_in_box(text: str, closing: int) -> tuple[bool, bool]:
    r"""(whether one of the last `closing` braces completes a \boxed{...}, whether the text reaches back far enough to tell)."""
    last = list(closed(text))[-closing:] if closing else []
    if any(pair.command == BOX for pair in last):
        return True, True
    return False, all(pair.start > BOX_REACH for pair in last)
