"""How many a share of so many is, by the share as it is written: 0.29 of 100 is 29, though 0.29 x 100 lies below it in floating point."""

from __future__ import annotations

import math
from fractions import Fraction


def at_most(share: float, count: int) -> int:
    """The most of `count` that are no more than the share of them."""
    return math.floor(Fraction(str(share)) * count)


def at_least(share: float, count: int) -> int:
    """The fewest of `count` that are no less than the share of them."""
    return math.ceil(Fraction(str(share)) * count)
