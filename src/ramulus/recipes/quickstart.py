"""From nothing to a model that overtakes its teacher, on a laptop: SFT on a bad teacher, then TreePO against a verifier alone."""

from typing import Any

from ramulus.core.tree import Author
from ramulus.engine.local.factory import Local
from ramulus.grow.branching import Star
from ramulus.grow.schedule import Fixed
from ramulus.grow.segments import Segments
from ramulus.learn.advantage.group import Constant
from ramulus.learn.advantage.subgroup import SubgroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import DualClip, Everything
from ramulus.learn.objective.mix import Mix, Term, TokenMean
from ramulus.learn.objective.reference import Behavior, Itself
from ramulus.learn.policy.model import Scratch
from ramulus.run.config.recipe import AdamW, FinalEvaluation, Run
from ramulus.tasks.chain import ChainAnswer, ChainSum, ForgetsCarry

TEACHER = ForgetsCarry(0.6)  # forgets the carry in 60 % of the steps that cross a ten
TRAIN = ChainSum(30_000, "train", teacher=TEACHER)  # such as 4+7-9+2?, three to six terms
TEST = ChainSum(250, "test")  # problems whose texts are never in TRAIN
SCALE: dict[str, Any] = {"prompt_limit": 16, "response_limit": 64, "tokens_per_batch": 16384, "engine": Local(slots=256)}
MANY = Local(slots=256, precision="auto")  # of the recipes for GPUs: as many rows as memory holds, up to that; keys and values in bfloat16
SMALL: dict[str, Any] = SCALE | {  # RL on the quickstart's task, shared with the small variants of the other recipes
    "tasks": TRAIN, "evals": TEST, "rewards": ChainAnswer(), "answer": None, "repetition": None, "schedule": Fixed(64), "minibatches": 1, "steps": 75,
    "optimizer": AdamW(lr=3e-4, warmup=5, decay="linear", floor=0.1), "autocast": False, "activation_checkpointing": False,
    "eval_every": 15, "eval_limit": 60, "save_every": 15, "trees_every": 5,
}  # fmt: skip


def recipe() -> tuple[Run, Run]:
    """Two stages: imitate the teacher, then learn from the verifier what the teacher never knew."""
    model = Scratch(TRAIN.alphabet, hidden=128, layers=2, heads=4, kv_heads=2, init_std=0.06)
    imitate = Mix((Term(Estimator(Everything(), Itself(), Constant(1.0)), authors=(Author.EXPERT,)),))
    improve = Mix((Term(Estimator(DualClip(0.2, 0.28, 10.0), Behavior(), SubgroupMean()), normaliser=TokenMean()),))
    sft = Run(
        name="sft", model=model, tasks=TRAIN, branching=Star(0), demonstrations=1, schedule=Fixed(48), mix=imitate,
        steps=600, optimizer=AdamW(lr=3e-3, betas=(0.9, 0.95), warmup=50, decay="cosine", floor=0.05),
        save_every=300, trees_every=100, **SCALE,
    )  # fmt: skip
    branching = Segments(width=8, depth=8, length=8, branching=2)
    treepo = Run(name="treepo", model=model, branching=branching, mix=improve, final_evaluation=FinalEvaluation(samples=8), **SMALL)
    return sft, treepo
