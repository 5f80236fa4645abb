"""The value head: GAE by hand, the packed regression against flattened paths, a policy that carries it, and PPO as a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from forests import Trajectory, flatten, forest
from kept import tensors
from methods import METHODS, rows_of
from methods_hpt import returns
from ramulus.core.store import read
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree, column
from ramulus.grow.worth import Estimated
from ramulus.learn.advantage.entropy_advantage import ClipCov, EntropyAdvantage
from ramulus.learn.advantage.gae import GAE
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.batch.layout import lay_out
from ramulus.learn.objective import gauges
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.kl_cov import kl_cov
from ramulus.learn.objective.leaf_weight import EntropyWeight
from ramulus.learn.objective.mask import Clip, Everything
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior, Itself
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.value_head import ActorCritic
from ramulus.run.launch import launch
from ramulus.run.step_statistics import loss
from test_equivalence import budget_for
from tiny import build

RECIPES = Path(__file__).with_name("run_hpt.py")
PPO = Mix((Term(Estimator(Clip(), Behavior(), GAE())),), value=0.5)


def test_gae_by_hand() -> None:
    tree = Tree.plant(Task("q", (1,), ""))
    leaf = tree.add(tree.root, [2, 3, 4], Author.POLICY, finish="eos", reward=1.0, signals={"value": [0.5, 0.2, 0.4]})
    (credit,) = GAE(0.9, 0.5, whiten=False)([tree])
    third = 1.0 - 0.4
    second = 0.9 * 0.4 - 0.2 + 0.45 * third
    first = 0.9 * 0.2 - 0.5 + 0.45 * second
    assert credit.token is not None
    assert credit.token[leaf.id] == pytest.approx([first, second, third])
    assert credit.target is not None
    assert credit.target[leaf.id] == pytest.approx([first + 0.5, second + 0.2, 1.0])
    del leaf.signals["value"]
    with pytest.raises(ValueError, match="has no values: score the forest with an ActorCritic"):
        GAE()([tree])


@pytest.mark.parametrize("rule", [EntropyAdvantage, ClipCov])
def test_an_advantage_over_gae_keeps_what_values_are_learned_from(rule: type) -> None:
    trees = forest(3, tempered=True)
    for node in (node for tree in trees for node in tree.walk()):
        node.signals["value"] = column([0.1 * k for k in range(len(node.tokens))])
    over = rule(GAE())
    assert Mix((Term(Estimator(Clip(), Behavior(), over)),), value=0.5).needs == ("value",)
    plain, raised = GAE()(trees), over(trees)
    assert [credit.target for credit in raised] == [credit.target for credit in plain]
    assert any(credit.target for credit in raised)
    assert [credit.token for credit in raised] != [credit.token for credit in plain]
    assert Mix(kl_cov(GAE()), value=0.5).needs == ("value",)


@pytest.mark.parametrize("size", ["one row", "cut", "shared"])
def test_the_packed_regression_is_that_of_the_paths(size: str) -> None:
    """Gradient and value of 0.5 x the mean over flattened tokens of (V - target)^2 / 2, with V a free parameter of every token."""
    mix = METHODS["ppo"].mix
    for seed in range(6):
        trees = forest(seed, tempered=True)
        credits = mix.credit(trees)
        index: dict[tuple[int, int, int], int] = {}
        for row in flatten(trees):
            for spot in row.spots:
                index.setdefault(spot, len(index))
        free = torch.randn(
            len(index), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).requires_grad_()
        total, value = torch.zeros((), dtype=torch.float64), 0.0
        keep = [answer.trained() for answer in credits[0]]
        learned = [
            {x.id for x in t.leaves() if x.id in k and any(n.author is Author.POLICY and n.tokens for n in x.line())}
            for t, k in zip(trees, keep, strict=True)
        ]
        budget = budget_for(trees, size)
        for batch, row in zip(
            pack(trees, credits, mix, budget, torch.float64), lay_out(trees, learned, budget), strict=True
        ):
            picks = [index.get((t, n.id, k), 0) for t, n, a, b in row.nodes for k in range(b - a)]
            none = torch.zeros(len(batch), dtype=torch.float64)
            values = free[picks]
            total = total + mix.loss(none, none, none, batch, values) - mix.loss(none, none, none, batch)
            value += gauges.surrogate(mix, none, none, none, batch, values.detach())
            value -= gauges.surrogate(mix, none, none, none, batch)
        want = flattened(trees, index, free)
        (ours,) = torch.autograd.grad(total, free)
        (theirs,) = torch.autograd.grad(want, free)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        assert value == pytest.approx(float(want.detach()), abs=1e-12)


def flattened(trees: list[Tree], index: dict, free: Tensor) -> Tensor:
    def zeros(rows: list[Trajectory]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        empty = [torch.zeros(len(row.spots), dtype=torch.float64) for row in rows]
        return empty, empty, empty

    rows = rows_of(trees, zeros, (Author.POLICY,), True, policy_only=True)
    _, target = returns(rows, 1.0, 0.95)
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows.rows):
        said = free[[index[spot] for spot in row.spots]]
        total = total + (rows.mask[i, : len(said)] * (said - target[i, : len(said)]) ** 2).sum()
    return 0.5 * 0.5 * total / rows.mask.sum()


def test_values_are_those_of_separate_paths_and_learn() -> None:
    model = build("qwen2", double=True)
    policy = ActorCritic(model, clip=float("inf"))
    with torch.no_grad():
        policy.critic.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    trees = forest(5)
    score_now(policy, trees, {"value"})
    nodes = [{node.id: node for node in tree.walk()} for tree in trees]
    for row in flatten(trees):
        ids = torch.tensor([row.prompt + row.tokens])
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        alone = policy.critic(hidden)[len(row.prompt) - 1 : -1, 0].tolist()
        for spot, author, value in zip(row.spots, row.authors, alone, strict=True):
            if author in (Author.POLICY, Author.EXPERT):
                assert nodes[spot[0]][spot[1]].signals["value"][spot[2]] == pytest.approx(value, abs=1e-12)
    errors = []
    for _ in range(12):
        credits = PPO.credit(trees)
        error = 0.0
        for batch in pack(trees, credits, PPO, 0, torch.float64):
            value = policy.accumulate(PPO, batch).value
            error += float((batch.target_weight * (value - batch.target) ** 2).sum())
        policy.update(3e-3)
        score_now(policy, trees, {"value"})
        errors.append(error)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("kind", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float64, False)],
)
def test_values_are_computed_in_at_least_float32(kind: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ActorCritic(build("qwen2", double=kind == torch.float64).to(kind), autocast=autocast, clip=float("inf"))
    with torch.no_grad():
        policy.critic.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        policy.critic.bias.fill_(0.7)
    seen: list[tuple[Tensor, Tensor]] = []
    real = ActorCritic.read

    def read(self: ActorCritic, hidden: Tensor, parent: Tensor) -> Tensor:
        answer = real(self, hidden, parent)
        seen.append((hidden.detach()[parent], answer))
        return answer

    monkeypatch.setattr(ActorCritic, "read", read)
    trees = forest(5)
    score_now(policy, trees, {"value"})
    for batch in pack(trees, PPO.credit(trees), PPO, 0, torch.float64):
        policy.accumulate(PPO, batch)
    weight, bias = policy.critic.weight.detach().double()[0], policy.critic.bias.detach().double()
    for hidden, answer in seen:
        assert answer.dtype == torch.promote_types(kind, torch.float32)
        torch.testing.assert_close(answer.detach().double(), hidden.double() @ weight + bias, rtol=1e-5, atol=1e-5)
    assert len(seen) > 1
    for number in policy.critic.parameters():
        assert number.grad is not None
        assert number.grad.dtype == number.dtype == kind
        assert bool(number.grad.any())


def test_ppo_runs_and_resumes(tmp_path: Path) -> None:
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    quiet = Console(quiet=True)
    try:
        launch(f"{RECIPES}:ppo", [f"out={tmp_path / 'whole'}"], False, False, quiet)
        launch(f"{RECIPES}:ppo", [f"out={tmp_path / 'parts'}", "steps=2"], False, False, quiet)
        launch(f"{RECIPES}:ppo", [f"out={tmp_path / 'parts'}", "steps=3"], True, False, quiet)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
    whole, parts = (tensors(tmp_path / name, 3) for name in ("whole", "parts"))
    assert float(whole["weights/critic/weight"].abs().max()) > 0
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_head_and_its_advantage_go_together() -> None:
    with pytest.raises(ValueError, match="value is the coefficient of a value head"):
        Mix((Term(Estimator(Clip(), Behavior(), GAE())),))
    with pytest.raises(ValueError, match="value is the coefficient of a value head"):
        Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),), value=0.5)
    with pytest.raises(ValueError, match="lam are in"):
        GAE(lam=1.5)
    trees = forest(0)
    for tree in trees:
        for node in tree.walk():
            node.signals["value"] = column([0.0] * len(node.tokens), "d")
    mix = Mix((Term(Estimator(Everything(), Itself(), GAE(), EntropyWeight(1.0, 0.0))),), value=0.5)
    with pytest.raises(ValueError, match="weighs each path as one"):
        mix.credit(trees)


def run_of(name: str, out: Path, *overrides: str, resume: bool = False) -> list[dict]:
    """Train a recipe of run_value.py; its metrics."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        recipe = f"{Path(__file__).with_name('run_value.py')}:{name}"
        launch(recipe, [f"out={out}", *overrides], resume, False, Console(quiet=True))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def test_a_run_prunes_by_its_value_head(tmp_path: Path) -> None:
    rows = run_of("pruned", tmp_path / "whole")
    trees = [tree for file in sorted((tmp_path / "whole" / "trees").glob("*.jsonl")) for tree in read(file)]
    given_up = [sum(leaf.finish == "pruned" for leaf in tree.leaves()) for tree in trees]
    assert max(given_up) == 2
    assert sum(row["pruned"] for row in rows) > 0
    rule = Estimated()
    later = [tree for tree in trees if tree.step > 1]  # the head says 0 of everything before it has learned
    for tree in later:
        values = rule(tree, [leaf for leaf in tree.leaves() if leaf.finish == "pruned"])
        assert all(value is not None and value != 0 for value in values)
    assert any(leaf.finish == "pruned" for tree in later for leaf in tree.leaves())
    assert all("explained_variance" in row for row in rows)
    run_of("pruned", tmp_path / "parts", "steps=2")
    run_of("pruned", tmp_path / "parts", "steps=4", resume=True)
    whole, parts = (tensors(tmp_path / name, 4) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    again = [(tmp_path / name / "trees" / "000004.jsonl").read_bytes() for name in ("whole", "parts")]
    assert again[0] == again[1]


def test_a_run_without_a_head_cannot_prune_by_one(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"LowValue needs the signal 'value', but the run trains no value head: .*GAE.*MeanLogprob"
    ):
        run_of("headless", tmp_path)


def test_the_logged_loss_holds_the_regression_and_the_head_is_gauged() -> None:
    """By hand on flattened paths: the loss of a row, and 1 - Var(target - V) / Var(target)."""
    mix = METHODS["ppo"].mix
    for seed in range(4):
        trees = forest(seed, tempered=True)
        credits = mix.credit(trees)
        rows = []
        weights, wanted, left, total = [], [], [], 0.0
        layouts = lay_out(trees, [answer.trained() for answer in credits[0]], 10**6)
        (batch,), (layout,) = pack(trees, credits, mix, 10**6, torch.float64), layouts
        values = torch.randn(len(batch), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        none = torch.zeros(len(batch), dtype=torch.float64)
        where = {(t, n.id): start for t, n, start, _ in layout.nodes}
        for t, (tree, answer) in enumerate(zip(trees, credits[0], strict=True)):
            for leaf in tree.leaves():
                if leaf.id not in answer.trained():
                    continue
                nodes = [node for node in leaf.line() if node.author is Author.POLICY]
                spots = [where[t, node.id] + k for node in nodes for k in range(len(node.tokens))]
                for spot, target in zip(spots, answer.target[leaf.id], strict=True):
                    weights.append(1.0)
                    wanted.append(target)
                    left.append(target - float(values[spot]))
        w, y, e = (torch.tensor(column, dtype=torch.float64) for column in (weights, wanted, left))
        rows.append(gauges.gauges(mix, none, none, none, batch, values=values))
        found = gauges.merge(rows)
        assert found["explained_variance"] == pytest.approx(float(1 - e.var(unbiased=False) / y.var(unbiased=False)))
        assert not [name for name in found if name.startswith("value/")]
        total = 0.5 * 0.5 * float((w * e**2).sum() / w.sum())
        assert loss(mix, none, none, none, batch, values)[0] == pytest.approx(
            loss(mix, none, none, none, batch)[0] + total
        )
    assert "explained_variance" not in gauges.merge([gauges.gauges(mix, none, none, none, batch)])
