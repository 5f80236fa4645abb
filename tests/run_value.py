"""Tiny PPO runs whose value head prunes, as a user's recipe file."""

from __future__ import annotations

from dataclasses import replace

from ramulus.grow.segments import Segments
from ramulus.grow.worth import Estimated, LowValue, MeanLogprob
from ramulus.run.config.recipe import Run
from run_hpt import ppo

GROWTH = Segments(6, 3, 4, 2)


def pruned() -> Run:
    """Paths whose value lies below the middle of their siblings' are given up."""
    rules = (LowValue(Estimated(), budget=2),)
    return replace(ppo(), name="pruned", branching=GROWTH, pruning=rules, response_limit=12, steps=4)


def headless() -> Run:
    """The same rule without a value head."""
    from run_recipe import rl

    return replace(rl(), pruning=(LowValue(Estimated(), budget=2),))


def plain() -> Run:
    """The same run without pruning, and with a rule that needs no signal."""
    return replace(pruned(), pruning=(LowValue(MeanLogprob(), budget=2),))
