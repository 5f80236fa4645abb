"""HAPO (arXiv 2509.16591): temperature, credit and clip of each token by the entropy it was sampled at."""

from dataclasses import replace

from ramulus.grow.branching import Star
from ramulus.grow.schedule import Dynamic, Fixed
from ramulus.grow.temperature import ByEntropy
from ramulus.learn.advantage.token_group import TokenGroupMean
from ramulus.learn.objective.entropy_signal import AdaptiveClip, EntropySignal, Redistribution
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mix import Mix, Term, TokenMean
from ramulus.learn.objective.reference import Recomputed
from ramulus.learn.objective.token_weight import Product
from ramulus.learn.policy.model import Pretrained
from ramulus.recipes.quickstart import MANY, SMALL
from ramulus.run.config.recipe import AdamW, Run, Weighted
from ramulus.tasks.files import File
from ramulus.tasks.math import Boxed
from ramulus.tasks.rewards import Overlong


def recipe() -> Run:
    """The paper's second version: DAPO, tau 0.1, clip 0.2/0.28, 512 prompts x 16 paths, 16 updates; lengths here are for Qwen2.5-Math's context."""
    mask = Product((AdaptiveClip(0.2, 0.28, ceiling=10.0), Redistribution(1.0, 0.2, 0.28)))
    return Run(
        name="hapo", model=Pretrained("Qwen/Qwen2.5-Math-7B", dtype="bfloat16"), tasks=File("problems.jsonl"), prompt_limit=1024, response_limit=3072,
        rewards=(Weighted(Boxed(window=300)), Weighted(Overlong(limit=3072, buffer=512))), branching=Star(16), temperature=ByEntropy(tau=0.1),
        schedule=Dynamic(512, draws=3), mix=Mix((Term(Estimator(mask, Recomputed(), TokenGroupMean()), normaliser=TokenMean()),)),
        steps=500, minibatches=16, tokens_per_batch=16384, optimizer=AdamW(lr=1e-6, warmup=10, weight_decay=0.1), autocast="auto",
        activation_checkpointing=True, engine=MANY,
    )  # fmt: skip


def released() -> Run:
    """The released code: unsigned signal, clip 0.2/0.2 that moves the neutral zone, fallback to GRPO, no dynamic sampling; one statistic a step."""
    signal = EntropySignal(signed=False)
    mask = Product((AdaptiveClip(0.2, 0.2, 1.0, 10.0, signal), Redistribution(1.0, 0.2, 0.2, 1.0, signal)))
    advantage = TokenGroupMean(fallback=5.0, width=3072)
    rewards = (Weighted(Boxed(correct=1.0, wrong=-1.0, window=300)), Weighted(Overlong(limit=3072, buffer=512)))
    mix = Mix((Term(Estimator(mask, Recomputed(), advantage), normaliser=TokenMean()),))
    return replace(recipe(), mix=mix, temperature=ByEntropy(tau=0.05, kind="released"), schedule=Fixed(512), rewards=rewards)


def small() -> Run:
    """HAPO on the quickstart's task, from its supervised model, on a CPU; two updates a step, as on-policy the clip never acts."""
    changes = SMALL | {"schedule": Dynamic(64, draws=3), "minibatches": 2}
    return replace(recipe(), model=Pretrained("runs/quickstart/1-sft"), branching=Star(8), **changes)
