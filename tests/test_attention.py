"""Tree attention: every way of computing it answers what a softmax over each token's ancestors answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from engines import KERNELS
from forests import forest
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.learn.attention import kernels as compiled
from ramulus.learn.attention.runs import PathByPath, runs
from ramulus.learn.attention.tree_attention import TreePlan, attending, block_mask, plan, tree_attention, visible
from ramulus.learn.batch.layout import Layout, lay_out

HEADS, KV_HEADS, SIZE = 4, 2, 8


def columns(row: Layout) -> tuple[Tensor, Tensor]:
    """parent and end [T] of a row."""
    return torch.tensor(row.parent), torch.from_numpy(row.spread(row.ends, np.int64))


def branched(*levels: tuple[int, int], prompt: int = 3) -> Layout:
    """A row of one regular tree: (children, tokens) of each level."""
    tree = Tree.plant(Task("regular", tuple(range(prompt)), ""))
    nodes = [tree.root]
    for children, tokens in levels:
        nodes = [tree.add(node, [1] * tokens, Author.POLICY) for node in nodes for _ in range(children)]
    return lay_out([tree])[0]


def rows() -> list[tuple[str, Layout]]:
    """Rows of many shapes: random forests, regular trees, chains, stars, long runs."""
    made = [(f"random {seed}", lay_out(forest(seed, trees=1 + seed % 4))[0]) for seed in range(12)]
    made += [
        ("star", branched((16, 5))),
        ("binary", branched((2, 3), (2, 2), (2, 7), (2, 1))),
        ("one path", branched((1, 40))),
    ]
    made += [
        ("long runs", branched((2, 286), (1, 4), (2, 257), prompt=200)),
        ("forest of paths", lay_out(paths(7))[0]),
    ]
    return made


def paths(count: int) -> list[Tree]:
    """Trees without a branch, of many lengths: ordinary packing."""
    rng, trees = random.Random(count), []
    for index in range(count):
        trees.append(Tree.plant(Task(f"p{index}", tuple(range(1 + rng.randrange(5))), "")))
        trees[-1].add(trees[-1].root, [1] * rng.randrange(1, 60), Author.EXPERT)
    return trees


ROWS = rows()


def ancestors(parent: Tensor) -> Tensor:
    """[T, T] bool: what its parent sees, and itself; an independent statement of who sees whom."""
    seen = torch.eye(len(parent), dtype=torch.bool)
    for token, above in enumerate(parent.tolist()):
        if above != token:
            seen[token] |= seen[above]
    return seen


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random queries, keys and values [1, H, T, D]."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, h, tokens, SIZE) for h in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def softmax(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Attention spelled out, [1, T, H, D]."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) / SIZE**0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def answer(way: TreePlan, tensors: list[Tensor], wanted: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of one way."""
    out, _ = tree_attention(nn.Identity(), *tensors, tree=way)
    return out, list(torch.autograd.grad(out, tensors, wanted))


@pytest.mark.parametrize(("name", "row"), ROWS[:15], ids=[name for name, _ in ROWS[:15]])
def test_ends_say_who_sees_whom(name: str, row: Layout) -> None:
    parent, end = columns(row)
    assert torch.equal(visible(end), ancestors(parent))


@pytest.mark.parametrize("way", [pytest.param("stack", marks=KERNELS), "dense", "paths"])
@pytest.mark.parametrize(("name", "row"), ROWS, ids=[name for name, _ in ROWS])
def test_ways_agree(name: str, row: Layout, way: str) -> None:
    parent, end = columns(row)
    tensors, wanted = inputs(len(parent)), torch.randn(1, len(parent), HEADS, SIZE, dtype=torch.float64)
    expected = softmax(*tensors, visible(end))
    gradients = torch.autograd.grad(expected, tensors, wanted)
    out, got = answer(plan(parent, end, torch.float64, way), tensors, wanted)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(got, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_causal_mask_would_be_noticed() -> None:
    parent, end = columns(ROWS[13][1])
    tensors = inputs(len(parent))
    causal = torch.ones(len(parent), len(parent), dtype=torch.bool).tril()
    out, _ = tree_attention(nn.Identity(), *tensors, tree=plan(parent, end, torch.float64))
    assert (out - softmax(*tensors, causal)).abs().max() > 0.1


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[name for name, _ in ROWS])
def test_flex_agrees_forward(name: str, row: Layout) -> None:
    parent, end = columns(row)
    way = plan(parent, end, torch.float32, "flex")
    tensors = [x.detach() for x in inputs(way.length, torch.float32)]
    with torch.no_grad():
        out, _ = tree_attention(nn.Identity(), *tensors, tree=way)
        expected = softmax(*(x[:, :, : len(parent)] for x in tensors), visible(end))
    torch.testing.assert_close(out[:, : len(parent)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "levels", [[(3, 200), (2, 150)], [(16, 40)], [(1, 500)], [(2, 64), (2, 64), (2, 64), (2, 128)]]
)
def test_block_mask_is_torch_s_own(levels: list[tuple[int, int]]) -> None:
    _, end = columns(branched(*levels))
    length, ours = block_mask(end)
    padded = torch.cat([end, torch.arange(len(end), length) + 1])
    theirs = create_block_mask(lambda b, h, q, k: (k <= q) & (q < padded[k]), None, None, length, length, device="cpu")
    for count, index in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
    ):
        n = getattr(theirs, count)[0, 0]
        assert torch.equal(getattr(ours, count)[0, 0], n)
        for tile, many in enumerate(n.tolist()):
            assert torch.equal(getattr(ours, index)[0, 0, tile, :many], getattr(theirs, index)[0, 0, tile, :many])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("levels", [[(3, 200), (2, 150)], [(16, 40)]])
def test_flex_forward_and_backward_on_cuda(levels: list[tuple[int, int]]) -> None:
    parent, end = columns(branched(*levels))
    way = plan(parent.cuda(), end.cuda(), torch.float32)
    assert way.blocks is not None
    tensors = [
        torch.randn(1, h, way.length, 64, device="cuda", requires_grad=True) for h in (HEADS, KV_HEADS, KV_HEADS)
    ]
    wanted = torch.randn(1, way.length, HEADS, 64, device="cuda")
    wanted[:, len(parent) :] = 0
    out, got = answer(way, tensors, wanted)
    padded = torch.cat([end, torch.arange(len(end), way.length) + 1]).cuda()
    dense, expected = answer(
        TreePlan(way.length, way.depth, padded.device, torch.float32, mask=plan(padded * 0, padded, way="dense").mask), tensors, wanted
    )
    torch.testing.assert_close(out[:, : len(parent)], dense[:, : len(parent)], rtol=1e-3, atol=2e-3)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-3)


def test_runs_know_their_paths() -> None:
    for _, row in ROWS:
        parent, end = columns(row)
        found, above = runs(parent.numpy(), end.numpy()), ancestors(parent)
        assert np.array_equal(np.append(found.start[1:], len(parent)), found.stop)
        for run in range(len(found)):
            path = [t for start, stop in found.path(run) for t in range(start, stop)]
            assert path == above[found.stop[run] - 1].nonzero()[:, 0].tolist()
            assert len(path) == found.before[run] + found.length[run]


def test_without_kernels_cost_grows_with_paths_not_with_the_square_of_the_tree() -> None:
    held = {}
    for children in (8, 64):
        way = plan(*columns(branched((children, 50))), way="paths")
        assert isinstance(way.paths, PathByPath)
        held[children] = sum(q * k for q, k in zip(way.paths.queries, way.paths.keys, strict=True)) + way.paths.mask.numel()
    assert held[64] < 10 * held[8]


def test_a_path_alone_needs_no_mask() -> None:
    way = plan(*columns(branched((1, 5000))), way="paths")
    assert isinstance(way.paths, PathByPath)
    assert (way.paths.queries, way.paths.mask.numel()) == ([5003], 0)


def test_without_kernels_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, end = columns(branched((2, 3), (2, 2), (2, 2)))
    monkeypatch.setenv("RAMULUS_NATIVE", "0")
    compiled.warn.cache_clear()
    with pytest.warns(UserWarning, match="slower than its kernels: RAMULUS_NATIVE=0") as told:
        assert [plan(parent, end).mask is None for _ in range(3)] == [False] * 3
    assert len(told) == 1


class Odd(nn.Identity):
    """A module that wants something of its attention."""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"attention_mask": torch.ones(1, 1, 1, 1)}, "attention mask"),
        ({"tree": None}, "without a plan"),
    ],
)
def test_what_the_tree_cannot_give_is_refused(options: dict, words: str) -> None:
    parent, end = columns(branched((2, 3)))
    call = {"tree": plan(parent, end), **options}
    with pytest.raises(ValueError, match=words):
        tree_attention(Odd(), *inputs(len(parent)), **call)


VARIANTS = {
    "window": {"sliding_window": 4},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": torch.linspace(-1, 1, HEADS, dtype=torch.float64)},
    "all": {"sliding_window": 3, "softcap": 1.5, "s_aux": torch.linspace(-1, 1, HEADS, dtype=torch.float64)},
}


def variants_of_rows() -> Iterator[Any]:
    """Every row by every way with every option; the longest with all of them at once where there is time."""
    for name, row in ROWS[9:18]:
        for way in ("stack", "dense", "paths"):
            for option, options in VARIANTS.items():
                marks = [*([KERNELS] if way == "stack" else []), *([pytest.mark.slow] if name == "long runs" and option != "all" else [])]
                yield pytest.param(name, row, way, options, id=f"{name}-{way}-{option}", marks=marks)


@pytest.mark.parametrize(("name", "row", "way", "options"), variants_of_rows())
def test_variants_on_a_tree_are_those_of_each_path_alone(name: str, row: Layout, way: str, options: dict) -> None:
    """A window counts the tokens of a path, not those of the row; soft caps come before the softmax, sinks into its sum."""
    parent, end = columns(row)
    seen = ancestors(parent)
    tensors, wanted = inputs(len(parent)), torch.randn(1, len(parent), HEADS, SIZE, dtype=torch.float64)
    query, key, value = tensors
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / SIZE**0.5
    if "softcap" in options:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    depth = seen.sum(1)
    near = depth[:, None] - depth[None] < options.get("sliding_window", len(parent))
    scores = scores.masked_fill(~(seen & near), -torch.inf)
    sinks = options.get("s_aux", torch.full((HEADS,), -torch.inf, dtype=torch.float64))
    share = torch.cat((scores, sinks.view(1, HEADS, 1, 1).expand(-1, -1, len(parent), 1)), -1).softmax(-1)[..., :-1]
    expected = (share @ value).transpose(1, 2)
    gradients = torch.autograd.grad(expected, tensors, wanted)
    out, _ = tree_attention(nn.Identity(), *tensors, tree=plan(parent, end, torch.float64, way), **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(out, tensors, wanted), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_a_window_longer_than_every_path_is_no_window() -> None:
    parent, end = columns(branched((2, 3)))
    out, _ = tree_attention(Odd(), *inputs(len(parent)), tree=plan(parent, end, torch.float64), sliding_window=6)
    assert out.shape == (1, len(parent), HEADS, SIZE)


def test_wrong_row_and_way_are_refused() -> None:
    parent, end = columns(branched((2, 3)))
    with pytest.raises(ValueError, match="the plan is for one of 9"):
        tree_attention(Odd(), *inputs(5), tree=plan(parent, end))
    with pytest.raises(ValueError, match="'sparse'"):
        plan(parent, end, way="sparse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without tokens"):
        plan(parent[:0], end[:0])


def test_attending_gives_the_old_attention_back() -> None:
    class Config:
        _attn_implementation = "sdpa"

    model = nn.Identity()
    model.config = Config()
    with attending(model):
        assert model.config._attn_implementation == "ramulus_tree"
    assert model.config._attn_implementation == "sdpa"
