"""Text that a model wrote, made harmless for a terminal."""

from __future__ import annotations

from rich.markup import escape


def safe(text: str, width: int | None = None) -> str:
    """One line without control characters or rich markup; the middle is left out beyond `width` characters."""
    plain = text.replace("\n", "⏎")
    plain = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in plain)
    if width is not None and len(plain) > width:
        plain = plain[: width * 2 // 3] + " … " + plain[len(plain) - width // 3 :]
    return escape(plain)
