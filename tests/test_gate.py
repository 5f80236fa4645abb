"""Gates by hand, the posterior of the smooth one, and what a gate does to the weights of a step."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree, column
from ramulus.learn.advantage.baselines import Right
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.objective.entropy_signal import AdaptiveClip, Redistribution
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gate import SOFT, Even, Smooth, Soft, Switch, beta_cdf, draws
from ramulus.learn.objective.mask import Everything
from ramulus.learn.objective.mix import Mix, QuestionMean, Term, TokenMean
from ramulus.learn.objective.per_author import PerAuthor
from ramulus.learn.objective.reference import Behavior, Itself
from ramulus.learn.objective.token_weight import Product
from ramulus.learn.packing.pack import pack
from textbook_hpt import beta_below

POLICY, EXPERT = Author.POLICY, Author.EXPERT
RL = Term(Estimator(Everything(), Itself(), GroupMean(std=False)))
SFT = Term(Estimator(Everything(), Itself(), Constant(over="expert")), (EXPERT,))


def star(*rewards: float | None, demo: bool = True, name: str = "q") -> Tree:
    """Paths of two tokens and a demonstration of three."""
    tree = Tree.plant(Task(name, (1, 1), ""))
    for reward in rewards:
        tree.add(tree.root, [2, 2], POLICY, finish="eos", reward=reward)
    if demo:
        tree.add(tree.root, [3, 3, 3], EXPERT, finish="eos", reward=1.0)
    return tree


def sides(gate, tree: Tree) -> tuple[float, float]:
    weights, _ = gate(tree, {})
    return weights[POLICY], weights[EXPERT]


def test_the_switch_by_hand() -> None:
    assert sides(Switch(0.0), star(0.0, 0.0)) == (0, 1)
    assert sides(Switch(0.0), star(0.0, 1.0)) == (1, 0)
    assert sides(Switch(0.5), star(0.0, 1.0)) == (0, 1), "at the threshold the demonstration is shown"
    assert sides(Switch(1 / 3), star(0.0, 1.0, 0.0)) == (0, 1), "a third is a third"
    assert sides(Switch(-1.0), star(0.0, 0.0)) == (1, 0)
    assert sides(Switch(0.0), star(0.0, 0.0, demo=False)) == (1, 0), "there is nothing else to learn from"
    assert sides(Switch(0.0), star()) == (0, 1)
    assert sides(Switch(0.0), star(None, None)) == (0, 1), "paths without a reward say nothing"
    assert sides(Even(), star(0.0, 0.0)) == (1, 1)
    assert Switch(0.0, off=0.5)(star(0.0, 1.0), {})[0] == {POLICY: 0, EXPERT: 0, "off": 1}


@pytest.mark.parametrize("rewards", [(), (None,), (None, None)], ids=["no rollout", "one filtered", "all filtered"])
def test_a_question_without_a_graded_rollout_is_one_that_none_solved(rewards: tuple[float | None, ...]) -> None:
    for threshold, off, want in (
        (-1.0, None, (1, 0, 0)),  # below 0 a demonstration is never shown
        (-0.1, None, (1, 0, 0)),
        (-1.0, -0.5, (1, 0, 0)),
        (-1.0, 0.0, (0, 0, 1)),
        (-0.5, 0.25, (0, 0, 1)),
        (0.0, None, (0, 1, 0)),
        (0.25, 0.5, (0, 1, 0)),
    ):
        weights, _ = Switch(threshold, off)(star(*rewards), {})
        assert (weights[POLICY], weights[EXPERT], weights["off"]) == want, (threshold, off)
        assert weights == Switch(threshold, off)(star(0.0), {})[0]


@pytest.mark.parametrize("gate", [Switch(0.0), Switch(0.0, off=1.0), Smooth(), *(Soft(table) for table in SOFT)])
@pytest.mark.parametrize("rewards", [(), (None,), (0.0,), (1.0,), (0.0,) * 7 + (1.0,), (1.0, 0.0)])
def test_a_question_without_a_demonstration_stays_with_its_rollouts(gate, rewards: tuple[float | None, ...]) -> None:
    failed = star(*rewards, None, demo=False)
    failed.add(failed.root, [3], EXPERT, finish="eos")  # a demonstration that failed its check is none
    for tree in (star(*rewards, demo=False), failed):
        assert gate(tree, {})[0] == {POLICY: 1, EXPERT: 0, "off": 0}


def test_the_verdict_counts_and_a_helped_path_does_not() -> None:
    tree = star(0.4, 0.4)
    for leaf in tree.leaves()[:2]:
        leaf.verdict["correct"] = 0.0
    assert sides(Switch(0.0), tree) == (0, 1), "a reward for form is no solution"
    half = tree.graft(tree.leaves()[-1], 1)
    half.tokens, half.finish, half.reward, half.verdict = column([5], "i"), "eos", 1.0, {"correct": 1.0}
    assert sides(Switch(0.0), tree) == (0, 1), "the demonstration solved it, not the policy"


@given(st.floats(0.001, 0.999), st.integers(0, 60), st.integers(0, 60))
def test_the_beta_distribution(x: float, a: int, b: int) -> None:
    below = beta_cdf(x, a + 0.5, b + 0.5)
    assert below == pytest.approx(1 - beta_cdf(1 - x, b + 0.5, a + 0.5), abs=1e-12)
    assert 0 <= below <= 1
    if x < 0.9:  # beyond, the quadrature meets the other end's singularity
        assert below == pytest.approx(beta_below(x, a + 0.5, b + 0.5), abs=1e-9)


def test_the_beta_distribution_in_closed_form() -> None:
    assert beta_cdf(0.3, 1, 1) == pytest.approx(0.3)
    assert beta_cdf(0.3, 1, 8) == pytest.approx(1 - 0.7**8)
    assert (beta_cdf(0.0, 2, 3), beta_cdf(1.0, 2, 3)) == (0.0, 1.0)


@given(st.integers(0, 8), st.integers(0, 8))
def test_the_smooth_gate_follows_the_solve_rate(a: int, b: int) -> None:
    gate = Smooth(0.2)
    low, high = (sides(gate, star(*[1.0] * k, *[0.0] * (8 - k))) for k in sorted((a, b)))
    assert sum(low) == pytest.approx(1) == pytest.approx(sum(high))
    assert low[0] < high[0] or a == b


def test_one_unlucky_draw_flips_the_switch_but_not_the_smooth_gate() -> None:
    gate, state = Smooth(0.1), {}
    for _ in range(3):
        _, state = gate(star(1.0, 1.0, 0.0, 0.0), state)
    kept = json.dumps(state)
    weights, after = gate(star(0.0, 0.0, 0.0, 0.0), json.loads(kept))
    assert sides(Switch(0.0), star(0.0, 0.0, 0.0, 0.0)) == (0, 1)
    assert weights[POLICY] > 0.9
    assert json.dumps(state) == kept, "the state handed in is left as it was"
    assert after["q"] == pytest.approx([0.7 * state["q"][0], 0.7 * state["q"][1] + 4])
    for _ in range(6):
        weights, after = gate(star(0.0, 0.0, 0.0, 0.0), after)
    assert weights[EXPERT] > 0.7, "what no longer succeeds is forgotten"
    other, _ = gate(star(0.0, 0.0, 0.0, 0.0, name="another"), after)
    assert other[EXPERT] == pytest.approx(beta_cdf(0.1, 0.5, 4.5))


def weigh(trees: list[Tree], mix: Mix, gates: list | None = None) -> list[float]:
    """What the tokens of each term weigh in all, over every row."""
    gates = mix.gates(trees, {})[0] if gates is None else gates
    rows = pack(trees, mix.credit(trees), mix, 0, torch.float64, gates=gates)
    return [sum(float(row.weight[m].sum()) for row in rows) for m in range(len(mix.terms))]


def test_a_question_weighs_the_same_whichever_way_it_goes() -> None:
    mix = Mix((RL, SFT), gate=Switch(0.0))
    assert all(isinstance(term.normaliser, QuestionMean) for term in mix.terms)
    assert all(isinstance(term.normaliser, TokenMean) for term in Mix((RL, SFT)).terms)
    solved, failed = star(1.0, 0.0, 0.0), star(0.0, 0.0)
    assert weigh([solved, failed], mix) == pytest.approx([1 / 2, 1 / 2])
    assert weigh([solved, failed, failed, failed], mix) == pytest.approx([1 / 4, 3 / 4])
    half = [{POLICY: 0.25, EXPERT: 0.75}] * 2
    assert weigh([solved, failed], mix, half) == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("trees", "weights"),
    [
        ([star(0.0, 0.0), star()], [0.0, 1.0]),  # nothing but demonstrations
        ([star(0.0, 1.0), star(0.0, 0.0, demo=False)], [1.0, 0.0]),  # no demonstration
        ([star(0.0, 0.0, demo=False)], [1.0, 0.0]),
        ([star(demo=False)], [0.0, 0.0]),  # nothing at all
        ([star(None), star(None, demo=False)], [0.0, 0.5]),
    ],
)
@pytest.mark.parametrize("normaliser", [None, TokenMean()])
def test_a_batch_without_one_side_is_finite_and_right(trees: list[Tree], weights: list[float], normaliser) -> None:
    terms = [Term(term.estimator, term.authors, normaliser) for term in (RL, SFT)]
    mix = Mix(tuple(terms), gate=Switch(0.0), entropy_bonus=0.1)
    gates, _ = mix.gates(trees, {})
    rows = pack(trees, mix.credit(trees), mix, 0, torch.float64, gates=gates)
    if normaliser is None:
        assert [sum(float(row.weight[m].sum()) for row in rows) for m in (0, 1)] == pytest.approx(weights)
    for row in rows:
        logp = torch.full((len(row),), -0.7, dtype=torch.float64, requires_grad=True)
        loss = mix.loss(logp, logp, torch.ones_like(logp), row)
        assert math.isfinite(float(loss.detach()))
        (grad,) = torch.autograd.grad(loss, logp)
        assert bool(grad.isfinite().all())
        assert bool((grad[row.author == int(EXPERT)] < 0).all()), "demonstrations pull up"


OFF = replace(SFT, side="off")


@pytest.mark.parametrize(
    ("terms", "gate", "opened"),
    [  # how far the rollouts and the demonstration are open: a leaf counts once, however many terms train it
        ((RL, SFT), Even(), (1, 1)),
        ((RL, SFT, OFF), Even(), (1, 1)),
        ((RL, replace(RL, side=POLICY), SFT), Even(), (1, 1)),
        ((RL, SFT, replace(SFT, side=EXPERT)), Even(), (1, 1)),
        ((RL, replace(RL, side="off"), SFT, replace(SFT, side=POLICY), OFF), Even(), (1, 1)),
        ((RL, replace(RL, side=POLICY), SFT, replace(SFT, side=EXPERT)), lambda tree, state: ({POLICY: 0.25, EXPERT: 0.75}, state), (0.25, 0.75)),
        ((RL, SFT, OFF), lambda tree, state: ({POLICY: 0.5, EXPERT: 0.25, "off": 0.5}, state), (0.5, 0.75)),
        ((RL, SFT, OFF), lambda tree, state: ({POLICY: 0.5, EXPERT: 0.75, "off": 0.5}, state), (0.5, 1)),
        ((RL, SFT), lambda tree, state: ({POLICY: 2.0, EXPERT: 1.0}, state), (2, 1)),  # a gate may count a question twice
    ],
)
def test_a_leaf_of_several_terms_counts_once_in_the_bonus(terms: tuple[Term, ...], gate, opened: tuple[float, float]) -> None:
    mix, tree = Mix(terms, entropy_bonus=0.01, normaliser=TokenMean(), gate=gate), star(0.0, 1.0)
    (row,) = pack([tree], mix.credit([tree]), mix, 0, torch.float64, gates=mix.gates([tree], {})[0])
    rollout, shown = opened
    total = 2 * 2 * rollout + 3 * shown  # two rollouts of two tokens, a demonstration of three
    for author, want in ((POLICY, rollout), (EXPERT, shown)):
        here = row.extra_weight[row.author == int(author)]
        torch.testing.assert_close(here, torch.full_like(here, want / total))


def test_the_rare_right_rollouts_of_a_shown_question_are_kept() -> None:
    kept = Term(Estimator(Everything(), Itself(), Right()), (POLICY,), None, 1.0, EXPERT)
    mix = Mix((RL, SFT, kept), gate=Switch(0.5))
    assert weigh([star(1.0, 0.0, 0.0)], mix) == pytest.approx([0, 1, 1])
    assert weigh([star(1.0, 1.0, 0.0)], mix) == pytest.approx([1, 0, 0])
    assert weigh([star(0.0, 0.0)], mix) == pytest.approx([0, 1, 0])


def test_what_cannot_work_is_said() -> None:
    tree = star(0.0, 1.0)
    mix = Mix((RL, SFT), gate=Switch(0.0))
    with pytest.raises(ValueError, match=r"hand its answer to pack as gates="):
        pack([tree], mix.credit([tree]), mix)
    with pytest.raises(ValueError, match="the Mix has none"):
        Mix((Term(SFT.estimator, (EXPERT,), side="off"),))
    with pytest.raises(ValueError, match="side is 'none'"):
        weigh([tree], Mix((Term(SFT.estimator, (EXPERT,), side="none"),), gate=Switch(0.0)))
    with pytest.raises(ValueError, match="threshold <= off"):
        Switch(0.5, off=0.25)
    with pytest.raises(ValueError, match="Smooth needs"):
        Smooth(0.0)


def test_paths_that_share_a_beginning_are_one_draw() -> None:
    tree = Tree.plant(Task("q", (1,), ""))
    tree.add(tree.root, [2], Author.EXPERT, finish="eos", reward=1.0)
    for _ in range(2):
        top = tree.add(tree.root, [3], Author.POLICY)
        for reward in (0.0, 0.0, 0.0, 1.0):
            tree.add(top, [4], Author.POLICY, finish="eos", reward=reward)
    assert draws(tree) == [0.25, 0.25]
    _, state = Smooth()(tree, {})
    assert state == {"q": [0.5, 1.5]}


def test_parts_by_author_keep_their_measures_and_factors() -> None:
    tree = Tree.plant(Task("q", (1,), ""))
    for entropy in (0.1, 1.0):
        columns = {"logprobs": [-1.0], "kept": [0.0], "entropy": [entropy], "temperature": [1.0]}
        tree.add(tree.root, [2], Author.POLICY, finish="eos", reward=entropy, **columns)
    policy = Product((AdaptiveClip(column="behavior"), Redistribution(column="behavior")))
    mask = PerAuthor(policy, Everything())
    keep = [{leaf.id for leaf in tree.leaves()}]
    assert mask.measure([tree], keep) == policy.measure([tree], keep) != {}
    mix = Mix((Term(Estimator(mask, PerAuthor(Behavior(), Itself()), GroupMean())),))
    (row,) = pack([tree], mix.credit([tree]), mix)
    logp = torch.full((len(row),), -1.0)  # a ratio of 1, where sure tokens lose credit
    one, other = (rule.factor(1, logp, row.entropy, row.term(0)) for rule in (mask, policy))
    assert torch.equal(one, other)
    assert not torch.equal(one, torch.ones_like(one))
