"""`ramulus train --dry-run`: every part built and every input checked, a few tokens sampled to measure the machine, nothing trained."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from ramulus.engine.local.compiled import GB
from ramulus.grow.schedule import Fixed
from ramulus.grow.stop import Stop
from ramulus.learn.policy.scoring import score
from ramulus.look.cost.ledger import cost
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import build
from ramulus.run.event_loop import run_to_end
from ramulus.run.logbook import clock
from ramulus.run.memory.report import planned
from ramulus.run.memory.work import Work, work_of
from ramulus.run.rollouts import START, Rollouts
from ramulus.run.runtime import model_path
from ramulus.run.signals import SignalContext, Signals, provided
from ramulus.run.stage import Parts, build_parts, probe
from ramulus.run.trainer import hand_over

TASTE = 32  # tokens of a response that is sampled to measure the machine
CROWD = 64  # paths that are sampled beside each other for it, at most


@dataclass(frozen=True)
class Pace:
    """Tokens a second on this machine; 0 where nothing was sampled."""

    sampled: float
    trained: float


def rehearse(recipe: str, overrides: list[str], console: Console) -> int:
    """Build every stage as `train` would, and say what a step and the whole of it would take. Writes nothing.

    Raises what `train` would raise before its first step.
    """
    stages, folder = build(recipe, overrides)
    for i, run in enumerate(stages):
        later = f"; it begins from the model of {stages[i - 1].name}, the one in the recipe stands in for it" if i else ""
        console.print(f"{run.name}: {run.steps} steps, into {run.folder}{later}", markup=False, highlight=False, soft_wrap=True)
        parts = build_parts(run, None)
        try:
            pace = run_to_end(taste(run, parts))
        finally:
            parts.learner.close()
        for line in estimated(run, parts, pace):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    line = f"nothing was trained and nothing written; leave out --dry-run to begin, in {folder}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


async def taste(run: Run, parts: Parts) -> Pace:
    """The pace of this machine: some trees of short paths grown and graded, then evaluated as the learner evaluates them."""
    await probe(run, parts)
    await hand_over(parts.learner, parts.engine)
    work = work_of(run)
    limit = min(TASTE, run.response_limit)
    trees = max(1, min(work.trees, len(parts.tasks), CROWD // work.paths))
    short = replace(run, schedule=Fixed(trees), response_limit=limit, ahead=0)
    stop = Stop(parts.stop.eos, limit, parts.decode, run.answer, run.repetition)
    context = SignalContext(parts.learner, parts.decode.tokenizer, run.mix.columns)
    rollouts = Rollouts(short, parts.tasks, parts.engine, stop, parts.decode, Signals(provided(run.signals), context))
    began = time.monotonic()
    rollout, _ = await rollouts.get(1, dict(START))
    grown = time.monotonic()
    sampled = cost(rollout.grown).sampled
    await score(parts.learner, rollout.grown, ("recomputed",))
    forward = time.monotonic() - grown
    passes = 3 + run.activation_checkpointing + len(run.mix.columns)  # a backward pass costs two forward ones
    tokens = sum(len(tree.task.prompt) + sum(len(node.tokens) for node in tree.walk()) for tree in rollout.grown)
    return Pace(sampled / (grown - began) if sampled else 0.0, tokens / max(forward * passes, 1e-9))


def estimated(run: Run, parts: Parts, pace: Pace) -> list[str]:
    """What a step and the run would take at most, in sentences."""
    work = real(work_of(run), parts)
    samples = bool(pace.sampled)
    sampled = work.trees * (work.paths - run.demonstrations) * work.response if samples else 0
    seconds = (sampled / pace.sampled if samples else 0.0) + work.tokens / pace.trained
    draws = getattr(run.schedule, "draws", 1)
    more = f", in up to {draws} draws where groups are dropped" if draws > 1 else ""
    here = f"{pace.sampled:,.0f} tokens sampled and {pace.trained:,.0f} trained a second" if samples else f"{pace.trained:,.0f} tokens a second"
    longest = f"so a step takes up to {clock(seconds)} and the run up to {clock(seconds * run.steps)}, without evaluations"
    said = [
        f"problems: {len(parts.tasks)} to train on, {len(parts.evals)} held out; the longest prompt has {work.prompt} tokens",
        f"a step: {work.trees} trees of {work.paths} paths{more}; at most {sampled:,} tokens sampled and {work.tokens:,} trained",
        f"here: {here}",
        f"{longest}; half of it where answers are half as long",
    ]
    memory = planned(run if not isinstance(run.model, str) else replace(run, model=model_path(run.model)))
    said.append(f"memory: at most {memory.peak / GB:.2f} GB (`ramulus plan` says of what)")
    visits = run.steps * work.trees / len(parts.tasks)
    said.append(f"every problem is visited {visits:.1f} times in {run.steps} steps")
    return said


def real(work: Work, parts: Parts) -> Work:
    """The same with the longest prompt that there is."""
    longest: Any = max(len(task.prompt) for task in parts.tasks)
    return replace(work, prompt=int(longest))
