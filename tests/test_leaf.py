"""Sums along paths and folds down the tree against walks of the tree itself; what path weights cannot go with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forests import forest
from ramulus.core.tree import Author, Tree
from ramulus.learn.advantage.baselines import Whitened
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.batch.layout import lay_out
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gauges import surrogate
from ramulus.learn.objective.leaf_weight import EntropyWeight, GeometricMean, SequenceRatio, along, fold
from ramulus.learn.objective.mask import Clip, DualClip, Everything
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.per_author import PerAuthor
from ramulus.learn.objective.reference import Behavior, Itself, Recomputed
from ramulus.learn.objective.shaped_reference import Blend, Capped, Power, Probable, Shaped
from ramulus.learn.objective.token_weight import HighEntropy, IcePop, ImportanceWeight, Product
from ramulus.learn.packing.pack import pack


def rows(seed: int, authors: tuple[Author, ...], budget: int) -> list[tuple[TreeBatch, list[list[int]]]]:
    """Packed rows of a random forest, and for each trained leaf of a row the learned tokens on its path."""
    trees: list[Tree] = forest(seed)
    mix = Mix((Term(Estimator(Everything(), Itself(), Constant()), authors),))
    credits = mix.credit(trees)
    kept = [
        {
            leaf.id
            for leaf in tree.leaves()
            if leaf.reward is not None and any(n.author in authors and n.tokens for n in leaf.line())
        }
        for tree in trees
    ]
    answer = []
    for batch, row in zip(pack(trees, credits, mix, budget, torch.float64), lay_out(trees, kept, budget), strict=True):
        where = {(tree, node.id): (start, stop) for tree, node, start, stop in row.nodes}
        paths = [
            [t for n in leaf.line() if n.author in authors for t in range(*where[tree, n.id])]
            for tree, leaf, _ in row.leaves
        ]
        answer.append((batch.term(0), paths))
    return answer


@pytest.mark.parametrize("authors", [(Author.POLICY,), (Author.EXPERT,), (Author.POLICY, Author.EXPERT)])
@pytest.mark.parametrize("budget", [0, 40])
def test_along_and_fold(authors: tuple[Author, ...], budget: int) -> None:
    generator = torch.Generator().manual_seed(1)
    seen = 0
    for seed in range(10):
        for batch, paths in rows(seed, authors, budget):
            x = torch.randn(len(batch), generator=generator, dtype=torch.float64)
            v = torch.randn(len(paths), generator=generator, dtype=torch.float64)
            want = torch.tensor([float(x[path].sum()) for path in paths], dtype=torch.float64)
            torch.testing.assert_close(along(x, batch), want, rtol=0, atol=1e-12)
            down = torch.zeros(len(batch), dtype=torch.float64)
            for k, path in enumerate(paths):
                down[path] += v[k]
            torch.testing.assert_close(fold(v, batch), down, rtol=0, atol=1e-12)
            seen += len(paths)
    assert seen > 5


def test_a_path_is_weighed_as_one() -> None:
    trees = forest(0)
    mix = Mix((Term(Estimator(Everything(), Itself(), Whitened(0.9), SequenceRatio())),))
    with pytest.raises(ValueError, match="weighs each path as one"):
        mix.credit(trees)


def test_columns_go_together() -> None:
    assert Estimator(Everything(), Itself(), GroupMean(), SequenceRatio(column="recomputed")).columns == {"recomputed"}
    assert Estimator(Everything(), Itself(), GroupMean(), EntropyWeight(0.5, -1.0)).tempered
    with pytest.raises(ValueError, match="tempered or untempered"):
        Estimator(Clip(), Itself(), GroupMean(), GeometricMean(Clip(column="recomputed")))
    with pytest.raises(ValueError, match="a term reads one column"):
        PerAuthor(Behavior(), Recomputed())
    mixed = Estimator(PerAuthor(Clip(), Everything()), PerAuthor(Behavior(), Shaped()), GroupMean())
    assert (mixed.reads(Author.POLICY), mixed.reads(Author.EXPERT)) == ({"behavior"}, set())


def test_a_demonstration_without_a_sampler_is_refused_where_one_is_read() -> None:
    trees = forest(0)
    both = (Author.POLICY, Author.EXPERT)
    for reference, fine in ((Behavior(), False), (PerAuthor(Behavior(), Shaped()), True)):
        mix = Mix((Term(Estimator(Everything(), reference, GroupMean(over="all")), both),))
        if fine:
            assert pack(trees, mix.credit(trees), mix)
        else:
            with pytest.raises(ValueError, match="has no log-probs of a sampler"):
                pack(trees, mix.credit(trees), mix)


CLIP = Clip(0.2, 0.25, "recomputed")


def path_of(batch: TreeBatch, leaf: int) -> list[int]:
    """The learned tokens above a leaf of a row."""
    token, line = int(batch.leaf_token[leaf]), []
    while True:
        line += [token] if batch.leaves[token] > 0 else []
        above = int(batch.parent[token])
        if above == token or above < 0:
            return line
        token = above


def by_path(leaf: SequenceRatio | GeometricMean, logp: Tensor, batch: TreeBatch, factor: Tensor) -> Tensor:
    """GSPO-token and its like for GMPO: each token holds its path's ratio, whose gradient there is the token's own, times a constant."""
    assert batch.recomputed is not None
    total = logp.new_zeros(())
    for k in range(len(batch.leaf_token)):
        path, credit = path_of(batch, k), float(batch.leaf_weight[k] * batch.leaf_credit[k])
        sign = 1 if credit > 0 else -1
        if isinstance(leaf, GeometricMean):
            apart = CLIP.clamp(sign, logp, logp, batch) - batch.recomputed
            ratio = apart[path].mean().detach().exp() * (apart[path] - apart[path].detach()).exp()
        else:
            ratio = (logp - batch.recomputed)[path].mean().detach().exp() * (logp[path] - logp[path].detach()).exp()
            ratio = ratio.clamp(max=1 + leaf.high) if sign > 0 else ratio.clamp(min=1 - leaf.low)
        total = total - credit * (factor[path] * ratio).sum()
    return total


@pytest.mark.parametrize(
    ("mask", "known"),
    [
        (None, True),
        (IcePop(0.9, 1.2), True),
        (IcePop(0.999, 1.001), True),
        (ImportanceWeight(1.5), True),
        (HighEntropy(0.4), True),
        (HighEntropy(0.4, rescale=True), True),
        (Product((ImportanceWeight(2.0), HighEntropy(0.5))), True),
        (lambda sign, logp, entropy, batch: (batch.entropy > 1).to(logp.dtype), False),  # says nothing of its textbook loss
    ],
)
@pytest.mark.parametrize("leaf", [SequenceRatio(0.2, 0.1, "recomputed"), GeometricMean(CLIP)], ids=["gspo", "gmpo"])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_of_one_ratio_a_path_is_weighed_as_its_gradient(seed: int, leaf: SequenceRatio | GeometricMean, mask, known: bool) -> None:
    own = CLIP if isinstance(leaf, GeometricMean) else Everything()
    rule = Estimator(own if mask is None else Product((own, mask)), Itself(), GroupMean(), leaf, recomputed_tempered=True)
    trees, mix = forest(seed), Mix((Term(rule),))
    (row,) = pack(trees, mix.credit(trees), mix, 0, torch.float64)
    batch, generator = mix.term(row, 0), torch.Generator().manual_seed(seed)
    assert batch.recomputed is not None
    logp = (batch.recomputed + 0.3 * torch.randn(len(row), generator=generator, dtype=torch.float64)).requires_grad_()
    answer = surrogate(mix, logp, logp, row.entropy, row)
    if not known:
        assert answer is None
        return
    factor = torch.ones_like(logp) if mask is None else mask(1, logp, row.entropy, batch)
    want = by_path(leaf, logp, batch, factor.detach())
    assert answer == pytest.approx(want.item(), rel=1e-10, abs=1e-12)
    (theirs,), (ours,) = (torch.autograd.grad(loss, logp) for loss in (want, mix.loss(logp, logp, row.entropy, row)))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert (answer == 0) == (not bool(factor[batch.leaves > 0].any()))


SPARING = PerAuthor(Clip(), Everything())  # reads nothing at demonstrations


@pytest.mark.parametrize(
    ("mask", "fine"),
    [
        (Product((SPARING, Everything())), True),
        (Product((Everything(), SPARING)), True),
        (Product((Product((SPARING,)), Probable())), True),
        (PerAuthor(Product((Clip(), Everything())), SPARING), True),
        (PerAuthor(Clip(), Product((SPARING, Probable()))), True),
        (Product((SPARING, Clip())), False),
        (Product((Everything(), DualClip())), False),
        (PerAuthor(Everything(), Product((Everything(), Clip()))), False),
        (PerAuthor(SPARING, PerAuthor(Everything(), Clip())), False),
    ],
)
def test_nested_masks_read_a_sampler_where_one_inside_does(mask: Product | PerAuthor, fine: bool) -> None:
    trees = forest(0)
    estimator = Estimator(mask, Itself(), GroupMean(over="all"))
    mix = Mix((Term(estimator, (Author.POLICY, Author.EXPERT)),))
    assert estimator.reads(Author.EXPERT) == (set() if fine else {"behavior"})
    if fine:
        assert estimator.reads(Author.POLICY) == {"behavior"} == mix.columns
        assert pack(trees, mix.credit(trees), mix)
    else:
        with pytest.raises(ValueError, match="has no log-probs of a sampler"):
            pack(trees, mix.credit(trees), mix)


@pytest.mark.parametrize(
    "reference",
    [
        Shaped(0.1),
        Shaped(0.3, "behavior"),
        Power(0.5),
        Power(0.3, "recomputed"),
        Blend(0.1, 1.0),
        Blend(0.7, 0.0, "behavior"),
    ],
)
def test_a_reference_is_the_slope_of_its_potential(reference) -> None:
    batch = rows(2, (Author.POLICY,), 0)[0][0]
    batch.recomputed = batch.behavior - 0.2
    logp = (batch.behavior - 0.3).clone().requires_grad_()
    (slope,) = torch.autograd.grad(reference.potential(logp, batch).sum(), logp)
    torch.testing.assert_close((logp - reference(logp, batch)).exp(), slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Shaped(0.0), "gamma"),
        (lambda: Shaped(0.1, "reference_model"), "column"),
        (lambda: Power(0.0), "exponent"),
        (lambda: Blend(0.0, 0.0), "weights"),
        (lambda: Capped(high=-0.1), "Capped"),
        (lambda: Probable(0.5, 0.2), "Probable"),
        (lambda: SequenceRatio(low=1.0), "low"),
    ],
)
def test_values_are_checked(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
