r"""Where in a response the answer stands: the whole text, its last line, the last \boxed{...}, or between tags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ramulus.core.text import last_box

Extract = Callable[[str], str | None]
"""A frozen dataclass that finds the answer in a response; None where there is none."""


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


def response_with(extract: Extract, answer: str) -> str | None:
    r"""A response from which a shipped rule should take this answer; None for a rule of somebody else's."""
    if isinstance(extract, LastBox):
        return rf"\boxed{{{answer}}}"
    if isinstance(extract, Tagged):
        return f"<{extract.tag}>{answer}</{extract.tag}>"
    if isinstance(extract, LastLine):
        return f"{extract.prefix}{answer}"
    return answer if isinstance(extract, Whole) else None
