"""The tiny run for tests with a reward that draws from the global generators, its learner in this process or in another."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import torch

from ramulus.core.task import Path, Task
from ramulus.learn.policy.torch_learner import Torch
from ramulus.run.config.recipe import AdamW, Run
from run_recipe import rl


@dataclass(frozen=True)
class Drawn:
    """Nothing but chance; a coroutine function, since plain ones run side by side and come in any order."""

    async def __call__(self, task: Task, path: Path) -> float:
        return (random.random() + np.random.rand() + torch.rand(()).item()) / 3


def here() -> Run:
    return replace(rl(), rewards=Drawn(), steps=3, save_every=1, evals=None, eval_every=0, optimizer=AdamW(lr=1e-2))


def apart() -> Run:
    return replace(here(), learner=Torch(process=True))
