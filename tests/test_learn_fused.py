"""Layers with gradients of their own: the answers and gradients of the stock ones, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from forests import forest
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy.fused_layers import fused, gated, norm, patches
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.torch_policy import TorchPolicy
from test_policy import LEARN_ALL, batches
from tiny import FAMILIES, build


def kinds(model: nn.Module) -> list[str]:
    return sorted({type(module).__name__ for module, _ in patches(model)})


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_answer_what_the_stock_ones_do(family: str) -> None:
    model = build(family)
    generator = torch.Generator().manual_seed(0)
    found = patches(model)
    assert len(kinds(model)) == 2
    for module, forward in found:
        width = module.weight.shape[0] if hasattr(module, "weight") else module.gate_proj.in_features
        x = torch.randn(2, 7, width, generator=generator).requires_grad_()
        wanted = torch.randn(2, 7, width, generator=generator)
        inputs = [x, *module.parameters()]
        expected, got = module(x), forward(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(out, inputs, wanted) for out in (expected, got)]
        for theirs, ours in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    model = build().double()
    layer = model.model.layers[0]
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: gated(layer.mlp, x), (x, *layer.mlp.parameters()))
    with torch.no_grad():
        layer.input_layernorm.weight.copy_(torch.linspace(0.5, 1.5, 16))
    assert torch.autograd.gradcheck(
        lambda x, *_: norm(layer.input_layernorm, x), (x, *layer.input_layernorm.parameters())
    )


def test_a_frozen_weight_has_no_gradient_and_stops_none() -> None:
    layer = build().model.layers[0].mlp
    layer.up_proj.weight.requires_grad_(False)
    x = torch.randn(3, 16).requires_grad_()
    gated(layer, x).sum().backward()
    assert layer.up_proj.weight.grad is None
    assert layer.down_proj.weight.grad is not None
    assert x.grad is not None


def test_what_is_not_understood_stays_as_it_is() -> None:
    assert patches(build(double=True)) == []
    assert patches(build().bfloat16()) == []
    assert kinds(build("qwen2", hidden_act="gelu")) == ["Qwen2RMSNorm"]
    assert kinds(build("llama", mlp_bias=True)) == ["LlamaRMSNorm"]
    adapted = TorchPolicy(build(), lora=Lora(2, 4))
    assert {type(module).__name__ for module, _ in adapted.patches} == {"Qwen2RMSNorm"}


def test_the_model_is_its_own_afterwards() -> None:
    model = build()
    seen = []

    def fail() -> None:
        with fused(patches(model)):
            seen.append("forward" in vars(model.model.norm))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [True]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_through_them_changes_nothing(checkpointing: bool) -> None:
    mix: Mix = LEARN_ALL
    found = []
    for quick in (True, False):
        policy = TorchPolicy(build(), activation_checkpointing=checkpointing)
        assert policy.patches
        if not quick:
            policy.patches = []
        for row in batches(forest(3)):
            policy.accumulate(mix, row)
        found.append({name: p.grad for name, p in policy.trainable.items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)
