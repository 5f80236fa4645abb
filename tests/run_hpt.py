"""The shipped recipes that learn from demonstrations, on a tiny random model; as a user's recipe file."""

from __future__ import annotations

from dataclasses import replace

from ramulus.grow.branching import Star
from ramulus.grow.demonstration import Hinted
from ramulus.grow.schedule import Fixed
from ramulus.learn.advantage.gae import GAE
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gate import Smooth
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior
from ramulus.recipes import hpt as shipped_hpt
from ramulus.recipes import luffy as shipped_luffy
from ramulus.recipes import sft_then_grpo as shipped_stages
from ramulus.recipes import srft as shipped_srft
from ramulus.run.config.recipe import AdamW, Run
from ramulus.tasks.chain import ChainAnswer, ForgetsCarry
from run_recipe import MODEL, SMALL, TEST, TRAIN, Digits

TINY = SMALL | {
    "model": MODEL, "tasks": TRAIN, "evals": TEST, "rewards": Digits(), "schedule": Fixed(3), "steps": 3, "save_every": 2, "eval_every": 3,
    "eval_samples": 2, "eval_limit": 2, "optimizer": AdamW(lr=1e-2), "trees_every": 1,
}  # fmt: skip


def hpt() -> Run:
    return replace(shipped_hpt.small(), branching=Star(3), **TINY)


def smooth() -> Run:
    """HPT with the smooth gate, on so few problems that they come again."""
    run = hpt()
    return replace(run, name="smooth", tasks=replace(TRAIN, count=4), mix=replace(run.mix, gate=Smooth(0.3)), steps=4)


def luffy() -> Run:
    return replace(shipped_luffy.small(), branching=Star(3), **TINY)


def srft() -> Run:
    return replace(shipped_srft.small(), branching=Star(3), **TINY)


def careful() -> Run:
    """A teacher that is often wrong, checked first; one path goes on from a part of what is right."""
    tasks = replace(TRAIN, teacher=ForgetsCarry(1.0))
    return replace(
        hpt(),
        name="careful",
        tasks=tasks,
        rewards=ChainAnswer(),
        check_demonstrations=True,
        branching=Hinted(Star(2)),
        response_limit=24,
    )


def ppo() -> Run:
    """PPO with a value head."""
    mix = Mix((Term(Estimator(Clip(), Behavior(), GAE())),), value=0.5)
    return replace(hpt(), name="ppo", demonstrations=0, mix=mix)


def sft_then_grpo() -> tuple[Run, Run]:
    first, second = shipped_stages.small()
    quiet = {"rewards": (), "evals": None}  # nothing is sampled there
    return replace(first, **TINY | quiet), replace(second, branching=Star(3), **TINY)
