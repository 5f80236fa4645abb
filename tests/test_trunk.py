"""Trunks: paths that many tokens share are met in one call, and nothing in answers or gradients changes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

from engines import KERNELS
from forests import forest
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.attention import merged, trunk
from ramulus.learn.attention.gather import CHUNK, runs
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
        "longer than a chunk": branched((2, CHUNK + 40), (3, 5), (2, CHUNK + 1), prompt=CHUNK + 9),
        "binary": branched((2, 3), (2, 2), (2, 7), (2, 4)),
    }
    found |= {f"scattered {seed}": lay_out([scattered(seed, 25), scattered(seed + 9, 8)])[0] for seed in range(8)}
    return found | {f"random {seed}": lay_out(forest(seed, trees=1 + seed % 4))[0] for seed in range(6)}


SHAPES = shapes()
HEADS = {"alone": (2, 2), "grouped": (6, 2), "one key head": (4, 1)}


@pytest.fixture(params=[0.0, 1e-4, 3e-3], ids=["every fork", "many", "some"])
def eager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Take trunks out of rows so small that none would pay."""
    monkeypatch.setattr(trunk, "EAGER", (request.param,))
    return request.param


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


def felled(row: Layout, dtype: torch.dtype = torch.float64) -> TreePlan:
    """The plan with trunks, which must have some."""
    way = plan(*columns(row), dtype, "trunk")
    assert isinstance(way.paths, trunk.Trunk)
    assert way.paths.keys
    return way


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures("eager")
def test_trunks_change_nothing(row: Layout, heads: tuple[int, int]) -> None:
    way = plan(*columns(row), torch.float64, "trunk")
    tensors = inputs(way.length, heads, torch.float64)
    expected = answer(plan(*columns(row), torch.float64, "dense"), tensors)
    for ours, theirs in zip(answer(way, tensors), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("name", ["trunk and leaves", "caterpillar", "several trees", "longer than a chunk"])
def test_trunks_in_lower_precision(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk, "EAGER", (1e-3,))
    row = SHAPES[name]
    tensors = inputs(len(row.parent), (4, 2), dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = answer(plan(*columns(row), torch.float64, "dense"), exact)
    got = answer(felled(row, dtype), tensors)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * float(theirs.detach().abs().max()))


@pytest.mark.usefixtures("eager")
def test_each_key_is_met_once() -> None:
    for row in SHAPES.values():
        parent, end = (x.numpy() for x in columns(row))
        met = torch.zeros(len(parent), len(parent), dtype=torch.long)
        found = trunk.fell(runs(parent, end), parent, end, trunk.EAGER[0])
        for keys, first, last in zip(found.keys, found.first, found.last, strict=True):
            met[first:last, torch.from_numpy(keys)] += 1
        starts, near = found.row.start, found.row.near
        for start, stop, open_ in zip(starts.tolist(), found.row.stop.tolist(), near.tolist(), strict=True):
            at, path = start, []
            while len(path) < open_:
                at = int(parent[at])
                path.append(at)
            met[start:stop, path] += 1
            met[start:stop, start:stop] += torch.ones(stop - start, stop - start, dtype=torch.long).tril()
        index = torch.arange(len(parent))
        seen = (index[None, :] <= index[:, None]) & (index[:, None] < torch.from_numpy(end)[None, :])
        assert torch.equal(met, seen.long())


def test_a_dropped_merge_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "EAGER", (1e-3,))
    row = SHAPES["caterpillar"]
    way = felled(row)
    assert isinstance(way.paths, trunk.Trunk)
    tensors = inputs(len(row.parent), (4, 2), torch.float64)
    expected = answer(plan(*columns(row), torch.float64, "dense"), tensors)
    way.paths.last[0] -= 1
    got = answer(way, tensors)
    assert all((ours - theirs).abs().max() > 1e-3 for ours, theirs in zip(got, expected, strict=True))


def test_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "EAGER", (1e-3,))
    tensors = inputs(len(SHAPES["caterpillar"].parent), (4, 2), torch.float32)
    once, again = (answer(felled(SHAPES["caterpillar"], torch.float32), tensors) for _ in range(2))
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


@pytest.mark.parametrize("name", ["trunk and leaves", "caterpillar", "several trees", "scattered 3", "random 2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_through_a_model(name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "EAGER", (1e-3,))
    net, row = model(), SHAPES[name]
    expected = learned(net, row, plan(*columns(row), torch.float64, "dense"))
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
        net.train()
    got = learned(net, row, felled(row))
    for ours, theirs in zip(got, expected, strict=True):
        # transformers computes its norms in float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_checkpointed_call_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "EAGER", (1e-3,))
    way = felled(SHAPES["several trees"])
    tensors = inputs(way.length, (4, 2), torch.float64)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return tree_attention(nn.Identity(), query, key, value, tree=way)[0]

    out = checkpoint(call, *tensors[:3], use_reentrant=False)
    got = [out, *torch.autograd.grad(out, tensors[:3], tensors[3])]
    assert all(torch.equal(a, b) for a, b in zip(got, answer(way, tensors), strict=True))


def test_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "EAGER", (1e-3,))
    net, row = model().float(), SHAPES["caterpillar"]
    ways = plan(*columns(row), torch.bfloat16, "dense"), felled(row, torch.bfloat16)
    expected, got = (learned(net, row, way, torch.bfloat16) for way in ways)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1 * float(theirs.abs().max()))


def chosen(row: Layout, width: int = 128) -> str:
    """What auto takes for a row."""
    way = plan(*columns(row), width=width)
    return "dense" if way.mask is not None else type(way.paths).__name__


@KERNELS
def test_auto_takes_trunks_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(branched((4, 60), prompt=3)) == "Stacked"
    monkeypatch.setenv("RAMULUS_NATIVE", "0")
    assert chosen(branched((1000, 6), prompt=2000)) == "Trunk"
    assert chosen(lay_out([grown(900, 4, 4)])[0]) == "Trunk"
    assert chosen(branched((4, 30), prompt=10)) == "dense"
    assert chosen(branched((2, 700), (2, 700), prompt=20)) == "Trunk"
    assert chosen(branched((4, 60), prompt=3)) == "Gather"
    assert chosen(branched((1, 900))) == "Gather"


def test_without_the_operators_there_are_no_trunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMULUS_NATIVE", "0")
    monkeypatch.setattr(merged, "FORWARD", "_an_operator_that_torch_lacks")
    assert chosen(branched((1000, 6), prompt=2000)) == "dense"
