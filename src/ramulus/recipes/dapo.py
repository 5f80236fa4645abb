"""DAPO (arXiv 2503.14476): GRPO with clip-higher, token-level loss, dynamic sampling and a soft over-long penalty."""

from dataclasses import replace

from ramulus.grow.branching import Star
from ramulus.grow.schedule import Dynamic
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import DualClip
from ramulus.learn.objective.mix import Mix, Term, TokenMean
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.policy.model import Pretrained
from ramulus.recipes.quickstart import MANY, SMALL
from ramulus.run.config.recipe import AdamW, Run, Weighted
from ramulus.tasks.chain import ChainAnswer
from ramulus.tasks.files import File
from ramulus.tasks.math import Boxed
from ramulus.tasks.rewards import Overlong


def recipe() -> Run:
    """Published: 512 prompts x 16 paths, 16 updates a step, clip 0.2/0.28, response 16384 + 4096 buffer; here for Qwen2.5-Math's context."""
    return Run(
        name="dapo",
        model=Pretrained("Qwen/Qwen2.5-Math-7B", dtype="bfloat16"),
        tasks=File("problems.jsonl"),
        rewards=(Weighted(Boxed(correct=1.0, wrong=-1.0)), Weighted(Overlong(limit=3072, buffer=512))),
        prompt_limit=1024,
        response_limit=3072,
        branching=Star(16),
        schedule=Dynamic(512, draws=3),
        mix=Mix((Term(Estimator(DualClip(0.2, 0.28, 10.0), Behavior(), GroupMean(std=True)), normaliser=TokenMean()),)),
        steps=500,
        minibatches=16,
        tokens_per_batch=16384,
        optimizer=AdamW(lr=1e-6, warmup=10, weight_decay=0.1),
        autocast="auto",
        activation_checkpointing=True,
        engine=MANY,
    )


def small() -> Run:
    """DAPO on the quickstart's task, from its supervised model, on a CPU."""
    rewards = (Weighted(ChainAnswer()), Weighted(Overlong(limit=64, buffer=16)))
    changes = SMALL | {"schedule": Dynamic(64, draws=3), "rewards": rewards}
    return replace(recipe(), model=Pretrained("runs/quickstart/1-sft"), branching=Star(8), **changes)
