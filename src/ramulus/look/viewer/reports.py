"""Evaluations as rows of a table: those that training made (one set of problems a file) and those of `ramulus eval` (several)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_HEAD = 4096  # bytes that tell whether a JSON file is an evaluation
_GROUPS = {"tree": "trees", "equal_tokens": "independent attempts at the price of the trees"}
"""How answers were sampled, other than independently: the names inside a report, and for people."""


def is_report(path: Path) -> bool:
    """Whether a file is what `ramulus eval --out FILE.json` writes, or results.json of a folder."""
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError:  # one that may not be read hides no other
        return False
    return head.lstrip().startswith(b"{") and b'"model"' in head and b'"settings"' in head


def table_rows(name: str, report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The numbers of an evaluation's file without its answers: a row for each set of problems, and for each other way of sampling them."""
    step = step_of(name, report)
    if not isinstance(report.get("tasks"), dict):
        yield {"step": step, "name": name} | numbers_shown(report)
        return
    about = {"model": report.get("model"), "settings": report.get("settings")}
    for spec, numbers in report["tasks"].items():
        if not isinstance(numbers, dict):
            continue
        yield {"step": step, "name": spec, "file": name} | about | numbers_shown(numbers)
        for group, words in _GROUPS.items():
            if isinstance(numbers.get(group), dict):
                yield {"step": step, "name": f"{spec}, {words}", "file": name} | about | numbers_shown(numbers[group])


def numbers_shown(report: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a report that a table shows, and how many problems have their answers in the file."""
    shown = {key: value for key, value in report.items() if key not in ("answers", "step", "tasks", "settings", *_GROUPS)}
    answers = report.get("answers")
    return shown | {"answered": len(answers) if isinstance(answers, list) else 0}


def difference_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Its paired differences, to another evaluation and of trees to independent attempts, one row each."""
    rival = _dict(report.get("against"))
    tables: dict[str, Any] = {f"{spec}: this model and {rival.get('model')}": groups for spec, groups in _dict(rival.get("tasks")).items()}
    tables |= {"trees and independent attempts": report.get("tree_gains")}
    return [
        {"table": table, "sampled": group, "measure": measure} | gap
        for table, groups in tables.items()
        for group, measures in _dict(groups).items()
        for measure, gap in _dict(measures).items()
        if isinstance(gap, dict)
    ]


def _dict(value: Any) -> dict[str, Any]:
    """The value where it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def answers_in(name: str, report: Mapping[str, Any], wanted: str | None) -> Any:
    """Every answer of an evaluation's file, of the set of problems called `wanted` where it has several; None where they are not in it."""
    if isinstance(report.get("tasks"), dict):
        task = report["tasks"].get(wanted) if wanted else next(iter(report["tasks"].values()), None)
        return task.get("answers", []) if isinstance(task, dict) else None
    return report.get("answers", []) if wanted in (None, name) else None


def step_of(name: str, report: Mapping[str, Any]) -> int:
    """The step of an evaluation: in its content, else in its name."""
    step = report.get("step")
    return step if isinstance(step, int) else int(name) if name.isdigit() else 0

