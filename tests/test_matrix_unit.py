"""Products by the matrix unit of a processor (AMX) are those of its vectors but for the order of sums, and no row depends on its company."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engines import KERNELS, small
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.local.compiled import CompiledForward
from ramulus.engine.local.forward import ModelForward
from ramulus.engine.local.fused import recognise
from ramulus.engine.local.kv import Reach, Slots
from ramulus.learn.attention import kernels
from ramulus.learn.attention.tree_attention import plan
from ramulus.learn.batch.layout import lay_out
from ramulus.learn.policy import half_kernels
from ramulus.learn.policy.half_kernels import HeadPanels
from ramulus.native import build
from ramulus.native.build import has_matrix_unit
from test_attention_shapes import SHAPES, answer, columns

UNIT = pytest.mark.skipif(not has_matrix_unit(), reason="this processor has no matrix unit (AMX)")
REFUSED = ("-DPERMISSION=0x9999",)  # what is asked of the system is something that it does not know
pytestmark = KERNELS


def unit_of(flags: Sequence[str]) -> int:
    """Whether kernels compiled with these flags would use the unit."""
    return int(build.library("layers.c", {"ramulus_matrix": (ctypes.c_int64, ())}, *flags).ramulus_matrix())


def scores(rows: Tensor, weight: Tensor, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Of a head [37, d]."""
    monkeypatch.setattr(half_kernels, "HALF_FLAGS", flags)
    return HeadPanels.of(weight, len(weight)).scores(rows, 1.0)[:, : len(weight)]


@UNIT
def test_a_processor_with_the_unit_uses_it_and_says_so() -> None:
    assert (unit_of(()), unit_of(("-DUNTILED",)), unit_of(REFUSED)) == (1, 0, 0)
    assert build.multiplying() == "; bfloat16 by the matrix unit (AMX)"


def test_without_the_unit_nothing_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "abilities", frozenset)
    assert not has_matrix_unit()
    assert build.multiplying() == ""
    monkeypatch.setattr(build, "abilities", lambda: frozenset({"amx_bf16"}))
    monkeypatch.setattr(build, "has_matrix_unit", lambda: False)
    assert "by vectors" in build.multiplying()


@UNIT
@pytest.mark.parametrize("width", [16, 48, 64, 80, 96, 112, 576])
def test_a_product_of_any_size_is_that_of_vectors(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows and steps of inputs that are whole, and every kind that is not."""
    generator = torch.Generator().manual_seed(width)
    rows, weight = (torch.randn(n, width, generator=generator).bfloat16() for n in (100, 37))
    exact = rows.double() @ weight.double().t()
    ours = scores(rows, weight, (), monkeypatch)
    assert not torch.equal(ours, scores(rows, weight, ("-DUNTILED",), monkeypatch))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * width**0.5)
    for n in (1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65):
        assert torch.equal(scores(rows[:n], weight, (), monkeypatch), ours[:n])
        assert torch.equal(scores(rows[-n:], weight, (), monkeypatch), ours[-n:])


def tensors(tokens: int, heads: tuple[int, int], dim: int) -> list[Tensor]:
    """Queries, keys, values and the gradient of the answer."""
    generator = torch.Generator().manual_seed(tokens)
    made = [torch.randn(1, h, tokens, dim, generator=generator).bfloat16().requires_grad_() for h in (*heads, heads[1])]
    return [*made, torch.randn(1, tokens, heads[0], dim, generator=generator).bfloat16()]


@UNIT
@pytest.mark.parametrize("heads", [(9, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("dim", [8, 24, 64])
@pytest.mark.parametrize("name", ["trunk and leaves", "caterpillar", "several trees", "long runs"])
def test_tree_attention_by_the_unit_is_as_near_to_exact_as_by_vectors(
    name: str, dim: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = SHAPES[name]
    given = tensors(len(row.parent), heads, dim)
    exact = answer(plan(*columns(row), torch.float64, "dense"), [x.detach().double().requires_grad_() for x in given])
    off, answers = [], []
    for more in ((), ("-DUNTILED",)):
        monkeypatch.setitem(kernels.FLAGS, torch.bfloat16, ("-DBFLOAT16", *more))
        got = answer(plan(*columns(row), torch.bfloat16, "stack"), given)
        answers.append(got)
        off.append([float(((ours.double() - theirs).norm() / theirs.norm()).detach()) for ours, theirs in zip(got, exact, strict=True)])
    if name in ("several trees", "long runs"):
        assert not all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    for by_unit, by_vectors in zip(*off, strict=True):
        assert by_unit < min(1.1 * by_vectors, 0.02)


@UNIT
def test_where_the_system_refuses_the_unit_vectors_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (40, 37))
    refused, vectors = (scores(rows, weight, flags, monkeypatch) for flags in (REFUSED, ("-DUNTILED",)))
    assert torch.equal(refused, vectors)


@UNIT
def test_decoding_goes_through_the_unit() -> None:
    """The sums of vectors, in another order."""
    fused = recognise(ModelForward(small("llama", hidden_size=96, intermediate_size=160, head_dim=32)))
    assert fused is not None
    positions, tokens = torch.zeros(20, 1, dtype=torch.long), torch.arange(20)[:, None]
    logits = []
    for more in ((), ("-DUNTILED",)):
        forward = CompiledForward(fused, torch.bfloat16, more)
        slots = Slots(forward.geometry)
        slots.resize(20, 32, 0)
        found = forward(tokens, positions, Reach(slots, positions, 1), True)
        assert found is not None
        logits.append(found.clone())
    assert not torch.equal(*logits)
    torch.testing.assert_close(*logits, rtol=0.02, atol=0.02 * float(logits[1].abs().max()))


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_not_finite_in_a_branch_stays_there(backward: bool) -> None:
    """A trunk of 40 tokens, a leaf of 20 in which a value or a key is NaN, and one of 3, met after it, in the same step of inputs."""
    tree = Tree.plant(Task("t", tuple(range(3)), ""))
    trunk = tree.add(tree.root, [1] * 37, Author.POLICY)
    for tokens in (20, 3):
        tree.add(trunk, [1] * tokens, Author.POLICY)
    row = lay_out([tree])[0]
    given = tensors(len(row.parent), (3, 1), 16)
    for x in given[1:3]:
        x.data[:, :, 55] = torch.nan
    got = answer(plan(*columns(row), torch.bfloat16, "stack"), given)
    part = got[0][0] if not backward else got[1][0].transpose(0, 1)
    broken = part.isnan().flatten(1).any(1).nonzero().flatten().tolist()
    assert 59 in broken
    assert set(broken) <= set(range(40, 60))  # a step of inputs of the same run may have met it with a weight of 0
