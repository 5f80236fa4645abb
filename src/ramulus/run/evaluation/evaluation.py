"""`ramulus eval`: sample a model's answers to sets of problems chunk by chunk, so that a killed evaluation goes on, and say what they are worth."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ramulus.core.checksums import digest_of_all
from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.engine.engine import Sampling
from ramulus.grow.branching import Branching
from ramulus.grow.grading import Rewards
from ramulus.grow.growth import together
from ramulus.grow.stop import Stop
from ramulus.learn.policy.hub import NoConfig
from ramulus.look.evaluation.evaluate import numbers, sample_graded
from ramulus.models.errors import sentence
from ramulus.run.config.recipe import writable
from ramulus.run.evaluation.answers import SETTINGS, Answers, Earlier, day_begun, earlier, naming, read_settings, settle
from ramulus.run.evaluation.loaded_model import LoadedModel
from ramulus.run.evaluation.own_run import source_of
from ramulus.run.evaluation.plan import SamplingPlan
from ramulus.run.evaluation.progress import Count
from ramulus.run.evaluation.results import EvaluatedModel, Report, Set, share_a_set
from ramulus.run.evaluation.task_sets import TaskSets
from ramulus.run.event_loop import run_to_end
from ramulus.run.lock import Lock
from ramulus.run.memory.model import config_of
from ramulus.run.screen import unfailing
from ramulus.run.slow_rewards import SlowRewards

WAVES = 4  # chunks of so many times the engine's slots: few rows idle at the end of a chunk, little is lost to a kill
Open = Callable[[str], LoadedModel]


def run_evaluation(
    model: str,
    open_model: Open,
    task_sets: TaskSets,
    plan: SamplingPlan,
    k: Sequence[int],
    against: str | None,
    out: Path | None,
    console: Console,
) -> int:
    """Evaluate, compare with another model or an earlier evaluation, print the tables, write the files."""
    if plan.samples or not plan.width:
        numbers(plan.samples, plan.greedy, k)
    elif k:
        raise ValueError(
            "--k is told by independent attempts, the answers of a tree depend on each other: leave out --k, or --no-independent"
        )
    folder = out if out is not None and out.suffix != ".json" else None
    rival = rival_of(against, task_sets) if against is not None else None  # before hours of work, not after them
    if task_sets.caution:
        console.out(task_sets.caution, highlight=False)
    with unfailing(console), _place(out, folder):
        outcome = evaluate_one(model, open_model, task_sets, plan, folder, console)
        report = Report(outcome, numbers(plan.samples, plan.greedy, k) if plan.samples else [])
        if out is not None:
            report.write(out)  # whatever becomes of the comparison
        try:
            if against is not None and rival is None:
                gc.collect()  # the first model's memory, before the second one is loaded
                other = evaluate_one(against, open_model, task_sets, plan, folder and folder_against(folder, against), console)
                rival = Earlier(against, other.settings, {one.name: one.rows for one in other.sets})
            if rival is not None:
                report.compare(rival)
                if out is not None:
                    report.write(out)
        finally:
            report.show(console)
            if out is not None:
                console.out(f"every answer is in {out}", highlight=False)
        return 0


def _place(out: Path | None, folder: Path | None) -> AbstractContextManager[object]:
    """Make the folder that `out` lies in; entered, `folder` is ours alone. ValueError or OSError where nothing can be written there."""
    if out is None:
        return nullcontext()
    if out.suffix == ".json" and out.is_dir():
        raise ValueError(f"{out} is a folder, and a name that ends in .json is for one file: choose another --out")
    writable(out if out.is_dir() else out.parent, "choose another --out")
    return Lock([folder], "choose another --out") if folder is not None else nullcontext()


def folder_against(folder: Path, model: str) -> Path:
    """Where the answers of a model that is compared with lie: each has a folder of its own beside the first one's."""
    number, place = 1, folder / "against"
    while (place / SETTINGS).is_file() and read_settings(place / SETTINGS)["model"] != model:
        number += 1
        place = folder / f"against-{number}"
    return place


def rival_of(against: str, task_sets: TaskSets) -> Earlier | None:
    """The earlier evaluation to compare with; None for a model. Raises an error for neither, and for other sets of problems."""
    rival = earlier(Path(against).expanduser())
    if rival is None:
        there(against)
    else:
        share_a_set(list(naming(task_sets.specs).values()), rival)
    return rival


def there(model: str) -> None:
    """Raise FileNotFoundError for what is no model, here or on the hub."""
    try:
        config_of(source_of(model))
    except NoConfig:  # it may hold a GGUF, which brings its own
        return
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"there is neither a model nor an evaluation at {model}: check --against; {sentence(error)}") from error


def evaluate_one(
    model: str, open_model: Open, task_sets: TaskSets, plan: SamplingPlan, folder: Path | None, console: Console
) -> EvaluatedModel:
    """The answers of one model to all sets of problems; those that the folder holds already are not sampled again."""
    loaded = open_model(model)
    date = day_begun(folder)
    sets = task_sets.read(loaded.tokenizer, date)  # all inputs are read before any work
    usual = task_sets.run.response_limit if task_sets.run is not None else 1024
    stop = loaded.stop([task for _, tasks, _ in sets for task in tasks], plan.max_tokens, usual, task_sets.stops)
    kinds = plan.kinds(stop.max_tokens)
    chunk = plan.chunk or max(1, WAVES * loaded.slots // plan.answers)
    settings = settings_of(plan, loaded, stop, list(kinds), chunk) | task_sets.graders
    settings |= task_sets.endings | task_sets.prompting
    names = naming([spec for spec, _, _ in sets])
    if folder is not None:
        digests = {
            names[spec]: {"spec": spec, "problems": len(tasks), "digest": _digest(tasks)} for spec, tasks, _ in sets
        }
        settle(folder, model, settings, digests, date)
        if not (folder / "tokenizer").exists():
            loaded.tokenizer.save_pretrained(folder / "tokenizer")  # the viewer shows texts with it
    stores = [Answers(names[spec], tasks, list(kinds), loaded.decode, chunk, folder) for spec, tasks, _ in sets]
    count = Count(console, model, sum(map(len, (one.tasks for one in stores))), sum(len(one.rows) for one in stores), loaded.engine)
    try:
        with SlowRewards(console):
            run_to_end(sample(loaded, stores, [graders for _, _, graders in sets], plan, kinds, stop, count))
    except KeyboardInterrupt:
        count.close()
        rest = f": the same command goes on from there, in {folder}" if folder else ""
        kept_now = sum(len(one.rows) for one in stores)
        console.out(f"stopped after {kept_now} of {count.total} problems{rest}", highlight=False)
        raise
    finally:
        count.close()
    sampled_sets = [Set(spec, one.name, one.rows) for (spec, _, _), one in zip(sets, stores)]
    return EvaluatedModel(model, settings, sampled_sets)


async def sample(
    loaded: LoadedModel,
    stores: Sequence[Answers],
    rewards: Sequence[Rewards],
    plan: SamplingPlan,
    kinds: dict[str, Any],
    stop: Stop,
    count: Count,
) -> None:
    """Every chunk that is left. Each begins with an engine that remembers nothing, so it does not depend on those before it."""
    for answers, graders in zip(stores, rewards):
        for tasks in answers.left():
            await loaded.engine.reset()
            answers.append(await grow(loaded, tasks, graders, plan, kinds, stop, count))
            count.chunk(answers.name, len(answers.rows), len(answers.tasks))


async def grow(
    loaded: LoadedModel, tasks: Sequence[Task], rewards: Rewards, plan: SamplingPlan, kinds: dict[str, Any], stop: Stop, count: Count
) -> dict[str, list[Tree]]:
    """The graded trees of some problems by kind of sampling; the requests of all kinds are in flight together."""

    def sampled(branching: Branching, sampling: Sampling, visit: int) -> Awaitable[list[Tree]]:
        return sample_graded(
            loaded.engine, tasks, branching, sampling, stop, rewards, loaded.decode, plan.seed, visit,
            lambda tree: count.add(len(tree.leaves()) / plan.answers),
        )  # fmt: skip

    grown = await together(sampled(*kind) for kind in kinds.values())
    return dict(zip(kinds, grown, strict=True))


def settings_of(plan: SamplingPlan, loaded: LoadedModel, stop: Stop, kinds: list[str], chunk: int) -> dict[str, Any]:
    """All that the answers depend on, bit for bit, beside the problems; plain JSON."""
    tree = {"width": plan.width, "segment": plan.segment, "branching": plan.branching} if plan.width else None
    sampled = {
        "samples": plan.samples,
        "temperature": plan.temperature,
        "top_p": plan.top_p,
        "tree": tree,
        "seed": plan.seed,
    }
    parameter = next(loaded.model.parameters())
    machine = {
        "device": parameter.device.type,
        "dtype": str(parameter.dtype),
        "threads": torch.get_num_threads(),
        "slots": loaded.slots,
    }
    rest = {"chunk": chunk, "torch": torch.__version__, "weights": fingerprint(loaded.model)}
    return {"kinds": kinds} | sampled | {"max_tokens": stop.max_tokens} | machine | rest


def fingerprint(model: torch.nn.Module, most: int = 256) -> str:
    """A digest of the weights: names, shapes and up to `most` numbers of each, evenly spread."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // most)].cpu()
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hasher.update(some.double().numpy().tobytes())
    return hasher.hexdigest()


def _digest(tasks: Sequence[Task]) -> str:
    """A digest of the problems as the model sees them and as they are graded."""
    return digest_of_all((task.id, task.prompt, task.text, task.answer, task.extra) for task in tasks)
