"""Tree attention on rows of many shapes, alone and through a model, in every precision, by each way that training takes on a CPU."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

from engines import KERNELS
from forests import forest
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.attention.kernels import Stacked
from ramulus.learn.attention.runs import PathByPath
from ramulus.learn.attention.tree_attention import TreePlan, attending, plan, tree_attention
from ramulus.learn.batch.layout import Layout, lay_out
from test_attention import branched, columns


def grown(spine: int, tokens: int, leaf: int, first: bool = True, prompt: int = 3) -> Tree:
    """A caterpillar: `spine` pieces of `tokens`, each with one leaf beside the next piece, before or after it."""
    tree = Tree.plant(Task("caterpillar", tuple(range(prompt)), ""))
    at: Node = tree.root
    for _ in range(spine):
        kinds = [leaf, tokens] if first else [tokens, leaf]
        made = [tree.add(at, [1] * count, Author.POLICY) for count in kinds]
        at = made[1 if first else 0]
    return tree


def scattered(seed: int, nodes: int) -> Tree:
    """A random tree, deep or bushy, with nodes of very different lengths."""
    rng = random.Random(seed)
    tree = Tree.plant(Task(f"r{seed}", tuple(range(1 + rng.randrange(30))), ""))
    made = [tree.root]
    for _ in range(nodes):
        parent = rng.choice(made[-3:] if seed % 2 else made)
        made.append(tree.add(parent, [1] * rng.choice([1, 2, 3, 5, 20, 60]), Author.POLICY))
    return tree


def shapes() -> dict[str, Layout]:
    """Rows of many shapes."""
    trunked = Tree.plant(Task("t", tuple(range(40)), ""))
    for _ in range(30):
        trunked.add(trunked.root, [1, 1, 1], Author.POLICY)
    found = {
        "trunk and leaves": lay_out([trunked])[0],
        "caterpillar": lay_out([grown(30, 4, 3)])[0],
        "caterpillar, spine first": lay_out([grown(20, 6, 2, first=False)])[0],
        "several trees": lay_out([grown(8, 3, 5), trunked, scattered(1, 12), grown(5, 9, 1, first=False)])[0],
        "long runs": branched((2, 296), (3, 5), (2, 257), prompt=265),
        "binary": branched((2, 3), (2, 2), (2, 7), (2, 4)),
    }
    found |= {f"scattered {seed}": lay_out([scattered(seed, 25), scattered(seed + 9, 8)])[0] for seed in range(8)}
    return found | {f"random {seed}": lay_out(forest(seed, trees=1 + seed % 4))[0] for seed in range(6)}


SHAPES = shapes()
HEADS = {"alone": (2, 2), "grouped": (6, 2), "one key head": (4, 1)}


WAYS = [pytest.param("stack", marks=KERNELS), "paths"]
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}


def inputs(tokens: int, heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values [1, H, T, 8], and the gradient of the answer [1, T, H, 8]."""
    generator = torch.Generator().manual_seed(tokens)
    made = [torch.randn(1, h, tokens, 8, generator=generator, dtype=torch.float64) for h in (*heads, heads[1])]
    wanted = torch.randn(1, tokens, heads[0], 8, generator=generator, dtype=torch.float64)
    return [*(x.mul(2).to(dtype).requires_grad_() for x in made), wanted.to(dtype)]


def answer(way: TreePlan, tensors: list[Tensor]) -> list[Tensor]:
    """Answer and gradients."""
    out, _ = tree_attention(nn.Identity(), *tensors[:3], tree=way)
    return [out, *torch.autograd.grad(out, tensors[:3], tensors[3])]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_way_is_the_dense_mask(row: Layout, heads: tuple[int, int], way: str) -> None:
    tensors = inputs(len(row.parent), heads, torch.float64)
    expected = answer(plan(*columns(row), torch.float64, "dense"), tensors)
    for ours, theirs in zip(answer(plan(*columns(row), torch.float64, way), tensors), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", [*WAYS, "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["trunk and leaves", "caterpillar", "several trees", "long runs"])
def test_lower_precision(name: str, dtype: torch.dtype, way: str) -> None:
    row = SHAPES[name]
    tensors = inputs(len(row.parent), (4, 2), dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = answer(plan(*columns(row), torch.float64, "dense"), exact)
    got = answer(plan(*columns(row), dtype, way), tensors)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        within = PRECISION[dtype] * float(theirs.detach().abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=within)


def test_a_path_cut_short_would_be_noticed() -> None:
    row = SHAPES["caterpillar"]
    way = plan(*columns(row), torch.float64, "paths")
    assert isinstance(way.paths, PathByPath)
    tensors = inputs(len(row.parent), (4, 2), torch.float64)
    expected = answer(way, tensors)
    other = way.paths.paths.clone()
    other[way.paths.keys[0]] = other[way.paths.keys[0] + 1]  # the first key of the second run
    got = answer(replace(way, paths=replace(way.paths, paths=other)), tensors)
    assert all((ours - theirs).abs().max() > 1e-3 for ours, theirs in zip(got, expected, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_same_bits_again(way: str, dtype: torch.dtype) -> None:
    row = SHAPES["caterpillar"]
    tensors = inputs(len(row.parent), (4, 2), dtype)
    once, again = (answer(plan(*columns(row), dtype, way), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def model() -> Qwen2ForCausalLM:
    """A small Qwen2 of random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).double()


def learned(net: Qwen2ForCausalLM, row: Layout, way: TreePlan, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Logits of a row and the gradients of every parameter."""
    parent, _ = columns(row)
    position = [0] * len(parent)
    for token, above in enumerate(parent.tolist()):
        position[token] = position[above] + 1 if above != token else 0
    tokens = torch.arange(len(parent))[None] % 16
    net.zero_grad()
    with attending(net):  # backward too, where checkpoints are computed again
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            logits = net(tokens, position_ids=torch.tensor([position]), use_cache=False, tree=way).logits
        logits.log_softmax(-1).square().mean().backward()
    return [logits.detach(), *(x.grad for x in net.parameters() if x.grad is not None)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["trunk and leaves", "caterpillar", "several trees", "scattered 3", "random 2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_through_a_model(name: str, checkpointing: bool, way: str) -> None:
    net, row = model(), SHAPES[name]
    expected = learned(net, row, plan(*columns(row), torch.float64, "dense"))
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
        net.train()
    got = learned(net, row, plan(*columns(row), torch.float64, way))
    for ours, theirs in zip(got, expected, strict=True):
        # transformers computes its norms in float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("way", WAYS)
def test_checkpointed_call_is_exact(way: str) -> None:
    tree = plan(*columns(SHAPES["several trees"]), torch.float64, way)
    tensors = inputs(tree.length, (4, 2), torch.float64)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return tree_attention(nn.Identity(), query, key, value, tree=tree)[0]

    out = checkpoint(call, *tensors[:3], use_reentrant=False)
    got = [out, *torch.autograd.grad(out, tensors[:3], tensors[3])]
    assert all(torch.equal(a, b) for a, b in zip(got, answer(tree, tensors), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_under_autocast(way: str) -> None:
    net, row = model().float(), SHAPES["caterpillar"]
    ways = plan(*columns(row), torch.bfloat16, "dense"), plan(*columns(row), torch.bfloat16, way)
    expected, got = (learned(net, row, one, torch.bfloat16) for one in ways)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1 * float(theirs.abs().max()))


def chosen(row: Layout, dtype: torch.dtype = torch.float32) -> str:
    """What auto takes for a row."""
    way = plan(*columns(row), dtype)
    return "dense" if way.mask is not None else type(way.paths).__name__


@KERNELS
def test_auto_takes_the_kernels() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert chosen(branched((4, 60), prompt=3), dtype) == Stacked.__name__
    assert chosen(branched((4, 60), prompt=3), torch.float16) == PathByPath.__name__


def test_without_kernels_auto_takes_the_cheaper_of_paths_and_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMULUS_NATIVE", "0")
    assert chosen(branched((2, 300), (2, 300), (2, 300))) == PathByPath.__name__
    assert chosen(branched((2, 700), (2, 700), prompt=20)) == PathByPath.__name__
    assert chosen(branched((1, 900))) == PathByPath.__name__
    assert chosen(branched((4, 30), prompt=10)) == "dense"
    assert chosen(branched((1000, 1), prompt=200)) == "dense"
