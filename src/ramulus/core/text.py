r"""Braces and boxed answers in LaTeX text: what \{ escapes, what closes what, where a \boxed{...} is complete.

A box may be written with two backslashes, as text that went through JSON has it. One pass, linear, in all of this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
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
_PART = (
    r"(?:\bfor\b|\bin\b|\s|\\text\s?\{|\}|\b(?:the )?(?:part|case|question)\b|\(\s?(?:[a-z]|[ivx]{1,4}|\d)\s?\)|\\quad){2,20}"
)  # \text{ for part (a) and }: what part of the task a box answers
_PARTS = re.compile(rf"[\s$]*{_PART}(?:and\b|[,;]\s?(?:and\b)?)[\s}}$]*(?:\\text\s?\{{|\$|\s)*", re.ASCII)
_NUMBERED = re.compile(r"([a-zA-Z])\s?_\s?\{?\s?(\d)\s?\}?\s?=[\s$]*$")
_NO_LIST = r"(?!.*\b(?:not?|so|then|but|wrong|thus|hence|gives?|therefore|is)\b)"
_WORDS_ONLY = re.compile(_NO_LIST + r"(?:[^\\=.?!:{}\n]|\\(?:text|mbox)\s?\{|\}|\\q?quad|\\[,;: ])*\\{0,2}")
_UNFINISHED = re.compile(r"\$*\\{1,2}boxed\s?\{")


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
            before = text[max(run[-1].begin - 20, 0) : run[-1].begin] if run else ""
            run = [*run, pair] if len(run) < 64 and joins(unnumbered(gap, before)) else [pair]
    end = run[-1].end if run else 0
    for match in _BARE.finditer(text, end):
        return match[1] or match[2]
    boxes = list(
        dict.fromkeys(
            text[pair.start : pair.end].strip() if len(run) > 1 else text[pair.start : pair.end] for pair in run
        )
    )
    return ", ".join(boxes) if boxes else None


def unnumbered(gap: str, before: str) -> str:
    """What stands between two boxes without a name there, y_2 =, that goes on from a name before the first of them, y_1 =."""
    one, other = _NUMBERED.search(before), _NUMBERED.search(gap)
    goes_on = one and other and one[1] == other[1] and int(other[2]) == int(one[2]) + 1
    return gap[: other.start()] if other and goes_on else gap


def joins(gap: str) -> bool:
    """Whether what stands between two boxes makes them parts of one answer: a conjunction or a comma, or nothing at all."""
    if "\n\n" in gap:
        return False
    plain = _JOINT.fullmatch(gap) is not None and (
        gap.strip(" ~$\\") == "" or re.search(r"[,;&]|and|or", gap) is not None
    )
    return plain or _PARTS.fullmatch(gap) is not None


def reference_said(text: str) -> str:
    r"""What a reference says: its boxes with words between or after them, joined by commas; what follows a \boxed{ that nothing closes; or itself.

    One that argues, with equations or sentences between the boxes, is left as it is: its last box is the answer, as a response's is.
    """
    boxes = [pair for pair in closed(text) if pair.command]
    if not boxes and (start := _UNFINISHED.match(text)):
        return text[start.end() :]
    pairs = list(pairwise(boxes))
    gaps = [text[one.end + 1 : other.begin] for one, other in pairs if one.end < other.begin]
    if not gaps or len(gaps) < len(pairs) or not all(len(gap) <= 60 and _WORDS_ONLY.fullmatch(gap) for gap in gaps):
        return text
    return ", ".join(dict.fromkeys(text[pair.start : pair.end].strip() for pair in boxes))


def has_box(text: str) -> bool:
    r"""Whether there is a complete \boxed{...} anywhere in a text."""
    return any(pair.command == BOX for pair in closed(text))


def ends_in_box(text: str, begin: int) -> tuple[bool, bool]:
    r"""(whether a brace at `begin` or behind it completes a \boxed{...}, whether the text reaches back far enough to tell)."""
    last = [pair for pair in closed(text) if pair.end >= begin]
    if any(pair.command == BOX for pair in last):
        return True, True
    return False, all(pair.start > BOX_REACH for pair in last)
