"""The TreePO sampler held by properties over random settings, and its numbers against hand-made trees."""

from __future__ import annotations

import asyncio
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growing import EOS, Recorder, Shuffled, chain, decode, grow_tree, plant
from ramulus.core.store import dump, load
from ramulus.core.tree import PER_TOKEN, Author, Node, Tree
from ramulus.engine.engine import Sampling
from ramulus.engine.toy import ToyEngine
from ramulus.grow.allocation import ByLogprob, Even, FirstByTokens, MoreFirst, Ramp
from ramulus.grow.branching import Bud, depth, length, own_depth, own_length, paths
from ramulus.grow.demonstration import Hinted
from ramulus.grow.fallback import (
    Answered,
    Anyone,
    BlockCut,
    FinishedFirst,
    FromStart,
    LongAnswered,
    LongerFirst,
    RandomCut,
    WorstTokenCut,
)
from ramulus.grow.growth import demonstrate, grow_forest, seed_of
from ramulus.grow.segments import Segments
from ramulus.grow.stop import BoxedAnswer, Repeats, Stop

SAMPLING = Sampling(max_tokens=64)

windows = st.one_of(st.none(), st.integers(1, 7))
favours = st.sampled_from(["low", "high"])
cuts = st.one_of(
    st.builds(RandomCut, windows, st.integers(0, 3)),
    st.builds(BlockCut, st.integers(1, 5), favours, windows),
    st.builds(WorstTokenCut, windows),
    st.just(FromStart()),
)
seed_orders = st.one_of(
    st.sampled_from([Anyone(), Answered(), LongerFirst(), FinishedFirst(), FinishedFirst(strict=True)]),
    st.builds(LongAnswered, st.integers(1, 2), windows),
)
temperatures = st.one_of(st.floats(0.1, 5.0), st.builds(Ramp, st.integers(1, 9), rising=st.booleans()))
allocations = st.one_of(
    st.builds(Even, st.booleans()),
    st.builds(ByLogprob, st.sampled_from(["sum", "mean", "last"]), favours, temperatures),
)


@st.composite
def rules(draw: st.DrawFn) -> Segments:
    """Any setting of the sampler with fallback."""
    width = draw(st.integers(1, 12))
    branching = min(
        width, draw(st.sampled_from([1, 1, 1, 2, 2, 3, 4]))
    )  # with 1 every path but the first is a fallback
    first = draw(st.one_of(st.none(), st.integers(1, width), st.just(MoreFirst(8)), st.just(FirstByTokens(30, 2))))
    return Segments(
        width,
        draw(st.integers(1, 8)),
        draw(st.integers(1, 8)),
        branching,
        first=first,
        allocation=draw(allocations),
        seeds=draw(seed_orders),
        fallback=draw(cuts),
    )


stops = st.builds(
    Stop,
    st.just((EOS,)),
    st.integers(10, 40),
    st.just(decode),
    st.sampled_from([None, BoxedAnswer(), BoxedAnswer(and_eos=True)]),
    st.sampled_from([None, Repeats(3, 3), Repeats(2, 3, every=2, first=True)]),
)


class Watched:
    """A rule that checks the budget of every round, and keeps TreePO's labels in TreePO's own way."""

    needs = ()

    def __init__(self, rule: Segments) -> None:
        self.rule, self.nominal = rule, 0
        self.plans: list[tuple[int | None, int, int]] = []  # of each bud: node or None, response tokens kept, its round

    def __call__(self, tree: Tree) -> list[Bud]:
        before = dump(tree)
        buds = self.rule(tree)
        assert dump(tree) == before, "a rule is a pure function of the tree"
        assert [(b.node.id, b.drop) for b in self.rule(tree)] == [(b.node.id, b.drop) for b in buds]
        known, rule = paths(tree), self.rule
        living = [leaf for leaf in known if leaf.finish is None and depth(leaf) < rule.depth]
        finished = len(known) - len(living)
        assert finished + len(buds) <= rule.width
        if living:  # all requests of the round before either live or have just finished
            assert len(buds) == max(len(living), min(rule.width - finished, rule.branching * self.nominal))
            assert {b.node.id for b in buds} == {leaf.id for leaf in living}
        self.nominal = len(buds)
        self.plans += [(b.node.id, length(b.node) - b.drop, tree.rounds) for b in buds]
        return buds


def labels_by_treepo(tree: Tree, watched: Watched, engine: Recorder, segment: int) -> dict[int, list[int]]:
    """Label path of every sampled node: the first ceil(c / l) labels of its source, then its own."""
    by_seed = {seed_of(tree, node): node.id for node in tree.walk()}
    labels: dict[int, list[int]] = {0: []}
    for (source, kept, _), (request, _) in zip(watched.plans, engine.seen, strict=True):
        node = by_seed[request.seed]
        labels[node] = [*labels[source or 0][: math.ceil(kept / segment)], node]
    return labels


def level_nodes(leaf: Node) -> list[int]:
    """Node ids of a path, each as often as it counts levels."""
    return [node.id for node in leaf.line() for _ in range(node.levels)]


def shared(a: list[int], b: list[int]) -> int:
    """How many items two lists have in common from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@given(rules(), stops, st.integers(0, 10**6), st.sampled_from([1.0, 2.5]))
@settings(max_examples=120)
def test_every_tree_of_every_setting(rule: Segments, stop: Stop, seed: int, spread: float) -> None:
    engine, watched = Recorder(vocab=8, seed=seed % 5, spread=spread), Watched(rule)
    tree = asyncio.run(grow_tree(plant(seed=seed), engine, watched, SAMPLING, stop))
    leaves = tree.leaves()
    assert len(leaves) == rule.width
    assert all(leaf.finish in ("answer", "eos", "length", "repetition") for leaf in leaves)
    assert all(depth(leaf) <= rule.depth and length(leaf) <= stop.max_tokens for leaf in leaves)
    assert tree.root.levels == 0
    nodes = {seed_of(tree, node): node for node in tree.walk()}
    for request, segment in engine.seen:  # what was sampled, and after what, is what stands in the tree
        node = nodes[request.seed]
        assert node.prefix() == [*request.prefix, *segment.tokens]
        assert 1 <= len(segment.tokens) <= rule.length
        assert not node.children or node.finish is None
    sampled = {nodes[request.seed].id for request, _ in engine.seen}
    assert all(node.id in sampled or node.children or node is tree.root for node in tree.walk())
    check_logprobs(tree, engine)
    labels = labels_by_treepo(tree, watched, engine, rule.length)
    assert all(depth(leaf) == len(labels[leaf.id]) for leaf in leaves)
    for a, b in combinations(leaves, 2):
        assert shared(level_nodes(a), level_nodes(b)) == shared(labels[a.id], labels[b.id])


@given(rules(), st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 3))
@settings(max_examples=60)
def test_hinted_paths_are_cut_and_counted_from_the_end_of_their_hint(rule: Segments, seed: int, shown: int, hints: int) -> None:
    tree = plant(seed=seed)
    tree.task = replace(tree.task, demonstrations=((*([3, 2, 1] * 14)[:shown], EOS),))
    demonstrate(tree, 1)
    engine = Recorder(vocab=8, seed=seed % 5, spread=0.5)
    tree = asyncio.run(grow_tree(tree, engine, Hinted(rule, hints), SAMPLING, Stop((EOS,), 99)))
    assert all(own_depth(leaf) <= rule.depth and own_length(leaf) <= rule.depth * rule.length for leaf in paths(tree))
    assert len(paths(tree)) >= rule.width
    assert all(1 <= len(segment.tokens) <= rule.length for _, segment in engine.seen)
    assert all(node.parent.author is not Author.POLICY for node in tree.walk() if node.author is Author.EXPERT), "no hint is cut from a path"


@pytest.mark.parametrize("cut", [BlockCut(2), WorstTokenCut(2)])
def test_a_cut_of_a_hinted_path_lies_in_its_own_part(cut: BlockCut | WorstTokenCut) -> None:
    tree = plant()
    hint = tree.add(tree.root, [3] * 6, Author.EXPERT)
    leaf = tree.add(hint, [7, 8, 1, EOS], Author.POLICY, logprobs=[-0.1, -0.1, -50.0, -0.1], finish="eos")
    rule = Segments(4, 3, 4, fallback=cut)
    bud = rule.bud(leaf, rule.cut(leaf, random.Random(0)))
    kept = [*leaf.response()][: len(leaf.response()) - bud.drop]
    assert kept == [3] * 6 + [7, 8]
    restart = rule.bud(leaf, 0)
    assert (restart.node, restart.drop) == (hint, 0), "what the policy wrote anew goes on from the same hint"


def check_logprobs(tree: Tree, engine: ToyEngine) -> None:
    """Every recorded log-prob is the model's, given the recorded path."""
    for node in tree.walk():
        if node.author is Author.POLICY:
            assert node.kept is None, "nothing is cut off"
            assert all(len(node.column(name)) == len(node.tokens) for name in PER_TOKEN if name != "kept")
            prefix = node.prefix()[: len(node.prefix()) - len(node.tokens)]
            for token, logprob in zip(node.tokens, node.logprobs):
                assert logprob == pytest.approx(math.log(engine.probabilities(prefix)[token]), rel=1e-6, abs=1e-7)
                prefix.append(token)


def test_levels_after_cuts_off_the_grid() -> None:
    """With a window of 2 and segments of 5 a second fallback cuts segments that began off the grid: ceil(4 / 5) is 1, not 2."""
    engine, watched = (
        Recorder(vocab=8, spread=0.5),
        Watched(Segments(24, 5, 5, 1, seeds=Anyone(), fallback=RandomCut(2))),
    )
    tree = asyncio.run(grow_tree(plant(seed=4), engine, watched, SAMPLING, Stop((EOS,), 25)))
    labels = labels_by_treepo(tree, watched, engine, 5)
    assert all(depth(leaf) == len(labels[leaf.id]) for leaf in tree.leaves())
    heads = [node for node in tree.walk() if node.id not in labels]
    starts = {node.id: length(node) - len(node.tokens) for node in heads}
    assert any(node.levels == 1 for node in heads)
    assert any(node.levels == 0 and starts[node.id] % 5 for node in heads), "a level went on to the rest of its segment"
    assert any(not leaf.levels for leaf in tree.leaves()), "a path that another one's labels extend"
    assert any(node.why == "fallback" for node in tree.walk())


def test_levels_after_cuts_on_the_grid() -> None:
    engine, watched = Recorder(vocab=8, spread=0.5), Watched(Segments(24, 5, 4, 1, seeds=Anyone()))
    tree = asyncio.run(grow_tree(plant(seed=4), engine, watched, SAMPLING, Stop((EOS,), 20)))
    assert all(node.levels == 1 for node in tree.walk() if node is not tree.root), "no segment was cut"
    assert all(depth(leaf) == math.ceil(length(leaf) / 4) for leaf in tree.leaves())
    assert sum(node.why == "fallback" for node in tree.walk()) > 5


def test_without_fallback_a_tree_may_stay_narrow() -> None:
    always_eos = ToyEngine(vocab=8, table={(): [50.0] + [0.0] * 7})
    for fallback, leaves in ((None, 2), (RandomCut(), 8)):
        rule = Segments(8, 4, 5, fallback=fallback)
        tree = asyncio.run(grow_tree(plant(), always_eos, rule, SAMPLING, Stop((EOS,), 30)))
        assert [list(leaf.tokens) for leaf in tree.leaves()] == [[EOS]] * leaves, (
            "EOS as the first token of a segment is seen"
        )


@given(rules(), st.integers(0, 99))
@settings(max_examples=15)
def test_a_tree_depends_on_its_own_names_only(rule: Segments, seed: int) -> None:
    stop = Stop((EOS,), 20)

    def grown(engine: ToyEngine, names: list[str]) -> dict[str, bytes]:
        forest = [plant(name, seed) for name in names]
        return {t.task.id: dump(t) for t in asyncio.run(grow_forest(forest, engine, rule, SAMPLING, stop))}

    alone = grown(ToyEngine(), ["a"])
    crowd = grown(Shuffled(), ["c", "b", "a", "d"])
    assert crowd["a"] == alone["a"]
    assert grown(ToyEngine(), ["a", "b", "c", "d"]) == crowd
    assert dump(load(crowd["b"])) == crowd["b"]


def test_seed_visit_and_task_each_change_the_tree() -> None:
    rule, stop = Segments(6, 4, 4), Stop((EOS,), 16)
    trees = [plant(), plant(seed=1), plant(visit=1), plant("u")]
    grown = asyncio.run(grow_forest(trees, ToyEngine(), rule, SAMPLING, stop))
    texts = [tuple(tuple(leaf.response()) for leaf in tree.leaves()) for tree in grown]
    assert len(set(texts)) == 4


def test_nothing_hangs_on_the_salt_of_hashes() -> None:
    code = (
        "import asyncio, hashlib; from growing import *; from ramulus.core.store import dump; from ramulus.grow.growth "
        "import *; from ramulus.grow.segments import Segments; t = asyncio.run(grow_tree(plant(), ToyEngine(spread=1.0), "
        "Segments(9, 4, 4), Sampling(64), Stop((0,), 20))); print(hashlib.md5(dump(t)).hexdigest())"
    )
    root = Path(__file__).parent
    path = os.pathsep.join([str(root.parent / "src"), str(root)])
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert len(runs[0].strip()) == 32


def test_budget_of_finished_siblings_goes_to_the_survivors() -> None:
    tree = plant()
    chain(tree, [4], "eos")
    tree.fresh = tree.serial  # the round begins here: three finish, two live
    for finish in ("eos", "answer", "length", None, None):
        chain(tree, [4], finish)
    tree.rounds = 2
    rule = Segments(16, 6, 4, 2)
    assert len(rule(tree)) == 10  # b f + b a = 2 x 3 + 2 x 2, and 16 - 4 = 12 is no limit
    assert len(replace(rule, width=12)(tree)) == 8  # 12 - 4
    assert len(replace(rule, width=5)(tree)) == 2  # never fewer than live
    assert len(replace(rule, branching=1)(tree)) == 5
    counts = [sum(bud.node is leaf for bud in rule(tree)) for leaf in paths(tree)[-2:]]
    assert counts == [5, 5]


def test_a_path_out_of_depth_counts_as_finished() -> None:
    tree = plant()
    deep, young = chain(tree, [4, 4], None), chain(tree, [4], None)
    rule = Segments(8, 2, 4)
    assert {bud.node for bud in rule(tree)} == {young}
    assert len(rule(tree)) == 4
    stopped = asyncio.run(grow_tree(tree, ToyEngine(), replace(rule, fallback=None), SAMPLING, Stop((EOS,), 99)))
    assert deep.finish == "length"
    assert all(depth(leaf) <= 2 and leaf.finish for leaf in stopped.leaves())


def test_first_round() -> None:
    def first(rule: Segments, tree: Tree | None = None) -> int:
        return len(rule(tree or plant()))

    rule = Segments(16, 4, 8, 2)
    assert first(rule) == 2
    assert first(replace(rule, first=5)) == 5
    drawn = {first(replace(rule, first=MoreFirst(8)), plant(f"t{i}")) for i in range(100)}
    assert drawn == set(range(2, 9))
    assert {first(replace(rule, first=MoreFirst(8), width=4), plant(f"t{i}")) for i in range(50)} == {2, 3, 4}
    assert {first(replace(rule, first=MoreFirst(6, 5)), plant(f"t{i}")) for i in range(50)} == {5, 6}
    shared_rule = replace(rule, first=MoreFirst(8, shared=True))
    assert len({first(shared_rule, plant(f"t{i}")) for i in range(20)}) == 1
    by_step = set()
    for step in range(60):
        tree = plant()
        tree.step = step
        by_step.add(first(shared_rule, tree))
    assert by_step == set(range(2, 9))
    assert first(replace(rule, first=FirstByTokens(200, 5))) == 5  # 200 // 8 // 5
    assert first(replace(rule, first=FirstByTokens(10, 5))) == 1
    assert first(replace(rule, first=FirstByTokens(10_000, 1))) == 16


def test_fallback_shares_the_missing_paths_among_seeds() -> None:
    tree = plant()
    leaves = [chain(tree, [4, 2], "eos") for _ in range(3)]
    rule = Segments(8, 6, 4, 2)
    buds = rule(tree)
    assert len(buds) == 5
    assert all(buds[i].node is buds[i + 1].node or buds[i].why == "restart" for i in (0, 2))
    assert all(bud.max_tokens == 4 for bud in buds)
    for bud in buds:
        kept = 0 if bud.node is tree.root else length(bud.node) - bud.drop
        assert kept in (0, 4)
        assert bud.levels == (1 if kept else None)
    many = replace(rule, width=30)
    assert len(many(tree)) == 6, "what the seeds do not give waits for the next round"
    from_start = replace(rule, fallback=FromStart())(tree)
    assert [bud.node for bud in from_start] == [tree.root] * 2, "one seed only"
    for leaf in leaves:
        leaf.finish = "length"
    restart = rule(tree)
    assert [(bud.node, bud.why) for bud in restart] == [(tree.root, "restart")] * 2, "no seed left"
    assert {bud.node for bud in replace(rule, seeds=Anyone(), fallback=WorstTokenCut(1))(tree)} == {tree.root}
    assert Segments(3, 6, 4, 2)(tree) == []


def test_a_cut_leaves_at_least_one_level_to_grow() -> None:
    class AtEnd:
        def __call__(self, leaf: Node, dice: object, segment: int) -> int:
            return length(leaf) - 1

    tree = plant()
    leaf = chain(tree, [4, 4, 4], "eos")
    (bud,) = Segments(2, 3, 4, 1, fallback=AtEnd())(tree)  # ceil(11 / 4) = 3 = depth, so the cut moves to 4 x 2
    assert (bud.node, bud.drop, bud.levels) == (leaf, 4, 2)
    (bud,) = Segments(2, 4, 4, 1, fallback=AtEnd())(tree)
    assert (bud.drop, bud.levels) == (1, 3)

    class Beyond:
        def __call__(self, leaf: Node, dice: object, segment: int) -> int:
            return 12

    with pytest.raises(ValueError, match=r"cut a path of 12 tokens at 12.*keeps 0 to 11"):
        Segments(2, 4, 4, 1, fallback=Beyond())(tree)


def test_token_mode_counts_shared_tokens_once() -> None:
    tree = plant()
    stem = tree.add(tree.root, [1] * 4, Author.POLICY)
    for finish in ("eos", "eos", None, None):
        tree.add(stem, [1] * 3, Author.POLICY, finish=finish)
    tree.fresh = 2
    rule = Segments(16, 8, 4, 2, tokens=45)
    # finished paths hold 4 + 3 + 3 = 10 tokens; a living one added 3 and will add 4: 2 + floor(35 / 7) = 7 paths
    living, ended = paths(tree)[2:], paths(tree)[:2]
    assert rule.target(living, ended) == 7
    assert len(rule(tree)) == 5
    assert replace(rule, tokens=44).target(living, ended) == 6
    assert replace(rule, tokens=9000).target(living, ended) == 16
    assert replace(rule, tokens=1).target(living, ended) == 1
    assert replace(rule, tokens=1, least=3).target(living, ended) == 3
    assert len(replace(rule, tokens=1)(tree)) == 2, "living paths are never given up"
    for leaf in living:
        leaf.finish = "eos"
    assert rule.target([], paths(tree)) == 11  # 16 tokens on 4 paths, 4 each: 4 + floor(29 / 4)
    assert len(rule(tree)) == 7
    assert replace(rule, tokens=16)(tree) == []


def test_token_mode_spends_about_its_tokens() -> None:
    for budget in (40, 80, 160):
        rule = Segments(64, 5, 4, 2, tokens=budget)
        forest = [plant(f"t{i}") for i in range(20)]
        asyncio.run(grow_forest(forest, ToyEngine(spread=1.0), rule, SAMPLING, Stop((EOS,), 20)))
        spent = [sum(len(node.tokens) for node in tree.walk() if node is not tree.root) for tree in forest]
        assert budget * 0.9 <= sum(spent) / 20 <= budget * 1.3


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"width": 0}, "width of at least 1, got 0"),
        ({"depth": 0}, "depth of at least 1, got 0"),
        ({"length": -3}, "length of at least 1, got -3"),
        ({"branching": 0}, "branching of at least 1, got 0"),
        ({"width": 3, "branching": 4}, "width 3 below its branching factor 4.*raise width to 4"),
        ({"first": 17}, "1 to width=16 paths, got first=17"),
        ({"first": MoreFirst(3), "branching": 4}, "below the branching factor 4"),
        ({"tokens": -1}, "got -1"),
        ({"least": 17}, "least <= width=16"),
    ],
)
def test_wrong_settings_say_what_and_how(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments(**{"width": 16, "depth": 4, "length": 8, **settings_})
