"""Decide whether its run begins or goes on, and say what changed since it was saved."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from ramulus.core import run_folder
from ramulus.core.json_object import read_object
from ramulus.engine.factory import engine_traits
from ramulus.learn.objective.kl import KL
from ramulus.run.config.describe import CLASS, brought_forward, changes, holds, recipe_text, to_json, with_later_fields
from ramulus.run.config.find import absolute, split_name, stages_of
from ramulus.run.config.override import override, split
from ramulus.run.config.own_code import changed_code, code_digests
from ramulus.run.config.recipe import Run, writable
from ramulus.run.config.short_names import long_name
from ramulus.run.lock import Lock, check_free
from ramulus.tasks.chat import today

_FORMAT = 3
CODE = "code"  # in run.json: digests of the code of one's own that each stage uses, by file
AS_GIVEN = "given"  # in run.json: the stages that were given as objects, before overrides
FROM_PYTHON = "ramulus.train"  # what stands for the recipe of a run that was given as an object: only Python can go on with it
FORMER = "ramify"  # what the package, and the recipe that joins everything, were called in format 1
FORMER_PATHS = {  # overrides of earlier formats, and of what is below them, as the shipped recipes take them
    "exam": "final_evaluation",
    "mix.leash": "mix.kl_coef",
    "engine.copy": "engine.precision",
    "branching.delta": "signals.0.delta",
    "branching.words": "signals.0.words",
}
FIXED = (
    "name",
    "model",
    "lora",
    "seed",
    "tasks",
    "template",
    "system",
    "template_arguments",
    "date",
    "prompt_limit",
    "on_long",
)  # a change would make it another run
FORMER_PRECISION = "bfloat16"  # of engines of shipped recipes, which had autocast=true, before both were auto
FORMER_DEFAULTS = {"tokens_per_batch": 8192, "engine.memory_mb": 1024}  # which a run that began with them keeps, though they are auto now
SHAPED = ("mix", "schedule")  # numbers in them may change, their classes and the number of terms may not


@dataclass(frozen=True)
class Plan:
    """What `train` will do: the stages in their folders, under one top folder; nobody else writes there until `held` is closed."""

    recipe: str
    overrides: tuple[str, ...]
    stages: tuple[Run, ...]
    folder: Path
    notes: tuple[str, ...] = ()  # what changed since the run was saved
    held: ExitStack = field(default_factory=ExitStack, compare=False, repr=False)
    date: str = ""  # on which the run began: what chat templates write into prompts, also when it goes on
    given: tuple[Run, ...] = ()  # the stages as Python gave them, before overrides

    def save(self) -> None:
        """Write run.json for programs and recipe.py for people, atomically; done when every input has been found good."""
        (self.folder / "summary.json").unlink(missing_ok=True)  # of a shorter run: this one is at work
        path = self.folder / "run.json"
        began = read_saved(path).get("started") if path.exists() else None
        content = {"format": _FORMAT, "recipe": self.recipe, "overrides": list(self.overrides), "date": self.date}
        content |= {"started": began or round(time.time(), 3)} | ({AS_GIVEN: [to_json(stage) for stage in self.given]} if self.given else {})
        for stage in self.stages:
            replace_text(stage.folder / "recipe.py", recipe_text(stage))
        content["stages"] = [to_json(stage) for stage in self.stages]
        content[CODE] = code_of(self.stages)
        replace_text(path, json.dumps(content, indent=1))


def code_of(stages: Sequence[Run]) -> list[dict[str, str]]:
    """Digests of the code of one's own that stages use, by file."""
    return [code_digests(stage, *(reward for reward, _, _ in stage.weighted())) for stage in stages]


def changed_since(saved: Mapping[str, Any], stages: Sequence[Run]) -> list[str]:
    """A sentence for each file of one's own whose code was changed since a run was saved."""
    return [f"the code in {name} that the recipe uses was changed" for name in changed_code(saved.get(CODE, ()), code_of(stages))]


def build(recipe: str | tuple[Run, ...], overrides: list[str]) -> tuple[tuple[Run, ...], Path]:
    """The stages of a recipe, or these stages, with their overrides, each with its folder, and the top folder. ValueError for what is not saved."""
    stages = override(stages_of(recipe) if isinstance(recipe, str) else recipe, overrides)
    for stage in stages:
        to_json(stage)
    if len(stages) == 1:
        return stages, stages[0].folder
    if alone := [word for word in overrides for stage in stages if word.startswith(f"{stage.name}.") and field_meant(stage, word) == "out"]:
        raise ValueError(f"{alone[0]}: the stages of a recipe lie in one folder: set out=FOLDER")
    name = Path(split_name(recipe)[0]).stem if isinstance(recipe, str) else "-".join(stage.name for stage in stages)
    top = Path(stages[-1].out or f"runs/{name}").expanduser()
    return tuple(replace(stage, out=str(top / f"{i}-{stage.name}")) for i, stage in enumerate(stages, 1)), top


def prepare(recipe: str | tuple[Run, ...], overrides: list[str], resume: bool = False, fresh: bool = False) -> Plan:
    """Build the run and make its folder ready; an existing run is resumed, moved aside, or refused. A recipe is named, or its stages are given.

    Raises ValueError where the folder holds a run and neither was asked for, or where a change cannot be made in a running run.
    """
    if resume and fresh:
        raise ValueError("--resume and --fresh exclude each other: go on with the run in the folder, or begin a new one")
    source, day = absolute(recipe) if isinstance(recipe, str) else recipe, today()
    name = source if isinstance(source, str) else FROM_PYTHON
    stages, top = located(source, overrides) if resume else build(source, overrides)
    folders = [top, *(stage.folder for stage in stages)]
    saved_at = top / "run.json"
    notes: list[str] = []
    with ExitStack() as held:
        lock = held.enter_context(Lock(folders))
        for folder in folders:
            writable(folder)
        there = saved_at.exists() or any(run_folder.steps(folder) for folder in folders)
        if not there and (foreign := run_folder.foreign(top)):
            raise ValueError(f"out={top} holds {foreign}, among which the files of a run would be lost: name a folder of its own")
        if there and fresh:
            check_free(top, lock)
            there_really = top.resolve()  # a link stays one
            lock.release((there_really, move_aside(there_really)))
            held.enter_context(Lock(folders))
        elif there:
            if not resume:
                raise ValueError(
                    f"{top} holds a run already ({progress(top)}): add --resume to go on with it, --fresh to begin anew "
                    "(the old one is kept beside it), or choose another out=FOLDER"
                )
            saved = read_saved(saved_at)
            if (was := saved["recipe"]) != name:
                if was == FROM_PYTHON:
                    go_on = "go on with the same call of ramulus.train and resume=True"
                    raise ValueError(f"{top} holds a run that was trained from objects of Python: {go_on}, or choose another out=FOLDER")
                raise ValueError(f"{top} holds a run of the recipe {was}, not of {name}: resume it with that one, or choose another out=FOLDER")
            overrides = _merge(still_meant(saved, source, stages), overrides)
            stages, top = build(source, overrides)
            stages = as_begun(stages, saved["stages"], overrides)
            day = saved.get("date") or day
            notes = _compare(saved["stages"], [to_json(stage) for stage in stages], stages) + changed_since(saved, stages)
            refuse_fewer(stages)
        return Plan(name, tuple(overrides), stages, top, tuple(notes), held.pop_all(), day, () if isinstance(source, str) else source)


def located(source: str | tuple[Run, ...], overrides: list[str]) -> tuple[tuple[Run, ...], Path]:
    """As `build`, for a run that is there: overrides that say nothing without those it was begun with only have to name its folder."""
    try:
        return build(source, overrides)
    except ValueError:
        stages, top = build(source, [word for word in overrides if word.partition("=")[0].strip() == "out"])
        if not (top / "run.json").exists():
            raise
        return stages, top


def as_begun(stages: tuple[Run, ...], saved: Sequence[Mapping[str, Any]], overrides: Sequence[str]) -> tuple[Run, ...]:
    """The stages in the numbers that they began with, where shipped recipes said bfloat16 and say auto now, and no override does."""
    if any(word.endswith(("autocast=auto", "precision=auto", "bf16=auto")) for word in overrides) or len(stages) != len(saved):
        return stages
    answer = []
    for run, before in zip(stages, saved, strict=True):
        if run.autocast == "auto" and before.get("autocast") is True:
            run = replace(run, autocast=True)
        was, engine = before.get("engine"), cast(Any, run.engine)
        if isinstance(was, Mapping) and was.get("precision") == FORMER_PRECISION and engine_traits(engine).memory.precision == "auto":
            run = replace(run, engine=replace(engine, precision=FORMER_PRECISION))
        answer.append(run)
    return tuple(answer)


def still_meant(saved: dict[str, Any], source: str | tuple[Run, ...], stages: tuple[Run, ...]) -> list[str]:
    """The overrides of a saved run that hold for it still: where it lies is said by who goes on with it, and where that is an object of Python a
    field that was given otherwise since."""
    fields = [(assignment, stage, field_meant(stage, assignment)) for assignment in saved["overrides"] for stage in stages]
    dropped = {assignment for assignment, _, name in fields if name == "out"}
    if not isinstance(source, str):
        now = [to_json(stage) for stage in source]
        for number, before in enumerate(saved.get(AS_GIVEN, ())[: len(now)]):
            moved = [path for path, _, _ in changes(with_later_fields(before, source[number]), now[number])]
            alike = [(assignment, name) for assignment, stage, name in fields if stage is stages[number]]
            dropped |= {assignment for assignment, name in alike if any(f"{path}.".startswith(f"{name}.") for path in moved)}
            dropped |= {assignment for assignment, name in alike if any(f"{name}.".startswith(f"{path}.") for path in moved)}
    return [assignment for assignment in saved["overrides"] if assignment not in dropped]


def field_meant(stage: Run, assignment: str) -> str:
    """The field of a stage that an override sets, though it be by another name or for this stage alone."""
    return long_name(split(assignment)[0].removeprefix(f"{stage.name}."), stage)


def _merge(saved: list[str], new: list[str]) -> list[str]:
    """Saved overrides, then new ones; of two for one path the later stays, in its place: a field may have two names."""
    last: dict[str, str] = {}
    for assignment in [*saved, *new]:
        path = split(assignment)[0]
        last.pop(path, None)
        last[path] = assignment
    return list(last.values())


def _compare(old: list[Any], new: list[Any], stages: tuple[Run, ...]) -> list[str]:
    """One sentence for every change; ValueError for those that cannot be made."""
    if len(old) != len(new):
        raise ValueError(
            f"the saved run has {len(old)} stages and the recipe now {len(new)}: begin a new run with --fresh or another out=FOLDER"
        )
    notes: list[str] = []
    refused: list[str] = []
    undone: list[str] = []
    for stage, before, after in zip(stages, old, new):
        for path, was, now in changes(with_later_fields(before, stage), after):
            head = path.split(".")[0]
            if head == "out" or (now == "auto" and was == FORMER_DEFAULTS.get(path)):
                continue
            where = f"{stage.name}: {path}" if len(stages) > 1 else path
            text = f"{where} was {brief(was)}, is now {brief(now)}"
            shape = head in SHAPED and not isinstance(now, int | float) and holds(before, path)
            lacking = path == "mix.kl_coef" and not was and no_reference(stage)
            if head in FIXED or shape or lacking:
                text += ", but its checkpoints hold no reference model" if lacking else ""
                refused.append(text)
                undone.append(as_set(where.replace(": ", "."), was) if holds(before, path) else "")
            else:
                notes.append(text)
        notes += since_then(before, stage)
    if refused:
        undo = f"go on with {' '.join(undone)}" if all(undone) else "undo it"
        raise ValueError(
            f"cannot resume: {'; '.join(refused)}. Such a change makes it another run: {undo}, or begin a new run with --fresh or another out=FOLDER"
        )
    return notes


def refuse_fewer(stages: tuple[Run, ...]) -> None:
    """ValueError where a stage has come further than it is now to go: nothing leads back to a step whose checkpoint gave way to later ones."""
    for stage in stages:
        done = run_folder.steps(stage.folder)
        if done and done[-1] > stage.steps:
            field = f"{stage.name}.steps" if len(stages) > 1 else "steps"
            raise ValueError(
                f"{stage.folder} is saved at step {done[-1]}, beyond {field}={stage.steps}: set {field}={done[-1]} or more, "
                "or begin a new run with --fresh or another out=FOLDER"
            )


def no_reference(stage: Run) -> bool:
    """Whether a stage that had no KL term has begun, so that its checkpoints lack the reference model; of adapters the weights below them are it."""
    return stage.lora is None and bool(run_folder.steps(stage.folder))


def as_set(path: str, value: Any) -> str:
    """A field as it is set on the command line; "" for what is not written so."""
    if not isinstance(value, str | int | float | None) or (isinstance(value, str) and not value.strip()):
        return ""
    word = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return shlex.quote(f"{path}={word}")


def since_then(saved: dict[str, Any], stage: Run) -> list[str]:
    """What goes on otherwise in a run that was saved before a field was there, though nobody set it; and what goes on as before."""
    mix, notes = saved.get("mix") or {}, []
    if stage.mix.kl_coef and "kl" not in mix and stage.mix.kl == KL():
        notes.append("the KL term was k3 without a clamp and is clamped now: mix.kl.estimator=k3 mix.kl.clamp=none goes on as before")
    for i, (term, now) in enumerate(zip(mix.get("terms") or (), stage.mix.terms)):
        if getattr(now.estimator.advantage, "lone", None) == "zero" and "lone" not in term["estimator"]["advantage"]:
            name = f"mix.terms.{i}.estimator.advantage.lone=reward"
            notes.append(f"a path that is graded alone earned its reward and earns 0 now: {name} goes on as before")
    return notes


def brief(value: Any) -> str:
    """A JSON value in a few words."""
    if isinstance(value, dict) and CLASS in value:
        return f"{value[CLASS].rpartition('.')[2]}(...)"
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


def read_saved(path: Path) -> dict[str, Any]:
    """run.json of a run folder."""
    try:
        saved = json.loads(path.read_text())
        if saved["format"] > _FORMAT:
            raise ValueError(f"{path} was written by a newer ramulus: upgrade ramulus to resume it")
        return renamed(saved) if saved["format"] < _FORMAT else saved
    except (KeyError, TypeError, FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no saved run ({error}): begin a new one with --fresh or another out=FOLDER"
        ) from error


def renamed(saved: dict[str, Any]) -> dict[str, Any]:
    """run.json of an earlier format with the names of today."""
    name, colon, function = saved["recipe"].partition(":")
    stages = [stage | {"name": "ramulus" if stage["name"] == FORMER else stage["name"]} for stage in saved["stages"]]
    recipe = f"ramulus{colon}{function}" if name == FORMER else saved["recipe"]
    pairs = [split(assignment) for assignment in saved["overrides"]]
    names = [stage["name"] for stage in saved["stages"]]
    overrides = [f"{path_now(path, names)}={value}" for path, value in pairs]
    return saved | {"recipe": recipe, "overrides": overrides, "stages": brought_forward(stages)}


def path_now(path: str, names: list[str]) -> str:
    """The dotted path of an override as it is now; it may begin with the name of a stage."""
    head, dot, inner = path.partition(".")
    if head in names and dot:
        return f"{head}.{path_now(inner, [])}"
    for former, new in FORMER_PATHS.items():
        if path == former or path.startswith(f"{former}."):
            return new + path[len(former) :]
    return path


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a kill leaves the old one or the new one; OSError names it and the remedy."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OSError(f"cannot write {path}: {error.strerror}; free space, then go on with --resume") from error


def written_json(path: Path) -> dict[str, Any]:
    """A JSON file that a run wrote; ValueError names it and the remedy."""
    return read_object(path, "delete it, and what it holds is made again where that can be done")


def move_aside(folder: Path) -> Path:
    """Rename a folder to the first free NAME.1, NAME.2 ..., with a mark in it that says so."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    (aside / run_folder.ASIDE_MARK).touch()
    return aside


def progress(top: Path) -> str:
    """How far the run in a folder has come, in words."""
    checkpoints = [
        (path.parent, run_folder.steps(path.parent))
        for path in sorted(top.glob("checkpoints")) + sorted(top.glob("*/checkpoints"))
    ]
    done = [f"step {steps[-1]}" + (f" of {folder.name}" if folder != top else "") for folder, steps in checkpoints if steps]
    return f"saved at {done[-1]}" if done else "nothing saved yet"
