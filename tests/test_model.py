"""Models and tokenizers: built from nothing, loaded from folders, and every way a folder can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ramulus.engine.local.local_engine import LocalEngine
from ramulus.learn.policy.model import Pretrained, Scratch
from ramulus.learn.policy.torch_policy import TorchPolicy

ALPHABET = "0123456789+-=? \n\taZéß漢"
SMALL = Scratch(ALPHABET, hidden=16, layers=1, heads=2, kv_heads=1, max_positions=64)


@pytest.fixture(scope="module")
def tokenizer():
    return SMALL()[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved small model."""
    model, tokenizer = SMALL()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@given(text=st.text(alphabet=ALPHABET))
def test_text_comes_back(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer) -> None:
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.encode("X") == [tokenizer.unk_token_id]
    assert tokenizer.decode([*tokenizer.encode("1+1"), tokenizer.eos_token_id], skip_special_tokens=True) == "1+1"


def test_one_token_a_character() -> None:
    alphabet = "0123456789+-=? \n"
    model, tokenizer = Scratch(alphabet, hidden=16, layers=1, heads=2, kv_heads=1)()
    assert len(tokenizer) == len(alphabet) + 3 == model.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("beside", ["a model", "nothing"])
def test_tokenizer_survives_saving(tokenizer, folder: Path, beside: str) -> None:
    if beside == "nothing":
        (folder / "config.json").unlink()
    again = AutoTokenizer.from_pretrained(folder)
    text = "12+3 =\n\t?漢 a "
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_scratch_is_seeded_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = SMALL()[0], SMALL()[0]
    other = Scratch(ALPHABET, hidden=16, layers=1, heads=2, kv_heads=1, seed=1)()[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not one.training


def test_the_quickstart_s_size() -> None:
    model, _ = Scratch("0123456789+-=?\n ", hidden=128, layers=2, heads=4, kv_heads=2)()
    assert 0.4e6 < sum(p.numel() for p in model.parameters()) < 0.6e6


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden": 30, "heads": 4}, "hidden=30"),
        ({"hidden": 12, "heads": 4}, "even multiple"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3"),
        ({"layers": 0}, "at least 1"),
        ({"alphabet": ""}, "alphabet"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scratch(**{"alphabet": "ab", **sizes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_pretrained_loads_what_was_saved(folder: Path, dtype: str) -> None:
    model, tokenizer = Pretrained(str(folder), dtype)()  # type: ignore[arg-type]
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("1 +\n1")) == "1 +\n1"
    if dtype == "float32":
        saved = AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))


@pytest.mark.parametrize("path", ["./nothing/here", "/nothing/here", "~/nothing-here", "a/b/c"])
def test_missing_folder(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no model folder .*(nothing.here|a/b/c)"):
        Pretrained(path)()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("config.json", "no config.json"), ("*.safetensors", "no weights"), ("tokenizer*", "no tokenizer")],
)
def test_folder_without_a_part(folder: Path, pattern: str, words: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=words):
        Pretrained(str(folder))()


def test_a_folder_that_is_a_file(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        Pretrained(str(folder / "config.json"))()


def test_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot load the model"):
        Pretrained(str(folder))()


def test_unknown_hub_name_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot load the model 'nobody/nothing-at-all'"):
        Pretrained("nobody/nothing-at-all")()


def as_llama(folder: Path, *without: str) -> None:
    """Save a Llama whose tokenizer lacks some special tokens: AutoTokenizer gives Qwen2 its own ones."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in without}))


def test_tokenizer_without_eos(folder: Path) -> None:
    as_llama(folder, "eos_token")
    with pytest.raises(ValueError, match="no EOS token"):
        Pretrained(str(folder))()


def test_padding_is_eos_where_there_is_none(folder: Path) -> None:
    as_llama(folder, "pad_token")
    _, tokenizer = Pretrained(str(folder))()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_remote_code_is_not_run_unasked(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit\n"
    )
    with pytest.raises(ValueError, match="cannot load the model"):
        Pretrained(str(folder))()
    assert not (folder / "ran").exists()


def test_the_context_can_be_extended(folder: Path, tmp_path: Path) -> None:
    """More positions and another base, in the model, in its angles, and in what it saves."""
    short, _ = Pretrained(str(folder))()
    long, tokenizer = Pretrained(str(folder), max_positions=256, rope={"rope_theta": 40000.0})()
    assert (short.config.max_position_embeddings, long.config.max_position_embeddings) == (64, 256)
    size = long.config.hidden_size // long.config.num_attention_heads
    angles = 40000.0 ** -(torch.arange(0, size, 2) / size)
    torch.testing.assert_close(long.model.rotary_emb.inv_freq, angles)
    assert not torch.allclose(short.model.rotary_emb.inv_freq, angles)
    assert LocalEngine(long).limit == 256
    TorchPolicy(long).write(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    for again in (Pretrained(str(tmp_path / "saved")), Pretrained(str(tmp_path / "saved"), max_positions=256)):
        loaded, _ = again()
        assert loaded.config.max_position_embeddings == 256
        torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, angles)


def test_a_scaled_rope_counts_from_the_first_context(folder: Path, tmp_path: Path) -> None:
    """YaRN measures by the context that the model was trained with, also when the extended model is loaded again."""
    scaled = Pretrained(str(folder), max_positions=256, rope={"rope_type": "yarn", "factor": 4.0})
    model, tokenizer = scaled()
    assert model.config.rope_parameters["original_max_position_embeddings"] == 64
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = replace(scaled, path=str(tmp_path / "saved"))()
    assert again.config.rope_parameters == model.config.rope_parameters
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_positions": 0}, "at least 1, got 0"),
        ({"rope": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is one of .*yarn.* got 'dynamic'"),
        ({"rope": {"theta": 1e6}}, "unknown rope settings theta: known are .*rope_theta"),
        ({"rope": {"rope_type": "yarn"}}, "'yarn' needs factor"),
        ({"rope": {"rope_theta": 0}}, "above 0, got rope_theta=0"),
    ],
)
def test_an_extension_that_makes_no_sense_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Pretrained("model", **options)
