"""A model on the bench: evaluate it, grow trees with it, export it; no training."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ramify.core import store
from ramify.core.task import Reward, Task
from ramify.core.tree import Tree
from ramify.engine.engine import Engine, Sampling
from ramify.engine.local import LocalEngine
from ramify.grow.growth import grade, grow_forest
from ramify.grow.stop import Stop
from ramify.learn.model import Pretrained
from ramify.look.evaluate import evaluate
from ramify.look.ledger import cost
from ramify.look.show import bill, draw
from ramify.run import checkpoint
from ramify.run.recipe import Local
from ramify.run.setting import Decoder, device_of, eos_of, quiet, set_threads
from ramify.tasks.chain import ChainAnswer, ChainSum
from ramify.tasks.files import File
from ramify.tasks.problem import Source, render


@dataclass(frozen=True)
class Bench:
    """A model that is ready to answer."""

    name: str
    tokenizer: Any
    engine: Engine
    decode: Decoder
    stop: Stop


def open_bench(model: str, device: str, threads: int | None, slots: int, max_tokens: int) -> Bench:
    """Load a model folder, a hub name, or the last checkpoint of a run."""
    quiet()
    set_threads(threads)
    folder = str(model_folder(Path(model), "last")[0]) if is_run(Path(model)) else model
    net, tokenizer = Pretrained(folder)()
    net.to(device_of(device)).eval().requires_grad_(False)
    settings = Local(slots)
    engine = LocalEngine(net, settings.slots, settings.memory_mb * 2**20)
    return Bench(model, tokenizer, engine, Decoder(tokenizer), Stop(eos_of(net, tokenizer), max_tokens))


def source_of(spec: str, limit: int | None) -> tuple[Source, Reward]:
    """Problems and their grader: `chain`, `gym:NAME`, or a file of boxed mathematics."""
    if spec == "chain":
        return ChainSum(limit or 100, "test"), ChainAnswer()
    if spec.startswith("gym:"):
        from ramify.tasks.gym import Gym, GymScore

        return Gym(spec[4:], size=limit or 100), GymScore()
    from ramify.tasks.math import Boxed

    return File(spec, limit=limit), Boxed()


def tasks_of(bench: Bench, spec: str, prompts: dict[str, Any], limit: int | None) -> tuple[list[Task], Reward]:
    """The rendered tasks of one task set; prompts that are too long are left out with a warning."""
    source, reward = source_of(spec, limit)
    tasks = render(source(), bench.tokenizer, on_long="drop", **prompts)
    if not tasks:
        raise ValueError(
            f"no problem of {spec} has a prompt of at most {prompts['limit']} tokens: raise --prompt-limit"
        )
    return tasks, reward


def evaluate_model(
    bench: Bench,
    specs: Sequence[str],
    prompts: dict[str, Any],
    samples: int,
    k: Sequence[int],
    temperature: float,
    greedy: bool,
    limit: int | None,
    seed: int,
    out: Path | None,
    console: Console,
) -> int:
    """Evaluate on every task set, print a table, write the JSON."""
    sets = [(spec, *tasks_of(bench, spec, prompts, limit)) for spec in specs]  # all inputs are read before any work
    sampling = Sampling(bench.stop.max_tokens, temperature)
    results = {}
    for spec, tasks, reward in sets:
        rewards = [(reward, 1.0, "correct answer")]
        results[spec] = asyncio.run(
            evaluate(bench.engine, tasks, rewards, bench.decode, bench.stop, sampling, samples, greedy, seed, k)
        )
        console.print(table(spec, results[spec]))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps(
                {"model": bench.name, "seed": seed, "max_tokens": bench.stop.max_tokens, "tasks": results}, indent=1
            )
        )
        console.print(f"every answer is in {out}", markup=False, highlight=False)
    return 0


def table(spec: str, found: dict[str, Any]) -> Table:
    """The numbers of one task set."""
    made = Table(
        title=f"{spec}: {found['problems']} problems, temperature {found['temperature']}",
        title_justify="left",
        title_style="bold",
    )
    made.add_column("")
    made.add_column("", justify="right")
    made.add_column("95 % interval", justify="right")
    for name, (low, high) in found["intervals"].items():
        made.add_row(name, f"{found[name]:.1%}", f"{low:.1%} to {high:.1%}")
    made.add_row("response tokens", f"{found['length']:.0f}", "")
    made.add_row("cut off at the limit", f"{found['truncated']:.1%}", "")
    return made


def grow_trees(
    bench: Bench,
    specs: Sequence[str],
    prompts: dict[str, Any],
    branching: Any,
    temperature: float,
    limit: int,
    seed: int,
    out: Path | None,
    console: Console,
) -> int:
    """Grow a tree for each problem; print them, or save them as JSON lines; say what they cost."""
    sets = [tasks_of(bench, spec, prompts, limit) for spec in specs]

    async def grow(tasks: list[Task], reward: Reward) -> list[Tree]:
        async def judge(tree: Tree) -> None:
            await grade(tree, [(reward, 1.0, "correct answer")], bench.decode)

        trees = [Tree.plant(task, seed=seed) for task in tasks]
        return await grow_forest(
            trees, bench.engine, branching, Sampling(bench.stop.max_tokens, temperature), bench.stop, on_tree=judge
        )

    forest = [tree for tasks, reward in sets for tree in asyncio.run(grow(tasks, reward))]
    if out is None:
        for tree in forest:
            console.print(draw(tree, bench.decode, max(console.width - 30, 40)))
    else:
        store.write(out, forest)
    console.print(bill(cost(forest)) + (f"; saved in {out}" if out else ""), markup=False, highlight=False)
    return 0


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / "run.json").is_file() or (folder / "checkpoints").is_dir()


def model_folder(run: Path, which: str) -> tuple[Path, int]:
    """The model folder of a checkpoint and its step; of the last stage that has one."""
    if not run.is_dir():
        raise FileNotFoundError(f"there is no run at {run}: give the folder that `ramify train` wrote")
    stages = sorted(
        (path for path in run.glob("*-*") if (path / "checkpoints").is_dir()),
        key=lambda path: int(path.name.split("-")[0]),
    )
    saved = [(stage, checkpoint.steps(stage)) for stage in [run, *stages]]
    found = [(stage, steps) for stage, steps in saved if steps]
    if not found:
        raise ValueError(
            f"{run} has no checkpoint yet: let it train to its first save_every, or stop it with Ctrl-C, which saves"
        )
    stage, steps = found[-1]
    step = steps[-1]
    if which == "best":
        best = json.loads((checkpoint.path_of(stage, step) / "state.json").read_text())["best"]
        if best is None:
            raise ValueError(
                f"{stage} was never evaluated, so no checkpoint is the best: export the last one, or train with evals"
            )
        step = int(best["step"])
    return checkpoint.path_of(stage, step) / "model", step


def export_model(run: Path, out: Path, which: str) -> int:
    """Copy the model of a run to a new folder; returns its step."""
    folder, step = model_folder(run, which)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty: choose a new folder")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part)
    if out.exists():
        out.rmdir()
    part.rename(out)
    return step
