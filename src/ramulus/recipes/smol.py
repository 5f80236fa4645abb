"""Every recipe on SmolLM2-135M-Instruct and sums of three digits, on a CPU: `smol:treepo`, `smol:attnrl` and so on; `smol` itself is GRPO."""

from dataclasses import replace

from ramulus.grow.adaptive import Adaptive
from ramulus.grow.branching import Star
from ramulus.grow.forks import EntropyForks
from ramulus.grow.schedule import Dynamic
from ramulus.grow.segments import Segments

from ramulus.recipes import attnrl as attnrl_, grpo, hapo as hapo_, hpt as hpt_, ramulus as ramulus_, treepo as treepo_, treerl as treerl_  # isort: skip
from ramulus.recipes.quickstart_real import BATCH, FORKS, MIXED, SMOL
from ramulus.run.config.recipe import Run


def recipe() -> Run:
    """GRPO on independent answers, the plainest of the methods compared here."""
    return replace(grpo.recipe(), name="smol", branching=Star(8), **SMOL)


def treepo() -> Run:
    """TreePO, in segments of 8 tokens: `quickstart_real` without its evaluations."""
    return replace(treepo_.recipe(), branching=Segments(width=8, depth=8, length=8), **SMOL | MIXED)


def attnrl() -> Run:
    """AttnRL; a worked line is a step."""
    return replace(attnrl_.recipe(), **SMOL | FORKS | {"schedule": Adaptive(BATCH)})


def treerl() -> Run:
    """TreeRL: branches where tokens were uncertain, credit by node."""
    return replace(treerl_.small(), branching=EntropyForks(roots=4, points=2, branches=1, closed=None), **SMOL)


def hapo() -> Run:
    """HAPO; two updates a step, as on-policy the clip never acts."""
    return replace(hapo_.recipe(), branching=Star(8), **SMOL | {"schedule": Dynamic(8, draws=2), "minibatches": 2})


def hpt() -> Run:
    """HPT, with the worked solutions."""
    return replace(hpt_.recipe(), **SMOL)


def ramulus() -> Run:
    """All of it, with the worked solutions."""
    return replace(ramulus_.recipe(), **SMOL | FORKS | {"schedule": Adaptive(BATCH, even=False, unbranched=True), "minibatches": 2})
