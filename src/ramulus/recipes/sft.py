"""Supervised fine-tuning on demonstrations: a tree with one branch, written by an expert."""

from ramulus.core.tree import Author
from ramulus.grow.branching import Star
from ramulus.grow.schedule import Fixed
from ramulus.learn.advantage.group import Constant
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Everything
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Itself
from ramulus.learn.policy.model import Pretrained
from ramulus.run.config.recipe import AdamW, Run
from ramulus.tasks.files import File


def recipe() -> Run:
    """Settings of the SFT baseline of LUFFY (arXiv 2504.14945): 3 epochs, batch 64, learning rate 5e-5, warm-up 0.1."""
    return Run(
        name="sft",
        model=Pretrained("Qwen/Qwen2.5-Math-1.5B", dtype="bfloat16", max_positions=16384, rope={"rope_theta": 40000.0}),
        tasks=File("problems.jsonl", demonstration="solution"),
        prompt_limit=1024,
        response_limit=8192,
        branching=Star(0),
        demonstrations=1,
        schedule=Fixed(64),
        mix=Mix((Term(Estimator(Everything(), Itself(), Constant(1.0)), authors=(Author.EXPERT,)),)),
        steps=2000,
        tokens_per_batch=16384,
        optimizer=AdamW(lr=5e-5, warmup=200, decay="cosine", weight_decay=0.01),
        autocast="auto",
        activation_checkpointing=True,
    )
