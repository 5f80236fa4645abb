r"""Where in a response the answer stands: the whole text, its last line, the last \boxed{...}, the last number, or between tags."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ramulus.core.text import last_box

Extract = Callable[[str], str | None]
"""A frozen dataclass that finds the answer in a response; None where there is none."""


@dataclass(frozen=True)
class Whole:
    """Takes the whole response, stripped, for the answer."""

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
        box = last_box(text)
        return box.strip() or None if box is not None else None


@dataclass(frozen=True)
class Tagged:
    """What stands between the last complete pair of <tag> and </tag>, stripped."""

    tag: str = "answer"

    def __call__(self, text: str) -> str | None:
        close = text.rfind(f"</{self.tag}>")
        start = text.rfind(f"<{self.tag}>", 0, max(close, 0))
        return text[start + len(self.tag) + 2 : close].strip() or None if close >= 0 and start >= 0 else None


@dataclass(frozen=True)
class LastNumber:
    """The number that stands last, without commas between its thousands: `-3`, `1,234.5`, `2/3`, `40%` as `40`.

    Example:
        >>> from ramulus.tasks.answers import LastNumber
        >>> LastNumber()("4 apples and 1,000 pears are 1,004 pieces.")
        '1004'
    """

    def __call__(self, text: str) -> str | None:
        numbers = _NUMBER.findall(text)
        return numbers[-1].replace(",", "") if numbers else None


def extraction(text: str) -> Extract:
    """The rule that a word stands for: box, number, line, whole, tag, or tag:NAME. Raises ValueError for another."""
    word, _, tag = text.partition(":")
    if word == "tag":
        return Tagged(tag) if tag else Tagged()
    if text not in _WORDS:
        raise ValueError(f"an answer is looked for in {', '.join(_WORDS)}, tag or tag:NAME, or by a rule in the recipe file")
    return _WORDS[text]()


_NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)(?:\.\d+)?(?:/\d+(?:\.\d+)?)?")
_WORDS: dict[str, Callable[[], Extract]] = {"box": LastBox, "number": LastNumber, "line": LastLine, "whole": Whole}
READ = {"read": extraction}
"""The metadata of a field that is written so on the command line."""


def response_with(extract: Extract, answer: str) -> str | None:
    r"""A response from which a shipped rule should take this answer; None for a rule of somebody else's."""
    if isinstance(extract, LastBox):
        return rf"\boxed{{{answer}}}"
    if isinstance(extract, Tagged):
        return f"<{extract.tag}>{answer}</{extract.tag}>"
    if isinstance(extract, LastLine):
        return f"{extract.prefix}{answer}"
    return answer if isinstance(extract, Whole | LastNumber) and extract(answer) == answer.strip() else None
