"""GRPO (arXiv 2402.03300): a star of independent paths, credit against the group's mean and deviation, a clipped ratio."""

from dataclasses import replace

from ramulus.grow.branching import Star
from ramulus.grow.schedule import Fixed
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, SequenceMean, Term
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.policy.model import Pretrained
from ramulus.recipes.quickstart import MANY, SMALL
from ramulus.run.config.recipe import AdamW, Run
from ramulus.tasks.files import File
from ramulus.tasks.math import Boxed


def recipe() -> Run:
    """Qwen2.5-Math on boxed mathematics, the usual settings: 128 prompts x 8 paths, learning rate 1e-6, no KL.

    The paper holds the policy to its start by a KL term with a coefficient of 0.04: `mix.kl_coef=0.04`.
    """
    return Run(
        name="grpo",
        model=Pretrained("Qwen/Qwen2.5-Math-1.5B", dtype="bfloat16"),
        tasks=File("problems.jsonl"),
        rewards=Boxed(),
        prompt_limit=1024,
        response_limit=3072,
        branching=Star(8),
        schedule=Fixed(128),
        mix=Mix((Term(Estimator(Clip(0.2, 0.2), Behavior(), GroupMean(std=True)), normaliser=SequenceMean()),)),
        steps=500,
        minibatches=2,
        tokens_per_batch=16384,
        optimizer=AdamW(lr=1e-6, warmup=10, weight_decay=0.1),
        autocast="auto",
        activation_checkpointing=True,
        engine=MANY,
    )


def small() -> Run:
    """GRPO on the quickstart's task, from its supervised model, on a CPU."""
    return replace(recipe(), model=Pretrained("runs/quickstart/1-sft"), branching=Star(8), **SMALL)
