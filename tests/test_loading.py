"""Loading: weights and files that are not what they should be are refused in one sentence; tokenizer.json wins; adapters are added."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ramulus.cli import main
from ramulus.learn.policy.model import Pretrained, Scratch

SMALL = Scratch("0123456789+-=? \n\tabcdefghijklmnopqrstuvwxyz", hidden=16, layers=3, heads=2, kv_heads=1, max_positions=64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved small model of three layers."""
    model, tokenizer = SMALL()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the weights of a folder."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def configure(folder: Path, **settings: Any) -> None:
    """Change the config of a folder."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def layers(folder: Path, count: int) -> None:
    configure(folder, num_hidden_layers=count, layer_types=None)


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda weights: {key: t for key, t in weights.items() if part not in key})


def nan(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {"model.layers.1.mlp.up_proj.weight": weights["model.layers.1.mlp.up_proj.weight"] * torch.nan})


def wrapped(folder: Path) -> None:
    rewrite(folder, lambda weights: {key.replace("q_proj", "q_proj.base_layer"): t for key, t in weights.items()})


def truncated(folder: Path, share: float = 0.5) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def holding(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


def sharded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    first = {key: t for key, t in weights.items() if "layers.2" not in key}
    save_file(first, folder / "model-1.safetensors", {"format": "pt"})
    index = {key: "model-1.safetensors" if key in first else "model-2.safetensors" for key in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(POINTER)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 538090408\n"
PAGE = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without("layers.1."), r"it lacks model.layers.1.input_layernorm.weight, .* and 9 more"),
        (without("q_proj.bias"), r"it lacks model.layers.0.self_attn.q_proj.bias"),
        (without("norm.weight"), r"it lacks "),
        (without("lm_head"), r"it lacks lm_head.weight"),
        (wrapped, r"it lacks .*q_proj.* and model.layers.0.self_attn.q_proj.base_layer.bias, .* has no place in it"),
        (lambda folder: layers(folder, 2), r"no place for model.layers.2.input_layernorm.weight.*extra_weights"),
        (lambda folder: layers(folder, 4), r"it lacks model.layers.3."),
        (lambda folder: configure(folder, num_hidden_layers=4), r"num_hidden_layers. \(4\) must be equal"),
        (lambda folder: configure(folder, intermediate_size=48), r"has the shape \[16, 64\] where the model wants \[16, 48\] and 8 more"),
        (lambda folder: configure(folder, vocab_size=500), r"has the shape .* where the model wants \[500, 16\]"),
        (nan, r"not all finite numbers: model.layers.1.mlp.up_proj.weight"),
        (truncated, r"model.safetensors is not whole, it has \d+ of \d+ bytes"),
        (lambda folder: truncated(folder, 0.01), r"model.safetensors is not whole"),
        (lambda folder: truncated(folder, 0), r"model.safetensors is empty"),
        (holding("model.safetensors", POINTER), r"model.safetensors is a pointer of Git LFS.*git lfs pull"),
        (holding("model.safetensors", PAGE), r"model.safetensors is a web page"),
        (holding("model.safetensors", b"\x10\0\0\0\0\0\0\0nothing of weights in here"), r"model.safetensors is no file of safetensors"),
        (pickled, r"pytorch_model.bin is a pointer of Git LFS"),
        (sharded, r"lacks 1 of its 2 files of weights, model-2.safetensors first"),
        (holding("tokenizer.json", POINTER), r"tokenizer.json is a pointer of Git LFS"),
        (holding("tokenizer.json", b'{"version": "1.0", "model": {'), r"tokenizer.json is damaged \(.*: download"),
        (holding("config.json", PAGE), r"config.json is a web page"),
        (holding("config.json", b"[]"), r"config.json is damaged \(it is no JSON object\): download"),
    ],
)
def test_what_is_not_whole_is_refused_in_one_sentence(folder: Path, spoil: Callable[[Path], None], said: str) -> None:
    Pretrained(str(folder))()
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        Pretrained(str(folder))()


def test_nothing_is_begun_with_weights_that_are_not_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without("layers.1.")(folder)
    (tmp_path / "problems.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    words = ["train", "grpo", f"model={folder}", f"tasks.path={tmp_path / 'problems.jsonl'}", "rewards=ExactAnswer", f"out={tmp_path / 'run'}"]
    for command in (words, ["eval", str(folder), "--tasks", "chain"]):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        said = capsys.readouterr()
        assert stopped.value.code == 2
        assert "it lacks model.layers.1." in said.err
        assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "run" / "run.json").exists()


def test_weights_without_a_place_can_be_left_out(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {"v_head.weight": torch.ones(1, 16)})
    with pytest.raises(ValueError, match=r"no place for v_head\.weight"):
        Pretrained(str(folder))()
    model, _ = Pretrained(str(folder), extra_weights=True)()
    assert torch.equal(model.lm_head.weight, SMALL()[0].lm_head.weight)


@pytest.mark.parametrize("name", ["my-modle", "models/my-modle", "./my-modle", "models", "my modle"])
def test_a_mistyped_path_is_answered_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    began = time.monotonic()
    with pytest.raises((ValueError, FileNotFoundError), match=r"there is no .*folder|no model folder") as error:
        Pretrained(name)()
    assert time.monotonic() - began < 5
    assert len(str(error.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")
    if name == "my-modle":
        assert "there is my-model" in str(error.value)


# tokenizers


def test_the_file_of_the_tokenizer_wins(folder: Path) -> None:
    """A Metaspace tokenizer in a Qwen2 folder, which transformers reads as Qwen2's byte-level one."""
    alphabet = ["<eos>", "<unk>", "▁", *"0123456789+-=?abcdefghijklmnopqrstuvwxyz", "ab", "▁a"]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [("a", "b"), ("▁", "a")], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    _, tokenizer = Pretrained(str(folder))()
    text = "1 + ab a = 3"
    assert tokenizer(text).input_ids == made.encode(text).ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == "<eos>"


def test_a_tokenizer_that_loses_spaces_is_said(folder: Path) -> None:
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<eos>", "<unk>", "1", "2", "3", "+", "="])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    with pytest.warns(UserWarning, match="does not keep spaces and line breaks"):
        Pretrained(str(folder))()


def test_a_tokenizer_that_keeps_them_is_not_warned_of(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Pretrained(str(folder))()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_weights_in_8_bits_by_blocks_are_plain_ones(tmp_path: Path, dtype: str) -> None:
    """Dequantised wherever they are read, of one dtype, and written like any other."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=20)
    model, (_, tokenizer) = LlamaForCausalLM(config), SMALL()
    written: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if weight.dim() < 2 or "embed" in name or "lm_head" in name:
            written[name] = weight.to(torch.bfloat16)
            continue
        tall, wide = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
        scale = torch.full((tall, wide), float(weight.abs().max()) / 448)
        written[name] = (weight / scale[0, 0]).to(torch.float8_e4m3fn)
        written[f"{name}_scale_inv"] = scale
        model.get_parameter(name).data = written[name].float() * scale[0, 0]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "fp8")
    save_file(written, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    eighth = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
    configure(tmp_path / "fp8", quantization_config=eighth, dtype="bfloat16")
    wanted = getattr(torch, "bfloat16" if dtype == "auto" else dtype)
    with pytest.warns(UserWarning, match=rf"in 8 bits, dequantised to {str(wanted).removeprefix('torch.')}"):
        read, _ = Pretrained(str(tmp_path / "fp8"), dtype=dtype)()
    assert {parameter.dtype for parameter in read.parameters()} == {wanted}
    ids = torch.tensor([[4, 5, 6, 7]])
    torch.testing.assert_close(read(ids).logits.float(), model(ids).logits, rtol=0, atol=0.02)
    for part in (read, tokenizer):
        part.save_pretrained(tmp_path / "again")
    again, _ = Pretrained(str(tmp_path / "again"), dtype=dtype)()
    assert torch.equal(again(ids).logits, read(ids).logits)
    assert all(parameter.requires_grad for parameter in read.parameters())


# adapters


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """Adapters of that model, not at zero."""
    from peft import LoraConfig, get_peft_model

    model, _ = Pretrained(str(folder))()
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = str(folder)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_training_starts_from_adapters(folder: Path, adapter: Path) -> None:
    """Their folder alone, or with the model they are of: the same plain model, which answers as peft's does."""
    from peft import PeftModel

    ids = torch.tensor([[4, 5, 6, 7]])
    base, _ = Pretrained(str(folder))()
    plain = base(ids).logits
    right = PeftModel.from_pretrained(base, adapter)(ids).logits
    assert not torch.allclose(plain, right, atol=1e-3)
    for source in (Pretrained(str(adapter)), Pretrained(str(folder), adapter=str(adapter))):
        model, tokenizer = source()
        assert type(model).__name__ == "Qwen2ForCausalLM"
        assert model.state_dict().keys() == SMALL()[0].state_dict().keys()
        torch.testing.assert_close(model(ids).logits, right, atol=1e-5, rtol=1e-5)
        assert tokenizer.eos_token == "<eos>"
        assert all(parameter.requires_grad for parameter in model.parameters()), "all of it is trained"


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
)
def test_adapters_of_the_ends_of_a_tied_model_are_of_one_end(folder: Path, tmp_path: Path, options: dict) -> None:
    """The same logits as by peft, also once written and read again; the head and the embeddings are two matrices where they must be."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    base, tokenizer = Pretrained(str(folder))()
    config = type(base.config)(**base.config.to_dict() | {"tie_word_embeddings": True})
    base = type(base)(config).float()
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "tied")
    tuned = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "tied")
    tuned.save_pretrained(tmp_path / "adapter")
    ids, ends = torch.tensor([[4, 5, 6, 7]]), "norm" not in options.get("modules_to_save", ())
    right = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "tied"), tmp_path / "adapter").eval()(ids).logits
    with pytest.warns(UserWarning, match="from here on it has two") if ends else nullcontext():
        model, _ = Pretrained(str(tmp_path / "tied"), adapter=str(tmp_path / "adapter"))()
    torch.testing.assert_close(model(ids).logits, right, atol=1e-5, rtol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (model.get_input_embeddings().weight is not model.get_output_embeddings().weight) == ends
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "written")
    torch.testing.assert_close(Pretrained(str(tmp_path / "written"))()[0](ids).logits, right, atol=1e-5, rtol=1e-5)


def test_adapters_that_cannot_be_added_to_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    biased = LoraConfig(r=2, target_modules=["o_proj"], lora_bias=True, init_lora_weights=False)
    prompts, prefixes = (kind(task_type="CAUSAL_LM", num_virtual_tokens=2) for kind in (PromptTuningConfig, PrefixTuningConfig))
    for name, config, words in (
        ("biased", biased, "of the kind LORA, cannot be added to weights: "),
        ("prompts", prompts, "of the kind PROMPT_TUNING, which is added to prompts, not to weights"),
        ("prefixes", prefixes, "of the kind PREFIX_TUNING, which is added to prompts, not to weights"),
    ):
        tuned = get_peft_model(Pretrained(str(folder))()[0], config)
        tuned.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=words):
            Pretrained(str(folder), adapter=str(tmp_path / name))()


def test_adapters_that_do_not_fit_are_refused(folder: Path, adapter: Path, tmp_path: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match=r"are of '.*gone', which is not there: set model.path to that model and model.adapter="):
        Pretrained(str(adapter))()
    other, tokenizer = Scratch("0123456789+", hidden=8, layers=3, heads=2, kv_heads=1)()
    for saved in (other, tokenizer):
        saved.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="are not of this model"):
        Pretrained(str(tmp_path / "other"), adapter=str(adapter))()
    with pytest.raises(FileNotFoundError, match="there are no adapters in"):
        Pretrained(str(folder), adapter=str(folder))()
    (adapter / "adapter_model.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match="is a pointer of Git LFS"):
        Pretrained(str(folder), adapter=str(adapter))()
