"""`ramulus train --dry-run`: every part built and every input checked, a real step of some trees taken to measure the machine, nothing kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from ramulus.core.recipe_part import with_defaults
from ramulus.core.task import Path, Task
from ramulus.grow.schedule import Fixed, Schedule
from ramulus.grow.stop import Stop
from ramulus.learn.policy.learner import Learner
from ramulus.learn.policy.scoring import score
from ramulus.look.cost.ledger import cost
from ramulus.look.terminal import new_console
from ramulus.native.memory import GB
from ramulus.run.ahead import AheadRollouts
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import build
from ramulus.run.evaluation.final_evaluation import answer_count
from ramulus.run.event_loop import run_to_end
from ramulus.run.interrupt import Interrupt
from ramulus.run.logbook import Logbook, clock
from ramulus.run.memory.report import planned
from ramulus.run.memory.work import Work, work_of
from ramulus.run.rollouts import START
from ramulus.run.runtime import model_path
from ramulus.run.stage import Parts, build_parts, probe, rollouts_of
from ramulus.run.trainer import Trainer, TrainerState, hand_over

TASTE = 32  # tokens of a response that is sampled to measure the machine
CONCURRENT = 64  # paths that are sampled at once for it, at most
BUDGET = 30.0  # seconds that a real step of some trees may take
NOW = ", as the model answers now", ", where the answers to every problem earn different rewards"
LITTLE = 0.25  # of the sampled tokens: a step that trained fewer says nothing of what training takes


@dataclass(frozen=True)
class Pace:
    """Tokens a second on this machine; 0 where nothing was sampled."""

    sampled: float
    trained: float


@dataclass(frozen=True)
class TriedStep:
    """A real step of some trees: what it came to, and the seconds of which only the optimizer's do not grow with the trees."""

    trees: int
    mixed: float  # share of them whose answers earned different rewards
    sampled: float  # tokens
    trained: float  # tokens that went through the update
    length: float  # of a response
    growing: float  # seconds, grading included
    learning: float
    optimizer: float


@dataclass(frozen=True)
class Coin:
    """A reward by chance, so that every tree teaches."""

    def __call__(self, task: Task, path: Path) -> dict[str, float]:
        tossed = float(sum(path.tokens) % 2)
        return {"reward": tossed, "correct": tossed}


class TimedUpdates:
    """A learner whose optimizer's steps are timed."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.seconds = learner, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)

    async def update(self, lr: float) -> dict[str, float]:
        """An optimizer step of the learner, whose seconds are added to `seconds`."""
        began = time.monotonic()
        done = await self.learner.update(lr)
        self.seconds += time.monotonic() - began
        return done


def rehearse(recipe: str, overrides: list[str], console: Console) -> int:
    """Build every stage as `train` would, and say what a step and the whole of it would take. Writes nothing.

    Raises what `train` would raise before its first step.
    """
    stages, folder = build(recipe, overrides)
    for i, run in enumerate(stages):
        later = f"; it begins from the model of {stages[i - 1].name}, the one in the recipe stands in for it" if i else ""
        console.out(f"{run.name}: {run.steps} steps, into {run.folder}{later}", highlight=False)
        parts = build_parts(run, None)
        try:
            pace, steps = run_to_end(pace_and_steps(run, parts))
        finally:
            parts.learner.close()
            parts.engine.close()
        for line in estimated(run, parts, pace, steps):
            console.out(f"  {line}", highlight=False)
    line = f"nothing was trained and nothing written; leave out --dry-run to begin, in {folder}"
    console.out(line, highlight=False)
    return 0


async def pace_and_steps(run: Run, parts: Parts) -> tuple[Pace, list[TriedStep]]:
    """The pace of this machine, and a real step of as many trees as the budget allows; none where it is not one.

    Where hardly a tree earned different rewards, as the trees of a model that learns do, another one in which every tree does by chance.
    """
    await probe(run, parts)
    await hand_over(parts.learner, parts.engine)
    await taste(run, parts, 1)  # the first one makes what later ones find
    pace = await taste(run, parts, CONCURRENT)
    work = real(work_of(run), parts)
    tree = work.tree_tokens / pace.trained + (work.paths * work.response / pace.sampled if pace.sampled else 0.0)
    trees = min(int(BUDGET / tree), work.first, len(parts.tasks))
    if trees < 1:
        return pace, []
    await tried(run, parts, trees)
    steps = [await tried(run, parts, trees)]
    if steps[0].trained < LITTLE * steps[0].sampled:
        steps.append(await tried(replace(run, rewards=Coin()), parts, trees))
    fastest = max((step.sampled / step.growing for step in steps), default=0.0)
    return replace(pace, sampled=max(pace.sampled, fastest) if pace.sampled else 0.0), steps


async def taste(run: Run, parts: Parts, most: int) -> Pace:
    """The pace of this machine: trees of at most so many short paths grown and graded, then evaluated as the learner evaluates them."""
    work = work_of(run)
    limit = min(TASTE, run.response_limit)
    trees = max(1, min(work.first, len(parts.tasks), most // work.paths))
    short = replace(run, schedule=Fixed(trees), response_limit=limit, ahead=0)
    stop = Stop(parts.stop.eos, limit, parts.decode, run.answer, run.repetition)
    rollouts = rollouts_of(short, parts, stop)
    began = time.monotonic()
    rollout, _ = await rollouts.get(1, dict(START))
    grown = time.monotonic()
    sampled = cost(rollout.grown).sampled
    await score(parts.learner, rollout.grown, ("recomputed",))
    forward = time.monotonic() - grown
    passes = 3 + run.activation_checkpointing + len(run.mix.columns)  # a backward pass costs two forward ones
    tokens = sum(len(tree.task.prompt) + sum(len(node.tokens) for node in tree.walk()) for tree in rollout.grown)
    return Pace(sampled / (grown - began) if sampled else 0.0, tokens / max(forward * passes, 1e-9))


async def tried(run: Run, parts: Parts, trees: int) -> TriedStep:
    """A step of training on so many trees, of which nothing is kept but a model in memory that is thrown away."""
    whole = trees == work_of(run).first
    learner = TimedUpdates(parts.learner)
    with TemporaryDirectory(prefix="ramulus-dry-run-") as folder:
        small = replace(run, out=folder, ahead=0, trees_every=0, minibatches=run.minibatches if whole else 1)
        small = small if whole else replace(small, schedule=Fixed(trees))
        logbook = Logbook(small, new_console(quiet=True))
        try:
            rollouts = AheadRollouts(rollouts_of(small, parts, parts.stop), 0, small.steps)
            trainer = Trainer(small, learner, parts.engine, rollouts, [], logbook, Interrupt(), TrainerState())
            metrics = await trainer.step()
        finally:
            logbook.close()
    seconds = metrics["seconds"]
    growing = seconds.get("grow", 0.0) + seconds.get("grade", 0.0)
    learning = seconds["step"] - growing - learner.seconds
    tokens = metrics["sampled"], metrics["trained"], metrics.get("length", 0.0)
    return TriedStep(int(metrics["trees"]), metrics.get("mixed", 1.0), *tokens, max(growing, 1e-9), learning, learner.seconds)


def whole_step(run: Run, work: Work, pace: Pace, step: TriedStep) -> tuple[float, float, float]:
    """(tokens sampled, tokens trained, seconds) of a step of all trees by that of some; where groups are dropped, in as many draws as it takes."""
    if step.trees >= work.first:
        return step.sampled, step.trained, step.growing + step.learning + step.optimizer
    draws, grown, kept = with_defaults(run.schedule, Schedule).draws, 0.0, 0.0
    share = drawn_at_most(run, work) / (draws * work.trees)  # that a draw asks for, of those that are missing
    for _ in range(draws):
        drawn = share * (work.first - kept)
        grown += drawn
        kept = min(float(work.first), kept + drawn * (step.mixed if draws > 1 else 1.0))
    more, learned = grown / step.trees, kept / (step.trees * (step.mixed if draws > 1 else 1.0) or 1.0)
    growing = step.sampled * more / pace.sampled if pace.sampled else step.growing * more
    return step.sampled * more, step.trained * learned, growing + step.learning * learned + step.optimizer * run.minibatches


def drawn_at_most(run: Run, work: Work) -> int:
    """Trees that are grown for a step at most."""
    schedule = with_defaults(run.schedule, Schedule)
    return schedule.draws * work.trees if schedule.most_drawn is None else schedule.most_drawn


def estimated(run: Run, parts: Parts, pace: Pace, steps: Sequence[TriedStep]) -> list[str]:
    """What a step and the run would take, in sentences."""
    work = real(work_of(run), parts)
    samples = bool(pace.sampled)
    draws = with_defaults(run.schedule, Schedule).draws
    most = drawn_at_most(run, work) * (work.paths - run.demonstrations) * work.response if samples else 0
    more = f", in up to {draws} draws where groups are dropped" if draws > 1 else ""
    counted, trained, length = f"at most {tokens_said(samples, most, work.tokens)}", pace.trained, float(work.response)
    times, about = [(most / pace.sampled if samples else 0.0) + work.tokens / pace.trained], "up to"
    rest = "; half of it where answers are half as long" if not steps else ""
    if steps:
        whole_steps = [whole_step(run, work, pace, step) for step in steps]
        sentences = [f"about {tokens_said(samples, *tokens)}{words}" for (*tokens, _), words in zip(whole_steps, NOW)]
        counted = "; ".join([*sentences, counted])
        times, about, length = [seconds for *_, seconds in whole_steps], "about", steps[0].length
        trained = steps[-1].trained / max(steps[-1].learning, 1e-9)
    checked = evaluated_answers(run, parts) * length / pace.sampled if samples else 0.0
    with_them = f", {lasting(checked)} of it for evaluations" if checked else ""
    step, whole = (" to ".join(lasting(seconds) for seconds in sorted(many)) for many in (times, [each * run.steps + checked for each in times]))
    here = f"{pace.sampled:,.0f} tokens sampled and {trained:,.0f} trained a second" if samples else f"{trained:,.0f} tokens a second"
    memory = planned(run if not isinstance(run.model, str) else replace(run, model=model_path(run.model)))
    visits = run.steps * work.first / len(parts.tasks)
    return [
        f"problems: {len(parts.tasks)} to train on, {len(parts.evals)} held out; the longest prompt has {work.prompt} tokens",
        f"a step: {work.spelled}{more}; {counted}",
        f"here: {here}",
        f"so a step takes {about} {step} and the run {about} {whole}{with_them}{rest}",
        f"memory: at most {memory.peak / GB:.2f} GB (`ramulus plan` says of what)",
        f"every problem is visited {visits:.1f} times in {run.steps} steps",
        *work.assumed,
    ]


def tokens_said(samples: bool, sampled: float, trained: float) -> str:
    """How many tokens, in words."""
    return f"{sampled:,.0f} tokens sampled and {trained:,.0f} trained" if samples else f"{trained:,.0f} tokens trained"


def lasting(seconds: float) -> str:
    """Seconds in words: 5.2 s below a minute, 4:05 from there on."""
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def evaluated_answers(run: Run, parts: Parts) -> int:
    """Answers of all evaluations of a run."""
    times = 0 if not parts.evals else 1 + ((run.steps - 1) // run.eval_every if run.eval_every else 0)
    final = run.final_evaluation
    ends = sum(answer_count(final, len(parts.final_tasks), start) for start in (True, False)) if final is not None else 0
    return times * len(parts.evals) * (run.eval_samples + 1) + ends


def real(work: Work, parts: Parts) -> Work:
    """The step's work with the longest prompt of the tasks, in tokens, in place of the recipe's limit."""
    longest: Any = max(len(task.prompt) for task in parts.tasks)
    return replace(work, prompt=int(longest))
