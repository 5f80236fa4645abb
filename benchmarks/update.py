"""What does learning from packed trees gain over the same trajectories flat? `python -m benchmarks.update --shape S --tokens 1000 4000`.

Both sides hold the same weights and give the same gradient (checked in the same run): `TorchPolicy.accumulate` with GRPO on the tree;
stock transformers with SDPA on the flat side, where one by one and batches of like lengths are tried and the fastest counts.
`--scaling` measures trees of a thousand nodes from 2k to 16k unique tokens instead.
"""

from __future__ import annotations

import argparse
import functools
import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairing import SHAPES, interleave, ratio, record, settle, spread, table
from benchmarks.shapes import KINDS, Flat, deep, flatten, plant
from ramulus.core.tree import Tree, column
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.torch_policy import TorchPolicy

GRPO = Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),))
PEAK = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "4090": 165e12,
}  # dense bf16 FLOP/s
BUDGETS = (2048, 8192)  # padded tokens of a flat batch


def flat_pass(model: Any, rows: list[Flat], device: str) -> None:
    """Forward and backward of PPO's clipped loss on one padded batch of trajectories."""
    longest = max(len(row.tokens) for row in rows)
    token = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        token[i, : len(row.tokens)] = row.tokens
    token = token.to(device)
    hidden = model.model(
        token, use_cache=False
    ).last_hidden_state  # right padding: no mask, so SDPA takes its causal kernel
    who = torch.cat([torch.full((len(row.behavior),), i) for i, row in enumerate(rows)]).to(device)
    at = torch.cat([torch.arange(row.prompt, len(row.tokens)) for row in rows]).to(device)
    logits = model.lm_head(hidden[who, at - 1]).float()
    logp = logits.log_softmax(-1).gather(1, token[who, at][:, None])[:, 0]
    old = torch.cat([row.behavior for row in rows]).to(device)
    credit = torch.cat([torch.full((len(row.behavior),), row.credit) for row in rows]).to(device)
    apart = (logp - old).exp()
    loss = -torch.minimum(apart * credit, apart.clamp(0.8, 1.2) * credit).sum()
    loss.backward()


def batches(rows: list[Flat], budget: int) -> Iterator[list[Flat]]:
    """Trajectories of like lengths together, at most `budget` padded tokens; 0: one by one, -1: all at once."""
    group: list[Flat] = []
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        if group and budget >= 0 and (len(group) + 1) * len(row.tokens) > budget:
            yield group
            group = []
        group.append(row)
    yield group


def ways(rows: list[Flat], longest: int) -> dict[str, int]:
    """The flat ways that differ for these rows."""
    found = {"one by one": 0} | {f"batches of {budget}": budget for budget in BUDGETS if budget >= longest}
    seen: dict[tuple[int, ...], str] = {}
    for name, budget in found.items():
        seen.setdefault(tuple(len(group) for group in batches(rows, budget)), name)
    return {name: found[name] for name in seen.values()}


class Pair:
    """One tree, its flat trajectories and the two models."""

    def __init__(self, args: argparse.Namespace, kind: str, wanted: float, tokens: int) -> None:
        dtype = getattr(torch, args.dtype)
        shape = SHAPES[args.shape]
        self.device = args.device
        self.policy = TorchPolicy(shape(args.device, dtype))
        self.flat = shape(args.device, dtype)
        self.tree: Tree = plant(kind, wanted, tokens, shape.vocabulary)
        sample(self.policy, self.tree)
        (self.batch,) = pack([self.tree], GRPO.credit([self.tree]), GRPO)
        self.batch = self.batch.to(args.device)
        self.rows = flatten(self.tree, self.batch)
        self.unique = len(self.batch)
        self.total = sum(len(row.tokens) for row in self.rows)

    def learn(self) -> None:
        """The tree side."""
        self.policy.accumulate(GRPO, self.batch)

    def learn_flat(self, budget: int) -> None:
        """The flat side."""
        for group in batches(self.rows, budget):
            flat_pass(self.flat, group, self.device)

    def check(self, tolerance: float) -> float:
        """Largest difference of the gradients over the largest gradient; raises RuntimeError above `tolerance`."""
        self.clear()
        self.learn()
        self.learn_flat(0)
        pairs = [(a.grad, b.grad) for a, b in zip(self.policy.model.parameters(), self.flat.parameters(), strict=True)]
        off = max(float((a - b).abs().max()) for a, b in pairs) / max(float(b.abs().max()) for _, b in pairs)
        if not off <= tolerance:
            raise RuntimeError(
                f"the gradients of tree and flat trajectories differ by {off:.2g}, more than {tolerance}"
            )
        return off

    def clear(self) -> None:
        """Forget all gradients."""
        for model in (self.policy.model, self.flat):
            model.zero_grad()


@torch.no_grad()
def sample(policy: TorchPolicy, tree: Tree) -> None:
    """Give every response node the log-probs of a policy a little off this one, so that some ratios are clipped."""
    score_now(policy, [tree], {"recomputed"})
    noise = torch.Generator().manual_seed(1)
    for node in tree.walk():
        count = len(node.tokens)
        if node.parent is not None:
            near = torch.tensor(node.signals["recomputed"]) + 0.1 * torch.randn(count, generator=noise)
            node.logprobs, node.entropy, node.temperature = column(near.tolist(), "f"), column([1.0] * count, "f"), 1.0


def flops(args: argparse.Namespace, batch: TreeBatch) -> float:
    """Arithmetic of forward and backward on the tree."""
    shape, tokens = SHAPES[args.shape], len(batch)
    size = shape.hidden // shape.heads
    layer = shape.hidden * (2 * shape.hidden + 2 * shape.kv_heads * size + 3 * shape.intermediate)
    seen = float((batch.position + 1).sum())
    head = shape.hidden * shape.vocabulary * float((batch.weight != 0).any(0).sum())
    return 6 * (shape.layers * layer * tokens + head) + 12 * shape.layers * shape.hidden * seen


def one(args: argparse.Namespace, kind: str, wanted: float, tokens: int) -> dict[str, Any]:
    """A row of the table."""
    pair = Pair(args, kind, wanted, tokens)
    off = pair.check(args.tolerance)
    names = ways(pair.rows, max(len(row.tokens) for row in pair.rows))
    contenders: dict[str, Any] = {"tree": pair.learn}
    contenders |= {name: (lambda budget=budget: pair.learn_flat(budget)) for name, budget in names.items()}
    clock = time.process_time if args.cpu else time.perf_counter
    seconds = interleave(contenders, args.repeats, device=args.device, clock=clock)
    best = min(names, key=lambda name: spread(seconds[name]).median)
    gain, reuse = ratio(seconds, "tree", best), pair.total / pair.unique
    row = {
        "shape": args.shape, "dtype": args.dtype, "kind": kind, "unique": pair.unique, "ratio": round(reuse, 2),
        "tree s": str(spread(seconds["tree"])), "flat s": str(spread(seconds[best])), "flat way": best, "speed-up": str(gain),
        "of the ratio": round(gain.median / reuse, 2), "gradient off": f"{off:.1g}",
    }  # fmt: skip
    if args.device.startswith("cuda"):
        peak = next((p for name, p in PEAK.items() if name in torch.cuda.get_device_name()), float("nan"))
        row["share of peak"] = round(flops(args, pair.batch) / spread(seconds["tree"]).median / peak, 3)
    if args.memory:
        del pair, contenders
        gc.collect()
        held = {side: child(args, kind, wanted, tokens, side) for side in ("tree", "flat", best)}
        row["MB tree"], row["MB flat at once"], row["MB flat way"] = (
            round(held[s] / 2**20) for s in ("tree", "flat", best)
        )
        row["memory x ratio"] = round(held["tree"] / held["flat"] * reuse, 2)
    return row


def child(args: argparse.Namespace, kind: str, wanted: float, tokens: int, side: str) -> int:
    """Peak bytes of one side in a process of its own."""
    options = ["--shape", args.shape, "--dtype", args.dtype, "--device", args.device, "--kinds", kind]
    command = [
        sys.executable,
        "-m",
        "benchmarks.update",
        *options,
        "--ratios",
        str(wanted),
        "--tokens",
        str(tokens),
        "--peak",
        side,
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(args: argparse.Namespace) -> int:
    """Peak bytes above what weights, gradients and the libraries hold."""
    small = Pair(args, "star", 2, 64)
    pair = Pair(args, args.kinds[0], args.ratios[0], args.tokens[0])
    names = {"flat": -1} | ways(pair.rows, max(len(row.tokens) for row in pair.rows))
    run = (
        (lambda p: p.learn())
        if args.peak == "tree"
        else (lambda p: p.learn_flat(names[args.peak] if p is pair else -1))
    )
    small.policy, small.flat = pair.policy, pair.flat
    run(small)  # kernels are loaded and gradients made
    gc.collect()
    settle(args.device)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(pair)
        settle(args.device)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = resident("VmRSS")
    run(pair)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of trees of about a thousand nodes against their unique tokens and depth."""
    rows = []
    for kind in ("binary", "chain"):
        for tokens in (2000, 4000, 8000, 16000):
            shape = SHAPES[args.shape]
            policy, tree = (
                TorchPolicy(shape(args.device, getattr(torch, args.dtype))),
                deep(kind, tokens, shape.vocabulary),
            )
            sample(policy, tree)
            (batch,) = pack([tree], GRPO.credit([tree]), GRPO)
            batch = batch.to(args.device)
            work = functools.partial(policy.accumulate, GRPO, batch)
            seconds = interleave({"tree": work}, args.repeats, device=args.device)["tree"]
            seen, took = float((batch.position + 1).sum()), spread(seconds)
            rows.append(
                {
                    "shape": args.shape, "kind": kind, "nodes": sum(1 for _ in tree.walk()), "unique": len(batch),
                    "depth": int(batch.position.max()) + 1, "tree s": str(took), "ms a token": round(1e3 * took.median / len(batch), 3),
                    "ns a token and ancestor": round(1e9 * took.median / seen, 1),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    """Measure, check, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[1, 2, 4, 8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1000], help="unique tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--tolerance", type=float, default=None, help="of gradients, over the largest; 1e-3, in bfloat16 0.2"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="seconds of the processor: a busy machine tells less in them"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory too, each side in a process of its own")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tolerance = args.tolerance or (0.2 if args.dtype == "bfloat16" else 1e-3)
    if args.peak:
        print(peak(args))
        return
    if args.scaling:
        rows = scaling(args)
    else:
        asked = [(k, r, t) for t in args.tokens for r in args.ratios for k in args.kinds if (r == 1) == (k == "paths")]
        rows = [one(args, *each) for each in asked]
    print(table(rows))
    record("update", rows, args.device)


if __name__ == "__main__":
    main()
