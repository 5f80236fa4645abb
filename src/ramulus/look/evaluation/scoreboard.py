"""The results of an evaluation as tables for a terminal and as rows for a spreadsheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.table import Table

from ramulus.look.evaluation.measures import EQUAL_TOKENS, GREEDY, INDEPENDENT, TREE, Columns, Scores
from ramulus.look.evaluation.paired import PairedDifference
from ramulus.look.evaluation.statistics import interval_over, mean
from ramulus.look.spreadsheet import csv_of
from ramulus.look.terminal import safe

_COUNTS = ("length", "tokens", "attempts")  # not shares
_ABOUT = {
    "length": "response tokens",
    "reward": "mean reward",
    "truncated": "cut off at the limit",
    "unanswered": "without an answer",
    "tokens": "tokens sampled for a tree",
    "attempts": "attempts that cost as much",
    "short": "problems with too few of them",
    "pass": "pass, any of them",
    "maj": "maj, their vote",
}
HEADINGS: dict[str, str] = {
    INDEPENDENT: "independent",
    TREE: "trees",
    EQUAL_TOKENS: "independent, at the tokens of the trees",
    GREEDY: "greedy",
}
FEW = 20  # problems
FIRST, COLUMN = 38, 17  # characters of the first column and of each other one, about
_Row = Callable[[str, Sequence[Sequence[float]]], Sequence[str]]
"""(measure, its column in each set) -> the cells beside its name."""


def _label(group: str, name: str) -> str:
    """What a table calls a measure, and how its answers were sampled where that is greedily."""
    what, _, k = name.partition("@")
    if what == "mean" and k:
        text = f"mean@{k} (avg@{k})"
    elif what == "ties":
        text = f"  ties of maj@{k}"
    else:
        text = _ABOUT.get(name, name)
    return f"greedy, {text}" if group == GREEDY and name != "greedy" else text


def shown_number(name: str, value: float, sign: str = "") -> str:
    """A value: a share in per cent, a reward, or a count."""
    if name.endswith("reward"):
        return f"{value:{sign}.3f}"
    return f"{value:{sign}.1f}" if name in _COUNTS else f"{100 * value:{sign}.1f}"


def sections(sets: Sequence[Scores]) -> list[tuple[str, list[str]]]:
    """The groups and measures that every set has, in the order of the table."""
    groups = [group for group in (INDEPENDENT, GREEDY, TREE, EQUAL_TOKENS) if all(group in s.groups for s in sets)]
    return [
        (group, [name for name in sets[0].groups[group] if all(name in s.groups[group] for s in sets)])
        for group in groups
    ]


def boards(titles: Sequence[str], sets: Sequence[Scores], about: str, width: int) -> list[Table]:
    """All sets side by side, and the mean over them where there are several; more than one table where they do not fit."""
    if len(sets) == 1:
        title = f"{titles[0]}: {len(sets[0].ids)} problems, {about}"
        return [board(title, ("", "95 % interval"), sets, cells)]
    heads = [*titles, "mean over sets"]
    most = max(1, (width - FIRST) // COLUMN)
    tables = []
    for start in range(0, len(heads), most):
        place = slice(start, start + most)
        title = f"{len(sets)} sets of problems, {about}" if start == 0 else ""
        tables.append(board(title, heads[place], sets, partial(halves, place=place)))
    return tables


def board(title: str, heads: Sequence[str], sets: Sequence[Scores], row: _Row) -> Table:
    """One table; `row` says what stands in it of one measure."""
    table = Table(title=safe(title) or None, title_justify="left", title_style="bold")
    table.add_column("shares in %")
    for head in heads:
        table.add_column(safe(head), justify="right")
    for group, names in sections(sets):
        if group in (TREE, EQUAL_TOKENS):
            table.add_section()
            table.add_row(f"[bold]{HEADINGS[group]}[/bold]")
        for name in names:
            beside = group == GREEDY and name != "greedy" and INDEPENDENT in sets[0].groups
            if name != "ties@1" and not beside:
                table.add_row(_label(group, name), *row(name, [scores.groups[group][name] for scores in sets]))
    return table


def cells(name: str, columns: Sequence[Sequence[float]]) -> list[str]:
    """Value and interval of the only set."""
    low, high = interval_over(columns)
    return [shown_number(name, mean(columns[0])), f"{shown_number(name, low)} to {shown_number(name, high)}"]


def halves(name: str, columns: Sequence[Sequence[float]], place: slice) -> list[str]:
    """Each set, then the mean over them, with half an interval; those at `place` of the row."""
    return [about_half(name, some) for some in [*([column] for column in columns), columns][place]]


def about_half(name: str, columns: Sequence[Sequence[float]]) -> str:
    """The mean over sets, with half the width of its interval."""
    low, high = interval_over(columns)
    return f"{shown_number(name, mean([mean(column) for column in columns]))} ± {shown_number(name, (high - low) / 2)}"


def differences_table(title: str, differences: Mapping[str, Mapping[str, PairedDifference]], this: str, other: str) -> Table:
    """Paired differences, and which of them are within noise."""
    table = Table(title=safe(title), title_justify="left", title_style="bold")
    table.add_column("shares in %")
    for head in (this, other, "difference", "95 % interval", ""):
        table.add_column(safe(head), justify="right")
    for group, measures in differences.items():
        if len(differences) > 1:
            table.add_section()
            table.add_row(f"[bold]{HEADINGS.get(group, group)}[/bold]")
        for name, gap in measures.items():
            if name.startswith("ties"):
                continue
            low, high = (shown_number(name, end, "+") for end in gap["interval"])
            values = (shown_number(name, gap["this"]), shown_number(name, gap["other"]), shown_number(name, gap["difference"], "+"))
            table.add_row(_label(group, name), *values, f"{low} to {high}", "within noise" if gap["within_noise"] else "")
    return table


def note(sets: Sequence[Scores]) -> str:
    """What the reader of a table must know, or nothing."""
    fewest = min(len(scores.ids) for scores in sets)
    return f"{fewest} problems are few: the intervals are rough, and rather too narrow" if fewest < FEW else ""


def overall(sets: Sequence[Scores]) -> dict[str, dict[str, Any]]:
    """The mean over sets of each measure with its interval, by how the answers were sampled."""
    groups: dict[str, dict[str, Any]] = {}
    for group, names in sections(sets):
        columns = {name: [scores.groups[group][name] for scores in sets] for name in names}
        means: dict[str, Any] = {name: mean([mean(values) for values in some]) for name, some in columns.items()}
        groups[group] = means | {"intervals": {name: interval_over(some) for name, some in columns.items()}}
    return groups


def results_csv(
    titles: Sequence[str], sets: Sequence[Scores], gaps: Mapping[str, Mapping[str, Mapping[str, PairedDifference]]]
) -> str:
    """A line for each measure of each set, then for each paired difference, by what was compared."""
    lines: list[Sequence[Any]] = [("tasks", "problems", "sampling", "measure", "value", "low", "high", "within_noise")]
    for title, scores in zip(titles, sets, strict=True):
        for group, columns in scores.groups.items():
            for name, values in columns.items():
                lines.append((title, len(values), group, name, mean(values), *interval_over([values]), ""))
    for group, means in overall(sets).items() if len(sets) > 1 else ():
        for name, ends in means.pop("intervals").items():
            lines.append(("mean over sets", sum(len(s.ids) for s in sets), group, name, means[name], *ends, ""))
    for title, compared in gaps.items():
        for group, measures in compared.items():
            for name, gap in measures.items():
                lines.append((title, "", group, name, gap["difference"], *gap["interval"], gap["within_noise"]))
    return csv_of(lines)


def problems_csv(titles: Sequence[str], sets: Sequence[Scores]) -> str:
    """A line for each problem with all its measures."""
    names = list(
        dict.fromkeys(f"{group}: {name}" for s in sets for group, columns in s.groups.items() for name in columns)
    )
    lines: list[Sequence[Any]] = [("tasks", "problem", *names)]
    for title, scores in zip(titles, sets, strict=True):
        flat: Columns = {
            f"{group}: {name}": x for group, columns in scores.groups.items() for name, x in columns.items()
        }
        lines += [
            (title, problem, *(flat[name][i] if name in flat else "" for name in names))
            for i, problem in enumerate(scores.ids)
        ]
    return csv_of(lines)
