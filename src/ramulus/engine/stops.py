"""What an engine looks at in a request: whether it can be served at all; and stop strings and `until`, asked together."""

from __future__ import annotations

from collections.abc import Sequence

from ramulus.engine.engine import Decode, Request, Until

BYTES = 4  # most tokens that a character takes: one a byte
SLACK = 16  # tokens without text that may stand inside a stop string


def ends_in(strings: Sequence[str], tokens: list[int], decode: Decode, before: list[int] | None = None) -> bool:
    """Whether one of the strings ends in the text of the last tokens; it may begin among those `before`.

    Decodes no more than the longest string may take.
    """
    reach = BYTES * max(map(len, strings)) + SLACK
    shown = before[-(reach - len(tokens)) :] if before and len(tokens) < reach else []
    text = decode(shown + tokens[-reach:])
    old = agreeing(decode(shown), text) if shown and any(string in text for string in strings) else 0
    return any(string in text[max(old - len(string) + 1, 0) :] for string in strings)


def agreeing(one: str, other: str) -> int:
    """With how many characters both texts begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


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


def check_request(request: Request, limit: int, vocabulary: int) -> None:
    """Raise ValueError for a request that no engine of this limit and vocabulary could ever serve."""
    prefix, sampling = request.prefix, request.sampling
    if not prefix:
        raise ValueError("the prefix of a request is empty: a text begins with at least one token")
    if not 0 <= min(prefix) <= max(prefix) < vocabulary:
        wrong = next(token for token in prefix if not 0 <= token < vocabulary)
        raise ValueError(f"token {wrong} of the prefix is outside the vocabulary of {vocabulary}")
    if len(prefix) + sampling.max_tokens > limit:
        raise ValueError(f"a prefix of {len(prefix)} tokens and max_tokens={sampling.max_tokens} end beyond the model's {limit}: lower max_tokens")
