"""A pretrained model on a laptop: SmolLM2-135M-Instruct learns sums of three digits by TreePO, from under a fifth right, in minutes."""

from typing import Any

from ramulus.engine.local.factory import Local
from ramulus.grow.forks import AttentionForks
from ramulus.grow.prompts import PromptBatch
from ramulus.grow.schedule import Dynamic, Fixed
from ramulus.grow.segments import Segments
from ramulus.learn.advantage.subgroup import SubgroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import DualClip
from ramulus.learn.objective.mix import Mix, Term, TokenMean
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.policy.model import Pretrained
from ramulus.models.smollm2 import SMOLLM2
from ramulus.run.config.recipe import AdamW, FinalEvaluation, Run
from ramulus.run.signals import ForwardInfluence
from ramulus.tasks.math import Boxed
from ramulus.tasks.sums import Sums

SMOL: dict[str, Any] = {  # shared with the recipes of smol.py
    "model": Pretrained(str(SMOLLM2)), "tasks": Sums(), "evals": Sums(60, "test"), "rewards": Boxed(), "answer": None, "repetition": None,
    "prompt_limit": 160, "response_limit": 64, "schedule": Fixed(8), "minibatches": 1, "steps": 20, "tokens_per_batch": 4096,
    "optimizer": AdamW(lr=1e-5), "autocast": "auto", "activation_checkpointing": False, "engine": Local(slots=64, precision="auto"),
    "eval_samples": 4, "eval_every": 0, "trees_every": 5, "save_every": 20, "keep": 1,
}  # fmt: skip
FORKS = {"branching": AttentionForks(roots=4, points=2, branches=1, distance=4), "signals": (ForwardInfluence(delta=1),)}  # of attended steps
MIXED = {"schedule": Dynamic(8, draws=3)}  # TreePO whitens over the batch: a few wrong paths among many right ones would weigh too much
BATCH = PromptBatch(8, target=8 * 9, rounding="none", least=4, most=12)


def recipe() -> Run:
    """TreePO, 8 mixed prompts x 8 paths in segments of 8 tokens; `python -m ramulus.models.smollm2` makes the model's folder."""
    mix = Mix((Term(Estimator(DualClip(0.2, 0.28, 10.0), Behavior(), SubgroupMean()), normaliser=TokenMean()),))
    branching = Segments(width=8, depth=8, length=8, branching=2)
    evaluation = FinalEvaluation(samples=4, temperatures=())
    return Run(name="quickstart_real", branching=branching, mix=mix, final_evaluation=evaluation, **SMOL | MIXED)
