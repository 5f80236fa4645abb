"""The statement of account of a run: read from its folder, as tables, JSON and CSV."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ramulus.core.run_folder import WHEN, final_evaluation, stage_folders
from ramulus.look.cost.account import FATES, PHASES, PREFIXES, SOURCES, UPDATES, account, added, share
from ramulus.look.curves import flat, load_json, rows, runs_in
from ramulus.look.spreadsheet import csv_of
from ramulus.look.terminal import safe, styled

Account = dict[str, Any]
WHOLE = "run"  # the column of all stages together
ALWAYS = {"sampled", *FATES, "step", "total"}  # lines that are told even where they are 0
UNKNOWN = "?"
_STEPS = (
    "sampled", "reused", "expert", "trained", "idle_tokens", "excluded", "pruned", "dropped_tokens", "prefilled", "paths", "correct",
)  # fmt: skip
SPENT = {"s sampling": "grow", "s grading": "grade", "s update": "update", "s idle": "idle"}


@dataclass(frozen=True)
class Statement:
    """One run: the rows of each of its stages, and the seconds of its final evaluations, which are in no step."""

    folder: Path
    stages: dict[str, list[dict[str, Any]]]
    evaluations: float

    def accounts(self) -> dict[str, Account]:
        """The account of each stage, and of the run where it has several."""
        accounts = {name: account(rows) for name, rows in self.stages.items()}
        return (
            accounts if len(accounts) == 1 else accounts | {WHOLE: account([row for rows in self.stages.values() for row in rows])}
        )

    def to_json(self, steps: bool) -> dict[str, Any]:
        """All of it as plain JSON; with `steps` also the account of every step of each stage."""
        content = {"run": str(self.folder), "accounts": self.accounts(), "final_evaluation_seconds": self.evaluations}
        each = {name: [{"step": row["step"], **account([row])} for row in rows] for name, rows in self.stages.items()}
        return content | ({"steps": each} if steps else {})


def read_statement(folder: Path) -> Statement:
    """The metrics of a run's folder, or of the folder of one stage; a stage that has not made a step is left out."""
    folders = [folder] if (folder / "metrics.jsonl").is_file() else stage_folders(folder)
    stages = {path.resolve().name: read for path in folders if (read := rows(path / "metrics.jsonl"))}
    evaluations = [load_json(final_evaluation(path, when)) for path in folders for when in WHEN]
    return Statement(folder, stages, sum(evaluation.get("seconds", 0.0) for evaluation in evaluations))


def read_statements(folders: Sequence[Path]) -> list[Statement]:
    """The statements of several runs, and of all runs in a folder of runs; a warning names those that have not made a step.

    Raises ValueError for no folder at all, FileNotFoundError for one without a step.
    """
    if not folders:
        raise ValueError("name the folder of a run, or of runs: ramulus ledger runs/mine")
    statements: dict[Path, Statement] = {}
    for folder in folders:
        inside = [read_statement(path) for path in (runs_in(folder) if folder.is_dir() else ())]
        begun = {statement.folder.resolve(): statement for statement in inside if statement.stages}
        if not begun:
            raise FileNotFoundError(
                f"{folder} holds no metrics.jsonl with a step in it, nor does a folder in it: "
                "give the folder of a run, of one of its stages, or of several runs"
            )
        if silent := [str(statement.folder) for statement in inside if not statement.stages]:
            warnings.warn(f"left out, without a step so far: {', '.join(silent)}", stacklevel=2)
        statements |= begun
    return list(statements.values())


def statement_tables(statement: Statement) -> Iterator[str | Table]:
    """Headings and tables for a terminal; lines that are 0 everywhere are left out."""
    accounts = statement.accounts()
    last = accounts.get(WHOLE) or next(iter(accounts.values()))
    yield f"{styled('bold', str(statement.folder))}  {headline(last)}"
    for title, group, names in (
        ("tokens by source", "tokens", SOURCES),
        ("sampled tokens by fate", "tokens", FATES),
        ("tokens of the update", "tokens", UPDATES),
        ("tokens of prefixes", "tokens", PREFIXES),
        ("seconds", "seconds", phases(last)),
    ):
        yield _table(title, group, names, accounts)
    yield footing(last, statement.evaluations)


def phases(totals: Account) -> dict[str, str]:
    """The lines of the table of seconds."""
    others = {name: name for name in totals["seconds"] if name not in (*PHASES, "step", "eval", "total")}
    return PHASES | others | {"step": "all steps", "eval": "evaluation", "total": "steps and evaluation"}


def _table(title: str, group: str, names: Mapping[str, str], accounts: Mapping[str, Account]) -> Table:
    """A line for each name: totals of every stage and, last, of the run; then the run's for each step and correct answer, and a share."""
    table = Table(box=None, pad_edge=False)
    table.add_column(title, style="bold")  # the only one that gives way on a narrow terminal
    for heading in (*accounts, "per step", "per correct", "share"):
        table.add_column(safe(heading), justify="right", no_wrap=True)
    digits, last = 2 * (group == "seconds"), list(accounts.values())[-1]
    for name, words in names.items():
        values = [totals[group].get(name) for totals in accounts.values()]
        if name not in ALWAYS and not any(value is None or value for value in values):
            continue
        each = share(values[-1], last["steps"]), share(values[-1], last["answers"]["correct"])
        cells = [_number(value, digits) for value in values]
        cells += [_number(each[0], digits + 1), _number(each[1], digits + 2)]
        table.add_row(words, *cells, _percent(share(values[-1], base(name, last))))
    return table


def base(name: str, totals: Account) -> float | None:
    """What a line is a share of; None where it is of nothing."""
    tokens, seconds = totals["tokens"], totals["seconds"]
    if name in FATES:
        return tokens["sampled"]
    if name in ("repeated", "zero_credit"):
        return tokens["trained"]
    if name in PREFIXES:
        return added([tokens["prefilled"], tokens["prefix_reused"]])
    return seconds["step"] if name in seconds and name not in ("eval", "total") else None


def headline(totals: Account) -> str:
    """What the run was, in a line."""
    answers = {name: _number(value) for name, value in totals["answers"].items()}
    right = f", {answers['correct']} of {answers['graded']} graded ones correct" if totals["answers"]["paths"] else ""
    return f"{totals['steps']:,} steps, {answers['trees']} trees ({answers['dropped']} dropped), {answers['paths']} paths{right}"


def footing(totals: Account, evaluations: float) -> str:
    """Ratios and the machine, in a few lines."""
    ratios, machine = totals["ratios"], totals["machine"]
    lines = [
        f"reuse: {_number(ratios['reuse'], 2)} trajectory tokens for each sampled one, {_number(ratios['update_reuse'], 2)} flattened tokens for "
        f"each packed one, {_percent(ratios['kv_reuse']) or UNKNOWN} of prefix tokens from the KV memory"
    ]
    known = [f"processor {machine['cpu_seconds']:,.1f} s"] if machine["cpu_seconds"] is not None else []
    for name, words in (("peak_rss", "peak memory"), ("peak_gpu", "peak memory of the GPU")):
        known += [f"{words} {machine[name] / 2**20:,.0f} MiB"] if machine[name] else []
    known += [f"GPU busy {_percent(machine['gpu_busy'])}"] if machine["gpu_busy"] is not None else []
    known += [f"final evaluations, in no step, {evaluations:,.1f} s"] if evaluations else []
    return "\n".join([*lines, *([", ".join(known)] if known else [])]) + "\n"


def step_tables(statement: Statement) -> Iterator[str | Table]:
    """A table for each stage with a line for each step."""
    for stage, steps in statement.stages.items():
        table = Table(box=None, pad_edge=False, title=safe(stage), title_justify="left")
        for heading in ("step", *_STEPS, *SPENT, "s other", "s step"):
            table.add_column(heading.removesuffix("_tokens"), justify="right", no_wrap=True)
        for row in steps:
            totals = account([row])
            counts = totals["tokens"] | totals["answers"]
            spent = [totals["seconds"].get(name) for name in (*SPENT.values(), "step")]
            other = spent[-1] - sum(s or 0.0 for s in spent[:-1]) if spent[-1] is not None else None
            cells = [_number(counts[name]) for name in _STEPS] + [_number(s, 3) for s in (*spent[:-1], other, spent[-1])]
            table.add_row(str(row["step"]), *cells)
        yield table


def _number(value: float | None, digits: int = 0) -> str:
    """A number for a table."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    """A share for a table; nothing where it is unknown."""
    return "" if value is None else f"{value:.1%}"


def write_csv(path: Path, statements: Sequence[Statement], steps: bool) -> None:
    """A line for each run and stage, and for each step with `steps`; what is unknown is left empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for statement in statements:
        content = statement.to_json(steps)
        lines += [{"run": content["run"], "stage": name} | flat(each) for name, each in content["accounts"].items()]
        for name, each in content.get("steps", {}).items():
            lines += [{"run": content["run"], "stage": name} | flat(row) for row in each]
    names = list(dict.fromkeys(name for line in lines for name in line))
    names.insert(2, names.pop(names.index("step"))) if "step" in names else None
    path.write_text(csv_of([names, *([line.get(name) for name in names] for line in lines)]), encoding="utf-8", newline="")


def write_json(path: Path, statements: Sequence[Statement], steps: bool) -> None:
    """The accounts of all runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": [statement.to_json(steps) for statement in statements]}, indent=1))
