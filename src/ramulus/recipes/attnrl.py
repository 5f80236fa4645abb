"""AttnRL (arXiv 2509.26628): more paths from the steps that later ones attend to, fewer for easy prompts, credit for every segment."""

from dataclasses import replace

from ramulus.grow.adaptive import Adaptive
from ramulus.grow.forks import AttentionForks, EarlyForks
from ramulus.grow.prompts import PromptBatch
from ramulus.learn.advantage.global_local import GlobalLocal
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import DualClip
from ramulus.learn.objective.mix import Mix, Term, TokenMean
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.policy.model import Pretrained
from ramulus.recipes.quickstart import MANY, SMALL
from ramulus.run.config.recipe import AdamW, Run
from ramulus.run.signals import ForwardInfluence
from ramulus.tasks.files import File
from ramulus.tasks.math import Boxed


def recipe() -> Run:
    """Published settings (DeepScaleR-Preview, R1-Distill-Qwen-1.5B, 30 paths a prompt), one step off-policy; `ahead=0` is on-policy."""
    return Run(
        name="attnrl", model=Pretrained("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", dtype="bfloat16"), tasks=File("problems.jsonl"), rewards=Boxed(),
        prompt_limit=1024, response_limit=8192, branching=AttentionForks(roots=6, points=2, branches=2, quantile=0.8, distance=512),
        signals=(ForwardInfluence(delta=4),), schedule=Adaptive(PromptBatch(64, target=64 * 30, beta=0.1)),
        mix=Mix((Term(Estimator(DualClip(0.2, 0.28, 3.0), Behavior(), GlobalLocal()), normaliser=TokenMean()),), kl_coef=0.001),
        steps=500, minibatches=10, ahead=1, tokens_per_batch=16384, optimizer=AdamW(lr=1e-6), autocast="auto", activation_checkpointing=True,
        engine=MANY,
    )  # fmt: skip


def small() -> Run:
    """AttnRL on the quickstart's task, from its supervised model, on a CPU; a line is a step there, and a batch has bounds."""
    forks = AttentionForks(roots=4, points=2, branches=1, distance=4)
    batch = PromptBatch(48, target=48 * 9, rounding="none", least=32, most=96)
    changes = SMALL | {"branching": forks, "signals": (ForwardInfluence(delta=1),), "schedule": Adaptive(batch)}
    return replace(recipe(), model=Pretrained("runs/quickstart/1-sft"), **changes)


def early() -> Run:
    """The control of `small`: branches at random early steps, without attention."""
    forks = EarlyForks(roots=4, points=2, branches=1, distance=4)
    return replace(small(), branching=forks, signals=(), schedule=replace(small().schedule, attention=False))
