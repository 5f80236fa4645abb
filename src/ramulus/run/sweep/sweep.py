"""`ramulus sweep`: recipes x seeds, each an ordinary `ramulus train` in a process of its own, as many at once as the machine allows."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ramulus.look.curves import sweep_in
from ramulus.look.terminal import printable
from ramulus.native.memory import shared_among
from ramulus.native.processors import cores
from ramulus.run.config.describe import changes, holds, to_json, with_later_fields
from ramulus.run.config.find import absolute, split_name
from ramulus.run.config.override import split
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import brief, build, changed_since, field_meant, read_saved, replace_text
from ramulus.run.interrupt import Interrupt
from ramulus.run.lock import Lock
from ramulus.run.screen import unfailing
from ramulus.run.sweep.job_pool import Job, JobPool

TAIL = 12  # lines of a failed run's log that are shown


def label_of(recipe: str) -> str:
    """A recipe's name as a folder: `grpo:small` is grpo-small, `path/easy.py:grpo` is easy-grpo."""
    name, function = split_name(absolute(recipe))
    words = [Path(name).stem if name.endswith((".py", ".yaml", ".yml")) else name] + [function] * (absolute(recipe) != name)
    safe_words = (re.sub(r"[^\w.]+", "-", word).strip("-.") for word in words)
    return "-".join(word for word in safe_words if word) or "recipe"


def planned_jobs(recipes: Sequence[str], overrides: Sequence[str], seeds: Sequence[int], out: Path, threads: int) -> list[Job]:
    """Every run, seed by seed, all built and checked; ValueError for what cannot run or is not what the folder holds."""
    labels = [label_of(recipe) for recipe in recipes]
    _refuse(recipes, labels, overrides, seeds)
    jobs = []
    for seed in seeds:
        for recipe, label in zip(recipes, labels):
            folder = out / label / f"seed-{seed}"
            stages, _ = build(absolute(recipe), [f"out={folder}", f"seed={seed}", *overrides])
            saved = (folder / "run.json").exists()  # a run goes on with the threads it began with
            free = not saved and all(stage.threads is None for stage in stages)
            extra = (f"threads={threads}",) if free else ()
            jobs.append(Job(label, seed, absolute(recipe), folder, tuple(overrides), extra, stages))
    for job in jobs:
        _check(job)
    return jobs


def _refuse(recipes: Sequence[str], labels: list[str], overrides: Sequence[str], seeds: Sequence[int]) -> None:
    """ValueError for a sweep that makes no sense."""
    if not recipes or not seeds:
        raise ValueError(
            "a sweep needs at least one recipe and one seed: ramulus sweep grpo dapo --seeds 0 1 2 --out FOLDER"
        )
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different and not negative, got {' '.join(map(str, seeds))}")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f"two recipes have the label {', '.join(twice)}: name each once, or sweep them into different --out folders"
        )
    for stage in (stage for recipe in recipes for stage in build(absolute(recipe), [])[0]):
        for assignment in overrides:
            if field_meant(stage, assignment) in ("seed", "out"):
                raise ValueError(f"{assignment}: a sweep sets it for each run, use --seeds and --out")


def _check(job: Job) -> None:
    """ValueError where the folder holds another run than the one that is asked for; a field that is new since then is no difference."""
    path = job.folder / "run.json"
    if not path.exists():
        return
    saved = read_saved(path)
    differences: list[str] = []
    if saved["recipe"] != job.recipe:
        differences.append(f"its recipe is {saved['recipe']}, not {job.recipe}")
    overrides, there = (dict(map(split, words)) for words in (job.overrides, saved["overrides"]))
    for name in sorted((overrides.keys() | there.keys()) - {"out", "seed"} - ({"threads"} - overrides.keys())):
        if overrides.get(name) != there.get(name):
            differences.append(f"{name} was {there.get(name, 'not set')}, is now {overrides.get(name, 'not set')}")
    if not differences:
        differences = edited(saved["stages"], job.stages)
        differences += changed_since(saved, job.stages)
    if differences:
        raise ValueError(
            f"{job.folder} holds another run: {'; '.join(differences)}. Ask for what it holds, choose another --out, or move the folder away"
        )


def edited(saved: list[Any], stages: tuple[Run, ...]) -> list[str]:
    """What is different in the recipe since a run of it was saved."""
    if len(saved) != len(stages):
        return [f"it has {len(saved)} stages, the recipe now {len(stages)}"]
    differences = []
    for old, stage in zip(saved, stages):
        for path, was, now in changes(with_later_fields(old, stage), to_json(stage)):
            if path.split(".")[0] not in ("out", "threads") and holds(old, path):
                differences.append(f"{stage.name}: {path} was {brief(was)}, is now {brief(now)}")
    return differences


def allot(jobs: int | None, threads: int | None) -> tuple[int, int]:
    """(processes at once, threads of each): one thread each on all cores where nothing is said."""
    for name, value in (("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    threads = threads or (max(cores() // jobs, 1) if jobs else 1)
    return jobs or max(cores() // threads, 1), threads


def sweep(
    recipes: Sequence[str], overrides: Sequence[str], seeds: Sequence[int], out: Path, console: Console,
    jobs: int | None = None, threads: int | None = None,
) -> int:  # fmt: skip
    """Run what is not finished; returns the exit status: 0, 1 where a run failed, 128 + the signal that stopped the sweep."""
    with unfailing(console):  # runs go on though nobody can be told
        return _swept(recipes, overrides, seeds, out, console, jobs, threads)


def _swept(
    recipes: Sequence[str], overrides: Sequence[str], seeds: Sequence[int], out: Path, console: Console, jobs: int | None, threads: int | None
) -> int:
    """The same, where no word on the console raises."""
    most, count = allot(jobs, threads)
    planned = planned_jobs(recipes, overrides, seeds, out.resolve(), count)
    out.mkdir(parents=True, exist_ok=True)
    numbers = [f"--{name}={value}" for name, value in (("jobs", jobs), ("threads", threads)) if value is not None]
    command = ["ramulus", "sweep", *recipes, *overrides, "--seeds", *map(str, seeds), "--out", str(out), *numbers]
    content = {
        "format": 1, "command": command, **recipes_and_labels(recipes, out), "overrides": list(overrides), "seeds": list(seeds), "threads": count,
    }  # fmt: skip
    with Lock([out], "choose another --out") as lock:
        replace_text(out / "sweep.json", json.dumps(content, indent=1))
        most = min(most, len(planned))
        environment = os.environ | {"OMP_NUM_THREADS": str(count), "PYTHONUNBUFFERED": "1"} | shared_among(most)
        pool = JobPool(planned, most, environment, lock, console)
        with Interrupt() as interrupt:
            pool.work(interrupt)
    report(pool.failed, len(planned), out, interrupt.signal_name, console)
    if interrupt.signal_name is not None:
        pool.say(f"stopped by {interrupt.signal_name}, everything done so far is saved; go on with\n  {shlex.join(command)}")
        return 128 + signal.Signals[interrupt.signal_name].value
    return int(bool(pool.failed))


def recipes_and_labels(recipes: Sequence[str], out: Path) -> dict[str, list[str]]:
    """The recipes and labels of a folder's sweeps, those of an earlier one first: the first is what `compare` holds the others against."""
    before = sweep_in(out)
    these = {"recipes": [absolute(recipe) for recipe in recipes], "labels": [label_of(recipe) for recipe in recipes]}
    return {name: list(dict.fromkeys([*before.get(name, []), *now])) for name, now in these.items()}


def report(failed: dict[str, Job], total: int, out: Path, stopped: str | None, console: Console) -> None:
    """What failed, with the end of its log, and what to do next."""
    for how, job in failed.items():
        console.out(f"\n{how}; the end of {job.log}:", highlight=False)
        for line in job.log.read_text(errors="replace").splitlines()[-TAIL:] if job.log.is_file() else ():
            console.out(f"  {printable(line)}", highlight=False)
    if stopped is None:
        text = f"{total - len(failed)} of {total} runs are finished in {out}; "
        rest = "the same command tries the others again" if failed else f"ramulus compare {shlex.quote(str(out))}"
        console.out(f"\n{text}{rest}", highlight=False)
