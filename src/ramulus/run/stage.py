"""Build the parts of one stage, checking every input before work begins."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ramulus.core.json_object import object_in
from ramulus.core.recipe_part import RecipePart, inside, needed, parts_of, readers, with_defaults
from ramulus.core.task import Path as Response
from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.engine.engine import FEATURES, Engine, Sampling, known_rules, rule_features
from ramulus.grow.adaptive import Adaptive
from ramulus.grow.branching import Star, innermost
from ramulus.grow.grading import Call, settle_all
from ramulus.grow.stop import Stop
from ramulus.learn.advantage.group import Advantage
from ramulus.learn.policy.learner import Learner
from ramulus.learn.policy.model import Pretrained
from ramulus.models.positions import beyond
from ramulus.native.processors import device_of
from ramulus.run import checkpoint
from ramulus.run.cluster import Ground
from ramulus.run.config.recipe import Model, Run
from ramulus.run.event_loop import run_to_end
from ramulus.run.lock import reading
from ramulus.run.memory.auto import Rooms, Taken, settled
from ramulus.run.memory.rooms import rooms_here, rooms_of
from ramulus.run.prompts import prompts_of
from ramulus.run.rollouts import Rollouts
from ramulus.run.runtime import Detokenizer, encode_quickly, eos_of, model_path, quiet, set_threads
from ramulus.run.sampler import skeleton_of
from ramulus.run.scored_engine import with_entropies
from ramulus.run.signals import SignalContext, Signals, StateValue, ordered, provided
from ramulus.run.slow_modes import threads_of
from ramulus.tasks.problem import check_ids
from ramulus.tasks.self_check import unmatched

SHOWN_TREES = ("branching", "schedule", "pruning", "temperature", "mix")
"""The fields of a Run whose parts may read signals: a temperature rule when it measures a step's trees, a Mix when they are graded."""


@dataclass(frozen=True)
class Parts:
    """What one stage works with."""

    learner: Learner
    engine: Engine
    tasks: Sequence[Task]
    evals: Sequence[Task]
    final_tasks: Sequence[Task]
    decode: Detokenizer
    stop: Stop
    run: Run  # with numbers where it said auto
    taken: Taken
    asks_learner: bool = False  # the engine, for entropies that it does not record
    rest: Callable[[], Awaitable[None]] | None = None  # called when nothing is sampled until the next load


def build_parts(run: Run, start: Path | None, ground: Ground | None = None) -> Parts:
    """Model, policy, engine and rendered tasks; `start` is the model folder of the stage before, `ground` where samplers are placed."""
    check_signals(run)
    quiet()
    encode_quickly()
    set_threads(threads_of(run))
    torch.use_deterministic_algorithms(device_of(run.device).type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    sources = [
        source() if source is not None else []
        for source in (run.tasks, run.evals, run.final_evaluation.tasks if run.final_evaluation else None)
    ]
    checkpoint.seed_all(run.seed)
    source = _source_of(run, start)
    warn_of_rounding(run, source, start)
    with reading(Path(getattr(source, "path", ".")).parent):
        model, tokenizer = source()
    tasks, evals, final_tasks = prompts_of(run, sources, tokenizer)
    check_ids([*tasks, *evals, *final_tasks], tokenizer, int(model.get_input_embeddings().weight.shape[0]))
    ends = eos_of(model, tokenizer)
    decode = Detokenizer(tokenizer, ends)
    stop = Stop(ends, run.response_limit, decode, run.answer, run.repetition)
    warn_of_float16(run, model)
    model = model.to(device_of(run.device))
    skeleton = skeleton_of(model) if ground is not None else None
    with ExitStack() as undo:  # what began ends again where anything is refused
        learner = run.learner(model, tokenizer, source, bool(run.mix.value), run.policy_options(), run.seed)
        undo.callback(learner.close)
        run, taken = settled(run, model, device_of(run.device), _rooms(ground), learner)
        placed = run_to_end(ground.engine(run, skeleton, decode)) if ground is not None else None
        engine, asks_learner = with_entropies(placed or run.engine(model, decode), learner, parts_of(run))
        if placed is None:
            undo.callback(engine.close)
        limits = (run.eval_limit, run.final_evaluation.limit if run.final_evaluation else None)
        rest = placed.sleep if placed is not None and placed.rests else None
        parts = Parts(learner, engine, tasks, evals[: limits[0]], (final_tasks or evals)[: limits[1]], decode, stop, run, taken, asks_learner, rest)
        _check(run, parts, model.config)
        undo.pop_all()
    return parts


def rollouts_of(run: Run, parts: Parts, stop: Stop) -> Rollouts:
    """What grows the trees of a run."""
    signals = Signals(provided(run.signals), SignalContext(parts.learner, parts.decode.tokenizer, run.mix.columns - run.begins))
    return Rollouts(run, parts.tasks, parts.engine, stop, parts.decode, signals)


def _rooms(ground: Ground | None) -> Rooms:
    """What a run's processes share of memory."""
    return rooms_here if ground is None else lambda run, device: rooms_of(run, device, ground.machines())


def _source_of(run: Run, start: Path | None) -> Model:
    """What builds the model and its tokenizer: from the stage before, or as the recipe says."""
    named = Pretrained(run.model) if isinstance(run.model, str) else run.model
    if start is not None:
        return replace(named, path=str(start), file=None) if isinstance(named, Pretrained) else Pretrained(str(start))
    return replace(named, path=model_path(named.path)) if isinstance(named, Pretrained) else named


def _check(run: Run, parts: Parts, config: Any) -> None:
    """Raise ValueError for settings that only show with the tasks and the model at hand."""
    Sampling(run.response_limit, run.temperature, run.top_p, run.top_k, run.min_p)  # it checks its values
    if not parts.tasks:
        raise ValueError(f"no task of {run.name} is left to train on: raise prompt_limit={run.prompt_limit}")
    check_schedule(run)
    check_grown_ahead(run, parts.asks_learner)
    check_engine(run, parts.engine)
    samples = bool(run.branching(Tree.plant(parts.tasks[0])))
    if samples and not run.weighted():
        raise ValueError(
            f"{run.name} samples paths but has no reward to grade them: give rewards=..., or branching=Star(0) to learn from demonstrations alone"
        )
    if not samples and not run.demonstrations:
        raise ValueError(
            f"{run.name} samples nothing and shows no demonstrations: set demonstrations=1, or give a branching that samples"
        )
    if run.demonstrations and not any(task.demonstrations for task in parts.tasks):
        raise ValueError(
            f"demonstrations={run.demonstrations}, but no task has one: set tasks.demonstration to the column that holds them, or demonstrations=0"
        )
    if run.check_demonstrations and not run.weighted():
        raise ValueError(
            "check_demonstrations asks the rewards about each demonstration: give rewards=..., or leave it off"
        )
    if run.final_evaluation is not None and not parts.final_tasks:
        raise ValueError("a final evaluation needs problems: set evals or final_evaluation.tasks")
    if (run.final_evaluation is not None or parts.evals) and not run.weighted():
        raise ValueError("evaluating needs a reward: give rewards=...")
    longest = max((len(task.prompt) for task in [*parts.tasks, *parts.evals, *parts.final_tasks]), default=0)
    if (samples or parts.evals or parts.final_tasks) and longest + run.response_limit > parts.engine.limit:
        raise ValueError(
            f"the longest prompt has {longest} tokens and response_limit is {run.response_limit}, "
            f"but the model ends at {parts.engine.limit}: lower response_limit or prompt_limit, "
            f"{beyond(config)}"
        )
    warn_of_references(run, parts.tasks)
    warn_of_leaks(run, parts)


def check_signals(run: Run) -> None:
    """Raise ValueError for a signal that nothing provides or two objects do, for a part that cannot read the one it needs, and for a rule or
    schedule that does not say what it reads."""
    for part, names in ((run.branching, ("needs", "rounds")), (run.schedule, ("needs", "expand"))):
        for name in (name for name in names if not hasattr(part, name)):
            usual = "()" if name == "needs" else "None"
            raise ValueError(f"{type(part).__name__} has no {name!r}: write {name}: ClassVar = {usual} into the class, or what it reads")
    providers = provided(run.signals)
    for place, thing in inside(run):
        if place == "signals":  # each is asked where somebody reads it
            continue
        shown = place in SHOWN_TREES and (place != "temperature" or "stats" in rule_features(run.temperature))
        for part, read in readers(inside(thing) if thing is run.mix else thing):
            reader = type(part).__name__
            if not shown:
                raise ValueError(
                    f"{reader} needs the signal {read[0]!r}, but nothing shows {place} a tree to read it in: only {', '.join(SHOWN_TREES[:3])}, mix "
                    "and a temperature rule with the feature 'stats' read signals, so leave needs out of the class"
                )
            if StateValue() in ordered(providers, read, reader) and not run.mix.value:
                raise ValueError(
                    f"{reader} needs the signal 'value', but the run trains no value head: give the mix one (value=0.5 with the "
                    "advantage GAE), or judge paths by MeanLogprob or Agreement"
                )


def check_engine(run: Run, engine: Engine) -> None:
    """Raise ValueError for what some part of the recipe reads and the engine does not record, or that it cannot do."""
    wanted = [(name, part) for part in parts_of(run) for name in with_defaults(part, RecipePart).records]
    former = {"of_entropy": "of_entropy", "positive": "positive", "measure": "stats"}  # attributes that were asked for before there were features
    for name in (name for name, feature in former.items() if hasattr(run.temperature, name) and feature not in rule_features(run.temperature)):
        kind = type(run.temperature).__name__
        raise ValueError(f"{kind} has {name} but not the feature {former[name]!r}: write features = frozenset({{{former[name]!r}}}) into the class")
    if callable(run.temperature):
        wanted.append(("rules", run.temperature))
    if Sampling(1, 1.0, run.top_p, run.top_k, run.min_p).truncates:
        wanted.append(("kept", f"top_p={run.top_p}, top_k={run.top_k}, min_p={run.min_p}"))
    for name, part in wanted:
        if name not in engine.features:
            raise ValueError(
                f"{part} needs an engine with the feature {name!r} ({FEATURES[name]}), which {run.engine} has not: take engine=Local(), "
                "or leave that part out"
            )
    known = known_rules(engine.features)
    if callable(run.temperature) and known is not None and type(run.temperature).__name__ not in known:
        raise ValueError(
            f"{run.temperature} is a temperature rule that {run.engine} does not know (it knows {', '.join(known)}): take one of these, or "
            "engine=Local(), which takes any"
        )


def check_grown_ahead(run: Run, asks_learner: bool) -> None:
    """Raise ValueError where trees would ask the learner for something while it learns, or the engine does, which then `asks_learner`."""
    reading = [part for part in (run.branching, run.schedule, *run.pruning, run.temperature) if needed(part)]
    if run.cluster and run.cluster.ahead and (reading or asks_learner):
        what = f"{type(reading[0]).__name__} reads what it computes" if reading else "it computes the entropies that the engine lacks"
        raise ValueError(f"with cluster.ahead={run.cluster.ahead} trees grow while the learner learns, but {what}: set cluster.ahead=0")


def check_schedule(run: Run) -> None:
    """Raise ValueError where an adaptive schedule would drop every tree, or count as trained what the advantage does not train."""
    if not isinstance(run.schedule, Adaptive):
        return
    rule = innermost(run.branching)
    if isinstance(rule, Star) and not run.schedule.unbranched:
        raise ValueError(
            f"Adaptive trains no path that nothing branches from, and {rule} never branches, so that every tree would be dropped: "
            "take a rule that branches (AttentionForks, EntropyForks), or set unbranched=True in Adaptive"
        )
    for advantage in (term.estimator.advantage for term in run.mix.terms):
        unbranched = with_defaults(advantage, Advantage).unbranched
        if unbranched not in (None, run.schedule.unbranched):
            raise ValueError(
                f"the schedule has unbranched={run.schedule.unbranched} and {type(advantage).__name__} unbranched={unbranched}, so it would "
                "count other paths than those that are trained: set both alike"
            )


def warn_of_rounding(run: Run, source: Model, start: Path | None) -> None:
    """Warn where the stage before wrote wider weights than this one holds, as it does where adapters were merged into half precision."""
    dtype = getattr(source, "dtype", None)
    if start is None or dtype not in ("bfloat16", "float16"):
        return
    settings = object_in(start / "config.json")
    if (written := settings.get("dtype", settings.get("torch_dtype"))) == "float32":
        warnings.warn(
            f"the stage before {run.name} wrote weights in {written}, as with adapters, and model.dtype={dtype} rounds them, which loses most of "
            f"what small steps taught: set {run.name}.model.dtype=float32",
            stacklevel=3,
        )


def warn_of_float16(run: Run, model: Any) -> None:
    """Warn where gradients would be in float16, most of which are 0 at the size of a usual step: nothing scales the loss."""
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        lost = "gradients below 6e-8 are 0 in float16, which is most of them in a step of many tokens"
        warnings.warn(f"{run.name} learns through weights in float16: {lost}; set model.dtype=bfloat16 or float32", stacklevel=3)


def warn_of_references(run: Run, tasks: Sequence[Task]) -> None:
    """Warn of references that no answer could match, with the first of them."""
    for reward, _, name in run.weighted():
        if cases := unmatched(reward, tasks):
            first, why = cases[0]
            warnings.warn(
                f"{len(cases)} of the {len(tasks)} references of {run.name} can be matched by no answer that the reward {name!r} takes, the first "
                f"is that of {first!r}: {why}; correct them, or leave these problems out",
                stacklevel=3,
            )


def warn_of_leaks(run: Run, parts: Parts) -> None:
    """Warn where held-out problems are trained on."""
    texts = {task.text for task in parts.tasks}
    leaks = {task.text for task in [*parts.evals, *parts.final_tasks] if task.text in texts}
    if leaks:
        warnings.warn(
            f"{len(leaks)} of the held-out problems are among the tasks of {run.name}, so their scores say less",
            stacklevel=3,
        )


async def probe(run: Run, parts: Parts) -> None:
    """Ask every reward about a response that repeats the first problem of each set: what raises or gives NaN is found before anything is sampled."""
    asked = [tasks[0] for tasks in (parts.tasks, parts.evals, parts.final_tasks) if tasks]
    firsts = {task.id: (task, Response(task.text, task.prompt, "eos")) for task in asked}
    await settle_all([Call(reward, name, *first) for first in firsts.values() for reward, _, name in run.weighted()])
