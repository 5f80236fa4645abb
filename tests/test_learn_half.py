"""Layers and head in bfloat16: answers and gradients of the float32 ones but for rounding, and copies of weights that are never stale."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from itertools import chain

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from engines import KERNELS, ask, line, run, small
from forests import forest
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy import half_head, half_kernels
from ramulus.learn.policy.half import half_patches
from ramulus.learn.policy.half_head import Read
from ramulus.learn.policy.half_kernels import HeadPanels
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.narrow import Narrow
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.torch_policy import TorchPolicy
from test_policy import LEARN_ALL, batches
from tiny import build

pytestmark = KERNELS

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
wide = partial(build, **WIDE)


@pytest.fixture(params=[(), ("-DWIDENED",), ("-DUNTILED",), *(pytest.param((f"-DLANES={n}",), marks=pytest.mark.slow) for n in (8, 4))])
def flags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of this processor and of others."""
    monkeypatch.setattr(half_kernels, "HALF_FLAGS", request.param)


def off(one: Tensor, other: Tensor) -> float:
    """The norm of the difference over that of the second."""
    return float((one.detach().double() - other.detach().double()).norm() / other.detach().double().norm())


def plain(policy: TorchPolicy) -> TorchPolicy:
    """The same policy, by torch's autocast."""
    policy.patches, policy.head = [], replace(policy.head, narrow=None)
    return policy


def gradients(policy: TorchPolicy, mix: Mix = LEARN_ALL) -> dict[str, Tensor]:
    policy.model.zero_grad()
    for row in batches(forest(3, tempered=True)):
        policy.accumulate(mix, row)
    return {name: p.grad.clone() for name, p in policy.trainable.items()}


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_norm_and_a_feed_forward_layer_are_those_of_float32(kind: torch.dtype) -> None:
    model, generator = wide("llama"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.3 * torch.randn(p.shape, generator=generator)).bfloat16())
    found = [(module, forward) for module, forward in half_patches(model, Narrow()) if "Attention" not in type(module).__name__]
    assert len(found) == 7
    for module, forward in found:
        x = torch.randn(2, 7, 64, generator=generator).bfloat16()
        wanted = torch.randn(2, 7, 64, generator=generator).bfloat16()
        answers = []
        for compute, dtype in ((module, torch.float32), (forward, kind)):
            given = x.to(dtype).requires_grad_()
            out = compute(given if "Norm" in type(module).__name__ else given.to(torch.float32 if compute is module else torch.bfloat16))
            answers.append((out, *torch.autograd.grad(out, [given, *module.parameters()], wanted.to(out.dtype))))
        assert answers[1][0].dtype == torch.bfloat16
        assert answers[1][1].dtype == kind
        assert all(off(ours, theirs) < 0.01 for theirs, ours in zip(*answers, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gradients_are_as_near_to_float32_as_those_of_autocast(family: str) -> None:
    exact = gradients(TorchPolicy(wide(family)))
    ours = gradients(TorchPolicy(wide(family), autocast=True))
    theirs = gradients(plain(TorchPolicy(wide(family), autocast=True)))
    assert exact.keys() == ours.keys() == theirs.keys()
    for name, gradient in exact.items():
        assert ours[name].dtype == torch.float32
        assert 0 < off(ours[name], gradient) < 1.3 * off(theirs[name], gradient) + 0.01, name
    whole, mine, other = (torch.cat([x.flatten() for x in found.values()]) for found in (exact, ours, theirs))
    assert off(mine, whole) < 1.1 * off(other, whole)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"attention": "dense"}, {"attention": "paths"}])
def test_checkpointed_and_by_any_attention_it_is_the_same(options: dict) -> None:
    one, other = gradients(TorchPolicy(wide(), autocast=True)), gradients(TorchPolicy(wide(), autocast=True, **options))
    for name, gradient in one.items():
        assert off(other[name], gradient) < (1e-6 if "activation_checkpointing" in options else 0.05), name


def test_a_model_with_windows_keeps_them() -> None:
    changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    exact, ours = (TorchPolicy(wide("qwen2", **changes), autocast=cast) for cast in (False, True))
    every = TorchPolicy(wide("qwen2"), autocast=True)
    (row,) = batches(forest(6))
    found = [policy.evaluate(row, grad=False).plain for policy in (exact, ours, every)]
    assert off(found[1], found[0]) < 0.03
    assert off(found[2], found[0]) > 0.05


WORDS = 75


def case(rows: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, 48] and weight [WORDS, 48] that bfloat16 holds, token and temperatures [N]."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 48, generator=generator).bfloat16().float() for n in (rows, WORDS))
    return hidden, weight, torch.randint(0, 70, (rows,), generator=generator), 0.5 + torch.rand(rows, generator=generator)


def spelled(hidden: Tensor, weight: Tensor, token: Tensor, temperature: Tensor | None, hot: bool, words: int, scale: float) -> tuple[Tensor, ...]:
    """What a head answers, in float64."""
    logits = scale * hidden.double() @ weight.double()[:words].t()
    cold, warm = logits.log_softmax(-1), (logits if temperature is None else logits / temperature.double()[:, None]).log_softmax(-1)
    spread = warm if hot else cold
    return *(x.gather(1, token[:, None])[:, 0] for x in (warm, cold)), -(spread.exp() * spread).sum(-1)


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("kept", [2**28, 0])
@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize(("words", "scale", "hot"), [(WORDS, 1.0, False), (70, 0.25, True)])
def test_the_head_is_that_of_float64(kept: int, tempered: bool, words: int, scale: float, hot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_head, "KEPT_PULLS", kept)
    monkeypatch.setattr(half_head, "AT_ONCE", 12 * 96)  # several parts
    monkeypatch.setattr(half_head, "PULL_ROWS", 16)
    hidden, weight, token, temperature = case()
    by = 1 / temperature if tempered else None
    taken = hidden.bfloat16().requires_grad_(), weight.clone().requires_grad_()
    ours = Read.apply(*taken, weight.bfloat16(), HeadPanels.of(weight.bfloat16(), words), scale, token, by, hot)
    asked = hidden.double().requires_grad_(), weight.double().requires_grad_()
    theirs = spelled(*asked, token, temperature if tempered else None, hot, words, scale)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    wanted = torch.linspace(-1, 1, len(token))
    for chosen in ([0 if tempered else 1], [1], [2], [0, 1, 2] if tempered else [1, 2]):
        losses = [sum((wanted.to(answer[0].dtype) * answer[i]).sum() for i in chosen) for answer in (ours, theirs)]
        pairs = zip(*(torch.autograd.grad(loss, x, retain_graph=True) for loss, x in zip(losses, (taken, asked), strict=True)), strict=True)
        assert all(off(one, other) < 0.01 for one, other in pairs), chosen


def test_logits_of_all_targets_never_exist_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_head, "AT_ONCE", 12 * 96)
    made: list[int] = []
    scores = HeadPanels.scores
    monkeypatch.setattr(HeadPanels, "scores", lambda self, hidden, scale: made.append(len(hidden) * self.line) or scores(self, hidden, scale))
    gradients(TorchPolicy(wide(), autocast=True))
    assert len(made) > 1
    assert max(made) <= 12 * 96  # lines are as long as a whole number of panels, which are wider where vectors are


def test_a_bonus_for_entropy_is_learned_from() -> None:
    mix = replace(LEARN_ALL, entropy_bonus=5.0)
    policies = TorchPolicy(wide()), TorchPolicy(wide(), autocast=True), plain(TorchPolicy(wide(), autocast=True)), TorchPolicy(wide(), autocast=True)
    mixes = mix, mix, mix, LEARN_ALL
    whole, mine, other, without = (torch.cat([x.flatten() for x in gradients(*pair).values()]) for pair in zip(policies, mixes, strict=True))
    assert off(mine, whole) < 1.1 * off(other, whole)
    assert off(without, whole) > 3 * off(mine, whole)


def test_copies_follow_the_weights() -> None:
    policy, (row,) = TorchPolicy(wide(), autocast=True), batches(forest(6))
    seen = [policy.evaluate(row, grad=False).plain.clone()]
    first = dict(policy.narrow.copies)
    policy.evaluate(row, grad=False)
    assert all(policy.narrow.copies[key] is value for key, value in first.items())  # made once
    policy.accumulate(LEARN_ALL, row)
    policy.update(0.05)
    seen.append(policy.evaluate(row, grad=False).plain)
    kept, state = {name: x.clone() for name, x in policy.tensors().items()}, policy.state()
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.1)
    seen.append(policy.evaluate(row, grad=False).plain)
    policy.restore(kept, state)
    assert torch.equal(policy.evaluate(row, grad=False).plain, seen[1])
    for i, one in enumerate(seen[:2]):
        assert all(off(one, other) > 1e-4 for other in seen[i + 1 :])
    fresh = wide()
    fresh.load_state_dict(policy.model.state_dict())
    assert torch.equal(TorchPolicy(fresh, autocast=True).evaluate(row, grad=False).plain, seen[1])


def test_what_is_not_understood_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(model: nn.Module) -> set[str]:
        return {type(module).__name__.removeprefix("Llama") for module, _ in half_patches(model, Narrow())}

    assert kinds(wide("llama")) == {"RMSNorm", "MLP", "Attention"}
    assert kinds(wide("llama", mlp_bias=True)) == {"RMSNorm", "Attention"}
    assert kinds(wide("llama", head_dim=8)) == {"RMSNorm", "MLP"}
    assert kinds(build("llama", hidden_size=12)) == set()
    assert kinds(wide("llama").double()) == set()
    adapted = TorchPolicy(wide("llama"), lora=Lora(2, 4), autocast=True)
    assert {type(module).__name__ for module, _ in adapted.patches} == {"LlamaRMSNorm"}
    monkeypatch.setenv("RAMULUS_NATIVE", "0")
    policy = TorchPolicy(wide("llama"), autocast=True)
    assert policy.patches == []
    assert all(bool(x.isfinite().all()) for x in gradients(policy).values())


class LlamaRMSNorm(modeling_llama.LlamaRMSNorm):
    """One of a family's own, by the name of another."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.5 * self.weight


class LlamaAttention(modeling_llama.LlamaAttention):
    """As above."""

    def forward(self, *rows: Tensor, **options: object) -> tuple[Tensor, ...]:
        out = super().forward(*rows, **options)
        return (out[0] * 0.3, *out[1:])


def test_a_class_of_a_known_name_that_computes_something_else_is_computed_as_it_is() -> None:
    """And where the code is the same but not what it computes, the check at the start falls back on torch's autocast."""
    model = wide("llama")
    for module in model.modules():
        for kind in (LlamaRMSNorm, LlamaAttention):
            if type(module) is getattr(modeling_llama, kind.__name__):
                module.__class__ = kind
    policy = TorchPolicy(model, autocast=True)
    assert {type(module).__name__ for module, _ in policy.patches} == {"LlamaMLP"}
    row = next(iter(batches(forest(3, tempered=True))))
    exact = TorchPolicy(model).evaluate(row, grad=False).plain
    assert off(policy.evaluate(row, grad=False).plain, exact) < 0.05
    twisted = wide("llama")
    for layer in twisted.model.layers:
        layer.mlp.act_fn = Twice()
    other = TorchPolicy(twisted, autocast=True)
    assert other.patches == []
    assert other.head.narrow is None


class Twice(nn.SiLU):
    """What calls itself SiLU and is not."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


Twice.__name__ = "SiLU"


def test_a_frozen_weight_has_no_gradient_and_stops_none() -> None:
    policy = TorchPolicy(wide(), autocast=True)
    frozen = {name: p for name, p in policy.trainable.items() if any(part in name for part in ("k_proj", "up_proj", "lm_head", "layers.1.input"))}
    for p in frozen.values():
        p.requires_grad_(False)
    policy.accumulate(LEARN_ALL, batches(forest(6))[0])
    assert frozen
    assert all((p.grad is None) == (name in frozen) for name, p in policy.trainable.items())


def test_a_reference_model_is_read_alike() -> None:
    policy, (row,) = TorchPolicy(wide(), autocast=True, reference_model=True), batches(forest(6))
    assert len(policy.reference_patches) == len(policy.patches) > 0
    target = (row.weight != 0).any(0)
    arguments = (row.token, row.position, row.parent, row.end), target, None, False
    with torch.no_grad():
        first = [policy._logprobs(model, *arguments).plain for model in (policy.model, policy.reference)]
        next(chain(policy.model.parameters())).mul_(1.5)
        later = [policy._logprobs(model, *arguments).plain for model in (policy.model, policy.reference)]
    assert torch.equal(*first)
    assert torch.equal(later[1], first[1])
    assert not torch.equal(later[0], first[0])


def test_sampler_and_learner_are_nearer_to_each_other_than_a_plain_forward_to_float32() -> None:
    """Both in bfloat16 beside the same float32 weights, against the model's own forward in bfloat16."""
    model = small("llama", num_attention_heads=2, num_key_value_heads=1, vocab_size=1000, hidden_size=128, intermediate_size=256)
    policy, engine = TorchPolicy(model, autocast=True), LocalEngine(model, precision=torch.bfloat16)
    prompts = [line(12, seed) for seed in range(12)]
    segments = run(engine, [ask(prompt, seed, max_tokens=40) for seed, prompt in enumerate(prompts)])
    trees = [Tree.plant(Task("t", prompt, "")) for prompt in prompts]
    leaves = [tree.add(tree.root, part.tokens, Author.POLICY, logprobs=part.logprobs) for tree, part in zip(trees, segments, strict=True)]
    score_now(policy, trees, {"recomputed"})
    ours = torch.tensor([x for leaf in leaves for x in leaf.signals["recomputed"]]) - torch.tensor([x for part in segments for x in part.logprobs])
    columns = []
    texts = [torch.tensor([leaf.prefix()]) for leaf in leaves]
    for judge in (copy.deepcopy(model).bfloat16(), model):
        with torch.no_grad():
            rows = [judge(text).logits[0, 11:-1].float().log_softmax(-1).gather(1, text[0, 12:, None])[:, 0] for text in texts]
        columns.append(torch.cat(rows))
    plain = columns[0] - columns[1]
    assert len(ours) == len(plain) == 12 * 40
    assert 0 < float(ours.square().mean().sqrt()) < float(plain.square().mean().sqrt())
    assert float(ours.abs().mean()) < float(plain.abs().mean())
