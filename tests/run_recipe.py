"""A tiny run for tests, as a user's recipe file: a Scratch model, chain sums, a reward with signal from the first step."""

from __future__ import annotations

from dataclasses import dataclass

from ramulus.core.task import Path, Task
from ramulus.core.tree import Author
from ramulus.engine.local.factory import Local
from ramulus.grow.branching import Star
from ramulus.grow.schedule import Dynamic, Fixed
from ramulus.grow.segments import Segments
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip, Everything
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior, Itself
from ramulus.learn.policy.model import Scratch
from ramulus.run.config.recipe import AdamW, FinalEvaluation, Run
from ramulus.tasks.chain import ChainSum

TRAIN, TEST = ChainSum(40, "train", terms=(2, 3)), ChainSum(4, "test", terms=(2, 3))
MODEL = Scratch(TRAIN.alphabet, hidden=16, layers=1, heads=2, kv_heads=1)
SMALL = {
    "prompt_limit": 16,
    "response_limit": 12,
    "tokens_per_batch": 256,
    "engine": Local(slots=8),
    "threads": 1,
    "tensorboard": False,
}


@dataclass(frozen=True)
class Digits:
    """The share of digits in a response: something that a random model does now and then."""

    def __call__(self, task: Task, path: Path) -> dict[str, float]:
        share = sum(c.isdigit() for c in path.text) / path.length
        return {"reward": share, "correct": float(share > 0.6)}


def sft() -> Run:
    mix = Mix((Term(Estimator(Everything(), Itself(), Constant(1.0)), authors=(Author.EXPERT,)),))
    return Run(
        name="sft", model=MODEL, tasks=TRAIN, branching=Star(0), demonstrations=1, schedule=Fixed(4), mix=mix, steps=4, save_every=2,
        optimizer=AdamW(lr=2e-3, warmup=1, decay="cosine"), **SMALL,
    )  # fmt: skip


def rl() -> Run:
    return Run(
        name="rl", model=MODEL, tasks=TRAIN, evals=TEST, rewards=Digits(), branching=Segments(4, 3, 4), schedule=Dynamic(4),
        mix=Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),), kl_coef=0.01, entropy_bonus=0.001),
        steps=6, minibatches=2, optimizer=AdamW(lr=1e-2, decay="linear"), save_every=2, eval_every=3, eval_samples=2, **SMALL,
    )  # fmt: skip


def recipe() -> Run:
    return rl()


def stages() -> tuple[Run, Run]:
    """For the recipe of two stages."""
    from dataclasses import replace

    return sft(), replace(rl(), final_evaluation=FinalEvaluation(samples=2, temperatures=(0.5,)))
