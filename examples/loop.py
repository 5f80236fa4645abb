"""SFT, then GRPO or TreePO, as one readable loop: `python examples/loop.py treepo`, a minute or two on a laptop.

`ramulus train` runs the same parts with what surrounds them: checkpoints, metrics, evaluation, sampling ahead.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Iterator

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
    Task,
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


def draw(tasks: list[Task], count: int, steps: int, seed: int = 0) -> Iterator[list[Tree]]:
    """For each step, `count` trees that hold their prompts alone."""
    dice = random.Random(seed)
    for step in range(steps):
        yield [Tree.plant(task, seed, step) for task in dice.sample(tasks, count)]


def learn(policy: TorchPolicy, mix: Mix, forest: list[Tree], rate: float) -> None:
    """One optimizer step: credit, columns, gradients of every row, update."""
    for batch in pack(forest, mix.credit(forest), mix, tokens_per_batch=8192):
        policy.accumulate(mix, batch)
    policy.update(rate)


async def train(method: str, steps: int, lessons: int, count: int = 32) -> list[float]:
    """The mean reward of every step, by a model that was first shown `lessons` x `count` demonstrations."""
    branching, advantage = METHODS[method]
    mix = Mix((Term(Estimator(Clip(0.2, 0.28), Behavior(), advantage)),))
    model, tokenizer = Scratch(PROBLEMS.alphabet, init_std=0.06)()
    tasks, stop = render(PROBLEMS(), tokenizer), Stop((tokenizer.eos_token_id,), max_tokens=32)
    policy, engine = TorchPolicy(model), LocalEngine(model, slots=256)
    for forest in draw(tasks, count, lessons):
        for tree in forest:
            demonstrate(tree, 1)
        learn(policy, IMITATE, forest, 3e-3)
    policy = TorchPolicy(model)  # the same weights, a new optimizer

    async def judge(tree: Tree) -> None:
        await grade(tree, [(ChainAnswer(), 1.0, "chain")], lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))

    rewards = []
    for forest in draw(tasks, count, steps, seed=1):
        await engine.load(None, policy.version)  # it reads the policy's own weights
        await grow_forest(forest, engine, branching, Sampling(32), stop, on_tree=judge)
        learn(policy, mix, forest, 2e-4)
        earned = [leaf.reward or 0.0 for tree in forest for leaf in tree.leaves()]
        rewards.append(sum(earned) / len(earned))
        print(f"{method} {len(rewards)}/{steps}  reward {rewards[-1]:.3f}  sampled {engine.counters()['sampled']} tokens")
    return rewards


if __name__ == "__main__":
    asyncio.run(train(sys.argv[1] if len(sys.argv) > 1 else "treepo", steps=30, lessons=300))
