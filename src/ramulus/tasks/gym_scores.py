"""Scores of reasoning-gym that take junk for an answer, mended by the name of the task; found by fuzzing every scorer with junk.

`game_of_life_halting` asks for the truth of any text, `coin_flip` for a common beginning (0 for 0.3125), and a NaN passes for any
number in those that measure a distance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

_NO_NUMBER = re.compile(r"(?<![a-z])[-+]?(?:nan|inf|infinity)j?(?![a-z])", re.IGNORECASE)


def _same_truth(answer: str, entry: dict[str, Any], score: float) -> float:
    return float(answer.strip().casefold() == str(entry["answer"]).strip().casefold())


def _near(answer: str, entry: dict[str, Any], score: float) -> float:
    """Full marks for a probability that is off by 0.01 % at most, half of what the scorer gives for others."""
    try:
        value, known = Fraction(answer.replace(",", "")), Fraction(str(entry["answer"]).replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return 0.0
    return 1.0 if abs(value - known) <= known / 10**4 else score / 2


MENDED: dict[str, Callable[[str, dict[str, Any], float], float]] = {
    "game_of_life_halting": _same_truth,
    "coin_flip": _near,
}
"""By the name of the task: (answer, entry, the scorer's score) -> the score."""


def mended(names: set[str], answer: str, entry: dict[str, Any], score: float) -> float:
    """The score between 0 and 1 that an answer to one of these tasks deserves; NaN and infinities in an answer are no numbers."""
    for name in names & MENDED.keys():
        score = MENDED[name](answer, entry, score)
    if not math.isfinite(score) or (_NO_NUMBER.search(answer) and not _NO_NUMBER.search(str(entry["answer"]))):
        return 0.0
    return min(max(score, 0.0), 1.0)
