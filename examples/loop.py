"""SFT, then GRPO or TreePO, as one readable loop: `python examples/loop.py treepo`, a minute or two on a laptop.

`ramulus train` runs the same parts with what surrounds them: checkpoints, metrics, evaluation, sampling ahead.
"""

from __future__ import annotations

import asyncio
import random
import sys
from statistics import fmean

from ramulus import (
    Author,
    Behavior,
    ChainAnswer,
    ChainSum,
    Clip,
    Constant,
    Estimator,
    Everything,
    GroupMean,
    Itself,
    LocalEngine,
    Mix,
    Sampling,
    Scratch,
    Segments,
    Star,
    Stop,
    SubgroupMean,
    Term,
    TorchPolicy,
    Tree,
    demonstrate,
    grade,
    grow_forest,
    pack,
    render,
)

PROBLEMS = ChainSum(2000, "train", terms=(2, 3))  # such as 4+7-9?
IMITATE = Mix((Term(Estimator(Everything(), Itself(), Constant(1.0)), authors=(Author.EXPERT,)),))
METHODS = {  # how trees grow, and what credit their paths earn: all that tells the two apart
    "grpo": (Star(8), GroupMean()),
    "treepo": (Segments(width=8, depth=4, length=8), SubgroupMean()),
}


def learn(policy: TorchPolicy, mix: Mix, forest: list[Tree], rate: float) -> None:
    """One optimizer step: credit, columns, gradients of every row, update."""
    for batch in pack(forest, mix.credit(forest), mix, tokens_per_batch=8192):
        policy.accumulate(mix, batch)
    policy.update(rate)


async def train(method: str, steps: int, sft_steps: int, count: int = 32) -> list[float]:
    """The mean reward of every step on `count` trees, by a model that first took `sft_steps` steps on as many demonstrations."""
    branching, advantage = METHODS[method]
    mix = Mix((Term(Estimator(Clip(0.2, 0.28), Behavior(), advantage)),))
    model, tokenizer = Scratch(PROBLEMS.alphabet, init_std=0.06)()
    tasks, stop, dice = render(PROBLEMS(), tokenizer), Stop((tokenizer.eos_token_id,), max_tokens=32), random.Random(0)
    policy, engine = TorchPolicy(model), LocalEngine(model, slots=256)
    for step in range(sft_steps):
        forest = [Tree.plant(task, step=step) for task in dice.sample(tasks, count)]
        for tree in forest:
            demonstrate(tree, 1)
        learn(policy, IMITATE, forest, 3e-3)
    policy = TorchPolicy(model)  # the same weights, a new optimizer

    async def judge(tree: Tree) -> None:
        await grade(tree, [(ChainAnswer(), 1.0, "chain")], lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))

    rewards = []
    for step in range(steps):
        forest = [Tree.plant(task, step=step) for task in dice.sample(tasks, count)]
        await engine.load(None, policy.version)  # it reads the policy's own weights
        await grow_forest(forest, engine, branching, Sampling(32), stop, on_tree=judge)
        learn(policy, mix, forest, 2e-4)
        rewards.append(fmean(leaf.reward or 0.0 for tree in forest for leaf in tree.leaves()))
        print(f"{method} {step + 1}/{steps}  reward {rewards[-1]:.3f}  sampled {engine.counters()['sampled']} tokens")
    return rewards


if __name__ == "__main__":
    asyncio.run(train(sys.argv[1] if len(sys.argv) > 1 else "treepo", steps=30, sft_steps=300))
