"""A tiny run of HAPO for tests, with every part of it in motion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ramulus.grow.schedule import Fixed
from ramulus.recipes import hapo
from ramulus.run.config.find import find
from ramulus.run.config.recipe import AdamW, Run


def recipe() -> Run:
    tiny = find(str(Path(__file__).with_name("run_recipe.py"))).rl()
    own = hapo.recipe()
    changes = {"mix": own.mix, "temperature": own.temperature, "schedule": Fixed(4), "evals": None, "eval_every": 0}
    return replace(tiny, name="hapo", steps=4, minibatches=2, optimizer=AdamW(lr=1e-2), **changes)
