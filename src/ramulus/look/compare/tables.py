"""A comparison as tables for a terminal, as CSV, as LaTeX and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ramulus.look.compare.compare import Axis, Comparison, Difference, Estimate, Place
from ramulus.look.curves import AXES
from ramulus.look.spreadsheet import csv_of
from ramulus.look.terminal import new_console, safe, unbroken

EARLY = 0.9  # a value that was measured before this share of the budget is pointed out
SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def publish(
    comparison: Comparison, console: Console, csv: Path | None, latex: Path | None, json: Path | None, plots: Path | None
) -> None:  # fmt: skip
    """Show a comparison, and write it wherever it is wanted."""
    wide = console if console.is_terminal else new_console(file=console.file, width=240)
    for part in tables(comparison, wide.width):
        wide.print(part, highlight=False)
    for line in (_rules(comparison), *comparison.notes, *noise_notes(comparison)):
        console.print(f"- {safe(line)}", highlight=False, soft_wrap=True)
    writers: list[tuple[Path | None, Callable[[Comparison], str]]] = [
        (csv, csv_text),
        (latex, latex_text),
        (json, json_text),
    ]
    for path, text in writers:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(comparison), encoding="utf-8")
    if plots is not None:
        from ramulus.look.compare.plots import draw_plots

        for path in draw_plots(comparison, plots):
            console.out(f"drawn: {path}", highlight=False)


def tables(comparison: Comparison, width: int = 240) -> Iterator[Table]:
    """One table for every axis, or two where one would be too wide."""
    for axis in comparison.axes:
        heading = safe(f"{comparison.metric} at equal {title(axis)}")
        columns = _columns_of(comparison, axis)
        needed = sum(max(len(line) for cell in column for line in cell.split("\n")) + 2 for column in columns)
        cut = len(axis.budgets) + 2
        parts = [columns] if needed <= width else [columns[:cut], columns[:1] + columns[cut:]]
        for i, part in enumerate(parts):
            table = Table(
                box=SIMPLE_HEAD, title="" if i else heading, title_justify="left", title_style="bold", padding=(0, 1, 0, 0)
            )
            table.pad_edge = False
            for column in part:
                words = column is columns[0] or (column is columns[-1] and comparison.baseline is not None)
                table.add_column(column[0], justify="left" if words else "right", overflow="fold")
            for row in zip(*(column[1:] for column in part)):
                table.add_row(*row)
            yield table


def _columns_of(comparison: Comparison, axis: Axis) -> list[list[str]]:
    """The columns of an axis, each with its head: label, seeds, one for each budget, when measured, and the difference."""
    labels, last = list(comparison.groups), axis.budgets[-1]
    columns = [["", *map(safe, labels)], ["seeds", *(str(len(comparison.groups[label])) for label in labels)]]
    for budget in axis.budgets:
        head = f"{budget.fraction:.4g}\n{count(budget.amount)}"
        columns.append([head, *(_spoken(place.estimate) for place in budget.places)])
    columns += map(list, zip(("measured\nat", "next\nvalue"), *map(when, last.places)))
    if comparison.baseline is not None:
        heads = (f"minus {safe(comparison.baseline)}\nat {last.fraction:.4g}", "")
        columns += map(list, zip(heads, *(gap(place, comparison.baseline) for place in last.places)))
    return columns


def when(place: Place) -> list[str]:
    """How much of the budget had been spent at a value, and the next value with the same, in two cells."""
    measured = "-" if place.measured is None else f"{place.measured:.2f}"
    after = "" if place.next_at is None else f"{_number(fmean(list(place.later.values())))} at {place.next_at:.2f}"
    return [measured, after]


def title(axis: Axis) -> str:
    """What is equal, up to how much."""
    return f"{AXES[axis.name]}; all reach {count(axis.budgets[-1].amount / axis.budgets[-1].fraction)} ({axis.limit} no more)"


def place_of(places: tuple[Place, ...], label: str) -> Place:
    return next(place for place in places if place.label == label)


def gap(place: Place, baseline: str) -> list[str]:
    """The difference to the baseline and what it means, in two cells."""
    if place.label == baseline:
        return ["", "baseline"]
    if place.difference is None:
        return ["-", "no value"]
    return [_spoken(place.difference.estimate, sign=True), place.difference.verdict]


def _spoken(value: Estimate | None, sign: bool = False, between: str = "±") -> str:
    """A mean with half its interval."""
    if value is None:
        return "-"
    if value.half is None:
        return _number(value.mean, sign)
    size = max(abs(value.mean), value.half)
    return _number(value.mean, sign, size) + between + _number(value.half, size=size)


def _number(value: float, sign: bool = False, size: float | None = None) -> str:
    """Three decimals where the size, by default its own, is a usual one, three digits elsewhere."""
    size = abs(value) if size is None else size
    return format(value, ("+" if sign else "") + (".3f" if size == 0 or 0.0005 <= size < 1000 else ".2e"))


def count(value: float) -> str:
    """An amount in full, rounded down so that no more is promised than there was."""
    return f"{int(value):,}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _rules(comparison: Comparison) -> str:
    """How the numbers of a comparison were made, in a sentence."""
    slack = f", or up to {comparison.slack:.4g} of it after it" if comparison.slack else ""
    return (
        f"mean ± half the 95 % t interval over seeds; the value at a budget is the last one measured at or before it{slack}, "
        "and there is none (-) until every seed has one"
    )


def noise_notes(comparison: Comparison) -> list[str]:
    """Which values were measured too early, what the verdicts mean, and how many of them chance alone would bring."""
    ends = [
        (axis, place) for axis in comparison.axes for place in axis.budgets[-1].places if place.measured is not None
    ]
    early = [(place.measured, place.label, AXES[axis.name]) for axis, place in ends if (place.measured or 0) < EARLY]
    notes = []
    if early:
        share, label, what = min(early)
        notes.append(
            f"{len(early)} of {len(ends)} values were measured before {EARLY} of the budget (the earliest: {label}, at {share:.2f} of "
            f"the {what}), so they lag: see `measured at` and the next value; more evaluations bring them closer"
        )
    others = len(comparison.groups) - 1
    if comparison.baseline is not None:
        chance = (
            f"; of {others} such differences in a table, chance alone makes about {others / 20:.1g}"
            if others > 1
            else ""
        )
        if any("unsure" in row["verdict"] for row in _rows(comparison) if row["verdict"]):
            notes.append(
                "unsure: somewhere between the values before and after the budget the difference could be within noise"
            )
        notes.append(
            f"differences to {comparison.baseline} are paired by seed; within noise: their 95 % t interval holds 0{chance}"
        )
    return notes


def _rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """One flat row for every label at every budget of every axis."""
    for axis in comparison.axes:
        for budget in axis.budgets:
            for place in budget.places:
                estimate, n = place.estimate, len(comparison.groups[place.label])
                compared = place.difference or Difference(0, None)
                yield (
                    {
                        "metric": comparison.metric,
                        "axis": axis.name,
                        "fraction": budget.fraction,
                        "budget": budget.amount,
                    }
                    | {"label": place.label, "seeds": n, "measured_at": place.measured}
                    | {
                        "next_at": place.next_at,
                        "next_mean": fmean(list(place.later.values())) if place.next_at else None,
                    }
                    | bounds(estimate, "mean", "low", "high")
                    | {"baseline": comparison.baseline, "pairs": compared.pairs}
                    | bounds(compared.estimate, "difference", "difference_low", "difference_high")
                    | {"verdict": compared.verdict if place.difference else None}
                )


def bounds(value: Estimate | None, mean: str, low: str, high: str) -> dict[str, float | None]:
    """Mean and interval under these names; None for what there is not."""
    if value is None or value.half is None:
        return {mean: value.mean if value else None, low: None, high: None}
    return {mean: value.mean, low: value.mean - value.half, high: value.mean + value.half}


def csv_text(comparison: Comparison) -> str:
    """A head, and a line for every label at every budget of every axis."""
    records = list(_rows(comparison))
    return csv_of([list(records[0]) if records else ["metric"], *(list(row.values()) for row in records)])


def json_text(comparison: Comparison) -> str:
    """Everything: every row of the CSV, the value of every seed, the curves, the notes."""
    seeds = {
        axis.name: [{place.label: place.values for place in budget.places} for budget in axis.budgets]
        for axis in comparison.axes
    }
    curves = [
        {"label": label, "seed": curve.run.seed, "folder": str(curve.run.folder), "finished": curve.run.finished}
        | {"steps": curve.steps, "values": curve.values, "costs": curve.costs, "totals": curve.totals}
        for label, group in comparison.groups.items()
        for curve in group
    ]
    notes = [_rules(comparison), *comparison.notes, *noise_notes(comparison)]
    content = {
        "metric": comparison.metric,
        "baseline": comparison.baseline,
        "notes": notes,
        "rows": list(_rows(comparison)),
    }
    limits = {axis.name: axis.limit for axis in comparison.axes}
    return json.dumps(content | {"limits": limits, "values": seeds, "curves": curves}, indent=1) + "\n"


def latex_text(comparison: Comparison) -> str:
    """One tabular for every axis; needs \\usepackage{booktabs}."""
    parts = ["% needs \\usepackage{booktabs}; ± is half the 95 % t interval over seeds"]
    for axis in comparison.axes:
        heads = [
            r"\shortstack{" + f"{budget.fraction:.4g}" + r"\\" + count(budget.amount) + "}" for budget in axis.budgets
        ]
        ends = [f"minus {latex(comparison.baseline)}", ""] if comparison.baseline is not None else []
        lines = [f"% {latex(comparison.metric)} at equal {latex(title(axis))}"]
        lines += [r"\begin{tabular}{lr" + "r" * len(heads) + ("rl" if ends else "") + "}", r"\toprule"]
        lines += [" & ".join(["", "seeds", *heads, *ends]) + r" \\", r"\midrule"]
        lines += [" & ".join(latex_row(comparison, axis, label)) + r" \\" for label in comparison.groups]
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def latex_row(comparison: Comparison, axis: Axis, label: str) -> list[str]:
    """The cells of a label."""
    places = [place_of(budget.places, label) for budget in axis.budgets]
    cells = [latex(label), str(len(comparison.groups[label])), *(formula(place.estimate) for place in places)]
    if comparison.baseline is None:
        return cells
    _, verdict = gap(places[-1], comparison.baseline)
    compared = places[-1].difference
    return [*cells, formula(compared.estimate, sign=True) if compared else "", verdict]


def formula(value: Estimate | None, sign: bool = False) -> str:
    """A mean with half its interval, in mathematics."""
    return "--" if value is None else "$" + _spoken(value, sign, between=r" \pm ") + "$"


def latex(text: str | None) -> str:
    """Text as LaTeX shows it, on one line."""
    return "".join(SPECIAL.get(c, c) for c in unbroken(text or ""))
