"""In which numbers the engine computes and what it keeps: planned as the engine does it, whatever the model's dtype, adapters and heads are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from architectures import build
from ramulus.engine import memory
from ramulus.engine.factory import engine_traits
from ramulus.engine.local.factory import Local, usual_memory
from ramulus.engine.local.forward import ModelForward
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.model import Pretrained, Scratch
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.models.sizes import sizes_of, sizes_of_model
from ramulus.recipes import grpo
from ramulus.run import diagnosis
from ramulus.run.config.recipe import Run
from ramulus.run.memory.model import planned_sizes
from ramulus.run.memory.step import Site, own_dtype, sampling_of, step_memory

pytestmark = pytest.mark.usefixtures("torch_as_it_was")
CONFIG = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}


def llama(dtype: str = "float32", **changes: Any) -> Any:
    config = LlamaConfig(**CONFIG | {"num_key_value_heads": 1} | changes)
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def run(dtype: str, precision: Any = None, adapters: bool = False) -> Run:
    changes: dict[str, Any] = {"lora": Lora(4) if adapters else None, "autocast": False, "prompt_limit": 64, "response_limit": 192}
    return replace(grpo.recipe(), model=Pretrained("x", dtype=dtype), engine=Local(precision=precision), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("precision", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_plan_is_what_the_engine_does(dtype: str, precision: Any, adapters: bool) -> None:
    model = llama(dtype)
    if adapters:
        TorchPolicy(model, lora=Lora(4))
    engine = Local(memory_mb=8, precision=precision)(model)
    made, sizes = run(dtype, precision, adapters), sizes_of_model(model)
    geometry, expected = engine.forward.geometry, engine_traits(made.engine).memory.dtype(sampling_of(made, sizes, Site()))
    kernels = engine.forward.name == "compiled"
    plan = step_memory(made, sizes, Site())
    if not kernels and (dtype, precision, adapters) != ("float16", "bfloat16", False):
        pytest.skip(f"no kernels here: {engine.about}")
    assert (geometry.dtype, geometry.token_bytes) == (expected, sizes.token_bytes(expected.itemsize))
    if kernels:
        assert plan.named("the kernels' copy of the weights") == pytest.approx(engine.native_bytes, rel=0.06)  # panels are padded
    else:
        assert plan.named("the sampler's copy of the weights") == sizes.parameters * 2


def test_the_size_check_counts_what_is_copied_of_the_embeddings() -> None:
    model = llama("bfloat16")
    full = LocalEngine(model, slots=2, precision=torch.float32)
    if not full.native_bytes:
        pytest.skip("no kernels here")
    matrices = sizes_of_model(model).matrices * 4
    assert full.native_bytes > 1.5 * matrices
    scarce = LocalEngine(model, slots=2, precision=torch.float32, native_limit=(full.native_bytes + matrices) // 2)
    assert not scarce.native_bytes
    assert "the kernels' copy of the weights takes" in scarce.about


def test_why_a_float16_model_is_not_sampled_in_bfloat16_by_kernels() -> None:
    about = Local(memory_mb=8, precision="bfloat16")(llama("float16")).about
    assert about.startswith("torch's operations in bfloat16")
    assert "the kernels do not round a float16 model to bfloat16" in about
    assert "leave engine.precision out, which samples it in float32" in about


LATENT = "deepseek_v2", "deepseek_v3", "minicpm3", "longcat_flash"
KINDS = "llama", *LATENT, "gemma4_text", "mimo_v2_flash", "gpt_oss", "gpt2", "gemma3_text", "llama4_text"


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_those_of_the_survey(kind: str) -> None:
    """Latent attention, layers of several shapes, experts: from the model and from its config alone."""
    model = build(kind)
    kept = ModelForward(model).geometry.token_bytes
    before = model.config._attn_implementation, torch.random.get_rng_state()
    assert sizes_of_model(model).token_bytes(4) == sizes_of(model.config).token_bytes(4) == kept
    assert model.config._attn_implementation == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_auto_by_itself_knows_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramulus.engine.local.factory.free_on", lambda device: 10**15)
    model = llama("bfloat16", max_position_embeddings=4096)
    plain = usual_memory(model, 10**5)
    TorchPolicy(model, lora=Lora(2))
    assert usual_memory(model, 10**5) == usual_memory(llama(max_position_embeddings=4096), 10**5) == pytest.approx(2 * plain)


@pytest.mark.parametrize(("files", "says", "expected"), [
    ("float32", None, "float32"), ("bfloat16", None, "bfloat16"), ("float32", "float32", "float32"), ("float32", "bfloat16", "bfloat16"),
])  # fmt: skip
def test_auto_is_the_dtype_of_config_or_files(files: str, says: str | None, expected: str, tmp_path: Path) -> None:
    model, tokenizer = Scratch("0123456789", hidden=32, layers=1, heads=2, kv_heads=1)()
    for part in (model.to(getattr(torch, files)), tokenizer):
        part.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = says
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    made = replace(run("auto"), model=Pretrained(str(tmp_path), dtype="auto"))
    sizes = planned_sizes(made)
    loaded = next(made.model()[0].parameters()).dtype
    assert own_dtype(made, sizes) == getattr(torch, expected) == loaded
    assert own_dtype(replace(made, model=str(tmp_path)), sizes) == torch.float32
    assert step_memory(made, sizes).named("weights") == sizes.parameters * loaded.itemsize


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 16), ("bfloat16", 18), ("float16", 18)])
def test_the_doctor_says_what_training_takes(dtype: Any, bytes_each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half precision with float32 copies, which it makes none of while it looks."""
    model, tokenizer = Scratch("0123456789", hidden=256, layers=4, heads=4, kv_heads=2)()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    made: list[TorchPolicy] = []
    monkeypatch.setattr(diagnosis, "TorchPolicy", lambda *given, **options: made.append(TorchPolicy(*given, **options)) or made[-1])
    monkeypatch.setattr(diagnosis, "_GB", 1.0)
    rows, works = diagnosis.diagnose(str(tmp_path), dtype)
    said, many = dict(rows), sum(p.numel() for p in model.parameters())
    assert works
    assert not made[0].masters.copies
    assert f", {bytes_each * many:.2f} GB with gradients and AdamW's two moments" in said["memory"]
    assert ("float32 copies" in said["memory"]) == (bytes_each == 18)
    whole = replace(run(dtype), mix=replace(grpo.recipe().mix, kl_coef=0.0))
    parts = step_memory(whole, sizes_of_model(model), Site()).parts
    named = "weights", "float32 masters", "optimizer", "gradients"
    assert sum(part.bytes for part in parts if part.name in named and "step" in part.phases) == bytes_each * many


def test_a_model_that_ranks_sample_with_on_a_gpu_is_counted_once() -> None:
    sizes = sizes_of_model(Scratch("0123456789+=?", hidden=16, layers=1, heads=2, kv_heads=1)()[0])
    step = memory.PlannedSampling(sizes, torch.bfloat16, 8, 64, 32, cuda=True, apart=True)
    parts = memory.EngineMemory(precision="auto").parts(step, 2**20)
    assert parts["the sampler's model"] == 2 * sizes.parameters
    assert parts["the sampler's copy of the weights"] == 0
    served = memory.EngineMemory(precision="float32", kernels=False).parts(step, 2**20)
    assert (served["the sampler's model"], served["the sampler's copy of the weights"]) == (0, 4 * sizes.parameters)
