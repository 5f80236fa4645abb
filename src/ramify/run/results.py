"""What came of an evaluation: tables for people, JSON and CSV for programs, the comparison with another one."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ramify.look.measures import Row, Scores, report_of, scores_of
from ramify.look.paired import against, compared, tree_gains
from ramify.look.scoreboard import boards, differences_table, note, overall, problems_csv, results_csv
from ramify.run.answers import Earlier
from ramify.run.resume import brief, replace_text

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
class Outcome:
    """One model's answers to all sets."""

    model: str
    settings: dict[str, Any]
    sets: list[Set]


def tell(outcome: Outcome, rival: Earlier | None, ks: Sequence[int], out: Path | None, console: Console) -> None:
    """Print the tables and write the files: a folder with results.json, results.csv, problems.csv and results.txt, or one .json."""
    names = [one.name for one in outcome.sets]
    scores = [scores_of(one.rows, ks) for one in outcome.sets]
    content: dict[str, Any] = {"model": outcome.model} | {
        name: outcome.settings[name] for name in ("seed", "max_tokens")
    }
    content |= {
        "settings": outcome.settings,
        "tasks": {one.spec: found(one, s, outcome) for one, s in zip(outcome.sets, scores)},
    }
    gaps = {f"trees - independent, {names[0] if len(names) == 1 else 'mean over sets'}": tree_gains(scores)}
    about = f"temperature {outcome.settings['temperature']:g}"
    tables: list[Table] = []
    notes = [note(scores)]
    if gaps_of_trees := next(iter(gaps.values())):
        content["tree_gains"] = gaps_of_trees
        tables.append(differences_table("Trees against independent attempts", gaps_of_trees, "trees", "independent"))
    if len(scores) > 1:
        content["mean"] = overall(scores)
    if rival is not None:
        versus = compare(outcome, rival, ks)
        content["against"] = {"model": rival.model, "settings": rival.settings} | versus
        gaps |= {f"difference to {rival.model}, {name}": gap for name, gap in versus["tasks"].items()}
        tables += versus_tables(versus, outcome.model, rival.model)
        notes += versus["notes"]
    said = [text for text in notes if text]
    for table in [*boards(names, scores, about, console.width if console.is_terminal else WIDE), *tables]:
        show(console, table)
    for text in said:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        write(
            out,
            content,
            outcome,
            (results_csv(names, scores, gaps), problems_csv(names, scores)),
            [*boards(names, scores, about, WIDE), *tables],
            said,
        )
        console.print(f"every answer is in {out}", markup=False, highlight=False, soft_wrap=True)


def found(one: Set, scores: Scores, outcome: Outcome) -> dict[str, Any]:
    """The numbers of one set, as in earlier evaluations."""
    told = {
        "problems": len(one.rows),
        "samples": outcome.settings["samples"],
        "temperature": outcome.settings["temperature"],
    }
    gains = tree_gains([scores])
    return told | report_of(scores, one.rows) | ({"tree_gains": gains} if gains else {})


def compare(outcome: Outcome, rival: Earlier, ks: Sequence[int]) -> dict[str, Any]:
    """Paired differences on the problems that both answered: `tasks` by name, their mean if there are several, and `notes`."""
    shared = [one for one in outcome.sets if one.name in rival.rows]
    if not shared:
        raise ValueError(
            f"the other evaluation has no set of these names: it has {', '.join(rival.rows)}, here is {outcome.sets[0].name}"
        )
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


def differing(rival: Earlier, outcome: Outcome) -> list[str]:
    """Each setting that differs and may change what is measured, in words."""
    known = {name: value for name, value in rival.settings.items() if name not in MACHINE}
    here = {name: outcome.settings.get(name) for name in known}
    return [
        f"{name} {brief(known[name])} there, {brief(here[name])} here" for name in known if known[name] != here[name]
    ]


def versus_tables(versus: dict[str, Any], this: str, other: str) -> list[Table]:
    """One table for each set, or for their mean where there are several."""
    tasks = versus["tasks"]
    title = "mean over sets" if "mean over sets" in tasks else next(iter(tasks))
    return [differences_table(f"{title}: this model and {other}", tasks[title], "this", "other")]


def show(console: Console, table: Table) -> None:
    """Print a table; as wide as it is where no terminal must hold it."""
    (console if console.is_terminal else Console(file=console.file, width=WIDE, color_system=None)).print(table)


def write(
    out: Path,
    content: dict[str, Any],
    outcome: Outcome,
    sheets: tuple[str, str],
    tables: Sequence[Table],
    said: Sequence[str],
) -> None:
    """The single JSON file with every answer, or the files beside the trees in the folder."""
    if out.suffix == ".json":
        for one in outcome.sets:
            content["tasks"][one.spec] |= {"answers": one.rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, json.dumps(content, indent=1))
        return
    plain = Console(width=WIDE, file=io.StringIO(), color_system=None)
    for table in tables:
        show(plain, table)
    text = "\n".join([*(line.rstrip() for line in plain.file.getvalue().splitlines()), *said, ""])  # type: ignore[attr-defined]
    replace_text(out / "results.json", json.dumps(content, indent=1))
    for name, made in (("results.csv", sheets[0]), ("problems.csv", sheets[1]), ("results.txt", text)):
        replace_text(out / name, made)
