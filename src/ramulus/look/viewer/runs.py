"""What there is to look at: the stage folders, files and folders of trees under the paths that were given."""

from __future__ import annotations

import errno
import hashlib
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
from ramulus.look.viewer.about import model_name, number_or, recipe_name, seed_in, started
from ramulus.look.viewer.files import Fence, Lines, Metrics, is_tree_file
from ramulus.look.viewer.reports import is_report

DEPTH = 6  # folders below a given one that are searched for runs
PASSED_BY = {"checkpoints", "tensorboard", "trees", "__pycache__", "node_modules"}
HEAD = re.compile(rb'^\s*\{"format":\s*\d+,\s*"step":\s*(-?\d+)\s*,')
FILES = 256  # files of trees whose lines are remembered
LETTERS = 6  # letters of an id that its path alone decides, so that links survive other runs beside it
SETTLED = 3.0  # seconds after which a folder's time tells whether it has changed
_PATIENCE = 300.0  # seconds without a new line of metrics after which a run counts as stopped


class NothingShown(ValueError):
    """Why nothing can be shown of what was named."""


class Entry:
    """One entry of the viewer: a stage of a run, a folder of numbered files of trees or of an evaluation, or a `loose` file with trees of any steps.

    One with a `trouble` cannot be shown, and says why in the list.
    """

    def __init__(self, path: Path, root: Path, fence: Fence, loose: bool = False, trouble: str = "") -> None:
        self.path, self.root, self.fence, self.loose, self.trouble = path, root, fence, loose, trouble
        self.id, self.slug, self.title = "", "", ""
        self.metrics = Metrics(path / "metrics.jsonl", fence)
        self.files: OrderedDict[Path, Lines] = OrderedDict()  # the last ones that were read, of all runs of a shelf
        self.lock = threading.RLock()
        self.sorted: tuple[int, dict[int, list[int]]] = (0, {})  # of a loose file: its edition, the lines of each step
        self.run_json: tuple[Any, dict[str, Any]] | None = None  # (path and state of the file, content)
        self.listed: tuple[int, dict[int, Path]] | None = None  # (time of the folder of trees, its files)

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
        folder = self.path / "trees"
        stat = (folder if folder.is_dir() else self.path).stat()
        if self.listed is None or self.listed[0] != stat.st_mtime_ns:
            files = step_files(self.path, self.fence.has)
            if time.time() - stat.st_mtime < SETTLED:  # another file may come at the same tick of the file system's clock
                return files
            self.listed = stat.st_mtime_ns, files
        return self.listed[1]

    def tree_steps(self) -> list[int]:
        """The steps that have trees, ascending."""
        return sorted(self.loose_steps()) if self.loose else list(self.step_files())

    def loose_steps(self) -> dict[int, list[int]]:
        """The lines of each step in a file of any steps."""
        if self.path.suffix == ".json":  # an evaluation in one file
            return {}
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

    def saved(self) -> tuple[dict[str, Any], Path | None]:
        """run.json of its run, and its path; ({}, None) where there is none that can be read."""
        for folder in (self.path, self.path.parent) if not self.loose else ():
            path = folder / "run.json"
            try:
                stat = self.fence(path).stat()
            except OSError:
                continue
            now = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self.run_json is None or self.run_json[0] != (path, now):  # 500 runs are asked every few seconds
                self.run_json = ((path, now), self.fence.json(path) or {})
            if self.stage_in(self.run_json[1], folder) is not None:
                return self.run_json[1], path
        return {}, None

    def stage_in(self, saved: dict[str, Any], folder: Path) -> dict[str, Any] | None:
        """The part of a folder's run.json that is this stage's; None where there is none."""
        stages = saved.get("stages")
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
            return None
        named = [stage for i, stage in enumerate(stages, 1) if self.path.name == f"{i}-{stage.get('name')}"]
        return next(iter(named or (stages if folder == self.path and len(stages) == 1 else [])), None)

    def config(self) -> dict[str, Any]:
        """This stage's part of run.json; {} where there is none."""
        saved, path = self.saved()
        return (self.stage_in(saved, path.parent) if path else None) or {}

    def tokenizer(self) -> Path | None:
        """tokenizer.json for its trees; None where there is none yet."""
        return tokenizer_of(self.path, self.fence.has)

    def evaluations(self) -> dict[str, Path]:
        """The files of its evaluations by name: those of steps, then the final ones, then what `ramulus eval` wrote beside its trees."""
        folder = self.path.parent if self.path.is_file() else self.path
        files = [*sorted(folder.glob("evals/*.json")), *(final_evaluation(folder, when) for when in WHEN)] if not self.loose else []
        results = self.path if self.path.suffix == ".json" else folder / "results.json"
        return {path.stem: path for path in [*files, results] if self.fence.has(path)}

    def summary(self) -> dict[str, Any]:
        """What the list of runs says about it; what it cannot be said of for its odd files is left out."""
        if self.trouble:
            raise NothingShown(self.trouble)
        (row, written), trees, config = self.metrics.last(), self.tree_steps(), self.config()
        saved, path = self.saved()
        numbers, steps = flat(row or {}), number_or(config.get("steps"), None)
        step = row["step"] if row is not None else trees[-1] if trees else 0
        pace = number_or(numbers.get("seconds/mean"), 0.0)
        recent = time.time() - written < max(_PATIENCE, 4 * pace)
        done = steps is not None and step >= steps
        live = recent and not done
        status = "trees" if row is None and not live else "live" if live else "done" if done else "stopped"
        group, seed = seed_in(self.title)
        about = {"id": self.id, "title": self.title, "folder": str(self.path), "group": group, "seed": number_or(config.get("seed"), seed)}
        about |= {"live": live, "status": status, "step": step, "steps": steps, "trees": trees}
        about |= {"recipe": recipe_name(saved, config), "model": model_name(config.get("model"))}
        about |= {"reward": number_or(numbers.get("reward"), None), "seconds": pace * step or None}
        return about | {"started": started(saved, path, written, pace * step)}


def shown_under(root: Path, fence: Fence) -> Iterator[Entry]:
    """The stages of runs, the trees and the evaluations under a path; a folder that cannot be looked into is shown with its trouble."""
    if root.is_file():
        yield Entry(root, root, fence, loose=True)
        return
    inside = list(folders(root))
    kinds: dict[Path, bool | str] = {folder: holds_stage(folder) for folder in inside}
    for folder in sorted(inside, key=natural):
        if kinds[folder]:
            yield Entry(folder, root, fence, trouble=str(kinds[folder]) if isinstance(kinds[folder], str) else "")
    if kinds[root] is True:
        return
    if any(is_tree_file(path) for path in step_files(root, fence.has).values()):
        yield Entry(root, root, fence)
    for folder in sorted(inside, key=natural):
        if folder == root or is_report(folder / "results.json"):
            loose = loose_files(folder, fence.has)
            if not loose and is_report(folder / "results.json"):
                yield Entry(folder, root, fence)
            for path in loose:
                yield Entry(path, root, fence, loose=True)


def holds_stage(folder: Path) -> bool | str:
    """Whether a folder holds metrics or numbered trees; why it cannot be said, where it cannot."""
    try:
        stage, rows = is_stage(folder), folder / "metrics.jsonl"
        if not os.access(folder, os.R_OK | os.X_OK) or (stage and rows.exists() and not os.access(rows, os.R_OK)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return stage
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror or error}"


def folders(root: Path) -> Iterator[Path]:
    """A folder and those below it, those that cannot be listed too; links to folders are not followed."""
    closed: list[Path] = []
    for place, names, files in os.walk(root, onerror=lambda error: closed.append(Path(error.filename))):
        deep = len(Path(place).relative_to(root).parts)
        stage = {"evals"} if "metrics.jsonl" in files else set()  # a folder of that name elsewhere may hold evaluations
        names[:] = [name for name in names if deep < DEPTH and name not in PASSED_BY | stage and name[:1] != "."]
        yield Path(place)
    yield from closed


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
        self.entries: dict[str, Entry] = {}
        self.files: OrderedDict[Path, Lines] = OrderedDict()
        self.known: set[Path] = set()
        self.lock = threading.Lock()
        self.looked = 0.0
        self.missed = {path: why for path in self.given if (why := nothing_in(path, self.fence))}
        if len(self.missed) == len(self.given):
            raise ValueError(next(iter(self.missed.values())))
        self.refresh(0.0)

    def refresh(self, every: float = 3.0) -> list[Entry]:
        """Everything shown, after a new look at the folders if the last one is so many seconds old."""
        with self.lock:
            if time.monotonic() - self.looked >= every or not self.entries:
                for root in self.given:
                    missed = [Entry(root, root, self.fence, trouble=self.missed[root])] if root in self.missed else []
                    for one in missed or shown_under(root, self.fence):
                        if one.path not in self.known:
                            self.add(one)
                self.looked = time.monotonic()
            return list(self.entries.values())

    def add(self, one: Entry) -> None:
        """Give it a title, its path from the given folder on, or from what all have in common where two are named alike, and an id."""
        alike = len({path.name for path in self.given}) < len(self.given)
        above = Path(os.path.commonpath([path.parent for path in self.given])) if alike else one.root.parent
        name = one.path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json") if one.loose else one.path.name
        one.title = str(one.path.parent.relative_to(above) / name)
        one.slug = re.sub(r"[^a-z0-9]+", "-", one.title.lower()).strip("-") or "run"
        one.id = f"{one.slug}-{hashlib.sha256(os.fsencode(one.path)).hexdigest()[:LETTERS]}"
        one.files = self.files
        self.entries[one.id] = one
        self.known.add(one.path)

    def __getitem__(self, name: str) -> Entry:
        """The entry with this id, wherever the shelf begins; of a folder that was moved, the only one with this title. Else KeyError."""
        if name in self.entries:
            return self.entries[name]
        alike = [one for one in self.entries.values() if len(name) > LETTERS and one.id[-LETTERS - 1 :] == name[-LETTERS - 1 :]]
        alike = alike or [one for one in self.entries.values() if one.slug in (name, name[: -LETTERS - 1])]
        if len(alike) != 1:
            raise KeyError(name)
        return alike[0]


def nothing_in(path: Path, fence: Fence) -> str:
    """Why there is nothing to show at a path that was given, and the remedy; "" where there is something."""
    if path.is_file():
        return "" if is_tree_file(path) or is_report(path) else (
            f"{path} is neither a file of trees nor an evaluation: name what `ramulus train`, `ramulus rollout` "
            "or `ramulus eval --out FOLDER` wrote"
        )
    if any(True for _ in shown_under(path, fence)):
        return ""
    return (
        f"{path} holds neither metrics.jsonl nor trees nor results.json: name a folder that `ramulus train` or "
        "`ramulus eval --out FOLDER` wrote, or a folder or file of trees"
    )


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
