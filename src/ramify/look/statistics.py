"""The numbers of an evaluation: unbiased pass@k, majority votes, bootstrap intervals. Plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

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
    drawn = random.Random(f"{seed}/interval/{len(values)}")
    means = sorted(math.fsum(drawn.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    low = int((1 - share) / 2 * RESAMPLES)
    return means[low], means[RESAMPLES - 1 - low]


def mean(values: Sequence[float]) -> float:
    """The mean; nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
