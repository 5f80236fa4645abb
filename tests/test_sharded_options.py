"""The optimizer's other forms over ranks: moments in 8 bits, numbers in the CPUs' memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.learners import ranks, run
from conformance.test_learner import rows
from forests import forest
from methods import METHODS
from ramulus.learn.policy.master_weights import MasterWeights
from ramulus.learn.sharded.factory import Sharded
from ramulus.learn.sharded.optimizer import eight_bits
from tiny import build

MIX = METHODS["grpo"].mix
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}  # 8 bits are for tensors of 4096 numbers and more


@pytest.fixture
def two() -> Iterator[None]:
    ranks(2)
    yield
    ranks(0)


def made(how: Sharded, dtype: torch.dtype = torch.float32) -> Any:
    return how(build(**WIDE).to(dtype), None, None, False, {}, 0)


async def stepped(one: Any, seeds: range) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    updates = []
    for seed in seeds:
        await one.accumulate(MIX, rows(MIX, forest(seed, trees=4, tempered=True)))
        updates.append(await one.update(1e-2))
    return await one.weights(), updates


def test_copies_are_made_where_they_are_wanted() -> None:
    for dtype, exact, copies in ((torch.float32, True, 0), (torch.bfloat16, True, 1), (torch.bfloat16, False, 0)):
        parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        masters = MasterWeights(exact)
        masters.take({"w": parameter})
        assert len(masters.copies) == copies
        parameter.grad = torch.full((3,), 0.5, dtype=dtype)
        [gradient] = masters.hold_gradients()
        assert gradient.dtype == masters.stepped["w"].dtype == (torch.float32 if copies else dtype)
        with torch.no_grad():
            masters.stepped["w"] -= 2**-12  # lost in bfloat16
        masters.round_off()
        assert (parameter.grad is None) == bool(copies)
        assert torch.equal(masters.stepped["w"].to(dtype), parameter)
        assert bool((masters.stepped["w"] != 1).all()) == (masters.stepped["w"].dtype == torch.float32)


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ImportError, match=r'learner\.adam=8bit needs torchao: pip install "ramulus\[sharded\]"'):
        eight_bits()


@pytest.mark.slow
def test_half_precision_steps_copies_over_ranks_too(two: None) -> None:
    ends = {}
    for offload in (False, True):
        one = made(Sharded(offload=offload), torch.bfloat16)
        before = run(one.weights())
        ends[offload], updates = run(stepped(one, range(3)))
        one.close()
        assert all(update["grad_norm"] > 0 for update in updates)
        assert all(tensor.dtype == torch.bfloat16 for tensor in ends[offload].values())
        assert any(not torch.equal(before[name], ends[offload][name]) for name in before)
    assert all(torch.equal(ends[False][name], ends[True][name]) for name in ends[False])


@pytest.mark.slow
def test_moments_in_eight_bits_learn_nearly_the_same_and_go_on_bit_for_bit(two: None, tmp_path: Path) -> None:
    pytest.importorskip("torchao.optim", reason="torchao is not installed here")
    exact, narrow = made(Sharded()), None
    begun = run(exact.weights())
    wanted, _ = run(stepped(exact, range(6)))
    exact.close()
    narrow = made(Sharded(adam="8bit"))
    run(stepped(narrow, range(3)))
    moments = [value for state in narrow.policy.optimizer.state.values() for value in state.values() if hasattr(value, "codes")]
    assert moments, "some are kept in 8 bits"
    state = run(narrow.save(tmp_path))
    found, _ = run(stepped(narrow, range(3, 6)))
    narrow.close()
    moved = sum(float((wanted[name] - begun[name]).square().sum()) for name in wanted) ** 0.5
    apart = sum(float((wanted[name] - found[name]).square().sum()) for name in wanted) ** 0.5
    assert 0 < apart < 0.2 * moved
    again = made(Sharded(adam="8bit"))
    run(again.restore(tmp_path, state))
    anew, _ = run(stepped(again, range(3, 6)))
    again.close()
    assert all(torch.equal(found[name], anew[name]) for name in found)
    ranks(1)
    alone = made(Sharded(adam="8bit"))
    run(alone.restore(tmp_path, state))
    nearly, _ = run(stepped(alone, range(3, 6)))
    alone.close()
    assert sum(float((nearly[name] - found[name]).square().sum()) for name in found) ** 0.5 < 0.2 * moved
