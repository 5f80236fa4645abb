"""Train one stage from wherever it stands: evaluate, train what is left, evaluate again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError

from ramulus.core import run_folder
from ramulus.core.checksums import digest_of_all
from ramulus.core.json_object import finite_text
from ramulus.core.task import Task
from ramulus.native.processors import device_of
from ramulus.run import checkpoint
from ramulus.run.advice import Advice, Facts
from ramulus.run.ahead import AheadRollouts, ripe_of_json
from ramulus.run.callbacks import Callback, EvaluationDone, Listeners, Say, TrainingBegun, TrainingEnded
from ramulus.run.cluster import Ground, grounded
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import replace_text, written_json
from ramulus.run.evaluation.final_evaluation import ModelScores, evaluate_model, scores
from ramulus.run.interrupt import Interrupt
from ramulus.run.logbook import Logbook
from ramulus.run.numerics import numerics, other_numerics
from ramulus.run.slow_modes import slow_modes
from ramulus.run.stage import Parts, build_parts, probe, rollouts_of
from ramulus.run.trackers import Trackers
from ramulus.run.trainer import Trainer, TrainerState, hand_over


@dataclass(frozen=True)
class Session:
    """What all stages of one call share."""

    console: Console
    interrupt: Interrupt
    callbacks: Sequence[Callback] = ()
    pause: float = 0.0  # seconds between the lines of steps where no terminal shows a bar

    def say(self, text: str) -> None:
        """A line for people, as it is."""
        self.console.out(text, highlight=False)


def _digest(tasks: Sequence[Task]) -> str:
    """A fingerprint of ids, prompts, answers and demonstrations: resuming with other problems is refused."""
    return digest_of_all((task.id, task.prompt, task.answer, task.demonstrations) for task in tasks)


async def restore(run: Run, parts: Parts, console: Console) -> TrainerState:
    """The state to go on from: that of the newest whole checkpoint, or a new one; damaged newer ones are set aside.

    Raises ValueError where the problems are others now, and where no checkpoint is whole.
    """
    checkpoint.bring_back(run.folder)
    wrong: dict[int, str] = {}
    alone: list[int] = []
    for step in reversed(run_folder.steps(run.folder)):
        try:
            state = await at_checkpoint(run, parts, step)
            break
        except checkpoint.Damaged as error:
            wrong[step] = str(error)
        except checkpoint.ModelAlone:
            alone.append(step)
    else:
        if wrong or alone:
            line = "; ".join(f"that of step {step} is damaged ({text})" for step, text in wrong.items())
            line += f"{'; ' if wrong and alone else ''}{f'that of step {alone[0]} holds the model alone (keep_optimizer=false)' if alone else ''}"
            raise ValueError(f"{run.folder} has no whole checkpoint: {line}. Bring one back, or begin anew with --fresh (the old run is kept)")
        return TrainerState(tasks=_digest(parts.tasks))
    for step, text in wrong.items():
        aside = checkpoint.set_aside(run.folder, step)
        line = f"the checkpoint of step {step} is damaged ({text}), so it is not gone on from; it is {aside.name} now"
        console.out(f"{run.name}: {line}", highlight=False)
    for path in (run.folder / "trees").glob("*.jsonl"):
        if path.stem.isdigit() and int(path.stem) > state.step:
            path.unlink()
    console.out(f"{run.name}: going on after step {state.step} of {run.steps}", highlight=False)
    before = run_folder.state_of(run_folder.path_of(run.folder, state.step)).get("numerics", {})
    if before and (changed := other_numerics(before, numerics(device_of(run.device), parts.engine.about))):
        warning = f"not the machine or the packages of step {state.step}, so what follows may differ in the last bits: {changed}"
        console.out(f"{run.name}: {warning}", highlight=False)
    return state


async def at_checkpoint(run: Run, parts: Parts, step: int) -> TrainerState:
    """The state of a checkpoint, with the learner and the generators brought to where it found them. Raises Damaged."""
    saved = {"lowered": {}} | checkpoint.read_state(run.folder, step)  # older ones lack it
    try:
        state = TrainerState(**{field.name: saved[field.name] for field in fields(TrainerState)} | {"cursor": ripe_of_json(saved["cursor"])})
        policy = saved["policy"]
    except Exception as error:
        raise checkpoint.Damaged(f"state.json lacks a part or has a wrong one: {error}") from error
    if state.tasks != _digest(parts.tasks):
        raise ValueError(
            f"cannot resume {run.folder}: its problems are not those it was trained on; bring the old ones back, or begin a new run with --fresh"
        )
    try:
        await parts.learner.restore(run_folder.path_of(run.folder, step), policy)
        checkpoint.restore_random(saved)
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError, RuntimeError, OSError) as error:
        if saved.get("sealed"):  # every file is as it was written: something else is wrong
            raise
        raise checkpoint.Damaged(f"{type(error).__name__}: {error}") from error
    return state


async def train_stage(run: Run, start: Path | None, ready: Callable[[], None], session: Session) -> None:
    """Evaluate if asked, train what is left of the stage, evaluate again; all of it picks up where it was stopped.

    `ready` is called once every input has been found good, before any work.
    """
    with grounded(run) as ground:
        await on_ground(run, start, ready, session, ground)


async def on_ground(run: Run, start: Path | None, ready: Callable[[], None], session: Session, ground: Ground | None) -> None:
    """Build the parts of a stage on `ground` (None: this process), restore its last checkpoint and train; closes learner and engine at the end."""
    parts = build_parts(run, start, ground)
    run = parts.run
    try:
        await session.interrupt.abandonable(probe(run, parts))
        state = await restore(run, parts, session.console)  # the last to touch the generators: a reward may draw from them
        trackers = Trackers(run, state.steps_logged, parts.decode)
        trackers.open(strict=state.step == 0 and start is None)
        ready()
        if parts.taken.remark:
            parts.taken.save(run.folder)
        await _train(run, parts, state, trackers, session)
    finally:
        parts.learner.close()
        parts.engine.close()


async def _train(run: Run, parts: Parts, state: TrainerState, trackers: Trackers, session: Session) -> None:
    """What is left of a stage."""
    console = session.console
    session.say(f"{run.name}: samples by {parts.engine.about}")
    for words in (parts.taken.remark, *slow_modes(run, device_of(run.device))):
        if words:
            session.say(f"{run.name}: {words}")
    ends = tuple(map(str, parts.decode.tokenizer.convert_ids_to_tokens(list(parts.stop.eos))))
    advice = Advice(Facts(run, len(parts.tasks), ends))
    listeners = Listeners((trackers, advice, *session.callbacks), session.say)
    await hand_over(parts.learner, parts.engine)
    if state.step == 0:
        await evaluate_once(run, parts, "before", session, listeners)
        checkpoint.seed_all(run.seed)  # a run that was killed early does not repeat that evaluation
    rollouts = AheadRollouts(rollouts_of(run, parts, parts.stop), run.cluster.ahead if run.cluster else 0, run.steps)
    logbook = Logbook(run, console, state.steps_logged, session.pause)
    try:
        listeners.tell(lambda it: it.on_begin, TrainingBegun(run, state.step, logbook.say))
        about = run, parts.learner, parts.engine, rollouts, parts.evals, logbook, session.interrupt, state
        trainer = Trainer(*about, listeners=listeners, rest=parts.rest)
        try:
            await trainer.train()
        finally:
            logbook.close()
        await evaluate_once(run, parts, "after", session, listeners)
    finally:
        listeners.tell(lambda it: it.on_end, TrainingEnded(run, state.step, session.say))


async def evaluate_once(run: Run, parts: Parts, when: str, session: Session, listeners: Listeners) -> None:
    """Evaluate the model as it is now, where the run asks for that, and keep the result, unless that was done already."""
    how, console = run.final_evaluation, session.console
    if how is None:
        return
    path = run_folder.final_evaluation(run.folder, when)
    if path.exists() and (when == "before" or written_json(path)["step"] == run.steps):
        return
    console.out(f"evaluating the model {when} training, on {len(parts.final_tasks)} problems it is not trained on ...", highlight=False)
    began = time.monotonic()
    start = when == "before"
    work = evaluate_model(run, how, parts.engine, parts.final_tasks, parts.decode, parts.stop, start, console)
    measured: ModelScores = await session.interrupt.abandonable(work)
    await parts.engine.reset()  # what the evaluation left in the engine's memory must not touch training
    step = 0 if start else run.steps
    replace_text(path, finite_text(measured | {"seconds": time.monotonic() - began, "step": step}))
    brief = scores(measured, how.samples)
    listeners.tell(lambda it: it.on_evaluation, EvaluationDone(run, step, session.say, brief, path, when))


def catch_up(run: Run, say: Say) -> None:
    """Send the trackers of a finished stage what they have missed."""
    trackers = Trackers(run, run.steps)
    if trackers.behind(run.steps):
        trackers.open(strict=False)
        trackers.on_begin(TrainingBegun(run, run.steps, say))
        trackers.on_end(TrainingEnded(run, run.steps, say))


def finished(run: Run, used: bool) -> bool:
    """Whether nothing is left to do in a stage; where its last checkpoint will be `used`, it must be whole too."""
    checkpoints = run_folder.steps(run.folder)
    if not checkpoints or checkpoints[-1] < run.steps:
        return False
    path, after = run_folder.path_of(run.folder, checkpoints[-1]), run_folder.final_evaluation(run.folder, "after")
    try:
        pending = run_folder.state_of(path)["pending"]
    except (ValueError, KeyError):
        return False
    evaluated = run.final_evaluation is None or (after.exists() and written_json(after)["step"] == run.steps)
    return pending is None and evaluated and not (used and run_folder.wrong_with(path))
