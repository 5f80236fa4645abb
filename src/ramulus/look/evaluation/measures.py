"""What an evaluation says: one value a problem for every measure, and their means with intervals.

Independent attempts are exchangeable, so any k of them say the same and pass@k and maj@k are averaged over all draws of k of n. The
answers of a tree share prefixes and are not: of those only the whole tree is a fair draw, so they have measures at their full number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from ramulus.look.evaluation.statistics import between, interval, mean, pass_at_k, vote

Attempt = Mapping[str, Any]
"""tokens, finish, reward, correct (None where no reward says so), verdict, and perhaps the text, of one answer."""

Row = dict[str, Any]
"""A problem: id, problem, answer; its attempts as `sampled`, `tree`, `greedy`; `tree_tokens`, those sampled for its tree."""

Columns = dict[str, list[float]]
"""Measure: one value a problem."""

ATTEMPT_KINDS = ("sampled", "tree", "greedy")
INDEPENDENT, TREE, EQUAL_TOKENS, GREEDY = "independent", "tree", "equal_tokens", "greedy"


@dataclass(frozen=True)
class Scores:
    """One set of problems: one value a problem for each measure, by how the answers were sampled."""

    ids: list[str]
    groups: dict[str, Columns]

    def of(self, ids: Sequence[str]) -> Scores:
        """The scores of some of the problems, in the given order."""
        places = {name: place for place, name in enumerate(self.ids)}
        chosen = [places[name] for name in ids]
        groups = {
            group: {name: [values[i] for i in chosen] for name, values in columns.items()}
            for group, columns in self.groups.items()
        }
        return Scores(list(ids), groups)


def scores_of(rows: Sequence[Row], ks: Sequence[int]) -> Scores:
    """Every measure of the attempts in these rows, with pass@k and maj@k for each k."""
    groups: dict[str, Columns] = {}
    trees = [row["tree"] for row in rows if row.get("tree")]
    width = min(map(len, trees)) if len(trees) == len(rows) else 0
    judged = any(attempt["correct"] is not None for row in rows for kind in ATTEMPT_KINDS for attempt in row.get(kind) or ())
    if all(row.get("sampled") for row in rows):
        samples = len(rows[0]["sampled"])
        wanted = sorted({*ks, width}) if 0 < width <= samples else ks  # what a tree is compared with
        groups[INDEPENDENT] = {f"mean@{samples}": [rate(row["sampled"]) for row in rows]} | _draws(rows, wanted) if judged else {}
        groups[INDEPENDENT] |= mean_rewards([row["sampled"] for row in rows], judged) | ends([row["sampled"] for row in rows])
    if width:
        groups[TREE] = {f"mean@{width}": [rate(tree) for tree in trees]} if judged else {}
        if judged:
            groups[TREE][f"pass@{width}"] = [max(mark(attempt) for attempt in tree) for tree in trees]
        if judged and voting(trees):
            groups[TREE] |= votes(f"{width}", [polled(tree, len(tree)) for tree in trees])
        groups[TREE] |= mean_rewards(trees, judged) | ends(trees) | {"tokens": [float(row["tree_tokens"]) for row in rows]}
    if judged and INDEPENDENT in groups and TREE in groups:
        groups[EQUAL_TOKENS] = equal_tokens(rows)
    if all(row.get("greedy") for row in rows):
        once = [row["greedy"] for row in rows]
        groups[GREEDY] = {"greedy": [rate(attempts) for attempts in once]} if judged else {}
        groups[GREEDY] |= mean_rewards(once, judged) | ends(once)
    return Scores([row["id"] for row in rows], groups)


def _draws(rows: Sequence[Row], ks: Sequence[int]) -> Columns:
    """pass@k and, where the grader says what was answered, maj@k and the probability of a tie, of independent attempts."""
    columns: Columns = {}
    attempts = [row["sampled"] for row in rows]
    for k in ks:
        columns[f"pass@{k}"] = [passed(given, k) for given in attempts]
    for k in ks if voting(attempts) else ():
        columns |= votes(f"{k}", [polled(given, k) for given in attempts])
    return columns


def equal_tokens(rows: Sequence[Row]) -> Columns:
    """Independent attempts at the price of each problem's tree.

    A tree of T sampled tokens pays for T / (mean length) attempts, at least 1 and at most all there are; between two whole numbers
    the measures are interpolated. Taking attempts one after another until T is used up would favour short ones.
    """
    prices = [row["tree_tokens"] / max(fmean(attempt["tokens"] for attempt in row["sampled"]), 1e-9) for row in rows]
    paid = [min(max(price, 1.0), float(len(row["sampled"]))) for price, row in zip(prices, rows)]
    columns = {
        "attempts": paid,
        "short": [float(price > len(row["sampled"])) for price, row in zip(prices, rows)],
        "mean": [rate(row["sampled"]) for row in rows],
        "pass": [between(partial(passed, row["sampled"]), m) for row, m in zip(rows, paid)],
    }
    if voting([row["sampled"] for row in rows]):
        columns["maj"] = [between(partial(elected, row["sampled"]), m) for row, m in zip(rows, paid)]
    return columns


def mean_rewards(attempts: Sequence[Sequence[Attempt]], judged: bool) -> Columns:
    """The mean reward, where it says anything beyond what is correct, or nothing is `judged` to be."""
    known = [[attempt for attempt in given if attempt["reward"] is not None] for given in attempts]
    if not all(known) or (judged and all(attempt["reward"] == mark(attempt) for given in known for attempt in given)):
        return {}
    return {"reward": [fmean(attempt["reward"] for attempt in given) for given in known]}


def ends(attempts: Sequence[Sequence[Attempt]]) -> Columns:
    """Mean length in tokens, share cut off at the limit and, where the grader says so, share without an answer."""
    columns = {
        "length": [fmean(attempt["tokens"] for attempt in given) for given in attempts],
        "truncated": [fmean(attempt["finish"] == "length" for attempt in given) for given in attempts],
    }
    if voting(attempts):
        columns["unanswered"] = [fmean(not answer(attempt) for attempt in given) for given in attempts]
    return columns


def votes(k: str, outcomes: Sequence[tuple[float, float]]) -> Columns:
    """The columns of a vote: its score, and the share of problems (or of draws) in which the top is tied."""
    return {f"maj@{k}": [score for score, _ in outcomes], f"ties@{k}": [tie for _, tie in outcomes]}


def polled(attempts: Sequence[Attempt], k: int) -> tuple[float, float]:
    """Score and probability of a tie of the vote of k of these attempts."""
    return vote([answer(attempt) for attempt in attempts], [mark(attempt) for attempt in attempts], k)


def elected(attempts: Sequence[Attempt], k: int) -> float:
    """maj@k of independent attempts."""
    return polled(attempts, k)[0]


def passed(attempts: Sequence[Attempt], k: int) -> float:
    """pass@k of independent attempts."""
    return pass_at_k(len(attempts), sum(mark(attempt) > 0 for attempt in attempts), k)


def rate(attempts: Sequence[Attempt]) -> float:
    """Share of these attempts that is correct."""
    return mean([mark(attempt) for attempt in attempts])


def mark(attempt: Attempt) -> float:
    """Whether an attempt is correct; one of which no reward says so, where it says it of others, is not."""
    return float(attempt["correct"] or 0.0)


def answer(attempt: Attempt) -> str:
    """What the grader took for the answer; "" where there is none."""
    return str(attempt["verdict"].get("answer", ""))


def voting(attempts: Sequence[Sequence[Attempt]]) -> bool:
    """Whether the grader says what was answered, without which nobody can vote."""
    return any("answer" in attempt["verdict"] for given in attempts for attempt in given)


def summary(columns: Columns, seed: int = 0) -> dict[str, Any]:
    """The means, and their 95 % bootstrap intervals over problems as `intervals`."""
    means: dict[str, Any] = {name: mean(values) for name, values in columns.items()}
    return means | {"intervals": {name: interval(values, seed) for name, values in columns.items()}}


def report_of(scores: Scores, rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers of one set as plain JSON: independent and greedy at the top, `tree` and `equal_tokens` below, without the answers."""
    groups = scores.groups
    cold = groups.get(GREEDY, {})
    top = groups.get(INDEPENDENT) or {k: v for k, v in cold.items() if k != "greedy"}
    named = {"greedy": "greedy", "reward": "greedy_reward"}
    report = summary(top | {named[name]: values for name, values in cold.items() if name in named})
    given = [
        attempt["reward"]
        for row in rows
        for attempt in row.get("sampled") or row.get("tree") or row["greedy"]
        if attempt["reward"] is not None
    ]
    report["reward"] = mean(given)
    for group in (TREE, EQUAL_TOKENS):
        if group in groups:
            report[group] = summary(groups[group])
    return report
