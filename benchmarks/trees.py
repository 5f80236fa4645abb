"""Which engine grows trees of a pretrained model fastest? `python -m benchmarks.trees FOLDER --vllm PYTHON --llama PYTHON --gguf FILE`.

The paths of a step by Star(8), flat ones, and by TreePO's Segments(8, 4, 32), which share what lies above their forks: by ours, by vLLM with
its prefix cache, and by llama.cpp, whose sequences share what they have in common. The same rules of ours decide in each case, one length, no end
of text; each forest begins with new weights, that is without keys and values. In paths per CPU-second of all processes, contenders in turns. The
reuse ratio is tokens of paths over sampled tokens: the speed-up of Segments over Star were a token's cost the same everywhere.
"""

from __future__ import annotations

import argparse
import asyncio
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairing import interleave, ratio, record, spread, table
from benchmarks.pretrained import Worker, add_rivals, cpu_seconds, loaded
from benchmarks.rollout import Case, counted, plant
from ramulus.core.tree import Tree
from ramulus.engine.engine import Request, Sampling, Segment
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.grow.branching import Branching, Star
from ramulus.grow.growth import grow_forest
from ramulus.grow.stop import Stop
from ramulus.run.runtime import collect_seldom

CONTENDERS = ("ours-float32", "ours-bfloat16", "vllm-float32", "vllm-bfloat16")
WAIT = 0.01  # seconds in which all trees of a round have asked
VOCABULARY = 40_000  # ids of prompts are below it


class Rival:
    """Another engine in a process of its own: continuations of one length, with no log-probs."""

    features: frozenset[str] = frozenset()

    def __init__(self, worker: Worker, limit: int) -> None:
        self.worker, self.limit, self.about = worker, limit, worker.name
        self.version, self.fresh, self.sampled = 0, True, 0
        self.waiting: list[tuple[Sequence[Request], asyncio.Future[list[Segment]]]] = []

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        """Together with what other trees ask at the same time."""
        answer: asyncio.Future[list[Segment]] = asyncio.get_running_loop().create_future()
        self.waiting.append((requests, answer))
        if len(self.waiting) == 1:
            await asyncio.sleep(WAIT)
            waiting, self.waiting = self.waiting, []
            segments = iter(self.sampled_now([request for asked, _ in waiting for request in asked]))
            for asked, other in waiting:
                other.set_result([next(segments) for _ in asked])
        return await answer

    def sampled_now(self, requests: Sequence[Request]) -> list[Segment]:
        """All at once."""
        [new] = {request.sampling.max_tokens for request in requests}
        responses = self.worker.responses([list(request.prefix) for request in requests], new, self.fresh)
        self.fresh, self.sampled = False, self.sampled + new * len(requests)
        if {len(response) for response in responses} != {new}:
            raise AssertionError(f"{self.worker.name} answered with {sorted({len(response) for response in responses})} tokens, not {new}")
        return [Segment(array("i", response), array("f", [0.0] * new), None, self.version, self.version) for response in responses]

    async def load(self, weights: Any, version: int) -> None:
        """As if there were new weights."""
        self.version, self.fresh = version, True

    async def reset(self) -> None:
        """Forget keys and values."""
        self.fresh = True

    def counters(self) -> Mapping[str, float]:
        """Tokens sampled."""
        return {"sampled": self.sampled}


def engine_of(name: str, args: argparse.Namespace, case: Case) -> Any:
    """A contender."""
    rows, most = case.prompts * case.width, args.prompt + args.new
    kind, _, what = name.partition("-")
    if kind == "vllm":
        return Rival(Worker(name, "vllm_worker.py", args.vllm, args.folder, what, rows, most, "remember"), most)
    if kind == "llama.cpp":
        return Rival(Worker(name, "llama_worker.py", args.llama, what, torch.get_num_threads(), rows, most, "remember"), most)
    return LocalEngine(loaded(args.folder, torch.float32), slots=rows, precision=getattr(torch, what))


def grown(engine: Any, case: Case, rule: Branching, args: argparse.Namespace) -> list[Tree]:
    """A forest from nothing."""

    async def everything() -> list[Tree]:
        await engine.load(None, engine.version + 1)
        return await grow_forest(plant(case, args.prompt, VOCABULARY), engine, rule, Sampling(args.new), Stop((), args.new))

    return asyncio.run(everything())


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender."""
    case = Case("", args.prompts, args.width, args.depth)
    rules: dict[str, Branching] = {"star": Star(case.width), "segments": case.segments(args.new)}
    names = [*args.contenders, *(f"llama.cpp-{file}" for file in args.gguf)]
    engines = {name: engine_of(name, args, case) for name in names}
    work: dict[str, Callable[[], Any]] = {}
    for name, engine in engines.items():
        for rule in rules:
            work[f"{name} {rule}"] = lambda engine=engine, rule=rule: grown(engine, case, rules[rule], args)
    paths, reuse = case.prompts * case.width, 1.0
    for name, engine in engines.items():
        for rule in rules:
            before = engine.counters()["sampled"]
            reuse = paths * args.new / counted(work[f"{name} {rule}"](), case, args.new, engine, before)
    rivals = [engine.worker for engine in engines.values() if isinstance(engine, Rival)]
    seconds = interleave(work, args.repeats, clock=lambda: cpu_seconds() + sum(worker.seconds for worker in rivals))
    rows, first = [], names[0]
    for name in names:
        star, segments = f"{name} star", f"{name} segments"
        rates = {rule: str(spread([paths / s for s in seconds[f"{name} {rule}"]])) for rule in rules}
        faster = ratio(seconds, segments, star)
        kind, _, what = name.partition("-")
        line = {"engine": f"{kind}, {Path(what).name}", "star, paths/CPU-s": rates["star"], "segments, paths/CPU-s": rates["segments"]}
        line |= {"speed-up": str(faster), "reuse ratio": str(round(reuse, 2)), "share of the ratio": str(round(faster.median / reuse, 2))}
        rows.append(line | {f"segments of {first} / it": str(ratio(seconds, f"{first} segments", segments))})
    return rows


def main() -> None:
    """Measure, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=CONTENDERS[:2])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--width", type=int, default=8, help="paths of a prompt")
    parser.add_argument("--depth", type=int, default=4, help="segments of a path")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of each path")
    parser.add_argument("--repeats", type=int, default=3)
    add_rivals(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    collect_seldom()  # as the command line does after its imports
    rows = measured(args)
    print(table(rows))
    record("trees", rows, "cpu")


if __name__ == "__main__":
    main()
