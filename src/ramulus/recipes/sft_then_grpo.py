"""SFT, then GRPO: the usual two stages, which methods that mix demonstrations with rollouts are measured against."""

from dataclasses import replace

from ramulus.learn.policy.model import Scratch
from ramulus.recipes import grpo, quickstart, sft
from ramulus.run.config.recipe import Run
from ramulus.tasks.chain import ChainSum


def recipe() -> tuple[Run, Run]:
    """The SFT baseline of LUFFY (arXiv 2504.14945), then GRPO from where it ended, on the same problems."""
    first = replace(sft.recipe(), response_limit=3072)
    return first, replace(grpo.recipe(), tasks=first.tasks)


def small() -> tuple[Run, Run]:
    """Both on the quickstart's task, with a teacher that is right, from nothing, on a CPU: SFT stops early, at half the quickstart's steps."""
    first, _ = quickstart.recipe()
    tasks = ChainSum(30_000, "train")
    assert isinstance(first.model, Scratch)
    second = replace(grpo.small(), model=first.model, tasks=tasks)
    return replace(first, tasks=tasks, steps=first.steps // 2, save_every=first.steps // 2), second
