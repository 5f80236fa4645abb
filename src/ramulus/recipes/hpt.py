"""HPT (arXiv 2509.04419): each question is learned from its rollouts or, where all of them fail, from its demonstration."""

from dataclasses import replace
from typing import Any

from ramulus.core.tree import Author
from ramulus.grow.branching import Star
from ramulus.grow.schedule import Fixed
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gate import Switch
from ramulus.learn.objective.mask import Everything
from ramulus.learn.objective.mix import Mix, QuestionMean, Term, TokenMean
from ramulus.learn.objective.reference import Behavior, Itself
from ramulus.learn.policy.model import Pretrained
from ramulus.recipes import quickstart
from ramulus.run.config.recipe import AdamW, Run
from ramulus.tasks.chain import ChainSum
from ramulus.tasks.files import File
from ramulus.tasks.math import Boxed

PUBLISHED: dict[str, Any] = {  # shared with LUFFY and SRFT; Qwen2.5-Math's context of 4096 tokens is extended as theirs is
    "model": Pretrained("Qwen/Qwen2.5-Math-7B", dtype="bfloat16", max_positions=16384, rope={"rope_theta": 40000.0}),
    "tasks": File("problems.jsonl", demonstration="solution"), "rewards": Boxed(), "demonstrations": 1, "prompt_limit": 1024, "response_limit": 8192,
    "schedule": Fixed(128), "steps": 500, "minibatches": 2, "tokens_per_batch": 32768, "autocast": "auto", "activation_checkpointing": True,
    "engine": quickstart.MANY,
}  # fmt: skip
SMALL = quickstart.SMALL | {"model": Pretrained("runs/quickstart/1-sft"), "tasks": ChainSum(30_000, "train")}


def recipe() -> Run:
    """Published settings: Dr.GRPO without a clip, threshold 0, learning rate 5e-6.

    Qwen2.5-Math-1.5B: `model.path=Qwen/Qwen2.5-Math-1.5B mix.terms.1.coefficient=0.3`. LLaMA-3.1-8B: `model=NAME mix.gate.threshold=0.25`,
    which keeps the context of that model.
    """
    rl = Term(Estimator(Everything(), Behavior(), GroupMean(std=False)), normaliser=QuestionMean())
    sft = Term(Estimator(Everything(), Itself(), Constant(over="expert")), (Author.EXPERT,), QuestionMean())
    mix = Mix((rl, sft), entropy_bonus=0.001, gate=Switch(0.0), normaliser=TokenMean())
    return Run(name="hpt", branching=Star(8), mix=mix, optimizer=AdamW(lr=5e-6, weight_decay=0.01), **PUBLISHED)


def small() -> Run:
    """HPT on the quickstart's task, from its supervised model, with a teacher that is right, on a CPU."""
    return replace(recipe(), **SMALL)
