r"""What an answer says: one number or formula, a quantity with a unit, a list, a tuple or interval, a relation, a matrix, or words.

`forms(text)` gives every reading that the text admits, the plainest first: `5 m` is a quantity, and the product of 5 and m.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from ramulus.tasks.formula import MINUS, Formula, Unreadable, formula_of, letters, negative
from ramulus.tasks.latex import one_spelling, split_outside
from ramulus.tasks.units import Unit, unit_of

RELATIONS = frozenset({"=", "<", ">", "\\le", "\\ge", "\\ne", "\\approx"})
_LISTED = frozenset({",", ";", "\\text{and}", "\\text{or}", "\\text{And}", "\\text{OR}"})
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)(?:\\overline\s?\{\s?(\d+)\s?\}|\\overline\s?(\d)|\\bar\s?\{\s?(\d+)\s?\}|\\bar\s?(\d)|\\dot\s?\{?(\d)\}?(?:\\dot\s?\{?(\d)\}?)?|\((\d{1,20})\))"
)
_ENDLESS = re.compile(r"([-+]?)\s?(\d*)\.(\d{2,})\s?(?:\\ldots|\.{2,3})")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,3})(?![\w.])")
_TIMES_TEN = re.compile(r"(?<=\d)\s?[xX]\s?(?=10\s?\^)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_BASED = re.compile(r"\(?([0-9A-F]*\d[0-9A-F]*)\)?\s?_\s?(?:\{\s?(?:\\text\{)?(\w+)\}?\s?\}|(\d+))")
_BASES = {
    name: str(n)
    for n, name in enumerate(
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], 2
    )
}
_UNITS = re.compile(
    r"\s*(\\text\{|\\frac\s?\{\s?(?:\\text\{[^{}]*\}|[a-zA-Z])\s?\}\{\s?(?:\\text\{[^{}]*\}|[a-zA-Z])\s?\})"
)
_LETTER_UNIT = re.compile(
    r"([-+]?(?:\d[\d.]*|\\frac\s?(?:\{\d+\}\{\d+\}|\d\d)))(?:(\s?)([msgLlhNJWVAK])((?:\s?\^\s?\{?[23]\}?)?(?:\s?/\s?(?:[shm]|\\text\{\w+\})(?:\^\s?\{?\d\}?)?)?)|\s\\frac\{\s?([msg])\s?\}\{\s?([shm])(?:\^\{?(\d)\}?)?\s?\})"
)
_FRENCH = re.compile(
    r"(\])([^\[\](),;]{1,60}[,;][^\[\](),;]{1,60})([\[\]])|(\[)([^\[\](),;]{1,60}[,;][^\[\](),;]{1,60})(\[)"
)
_SAYING = re.compile(
    r"\\text\{(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct |right )?(?:answer|result|value|solution)s?(?: is| are)?\s?:?\}\s?:?",
    re.IGNORECASE,
)
_HALF_LINE = re.compile(r"\\mathbb\s?\{?\s?R\s?\}?\s?(?:\^\s?\{?\s?([+-])\s?\}?|_\s?\{?\s?(>|\\ge|<)\s?0\s?\}?)")
_EMPTY = frozenset(
    {
        "nosolution",
        "nosolutions",
        "norealsolution",
        "norealsolutions",
        "emptyset",
        "theemptyset",
        "nosuchvalues",
        "nosuchnumbers",
    }
)
_ALL = frozenset({"allrealnumbers", "allreals", "reals", "thereals", "therealnumbers", "realnumbers", "allrealx"})


@dataclass(frozen=True)
class Value:
    """A formula; `percent` and `degrees` where such a sign stands after it."""

    formula: Formula
    percent: bool = False
    degrees: bool = False


@dataclass(frozen=True)
class Quantity:
    """A number and its unit."""

    value: Value
    unit: Unit


@dataclass(frozen=True)
class Many:
    """Several things: kind `,` for a list, `{` a set, two brackets a tuple or interval, `:` a ratio, `U` a union, `-` a difference."""

    kind: str
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Relation:
    """Sides with relations between them. A side is any form."""

    sides: tuple[Any, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """The rows of a matrix, whose cells are forms."""

    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Wording:
    """Text that is none of these, without gaps, fonts and the case of words."""

    text: str


Form = Value | Quantity | Many | Relation | Matrix | Wording
REALS, EMPTY = Wording("reals"), Many("{", ())


@lru_cache(maxsize=1 << 12)
def forms(text: str) -> tuple[Form, ...]:
    """Every reading of an answer, the plainest first; none for one that is empty, too long or too deep."""
    try:
        cleaned = unbraced(one_spelling(text))
    except ValueError:
        return ()
    return tuple(readings(cleaned)) if cleaned else ()


def unbraced(text: str) -> str:
    """The text without braces around all of it, the words that announce an answer, and the stop of a sentence."""
    text = _SAYING.sub("", text, count=1).strip() if text.startswith("\\text{") else text
    while text.startswith("{") and text.endswith("}") and not split_outside(text[1:-1], {"}"})[1]:
        text = text[1:-1].strip()
    if text.endswith((".", ",", ";", ":")) and not text.endswith(("..", "\\.")):
        text = text[:-1].strip()
    return text.lstrip(":").strip()


def readings(text: str) -> list[Form]:
    """A list, or the readings of one thing."""
    text = _FRENCH.sub(_turned, text)
    merged = (
        _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
        if not re.search(r"[(\[]\s?\d|\\\{", text)
        else text
    )
    parts = [part for part in split_outside(merged, _LISTED)[0] if part]
    if len(parts) > 1:
        items = list_items(parts)
        return [Many(",", tuple(items))] if len(items) > 1 else items
    spaced = re.fullmatch(r"-?\d+(?: -?\d+)+", merged)
    if spaced:
        return [Many(",", tuple(Value(formula_of(part)) for part in merged.split())), Wording(gist(merged))]
    if not parts:
        return [Wording(gist(text))]
    signed = signs(parts[0])
    return [Many(",", tuple(one(part) for part in signed))] if len(signed) > 1 else every(parts[0])


def _turned(match: re.Match[str]) -> str:
    """An interval with brackets turned outwards, ]1,2[, as (1,2)."""
    opening, inside, closing = match.groups()[:3] if match[1] else match.groups()[3:]
    return f"{'[' if opening == '[' else '('}{inside}{']' if closing == ']' else ')'}"


def list_items(parts: list[str]) -> list[Form]:
    """The forms of a list's parts; x=1,2 says that x is both."""
    items: list[Form] = []
    for part in parts:
        items += [one(item) for item in signs(part)]
    first = items[0]
    if (
        isinstance(first, Relation)
        and first.signs == ("=",)
        and not any(isinstance(form, Relation) for form in items[1:])
    ):
        items[0] = first.sides[1]
    return items


def signs(text: str) -> list[str]:
    r"""Both readings of one \pm, with \mp as its opposite; the text itself where there is none."""
    if "\\pm" not in text:
        text = text.replace("\\mp", "\\pm")
    if len(re.findall(r"\\pm(?![a-zA-Z])", text)) != 1 or re.search(r"[,;]", text):
        return [text]
    return [
        re.sub(r"\\pm(?![a-zA-Z])", a, re.sub(r"\\mp(?![a-zA-Z])", b, text))
        for a, b in ((" + ", " - "), (" - ", " + "))
    ]


def one(text: str) -> Form:
    """The plainest reading of one thing."""
    return every(unbraced(text))[0] if unbraced(text) else Wording("")


def every(text: str) -> list[Form]:
    """The readings of one thing, the plainest first."""
    special = sets(text) or relation(text) or matrix(text) or bracketed(text) or ratio(text)
    if special is not None:
        return [special]
    tried = (quantity, plain_value) if "\\text" in text else (plain_value, quantity)
    meanings: list[Form] = [form for form in (based(text), *(reading(text) for reading in tried)) if form is not None]
    return meanings or [Wording(gist(text))]


def plain_value(text: str) -> Value | None:
    """A formula, perhaps with a sign for percent or degrees after it."""
    text = re.sub(r"\s?\\text\{(?:percent|percentage|pct)\}$", "%", text)
    percent = text.endswith("%")
    text = re.sub(r"(\\circ\s?\}?)\s?(?:C|F|\\text\{[CF]\})$", r"\1", text.rstrip("% "))
    try:
        formula = formula_of(numerals(text))
    except (Unreadable, RecursionError):
        return None
    if formula[0] == "*" and formula[1] == MINUS and formula[2][0] == "degrees":
        return Value(negative(formula[2][1]), percent, True)
    return Value(formula[1], percent, True) if formula[0] == "degrees" else Value(formula, percent)


def numerals(text: str) -> str:
    """Repeating decimals as fractions, 1.5e3 and 1.5 x 10^3 as products."""
    if endless := _ENDLESS.fullmatch(text.strip()):
        text = endless[1] + repeated(endless[2], endless[3])
    text = _REPEATING.sub(_repeating, text)
    text = _SCIENTIFIC.sub(lambda match: f"({match[1].rstrip('.')} \\cdot 10^{{{match[2]}}})", text)
    return re.sub(r"(?<=\d)\.(?!\d)", "", _TIMES_TEN.sub(r" \\times ", text))


def repeated(whole: str, digits: str) -> str:
    """0.333... as a fraction, where the last digits of it are seen to repeat; raises Unreadable for others."""
    for size in range(1, len(digits) // 2 + 1):
        again = digits[-size:]
        count = 0
        while digits.endswith(again * (count + 1)):
            count += 1
        if count >= (2 if len(digits) < 4 or size > 1 else 3) or count * size == len(digits):
            return _fraction(whole, digits[: len(digits) - count * size], again)
    raise Unreadable("a decimal without an end")


def _repeating(match: re.Match[str]) -> str:
    return _fraction(match[1], match[2], "".join(group for group in match.groups()[2:] if group))


def _fraction(whole: str, fixed: str, again: str) -> str:
    nines = int("9" * len(again)) * 10 ** len(fixed)
    value = Fraction(int(whole + fixed or "0"), 10 ** len(fixed)) + Fraction(int(again), nines)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def based(text: str) -> Form | None:
    """A numeral in another base, as words: 2220_5; in base ten it is a number."""
    match = _BASED.fullmatch(text)
    base = (match[2] or match[3]) if match else ""
    base = _BASES.get(base, base)
    if not match or not base.isdigit():
        return None
    return plain_value(match[1]) if base == "10" else Wording(f"{match[1]}_{base}")


def quantity(text: str) -> Quantity | None:
    """A value with a unit after it, or a currency before it."""
    if before := re.match(r"([-+]?)\\text\{([A-Z]{3})\}\s?(.+)", text):
        unit, inner = unit_of(before[2]), quantity(before[1] + before[3])
        if inner is not None and not inner.unit.measures and unit is not None:
            return Quantity(inner.value, Unit(unit.factor, inner.unit.scale, unit.measures))
        amount = plain_value(before[1] + before[3])
        return Quantity(amount, unit) if amount is not None and unit is not None and unit.measures else None
    if match := _LETTER_UNIT.fullmatch(text):
        if match[3] and not match[2] and match[3] not in "msgL" and not match[4]:
            return None
        words = match[3] + match[4] if match[3] else f"{match[5]}/{match[6]}" + (f"^{match[7]}" if match[7] else "")
        return _measured(match[1], words)
    if ordinal := re.fullmatch(r"(\d+)\s?\^?\s?\{?\s?\\text\{(?:st|nd|rd|th)\}\s?\}?", text):
        return _measured(ordinal[1], "units")
    start = _UNITS.search(text)
    return _measured(text[: start.start()], text[start.start() :]) if start and start.start() else None


def _measured(number: str, words: str) -> Quantity | None:
    words = re.sub(r"\\frac\s?\{(.*?)\s?\}\{(.*?)\}", r"\1 / \2", words) if "\\frac" in words else words
    unit = unit_of(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", words))
    value = plain_value(number.strip())
    return Quantity(value, unit) if value is not None and unit is not None else None


def relation(text: str) -> Form | None:
    r"""Sides with signs between them; x \in S is S."""
    if re.search(r"\\(?:in|ni)(?![a-zA-Z])", text):
        sides, _ = split_outside(text, {"\\in"})
        return one(sides[1]) if len(sides) == 2 and re.fullmatch(r"[A-Za-z]|\\[a-z]+", sides[0]) else None
    sides, between = split_outside(text, RELATIONS)
    if len(sides) == 1 or (len(sides) == 2 and sides[0] == "" and between[0] not in ("=", "\\approx")):
        return None if len(sides) == 1 else Wording(gist(text))
    if len(sides) > 12:
        return Wording(gist(text))
    if sides[0] == "":
        sides, between = sides[1:], between[1:]
        if not between:
            return one(sides[0])
    first = one(sides[0])
    if called := re.fullmatch(r"([A-Za-z])\s?\(\s?([a-z])\s?\)", sides[0]):  # W(x) before a sign is no product
        first = Value(("call", f"of {called[1]}", ("letter", called[2])))
    return Relation((first, *(one(side) for side in sides[1:])), tuple(between))


def sets(text: str) -> Form | None:
    """Unions, differences, the reals and the empty set."""
    if re.fullmatch(r"\\emptyset|\\\{\s*\\\}|\\phi", text) or gist(text) in _EMPTY:
        return EMPTY
    if re.fullmatch(r"\\mathbb\s?\{?\s?R\s?\}?|\\reals|\\Reals", text) or gist(text) in _ALL:
        return REALS
    if half := _HALF_LINE.fullmatch(text):
        return one({"+": r"(0,\infty)", ">": r"(0,\infty)", "\\ge": r"[0,\infty)", "-": r"(-\infty,0)", "<": r"(-\infty,0)"}[half[1] or half[2]])
    for token, kind in (("\\cup", "U"), ("\\setminus", "-")):
        parts, between = split_outside(text, {token})
        if between and all(parts):
            return Many(kind, tuple(one(part) for part in parts))
    minus = re.fullmatch(r"(\\mathbb\s?\{?\s?R\s?\}?|\\reals)\s?-\s?(\\\{.*\\\})", text)
    return Many("-", (REALS, one(minus[2]))) if minus else None


def bracketed(text: str) -> Form | None:
    r"""A tuple, interval or set: (1,2], \{1,2\}, \langle 1,2\rangle."""
    match = re.match(r"[(\[]|\\\{|\\langle", text)
    ending = re.search(r"(?:[)\]]|\\\}|\\rangle)$", text)
    if not match or not ending or split_outside(text[match.end() : ending.start()], {")", "]", "\\}", "\\rangle"})[1]:
        return None
    inside = text[match.end() : ending.start()]
    if match.group() == "\\{":
        return braced(inside)
    parts = split_outside(inside, {",", ";"})[0]
    if len(parts) < 2 or not all(parts):
        return None
    kind = "()" if match.group() == "\\langle" else match.group() + ending.group()
    return Many(kind, tuple(one(part) for part in parts)) if kind in ("()", "(]", "[)", "[]") else None


def braced(inside: str) -> Form | None:
    r"""The set in braces; \{x : x>2\} is what it says of x."""
    for bar in (":", "|"):
        parts, between = split_outside(inside, {bar})
        if len(between) == 1 and re.fullmatch(r"[a-zA-Z]|[a-zA-Z]\s?\\in\s?\\mathbb\{?R\}?", parts[0]):
            return readings(parts[1])[0]
    parts = split_outside(inside, {",", ";"})[0]
    return Many("{", tuple(one(item) for part in parts for item in signs(part))) if all(parts) else None


def matrix(text: str) -> Matrix | None:
    """A matrix, whatever brackets it has; not a determinant."""
    text = re.sub(r"^[\[(]\s*(\\begin.*\\end\{\w+\})\s*[\])]$", r"\1", text)
    match = re.fullmatch(r"\\begin\{([pbB]?matrix|smallmatrix|array)\}(?:\s?\{[lcr| ]*\})?(.*)\\end\{\1\}", text)
    if not match or "\\begin" in match[2]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[\d.]{1,5}[a-z]{2}\])?", match[2].strip()) if row.strip()]
    return Matrix(tuple(tuple(one(cell) for cell in row.split("&")) for row in rows)) if rows else None


def ratio(text: str) -> Many | None:
    """3:1, or 3 to 1."""
    parts, between = split_outside(re.sub(r"(?<=\d)\s?\\text\{to\}\s?(?=\d)", ":", text), {":"})
    if not between or len(parts) > 4 or not all(parts):
        return None
    values = [plain_value(part) for part in parts]
    return Many(":", tuple(values)) if all(item is not None and not letters(item.formula) for item in values) else None


def gist(text: str) -> str:
    """A clean text as words: without \\text, braces around one thing and gaps, but for those between digits; the case of words is ignored."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\b[A-Za-z]{2,}\b", lambda match: match.group().casefold(), text)
    text = re.sub(r"(?<=\d),\s+(?=\d)", ";", re.sub(r"([\^_]|\\[a-zA-Z]+\s?)\{(\w)\}", r"\1\2", text)).strip()
    text = text if text.endswith("..") else text.rstrip(".,;")
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.replace('"', "").replace("``", "").replace("''", ""))
