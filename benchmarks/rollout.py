"""How much of what a tree shares is saved? `python -m benchmarks.rollout --shape S`.

TreePO's Segments sampler against Star at the same width in the same engine, with one response length and no EOS, so that both
give the same number of trajectories of the same length. The reuse ratio is trajectory tokens over sampled tokens; were a
token's cost the same everywhere, the speed-up would be that ratio. Each repeat starts with new weights, that is without KV.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.pairing import SHAPES, interleave, ratio, record, spread, table
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.engine import Sampling
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.grow.branching import Branching, Star
from ramulus.grow.growth import grow_forest
from ramulus.grow.segments import Segments
from ramulus.grow.stop import Stop
from ramulus.run.runtime import collect_seldom


@dataclass(frozen=True)
class Case:
    """How many prompts, and a Segments rule: `width` paths of `depth` segments, `first` of them in the first round."""

    name: str
    prompts: int
    width: int
    depth: int
    first: int = 2

    def segments(self, response: int) -> Segments:
        """The rule for responses of that many tokens."""
        return Segments(self.width, self.depth, response // self.depth, branching=2, first=self.first)


CASES = (
    Case("many prompts, small width", 64, 8, 3),
    Case("many prompts, one trunk", 64, 8, 4, first=1),
    Case("as many as wide", 16, 16, 5),
    Case("as many as wide, shallow", 16, 16, 4),
    Case("few prompts, large width", 4, 32, 5),
    Case("few prompts, very large width", 4, 64, 6),
)
# tokens of a prompt, and of a response: divisible by every depth
LENGTHS = {"quickstart": (11, 60), "S": (64, 120), "M": (64, 120), "0.5B": (256, 960), "1.5B": (256, 960)}


def plant(case: Case, prompt: int, vocabulary: int) -> list[Tree]:
    """Prompts of that many random tokens."""
    generator = torch.Generator().manual_seed(0)
    lines = torch.randint(2, vocabulary, (case.prompts, prompt), generator=generator).tolist()
    return [
        Tree.plant(Task(id=str(i), prompt=tuple(line), text=""), seed=0, step=0, visit=0)
        for i, line in enumerate(lines)
    ]


def grow(engine: LocalEngine, case: Case, rule: Branching, prompt: int, response: int, vocabulary: int) -> list[Tree]:
    """A forest from nothing: new weights, no KV."""

    async def everything() -> list[Tree]:
        await engine.load(None, engine.version + 1)
        return await grow_forest(plant(case, prompt, vocabulary), engine, rule, Sampling(response), Stop((), response))

    return asyncio.run(everything())


def counted(trees: list[Tree], case: Case, response: int, engine: LocalEngine, before: int) -> int:
    """Tokens sampled for these trees; raises AssertionError where a trajectory is missing or has another length."""
    lengths = [len(leaf.response()) for tree in trees for leaf in tree.leaves() if leaf.author is Author.POLICY]
    if lengths != [response] * (case.prompts * case.width):
        raise AssertionError(
            f"{case}: {len(lengths)} trajectories, wanted {case.prompts * case.width} of {response} tokens each"
        )
    sampled = engine.counters()["sampled"] - before
    written = sum(len(node.tokens) for tree in trees for node in tree.root.walk() if node.author is Author.POLICY)
    if sampled != written:
        raise AssertionError(f"{case}: {sampled} tokens were sampled and {written} are in the trees")
    return sampled


def measure(args: argparse.Namespace, engine: LocalEngine, case: Case) -> dict[str, Any]:
    """One row of the table."""
    prompt, response = LENGTHS[args.shape]
    rules: dict[str, Branching] = {"segments": case.segments(response), "star": Star(case.width)}
    sampled = {}
    for name, rule in rules.items():
        before = engine.counters()["sampled"]
        trees = grow(engine, case, rule, prompt, response, SHAPES[args.shape].vocabulary)
        sampled[name] = counted(trees, case, response, engine, before)
    contenders = {
        name: lambda rule=rule: grow(engine, case, rule, prompt, response, SHAPES[args.shape].vocabulary)
        for name, rule in rules.items()
    }
    seconds = interleave(contenders, args.repeats, 0, args.device)
    trajectories = case.prompts * case.width
    reuse = trajectories * response / sampled["segments"]
    faster = ratio(seconds, "segments", "star")
    return {
        "shape": args.shape, "dtype": args.dtype, "case": case.name, "prompts x width": f"{case.prompts} x {case.width}",
        "depth": case.depth, "trajectories": trajectories, "reuse ratio": round(reuse, 2),
        "segments trajectories/s": str(spread([trajectories / s for s in seconds["segments"]])),
        "star trajectories/s": str(spread([trajectories / s for s in seconds["star"]])),
        "speed-up": str(faster), "share of the ratio": round(faster.median / reuse, 2),
    }  # fmt: skip


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="S")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--memory-mb", type=int, default=1024, help="of KV")
    parser.add_argument("--engine-threads", type=int, help="of torch while the engine works; by default as they are")
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="numbers of the cases, from 0")
    args = parser.parse_args()
    model = SHAPES[args.shape](args.device, getattr(torch, args.dtype))
    engine = LocalEngine(model, slots=args.slots, memory=args.memory_mb * 2**20, threads=args.engine_threads)
    collect_seldom()  # as the command line does after its imports
    rows = [measure(args, engine, CASES[i]) for i in args.cases]
    print(table(rows))
    record("rollout", rows, args.device)


if __name__ == "__main__":
    main()
