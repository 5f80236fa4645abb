r"""Plain readings of a short LaTeX answer, tried before any algebra: the same string after tidying, or the same number."""

from __future__ import annotations

import re
from fractions import Fraction

from ramulus.core.text import last_box

_SPACING = re.compile(
    r"(\\\\)(?:\[[\d.]{1,5}[a-z]{2}\])?|\\[!,;: ()\[\]]|\\q?quad\b|~|\\left\b|\\right\b|\\displaystyle\b"
)  # group 1, a new row, stays
_WORDS = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname)\s?\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d})])\s*(?:\\(?:text|mathrm|mbox|operatorname)\s?\{[^{}]*\}(?:\^\{?-?\d\}?)?)+$")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_SCIENTIFIC = re.compile(rf"({_DECIMAL})(?:[eE]([-+]?\d{{1,3}})|(?:\\times|\\cdot|\*)10\^\{{?([-+]?\d{{1,3}})\}}?)?")
_POWER = re.compile(r"([-+]?)10\^(?:\{([-+]?\d{1,3})\}|(\d{1,3}))")
_FRACTION = re.compile(r"([-+]?)(?:\\frac\{(\d{1,40})\}\{(\d{1,40})\}|\\frac(\d)(\d)|(\d{1,40})/(\d{1,40}))")
_BASED = re.compile(r"(\w+)_\{?(\d+)\}?")


def unwrap(text: str) -> str:
    r"""The answer inside a \boxed{...}, however often it is boxed, or the text itself."""
    for _ in range(3):
        inner = last_box(text)
        if inner is None:
            break
        text = inner
    return text.strip()


def tidy(text: str) -> str:
    r"""The answer without boxes, dollars, spacing commands, \left and \right; \dfrac is \frac, 1{,}000 and 1\,000 are 1000."""
    text = unwrap(text).replace("\\$", "").replace("$", "").replace("\u2212", "-").replace("{,}", ",")
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", re.sub(r"(?<=\d)\\,(?=\d)", "", text))
    text = _SPACING.sub(lambda match: match[1] or " ", text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".").strip()
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def words(text: str) -> str:
    """A tidy answer without font commands and spaces; the case of words is ignored, that of single letters is not."""
    text = _WORDS.sub(r"\1", text)
    return re.sub(r"[A-Za-z]{2,}", lambda match: match.group().casefold(), text).replace(" ", "")


def number(text: str) -> Fraction | None:
    r"""The value of a tidy answer that is one number: 12, -0.5, 4.5e33, 4.5 \times 10^{33}, 10^{-3}, \frac{1}{2}, 1/2, with or without a unit."""
    text = _UNIT.sub("", text)
    text = (text.replace(",", "") if _THOUSANDS.fullmatch(text) else text).replace(" ", "")
    if len(text) > 400:
        return None
    if match := _SCIENTIFIC.fullmatch(text):
        exponent = int(match[2] or match[3] or 0)
        return Fraction(match[1].rstrip(".") if match[1][-1] == "." else match[1]) * Fraction(10) ** exponent
    if match := _POWER.fullmatch(text):
        return (-1 if match[1] == "-" else 1) * Fraction(10) ** int(match[2] or match[3])
    if match := _FRACTION.fullmatch(text):
        top, bottom = next((match[i], match[i + 1]) for i in (2, 4, 6) if match[i] is not None)
        return (-1 if match[1] == "-" else 1) * Fraction(int(top), int(bottom)) if int(bottom) else None
    return None


def compare_answers(reference: str, answer: str) -> bool | None:
    """Whether two answers are plainly the same (True) or plainly different numbers (False); None if it takes algebra to say."""
    one, other = tidy(reference), tidy(answer)
    if words(one) == words(other) != "":
        return True
    a, b = number(one), number(other)
    if a is not None and b is not None:
        # six decimals, or six digits of a small number: 0.333333 is 1/3, but 1.6e-19 is not 2.6e-19
        return a == b or (
            (a.denominator > 1 or b.denominator > 1) and abs(a - b) <= min(Fraction(1), max(abs(a), abs(b))) / 10**6
        )
    based, also = _BASED.fullmatch(one.replace(" ", "")), _BASED.fullmatch(other.replace(" ", ""))
    if based and also:  # 2220_5: numerals in another base
        return based.groups() == also.groups()
    return None
