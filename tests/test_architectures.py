"""Each causal LM that transformers can build, tiny: engine and learner give its plain forward's log-probs and save it, or refuse it in one sentence.

Texts and paths are longer than the windows, and positions reach to the last. In float32 everything agrees to float tolerance. In bfloat16 what
engine and learner give is held against the model's forward in float32 arithmetic, where the model's own bfloat16 forward says how far is far.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from architectures import KINDS, POSITIONS, UNBUILDABLE, WINDOW, build
from engines import WAYS, ask, run
from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.learn.policy.scoring import score_now
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.models.positions import beyond
from ramulus.models.precision import widened
from ramulus.models.survey import attending_by

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 64}),
    "llama llama3 rope": ("llama", {"rope_parameters": {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    "llama bias": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2 some windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3_moe windows": ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 2}),
    "mistral whole": ("mistral", {"sliding_window": None}),
    "mixtral whole": ("mixtral", {"sliding_window": None}),
    "phi3 longrope": (
        "phi3",
        {
            "sliding_window": None, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 8, "short_factor": [1.0] * 8},
        },
    ),
    "phi3 whole": ("phi3", {"sliding_window": None}),
    "phimoe whole": ("phimoe", {"sliding_window": None}),
    "ministral3 scaled queries": ("ministral3", {"sliding_window": None, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}}),
    "granite multipliers": (
        "granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "logits_scaling": 8.0},
    ),
    "smollm3 some without positions": ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}),
    "olmo clipped": ("olmo", {"clip_qkv": 0.5}),
    "gpt_oss whole": ("gpt_oss", {"layer_types": ["full_attention"] * 4}),
    "gemma4_text no sharing": ("gemma4_text", {"num_kv_shared_layers": 0}),
    "gemma4_text experts": ("gemma4_text", {"enable_moe_block": True, "top_k_experts": 2}),
    "exaone4 whole": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
}  # fmt: skip
MAIN = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "mistral", "olmo2", "olmo3", "phi3", "smollm3", "granite multipliers", "glm4")
MORE = ("gpt_oss", "deepseek_v2", "deepseek_v3", "gemma2", "gemma4_text", "llama4_text", "phimoe", "olmo")
QUICK = {torch.float32: ("qwen3", "qwen3_moe", "gemma3_text", "mistral", "olmo3", "phi3", "gpt_oss", "deepseek_v3"), torch.bfloat16: ("qwen3",)}
STATE = """
bailing_hybrid bamba bart bigbird_pegasus blenderbot blenderbot-small cpmant falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2_moe
lfm3 mamba mamba2 marian mbart minimax mllama nemotron_h olmo_hybrid openai-gpt pegasus plbart qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
qwen3_next recurrent_gemma reformer rwkv whisper xlnet xlstm zamba zamba2
"""
MASKS = """
axk2 big_bird bloom codegen deepseek_v32 deepseek_v4 doge dots3_note dots3_note_text falcon gemma4_unified git glm_moe_dsa gpt_neo gpt_neox_japanese
gptj hy_v4 megatron-bert mpt mvp qwen4_exp qwen4_exp_text rembert roformer trocr xglm xlm
"""
OTHER = """
blt camembert data2vec-text diffllama hrm_text inkling2_text inkling_text nemotron prophetnet roberta roberta-prelayernorm stablelm
xlm-roberta xlm-roberta-xl xmod zaya
"""
REFUSED = frozenset((STATE + MASKS + OTHER).split())
"""Refused today, at least by the engine: layers with a state or without transformers' attention interface; attention that computes with its mask;
positions of their own, arguments that do not reach attention, and what has no name yet. Whatever else can be built is right."""


UNREADABLE = {"emu3": "cannot be saved so that it can be read again, .* Unrecognized configuration class"}
"""What AutoModelForCausalLM does not load from a config that it builds from."""


def tiny(name: str) -> Any:
    """A model by its kind or the name of a variant."""
    kind, fields = VARIANTS.get(name, (name, {}))
    return build(kind, **fields)


def refusal(error: ValueError) -> str:
    """The message of a refusal: one sentence that says of which model."""
    words = str(error)
    assert "\n" not in words
    assert " cannot be sampled by the local engine: " in words or " cannot learn from packed trees: " in words
    return words


@torch.no_grad()
def plain(model: Any, text: list[int]) -> Tensor:
    """Log-probs of each token of a text after the first."""
    logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]


def decoded(engine: LocalEngine, vocabulary: int) -> list[tuple[list[int], Tensor]]:
    """Texts and the log-probs of their last tokens, as the engine drew them: past windows, forked, and to the last position."""
    rng = random.Random(0)
    long = [rng.randrange(vocabulary) for _ in range(engine.limit - 20 if engine.limit <= POSITIONS else POSITIONS - 20)]
    requests = [ask(long, seed=1, max_tokens=20), ask(long[:3], seed=2, max_tokens=3 * WINDOW), ask(long[: 2 * WINDOW], seed=3, max_tokens=4)]
    segments = run(engine, requests)
    fork = ask([*long[:3], *segments[1].tokens.tolist()[: 2 * WINDOW]], seed=4, max_tokens=5)
    done = zip([*requests, fork], [*segments, *run(engine, [fork])], strict=True)
    return [([*map(int, r.prefix), *s.tokens.tolist()], torch.tensor(s.logprobs.tolist(), dtype=torch.float64)) for r, s in done]


def learned(policy: TorchPolicy, vocabulary: int) -> list[tuple[list[int], Tensor]]:
    """Texts of a random tree's paths and the log-probs of what follows its prompt, as the learner has them."""
    rng = random.Random(1)
    tree = Tree.plant(Task("t", tuple(rng.randrange(vocabulary) for _ in range(5)), ""))
    made = [tree.root]
    for _ in range(7):
        tokens = [rng.randrange(vocabulary) for _ in range(rng.choice([1, 4, WINDOW + 3]))]
        made.append(tree.add(rng.choice(made[-2:]), tokens, Author.POLICY))
    score_now(policy, [tree], ["recomputed"])
    found = []
    for leaf in tree.leaves():
        numbers = [x for node in leaf.line() if node.author is Author.POLICY for x in node.signals["recomputed"]]
        found.append((leaf.prefix(), torch.tensor(numbers, dtype=torch.float64)))
    return found


def hold(model: Any, found: list[tuple[list[int], Tensor]], what: str) -> None:
    """Hold log-probs against the model's plain forward; in half precision against that in float32, near which its own are in two ways."""
    half = next(model.parameters()).dtype == torch.bfloat16
    off, own = [], [[], []]
    for text, numbers in found:
        with widened(model):
            truth = plain(model, text)[-len(numbers) :]
        off.append((numbers - truth).abs())
        for kept, way in zip(own, (model.config._attn_implementation, "eager") if half else ()):
            with attending_by(model, way):
                kept.append((plain(model, text)[-len(numbers) :] - truth).abs())
    median, mean = measures(off)
    if not half:
        assert float(torch.cat(off).max()) < 5e-4, (what, float(torch.cat(off).max()))
        assert mean < 5e-5, (what, mean)
        return
    most = [max(numbers) for numbers in zip(*(measures(kept) for kept in own))]
    wide = 5 if any("expert" in name for name, _ in model.named_modules()) else 2  # a token that rounding sends to another expert is far off
    assert median <= wide * most[0] + 2e-3, (what, median, most)
    assert mean <= wide * most[1] + 2e-3, (what, mean, most)


def measures(numbers: list[Tensor]) -> tuple[float, float]:
    """Median and mean."""
    return float(torch.cat(numbers).median()), float(torch.cat(numbers).mean())


def judge(name: str, dtype: torch.dtype) -> list[str]:
    """What is refused, by engine or learner; all else is held to be right."""
    model = tiny(name).to(dtype)
    vocabulary, refused, ways = int(model.config.get_text_config().vocab_size), [], set()
    for options in WAYS.values():
        try:
            engine = LocalEngine(model, slots=3, memory=2**24, **options)
        except ValueError as error:
            refused.append(refusal(error))
            break
        if engine.forward.name not in ways:
            hold(model, decoded(engine, vocabulary), engine.about)
        ways.add(engine.forward.name)
    try:
        policy = TorchPolicy(model)
    except ValueError as error:
        return [*refused, refusal(error)]
    hold(model, learned(policy, vocabulary), "learner")
    if name in UNREADABLE:
        with pytest.raises(ValueError, match=UNREADABLE[name]):
            policy.try_writing()
    else:
        policy.try_writing()
    return refused


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for dtype, names in QUICK.items() for name in names])
def test_main_families_are_right(name: str, dtype: torch.dtype) -> None:
    assert judge(name, dtype) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sorted({*KINDS} - {*UNBUILDABLE}), *VARIANTS])
def test_each_is_right_or_refused(name: str) -> None:
    refused = judge(name, torch.float32)
    assert bool(refused) == (name in REFUSED), refused
    if not refused:
        assert judge(name, torch.bfloat16) == []
    assert not (name in MAIN + MORE and refused)


@pytest.mark.parametrize("name", UNBUILDABLE)
def test_what_transformers_cannot_build(name: str) -> None:
    with pytest.raises(Exception, match=UNBUILDABLE[name]):
        build(name)


@pytest.mark.parametrize(("rope", "extends"), [("default", True), ("yarn", True), ("longrope", False), ("dynamic", False)])
def test_what_is_said_beyond_a_context(rope: str, extends: bool) -> None:
    """Only a rope whose angles stay the same as a text grows is told to be extended."""
    kinds = {
        "default": {},
        "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
        "longrope": {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 32},
        "dynamic": {"factor": 2.0},
    }
    rule = {"rope_type": rope, "rope_theta": 1e4, **kinds[rope]}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_parameters=rule)
    assert ("extend its context" in beyond(config)) is extends
