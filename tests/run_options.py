"""The tiny run for tests with every option of the learner on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ramulus.engine.local.factory import Local
from ramulus.learn.policy.lora import Lora
from ramulus.run.config.find import find
from ramulus.run.config.recipe import Run


def recipe() -> Run:
    tiny = find(str(Path(__file__).with_name("run_recipe.py")))
    options = {
        "lora": Lora(rank=4),
        "autocast": True,
        "activation_checkpointing": True,
        "engine": Local(8, 64, "bfloat16"),
    }
    return replace(tiny.rl(), temperature=0.8, top_p=0.95, demonstrations=1, steps=4, **options)
