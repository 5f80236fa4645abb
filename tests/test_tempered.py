"""Log-probs, KL term and entropy bonus at the temperature of sampling, as verl and TRL take them: through a model and through a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree, column
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.entropy_signal import AdaptiveClip, Redistribution
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.kl import KL
from ramulus.learn.objective.kl_cov import kl_cov
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.per_author import PerAuthor
from ramulus.learn.objective.reference import Behavior, Recomputed
from ramulus.learn.objective.token_weight import Product
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.run.config.find import find
from ramulus.run.config.recipe import check_ahead
from ramulus.run.launch import launch
from tiny import build

RECOMPUTED = Estimator(Clip(column="recomputed"), Recomputed(), GroupMean(), recomputed_tempered=True)
WARM = Mix((Term(RECOMPUTED),), kl_coef=0.1, kl=KL(tempered=True), entropy_bonus=0.1, entropy_tempered=True)
HEATS, TOKENS = [0.5, 1.0, 2.0], [4, 5, 6]


def tree_of(temperature: list[float] | float) -> Tree:
    tree = Tree.plant(Task("q", (1, 2, 3), ""))
    for reward in (1.0, 0.0):
        columns = {"logprobs": [-1.0] * 3, "kept": [0.0] * 3, "entropy": [1.0] * 3}
        heat = column(temperature) if isinstance(temperature, list) else temperature
        tree.add(tree.root, TOKENS, Author.POLICY, finish="eos", reward=reward, temperature=heat, **columns)
    return tree


def by_hand(model: nn.Module, heats: list[float]) -> tuple[list[float], list[float]]:
    """Log-probs of the three tokens, and entropies, at these temperatures."""
    logits = model(input_ids=torch.tensor([[1, 2, 3, *TOKENS]]), use_cache=False).logits[0, 2:-1].detach()
    logp = (logits / torch.tensor(heats, dtype=logits.dtype)[:, None]).log_softmax(-1)
    return logp.gather(1, torch.tensor(TOKENS)[:, None])[:, 0].tolist(), (-(logp.exp() * logp).sum(-1)).tolist()


def test_a_policy_scores_both() -> None:
    model, tree = build("qwen2", double=True), tree_of(HEATS)
    score_now(TorchPolicy(model, reference_model=True), [tree], {"recomputed", "recomputed_tempered", "reference_model_tempered"})
    leaf = tree.leaves()[0]
    assert list(leaf.signals["recomputed"]) == pytest.approx(by_hand(model, [1.0] * 3)[0], abs=1e-12)
    for name in ("recomputed_tempered", "reference_model_tempered"):
        assert list(leaf.signals[name]) == pytest.approx(by_hand(model, HEATS)[0], abs=1e-12)
    assert "reference_model" not in leaf.signals


def test_the_mix_says_which_columns_and_which_entropy() -> None:
    assert WARM.columns == {"recomputed_tempered", "reference_model_tempered"}
    assert replace(WARM, kl=KL(), terms=(Term(replace(RECOMPUTED, recomputed_tempered=False)),)).columns == {"recomputed", "reference_model"}
    assert Mix(kl_cov(chosen_by="recomputed_tempered")).columns == {"behavior", "recomputed_tempered"}
    model, tree = build("qwen2", double=True), tree_of(HEATS)
    policy = TorchPolicy(model, reference_model=True)
    score_now(policy, [tree], WARM.columns)
    (batch,) = pack([tree], WARM.credit([tree]), WARM, dtype=torch.float64)
    found = policy.accumulate(WARM, batch)
    assert found.entropy[batch.author == int(Author.POLICY)][:3].tolist() == pytest.approx(by_hand(model, HEATS)[1], abs=1e-12)
    plain = policy.accumulate(replace(WARM, entropy_tempered=False), batch).entropy
    assert plain[batch.author == int(Author.POLICY)][:3].tolist() == pytest.approx(by_hand(model, [1.0] * 3)[1], abs=1e-12)


@pytest.mark.parametrize("mix", [WARM, replace(WARM, terms=(Term(replace(RECOMPUTED, recomputed_tempered=False)),), kl_coef=0.0)])
def test_greedy_text_has_no_tempered_log_probs(mix: Mix) -> None:
    tree = tree_of(0.0)
    policy = TorchPolicy(build("qwen2", double=True), reference_model=True)


    def learn() -> None:
        score_now(policy, [tree], mix.columns)
        (batch,) = pack([tree], mix.credit([tree]), mix, dtype=torch.float64)
        policy.accumulate(mix, batch)

    with pytest.raises(ValueError, match="were sampled at temperature 0"):
        learn()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="tempered or untempered as a whole"):
        Estimator(Clip(), Recomputed(), GroupMean())
    assert Estimator(Clip(), Recomputed(), GroupMean(), recomputed_tempered=True).tempered
    for mask in (AdaptiveClip(), Product((AdaptiveClip(), Redistribution())), PerAuthor(AdaptiveClip(), Clip(column="recomputed"))):
        with pytest.raises(ValueError, match="holds it against untempered"):
            Mix((Term(Estimator(mask, Recomputed(), GroupMean())),), entropy_bonus=0.1, entropy_tempered=True)
    with pytest.raises(ValueError, match="ahead=1 trains tokens that an older version sampled"):
        check_ahead(1, WARM)
    check_ahead(1, Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),)))


@pytest.mark.parametrize("estimator", ["k4", "k2+", "mse+", "", "+"])
def test_an_unknown_estimate_is_answered_with_the_known_ones(estimator: str) -> None:
    with pytest.raises(ValueError, match=r"k1, kl, abs, k2, mse, k3, low_var_kl.*got"):
        KL(estimator)


@pytest.mark.parametrize("far", [-40.0, -15.0, 15.0, 40.0, 1000.0])
def test_the_default_pull_neither_stops_nor_explodes(far: float) -> None:
    logp = torch.tensor([-1.0], requires_grad=True)
    value = KL()(logp, logp.detach() + far)
    value.sum().backward()
    assert value.abs() <= 10
    assert logp.grad == -far
    for estimator in ("k1", "abs", "k2", "k3", "k1+", "abs+"):
        for clamp in (10.0, None):
            logp.grad = None
            KL(estimator, clamp)(logp, logp.detach() + far).sum().backward()
            assert torch.isfinite(logp.grad).all()


def test_a_run_learns_with_all_of_it_tempered(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    source = Path(__file__).with_name("run_recipe.py")
    recipe.write_text(
        f"import sys; sys.path.insert(0, {str(source.parent)!r})\n"
        "from dataclasses import replace\nfrom run_recipe import rl\nfrom test_tempered import WARM\n\n"
        "def recipe():\n    return replace(rl(), mix=WARM, temperature=0.7, steps=2)\n"
    )
    assert launch(str(recipe), [f"out={tmp_path / 'run'}"], False, False, Console(quiet=True)) == 0
    assert find(str(recipe)).recipe().mix.columns == {"recomputed_tempered", "reference_model_tempered"}
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
