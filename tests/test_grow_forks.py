"""AttentionForks, EarlyForks, EntropyForks: where they branch, their fallbacks, and what they never do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable

import pytest

from growing import EOS, Recorder, Shuffled, plant
from ramulus.core.tree import Author, Node, Tree, column
from ramulus.engine.engine import Sampling
from ramulus.grow.forks import AttentionForks, EarlyForks, EntropyForks
from ramulus.grow.growth import grow_forest
from ramulus.grow.points import at_random, by_score, filled, quantile, threshold
from ramulus.grow.stop import Stop
from ramulus.learn.policy.steps import (
    Marked,
    Separators,
    Steps,
    holding,
    marked_after,
    marked_steps,
    segment,
    separators_of,
)

LINES = Separators(frozenset(), frozenset({2}))


def write(columns: Iterable[Marked]) -> None:
    """Signals into their nodes."""
    for node, name, values in columns:
        node.signals[name] = column(values, "d")


def star(tokens: list[list[int]], scores: list[list[float]] | None = None, prompt: int = 3) -> Tree:
    """A tree after its first round, with its steps, and the score of each step on its tokens."""
    tree = plant(prompt=(1,) * prompt)
    for path in tokens:
        leaf = tree.add(tree.root, list(path), Author.POLICY, finish="eos")
        leaf.logprobs, leaf.kept = column(-float(token) for token in path), column([0.0] * len(path))
        leaf.entropy = column(float(token % 3) for token in path)
    tree.rounds = 1
    write(marked_steps(tree, LINES))
    for leaf, values in zip(tree.leaves(), scores or []):
        starts = [*segment(leaf.tokens, LINES).starts, len(leaf.tokens)]
        leaf.signals["influence"] = column((v for v, a, b in zip(values, starts, starts[1:]) for _ in range(b - a)), "d")
    return tree


def lines(sizes: list[int]) -> list[int]:
    """A response of lines of so many tokens, the separator included."""
    return [token for size in sizes for token in [*[1] * (size - 1), 2]]


def places(tree: Tree, rule) -> list[tuple[int, int]]:
    """(node id, response tokens kept) of every bud."""
    return [(bud.node.id, len(bud.node.response()) - bud.drop) for bud in rule(tree)]


def test_the_first_round_is_of_roots_and_the_second_the_last() -> None:
    for rule in (AttentionForks(3), EarlyForks(3), EntropyForks(3)):
        assert [bud.node.parent for bud in rule(plant())] == [None] * 3
        tree = star([lines([2, 2])], [[0, 1]])
        tree.rounds = 2
        assert rule(tree) == []


def test_attention_takes_early_high_steps_at_a_distance() -> None:
    sizes, scores = [3, 3, 3, 3, 3, 3, 3, 3, 3, 3], [0.0, 0.1, 0.9, 0.1, 0.8, 0.1, 0.7, 0.1, 0.1, 0.0]
    tree = star([lines(sizes)], [scores])
    leaf = tree.leaves()[0].id
    assert places(tree, AttentionForks(1, 2, 1, distance=0)) == [(leaf, 6), (leaf, 12)]
    assert places(tree, AttentionForks(1, 2, 3, distance=3)) == [(leaf, 6)] * 3 + [(leaf, 12)] * 3
    assert places(tree, AttentionForks(1, 2, 1, distance=4)) == [(leaf, 3), (leaf, 6)], (
        "12 - 9 is too near: the earliest"
    )
    assert places(tree, AttentionForks(1, 2, 1, quantile=0.7, distance=4)) == [(leaf, 6), (leaf, 18)]
    assert places(tree, AttentionForks(1, 1, 1, distance=12)) == [(leaf, 12)], "the prompt's 3 tokens count"
    assert places(tree, AttentionForks(1, 2, 1, distance=512)) == [(leaf, 3), (leaf, 6)]


def test_short_responses() -> None:
    tree = star([lines([2, 3]), lines([4]), [1], lines([1, 1])], [[0, 0.5], [0.0], [0.0], [0, 0]])
    first, *_, last = (leaf.id for leaf in tree.leaves())
    assert places(tree, AttentionForks(1, 3, 1)) == [(first, 2)] * 3 + [(last, 1)] * 3
    assert places(tree, EarlyForks(1, 3, 1)) == [(first, 2)] * 3 + [(last, 1)] * 3


def test_paths_that_are_pruned_or_ruled_out_grow_nothing() -> None:
    tree = star([lines([2, 3])] * 4, [[0, 0.5]] * 4)
    for rule in (AttentionForks(1, 1, 1), EarlyForks(1, 1, 1)):
        pruned, out, chosen, free = tree.leaves()
        pruned.finish, tree.unexpanded = "pruned", (out.id,)
        assert [node for node, _ in places(tree, rule)] == [chosen.id, free.id]
    assert {node for node, _ in places(tree, EntropyForks(1, 1, 1, 1, closed=None))} == {chosen.id, free.id}


def test_later_rounds_branch_the_newest_paths_only() -> None:
    tree = star([lines([2, 3, 2])], [[0, 0.5, 0.1]])
    rule = AttentionForks(1, 1, 1, distance=0, rounds=2)
    (bud,) = rule(tree)
    old = bud.node
    tree.fresh = tree.serial
    leaf = tree.graft(bud.node, bud.drop)
    leaf.tokens, leaf.finish = column(lines([1, 2, 3]), "i"), "eos"
    tree.rounds = 2
    write(marked_steps(tree, LINES))
    for node in tree.walk():
        node.signals["influence"] = column([0.0, 9, 9, 1, 1, 1] if node is leaf else [0.5] * len(node.tokens), "d")
    assert places(tree, rule) == [(leaf.id, 3)]
    assert old.id != leaf.id


def test_early_steps_are_early_and_drawn_by_the_tree() -> None:
    found = set()
    for visit in range(40):
        tree = star([lines([2] * 11)])
        tree.visit = visit
        kept = [at for _, at in places(tree, EarlyForks(1, 2, 1, early=0.5, distance=1))]
        assert kept == [at for _, at in places(tree, EarlyForks(1, 2, 1, early=0.5, distance=1))]
        assert kept == sorted(kept)
        assert max(kept) <= 10
        assert min(kept) >= 2
        assert kept[1] - kept[0] > 2, "no two neighbours"
        found.add(tuple(kept))
    assert len(found) > 3


def test_entropy_takes_the_least_expected_tokens_of_each_root() -> None:
    tree = star([[9, 3, 7, 2, 5], [1, 1, 6]])
    first, second = tree.leaves()
    assert places(tree, EntropyForks(1, 2, 1, 1, closed=None)) == [
        (first.id, 2),
        (first.id, 4),
        (second.id, 2),
        (second.id, 1),
    ]
    first.kept = [0.0, 0.0, 3.5, 0.0, 0.0]  # what truncation took off is not surprise
    assert places(tree, EntropyForks(1, 1, 1, 1, closed=None))[0] == (first.id, 4)
    assert places(tree, EntropyForks(1, 1, 1, 2, by="entropy", closed=None)) == [(first.id, 3)] * 2 + [(second.id, 1)] * 2


def test_entropy_forks_after_the_words_never_come() -> None:
    tree = star([[9, 3, 7, 2, 8], [1, 1, 6]])
    first, second = tree.leaves()
    with pytest.raises(ValueError, match="no signal 'concluded'"):
        EntropyForks(1, 2, 1, 1)(tree)
    write(marked_after(tree, holding(lambda rows: ["The ANSWER" if row == [7] else "" for row in rows], 10, ("answer",))))
    assert list(first.signals["concluded"]) == [0, 0, 0, 1, 1]
    assert places(tree, EntropyForks(1, 2, 1, 1)) == [(first.id, 2), (first.id, 1), (second.id, 2), (second.id, 1)]


def test_a_token_is_branched_at_once_and_rounds_go_on_below_each_root() -> None:
    engine = Recorder(vocab=6)
    rule = EntropyForks(2, 2, 3, 2, closed=None)
    (tree,) = asyncio.run(grow_forest([plant()], engine, rule, Sampling(12), Stop((EOS,), 12)))
    assert tree.rounds == 4
    prefixes = [request.prefix for request, _ in engine.seen]
    assert prefixes.count((1, 2)) == 2
    inner = [prefix for prefix in prefixes if len(prefix) > 2]
    assert all(inner.count(prefix) == 2 for prefix in inner)
    assert 8 < len(inner) <= 2 * 2 * 3 * 2


def test_between_sees_whole_rounds_in_order_whatever_arrives_first() -> None:
    def grown(engine) -> tuple[list, list]:
        seen: list = []

        async def between(trees: list[Tree]) -> None:
            seen.append([(tree.task.id, [leaf.tokens for leaf in tree.leaves()]) for tree in trees])
            for tree in trees:
                write(marked_steps(tree, LINES))

        trees = [plant(f"t{i}", prompt=(1, i % 4)) for i in range(6)]
        asyncio.run(
            grow_forest(trees, engine, EarlyForks(3, 2, 1, distance=1), Sampling(9), Stop((EOS,), 9), between=between)
        )
        return seen, [[leaf.tokens for leaf in tree.leaves()] for tree in trees]

    one, other = grown(Recorder(vocab=6)), grown(Shuffled(vocab=6))
    assert one == other
    assert [[name for name, _ in row] for row in one[0]] == [[f"t{i}" for i in range(6)]] * 2


def test_points_never_lie_at_the_start_and_keep_their_distance() -> None:
    dice = random.Random(0)
    for _ in range(500):
        sizes = [dice.randint(1, 9) for _ in range(dice.randint(1, 12))]
        starts, at = [], dice.randint(1, 20)
        for size in sizes:
            starts.append(at)
            at += size
        count, distance = dice.randint(1, 4), dice.choice([0, 3, 10, 512])
        scores = [dice.choice([0.0, dice.random()]) for _ in sizes]
        for steps in (
            by_score(scores, starts, at, count, 0.8, distance),
            at_random(starts, at, count, 0.5, distance, dice),
        ):
            assert len(steps) == (count if len(sizes) > 1 else 0)
            assert all(0 < k < len(sizes) for k in steps)
            assert len(set(steps)) == min(count, len(sizes) - 1) if steps else True


def test_quantile_is_exact_where_it_lands_on_a_value() -> None:
    assert quantile([float(i) for i in range(36)], 0.8) == 28.0  # 0.8 x 35 is a little more
    assert quantile([0.0, 1.0], 0.25) == 0.25
    assert threshold([0.0, 0.0, 0.0, 0.0, 0.0, 0.3, 0.2], 0.5) == 0.2
    assert threshold([0.0, 0.0], 0.8) == 0.0
    assert filled([], 1, 2) == []


def test_separators_come_from_the_text_of_every_token() -> None:
    texts = ["a", "\n", ".\n\n", "x\ny", "</think>"]
    found = separators_of(lambda rows: [texts[token] for (token,) in rows], 5, 4)
    assert found == Separators(frozenset({2}), frozenset({1, 2, 3}), 4)
    assert segment([0, 1, 0], found).starts == [0, 2]
    assert segment([0, 1, 2, 0, 4], found) == Steps([0, 3], 5, 1)
    assert segment([], found).starts == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: AttentionForks(0),
        lambda: AttentionForks(points=0),
        lambda: AttentionForks(quantile=1.1),
        lambda: EarlyForks(early=0),
        lambda: EarlyForks(distance=-1),
        lambda: EntropyForks(rounds=0),
        lambda: EntropyForks(by="luck"),
    ],
)
def test_what_makes_no_sense_is_refused(make) -> None:
    with pytest.raises(ValueError, match=r"must be at least|goes by|share of the steps|quantile must"):
        make()


def test_a_missing_signal_is_named() -> None:
    tree = plant()
    tree.add(tree.root, [1, 2, 1], Author.POLICY)
    tree.rounds = 1
    assert isinstance(tree.leaves()[0], Node)
    with pytest.raises(ValueError, match="no signal 'steps'"):
        AttentionForks()(tree)


def test_diverse_points_lie_far_apart_in_the_tree() -> None:
    """The least expected tokens first: 9 at token 8 of one path, then 8 beside it and 7, 6 elsewhere on it; 5 on a branch from token 2."""
    tree = plant()
    leaf = tree.add(tree.root, [1] * 10, Author.POLICY, finish="eos", logprobs=[-0.1] * 10, kept=[0.0] * 10)
    for at, score in ((8, 9.0), (7, 8.0), (5, 7.0), (4, 6.0)):
        leaf.logprobs[at] = -score
    branch = tree.graft(leaf, 8)
    branch.tokens, branch.logprobs, branch.kept = column([1] * 5, "i"), column([-0.1] * 3 + [-5.0, -0.1]), column([0.0] * 5)
    branch.finish = "eos"
    tree.rounds = 1
    assert places(tree, EntropyForks(1, 2, closed=None, branches=1)) == [(leaf.id, 8), (leaf.id, 7)]
    assert places(tree, EntropyForks(1, 2, closed=None, branches=1, diverse=2)) == [(leaf.id, 8), (leaf.id, 4)]
    far = places(tree, EntropyForks(1, 2, closed=None, branches=1, diverse=5))
    assert far == [(leaf.id, 8), (branch.id, 5)], "6 tokens up to where the paths part and 3 down, not |6 - 3|"
    three = places(tree, EntropyForks(1, 3, closed=None, branches=1, diverse=2))
    assert three == [(leaf.id, 8), (branch.id, 5), (leaf.id, 4)], "4 from the first as the trunk is, and less expected"
    everything = EntropyForks(1, 50, closed=None, branches=1, diverse=5)
    assert sorted(places(tree, everything)) == sorted(places(tree, EntropyForks(1, 50, closed=None, branches=1)))
    with pytest.raises(ValueError, match="diverse is how many times"):
        EntropyForks(diverse=0)
