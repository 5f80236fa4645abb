"""Credit written into trees: what it says, that it survives the store, and that training does not feel it."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from forests import forest
from kept import tensors
from methods import METHODS
from ramulus.core.store import dump, load, read
from ramulus.core.tree import Author, Tree
from ramulus.learn.batch.layout import lay_out
from ramulus.learn.batch.score_row import nodes_of
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mix import Mix
from ramulus.learn.packing.annotate import annotate, annotate_ratio, names
from ramulus.learn.packing.pack import pack
from ramulus.learn.packing.weights import select
from ramulus.run.launch import launch

RECIPE = str(Path(__file__).parent / "run_recipe.py")


def same(ours: list[TreeBatch], theirs: list[TreeBatch]) -> bool:
    """Whether two lists of rows are equal, bit for bit."""
    columns = [f.name for f in fields(TreeBatch) if isinstance(getattr(theirs[0], f.name), torch.Tensor)]
    return len(ours) == len(theirs) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(ours, theirs) for name in columns
    )


def annotated(mix: Mix, trees: list[Tree]) -> list[Tree]:
    """The trees as they were, by way of the store, after their copies in `trees` were annotated."""
    before = [load(dump(tree)) for tree in trees]
    annotate(trees, mix, mix.credit(trees), select(trees, mix.credit(trees), mix, mix.gates(trees, {})[0]))
    return before


@pytest.mark.parametrize("name", METHODS)
def test_credit_survives_the_store_and_changes_no_row(name: str) -> None:
    mix, trees = METHODS[name].mix, forest(2, tempered=True)
    before = annotated(mix, trees)
    assert any(dump(tree) != dump(old) for tree, old in zip(trees, before, strict=True))
    for tree, old in zip(trees, before, strict=True):
        assert dump(load(dump(tree))) == dump(tree)
        for node in tree.walk():
            for column in (node.verdict, node.signals):
                for key in names(mix):
                    column.pop(key, None)
        assert dump(tree) == dump(old), "nothing else was touched"
    gates, _ = mix.gates(trees, {})
    annotate(trees, mix, mix.credit(trees), select(trees, mix.credit(trees), mix, gates))
    assert same(
        pack(trees, mix.credit(trees), mix, 40, gates=gates), pack(before, mix.credit(before), mix, 40, gates=gates)
    )


def test_a_leaf_s_credit_stands_in_its_verdict() -> None:
    mix, trees = METHODS["treepo"].mix, forest(2, tempered=True)
    annotate(trees, mix, mix.credit(trees), select(trees, mix.credit(trees), mix))
    (answers,) = mix.credit(trees)
    count = 0
    for tree, answer in zip(trees, answers, strict=True):
        for leaf in tree.leaves():
            learned = any(n.author in mix.terms[0].authors and n.tokens for n in leaf.line())
            value = answer.leaf.get(leaf.id) if learned else None
            assert leaf.verdict.get("credit/SubgroupMean") == value
            count += value is not None
        assert not any("credit/SubgroupMean" in node.signals for node in tree.walk())
    assert count > 5


@pytest.mark.parametrize("name", ["treepo_segments", "treepo_zscores", "node_values_some_leaves"])
def test_credit_along_a_path_stands_in_the_signals(name: str) -> None:
    """Where all leaves weigh alike, weight x the mean credit of the leaves below is gain + pain."""
    mix, trees = METHODS[name].mix, forest(2, tempered=True)
    annotate(trees, mix, mix.credit(trees), select(trees, mix.credit(trees), mix))
    (key,) = names(mix)
    (batch,) = pack(trees, mix.credit(trees), mix, 0, torch.float64)
    (row,) = lay_out(trees, [{leaf.id for leaf in tree.leaves() if key in leaf.verdict} for tree in trees])
    written = torch.zeros(len(batch), dtype=torch.float64)
    for _, node, start, stop in row.nodes:
        if key in node.signals:
            written[start:stop] = torch.tensor(node.signals[key], dtype=torch.float64)
    torch.testing.assert_close(written * batch.weight[0], (batch.gain + batch.pain)[0], rtol=0, atol=1e-12)
    assert float(written.abs().max()) > 0.1


def test_terms_of_one_kind_have_names_of_their_own() -> None:
    mix = METHODS["rl_and_sft_per_question"].mix
    assert names(mix) == ["credit/GroupMean", "credit/Constant"]
    assert names(replace(mix, terms=mix.terms + mix.terms[:1])) == [*names(mix), "credit/GroupMean/2"]


def test_the_ratio_to_the_sampler_stands_in_the_signals_of_trained_nodes() -> None:
    mix, trees = METHODS["grpo"].mix, forest(2, tempered=True)
    for batch in pack(trees, mix.credit(trees), mix, 40):
        annotate_ratio(nodes_of(trees), batch, batch.behavior + math.log(1.25))
    held = {node for tree in trees for node in tree.walk() if "ratio" in node.signals}
    graded = {node for tree in trees for leaf in tree.leaves() if leaf.reward is not None for node in leaf.line()}
    assert held == {node for node in graded if node.author is Author.POLICY and node.tokens}
    assert all(list(node.signals["ratio"]) == [1.25] * len(node.tokens) for node in held)


def trained(out: Path, every: int) -> dict[str, Any]:
    launch(RECIPE, [f"out={out}", "steps=2", "save_every=2", f"trees_every={every}"], True, False, Console(quiet=True))
    return tensors(out, 2)


def test_a_run_writes_credit_and_learns_as_without(tmp_path: Path) -> None:
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        with_trees, without = trained(tmp_path / "one", 1), trained(tmp_path / "two", 0)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
    assert with_trees.keys() == without.keys()
    assert all(torch.equal(with_trees[name], without[name]) for name in with_trees)
    trees = list(read(tmp_path / "one" / "trees" / "000002.jsonl"))
    credit = [leaf.verdict.get("credit/GroupMean") for tree in trees for leaf in tree.leaves()]
    assert any(credit), "some path was worth more or less than its group"
