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

from ramulus import recipes
from ramulus.engine import memory
from ramulus.engine.local import factory
from ramulus.engine.local.factory import Local
from ramulus.learn.policy import torch_policy
from ramulus.learn.policy.model import Pretrained, Scratch
from ramulus.learn.policy.torch_learner import Torch
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.sharded import factory as sharded_factory
from ramulus.learn.sharded.factory import Sharded
from ramulus.models.sizes import sizes_of_model
from ramulus.native.processors import cores
from ramulus.recipes import grpo, smol
from ramulus.run import slow_modes
from ramulus.run.config.describe import to_json
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import as_begun
from ramulus.run.memory import step as memory_step
from ramulus.run.memory.step import Site

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
    monkeypatch.setattr(slow_modes, "multiplies_bfloat16", lambda: True)
    assert not any("bfloat16" in said for said in slow_modes.slow_modes(auto, CPU))
    monkeypatch.setattr(slow_modes, "multiplies_bfloat16", lambda: False)
    (said,) = (said for said in slow_modes.slow_modes(auto, CPU) if "bfloat16" in said)
    assert said == "updates in float32, as this processor does not multiply bfloat16 (autocast=auto)"
    for other in (replace(auto, model=Pretrained("x", dtype="bfloat16")), replace(auto, learner=Torch(process=True, device="cuda"))):
        assert not any("updates in float32" in said for said in slow_modes.slow_modes(other, CPU)), "they are not, or elsewhere"
    gpu = torch.device("cuda")
    monkeypatch.setattr(slow_modes, "device_multiplies_bfloat16", lambda device: device != gpu)
    assert slow_modes.slow_modes(auto, gpu) == ["updates in float32, as this GPU does not multiply bfloat16 (autocast=auto)"]


@pytest.mark.parametrize("multiplied", [True, False])
def test_auto_is_bfloat16_where_the_processor_multiplies_it(multiplied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learner, engine and the memory plan agree."""
    for module in (factory, torch_policy):
        monkeypatch.setattr(module, "device_multiplies_bfloat16", lambda device: multiplied)
    for module in (memory_step, memory):
        monkeypatch.setattr(module, "planned_in_bfloat16", lambda cuda: cuda or multiplied)
    model, _ = Scratch("0123456789+=?", hidden=16, layers=1, heads=2, kv_heads=1)()
    assert TorchPolicy(model, autocast="auto").autocast is multiplied
    engine, chosen = Local(precision="auto", memory_mb=8)(model), torch.bfloat16 if multiplied else torch.float32
    assert engine.forward.geometry.dtype == chosen
    here = replace(smol.recipe(), model="x", activation_checkpointing=False)
    sizes = sizes_of_model(model)
    assert memory_step.autocasts(here, Site()) is multiplied
    assert here.engine.traits.memory.dtype(memory_step.sampling_of(here, sizes, Site())) == chosen
    assert memory_step.autocasts(here, Site("cuda"))
    assert memory_step.autocasts(replace(here, autocast=True), Site())
    assert Local(precision="auto", memory_mb=8)(model.to(torch.float64)).forward.geometry.dtype == torch.float64, "as the model is"


def test_ranks_take_what_their_device_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the processor does that holds the copy from which their policy is made."""
    asked, given = [], []
    monkeypatch.setattr(sharded_factory, "device_multiplies_bfloat16", lambda device: asked.append(device.type) or True)
    monkeypatch.setattr("ramulus.learn.sharded.starting.start_ranks", lambda size, timeout: None)
    monkeypatch.setattr("ramulus.learn.sharded.sharded_learner.sharded_learner", lambda *parts: given.append(parts[4]))
    model, tokenizer = Scratch("0123456789+=?", hidden=16, layers=1, heads=2, kv_heads=1)()
    Sharded(ranks=1)(model.to("meta"), tokenizer, None, False, {"autocast": "auto"}, 0)
    assert (asked, [more["autocast"] for more in given]) == (["meta"], [True])


@pytest.mark.parametrize(("field", "kind"), [("engine", Local), ("learner", Torch), ("learner", Sharded)])
def test_a_class_in_place_of_an_object_is_refused(field: str, kind: type) -> None:
    with pytest.raises(ValueError, match=rf"{field} is the class {kind.__name__}: write {kind.__name__}\(\)"):
        replace(grpo.recipe(), **{field: kind})


def test_a_run_that_began_in_bfloat16_goes_on_in_it() -> None:
    now = (replace(grpo.recipe(), name="now"),)
    before = [to_json(replace(now[0], autocast=True, engine=replace(now[0].engine, precision="bfloat16")))]
    (run,) = as_begun(now, before, [])
    assert (run.autocast, run.engine.precision) == (True, "bfloat16")
    assert as_begun(now, before, ["bf16=auto"]) == now
    assert as_begun(now, [to_json(now[0])], []) == now


def test_a_model_that_ranks_sample_with_on_a_gpu_is_counted_once() -> None:
    sizes = sizes_of_model(Scratch("0123456789+=?", hidden=16, layers=1, heads=2, kv_heads=1)()[0])
    step = memory.PlannedSampling(sizes, torch.bfloat16, 8, 64, 32, cuda=True, apart=True)
    parts = memory.EngineMemory(precision="auto").parts(step, 2**20)
    assert parts["the sampler's model"] == 2 * sizes.parameters
    assert parts["the sampler's copy of the weights"] == 0
    served = memory.EngineMemory(precision="float32", kernels=False).parts(step, 2**20)
    assert (served["the sampler's model"], served["the sampler's copy of the weights"]) == (0, 4 * sizes.parameters)


@pytest.mark.parametrize("module", sorted(Path(recipes.__path__[0]).glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_no_shipped_recipe_asks_a_processor_for_what_it_cannot_multiply(module: Path) -> None:
    """On a laptop without bfloat16 such a product takes several times as long as one of float32."""
    text = module.read_text()
    assert not [word for word in ("autocast=True", '"autocast": True', 'precision="bfloat16"') if word in text]


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
