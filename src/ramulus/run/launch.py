"""`ramulus train`: stage after stage, stopped cleanly by a signal, and the summary at the end."""

from __future__ import annotations

import json
import shlex
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ramulus.core import run_folder, store
from ramulus.core.json_object import finite_text
from ramulus.grow.branching import innermost
from ramulus.grow.segments import Segments
from ramulus.learn.factory import learner_traits
from ramulus.learn.sharded.joining import torchrun_size
from ramulus.look.before_after import reward_line, turned
from ramulus.look.viewer.show import decoder_of, draw_tree
from ramulus.run.cluster import connected
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import FROM_PYTHON, Plan, prepare, replace_text, written_json
from ramulus.run.config.words import problems_word, reward_word
from ramulus.run.evaluation.final_evaluation import scores, table
from ramulus.run.event_loop import run_to_end
from ramulus.run.interrupt import Interrupt, Stopped
from ramulus.run.logbook import clock, rows_of
from ramulus.run.screen import unfailing
from ramulus.run.slow_rewards import SlowRewards
from ramulus.run.train_stage import Session, catch_up, finished, train_stage
from ramulus.tasks.files import File

MOST_SHOWN = 10  # paths of a tree that is drawn when all is done


def launch(
    recipe: str, overrides: list[str], resume: bool, fresh: bool, console: Console, began: float | None = None
) -> int:
    """Run every stage that is not finished; returns the exit status: 0, or 128 + the signal that stopped the run.

    `began` is when the command was given, by time.monotonic(): what start-up took counts among the seconds of the summary.
    """
    began = time.monotonic() if began is None else began
    with unfailing(console):
        plan = prepare(recipe, overrides, resume, fresh)
        with plan.held:
            refuse_idle_ranks(plan)
            return work(plan, recipe, console, began)


def work(plan: Plan, recipe: str, console: Console, began: float) -> int:
    """Run every stage that is not finished, and say what came of it; returns the exit status."""
    earlier = sum(seconds_worked(run) for run in plan.stages)
    for note in plan.notes:
        console.out(f"changed since the run was saved: {note}", highlight=False)
    refuse_rework(plan)
    with Interrupt() as interrupt:
        try:
            run_stages(plan, Session(console, interrupt))
        except (Stopped, KeyboardInterrupt) as stopped:
            by = interrupt.signal_name or "SIGINT"
            saved = f"stopped by {by}, everything done so far is saved in {plan.folder}"
            if not isinstance(stopped, Stopped):
                saved = f"stopped at once by a second signal, the last checkpoint is in {plan.folder}"
            if nothing_saved(plan):
                saved = f"stopped by {by} before the end of the first step, so nothing is saved yet"
            again = f"ramulus train {shlex.quote(recipe)} out={shlex.quote(str(plan.folder))} --resume"
            console.out(f"\n{saved}; go on with\n  {again}", highlight=False)
            return 128 + signal.Signals[by].value
    conclude(plan, console, earlier + time.monotonic() - began)
    return 0


def run_stages(plan: Plan, session: Session) -> None:
    """Each stage in a loop of its own; a later one starts from the weights of the one before."""
    start: Path | None = None
    console = session.console
    for i, run in enumerate(plan.stages, 1):
        if finished(run, used=i == len(plan.stages) or not run_folder.steps(plan.stages[i].folder)):
            console.out(f"{run.name}: finished already, {run.steps} steps in {run.folder}", highlight=False)
            catch_up(run, session.say)
        else:
            if len(plan.stages) > 1:
                console.print(f"[bold]stage {i} of {len(plan.stages)}: {run.name}[/bold], {run.steps} steps")
            with SlowRewards(console), connected(run.cluster):
                stage_to_end(replace(run, date=run.date or plan.date), start, plan, session)
        start = run_folder.path_of(run.folder, run_folder.steps(run.folder)[-1]) / "model"


def stage_to_end(run: Run, start: Path | None, plan: Plan, session: Session) -> None:
    """One stage; where a rank of its trainers is lost, from the last checkpoint again, as often as its cluster says."""
    for left in range(run.cluster.restarts if run.cluster else 0, -1, -1):
        try:
            run_to_end(train_stage(run, start, plan.save, session))
            return
        except ChildProcessError as error:
            if not left:
                raise
            lost = str(error).partition(": its own message")[0]
            session.say(f"{run.name}: {lost}; the trainers begin again from the last checkpoint, {left - 1} more times if need be")


def refuse_idle_ranks(plan: Plan) -> None:
    """ValueError where torchrun has started several processes and a stage has a learner of one, or a cluster that starts its ranks."""
    for run in plan.stages:
        if torchrun_size() > 1 and run.cluster is not None:
            raise ValueError(f"the cluster of {run.name} starts its ranks itself: leave torchrun out, and set cluster.trainers={torchrun_size()}")
        if (ranks := torchrun_size()) > 1 and learner_traits(run.learner).ranks is None:
            raise ValueError(f"torchrun has started {ranks} processes, but {run.name} learns in one: set learner=sharded, or leave torchrun out")


def refuse_rework(plan: Plan) -> None:
    """ValueError where a stage is not finished although a later one has begun from its weights (its steps were raised)."""
    for run, later in zip(plan.stages, plan.stages[1:]):
        if run_folder.steps(later.folder) and not finished(run, used=False):
            raise ValueError(
                f"stage {run.name} is not finished at steps={run.steps}, but {later.name} has begun from it: "
                f"set {run.name}.steps back, or begin anew with --fresh"
            )


def nothing_saved(plan: Plan) -> bool:
    """Whether no stage has a checkpoint."""
    return not any(run_folder.steps(stage.folder) for stage in plan.stages)


def conclude(plan: Plan, console: Console, seconds: float) -> None:
    """Write summary.json, show before and after, and say what to type next; `seconds` is what it all took."""
    last = plan.stages[-1]
    summary: dict[str, Any] = {
        "seconds": seconds,
        "stages": {run.name: seconds_worked(run) for run in plan.stages},
        "steps": {run.name: run.steps for run in plan.stages},
    }
    before, after = (_read(run_folder.final_evaluation(last.folder, when)) for when in run_folder.WHEN)
    if last.final_evaluation is not None and after is not None:
        usual = last.final_evaluation.samples  # of reports that do not say it: a resume may have changed it since
        samples = after.get("samples", usual)
        accuracies = {
            "before": scores(before, before.get("samples", usual)) if before else None,
            "after": scores(after, samples),
        }
        summary = accuracies | {"problems": after["problems"]} | summary
        if before is not None:
            start = plan.stages[-2].name if len(plan.stages) > 1 else "start"
            console.print(table(accuracies["before"], accuracies["after"], samples, after["problems"], start, last.name))  # type: ignore[arg-type]
            for line in (reward_line(_rewards(last), last.name), *turned(before, after)):
                console.print(line, highlight=False, soft_wrap=True)
    replace_text(plan.folder / "summary.json", finite_text(summary, 1))
    if last.final_evaluation is not None:
        with suppress(store.StoreError, OSError):  # a damaged file of trees: there is nothing to show
            show_tree(last, console)
    headline = f"\ndone in {clock(seconds)}; everything is in {plan.folder}. What you can do with it:"
    console.out(headline, highlight=False)
    for command, purpose in next_commands(plan):
        console.out(f"  {command:<60}  # {purpose}", highlight=False)


def next_commands(plan: Plan) -> tuple[tuple[str, str], ...]:
    """(command, what it is for) of what can be done with a finished run; they name what it was trained with where no command can rebuild that."""
    folder, last = shlex.quote(str(plan.folder)), plan.stages[-1]
    tasks, reward, limit = f" --tasks {task_words(last)}", "", ""
    if plan.recipe == FROM_PYTHON:
        reward, limit = f" --reward {reward_word(last.rewards)}", f" --max-tokens {last.response_limit}"
    return (
        (f"ramulus view {folder}", "curves and trees in the browser"),
        (f"ramulus rollout {folder}{tasks}{reward}{segment_word(last)}", "watch the model solve problems, as trees"),
        (f"ramulus eval {folder}{tasks + reward + limit if reward else ''}", "measure it"),
        (f"ramulus export {folder} my-model", "a plain Hugging Face folder"),
    )


def show_tree(run: Run, console: Console) -> None:
    """Draw a tree of the last forest that was written: one with right and wrong paths, and no more than MOST_SHOWN of them."""
    written = sorted((run.folder / "trees").glob("*.jsonl"))
    for tree in store.read(written[-1]) if written else ():
        rewards = [leaf.reward for leaf in tree.leaves()]
        if len(set(rewards)) > 1 and len(rewards) <= MOST_SHOWN:
            decode = decoder_of(written[-1])
            if decode is None:
                console.out("\nthe model has no tokenizer.json, by which its trees would be shown here", highlight=False)
                return
            console.print(f"\none of the last trees, step {tree.step} (tokens, text, how it ended):", highlight=False)
            console.print(draw_tree(tree, decode))
            return


def _rewards(run: Run) -> list[float]:
    """The mean reward of each step in which there were paths."""
    return [row["reward"] for row in rows_of(run.folder / "metrics.jsonl") if row.get("paths") and row.get("reward") is not None]


def seconds_worked(run: Run) -> float:
    """Seconds of training, evaluation and final evaluation in a stage, over all resumptions."""
    state = run_folder.newest_state(run.folder)
    evaluations = [_read(run_folder.final_evaluation(run.folder, when)) for when in run_folder.WHEN]
    return (state["seconds"] if state else 0.0) + sum(evaluation["seconds"] for evaluation in evaluations if evaluation)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file, or None where there is none."""
    return written_json(path) if path.is_file() else None


def segment_word(run: Run) -> str:
    """How the command line asks for segments as long as those of a run."""
    rule = innermost(run.branching)
    return f" --segment {rule.length}" if isinstance(rule, Segments) else ""


def task_words(run: Run) -> str:
    """How the command line names the problems a run was trained on, and how they become prompts."""
    source = run.evals or run.tasks
    usual_words = [("prompt", "problem"), ("answer", "answer"), ("split", None)] if isinstance(source, File) else []
    options = [(word, getattr(source, word)) for word, usual in usual_words if getattr(source, word) not in (usual, None)]
    written = json.dumps(run.template_arguments) if run.template_arguments else None
    rendering = [("template", run.template), ("system", run.system), ("template-arguments", written)]
    options += [(word, value) for word, value in rendering if value]
    return " ".join([shlex.quote(problems_word(source)), *(f"--{word} {shlex.quote(value)}" for word, value in options)])
