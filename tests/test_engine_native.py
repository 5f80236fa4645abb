"""The compiled kernels: built for several widths of vector, against torch, and the same bits in any company."""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import KERNELS, KINDS, LANES, ask, line, mixed, run, small, worst
from ramulus.engine.engine import Sampling
from ramulus.engine.local import compiled
from ramulus.engine.local.check import verify_forward
from ramulus.engine.local.compiled import CompiledForward
from ramulus.engine.local.forward import ModelForward
from ramulus.engine.local.fused import recognise
from ramulus.engine.local.kv import Reach, Slots
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.engine.local.sampling import SamplingBatch, draw
from ramulus.grow.temperature import ByEntropy
from ramulus.native import memory
from ramulus.native.memory import free_memory, machine_memory

MANY = 2**26
pytestmark = KERNELS


@pytest.fixture(params=LANES)
def lanes(request: pytest.FixtureRequest) -> str:
    """Vectors of 4, 8 or 16 floats, whatever this processor has: the compiler splits longer ones."""
    return f"-DLANES={request.param}"


def forward_of(model: Any, *flags: str, precision: torch.dtype = torch.float32) -> CompiledForward:
    fused = recognise(ModelForward(model))
    assert fused is not None
    return CompiledForward(fused, precision, flags)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_width_of_vector_passes_the_self_check(kind: str, lanes: str) -> None:
    """Heads of 16 and 48, hidden sizes and vocabularies that fill no whole panel, one to four queries a key head."""
    for fields in (
        {},
        {"head_dim": 48, "num_key_value_heads": 1, "hidden_size": 52, "intermediate_size": 77, "vocab_size": 37},
    ):
        forward = forward_of(small(kind, **fields), lanes)
        assert forward.library.ramulus_lanes() == int(lanes[-2:].strip("="))
        assert verify_forward(forward, forward.reference) < 1e-5


@pytest.mark.parametrize("flag", [None, "-DWIDENED", "-DUNTILED"])
def test_bfloat16_passes_the_self_check_with_and_without_the_instructions(flag: str | None, lanes: str) -> None:
    """Within what the model's own forward in bfloat16 rounds; odd sizes make pairs of inputs that are not whole, heads of 48 no whole vectors."""
    odd = {"head_dim": 48, "num_key_value_heads": 1, "hidden_size": 52, "intermediate_size": 77, "vocab_size": 37}
    for kind, fields in (("qwen2", {}), ("qwen3", odd), ("llama", odd)):
        for model in (small(kind, **fields), small(kind, torch.bfloat16, **fields)):
            forward = forward_of(model, lanes, *filter(None, [flag]), precision=torch.bfloat16)
            assert 1e-4 < verify_forward(forward, forward.reference) < 3e-2


def test_a_head_that_does_not_fit_is_refused(lanes: str) -> None:
    with pytest.raises(ValueError, match="heads of a multiple of"):
        forward_of(small(hidden_size=8), lanes)  # heads of 2


@pytest.mark.parametrize("rule", ["plain", "hot and greedy", "by entropy"])
@pytest.mark.parametrize("vocabulary", [5, 37, 3000])
def test_draws_are_those_of_torch(vocabulary: int, rule: str, lanes: str) -> None:
    """The same tokens for the same uniform numbers, with their log-probs, entropies and temperatures."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(40, vocabulary, generator=generator) * 4
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    heats: dict[str, list[Any]] = {
        "plain": [1.0] * 40,
        "hot and greedy": [0.0, 0.7, 1.0, 1.8] * 10,
        "by entropy": [ByEntropy(pivot=1.0)] * 40,
    }
    knobs = SamplingBatch([Sampling(8, heat) for heat in heats[rule]], torch.device("cpu"), torch.float32)
    ours, theirs = (draw(logits, knobs, uniform, quick) for quick in (forward_of(small(), lanes), None))
    assert ours.tokens == theirs.tokens
    for name in ("logprobs", "kept", "entropy", "temperature"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=2e-6, rel=2e-6), name
    assert len(set(ours.tokens)) > 2


def test_tokens_without_probability_are_never_drawn(lanes: str) -> None:
    """-inf in the logits, also at the ends, and numbers next to 0 and 1."""
    logits = torch.full((6, 40), -torch.inf)
    logits[:, 7], logits[:, 21] = 1.0, 2.0
    uniform = torch.tensor([0.0, 1e-300, 0.2, 0.3, 1 - 2**-53, 0.999], dtype=torch.float64)
    knobs = SamplingBatch([Sampling(8)] * 6, torch.device("cpu"), torch.float32)
    drawn = draw(logits, knobs, uniform, forward_of(small(), lanes))
    assert drawn.tokens == [7, 7, 7, 21, 21, 21]
    share = 1 / (1 + torch.e)
    assert drawn.logprobs[0] == pytest.approx(torch.tensor(share).log().item(), abs=1e-6)
    two = torch.tensor([share, 1 - share])
    assert drawn.entropy == pytest.approx([float(-(two * two.log()).sum())] * 6, abs=1e-6)


@pytest.mark.parametrize("vocabulary", [9, 600])
def test_broken_logits_are_reported(vocabulary: int, lanes: str) -> None:
    """NaN or +inf anywhere, or -inf everywhere."""
    forward, uniform = forward_of(small(), lanes), torch.zeros(2, dtype=torch.float64)
    for heat in (1.0, 0.0, 0.7, ByEntropy(pivot=1.0)):
        knobs = SamplingBatch([Sampling(8, heat)] * 2, torch.device("cpu"), torch.float32)
        for place in (0, 4, vocabulary - 1, slice(None)):
            for number in (torch.nan, torch.inf, -torch.inf):
                logits = torch.zeros(2, vocabulary)
                logits[1, place] = number
                if place != slice(None) and number == -torch.inf:
                    assert draw(logits, knobs, uniform, forward).entropy[1] == pytest.approx(math.log(vocabulary - 1), abs=1e-5)
                    continue
                with pytest.raises(ValueError, match="logits are NaN or infinite"):
                    draw(logits, knobs, uniform, forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_changes_nothing(dtype: torch.dtype) -> None:
    """The same bits alone, in a crowd, with other slots, threads, lengths and prompts forked or prefilled: what no batched product promises."""
    model = small(dtype=dtype)
    requests = mixed(30)
    alone = [run(LocalEngine(model, slots=1, memory=MANY), [request])[0] for request in requests]
    threads = torch.get_num_threads()
    for slots, count in ((7, 1), (64, 3)):
        crowd = LocalEngine(model, slots=slots, memory=MANY, threads=count)
        assert crowd.forward.name == "compiled"
        assert run(crowd, requests) == alone
    assert torch.get_num_threads() == threads
    whole = alone[3]
    forked = ask((*requests[3].prefix, *whole.tokens[:5]), seed=9, max_tokens=6)
    fresh, known = LocalEngine(model, slots=4, memory=MANY), LocalEngine(model, slots=4, memory=MANY)
    run(known, [requests[3]])
    assert run(known, [forked]) == run(fresh, [forked])
    assert known.counters()["reused"] > fresh.counters()["reused"]


def test_long_texts_grow_the_tables() -> None:
    """Slots that become longer than the rotary table, and more rows than the line of seats."""
    model = small(max_position_embeddings=600)
    engine = LocalEngine(model, slots=80, memory=MANY)
    requests = [ask(line(5, i), seed=i, max_tokens=3) for i in range(80)] + [
        ask(line(400, 99), seed=99, max_tokens=100)
    ]
    assert worst(model, requests, run(engine, requests)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_are_kept_at_once_change_nothing(dtype: torch.dtype) -> None:
    """Prompts and a crowd around 128 and 256 tokens, which a thread meets in parts: the same bits alone and together."""
    model = small(dtype=dtype, max_position_embeddings=600)
    requests = [ask(line(n, n), seed=n, max_tokens=3) for n in (127, 128, 129, 255, 256, 257, 520)]
    requests += [ask(line(3 + i % 5, i), seed=i, max_tokens=3) for i in range(270)]
    together = run(LocalEngine(model, slots=300, memory=MANY, threads=1), requests)
    assert worst(model, requests, together) < (1e-5 if dtype == torch.float32 else 0.3)
    for i in (*range(7), 100, 276):
        assert run(LocalEngine(model, slots=1, memory=MANY, threads=1), [requests[i]]) == [together[i]]


def test_several_tokens_a_row_give_no_logits() -> None:
    forward = forward_of(small())
    slots = Slots(forward.geometry)
    slots.resize(1, 32, 0)
    tokens = torch.tensor([line(9, 1)])
    with pytest.raises(ValueError, match="one token a row"):
        forward(tokens, torch.arange(9)[None], Reach(slots, torch.arange(9)[None], 32), True)


@dataclass(frozen=True)
class Strided:
    """A rule whose answer is a view: of one number, or of every second one."""

    single: bool

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.single:
            return torch.tensor(0.7).expand(len(logits))
        return (0.5 + logits[:, :2].abs())[:, 1]


@pytest.mark.parametrize("single", [True, False])
def test_temperatures_may_be_views(single: bool) -> None:
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)) * 3
    uniform = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    knobs = SamplingBatch([Sampling(8, Strided(single))] * 30, torch.device("cpu"), torch.float32)
    ours, theirs = (draw(logits, knobs, uniform, quick) for quick in (forward_of(small()), None))
    assert ours.tokens == theirs.tokens
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-6)


def test_the_coldest_temperature_takes_the_most_probable() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    knobs = SamplingBatch([Sampling(8, 1e-40)] * 4, torch.device("cpu"), torch.float32)
    drawn = draw(logits, knobs, torch.full((4,), 0.5, dtype=torch.float64), forward_of(small()))
    assert drawn.tokens == logits.argmax(-1).tolist()
    assert drawn.logprobs == [0.0] * 4


def test_the_highest_number_draws_no_improbable_tail() -> None:
    """The largest uniform number falls on the last token that the sum reaches, not on one of probability e^-80 behind it."""
    logits = torch.randn(200, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = -80
    knobs = SamplingBatch([Sampling(8)] * 200, torch.device("cpu"), torch.float32)
    drawn = draw(logits, knobs, torch.full((200,), 1 - 2**-53, dtype=torch.float64), forward_of(small()))
    assert min(drawn.logprobs) > -20


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_s_default_dtype_is_no_matter(dtype: torch.dtype) -> None:
    model, requests = small(), mixed(8)
    expected = run(LocalEngine(model, slots=4, memory=MANY), requests)
    torch.set_default_dtype(dtype)
    try:
        found = run(LocalEngine(model, slots=4, memory=MANY), requests)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [s.tokens for s in found] == [s.tokens for s in expected]


def test_new_weights_are_taken_by_load() -> None:
    model = small(tie_word_embeddings=False)
    engine = LocalEngine(model, slots=4, memory=MANY)
    requests = mixed(8)
    run(engine, requests)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    asyncio.run(engine.load(None, 1))
    assert worst(model, requests, run(engine, requests)) < 1e-5


@pytest.mark.parametrize("kind", list(KINDS))
def test_its_copy_is_stated_and_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is copied too where it is tied to the embeddings; padding to whole panels comes on top."""
    model = small(kind)
    bound = sum(p.nbytes for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    bound += model.config.tie_word_embeddings * model.lm_head.weight.nbytes
    plain: dict[str, Any] = {"slots": 1, "memory": MANY}
    engine = LocalEngine(model, **plain, native_limit=bound)
    assert engine.forward.name == "compiled"
    assert bound <= engine.native_bytes < 1.2 * bound
    fused = LocalEngine(model, **plain, native_limit=bound - 1)
    assert (fused.forward.name, fused.native_bytes) == ("fused", 0)
    requests = mixed(10)
    assert [s.tokens for s in run(engine, requests)] == [s.tokens for s in run(fused, requests)]
    for free, name in ((bound + MANY, "compiled"), (bound + MANY - 1, "fused")):
        monkeypatch.setattr(compiled, "free_memory", lambda free=free: free)
        engine = LocalEngine(model, **plain)
        assert engine.forward.name == name
        assert ("GB are left for it beside 0.1 GB of KV" in engine.about) == (name == "fused")


def test_what_a_container_leaves_is_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that it has read do not count: the system gives their memory back."""
    plain = free_memory()
    assert 2**20 < plain <= machine_memory()
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert free_memory() == pytest.approx(plain, rel=0.2)
    stat = "anon 100\ninactive_file 3000\nactive_file 1000\n"
    for name, text in (("memory.max", "10000\n"), ("memory.current", "5000\n"), ("memory.stat", stat)):
        (tmp_path / name).write_text(text)
    assert free_memory() == 9000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == pytest.approx(plain, rel=0.2)
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    for name, text in (("memory.limit_in_bytes", "900\n"), ("memory.usage_in_bytes", "500\n"), ("memory.stat", "")):
        (tmp_path / "memory" / name).write_text(text)
    assert free_memory() == 400


def test_a_process_and_those_below_it_take_no_more_than_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = memory.held_bytes(os.getpid())
    monkeypatch.setenv(memory.LIMIT, str((mine + 2**28) // 2**20))
    assert free_memory() == pytest.approx(2**28, abs=2**25)
    command = [sys.executable, "-c", "held = bytearray(2**28); print('held', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        assert 2**28 < memory.held_bytes(os.getpid()) - mine < 2**28 + 2**26
        child.communicate("\n")
    monkeypatch.setenv(memory.LIMIT, "lots")
    with pytest.raises(ValueError, match="RAMULUS_MEMORY_MB=lots in the environment is no number of MB"):
        free_memory()


@pytest.mark.skipif(memory._of_c("mallopt") is None, reason="the C library is not glibc")
@pytest.mark.parametrize("maps", [False, True])
def test_blocks_that_are_mapped_leave_no_holes(maps: bool) -> None:
    """A freed block between two that stay, of a size that the C library has learned to take from its heap."""
    code = f"""if True:
        import os
        from ramulus.native.memory import held_bytes, map_blocks
        block = lambda megabytes: bytearray(b"x") * (megabytes * 2**20)
        del_this = block(24)
        del del_this
        if {maps}:
            map_blocks(2**22)
        before, large, small = held_bytes(os.getpid()), block(16), block(0) + b"x" * 100_000
        del large
        print((held_bytes(os.getpid()) - before) // 2**20)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 4) == maps


def test_an_engine_says_how_it_decodes() -> None:
    """The way, the precision and the copy; and why it is a slower way."""
    model = small()
    assert re.fullmatch(r"compiled kernels in float32, which read .* 0\.00 GB", LocalEngine(model, slots=1, memory=MANY).about)
    for options, said in (
        ({"native": False}, "torch's operations in float32 on cpu: native=False asks for it"),
        ({"fast": False}, "the model's own modules in float32 on cpu: fast=False asks for it"),
        ({"native_limit": 1}, "torch's operations in float32 on cpu: the kernels' copy of the weights takes 0.00 GB, and 0.00 GB are left for it"),
    ):
        assert LocalEngine(model, slots=1, memory=MANY, **options).about == said
    odd = small(hidden_size=8)
    assert "heads of a multiple of" in LocalEngine(odd, slots=1, memory=MANY).about
    assert "the model in float64" in LocalEngine(model.double(), slots=1, memory=MANY).about


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_weights_that_begin_in_the_middle_of_a_pair_are_read(precision: torch.dtype) -> None:
    """Parts of one flat tensor, as what trains by flat parameters leaves them."""
    model = small("llama", dtype=precision)
    expected = forward_of(model, precision=precision)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            flat = torch.empty(module.weight.numel() + 1, dtype=precision)
            flat[1:] = module.weight.detach().flatten()
            module.weight.data = flat[1:].view_as(module.weight)
    moved = forward_of(model, precision=precision)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(expected._matrices(), moved._matrices(), strict=True))
