"""When a text ends: EOS, a complete boxed answer, the length limit, repetition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from ramulus.core.text import ends_in_box, has_box
from ramulus.engine.engine import Decode, StopRule, Until
from ramulus.engine.stops import agreeing, ends_in

Answer = Callable[[list[int], list[int], Decode, bool], bool]
"""(response before this segment, its tokens so far, decode, whether EOS just came) -> whether the answer is complete."""


@dataclass(frozen=True)
class BoxedAnswer:
    r"""A complete `\boxed{...}`, with any nesting of braces; escaped braces do not count.

    Seen at the token that closes it, also where it began in an earlier segment; a box of more than `window` tokens is not.
    With `and_eos` the text goes on to EOS, and ends as an answer where there is a box anywhere in it.

    Example:
        >>> from ramulus import BoxedAnswer
        >>> def decode(tokens):
        ...     return "".join(map(chr, tokens))
        >>> [BoxedAnswer()([], [*map(ord, text)], decode, False) for text in (r"\boxed{x^{2}", r"\boxed{x^{2}}")]
        [False, True]
    """

    and_eos: bool = False
    window: int = 1024

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"BoxedAnswer's window must be at least 1 token, got {self.window}")

    def __call__(self, response: list[int], new: list[int], decode: Decode, ended: bool) -> bool:
        if self.and_eos:
            return ended and has_box(decode(response + new))
        return has_brace(decode, new[-1]) and self.closes(response, new, decode)

    def closes(self, response: list[int], new: list[int], decode: Decode) -> bool:
        """Whether a brace in the text of the last token completes a box; decodes no further back than it must."""
        size = 32
        while True:
            take = min(size, self.window)
            tail = new[-take:] if len(new) >= take else response[max(len(response) - take + len(new), 0) :] + new
            text = decode(tail)
            boxed, whole = ends_in_box(text, agreeing(decode(tail[:-1]), text) if len(tail) > 1 else 0)
            if boxed or whole or take == self.window or len(tail) == len(response) + len(new):
                return boxed
            size *= 2


@dataclass(frozen=True)
class Repeats:
    """Some substring of `width` characters occurs at least `times` times in a segment's text, overlaps counted.

    Tested at the end of a segment, as TreePO does, and with `every` > 0 each `every` tokens, on the segment's last `window`
    tokens. `first`: it goes before an answer, EOS or length that comes at the same token.

    Example:
        >>> from ramulus import Repeats
        >>> def decode(tokens):
        ...     return "".join(map(chr, tokens))
        >>> [Repeats(width=4, times=3)(list(map(ord, text)), decode) for text in ("ab ab ab ab ab ab ", "once upon a time")]
        [True, False]
    """

    width: int = 32
    times: int = 8
    every: int = 0
    window: int = 512
    first: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or self.times < 2 or self.every < 0 or self.window < 1:
            raise ValueError(f"{self}: width and window must be at least 1, times at least 2, every at least 0")

    def __call__(self, new: list[int], decode: Decode) -> bool:
        return repeats(decode(new[-self.window :]), self.width, self.times)


@dataclass(frozen=True)
class Stop:
    """Says after every token why the text ends there, or None: an answer, EOS, a stop string, the length, repetition, in this order.

    `max_tokens` is the longest response over all its segments; an empty `eos` never ends a text. `strings`: the text ends, as "stop", at the token
    that completes one of them. `decode` is wanted by `strings`, `answer` and `repetition` alone.

    Example:
        >>> Stop(eos=(0,), max_tokens=64).rule.ids
        frozenset({0})
    """

    eos: tuple[int, ...]
    max_tokens: int
    decode: Decode | None = None
    answer: Answer | None = None
    repetition: Repeats | None = None
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"a response has at least 1 token, got max_tokens={self.max_tokens}")
        if any(not isinstance(token, int) for token in self.eos):
            raise ValueError(f"eos is a tuple of token ids, got {self.eos!r}")
        if self.decode is None and self.reads:
            raise ValueError("stopping at strings, answers or repetition reads text: pass decode=tokenizer.decode to Stop")

    @property
    def reads(self) -> bool:
        """Whether it takes a look at the text to tell; else token ids and the length say all."""
        return self.answer is not None or self.repetition is not None or bool(self.strings)

    @property
    def rule(self) -> StopRule:
        """What of it is data: any engine ends a segment there, if nothing else ended it before."""
        return StopRule(frozenset(self.eos), self.strings)

    def until(self, response: list[int], most: int) -> Until | None:
        """What to ask after every token of a segment of at most `most` tokens behind `response`; None where the rule says all."""
        return partial(self, response, most=most) if self.reads else None

    def __call__(self, response: list[int], new: list[int], most: int | None = None) -> str | None:
        """Why the text ends after `new`, or None; `response` came before this segment, which may have `most` tokens."""
        rule, why = self.repetition, self.plain(response, new)
        if rule is None or self.decode is None or (why is not None and not rule.first):
            return why
        due = why is not None or len(new) == most or (rule.every > 0 and len(new) % rule.every == 0)
        return "repetition" if due and rule(new, self.decode) else why

    def plain(self, response: list[int], new: list[int]) -> str | None:
        """Answer, EOS, a string or length."""
        ended, decode = new[-1] in self.eos, self.decode
        if self.answer is not None and decode is not None and self.answer(response, new, decode, ended):
            return "answer"
        if ended:
            return "eos"
        if self.strings and decode is not None and ends_in(self.strings, new, decode, response):
            return "stop"
        return "length" if len(response) + len(new) >= self.max_tokens else None


@lru_cache(maxsize=1 << 18)
def has_brace(decode: Decode, token: int) -> bool:
    """Whether there is a closing brace in the text of one token; remembered, since it is asked at every token."""
    return "}" in decode([token])


def repeats(items: str | tuple[int, ...], width: int, times: int) -> bool:
    """Whether some run of `width` items (characters, tokens) occurs at least `times` times, overlaps counted."""
    if len(items) < width + times - 1:
        return False
    return max(Counter(items[i : i + width] for i in range(len(items) - width + 1)).values()) >= times
