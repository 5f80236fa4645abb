"""The small variant of every recipe, with the quickstart's model untrained and a reward that has signal from the first step."""

from __future__ import annotations

from dataclasses import replace

from ramulus.recipes import attnrl as attnrl_recipe
from ramulus.recipes import dapo as dapo_recipe
from ramulus.recipes import grpo as grpo_recipe
from ramulus.recipes import hapo as hapo_recipe
from ramulus.recipes import hpt as hpt_recipe
from ramulus.recipes import luffy as luffy_recipe
from ramulus.recipes import quickstart
from ramulus.recipes import ramulus as ramulus_recipe
from ramulus.recipes import sft_then_grpo as sft_then_grpo_recipe
from ramulus.recipes import srft as srft_recipe
from ramulus.recipes import treepo as treepo_recipe
from ramulus.recipes import treerl as treerl_recipe
from ramulus.run.config.recipe import Run
from ramulus.tasks.chain import ChainSum
from run_recipe import Digits

FIRST, _ = quickstart.recipe()
TASKS = ChainSum(200, "train")
CHANGES = {
    "model": FIRST.model, "tasks": TASKS, "evals": None, "rewards": Digits(), "steps": 10, "save_every": 5, "keep": 10, "eval_every": 0,
    "response_limit": 24, "final_evaluation": None, "threads": 1, "tensorboard": False, "trees_every": 1,
}  # fmt: skip


def few(run: Run) -> Run:
    """Ten steps of few prompts."""
    schedule = run.schedule
    if hasattr(schedule, "batch"):
        schedule = replace(schedule, batch=replace(schedule.batch, first=4, target=40, least=3, most=6))
    else:
        schedule = replace(schedule, prompts=4)
    return replace(run, schedule=schedule, **CHANGES)


def sft() -> Run:
    return few(FIRST)


def grpo() -> Run:
    return few(grpo_recipe.small())


def dapo() -> Run:
    return few(dapo_recipe.small())


def treepo() -> Run:
    return few(treepo_recipe.small())


def treerl() -> Run:
    return few(treerl_recipe.small())


def attnrl() -> Run:
    return few(attnrl_recipe.small())


def early() -> Run:
    return few(attnrl_recipe.early())


def hapo() -> Run:
    return few(hapo_recipe.small())


def hpt() -> Run:
    return few(hpt_recipe.small())


def luffy() -> Run:
    return few(luffy_recipe.small())


def srft() -> Run:
    return few(srft_recipe.small())


def ramulus() -> Run:
    return few(ramulus_recipe.small())


def sft_then_grpo() -> tuple[Run, Run]:
    first, second = sft_then_grpo_recipe.small()
    return few(first), few(second)
