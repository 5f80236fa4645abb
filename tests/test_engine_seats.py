"""Where rows sit: pools of slots, what stays in them, several steps in one call, and many requests in one."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import EVERY_WAY, KERNELS, VOCABULARY, WAYS, ask, line, mixed, one, run, small, worst
from ramulus.engine.engine import Request, Segment, StopRule
from ramulus.engine.local import compiled
from ramulus.engine.local import slots as slot_allocation
from ramulus.engine.local.batch import COUNT, LEFT, POSITION, Batch
from ramulus.engine.local.compiled import CompiledForward, DecodeSteps
from ramulus.engine.local.forward import ModelForward
from ramulus.engine.local.fused import recognise
from ramulus.engine.local.kv import Geometry, Slots
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.engine.local.prefix_cache import PrefixCache
from ramulus.engine.local.radix_tree import RadixTree, common
from ramulus.engine.local.samples import Samples
from ramulus.engine.local.sampling import Drawn
from ramulus.engine.local.sequence import Group, Sequence
from ramulus.engine.rng import uniform
from ramulus.engine.toy import ToyEngine

MANY = 2**26
TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=7).map(tuple), max_size=12)


def prefix_cache() -> PrefixCache:
    geometry = Geometry(1, 1, 1, torch.float32, torch.device("cpu"))
    slots = Slots(geometry)
    slots.resize(40, 8, 0)
    tree = RadixTree(geometry.token_bytes)
    tree.shrink(2**20)
    return PrefixCache(slots, tree)


@settings(deadline=None, max_examples=150)
@given(held=TEXTS, gone=st.sets(st.integers(0, 11)), more=TEXTS, asked=TEXTS)
def test_the_longest_beginning_is_found(
    held: list[tuple[int, ...]], gone: set[int], more: list[tuple[int, ...]], asked: list[tuple[int, ...]]
) -> None:
    """As by looking at all texts, also after some have lost their slot and others have come."""
    here = prefix_cache()
    for slot, text in enumerate(held):
        here.keep(slot, text)
    for text in asked[:3]:
        here.find(text)
    for slot in gone:
        here.evict(slot)
    for slot, text in enumerate(more, len(held)):
        here.keep(slot, text)
    for text in asked + held:
        slot, n = here.find(text)
        assert n == max((common(text, other) for other in here.slot_of), default=0)
        if n:
            assert any(text[:n] == other[:n] for other in here.texts[slot])


async def grown(engine: Any, prompts: list[tuple[int, ...]], rounds: int, seed: int, **sampling: Any) -> list[tuple[Request, Segment]]:
    """Trees whose forks lie at ends and inside of earlier paths, at random, each tree at its own pace."""
    found: list[tuple[Request, Segment]] = []

    async def tree(prompt: tuple[int, ...], dice: random.Random) -> None:
        texts = [prompt]
        for _ in range(rounds):
            parents = [dice.choice(texts) for _ in range(2)]
            parents = [text[: dice.randint(len(prompt), len(text))] if dice.random() < 0.4 else text for text in parents]
            requests = [
                ask(text, seed=dice.randrange(2**40), max_tokens=dice.randint(1, 9), **sampling) for text in parents for _ in range(2)
            ]
            segments = await engine.sample(requests)
            found.extend(zip(requests, segments, strict=True))
            texts += [r.prefix + tuple(s.tokens) for r, s in zip(requests, segments, strict=True)]

    await asyncio.gather(*[tree(prompt, random.Random(f"{seed}/{i}")) for i, prompt in enumerate(prompts)])
    return found


@KERNELS
@pytest.mark.parametrize(("pool", "slots", "memory"), [(1, 3, MANY), (2, 5, MANY), (16, 4, 2**18), (16, 32, 2**17)])
def test_forests_larger_than_the_pool_are_the_same_bits(monkeypatch: pytest.MonkeyPatch, pool: int, slots: int, memory: int) -> None:
    """Slots taken from finished rows, texts copied from slots and from the trie, or prefilled again: nobody notices."""
    model = small()
    prompts = [line(4 + 5 * i, i) for i in range(6)]
    roomy = LocalEngine(model, slots=64, memory=MANY)
    expected = asyncio.run(grown(roomy, prompts, 6, 1))
    assert worst(model, *zip(*expected, strict=True)) < 1e-5
    monkeypatch.setattr(slot_allocation, "POOL", pool)
    tight = LocalEngine(model, slots=slots, memory=memory)
    found = asyncio.run(grown(tight, prompts, 6, 1))
    key = lambda pair: (pair[0].prefix, pair[0].seed)  # noqa: E731
    assert sorted((*key(pair), pair[1].tokens, pair[1].logprobs) for pair in found) == sorted(
        (*key(pair), pair[1].tokens, pair[1].logprobs) for pair in expected
    )
    assert tight._scheduler.memory.nbytes <= memory
    assert tight.counters()["sampled"] == roomy.counters()["sampled"]
    here = tight._scheduler.allocator
    assert sorted(here.idle) == list(range(here.slots.rows))  # every slot is free again
    for text, slot in here.cache.slot_of.items():
        assert text in here.cache.texts[slot]


@KERNELS
def test_forests_in_a_pool_copy_nothing_through_the_trie() -> None:
    engine = LocalEngine(small(), slots=8, memory=MANY)
    found = asyncio.run(grown(engine, [line(9, i) for i in range(4)], 4, 2))
    assert engine._scheduler.memory.tree.used == 0
    assert engine.counters()["prefilled"] == 4 * 8 + len(found)  # prompts once, then last tokens alone


@KERNELS
def test_slots_become_longer_while_rows_sit_in_them() -> None:
    """A long request arrives in the middle of shorter ones, whose keys and values are brought along; in memory for short slots alone."""
    model = small()
    early = [ask(line(6, i), seed=i, max_tokens=24) for i in range(5)]
    late = [ask(line(90, 50 + i), seed=50 + i, max_tokens=9) for i in range(3)]
    alone = [run(LocalEngine(model, slots=1, memory=MANY), [request])[0] for request in early + late]
    engine = LocalEngine(model, slots=16, memory=2**21)
    assert engine._scheduler.allocator.ample == 32

    async def after(request: Request) -> Segment:
        await one(engine, ask(request.prefix[:4], seed=9, max_tokens=3))
        return await one(engine, request)

    async def everything() -> list[Segment]:
        return await asyncio.gather(*[one(engine, request) for request in early], *[after(request) for request in late])

    assert asyncio.run(everything()) == alone
    assert engine._scheduler.memory.slots.capacity >= 99
    counted = dict(engine.counters())
    asyncio.run(engine.load(None, 0))
    assert asyncio.run(everything()) == alone
    assert {name: n - counted[name] for name, n in engine.counters().items()} == counted  # what came before is not to be seen
    engine.release()
    assert engine._scheduler.memory.nbytes == 0
    assert asyncio.run(everything()) == alone


@KERNELS
def test_slots_that_were_made_once_serve_again() -> None:
    engine = LocalEngine(small(), slots=4, memory=MANY)
    requests = mixed(20)
    expected = run(engine, requests)
    store = engine._scheduler.memory.slots.store.data_ptr()
    asyncio.run(engine.load(None, 0))
    assert run(engine, requests) == expected
    assert engine._scheduler.memory.slots.store.data_ptr() == store
    assert engine._scheduler.memory.nbytes <= MANY


@KERNELS
@pytest.mark.parametrize("memory", [2**18, 2**19, 2**21])
def test_counters_are_those_of_a_fresh_engine_after_a_load(memory: int) -> None:
    """As a resumed run counts: whatever was sampled before, long texts or short, in memory that is scarce or not."""
    model, prompts = small(), [line(4 + 5 * i, i) for i in range(6)]
    fresh, used = (LocalEngine(model, slots=6, memory=memory) for _ in range(2))
    run(used, [ask(line(100 + i, i), max_tokens=30) for i in range(9)])
    asyncio.run(used.load(None, 0))
    before = dict(used.counters())
    for engine in (fresh, used):
        asyncio.run(grown(engine, prompts, 6, 3))
    assert {name: n - before[name] for name, n in used.counters().items()} == fresh.counters()


@KERNELS
def test_prefixes_of_waiting_requests_cost_no_remembered_text() -> None:
    """Nobody waits, so no slot is emptied for early prefills: all paths that ended are there afterwards."""
    engine = LocalEngine(small(), slots=2, memory=MANY)
    requests = [ask(line(5 + i, i), seed=i, max_tokens=3) for i in range(24)]

    async def one_by_one() -> None:
        for request in requests:
            await one(engine, request)

    asyncio.run(one_by_one())
    assert len(set(engine._scheduler.memory.cache.slot_of.values())) == 24
    assert engine._scheduler.memory.tree.used == 0


@KERNELS
def test_one_slot_keeps_the_prompt_of_siblings() -> None:
    """There is room for one row: each sibling goes on from the prompt that the one before has left, which is prefilled once."""
    model, prompt = small(), line(20, 1)
    token = LocalEngine(model, slots=1).forward.geometry.token_bytes
    engine = LocalEngine(model, slots=1, memory=32 * token)
    requests = [ask(prompt, seed=i, max_tokens=8) for i in range(5)]
    assert worst(model, requests, run(engine, requests)) < 1e-5
    assert engine.counters()["prefilled"] == 19 + 5


def eos(tokens: list[int]) -> str | None:
    return "eos" if tokens[-1] in (3, 11) else None


@pytest.mark.parametrize("way", EVERY_WAY[:2])
@pytest.mark.parametrize("at_once", [1, 2**30])
def test_several_steps_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch, way: str, at_once: int) -> None:
    """Rows whose ends are known beside rows that look at every token, at several temperatures."""
    monkeypatch.setattr(compiled, "AT_ONCE", at_once)
    model = small()
    asked = [ask(r.prefix, seed=i, until=eos, max_tokens=4 + i, temperature=(1.0, 0.0, 1.4)[i % 3]) for i, r in enumerate(mixed(20))]
    told = [Request(r.prefix, r.sampling, StopRule(frozenset({3, 11, 999})), r.seed) for r in asked]
    one_by_one, together, both = (LocalEngine(model, slots=6, memory=MANY, **WAYS[way]) for _ in range(3))
    expected = run(one_by_one, asked)
    assert run(together, told) == expected
    assert run(both, [*told[:10], *asked[10:]]) == expected
    assert any(s.finish == "eos" for s in expected)
    assert together.counters()["sampled"] == sum(len(s.tokens) for s in expected)
    for name in ("steps", "row_steps", "sampled"):
        assert together.counters()[name] == one_by_one.counters()[name], name


@KERNELS
def test_the_kernels_numbers_are_those_of_the_streams() -> None:
    fused = recognise(ModelForward(small()))
    assert fused is not None
    forward, seeds = CompiledForward(fused), [0, 1, 2**63 - 1, 77, 12345678901]
    slots, batch, samples, steps = Slots(forward.geometry, forward), Batch(8, VOCABULARY), Samples(8), DecodeSteps(forward, 8)
    slots.resize(5, 32, 0)
    group = Group(asyncio.new_event_loop().create_future(), [], 5)
    rows = [Sequence.of(ask((i + 1,), seed=seed, max_tokens=40), group, i, 32, None) for i, seed in enumerate(seeds)]
    for i, row in enumerate(rows):
        row.slot = 4 - i
        batch.put(row, i, 0)
    batch.join(rows)
    for step in range(3):
        assert steps.run(batch, slots, samples, 1) == 1
        assert steps.uniform[:5].tolist() == [uniform(seed, step) for seed in seeds]
    assert batch.state[POSITION, :5].tolist() == [3] * 5
    assert steps.run(batch, slots, samples, 4) == 4
    assert batch.state[COUNT, :5].tolist() == [7] * 5
    assert batch.state[LEFT, :5].tolist() == [33] * 5
    assert [len(tokens) for tokens, _ in samples.read(rows)] == [7] * 5


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_record_gives_back_what_each_row_drew(data: st.DataObject) -> None:
    """Rows that come, go and change places, longer than there is room for at first."""
    record, rows, told, counter = Samples(4), [None] * 4, {}, 0  # type: ignore[var-annotated]
    group = Group(asyncio.new_event_loop().create_future(), [], 1)
    for _ in range(data.draw(st.integers(1, 25))):
        for place in range(4):
            if rows[place] is None and data.draw(st.booleans()):
                rows[place] = Sequence.of(ask((1,)), group, 0, 32, None)
                rows[place].take_row(place, record.now)
                told[rows[place]] = []
        free, full = [i for i in range(4) if rows[i] is None], [i for i in range(4) if rows[i] is not None]
        if free and full and data.draw(st.booleans()):
            rows[free[0]], rows[full[-1]] = rows[full[-1]], None
            rows[free[0]].take_row(free[0], record.now)
        for _ in range(data.draw(st.sampled_from([1, 2, 40]))):
            line = list(range(counter, counter + 4))
            record.add(Drawn(line, [x + 0.25 for x in line], [0.0] * 4, [x + 0.5 for x in line], [1.0] * 4), rows)
            counter += 4
            for place, row in enumerate(rows):
                if row is not None:
                    told[row].append(line[place])
        ended = [row for row in rows if row is not None and data.draw(st.booleans())]
        for row, (tokens, columns) in zip(ended, record.read(ended), strict=True):
            assert tokens.tolist() == told[row]
            assert columns[1].tolist() == [x + 0.5 for x in told[row]]
            rows[rows.index(row)] = None
    assert len(record.tokens) <= 4096


@KERNELS
def test_logits_that_break_in_the_middle_are_reported() -> None:
    """A token whose embedding is NaN is drawn some steps into a call of several."""
    model = small(tie_word_embeddings=False)
    request = ask(line(5, 1), seed=4, until=None, max_tokens=12)
    engine = LocalEngine(model, slots=2, memory=MANY)
    tokens = run(engine, [request])[0].tokens
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens[6]] = torch.nan
    asyncio.run(engine.load(None, 1))
    first = tokens.index(tokens[6])
    assert 0 < first < 11
    with pytest.raises(ValueError, match="logits are NaN"):
        run(engine, [request])


@pytest.mark.parametrize("way", EVERY_WAY)
def test_many_at_once_are_those_one_by_one(way: str) -> None:
    model, requests = small(), mixed(15)
    engine = LocalEngine(model, slots=4, memory=MANY, **WAYS[way])
    expected = run(LocalEngine(model, slots=4, memory=MANY, **WAYS[way]), requests)
    assert asyncio.run(engine.sample(requests)) == expected
    assert asyncio.run(engine.sample([])) == []
    toy, asked = ToyEngine(vocab=8), [ask((1, i % 8), seed=i) for i in range(5)]
    assert asyncio.run(toy.sample(asked)) == [toy.continuation(request) for request in asked]


def test_whoever_stops_waiting_for_new_weights_stops_alone() -> None:
    """Requests that wait for `load`: one is cancelled, the others and the load go on."""
    engine, requests = LocalEngine(small(), slots=2, memory=MANY), mixed(4)
    expected = run(LocalEngine(small(), slots=2, memory=MANY), requests[1:])

    async def story() -> list[Segment]:
        busy = asyncio.create_task(one(engine, ask(line(9, 1), max_tokens=60, until=lambda tokens: None)))
        while not engine.counters()["steps"]:
            await asyncio.sleep(0)
        loading = asyncio.create_task(engine.load(None, 1))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(one(engine, request)) for request in requests]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.gather(busy, loading)
        return await asyncio.gather(*waiting[1:])

    found = asyncio.run(story())
    assert [s.tokens for s in found] == [s.tokens for s in expected]
    assert {s.version for s in found} == {1}


def test_one_bad_request_of_many_is_refused_before_any_is_sampled() -> None:
    engine = LocalEngine(small(), slots=4, memory=MANY)
    for bad in (ask((1, 999)), ask(()), ask((1, 2), max_tokens=4000)):
        with pytest.raises(ValueError, match=r"vocabulary of 48|prefix of a request is empty|the model takes 256"):
            asyncio.run(engine.sample([ask((1, 2)), ask((1, 2)), bad]))
    assert engine.counters()["sampled"] == 0
    assert not engine._scheduler.busy


@pytest.mark.parametrize("way", EVERY_WAY[:2])
def test_those_who_wait_no_more_leave_the_crowd(way: str) -> None:
    """A cancelled group frees its seats; others get what they would have got."""
    engine = LocalEngine(small(), slots=4, memory=MANY, **WAYS[way])
    other = ask(line(7, 3), seed=3, max_tokens=30)
    expected = run(LocalEngine(small(), slots=4, memory=MANY, **WAYS[way]), [other])[0]

    async def story() -> Segment:
        crowd = [ask(line(9, i), seed=i, max_tokens=200, until=lambda tokens: None) for i in range(9)]
        leaving = asyncio.create_task(engine.sample(crowd))
        staying = asyncio.create_task(one(engine, other))
        while engine.counters()["steps"] < 3:
            await asyncio.sleep(0)
        leaving.cancel()
        return await staying

    found = asyncio.run(story())
    assert found.tokens == expected.tokens
    assert not engine._scheduler.busy
    assert engine.counters()["row_steps"] < 9 * 200
    assert run(engine, [other])[0].tokens == expected.tokens


def test_a_failing_until_reaches_its_own_call_and_the_engine_goes_on() -> None:
    engine = LocalEngine(small(), slots=4, memory=MANY)

    def broken(tokens: list[int]) -> str | None:
        raise RuntimeError("broken rule")

    async def story() -> list[Any]:
        groups = [[ask(line(5, i), seed=i), ask(line(5, i), seed=9, until=broken if i == 1 else eos)] for i in range(3)]
        return await asyncio.gather(*[engine.sample(group) for group in groups], return_exceptions=True)

    first, failed, last = asyncio.run(story())
    assert str(failed) == "broken rule"
    assert [len(first), len(last)] == [2, 2]
    fresh, requests = LocalEngine(small(), slots=4, memory=MANY), mixed(6)
    assert run(engine, requests) == run(fresh, requests)
