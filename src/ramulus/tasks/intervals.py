"""Sets of real numbers as spans: intervals, unions, differences and inequalities in one letter brought to one shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ramulus.tasks.forms import EMPTY, REALS, Form, Many, Relation, Value
from ramulus.tasks.formula import Formula, Unreadable, letters
from ramulus.tasks.values import computed, precise, same_number

Interval = tuple[Any, bool, Any, bool]
"""(from, whether it is in the set, to, whether it is)."""

_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}


@dataclass(frozen=True, eq=False)
class Spans:
    """Disjoint spans in order; `whole`: an interval was written in so many words, not as a tuple may be."""

    spans: tuple[Interval, ...]
    whole: bool = True
    of: Formula | None = None  # the name of what lies in them, where it is said: x, f(x)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spans) or len(self.spans) != len(other.spans):
            return False
        if self.of is not None and other.of is not None and self.of != other.of:
            return False
        return all(
            a[1] == b[1] and a[3] == b[3] and same_number(a[0], b[0], True) and same_number(a[2], b[2], True)
            for a, b in zip(self.spans, other.spans)
        )


def infinity() -> Any:
    return precise(50).inf


def spans_of(form: Form) -> Spans | None:
    """The reals that a form means; None where it means no set of them."""
    try:
        return _spans(form)
    except (Unreadable, TypeError):
        return None


def _spans(form: Form) -> Spans | None:
    if form == REALS:
        return Spans(((-infinity(), False, infinity(), False),))
    if isinstance(form, Relation):
        return _inequality(form)
    if not isinstance(form, Many):
        return None
    if form == EMPTY:
        return Spans(())
    if form.kind in ("()", "[]", "(]", "[)") and len(form.items) == 2:
        low, high = (_end(item) for item in form.items)
        if form.kind == "()" and not low < high:
            return None
        return Spans(((low, form.kind[0] == "[", high, form.kind[1] == "]"),), form.kind in ("(]", "[)"))
    if form.kind == "{":
        ends = [_end(item) for item in form.items]
        return Spans(in_line([(end, True, end, True) for end in ends]), False)
    parts = [_spans(item) for item in form.items] if form.kind in ("U", "-", ",") else [None]
    if any(part is None for part in parts) or (
        form.kind == "," and not all(isinstance(item, Relation) for item in form.items)
    ):
        return None
    return _joined(form.kind, [part for part in parts if part is not None])


def _joined(kind: str, parts: list[Spans]) -> Spans | None:
    subjects = list({part.of: None for part in parts if part.of is not None})
    of = subjects[0] if subjects else None
    if kind == "U":
        return Spans(in_line([span for part in parts for span in part.spans]), of=of)
    common = parts[0].spans
    if kind == "-":
        for part in parts[1:]:
            common = outside_of(common, part.spans)
        return Spans(common, of=of)
    if len(subjects) > 1:
        return None
    either = tuple(span for part in parts for span in part.spans)
    for part in parts[1:]:
        common = intersection(common, part.spans)
    return Spans(common or in_line(list(either)), of=of)  # x<1, x>2 can only mean either


def _end(item: Form) -> Any:
    """The number at an end of a span; raises Unreadable."""
    if not isinstance(item, Value) or letters(item.formula):
        raise Unreadable("no number at an end")
    value = precise(50).convert(computed(item.formula))
    if value.imag != 0:
        raise Unreadable("no real number at an end")
    return value.real


def _inequality(form: Relation) -> Spans | None:
    r"""x>2, 1<x\le 3, 0<f(x)<1, 1\le|x|<2, x\ne 0: one name, or its distance from 0, between numbers."""
    places = [i for i, side in enumerate(form.sides) if isinstance(side, Value) and _named(side.formula)]
    if len(places) != 1 or len(form.sides) > 3 or (set(form.signs) - _FLIPPED.keys()):
        return None
    at = places[0]
    name = form.sides[at].formula
    distance = name[1] == "abs"
    spans: tuple[Interval, ...] = ((-infinity(), False, infinity(), False),)
    if len(form.sides) == 3 and at != 1:
        return None
    for i, side in enumerate(form.sides):
        if i == at:
            continue
        sign = form.signs[i - 1] if i > at else _FLIPPED[form.signs[i]]
        half = (_distance if distance else _half)(sign, _end(side))
        if half is None:
            return None
        spans = intersection(spans, half)
    return Spans(spans, of=name[2] if distance else name)


def _named(formula: Formula) -> bool:
    """Whether a formula is a letter x, or |x| or f(x) of one."""
    if formula[0] == "call" and len(formula) == 3 and (formula[1] == "abs" or formula[1].startswith("of ")):
        return bool(formula[2][0] == "letter")
    return bool(formula[0] == "letter")


def _distance(sign: str, end: Any) -> tuple[Interval, ...] | None:
    """|x|<2 is -2<x<2, |x|>2 what is left; None for what nothing, or nothing but all, can be."""
    if end < 0 or sign == "\\ne":
        return None
    below, above = _half(sign, end), _half(_FLIPPED[sign], -end)
    return intersection(below, above) if sign in ("<", "\\le") else in_line([*below, *above])


def _half(sign: str, end: Any) -> tuple[Interval, ...]:
    """The numbers that stand in this relation to an end."""
    low, high = -infinity(), infinity()
    if sign in ("<", "\\le"):
        return ((low, False, end, sign == "\\le"),)
    if sign in (">", "\\ge"):
        return ((end, sign == "\\ge", high, False),)
    return ((low, False, end, False), (end, False, high, False))


def in_line(spans: list[Interval]) -> tuple[Interval, ...]:
    """Spans in order, those that touch joined."""
    union: list[Interval] = []
    for span in sorted(spans, key=lambda span: (span[0], not span[1])):
        if union and (union[-1][2] > span[0] or (union[-1][2] == span[0] and (union[-1][3] or span[1]))):
            last = union[-1]
            high = max((last[2], last[3]), (span[2], span[3]))
            union[-1] = (last[0], last[1], high[0], high[1])
        else:
            union.append(span)
    return tuple(union)


def intersection(one: tuple[Interval, ...], other: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """The spans of the numbers that lie in both, in order."""
    overlaps = []
    for a in one:
        for b in other:
            low = max((a[0], not a[1]), (b[0], not b[1]))
            high = min((a[2], a[3]), (b[2], b[3]))
            if low[0] < high[0] or (low[0] == high[0] and not low[1] and high[1]):
                overlaps.append((low[0], not low[1], high[0], high[1]))
    return in_line(overlaps)


def outside_of(one: tuple[Interval, ...], other: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """What is in the first alone."""
    for span in other:
        outside = ((-infinity(), False, span[0], not span[1]), (span[2], not span[3], infinity(), False))
        one = tuple(part for half in outside for part in intersection(one, (half,)))
    return in_line(list(one))
