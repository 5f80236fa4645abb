"""Stops for engines that look at every token: strings and `until` asked together."""

from __future__ import annotations

from collections.abc import Sequence

from ramulus.engine.engine import Decode, Request, Until

BYTES = 4  # most tokens that a character takes: one a byte
SLACK = 16  # tokens without text that may stand inside a stop string


def ends_in(strings: Sequence[str], tokens: list[int], decode: Decode, before: list[int] | None = None) -> bool:
    """Whether one of the strings is in the text of the last tokens, which may begin among those `before`.

    Decodes no more than the longest string may take.
    """
    reach = BYTES * max(map(len, strings)) + SLACK
    tail = tokens[-reach:] if len(tokens) >= reach or not before else before[-(reach - len(tokens)) :] + tokens
    text = decode(tail)
    return any(string in text for string in strings)


def watched(request: Request, decode: Decode | None) -> Until | None:
    """What to ask after every token of a request, or None; stop ids are not in it. ValueError for strings where no text can be read."""
    strings, until = request.stop.strings, request.until
    if not strings:
        return until
    if decode is None:
        raise ValueError(f"stop strings {strings!r} need text: give the engine decode=tokenizer.decode, or leave them out")

    def ask(tokens: list[int]) -> str | None:
        finish = until(tokens) if until is not None else None
        return finish or ("stop" if ends_in(strings, tokens, decode) else None)

    return ask
