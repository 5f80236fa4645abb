"""The entropy signal and what it drives; factors of tokens and their products; the statistics of a step."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forests import flatten, forest
from methods import METHODS
from ramulus.core.share import at_least, at_most
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree, column
from ramulus.learn.advantage.entropy_advantage import ClipCov, Covarying, EntropyAdvantage
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.advantage.subgroup import learned
from ramulus.learn.advantage.token_group import TokenGroupMean
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.entropy_signal import (
    RANKS,
    AdaptiveClip,
    EntropySignal,
    Redistribution,
    flattened,
    quantiles,
)
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gate import Even, Switch, demonstrated
from ramulus.learn.objective.mask import Clip, DualClip, Everything
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.per_author import PerAuthor
from ramulus.learn.objective.reference import Behavior, Itself, Recomputed
from ramulus.learn.objective.token_weight import HighEntropy, ImportanceWeight, Product
from ramulus.learn.packing.pack import pack
from ramulus.learn.packing.weights import select

ENTROPY = st.floats(0, 8, allow_subnormal=False)
SIGNALS = [EntropySignal(), EntropySignal(signed=False), EntropySignal(scale="rank"), EntropySignal(0.5, scale="rank")]


def stats_of(signal: EntropySignal, entropy: list[float]) -> dict[str, float]:
    return signal.statistics(np.array(entropy), np.ones(len(entropy), dtype=np.int64))


def h_of(signal: EntropySignal, step: list[float], now: list[float] | None = None) -> torch.Tensor:
    return signal(torch.tensor(step if now is None else now, dtype=torch.float64), stats_of(signal, step))


@pytest.mark.parametrize("signal", SIGNALS, ids=str)
@given(step=st.lists(ENTROPY, min_size=1, max_size=30), now=st.lists(ENTROPY, min_size=1, max_size=30))
def test_a_signal_rises_with_entropy_within_its_bounds(
    signal: EntropySignal, step: list[float], now: list[float]
) -> None:
    h = h_of(signal, step, sorted(now))
    assert bool((h >= (-1 if signal.signed else 0)).all())
    assert bool((h <= 1).all())
    if signal.signed:
        assert bool((h.diff() >= -1e-12).all())


def test_the_signal_of_a_known_step() -> None:
    step = [float(np.exp(x)) for x in (-4.0, -3.0, -2.0, -1.0, 0.0, 2.0)]
    signal = EntropySignal(0.6)  # the pivot is rank round(0.6 * 5) = 3: -1
    assert h_of(signal, step).tolist() == pytest.approx([-1, -2 / 3, -1 / 3, 0, 1 / 3, 1])
    assert h_of(replace(signal, signed=False), step).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0, 1 / 3, 1])


def test_ranks_are_shares_of_the_tokens() -> None:
    step = [i / 1000 for i in range(1, 1001)]
    h = h_of(EntropySignal(scale="rank"), step, [0.4, 0.8, 0.9, 0.0001, 5.0])
    assert h.tolist() == pytest.approx([-0.5, 0.0, 0.5, -1.0, 1.0], abs=0.02)


def test_tied_ranks_lie_in_the_middle() -> None:
    """Half of the tokens have entropy 0, as in bfloat16: they share the rank 1/4."""
    h = h_of(EntropySignal(0.5, scale="rank"), [0.0] * 500 + [1 + i / 1000 for i in range(500)], [0.0, 1e-12, 1.2505])
    assert h.tolist() == pytest.approx([-0.5, -0.5, 0.5], abs=0.02)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1e6), st.integers(50, 400), st.floats(0.1, 3))
def test_no_single_token_rescales_the_ranks(seed: int, outlier: float, size: int, spread: float) -> None:
    """Whatever one token does, the signal of each of the others moves by less than two tokens and one quantile."""
    signal, step = (
        EntropySignal(scale="rank"),
        np.exp(spread * np.random.default_rng(seed).standard_normal(size)).tolist(),
    )
    apart = (h_of(signal, step, step[1:]) - h_of(signal, [outlier, *step[1:]], step[1:])).abs().max()
    assert float(apart) <= (2 / size + 1 / RANKS) / 0.2


def test_a_single_token_rescales_the_extremes() -> None:
    """Why there are ranks: one wild token takes most of the signal from all the others."""
    step = [0.5 + i / 100 for i in range(100)]
    wild = [*step[:-1], 1e6]
    inside = [x for x in step if x > step[80]][:-1]
    plain, spoilt = (h_of(EntropySignal(), s, inside) for s in (step, wild))
    assert float(plain.max()) > 0.9
    assert float(spoilt.max()) < 0.05
    ranks, after = (h_of(EntropySignal(scale="rank"), s, inside) for s in (step, wild))
    assert float((ranks - after).abs().max()) < 0.06


@pytest.mark.parametrize("seed", range(4))
def test_statistics_are_those_of_the_flattened_rows(seed: int) -> None:
    trees = forest(seed, tempered=True)
    credits = GroupMean()(trees)
    entropy, counts = flattened(trees, [credit.trained() for credit in credits])
    rows = [row for row in flatten(trees) if row.leaf.id in credits[row.tree].trained()]
    nodes = [{node.id: node for node in tree.walk()} for tree in trees]
    flat = [
        nodes[t][n].entropy[k]
        for row in rows
        for (t, n, k), author in zip(row.spots, row.authors, strict=True)
        if author is Author.POLICY
    ]
    assert counts.max() > 1
    assert sorted(np.repeat(entropy, counts)) == sorted(flat)
    shares = [0, 0.2, 0.5, 0.8, 0.99, 1]
    assert quantiles(entropy, counts, shares) == [sorted(flat)[round(share * (len(flat) - 1))] for share in shares]


@pytest.mark.parametrize("name", ["hapo", "hapo_ranks", "forking_tokens", "clip_cov"])
def test_minibatches_and_rows_share_the_numbers_of_the_step(name: str) -> None:
    """Parts of the forest, packed with its statistics, give the gradient of the whole up to the denominators."""
    trees, mix = forest(7, trees=4, tempered=True), METHODS[name].mix
    credits = mix.credit(trees)
    stats = mix.measure(trees, select(trees, credits, mix).terms)
    part = pack(trees[:2], [c[:2] for c in credits], mix, 0, torch.float64, stats)
    assert all(stats.items() <= batch.stats.items() for batch in part)
    alone = mix.measure(trees[:2], select(trees[:2], [c[:2] for c in credits], mix).terms)
    assert (alone != stats) == (name != "clip_cov"), "statistics of a part are others"
    cut = pack(trees, credits, mix, max(len(leaf.prefix()) for tree in trees for leaf in tree.leaves()), torch.float64)
    assert len(cut) > 1
    assert all(stats.items() <= batch.stats.items() for batch in cut)


def test_each_term_finds_its_own_numbers() -> None:
    trees = forest(2)
    terms = [Term(Estimator(HighEntropy(share), Behavior(), GroupMean())) for share in (0.2, 0.5)]
    mix = Mix((terms[0], Term(Estimator(Clip(), Behavior(), GroupMean())), terms[1]))
    (batch,) = pack(trees, mix.credit(trees), mix)
    assert set(batch.term(0).stats) == {"forks/0.2/threshold", "forks/0.2/share"}
    assert batch.term(1).stats == {}
    assert set(batch.term(2).stats) == {"forks/0.5/threshold", "forks/0.5/share"}


def measured(mix: Mix, trees: list[Tree]) -> dict[str, float]:
    """The numbers of a step whose gates are asked."""
    return mix.measure(trees, select(trees, mix.credit(trees), mix, mix.gates(trees, {})[0]).terms)


def test_leaves_that_a_gate_closes_are_not_counted() -> None:
    trees = forest(4)
    term = Term(Estimator(HighEntropy(), Behavior(), GroupMean()))
    plain, even, switched = Mix((term,)), Mix((term,), gate=Even()), Mix((term,), gate=Switch(threshold=1.0))
    found = [measured(mix, trees) for mix in (even, switched)]
    shut = measured(plain, trees[2:])
    assert found[0] == measured(plain, trees)
    assert found[1] == shut, "only the tree without a demonstration is left"


def test_a_token_without_entropy_is_refused() -> None:
    tree = Tree.plant(Task("a", (1,), ""))
    leaf = tree.add(tree.root, [2, 3], Author.POLICY, finish="eos", reward=1.0)
    with pytest.raises(ValueError, match="no recorded entropies"):
        EntropySignal().measure([tree], [{leaf.id}])


@pytest.mark.parametrize("signal", [EntropySignal(), EntropySignal(scale="rank"), EntropySignal(0.5, signed=False)])
@pytest.mark.parametrize("kind", [AdaptiveClip, Redistribution])
def test_a_step_of_demonstrations_alone_is_learned(kind: type, signal: EntropySignal) -> None:
    """A gate may close every rollout of a step: then there is no entropy to measure, and none of their tokens is asked about."""
    policy = Term(Estimator(kind(signal=signal), Recomputed(), GroupMean()))
    shown = Term(Estimator(Everything(), Itself(), Constant()), authors=(Author.EXPERT,))
    mix = Mix((policy, shown), gate=Switch(threshold=1.0))
    trees = [tree for tree in forest(4) if demonstrated(tree)]
    gates, _ = mix.gates(trees, {})
    batches = pack(trees, mix.credit(trees), mix, gates=gates)
    assert batches
    for batch in batches:
        logp = torch.full((len(batch),), -1.0, dtype=torch.float64, requires_grad=True)
        mix.loss(logp, logp, batch.entropy, batch).backward()
        assert logp.grad is not None
        assert not logp.grad[batch.author == int(Author.POLICY)].any()
        assert logp.grad[batch.author == int(Author.EXPERT)].any()


@pytest.mark.parametrize("mask", [AdaptiveClip(), Redistribution(), HighEntropy()])
def test_a_batch_without_statistics_is_refused(mask: object) -> None:
    trees = forest(1)
    mix = Mix((Term(Estimator(Everything(), Recomputed(), GroupMean())),))
    (batch,) = pack(trees, mix.credit(trees), mix)
    with pytest.raises(ValueError, match="no statistics"):
        mask(1, batch.recomputed, batch.entropy, batch.term(0))  # type: ignore[operator]


def hapo_batch(mask: object, seed: int = 0) -> TreeBatch:
    trees = forest(seed, tempered=True)
    mix = Mix((Term(Estimator(mask, Recomputed(), GroupMean())),))
    return pack(trees, mix.credit(trees), mix, dtype=torch.float64)[0].term(0)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_adaptive_clip_of_alpha_0_is_the_clip(sign: int) -> None:
    batch = hapo_batch(AdaptiveClip())
    logp = batch.recomputed + torch.randn(len(batch), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    both = AdaptiveClip(0.2, 0.3, 0.0, 1.5), DualClip(0.2, 0.3, 1.5, "recomputed")
    one, other = (mask(sign, logp, batch.entropy, batch) for mask in both)
    assert torch.equal(one, other)
    assert 0 < float(one.mean()) < 1
    one, other = (mask.clamp(sign, logp, batch.entropy, batch) for mask in both)
    assert torch.allclose(one, other, rtol=1e-14)


def test_low_entropy_widens_the_left_side_and_high_entropy_the_right_one() -> None:
    clip = AdaptiveClip(0.2, 0.3)
    batch = hapo_batch(clip)
    h = clip.signal(batch.entropy, batch.stats)
    for ratio, sign, want in ((1.45, 1, h > 0.5), (0.65, -1, h < -0.75)):
        logp = batch.recomputed + np.log(ratio)
        assert torch.equal(clip(sign, logp, batch.entropy, batch) > 0, want)
        assert 0 < float(want.double().mean()) < 1


def test_on_policy_only_the_sure_tokens_shrink() -> None:
    """At ratio 1 every token is in the neutral zone: high entropy is left alone, and the released signal does nothing."""
    for signal in (EntropySignal(), EntropySignal(signed=False)):
        share = Redistribution(signal=signal)
        batch = hapo_batch(share)
        h = signal(batch.entropy, batch.stats)
        factor = share(1, batch.recomputed, batch.entropy, batch)
        assert torch.allclose(factor, 1 + h.clamp(max=0))
        assert (float(factor.min()) < 0.1) == signal.signed
        assert bool((factor >= 0).all())


def test_the_importance_weight_is_capped_and_1_where_nothing_was_sampled() -> None:
    batch = hapo_batch(ImportanceWeight(1.5))
    weight = ImportanceWeight(1.5)(1, batch.recomputed, batch.entropy, batch)
    policy = batch.author == int(Author.POLICY)
    want = (batch.recomputed - batch.behavior).exp().clamp(max=1.5)
    assert torch.allclose(weight[policy], want[policy])
    assert float(weight.max()) == 1.5
    assert float(weight[policy].min()) < 0.5
    assert bool((weight[~policy] == 1).all())
    assert bool((~policy).any())


def test_a_product_is_of_one_column() -> None:
    with pytest.raises(ValueError, match="against one column"):
        Product((Clip(column="behavior"), ImportanceWeight()))
    with pytest.raises(ValueError, match="against one column"):
        Product(())
    assert Product((HighEntropy(),)).column is None
    assert Product((HighEntropy(), Clip(column="recomputed"))).column == "recomputed"
    with pytest.raises(ValueError, match="tempered or untempered as a whole"):
        Estimator(Product((ImportanceWeight(),)), Behavior(), GroupMean())


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_forking_tokens_are_a_share_of_the_flattened_tokens(share: float) -> None:
    batch = hapo_batch(HighEntropy(share))
    chosen = HighEntropy(share)(1, batch.recomputed, batch.entropy, batch)
    trained = batch.leaves * (batch.author == int(Author.POLICY))
    got = float((chosen * trained).sum() / trained.sum())
    assert got == pytest.approx(batch.stats[f"forks/{share:g}/share"])
    assert share <= got < share + 0.1
    rescaled = HighEntropy(share, rescale=True)(1, batch.recomputed, batch.entropy, batch)
    assert float((rescaled * trained).sum()) == pytest.approx(float(trained.sum()))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("authors", [(Author.EXPERT,), (Author.POLICY, Author.EXPERT)])
def test_forking_tokens_leave_demonstrations_as_they_are(authors: tuple[Author, ...], share: float, rescale: bool) -> None:
    trees, rule = forest(0, tempered=True), HighEntropy(share, rescale)
    for mask in (rule, Product((rule, Everything())), PerAuthor(rule, rule)):
        mix = Mix((Term(Estimator(mask, Itself(), GroupMean(over="all")), authors),))
        batch = pack(trees, mix.credit(trees), mix, dtype=torch.float64)[0].term(0)
        weight = mask(1, batch.behavior, batch.entropy, batch)
        policy = batch.author == int(Author.POLICY)
        assert bool((batch.leaves[batch.author == int(Author.EXPERT)] > 0).any())
        assert bool((weight[~policy] == 1).all())
        assert mask.factor(1, batch.behavior, batch.entropy, batch).equal(weight)
        sampled = batch.leaves * policy
        size = float((weight * sampled).sum())
        assert size == pytest.approx(float(sampled.sum())) if rescale else size <= float(sampled.sum())


@pytest.mark.parametrize("mask", [HighEntropy(), HighEntropy(1.0, rescale=True), Product((Everything(), HighEntropy(0.5)))])
def test_a_step_of_nothing_but_demonstrations_has_forking_tokens_too(mask: object) -> None:
    trees = [tree for tree in forest(4, tempered=True) if demonstrated(tree)]
    shown = Term(Estimator(Everything(), Itself(), Constant(over="expert")), (Author.EXPERT,))
    mix = Mix((Term(Estimator(mask, Itself(), GroupMean())), shown), gate=Switch(threshold=1.0))
    (batch,) = pack(trees, mix.credit(trees), mix, gates=mix.gates(trees, {})[0])
    assert not bool((batch.leaves[0] > 0).any())
    logp = torch.zeros(len(batch), requires_grad=True)
    mix.loss(logp, logp, batch.entropy, batch).backward()
    torch.testing.assert_close(-logp.grad, batch.weight[1])


TAKEN = [(0.2, 10, 2), (0.2, 11, 3), (0.1, 100, 10), (0.5, 3, 2), (0.07, 100, 7), (1.0, 5, 5), (0.01, 5, 1)]
BOUNDS = [(0.29, 100, 29, 29), (1.1, 50, 55, 55), (0.07, 100, 7, 7), (0.2, 11, 3, 2), (1e-4, 10, 1, 0)]


@pytest.mark.parametrize(("share", "count", "taken"), TAKEN)
def test_a_share_of_the_tokens_is_counted_exactly(share: float, count: int, taken: int) -> None:
    tree = Tree.plant(Task("q", (1,), ""))
    entropy = [0.1 + 0.013 * ((7 * i) % count) for i in range(count)]
    leaf = tree.add(tree.root, [2] * count, Author.POLICY, finish="eos", reward=1.0, logprobs=[-1.0] * count, entropy=column(entropy))
    stats = HighEntropy(share).measure([tree], [{leaf.id}])
    assert sum(x >= stats[f"forks/{share:g}/threshold"] for x in leaf.entropy) == taken
    assert stats[f"forks/{share:g}/share"] == taken / count


@pytest.mark.parametrize(("share", "count", "least", "most"), BOUNDS)
def test_shares_are_those_that_are_written(share: float, count: int, least: int, most: int) -> None:
    """0.29 x 100 is a little below 29 in floating point, 1.1 x 50 a little above 55."""
    assert (at_least(share, count), at_most(share, count)) == (least, most)


@pytest.mark.parametrize("share", [0.29, 0.5, 1.0])
def test_kl_cov_holds_exactly_a_share(share: float) -> None:
    tree = Tree.plant(Task("q", (1,), ""))
    for i, reward in enumerate((0.0, 1.0)):
        logprobs = column([-0.1 - 0.017 * ((13 * k + i) % 50) for k in range(50)])
        tree.add(tree.root, [2] * 50, Author.POLICY, finish="eos", reward=reward, logprobs=logprobs, kept=[0.0] * 50)
    (credit,) = Covarying(share=share, value=-1.0)([tree])
    assert sum(x for row in credit.token.values() for x in row) == -round(100 * share)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EntropySignal(1.2), "pivot"),
        (lambda: EntropySignal(eps=0), "eps"),
        (lambda: EntropySignal(scale="median"), "scale"),
        (lambda: AdaptiveClip(low=0.5), "alpha"),
        (lambda: AdaptiveClip(ceiling=1.0), "ceiling"),
        (lambda: AdaptiveClip(column="reference_model"), "column"),
        (lambda: Redistribution(2.0), "beta"),
        (lambda: HighEntropy(0), "share"),
        (lambda: ImportanceWeight(0.5), "cap"),
        (lambda: EntropyAdvantage(kappa=1.0), "kappa"),
        (lambda: ClipCov(share=0), "share"),
        (lambda: ClipCov(low=5, high=1), "low < high"),
        (lambda: TokenGroupMean(fallback=0), "fallback"),
    ],
)
def test_what_cannot_be(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("seed", range(6))
def test_the_group_average_is_over_flattened_tokens(seed: int) -> None:
    """Credit sums to 0, and its squares to 1, over a tree's tokens when a shared one counts once for each leaf below it; not otherwise."""
    trees, apart = forest(seed), 0.0
    for tree, credit in zip(trees, TokenGroupMean()(trees), strict=True):
        leaves = [leaf for leaf in tree.leaves() if leaf.id in credit.leaf and learned(leaf)]
        values, counts = [credit.leaf[leaf.id] for leaf in leaves], [learned(leaf) for leaf in leaves]
        assert sum(v * n for v, n in zip(values, counts, strict=True)) == pytest.approx(0, abs=1e-9)
        if len({leaf.reward for leaf in leaves}) > 1:
            square = sum(v * v * n for v, n in zip(values, counts, strict=True)) / sum(counts)
            assert square == pytest.approx(1, abs=1e-4)
            apart = max(apart, abs(sum(values)))
    assert apart > 1e-6, "the mean over paths is another"


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(1, 9)), min_size=2, max_size=8))
def test_binary_credit_is_that_of_the_share_of_right_tokens(paths: list[tuple[float, int]]) -> None:
    tree = Tree.plant(Task("a", (1,), ""))
    leaves = [tree.add(tree.root, [2] * n, Author.POLICY, finish="eos", reward=r) for r, n in paths]
    f = sum(r * n for r, n in paths) / sum(n for _, n in paths)
    (credit,) = TokenGroupMean(eps=1e-12)([tree])
    for leaf, (r, _) in zip(leaves, paths, strict=True):
        want = 0.0 if f in (0, 1) else ((1 - f) / f) ** 0.5 if r else -((f / (1 - f)) ** 0.5)
        assert credit.leaf[leaf.id] == pytest.approx(want, abs=1e-6)


def test_the_entropy_bonus_never_turns_credit_around() -> None:
    trees = forest(3)
    for plain, raised in zip(GroupMean()(trees), EntropyAdvantage(alpha=100.0)(trees), strict=True):
        for leaf, value in plain.leaf.items():
            for token in raised.token[leaf]:
                assert value <= token <= value + abs(value) / 2
                assert (token > 0) == (value > 0)


def test_clip_cov_silences_a_few_tokens_the_same_ones_each_time() -> None:
    trees = forest(3)
    rule = ClipCov(share=0.05, low=0.2, high=2.0)
    plain, cut = GroupMean()(trees), rule(trees)
    assert cut == rule(trees)
    state = random.getstate()
    rule(trees)
    assert random.getstate() == state, "it draws from nobody else's numbers"
    pairs = [(v, t) for p, c in zip(plain, cut, strict=True) for leaf, v in p.leaf.items() for t in c.token[leaf]]
    silenced = [v for v, t in pairs if t != v]
    assert all(t in (v, 0.0) for v, t in pairs)
    assert len(silenced) == int(0.05 * len(pairs))
    assert all(v != 0 for v in silenced)
