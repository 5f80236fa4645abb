"""All parts in one run: attended steps, adaptive sampling, one step off-policy, entropy-aware temperature, clip and credit, the smooth gate."""

from dataclasses import replace

from ramulus.core.tree import Author
from ramulus.grow.adaptive import Adaptive
from ramulus.grow.forks import AttentionForks
from ramulus.grow.prompts import PromptBatch
from ramulus.grow.temperature import ByEntropy
from ramulus.learn.advantage.global_local import GlobalLocal
from ramulus.learn.advantage.group import Constant
from ramulus.learn.objective.entropy_signal import AdaptiveClip, EntropySignal, Redistribution
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gate import Smooth
from ramulus.learn.objective.mask import Everything
from ramulus.learn.objective.mix import Mix, QuestionMean, Term
from ramulus.learn.objective.reference import Behavior, Itself
from ramulus.learn.objective.token_weight import Product
from ramulus.recipes.hpt import PUBLISHED, SMALL
from ramulus.run.config.recipe import AdamW, Run
from ramulus.run.signals import ForwardInfluence


def recipe() -> Run:
    """No paper's settings: those of AttnRL, HAPO and HPT where they do not meet, shares split at forks, the entropy signal by ranks."""
    signal = EntropySignal(scale="rank")
    mask = Product((AdaptiveClip(0.2, 0.28, 1.0, 10.0, signal, "behavior"), Redistribution(1.0, 0.2, 0.28, 1.0, signal, "behavior")))
    rl = Term(Estimator(mask, Behavior(), GlobalLocal(unbranched=True)), normaliser=QuestionMean())
    sft = Term(Estimator(Everything(), Itself(), Constant(over="expert")), (Author.EXPERT,), QuestionMean())
    schedule = Adaptive(PromptBatch(128, target=128 * 30, rounding="none", least=64, most=256), even=False, unbranched=True)
    changes = PUBLISHED | {"schedule": schedule, "minibatches": 4}
    return Run(
        name="ramulus", branching=AttentionForks(roots=6, points=2, branches=2, quantile=0.8, distance=128), ahead=1,
        signals=(ForwardInfluence(delta=4),), temperature=ByEntropy(tau=0.1),
        mix=Mix((rl, sft), share="each_fork", gate=Smooth(0.1)), optimizer=AdamW(lr=1e-6), **changes,
    )  # fmt: skip


def small() -> Run:
    """All of it on the quickstart's task, from its supervised model, with a teacher that is right, on a CPU."""
    forks = AttentionForks(roots=4, points=2, branches=1, distance=4)
    schedule = Adaptive(PromptBatch(48, target=48 * 12, rounding="none", least=32, most=96), even=False, unbranched=True)
    changes = {"branching": forks, "signals": (ForwardInfluence(delta=1),), "schedule": schedule, "minibatches": 2}
    return replace(recipe(), **SMALL | changes)
