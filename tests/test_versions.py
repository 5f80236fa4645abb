"""Nodes whose tokens several versions of the policy sampled: cut, stored, packed, replayed with each token's own."""

from __future__ import annotations

import random
from array import array

import pytest

from ramulus.core import store
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.engine.engine import Segment
from ramulus.engine.remote.wire import segment_of_json, segment_to_json
from ramulus.grow.growth import replayed
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gauges import gauges, merge
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.packing.pack import pack

VERSIONS = [3, 3, 4, 4, 4, 6]
MIX = Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),))


def grown() -> tuple[Tree, Node]:
    """A tree of two paths, of which one saw three versions."""
    tree = Tree.plant(Task("t", (1, 2), "t"))
    fields = {"logprobs": [-1.0] * 6, "finish": "eos"}
    mixed = tree.add(tree.root, range(3, 9), Author.POLICY, version=3, newest=6, versions=VERSIONS, reward=1.0, **fields)
    tree.add(tree.root, range(3, 9), Author.POLICY, version=3, reward=0.0, **fields)
    return tree, mixed


def of_path(leaf: Node) -> list[int]:
    """The version of each of its tokens."""
    return [v for node in leaf.line() for v in (node.versions if node.versions is not None else [node.version] * len(node.logprobs))]


def test_every_token_keeps_its_version_through_cuts_and_copies() -> None:
    for seed in range(50):
        draw, (tree, leaf) = random.Random(seed), grown()
        for _ in range(4):
            node = draw.choice(leaf.line()[1:])
            tree.cut(node, draw.randint(0, len(node.tokens)))
        tree.graft(leaf, draw.randint(0, 5))
        for one in (tree, tree.copy(), store.load(store.dump(tree))):
            found = next(node for node in one.walk() if node.id == leaf.id)
            assert of_path(found) == VERSIONS
            for node in found.line()[1:]:
                if node.tokens:
                    own = of_path(node)[-len(node.tokens) :]
                    assert (node.version, node.newest) == (own[0], own[-1])


def test_what_one_version_sampled_is_stored_as_before() -> None:
    tree, leaf = grown()
    leaf.versions = None
    assert b"versions" not in store.dump(tree)


def test_the_learner_compares_tokens_of_its_own_version_alone() -> None:
    tree, _ = grown()
    [batch] = pack([tree], MIX.credit([tree]), MIX)
    assert batch.version is not None
    assert sorted(batch.version.tolist()) == sorted([0, 0, *VERSIONS, *[3] * 6])
    logp = batch.behavior.clone()
    logp[batch.version == 4] += 0.5
    for version, worst in ((3, 0.0), (4, 0.5), (6, 0.0)):
        assert merge([gauges(MIX, logp, logp, logp.exp(), batch, version)])["mismatch_max"] == pytest.approx(worst)


def test_a_segment_that_is_cut_keeps_the_versions_of_what_is_left() -> None:
    segment = Segment(array("i", range(6)), array("f", [-1.0] * 6), None, 3, 6, versions=array("i", VERSIONS))
    cut = replayed(lambda tokens: "answer" if len(tokens) == 4 else None, segment)
    assert (cut.version, cut.newest, cut.versions) == (3, 4, array("i", [3, 3, 4, 4]))
    assert segment_of_json(segment_to_json(segment)) == segment
