"""The tiny run with a reward that draws from every global generator; a coroutine function, so that its calls come in one order."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import torch

from ramulus.core.task import Path, Task
from ramulus.grow.schedule import Fixed
from ramulus.run.config.recipe import FinalEvaluation, Run
from run_recipe import rl


@dataclass(frozen=True)
class Drawn:
    """The share of digits, and some luck."""

    async def __call__(self, task: Task, path: Path) -> dict[str, float]:
        share = sum(c.isdigit() for c in path.text) / path.length
        return {"reward": share + random.random() + np.random.rand() + float(torch.rand(())), "correct": share}


def recipe() -> Run:
    return replace(rl(), rewards=Drawn(), schedule=Fixed(1), save_every=2, eval_every=3, keep=10)


def evaluated() -> Run:
    return replace(recipe(), final_evaluation=FinalEvaluation(samples=1, temperatures=()))
