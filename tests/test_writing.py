"""What is written: read back and compared, with LoRA on every kind of layer, and under the names that other readers look for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from architectures import build as build_kind
from ramulus.learn.policy.in_process import restored, saved
from ramulus.learn.policy.lora import Lora, merged
from ramulus.learn.policy.model import Pretrained, Scratch
from ramulus.learn.policy.torch_learner import policy_of
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.policy.writing import read_back, tokenizer_for_all, try_writing
from ramulus.models.precision import widened

TOKENIZER = Scratch("0123456789+-=? \n", hidden=16)()[1]
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 64}
BASE = {"rope_type": "default", "rope_theta": 5e5}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4},
    "gemma3_text": {"head_dim": 8},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def build(family: str, rope: dict[str, Any] = BASE) -> Any:
    """A tiny random model of a family."""
    positions = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}} if family == "gemma3_text" else rope
    given = {} if family == "gpt2" else {"rope_parameters": json.loads(json.dumps(positions))}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **FAMILIES[family], **given)).eval()


@pytest.mark.parametrize(
    ("family", "lora"),
    [(family, lora) for family in FAMILIES for lora in (None, Lora(2))],
)
def test_what_is_written_is_the_model(family: str, lora: Lora | None, tmp_path: Path) -> None:
    """The folder answers as the trained model does, under the names that the family has."""
    model = build(family)
    names = set(model.state_dict())
    policy = TorchPolicy(model, TOKENIZER, lora=lora)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    policy.write(tmp_path)
    assert set(policy.weights()) == names
    again, tokenizer = Pretrained(str(tmp_path))()
    ids = (torch.arange(40)[None] * 7 + 1) % 64
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-4)
    assert tokenizer("1+2").input_ids == TOKENIZER("1+2").input_ids


def test_a_writer_that_loses_something_is_noticed(tmp_path: Path) -> None:
    """Weights, positions and spelling are each held against what was meant to be written."""
    model = build("qwen2", YARN)
    policy = TorchPolicy(model, TOKENIZER)
    policy.write(tmp_path)
    state = policy.weights()
    read_back(tmp_path, model, TOKENIZER, state)
    with pytest.raises(RuntimeError, match=r"its lm_head.weight differs"):
        read_back(tmp_path, model, TOKENIZER, state | {"lm_head.weight": state["lm_head.weight"] + 1e-6})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(RuntimeError, match="answers otherwise than the one that was written"):
        read_back(tmp_path, model, TOKENIZER, state)
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = Scratch("9876543210+-=? \nabc", hidden=16)()[1]
    with pytest.raises(RuntimeError, match=r"tokenizer in .* spells otherwise"):
        read_back(tmp_path, model, other, state)
    file = tmp_path / "model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if "layers.1" not in key}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks model.layers.1"):
        read_back(tmp_path, model, TOKENIZER, state)


def test_it_is_read_back_once_and_leaves_the_generators_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = []
    monkeypatch.setattr("ramulus.learn.policy.torch_policy.read_back", lambda *given: times.append(1) or read_back(*given))
    policy = TorchPolicy(build("qwen2"), TOKENIZER)
    before = torch.get_rng_state()
    for _ in range(3):
        policy.write(tmp_path)
    assert times == [1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("family", "rope", "wanted"),
    [
        ("llama", BASE, {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float32"}),
        ("qwen2", YARN, {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
        ("gemma3_text", YARN, {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
        ("gpt_neox", BASE | {"partial_rotary_factor": 0.5}, {"rotary_emb_base": 5e5, "rotary_pct": 0.5}),
        ("qwen3_moe", BASE, {"num_experts": 4, "num_local_experts": 4}),
    ],
)
def test_other_readers_find_their_names(family: str, rope: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    """Those of transformers 4, which vLLM and llama.cpp's converter share; transformers 5 reads the same config as before."""
    model = build(family, rope)
    TorchPolicy(model, TOKENIZER).write(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert {name: said[name] for name in wanted} == wanted
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_tokenizer_keeps_the_class_it_came_with(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizer"}))
    build("llama").save_pretrained(tmp_path)
    model, tokenizer = Pretrained(str(tmp_path))()
    TorchPolicy(model, tokenizer).write(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizer"
    said = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "is_local": True, "eos_token": "<eos>"}
    assert tokenizer_for_all(said, None) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"], "eos_token": "<eos>",
    }  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_what_adapters_learn_in_half_precision_is_written_whole(family: str, tmp_path: Path) -> None:
    """Steps so small that bfloat16 weights would not show them shift log-probs alike once they are read again, by default and by Pretrained."""
    build(family).bfloat16().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    model = Pretrained(str(tmp_path / "base"), dtype="bfloat16")()[0]  # with rotary angles in float32
    ids = (torch.arange(40)[None] * 7 + 1) % 64
    with widened(model):
        before = model(ids).logits.log_softmax(-1)
    policy = TorchPolicy(model, TOKENIZER, lora=Lora(2))
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(torch.randn_like(parameter) * 1e-4)
    with widened(model):
        learned = model(ids).logits.log_softmax(-1) - before
    assert 0 < float(learned.abs().mean()) < 1e-2
    folder = tmp_path / "written"
    policy.write(folder)
    policy.write(folder)
    for again in (AutoModelForCausalLM.from_pretrained(folder).eval(), Pretrained(str(folder))()[0]):
        lost = again(ids).logits.log_softmax(-1) - before - learned
        assert float(lost.abs().mean()) < 0.01 * float(learned.abs().mean())
    assert {str(t.dtype) for name, t in load_file(folder / "model.safetensors").items() if "norm" in name or "embed" in name} == {"torch.bfloat16"}


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("qwen2", ("q_proj", "lm_head"), "names lm_head, the output layer, which cannot have adapters"),
        ("llama", ".*(q_proj|embed_tokens)", "names model.embed_tokens, embeddings, which"),
        ("gpt2", ("wte",), "names transformer.wte, embeddings"),
        ("qwen2", ("nothing",), "nothing"),
    ],
)
def test_adapters_that_would_not_be_trained_are_refused(kind: str, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchPolicy(build(kind), lora=Lora(2, targets=targets))


def test_adapters_are_tried_and_what_they_leave_is_said() -> None:
    with pytest.raises(ValueError, match=r"^PhimoeForCausalLM cannot be trained by LoRA with lora.targets='all-linear' \(AttributeError: [^\n]*$"):
        TorchPolicy(build_kind("phimoe"), lora=Lora(2))
    with pytest.warns(UserWarning, match=r"LoRA adapts 14% of the numbers in this model's matrices, .*experts.gate_up_proj and others"):
        policy = TorchPolicy(build_kind("gpt_oss"), lora=Lora(2))
    assert all(parameter.grad is None for parameter in policy.trainable.values())


def test_merging_changes_nothing_in_place() -> None:
    model = build("qwen3_moe")
    policy = TorchPolicy(model, TOKENIZER, lora=Lora(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert policy.trainable


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "gemma4_text"])
def test_what_attends_or_turns_in_its_own_way_is_written(kind: str, tmp_path: Path) -> None:
    """Soft caps, sinks, and positions whose settings transformers 4 has no names for."""
    model = build_kind(kind)
    TorchPolicy(model).write(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = (torch.arange(40)[None] * 7 + 1) % 64
    model.set_attn_implementation("eager")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-4)


def test_what_cannot_be_saved_is_refused_before_work(tmp_path: Path) -> None:
    """In one sentence; also by its settings alone, where its weights are too large to try."""
    with pytest.raises(ValueError, match=r"^Emu3ForCausalLM cannot be saved so that it can be read again, .*Unrecognized configuration class[^\n]*$"):
        policy_of(build_kind("emu3"), None, False, {})
    model = build("qwen2")
    model.generation_config.temperature = 0.5
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=r"GenerationConfig is invalid: .*`temperature`"):
            policy_of(model.to(dtype), TOKENIZER, False, {})


def test_settings_alone_are_tried_where_weights_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2")
    assert try_writing(model, TOKENIZER, None)
    monkeypatch.setattr("ramulus.learn.policy.writing.TRIED_WHOLE", 1000)
    assert not try_writing(model, TOKENIZER, None)
    model.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        try_writing(model, TOKENIZER, None)


def test_steps_last_where_the_model_cannot_be_written(tmp_path: Path) -> None:
    """Its checkpoint is warned of, and holds all that a run goes on from."""
    policy, other = TorchPolicy(build_kind("emu3")), TorchPolicy(build_kind("emu3"))
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(1)
    with pytest.warns(UserWarning, match="cannot be relied on .*: the run can be resumed from there"):
        state = saved(policy, tmp_path)
    restored(other, tmp_path, state)
    assert all(torch.equal(parameter, other.trainable[name]) for name, parameter in policy.trainable.items())


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_came_with_a_model_is_written_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And run again without being asked about."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    build("llama").save_pretrained(tmp_path / "own")
    TOKENIZER.save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own/config.json").read_text())
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    (tmp_path / "own/config.json").write_text(json.dumps(config | {"model_type": "own_llama", "auto_map": names}))
    (tmp_path / "own/own_code.py").write_text(CODE)
    model, tokenizer = Pretrained(str(tmp_path / "own"), trust_remote_code=True)()
    policy = policy_of(model, tokenizer, False, {})
    assert policy.written
    TorchPolicy(model, tokenizer).write(tmp_path / "written")
    assert type(Pretrained(str(tmp_path / "written"), trust_remote_code=True)()[0]).__name__ == "OwnForCausalLM"
