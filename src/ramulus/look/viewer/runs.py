"""What there is to look at: the stage folders, files and folders of trees under the paths that were given."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ramulus.core.run_folder import WHEN, final_evaluation, is_stage, natural
from ramulus.look.curves import flat
from ramulus.look.stages import belonging, loose_files, step_files, tokenizer_of
from ramulus.look.viewer.files import Fence, Lines, Metrics, is_tree_file

DEPTH = 6  # folders below a given one that are searched for runs
PASSED_BY = {"checkpoints", "tensorboard", "evals", "trees", "__pycache__", "node_modules"}
HEAD = re.compile(rb'^\s*\{"format":\s*\d+,\s*"step":\s*(-?\d+)\s*,')
FILES = 32  # files of trees of one run whose lines are remembered
_PATIENCE = 300.0  # seconds without a new line of metrics after which a run counts as stopped


class Entry:
    """One entry of the viewer: a stage of a run, a folder of numbered files of trees, or a `loose` file with trees of any steps."""

    def __init__(self, path: Path, root: Path, fence: Fence, loose: bool = False) -> None:
        self.path, self.root, self.fence, self.loose = path, root, fence, loose
        self.id, self.title = "", ""
        self.metrics = Metrics(path / "metrics.jsonl", fence)
        self.files: OrderedDict[Path, Lines] = OrderedDict()  # the last ones that were read
        self.lock = threading.RLock()
        self.sorted: tuple[int, dict[int, list[int]]] = (0, {})  # of a loose file: its edition, the lines of each step

    def lines(self, path: Path) -> Lines:
        """The lines of a file of trees, up to date."""
        with self.lock:
            lines = self.files.setdefault(path, Lines(path, self.fence))
            self.files.move_to_end(path)
            if len(self.files) > FILES:
                self.files.popitem(last=False)
        lines.refresh()
        return lines

    def step_files(self) -> dict[int, Path]:
        """The file of each step, ascending; a plain one counts before a packed one."""
        if self.loose:
            return {}
        return step_files(self.path, self.fence.has)

    def tree_steps(self) -> list[int]:
        """The steps that have trees, ascending."""
        return sorted(self.loose_steps()) if self.loose else list(self.step_files())

    def loose_steps(self) -> dict[int, list[int]]:
        """The lines of each step in a file of any steps."""
        lines = self.lines(self.path)
        with lines.lock:
            edition, known = self.sorted
            known = known if edition == lines.edition else {}
            done = sum(len(places) for places in known.values())
            for place, line in enumerate(lines.read(range(done, len(lines.spans)), most=200), done):
                head = HEAD.match(line)
                known.setdefault(int(head[1]) if head else 0, []).append(place)
            self.sorted = (lines.edition, known)
            return known

    def trees(self, step: int) -> tuple[Lines, list[int]]:
        """The file with the trees of a step, and its lines; KeyError where there are none."""
        if self.loose:
            return self.lines(self.path), self.loose_steps()[step]
        lines = self.lines(self.step_files()[step])
        return lines, list(range(len(lines.spans)))

    def config(self) -> dict[str, Any]:
        """This stage's part of run.json; {} where there is none."""
        if self.loose:
            return {}
        for folder in (self.path, self.path.parent):
            saved = self.fence.json(folder / "run.json")
            stages = saved.get("stages") if isinstance(saved, dict) else None
            if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
                continue
            named = [stage for i, stage in enumerate(stages, 1) if self.path.name == f"{i}-{stage.get('name')}"]
            if configs := named or (stages if folder == self.path and len(stages) == 1 else []):
                return configs[0]
        return {}

    def tokenizer(self) -> Path | None:
        """tokenizer.json for its trees; None where there is none yet."""
        return tokenizer_of(self.path, self.fence.has)

    def evaluations(self) -> dict[str, Path]:
        """The files of its evaluations by name: those of steps, then the final ones."""
        if self.loose:
            return {}
        files = [*sorted(self.path.glob("evals/*.json")), *(final_evaluation(self.path, when) for when in WHEN)]
        return {path.stem: path for path in files if self.fence.has(path)}

    def summary(self) -> dict[str, Any]:
        """What the list of runs says about it; what it cannot be said of for its odd files is left out."""
        (row, written), trees = self.metrics.last(), self.tree_steps()
        steps = number_or(self.config().get("steps"), None)
        step = row["step"] if row is not None else trees[-1] if trees else 0
        pace = number_or(flat(row).get("seconds/mean"), 0.0) if row is not None else 0.0
        recent = time.time() - written < max(_PATIENCE, 4 * pace)
        about = {"id": self.id, "title": self.title, "folder": str(self.path)}
        return about | {"live": recent and (steps is None or step < steps), "step": step, "steps": steps, "trees": trees}


def number_or(value: Any, usual: Any) -> Any:
    """The value where it is a number, else the usual one."""
    return value if isinstance(value, int | float) and math.isfinite(value) else usual


def shown_under(root: Path, fence: Fence) -> Iterator[Entry]:
    """The stages of runs and the trees under a path."""
    if root.is_file():
        yield Entry(root, root, fence, loose=True)
        return
    stages = [folder for folder in folders(root) if is_stage(folder)]
    for folder in sorted(stages, key=natural):
        yield Entry(folder, root, fence)
    if root in stages:
        return
    if any(is_tree_file(path) for path in step_files(root, fence.has).values()):
        yield Entry(root, root, fence)
    for path in loose_files(root, fence.has):
        yield Entry(path, root, fence, loose=True)


def folders(root: Path) -> Iterator[Path]:
    """A folder and those below it; links to folders are not followed."""
    for place, names, _ in os.walk(root):
        deep = len(Path(place).relative_to(root).parts)
        names[:] = [name for name in names if deep < DEPTH and name not in PASSED_BY and name[:1] != "."]
        yield Path(place)


class Shelf:
    """Everything shown, by id; ids are the only names a request can use. Runs that begin later appear by themselves."""

    def __init__(self, given: Sequence[Path], tokenizer: Path | None = None) -> None:
        if not given:
            raise ValueError("there is nothing to show: name a run, a folder of runs, or a file of trees")
        for path in given:
            if not path.exists():
                raise FileNotFoundError(f"there is nothing at {path}: name the folder of a run, or a file of trees")
        self.given = list(dict.fromkeys(path.resolve() for path in given))
        self.fence = Fence([*self.given, *(near for path in self.given for near in belonging(path))])
        self.tokenizer = tokenizer_file(tokenizer) if tokenizer else None
        self.found: dict[str, Entry] = {}
        self.known: set[Path] = set()
        self.lock = threading.Lock()
        self.looked = 0.0
        for path in self.given:
            if path.is_file() and not is_tree_file(path):
                raise ValueError(
                    f"{path} is no file of trees: name one that `ramulus train` or `ramulus rollout` wrote, "
                    "or the FOLDER of `ramulus eval --out FOLDER`"
                )
            if not any(True for _ in shown_under(path, self.fence)):
                raise ValueError(
                    f"{path} holds neither metrics.jsonl nor trees: name a folder that `ramulus train` or "
                    "`ramulus eval --out FOLDER` wrote, or a folder or file of trees"
                )
        self.refresh(0.0)

    def refresh(self, every: float = 3.0) -> list[Entry]:
        """Everything shown, after a new look at the folders if the last one is so many seconds old."""
        with self.lock:
            if time.monotonic() - self.looked >= every or not self.found:
                for root in self.given:
                    for one in shown_under(root, self.fence):
                        if one.path not in self.known:
                            self.add(one)
                self.looked = time.monotonic()
            return list(self.found.values())

    def add(self, one: Entry) -> None:
        """Give it a title, its path from the given folder on, or from what all have in common where two are named alike, and an id."""
        alike = len({path.name for path in self.given}) < len(self.given)
        above = Path(os.path.commonpath([path.parent for path in self.given])) if alike else one.root.parent
        name = one.path.name.removesuffix(".gz").removesuffix(".jsonl") if one.loose else one.path.name
        one.title = str(one.path.parent.relative_to(above) / name)
        slug = re.sub(r"[^a-z0-9]+", "-", one.title.lower()).strip("-") or "run"
        one.id, number = slug, 2
        while one.id in self.found:
            one.id, number = f"{slug}-{number}", number + 1
        self.found[one.id] = one
        self.known.add(one.path)

    def __getitem__(self, name: str) -> Entry:
        """The entry with this id; KeyError for any other name."""
        return self.found[name]


def tokenizer_file(path: Path) -> Path:
    """tokenizer.json at or in a path that the user named; FileNotFoundError where there is none."""
    inside = [
        path,
        path / "tokenizer.json",
        *sorted(path.glob("**/checkpoints/step-*/model/tokenizer.json"), key=natural)[-1:],
    ]
    files = [place for place in inside if place.is_file()]
    if not files:
        raise FileNotFoundError(f"there is no tokenizer.json at {path}: name that file, or the model folder it is in")
    return files[0]
