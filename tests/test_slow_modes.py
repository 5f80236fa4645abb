"""What makes a run slower than this machine could be is said before its first step; threads are those that others leave free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ramulus.engine.local.factory import Local
from ramulus.learn.policy.model import Pretrained
from ramulus.learn.policy.torch_learner import Torch
from ramulus.native.processors import cores
from ramulus.recipes import grpo
from ramulus.run import slow_modes
from ramulus.run.config.recipe import Run

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return replace(grpo.recipe(), autocast=False, engine=Local(precision="bfloat16"), out=str(tmp_path / "run"))


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    slow_modes.usual_threads.cache_clear()


@pytest.mark.parametrize(("busy", "wanted"), [(0.0, 4), (0.4, 4), (1.2, 3), (3.9, 1), (9.0, 1)])
def test_threads_are_the_cores_that_others_leave_free(busy: float, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_modes, "cores", lambda: 4)
    monkeypatch.setattr(slow_modes, "busy_cores", lambda: busy)
    assert slow_modes.usual_threads() == wanted


@pytest.mark.parametrize(("told", "wanted"), [("3", 3), ("2,1", 2), ("", 4), ("many", 4), ("0", 4)])
def test_omp_num_threads_is_heard(told: str, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_modes, "cores", lambda: 4)
    monkeypatch.setattr(slow_modes, "busy_cores", lambda: 0.0)
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert slow_modes.usual_threads() == wanted


def test_a_limit_of_time_leaves_some_processors_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_modes, "allowed", lambda: set(range(64)))
    monkeypatch.setattr(slow_modes, "cores", lambda: 8)
    for busy, wanted in ((0.0, 8), (50.0, 8), (59.0, 5), (64.0, 1)):
        monkeypatch.setattr(slow_modes, "busy_cores", lambda busy=busy: busy)
        slow_modes.usual_threads.cache_clear()
        assert slow_modes.usual_threads() == wanted


def test_a_run_goes_on_with_the_threads_of_its_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_modes, "cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert slow_modes.threads_of(run) == 2
    saved = run.folder / "checkpoints" / "step-000003"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"numerics": {"threads": "5"}}))
    assert slow_modes.threads_of(run) == 5
    assert slow_modes.threads_of(replace(run, threads=3)) == 3
    (saved / "state.json").write_text(json.dumps({"numerics": {"threads": "99"}}))
    assert slow_modes.threads_of(run) == 2, "more than this machine has"
    (saved / "state.json").write_text("{")
    assert slow_modes.threads_of(run) == 2


def test_each_slow_mode_is_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_modes, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(slow_modes, "why", lambda: "compiled by /usr/bin/gcc")
    monkeypatch.setattr(slow_modes, "multiplies_bfloat16", lambda: True)
    assert slow_modes.slow_modes(replace(run, autocast=True), CPU) == []
    monkeypatch.setattr(slow_modes, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(slow_modes, "why", lambda: "none: no C compiler was found")
    kernels, threads, half = slow_modes.slow_modes(replace(run, autocast=True), CPU)
    assert "no C compiler was found" in kernels
    assert threads.endswith("threads=4 takes all")
    assert half.startswith("slow: autocast=true and model.dtype=bfloat16 and engine.precision=bfloat16 on a processor that does not")
    assert half.endswith("autocast=false and model.dtype=float32 and engine.precision=float32 are faster here")
    plain = replace(run, model=Pretrained("x", dtype="bfloat16"))
    *_, half = slow_modes.slow_modes(plain, CPU)
    assert half.startswith("slow: model.dtype=bfloat16 and engine.precision=bfloat16 on a processor that does not")
    assert not any("bfloat16" in said for said in slow_modes.slow_modes(replace(plain, model="x", engine=Local(precision="float32")), CPU))
    assert slow_modes.slow_modes(replace(run, autocast=True), torch.device("cuda")) == []


def test_auto_is_never_slow_and_says_what_it_takes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_modes, "cores", torch.get_num_threads)
    auto = replace(run, model="x", autocast="auto", engine=Local(precision="auto"))
    monkeypatch.setattr(slow_modes, "device_multiplies_bfloat16", lambda device: True)
    assert not any("bfloat16" in said for said in slow_modes.slow_modes(auto, CPU))
    monkeypatch.setattr(slow_modes, "device_multiplies_bfloat16", lambda device: False)
    (said,) = (said for said in slow_modes.slow_modes(auto, CPU) if "bfloat16" in said)
    assert said == "updates in float32, as this processor does not multiply bfloat16 (autocast=auto)"
    for other in (replace(auto, model=Pretrained("x", dtype="bfloat16")), replace(auto, learner=Torch(process=True, device="cuda"))):
        assert not any("updates in float32" in said for said in slow_modes.slow_modes(other, CPU)), "they are not, or elsewhere"
    gpu = torch.device("cuda")
    monkeypatch.setattr(slow_modes, "device_multiplies_bfloat16", lambda device: device != gpu)
    assert slow_modes.slow_modes(auto, gpu) == ["updates in float32, as this GPU does not multiply bfloat16 (autocast=auto)"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value", "said"), [("CC", "no-such-compiler", "no-such-compiler"), ("RAMULUS_CACHE", "/proc/none", "/proc/none")])
def test_a_run_without_kernels_says_why(name: str, value: str, said: str, tmp_path: Path) -> None:
    """A real run: no compiler, or no place to keep what it compiles."""
    empty = {"CC": str(tmp_path / value) if name == "CC" else "", "RAMULUS_CACHE": value if name == "RAMULUS_CACHE" else str(tmp_path / "cache")}
    environment = os.environ | {key: text for key, text in empty.items() if text} | {"OMP_NUM_THREADS": "1"}
    words = [
        "quickstart", f"out={tmp_path / 'run'}", "sft.steps=1", "treepo.steps=1", "sft.eval_every=0", "treepo.eval_every=0", "final_evaluation=None",
        "sft.schedule.prompts=2", "treepo.schedule.prompts=2", "tensorboard=false",
    ]  # fmt: skip
    command = [sys.executable, "-m", "ramulus.cli", "train", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = {line for line in done.stdout.splitlines() if "1-" not in line and line.startswith("sft: slow")}
    assert said in line
    if cores() > 1:
        assert f"sft: 1 of {cores()} threads, as OMP_NUM_THREADS says; threads={cores()} takes all" in done.stdout
