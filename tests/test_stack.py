"""Tree attention by the compiled kernels, for every width of vector, against a dense mask."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from engines import KERNELS, LANES
from ramulus.learn.attention import kernels as stack
from ramulus.learn.attention.kernels import Folding, Stacked
from ramulus.learn.attention.runs import runs
from ramulus.learn.attention.tree_attention import plan

pytestmark = KERNELS
SHAPES = {
    "grouped": (4, 2, 32),
    "alone": (3, 3, 40),
    "many queries a key": (52, 1, 4),
    "one key head": (6, 1, 24),
    "tiny": (2, 2, 5),
}


@pytest.fixture(params=LANES)
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Vectors of 4, 8 or 16 floats, or half as many doubles, whatever this processor has."""
    width = f"-DLANES={request.param}"
    monkeypatch.setattr(stack, "FLAGS", {dtype: (*flags, width) for dtype, flags in stack.FLAGS.items()})
    return request.param


def row(seed: int, longest: int, trees: int) -> tuple[Tensor, Tensor]:
    """parent and end [T] of a random forest with runs of up to `longest` tokens."""
    chance, parent, end = random.Random(seed), [], []

    def grow(above: int, depth: int) -> None:
        first = len(parent)
        for _ in range(chance.randint(1, longest)):
            parent.append(len(parent) if above < 0 else above)
            end.append(0)
            above = len(parent) - 1
        last = len(parent)
        for _ in range(chance.choice([0, 2, 3]) if 0 < depth < 3 else 3 * (depth == 0)):
            grow(above, depth + 1)
        end[first:last] = [len(parent)] * (last - first)

    for _ in range(trees):
        grow(-1, 0)
    return torch.tensor(parent), torch.tensor(end)


def inputs(tokens: int, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Queries as a view of [1, T, H, D], keys and values as they lie, and the gradient of the answer."""
    heads, shared, dim = shape
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(1, tokens, heads, dim, generator=generator, dtype=torch.float64).transpose(1, 2)
    k, v = (torch.randn(1, shared, tokens, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    g = torch.randn(1, tokens, heads, dim, generator=generator, dtype=torch.float64)
    return [*((2 * x).to(dtype).requires_grad_() for x in (q, k, v)), g.to(dtype)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.04)], ids=["double", "float", "bfloat16"]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_are_the_dense_mask(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, lanes: int
) -> None:
    """Answers and gradients on runs shorter and longer than a tile, several trees a row, with more and fewer threads than those."""
    threads = torch.get_num_threads()
    for seed, (longest, trees) in enumerate([(1, 1), (5, 3), (20, 2), (70, 1)]):
        parent, end = row(seed, longest, trees)
        exact = inputs(len(parent), shape, torch.float64)
        truth = plan(parent, end, torch.float64, "dense").attend(*exact[:3], None)
        expected = [truth, *torch.autograd.grad(truth, exact[:3], exact[3])]
        tensors = inputs(len(parent), shape, dtype)
        torch.set_num_threads(1 + seed % 3)
        try:
            way = plan(parent, end, dtype, "stack")
            assert isinstance(way.paths, Stacked)
            out = way.attend(*tensors[:3], None)
            got = [out, *torch.autograd.grad(out, tensors[:3], tensors[3])]
        finally:
            torch.set_num_threads(threads)
        lane = stack.kernels(dtype).ramulus_attention_lanes()
        assert lane == (lanes // 2 if dtype == torch.float64 else lanes)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(
                ours.double(), theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.detach().abs().max()))
            )


@pytest.mark.slow
def test_long_paths_take_more_than_one_tile_of_scores() -> None:
    """A path so long that the heads of one token fill the room for scores, and branches at its end."""
    trunk = 12_000
    parent = torch.tensor(
        [0, *range(trunk - 1), trunk - 1, *range(trunk, trunk + 9), trunk - 1, *range(trunk + 10, trunk + 19)]
    )
    end = torch.tensor([trunk + 20] * trunk + [trunk + 10] * 10 + [trunk + 20] * 10)
    tensors = inputs(len(parent), (7, 1, 8), torch.float32)
    out = plan(parent, end, torch.float32, "stack").attend(*tensors[:3], None)
    got = torch.autograd.grad(out, tensors[:3], tensors[3])
    other = plan(parent, end, torch.float32, "paths").attend(*tensors[:3], None)
    for ours, theirs in zip((out, *got), (other, *torch.autograd.grad(other, tensors[:3], tensors[3])), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_same_bits_for_any_number_of_threads() -> None:
    parent, end = row(1, 40, 3)
    found = []
    threads = torch.get_num_threads()
    for count in (1, 4):
        torch.set_num_threads(count)
        tensors = inputs(len(parent), (4, 2, 32), torch.float32)
        out = plan(parent, end).attend(*tensors[:3], None)
        found.append([out, *torch.autograd.grad(out, tensors[:3], tensors[3])])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_folding_adds_what_it_says(lanes: int) -> None:
    """Sums [H, columns] of entries chosen at random: token, weight, columns, limit."""
    parent, end = row(2, 20, 2)
    heads, shared, dim = 4, 2, 16
    q, k, v, _ = inputs(len(parent), (heads, shared, dim), torch.float64)
    way = Stacked.of(runs(parent.numpy(), end.numpy()))
    index = torch.arange(len(parent))
    chance, entries = random.Random(0), []
    expected = torch.zeros(heads, 1400, dtype=torch.float64)
    second = int(end[0])  # where the other tree begins: it has columns of its own
    for t in range(len(parent)):
        path = index[(index <= t) & (end > t)]
        score = torch.stack([q[0, h, t] @ k[0, h // 2, path].T for h in range(heads)]) * dim**-0.5
        for _ in range(chance.choice([0, 0, 1, 3])):
            limit, base, weight = chance.randint(1, len(path)), chance.randrange(400) + 700 * (t >= second), chance.random()
            entries.append((t, base, limit, weight))
            expected[:, base : base + limit] += weight * score.softmax(-1)[:, :limit]
    token, base, limit, weight = (np.array(column) for column in zip(*entries, strict=True))
    folding = Folding(np.searchsorted(token, np.arange(len(parent) + 1)), base, limit, weight)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        sums = torch.zeros(heads, 1400, dtype=torch.promote_types(dtype, torch.float32))
        given = [x.detach().to(dtype) for x in (q, k, v)]
        out = way.watched(*given, None, folding, sums)
        assert torch.equal(out, way.attend(*given, None))
        torch.testing.assert_close(sums.double(), expected, rtol=0, atol=tolerance)


def test_values_may_be_of_another_size_and_not_of_another_dtype() -> None:
    parent, end = row(1, 5, 1)
    q, k, v, _ = inputs(len(parent), (4, 2, 16), torch.float64)
    ours, dense = (plan(parent, end, torch.float64, way).attend(q, k, v[..., :12], None) for way in ("stack", "dense"))
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="one dtype"):
        plan(parent, end, torch.float64, "stack").attend(q, k.float(), v.float(), None)


def test_bfloat16_is_float32_on_rounded_tensors() -> None:
    """The kernels differ from those of float32 on the same numbers by three roundings: of what enters the second product of each pair, of the
    answer, and of the answers that the backward pass keeps."""
    for seed, (longest, trees) in enumerate([(5, 3), (70, 1)]):
        parent, end = row(seed, longest, trees)
        narrow = inputs(len(parent), (4, 2, 32), torch.bfloat16)
        tensors = [x.detach().float().requires_grad_() for x in narrow]
        outs = [plan(parent, end, x[0].dtype, "stack").attend(*x[:3], None) for x in (narrow, tensors)]
        size = plan(parent, end, torch.float32, "stack").attend(*tensors[:2], tensors[2].abs(), None)
        assert bool(((outs[0].float() - outs[1]).abs() <= 2**-8 * (size + outs[1].abs()) + 1e-6).all())
        got, wanted = (torch.autograd.grad(out, x[:3], x[3]) for out, x in zip(outs, (narrow, tensors), strict=True))
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=2**-8, atol=5e-3 * float(theirs.abs().max()))


def test_what_is_no_number_stays_none_in_bfloat16() -> None:
    parent, end = row(1, 5, 1)
    tensors = inputs(len(parent), (4, 2, 32), torch.bfloat16)
    with torch.no_grad():
        tensors[2][0, 0, 0, 3] = torch.nan
        tensors[2][0, 1, 0, 4] = torch.inf
    out = plan(parent, end, torch.bfloat16, "stack").attend(*tensors[:3], None)
    assert bool(out[0, :, :2, 3].isnan().all())
    assert bool(out[0, 0, 2:, 4].isposinf().all())
    assert bool(out[0, :, 2:, 3].isfinite().all())


def test_under_autocast_tensors_are_met_in_its_dtype() -> None:
    """Queries and keys come in float32 from their rotation, values in bfloat16."""
    parent, end = row(1, 20, 2)
    q, k, v, _ = inputs(len(parent), (4, 2, 32), torch.float32)
    narrow = [x.bfloat16() for x in (q, k, v)]
    way = plan(parent, end, torch.bfloat16, "stack")
    with torch.autocast("cpu", torch.bfloat16):
        out = way.attend(q, k, v.bfloat16(), None)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, way.attend(*narrow, None))
    got, wanted = (torch.autograd.grad(one.float().sum(), (q, k)) for one in (out, way.attend(*narrow, None)))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(got, wanted, strict=True))


def test_where_there_are_no_kernels_others_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, end = row(0, 5, 1)
    assert not isinstance(plan(parent, end, torch.float16).paths, Stacked)
    with pytest.raises(ValueError, match=r"'stack' cannot be had on cpu in torch\.float16"):
        plan(parent, end, torch.float16, "stack")
    monkeypatch.setenv("RAMULUS_NATIVE", "0")
    assert not isinstance(plan(parent, end).paths, Stacked)
    with pytest.raises(ValueError, match="RAMULUS_NATIVE=0"):
        plan(parent, end, torch.float32, "stack")
