"""Weights in half precision learn through float32 masters, and a checkpoint holds every weight once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forests import forest
from ramulus.learn.policy.in_process import restored, saved
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.policy.value_head import ActorCritic
from test_policy import LEARN_ALL, batches, build


def learn(policy: TorchPolicy, steps: range, lr: float) -> None:
    for step in steps:
        for row in batches(forest(step), 40):
            policy.accumulate(LEARN_ALL, row)
        policy.update(lr)


def test_a_small_rate_moves_half_precision_weights() -> None:
    """10 steps at 1e-5: nearly no weight would move by itself; the masters all do, and the weights are their rounding."""
    shares = {}
    for exact in (True, False):
        policy = TorchPolicy(build().to(torch.bfloat16), float32_masters=exact)
        before = {name: tensor.detach().clone() for name, tensor in policy.masters.stepped.items()}
        learn(policy, range(10), 1e-5)
        after = policy.masters.stepped
        moved = sum(int((after[name] != tensor).sum()) for name, tensor in before.items() if tensor.ndim == 2)
        shares[exact] = moved / sum(tensor.numel() for tensor in before.values() if tensor.ndim == 2)
        assert all(torch.equal(policy.trainable[name], after[name].to(torch.bfloat16)) for name in after)
        assert all(tensor.dtype == (torch.float32 if exact else torch.bfloat16) for tensor in after.values())
    assert shares[True] > 0.9
    assert shares[False] < 0.6 * shares[True]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "critic"])
def test_many_rows_add_up_as_few_do(kind: str) -> None:
    """In half precision a sum of equal addends stands still at some 256 of them."""
    dtype = torch.bfloat16 if kind == "critic" else getattr(torch, kind)
    policy = (ActorCritic if kind == "critic" else TorchPolicy)(build().to(dtype))
    [row, *_] = batches(forest(3), 40)

    def held(times: int) -> torch.Tensor:
        for _ in range(times):
            policy.accumulate(LEARN_ALL, row)
        gradients = policy.masters.hold_gradients()
        whole = torch.cat([gradient.flatten().clone() for gradient in gradients])
        policy.discard()
        assert not policy.masters.hold_gradients()
        return whole

    one, many = held(1), held(300)
    assert float((many / 300 - one).norm() / one.norm()) < 0.01


def test_float32_has_no_masters() -> None:
    policy = TorchPolicy(build())
    assert not policy.masters.copies
    assert all(policy.masters.stepped[name] is p for name, p in policy.trainable.items())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "lora", "lora in bfloat16", "critic", "tied", "reference"])
def test_a_checkpoint_holds_every_weight_once_and_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def fresh() -> TorchPolicy:
        model = build(tie_word_embeddings=kind == "tied").to(torch.bfloat16 if "bfloat16" in kind else torch.float32)
        kinds = ActorCritic if kind == "critic" else TorchPolicy
        return kinds(model, weight_decay=0.1, lora=Lora(2, 4) if "lora" in kind else None, reference_model=kind == "reference")

    whole, first, second = fresh(), fresh(), fresh()
    learn(whole, range(4), 1e-3)
    learn(first, range(2), 1e-3)
    state = saved(first, tmp_path)
    there = load_file(tmp_path / "tensors.safetensors")
    assert not there.keys() & {f"weights/{name}" for name in load_file(tmp_path / "model" / "model.safetensors")}
    assert any(".lora_" in name for name in there) == ("lora" in kind)
    restored(second, tmp_path, state)
    learn(second, range(2, 4), 1e-3)
    ours, theirs = second.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_checkpoint_of_before_is_read(tmp_path: Path) -> None:
    """It holds the weights in tensors.safetensors as well, and no masters."""
    first, second = TorchPolicy(build().to(torch.bfloat16), float32_masters=False), TorchPolicy(build().to(torch.bfloat16))
    learn(first, range(2), 1e-3)
    state = saved(first, tmp_path)
    file = tmp_path / "tensors.safetensors"
    save_file(load_file(file) | {name: t.contiguous() for name, t in first.tensors().items()}, file)
    restored(second, tmp_path, state)
    assert all(torch.equal(p, first.trainable[name]) for name, p in second.trainable.items())
    assert all(torch.equal(second.masters.stepped[name], second.trainable[name].float()) for name in second.masters.copies)
    assert second.masters.copies
    learn(second, range(2, 3), 1e-3)
