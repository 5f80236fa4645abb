"""The calculator of memory: its parts add up, scale rightly, and are what autograd, peft and the engine really hold."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from architectures import build as build_kind
from ramulus.cli import main
from ramulus.engine.factory import engine_traits
from ramulus.engine.local.factory import Local, usual_memory
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.engine.local.slots import SlotMemory
from ramulus.learn.policy import torch_policy, writing
from ramulus.learn.policy.in_process import InProcess
from ramulus.learn.policy.kept import kept_by_layer, kept_bytes
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.model import Pretrained, Scratch
from ramulus.learn.policy.torch_learner import Torch
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.sharded.factory import Sharded
from ramulus.learn.sharded.sharded_learner import ShardedLearner
from ramulus.models.sizes import PUBLISHED, sizes_of, sizes_of_model
from ramulus.models.smollm2 import fetch
from ramulus.native.build import why
from ramulus.recipes import grpo, hapo, quickstart_real, treepo, treerl
from ramulus.run.config.recipe import Run
from ramulus.run.dry_run import TimedUpdates
from ramulus.run.memory.model import planned_sizes
from ramulus.run.memory.step import (
    HOLES,
    KEPT,
    MOMENTS,
    RANK,
    Site,
    activations,
    casts_of,
    kept_of,
    sampling_of,
    step_memory,
    way_of,
)
from ramulus.run.memory.work import work_of

TOKENS = 128, 384


def llama(**changes: int) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes | {"num_hidden_layers": 3} | changes))


def run(**changes: Any) -> Run:
    model = Scratch("0123456789+=?", hidden=64, layers=3, heads=4, kv_heads=2)
    small: dict[str, Any] = {"model": model, "prompt_limit": 64, "response_limit": 192, "engine": Local()}
    return replace(grpo.recipe(), **small | {"autocast": False, "activation_checkpointing": False} | changes)


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("fused", {}),
        ("autocast", {"autocast": True}),
        ("half", {}),
        ("lora", {"lora": Lora(4)}),
        ("lora autocast", {"lora": Lora(4), "autocast": True}),
        ("plain", {}),
    ],
)
def test_activations_are_what_autograd_keeps(way: str, options: dict[str, Any]) -> None:
    def a_token(layers: int) -> float:
        model = llama(num_hidden_layers=layers)
        policy = TorchPolicy(model.bfloat16() if way == "half" else model, **options)
        if way == "plain":
            policy.patches = []
        few, many = (kept_bytes(policy, tokens) for tokens in TOKENS)
        return (many - few) / (TOKENS[1] - TOKENS[0])

    sizes = sizes_of(llama().config)
    way = way_of(run(**options), Site(), sizes) if way == "autocast" else way
    widths = sizes.hidden, sizes.query, sizes.key, sizes.inner
    expected = sum(a * b for a, b in zip(KEPT[way], widths, strict=True)) + (RANK * 4 if "lora" in way else 0)
    assert (a_token(3) - a_token(1)) / 2 == pytest.approx(expected, rel=0.1)


WAYS: dict[str, dict[str, Any]] = {
    "float32": {}, "autocast": {"autocast": True}, "bfloat16": {}, "lora": {"lora": Lora(4)}, "lora autocast": {"lora": Lora(4), "autocast": True},
}  # fmt: skip


def family(kind: str, layers: int) -> Any:
    """A model of this kind, whose feed-forward layers and heads are about as wide beside its hidden state as real ones'."""
    widths = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    more = {"vocab_size": 64, "sliding_window": 512, "pad_token_id": 0}
    more |= {"num_local_experts": 4} if kind == "mixtral" else {}
    more |= {"moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2} if kind == "qwen3_moe" else {}
    config = AutoConfig.for_model(kind, **widths | more | {"num_hidden_layers": layers, "max_position_embeddings": 512})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "olmo2", "phi3", "smollm3", "granite", "qwen3_moe", "mixtral"])
def test_activations_are_planned_by_family(kind: str, way: str) -> None:
    def a_token(layers: int) -> float:
        model = family(kind, layers)
        policy = TorchPolicy(model.bfloat16() if way == "bfloat16" else model, **WAYS[way])
        few, many = (kept_bytes(policy, tokens) for tokens in TOKENS)
        return (many - few) / (TOKENS[1] - TOKENS[0])

    sizes = sizes_of_model(family(kind, 1))
    made = run(model=Pretrained("x", dtype="bfloat16") if way == "bfloat16" else Pretrained("x"), **WAYS[way])
    expected = kept_of(way_of(made, Site(), sizes), sizes) + (RANK * 4 if "lora" in way else 0)
    assert expected == pytest.approx(a_token(2) - a_token(1), rel=0.15)


@pytest.mark.parametrize("options", [{}, {"autocast": True}, {"activation_checkpointing": True}, {"lora": Lora(4)}])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_what_a_token_keeps_is_measured_on_the_loaded_model(kind: str, options: dict[str, Any]) -> None:
    model = family(kind, 3)
    policy, sizes = TorchPolicy(model, **options), sizes_of_model(model)
    learner = InProcess(policy)
    layers, weights = policy.layers, {name: x.clone() for name, x in model.state_dict().items()}
    each = asyncio.run(kept_by_layer(learner, sizes))
    assert asyncio.run(kept_by_layer(TimedUpdates(learner), sizes)) == each, "what stands around it hands it on"
    learner.close()
    assert policy.layers is layers
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    policy.layers = []
    few, many = (kept_bytes(policy, tokens) for tokens in (100, 400))
    made = run(**{name: value for name, value in options.items() if name != "activation_checkpointing"})
    kept = [activations(made, replace(sizes, kept=each), Site(), tokens)[0] for tokens in (100, 400)]
    assert kept[1] - kept[0] == pytest.approx(many - few, rel=0.1)


class Measuring:
    """A learner of one's own that knows what it keeps."""

    features = frozenset({"measured"})

    async def kept_bytes(self, tokens: int) -> int:
        return 1000 + tokens * (8 * 96 + 3 * 500)


def test_a_learner_of_ones_own_is_asked_and_one_that_does_not_measure_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner of several ranks has a policy too, whose passes wait for the other ranks."""
    sizes = sizes_of(llama().config)
    assert asyncio.run(kept_by_layer(Measuring(), sizes)) == 500
    assert asyncio.run(kept_by_layer(Measuring(), replace(sizes, positions=40))) == 0.0
    monkeypatch.setattr("ramulus.learn.policy.kept.kept_bytes", lambda *given: pytest.fail("a pass"))
    ranks: Any = SimpleNamespace(policy=TorchPolicy(llama()), features=ShardedLearner.features)
    assert asyncio.run(kept_by_layer(ranks, sizes)) == 0.0


def test_sizes_are_those_of_the_model() -> None:
    config = llama(tie_word_embeddings=True).config
    model, sizes = LlamaForCausalLM(config), sizes_of(config)
    assert sizes.parameters == sizes.active == sum(p.numel() for p in model.parameters())
    engine = LocalEngine(model, slots=4)
    assert sizes.token_bytes(4) == engine.forward.geometry.token_bytes
    assert sizes_of_model(model) == sizes
    policy = TorchPolicy(model, lora=Lora(4))
    assert sizes.adapters(4, "all-linear") == sum(p.numel() for p in policy.trainable.values())
    assert sizes.adapters(4, ("q_proj",)) == 3 * 4 * (96 + 128)


def test_the_kernels_copy_is_counted() -> None:
    config = llama().config
    engine = LocalEngine(LlamaForCausalLM(config), slots=4)
    if not engine.native_bytes:
        pytest.skip(f"no kernels here: {why()}")
    assert sizes_of(config).matrices * 4 == pytest.approx(engine.native_bytes, rel=0.05)  # panels are padded


@pytest.mark.parametrize(("kind", "key", "inner"), [("gemma4_text", 2 * 32, 96), ("gemma3n_text", 2 * 16, 96)])
def test_layers_that_differ_have_the_sizes_of_the_largest(kind: str, key: int, inner: int) -> None:
    model = build_kind(kind)
    sizes = sizes_of_model(model)
    assert (sizes.key, sizes.inner, sizes.layers) == (key, inner, 4)
    assert usual_memory(model, 4) == 2**30
    vars(model.config)["num_hidden_layers"] = None
    with pytest.raises(ValueError, match=f"the memory of a '{kind}' cannot be planned: "):
        sizes_of_model(model)


@pytest.mark.parametrize(("name", "billions"), [("Qwen/Qwen2.5-Math-1.5B", 1.54), ("Qwen/Qwen2.5-7B", 7.62), ("Qwen/Qwen2.5-14B", 14.77)])
def test_published_configs_have_the_published_sizes(name: str, billions: float) -> None:
    from transformers import AutoConfig

    said = dict(PUBLISHED[name])
    assert sizes_of(AutoConfig.for_model(said.pop("model_type"), **said)).parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("recipe", [grpo, treepo, hapo, treerl])
def test_shipped_recipes_are_planned_without_their_model(recipe: Any) -> None:
    made = recipe.recipe()
    memory = step_memory(made, planned_sizes(made))
    assert memory.peak == max(memory.at(phase) for phase in MOMENTS) > 4 * memory.sizes.parameters
    for phase in MOMENTS:
        assert memory.at(phase) == sum(part.bytes for part in memory.parts if phase in part.phases)


def test_parts_scale_as_what_they_are() -> None:
    one = step_memory(run(), planned_sizes(run()), tokens=1024)
    two = step_memory(run(), planned_sizes(run()), tokens=2048)
    assert two.named("activations") == 2 * one.named("activations")
    assert two.named("weights") == one.named("weights")
    wide = run(lora=Lora(8))
    small = step_memory(wide, planned_sizes(wide), tokens=1024)
    assert small.named("optimizer") == 2 * 4 * planned_sizes(wide).adapters(8, "all-linear") < one.named("optimizer")
    again = run(activation_checkpointing=True)
    assert step_memory(again, planned_sizes(again), tokens=1024).named("activations") < one.named("activations") / 3
    shards = step_memory(run(), planned_sizes(run()), Site("cuda", shards=4), tokens=1024)
    assert shards.named("optimizer") == one.named("optimizer") / 4
    assert step_memory(run(), planned_sizes(run()), Site(learner=False)).named("optimizer", "activations") == 0
    more = step_memory(run(), planned_sizes(run()), engine_bytes=2**20)
    assert more.named("keys and values") == 2**20
    assert more.rows < one.rows


def test_holes_are_planned_where_blocks_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of adapters' layers on a CPU: of small models, without a compiler, and in processes of their own."""
    adapted = run(lora=Lora(8))

    def holes(made: Run, parameters: int = 10**8) -> float:
        memory = step_memory(made, replace(planned_sizes(made), parameters=parameters), tokens=1024)
        return memory.named("freed between activations") / memory.named("activations")

    for reason, share in (("", 0.0), ("no compiler", HOLES)):
        monkeypatch.setattr("ramulus.run.memory.step.blocks_refused", lambda reason=reason: reason)
        assert holes(adapted) == pytest.approx(share)
        assert holes(adapted, 10**6) == pytest.approx(HOLES)
        for learner in (Sharded(ranks=2), Torch(process=True)):
            assert holes(replace(adapted, learner=learner)) == pytest.approx(HOLES)
        assert holes(run()) == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_held_while_adapters_are_written_is_planned(dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged weights that are not the model's own, and the model that is read back."""
    model = family("llama", 2).to(getattr(torch, dtype))
    policy = TorchPolicy(model, lora=Lora(2))
    held: dict[str, int] = {}
    own = {x.untyped_storage().data_ptr() for x in model.state_dict().values()}
    read_back, load_weights = writing.read_back, writing.load_weights

    def state_of(folder: Any, model: Any, tokenizer: Any, state: dict[str, torch.Tensor]) -> None:
        held["merged"] = sum(x.nbytes for x in state.values() if x.untyped_storage().data_ptr() not in own)
        read_back(folder, model, tokenizer, state)

    def loaded(*given: Any, **options: Any) -> Any:
        again = load_weights(*given, **options)
        held["again"] = sum(p.nbytes for p in again.parameters())
        return again

    monkeypatch.setattr(torch_policy, "read_back", state_of)
    monkeypatch.setattr(writing, "load_weights", loaded)
    policy.write(tmp_path / "model")
    made = run(model=Pretrained("x", dtype=dtype), lora=Lora(2))
    memory = step_memory(made, sizes_of_model(model))
    assert memory.named("weights with adapters merged") == held["merged"]
    assert memory.named("the model read back") == held["again"]
    plain = step_memory(replace(made, lora=None), sizes_of_model(model))
    assert plain.named("weights with adapters merged", "the model read back") == 0
    large = replace(sizes_of_model(model), parameters=2**31)
    assert step_memory(replace(made, lora=None), large).named("the model read back") == 2**31 * (4 if dtype == "float32" else 2)


def test_rows_are_those_that_the_engine_makes() -> None:
    made, model = run(), run().model()[0]
    engine = LocalEngine(model, slots=64, memory=3 * 2**20)
    work = work_of(made)
    slots = SlotMemory(engine.forward.geometry, 64, 3 * 2**20)
    rows = engine_traits(made.engine).memory.rows(sampling_of(made, sizes_of_model(model), Site()), 3 * 2**20)
    assert rows == slots.room(-(-work.longest // 32) * 32) < 64


def test_the_work_of_a_step_is_read_off_the_rules() -> None:
    assert work_of(treepo.recipe()).paths == treepo.recipe().branching.width
    assert work_of(treerl.recipe()).paths == 6 * (1 + 2 * 2)
    work = work_of(quickstart_real.recipe())
    assert (work.trees, work.paths, work.longest, work.tokens) == (8, 8, 160 + 64, 8 * (160 + 8 * 64))


def ramulus(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return (int(stopped.value.code or 0), *capsys.readouterr())


def test_the_command_line_plans_every_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, said, _ = ramulus(capsys, "plan", "quickstart", "device=cpu")
    assert status == 0
    for words in ("sft: a step with", "treepo: a step with", "activations", "in the backward pass", "sequences of 80 tokens decode together"):
        assert words in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("learner=sharded", "learner.ranks=3"), "that is rank 0, which samples too; each of the other 2 ranks takes at most"),
        (("cluster=ray", "cluster.samplers=2"), "that is the process that learns; each of 2 samplers takes at most"),
        (("cluster=ray", "cluster.trainers=2", "learner=sharded"), "that is rank 0; the other rank takes at most"),
    ],
)
def test_a_plan_says_what_those_beside_it_take(words: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = ramulus(capsys, "plan", "quickstart", "device=cpu", *words)
    assert status == 0
    assert expected in said


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("grpo", "model=./nowhere"), "nowhere"),
        (("grpo", "tokens_per_batch=12"), "tokens_per_batch=12 cannot hold one path"),
        (("grpoo",), "there is no recipe 'grpoo'"),
        (("grpo:small", "model=runs/never"), "runs/never"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], names: str) -> None:
    status, _, said = ramulus(capsys, "plan", *words)
    assert status == 2
    assert names in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_run_on_a_real_model_takes_what_was_planned() -> None:
    """Two steps on SmolLM2, from the start of the process to the last checkpoint; more shapes are in benchmarks/peak.py, which this runs."""
    try:
        fetch()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"SmolLM2-135M-Instruct cannot be had here: {error}")
    root = Path(__file__).parents[1]
    code = "from benchmarks.peak import compared; planned, measured = compared('autocast=false'); print(planned / measured)"
    env = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root, check=True)
    assert float(done.stdout.split()[-1]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, Lora(4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_autocast_keeps_of_weights_is_measured(dtype: str, lora: Lora | None, checkpointing: bool) -> None:
    """The part of what a pass keeps that does not grow with its tokens; frozen weights are kept by the graph, which checkpointing cuts by layers."""
    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, vocab_size=64)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    sizes, run = sizes_of_model(model), replace(grpo.recipe(), lora=lora, autocast=True, activation_checkpointing=checkpointing)
    run = replace(run, model=Pretrained("some", dtype=dtype))
    planned = casts_of(run, sizes, Site("cuda"))
    if checkpointing:
        whole = casts_of(replace(run, activation_checkpointing=False), sizes, Site("cuda"))
        assert planned == (whole / 4 if lora else whole)
        return
    policy = TorchPolicy(model, lora=lora, autocast=True)
    policy.patches = []  # transformers' own layers, as on a GPU
    few, many = kept_bytes(policy, 32), kept_bytes(policy, 64)
    assert planned == pytest.approx(2 * few - many, abs=0.15e6)  # of 1.3 MB
