"""auto takes what fits, says so once, and keeps the number with the run; small models get what they always had."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ramulus.cli import main
from ramulus.engine.local.factory import Local, usual_memory
from ramulus.engine.vllm.factory import Vllm
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.model import Scratch
from ramulus.learn.policy.torch_learner import Torch
from ramulus.models.sizes import sizes_of_model
from ramulus.recipes import quickstart
from ramulus.run.config.recipe import Run
from ramulus.run.config.resume import build
from ramulus.run.memory import rooms
from ramulus.run.memory.auto import USE, Taken, fitted, fitting, settled
from ramulus.run.memory.model import planned_sizes
from ramulus.run.memory.report import beside as beside_rank_0
from ramulus.run.memory.report import planned
from ramulus.run.memory.rooms import PRESENT, Placement, rooms_here, rooms_of
from ramulus.run.memory.step import Site, step_memory

RECIPE = str(Path(__file__).with_name("run_recipe.py"))
LARGE = Scratch("0123456789+=?", hidden=512, layers=8, heads=8, kv_heads=8, max_positions=8192)
MB, GB = 2**20, 1e9

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


def run(**changes: Any) -> Run:
    [made] = build(RECIPE, ["tokens_per_batch=auto", "engine.memory=auto", "mix.kl_coef=0"])[0]
    return replace(made, **{"model": LARGE, "prompt_limit": 512, "response_limit": 2048, "engine": Local(64)} | changes)


@pytest.mark.parametrize("stage", quickstart.recipe(), ids=lambda stage: stage.name)
def test_the_quickstart_takes_what_it_always_had(stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "free_on", lambda device: 4 * GB)
    made, taken = settled(replace(stage, out=str(tmp_path)), stage.model()[0], "cpu")
    assert (made.engine.memory_mb, made.tokens_per_batch) == (1024, 16384)
    assert taken.memory_mb == 1024
    assert settled(replace(stage, tokens_per_batch="auto", out=str(tmp_path)), stage.model()[0], "cpu")[0].tokens_per_batch == 8192


@pytest.mark.parametrize("changes", [{}, {"lora": Lora(8)}, {"activation_checkpointing": True}, {"autocast": True}])
@pytest.mark.parametrize("free", [1.5 * GB, 3 * GB, 8 * GB, 40 * GB])
def test_what_is_taken_fits_and_grows_with_what_is_free(changes: dict[str, Any], free: float) -> None:
    made = run(**changes)
    sizes = planned_sizes(made)
    less, more = (fitting(made, sizes, Site(), room) for room in (free, 2 * free))
    assert less.peak - less.named(*PRESENT) <= free * USE or (less.tokens_per_batch, less.rows) == (2560, 2)
    assert less.tokens_per_batch <= more.tokens_per_batch <= 8192
    assert less.engine_bytes <= more.engine_bytes
    assert fitting(made, sizes, Site(), 400 * GB).rows == 64


SHARED = {
    "two samplers": ("cluster=ray", "cluster.samplers=2"),
    "four samplers and two ranks": ("cluster=ray", "cluster.samplers=4", "cluster.trainers=2", "learner=sharded"),
    "two samplers by turns": ("cluster=ray", "cluster.samplers=2", "cluster.colocated=true"),
    "a sampler in rank 0": ("learner=sharded", "learner.ranks=2"),
    "two copies of the weights": ("learner=sharded", "learner.ranks=4", "learner.sharing=2"),
    "servers of vLLM": (),
}


def beside(words: tuple[str, ...], **changes: Any) -> Run:
    """A run whose step some processes share: as the words say, or two servers of vLLM."""
    changes |= {} if words else {"engine": Vllm(servers=2)}
    words += ("engine.slots=64",) if words else ()
    [made] = build(RECIPE, ["tokens_per_batch=auto", "mix.kl_coef=0", "device=cpu", *words])[0]
    return replace(made, model=LARGE, prompt_limit=512, response_limit=2048, **changes)


def taken_by(made: Run, free: float) -> tuple[int, float]:
    """Bytes of keys and values in each process that samples, and what all processes take in the phase of most, by the parts of each of them."""
    sizes, how = planned_sizes(made), made.cluster
    ranks = (how.trainers if how else getattr(made.learner, "ranks", None)) or 1
    samplers = how.samplers if how else getattr(made.engine, "servers", 0)
    shards = getattr(made.learner, "sharing", None) or ranks
    tokens, room = fitted(made, sizes, rooms_here(made, "cpu"))
    first = step_memory(made, sizes, Site("cpu", shards, engine=not samplers), tokens, room)
    other = step_memory(made, sizes, Site("cpu", shards, engine=False, first=False), tokens, room)
    sampler = step_memory(made, sizes, Site("cpu", learner=False), tokens, room)
    learned = {p: first.at(p) - first.named(*PRESENT) + (ranks - 1) * (other.at(p) - other.named(*PRESENT)) for p in ("grow", "update", "step")}
    asleep = sampler.named("libraries") if how and how.colocated else sampler.peak
    return room, max(learned["grow"] + samplers * sampler.peak, *(learned[p] + samplers * asleep for p in ("update", "step")))


@pytest.mark.parametrize("free", [9 * GB, 14 * GB, 30 * GB])
@pytest.mark.parametrize("words", SHARED.values(), ids=SHARED)
def test_processes_on_one_machine_share_what_is_free(words: tuple[str, ...], free: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = beside(words)
    for name in ("free_on", "free_memory"):
        monkeypatch.setattr(rooms, name, lambda *device: free)
    room, taken = taken_by(made, free)
    assert 0.5 * free < taken <= free * USE or taken < free, (taken / GB, room / GB)
    monkeypatch.setattr(rooms, "free_memory", lambda: 200 * GB)
    monkeypatch.setattr(rooms, "free_on", lambda device: 200 * GB)
    assert taken_by(made, 200 * GB)[0] >= room


def test_a_learner_with_a_process_of_its_own_is_planned_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 30 * GB, "cuda:0": 20 * GB, "cuda:1": 9 * GB}
    monkeypatch.setattr(rooms, "free_on", lambda device: free[str(device)])
    made = run(learner=Torch(process=True, device="cuda:1"), device="cuda:0")
    assert planned(made).named("the sampler's model") == 0
    assert [kind for kind, _, _ in beside_rank_0(made, planned(made))] == ["sampler"]
    monkeypatch.setattr(rooms, "device_of", torch.device)
    learns, samples = rooms_here(made, "cuda:0")
    assert (learns.free, samples.free) == (9 * GB, 20 * GB)
    assert [(site.kind, site.engine, site.learner) for room in (learns, samples) for site in room.here] == [
        ("cuda", False, True), ("cuda", True, False),
    ]  # fmt: skip
    on_cpu = rooms_here(replace(made, learner=Torch(process=True, device="cpu")), "cuda:0")
    assert [(room.free, room.here[0].kind) for room in on_cpu] == [(30 * GB, "cpu"), (20 * GB, "cuda")]
    [shared] = rooms_here(replace(made, learner=Torch(process=True, device="cuda")), "cuda")
    assert (shared.free, len(shared.here)) == (20 * GB, 2)
    [alone] = rooms_here(replace(made, learner=Torch()), "cuda:1")
    assert (alone.free, len(alone.here)) == (9 * GB, 1)
    sizes = planned_sizes(made)
    apart, together = fitted(made, sizes, [learns, samples]), fitted(made, sizes, [replace(shared, free=9 * GB)])
    assert apart[0] >= together[0]
    assert apart[1] >= together[1]


def test_samplers_on_machines_of_their_own_take_what_is_free_there() -> None:
    made = beside(SHARED["two samplers"])
    sizes = planned_sizes(made)
    together = fitted(made, sizes, rooms_of(made, "cpu", [Placement(1, 2, 4 * GB)]))
    apart = fitted(made, sizes, rooms_of(made, "cpu", [Placement(1, 1, 4 * GB), Placement(0, 1, 4 * GB)]))
    scarce = fitted(made, sizes, rooms_of(made, "cpu", [Placement(1, 1, 4 * GB), Placement(0, 1, 1.2 * GB)]))
    assert scarce[1] < together[1] < apart[1]
    asleep = beside(SHARED["two samplers by turns"])
    assert fitted(asleep, sizes, rooms_of(asleep, "cpu", [Placement(1, 2, 4 * GB)]))[0] >= together[0]


def test_whom_it_is_shared_with_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = beside(SHARED["four samplers and two ranks"], out=str(tmp_path)), LARGE()[0]
    for name in ("free_on", "free_memory"):
        monkeypatch.setattr(rooms, name, lambda *device: 14 * GB)
    run, taken = settled(made, model, "cpu")
    assert "of 14.0 GB that are free for 2 ranks and 4 samplers a step takes at most" in taken.remark
    assert "in each sampler, for" in taken.remark
    assert run.engine.memory_mb == taken.memory_mb < 1024
    monkeypatch.setattr(rooms, "free_memory", lambda: 4 * GB)
    assert "it does not fit; see `ramulus plan`" in settled(made, model, "cpu")[1].remark


def test_numbers_that_a_recipe_states_stay() -> None:
    made = run(tokens_per_batch=3000, engine=Local(64, memory_mb=700))
    memory = fitting(made, planned_sizes(made), Site(), 400 * GB)
    assert (memory.tokens_per_batch, memory.engine_bytes) == (3000, 700 * MB)


def test_adapters_do_not_change_the_sizes() -> None:
    from ramulus.learn.policy.torch_policy import TorchPolicy

    model = Scratch("01", hidden=32, layers=2, heads=2, kv_heads=1)()[0]
    before = sizes_of_model(model)
    TorchPolicy(model, lora=Lora(2))
    assert sizes_of_model(model) == before


def test_an_engine_by_itself_takes_a_gibibyte_or_more() -> None:
    assert usual_memory(Scratch("01", hidden=32, layers=1, heads=2, kv_heads=1)()[0], 64) == 2**30
    assert usual_memory(LARGE()[0], 10**4) > 2**30


def train(folder: Path, *words: str, status: int = 0) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", RECIPE, f"out={folder}", "mix.kl_coef=0", *words])
    assert (stopped.value.code or 0) == status


def test_what_was_taken_is_said_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, words = tmp_path / "run", ("engine.memory_mb=auto", "tokens_per_batch=auto")
    monkeypatch.setattr(rooms, "free_on", lambda device: 9 * GB)
    train(folder, "steps=2", *words)
    assert "of 9.0 GB that are free a step takes at most" in (said := capsys.readouterr().out)
    assert "keys and values take up to 1.07 GB, for 8 sequences of 28 tokens together; up to 8,192 tokens go through the model at once" in said
    kept = json.loads((folder / "memory.json").read_text())
    assert kept == {"tokens_per_batch": 8192, "memory_mb": 1024}
    (folder / "memory.json").write_text(json.dumps(kept | {"tokens_per_batch": 100}))  # as if less had been free, or an allocation had failed
    shutil.copytree(folder, tmp_path / "other")
    monkeypatch.setattr(rooms, "free_on", lambda device: 0.1 * GB)
    train(folder, "steps=4", "--resume")
    assert "free" not in capsys.readouterr().out
    assert json.loads((folder / "memory.json").read_text())["tokens_per_batch"] == 100
    made = replace(build(RECIPE, [*words, f"out={folder}"])[0][0])
    assert settled(made, made.model()[0], "cpu")[0].tokens_per_batch == 100
    assert settled(replace(made, tokens_per_batch=64), made.model()[0], "cpu")[0].tokens_per_batch == 64
    (tmp_path / "other" / "memory.json").unlink()  # a run of before there was an auto
    old = replace(made, out=str(tmp_path / "other"))
    monkeypatch.setattr(rooms, "free_on", lambda device: 0.0)
    assert settled(old, made.model()[0], "cpu")[1].tokens_per_batch < 8192  # what it began with no longer fits
    monkeypatch.setattr(rooms, "free_on", lambda device: 9 * GB)
    assert settled(old, made.model()[0], "cpu")[1] == Taken(8192, 1024)


def test_a_run_that_began_with_the_constants_goes_on_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    train(folder, "steps=1", "engine.memory_mb=1024", "tokens_per_batch=8192")
    saved = json.loads((folder / "run.json").read_text())
    saved["overrides"] = [f"out={folder}", "mix.kl_coef=0", "tokens_per_batch=auto", "engine.memory_mb=auto"]
    (folder / "run.json").write_text(json.dumps(saved))
    capsys.readouterr()
    train(folder, "steps=2", "--resume")
    said = capsys.readouterr().out
    assert "memory_mb was" not in said
    assert "tokens_per_batch was" not in said
