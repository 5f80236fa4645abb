"""The policy at the start of the step: where a step is one update, that update's own forward pass gives it, and no other is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forests import forest
from ramulus.core.tree import Author
from ramulus.learn.advantage.entropy_advantage import Covarying
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.entropy_signal import AdaptiveClip, Redistribution
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.leaf_weight import SequenceRatio
from ramulus.learn.objective.mask import Clip, Everything
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior, Itself, Recomputed
from ramulus.learn.objective.token_weight import ImportanceWeight, Product
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.run.config.recipe import Run
from run_forks import recomputed
from test_resume import metrics, same
from test_run_forks import train
from tiny import build

CLIP = Clip(column="recomputed")
MASKS = {
    "clip": Estimator(CLIP, Recomputed(), GroupMean()),
    "hapo": Estimator(Product((AdaptiveClip(), Redistribution())), Recomputed(), GroupMean()),
    "weighed, at the temperature of sampling": Estimator(Product((CLIP, ImportanceWeight(2.0))), Recomputed(), GroupMean(), recomputed_tempered=True),
    "by sequence": Estimator(Everything(), Itself(), GroupMean(), SequenceRatio(column="recomputed")),
}


def gradients(mix: Mix, scored: bool, budget: int) -> dict[str, torch.Tensor]:
    policy, trees = TorchPolicy(build(double=True)), forest(8, tempered=True)
    for tree in trees:
        for node in tree.walk():
            if node.author in (Author.POLICY, Author.EXPERT):
                node.signals.pop("recomputed", None)
    begins = () if scored else mix.begins
    assert scored or begins == mix.columns
    score_now(policy, trees, mix.columns - set(begins))
    for row in pack(trees, mix.credit(trees), mix, budget, torch.float64, begins=begins):
        assert (row.recomputed is None and row.recomputed_tempered is None) == (not scored)
        policy.accumulate(mix, row)
    return {name: p.grad for name, p in policy.trainable.items()}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("budget", [0, 40])
def test_gradients_are_those_of_trees_that_were_scored(name: str, budget: int) -> None:
    mix = Mix((Term(MASKS[name]),))
    ours, theirs = (gradients(mix, scored, budget) for scored in (False, True))
    assert any(float(x.abs().max()) > 1e-6 for x in theirs.values())
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-9, atol=1e-11)


def test_what_somebody_reads_before_the_update_is_scored() -> None:
    run, chosen = replace(recomputed(), minibatches=1), Covarying(GroupMean(), column="recomputed")
    assert run.begins == {"recomputed"}
    assert replace(run, minibatches=2).begins == set()
    assert replace(run, mix=Mix((Term(Estimator(CLIP, Recomputed(), chosen)),))).begins == set()
    assert Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),), kl_coef=0.1).begins == set()  # the reference model is another one


def test_a_run_makes_no_pass_of_its_own_and_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[set[str]] = []
    inner = TorchPolicy._score_row

    def counted(self, model, row, names, watch=None):
        read.append(set(names))
        return inner(self, model, row, names, watch)

    monkeypatch.setattr(TorchPolicy, "_score_row", counted)
    still = "optimizer.decay=constant", "minibatches=1"
    assert train(tmp_path / "whole", "steps=3", *still, variant=":recomputed") == 0
    assert not any(read)
    assert train(tmp_path / "stopped", "steps=1", *still, variant=":recomputed") == 0
    assert train(tmp_path / "stopped", "steps=3", *still, variant=":recomputed") == 0
    same(tmp_path / "whole", tmp_path / "stopped")
    monkeypatch.setattr(Run, "begins", frozenset())
    assert train(tmp_path / "scored", "steps=3", *still, variant=":recomputed") == 0
    assert any(read)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "scored"), strict=True):
        names = one.keys() & other.keys() - {"seconds", "cpu_seconds"}
        assert {"loss", "grad_norm", "clip_high", "mismatch", "reward"} <= names
        numbers = [name for name in names if isinstance(one[name], float) and "mem" not in name and "mismatch" not in name]
        assert {name: one[name] for name in numbers} == pytest.approx({name: other[name] for name in numbers}, rel=0.01, abs=1e-4)
