"""`ramulus.train`: the same training as the command's, in a script, a thread or a notebook cell."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ramulus.look.terminal import new_console
from ramulus.run.callbacks import Callback, callbacks_of
from ramulus.run.checkpoint import Generators
from ramulus.run.config.find import refuse_same_names, stages_of
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import prepare
from ramulus.run.config.unknown import unknown
from ramulus.run.interrupt import Interrupt, Stopped
from ramulus.run.launch import conclude, nothing_saved, refuse_rework, run_stages, seconds_worked
from ramulus.run.result import Result
from ramulus.run.runtime import collecting_seldom
from ramulus.run.screen import Screen
from ramulus.run.train_stage import Session

_PAUSE = 2.0  # seconds between the lines of steps in a notebook, where they would fill the page


def train(
    run: Run | Sequence[Run] | str,
    *overrides: str,
    callbacks: Callback | Sequence[Callback] = (),
    out: str | Path | None = None,
    resume: bool = False,
    fresh: bool = False,
    quiet: bool = False,
    **changed: Any,
) -> Result:
    """Train by a Run, by several as stages, or by a recipe's name or file, and wait for the end; what it says goes to standard output.

    `overrides` are those of the command line ("branching.width=16"), `changed` are fields by name and value (rewards=my_function), both for
    every stage that has them. `resume`, `fresh` and `out` are as in `ramulus train`. Rewards may be any function, also a lambda or one of a
    notebook cell: plain ones run in threads of this process; `Guarded` sends them into processes that can be killed.

    Torch's threads and determinism and the global random generators are afterwards as they were. Ctrl-C, or a notebook's stop button, saves
    and raises KeyboardInterrupt; the same call with resume=True goes on. A callback that raises StopTraining saves and returns.
    Raises ValueError, OSError or ImportError, with the remedy, for what cannot work, before any work.
    """
    began = time.monotonic()
    stages, listening = _stages(run, changed), callbacks_of(callbacks)
    if wrong := [word for word in overrides if not isinstance(word, str)]:
        raise ValueError(f"an override is text, as \"steps=100\", got {wrong[0]!r:.80}; several stages are one list, and fields by value have names")
    words = [*overrides, *([f"out={out}"] if out is not None else [])]
    console = _console(quiet)
    plan = prepare(stages, words, resume, fresh)
    with plan.held, _as_it_was(), collecting_seldom(), Interrupt() as interrupt:
        for note in plan.notes:
            console.out(f"changed since the run was saved: {note}", highlight=False)
        refuse_rework(plan)
        earlier = sum(seconds_worked(stage) for stage in plan.stages)
        session = Session(console, interrupt, listening, _PAUSE if new_console().is_jupyter else 0.0)
        try:
            run_stages(plan, session)
        except (Stopped, KeyboardInterrupt) as stopped:
            return _stopped(plan.folder, stopped, interrupt, session, nothing_saved(plan))
        conclude(plan, console, earlier + time.monotonic() - began)
    return Result(plan.folder)


def _stages(run: Run | Sequence[Run] | str, changed: dict[str, Any]) -> tuple[Run, ...] | str:
    """The stages with these fields in each that has them; a recipe's name stays one where nothing is changed by value."""
    if isinstance(run, str) and not changed:
        return run
    stages: tuple[Any, ...] = stages_of(run) if isinstance(run, str) else tuple(run) if isinstance(run, Sequence) else (run,)
    wrong = [stage for stage in stages if not isinstance(stage, Run)]
    if wrong or not stages:
        raise ValueError(f"train takes a Run, several, or the name or file of a recipe, got {wrong[0] if wrong else run!r:.80}")
    known = [field.name for field in fields(Run)]
    for name in changed:
        if name not in known:
            raise ValueError(unknown(name, Run, known, name, stages[-1]))
    stages = tuple(replace(stage, **changed) for stage in stages)
    refuse_same_names(stages, "ramulus.train")
    return stages


def _stopped(folder: Path, stopped: BaseException, interrupt: Interrupt, session: Session, nothing: bool) -> Result:
    """Say what is saved; a callback's wish is a result, a signal's goes on upward."""
    if interrupt.signal_name is None and isinstance(stopped, Stopped):
        session.say(f"stopped by {stopped}; everything done so far is saved in {folder}, resume=True goes on")
        return Result(folder, str(stopped))
    saved = "nothing was saved yet" if nothing else f"what is saved is in {folder}"
    saved += f": the same call with resume=True {'begins again' if nothing else 'goes on'}"
    session.say(f"stopped by {interrupt.signal_name or 'SIGINT'}; {saved}")
    if interrupt.signal_name not in (None, "SIGINT"):
        raise SystemExit(128 + signal.Signals[interrupt.signal_name].value) from stopped
    raise KeyboardInterrupt from None


def _console(quiet: bool) -> Console:
    """Where a run speaks: plain text in a notebook, and nothing that fails to be written raises."""
    in_notebook = new_console().is_jupyter  # whose kernel sets FORCE_COLOR, which rich takes for a terminal
    console = new_console(quiet=quiet, force_jupyter=False, force_terminal=False if in_notebook else None, no_color=in_notebook or None)
    console.file = Screen(console.file)  # type: ignore[assignment]
    return console


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Set back what a run sets for the whole process."""
    generators, threads, strict = Generators.now(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        generators.restore()
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
