"""The recipes of HAPO: their settings, and a few steps of the small one on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ramulus.core import store
from ramulus.grow.schedule import Fixed
from ramulus.learn.policy.model import Scratch
from ramulus.recipes import hapo
from ramulus.run.config.find import stages_of
from ramulus.run.config.recipe import Run
from ramulus.tasks.chain import ChainSum
from run_recipe import Digits
from test_resume import metrics, train

pytestmark = pytest.mark.usefixtures("torch_as_it_was")
TINY = """
from dataclasses import replace
from ramulus.recipes import hapo
from test_recipe_hapo import tiny

def recipe():
    return tiny(hapo.small())

def released():
    return tiny(replace(hapo.small(), mix=hapo.released().mix, temperature=hapo.released().temperature))
"""


def tiny(run: Run) -> Run:
    """The same method on a model and problems that take no time."""
    tasks = ChainSum(40, "train", terms=(2, 3))
    model = Scratch(tasks.alphabet, hidden=16, layers=1, heads=2, kv_heads=1)
    changes = {
        "response_limit": 12,
        "threads": 1,
        "tensorboard": False,
        "trees_every": 1,
        "eval_limit": 4,
        "eval_every": 0,
    }
    return replace(run, model=model, tasks=tasks, schedule=Fixed(8), rewards=Digits(), steps=4, **changes)


def test_settings_are_those_of_the_paper_and_of_its_code() -> None:
    (paper,), (code,) = stages_of("hapo"), stages_of("hapo:released")
    clip, share = paper.mix.terms[0].estimator.mask.parts
    assert (clip.low, clip.high, clip.alpha, share.beta, share.alpha) == (0.2, 0.28, 1.0, 1.0, 0.0)
    assert clip.signal == share.signal
    assert (clip.signal.pivot, clip.signal.signed) == (0.8, True)
    assert (paper.temperature.tau, paper.temperature.kind) == (0.1, "zscore")
    clip, share = code.mix.terms[0].estimator.mask.parts
    assert (clip.low, clip.high, clip.ceiling, share.alpha, clip.signal.signed) == (0.2, 0.2, 10.0, 1.0, False)
    assert (code.temperature.tau, code.temperature.kind) == (0.05, "released")
    assert code.mix.terms[0].estimator.advantage.fallback == 5.0
    assert hapo.small().minibatches > 1, "on-policy the clip never acts"


@pytest.mark.parametrize("variant", ["", ":released"])
def test_a_few_steps(variant: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TINY)
    assert train(tmp_path / "run", recipe=str(tmp_path / "mine.py") + variant) == 0
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4
    assert all(line["not_finite"] == 0 for line in lines)
    assert max(line["grad_norm"] for line in lines if "grad_norm" in line) > 0
    last = list(store.read(tmp_path / "run" / "trees" / "000004.jsonl"))
    heat = [t for tree in last for node in tree.walk() for t in node.column("temperature")]
    assert len({round(t, 3) for t in heat}) > 5
    assert min(heat) < 1 or variant
    assert max(heat) > 1
    assert (min(heat) >= 1 - 1e-6) == bool(variant), "the released sign never cools"
