"""The blocks of docs/extend.md are run as they stand: each part is short, does what it says, and trains with the others."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from ramulus import Behavior, Clip, Dynamic, Estimator, Mix, Product, Term, pack
from ramulus.core.recipe_part import with_defaults
from ramulus.core.store import read
from ramulus.core.task import Path as Answer
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree, column
from ramulus.engine.engine import RULE_FEATURES, rule_features
from ramulus.grow.branching import paths
from ramulus.grow.demonstration import Hinted
from ramulus.grow.schedule import Schedule
from ramulus.learn.advantage.group import Advantage, GroupMean
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.objective.gauges import surrogate
from ramulus.learn.objective.mask import Mask
from ramulus.learn.objective.per_author import PerAuthor
from ramulus.learn.objective.reference import Reference
from ramulus.run.checkpoint import path_of
from ramulus.run.launch import launch
from ramulus.run.signals import SHIPPED

PAGE = Path(__file__).parents[1] / "docs" / "extend.md"
PARTS = ("SecondThoughts", "Surprise", "MedianBaseline", "FadeOut", "HotWhereTorn", "Brief", "FirstTimeShown", "FewSlots")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """All blocks as one recipe file, imported."""
    code = "from __future__ import annotations\n" + "\n".join(
        re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    )
    file = tmp_path_factory.mktemp("extend") / "extend_page.py"
    file.write_text(code)
    module = ModuleType("extend_page")
    module.__file__ = str(file)
    sys.modules["extend_page"] = module
    exec(compile(code, str(file), "exec"), module.__dict__)
    return module


def test_every_part_is_under_twenty_lines(page: ModuleType) -> None:
    classes = {
        node.name: node
        for node in ast.parse(Path(page.__file__ or "").read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    assert set(classes) == set(PARTS)
    assert all((node.end_lineno or 0) - node.lineno + 2 < 20 for node in classes.values()), "the decorator counts too"


def grown() -> Tree:
    tree = Tree.plant(Task("t", (1,), "t"))
    for reward in (0.0, 1.0, 1.0):
        leaf = tree.add(tree.root, [1] * 6, Author.POLICY, finish="eos", reward=reward)
        leaf.logprobs = column([-0.1, -0.7, -0.5 - reward, -2.0 + reward, -0.2, -0.4])
    return tree


def test_the_branching_rule_grows_again_from_the_most_surprising_token(page: ModuleType) -> None:
    rule, tree = page.SecondThoughts(3), Tree.plant(Task("t", (1,), "t"))
    assert len(rule(tree)) == 3
    assert (rule.most_paths(), Hinted(rule, 2).most_paths()) == (6, 10)
    tree = grown()
    tree.rounds = 1
    for node, name, values in page.Surprise()([tree], None):
        node.signals[name] = column(values, "d")
    assert [(bud.node, bud.drop) for bud in rule(tree)] == list(zip(tree.leaves(), (3, 4, 4), strict=True))
    tree.rounds = 2
    assert rule(tree) == []


def test_the_signal_is_what_lies_above_the_usual(page: ModuleType) -> None:
    columns = list(page.Surprise(usual=0.25)([grown()], None))
    assert [name for _, name, _ in columns] == ["surprise"] * 3
    assert columns[0][2] == pytest.approx([0, 0.45, 0.25, 1.75, 0, 0.15])


def test_a_rule_whose_signal_is_missing_is_refused(page: ModuleType, tmp_path: Path) -> None:
    bare = Path(str(page.__file__)).with_name("extend_bare.py")
    bare.write_text(Path(str(page.__file__)).read_text().replace("        signals=(Surprise(),),\n", ""))
    known = "StepStarts provides steps, ForwardInfluence provides influence, Concluded provides concluded, StateValue provides value"
    with pytest.raises(ValueError, match=rf"SecondThoughts needs the signal 'surprise', which nothing provides \({known}\): give signals"):
        launch(str(bare), [f"out={tmp_path / 'run'}"], False, True, Console(quiet=True))
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_advantage_is_over_the_middle_reward(page: ModuleType) -> None:
    (credit,) = page.MedianBaseline()([grown()])
    assert list(credit.leaf.values()) == [-1.0, 0.0, 0.0]


def test_credit_is_of_leaves_nodes_or_tokens_and_none_is_left_out() -> None:
    assert {f.name for f in fields(Credits)} >= {"leaf", "node", "token"}
    assert Credits({1: 0.5, 2: None}).trained() == {1}
    assert Credits(token={1: [0.5, 0.25]}).trained() == {1}


def test_the_shipped_signals_are_those_that_the_page_names() -> None:
    (line,) = re.findall(r"Shipped ones: (.*?)\.\n", PAGE.read_text())
    named = re.findall(r"`(\w+)(?:\((\w+)=(.*?)\))?`", line)
    assert [name for name, _, _ in named] == [type(signal).__name__ for signal in SHIPPED]
    for signal, (_, option, value) in zip(SHIPPED, named, strict=True):
        assert not option or hasattr(signal, option)
        assert value in ("", "...") or repr(getattr(signal, option)) == value


def test_the_clip_rule_fades_out_on_its_side_only(page: ModuleType) -> None:
    class Row:
        behavior = torch.zeros(3)

    logp = torch.tensor([-0.1, 0.1, 0.3])
    torch.testing.assert_close(page.FadeOut()(1, logp, logp, Row()), torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(page.FadeOut()(-1, logp, logp, Row()), torch.tensor([0.5, 1.0, 1.0]))


def test_what_a_part_leaves_out_is_said_by_its_protocol(page: ModuleType) -> None:
    fade, none = with_defaults(page.FadeOut(), Mask), torch.zeros(3)
    assert (fade.column, fade.column_of(Author.POLICY), fade.measure, fade.signal) == ("behavior", "behavior", None, None)
    assert fade.clamp(1, none, none, None) is None
    assert fade.factor(1, none, none, None).tolist() == [1.0] * 3
    plain = with_defaults(lambda logp, batch: logp, Reference)
    assert (plain.column, plain.needs, plain.records, plain.potential(none, None)) == (None, (), (), None)
    assert (with_defaults(Dynamic(2, draws=5), Schedule).draws, with_defaults(object(), Schedule).most_trees) == (5, None)


@pytest.mark.parametrize("around", [lambda mask: mask, lambda mask: Product((Clip(), mask)), lambda mask: PerAuthor(mask, Clip())])
def test_a_mask_that_says_nothing_of_its_textbook_loss_has_none(page: ModuleType, around: Callable[[Any], Any]) -> None:
    tree = grown()
    mix = Mix((Term(Estimator(around(page.FadeOut()), Behavior(), page.MedianBaseline())),))
    [batch] = pack([tree], mix.credit([tree]), mix)
    assert surrogate(mix, batch.behavior, batch.behavior, batch.entropy, batch) is None


def test_the_temperature_rises_above_the_mean_entropy_of_the_step_before(page: ModuleType) -> None:
    rule, logits = page.HotWhereTorn(), torch.tensor([[0.0, 0.0], [9.0, 0.0], [1.0, 0.0]])
    assert rule_features(rule) == set(RULE_FEATURES) == {name for name, _ in re.findall(r'^\| `"(\w+)"` \| (.*) \|$', PAGE.read_text(), re.M)}
    assert rule.given(None)(logits).tolist() == [1.0] * 3
    tree = grown()
    assert rule.measure([tree]) is None
    for leaf in tree.leaves():
        leaf.entropy = column([0.25] * 6)
    later = rule.given(rule.measure([tree]))
    assert later == page.HotWhereTorn(usual=0.25)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(later(logits), 1 + 0.3 * (entropy - 0.25).clamp(0, 1))
    assert sorted(later(logits).gt(1).tolist()) == [False, True, True]


def test_the_reward_falls_with_length(page: ModuleType) -> None:
    task = Task("t", (1,), "t")

    def of(n: int, finish: str) -> float:
        return page.Brief(10)(task, Answer(text="", tokens=(1,) * n, finish=finish))

    assert (of(5, "eos"), of(20, "eos"), of(5, "length")) == (1.0, 0.5, 0.0)


def test_the_gate_shows_once(page: ModuleType) -> None:
    first, state = page.FirstTimeShown()(grown(), {})
    again, _ = page.FirstTimeShown()(grown(), state)
    assert (first[Author.EXPERT], first[Author.POLICY]) == (1.0, 0.0)
    assert (again[Author.EXPERT], again[Author.POLICY]) == (0.0, 1.0)


def test_they_train_together(page: ModuleType, tmp_path: Path) -> None:
    small = ["tasks.count=60", "evals.count=4", "schedule.prompts=3", "model.hidden=32", "steps=2", "trees_every=1"]
    out = tmp_path / "run"
    assert launch(str(page.__file__), [*small, f"out={out}"], False, True, Console(quiet=True)) == 0
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(step["trained"] > 0 and step["updates"] == 1 for step in steps)
    state = json.loads((path_of(out, 2) / "state.json").read_text())
    assert len(state["mix"]) == 6, "the gate's state: every question that was seen"
    assert set(state["mix"].values()) == {True}
    assert json.loads((path_of(out, 2) / "state.json").read_text())["cursor"]["temperature"].keys() == {"usual"}
    every = [{x for tree in read(file) for node in tree.walk() for x in node.column("temperature")} for file in sorted((out / "trees").iterdir())]
    assert every[0] <= {1.0}
    assert max(every[1]) > 1.0
    for tree in (tree for file in sorted((out / "trees").iterdir()) for tree in read(file)):
        first = [leaf for leaf in tree.leaves() if leaf.why == "first"]
        again = [leaf for leaf in tree.leaves() if leaf.why == "again"]
        assert len(again) == len(first) == 4
        assert len(paths(tree)) == page.SecondThoughts(4).most_paths()
        assert all("surprise" in leaf.signals for leaf in first)
        assert not any("surprise" in leaf.signals for leaf in again), "nobody would read it"


def test_a_part_with_its_defaults_is_that_part() -> None:
    whole = with_defaults(GroupMean(), Advantage)
    trees = [Tree.plant(Task("t", (1,), "t"))]
    assert whole(trees) == GroupMean()(trees)
    assert copy.deepcopy(whole).needs == whole.needs == ()
    assert pickle.loads(pickle.dumps(whole)).column is None
