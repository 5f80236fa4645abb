"""TorchPolicy: the packed tree against its separate sequences, every option, checkpoints, and what must be refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from engines import KERNELS
from forests import VOCABULARY, forest
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Everything
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior, Itself, Recomputed
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy import head as head_module
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.model import Scratch
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.torch_policy import TorchPolicy
from tiny import FAMILIES, SIZES, build

LEARN_ALL = Mix((Term(Estimator(Everything(), Itself(), Constant(1.0)), (Author.POLICY, Author.EXPERT)),))
REINFORCE = Mix((Term(Estimator(Everything(), Behavior(), GroupMean())),))


def batches(
    trees: list[Tree], budget: int = 0, mix: Mix = LEARN_ALL, dtype: torch.dtype = torch.float32
) -> list[TreeBatch]:
    return pack(trees, mix.credit(trees), mix, budget, dtype)


Spot = tuple[tuple[int, ...], float]  # the token ids of a path down to a token, and its temperature


def spots(row: TreeBatch) -> dict[Spot, int]:
    """Where each token of a row stands."""
    paths: list[tuple[int, ...]] = []
    for t in range(len(row)):
        up = int(row.parent[t])
        paths.append((*(() if up == t else paths[up]), int(row.token[t])))
    return {(path, round(float(row.temperature[t]), 5)): t for t, path in enumerate(paths)}


def sequences(model: nn.Module, trees: list[Tree]) -> dict[Spot, tuple[Tensor, Tensor, Tensor]]:
    """(tempered, plain, entropy) of every learnable token, by plain forward passes of one path each."""
    values = {}
    for leaf in (leaf for tree in trees for leaf in tree.leaves()):
        path = leaf.prefix()
        logits = model(input_ids=torch.tensor([path]), use_cache=False).logits[0]
        at = 0
        for node in leaf.line():
            for k, token in enumerate(node.tokens):
                if node.author in (Author.POLICY, Author.EXPERT):
                    heat = node.column("temperature")[k] if node.logprobs else 1.0
                    logp, hot = logits[at - 1].log_softmax(-1), (logits[at - 1] / heat).log_softmax(-1)
                    values[tuple(path[: at + 1]), round(heat, 5)] = hot[token], logp[token], -(logp.exp() * logp).sum()
                at += 1
    return values


def compare(model: nn.Module, trees: list[Tree], rows: list[TreeBatch], policy: TorchPolicy, tolerance: float) -> None:
    """Log-probs, entropy and the gradient of a random weighting of them, packed against separate."""
    expected = sequences(model, trees)
    generator = torch.Generator().manual_seed(1)
    ours, theirs, seen = torch.zeros(()), torch.zeros(()), 0
    for row in rows:
        columns = policy.evaluate(row, entropy_grad=True)[:3]
        for spot, t in spots(row).items():
            if not bool((row.weight[:, t] != 0).any()):
                continue
            for column, value in zip(columns, expected[spot], strict=True):
                assert abs(float(column[t].detach()) - float(value.detach())) < tolerance
                factor = torch.randn((), generator=generator, dtype=torch.float64)
                ours, theirs, seen = ours + factor * column[t], theirs + factor * value, seen + 1
    assert seen > 20
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        assert float((a - b).abs().max()) < tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("way", [pytest.param("stack", marks=KERNELS), "dense", "paths"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_tree_equals_sequences_float64(family: str, way: str, seed: int) -> None:
    model = build(family, double=True)
    trees = forest(seed, tempered=True)
    policy = TorchPolicy(model, attention=way, chunk=7)
    compare(model, trees, batches(trees, 0 if seed else 24, dtype=torch.float64), policy, 1e-10)


@pytest.mark.parametrize("way", [pytest.param("stack", marks=KERNELS), "dense", "paths"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tree_equals_sequences_in_stock(family: str, way: str) -> None:
    model = build(family)
    trees = forest(11, tempered=True)
    compare(model, trees, batches(trees), TorchPolicy(model, attention=way), 1e-4)


def test_flex_equals_sequences_forward() -> None:
    model, trees = build(), forest(4)
    (row,) = batches(trees)
    with torch.no_grad():
        _, expected, _, _ = TorchPolicy(model, attention="paths").evaluate(row)
        _, got, _, _ = TorchPolicy(model, attention="flex").evaluate(row)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_trains_like_the_cpu() -> None:
    trees = forest(4)
    (row,) = batches(trees)
    wide = {"hidden_size": 64, "head_dim": 16}
    cpu, gpu = TorchPolicy(build(**wide)), TorchPolicy(build(**wide).cuda(), attention="flex")
    for policy in (cpu, gpu):
        policy.accumulate(LEARN_ALL, row)
    for a, b in zip(cpu.trainable.values(), gpu.trainable.values(), strict=True):
        torch.testing.assert_close(a.grad, b.grad.cpu(), rtol=1e-2, atol=1e-3)


def test_causal_mask_would_be_noticed() -> None:
    model, trees = build(), forest(5)
    (row,) = batches(trees)
    policy = TorchPolicy(model)
    _, right, _, _ = policy.evaluate(row, grad=False)
    _, wrong, _, _ = policy.evaluate(replace(row, end=torch.full_like(row.end, len(row))), grad=False)
    assert float((right - wrong).abs().max()) > 0.05


def test_tempered_is_plain_where_nothing_is_tempered() -> None:
    (row,) = batches(forest(3))
    tempered, plain, _, _ = TorchPolicy(build()).evaluate(row)
    assert tempered is plain
    tempered, plain, _, _ = TorchPolicy(build()).accumulate(LEARN_ALL, row)
    assert tempered is plain
    assert not plain.requires_grad


def test_only_weighted_tokens_are_evaluated() -> None:
    (row,) = batches(forest(3), mix=REINFORCE)
    assert bool((row.author == int(Author.EXPERT)).any()) or bool((row.author == int(Author.TOOL)).any())
    _, plain, entropy, _ = TorchPolicy(build()).evaluate(row)
    trained = (row.weight != 0).any(0)
    assert torch.equal(plain != 0, trained)
    assert torch.equal(entropy != 0, trained)


def test_every_branch_point_has_all_its_targets() -> None:
    (row,) = batches(forest(0))
    _, plain, _, _ = TorchPolicy(build()).evaluate(row)
    heads = [int(p) for t, p in enumerate(row.parent) if plain[t] != 0]
    assert max(heads.count(p) for p in heads) >= 5


def test_greedy_tokens_have_no_tempered_log_prob() -> None:
    (row,) = batches(forest(3))
    row = replace(row, temperature=torch.where(row.author == int(Author.POLICY), 0.0, row.temperature))
    policy = TorchPolicy(build())
    with pytest.raises(ValueError, match="sampled at temperature 0"):
        policy.evaluate(row)
    untempered = Mix((Term(Estimator(Everything(), Recomputed(), Constant(1.0))),))
    tempered, plain, _, _ = policy.accumulate(untempered, replace(row, recomputed=row.behavior))
    assert tempered is plain


def gradients(policy: TorchPolicy, trees: list[Tree]) -> dict[str, Tensor]:
    for row in batches(trees):
        policy.accumulate(LEARN_ALL, row)
    return {name: p.grad.clone() for name, p in policy.trainable.items() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(family: str) -> None:
    trees = forest(6)
    plain = gradients(TorchPolicy(build(family)), trees)
    policy = TorchPolicy(build(family), activation_checkpointing=True)
    calls: list[str] = []
    policy.model.model.layers[0].self_attn.register_forward_hook(
        lambda *_: calls.append(policy.model.config._attn_implementation)
    )
    again = gradients(policy, trees)
    assert calls == ["ramulus_tree"] * 2  # forward, and once more in the backward pass, on the tree both times
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert not any(module.training for module in policy.model.modules())
    assert policy.model.config._attn_implementation != "ramulus_tree"


@pytest.mark.parametrize("kind", ["opt", "biogpt"])
def test_activation_checkpointing_wakes_no_dropout_of_a_layer_itself(kind: str) -> None:
    """Layers that ask their own flag in functions: dropout as these models ship it."""
    torch.manual_seed(0)
    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    small |= {"ffn_dim": 32, "word_embed_proj_dim": 16} if kind == "opt" else {"intermediate_size": 32}
    config = AutoConfig.for_model(kind, **small, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    model, trees = AutoModelForCausalLM.from_config(config).float(), forest(4)
    plain = gradients(TorchPolicy(model), trees)
    model.zero_grad(set_to_none=True)
    again = gradients(TorchPolicy(model, activation_checkpointing=True), trees)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)
    assert not any(module.training for module in model.modules())


def test_adapters_are_not_brought_back_onto_another_model() -> None:
    """Only they are in a checkpoint; one that says nothing of the model below is of an earlier version."""
    models = [build(), build(), build()]
    with torch.no_grad():
        models[2].model.layers[0].mlp.up_proj.weight += 1
    one, same, other = (TorchPolicy(model, lora=Lora(2)) for model in models)
    tensors, state = one.tensors(), one.state()
    same.restore(tensors, state)
    with pytest.raises(ValueError, match="the model below the adapters is another than the run began with"):
        other.restore(tensors, state)
    other.restore(tensors, {name: value for name, value in state.items() if name != "below"})
    assert "below" not in TorchPolicy(build()).state()


def test_chunked_head_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trees = forest(6)
    whole = gradients(TorchPolicy(build()), trees)
    monkeypatch.setattr(head_module, "SMALL", 0)
    parts = gradients(TorchPolicy(build(), chunk=5), trees)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_head_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = batches(forest(6))
    monkeypatch.setattr(head_module, "SMALL", 0)
    policy = TorchPolicy(build(), chunk=4)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel() if x.shape[-1:] == (VOCABULARY,) else 0) or x, lambda x: x
    ):
        policy.evaluate(row)
    assert max(kept) == 0


def test_bf16_autocast() -> None:
    trees = forest(6, tempered=True)
    (row,) = batches(trees)
    for way in ("dense", "auto"):
        policy = TorchPolicy(build(), autocast=True, attention=way, activation_checkpointing=way == "auto")
        _, plain, entropy, _ = policy.accumulate(LEARN_ALL, row)
        _, exact, _, _ = TorchPolicy(build()).evaluate(row, grad=False)
        assert plain.dtype == entropy.dtype == torch.float32
        assert 0 < float((plain - exact).abs().max()) < 0.2
        assert all(p.grad.dtype == torch.float32 for p in policy.trainable.values())
        assert policy.update(1e-3)["skipped"] == 0


def test_bf16_weights() -> None:
    (row,) = batches(forest(6))
    policy = TorchPolicy(build().to(torch.bfloat16))
    _, plain, _, _ = policy.accumulate(LEARN_ALL, row)
    assert plain.dtype == torch.float32
    assert policy.update(1e-3)["skipped"] == 0


def train(policy: TorchPolicy, steps: range) -> list[float]:
    norms = []
    for step in steps:
        for row in batches(forest(step), 40):
            policy.accumulate(LEARN_ALL, row)
        norms.append(policy.update(1e-2)["grad_norm"])
    return norms


def test_learning_lowers_the_loss() -> None:
    policy, trees = TorchPolicy(build()), forest(1)
    (row,) = batches(trees)
    before = float(policy.evaluate(row, grad=False)[1].sum())
    for _ in range(20):
        policy.accumulate(LEARN_ALL, row)
        policy.update(1e-2)
    assert float(policy.evaluate(row, grad=False)[1].sum()) > before + 10
    assert policy.version == 20


@pytest.mark.parametrize("kind", ["full", "lora", "reference", "tied"])
def test_restoring_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def fresh() -> TorchPolicy:
        return TorchPolicy(
            build(tie_word_embeddings=kind == "tied"),
            weight_decay=0.1,
            lora=Lora(2, 4) if kind == "lora" else None,
            reference_model=kind == "reference",
        )

    whole = fresh()
    norms = train(whole, range(4))
    first = fresh()
    train(first, range(2))
    save_file({name: t.contiguous() for name, t in first.tensors().items()}, tmp_path / "tensors.safetensors")
    state = json.loads(json.dumps(first.state()))
    second = fresh()
    shared = dict(second.trainable)
    second.restore(load_file(tmp_path / "tensors.safetensors"), state)
    assert all(second.trainable[name] is p for name, p in shared.items())
    assert train(second, range(2, 4)) == norms[2:]
    assert second.version == whole.version == 4
    assert second.tensors().keys() == whole.tensors().keys()
    assert all(torch.equal(t, whole.tensors()[name]) for name, t in second.tensors().items())
    assert all(torch.equal(t, whole.weights()[name]) for name, t in second.weights().items())


def test_restoring_another_model_is_refused() -> None:
    saved = TorchPolicy(build())
    other = TorchPolicy(build(intermediate_size=32))
    with pytest.raises(ValueError, match=r"the checkpoint has \(24, 16\) as weights/model.layers.0.mlp"):
        other.restore(saved.tensors(), saved.state())


def test_clipping_bounds_the_step() -> None:
    (row,) = batches(forest(1))
    free, tight = TorchPolicy(build(), clip=math.inf), TorchPolicy(build(), clip=1e-3)
    for policy in (free, tight):
        policy.accumulate(LEARN_ALL, row)
    assert free.update(1e-3)["grad_norm"] == pytest.approx(tight.update(1e-3)["grad_norm"])
    size = {
        p: math.sqrt(sum(float(s["exp_avg"].pow(2).sum()) for s in p.optimizer.state.values())) for p in (free, tight)
    }
    assert size[tight] == pytest.approx(1e-4, rel=1e-2)  # (1 - beta1) x the clipped gradient
    assert size[free] > 10 * size[tight]


def test_an_infinite_gradient_is_skipped() -> None:
    (row,) = batches(forest(1))
    policy = TorchPolicy(build())
    before = {name: p.detach().clone() for name, p in policy.trainable.items()}
    policy.accumulate(LEARN_ALL, replace(row, gain=row.gain * math.inf))
    report = policy.update(1e-3)
    assert report["skipped"] == 1
    assert not math.isfinite(report["grad_norm"])
    assert policy.version == 0
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in policy.trainable.items())
    policy.accumulate(LEARN_ALL, row)
    assert policy.update(1e-3)["skipped"] == 0


def test_weight_decay_is_for_matrices() -> None:
    policy = TorchPolicy(build(), weight_decay=0.5)
    decayed = {id(p) for group in policy.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert all((id(p) in decayed) == (p.ndim >= 2) for p in policy.trainable.values())


def test_nothing_to_learn_is_no_error() -> None:
    (row,) = batches(forest(1))
    policy = TorchPolicy(build())
    _, plain, _, _ = policy.accumulate(LEARN_ALL, replace(row, weight=row.weight * 0, gain=row.gain * 0))
    assert not plain.any()
    assert policy.update(1e-3) == {"grad_norm": 0.0, "skipped": 1.0}


def test_lora_trains_adapters_alone_and_keeps_the_base() -> None:
    base = {name: t.clone() for name, t in build().state_dict().items()}
    policy = TorchPolicy(build(), lora=Lora(2, 4))
    assert policy.trainable
    assert all(".lora_" in name for name in policy.trainable)
    trees = forest(2)
    score_now(policy, trees, {"recomputed", "reference_model"})
    start = [list(node.signals["reference_model"]) for tree in trees for node in tree.walk() if "reference_model" in node.signals]
    train(policy, range(3))
    score_now(policy, trees, {"recomputed", "reference_model"})
    nodes = [node for tree in trees for node in tree.walk() if "reference_model" in node.signals]
    assert [list(node.signals["reference_model"]) for node in nodes] == start
    assert any(node.signals["recomputed"] != node.signals["reference_model"] for node in nodes)
    kept = {
        name.replace(".base_layer.", "."): t for name, t in policy.model.state_dict().items() if ".lora_" not in name
    }
    assert all(torch.equal(t, base[name]) for name, t in kept.items())
    merged = policy.weights()
    assert merged.keys() == base.keys()
    plain = build()
    plain.load_state_dict(merged)
    (row,) = batches(trees)
    torch.testing.assert_close(
        TorchPolicy(plain).evaluate(row, grad=False)[1], policy.evaluate(row, grad=False)[1], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("budget", [0, 30])
def test_score_writes_what_separate_sequences_say(budget: int) -> None:
    trees = forest(7, tempered=True)
    policy = TorchPolicy(build(), reference_model=True)
    train(policy, range(2))
    for tree in trees:
        for node in tree.walk():
            node.signals.clear()
    score_now(policy, trees, {"behavior", "recomputed", "reference_model"}, tokens=budget or 4096)
    for name, model in (("recomputed", policy.model), ("reference_model", build())):
        with torch.no_grad():
            expected = {path: values[1] for (path, _), values in sequences(model, trees).items()}
        for node in (node for tree in trees for node in tree.walk()):
            learned = node.author in (Author.POLICY, Author.EXPERT)
            assert (name in node.signals) == learned
            assert not learned or len(node.signals[name]) == len(node.tokens)
            before = len(node.prefix()) - len(node.tokens)
            for k, value in enumerate(node.signals[name]) if learned else ():
                assert value == pytest.approx(float(expected[tuple(node.prefix()[: before + k + 1])]), abs=1e-4)


def test_score_of_nothing_and_without_a_reference_model() -> None:
    policy = TorchPolicy(build())
    score_now(policy, [], {"recomputed"})
    score_now(policy, forest(1), set())
    with pytest.raises(ValueError, match="reference_model=True"):
        score_now(policy, forest(1), {"reference_model"})


def test_the_reference_model_stays_where_it_was() -> None:
    policy, trees = TorchPolicy(build(), reference_model=True), forest(2)
    score_now(policy, trees, {"recomputed", "reference_model"})
    nodes = [node for tree in trees for node in tree.walk() if node.author is Author.POLICY and node.tokens]
    assert all(node.signals["recomputed"] == node.signals["reference_model"] for node in nodes)
    train(policy, range(1))
    before = [node.signals["reference_model"] for node in nodes]
    score_now(policy, trees, {"recomputed", "reference_model"})
    assert [node.signals["reference_model"] for node in nodes] == before
    assert all(node.signals["recomputed"] != node.signals["reference_model"] for node in nodes)


@pytest.mark.parametrize("kind", ["full", "lora", "tied"])
def test_written_folder_loads_in_transformers(kind: str, tmp_path: Path) -> None:
    if kind == "full":
        model, tokenizer = Scratch("0123456789+=? \n", hidden=16, layers=1, heads=2, kv_heads=1)()
    else:
        model, tokenizer = build(tie_word_embeddings=kind == "tied"), None
    policy = TorchPolicy(model, tokenizer, lora=Lora(2, 4) if kind == "lora" else None)
    train(policy, range(2))
    policy.write(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = policy.weights()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(t, weights[name]) for name, t in loaded.state_dict().items())
    assert "ramulus" not in (tmp_path / "config.json").read_text()
    assert (tmp_path / "tokenizer.json").exists() == (kind == "full")


def test_lora_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "ramulus\[lora\]"'):
        TorchPolicy(build(), lora=Lora())


def test_models_that_cannot_take_a_tree_are_refused() -> None:
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    with pytest.raises((ValueError, TypeError), match=r"Mamba|mamba"):
        TorchPolicy(mamba)


def test_scaled_logits_are_understood() -> None:
    torch.manual_seed(0)
    granite = GraniteForCausalLM(GraniteConfig(**{**SIZES, "logits_scaling": 4.0})).eval()
    trees = forest(8)
    compare(granite, trees, batches(trees), TorchPolicy(granite), 1e-4)


@pytest.mark.parametrize(
    ("config", "kind"), [(MistralConfig, MistralForCausalLM), (Gemma2Config, Gemma2ForCausalLM)], ids=["window", "window and softcap"]
)
def test_windows_shorter_than_a_path_and_soft_caps_are_understood(config: type, kind: type) -> None:
    torch.manual_seed(0)
    model = kind(config(**SIZES, sliding_window=4)).eval()
    trees = forest(8)
    compare(model, trees, batches(trees), TorchPolicy(model), 1e-4)


def test_a_path_longer_than_the_rotary_embedding_bears_is_refused() -> None:
    """Beyond its original context a dynamic embedding turns every token of a row by the longest path's angles."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    policy = TorchPolicy(build("llama", max_position_embeddings=8, rope_parameters=rope))
    tree = Tree.plant(Task("long", (1, 2, 3), ""))
    tree.add(tree.root, [1] * 9, Author.EXPERT, reward=1.0, finish="eos")
    (row,) = batches([tree])
    with pytest.raises(ValueError, match="a path holds 12 tokens and the rotary embedding of LlamaForCausalLM changes beyond 8"):
        policy.evaluate(row)


def test_a_path_without_a_prompt_is_refused() -> None:
    tree = Tree.plant(Task("bare", (), ""))
    tree.add(tree.root, [1, 2], Author.EXPERT, reward=1.0, finish="eos")
    (row,) = batches([tree])
    with pytest.raises(ValueError, match="give the task a prompt"):
        TorchPolicy(build()).evaluate(row)
