"""An allocation that fails halves what is done at once and goes on: the same tokens, the same gradients, nothing twice, and it is said."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ramulus.cli import main
from ramulus.engine.engine import Request, Sampling, Segment, StopRule
from ramulus.engine.local.kv import Slots
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.engine.local.prefill import Prefill
from ramulus.engine.local.samples import Samples
from ramulus.engine.local.scheduler import Scheduler
from ramulus.learn.attention.kernels import Attention
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy.fused_layers import Gated, RMSNorm
from ramulus.learn.policy.head import Head
from ramulus.learn.policy.model import Scratch
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.native.memory import OutOfMemory, allocation_failed

RECIPE = str(Path(__file__).with_name("run_recipe.py"))
ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"}
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
ERRORS = [RuntimeError(CPU), MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")]


def fails(at: int, what: Callable[..., Any], error: BaseException, times: int = 1) -> Callable[..., Any]:
    """What does as `what` does, but at the call number `at` and some after it."""
    calls = iter(range(10**9))

    def other(*arguments: Any, **options: Any) -> Any:
        if at <= next(calls) < at + times:
            raise error
        return what(*arguments, **options)

    return other


def model() -> Any:
    return Scratch("0123456789+=?", hidden=64, layers=2, heads=4, kv_heads=2, seed=3)()[0]


def requests(count: int = 12) -> list[Request]:
    ends = StopRule(frozenset({1}))
    return [Request((3, 4 + i % 3, 5, 6 + i % 5), Sampling(12 + i), ends, seed=i) for i in range(count)]


def sampled(engine: LocalEngine, asked: list[Request]) -> list[Segment]:
    return asyncio.run(engine.sample(asked))


@pytest.mark.parametrize("error", ERRORS, ids=["torch", "python", "cuda"])
def test_what_says_that_there_is_no_memory(error: BaseException) -> None:
    assert allocation_failed(error)
    assert allocation_failed(OutOfMemory("x"))
    assert not allocation_failed(RuntimeError("shapes differ"))
    assert not allocation_failed(ValueError("out of memory"))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("where", "name", "at"),
    [
        (Slots, "_empty", 1),  # the first slots
        (Samples, "room", 3),  # in the middle of decoding
        (Prefill, "_pass", 0),
        (Scheduler, "step", 2),
        (Scheduler, "_end", 1),  # after a step was counted
    ],
)
def test_the_engine_halves_and_draws_the_same_tokens(
    where: type, name: str, at: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sampled(LocalEngine(model(), slots=8, native=native), requests())
    engine = LocalEngine(model(), slots=8, native=native)
    failing = fails(at, getattr(where, name), ERRORS[at % len(ERRORS)])
    monkeypatch.setattr(where, name, lambda *arguments: failing(*arguments))
    with pytest.warns(RuntimeWarning, match="from here on 4 decode together") as said:
        found = sampled(engine, requests())
    assert len([w for w in said if "decode together" in str(w.message)]) == 1
    assert [segment.tokens for segment in found] == [segment.tokens for segment in expected]
    assert [segment.finish for segment in found] == [segment.finish for segment in expected]
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert engine.counters()["sampled"] == sum(len(segment.tokens) for segment in expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sampled(engine, requests())
    assert [segment.tokens for segment in again] == [segment.tokens for segment in expected]


@pytest.mark.parametrize("given_back", ["slept", "released", "failed"])
@pytest.mark.parametrize(("where", "name", "at"), [(Slots, "_empty", 0), (Prefill, "_pass", 0), (Scheduler, "step", 0), (Scheduler, "step", 3)])
def test_counters_are_right_after_memory_was_given_back(where: type, name: str, at: int, given_back: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of a while ago are gone, and none of their steps is taken off."""
    engine = LocalEngine(model(), slots=8, native=False)
    expected = sampled(engine, requests())
    if given_back == "slept":
        asyncio.run(engine.sleep())
    elif given_back == "released":
        engine.release()
    else:
        with monkeypatch.context() as patch:
            broken = fails(0, Scheduler.step, ValueError("no such step"))
            patch.setattr(Scheduler, "step", lambda *arguments: broken(*arguments))
            with pytest.raises(ValueError, match="no such step"):
                sampled(engine, requests())
    before = engine.counters()["sampled"]
    failing = fails(at, getattr(where, name), MemoryError())
    monkeypatch.setattr(where, name, lambda *arguments: failing(*arguments))
    with pytest.warns(RuntimeWarning, match="from here on 4 decode together"):
        found = sampled(engine, requests())
    assert [segment.tokens for segment in found] == [segment.tokens for segment in expected]
    assert engine.counters()["sampled"] - before == before == sum(len(segment.tokens) for segment in expected)


def test_the_engine_halves_until_one_row_is_left_and_then_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(model(), slots=8)
    failing = fails(0, Scheduler.step, RuntimeError(CPU), times=10**6)
    monkeypatch.setattr(Scheduler, "step", lambda *arguments: failing(*arguments))
    with pytest.warns(RuntimeWarning, match="from here on 1 decode"), pytest.raises(OutOfMemory, match=r"out of memory: .*DefaultCPUAllocator"):
        sampled(engine, requests())
    monkeypatch.undo()
    assert all(len(segment.tokens) for segment in sampled(engine, requests()))


def test_a_longer_text_than_before_is_still_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(model(), slots=8, memory=2**20)
    failing = fails(0, Scheduler.step, MemoryError(), times=3)
    monkeypatch.setattr(Scheduler, "step", lambda *arguments: failing(*arguments))
    with pytest.warns(RuntimeWarning):
        sampled(engine, requests())
    long = Request((3, 4), Sampling(900), seed=1)
    assert sampled(engine, [long])[0].tokens == sampled(LocalEngine(model(), slots=8), [long])[0].tokens


def test_other_errors_reach_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = fails(0, Scheduler.step, RuntimeError("shapes differ"))
    monkeypatch.setattr(Scheduler, "step", lambda *arguments: failing(*arguments))
    with pytest.raises(RuntimeError, match="shapes differ"):
        sampled(LocalEngine(model(), slots=8), requests())


def train(folder: Path, *words: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The weights and the metrics of a small run in this process."""
    with pytest.raises(SystemExit) as stopped:
        main(["train", RECIPE, f"out={folder}", "seed=3", *words])
    assert not stopped.value.code
    weights = load_file(sorted((folder / "checkpoints").iterdir())[-1] / "model" / "model.safetensors")
    return weights, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


PLACES = [
    (TorchPolicy, "_hidden"),
    (Head, "_some"),
    (RMSNorm, "backward"),
    (Gated, "backward"),
    (Attention, "backward"),
    (Mix, "loss"),
]


@pytest.mark.usefixtures("torch_as_it_was")
@pytest.mark.parametrize(("where", "name"), PLACES, ids=[f"{where.__name__}.{name}" for where, name in PLACES])
@pytest.mark.parametrize("at", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_an_update_that_fails_is_done_again_in_smaller_rows(
    where: type, name: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["steps=2", "minibatches=1", "tokens_per_batch=64", "mix.kl_coef=0"]
    expected, plain = train(tmp_path / "expected", *words)
    own = where.__dict__[name]
    calls = fails(at, own.__func__ if isinstance(own, staticmethod) else own, ERRORS[at % len(ERRORS)])
    counted = lambda *arguments, **options: calls(*arguments, **options)  # noqa: E731
    begun = TorchPolicy.accumulate

    def accumulate(self: TorchPolicy, *arguments: Any) -> Any:  # only updates fail, not the checks of a policy
        monkeypatch.setattr(where, name, staticmethod(counted) if isinstance(own, staticmethod) else counted)
        return begun(self, *arguments)

    monkeypatch.setattr(TorchPolicy, "accumulate", accumulate)
    with pytest.warns(RuntimeWarning, match="model at once: from here on it is at most") as said:
        found, rows = train(tmp_path / "found", *words)
    assert len([w for w in said if "going through" in str(w.message)]) == 1
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
    for one, other in zip(rows, plain, strict=True):  # nothing twice
        for key in ("trained_policy", "sampled", "reward", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)


@pytest.mark.usefixtures("torch_as_it_was")
def test_a_path_that_memory_does_not_hold_ends_the_run_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TorchPolicy, "accumulate", fails(0, TorchPolicy.accumulate, RuntimeError(CPU), times=10**6))
    with pytest.raises(SystemExit) as stopped, pytest.warns(RuntimeWarning):
        main(["train", RECIPE, f"out={tmp_path / 'run'}", "steps=1"])
    assert stopped.value.code == 2
    assert "out of memory: " in (said := capsys.readouterr().err)
    assert "lower tokens_per_batch" in said


@pytest.mark.usefixtures("torch_as_it_was")
@pytest.mark.parametrize(("place", "name"), [(TorchPolicy, "update"), (Scratch, "__call__")], ids=["the optimizer", "the model"])
def test_what_takes_less_is_named_where_the_model_does_not_fit(
    place: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(place, name, fails(0, getattr(place, name), RuntimeError(CPU), times=10**6))
    with pytest.raises(SystemExit) as stopped:
        main(["train", RECIPE, f"out={tmp_path / 'run'}", "steps=1"])
    assert stopped.value.code == 2
    assert "`ramulus plan RECIPE` says what takes how much; adapters (lora)" in (said := capsys.readouterr().err)
    assert "tokens_per_batch" not in said


@pytest.mark.usefixtures("torch_as_it_was")
def test_log_probs_that_fail_are_computed_in_smaller_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["steps=1", "model.dtype=float64"]  # its KL term asks for the reference model's log-probs
    expected, _ = train(tmp_path / "expected", *words)
    monkeypatch.setattr(TorchPolicy, "_score_row", fails(0, TorchPolicy._score_row, MemoryError()))
    with pytest.warns(RuntimeWarning, match="while log-probs were computed again"):
        found, _ = train(tmp_path / "found", *words)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("torch_as_it_was")
def test_later_steps_compute_log_probs_in_rows_that_memory_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, most = TorchPolicy._score_row, 60

    def limited(policy: TorchPolicy, model: Any, row: Any, *rest: Any) -> Any:
        if len(row) > most:
            raise MemoryError
        return whole(policy, model, row, *rest)

    monkeypatch.setattr(TorchPolicy, "_score_row", limited)
    counts = []
    for steps in (1, 3):
        with pytest.warns(RuntimeWarning, match="while log-probs were computed again") as caught:
            train(tmp_path / str(steps), f"steps={steps}")
        counts.append(sum("log-probs were computed again" in str(warning.message) for warning in caught))
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of Linux")
@pytest.mark.parametrize("part", ["engine", "update"])
def test_a_real_limit_is_met(part: str) -> None:
    """tests/run_limited.py limits its own address space and compares with what it computed before."""
    script = Path(__file__).with_name("run_limited.py")
    done = subprocess.run([sys.executable, str(script), part], capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memory did not hold" in done.stderr
    assert "the same" in done.stdout
