"""What lies where in the folder of a run: what is a run, a stage of one, a checkpoint, a file of a step's trees.

RUN/run.json, RUN/1-NAME/metrics.jsonl, RUN/1-NAME/trees/000001.jsonl, RUN/1-NAME/checkpoints/step-000100/model
"""

from __future__ import annotations

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from ramulus.core.checksums import CHECKSUMS, damage
from ramulus.core.json_object import object_in, read_object

STAGE = re.compile(r"[0-9]+-.+")  # the folders of the stages of a run
ASIDE = re.compile(r".+\.\d+")  # what `train --fresh` calls an earlier run; lr-0.1 is a name like that too
ASIDE_MARK = ".moved-aside"  # the file that it leaves in one
WHEN = ("before", "after")  # a final evaluation is made, training
NUMBERED = re.compile(r"^([0-9]+)\.jsonl(\.gz)?$")  # the trees of a step


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, or of one stage; one of a model, which may have a folder `checkpoints` of its own, is none."""
    if any((folder / name).is_file() for name in ("run.json", "metrics.jsonl")):
        return True
    began = (folder / "checkpoints").is_dir() and not is_model(folder) and not any(folder.glob("*.gguf"))
    return began or bool(stage_folders(folder))


def is_model(folder: Path) -> bool:
    """Whether a folder is that of a model, or of adapters of one."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def foreign(folder: Path) -> str:
    """What a folder holds that is no run's: a repository, a package, a model, programs, or everything in the current folder; "" else."""
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    kinds = {
        "a repository or a package": [name for name in inside if name in (".git", ".hg", "pyproject.toml", "setup.py", "package.json")],
        "a model": [name for name in inside if name == "config.json" or name.endswith((".safetensors", ".gguf", ".bin"))],
        "programs": [name for name in inside if name.endswith((".py", ".ipynb")) and name != "recipe.py"],  # a run's own, before its run.json
        "the files that you work on": inside if folder.resolve() in (Path.cwd(), Path(os.path.expanduser("~"))) else [],
    }
    return next((f"{kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if any(not name.startswith(".lock") for name in names)), "")


def is_stage(folder: Path) -> bool:
    """Whether a folder holds metrics, or a folder of numbered trees."""
    trees = folder / "trees"
    numbered = trees.is_dir() and any(NUMBERED.match(path.name) for path in trees.iterdir())
    return (folder / "metrics.jsonl").is_file() or numbered


def stage_folders(folder: Path) -> list[Path]:
    """The folders of the stages that a run has begun, by number; a run of its own below the folder is no stage."""
    inside = folder.iterdir() if folder.is_dir() else ()
    begun = [path for path in inside if STAGE.fullmatch(path.name) and (path / "metrics.jsonl").is_file()]
    return sorted((path for path in begun if not (path / "run.json").exists()), key=lambda path: natural(path.name))


def moved_aside(folder: Path) -> bool:
    """Whether a folder is an earlier run that `train --fresh` renamed to NAME.1 to begin anew as NAME.

    One of before there was a mark says in its run.json where it was written; where it does not, it counts as no such run, with a warning.
    """
    base = folder.name.rpartition(".")[0]
    if not ASIDE.fullmatch(folder.name) or not is_run(folder) or not is_run(folder.with_name(base)):
        return False
    if (folder / ASIDE_MARK).exists():
        return True
    written = written_as(folder)
    if written not in (base, folder.name):
        doubt = f"{folder} counts as a run of its own: move it elsewhere if it is an earlier run of {base} that --fresh moved aside"
        warnings.warn(doubt, stacklevel=2)
    return written == base


def written_as(folder: Path) -> str:
    """The name of the folder that a run was written in, by its run.json; "" where that does not say it."""
    try:
        stages = object_in(folder / "run.json")["stages"]
        last = Path(stages[-1]["out"] or f"runs/{stages[-1]['name']}")
    except (LookupError, TypeError):
        return ""
    return last.name if len(stages) == 1 else last.parent.name


def natural(name: str | Path) -> list[tuple[int, int, str]]:
    """A key that sorts seed-10 after seed-9."""
    words = re.split(r"(\d+)", str(name))
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in words if word]


def steps(folder: Path) -> list[int]:
    """The steps of the whole checkpoints of a stage, ascending."""
    checkpoints = (folder / "checkpoints").glob("step-*")
    return sorted(int(path.name[5:]) for path in checkpoints if path.name[5:].isdigit() and (path / "state.json").is_file())


def path_of(folder: Path, step: int) -> Path:
    """The folder of one checkpoint of a stage."""
    return folder / "checkpoints" / f"step-{step:06d}"


def final_evaluation(folder: Path, when: str) -> Path:
    """The file of what a stage's model scored before or after training; a file by its former name, exam-after.json, where there is one."""
    former = folder / f"exam-{when}.json"
    return former if former.is_file() else folder / f"evaluation-{when}.json"


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The state.json of a checkpoint; ValueError names the file where it is damaged."""
    path = checkpoint / "state.json"
    try:
        return read_object(path)
    except OSError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def wrong_with(checkpoint: Path, model_only: bool = False) -> str:
    """What is wrong with a checkpoint, in words; "" where all that was written is there as it was written.

    Of one without checksums, as they were written before, only state.json is looked at.
    """
    try:
        return damage(checkpoint, lambda name: not model_only or name.startswith(("model/", "state.json")))
    except FileNotFoundError:
        pass
    try:
        return f"{CHECKSUMS} is missing" if state_of(checkpoint).get("sealed") else ""
    except ValueError as error:
        return str(error)


def newest_state(stage: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint whose state.json can be read; None where there is none."""
    for step in reversed(steps(stage)):
        with suppress(ValueError):
            return state_of(path_of(stage, step))
    return None


def model_folder(run: Path, which: str) -> tuple[Path, int]:
    """The model folder of a checkpoint, the "last" or the "best", and its step; of the last stage that has one.

    A damaged one is passed over for the newest whole one, with a warning.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"there is no run at {run}: give the folder that `ramulus train` wrote")
    stages = [stage for stage in [run, *stage_folders(run)] if steps(stage)]
    if not stages:
        raise ValueError(
            f"{run} has no checkpoint yet: let it train to its first save_every, or stop it with Ctrl-C, which saves"
        )
    stage, known = stages[-1], steps(stages[-1])
    if which == "best":
        best = (newest_state(stage) or {}).get("best")
        if best is None:
            raise ValueError(
                f"{stage} was never evaluated, so no checkpoint is the best: export the last one, or train with evals"
            )
        known = [int(best["step"])]
    wrong: dict[Path, str] = {}
    for step in reversed(known):
        path = path_of(stage, step)
        if not (fault := wrong_with(path, model_only=True)):
            if wrong:
                damaged = "; ".join(f"{path} is damaged ({fault})" for path, fault in wrong.items())
                warnings.warn(f"{damaged}: taking the checkpoint of step {step}", stacklevel=2)
            return path / "model", step
        wrong[path] = fault
    raise ValueError("; ".join(f"{path} is damaged ({fault})" for path, fault in wrong.items()) + ": no whole checkpoint is left there")
