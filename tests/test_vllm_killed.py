"""Real vLLM servers whose processes are killed or stopped, and weights that arrive in part: seen, said, mended; the same tokens afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import save_file

from conformance.subjects import scratch
from ramulus.engine.engine import Request, Sampling, Segment, StopRule
from ramulus.engine.vllm.process import Process
from ramulus.engine.vllm.vllm_engine import VllmEngine
from ramulus.engine.weight_bytes import to_bytes
from vllm_servers import NEEDS, engine_at, process_of

pytestmark = NEEDS
LONG = [Request((1, 2, 3 + i % 5), Sampling(400), StopRule(frozenset()), seed=i) for i in range(16)]


def ours(timeout: float = 120.0) -> tuple[VllmEngine, Process]:
    """An engine that may start its server again."""
    process = process_of("killed", scratch(0, 64)[0])
    return engine_at(process, timeout=timeout, ours=True), process


def processes(group: int) -> dict[str, int]:
    """The processes of a server by what they are: "server", "EngineCore", "Worker"."""
    found = {"server": group}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = path.joinpath("cmdline").read_text()
            of = path.joinpath("stat").read_text().rpartition(")")[2].split()[2]
        except OSError:
            continue
        if int(of) == group and name.startswith("VLLM::"):
            found[name.partition("::")[2].strip("\0").split("_")[0]] = int(path.name)
    return found


def same(some: Sequence[Segment], others: Sequence[Segment]) -> bool:
    return [(s.tokens, s.version) for s in some] == [(s.tokens, s.version) for s in others]


@pytest.mark.parametrize("part", ["EngineCore", "Worker", "server"])
def test_a_part_of_it_that_is_killed_on_the_way_costs_a_restart_and_nothing_else(part: str) -> None:
    engine, process = ours()

    async def story() -> None:
        await engine.load(scratch(1, 64)[0].state_dict(), 5)
        undisturbed = await engine.sample(LONG)
        assert process.running is not None
        first = process.running.pid
        sampled = engine.counters()["sampled"]
        asking = asyncio.ensure_future(engine.sample(LONG))
        await asyncio.sleep(0.3)
        assert not asking.done()
        os.kill(processes(first)[part], signal.SIGKILL)
        assert same(await asking, undisturbed)
        assert process.running.pid != first
        assert engine.counters()["sampled"] - sampled == 16 * 400, "counted once"

    with pytest.warns(UserWarning, match="it is started again, and what it had not answered is asked again"):
        asyncio.run(story())


def test_one_that_hangs_is_ended_at_the_deadline_and_started_again() -> None:
    engine, process = ours(timeout=20.0)

    async def story() -> None:
        await engine.load(scratch(1, 64)[0].state_dict(), 5)
        undisturbed = await engine.sample(LONG)
        assert process.running is not None
        os.killpg(process.running.pid, signal.SIGSTOP)
        assert same(await engine.sample(LONG), undisturbed)

    with pytest.warns(UserWarning, match="has answered nothing for 20 s: it is started again"):
        asyncio.run(story())


def test_one_that_is_killed_while_weights_are_on_their_way_gets_them_again() -> None:
    engine, process = ours()

    async def story() -> None:
        await engine.load(scratch(1, 64)[0].state_dict(), 5)
        wanted = [list(segment.tokens) for segment in await engine.sample(LONG)]
        await engine.load(scratch(0, 64)[0].state_dict(), 6)
        loading = asyncio.ensure_future(engine.load(scratch(1, 64)[0].state_dict(), 7))
        await asyncio.sleep(0.02)
        assert process.running is not None
        os.killpg(process.running.pid, signal.SIGKILL)
        await loading
        segments = await engine.sample(LONG)
        assert [list(segment.tokens) for segment in segments] == wanted
        assert {segment.version for segment in segments} == {7}

    with pytest.warns(UserWarning, match="it is started again"):
        asyncio.run(story())


def test_weights_half_sent_are_refused_and_those_that_were_stay(tmp_path: Path) -> None:
    engine, process = ours()
    first, second = scratch(0, 64)[0].state_dict(), scratch(1, 64)[0].state_dict()
    body = to_bytes(second)
    (tmp_path / "cut.safetensors").write_bytes(body[: len(body) // 2])
    lacking = {name: tensor for name, tensor in second.items() if "layers.1" not in name}
    save_file(lacking, tmp_path / "lacking.safetensors")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "model.safetensors").write_bytes(b"")
    other = scratch(1, 128)[0].state_dict()

    async def story() -> None:
        await engine.load(first, 5)
        undisturbed = await engine.sample(LONG)
        began = process.running
        for weights, said in (
            (tmp_path / "cut.safetensors", "are not whole"),
            (tmp_path / "nothing", "are not whole"),
            (tmp_path / "lacking.safetensors", "are missing|missing, new"),
            (lacking, "are missing|missing, new"),
            (other, "of another shape"),
        ):
            with pytest.raises(ValueError, match=said):
                await engine.load(weights, 6)
            assert same(await engine.sample(LONG), undisturbed), "the old ones are there"
        assert process.running is began, "without a restart"
        await engine.load(second, 6)
        assert {segment.version for segment in await engine.sample(LONG)} == {6}

    asyncio.run(story())


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_sampled() -> None:
    engine, _ = ours()

    async def story() -> None:
        await engine.load(scratch(0, 64)[0].state_dict(), 1)
        before = engine.counters()
        with pytest.raises(ValueError, match="end beyond the model's 1024: lower max_tokens"):
            await engine.sample([*LONG, Request((1,) * 1000, Sampling(25))])
        assert engine.counters() == before
        assert len((await engine.sample([Request((1,) * 1000, Sampling(24))]))[0].tokens) == 24

    asyncio.run(story())
