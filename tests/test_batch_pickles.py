"""What crosses to a learner in another process is plain: it survives pickling, at any depth of tree."""

from __future__ import annotations

import pickle
from dataclasses import fields

import pytest
import torch

from forests import forest
from methods import METHODS
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.engine import Live
from ramulus.learn.batch.score_row import nodes_of
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.packing.pack import pack


def deep(nodes: int) -> Tree:
    """Two paths that part after `nodes` nodes of one token each."""
    tree = Tree.plant(Task("deep", (1, 2), "?"))
    here = tree.root
    for _ in range(nodes):
        here = tree.add(here, [3], Author.POLICY, logprobs=[-1.0], kept=[0.0], entropy=[0.5], temperature=[1.0])
    for reward in (0.0, 1.0):
        leaf = tree.add(here, [4], Author.POLICY, logprobs=[-0.5], kept=[0.0], entropy=[0.2], temperature=[1.0])
        leaf.reward, leaf.finish = reward, "eos"
    return tree


def same(one: TreeBatch, other: TreeBatch) -> bool:
    """Whether two rows hold the same, bit for bit."""
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(TreeBatch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_a_row_of_a_deep_tree_is_pickled() -> None:
    mix, trees = METHODS["grpo"].mix, [deep(2000)]
    (batch,) = pack(trees, mix.credit(trees), mix)
    assert same(pickle.loads(pickle.dumps(batch)), batch)
    with pytest.raises(RecursionError):
        pickle.dumps(trees[0])


@pytest.mark.parametrize("name", ["grpo", "treepo", "hapo", "rl_and_sft_per_question"])
def test_rows_and_mixes_are_pickled(name: str) -> None:
    mix, trees = METHODS[name].mix, forest(2, tempered=True)
    gates, _ = mix.gates(trees, {})
    for batch in pack(trees, mix.credit(trees), mix, 40, gates=gates):
        assert same(pickle.loads(pickle.dumps(batch)), batch)
    assert pickle.loads(pickle.dumps(mix)) == mix


def test_live_parameters_are_a_copy_whose_version_stays_once_pickled() -> None:
    now = [3]
    live = Live({"a": torch.ones(2)}, lambda: now[0])
    copy = pickle.loads(pickle.dumps(live))
    now[0] = 4
    assert (type(copy), copy.version(), live.version()) == (Live, 3, 4)
    assert torch.equal(copy["a"], live["a"])


def test_spans_name_the_nodes_of_every_token() -> None:
    mix, trees = METHODS["grpo"].mix, forest(3, trees=3)
    nodes, count = nodes_of(trees), 0
    for batch in pack(trees, mix.credit(trees), mix, 40):
        for tree, number, start, stop in batch.spans:
            node = nodes[tree][number]
            assert batch.token[start:stop].tolist() == list(node.tokens)
            assert bool(batch.sampled[start:stop].all()) == bool(len(node.logprobs)) or start == stop
            count += stop - start
        assert int(batch.sampled.sum()) == sum(stop - start for t, n, start, stop in batch.spans if len(nodes[t][n].logprobs))
    assert count > 50
