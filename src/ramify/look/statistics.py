"""The numbers of an evaluation: unbiased pass@k, majority votes, bootstrap intervals. Plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter

RESAMPLES = 1000


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of n attempts drawn without replacement hold a correct one: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= correct <= n, got n={n}, correct={correct}, k={k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[str], correct: Sequence[float]) -> float:
    """Whether the most frequent answer is correct; a tie goes to the answer given first, attempts without an answer do not vote."""
    votes: dict[str, int] = {}
    for answer in answers:
        if answer:
            votes[answer] = votes.get(answer, 0) + 1
    if not votes:
        return 0.0
    winner = max(votes, key=lambda answer: votes[answer])
    return correct[answers.index(winner)]


def interval(values: Sequence[float], seed: int = 0, share: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean of one value a problem: percentiles of the means of resampled problems."""
    if not values:
        raise ValueError("an interval needs at least one problem")
    if len(values) == 1:
        return values[0], values[0]
    means = sorted(math.fsum(chosen(values)) / len(values) for chosen in resamples(seed, len(values)))
    low = int((1 - share) / 2 * RESAMPLES)
    return means[low], means[RESAMPLES - 1 - low]


@lru_cache(maxsize=1)
def resamples(seed: int, n: int) -> list[Callable[[Sequence[float]], tuple[float, ...]]]:
    """What picks n of n >= 2 values, with replacement, for each resampled mean; the columns of one evaluation share it."""
    drawn = random.Random(f"{seed}/interval/{n}")
    return [itemgetter(*drawn.choices(range(n), k=n)) for _ in range(RESAMPLES)]


def mean(values: Sequence[float]) -> float:
    """The mean; nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
