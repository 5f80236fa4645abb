"""The local engine against the model's plain forward: log-probs, forks, eviction, dtypes, weights."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch

from engines import (
    EVERY_WAY,
    KERNELS,
    KINDS,
    VOCABULARY,
    WAYS,
    ask,
    drawn_from,
    line,
    mixed,
    one,
    run,
    scored,
    small,
    worst,
)
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.engine.local.radix_tree import common

MANY = 2**26


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("kind", list(KINDS))
def test_logprobs_are_those_of_the_plain_forward(kind: str, way: str) -> None:
    model = small(kind)
    engine = LocalEngine(model, slots=6, memory=MANY, **WAYS[way])
    assert engine.forward.name == way
    requests = mixed(24)
    segments = run(engine, requests)
    assert [len(s.tokens) for s in segments] == [r.sampling.max_tokens for r in requests]
    assert worst(model, requests, segments) < 1e-5
    with torch.no_grad():
        text = torch.tensor([[*requests[3].prefix, *segments[3].tokens]])
        p = model(text).logits[0, len(requests[3].prefix) - 1 : -1].double().softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    assert torch.allclose(entropy, torch.tensor(segments[3].entropy.tolist(), dtype=torch.float64), atol=1e-5)


def test_threads_are_set_for_the_engine_alone() -> None:
    """Torch's own number is back whenever other code runs, after a failure too."""
    seen: list[int] = []

    def until(tokens: list[int]) -> str | None:
        seen.append(torch.get_num_threads())
        return None

    def broken(tokens: list[int]) -> str | None:
        raise RuntimeError("broken")

    before = torch.get_num_threads()
    other = before + 1
    engine = LocalEngine(small(), slots=2, memory=MANY, threads=other)
    run(engine, [ask(line(5, 1), until=until)])
    assert seen == [other] * 8
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="broken"):
        run(engine, [ask(line(5, 1), until=broken)])
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be at least 1"):
        LocalEngine(small(), threads=0)


@pytest.mark.parametrize("way", EVERY_WAY)
def test_a_temperature_that_float32_rounds_to_zero_is_greedy_in_every_way(way: str) -> None:
    engine = LocalEngine(small(), slots=4, memory=MANY, **WAYS[way])
    cold, tiny = (
        run(engine, [ask(line(5, 1), temperature=t, **cut) for cut in ({}, {"top_k": 3}, {"until": None})] + [ask(line(5, 2))]) for t in (0.0, 1e-46)
    )
    assert [s.tokens for s in tiny] == [s.tokens for s in cold]
    assert [s.logprobs.tolist() for s in tiny[:3]] == [[0.0] * 8] * 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.25)])
@pytest.mark.parametrize("way", EVERY_WAY)
def test_other_dtypes(dtype: torch.dtype, tolerance: float, way: str) -> None:
    """float64 agrees to transformers' float32 norms; bf16 to bf16's rounding of logits of this size."""
    model = small("qwen2", dtype)
    requests = mixed(12)
    engine = LocalEngine(model, slots=4, memory=MANY, **WAYS[way])
    segments = run(engine, requests)
    differences = torch.cat(
        [(drawn_from(s) - scored(model, r, s)).abs() for r, s in zip(requests, segments)]
    )
    assert float(differences.max()) < tolerance
    assert float(differences.mean()) < tolerance / 5


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_may_be_decoded_in_float32(dtype: torch.dtype) -> None:
    """From the same weights: its log-probs are those of a float32 model that has them, and nearer to the plain forward's."""
    model = small("qwen2", dtype)
    requests = mixed(12)
    engine = LocalEngine(model, slots=4, memory=MANY, precision=torch.float32)
    assert engine.forward.name == "compiled"
    assert (engine.forward.geometry.dtype, engine._copy) == (torch.float32, None)
    exact = small("qwen2", dtype).float()
    assert worst(exact, requests, run(engine, requests)) < 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    asyncio.run(engine.load(None, 1))
    assert worst(model.float(), requests, run(engine, requests)) < 1e-4


@KERNELS
@pytest.mark.parametrize("kind", list(KINDS))
def test_bfloat16_rounds_less_than_a_plain_forward_in_it(kind: str) -> None:
    """Of a bfloat16 model and beside a float32 one, without a copy of the model: nearer to float32 than the model's own forward in bfloat16."""
    exact, half = small(kind, torch.bfloat16).float(), small(kind, torch.bfloat16)
    requests = mixed(12)
    for model, precision in ((half, None), (exact, torch.bfloat16)):
        engine = LocalEngine(model, slots=4, memory=MANY, precision=precision)
        assert (engine.forward.name, engine.forward.geometry.dtype, engine._copy) == ("compiled", torch.bfloat16, None)
        assert "bfloat16" in engine.about
        segments = run(engine, requests)
        ours, theirs, apart = [], [], []
        for request, segment in zip(requests, segments):
            truth, plain = scored(exact, request, segment), scored(half, request, segment)
            ours.append(drawn_from(segment) - truth)
            theirs.append(plain - truth)
            apart.append(drawn_from(segment) - plain)
        own, plain, mismatch = (float(torch.cat(part).pow(2).mean().sqrt()) for part in (ours, theirs, apart))
        assert 0 < own < 0.8 * plain
        assert mismatch < 1.3 * plain  # two forwards that round independently would be 1.4 apart
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.mul_(0.9)
    asyncio.run(engine.load(None, 1))
    fresh, stale = run(engine, requests), segments
    assert worst(exact, requests, fresh) < 0.2 < worst(exact, requests, stale)


def test_the_model_is_left_as_it_was() -> None:
    model = small().train()
    model.config._attn_implementation = "eager"
    model.model.layers[1].eval()
    for fast in (True, False):
        run(LocalEngine(model, slots=2, memory=MANY, fast=fast), mixed(3))
    text = torch.tensor([line(12, 1)])
    model(text, labels=text).loss.backward()  # nothing that sampling made is in the way of training
    assert all(p.grad is not None for p in model.parameters())
    assert model.config._attn_implementation == "eager"
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[1].training
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("fast", [True, False])
def test_a_fork_reuses_kv_at_every_offset(fast: bool) -> None:
    model = small()
    engine = LocalEngine(model, slots=4, memory=MANY, fast=fast)
    prompt = line(9, 1)
    parent = run(engine, [ask(prompt, seed=5, max_tokens=21)])[0]
    text = prompt + tuple(parent.tokens)
    requests = [ask(text[:n], seed=n) for n in range(1, len(text) + 1)]
    before = dict(engine.counters())
    segments = run(engine, requests)
    assert worst(model, requests, segments) < 1e-5
    reused = engine.counters()["reused"] - before["reused"]
    assert reused == sum(len(r.prefix) - 1 for r in requests)  # all but the token whose logits are wanted
    assert engine.counters()["prefilled"] - before["prefilled"] == len(requests)


def test_a_tree_grows_from_what_its_parents_left_in_their_slots() -> None:
    """Children that arrive as their parents end copy nothing from the trie, whose first look at them is when a slot is wanted."""
    model = small()
    engine = LocalEngine(model, slots=8, memory=MANY)
    cache, asked = engine._scheduler.memory.cache, []
    texts = [line(9, i) for i in range(4)]

    async def tree(text: tuple[int, ...], seed: int, depth: int) -> None:
        requests = [ask(text, seed=seed * 10 + i, max_tokens=6) for i in range(2 if depth else 1)]
        segments = await asyncio.gather(*[one(engine, request) for request in requests])
        asked.extend(zip(requests, segments))
        if depth:
            await asyncio.gather(*[tree(text + tuple(s.tokens), seed * 10 + i, depth - 1) for i, s in enumerate(segments)])

    async def forest() -> None:
        await asyncio.gather(*[tree(text, i + 1, 2) for i, text in enumerate(texts)])

    asyncio.run(forest())
    requests, segments = zip(*asked)
    assert worst(model, requests, segments) < 1e-5
    assert engine.counters()["prefilled"] == 4 * 8 + len(requests)  # prompts once, then only last tokens
    for text, slot in cache.slot_of.items():  # what it says lies there, lies there
        assert text in cache.texts[slot]
        with torch.no_grad():
            alone = LocalEngine(model, slots=1, memory=MANY)
            run(alone, [ask((*text, 0), max_tokens=1)])
        mine, other = engine._scheduler.memory.slots.get(slot, 0, len(text)), alone._scheduler.memory.slots.get(0, 0, len(text))
        assert torch.allclose(mine, other, atol=1e-4)


def test_slots_may_be_shorter_after_a_load() -> None:
    model = small()
    engine = LocalEngine(model, slots=4, memory=MANY)
    run(engine, [ask(line(60, 1), max_tokens=30)])
    asyncio.run(engine.load(None, 1))
    requests = mixed(6, longest=8, most=5)
    assert worst(model, requests, run(engine, requests)) < 1e-5


def test_siblings_prefill_their_prompt_once() -> None:
    model = small()
    engine = LocalEngine(model, slots=5, memory=MANY)
    prompt = line(40, 1)
    requests = [ask(prompt, seed=i, max_tokens=3 + i) for i in range(12)]  # three waves through five slots
    segments = run(engine, requests)
    assert worst(model, requests, segments) < 1e-5
    assert engine.counters()["prefilled"] == 39 + 12
    assert engine.counters()["reused"] == 39 * 11
    assert len({tuple(s.tokens[:3]) for s in segments}) > 6


def test_long_shared_openings_are_prefilled_once() -> None:
    model = small()
    engine = LocalEngine(model, slots=16, memory=MANY)
    opening = line(50, 1)
    requests = [ask(opening + line(5 + i, 20 + i), seed=i) for i in range(8)]
    segments = run(engine, requests)
    assert worst(model, requests, segments) < 1e-5
    assert engine.counters()["prefilled"] < 120  # 492 tokens in all
    assert engine.counters()["prefilled"] + engine.counters()["reused"] == sum(len(r.prefix) for r in requests)


def test_slots_grow_ahead_only_within_the_memory() -> None:
    """A long text after shorter ones, with room for little more than itself."""
    model = small(max_position_embeddings=2048)
    token = LocalEngine(model, slots=1).forward.geometry.token_bytes
    engine = LocalEngine(model, slots=1, memory=260 * token)
    for n in (150, 180):
        run(engine, [ask(line(n, n), max_tokens=8)])
        assert engine._scheduler.memory.nbytes <= 260 * token


def test_forks_of_one_path_are_prefilled_with_the_longest() -> None:
    """Prefixes that begin one another, as after new weights: the longest is computed, the others copy."""
    model = small()
    engine = LocalEngine(model, slots=8, memory=MANY)
    text, other = line(30, 1), line(30, 2)
    requests = [ask(text[:n], seed=n, max_tokens=4) for n in (12, 30, 20, 20)] + [ask(other[:9], seed=9, max_tokens=4)]
    segments = run(engine, requests)
    assert worst(model, requests, segments) < 1e-5
    assert engine.counters()["prefilled"] == 29 + 8 + len(requests)
    assert engine.counters()["prefilled"] + engine.counters()["reused"] == sum(len(r.prefix) for r in requests)


def test_short_prompts_of_waiting_requests_are_prefilled_several_at_a_time() -> None:
    model = small()
    engine = LocalEngine(model, slots=4, memory=MANY)
    requests = [ask((p, *line(5 + p % 5, 100 + p)), seed=8 * p + i, max_tokens=3 + (p + i) % 7) for p in range(30) for i in range(4)]
    segments = run(engine, requests)
    assert worst(model, requests, segments) < 1e-5
    assert engine.counters()["passes"] <= 10  # 30 distinct prompts through four slots
    assert engine.counters()["prefilled"] == 120 + sum(len(r.prefix) - 1 for r in requests[::4])
    assert engine.counters()["prefilled"] + engine.counters()["reused"] == sum(len(r.prefix) for r in requests)


def test_eviction_changes_costs_and_not_logprobs() -> None:
    model = small()
    needed = 96 * 3 * 2 * 2 * 16 * 4  # one slot of 96 tokens
    roomy, tight = LocalEngine(model, slots=2, memory=MANY), LocalEngine(model, slots=2, memory=int(needed * 2.9))
    prompts = [line(30 + i, i) for i in range(6)]
    first = [ask(p, seed=i, max_tokens=20) for i, p in enumerate(prompts)]
    for engine in (roomy, tight):
        parents = run(engine, first)
        forks = [ask(p + tuple(s.tokens[:7]), seed=i, max_tokens=20) for i, (p, s) in enumerate(zip(prompts, parents))]
        children = run(engine, forks)
        assert worst(model, first, parents) < 1e-5
        assert worst(model, forks, children) < 1e-5
        assert engine._scheduler.memory.nbytes <= engine._scheduler.memory.memory
    assert roomy.counters()["prefilled_again"] == 0
    assert tight.counters()["prefilled_again"] > 60
    assert tight.counters()["prefilled"] > roomy.counters()["prefilled"]
    assert tight.counters()["prefilled"] + tight.counters()["reused"] == roomy.counters()["prefilled"] + roomy.counters()["reused"]


def test_long_prompts_are_prefilled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramulus.engine.local.prefill.PIECE", 16)
    model = small()
    for fast in (True, False):
        engine = LocalEngine(model, slots=4, memory=MANY, fast=fast)
        requests = [ask(line(n, n), seed=n) for n in (70, 3, 16, 17, 33, 150)]
        assert worst(model, requests, run(engine, requests)) < 1e-5


def test_same_seed_same_tokens_run_after_run() -> None:
    requests = mixed(40)
    runs = []
    for _ in range(2):
        engine = LocalEngine(small(), slots=8, memory=2**20)
        segments = run(engine, requests)
        forks = [ask(r.prefix + tuple(s.tokens[:4]), seed=7 + i) for i, (r, s) in enumerate(zip(requests, segments))]
        runs.append(segments + run(engine, forks))
    assert runs[0] == runs[1]
    asyncio.run(engine.load(None, 0))  # counted from a load, the same engine repeats itself as well
    assert run(engine, requests) == runs[0][: len(requests)]


def test_neighbours_change_logprobs_only_within_tolerance() -> None:
    """The same request alone, in a crowd, and in a crowd with other sampling settings."""
    model = small()
    asked = ask(line(20, 3), seed=11, max_tokens=25)
    alone = run(LocalEngine(model, slots=1, memory=MANY), [asked])[0]
    for extra in ({}, {"temperature": 0.5, "top_p": 0.8, "min_p": 0.05}):
        crowd = [ask(line(5 + 3 * i, 50 + i), seed=100 + i, max_tokens=4 + i, **extra) for i in range(14)]
        together = run(LocalEngine(model, slots=9, memory=MANY), [*crowd[:7], asked, *crowd[7:]])[7]
        n = common(tuple(together.tokens), tuple(alone.tokens))
        assert n >= 8  # a draw within rounding of an edge may part them later, not at once
        assert torch.allclose(torch.tensor(together.logprobs[:n].tolist()), torch.tensor(alone.logprobs[:n].tolist()), atol=1e-5)


def test_frequencies_match_the_model() -> None:
    model = small()
    engine = LocalEngine(model, slots=64, memory=MANY)
    prompt = line(6, 2)
    n = 3000
    segments = run(engine, [ask(prompt, seed=1000 + i, max_tokens=1, temperature=1.3) for i in range(n)])
    counts = torch.bincount(torch.tensor([s.tokens[0] for s in segments]), minlength=VOCABULARY).double()
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1].double() / 1.3).softmax(-1)
    common = p * n >= 5
    chi = ((counts - p * n) ** 2 / (p * n))[common].sum()
    freedom = int(common.sum()) - 1
    assert float(chi) < freedom + 4 * (2 * freedom) ** 0.5


def test_truncation_greedy_and_rules_end_to_end() -> None:
    def hot(logits: torch.Tensor) -> torch.Tensor:
        return 0.4 + 0.1 * logits.softmax(-1).amax(-1)

    model = small()
    engine = LocalEngine(model, slots=3, memory=MANY)
    prompt = line(12, 4)
    cut, cold, ruled = run(
        engine,
        [
            ask(prompt, seed=1, max_tokens=15, temperature=0.8, top_p=0.7, top_k=10, min_p=0.02),
            ask(prompt, seed=2, max_tokens=15, temperature=0.0),
            ask(prompt, seed=3, max_tokens=15, temperature=hot),
        ],
    )
    tempered = scored(model, ask(prompt), cut, 0.8)
    assert torch.allclose(drawn_from(cut), tempered, atol=1e-5)
    assert all(k < 0 for k in cut.kept)
    assert all(k > -1 for k in cut.kept)
    with torch.no_grad():
        best = model(torch.tensor([[*prompt, *cold.tokens]])).logits[0, len(prompt) - 1 : -1].argmax(-1)
    assert cold.tokens.tolist() == best.tolist()
    assert cold.logprobs.tolist() == [0.0] * 15
    assert (cold.kept, cold.temperature) == (None, 0.0)
    assert len(set(ruled.temperature)) > 1
    assert all(0.4 < t <= 0.5 for t in ruled.temperature)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ruled.tokens]])).logits[0, len(prompt) - 1 : -1]
    recorded = torch.tensor(ruled.temperature.tolist())
    assert torch.allclose(hot(logits), recorded, atol=1e-5)
    redone = (logits / recorded[:, None]).log_softmax(-1).gather(1, torch.tensor(ruled.tokens.tolist())[:, None])[:, 0]
    assert torch.allclose(redone, torch.tensor(ruled.logprobs.tolist()), atol=1e-5)


def test_load_drops_kv_and_takes_the_new_weights() -> None:
    model, other = small(seed=0), small(seed=1)
    engine = LocalEngine(model, slots=4, memory=MANY)
    requests = [ask(line(20, 9), seed=i) for i in range(3)]
    old = run(engine, requests)
    assert engine._scheduler.memory.nbytes > 0
    assert old[0].version == 0
    asyncio.run(engine.load(other.state_dict(), 3))
    assert engine._scheduler.memory.tree.used == 0
    before = dict(engine.counters())
    new = run(engine, requests)
    assert engine.counters()["reused"] - before["reused"] == 19 * 2  # siblings only: nothing older
    assert new[0].version == engine.version == 3
    assert worst(other, requests, new) < 1e-5
    assert worst(model, requests, new) < 1e-5
    assert max(abs(a - b) for a, b in zip(old[0].logprobs, new[0].logprobs)) > 0.01
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.1)  # the trainer steps in place
    asyncio.run(engine.load(None, 4))
    assert worst(model, requests, run(engine, requests)) < 1e-5
    with pytest.raises(TypeError, match="state dict, got list"):
        asyncio.run(engine.load([1], 5))


OTHERS: dict[str, tuple[Any, type[Exception], str]] = {
    "one more": (lambda s: s | {"model.extra.weight": torch.zeros(2)}, RuntimeError, "Unexpected key.*model.extra.weight"),
    "one less": (lambda s: {n: t for n, t in s.items() if n != "model.norm.weight"}, RuntimeError, "Missing key.*model.norm.weight"),
    "another shape": (lambda s: s | {"model.norm.weight": torch.zeros(3)}, RuntimeError, "size mismatch for model.norm.weight"),
    "a shorter vocabulary": (lambda s: s | {"model.embed_tokens.weight": torch.zeros(47, 32)}, RuntimeError, "mismatch for model.embed_tokens"),
    "no numbers": (lambda s: s | {"model.norm.weight": s["model.norm.weight"].to("meta")}, RuntimeError, "model.norm.weight.*meta"),
    "no tensor": (lambda s: s | {"model.norm.weight": [1.0]}, RuntimeError, "model.norm.weight.*list"),
    "another model": (lambda s: {f"transformer.{n}": t for n, t in s.items()}, RuntimeError, "Missing key.*Unexpected key"),
    "nothing": (lambda s: {}, RuntimeError, "Missing key"),
    "no names": (lambda s: s | {(): torch.zeros(2)}, TypeError, "whose names are text, got ()"),
}


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("way", EVERY_WAY)
def test_weights_that_do_not_fit_change_nothing(way: str, kind: str) -> None:
    """`llama` has a tied head."""
    model, other = small(kind), small(kind, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = LocalEngine(model, slots=4, memory=MANY, **WAYS[way])
    asyncio.run(engine.load(None, 2))
    requests = [ask(line(9, i), seed=i, temperature=0.0) for i in range(3)]
    expected = run(engine, requests)
    for name, (change, kind_of_error, said) in OTHERS.items():
        with pytest.raises(kind_of_error, match=said) as caught:
            asyncio.run(engine.load(change(dict(other.state_dict())), 7))
        assert "\n" not in str(caught.value), name
        assert len(str(caught.value)) < 2000
        assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items()), name
        assert run(engine, requests) == expected, name
        assert engine.version == 2
        asyncio.run(engine.reset())
        assert run(engine, requests) == expected, name


@pytest.mark.parametrize("way", EVERY_WAY)
def test_a_tied_head_and_another_dtype_are_taken(way: str) -> None:
    model, other = small("llama"), small("llama", seed=1)
    engine = LocalEngine(model, slots=4, memory=MANY, **WAYS[way])
    state = {name: tensor.double() for name, tensor in other.state_dict().items() if name != "lm_head.weight"}
    asyncio.run(engine.load(state, 1))
    requests = mixed(4)
    assert worst(other, requests, run(engine, requests)) < 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("way", EVERY_WAY)
def test_logits_that_are_no_numbers_are_said(way: str, number: float, temperature: float) -> None:
    """3e38 in a weight: logits that overflow to +inf and -inf."""
    model = small(tie_word_embeddings=False)
    engine = LocalEngine(model, slots=4, memory=MANY, **WAYS[way])
    with torch.no_grad():
        row = model.lm_head.weight[3]
        row.copy_(torch.full_like(row, number) * row.sign())
    asyncio.run(engine.load(None, 1))
    for sampling in ({}, {"top_p": 0.5}, {"top_k": 4}):
        refused = 0
        for seed in range(8):
            try:
                [segment] = run(engine, [ask(line(5, seed), seed=seed, temperature=temperature, **sampling)])
            except ValueError as error:
                refused += "logits are NaN or infinite" in str(error)
            else:
                assert all(map(math.isfinite, (*segment.logprobs, *segment.entropy)))
        assert refused


def test_a_low_precision_copy_is_stated_and_renewed() -> None:
    model = small()
    engine = LocalEngine(model, slots=4, memory=MANY, precision=torch.bfloat16, native=False)
    assert sum(p.nbytes for p in engine._copy.parameters()) == 2 * sum(p.numel() for p in model.parameters())
    assert LocalEngine(model, slots=1, memory=MANY)._copy is None
    requests = mixed(6)
    assert worst(model, requests, run(engine, requests)) < 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    stale = run(engine, requests)
    asyncio.run(engine.load(None, 1))
    fresh = run(engine, requests)
    assert worst(model, requests, fresh) < 0.1 < worst(model, requests, stale)
    assert model.dtype == torch.float32
