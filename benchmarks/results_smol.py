"""The recipes that docs/results-smol.md compares on SmolLM2-135M-Instruct: `ramulus sweep benchmarks/results_smol.py:grpo ...`.

Each is the shipped `smol` recipe, 15 steps of 8 prompts x 8 paths, held out on the same 60 problems every three steps, and examined before and
after on the task that it is not trained on. `tasks=word_problems evals=word_problems final_evaluation.tasks=sums` turns the two round.
"""

from __future__ import annotations

from dataclasses import replace

from ramulus.recipes import smol
from ramulus.run.config.recipe import AdamW, FinalEvaluation, Run
from ramulus.tasks.word_problems import WordProblems

LR = {"grpo": 1e-5, "treepo": 2e-5, "treepo_forks": 2e-5, "treerl": 1e-5, "attnrl": 1e-5, "hapo": 2e-5, "hpt": 2e-5, "ramulus": 1e-5}
"""The best of 5e-6, 1e-5 and 2e-5 after 10 steps on the sums, each with one seed (100) that is not used again."""


def within(run: Run, name: str) -> Run:
    """The run on the shared budget."""
    return replace(
        run, optimizer=AdamW(lr=LR[name]), steps=15, eval_every=3, eval_samples=2, trees_every=15, save_every=15, keep=1, keep_optimizer=False,
        tokens_per_batch=2048, prompt_limit=192, tensorboard=False, threads=1,
        final_evaluation=FinalEvaluation(WordProblems(60, "test"), samples=2, temperatures=()),
    )  # fmt: skip


def grpo() -> Run:
    return within(smol.recipe(), "grpo")


def treepo() -> Run:
    return within(smol.treepo(), "treepo")


def treepo_forks() -> Run:
    """TreePO in which the branches of a fork share a weight, as paths do not."""
    run = within(smol.treepo(), "treepo_forks")
    return replace(run, mix=replace(run.mix, share="each_fork"))


def treerl() -> Run:
    return within(smol.treerl(), "treerl")


def attnrl() -> Run:
    return within(smol.attnrl(), "attnrl")


def hapo() -> Run:
    return within(smol.hapo(), "hapo")


def hpt() -> Run:
    return within(smol.hpt(), "hpt")


def ramulus() -> Run:
    return within(smol.ramulus(), "ramulus")
