"""The recipes that docs/results.md compares, on one budget: `ramulus sweep benchmarks/results.py:grpo benchmarks/results.py:treepo ...`.

Each is the shipped `:small` recipe with 40 steps of about 64 prompts, from one shared supervised model, held out on the same 250
problems every ten steps. `model=`, `tasks.terms=` and `evals.terms=` on the command line choose the start and the difficulty.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ramulus.grow.segments import Segments
from ramulus.grow.worth import LowValue, MeanLogprob
from ramulus.learn.policy.model import Pretrained
from ramulus.recipes import attnrl as attnrl_recipe
from ramulus.recipes import dapo as dapo_recipe
from ramulus.recipes import grpo as grpo_recipe
from ramulus.recipes import hapo as hapo_recipe
from ramulus.recipes import hpt as hpt_recipe
from ramulus.recipes import luffy as luffy_recipe
from ramulus.recipes import ramulus as ramulus_recipe
from ramulus.recipes import sft_then_grpo as sft_then_grpo_recipe
from ramulus.recipes import srft as srft_recipe
from ramulus.recipes import treepo as treepo_recipe
from ramulus.recipes import treerl as treerl_recipe
from ramulus.run.config.recipe import AdamW, Run

STEPS = 40
START = Pretrained("runs/quickstart/1-sft")
BUDGET: dict[str, Any] = {
    "model": START, "eval_every": 10, "eval_limit": 250, "save_every": 20, "keep": 1, "trees_every": 20, "final_evaluation": None,
    "threads": 1, "tensorboard": False, "prompt_limit": 24,
}  # fmt: skip


def within(run: Run, steps: int = STEPS) -> Run:
    """The run on the shared budget."""
    return replace(run, steps=steps, **BUDGET)


def grpo() -> Run:
    return within(grpo_recipe.small())


def dapo() -> Run:
    return within(dapo_recipe.small())


def treepo() -> Run:
    return within(treepo_recipe.small())


def treepo_pruned() -> Run:
    """TreePO that prunes up to two paths of a tree early, by the log-prob of their last tokens, and spends what that saves on branching."""
    rule = LowValue(MeanLogprob(8), budget=2)
    return replace(treepo(), branching=Segments(width=8, depth=8, length=8, branching=2, rerolls=2), pruning=(rule,))


def treerl() -> Run:
    return within(treerl_recipe.small())


def attnrl() -> Run:
    return within(attnrl_recipe.small())


def early() -> Run:
    """AttnRL that branches at random early steps."""
    return within(attnrl_recipe.early())


def hapo() -> Run:
    return within(hapo_recipe.small())


def hpt() -> Run:
    return within(hpt_recipe.small())


def luffy() -> Run:
    return within(luffy_recipe.small())


def srft() -> Run:
    return within(srft_recipe.small())


def ramulus() -> Run:
    return within(ramulus_recipe.small())


def sft_then_grpo() -> tuple[Run, Run]:
    """Half the steps of each, the supervised ones at the learning rate of the others."""
    first, second = sft_then_grpo_recipe.small()
    half = STEPS // 2
    first = replace(within(first, half), optimizer=AdamW(lr=3e-4, warmup=5))
    return replace(first, eval_every=0, evals=None), within(second, half)
