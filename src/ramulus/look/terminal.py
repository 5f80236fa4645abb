"""Text that a model wrote, made harmless for terminals, pictures, figures and LaTeX."""

from __future__ import annotations

from rich.markup import escape


def safe(text: str, width: int | None = None) -> str:
    """One line without control characters or rich markup; the middle is left out beyond `width` characters."""
    return escape(printable(text.replace("\n", "⏎"), width))


def printable(text: str, most: int | None = None) -> str:
    """Text whose control characters, but for line breaks, stand as \\x1b; the middle is left out beyond `most` characters."""
    plain = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
    return plain if most is None or len(plain) <= most else f"{plain[: most * 2 // 3]} … {plain[len(plain) - most // 3 :]}"


def unbroken(text: str) -> str:
    """Text with a space for every control character and line break."""
    return "".join(c if c.isprintable() else " " for c in text)
