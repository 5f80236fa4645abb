"""What does HAPO cost? `python -m benchmarks.hapo --shape S --part temperature` (or `--part update`).

temperature: decoding with `ByEntropy` against temperature 1 and a constant 0.9, the same requests of one length.
update: measuring the step, packing, gradient and optimizer step with the signal, redistribution and adaptive clip, against the dual clip alone;
both read recomputed log-probs, which are scored beforehand.
The overhead is the share of the time with it that would be saved without it, within each repeat. Checked in the same run: every
token's temperature is what its entropy gives, and HAPO with all widths and factors at rest has the dual clip's gradient.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.pairing import SHAPES, Shape, Spread, interleave, record, spread, table
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.engine import Request, Sampling, Segment
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.grow.temperature import ByEntropy
from ramulus.learn.advantage.token_group import TokenGroupMean
from ramulus.learn.objective.entropy_signal import AdaptiveClip, EntropySignal, Redistribution
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import DualClip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Recomputed
from ramulus.learn.objective.token_weight import Product
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.torch_policy import TorchPolicy

# prompt and response tokens, trees, paths of each
SIZES = {"quickstart": (11, 32, 64, 8), "S": (64, 128, 8, 8), "0.5B": (128, 512, 16, 16), "1.5B": (128, 512, 16, 16)}
RULE = ByEntropy(tau=0.1)


def prompts(shape: Shape, trees: int, length: int) -> list[tuple[int, ...]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(0)
    return [tuple(row) for row in torch.randint(2, shape.vocabulary, (trees, length), generator=generator).tolist()]


def decoded(engine: LocalEngine, requests: list[Request]) -> list[Segment]:
    """All requests at once, from an empty memory."""

    async def all_of_them() -> list[Segment]:
        await engine.load(None, 0)
        return await engine.sample(requests)

    return asyncio.run(all_of_them())


def forest(shape: Shape, model: Any, size: tuple[int, int, int, int], slots: int) -> list[Tree]:
    """Stars with what the engine recorded, and rewards."""
    prompt, response, trees, paths = size
    engine = LocalEngine(model, slots)
    grown = [Tree.plant(Task(str(i), p, "")) for i, p in enumerate(prompts(shape, trees, prompt))]
    requests = [
        Request(tree.task.prompt, Sampling(response), seed=1000 * i + k)
        for i, tree in enumerate(grown)
        for k in range(paths)
    ]
    for i, segment in enumerate(decoded(engine, requests)):
        tree = grown[i // paths]
        leaf = tree.add(tree.root, segment.tokens, Author.POLICY, finish="length", reward=float(i % 3 == 0))
        leaf.logprobs, leaf.kept, leaf.entropy = segment.logprobs, segment.kept, segment.entropy
        leaf.temperature = segment.temperature
    return grown


def temperature(
    shape: Shape, model: Any, size: tuple[int, int, int, int], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of decoding with each rule."""
    prompt, response, trees, paths = size
    rule = RULE.given(RULE.measure(forest(shape, model, size, args.slots)))
    engine = LocalEngine(model, args.slots)
    contenders: dict[str, Callable[[], Any]] = {}
    for name, heat in (("temperature 1", 1.0), ("temperature 0.9", 0.9), ("by entropy", rule)):
        requests = [
            Request(p, Sampling(response, heat), seed=1000 * i + k)
            for i, p in enumerate(prompts(shape, trees, prompt))
            for k in range(paths)
        ]
        contenders[name] = lambda requests=requests: decoded(engine, requests)  # type: ignore[misc]
    for segment in contenders["by entropy"]():
        want = rule.of_entropy(torch.tensor(segment.entropy, dtype=torch.float64))
        if float((want - torch.tensor(segment.temperature, dtype=torch.float64)).abs().max()) > 1e-3:
            raise AssertionError("a token was not sampled at the temperature of its entropy")
    return interleave(
        contenders, args.repeats, device=args.device, clock=time.process_time if args.cpu else time.perf_counter
    )


def mix_of(mask: Any) -> Mix:
    """HAPO's terms around a mask."""
    return Mix((Term(Estimator(mask, Recomputed(), TokenGroupMean())),))


def gradient(policy: TorchPolicy, trees: list[Tree], mix: Mix, budget: int) -> dict[str, torch.Tensor]:
    """The gradient of a step's trees; it stays in the parameters."""
    for batch in pack(trees, mix.credit(trees), mix, budget):
        policy.accumulate(mix, batch)
    return {name: p.grad.clone() for name, p in policy.trainable.items() if p.grad is not None}


def update(
    shape: Shape, model: Any, size: tuple[int, int, int, int], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of an update with each mask."""
    trees, policy = forest(shape, model, size, args.slots), TorchPolicy(model)
    score_now(policy, trees, {"recomputed"})
    ranks = EntropySignal(scale="rank")
    masks = {
        "dual clip": DualClip(0.2, 0.28, 10.0, "recomputed"),
        "HAPO": Product((AdaptiveClip(ceiling=10.0), Redistribution())),
        "HAPO by ranks": Product((AdaptiveClip(ceiling=10.0, signal=ranks), Redistribution(signal=ranks))),
    }
    still = mix_of(Product((AdaptiveClip(alpha=0.0, ceiling=10.0), Redistribution(0.0))))
    one, other = (gradient(policy, trees, mix, args.budget) for mix in (mix_of(masks["dual clip"]), still))
    if max(float((one[name] - other[name] / 2).abs().max()) for name in one) > 1e-6:  # the second sum holds the first
        raise AssertionError("HAPO at rest is not the dual clip")
    policy.optimizer.zero_grad()

    def step(mask: Any) -> None:
        gradient(policy, trees, mix_of(mask), args.budget)
        policy.update(1e-12)

    contenders = {name: (lambda mask=mask: step(mask)) for name, mask in masks.items()}
    return interleave(
        contenders, args.repeats, device=args.device, clock=time.process_time if args.cpu else time.perf_counter
    )


def overhead(seconds: dict[str, list[float]], name: str, without: str) -> Spread:
    """Percent of the time with it that would be saved without it, within each repeat."""
    return spread([100 * (1 - a / b) for a, b in zip(seconds[without], seconds[name], strict=True)])


def main() -> None:
    """Measure one part and print the table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("temperature", "update"), default="temperature")
    parser.add_argument("--shape", choices=SIZES, default="S")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--cpu", action="store_true", help="seconds of the processor: a busy machine tells less in them"
    )
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a packed row")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    model = shape(args.device, getattr(torch, args.dtype))
    run = temperature if args.part == "temperature" else update
    seconds = run(shape, model, SIZES[args.shape], args)
    without = next(iter(seconds))
    rows = [
        {
            "part": args.part,
            "shape": args.shape,
            "with": name,
            "seconds": str(spread(times)),
            "overhead %": str(overhead(seconds, name, without)),
        }
        for name, times in seconds.items()
    ]
    print(table(rows))
    record("hapo", rows, args.device)


if __name__ == "__main__":
    main()
