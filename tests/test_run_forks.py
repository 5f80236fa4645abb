"""Whole runs that branch between rounds: signals supplied, state kept, a stopped run goes on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from ramulus.core import run_folder, store
from ramulus.core.tree import Author, Tree
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.run.launch import launch
from ramulus.run.signals import SignalContext
from run_forks import Half
from test_resume import metrics, same

HERE = Path(__file__).parent
RECIPE = str(HERE / "run_forks.py")
pytestmark = pytest.mark.usefixtures("torch_as_it_was")


def train(out: Path, *overrides: str, variant: str = "", resume: bool = True) -> int:
    return launch(RECIPE + variant, [f"out={out}", *overrides], resume, False, Console(quiet=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out) == 0
    return out


def trees(folder: Path) -> list[Tree]:
    return [tree for file in sorted((folder / "trees").iterdir()) for tree in store.read(file)]


def test_paths_grow_from_attended_steps_and_the_batch_adapts(whole: Path) -> None:
    grown = trees(whole)
    assert all(
        {"steps", "influence"} <= leaf.signals.keys() for tree in grown for leaf in tree.leaves() if leaf.why == "root"
    )
    later = [leaf for tree in grown for leaf in tree.leaves() if leaf.why == "influence"]
    assert len(later) > 50
    assert not any("influence" in leaf.signals for leaf in later), "nobody would read it"
    assert len({line["wanted"] for line in metrics(whole)}) > 1
    state = json.loads((run_folder.path_of(whole, 6) / "state.json").read_text())["cursor"]["schedule"]
    assert state["batch"]["seen"] == 6
    assert all(line["grad_norm"] > 0 for line in metrics(whole))
    assert any(tree.unexpanded for tree in grown)
    for tree in grown:
        for leaf in tree.leaves():
            if leaf.id in tree.unexpanded:
                assert leaf.parent is tree.root
                assert "credit/GlobalLocal" not in leaf.verdict


def test_a_run_that_stopped_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "steps=2", "optimizer.decay=constant") == 0
    assert train(tmp_path / "one", "steps=6", "optimizer.decay=constant") == 0
    assert train(tmp_path / "run", "steps=6", "optimizer.decay=constant") == 0
    same(tmp_path / "one", tmp_path / "run")


def test_influence_rides_on_the_pass_that_recomputes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run but for rounding, as with a pass of its own; and a stopped one goes on bit for bit."""
    passes: list[bool] = []  # of each, whether it was for influence alone
    inner = TorchPolicy._score_row

    def counted(self, model, row, head, watch=None):
        passes.append(not head)
        return inner(self, model, row, head, watch)

    monkeypatch.setattr(TorchPolicy, "_score_row", counted)
    still = "optimizer.decay=constant"
    assert train(tmp_path / "ridden", "steps=3", still, variant=":recomputed") == 0
    assert train(tmp_path / "stopped", "steps=1", still, variant=":recomputed") == 0
    assert train(tmp_path / "stopped", "steps=3", still, variant=":recomputed") == 0
    same(tmp_path / "ridden", tmp_path / "stopped")
    assert passes
    assert not any(passes)
    passes.clear()
    monkeypatch.setattr(SignalContext, "rides", ())
    assert train(tmp_path / "alone", "steps=3", still, variant=":recomputed") == 0
    every = zip(trees(tmp_path / "ridden"), trees(tmp_path / "alone"), strict=True)
    nodes = [pair for ridden, alone in every for pair in zip(ridden.walk(), alone.walk(), strict=True)]
    pairs = [pair for a, b in nodes for pair in zip(a.signals.get("recomputed", []), b.signals.get("recomputed", []))]
    ridden, alone = zip(*pairs, strict=True)
    assert len(pairs) > 100
    assert any(passes), "the pass of its own was not made"
    assert ridden == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(("variant", "why"), [(":early", "early"), (":entropy", "nats")])
def test_the_other_rules_run(tmp_path: Path, variant: str, why: str) -> None:
    assert train(tmp_path / "run", "steps=2", variant=variant) == 0
    grown = trees(tmp_path / "run")
    assert sum(leaf.why.endswith(why) for tree in grown for leaf in tree.leaves()) > 20
    assert not any("influence" in node.signals for tree in grown for node in tree.walk())
    if why == "nats":
        assert {tree.rounds for tree in grown} == {3}
        assert all(
            "concluded" in node.signals for tree in grown for leaf in tree.leaves() for node in leaf.line()[1:-1]
        )
    assert all(node.author is not Author.EXPERT for tree in grown for node in tree.walk())


def test_steps_in_which_every_tree_is_dropped_are_written_and_change_nothing(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "steps=2", variant=":hopeless") == 0
    assert [(line["trees"], line["dropped"], line["updates"]) for line in metrics(tmp_path / "run")] == [(4, 4, 0)] * 2
    assert len(trees(tmp_path / "run")) == 8


@pytest.mark.parametrize("reader", ["gate", "temperature", "schedule", "cut", "seeds", "allocation"])
def test_who_sees_all_trees_finds_the_signal_in_all_of_them(tmp_path: Path, reader: str) -> None:
    assert train(tmp_path / "run", "steps=2", variant=f":by_{reader}") == 0
    leaves = [leaf for tree in trees(tmp_path / "run") for leaf in tree.leaves()]
    assert len(leaves) >= 36
    assert all("change" in leaf.signals for leaf in leaves)


@pytest.mark.parametrize("reader", ["mask", "inner_mask", "reference"])
def test_who_sees_what_is_learned_from_finds_the_signal_there_and_no_other_tree_has_it(tmp_path: Path, reader: str) -> None:
    assert train(tmp_path / "run", "steps=2", variant=f":by_{reader}") == 0
    kept = Half(6).keep
    assert {kept(tree) for tree in trees(tmp_path / "run")} == {True, False}
    for tree in trees(tmp_path / "run"):
        assert all(("change" in leaf.signals) == kept(tree) for leaf in tree.leaves())


def test_an_advantage_reads_a_signal_of_the_recipe(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "steps=2", variant=":credited") == 0
    leaves = [leaf for tree in trees(tmp_path / "run") for leaf in tree.leaves()]
    assert leaves
    for leaf in leaves:
        assert list(leaf.signals["change"]) == [float(a != b) for a, b in zip(leaf.tokens, [-1, *leaf.tokens])]
        assert list(leaf.signals["credit/Unlike"]) == [(leaf.reward or 0.0) * x for x in leaf.signals["change"]]
    assert any(leaf.reward for leaf in leaves)
