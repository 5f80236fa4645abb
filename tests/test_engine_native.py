"""The compiled kernels: built for several widths of vector, against torch, and the same bits in any company."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import KINDS, ask, line, mixed, run, small, worst
from ramify.engine import native
from ramify.engine.compiled import CompiledForward
from ramify.engine.engine import Sampling
from ramify.engine.forward import ModelForward, verify
from ramify.engine.fused import recognise
from ramify.engine.kv import Reach, Slots
from ramify.engine.local import LocalEngine
from ramify.engine.sampling import Knobs, draw
from ramify.grow.temperature import ByEntropy

MANY = 2**26


@pytest.fixture(scope="module", params=[4, 8, 16])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels with vectors of 4, 8 or 16 floats, whatever this processor has: the compiler splits longer ones."""
    flags = native.FLAGS
    native.FLAGS = (*flags, f"-DW={request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAMIFY_CACHE", str(tmp_path_factory.mktemp("kernels")))
        native.kernels.cache_clear()
        try:
            made = native.kernels()
        finally:
            native.FLAGS = flags
            native.kernels.cache_clear()
    assert made.ramify_lanes() == request.param
    return made


def forward_of(model: Any, library: Any) -> CompiledForward:
    fused = recognise(ModelForward(model))
    assert fused is not None
    return CompiledForward(fused, library)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_width_of_vector_passes_the_self_check(kind: str, library: Any) -> None:
    """Heads of 16 and 48, hidden sizes and vocabularies that fill no whole panel, one to four queries a key head."""
    for fields in ({}, {"head_dim": 48, "num_key_value_heads": 1, "hidden_size": 52, "intermediate_size": 77, "vocab_size": 37}):
        forward = forward_of(small(kind, **fields), library)
        assert verify(forward, forward.reference) < 1e-5


def test_a_head_that_does_not_fit_is_refused(library: Any) -> None:
    with pytest.raises(ValueError, match="heads of a multiple of"):
        forward_of(small(hidden_size=8), library)  # heads of 2


@pytest.mark.parametrize("rule", ["plain", "hot and greedy", "by entropy"])
@pytest.mark.parametrize("vocabulary", [5, 37, 3000])
def test_draws_are_those_of_torch(vocabulary: int, rule: str, library: Any) -> None:
    """The same tokens for the same uniform numbers, with their log-probs, entropies and temperatures."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(40, vocabulary, generator=generator) * 4
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    heats: dict[str, list[Any]] = {"plain": [1.0] * 40, "hot and greedy": [0.0, 0.7, 1.0, 1.8] * 10, "by entropy": [ByEntropy(pivot=1.0)] * 40}
    knobs = Knobs([Sampling(8, heat) for heat in heats[rule]], torch.device("cpu"), torch.float32)
    ours, theirs = (draw(logits, knobs, uniform, quick) for quick in (forward_of(small(), library), None))
    assert ours.tokens == theirs.tokens
    for name in ("logprobs", "kept", "entropy", "temperature"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=2e-6, rel=2e-6), name
    assert len(set(ours.tokens)) > 2


def test_tokens_without_probability_are_never_drawn(library: Any) -> None:
    """-inf in the logits, also at the ends, and numbers next to 0 and 1."""
    logits = torch.full((6, 40), -torch.inf)
    logits[:, 7], logits[:, 21] = 1.0, 2.0
    uniform = torch.tensor([0.0, 1e-300, 0.2, 0.3, 1 - 2**-53, 0.999], dtype=torch.float64)
    knobs = Knobs([Sampling(8)] * 6, torch.device("cpu"), torch.float32)
    drawn = draw(logits, knobs, uniform, forward_of(small(), library))
    assert drawn.tokens == [7, 7, 7, 21, 21, 21]
    share = 1 / (1 + torch.e)
    assert drawn.logprobs[0] == pytest.approx(torch.tensor(share).log().item(), abs=1e-6)
    two = torch.tensor([share, 1 - share])
    assert drawn.entropy == pytest.approx([float(-(two * two.log()).sum())] * 6, abs=1e-6)


def test_broken_logits_are_reported(library: Any) -> None:
    logits = torch.zeros(2, 9)
    logits[1, 8] = torch.nan
    knobs = Knobs([Sampling(8)] * 2, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="logits are NaN"):
        draw(logits, knobs, torch.zeros(2, dtype=torch.float64), forward_of(small(), library))


def test_company_changes_nothing() -> None:
    """The same bits alone, in a crowd, with other slots, threads, lengths and prompts forked or prefilled: what no batched product promises."""
    model = small()
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
    assert known.counters["reused"] > fresh.counters["reused"]


def test_long_texts_grow_the_tables() -> None:
    """Slots that become longer than the rotary table, and more rows than the line of seats."""
    model = small(max_position_embeddings=600)
    engine = LocalEngine(model, slots=80, memory=MANY)
    requests = [ask(line(5, i), seed=i, max_tokens=3) for i in range(80)] + [ask(line(400, 99), seed=99, max_tokens=100)]
    assert worst(model, requests, run(engine, requests)) < 1e-5


def test_logits_after_the_last_token_of_uneven_rows() -> None:
    """A pass of several tokens a row that wants logits answers for the last real one of each."""
    model = small()
    forward = forward_of(model, None)
    slots = Slots(forward.geometry)
    slots.resize(3, 32, 0)
    texts = [line(9, 1), line(4, 2)]
    n = max(map(len, texts))
    tokens = torch.tensor([(*text, *[0] * (n - len(text))) for text in texts])
    positions = torch.stack([torch.arange(n).clamp(max=len(text) - 1) for text in texts])
    valid = torch.arange(n) < torch.tensor([[len(text)] for text in texts])
    found = forward(tokens, positions, Reach(slots, positions, 32, torch.tensor([2, 0]), valid), True)
    assert found is not None
    for row, text in zip(found, texts, strict=True):
        assert torch.allclose(row, forward.reference.plain(torch.tensor(text))[-1], atol=1e-4)


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


def test_its_copy_is_bounded_by_packed() -> None:
    model = small()
    bound = LocalEngine(model, slots=1, memory=MANY).packed_bytes
    assert bound >= sum(p.nbytes for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert LocalEngine(model, slots=1, memory=MANY, packed=bound).forward.name == "compiled"
    assert LocalEngine(model, slots=1, memory=MANY, packed=bound - 1).forward.name != "compiled"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """No kernels compiled so far."""
    monkeypatch.setenv("RAMIFY_CACHE", str(tmp_path / "kernels"))
    native.kernels.cache_clear()
    yield tmp_path
    native.kernels.cache_clear()


def test_without_a_compiler_torch_decodes(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(native.Unavailable, match=r"CC=no-such-compiler.*install one"):
        native.kernels()
    assert native.why().startswith("none: no C compiler")
    model, requests = small(), mixed(6)
    engine = LocalEngine(model, slots=4, memory=MANY)
    assert engine.forward.name == "packed"
    assert worst(model, requests, run(engine, requests)) < 1e-5


@pytest.mark.parametrize(("script", "said"), [("echo broken >&2; exit 1", "could not compile the kernels: broken"), ("exit 0", "exit status 0")])
def test_a_compiler_that_fails_says_why(script: str, said: str, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = empty / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(native.Unavailable, match=said):
        native.kernels()
    assert not list((empty / "kernels").iterdir())


def test_the_environment_switches_them_off(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMIFY_NATIVE", "0")
    assert LocalEngine(small(), slots=2, memory=MANY).forward.name == "packed"
    assert "RAMIFY_NATIVE=0" in native.why()


def test_a_library_that_is_broken_is_named(empty: Path) -> None:
    target = native.built()
    target.write_bytes(b"not a library")
    with pytest.raises(native.Unavailable, match="cannot be loaded"):
        native.kernels()


def test_several_processes_build_at_once(empty: Path) -> None:
    """Each finds a whole library, and one is left."""
    code = "from ramify.engine.native import kernels; assert kernels().ramify_lanes() in (4, 8, 16)"
    environment = os.environ | {"RAMIFY_CACHE": str(empty / "kernels")}
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [child.wait(100) for child in children] == [0, 0, 0]
    (left,) = (empty / "kernels").iterdir()
    assert ctypes.CDLL(str(left)).ramify_lanes() in (4, 8, 16)


