"""A model that is loaded for work without training: problems for it, trees grown with it, its export."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ramulus.core import store
from ramulus.core.new_folder import new_folder
from ramulus.core.run_folder import model_folder
from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.engine.engine import Engine, Sampling
from ramulus.grow.stop import Stop
from ramulus.look.cost.ledger import cost
from ramulus.look.evaluation.evaluate import sample_graded
from ramulus.look.progress import Bar
from ramulus.look.terminal import new_console
from ramulus.look.viewer.show import bill, draw_tree
from ramulus.native.processors import device_of
from ramulus.run.config.recipe import UsualEngine, writable
from ramulus.run.evaluation.own_run import source_of
from ramulus.run.evaluation.progress import Count
from ramulus.run.evaluation.task_sets import TaskSets
from ramulus.run.event_loop import run_to_end
from ramulus.run.lock import reading
from ramulus.run.runtime import Detokenizer, encode_quickly, eos_of, quiet, set_threads
from ramulus.run.screen import unfailing


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to answer."""

    name: str
    tokenizer: Any
    model: Any
    engine: Engine
    decode: Detokenizer
    ends: tuple[int, ...]
    slots: int

    def stop(self, tasks: Sequence[Task], wanted: int | None, usual: int, rules: Mapping[str, Any]) -> Stop:
        """Ends of responses of at most `wanted` tokens, or of the `usual` number where the model has room for them; `rules`: further fields of it."""
        longest = max(len(task.prompt) for task in tasks)
        room = self.engine.limit - longest
        if wanted is not None and wanted > room:
            raise ValueError(
                f"the longest prompt has {longest} tokens and {wanted} are wanted for a response, but the model ends at {self.engine.limit}: "
                f"ask for at most {room} tokens, or leave out long prompts with --prompt-limit"
            )
        if room < 1:
            raise ValueError(
                f"a prompt has {longest} tokens and the model ends at {self.engine.limit}: lower --prompt-limit"
            )
        return Stop(self.ends, min(usual, room) if wanted is None else wanted, self.decode, **rules)


def load_model(model: str, device: str, threads: int | None, slots: int, memory_mb: int | Literal["auto"] = "auto") -> LoadedModel:
    """Load a model folder, a hub name, or the last checkpoint of a run."""
    quiet()
    encode_quickly()
    set_threads(threads)
    source = source_of(model)
    with reading(Path(source.path).parent):
        net, tokenizer = source()
    net.to(device_of(device)).eval().requires_grad_(False)
    ends = eos_of(net, tokenizer)
    decode = Detokenizer(tokenizer, ends)
    return LoadedModel(model, tokenizer, net, UsualEngine(slots, memory_mb)(net, decode), decode, ends, slots)


def grow_trees(
    loaded: LoadedModel,
    task_sets: TaskSets,
    branching: Any,
    temperature: float,
    max_tokens: int,
    seed: int,
    out: Path | None,
    console: Console,
) -> int:
    """Grow a tree for each problem, counting them; print them, or save them as JSON lines; say what they cost."""
    if out is not None and out.exists():
        raise ValueError(f"{out} is there already: name another --out")
    if out is not None:
        writable(out.parent, "choose another --out")
    with unfailing(console):
        return _grow_trees(loaded, task_sets, branching, temperature, max_tokens, seed, out, console)


def _grow_trees(
    loaded: LoadedModel, task_sets: TaskSets, branching: Any, temperature: float, max_tokens: int, seed: int, out: Path | None, console: Console
) -> int:
    """The same, where no word on the console raises."""
    sets = task_sets.read(loaded.tokenizer)
    stop = loaded.stop([task for _, tasks, _ in sets for task in tasks], None, max_tokens, task_sets.stops)
    sampling = Sampling(stop.max_tokens, temperature)
    count = Count(console, "rollout", sum(len(tasks) for _, tasks, _ in sets), 0, loaded.engine)

    def counted(tree: Tree) -> None:
        count.add(1)
        count.chunk("rollout", round(count.done), count.total)

    async def grow() -> list[Tree]:
        forest = []
        for _, tasks, rewards in sets:
            forest += await sample_graded(
                loaded.engine, tasks, branching, sampling, stop, rewards, loaded.decode, seed, on_graded=counted
            )
        return forest

    try:
        forest = run_to_end(grow())
    finally:
        count.close()
    if out is None:
        for tree in forest:
            console.print(draw_tree(tree, loaded.decode, max(console.width - 30, 40)))
    else:
        store.write(out, forest)
    console.print(bill(cost(forest)) + (f"; saved in {out}" if out else ""), markup=False, highlight=False)
    return 0


def export_model(run: Path, out: Path, which: str, console: Console | None = None) -> int:
    """Copy the model of a run to a new folder, with a bar on a terminal; returns its step."""
    folder, step = model_folder(run, which)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty: choose a new folder")
    with new_folder(out) as part, reading(folder.parent):
        copy(folder, part, console or new_console(quiet=True))
    return step


def copy(folder: Path, to: Path, console: Console) -> None:
    """Copy a folder file by file, saying on a terminal how many bytes are done and what time is left."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    with Bar(console, "export", size, "bytes") as bar:

        def one(source: str, target: str) -> str:
            done = shutil.copy2(source, target)
            bar.more(Path(source).stat().st_size)
            return str(done)

        shutil.copytree(folder, to, copy_function=one, dirs_exist_ok=True)
