"""Text of tokens, each character shown at the token that completes it; ⟨id⟩ where there is no tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

BEFORE = 8  # tokens of the text above that a tokenizer's decoder may need: a character has at most 4 bytes
TORN = "\ufffd"  # what the bytes of a cut character decode to


class Text:
    """Tokens to text; `path` is a tokenizer.json."""

    def __init__(self, path: Path | None) -> None:
        self.inner: Any = _load(str(path), path.stat().st_mtime_ns) if path is not None else None

    def whole(self, tokens: Sequence[int], special: bool = True) -> str:
        """All tokens as one text, special tokens included or left out."""
        if self.inner is None:
            return "".join(f"⟨{token}⟩" for token in tokens)
        return self.inner.decode(list(tokens), skip_special_tokens=not special)

    def many(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """`whole` of many rows in one call."""
        if self.inner is None:
            return [self.whole(row) for row in rows]
        return self.inner.decode_batch([list(row) for row in rows], skip_special_tokens=False)

    def context(self, above: Callable[[int], Sequence[int]]) -> Sequence[int]:
        """The last tokens above that the text of the next ones depends on; `above` gives the last n. They do not begin inside a character."""
        size = BEFORE
        while len(last := above(size)) == size and self.inner is not None and self.whole(last).startswith(TORN):
            size *= 4
        return last

    def after(self, rows: Sequence[tuple[Sequence[int], Sequence[int], bool]]) -> list[str]:
        """What tokens add to the text above them, for rows of (`context`, tokens, whether the text ends here).

        A character whose bytes are split belongs to what completes it, so that the parts of a path joined are its text.
        """
        wholes = self.many([[*above, *tokens] for above, tokens, _ in rows])
        starts = self.many([above for above, _, _ in rows])
        texts = []
        for whole, start, (_, tokens, last) in zip(wholes, starts, rows, strict=True):
            known, end = start.rstrip(TORN), whole if last else whole.rstrip(TORN)
            texts.append(end[len(known) :] if tokens and whole.startswith(known) else self.whole(tokens))
        return texts

    def pieces(self, before: Sequence[int], tokens: Sequence[int], last: bool = True) -> list[str]:
        """The text of each token after those before; joined they are what `after` says."""
        if self.inner is None:
            return [self.whole([token]) for token in tokens]
        above = self.context(lambda size: before[-size:])
        row = [*above, *tokens]
        skip = len(row) - len(tokens)
        [goal] = self.after([(above, tokens, last)])
        start, pieces = 0, []
        prior = self.whole(row[:skip]).rstrip(TORN)  # what the tokens from `start` on have said already
        for i in range(skip, len(row)):
            read = self.whole(row[start : i + 1])
            text = read.rstrip(TORN)
            pieces.append(text[len(prior) :] if text.startswith(prior) else "")
            prior = text
            if len(read) == len(text) and i + 1 - start > 2 * BEFORE:  # a shorter window: decoding stays linear
                start = i + 1 - BEFORE
                prior = self.whole(row[start : i + 1]).rstrip(TORN)
        rest = goal[len("".join(pieces)) :] if goal.startswith("".join(pieces)) else None
        if rest is None:  # a decoder that looks further than the window
            return [self.whole([token]) for token in tokens]
        return [*pieces[:-1], pieces[-1] + rest] if pieces else []


@lru_cache(maxsize=8)
def _load(path: str, changed: int) -> Any:
    """The tokenizer of a tokenizer.json, kept until the file changes."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)
