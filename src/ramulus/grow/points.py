"""Which steps of a response to branch at: pure functions of scores and of where the steps begin (arXiv 2509.26628, section 3.1)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from ramulus.core.share import at_least


def quantile(values: Sequence[float], share: float) -> float:
    """The `share`-quantile by linear interpolation; exactly a value where the place is one."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    near = round(place)
    if abs(place - near) < 1e-9:  # 0.8 x 35 is a little above 28 in floating point
        return ordered[near]
    low = math.floor(place)
    return ordered[low] + (ordered[low + 1] - ordered[low]) * (place - low)


def threshold(scores: Sequence[float], share: float) -> float:
    """The score that a step must reach: the quantile; where that is 0, the smallest score above 0."""
    bar = quantile(scores, share)
    return min((score for score in scores if score > 0), default=0.0) if bar == 0 else bar


def by_score(
    scores: Sequence[float], starts: Sequence[int], end: int, count: int, share: float = 0.8, distance: int = 512
) -> list[int]:
    """`count` steps to branch at, in the order of selection: those that reach the threshold, the earliest first.

    `starts` [S] and `end` in tokens from the beginning of the prompt. A step is taken if it begins at `distance` or later and
    is that far from every step taken; where fewer than `count` are found, the earliest others fill up (`filled`).
    """
    tau = threshold(scores, share)
    high = [k for k in range(1, len(scores)) if scores[k] >= tau]
    return filled(spaced(high, starts, end, count, distance), len(starts), count)


def at_random(
    starts: Sequence[int], end: int, count: int, early: float, distance: int, dice: random.Random
) -> list[int]:
    """`count` steps drawn from the first `early` share of those after the first, under the same rules of distance."""
    pool = list(range(1, 1 + at_least(early, len(starts) - 1)))
    dice.shuffle(pool)
    return filled(spaced(pool, starts, end, count, distance), len(starts), count)


def spaced(steps: Iterable[int], starts: Sequence[int], end: int, count: int, distance: int) -> list[int]:
    """At most `count` of the steps, in their order, each `distance` tokens from the beginning and between any two."""
    stops = [*starts[1:], end]
    taken: list[int] = []
    for k in steps:
        if len(taken) == count:
            break
        if starts[k] >= distance and all(starts[max(k, other)] - stops[min(k, other)] >= distance for other in taken):
            taken.append(k)
    return taken


def filled(taken: list[int], total: int, count: int) -> list[int]:
    """`count` steps: those taken, then the earliest others but the first, then the earliest again and again.

    A response of one step has no place to branch at: [].
    """
    if total < 2:
        return []
    answer = taken + [k for k in range(1, total) if k not in taken][: count - len(taken)]
    while len(answer) < count:
        answer += list(range(1, total))[: count - len(answer)]
    return answer
