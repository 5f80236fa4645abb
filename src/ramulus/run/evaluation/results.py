"""What came of an evaluation: tables for people, JSON and CSV for programs, the comparison with another one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ramulus.core.json_object import finite_text
from ramulus.look.evaluation.measures import Row, Scores, report_of, scores_of
from ramulus.look.evaluation.paired import against, compared, tree_gains
from ramulus.look.evaluation.scoreboard import boards, differences_table, note, overall, problems_csv, results_csv
from ramulus.look.terminal import new_console
from ramulus.run.config.resume import brief, replace_text
from ramulus.run.config.weighted import REWARD_CODE
from ramulus.run.evaluation.answers import LATER, RESULTS, Earlier

WIDE = 240  # columns where there is no terminal: a file or a pipe wraps nothing
MACHINE = (
    "weights",
    "kinds",
    "threads",
    "slots",
    "chunk",
    "torch",
    "device",
    "seed",
)  # settings that change single draws only


@dataclass(frozen=True)
class Set:
    """One set of problems with every answer."""

    spec: str  # as it was asked for
    name: str
    rows: list[Row]


@dataclass(frozen=True)
class EvaluatedModel:
    """One model's answers to all sets."""

    model: str
    settings: dict[str, Any]
    sets: list[Set]


class Report:
    """The numbers, tables and notes of an evaluation, and the comparison with another one once that is added."""

    def __init__(self, outcome: EvaluatedModel, ks: Sequence[int]) -> None:
        self.outcome, self.ks = outcome, ks
        self.names = [one.name for one in outcome.sets]
        self.scores = [scores_of(one.rows, ks) for one in outcome.sets]
        self.content: dict[str, Any] = {"model": outcome.model} | {
            name: outcome.settings[name] for name in ("seed", "max_tokens")
        }
        self.content |= {
            "settings": outcome.settings,
            "tasks": {one.spec: set_numbers(one, s, outcome) for one, s in zip(outcome.sets, self.scores)},
        }
        gains = tree_gains(self.scores)
        self.gaps = {f"trees - independent, {self.names[0] if len(self.names) == 1 else 'mean over sets'}": gains}
        self.tables: list[Table] = []
        self.notes = [note(self.scores)]
        if gains:
            self.content["tree_gains"] = gains
            self.tables.append(differences_table("Trees against independent attempts", gains, "trees", "independent"))
        if len(self.scores) > 1:
            self.content["mean"] = overall(self.scores)

    def compare(self, rival: Earlier) -> None:
        """Add the differences to another evaluation; ValueError, and nothing is added, where no problem is in both."""
        versus = _compare(self.outcome, rival, self.ks)
        self.content["against"] = {"model": rival.model, "settings": rival.settings} | versus
        self.gaps |= {f"difference to {rival.model}, {name}": gap for name, gap in versus["tasks"].items()}
        self.tables += versus_tables(versus, rival.model)
        self.notes += versus["notes"]

    def show(self, console: Console) -> None:
        """Print the tables and the notes."""
        for table in self.all_tables(console.width if console.is_terminal else WIDE):
            _show(console, table)
        for text in filter(None, self.notes):
            console.out(text, highlight=False)

    def write(self, out: Path) -> None:
        """The single JSON file with every answer, or results.json, results.csv, problems.csv and results.txt beside the trees."""
        if out.suffix == ".json":
            for one in self.outcome.sets:
                self.content["tasks"][one.spec] |= {"answers": one.rows}
            replace_text(out, finite_text(self.content, 1))
            return
        plain = new_console(width=WIDE, file=io.StringIO(), color_system=None)
        for table in self.all_tables(WIDE):
            _show(plain, table)
        lines = [line.rstrip() for line in plain.file.getvalue().splitlines()]  # type: ignore[attr-defined]
        replace_text(out / RESULTS, finite_text(self.content, 1))
        replace_text(out / "results.csv", results_csv(self.names, self.scores, self.gaps))
        replace_text(out / "problems.csv", problems_csv(self.names, self.scores))
        replace_text(out / "results.txt", "\n".join([*lines, *filter(None, self.notes), ""]))

    def all_tables(self, width: int) -> list[Table]:
        """The table of the sets, in as many as the width asks for, then the tables of differences."""
        about = f"temperature {self.outcome.settings['temperature']:g}"
        return [*boards(self.names, self.scores, about, width), *self.tables]


def set_numbers(one: Set, scores: Scores, outcome: EvaluatedModel) -> dict[str, Any]:
    """The numbers of one set, as in earlier evaluations."""
    content = {
        "problems": len(one.rows),
        "samples": outcome.settings["samples"],
        "temperature": outcome.settings["temperature"],
    }
    gains = tree_gains([scores])
    return content | report_of(scores, one.rows) | ({"tree_gains": gains} if gains else {})


def share_a_set(names: Sequence[str], rival: Earlier) -> None:
    """Raise ValueError where the other evaluation has none of these sets of problems."""
    if not set(names) & set(rival.rows):
        raise ValueError(
            f"--against {rival.model} has no set of problems of these names: it has {', '.join(rival.rows)}, here is {', '.join(names)}; "
            "name an evaluation of the same --tasks"
        )


def _compare(outcome: EvaluatedModel, rival: Earlier, ks: Sequence[int]) -> dict[str, Any]:
    """Paired differences on the problems that both answered: `tasks` by name, their mean if there are several, and `notes`."""
    shared = [one for one in outcome.sets if one.name in rival.rows]
    share_a_set([one.name for one in outcome.sets], rival)
    pairs = {one.name: against(one.rows, rival.rows[one.name], ks) for one in shared}
    tasks = {name: compared([pair]) for name, pair in pairs.items()}
    if len(pairs) > 1:
        tasks["mean over sets"] = compared(list(pairs.values()))
    notes = (
        [f"the other evaluation has other settings: {'; '.join(other)}"] if (other := differing(rival, outcome)) else []
    )
    for one in shared:
        left = len(one.rows) + len(rival.rows[one.name]) - 2 * len(pairs[one.name][0].ids)
        notes += (
            [f"{one.name}: {left} problems are in one evaluation only and are left out of the comparison"]
            if left
            else []
        )
    notes += [f"{one.name} is not in the other evaluation" for one in outcome.sets if one.name not in rival.rows]
    return {"tasks": tasks, "notes": notes}


def differing(rival: Earlier, outcome: EvaluatedModel) -> list[str]:
    """Each setting that differs and may change what is measured, in words."""
    there, here = rival.settings, outcome.settings
    unsaid = {name for name in LATER if name not in there}.union(MACHINE)
    unsaid |= {REWARD_CODE} if there.get("rewards") != here.get("rewards") else set()  # their names say it
    names = [name for name in dict.fromkeys([*there, *(here if rival.whole else ())]) if name not in unsaid]
    return [
        f"{name} {brief(there.get(name))} there, {brief(here.get(name))} here" for name in names if there.get(name) != here.get(name)
    ]


def versus_tables(versus: dict[str, Any], other: str) -> list[Table]:
    """One table for each set, or for their mean where there are several."""
    tasks = versus["tasks"]
    title = "mean over sets" if "mean over sets" in tasks else next(iter(tasks))
    return [differences_table(f"{title}: this model and {other}", tasks[title], "this", "other")]


def _show(console: Console, table: Table) -> None:
    """Print a table; as wide as it is where no terminal must hold it."""
    (console if console.is_terminal else new_console(file=console.file, width=WIDE, color_system=None)).print(table)
