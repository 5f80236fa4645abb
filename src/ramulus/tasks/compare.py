"""Whether two forms say the same: values with their units, lists and tuples, matrices, equations and inequalities."""

from __future__ import annotations

from fractions import Fraction

from ramulus.tasks.forms import Form, Many, Matrix, Quantity, Relation, Value, Wording
from ramulus.tasks.formula import MINUS, Formula, Unreadable, letters, negative
from ramulus.tasks.intervals import spans_of
from ramulus.tasks.names import is_name, other_angles, quantity_said, relettered, rounds
from ramulus.tasks.units import Unit
from ramulus.tasks.values import DIGITS, POINTS, Values, computed, point, quotient, same_number, same_value

MOST_ITEMS = 40
ANGLE = frozenset({("angle", 1)})
EQUAL = {"=", "\\approx"}
_OPPOSITE = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne", "\\approx": "\\approx"}


def equal(reference: Form, answer: Form) -> bool:
    """Whether two forms say the same; raises Unreadable where that cannot be computed."""
    if isinstance(answer, Relation) or isinstance(reference, Relation):
        return related(reference, answer)
    if isinstance(reference, Value | Quantity) and isinstance(answer, Value | Quantity):
        return measured(reference, answer)
    if isinstance(reference, Matrix) or isinstance(answer, Matrix):
        return vectors(reference, answer)
    if isinstance(reference, Wording) and isinstance(answer, Wording):
        if reference.text != answer.text and "\\" in reference.text + answer.text:
            raise Unreadable("words with commands in them")
        return reference.text == answer.text
    if isinstance(reference, Many) or isinstance(answer, Many):
        return several(reference, answer)
    return False


def several(reference: Form, answer: Form) -> bool:
    """Lists and sets in any order, tuples in theirs; unions as the reals they hold."""
    one, other = spans_of(reference), spans_of(answer)
    reference, answer = in_rounds(reference, answer)
    both = isinstance(reference, Many) and isinstance(answer, Many)
    if one is not None and other is not None and (one.whole or other.whole):
        return one == other
    if not both or {reference.kind, answer.kind} & {"U", "-"}:  # type: ignore[union-attr]
        if isinstance(reference, Many) and reference.kind == "{" and len(reference.items) == 1 and isinstance(answer, Value | Quantity):
            return equal(reference.items[0], answer)
        if isinstance(answer, Many) and answer.kind == "{" and len(answer.items) == 1 and isinstance(reference, Value | Quantity):
            return equal(reference, answer.items[0])
        if not both or reference.kind != answer.kind or len(reference.items) != len(answer.items):  # type: ignore[union-attr]
            return False
        return matched(reference.items, answer.items)  # type: ignore[union-attr]
    return in_order(reference, answer)  # type: ignore[arg-type]


def in_rounds(reference: Form, answer: Form) -> tuple[Form, Form]:
    """Both, with p=5,q=2;p=7,q=2 as (5,2),(7,2) where that is how the other can be read: with the same names, or with none."""
    one, other = rounds(reference), rounds(answer)
    if one and other:
        if set(one[0]) != set(other[0]):
            return reference, answer
        order = [other[0].index(name) for name in one[0]]
        turned = tuple(Many("()", tuple(items.items[i] for i in order)) for items in other[1])  # type: ignore[union-attr]
        return Many(",", one[1]), Many(",", turned)
    return (Many(",", one[1]) if one else reference), (Many(",", other[1]) if other else answer)


def in_order(reference: Many, answer: Many) -> bool:
    kinds = {reference.kind, answer.kind}
    if ":" in kinds:
        return kinds == {":"} and proportional(reference, answer)
    if len(kinds) == 1 and kinds <= {",", "{"}:
        one, other = reference.items, answer.items
        plain = kinds == {","} and not all(isinstance(item, Many) and item.kind == "()" for item in (*one, *other))
        return matched(one, other) if plain else covered(one, other)
    if kinds == {",", "{"}:
        return matched(reference.items, answer.items)
    if len(reference.items) != len(answer.items):
        return False
    if len(kinds) == 2 and not (kinds <= {",", "()", "{"} or (kinds <= {"()", "[]", ","} and len(answer.items) > 2)):
        return False
    return all(equal(a, b) for a, b in zip(reference.items, answer.items, strict=True))


def matched(reference: tuple[Form, ...], answer: tuple[Form, ...]) -> bool:
    """Whether each thing of one is one of the other, as often, in any order."""
    if len(reference) != len(answer) or len(answer) > MOST_ITEMS:
        return False
    names = {form.sides[0] for form in reference if isinstance(form, Relation)}
    if len(names) > 1 and not any(
        isinstance(form, Relation) for form in answer
    ):  # k=45, n=2 are told apart by their order
        return all(equal(a, b) for a, b in zip(reference, answer, strict=True))
    left = list(answer)
    for form in reference:
        place = next((i for i, other in enumerate(left) if equal(form, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def covered(reference: tuple[Form, ...], answer: tuple[Form, ...]) -> bool:
    """Whether two sets have the same things, however often they are named."""
    if len(reference) > MOST_ITEMS or len(answer) > MOST_ITEMS:
        return False
    return all(any(equal(form, other) for other in answer) for form in reference) and all(
        any(equal(form, other) for form in reference) for other in answer
    )


def proportional(reference: Many, answer: Many) -> bool:
    """Whether two ratios are one up to a common factor; one with a zero in it, such as 12:00, has to be the same."""
    if len(reference.items) != len(answer.items):
        return False
    one, other = ([computed(item.formula) for item in form.items] for form in (reference, answer))
    if 0 in one or 0 in other:
        return one == other
    return all(same_number(quotient(a, b), quotient(one[0], other[0]), False) for a, b in zip(one, other, strict=True))


def measured(reference: Value | Quantity, answer: Value | Quantity) -> bool:
    """Values with their signs and units: units that are known on both sides must agree, one that stands on one side alone may be left out."""
    one, mine = (reference.value, reference.unit) if isinstance(reference, Quantity) else (reference, Unit())
    other, theirs = (answer.value, answer.unit) if isinstance(answer, Quantity) else (answer, Unit())
    for value, unit in ((one, theirs), (other, mine)):
        if (value.percent or value.degrees) and unit.measures and not (value.degrees and unit.measures == ANGLE):
            return False
    if (one.degrees and other.percent) or (one.percent and other.degrees):
        return False
    if mine.measures and theirs.measures:
        if mine.measures != theirs.measures:
            return False
        ratio = (theirs.factor * theirs.scale) / (mine.factor * mine.scale)
        return agreed(one, times(other, ratio))
    return agreed(times(one, mine.scale), times(other, theirs.scale))


def times(value: Value, factor: Fraction) -> Value:
    if factor == 1:
        return value
    return Value(("*", ("number", factor, False), value.formula), value.percent, value.degrees)


def agreed(reference: Value, answer: Value) -> bool:
    """Equal values; a sign for percent or degrees may be left out, or be written out: 50% is 0.5, 180 degrees are pi."""
    a, b = reference.formula, answer.formula
    if reference.percent != answer.percent:
        hundredth: Formula = ("number", Fraction(1, 100), False)
        if same_value(("*", a, hundredth) if reference.percent else a, b if reference.percent else ("*", b, hundredth)):
            return True
        if answer.percent and not letters(b) and abs(computed(b)) < 1:
            return False
    if reference.degrees != answer.degrees:
        turned = [("degrees", form) if flag else form for form, flag in ((a, reference.degrees), (b, answer.degrees))]
        if same_value(turned[0], turned[1]):
            return True
    return same_value(a, b)


def vectors(reference: Form, answer: Form) -> bool:
    """Matrices cell by cell; a column or row may be written as a tuple."""
    if isinstance(reference, Matrix) and isinstance(answer, Matrix):
        if [len(row) for row in reference.rows] != [len(row) for row in answer.rows]:
            return False
        cells = [
            (a, b)
            for one, other in zip(reference.rows, answer.rows, strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        return all(equal(a, b) for a, b in cells)
    grid, flat = (reference, answer) if isinstance(reference, Matrix) else (answer, reference)
    assert isinstance(grid, Matrix)
    if isinstance(flat, Value | Quantity) and len(grid.rows) == len(grid.rows[0]) == 1:
        return equal(grid.rows[0][0], flat)
    if not isinstance(flat, Many) or flat.kind != "()" or (len(grid.rows) > 1 and len(grid.rows[0]) > 1):
        return False
    items = [cell for row in grid.rows for cell in row]
    return len(items) == len(flat.items) and all(equal(a, b) for a, b in zip(items, flat.items, strict=True))


def related(reference: Form, answer: Form) -> bool:
    """Whether two forms, one of them at least a relation, say the same."""
    one = isinstance(reference, Relation) and set(reference.signs) <= EQUAL
    other = isinstance(answer, Relation) and set(answer.signs) <= EQUAL
    if one and other:
        return equations(reference, answer)  # type: ignore[arg-type]
    if one:
        value = assigned(reference) or quantity_said(reference)  # type: ignore[arg-type]
        return value is not None and not isinstance(answer, Relation) and equal(value, answer)
    if other:
        return not isinstance(reference, Relation) and chain(reference, answer)  # type: ignore[arg-type]
    first, second = spans_of(reference), spans_of(answer)
    both = isinstance(reference, Relation) and isinstance(answer, Relation)
    if both and letters_in(reference) != letters_in(answer):  # type: ignore[arg-type]
        return False
    if first is not None and second is not None:
        return first == second
    return both and inequalities(reference, answer)  # type: ignore[arg-type]


def letters_in(relation: Relation) -> set[str]:
    """The letters in a relation."""
    return set().union(*(letters(side.formula) for side in relation.sides if isinstance(side, Value)))


def assigned(relation: Relation) -> Form | None:
    """What an equation says that its first side, a name, is; None where it says no such thing."""
    if is_name(relation.sides[0]):
        return exact(relation)[-1] if exact(relation)[1:] else relation.sides[-1]
    if len(relation.sides) == 2 and is_name(relation.sides[1]) and isinstance(relation.sides[0], Value):
        return relation.sides[0]
    return None


def exact(relation: Relation) -> list[Form]:
    """The sides before the first that is only near."""
    if "\\approx" not in relation.signs:
        return list(relation.sides)
    return list(relation.sides[: relation.signs.index("\\approx") + 1])


def chain(reference: Form, answer: Relation) -> bool:
    """Whether an equation or a chain of them ends in what the reference is, and nothing in it says otherwise."""
    sides = exact(answer)
    first = answer.sides[0]
    label = is_name(first) or (isinstance(first, Value) and quantity_asked_for(first, answer.sides[-1]))
    if label and not (
        len(sides) > 1 and not isinstance(reference, Many) and isinstance(reference, Value) and equal(reference, first)
    ):
        sides = sides[1:] or list(answer.sides[1:])
    elif (
        len(answer.sides) == 2 and isinstance(first, Value) and is_name(answer.sides[1]) and not letters(first.formula)
    ):
        sides = [first]
    elif any(isinstance(side, Value) and letters(side.formula) for side in sides) and not isinstance(reference, Many):
        if isinstance(reference, Value) and letters(reference.formula):
            return all(equal(reference, side) for side in sides)
        return False
    if label and any(isinstance(side, Value) and is_computation(side.formula) for side in sides):
        return equal(reference, sides[-1])
    plain = [side for side in sides[:-1] if not (isinstance(side, Value) and letters(side.formula))]
    return equal(reference, sides[-1]) and all(equal(reference, side) for side in plain)


def is_computation(formula: Formula) -> bool:
    """Whether a formula is a computation, not a number."""
    return formula[0] in ("+", "*", "/", "^", "call") and not (formula[0] == "*" and formula[1] == MINUS)


def quantity_asked_for(first: Value, last: Form) -> bool:
    """Whether the left side can be what was asked for: x+y, not x-5 or 2x, which say something else of x."""
    names = letters(first.formula)
    if not names:
        return False
    zero = isinstance(last, Value) and last.formula[:2] == ("number", Fraction(0))
    return (len(names) > 1 and not zero) or first.formula[0] == "call"


def equations(reference: Relation, answer: Relation) -> bool:
    """Two equations: the same value for the same name, or one a multiple of the other."""
    answer = relettered(reference, answer)
    if other_angles(reference.sides[0], answer.sides[0]):
        return False
    if is_name(reference.sides[0]) and is_name(answer.sides[0]) and equal(reference.sides[0], answer.sides[0]):
        one, other = assigned(reference), assigned(answer)
        if one is None or other is None:
            return False
        return chain(one, answer) if len(answer.sides) > 2 else equal(one, other)
    if len(reference.sides) != 2 or len(answer.sides) != 2:
        return len(reference.sides) == len(answer.sides) and all(
            equal(a, b) for a, b in zip(reference.sides, answer.sides, strict=True)
        )
    if not all(isinstance(side, Value) for side in (*reference.sides, *answer.sides)):
        return all(equal(a, b) for a, b in zip(reference.sides, answer.sides, strict=True))
    return multiples(left_less_right(reference), left_less_right(answer))


def left_less_right(relation: Relation) -> Formula:
    """Left side less right side."""
    one, other = relation.sides[0].formula, relation.sides[1].formula
    return ("+", one, negative(other))


def multiples(one: Formula, other: Formula, positive: bool = False) -> bool:
    """Whether a formula is the other times a number that is not zero, or above it where `positive`."""
    names = sorted(letters(one) | letters(other))
    if letters(one) != letters(other) or not names:
        return False
    factors = []
    for number in range(POINTS):
        values = Values(DIGITS, point(names, number), True)
        try:
            a, b = values(one), values(other)
        except Unreadable:
            continue
        if a == 0 or b == 0:
            if not same_number(a, b, False):
                return False
            continue
        factors.append(quotient(a, b))
    if len(factors) < 3:
        raise Unreadable("two equations that are nowhere defined together")
    return all(same_number(factor, factors[0], False) for factor in factors) and (
        not positive or (factors[0].imag == 0 and factors[0].real > 0)
    )


def inequalities(reference: Relation, answer: Relation) -> bool:
    """Side by side, as written or turned around; or one a positive multiple of the other."""
    for sides, signs in (
        (answer.sides, answer.signs),
        (answer.sides[::-1], tuple(_OPPOSITE[sign] for sign in answer.signs[::-1])),
    ):
        if signs != reference.signs:
            continue
        if all(equal(a, b) for a, b in zip(reference.sides, sides, strict=True)):
            return True
        if len(sides) == 2 and all(isinstance(side, Value) for side in (*sides, *reference.sides)):
            turned = Relation(sides, signs)
            if multiples(left_less_right(reference), left_less_right(turned), positive=signs[0] not in ("=", "\\ne")):
                return True
    return False
