"""GGUF: what is read is what was written, its tokenizer too; what would be read wrongly is refused in one sentence."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from ramulus import Pretrained, Scratch
from ramulus.cli import run
from ramulus.learn.policy.writing import write_model
from ramulus.run.runtime import eos_of

ALPHABET = "0123456789+=? abcé"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
Q8 = gguf.GGMLQuantizationType.Q8_0


def written(file: Path, kind: str = "qwen2", quantised: bool = False, **more: Any) -> tuple[Any, Any]:
    """Write a tiny model as llama.cpp's converter does; (the model, with the weights that are in the file, and its tokenizer)."""
    model, tokenizer = small(kind)
    config = model.config
    out = gguf.GGUFWriter(file, kind)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if kind == "llama":
        out.add_rope_dimension_count(config.head_dim)
    for name, value in more.get("settings", {}).items():
        out.add_float32(f"{kind}.{name}", value)
    state = model.state_dict()
    for name, tensor in state.items():
        add(out, name, tensor, model, quantised)
    for name, tensor in more.get("tensors", {}).items():
        out.add_tensor(name, tensor)
    write_tokenizer(out, tokenizer, more.get("pre", "gpt-2"))
    for name, token in more.get("ends", {}).items():
        out.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return model, tokenizer


def small(kind: str) -> tuple[Any, Any]:
    """A tiny Qwen2, or a Llama of its sizes, with sharp weights; one token a character and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, tokenizer = Scratch(ALPHABET, hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96, init_std=0.3, max_positions=64)()
    tokenizer.chat_template = TEMPLATE
    if kind == "llama":
        said = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "layer_types")}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**said)).eval()
    return model, tokenizer


def add(out: Any, name: str, tensor: torch.Tensor, model: Any, quantised: bool) -> None:
    """Add a tensor under GGUF's name; where it is quantised the model gets the weights that come back."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    part, suffix = name.rsplit(".", 1)
    *_, layer = part.split("layers.")[-1].partition(".")
    short = whole.get(name) or f"blk.{part.split('layers.')[1].split('.')[0]}.{NAMES[layer]}.{suffix}"
    data = tensor.numpy()
    if quantised and data.ndim == 2:
        blocks = gguf.quants.quantize(data, Q8)
        tensor.copy_(torch.from_numpy(gguf.dequantize(blocks, Q8)))
        data = tensor.numpy()
    counts = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    heads = next((count for part, count in counts.items() if f".{part}." in short), None)
    if heads and model.config.model_type == "llama":  # whose rotary pairs llama.cpp lays beside each other
        data = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
    if quantised and data.ndim == 2:
        out.add_tensor(short, gguf.quants.quantize(np.ascontiguousarray(data), Q8), raw_dtype=Q8)
    else:
        out.add_tensor(short, np.ascontiguousarray(data))


def write_tokenizer(out: Any, tokenizer: Any, pre: str) -> None:
    """The tokenizer's part of a GGUF."""
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list([token for token, _ in by_id])
    out.add_token_types([3 if token.startswith("<") and token.endswith(">") else 1 for token, _ in by_id])
    out.add_token_merges([" ".join(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]])
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_pad_token_id(tokenizer.pad_token_id)
    out.add_unk_token_id(tokenizer.unk_token_id)
    out.add_chat_template(TEMPLATE)


def read(path: Path, **options: Any) -> tuple[Any, Any, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, tokenizer = Pretrained(str(path), **options)()
    return model, tokenizer, [str(one.message) for one in said if "GGUF" in str(one.message)]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("quantised", [False, True])
def test_what_is_read_is_what_was_written(tmp_path: Path, kind: str, quantised: bool) -> None:
    model, tokenizer = written(tmp_path / "tiny.gguf", kind, quantised)
    again, spelled, said = read(tmp_path / "tiny.gguf")
    ids = torch.tensor([tokenizer("12+3=15? abcé").input_ids])
    assert len(said) == 1
    assert ("dequantised" in said[0]) is quantised
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert spelled("12+3=15? abcé").input_ids == ids[0].tolist()
    assert spelled.decode(ids[0]) == "12+3=15? abcé"
    assert spelled.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "1+1"}]
    assert spelled.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "1+1="


def test_a_checkpoint_of_it_is_safetensors(tmp_path: Path) -> None:
    model, tokenizer = written(tmp_path / "tiny.gguf", "llama", quantised=True)
    again, spelled, _ = read(tmp_path)
    assert all(parameter.requires_grad for parameter in again.parameters())
    write_model(tmp_path / "out", again, spelled)
    back, after, said = read(tmp_path / "out")
    ids = torch.tensor([tokenizer("7+8=15").input_ids])
    assert not said
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert after("7+8").input_ids == tokenizer("7+8").input_ids
    assert after.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"settings": {"rope.scaling.factor": 4.0}}, "does not read rope.scaling.factor=4.0 of .* or give its rotary positions by model.rope"),
        ({"settings": {"attn_logit_softcapping": 50.0, "rope.scaling.factor": 4.0}}, "attn_logit_softcapping=50.0, rope.scaling.factor=4.0"),
        ({"settings": {"attention.scale": 0.3}}, "attention.scale="),
        ({"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "no place for rope_freqs.weight .* by model.rope"),
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}}, "no place for blk.0.attn_q_norm.weight"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    written(tmp_path / "tiny.gguf", "llama", **more)
    with pytest.raises(ValueError, match=words) as refused:
        read(tmp_path / "tiny.gguf")
    assert "\n" not in str(refused.value)


def test_rotary_positions_that_are_given_are_not_missed(tmp_path: Path) -> None:
    more: dict[str, Any] = {"settings": {"rope.scaling.factor": 4.0}, "tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}
    written(tmp_path / "tiny.gguf", "llama", **more)
    model, _, _ = read(tmp_path / "tiny.gguf", rope={"rope_type": "linear", "factor": 4.0})
    assert model.config.rope_parameters["rope_type"] == "linear"


def test_which_file(tmp_path: Path) -> None:
    written(tmp_path / "one.gguf")
    model, tokenizer, _ = read(tmp_path)
    written(tmp_path / "two.gguf", "llama")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files, one.gguf, two.gguf: .* model.file=one.gguf"):
        read(tmp_path)
    assert read(tmp_path, file="two.gguf")[0].config.model_type == "llama"
    with pytest.raises(FileNotFoundError, match=r"holds no three.gguf: it has one.gguf, two.gguf"):
        read(tmp_path, file="three.gguf")
    write_model(tmp_path, model, tokenizer)  # beside them: a folder as always
    assert read(tmp_path)[2] == []


@pytest.mark.parametrize("kept", [0, 3, 100, 2000, 20_000, -1])
def test_a_torn_file_is_said_to_be_one(tmp_path: Path, kept: int) -> None:
    written(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match="download or copy it again") as refused:
        read(tmp_path / "tiny.gguf")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.gguf", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.gguf", b"<!doctype html>", "web page"),
        ("a.gguf", b"PK\x03\x04" + b"\0" * 600, "is no GGUF"),
        ("a-00001-of-00002.gguf", b"GGUF", "llama-gguf-split --merge"),
        ("a.gguf", None, "there is no file"),
    ],
)
def test_what_is_no_gguf(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read(tmp_path / name)


@pytest.mark.parametrize(("kind", "words"), [(99, "does not know"), (24, "in I8, which cannot be dequantised")])
def test_unknown_quantisation(tmp_path: Path, kind: int, words: str) -> None:
    written(tmp_path / "tiny.gguf")
    raw = bytearray((tmp_path / "tiny.gguf").read_bytes())
    name = b"output_norm.weight"
    spot = raw.index(name) + len(name) + 4 + 8  # behind the number of dimensions and the only one of them
    raw[spot : spot + 4] = kind.to_bytes(4, "little")
    (tmp_path / "tiny.gguf").write_bytes(bytes(raw))
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "tiny.gguf")


def test_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "ramulus\[gguf\]"'):
        read(tmp_path / "tiny.gguf")


def test_numbers_are_split_as_their_tokenizer_was_trained(tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf", pre="smollm")
    _, tokenizer, _ = read(tmp_path / "tiny.gguf")
    assert [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")] == ["a", "ĠĠ", "1", "2"]
    written(tmp_path / "tiny.gguf", pre="some-other")
    with pytest.warns(UserWarning, match="does not know how tiny.gguf splits text \\('some-other'\\)"):
        Pretrained(str(tmp_path / "tiny.gguf"))()


def test_files_of_another_model_beside_it_are_not_mixed_in(tmp_path: Path) -> None:
    _, tokenizer = written(tmp_path / "tiny.gguf")
    other = Scratch("xyz", hidden=16)()[1]
    other.chat_template = "another"
    other.add_tokens(["<other>"])
    other.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "max_length": 3}')
    model, spelled, _ = read(tmp_path / "tiny.gguf")
    assert tokenizer.get_vocab().items() <= spelled.get_vocab().items()
    assert not {"<other>", "x"} & spelled.get_vocab().keys()
    assert (spelled.chat_template, spelled.name_or_path) == (TEMPLATE, str(tmp_path / "tiny.gguf"))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf", ends={"eot": 5, "eom": 6})
    model, tokenizer, _ = read(tmp_path / "tiny.gguf")
    assert {tokenizer.eos_token_id, 5, 6} <= set(eos_of(model, tokenizer))
    write_model(tmp_path / "again", model, tokenizer)
    assert {5, 6} <= set(eos_of(*Pretrained(str(tmp_path / "again"))()))


@pytest.mark.slow
def test_a_run_goes_on_as_safetensors(tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf", quantised=True)
    (tmp_path / "sums.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "2+1", "answer": "3"}\n')
    words = ["train", "grpo", f"model={tmp_path / 'tiny.gguf'}", f"tasks={tmp_path / 'sums.jsonl'}", f"out={tmp_path / 'run'}", "response_limit=8"]
    words += ["branching.n=2", "schedule.prompts=2", "save_every=1", "tensorboard=false", "rewards=Boxed"]
    assert run([*words, "steps=1"]) == 0
    assert run([*words, "steps=2", "--resume"]) == 0
    assert list((tmp_path / "run").glob("**/model/model.safetensors"))


def test_a_transformers_that_reads_no_gguf_as_we_do_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else goes with transformers 5.5.3 on."""
    (tmp_path / "old.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf", None)
    with pytest.raises(ImportError, match=r"old\.gguf is GGUF, which needs transformers 5\.17 or newer, and this is \d"):
        Pretrained(str(tmp_path / "old.gguf"))()
