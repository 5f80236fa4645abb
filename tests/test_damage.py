"""A damaged checkpoint gives way to the newest whole one, in a sentence; a reward that draws from the global generators goes on bit for bit."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError

from ramulus import Pretrained
from ramulus.core import run_folder
from ramulus.core.checksums import CHECKSUMS
from ramulus.run import checkpoint
from ramulus.run.checkpoint import keep_model_alone
from ramulus.run.launch import launch
from ramulus.run.rollouts import Rollouts
from ramulus.run.trainer import Trainer
from test_resume import RECIPE, STAGES, metrics, same, train

pytestmark = pytest.mark.usefixtures("torch_as_it_was")
DRAWING = str(Path(__file__).with_name("run_drawing.py"))
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven steps, with checkpoints of the steps 2, 4, 6 and 7."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out, "steps=7", "keep=9", "eval_every=0") == 0
    return out


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """The same run, stopped after six."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run_folder.path_of(tmp_path / "run", 7))
    return tmp_path / "run"


def flip(path: Path, at: int = -3) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def unseal(folder: Path) -> None:
    """As a checkpoint was before there were checksums."""
    (folder / CHECKSUMS).unlink()
    edit(folder / "state.json", lambda state: state.pop("sealed"))


def old(damage: Damage) -> Damage:
    def both(folder: Path) -> None:
        unseal(folder)
        damage(folder)

    return both


DAMAGES: list[tuple[Damage, str]] = [
    (lambda it: flip(it / "tensors.safetensors"), "tensors.safetensors is not what was written"),
    (lambda it: flip(it / "model" / "model.safetensors"), "model/model.safetensors is not what was written"),
    (lambda it: flip(it / "state.json", 50), "state.json is not what was written"),
    (lambda it: (it / "state.json").write_text(""), "state.json has 0 of"),
    (lambda it: os.truncate(it / "tensors.safetensors", 100), "tensors.safetensors has 100 of"),
    (lambda it: (it / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
    (lambda it: shutil.rmtree(it / "model"), "is missing"),
    (lambda it: edit(it / "state.json", lambda state: state.pop("cursor")), "state.json has"),
    (lambda it: (it / CHECKSUMS).unlink(), f"{CHECKSUMS} is missing"),
    (lambda it: (it / CHECKSUMS).write_text("[1]"), f"{CHECKSUMS} cannot be read"),
    (lambda it: (it / CHECKSUMS).write_text("{"), f"{CHECKSUMS} cannot be read"),
    (old(lambda it: os.truncate(it / "tensors.safetensors", 100)), "SafetensorError"),
    (old(lambda it: (it / "tensors.safetensors").unlink()), "No such file"),
    (old(lambda it: (it / "state.json").write_text("{")), "state.json is damaged"),
    (old(lambda it: (it / "state.json").write_text("[]")), "state.json is damaged"),
    (old(lambda it: edit(it / "state.json", lambda state: state.pop("cursor"))), "'cursor'"),
    (old(lambda it: edit(it / "state.json", lambda state: state.pop("policy"))), "'policy'"),
    (old(lambda it: edit(it / "state.json", lambda state: state.pop("random"))), "'random'"),
    (old(lambda it: edit(it / "state.json", lambda state: state.update(cursor={"young": [3]}))), "state.json"),
]


QUICK = (0, 3, 5, 8, 11, 15)  # one of each kind; the others are slow


@pytest.mark.parametrize(
    ("damage", "said"),
    [one if i in QUICK else pytest.param(*one, marks=pytest.mark.slow) for i, one in enumerate(DAMAGES)],
)
def test_the_newest_whole_checkpoint_is_gone_on_from(whole: Path, run: Path, damage: Damage, said: str):
    damage(run_folder.path_of(run, 6))
    console = Console(file=io.StringIO(), width=500)
    assert launch(RECIPE, [f"out={run}"], True, False, console) == 0
    told = console.file.getvalue()
    assert "the checkpoint of step 6 is damaged" in told
    assert said in told
    assert "going on after step 4 of 7" in told
    same(whole, run)
    assert [path.name for path in run.glob("checkpoints/*damaged*")] == ["step-000006.damaged-1"]


def test_two_damaged_ones_are_passed_over(whole: Path, run: Path):
    for step in (4, 6):
        flip(run_folder.path_of(run, step) / "tensors.safetensors")
    assert train(run) == 0
    same(whole, run)


def test_without_a_whole_checkpoint_nothing_is_touched(run: Path):
    for step in run_folder.steps(run):
        flip(run_folder.path_of(run, step) / "tensors.safetensors")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"has no whole checkpoint: that of step 6 is damaged .*; that of step 4 is damaged"):
        train(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_old_checkpoints_without_checksums_are_gone_on_from(whole: Path, run: Path):
    for step in run_folder.steps(run):
        unseal(run_folder.path_of(run, step))
    assert train(run) == 0
    same(whole, run)


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "run")
    flip(run_folder.path_of(tmp_path / "run", 7) / "model" / "model.safetensors")
    assert train(tmp_path / "run") == 0
    same(whole, tmp_path / "run")


def test_a_model_is_taken_from_the_newest_whole_checkpoint(run: Path):
    flip(run_folder.path_of(run, 6) / "tensors.safetensors")
    assert run_folder.model_folder(run, "last")[1] == 6, "the optimizer is not asked for"
    flip(run_folder.path_of(run, 6) / "model" / "model.safetensors")
    with pytest.warns(UserWarning, match="step-000006 is damaged .*: taking the checkpoint of step 4"):
        assert run_folder.model_folder(run, "last") == (run_folder.path_of(run, 4) / "model", 4)
    for step in (2, 4):
        flip(run_folder.path_of(run, step) / "model" / "config.json")
    with pytest.raises(ValueError, match="no whole checkpoint is left"):
        run_folder.model_folder(run, "last")


@pytest.mark.parametrize("name", ["evaluation-before.json", "evaluation-after.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str):
    assert train(tmp_path, "sft.steps=1", "rl.steps=1", recipe=STAGES) == 0
    (tmp_path / "2-rl" / name).write_text('{"mean@2": 0.5,')
    with pytest.raises(ValueError, match=f"{name} is damaged .*: delete it"):
        train(tmp_path, recipe=STAGES)


def test_a_stage_whose_last_checkpoint_is_damaged_is_finished_again(tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole, "rl.steps=1", recipe=STAGES) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "2-rl")
    flip(run_folder.path_of(cut / "1-sft", 4) / "model" / "model.safetensors")
    assert train(cut, recipe=STAGES) == 0
    for stage in ("1-sft", "2-rl"):
        same(whole / stage, cut / stage)


# disks


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # as tokenizers raises it
        ValueError("[Errno 28] No space left on device"),
    ],
)
def test_a_full_disk_is_known_whoever_meets_it(tmp_path: Path, error: Exception):
    async def full(part: Path) -> dict:
        (part / "some").write_text("of it")
        raise error

    with pytest.raises(OSError, match=r"cannot save step 3 in .*No space left on device.*there is no earlier checkpoint[.] Free space"):
        asyncio.run(checkpoint.write_files(tmp_path, 3, full, {"pending": None}))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_fault_of_a_program_is_none_of_the_disk(tmp_path: Path):
    async def wrong(part: Path) -> dict:
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        asyncio.run(checkpoint.write_files(tmp_path, 3, wrong, {"pending": None}))


# what the last bits depend on


def test_another_numerical_environment_is_said(run: Path, monkeypatch: pytest.MonkeyPatch):
    saved = run_folder.state_of(run_folder.path_of(run, 6))["numerics"]
    assert {"torch", "processor", "kernels", "threads", "engine", "float32 products"} <= saved.keys()
    console = Console(file=io.StringIO(), width=500)
    assert launch(RECIPE, [f"out={run}", "steps=8"], True, False, console) == 0
    assert "last bits" not in console.file.getvalue()
    monkeypatch.setenv("RAMULUS_NATIVE", "0")
    assert launch(RECIPE, [f"out={run}", "steps=9", "threads=2"], True, False, console) == 0
    (said,) = [line for line in console.file.getvalue().splitlines() if "last bits" in line]
    assert "not the machine or the packages of step 8" in said
    assert "threads was 1, is now 2" in said
    assert "RAMULUS_NATIVE was not set, is now 0" in said
    assert "torch was" not in said


# rewards that draw


@pytest.fixture(scope="module")
def lucky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lucky") / "run"
    assert train(out, recipe=DRAWING) == 0
    return out


@pytest.mark.parametrize("step", [2, 4])
def test_a_reward_that_draws_goes_on_bit_for_bit(lucky: Path, tmp_path: Path, step: int):
    shutil.copytree(lucky, tmp_path / "run")
    for later in run_folder.steps(lucky):
        if later > step:
            shutil.rmtree(run_folder.path_of(tmp_path / "run", later))
    assert train(tmp_path / "run", recipe=DRAWING) == 0
    same(lucky, tmp_path / "run")


@pytest.mark.parametrize(("owner", "name"), [(Rollouts, "get"), (Trainer, "evaluate")])
def test_what_was_drawn_for_abandoned_work_is_drawn_again(
    lucky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
):
    real = getattr(owner, name)

    async def stopped(self: object, step: int, *rest: object) -> object:
        if step == 3:
            random.random(), np.random.rand(), torch.rand(3)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
        return await real(self, step, *rest)

    monkeypatch.setattr(owner, name, stopped)
    assert train(tmp_path / "run", recipe=DRAWING) == 128 + signal.SIGTERM
    monkeypatch.setattr(owner, name, real)
    assert train(tmp_path / "run", recipe=DRAWING) == 0
    same(lucky, tmp_path / "run")


def test_an_evaluation_that_is_not_repeated_changes_no_luck(tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole, "steps=2", recipe=f"{DRAWING}:evaluated") == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints")
    assert train(cut, recipe=f"{DRAWING}:evaluated") == 0
    assert metrics(cut) == metrics(whole)
    same(whole, cut)


def test_the_optimizer_may_be_kept_in_the_last_checkpoint_alone(tmp_path: Path):
    """The older ones hold a model that is read, smaller than before; a run goes on from the last one alone, bit for bit."""
    run = tmp_path / "run"
    assert train(run, "keep_optimizer=false", "steps=6") == 0
    *older, last = run_folder.steps(run)
    assert older
    for step in older:
        path = run_folder.path_of(run, step)
        assert not (path / "tensors.safetensors").exists()
        assert run_folder.wrong_with(path) == ""
        assert load_model(path / "model")
    assert (run_folder.path_of(run, last) / "tensors.safetensors").exists()
    assert train(tmp_path / "other", "steps=6") == 0
    assert train(tmp_path / "other", "steps=7") == train(run, "steps=7") == 0
    same(tmp_path / "other", run)


def test_nothing_goes_on_from_a_model_alone(run: Path):
    for step in run_folder.steps(run)[:-1]:
        keep_model_alone(run_folder.path_of(run, step))
    flip(run_folder.path_of(run, 6) / "tensors.safetensors")
    with pytest.raises(ValueError, match=r"that of step 6 is damaged .*; that of step 4 holds the model alone \(keep_optimizer=false\)"):
        train(run)
    keep_model_alone(run_folder.path_of(run, 4))  # again: nothing changes
    assert run_folder.wrong_with(run_folder.path_of(run, 4)) == ""


@pytest.mark.parametrize("after", ["checksums", "marker"])
def test_a_kill_while_an_optimizer_is_taken_out(run: Path, monkeypatch: pytest.MonkeyPatch, after: str):
    """What is left is a checkpoint to go on from or a model alone, never a damaged one; the next time makes it a model alone."""
    path = run_folder.path_of(run, 4)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "touch" if after == "checksums" else "iterdir", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            keep_model_alone(path)
    assert run_folder.wrong_with(path) == ""
    assert (path / "tensors.safetensors").exists()
    keep_model_alone(path)
    assert not (path / "tensors.safetensors").exists()
    assert run_folder.wrong_with(path) == ""


def load_model(folder: Path) -> bool:
    """Whether a checkpoint's model is one."""
    model, _ = Pretrained(str(folder))()
    return sum(p.numel() for p in model.parameters()) > 0
