"""Scheduling: unequal requests through few slots, stop rules, wake-ups, failures, loops, refusals."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from engines import EVERY_WAY, KERNELS, WAYS, ask, line, mixed, one, run, small, worst
from ramulus.engine.engine import Segment
from ramulus.engine.local.local_engine import LocalEngine

MANY = 2**26


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_many_unequal_requests(slots: int) -> None:
    model = small()
    engine = LocalEngine(model, slots=slots, memory=MANY)
    requests = mixed(50 if slots > 1 else 12)
    segments = run(engine, requests)
    assert worst(model, requests, segments) < 1e-5
    total = sum(r.sampling.max_tokens for r in requests)
    assert engine.counters()["sampled"] == engine.counters()["row_steps"] == total
    longest = max(r.sampling.max_tokens for r in requests)
    assert engine.counters()["steps"] <= total / slots + longest  # a freed slot is taken at once
    assert engine.counters()["prefilled"] + engine.counters()["reused"] == sum(len(r.prefix) for r in requests)


def test_until_sees_every_token_and_ends_the_row() -> None:
    seen: list[int] = []

    def watch(tokens: list[int]) -> str | None:
        seen.append(len(tokens))
        return "enough" if len(tokens) == 4 else None

    engine = LocalEngine(small(), slots=2, memory=MANY)
    segment = run(engine, [ask(line(5, 1), until=watch, max_tokens=10)])[0]
    assert (len(segment.tokens), segment.finish, seen) == (4, "enough", [1, 2, 3, 4])
    assert len(segment.logprobs) == len(segment.entropy) == 4
    assert (segment.kept, segment.temperature) == (None, 1.0)
    last = run(engine, [ask(line(5, 1), until=lambda t: "eos" if len(t) == 6 else None, max_tokens=6)])[0]
    assert (len(last.tokens), last.finish) == (6, "eos")
    assert run(engine, [ask(line(5, 1), max_tokens=6)])[0].finish is None


def test_woken_coroutines_join_the_next_step() -> None:
    """Chains of five segments side by side, each link behind a gather and a task, must keep all slots busy."""
    engine = LocalEngine(small(), slots=8, memory=MANY)

    async def link(prefix: tuple[int, ...], seed: int) -> Segment:
        return (await asyncio.gather(one(engine, ask(prefix, seed=seed, max_tokens=6))))[0]

    async def chain(i: int) -> None:
        prefix = line(10, i)
        for k in range(5):
            task = asyncio.create_task(link(prefix, 10 * i + k))
            prefix += tuple((await asyncio.gather(task))[0].tokens)

    async def all_chains() -> None:
        await asyncio.gather(*[chain(i) for i in range(8)])

    asyncio.run(all_chains())
    assert engine.counters()["steps"] == 30
    assert engine.counters()["prefilled"] == 8 * 9 + 8 * 5  # every link continues from remembered KV


def test_requests_that_arrive_late_and_at_random_points_are_right() -> None:
    model = small()
    engine = LocalEngine(model, slots=5, memory=2**21)
    rng = random.Random(0)
    done: list[tuple[Any, Segment]] = []

    async def grow(prefix: tuple[int, ...], depth: int, seed: int) -> None:
        request = ask(prefix, seed=seed, max_tokens=rng.randint(1, 12))
        segment = await one(engine, request)
        done.append((request, segment))
        if depth:
            text = prefix + tuple(segment.tokens)
            cuts = [rng.randint(1, len(text)) for _ in range(3)]
            await asyncio.gather(*[grow(text[:cut], depth - 1, seed * 7 + i) for i, cut in enumerate(cuts)])

    async def forest() -> None:
        await asyncio.gather(*[grow(line(8 + i, i), 2, i + 1) for i in range(4)])

    asyncio.run(forest())
    assert len(done) == 4 * (1 + 3 + 9)
    assert worst(model, [r for r, _ in done], [s for _, s in done]) < 1e-5


def test_a_failure_reaches_everyone_and_the_engine_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(small(), slots=2, memory=MANY)

    def broken() -> int:
        raise RuntimeError("no such step")

    async def crowd() -> list[Any]:
        return await asyncio.gather(*[one(engine, ask(line(4, i), seed=i)) for i in range(5)], return_exceptions=True)

    with monkeypatch.context() as patched:
        patched.setattr(engine._scheduler, "step", broken)
        assert [str(e) for e in asyncio.run(crowd())] == ["no such step"] * 5
    requests = mixed(5)
    assert worst(engine.model, requests, run(engine, requests)) < 1e-5


@pytest.mark.parametrize("error", [RuntimeError("no such rule"), KeyError(3), MemoryError("no more"), StopIteration(), AssertionError()])
@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("slots", [2, 8])
def test_an_until_that_fails_ends_its_own_call_alone(slots: int, way: str, error: Exception) -> None:
    """The other requests of that call end with it, those that wait as well; those of other calls get the tokens that they get alone."""
    engine = LocalEngine(small(), slots=slots, memory=MANY, **WAYS[way])
    asked = [0]

    def broken(tokens: list[int]) -> str | None:
        asked[0] += 1
        if len(tokens) == 3:
            raise error
        return None

    fine = [ask(line(4, i), seed=i, max_tokens=6 + i) for i in range(6)]
    doomed = [ask(line(4, 9), seed=9, max_tokens=20, until=broken), ask(line(4, 8), seed=8, max_tokens=20)]
    doomed += [ask(line(3, i), seed=i, max_tokens=20, until=broken) for i in range(6)]

    async def crowd() -> list[Any]:
        calls = [one(engine, request) for request in fine]
        return await asyncio.gather(*calls[:3], engine.sample(doomed), *calls[3:], return_exceptions=True)

    told = asyncio.run(crowd())
    wrong = told.pop(3)
    if isinstance(error, StopIteration):
        assert isinstance(wrong, RuntimeError)
        assert wrong.__cause__ is error
    else:
        assert wrong is error
    before = asked[0]
    assert [segment.tokens for segment in told] == [segment.tokens for segment in run(engine, fine)]
    assert asked[0] == before <= 3 * slots
    assert not engine._scheduler.busy


def test_cancelled_requests_leave_the_others_alone() -> None:
    engine = LocalEngine(small(), slots=2, memory=MANY)
    asked = ask(line(4, 1), seed=3, max_tokens=20)

    async def one_gives_up() -> Segment:
        doomed = [asyncio.create_task(one(engine, ask(line(4, i), seed=i, max_tokens=200))) for i in range(3)]
        kept = asyncio.create_task(one(engine, asked))
        for _ in range(30):
            await asyncio.sleep(0)
        for task in doomed:
            task.cancel()
        return await kept

    segment = asyncio.run(one_gives_up())
    assert len(segment.tokens) == 20
    assert worst(engine.model, [asked], [segment]) < 1e-5
    assert engine.counters()["sampled"] < 100

    async def leave_in_the_middle() -> None:
        task = asyncio.create_task(one(engine, asked))
        for _ in range(15):
            await asyncio.sleep(0)
        del task

    asyncio.run(leave_in_the_middle())  # asyncio.run cancels what is left
    assert run(engine, [asked])[0].tokens == segment.tokens


def test_load_waits_for_requests_in_flight_and_later_ones_wait_for_it() -> None:
    engine = LocalEngine(small(), slots=4, memory=MANY)

    async def story() -> list[int]:
        early = [asyncio.create_task(one(engine, ask(line(4, i), seed=i, max_tokens=9))) for i in range(6)]
        await asyncio.sleep(0)
        loading = asyncio.create_task(engine.load(None, 1))
        await asyncio.sleep(0)
        late = [asyncio.create_task(one(engine, ask(line(4, i), seed=i, max_tokens=9))) for i in range(6)]
        again = asyncio.create_task(engine.load(None, 2))
        segments = await asyncio.gather(*early, *late)
        await asyncio.gather(loading, again)
        return [s.version for s in segments]

    versions = asyncio.run(story())
    assert versions[:6] == [0] * 6
    assert set(versions[6:]) <= {1, 2}
    assert engine.version == 2


def test_release_gives_memory_back() -> None:
    engine = LocalEngine(small(), slots=4, memory=MANY)
    run(engine, mixed(5))
    assert engine._scheduler.memory.nbytes > 0
    engine.release()
    assert engine._scheduler.memory.nbytes == 0

    async def too_early() -> None:
        task = asyncio.create_task(one(engine, ask(line(4, 1))))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="in flight"):
            engine.release()
        await task
        engine.release()  # at once, while the driver still looks around for more
        assert engine._scheduler.memory.nbytes == 0
        assert len((await one(engine, ask(line(4, 1)))).tokens) == 8

    asyncio.run(too_early())


def test_a_budget_for_few_slots_still_serves_all() -> None:
    model = small()
    token = 3 * 2 * 2 * 16 * 4
    requests = [*mixed(10), ask(line(150, 1), max_tokens=100), *mixed(9)]
    engine = LocalEngine(model, slots=32, memory=256 * token)  # one slot of the longest
    assert worst(model, requests, run(engine, requests)) < 1e-5
    assert engine._scheduler.memory.nbytes <= 256 * token


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(()), "prefix of a request is empty"),
        (ask((1, 2, 99)), "token 99 .* vocabulary of 48"),
        (ask((1, -1)), "token -1"),
        (ask(line(200, 1), max_tokens=57), "make 257, the model takes 256"),
        (ask(line(100, 1), max_tokens=100), "one slot of 224 tokens needs 172032 bytes of KV, the budget is memory=100000: it fits 128 tokens"),
    ],
)
def test_requests_that_cannot_be_served(request_: Any, message: str) -> None:
    engine = LocalEngine(small(), slots=2, memory=100000)
    with pytest.raises(ValueError, match=message):
        run(engine, [request_])
    assert len(run(engine, [ask((1, 2))])[0].tokens) == 8


TINY = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TINY)), r"Qwen3_5ForCausalLM .*of its 4 layers \[3\]"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2)), "MambaForCausalLM"),
    ],
)
def test_architectures_that_cannot_be_sampled_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalEngine(make())


def test_the_self_check_finds_state_outside_keys_and_values() -> None:
    """A model that mixes in the previous token's embedding by itself: decode cannot know it."""
    model = small()

    def mix_in(module: Any, arguments: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 0.3 * torch.nn.functional.pad(out[:, :-1], (0, 0, 1, 0))

    model.model.embed_tokens.register_forward_hook(mix_in)
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM .*relative error"):
        LocalEngine(model)


WINDOWED = {
    "every layer": lambda size: MistralForCausalLM(MistralConfig(**TINY | {"head_dim": 16}, sliding_window=size)),
    "the last layers": lambda size: small(use_sliding_window=True, sliding_window=size, max_window_layers=1, max_position_embeddings=128),
}


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("size", [1, 5, 16, 127])
@pytest.mark.parametrize("layers", WINDOWED)
def test_texts_longer_than_a_window(layers: str, size: int, way: str) -> None:
    torch.manual_seed(0)
    model = WINDOWED[layers](size).eval()
    engine = LocalEngine(model, slots=3, memory=MANY, **WAYS[way])
    assert (engine.limit, engine.forward.name) == (128, way)
    requests = mixed(8, longest=60, most=60)
    assert worst(model, requests, run(engine, requests)) < 1e-5


def test_a_window_with_soft_caps() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**TINY, sliding_window=16)).eval()
    engine = LocalEngine(model, slots=3, memory=MANY)
    assert (engine.limit, engine.forward.name) == (128, "transformers")
    requests = mixed(8, longest=60, most=60)
    assert worst(model, requests, run(engine, requests)) < 1e-5


def test_a_dynamic_rotary_embedding_ends_where_it_changes() -> None:
    model = small(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, max_position_embeddings=64)
    engine = LocalEngine(model, slots=3, memory=MANY)
    assert engine.limit == 64
    requests = mixed(8, longest=30, most=30)
    assert worst(model, requests, run(engine, requests)) < 1e-5


def test_same_names_other_arithmetic_falls_back_to_the_model_itself() -> None:
    model = small()
    hook = lambda module, arguments, out: out * 0.5  # noqa: E731
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(hook)
    engine = LocalEngine(model, slots=3, memory=MANY)
    assert engine.forward.name == "transformers"
    requests = mixed(5)
    assert worst(model, requests, run(engine, requests)) < 1e-5


def adapted(model: Any, **options: Any) -> Any:
    """The model under adapters that are not zero, on attention, MLP and the head."""
    peft = pytest.importorskip("peft", reason="needs peft")
    names = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": names, "init_lora_weights": False} | options))


@pytest.mark.parametrize("way", EVERY_WAY)
def test_adapters_are_sampled_from_at_full_speed(way: str) -> None:
    """Every way takes them, merged anew by each `load`; the model's own weights and adapters stay apart."""
    model = adapted(small())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    engine = LocalEngine(model, slots=4, memory=MANY, **WAYS[way])
    assert engine.forward.name == way
    requests = mixed(6)
    segments = run(engine, requests)
    assert worst(model, requests, segments) < 1e-5
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with model.disable_adapter():
        assert worst(model, requests, segments) > 1e-3
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-0.5)
    asyncio.run(engine.load(None, 1))
    assert worst(model, requests, run(engine, requests)) < 1e-5


@KERNELS
def test_adapters_on_a_bfloat16_model_are_not_lost_in_rounding() -> None:
    """A change that is far below the rounding of the weights that it is added to is sampled from; without the kernels the model's own modules do."""
    model = adapted(small(dtype=torch.bfloat16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.01)
    requests = mixed(6)
    engine = LocalEngine(model, slots=4, memory=MANY)
    assert (engine.forward.name, engine.forward.geometry.dtype) == ("compiled", torch.float32)
    segments = run(engine, requests)
    exact = model.float()
    assert worst(exact, requests, segments) < 1e-4
    with exact.disable_adapter():
        assert worst(exact, requests, segments) > 1e-3
    assert LocalEngine(adapted(small(dtype=torch.bfloat16)), slots=4, memory=MANY, native=False).forward.name == "transformers"


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_go_the_model_s_own_way(options: dict[str, Any]) -> None:
    model = adapted(small(), target_modules=["q_proj", "v_proj"], **options)
    engine = LocalEngine(model, slots=4, memory=MANY)
    assert engine.forward.name == "transformers"
    requests = mixed(4)
    assert worst(model, requests, run(engine, requests)) < 1e-5


def test_slots_must_be_positive() -> None:
    with pytest.raises(ValueError, match="slots"):
        LocalEngine(small(), slots=0)
