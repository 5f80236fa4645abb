"""Whether an answer is the reference: by what both say, form by form, and never by what is left after something was dropped.

`same` answers True, False, or None where a form is not understood and nobody has said the same words. It is cheap and bounded.
"""

from __future__ import annotations

import re
from functools import lru_cache

from ramulus.tasks.compare import equal
from ramulus.tasks.forms import Wording, forms, gist
from ramulus.tasks.formula import Unreadable
from ramulus.tasks.latex import one_spelling

_LABEL = re.compile(
    r"(?:(?:the )?(?:correct |final |best )?(?:answer|option|choice)(?: is)?\s?:?\s?)?"
    r"(?:\(\s?([A-Ja-j])\s?\)|\[([A-J])\]|([A-Ja-j])\s?[).:](?!\d)|([A-J])(?=$))(.*)",
    re.DOTALL,
)
_COMMA = re.compile(r"[-+]?\d+,\d+")


@lru_cache(maxsize=1 << 13)
def same(reference: str, answer: str) -> bool | None:
    """Whether two answers are the same; None where neither words nor forms can tell."""
    one, other = wording(reference), wording(answer)
    if not one or not other:
        return False
    if one == other or without_base(one) == other:
        return True
    labels = choice(reference, answer)
    if labels is not None:
        return labels
    if comma(reference, answer):
        return True
    unread = False
    for form in forms(reference):
        for reading in forms(answer):
            try:
                if equal(form, reading):
                    return True
            except (Unreadable, RecursionError, OverflowError, ArithmeticError):
                unread = True
            unread = unread or any(isinstance(some, Wording) and "\\" in some.text for some in (form, reading))
    return None if unread else False


def without_base(text: str) -> str:
    """A numeral of another base without the base, as an answer may give it; any other text as it is."""
    match = re.fullmatch(r"([-+]?([^\W_]+)(?:\.([^\W_]+))?)_(?:(\d+)|\{(\d+)\})", text)
    base = int(match[4] or match[5]) if match is not None else 0
    if match is None or not 2 <= base <= 36 or not re.search(r"\d", match[1]):
        return text
    try:
        int(match[2] + (match[3] or ""), base)
    except ValueError:
        return text
    return match[1]


def wording(text: str) -> str:
    """The words of an answer; "" for one that is empty, too long or too deep."""
    try:
        return gist(one_spelling(text))
    except ValueError:
        return ""


def choice(reference: str, answer: str) -> bool | None:
    """Whether both name the same choice; None where the reference is none, or the answer names none and may be its value."""
    ours, value = label(reference)
    if not ours:
        return None
    theirs, _ = label(answer)
    if theirs:
        return ours == theirs
    return None if not value else same(value, answer)


def label(text: str) -> tuple[str, str]:
    """(the letter of a multiple-choice answer, what stands after it); "" where the text is no such answer."""
    try:
        words = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", one_spelling(text)).strip(" .{}")
    except ValueError:
        return "", ""
    match = _LABEL.fullmatch(" ".join(words.split()), 0) or _LABEL.fullmatch(
        " ".join(words.split()).casefold().replace("option", "option"), 0
    )
    if not match:
        match = re.fullmatch(
            r"(?i:(?:the )?(?:answer|option|choice)(?: is)?):? ?\(?([A-J])\)?()()()(.*)", " ".join(words.split())
        )
    if not match:
        return "", ""
    rest = match[5].strip()
    if re.search(r"\([A-Ja-j]\)|\bor\b|\b[A-J]\)", rest) or (
        match[4] is None and match[1] and re.search(r"^[\^_!+*/=<>-]|^\s?\\cdot", rest)
    ):
        return "", ""
    return (match[1] or match[2] or match[3] or match[4]).upper(), rest


def comma(reference: str, answer: str) -> bool:
    """Whether one writes a comma where the other has the decimal point: 2,74 for 2.74; a reference such as 1,5 is a list."""
    one, other = reference.strip(" $"), answer.strip(" $")
    if any(re.fullmatch(r"[-+]?[1-9]\d{0,2},\d{3}", text) for text in (one, other)):
        return False  # thousands
    if _COMMA.fullmatch(other) and re.fullmatch(r"[-+]?\d+\.\d+", one):
        return other.replace(",", ".") == one
    return bool(re.fullmatch(r"[-+]?\d+,\d{2,}", one)) and one.replace(",", ".") == other
