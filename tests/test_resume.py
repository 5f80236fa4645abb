"""A killed run goes on bit for bit; stopped runs save; broken writes and full disks leave the last checkpoint whole."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ramulus import Result
from ramulus.cli import main
from ramulus.core import run_folder
from ramulus.look.curves import find_runs
from ramulus.run import checkpoint
from ramulus.run.interrupt import Interrupt
from ramulus.run.launch import launch

HERE = Path(__file__).parent
RECIPE = str(HERE / "run_recipe.py")
STAGES = str(HERE / "run_stages.py")
ENV = os.environ | {"PYTHONPATH": str(HERE.parent / "src"), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

MEASURED = ("seconds", "cpu_seconds", "memory", "gpu")  # what differs from run to run

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


def train(out: Path, *overrides: str, recipe: str = RECIPE, resume: bool = True) -> int:
    return launch(recipe, [f"out={out}", *overrides], resume, False, Console(quiet=True))


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(MEASURED)} for line in lines]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = run_folder.path_of(folder, run_folder.steps(folder)[-1])
    return load_file(path / "model" / "model.safetensors") | load_file(path / "tensors.safetensors")


def same(one: Path, other: Path) -> None:
    """Metrics, trees, weights, optimizer and random states are equal bit for bit."""
    assert metrics(one) == metrics(other)
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    names = sorted(path.name for path in (one / "trees").iterdir())
    assert names == sorted(path.name for path in (other / "trees").iterdir())
    assert all((one / "trees" / name).read_bytes() == (other / "trees" / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out) == 0
    assert len(metrics(out)) == 6
    return out


def killed(out: Path, moment: str, number: int, recipe: str = RECIPE) -> None:
    command = [sys.executable, str(HERE / "run_killed.py"), moment, str(number), recipe, f"out={out}"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_weights_and_metrics_move(whole: Path):
    rewards = [line["reward"] for line in metrics(whole)]
    assert len(set(rewards)) > 3
    assert all(line["grad_norm"] > 0 for line in metrics(whole))


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(whole: Path, tmp_path: Path):
    killed(tmp_path / "run", "checkpoint", 3)
    assert list((tmp_path / "run" / "checkpoints").glob(".*.part"))
    assert train(tmp_path / "run") == 0
    same(whole, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.part"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("growing", 1),
        ("growing", 60),
        ("updating", 1),
        ("updating", 8),
        ("metrics", 4),
        ("checkpoint", 1),
        ("renaming", 5),
        ("pruning", 2),
    ],
)
def test_killed_at_any_moment(whole: Path, tmp_path: Path, moment: str, number: int):
    killed(tmp_path / "run", moment, number)
    assert train(tmp_path / "run") == 0
    same(whole, tmp_path / "run")


@pytest.mark.slow
def test_killed_again_and_again_through_two_stages(tmp_path: Path):
    assert train(tmp_path / "whole", recipe=STAGES) == 0
    for moment, number in (("updating", 3), ("growing", 12), ("growing", 40), ("checkpoint", 1)):
        killed(tmp_path / "run", moment, number, STAGES)
    assert train(tmp_path / "run", recipe=STAGES) == 0
    for stage in ("1-sft", "2-rl"):
        same(tmp_path / "whole" / stage, tmp_path / "run" / stage)
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "run"))
    assert one["before"] == other["before"]
    assert one["after"] == other["after"]


def start(out: Path, *overrides: str) -> subprocess.Popen[str]:
    """A run in a process of its own that has done at least one step."""
    command = [sys.executable, "-m", "ramulus.cli", "train", RECIPE, f"out={out}", *overrides]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_bytes():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals):
    long = ("steps=400", "save_every=1000", "eval_every=0", "optimizer.decay=constant")
    process = start(tmp_path / "run", *long)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name}" in out
    assert f"out={tmp_path / 'run'} --resume" in out.replace("\n", "")
    (step,) = run_folder.steps(tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == step
    assert 0 < step < 400
    more = f"steps={step + 2}"
    assert train(tmp_path / "run", more) == 0
    assert train(tmp_path / "whole", *long, more) == 0
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_in_an_evaluation_is_made_good(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    from ramulus.run.trainer import Trainer

    real = Trainer.evaluate

    async def stopped(self: Trainer, step: int) -> dict[str, float]:
        os.kill(os.getpid(), number)
        return await real(self, step)

    monkeypatch.setattr(Trainer, "evaluate", stopped)
    before = signal.signal(number, signal.SIG_DFL)  # under nohup a hang-up is ignored, and these tests may be run so
    try:
        assert train(tmp_path / "run") == 128 + number
    finally:
        signal.signal(number, before)
    assert len(metrics(tmp_path / "run")) == 2
    state = json.loads((run_folder.path_of(tmp_path / "run", 3) / "state.json").read_text())
    assert state["pending"]["trees"] > 0
    monkeypatch.setattr(Trainer, "evaluate", real)
    assert train(tmp_path / "run") == 0
    same(whole, tmp_path / "run")


def test_nohup_keeps_a_run_from_hearing_that_the_terminal_is_gone():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            interrupt.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reward_that_fails_late_loses_no_step(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ramulus.grow.grading import RewardError
    from ramulus.run.rollouts import Rollouts

    real = Rollouts.get

    async def broken(self: Rollouts, step: int, cursor: dict) -> tuple:
        found = await real(self, step, cursor)
        if step == 6:
            raise RewardError("reward 'digits' on task 'x' returned nan: it must return a finite number")
        return found

    monkeypatch.setattr(Rollouts, "get", broken)
    with pytest.raises(RewardError):
        train(tmp_path / "run")
    assert run_folder.steps(tmp_path / "run")[-1] == 5
    monkeypatch.setattr(Rollouts, "get", real)
    assert train(tmp_path / "run") == 0
    same(whole, tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing_and_more_steps_go_on(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "run")
    assert train(tmp_path / "run") == 0
    same(whole, tmp_path / "run")
    assert train(tmp_path / "run", "steps=7") == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 8))


def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real, (soft, hard) = checkpoint.write_files, resource.getrlimit(resource.RLIMIT_FSIZE)

    async def write_files(folder: Path, step: int, *rest) -> Any:
        try:
            if step == 4:  # from here on no file may grow beyond 20 kB
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            return await real(folder, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(checkpoint, "write_files", write_files)
    with pytest.raises(SystemExit) as stopped:
        main(["train", RECIPE, f"out={tmp_path / 'run'}"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("cannot save step 4") == 1
    assert "the checkpoint of step 3 is whole" in said
    assert "--resume" in said
    assert run_folder.steps(tmp_path / "run") == [2, 3]
    monkeypatch.setattr(checkpoint, "write_files", real)
    assert train(tmp_path / "run") == 0
    same(whole, tmp_path / "run")


def test_what_changed_is_said_and_what_cannot_change_is_refused(whole: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    console = Console(record=True, width=200, file=io.StringIO())
    assert launch(RECIPE, [f"out={run}", "steps=7", "mix.kl_coef=0.02"], True, False, console) == 0
    said = console.export_text()
    assert "steps was 6, is now 7" in said
    assert "mix.kl_coef was 0.01, is now 0.02" in said
    for change in ("seed=1", "model.hidden=32", "tasks.count=50", "prompt_limit=17"):
        with pytest.raises(ValueError, match=f"cannot resume: {change.split('=')[0]} was"):
            train(run, change)
    assert json.loads((run / "run.json").read_text())["overrides"] == [f"out={run}", "steps=7", "mix.kl_coef=0.02"]


def test_a_final_evaluation_that_changed_at_a_resume_is_shown_as_far_as_it_goes(tmp_path: Path):
    run = [f"out={tmp_path / 'run'}", "steps=1", "optimizer.decay=constant", "final_evaluation.samples=2", "final_evaluation.temperatures=0.5"]
    shown: list[str] = []
    for words in ([], ["final_evaluation.temperatures=0.3,0.5"], ["final_evaluation.samples=4"], ["final_evaluation.samples=4", "steps=2"]):
        console = Console(record=True, width=200, file=io.StringIO())
        assert launch(RECIPE, [*run, *words], bool(words), False, console) == 0
        shown.append(console.export_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert ("mean@2" in summary["before"], "mean@4" in summary["after"], summary["steps"]) == (True, True, {"rl": 2})
    assert all(text.count("mean@2 at temperature 1") == 1 for text in shown[:3])
    assert all("mean@2 at temperature 0.5" in text and "temperature 0.3" not in text for text in shown)
    assert "mean@4 at temperature 1" in shown[3]


@pytest.mark.parametrize(("recipe", "words", "said"), [(RECIPE, ["steps=2"], "steps=3 or more"), (STAGES, ["rl.steps=2"], "set rl.steps=3 or more")])
def test_fewer_steps_than_are_done_are_refused(tmp_path: Path, recipe: str, words: list[str], said: str):
    run = ["optimizer.decay=constant", "sft.steps=1", "rl.steps=3", "final_evaluation=none"] if recipe == STAGES else ["steps=3"]
    assert train(tmp_path / "run", *run, recipe=recipe) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"saved at step 3, beyond .*steps=2: .*{said}"):
        train(tmp_path / "run", *words, recipe=recipe)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_run_that_is_taken_further_is_not_finished_until_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ramulus.run.trainer import Trainer

    run, words = tmp_path / "run", ["optimizer.decay=constant"]
    assert train(run, "steps=1", *words) == 0
    assert find_runs([run])[0].finished
    with pytest.raises(ValueError, match="cannot resume"):
        train(run, "steps=4", "seed=1")
    assert find_runs([run])[0].finished  # nothing was begun
    real = Trainer.step

    async def stopped(self: Trainer) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return await real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        assert train(run, "steps=4") == 130
    assert not find_runs([run])[0].finished
    assert Result(run).summary == {}
    assert train(run) == 0
    assert Result(run).summary["steps"] == {"rl": 4}


@pytest.mark.parametrize("linked", ["run", "run/1-sft"])
def test_a_run_behind_a_link_is_begun_anew(tmp_path: Path, linked: str):
    recipe, words = (STAGES, ["sft.steps=1", "rl.steps=1", "final_evaluation=none"]) if "/" in linked else (RECIPE, ["steps=1"])
    (tmp_path / "room" / "place").mkdir(parents=True)
    (tmp_path / linked).parent.mkdir(exist_ok=True)
    (tmp_path / linked).symlink_to(tmp_path / "room" / "place")
    out = [f"out={tmp_path / 'run'}", *words]
    for fresh in (False, True):
        assert launch(recipe, out, False, fresh, Console(quiet=True)) == 0
    aside = tmp_path / ("room/place.1" if linked == "run" else "run.1")
    assert (aside / "summary.json").exists()
    assert (tmp_path / "run" / "summary.json").exists()
    assert not list(tmp_path.rglob(".lock"))


def test_a_kl_term_needs_the_reference_model_that_the_checkpoints_hold(tmp_path: Path):
    off = ("mix.kl_coef=0", "optimizer.decay=constant")
    assert train(tmp_path / "run", "steps=1", *off) == 0
    with pytest.raises(ValueError, match=r"mix.kl_coef was .*is now 0.5, but its checkpoints hold no reference model.*go on with mix.kl_coef=0"):
        train(tmp_path / "run", "steps=2", "mix.kl_coef=0.5")
    assert train(tmp_path / "run", "steps=2") == 0
    assert train(tmp_path / "adapted", "steps=1", *off, "lora=true") == 0  # the weights below the adapters are the reference
    assert train(tmp_path / "adapted", "steps=2", "mix.kl_coef=0.5") == 0
    assert train(tmp_path / "on", "steps=1", "optimizer.decay=constant") == 0
    assert train(tmp_path / "on", "steps=2", "mix.kl_coef=0") == 0


@pytest.mark.parametrize("where", ["here", pytest.param("apart", marks=pytest.mark.slow)])
def test_a_reward_that_draws_goes_on_bit_for_bit_wherever_the_learner_is(tmp_path: Path, where: str):
    recipe = f"{HERE / 'run_drawn.py'}:{where}"
    assert train(tmp_path / "whole", recipe=recipe) == 0
    assert train(tmp_path / "run", "steps=2", recipe=recipe) == 0
    checkpoint.seed_all(99)  # another process would begin anywhere
    assert train(tmp_path / "run", "steps=3", recipe=recipe) == 0
    same(tmp_path / "whole", tmp_path / "run")


def test_an_existing_run_is_not_overwritten(whole: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with pytest.raises(ValueError, match=r"holds a run already .saved at step 6.: add --resume"):
        launch(RECIPE, [f"out={run}"], False, False, Console(quiet=True))
    with pytest.raises(ValueError, match="exclude each other"):
        launch(RECIPE, [f"out={run}"], True, True, Console(quiet=True))
    assert launch(RECIPE, [f"out={run}", "steps=1"], False, True, Console(quiet=True)) == 0
    assert len(metrics(run)) == 1
    same(whole, tmp_path / "run.1")


def test_the_saved_recipe_reads_as_python_and_nothing_is_evaluated_from_it(whole: Path, tmp_path: Path):
    from ramulus.run.config.find import find
    from ramulus.run.config.resume import build

    text = (whole / "recipe.py").read_text()
    find(RECIPE)  # its module holds the reward of this recipe
    space: dict = {}
    exec(text, space)
    stages, _ = build(RECIPE, [f"out={whole}"])
    from ramulus.run.config.describe import to_json

    assert to_json(space["run"]) == to_json(stages[0])
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "recipe.py").write_text("raise SystemExit('this must not run')")
    assert train(run, "steps=7") == 0


@pytest.mark.slow
def test_lora_autocast_and_a_narrow_copy_go_on_bit_for_bit(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    options = str(HERE / "run_options.py")
    assert train(tmp_path / "whole", recipe=options) == 0
    killed(tmp_path / "run", "updating", 6, options)
    assert train(tmp_path / "run", recipe=options) == 0
    same(tmp_path / "whole", tmp_path / "run")
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path / "run"))
    net = AutoModelForCausalLM.from_pretrained(run_folder.path_of(tmp_path / "run", 4) / "model")
    assert not [name for name, _ in net.named_parameters() if "lora" in name]
