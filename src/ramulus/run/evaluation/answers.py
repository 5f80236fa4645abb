"""The answers of an evaluation at rest: trees in JSON lines, appended as problems are finished, and read again to go on or to compare."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramulus.core import store
from ramulus.core.json_object import object_in
from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.engine.engine import Decode
from ramulus.look.evaluation.evaluate import answers_of
from ramulus.look.evaluation.measures import Row
from ramulus.run.config.resume import brief, replace_text
from ramulus.run.config.weighted import REWARD_CODE
from ramulus.run.evaluation.task_sets import PROMPTING
from ramulus.run.lock import LOCK_FILE
from ramulus.tasks.chat import today

_FORMAT = 1
SETTINGS, RESULTS = "eval.json", "results.json"
LATER = (REWARD_CODE, *PROMPTING)  # settings that earlier evaluations did not write down; the digest of their problems tells of changes
ENDINGS = {"sampled": "", "tree": "-tree", "greedy": "-greedy"}


def _file_of(folder: Path, name: str, kind: str) -> Path:
    """Where the trees of one kind of one set are."""
    return folder / f"{name}{ENDINGS[kind]}.jsonl"


@dataclass
class Answers:
    """The answers to one set of problems; `chunk` problems are sampled, and stand or fall, together.

    In memory, and in `folder` too where there is one: what whole chunks it holds already is taken from there, the rest of its files
    is cut off. ValueError for a file with other problems.
    """

    name: str
    tasks: Sequence[Task]
    kinds: Sequence[str]
    decode: Decode
    chunk: int
    folder: Path | None = None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        files = [_file_of(self.folder, self.name, kind) for kind in self.kinds]
        whole = min(sum(ended(file)) for file in files)
        done = whole if whole == len(self.tasks) else whole - whole % self.chunk
        for file in files:
            cut_after(file, done)
        for trees in zip(*(trees_of(file) for file in files)):
            self.rows += answers_of({kind: [tree] for kind, tree in zip(self.kinds, trees)}, self.decode)
        for row, task in zip(self.rows, self.tasks):
            if row["id"] != task.id:
                raise ValueError(f"{files[0]} has {row['id']!r} where {task.id!r} belongs: choose another --out")

    def left(self) -> Iterator[Sequence[Task]]:
        """The chunks of tasks that have no answers yet."""
        for start in range(len(self.rows), len(self.tasks), self.chunk):
            yield self.tasks[start : start + self.chunk]

    def append(self, forests: Mapping[str, Sequence[Tree]]) -> None:
        """Keep the graded trees of one chunk, by kind."""
        if self.folder is not None:
            for kind, trees in forests.items():
                store.write(_file_of(self.folder, self.name, kind), trees, append=True)
        self.rows += answers_of(forests, self.decode)


def trees_of(file: Path) -> Iterator[Tree]:
    """The whole lines of a file as trees; none of a file that is not there."""
    if file.is_file():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", store.TornLine)  # a killed write; its problems are done again
            for line, tree in zip(ended(file), store.read(file)):
                if line:
                    yield tree


def ended(file: Path) -> Iterator[bool]:
    """Whether each line of a file is whole, in order; none of a file that is not there."""
    if file.is_file():
        with open(file, "rb") as lines:
            yield from (line.endswith(b"\n") for line in lines)


def cut_after(file: Path, count: int) -> None:
    """Leave only the first `count` lines."""
    if not file.is_file():
        return
    with open(file, "r+b") as lines:
        for _ in range(count):
            lines.readline()
        lines.truncate(lines.tell())


def day_begun(folder: Path | None) -> str:
    """The day on which the evaluation in a folder began, which chat templates may write into prompts; today where it does not say."""
    began = object_in(folder / SETTINGS).get("date") if folder is not None else None
    return today() if began is None else str(began)


def settle(folder: Path, model: str, settings: dict[str, Any], sets: dict[str, Any], date: str = "") -> None:
    """Write the settings of an evaluation into its folder, or hold them against those that are there.

    Raises ValueError for a changed setting, for changed problems, and for a folder that holds something else. A set that is not
    there yet joins the others.
    """
    path = folder / SETTINGS
    if path.is_file():
        saved = read_settings(path)
        later = {name: settings[name] for name in LATER if name in settings and name not in saved["settings"]}
        differing = changed(saved["settings"] | later, settings)
        differing += [
            f"the problems of {name} are others" for name in sets if saved["sets"].get(name, sets[name]) != sets[name]
        ]
        if differing:
            raise ValueError(
                f"{folder} holds an evaluation with other settings: {'; '.join(differing)}. Go on with the same settings, or choose another --out"
            )
        sets = saved["sets"] | sets
    elif folder.exists() and (not folder.is_dir() or any(path.name != LOCK_FILE for path in folder.iterdir())):
        raise ValueError(
            f"{folder} is there already and is no evaluation: choose another --out, or a name that ends in .json"
        )
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": _FORMAT, "model": model, "settings": settings, "sets": sets, "date": date}
    replace_text(path, json.dumps(content, indent=1))


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, in words."""
    return [
        f"{name} was {brief(old.get(name))}, is now {brief(new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def read_settings(path: Path) -> dict[str, Any]:
    """eval.json of an evaluation's folder."""
    try:
        saved = json.loads(path.read_text())
        if saved["format"] > _FORMAT:
            raise ValueError(f"{path} was written by a newer ramulus: upgrade ramulus to read it")
        return {name: saved[name] for name in ("model", "settings", "sets")}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no saved evaluation ({error}): choose another --out") from error


@dataclass(frozen=True)
class Earlier:
    """An earlier evaluation: its settings and its answers by the name of their set."""

    model: str
    settings: dict[str, Any]
    rows: dict[str, list[Row]]
    whole: bool = True  # the settings are all that there were; files of before they were written down hold some


def earlier(path: Path) -> Earlier | None:
    """The evaluation in a .json file or in a folder; None for anything else, which may be a model. ValueError for one that is damaged."""
    if path.is_file() and path.name in (SETTINGS, RESULTS) and (path.parent / SETTINGS).is_file():
        path = path.parent
    if path.suffix == ".json" and path.is_file():
        return from_json(path)
    if not (path / SETTINGS).is_file():
        return None
    saved = read_settings(path / SETTINGS)
    rows: dict[str, list[Row]] = {}
    for name, about in saved["sets"].items():
        kinds = {kind: list(trees_of(_file_of(path, name, kind))) for kind in saved["settings"]["kinds"]}
        if any(len(trees) != about["problems"] for trees in kinds.values()):
            raise ValueError(f"the evaluation of {name} in {path} is not finished: run it to its end first")
        rows[name] = answers_of(kinds, None)
    return Earlier(saved["model"], saved["settings"], rows)


def from_json(path: Path) -> Earlier:
    """The evaluation in a single JSON file."""
    try:
        saved = json.loads(path.read_text())
        names = naming(list(saved["tasks"]))
        rows = {names[spec]: scores["answers"] for spec, scores in saved["tasks"].items()}
        settings = {name: saved[name] for name in ("seed", "max_tokens")}
        settings |= {name: scores[name] for scores in saved["tasks"].values() for name in ("samples", "temperature")}
        return Earlier(saved["model"], saved.get("settings", settings), rows, "settings" in saved)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no evaluation with answers ({error!r}): name the folder, or the .json file, that `ramulus eval --out` was given"
        ) from error


def naming(specs: Sequence[str]) -> dict[str, str]:
    """A short name for each set of problems, fit for a file: aime24, gym-chain_sum; numbered where two are alike."""
    names: dict[str, str] = {}
    for spec in specs:
        if spec in names:
            raise ValueError(f"--tasks names {spec} twice: leave one out")
        short = f"gym-{spec[4:]}" if spec.startswith("gym:") else Path(spec).name
        for ending in (".gz", ".jsonl", ".json", ".csv", ".parquet"):
            short = short.removesuffix(ending)
        name, number = short, 2
        while any(
            f"{name}{ending}" == f"{used}{other}"
            for used in names.values()
            for ending in ENDINGS.values()
            for other in ENDINGS.values()
        ):
            name, number = f"{short}-{number}", number + 1
        names[spec] = name
    return names
