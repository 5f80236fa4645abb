"""Text that a model wrote, made harmless for terminals, pictures, figures and LaTeX, and otherwise left as it is."""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.console import Console
from rich.markup import escape

DIRECTIONS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u200e", "\u200f", "\u061c"}  # they reorder what stands around
SHOWN_AS_IS = ("Zs", "Cf")  # categories that Python calls unprintable, of blanks of all widths, and of joiners inside letters and signs


def new_console(**options: Any) -> Console:
    """A console that shows text as it is: rich's own would make signs of words between colons."""
    return Console(emoji=False, **options)


def safe(text: str, width: int | None = None) -> str:
    """One line without control characters or rich markup; the middle is left out beyond `width` characters. `styled` puts a tag of rich around it."""
    return "".join(_escaped(text, width))


def styled(style: str, text: str) -> str:
    """The same between tags of rich."""
    line, end = _escaped(text)
    return f"[{style}]{line}{2 * end}[/{style}]"  # before a tag two backslashes stand for one


def _escaped(text: str, width: int | None = None) -> tuple[str, str]:
    """One line without control characters or rich markup, and the backslashes at its end, which mean something only before a tag."""
    line = printable(text.replace("\n", "⏎").replace("\t", "⇥"), width)
    body = line.rstrip("\\")
    return escape(body), line[len(body) :]


def printable(text: str, most: int | None = None) -> str:
    """Text whose control characters, but for line breaks, stand as \\x1b; the middle is left out beyond `most` characters."""
    plain = "".join(c if harmless(c) or c == "\n" else f"\\x{ord(c):02x}" for c in text)
    return plain if most is None or len(plain) <= most else f"{plain[: most * 2 // 3]} … {plain[len(plain) - most // 3 :]}"


def harmless(sign: str) -> bool:
    """Whether a character only shows itself: no control character, half of one, line break or change of direction."""
    return sign.isprintable() or (sign not in DIRECTIONS and unicodedata.category(sign) in SHOWN_AS_IS)


def unbroken(text: str) -> str:
    """Text with a space for every control character and line break."""
    return "".join(c if c.isprintable() else " " for c in text)
