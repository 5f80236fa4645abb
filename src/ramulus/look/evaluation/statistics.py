"""The numbers of an evaluation: unbiased pass@k and maj@k, bootstrap intervals of means, of differences and of means over sets."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from ramulus.tasks.equality import same

RESAMPLES = 1000
LONG = 200  # characters of an answer; longer ones are not read as mathematics in a vote
Class = tuple[int, float]
"""An answer's votes among all attempts, and its score."""


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of n attempts drawn without replacement hold a correct one: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= correct <= n, got n={n}, correct={correct}, k={k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


@lru_cache(maxsize=1 << 10)
def ballots(answers: tuple[str, ...]) -> dict[str, str]:
    """What each of these answers counts as in a vote: answers that the grader of mathematics takes for one another are one ballot.

    "" is no vote. Answers of more than LONG characters are one only if they are written alike.
    """
    names: dict[str, str] = {}
    known: list[str] = []
    for answer in sorted(set(answers), key=lambda text: (len(text), text)):
        name = answer.strip()
        short = 0 < len(name) <= LONG
        alike = (other for other in known if name == other or (short and len(other) <= LONG and (same(other, name) or same(name, other))))
        names[answer] = next(alike, name)
        if name and names[answer] == name:
            known.append(name)
    return names


def vote(answers: Sequence[str], correct: Sequence[float], k: int) -> tuple[float, float]:
    """(expected score, probability of a tie) of a majority vote among k of n attempts drawn without replacement; exact.

    `answers` [n]: an attempt without one does not vote, and where nobody votes the score is 0. `correct` [n]: the score of an
    answer is the mean over the attempts that gave it. A tie at the top scores the mean over the tied answers: what a fair
    coin would earn, and independent of the order of the attempts.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@k needs 1 <= k <= n, got n={len(answers)}, k={k}")
    votes: dict[str, list[float]] = {}
    names = ballots(tuple(sorted(set(answers))))
    for answer, mark in zip(answers, correct, strict=True):
        if name := names[answer]:
            votes.setdefault(name, []).append(mark)
    return _vote(tuple(sorted((len(marks), mean(marks)) for marks in votes.values())), len(answers), k)


@lru_cache(maxsize=1 << 14)
def _vote(classes: tuple[Class, ...], n: int, k: int) -> tuple[float, float]:
    """The vote by the sizes of the answers' classes.

    A draw of k of n is n independent coins of bias k / n given that k of them fall heads, so the votes of the classes are
    binomials given their sum; for each number of votes of the winners their generating function is multiplied out.
    """
    most = max((size for size, _ in classes), default=0)
    if k == n or not most:
        top = [score for size, score in classes if size == most]
        return mean(top) if top else 0.0, float(len(top) > 1)
    chances = [_won(classes, n, k, winning) for winning in range(1, min(k, most) + 1)]
    drawn = float(_chances(n, k / n)[k])
    best = max(score for _, score in classes)
    score, tie = math.fsum(score for score, _ in chances) / drawn, math.fsum(tie for _, tie in chances) / drawn
    return min(score, best), min(tie, 1.0)  # rounding may not pass what is possible


def _won(classes: tuple[Class, ...], n: int, k: int, winning: int) -> tuple[float, float]:
    """(score, tie) summed over the draws that are won with this many votes, times the probability that k coins fall heads."""
    large = [(size, score) for size, score in classes if size >= winning]
    tied = min(len(large), k // winning)
    ways = np.zeros((tied + 1, k + 1))  # of t tied classes and i votes so far
    scores = np.zeros((tied + 1, k + 1))  # the same, times the sum of the tied classes' scores
    small = _chances(n - sum(size for size, _ in large), k / n)[
        : k + 1
    ]  # cannot win: these, and those without an answer
    ways[0, : len(small)] = small
    for size, score in large:
        chances = _chances(size, k / n)
        more, gained = (_times(rows, chances[:winning]) for rows in (ways, scores))
        more[1:, winning:] += chances[winning] * ways[:-1, : k + 1 - winning]
        gained[1:, winning:] += chances[winning] * (scores + score * ways)[:-1, : k + 1 - winning]
        ways, scores = more, gained
    return float(sum(scores[t, k] / t for t in range(1, tied + 1))), float(ways[2:, k].sum())


def _times(rows: np.ndarray, polynomial: np.ndarray) -> np.ndarray:
    """Each row [t, i] of coefficients multiplied by a polynomial, cut at the same degree."""
    if len(polynomial) > 2 * len(rows):
        return np.stack([np.convolve(row, polynomial)[: rows.shape[1]] for row in rows])
    product = rows * polynomial[0]
    for i, factor in enumerate(polynomial[1 : rows.shape[1]], 1):
        product[:, i:] += factor * rows[:, :-i]
    return product


@lru_cache(maxsize=1 << 10)
def _chances(n: int, p: float) -> np.ndarray:
    """Probabilities of 0 to n heads among n coins of bias 0 < p < 1."""
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(n + 1)
    ]
    return np.exp(np.array(logs))


def between(value: Callable[[int], float], k: float) -> float:
    """A statistic of a whole number of attempts at a number between two of them: the mean of drawing one or the other."""
    low = math.floor(k)
    share = k - low
    return value(low) if share == 0 else (1 - share) * value(low) + share * value(low + 1)


def interval(values: Sequence[float], seed: int = 0, share: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean of one value a problem: percentiles of the means of resampled problems."""
    return interval_over([values], [seed], share)


def interval_over(
    sets: Sequence[Sequence[float]], seeds: Sequence[int] | None = None, share: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of the mean of several sets' means; the problems of each set are resampled by themselves."""
    if not sets or not all(sets):
        raise ValueError("an interval needs at least one problem")
    columns = [resampled(values, seed) for values, seed in zip(sets, seeds or range(len(sets)), strict=True)]
    means = np.sort(sum(columns) / len(columns))
    low = int((1 - share) / 2 * RESAMPLES)
    return float(means[low]), float(means[RESAMPLES - 1 - low])


def resampled(values: Sequence[float], seed: int) -> np.ndarray:
    """The means of resampled problems [RESAMPLES]."""
    column = np.asarray(values, dtype=np.float64)
    return column[resamples(seed, len(column))].sum(1) / len(column)


@lru_cache(maxsize=8)
def resamples(seed: int, n: int) -> np.ndarray:
    """Which n of n values, with replacement, make each resampled mean [RESAMPLES, n]; the columns of one evaluation share it."""
    drawn = random.Random(f"{seed}/interval/{n}")
    return np.array([drawn.choices(range(n), k=n) for _ in range(RESAMPLES)], dtype=np.int32)


def mean(values: Sequence[float]) -> float:
    """The mean; nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
