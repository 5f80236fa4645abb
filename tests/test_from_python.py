"""`ramulus.train`: the same run as the command's, from a script, a thread or under a running event loop, with callbacks; and its Result."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import ramulus
from ramulus import Callback, CheckpointSaved, EvaluationDone, Result, StepDone, StopTraining
from ramulus.cli import main
from ramulus.core import run_folder
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.model import Pretrained
from ramulus.run.launch import launch
from run_recipe import rl
from run_stages import recipe as stages
from test_resume import RECIPE, metrics, same

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return int(stopped.value.code or 0)


class Diary(Callback):
    """Notes what happens, and acts when asked to."""

    def __init__(self, act: Any = None, at: int = 2) -> None:
        self.seen: list[str] = []
        self.act, self.at, self.ended = act, at, 0

    def on_begin(self, event: Any) -> None:
        self.seen.append(f"begin {event.step}")

    def on_step(self, event: StepDone) -> None:
        self.seen.append(f"step {event.step}")
        assert len(event.trees) == event.metrics["trees"]
        assert {tree.step for tree in event.trees} == {event.step}
        assert event.decode(event.trees[0].task.prompt)
        if self.act is not None and event.step == self.at:
            self.act()

    def on_evaluation(self, event: EvaluationDone) -> None:
        self.seen.append(f"evaluation {event.step}")
        assert event.file is not None
        assert json.loads(event.file.read_text())["greedy"] == event.scores["eval/greedy"]

    def on_checkpoint(self, event: CheckpointSaved) -> None:
        self.seen.append(f"checkpoint {event.step}")
        assert (event.folder / "model" / "config.json").is_file()

    def on_end(self, event: Any) -> None:
        self.ended += 1


def test_it_is_the_run_of_the_command_and_callbacks_see_it(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diary = Diary()
    result = ramulus.train(rl(), callbacks=[diary], out=tmp_path / "run")
    same(whole, tmp_path / "run")
    saved = sorted({2, 4, 6} | {int(word.split()[1]) for word in diary.seen if word.startswith("checkpoint")})
    assert diary.seen[:4] == ["begin 0", "step 1", "step 2", "checkpoint 2"]
    assert [word for word in diary.seen if word.startswith("evaluation")] == ["evaluation 3", "evaluation 6"]
    assert [word for word in diary.seen if word.startswith("checkpoint")] == [f"checkpoint {step}" for step in saved]
    assert diary.ended == 1
    said = capsys.readouterr().out
    assert "rl 6/6" in said
    assert "everything is in" in said
    assert [row["step"] for row in result.metrics] == [1, 2, 3, 4, 5, 6]
    assert result.metrics[0]["seconds/grow"] > 0
    assert result.best is not None
    assert result.stopped == ""


def test_nothing_is_said_where_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ramulus.train(rl(), "steps=1", out=tmp_path / "run", quiet=True)
    assert capsys.readouterr().out == ""


def test_in_a_thread_and_under_a_running_event_loop(whole: Path, tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(ramulus.train(rl(), out=tmp_path / "thread", quiet=True)))
    thread.start()
    thread.join()

    async def cell() -> Result:
        return ramulus.train(rl(), out=tmp_path / "loop", quiet=True)

    results.append(asyncio.run(cell()))
    for result in results:
        same(whole, result.folder)


def test_any_function_is_a_reward(tmp_path: Path) -> None:
    wanted = "7"
    result = ramulus.train(rl(), steps=2, rewards=lambda task, path: float(wanted in path.text), out=tmp_path / "run", quiet=True)
    tree = result.trees(step=1).trees[0]
    shown = result.trees(step=1)
    assert {leaf.reward for tree in shown.trees for leaf in tree.leaves()} == {0.0, 1.0}
    assert all((wanted in shown.decode(leaf.response())) == leaf.reward for leaf in tree.leaves())
    assert json.loads((result.folder / "run.json").read_text())["recipe"] == "ramulus.train"


def test_a_run_of_objects_says_commands_that_work_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, grader = tmp_path / "run", tmp_path / "mine.py"
    grader.write_text("def score(task, path):\n    return 1\n")
    ramulus.train(rl(), steps=1, eval_every=0, rewards=lambda task, path: 1, out=out)
    lines = capsys.readouterr().out.splitlines()
    for word, more in (("eval", ["--samples", "1"]), ("rollout", ["--width", "2"])):
        line = next(line.split(" # ")[0] for line in lines if f"ramulus {word}" in line)
        words = line.replace("FILE.py:NAME", f"{grader}:score").split()[1:]
        assert command(*words, "--limit", "1", *more) == 0
        assert command(word, out) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "it was trained from objects of Python, which no command can rebuild): name --tasks FILE and --reward FILE.py:NAME" in said
        assert command(word, out, "--tasks", "chain") == 2
        assert "rebuild): name --reward FILE.py:NAME" in " ".join(capsys.readouterr().err.split())
    assert command("train", RECIPE, f"out={out}", "--resume") == 2
    assert "go on with the same call of ramulus.train and resume=True" in capsys.readouterr().err


def test_a_callback_that_fails_is_said_once_and_changes_nothing(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Callback):
        def on_step(self, event: StepDone) -> None:
            raise KeyError(f"step [bold]{event.step}")

    diary = Diary()
    ramulus.train(rl(), callbacks=[Broken(), diary], out=tmp_path / "run")
    same(whole, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("Broken.on_step raised KeyError: 'step [bold]1'; the run goes on") == 1
    assert said.count("Broken.on_step") == 1
    assert "step 6" in diary.seen


def test_a_callback_stops_a_run_which_then_goes_on(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def enough() -> None:
        raise StopTraining("the reward <is> high")

    result = ramulus.train(rl(), callbacks=Diary(enough), out=tmp_path / "run")
    assert result.stopped == "Diary.on_step: the reward <is> high"
    assert "&lt;is&gt;" in result._repr_html_()
    assert [row["step"] for row in result.metrics] == [1, 2]
    assert "resume=True goes on" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a run already"):
        ramulus.train(rl(), out=tmp_path / "run", quiet=True)
    diary = Diary()
    assert ramulus.train(rl(), callbacks=[diary], out=tmp_path / "run", resume=True, quiet=True).stopped == ""
    assert diary.seen[:3] == ["begin 2", "evaluation 3", "step 3"]
    same(whole, tmp_path / "run")


def test_stopping_at_the_last_step_is_an_end(tmp_path: Path) -> None:
    def enough() -> None:
        raise StopTraining

    assert ramulus.train(rl(), steps=np.int64(2), seed=np.int64(0), callbacks=[Diary(enough)], out=tmp_path / "run", quiet=True).stopped == ""


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_and_is_raised(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, error: type[BaseException]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        ramulus.train(rl(), callbacks=[Diary(lambda: os.kill(os.getpid(), number))], out=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert f"stopped by {number.name}; what is saved is in {tmp_path / 'run'}: the same call with resume=True goes on" in capsys.readouterr().out
    assert run_folder.steps(tmp_path / "run") == [2]
    ramulus.train(rl(), out=tmp_path / "run", resume=True, quiet=True)
    same(whole, tmp_path / "run")


def test_a_stop_before_the_first_step_says_that_nothing_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reward(task: Any, path: Any) -> float:
        if path.length and path.text != task.text:  # not the question whether it works at all
            os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        ramulus.train(rl(), rewards=reward, out=tmp_path / "run")
    assert "nothing was saved yet" in capsys.readouterr().out


def test_the_process_is_afterwards_as_it_was(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), float(torch.rand(())))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    ramulus.train(rl(), steps=1, out=tmp_path / "run", quiet=True)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_recipe_by_name_is_gone_on_with_by_the_command(whole: Path, tmp_path: Path) -> None:
    ramulus.train(RECIPE, "steps=3", out=tmp_path / "run", quiet=True)
    assert launch(RECIPE, [f"out={tmp_path / 'run'}", "steps=6"], True, False, Console(quiet=True)) == 0
    assert len(metrics(tmp_path / "run")) == 6


def test_several_runs_are_stages(tmp_path: Path) -> None:
    first, second = stages()
    result = ramulus.train((first, replace(second, steps=1, eval_every=0, evals=second.evals)), out=tmp_path / "run", quiet=True)
    assert list(result.stages) == ["sft", "rl"]
    assert len(result.metrics_of("sft")) == 4
    assert len(result.metrics) == 1
    assert set(result.summary["stages"]) == {"sft", "rl"}


@pytest.mark.parametrize(
    ("run", "fields", "words"),
    [
        (3, {}, "train takes a Run, several, or the name or file of a recipe, got 3"),
        ((), {}, "train takes a Run, several"),
        ([rl(), "grpo"], {}, "got 'grpo'"),
        ("nonsense", {}, "there is no recipe 'nonsense'"),
        (rl(), {"learning_rate": 1e-3}, "Run has no field 'learning_rate'. Did you mean optimizer.lr"),
        (rl(), {"steps": 0}, "steps must be at least 1"),
        ([rl(), rl()], {}, "two stages of ramulus.train have the same name: rl, rl; give each one of its own"),
        (stages(), {"name": "x"}, "two stages of ramulus.train have the same name: x, x"),
        (rl(), {"callbacks": [Diary]}, r"callbacks holds the class Diary: write Diary\(\)"),
        (rl(), {"callbacks": Diary}, r"callbacks holds the class Diary: write Diary\(\)"),
        (rl(), {"callbacks": print}, "callbacks holds <built-in function print>, which has no on_begin: let its class derive from ramulus.Callback"),
        (rl(), {"callbacks": None}, "callbacks holds None"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(run: Any, fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        ramulus.train(run, out=tmp_path / "run", **fields)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_in_place_of_an_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'an override is text, as "steps=100", got Run.*several stages are one list'):
        ramulus.train(rl(), rl(), out=tmp_path / "run")  # type: ignore[arg-type]


def test_a_result_is_read_from_any_run(whole: Path, tmp_path: Path) -> None:
    result = Result(whole)
    frame = result.frame()
    assert frame.index.tolist() == [1, 2, 3, 4, 5, 6]
    assert frame["reward"].tolist() == [row["reward"] for row in result.metrics]
    model, tokenizer = result.load()
    step = int((result.best or {})["step"])
    assert next(model.parameters()).equal(next(ramulus.Pretrained(str(run_folder.path_of(whole, step) / "model"))()[0].parameters()))
    assert tokenizer("1+2").input_ids
    assert "<svg" in result.trees(limit=2)._repr_html_()
    assert "6 steps" in repr(result)
    odd = tmp_path / "<script>alert(1)<"
    odd.mkdir()
    assert "<script" not in Result(odd)._repr_html_()
    assert (Result(odd).metrics, Result(odd).summary, Result(odd).best) == ([], {}, None)


@pytest.mark.parametrize(("dtype", "warned"), [("bfloat16", True), ("float32", False)])
def test_a_stage_that_would_round_what_adapters_learned_says_so(tmp_path: Path, dtype: str, warned: bool, recwarn: pytest.WarningsRecorder):
    model, tokenizer = stages()[0].model()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = Pretrained(str(tmp_path / "model"), dtype="bfloat16")
    first, second = (replace(stage, steps=1, final_evaluation=None, model=source) for stage in stages())
    second = replace(second, model=replace(source, dtype=dtype), mix=replace(second.mix, kl_coef=0.0))
    ramulus.train((replace(first, lora=Lora(rank=2)), second), out=str(tmp_path / "run"))
    said = [str(warning.message) for warning in recwarn if "rounds them" in str(warning.message)]
    assert bool(said) == warned
    if said:
        assert said[0].endswith("set rl.model.dtype=float32")
