"""Two evaluations of the same problems, problem by problem: differences with intervals, and which are within noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import variance
from typing import Any

from ramulus.look.evaluation.measures import EQUAL_TOKENS, INDEPENDENT, TREE, Columns, Row, Scores, scores_of
from ramulus.look.evaluation.statistics import interval_over, mean

FEWEST = 6  # problems that must differ: five that all went one way do so by chance one time in 16 (sign test)
PairedDifference = dict[str, Any]
"""this, other, difference, its 95 % interval, within_noise; of the means over one or several sets of problems."""


def difference(this: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> PairedDifference:
    """The mean over sets of paired differences; the problems of each set are resampled in pairs.

    Within noise: the 95 % interval holds 0, or the difference is less than 1.96 standard errors (a bootstrap is too narrow where
    few problems differ), or fewer than FEWEST problems differ.
    """
    gaps = [[a - b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in zip(this, other, strict=True)]
    low, high = interval_over(gaps)
    means = {"this": mean([mean(values) for values in this]), "other": mean([mean(values) for values in other])}
    gap = mean([mean(values) for values in gaps])
    moved = sum(value != 0 for values in gaps for value in values)
    noise = low <= 0 <= high or abs(gap) < 1.96 * error(gaps) or moved < FEWEST
    return means | {"difference": gap, "interval": (low, high), "within_noise": noise}


def error(sets: Sequence[Sequence[float]]) -> float:
    """The standard error of the mean of several sets' means; a set of one problem adds nothing."""
    return math.sqrt(math.fsum(variance(values) / len(values) for values in sets if len(values) > 1)) / len(sets)


def _differences(pairs: Sequence[tuple[Columns, Columns]]) -> dict[str, PairedDifference]:
    """The difference of every measure that all of these pairs of columns have; one pair a set of problems."""
    shared = [name for name in pairs[0][0] if all(name in mine and name in theirs for mine, theirs in pairs)]
    return {name: difference([a[name] for a, _ in pairs], [b[name] for _, b in pairs]) for name in shared}


def tree_gains(sets: Sequence[Scores]) -> dict[str, dict[str, PairedDifference]]:
    """What trees gain over independent attempts: at as many answers, and at as many sampled tokens."""
    if not all(EQUAL_TOKENS in scores.groups for scores in sets):
        return {}
    answers, tokens = [], []
    for scores in sets:
        tree, lone, paid = (scores.groups[group] for group in (TREE, INDEPENDENT, EQUAL_TOKENS))
        answers.append((_plain(tree, keep=True), _plain(lone, keep=True)))
        tokens.append((_plain(tree), paid))
    return {"at equal answers": _differences(answers), "at equal tokens": _differences(tokens)}


def _plain(columns: Columns, keep: bool = False) -> Columns:
    """The columns with mean@n as mean, since any number of attempts estimates it; also pass@n and maj@n as pass and maj unless `keep`."""
    return {name.split("@")[0] if name.startswith("mean@") or not keep else name: x for name, x in columns.items()}


def against(this: Sequence[Row], other: Sequence[Row], ks: Sequence[int]) -> tuple[Scores, Scores]:
    """Both evaluations of the problems that they share, in the same order, with pass@k and maj@k for each k that both can tell.

    Raises ValueError where they share none, or mean other problems by the same ids.
    """
    known = {row["id"]: row for row in other}
    shared = [(row, known[row["id"]]) for row in this if row["id"] in known]
    if not shared:
        raise ValueError(f"no problem is in both: here is {this[0]['id']!r}, there {other[0]['id']!r}")
    for row, twin in shared:
        if (row["problem"], row["answer"]) != (twin["problem"], twin["answer"]):
            raise ValueError(f"{row['id']!r} is another problem there: name an evaluation of the same problems")
    both = [[pair[i] for pair in shared] for i in (0, 1)]
    fewest = min(len(row.get("sampled") or ()) for rows in both for row in rows)
    mine, theirs = (scores_of(rows, [k for k in ks if k <= fewest]) for rows in both)
    return mine, theirs


def compared(pairs: Sequence[tuple[Scores, Scores]]) -> dict[str, dict[str, PairedDifference]]:
    """The differences between two evaluations of one or several sets, by how the answers were sampled."""
    groups = [
        group
        for group in pairs[0][0].groups
        if group != EQUAL_TOKENS and all(group in a.groups and group in b.groups for a, b in pairs)
    ]
    return {
        group: _differences([(_plain(a.groups[group], True), _plain(b.groups[group], True)) for a, b in pairs])
        for group in groups
    }
