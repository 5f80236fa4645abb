"""Where runs and evaluations keep their trees, and the tokenizer that reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ramulus.core.run_folder import NUMBERED, STAGE, natural
from ramulus.look.viewer.files import is_tree_file

Allowed = Callable[[Path], bool]


def step_files(folder: Path, allowed: Allowed = Path.exists) -> dict[int, Path]:
    """The file of each step in a stage or a folder of trees, ascending; a plain one counts before a packed one."""
    folder = folder / "trees" if (folder / "trees").is_dir() else folder
    if not allowed(folder) or is_evaluation(folder):
        return {}
    files: dict[int, Path] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True):
        named = NUMBERED.match(entry.name)
        if named and (not entry.is_symlink() or allowed(Path(entry.path))):
            files[int(named[1])] = Path(entry.path)
    return dict(sorted(files.items()))


def is_evaluation(folder: Path) -> bool:
    """Whether `ramulus eval` writes into a folder: its files have the names of sets of problems, 2024.jsonl too."""
    return (folder / "eval.json").is_file()


def loose_files(folder: Path, allowed: Allowed = Path.exists) -> list[Path]:
    """The files of trees in a folder whose names are no steps, as an evaluation writes them."""
    files = [path for path in folder.iterdir() if not NUMBERED.match(path.name) or is_evaluation(folder)]
    return sorted((path for path in files if allowed(path) and is_tree_file(path)), key=natural)


def _stages_of(path: Path) -> list[Path]:
    """The folder of the stage that trees at a path belong to, then the other stages of its run, the last one first."""
    folder = path if path.is_dir() else path.parent
    stage = folder.parent if folder.name == "trees" else folder
    if not STAGE.fullmatch(stage.name):
        return [stage]
    try:
        beside = [other for other in stage.parent.iterdir() if other != stage and STAGE.fullmatch(other.name)]
    except OSError:  # a folder that may be entered, but not listed
        beside = []
    return [stage, *sorted(beside, key=natural, reverse=True)]


def tokenizer_of(path: Path, allowed: Allowed = Path.exists) -> Path | None:
    """tokenizer.json for the trees of a stage, a folder or a file; None where there is none yet.

    An evaluation keeps it beside its trees; of a run it is that of the stage's last checkpoint, or of a stage beside it.
    """
    beside = (path if path.is_dir() else path.parent) / "tokenizer" / "tokenizer.json"
    if allowed(beside):
        return beside
    for stage in _stages_of(path):
        for checkpoint in sorted(stage.glob("checkpoints/step-*"), key=natural, reverse=True):
            file = checkpoint / "model" / "tokenizer.json"
            if allowed(file):
                return file
    return None


def belonging(path: Path) -> list[Path]:
    """What is read beside a given path: the configuration of a stage, and where the tokenizer of its trees may lie."""
    stages = _stages_of(path)
    config = [stages[0].parent / "run.json"] if STAGE.fullmatch(stages[0].name) else []
    tokenizers = [path.parent / "tokenizer"] if path.is_file() else []
    return [*config, *tokenizers, *(stage / "checkpoints" for stage in stages)]
