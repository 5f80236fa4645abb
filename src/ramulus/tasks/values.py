"""Values of formulas: exact fractions as long as they are, numbers of 50 digits where not; and whether two formulas have the same ones.

Everything has a limit: powers, factorials and roots that would not fit raise Unreadable, so that no formula is dear to compare.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from typing import Any

from ramulus.tasks.formula import Formula, Unreadable, atoms, decimal, letters

Computed = Any
"""A Fraction, or a real or complex number of mpmath."""

EXACT_BITS = 40_000  # of a power that is computed exactly
LARGEST_FACTORIAL = 3_000
DIGITS, MORE_DIGITS = 50, 150
CLOSE = Fraction(1, 10**6)  # the relative difference that a decimal fraction is allowed, absolute above 1
POINTS = 12


class Outside(Unreadable):
    """The value is not real although nothing imaginary was written: this point does not count."""


@cache
def precise(digits: int) -> Any:
    """mpmath at this precision, apart from everybody else's."""
    try:
        import mpmath
    except ImportError:
        raise ImportError('grading mathematics needs mpmath: pip install "ramulus[math]"') from None
    context = mpmath.MPContext()
    context.dps = digits
    return context


def mpf(mp: Any, value: Computed) -> Any:
    """A value as a number of this mpmath context."""
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


class Values:
    """Computes formulas with `point`, the values of letters. Without letters, or with an i, roots of negative numbers are imaginary."""

    def __init__(self, digits: int, point: Mapping[str, Fraction], real: bool) -> None:
        self.mp, self.point, self.real = precise(digits), point, real

    def __call__(self, formula: Formula) -> Computed:
        kind = formula[0]
        if kind == "number":
            return formula[1]
        if kind == "letter":
            if formula[1] not in self.point:
                raise Unreadable(f"{formula[1]} has no value")
            return self.point[formula[1]]
        if kind == "constant":
            return {"pi": self.mp.pi, "e": self.mp.e, "i": self.mp.j, "infinity": self.mp.inf}[formula[1]] * 1
        if kind == "degrees":
            return self.mpf(self(formula[1])) * self.mp.pi / 180
        if kind == "call":
            return self.call(formula[1], [self(part) for part in formula[2:]])
        one, other = self(formula[1]), self(formula[2])
        if kind == "^":
            return self.power(one, other)
        if not (isinstance(one, Fraction) and isinstance(other, Fraction)):
            one, other = self.mpf(one), self.mpf(other)
        if kind == "+":
            return one + other
        if kind == "*":
            return one * other
        if other == 0:
            raise Unreadable("a division by zero")
        return one / other

    def mpf(self, value: Computed) -> Any:
        return mpf(self.mp, value)

    def power(self, base: Computed, exponent: Computed) -> Computed:
        if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if base == 0 and exponent < 0:
                raise Unreadable("a division by zero")
            if abs(exponent) * bits <= EXACT_BITS:
                return base ** int(exponent)
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator > 1 and base > 0:
            return self.root(self.power(base, Fraction(exponent.numerator)), exponent.denominator, odd=False)
        if self.mp.isinf(self.mpf(base)) or abs(exponent) > 10**9:
            raise Unreadable("a power without bound")
        if base == 0:
            return Fraction(0)
        if self.real and exponent != self.mp.floor(self.mp.re(self.mpf(exponent))) and self.below_zero(base):
            raise Outside("a power of a negative number")
        exponent = int(exponent) if isinstance(exponent, Fraction) and exponent.denominator == 1 else self.mpf(exponent)
        return self.mp.power(self.mpf(base), exponent)

    def below_zero(self, value: Computed) -> bool:
        value = self.mpf(value)
        return bool(self.mp.im(value) == 0 and self.mp.re(value) < 0)

    def root(self, value: Computed, index: int, odd: bool = True) -> Computed:
        """The root; of a negative number with an odd index the real one, where `odd`."""
        if index < 1 or index > 10_000:
            raise Unreadable(f"a root of index {index}")
        if self.below_zero(value):
            if odd and index % 2:
                return -self.root(-value, index)
            if self.real:
                raise Outside("a root of a negative number")
        if isinstance(value, Fraction) and value >= 0:
            top, bottom = whole_root(value.numerator, index), whole_root(value.denominator, index)
            if top is not None and bottom is not None:
                return Fraction(top, bottom)
        value = self.mpf(value)
        return self.mp.sqrt(value) if index == 2 else self.mp.power(value, self.mp.mpf(1) / index)

    def call(self, name: str, given: list[Computed]) -> Computed:
        if name == "root":
            value, index = given
            if not isinstance(index, Fraction) or index.denominator > 1:
                raise Unreadable("a root of no whole index")
            return self.root(value, int(index))
        if name.startswith("of "):
            return self.opaque(name, given)
        if name in OF_SEVERAL:
            return OF_SEVERAL[name](self, given)
        if len(given) == 2 and name in ("log", "lg"):
            return self.logarithm(given[0]) / self.logarithm(given[1])
        if name in ("ln", "log", "lg") and len(given) == 1:
            return self.logarithm(given[0]) / (1 if name == "ln" else self.mp.log(10))
        if len(given) != 1 or name not in OF_ONE:
            raise Unreadable(f"{name} of {len(given)}")
        value = self.mpf(given[0])
        if not self.mp.isfinite(value) or abs(value) > 10**12:
            raise Unreadable(f"{name} of a number without bound")
        image = getattr(self.mp, OF_ONE[name])(value)
        if self.real and self.mp.im(image) != 0:
            raise Outside(f"{name} outside of the reals")
        return image

    def logarithm(self, value: Computed) -> Computed:
        if value == 0:
            raise Unreadable("a logarithm of zero")
        if self.real and self.below_zero(value):
            raise Outside("a logarithm of a negative number")
        return self.mp.log(self.mpf(value))

    def opaque(self, name: str, given: list[Computed]) -> Fraction:
        """A function nobody knows, as one that is different everywhere: its value hangs on the name and the arguments."""
        arguments = ",".join(self.mp.nstr(self.mpf(value), 30) for value in given)
        return Fraction(random.Random(f"{name}({arguments})").randint(10**5, 10**6), 10**5)


def whole_root(value: int, index: int) -> int | None:
    """The exact root of a whole number, if it has one."""
    if index == 2:
        root = math.isqrt(value)
        return root if root * root == value else None
    if value.bit_length() > 900:
        return None
    root = round(value ** (1 / index))
    return next((n for n in (root - 1, root, root + 1) if n >= 0 and n**index == value), None)


def _factorial(values: Values, given: list[Computed], step: int = 1) -> Computed:
    (n,) = given
    if isinstance(n, Fraction) and n.denominator == 1:
        if n < 0:
            raise Unreadable("a factorial of a negative number")
        if n <= LARGEST_FACTORIAL:
            return Fraction(math.factorial(int(n)) if step == 1 else math.prod(range(int(n), 0, -2)))
    if step == 2 or not abs(n) <= 10**9:
        raise Unreadable("a factorial without bound")
    return values.mp.gamma(values.mpf(n) + 1)


def _binomial(values: Values, given: list[Computed]) -> Computed:
    n, k = given
    if (
        all(isinstance(value, Fraction) and value.denominator == 1 for value in given)
        and 0 <= k <= 10**4
        and 0 <= n <= 10**4
    ):
        return Fraction(math.comb(int(n), int(k)))
    if not (abs(n) <= 10**9 and abs(k) <= 10**4):
        raise Unreadable("a binomial without bound")
    return values.mp.binomial(values.mpf(n), values.mpf(k))


def _rounded(down: bool) -> Callable[[Values, list[Computed]], Computed]:
    def compute(values: Values, given: list[Computed]) -> Computed:
        (value,) = given
        if isinstance(value, Fraction):
            return Fraction(math.floor(value) if down else math.ceil(value))
        return Fraction(int(values.mp.floor(value) if down else values.mp.ceil(value)))

    return compute


def _chosen(choose: Callable[..., Any]) -> Callable[[Values, list[Computed]], Computed]:
    def compute(values: Values, given: list[Computed]) -> Computed:
        return choose(given, key=values.mpf)

    return compute


def _of_whole(join: Callable[..., int]) -> Callable[[Values, list[Computed]], Computed]:
    def compute(values: Values, given: list[Computed]) -> Computed:
        if not all(isinstance(value, Fraction) and value.denominator == 1 for value in given):
            raise Unreadable("of no whole numbers")
        return Fraction(join(*(int(value) for value in given)))

    return compute


OF_SEVERAL: dict[str, Callable[[Values, list[Computed]], Computed]] = {
    "factorial": _factorial, "double factorial": lambda values, given: _factorial(values, given, 2), "binom": _binomial, "floor": _rounded(True),
    "ceiling": _rounded(False), "max": _chosen(max), "min": _chosen(min), "gcd": _of_whole(math.gcd), "lcm": _of_whole(math.lcm),
    "abs": lambda values, given: abs(given[0]),
}  # fmt: skip
_SAME_NAME = (
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "sinh",
    "cosh",
    "tanh",
    "coth",
    "exp",
    "arg",
    "sqrt",
    "re",
    "im",
    "sign",
    "expj",
)
OF_ONE = {name: name for name in (*_SAME_NAME, "asin", "acos", "atan")} | {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "cis": "expj", "sgn": "sign", "Re": "re", "Im": "im",
}  # fmt: skip
"""Functions of one number by the name that mpmath has for them."""


def computed(formula: Formula) -> Computed:
    """The value of a formula without letters. A number that only rounding keeps from zero is zero."""
    value = Values(DIGITS, {}, False)(formula)
    if not isinstance(value, Fraction) and abs(value) < 1e-30:
        more = Values(MORE_DIGITS, {}, False)(formula)
        if abs(more - value) <= abs(more) * precise(DIGITS).mpf(10) ** -30:
            return more  # small, and known to as many digits
        return Fraction(0) if abs(more) < precise(MORE_DIGITS).mpf(10) ** -100 else more
    return value


def quotient(one: Computed, other: Computed) -> Computed:
    """One by the other, which is not zero: exact for fractions."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one / other
    mp = precise(DIGITS)
    a, b = mpf(mp, one), mpf(mp, other)
    return a / b


def same_number(one: Computed, other: Computed, rough: bool) -> bool:
    """Whether two values are one number: exactly for fractions, to 35 digits else, to six if `rough`."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        if one == other or not rough:
            return one == other
        return abs(one - other) <= min(Fraction(1), max(abs(one), abs(other))) * CLOSE
    mp = precise(DIGITS)
    a, b = mpf(mp, one), mpf(mp, other)
    if mp.isinf(a) or mp.isinf(b):
        return bool(a == b)
    size = max(abs(a), abs(b))
    limit = min(mp.mpf(1), size) * mp.mpf(10) ** -6 if rough else size * mp.mpf(10) ** -35
    return bool(abs(a - b) <= limit)


def same_value(one: Formula, other: Formula) -> bool:
    """Whether two formulas are equal wherever both are defined; raises Unreadable where that cannot be told."""
    names = sorted(letters(one) | letters(other))
    rough = decimal(one) or decimal(other)
    if not names:
        return same_number(computed(one), computed(other), rough)
    imaginary = "i" in atoms(one, "constant") | atoms(other, "constant")
    agreed = 0
    for number in range(POINTS):
        values = Values(DIGITS, point(names, number), not imaginary)
        try:
            a, b = values(one), values(other)
        except Unreadable:
            continue
        if not same_number(a, b, rough):
            return False
        agreed += 1
        if agreed >= 6:
            return True
    if agreed < 2:
        raise Unreadable("two formulas that are nowhere defined together")
    return True


def point(names: list[str], number: int) -> dict[str, Fraction]:
    """Values for letters, the same for the same letter in every formula: of both signs, small and larger, whole at every third point."""
    kind = number % 3
    values = {}
    for name in names:
        drawn = random.Random(f"{name}/{number}")
        if kind == 0:
            values[name] = Fraction(drawn.randint(100, 3000), 997)
        elif kind == 1:
            values[name] = Fraction(drawn.randint(-3000, 3000), 991)
        else:
            values[name] = Fraction(drawn.randint(2, 12))
    return values
