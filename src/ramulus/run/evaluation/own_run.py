"""What a run was trained with, for an evaluation of it: its problems, rewards, template and limits."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ramulus.core import run_folder
from ramulus.grow.grading import Rewards
from ramulus.learn.policy.model import Pretrained
from ramulus.run.config.override import without_blanks
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import FROM_PYTHON, build, read_saved
from ramulus.run.config.weighted import named_rewards
from ramulus.run.config.words import rewards as rewards_named
from ramulus.run.evaluation.task_sets import HELD_OUT_SET, ProblemOptions, TaskSets
from ramulus.run.runtime import model_path


def asked_sets(model: str, tasks: tuple[str, ...], limit: int | None, options: ProblemOptions, reward: str | None) -> TaskSets:
    """The sets of problems of a command: those named, or the held-out ones of the run; graded by `reward`, by the run's rewards, or as usual.

    Raises ValueError where none are named and the model is no run, and for a run whose recipe cannot be read when it is needed.
    """
    rewards = None if reward is None else rewards_by_name(reward)
    run = None
    try:
        run = trained_by(model)
    except (ValueError, OSError, ImportError) as error:
        missing = ["--tasks FILE"] * (not tasks) + ["--reward FILE.py:NAME (or Boxed, say)"] * (rewards is None)
        if missing:
            raise ValueError(f"what {model} was trained with cannot be read ({error}): name {' and '.join(missing)}") from error
    if not tasks and run is None:
        raise ValueError(f"{model} is no run, whose held-out problems would be taken: name --tasks FILE, gym:NAME, chain, sums or word_problems")
    return TaskSets(tasks or (HELD_OUT_SET,), limit, options, rewards, run)


def rewards_by_name(reward: str) -> Rewards:
    """Rewards by their names or as FILE.py:FUNCTION, several with commas between."""
    return named_rewards(without_blanks(rewards_named(reward), "--reward"))


def saved_of(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The top folder of a run or of one of its stages, and its run.json; None for what is no run."""
    top = next((path for path in (folder, folder.parent) if (path / "run.json").is_file()), None)
    return None if top is None or not run_folder.is_run(folder) else (top, read_saved(top / "run.json"))


def trained_by(model: str) -> Run | None:
    """The stage of a run whose model is evaluated, rebuilt from its recipe; None for what is no run."""
    folder = Path(model).expanduser()
    there = saved_of(folder)
    if there is None:
        return None
    top, saved = there
    if saved["recipe"] == FROM_PYTHON:
        raise ValueError("it was trained from objects of Python, which no command can rebuild")
    stages, _ = build(saved["recipe"], [*saved["overrides"], f"out={top}"])
    trained = [stage for stage in stages if run_folder.steps(stage.folder)] or list(stages)
    run = next((stage for stage in stages if stage.folder.name == folder.name and folder != top), trained[-1])
    return replace(run, date=run.date or saved.get("date") or "")


def source_of(model: str) -> Pretrained:
    """What loads a model folder, hub name or the model of a run's checkpoint; that of a run with the code, weights and vocabulary that it allowed."""
    path = Path(model).expanduser()
    inside = path.name == "model" and path.parent.parent.name == "checkpoints"
    named: dict[str, Any] = {}
    with suppress(ValueError, OSError, TypeError, LookupError):  # of a run.json that cannot be read any more
        named = saved_model(path.parents[2] if inside else path)
    allowed = {name: named[name] for name in ("extra_weights", "trust_remote_code", "padded_tokens") if name in named}
    return Pretrained(model_path(model), **allowed)


def saved_model(folder: Path) -> dict[str, Any]:
    """What run.json says of the model of a stage, or of the last stage of a run that has begun; {} where it says nothing."""
    there = saved_of(folder)
    if there is None:
        return {}
    begun = [folder.name] if folder != there[0] else [path.name for path in run_folder.stage_folders(folder)]
    stages = there[1]["stages"]
    mine = [stage for stage in stages if Path(stage["out"] or "").name in begun] or stages
    return dict(mine[-1]["model"]) if mine and isinstance(mine[-1]["model"], dict) else {}
