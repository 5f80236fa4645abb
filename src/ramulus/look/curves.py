"""The curve of a metric in finished or running runs, with what had been spent by each of its points."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramulus.core.json_object import object_in, read_object
from ramulus.core.run_folder import is_run, moved_aside, natural, stage_folders

AXES = {
    "steps": "steps",
    "sampled": "sampled tokens",
    "trained": "trained tokens",
    "seconds": "seconds",
    "cpu_seconds": "CPU seconds",
}
"""What runs are compared at equal amounts of; all of it summed over the stages of a run, and without evaluations."""

SEED = re.compile(r"seed-(\d+)")


@dataclass(frozen=True)
class Found:
    """A run and the group that it is a seed of."""

    folder: Path
    label: str
    seed: int
    finished: bool

    @property
    def name(self) -> str:
        return f"{self.label} seed {self.seed}"


@dataclass(frozen=True)
class Curve:
    """The n points of a metric in the last stage of a run, and what they cost."""

    run: Found
    steps: list[int]  # [n] of the last stage
    values: list[float]  # [n]
    costs: dict[
        str, list[float]
    ]  # axis -> [n] spent from the beginning of the first stage; an axis that the metrics lack is left out
    totals: dict[str, float]  # axis -> spent by the whole run

    def at(self, axis: str, budget: float) -> int | None:
        """Index of the last point at or before a budget; None where there is none."""
        within = [i for i, cost in enumerate(self.costs[axis]) if cost <= budget * (1 + 1e-9)]
        return within[-1] if within else None


def find_runs(paths: Sequence[Path]) -> list[Found]:
    """The runs in some folders: of runs, of the seeds of one label (LABEL/seed-N), or of a sweep (FOLDER/LABEL/seed-N).

    Runs in LABEL/seed-N are one group; any other run is a group of its own. Raises ValueError where a folder holds no run.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is no folder: give the folder of a run or of a sweep")
        inside = list(runs_in(path.resolve()))
        if not inside:
            raise ValueError(f"{path} holds no run: give the folder of a run (with run.json) or of a sweep")
        folders |= dict.fromkeys(inside)
    groups = {folder: folder.parent if SEED.fullmatch(folder.name) else folder for folder in folders}
    labels = short_names(list(dict.fromkeys(groups.values())))
    return [described(folder, labels[group]) for folder, group in groups.items()]


def runs_in(folder: Path, depth: int = 3) -> Iterator[Path]:
    """The runs in a folder, or the folder itself where it is one; in a sweep's order."""
    if is_run(folder):
        yield folder
    elif depth:
        sweep = sweep_in(folder)
        order = {label: i for i, label in enumerate(sweep.get("labels", []))}
        inside = [path for path in folder.iterdir() if path.is_dir() and not moved_aside(path)]
        for path in sorted(inside, key=lambda path: (order.get(path.name, len(order)), natural(path.name))):
            yield from runs_in(path, depth - 1)


def flat(nested: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested dicts as one, names joined by a slash; lists are left out."""
    numbers: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{above}{name}/")
        elif not isinstance(value, list):
            numbers[above + name] = value
    return numbers


def short_names(folders: list[Path]) -> dict[Path, str]:
    """A different name for each folder: the last part of its path, or as many parts as tell them apart."""
    names = {}
    for folder in folders:
        for size in range(1, len(folder.parts) + 1):
            if sum(other.parts[-size:] == folder.parts[-size:] for other in folders) == 1:
                break
        names[folder] = "/".join(folder.parts[-size:])
    return names


def described(folder: Path, label: str) -> Found:
    """A run with its seed, from run.json or from the name of its folder, and whether it is finished."""
    saved = load_json(folder / "run.json")
    named = SEED.fullmatch(folder.name)
    stages = saved.get("stages") or [{}]
    seed = stages[-1].get("seed", int(named[1]) if named else 0)
    return Found(folder, label, seed, not saved or (folder / "summary.json").is_file())


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none. ValueError names a damaged one."""
    return read_object(path, "bring it back, or leave this run out") if path.is_file() else {}


def sweep_in(folder: Path) -> dict[str, Any]:
    """What a sweep says of itself in its folder; {} where there is none, with a warning where it is damaged, as only the order of labels is lost."""
    path = folder / "sweep.json"
    content = object_in(path)
    if path.is_file() and not content:
        warnings.warn(f"{path} is damaged, so the labels stand in the order of their names; the same sweep writes it anew", stacklevel=2)
    return content


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that is still being written is left out. ValueError names a damaged one."""
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is no JSON: the file is damaged, leave this run out") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"line {number} of {path} has no step: the file is damaged, leave this run out")
        lines.append(row)
    return lines


def stage_rows(folder: Path) -> list[list[dict[str, Any]]]:
    """The rows of every stage of a run, in order; an empty list for a stage that has not begun."""
    if (folder / "metrics.jsonl").is_file():
        return [rows(folder / "metrics.jsonl")]
    numbered = {int(path.name.split("-")[0]): path for path in stage_folders(folder)}
    count = len(load_json(folder / "run.json").get("stages", numbered))
    return [rows(numbered[i] / "metrics.jsonl") if i in numbered else [] for i in range(1, count + 1)]


def value_of(row: dict[str, Any], name: str) -> float | None:
    """A number in a row by its name, seconds/grow for one inside another; None where there is none."""
    value: Any = row.get(name)
    if value is None and "/" in name:
        head, _, rest = name.partition("/")
        value = row[head].get(rest) if isinstance(row.get(head), dict) else None
    return float(value) if isinstance(value, int | float) else None


def spent(row: dict[str, Any]) -> dict[str, float | None]:
    """What one step cost, by axis."""
    tokens = {name: value_of(row, name) for name in ("sampled", "trained")}
    times = {"seconds": value_of(row, "seconds/step"), "cpu_seconds": value_of(row, "cpu_seconds")}
    return {"steps": 1.0} | tokens | times


def read_curve(run: Found, metric: str) -> Curve:
    """The points of a metric in the last stage of a run; costs count from the beginning of its first stage."""
    stages = stage_rows(run.folder)
    total: dict[str, float] = dict.fromkeys(AXES, 0.0)
    steps, values, points = [], [], []
    for stage in stages:
        for row in stage:
            costs = spent(row)
            total = {axis: total[axis] + cost for axis, cost in costs.items() if cost is not None and axis in total}
            value = value_of(row, metric) if stage is stages[-1] else None
            if value is not None:
                steps.append(int(row["step"]))
                values.append(value)
                points.append(total)
    return Curve(run, steps, values, {axis: [point[axis] for point in points] for axis in total}, total)


def refuse_unknown(runs: Sequence[Found], metric: str) -> None:
    """ValueError for a metric that no run has, naming those that there are."""
    known: dict[str, None] = {}
    for run in runs:
        for row in stage_rows(run.folder)[-1:]:
            known |= dict.fromkeys(name for line in row for name in names_in(line) if name != "step")
    close = difflib.get_close_matches(metric, known, n=1)
    guess = f" Did you mean {close[0]}?" if close else ""
    raise ValueError(f"no run has the metric {metric!r}.{guess} There are {', '.join(sorted(known)) or 'none yet'}")


def names_in(row: dict[str, Any]) -> Iterator[str]:
    """The names of the numbers in a row."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from (f"{name}/{inner}" for inner in names_in(value))
        elif isinstance(value, int | float):
            yield name
