"""What an equation's first side names: a letter, a function, a length, an angle; and the same said with other letters."""

from __future__ import annotations

import re
from typing import Any

from ramulus.tasks.forms import Form, Many, Relation, Value, Wording
from ramulus.tasks.formula import Formula, letters

_TURNS = frozenset({"sin", "cos", "tan", "cot", "sec", "csc"})
_UNKNOWN = frozenset("xyztn")


def is_name(form: Form) -> bool:
    """Whether a side of an equation is the name of something: a letter, f(x), AB, some words."""
    if isinstance(form, Value):
        kind = form.formula[0]
        if kind == "*":
            return all(is_name(Value(part)) for part in form.formula[1:])
        return (
            kind == "letter"
            or (kind == "call" and form.formula[1].startswith("of "))
            or form.formula == ("constant", "i")
        )
    if isinstance(form, Many):
        return form.kind in ("()", ",") and all(is_name(item) for item in form.items)
    return isinstance(form, Wording) and re.fullmatch(r"[^\d\W][^-+*/^\\]*", form.text) is not None


def quantity_said(relation: Relation) -> Form | None:
    r"""The plain value that an equation gives to a length, a ratio or an angle: \frac{NO}{BO}=2, |AB|=1, \cos A=\frac12; else None.

    |z|=1 and \sin x=1 are equations to solve, and so is what holds letters on its right.
    """
    if len(relation.sides) != 2 or not all(isinstance(side, Value) for side in relation.sides):
        return None
    first, last = relation.sides
    return last if not letters(last.formula) and _is_quantity(first.formula) else None


def _is_quantity(formula: Formula) -> bool:
    if formula[0] == "/":
        return all(is_name(Value(part)) and not letters(part) & _UNKNOWN for part in formula[1:])
    if formula[:2] == ("call", "abs"):
        return _is_length(formula[2])
    if formula[0] == "call" and formula[1] in _TURNS:
        inside = formula[2]
        return is_name(Value(inside)) and not letters(inside) & _UNKNOWN
    return formula[0] == "+" and all(_is_length(part) for part in formula[1:])


def _is_length(formula: Formula) -> bool:
    """Whether a formula names a length, such as AB, or a vector."""
    names = letters(formula)
    if formula[0] == "letter":
        return formula[1].startswith(("vec ", "overline "))
    return formula[0] == "*" and is_name(Value(formula)) and all(name[0].isupper() for name in names)


def relettered(reference: Relation, answer: Relation) -> Relation:
    """The answer with the reference's letter for the argument of a function: W(x)=2x for W(n)=2n, where that letter is free.

    A capital is no such letter: P(A) and P(B) are two numbers.
    """
    values = [side.formula for side in answer.sides if isinstance(side, Value)]
    if not isinstance(reference.sides[0], Value) or len(values) != len(answer.sides):
        return answer
    one, other = reference.sides[0].formula, values[0]
    for call in (one, other):
        if (
            call[0] != "call"
            or not call[1].startswith("of ")
            or len(call) != 3
            or call[2][0] != "letter"
            or call[2][1].isupper()
        ):
            return answer
    if one[1] != other[1] or one[2] == other[2] or any(one[2][1] in letters(value) for value in values):
        return answer
    sides = (Value(_with(side.formula, other[2], one[2]), side.percent, side.degrees) for side in answer.sides)
    return Relation(tuple(sides), answer.signs)


def _with(formula: Any, old: Formula, new: Formula) -> Any:
    """The formula with one letter in another's place."""
    if formula == old:
        return new
    return tuple(_with(part, old, new) for part in formula) if isinstance(formula, tuple) else formula


def rounds(form: Form) -> tuple[tuple[Form, ...], tuple[Form, ...]] | None:
    """(names, their values round by round as tuples) of p=5,q=2;p=7,q=2; None for what names no two things at least twice each."""
    items = form.items if isinstance(form, Many) and form.kind == "," else ()
    if not all(isinstance(item, Relation) and item.signs == ("=",) and is_name(item.sides[0]) for item in items):
        return None
    names = tuple(item.sides[0] for item in items)
    size = len(set(names))
    if size < 2 or len(names) < 2 * size or names != names[:size] * (len(names) // size):
        return None
    values = tuple(item.sides[1] for item in items)
    return names[:size], tuple(Many("()", values[i : i + size]) for i in range(0, len(values), size))


def other_angles(one: Form, other: Form) -> bool:
    r"""Whether both sides name an angle, and not the same: \angle ABC is \angle CBA, not \angle ACB."""
    first, second = _angle(one), _angle(other)
    return first is not None and second is not None and first != second


def _angle(form: Form) -> tuple[str, frozenset[str]] | None:
    """(vertex, the points on its sides) of an angle named by three points."""
    points, formula = [], form.formula if isinstance(form, Value) else ("",)
    while formula[0] == "*" and formula[2][0] == "letter":
        points.append(formula[2][1])
        formula = formula[1]
    return (points[1], frozenset(points[::2])) if formula == ("letter", "angle") and len(points) == 3 else None
