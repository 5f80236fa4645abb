"""What does an update of a pretrained model take in float32, in bfloat16, and of adapters alone? `python -m benchmarks.update_pretrained FOLDER`.

The same packed trees for all contenders, in rows of at most --row tokens: a prompt with eight paths below it, as GRPO and TreePO train them. An
update is forward and backward, weights narrowed anew (with --step the optimizer's step too, at learning rate 0) on one thread, in CPU
seconds, contenders in turns. `autocast` is torch's own. Checked in the same run: the gradients of full training in bfloat16 lie as near to
float32 as autocast's. `--memory` adds the peak of resident memory, each contender in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.pairing import interleave, ratio, record, spread, table
from benchmarks.shapes import regular
from benchmarks.update import GRPO, resident
from ramulus.core.tree import Tree, column
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.in_process import keep_blocks_of
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.model import Pretrained
from ramulus.learn.policy.torch_policy import TorchPolicy

CONTENDERS = ("float32", "autocast", "bfloat16", "lora-float32", "lora-autocast", "lora-bfloat16")
VOCABULARY = 40_000  # ids of tokens are below it


def forest(args: argparse.Namespace) -> list[Tree]:
    """Stars and binary trees by turns, with rewards, as if sampled."""
    trees = [
        regular([8] if i % 2 else [2, 2, 2], args.prompt, args.new if i % 2 else args.new * 8 // 14, VOCABULARY, seed=i) for i in range(args.trees)
    ]
    for tree in trees:
        for node in tree.walk():
            if node.parent is not None:
                count = len(node.tokens)
                node.logprobs, node.entropy, node.temperature = column([-10.0] * count, "f"), column([1.0] * count, "f"), 1.0
    return trees


def policy_of(name: str, model: Any) -> TorchPolicy:
    """One of the contenders around a model in float32."""
    lora = Lora(rank=16, alpha=32) if name.startswith("lora") else None
    policy = TorchPolicy(model, autocast=not name.endswith("float32"), lora=lora)
    keep_blocks_of(policy)  # as the learner of a run does
    if name.endswith("autocast"):
        policy.patches, policy.head = [], replace(policy.head, narrow=None)
    return policy


def learn(policy: TorchPolicy, rows: list[TreeBatch], step: bool = True) -> None:
    """One update, or its gradient alone."""
    for row in rows:
        policy.accumulate(GRPO, row)
    if step:
        policy.update(lr=0.0)
    policy.narrow.forget()
    policy.discard()


def gradient(policy: TorchPolicy, rows: list[TreeBatch]) -> Tensor:
    """Of all rows."""
    for row in rows:
        policy.accumulate(GRPO, row)
    whole = torch.cat([p.grad.flatten() for p in policy.trainable.values() if p.grad is not None])
    policy.discard()
    return whole


def check(policies: dict[str, TorchPolicy], rows: list[TreeBatch]) -> dict[str, float]:
    """How far the gradients of full training are from those in float32, over their norm; RuntimeError where ours are farther than autocast's."""
    if not {"float32", "autocast", "bfloat16"} <= policies.keys():
        return {}
    exact = gradient(policies["float32"], rows)
    off = {name: float((gradient(policies[name], rows) - exact).norm() / exact.norm()) for name in ("autocast", "bfloat16")}
    if not off["bfloat16"] <= 1.1 * off["autocast"]:
        raise RuntimeError(f"gradients are off by {off}")
    return off


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender."""
    trees = forest(args)
    rows = pack(trees, GRPO.credit(trees), GRPO, args.row)
    whole = Pretrained(args.folder)()[0]
    policies = {name: policy_of(name, Pretrained(args.folder)()[0] if name.startswith("lora") else whole) for name in args.contenders}
    off = check(policies, rows[:1])
    work = {name: (lambda policy=policy: learn(policy, rows, args.step)) for name, policy in policies.items()}
    seconds = interleave(work, args.repeats, clock=time.process_time)
    tokens, found = sum(map(len, rows)), []
    first = args.contenders[0]
    for name in args.contenders:
        per = spread([1e3 * s / tokens for s in seconds[name]])
        line = {"update": name, "tokens": tokens, "rows": len(rows), "CPU ms a token": str(per), f"of {first}": str(ratio(seconds, name, first))}
        line |= {"gradient off": f"{off[name]:.2g}"} if name in off else {}
        line |= {"peak GB": round(child(args, name) / 2**30, 2)} if args.memory else {}
        found.append(line)
    return found


def child(args: argparse.Namespace, name: str) -> int:
    """Peak bytes of a contender's update in a process of its own, weights, gradients and optimizer among them."""
    options = [f"--{key}={getattr(args, key)}" for key in ("trees", "prompt", "new", "row")]
    command = [sys.executable, "-m", "benchmarks.update_pretrained", args.folder, *options, "--peak", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(args: argparse.Namespace) -> int:
    """The same, here."""
    policy, trees = policy_of(args.peak, Pretrained(args.folder)()[0]), forest(args)
    rows = pack(trees, GRPO.credit(trees), GRPO, args.row)
    gc.collect()
    for _ in range(2):
        learn(policy, rows)
    return resident("VmHWM")


def main() -> None:
    """Measure, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS[:3])
    parser.add_argument("--trees", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=100, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens of each path's response, nearly")
    parser.add_argument("--row", type=int, default=4096, help="tokens of a row at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step", action="store_true", help="with the optimizer's step")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(peak(args))
        return
    rows = measured(args)
    print(table(rows))
    record("update_pretrained", rows)


if __name__ == "__main__":
    main()
