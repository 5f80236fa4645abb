"""Demonstrations that are checked first, and partial ones that the policy goes on from."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ramulus.core.store import read
from ramulus.core.task import Path as Response
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree, demonstrations
from ramulus.engine.engine import Sampling
from ramulus.engine.toy import ToyEngine
from ramulus.grow.branching import Star
from ramulus.grow.demonstration import Hinted, verify
from ramulus.grow.forks import AttentionForks
from ramulus.grow.growth import demonstrate, grow_forest
from ramulus.grow.stop import Stop
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gate import Switch, marks
from ramulus.learn.objective.mask import Everything
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Itself
from ramulus.learn.packing.pack import pack
from ramulus.run.launch import launch

SHOWN = (tuple(range(3, 13)), (5, 6, 7, 0))
TASK = Task("q", (1, 2), "", demonstrations=SHOWN)


def text(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def ends_with_zero(task: Task, path: Response) -> dict[str, float]:
    return {"reward": 2.0 if path.tokens[-1] == 0 else 0.5, "correct": float(path.tokens[-1] == 0)}


def test_a_demonstration_that_fails_its_check_is_not_learned_from() -> None:
    tree = Tree.plant(TASK)
    wrong, good = demonstrate(tree, 2)
    asyncio.run(verify(tree, ((ends_with_zero, 0.5, "zero"),), text))
    assert (wrong.reward, good.reward) == (None, 1.0)
    assert (wrong.verdict["correct"], good.verdict["correct"]) == (0.0, 1.0)
    assert demonstrations(tree) == [good]
    sft = Mix((Term(Estimator(Everything(), Itself(), Constant(over="expert")), (Author.EXPERT,)),))
    (batch,) = pack([tree], sft.credit([tree]), sft)
    assert batch.token.tolist() == [1, 2, *SHOWN[1]]


def test_a_question_whose_demonstrations_all_fail_stays_with_its_rollouts() -> None:
    tree = Tree.plant(TASK)
    demonstrate(tree, 1)
    tree.add(tree.root, [4], Author.POLICY, finish="eos", reward=0.0)
    assert Switch()(tree, {})[0][Author.EXPERT] == 1
    asyncio.run(verify(tree, ((ends_with_zero, 1.0, "zero"),), text))
    assert Switch()(tree, {})[0] == {Author.POLICY: 1, Author.EXPERT: 0, "off": 0}


def hinted(rule: Hinted, visit: int = 0) -> Tree:
    tree = Tree.plant(TASK, seed=3, visit=visit)
    demonstrate(tree, 2)
    engine = ToyEngine(16)
    stop = Stop((0,), 14, text)
    asyncio.run(grow_forest([tree], engine, rule, Sampling(14), stop))
    return tree


@given(st.integers(0, 4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 50))
def test_paths_go_on_from_a_part_of_a_demonstration(n: int, a: float, b: float, visit: int) -> None:
    tree = hinted(Hinted(Star(2), n, min(a, b), max(a, b)), visit)
    leaves = tree.leaves()
    assert [leaf.response() for leaf in leaves if leaf.author is Author.EXPERT] in (
        [[*SHOWN[0]], [*SHOWN[1]]],
        [[*SHOWN[1]], [*SHOWN[0]]],
    )
    ours = [leaf for leaf in leaves if leaf.author is Author.POLICY]
    aided = [leaf for leaf in ours if any(node.author is Author.EXPERT for node in leaf.line())]
    assert (len(ours), len(aided)) == (n + 2, n)
    for leaf in aided:
        given = [token for node in leaf.line() if node.author is Author.EXPERT for token in node.tokens]
        shown = next(s for s in SHOWN if list(s[: len(given)]) == given)
        assert 1 <= len(given) < len(shown)
        assert min(a, b) * len(shown) - 1 <= len(given) <= max(a, b) * len(shown) + 1
        assert all(len(node.logprobs) == len(node.tokens) for node in leaf.line() if node.author is Author.POLICY)
        assert len(leaf.response()) <= 14


def test_hints_repeat_and_do_not_change_the_other_paths() -> None:
    with_hints, again, without = hinted(Hinted(Star(2), 2)), hinted(Hinted(Star(2), 2)), hinted(Hinted(Star(2), 0))
    assert [leaf.response() for leaf in with_hints.leaves()] == [leaf.response() for leaf in again.leaves()]
    alone = [
        leaf.response()
        for leaf in with_hints.leaves()
        if leaf.parent is with_hints.root and leaf.author is Author.POLICY
    ]
    assert alone == [leaf.response() for leaf in without.leaves() if leaf.author is Author.POLICY]


def test_a_helped_path_learns_but_is_no_proof() -> None:
    tree = hinted(Hinted(Star(2), 2))
    for leaf in tree.leaves():
        aided = any(node.author is Author.EXPERT for node in leaf.line())
        leaf.reward = 1.0 if aided else 0.0
    assert marks(tree) == [0.0, 0.0]
    mix = Mix((Term(Estimator(Everything(), Itself(), GroupMean(std=False))),))
    (batch,) = pack([tree], mix.credit([tree]), mix, 0, torch.float64)
    assert float(batch.gain.sum()) > 0
    assert not bool(batch.gain[0][batch.author == int(Author.EXPERT)].any()), (
        "what the demonstration gave is not credited to the policy"
    )


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match="Hinted needs"):
        Hinted(Star(2), low=0.8, high=0.2)
    assert len(Hinted(Star(2), 3)(Tree.plant(replace(TASK, demonstrations=())))) == 2, "no demonstration, no hint"


def test_a_run_with_both(tmp_path: Path) -> None:
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        recipe = f"{Path(__file__).with_name('run_hpt.py')}:careful"
        launch(recipe, [f"out={tmp_path}"], False, False, Console(quiet=True))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
    trees = [tree for file in sorted((tmp_path / "trees").glob("*.jsonl")) for tree in read(file)]
    shown = [leaf for tree in trees for leaf in tree.leaves() if leaf.author is Author.EXPERT]
    assert {leaf.reward is None for leaf in shown} == {True, False}
    assert all((leaf.reward is not None) == bool(leaf.verdict["correct"]) for leaf in shown)
    whys = {leaf.why for tree in trees for leaf in tree.leaves() if leaf.author is Author.POLICY}
    assert "hint" in whys


def test_a_hinted_rule_reads_what_the_rule_inside_reads() -> None:
    rule = Hinted(AttentionForks(rounds=2))
    assert (rule.rounds, rule.needs) == (2, ("steps", "influence"))
    assert (Hinted(Star(2)).rounds, Hinted(Star(2)).needs) == (None, ())
