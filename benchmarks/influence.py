"""What do attention-based branching and adaptive sampling cost? `python -m benchmarks.influence` (or `--part shares`, `--part ahead`).

passes: seconds and peak memory of scoring packed trees, with influence riding on that pass and with influence in a pass of its own (no head).
The signal is checked in the same run: riding changes no log-prob and gives what its own pass gives, and the memory it adds is less than one head's
T x T map. shares: of a step of the recipe `ramulus` in small, which share goes to the gate, to adaptive sampling and to influence, by a clock
around their calls, beside the spread of the steps. ahead: wall-clock of `attnrl` in small one step off-policy against two generations a step.
"""

from __future__ import annotations

import argparse
import gc
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairing import SHAPES, interleave, record, settle, spread, table
from benchmarks.shapes import plant, words
from benchmarks.step import SFT, Mine
from benchmarks.update import resident
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.grow.adaptive import Adaptive
from ramulus.grow.prompts import PromptBatch
from ramulus.learn.objective.gate import Smooth
from ramulus.learn.policy.influence import Influence
from ramulus.learn.policy.model import Pretrained
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.steps import Separators
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.recipes import attnrl
from ramulus.recipes import ramulus as together
from ramulus.run.config.recipe import Run
from ramulus.run.runtime import collect_seldom
from ramulus.run.signals import Signals

STEP = 64  # tokens of a step of thinking, about
KINDS = ("path", "star", "binary")


def forest(kind: str, tokens: int, vocabulary: int) -> list[Tree]:
    """One tree: a single path, a prompt of 64 with four paths, or four binary levels that hold each token about four times."""
    if kind == "binary":
        return [plant("binary", 4, tokens, vocabulary)]
    rng, paths = random.Random(0), 1 if kind == "path" else 4
    tree = Tree.plant(Task(kind, words(rng, 64, vocabulary), ""))
    for _ in range(paths):
        tree.add(tree.root, list(words(rng, (tokens - 64) // paths, vocabulary)), Author.POLICY, finish="eos")
    return [tree]


def separators(vocabulary: int) -> Separators:
    """As many tokens end a step as make steps of the wanted length."""
    ends = frozenset(range(2, 2 + max(vocabulary // STEP, 1)))
    return Separators(ends, ends, None)


class Scored:
    """A policy, a tree and the three ways of scoring it."""

    def __init__(self, args: argparse.Namespace, kind: str, tokens: int) -> None:
        shape = SHAPES[args.shape]
        self.policy = TorchPolicy(shape(args.device, getattr(torch, args.dtype)))
        self.trees = forest(kind, tokens, shape.vocabulary)
        self.marks = separators(shape.vocabulary)

    def forward(self) -> None:
        """The pass that is needed anyway."""
        score_now(self.policy, self.trees, {"recomputed"}, tokens=1 << 20)

    def riding(self) -> None:
        """Influence in that pass."""
        score_now(self.policy, self.trees, {"recomputed"}, Influence(self.marks), tokens=1 << 20)

    def alone(self) -> None:
        """Influence in a pass of its own."""
        score_now(self.policy, self.trees, (), Influence(self.marks), tokens=1 << 20)

    def column(self, name: str) -> torch.Tensor:
        """A signal of all tokens."""
        return torch.tensor([x for tree in self.trees for node in tree.walk() for x in node.signals.get(name, [])])

    def check(self) -> None:
        """Raise unless influence changes no log-prob and is the same both ways."""
        self.forward()
        plain = self.column("recomputed")
        self.riding()
        ridden, influence = self.column("recomputed"), self.column("influence")
        self.alone()
        if not torch.equal(plain, ridden) or not torch.equal(influence, self.column("influence")):
            raise AssertionError(
                "influence changed the log-probs of the pass it rode on, or differs between the two ways"
            )
        if not bool((influence > 0).any()):
            raise AssertionError("no step has any influence")


def passes(args: argparse.Namespace, kind: str, tokens: int) -> dict[str, Any]:
    """A row: what influence adds to a pass, and the peaks."""
    scored = Scored(args, kind, tokens)
    scored.check()
    ways: dict[str, Callable[[], None]] = {
        "forward": scored.forward, "riding": scored.riding, "alone": scored.alone
    }  # fmt: skip
    seconds = interleave(ways, args.repeats, device=args.device, clock=clock_of(args))
    share = {
        name: spread([b / a - less for a, b in zip(seconds["forward"], seconds[name], strict=True)])
        for name, less in (("riding", 1), ("alone", 0))
    }
    row = {
        "shape": args.shape, "kind": kind, "tokens": sum(len(node.tokens) for tree in scored.trees for node in tree.walk()),
        "forward s": str(spread(seconds["forward"])), "riding adds": str(share["riding"]), "alone, of a forward": str(share["alone"]),
    }  # fmt: skip
    del scored, ways
    gc.collect()
    return row | (held(args, kind, tokens, row["tokens"]) if args.memory else {})


def held(args: argparse.Namespace, kind: str, tokens: int, length: int) -> dict[str, int]:
    """Peaks of the three ways; raises where influence adds as much as one head's map of `length` tokens."""
    peaks = {side: child(args, kind, tokens, side) for side in ("forward", "riding", "alone")}
    whole = 4 * length * length
    if peaks["riding"] - peaks["forward"] > whole:
        raise AssertionError(f"influence adds {peaks['riding'] - peaks['forward']} bytes, more than a map of one head")
    return {f"MB {side}": round(size / 2**20) for side, size in peaks.items()} | {"MB of a map": round(whole / 2**20)}


def child(args: argparse.Namespace, kind: str, tokens: int, side: str) -> int:
    """Peak bytes of one way in a process of its own."""
    options = ["--shape", args.shape, "--dtype", args.dtype, "--device", args.device, "--kinds", kind]
    command = [sys.executable, "-m", "benchmarks.influence", *options, "--tokens", str(tokens), "--peak", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(args: argparse.Namespace) -> int:
    """Peak bytes above what weights and libraries hold."""
    getattr(Scored(args, "star", 512), args.peak)()  # kernels are loaded
    scored = Scored(args, args.kinds[0], args.tokens[0])
    gc.collect()
    settle(args.device)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        getattr(scored, args.peak)()
        settle(args.device)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = resident("VmRSS")
    getattr(scored, args.peak)()
    return resident("VmHWM") - before


def timed(book: dict[str, float], what: str, owner: Any, names: tuple[str, ...], clock: Callable[[], float]) -> None:
    """Let the methods of a class add their seconds to book[what], those of calls inside each other once."""
    inside = [False]

    def around(inner: Callable[..., Any]) -> Callable[..., Any]:
        async def awaited(*args: Any, **options: Any) -> Any:
            start = clock()
            try:
                return await inner(*args, **options)
            finally:
                book[what] = book.get(what, 0.0) + clock() - start

        def call(*args: Any, **options: Any) -> Any:
            if inside[0]:
                return inner(*args, **options)
            inside[0], start = True, clock()
            try:
                return inner(*args, **options)
            finally:
                inside[0] = False
                book[what] = book.get(what, 0.0) + clock() - start

        return awaited if iscoroutinefunction(inner) else call

    for name in names:
        setattr(owner, name, around(getattr(owner, name)))


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """Seconds on the wall, or of the processor."""
    return time.process_time if args.cpu else time.perf_counter


def small(run: Run, args: argparse.Namespace, out: str, **changes: Any) -> Run:
    """A recipe's small variant as the benchmark wants it."""
    model = Pretrained(args.model or str(SFT))
    changes |= {
        "steps": 10**4,
        "save_every": 10**6,
        "eval_every": 0,
        "evals": None,
        "tensorboard": False,
        "threads": None,
        "out": out,
    }
    return replace(run, model=model, device=args.device, **changes)


def shares(args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Rows: seconds of a step that go to the gate, adaptive sampling and influence."""
    book: dict[str, float] = {}
    clock = clock_of(args)
    timed(book, "smooth gate", Smooth, ("__call__",), clock)
    timed(book, "adaptive sampling", Adaptive, ("__call__", "asked", "keep", "expand", "trained"), clock)
    timed(book, "influence, alone", Signals, ("__call__",), clock)
    mine = Mine(small(together.small(), args, folder), False)
    steps: list[float] = []
    found: dict[str, list[float]] = {}
    try:
        for number in range(args.repeats + 1):
            book.clear()
            start = clock()
            mine.step()
            if number:  # the first one is slower than all others
                steps.append(clock() - start)
                for name, seconds in book.items():
                    found.setdefault(name, []).append(100 * seconds / steps[-1])
    finally:
        mine.close()
    told = f"{100 * (spread(steps).high - spread(steps).low) / spread(steps).median:.0f}"
    return [
        {"part": name, "% of a step": str(spread(values)), "seconds a step": str(spread(steps)), "their range, %": told}
        for name, values in found.items()
    ]


def ahead(args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Rows: a step with the next one's first round in its crowd, and a step with two generations."""
    schedule = Adaptive(PromptBatch(48, target=48 * 9, least=48, most=48))
    runs = {
        f"ahead={n}": Mine(small(attnrl.small(), args, f"{folder}/{n}", ahead=n, schedule=schedule), False) for n in (0, 1)
    }
    try:
        seconds = interleave(
            {name: run.step for name, run in runs.items()}, args.repeats, device=args.device, clock=clock_of(args)
        )
    finally:
        for run in runs.values():
            run.close()
    rows = []
    for name, times in seconds.items():
        later = runs[name].metrics[1:]
        grow = [line["seconds"]["grow"] for line in later]
        tokens = [line["sampled"] for line in later]
        faster = spread([a / b for a, b in zip(seconds["ahead=0"], times, strict=True)])
        rows.append(
            {
                "recipe": f"attnrl:small, {name}", "seconds a step": str(spread(times)), "of it growing": str(spread(grow)),
                "sampled tokens": str(spread([float(n) for n in tokens])), "speed-up of a step": str(faster),
                "ms of growing a token": str(spread([1e3 * s / n for s, n in zip(grow, tokens, strict=True)])),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("passes", "shares", "ahead"), default="passes")
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory too, each way in a process of its own")
    parser.add_argument(
        "--model", default="", help="the quickstart's supervised model, where benchmarks.accuracy made none"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="seconds of the processor: a busy machine tells less in them"
    )
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak(args))
        return
    if args.part == "passes":
        rows = [passes(args, kind, tokens) for tokens in args.tokens for kind in args.kinds]
    else:
        collect_seldom()  # as the command line does after its imports
        with tempfile.TemporaryDirectory() as folder:
            rows = (shares if args.part == "shares" else ahead)(args, folder)
    print(table(rows))
    record(f"influence/{args.part}", rows, args.device)


if __name__ == "__main__":
    main()
