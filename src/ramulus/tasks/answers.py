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
    r"""The number that stands last, without what stands between its thousands, a currency or a percent sign.

    `-3`, `.5`, `1,234.5`, `2/3`, `1e5`, `40%` as `40`, `-$5` as `-5`, `\frac{1}{2}` as `1/2`; a minus sign of typographers is a minus sign.

    Example:
        >>> from ramulus.tasks.answers import LastNumber
        >>> LastNumber()("4 apples and 1,000 pears are 1,004 pieces.")
        '1004'
    """

    def __call__(self, text: str) -> str | None:
        end, span = len(text), _SPAN  # of a long text only the end is read
        while end > 0:
            start = max(0, end - span)
            numbers = list(_NUMBER.finditer(text, start, end))
            if numbers and (start == 0 or numbers[-1].start() > start):
                return _written(numbers[-1])
            end, span = (end, 2 * span) if numbers else (start, _SPAN)  # one that begins where the reading did may be part of a longer one
        return None


def extraction(text: str) -> Extract:
    """The rule that a word stands for: box, number, line, whole, tag, or tag:NAME. Raises ValueError for another."""
    word, _, tag = text.partition(":")
    if word == "tag":
        return Tagged(tag) if tag else Tagged()
    if text not in _WORDS:
        raise ValueError(f"an answer is looked for in {', '.join(_WORDS)}, tag or tag:NAME, or by a rule in the recipe file")
    return _WORDS[text]()


def _written(number: re.Match[str]) -> str:
    """A number that was met, as one writes it to a computer."""
    sign, over, under, number_itself = number.group("sign", "over", "under", "number")
    plain = _BETWEEN.sub("", number_itself).replace("\u2212", "-") if over is None else f"{over}/{under}"
    return f"-{plain}" if sign else plain


_SPAN = 1000  # characters
_BETWEEN = re.compile(r",|\{,\}|\\,|[\u00a0\u2009\u202f]")  # thousands
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w.)\]])[-\u2212](?=\\?[$€£]?[.\d]|\\[dt]?frac))? (?:\\?[$€£])?
    (?: \\[dt]?frac\{{(?P<over>\d+)\}}\{{(?P<under>\d+)\}}
    | (?P<number> (?: \d{{1,3}}(?:(?:{_BETWEEN.pattern})\d{{3}})+(?!(?:{_BETWEEN.pattern})?\d) | \d+ | (?<![\w.])(?=\.\d) )
      (?:\.\d+)? (?:[eE][-+\u2212]?\d+(?!\w))? (?:/\d+(?:\.\d+)?)? ) )""",
    re.VERBOSE,
)
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
    return answer if isinstance(extract, Whole | LastNumber) else None
