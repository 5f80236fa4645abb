"""What would cost on a GPU, held without one: no token is read by itself, the structure of large models is made without memory."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM, Qwen2Config

from conformance.test_learner import rows
from forests import forest
from methods import METHODS
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.learn.attention.tree_attention import block_mask, plan, tree_attention, visible
from ramulus.learn.batch.score_row import score_rows
from ramulus.learn.policy.torch_learner import policy_of
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.sharded.placing import units
from ramulus.models.structure import copied, elsewhere
from ramulus.recipes import attnrl, dapo, grpo, hapo, hpt, luffy, ramulus, sft, srft, treepo, treerl
from test_attention import ROWS, columns, inputs, softmax
from tiny import build

ALONE = ("item", "tolist", "__int__", "__float__", "__index__")  # each reads numbers back by themselves
WAITS = ("__bool__", "cpu", "nonzero", "numpy")  # each waits for all that was asked of the device
waits: list[str] = []


class OnDevice(Tensor):
    """A tensor that behaves as if it were on a device: reading it number by number is an error, and what waits for it is counted."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ALONE:
            raise AssertionError(f"{name} reads a tensor of a device number by number")
        if name in WAITS:
            waits.append(name)
        answer = super().__torch_function__(func, types, args, kwargs or {})
        return answer.as_subclass(Tensor) if name == "cpu" else answer


def there(row: Any) -> Any:
    """A row as if on a device."""
    tensors = {f.name: v.as_subclass(OnDevice) for f in fields(row) if isinstance(v := getattr(row, f.name), Tensor)}
    return replace(row, **tensors)


@pytest.fixture(scope="module")
def policies() -> dict[bool, TorchPolicy]:
    """Without and with a value head."""
    options = {"reference_model": True, "attention": "dense"}
    return {value: policy_of(build(double=True), None, value, options) for value in (False, True)}


def test_reading_a_number_is_noticed() -> None:
    column = torch.arange(3).as_subclass(OnDevice)
    for read in (Tensor.tolist, lambda x: x[0].item(), lambda x: [int(one) for one in x], lambda x: float(x[1]), lambda x: range(9)[x[2]]):
        with pytest.raises(AssertionError, match="number by number"):
            read(column)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_method_reads_a_token_by_itself(policies: dict[bool, TorchPolicy], name: str) -> None:
    mix = METHODS[name].mix
    policy = policies[bool(mix.value)]
    batches = rows(mix, forest(1, trees=2, tempered=True), 200)
    for batch in batches:
        waits.clear()
        policy.accumulate(mix, there(batch))
        assert 1 <= len(waits) <= 12, waits
    policy.optimizer.zero_grad()


def grown(length: int) -> Tree:
    """A prompt and two paths that part once, in nodes of so many tokens."""
    tree = Tree.plant(Task("t", (1,) * length, "t"))
    for reward in (1.0, 0.0):
        tree.add(tree.root, [2] * length, Author.POLICY, logprobs=[-1.0] * length, finish="eos", reward=reward)
    return tree


def test_waits_do_not_grow_with_tokens(policies: dict[bool, TorchPolicy]) -> None:
    mix, counts = METHODS["grpo"].mix, []
    for length in (2, 20):
        waits.clear()
        for batch in rows(mix, [grown(length)], 0):
            policies[False].accumulate(mix, there(batch))
        policies[False].score([there(row) for row in score_rows([grown(length)])], ["recomputed", "reference_model"])
        counts.append(list(waits))
    policies[False].optimizer.zero_grad()
    assert counts[0] == counts[1]


SHAPES = {  # hidden, layers, heads, key heads, feed-forward, tied: of Qwen2.5
    "1.5B": (1536, 28, 12, 2, 8960, True, 1.54e9),
    "7B": (3584, 28, 28, 4, 18944, False, 7.62e9),
    "32B": (5120, 64, 40, 8, 27648, False, 32.76e9),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_structure_of_a_large_model_is_made_and_sent_without_its_numbers(name: str) -> None:
    hidden, layers, heads, key_heads, inner, tied, count = SHAPES[name]
    config = Qwen2Config(
        vocab_size=152064 if not tied else 151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=tied, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert abs(sum(p.numel() for p in model.parameters()) - count) < 0.01 * count
    sent = pickle.dumps(copied(model, elsewhere(model, "meta")))
    assert len(sent) < 2_000_000
    ghost = pickle.loads(sent)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in ghost.parameters())
    assert (ghost.lm_head.weight is ghost.model.embed_tokens.weight) == tied
    assert len(units(ghost)) == layers
    largest = max(sum(p.numel() for p in unit.parameters()) for unit in units(ghost))
    assert largest * layers < sum(p.numel() for p in ghost.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "row"), ROWS[:4], ids=[name for name, _ in ROWS[:4]])
def test_compiled_flex_attention_agrees_on_a_cpu(name: str, row: Any) -> None:
    """As it runs on a GPU, compiled; a CPU has no backward pass of it."""
    parent, end = columns(row)
    length, blocks = block_mask(end)
    query, key, value = (x.detach() for x in inputs(length, torch.float32))
    with torch.no_grad():
        out = torch.compile(flex_attention)(query, key, value, block_mask=blocks, enable_gqa=query.shape[1] != key.shape[1])
        expected = softmax(*(x[:, :, : len(parent)] for x in (query, key, value)), visible(end))
        eager, _ = tree_attention(nn.Identity(), query, key, value, tree=plan(parent, end, torch.float32, "flex"))
    torch.testing.assert_close(out.transpose(1, 2)[:, : len(parent)], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(eager[:, : len(parent)], expected, rtol=0, atol=1e-5)


RECIPES = (attnrl, dapo, grpo, hapo, hpt, luffy, ramulus, sft, srft, treepo, treerl)


@pytest.mark.parametrize("module", RECIPES, ids=[module.__name__.rpartition(".")[2] for module in RECIPES])
def test_recipes_for_a_gpu_hold_weights_and_kv_in_bfloat16_and_step_float32(module: Any) -> None:
    run = module.recipe()
    assert run.model.dtype == "bfloat16"
    assert run.autocast, "for models that are named in its place, whose weights are float32 unless model.dtype says otherwise"
    assert run.learner.float32_masters
    assert run.engine.precision in (None, "auto"), "keys and values in the model's dtype, or in bfloat16"
    if hasattr(module, "small"):
        assert module.small().model.dtype == "float32", "for a CPU"
