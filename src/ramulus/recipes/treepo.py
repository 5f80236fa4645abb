"""TreePO (arXiv 2508.17445): rollouts grown as trees of fixed-length segments, credit against every sub-group of shared prefixes."""

from dataclasses import replace

from ramulus.grow.schedule import Dynamic
from ramulus.grow.segments import Segments
from ramulus.grow.stop import BoxedAnswer, Repeats
from ramulus.learn.advantage.subgroup import SubgroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import DualClip
from ramulus.learn.objective.mix import Mix, Term, TokenMean
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.policy.model import Pretrained
from ramulus.recipes.quickstart import MANY, SMALL
from ramulus.run.config.recipe import AdamW, Run, Weighted
from ramulus.tasks.files import File
from ramulus.tasks.math import Boxed
from ramulus.tasks.rewards import Overlong


def recipe() -> Run:
    """Published settings (Qwen2.5-7B, depth 14 x 512 tokens, width 16), shortened to Qwen2.5-Math's context of 4096 tokens."""
    return Run(
        name="treepo",
        model=Pretrained("Qwen/Qwen2.5-Math-7B", dtype="bfloat16"),
        tasks=File("problems.jsonl"),
        rewards=(Weighted(Boxed(correct=1.0, wrong=-1.0)), Weighted(Overlong(limit=3072, buffer=512))),
        prompt_limit=1024,
        response_limit=3072,
        branching=Segments(width=16, depth=6, length=512, branching=2),  # "more init": first=MoreFirst(8)
        answer=BoxedAnswer(and_eos=True),
        repetition=Repeats(first=True),
        schedule=Dynamic(512, draws=3),
        mix=Mix((Term(Estimator(DualClip(0.2, 0.28, 10.0), Behavior(), SubgroupMean()), normaliser=TokenMean()),)),
        steps=400,
        minibatches=16,
        tokens_per_batch=16384,
        optimizer=AdamW(lr=1e-6, warmup=10, weight_decay=0.1),
        autocast="auto",
        activation_checkpointing=True,
        engine=MANY,
    )


def small() -> Run:
    """TreePO on the quickstart's task, from its supervised model, on a CPU."""
    return replace(
        recipe(), model=Pretrained("runs/quickstart/1-sft"), branching=Segments(width=8, depth=8, length=8), **SMALL
    )
