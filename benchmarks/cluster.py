"""What does Ray cost, and what do two samplers bring? `python -m benchmarks.cluster --model FOLDER`.

Trees of GRPO (one prompt, eight paths each) are grown by the local engine in this process, by one sampler and by two that Ray placed, one thread
each, in turn. Answers have all the same length, so that every way computes as much. Seconds are those of the wall: start it where every sampler has
a core. CPU seconds are those of all processes below this one; the path is this process's and the busiest other's, what the wall would show where
each has a core of its own and nobody else computes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.engine.engine import Engine, Sampling
from ramulus.engine.local.factory import Local
from ramulus.grow.branching import Star
from ramulus.grow.growth import grow_forest
from ramulus.grow.stop import Stop
from ramulus.learn.policy.model import Pretrained
from ramulus.recipes import grpo
from ramulus.run.cluster import Ground, connected
from ramulus.run.config.ground import Ray
from ramulus.run.runtime import collect_seldom, quiet
from ramulus.run.sampler import skeleton_of

HERTZ = os.sysconf("SC_CLK_TCK")


def family(process: int) -> set[int]:
    """A process and those below it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {process}
    for _ in range(8):
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def cpu_seconds() -> dict[int, float]:
    """Of this process and all below it."""
    told = {}
    for process in family(os.getpid()):
        try:
            words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        told[process] = (int(words[11]) + int(words[12])) / HERTZ
    return told


def forest(prompts: int, seed: int, length: int, vocabulary: int) -> list[Tree]:
    """Planted trees of prompts of some length."""
    numbers = torch.Generator().manual_seed(seed)
    texts = torch.randint(100, vocabulary, (prompts, length), generator=numbers).tolist()
    return [Tree.plant(Task(f"{seed}/{i}", tuple(text), ""), seed=seed) for i, text in enumerate(texts)]


async def grown(engine: Engine, args: argparse.Namespace, seed: int, vocabulary: int) -> tuple[tuple[float, float, float], list[list[int]]]:
    """Seconds of the wall, of all CPUs and of the longest path through processes, and the tokens of a forest."""
    trees = forest(args.rows // 8, seed, args.prompt, vocabulary)
    before, began = cpu_seconds(), time.perf_counter()
    await grow_forest(trees, engine, Star(8), Sampling(args.tokens), Stop((), args.tokens))
    seconds = time.perf_counter() - began
    spent = {process: cpu - before.get(process, 0.0) for process, cpu in cpu_seconds().items()}
    path = spent.pop(os.getpid())
    times = seconds, path + sum(spent.values()), path + max(spent.values(), default=0.0)
    return times, [list(node.tokens) for tree in trees for node in tree.walk()]


async def compared(ways: dict[str, Engine], weights: Any, args: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Medians of each way, and of the ratios of neighbours in time."""
    for way, engine in ways.items():
        began = time.perf_counter()
        await engine.load(None if way == "local" else weights, 1)
        print(f"{way}: {engine.about}; weights in {time.perf_counter() - began:.2f} s", flush=True)
        await grown(engine, argparse.Namespace(**vars(args) | {"tokens": 4}), 1, vocabulary)
    told: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for repeat in range(args.repeats):
        texts = []
        for way, engine in ways.items():
            times, tokens = await grown(engine, args, 100 + repeat, vocabulary)
            told[way].append(times)
            texts.append(tokens)
            await engine.reset()
        assert all(text == texts[0] for text in texts), "the trees are not the same"
        print({way: tuple(round(x, 2) for x in runs[-1]) for way, runs in told.items()}, flush=True)

    def ratio(pick: Callable[[int], float]) -> float:
        return round(statistics.median(pick(i) for i in range(args.repeats)), 3)

    return {
        "rows": args.rows, "tokens": args.tokens,
        "median seconds (wall, CPU, path)": {way: [round(statistics.median(x), 2) for x in zip(*runs)] for way, runs in told.items()},
        "overhead of one sampler (wall, CPU, path)": [ratio(lambda i, k=k: told["one"][i][k] / told["local"][i][k] - 1) for k in range(3)],
        "two samplers against one (wall, CPU, path)": [ratio(lambda i, k=k: told["one"][i][k] / told["two"][i][k]) for k in range(3)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(Path("~/.cache/ramulus/SmolLM2-135M-Instruct").expanduser()))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    model, _ = Pretrained(args.model)()
    run = replace(grpo.recipe(), model=args.model, engine=Local(slots=args.rows, memory_mb=512), threads=1, device="cpu")
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    skeleton = skeleton_of(model)
    grounds = {"one": Ground(Ray(samplers=1, trainer_cpus=0)), "two": Ground(Ray(samplers=2, trainer_cpus=0))}
    with connected(Ray(samplers=3, store_mb=1500)):
        collect_seldom()
        ways: dict[str, Engine] = {"local": run.engine(model, lambda tokens: "")}
        for way, ground in grounds.items():
            ground.reserve()
            ways[way] = asyncio.run(ground.engine(run, skeleton, None))
        try:
            print(json.dumps(asyncio.run(compared(ways, dict(model.state_dict()), args, vocabulary)), indent=1))
        finally:
            for ground in grounds.values():
                ground.leave()


if __name__ == "__main__":
    main()
